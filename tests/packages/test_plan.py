"""What goes into packages, and how they are written."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from kernelgen import save, targets
from kernelgen.cli import app
from kernelgen.config import Capabilities
from kernelgen.errors import FileError, TargetError
from kernelgen.generate import generate_walk
from kernelgen.ir import formats
from kernelgen.packages import plan as planning
from kernelgen.packages import write
from kernelgen.problem import row_bucket
from kernelgen.targets.package import Arithmetic, spelt
from kernelgen.tuner import cache, device, lookup, space
from kernelgen.tuner.problems import MatmulProblem
from tests.packages import making
from tests.packages.making import PACKAGED, ROOT, contents, planned


def run(*arguments: object, code: int = 0) -> Result:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == code, f"{result.output}\n{result.exception!r}"
    return result


def error_of(*arguments: object) -> str:
    lines = run("build", "--package", *arguments, code=1).stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


def test_every_target_but_one_has_packages() -> None:
    found = [t.name for t in targets.targets() if write.packageable(t) is None]
    assert sorted(found) == sorted(PACKAGED)
    with pytest.raises(TargetError, match="without --package"):
        write.contents(planning.plan(targets.get("numpy"), (formats.get("q8_0"),), ("matvec",)))


@pytest.mark.parametrize("target", PACKAGED)
def test_files_are_the_same_every_time(target: str) -> None:
    """Without dates and paths of the machine that made them."""
    planned.cache_clear()
    again = write.contents(planned(target, "q4_K", "f16"))
    assert again == contents(target, "q4_K", "f16")
    for name, content in again.items():
        assert isinstance(content, str)
        found = re.search(r"/tmp/|/home/|/work/|/root/|\b20[2-9]\d-\d\d-\d\d\b", content)
        assert str(ROOT) not in content and found is None, (name, found)
        assert content.endswith("\n") or not content, name


@pytest.mark.parametrize("target", PACKAGED)
def test_rules_name_kernels_that_are_there(target: str) -> None:
    made = contents(target, "q4_K", "f16")
    entries = {e["entry"]: e for e in json.loads(str(made["manifest.json"]))["kernels"]}
    rules = json.loads(str(made["dispatch.json"]))["rules"]
    assert {r["format"] for r in rules} == {"q4_K", "f16"}
    for rule in rules:
        seen = 0
        for one in rule["choices"]:
            entry = entries[one["kernel"]]
            assert entry["op"] == rule["op"] and entry["format"] == rule["format"]
            assert entry["precision"] in ("fp32", rule["precision"]) or rule["precision"] == "auto"
            assert set(entry["needs"].values()) <= entries.keys()
        # every M has a kernel that needs no feature that a device may lack
        first = rule["choices"][0]["m"][0]
        while seen < rule["choices"][-1]["m"][1]:
            here = [
                one["m"][1] for one in rule["choices"]
                if one["m"][0] <= max(first, seen + 1) <= one["m"][1]
                and (not entries[one["kernel"]]["features"] or target == "c")
            ]  # fmt: skip
            assert here or target in ("metal", "cuda"), (rule["format"], rule["precision"], seen)
            if not here:
                break
            seen = max(here)
    for e in entries.values():
        assert any(name.endswith(e["file"]) for name in made), e["file"]


def test_only_what_a_model_needs(tmp_path: Path) -> None:
    import numpy as np

    import kernelgen

    path = tmp_path / "model.gguf"
    w = kernelgen.quantize(np.ones((4, 256), np.float32), "q5_K")
    save(path, {"a.weight": w, "norm": np.ones(256, np.float32)})
    out = tmp_path / "dist"
    run("build", "--package", "--target", "metal", "--model", path, "--out", out)
    rules = json.loads((out / "metal" / "dispatch.json").read_text())["rules"]
    assert {r["format"] for r in rules} == {"q5_K"}


def test_tuned_configurations_have_names_of_their_own() -> None:
    plan = planned("opencl", "q4_K", tuned=True)
    assert len({k.entry for k in plan.kernels}) == len(plan.kernels)
    tuned = {p.kernel for rule in plan.rules for p in rule.points}
    for kernel in plan.kernels:
        assert re.search(rf"\b{kernel.entry}\b", kernel.source)
        if kernel.entry in tuned:
            plain = generate_walk(kernel.walk, kernel.format, plan.target)
            assert kernel.config != plain.config
            assert kernel.source.replace(kernel.entry, plain.entry) == (
                generate_walk(kernel.walk, kernel.format, plan.target, kernel.config).source
            )


def test_rules_are_those_of_kernelgen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a package chooses is what `kernelgen.matmul` does, with winners in the cache."""
    monkeypatch.setenv("KERNELGEN_CACHE", str(tmp_path / "cache"))
    target, fmt = targets.get("opencl"), formats.get("q4_K")
    runtime = target.runtime()
    if runtime.available():
        pytest.skip(str(runtime.available()))
    described = runtime.describe()  # which compiles a kernel each time
    monkeypatch.setattr(type(runtime), "describe", lambda self: described)
    # as a device that has what defaults assume, so that defaults are the same
    monkeypatch.setattr(type(runtime), "capabilities", lambda self: target.capabilities)
    for number, (m, n, k, _) in enumerate(making.TUNED):
        for precision in ("fp32", "auto"):
            problem = MatmulProblem(fmt, m, n, k, precision=precision)
            legal = space.explore(target, target.capabilities, problem).legal
            one = legal[(97 * number + 13) % len(legal)]
            key = cache.Key(
                problem.op, fmt.name, precision, target.name, tuple(problem.sizes.items()),
                device.of(target, runtime), space.walk_hash(one.walk, fmt, target),
            )  # fmt: skip
            cache.append(cache.Entry(
                key, one.walk.name, one.precision, one.config.as_dict(), 1e-3, time=str(number)
            ))  # fmt: skip
    plan = planning.plan(target, (fmt,), ("quantize", "matvec", "matmul"))
    assert sum(len(rule.points) for rule in plan.rules) >= 2 * len(making.TUNED)
    write.write(write.contents(plan), tmp_path / "package")
    package = making.imported(monkeypatch, tmp_path / "package", "kernelgen_opencl")
    kernels = {k.entry: k for k in plan.kernels}
    for m in (1, 2, 4, 9, 70, 128, 200):
        for n in (200, 512, 3000, 20000):
            for k in (256, 1024, 8192):
                for precision in ("fp32", "auto", "int8"):
                    bucket = row_bucket(m)
                    want = lookup.choose(target, runtime, fmt, precision, (bucket, n, k))
                    got = kernels[package.choose("q4_K", precision, m, n, k)]
                    assert (got.walk.name, got.config) == (want.walk.name, want.config), (
                        m, n, k, precision, want.why,
                    )  # fmt: skip


def test_capabilities_change_defaults_not_names() -> None:
    plan = planned("c", "q4_K")
    few, many = plan.defaults(Capabilities(8, 16)), plan.defaults(Capabilities(16, 32))
    assert [k.entry for k in few] == [k.entry for k in many]
    assert few != many


def test_expressions_in_other_languages() -> None:
    words = Arithmetic("({a} div {b})", "ceil({a}, {b})", "least({a}, {b})")
    assert spelt("min(-(-M * (K // 256) // 64), 65535)", words) == (
        "least(ceil((M * (K div 256)), 64), 65535)"
    )
    assert spelt("-(-N // 64) * -(-M // 16)", words) == "(ceil(N, 64) * ceil(M, 16))"
    for wrong in ("M - N", "f(M)", "-M", "M / 2"):
        with pytest.raises(ValueError):
            spelt(wrong, words)


# ---- files -----------------------------------------------------------------------------------


def test_a_folder_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    made = contents("triton", "q8_0", ops=("matvec",))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("all my work")
    with pytest.raises(FileError, match="is not empty and holds no package"):
        write.write(made, tmp_path / "mine")
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.txt"]
    (tmp_path / "a file").write_text("")
    with pytest.raises(FileError, match="could not be written"):
        write.write(made, tmp_path / "a file" / "deeper")


def test_an_older_package_is_replaced(tmp_path: Path) -> None:
    folder, made = tmp_path / "package", contents("triton", "q8_0", ops=("matvec",))
    assert len(write.write({**made, "old/kernel.py": "gone\n"}, folder)) == len(made) + 2
    (folder / "notes.txt").write_text("of the user")
    changed = {p.relative_to(folder).as_posix() for p in write.write(made, folder)}
    assert changed == {"files.txt", "old/kernel.py"}
    assert (folder / "notes.txt").exists() and not (folder / "old" / "kernel.py").exists()
    assert write.write(made, folder) == []
    (tmp_path / "outside").write_text("")
    (folder / "files.txt").write_text("../outside\n")
    with pytest.raises(FileError, match="outside"):
        write.write(made, folder)
    assert (tmp_path / "outside").exists()


# ---- mistakes --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--target", "abacus"], ["abacus", "opencl"]),
        (["--target", "numpy", "--format", "q8_0"], ["numpy", "without --package"]),
        (["--target", "c", "--layout", "tarball"], ["tarball", "huggingface"]),
        (["--target", "opencl", "--layout", "huggingface"], ["opencl", "huggingface"]),
        (["--target", "opencl", "--arch", "sm_80"], ["opencl", "sm_80"]),
        (["--target", "metal", "--arch", "sm_80"], ["sm_80", "metallib"]),
        (["--target", "c", "--check"], ["--check"]),
    ],
    ids=" ".join,
)
def test_a_mistake_is_answered_in_one_sentence(
    arguments: list[str], words: list[str], tmp_path: Path
) -> None:
    sentence = error_of("--format", "q8_0", "--out", tmp_path / "dist", *arguments)
    assert [word for word in words if word not in sentence] == []
    assert not (tmp_path / "dist").exists()


def test_missing_compilers_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    common = ("--format", "q8_0", "--op", "matvec", "--out", tmp_path / "dist")
    assert "nvcc is not on the path" in error_of("--target", "cuda", "--arch", "sm_80", *common)
    assert "xcrun is not on the path" in error_of(
        "--target", "metal", "--arch", "metallib", *common
    )
    run("build", "--package", "--target", "cuda,metal", *common)
    for target, word in (("cuda", "nvcc"), ("metal", "xcrun")):
        assert word in (tmp_path / "dist" / target / "README.md").read_text()


def test_options_of_packages_want_a_package() -> None:
    for option in (("--layout", "huggingface"), ("--arch", "sm_80")):
        assert "--package" in run("build", *option, code=1).stderr

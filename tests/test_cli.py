"""The command line: what each command prints, writes and answers to mistakes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from typer.testing import CliRunner, Result

import kernelgen
from kernelgen import bench, verify
from kernelgen import targets as target_list
from kernelgen.cli import app, terminal
from kernelgen.errors import TargetError
from kernelgen.ir.block import BlockFormat
from kernelgen.ir.expr import where
from kernelgen.targets.base import OPS
from kernelgen.targets.c import runtime as c_runtime
from kernelgen.verify_epilogue import KINDS

ROOT = Path(__file__).resolve().parent.parent
RNG = np.random.default_rng(0)

COMMANDS = list(typer.main.get_command(app).commands)  # type: ignore[attr-defined]


def run(*arguments: object, code: int = 0, **environment: str) -> Result:
    """The outcome of a command line; fails unless it exits with `code`."""
    result = CliRunner().invoke(app, [str(a) for a in arguments], env=environment or None)
    assert result.exit_code == code, f"{result.output}\n{result.exception!r}"
    return result


def json_of(*arguments: object, code: int = 0) -> Any:
    """What a command prints as JSON, which has to be all of its stdout."""
    return json.loads(run(*arguments, "--json", code=code).stdout)


def error_of(*arguments: object) -> str:
    """The one sentence on stderr that a mistake is answered with."""
    result = run(*arguments, code=1)
    lines = result.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), result.stderr
    return lines[0]


@pytest.fixture
def unpackable() -> Iterator[BlockFormat]:
    """A registered format of which neighbouring codes are not decoded alike."""
    fmt = BlockFormat(
        name="unpackable", block=32, group=32, nbytes=34,
        fields={"d": "f16", "qs": "u8[32]"},
        code=lambda b, i: b.qs[i] & where(i % 3 < 1, 15, 7),
        scale=lambda b, g: b.d,
    )  # fmt: skip
    yield kernelgen.register_format(fmt)
    kernelgen.unregister_format("unpackable")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A GGUF file with floats that can be quantized, and tensors that cannot."""
    path = tmp_path / "model.gguf"
    tensors = {
        "big.weight": RNG.standard_normal((64, 256), np.float32),
        "half.weight": RNG.standard_normal((2, 4, 256), np.float32).astype(np.float16),
        "odd.weight": RNG.standard_normal((4, 100), np.float32),
        "norm.weight": np.ones(256, np.float32),
        "done.weight": kernelgen.quantize(RNG.standard_normal((8, 256), np.float32), "q8_0"),
    }
    tokens = [f"token{n}" for n in range(1000)]
    kernelgen.save(path, tensors, {"general.name": "small", "tokens": tokens, "long": "x" * 500})
    return path


# ---- the whole --------------------------------------------------------------------------------


def test_help_names_every_command() -> None:
    assert [c for c in COMMANDS if not re.search(rf"\b{c}\b", run("--help").stdout)] == []


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str) -> None:
    assert "Usage" in run(command, "--help").stdout


def test_version() -> None:
    assert kernelgen.__version__ in run("--version").stdout


def test_wrong_usage_is_not_an_error_of_ours() -> None:
    assert "error:" not in run("nonsense", code=2).stderr
    assert "error:" not in run("show", "matvec", code=2).stderr


# ---- mistakes ---------------------------------------------------------------------------------

MISTAKES: dict[str, tuple[list[str], list[str]]] = {
    "format": (["list", "--format", "q9_9"], ["q9_9", "q4_K", "mxfp4"]),
    "target": (["list", "--target", "abacus"], ["abacus", *target_list.NAMES]),
    "op": (["verify", "--op", "divide"], ["divide", *verify.OPS]),
    "op of show": (["show", "divide", "q4_K"], ["divide", "matvec"]),
    "precision": (["show", "matvec", "q4_K", "--precision", "fp3"], ["fp3", "fp32", "int8"]),
    "config name": (["show", "matvec", "q4_K", "--config", "speed=9"], ["speed", "columns"]),
    "config value": (["show", "matvec", "q4_K", "--config", "columns=99"], ["99", "columns in 1"]),
    "config text": (["show", "matvec", "q4_K", "--config", "columns"], ["columns=4"]),
    "no such kernel": (["show", "matvec", "f32", "--precision", "int8"], ["f32", "floats"]),
    "nothing to decode": (["show", "quantize", "q4_K", "--ir"], ["decodes nothing", "matvec"]),
    "nothing is fused": (
        ["show", "get_rows", "q4_K", "--epilogue", "bias"], ["get_rows", "matvec"],
    ),
    "several are fused": (["show", "matvec", "q4_K", "--epilogue", "all"], ["one of them"]),
    "precision of attention": (
        ["show", "attention", "q8_0", "--precision", "fp3"], ["fp3", "fp16"],
    ),
    "columns": (["accuracy", "--columns", "256,²"], ["256,²", "256,4096"]),
    "nothing to time": (["bench", "--target", "metal", "--shape", "1x8x256"], ["metal", "devices"]),
    "variant": (["verify", "--isa", "sse9"], ["sse9", "scalar"]),
    "variant of a target": (["build", "--target", "numpy", "--isa", "sse9"], ["sse9", "none"]),
    "nothing to verify": (
        ["verify", "--target", "numpy", "--format", "f32", "--op", "quantize"], ["no kernel"],
    ),
    "shape": (["bench", "--shape", "1x2"], ["1x2", "MxNxK"]),
    "empty shape": (["bench", "--shape", "0x8x256"], ["0x8x256", "MxNxK"]),
    "shape and format": (["bench", "--shape", "1x8x100"], ["100", "256"]),
    "missing file": (["inspect", "/nowhere.gguf"], ["/nowhere.gguf", "does not exist"]),
    "missing array": (
        ["quantize", "/nowhere.npy", "out.gguf", "--format", "q4_K"], ["/nowhere.npy"],
    ),
    "missing folder": (
        ["quantize", "/nowhere.npy", "/nowhere/out.gguf", "--format", "q4_K"], ["/nowhere/out"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES, ids=str)
def test_a_mistake_is_answered_in_one_sentence(mistake: str) -> None:
    arguments, words = MISTAKES[mistake]
    sentence = error_of(*arguments)
    assert [word for word in words if word not in sentence] == []


def test_too_little_memory_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernelgen.api, "open", lambda _: np.empty(1 << 57))
    sentence = error_of("inspect", tmp_path)
    assert "memory does not suffice" in sentence and "EiB" in sentence


@pytest.mark.parametrize(
    "command",
    [("inspect",), ("build", "--model"), ("accuracy", "--model"), ("tune",), ("plan",),
     ("run", "-p", "x"), ("quantize", "--format", "q4_K", "out.gguf")],
    ids=lambda command: command[0],
)  # fmt: skip
def test_a_truncated_file_is_one_sentence(
    command: tuple[str, ...], model: Path, tmp_path: Path
) -> None:
    short = tmp_path / "short.gguf"
    short.write_bytes(model.read_bytes()[:300])
    name, *options = command
    given = (*command, short) if options == ["--model"] else (name, short, *options)
    assert "short.gguf is truncated" in error_of(*given)


def test_debug_shows_the_traceback() -> None:
    result = run("--debug", "list", "--target", "abacus", code=1)
    assert isinstance(result.exception, TargetError)


def test_an_error_of_the_system_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device", "/some/file")

    monkeypatch.setattr(kernelgen.api, "open", full)
    assert error_of("inspect", tmp_path) == "error: /some/file: No space left on device"


def test_interruption(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(kernelgen.api, "open", interrupt)
    run("inspect", "x.gguf", code=130)


# ---- list, devices ----------------------------------------------------------------------------


def test_list_shows_formats_ops_and_precisions() -> None:
    text = run("list", "--target", "numpy", "--format", "Q4_k,f32").stdout
    (row,) = [line for line in text.splitlines() if line.split()[:1] == ["q4_K"]]
    assert row.split()[:2] == ["q4_K", "4.5"] and "run int8 fp32" in row
    assert "q5_K" not in text
    assert "none for quantize f32: elements of f32 are floats" in text


def test_list_for_programs() -> None:
    cells = json_of("list", "--target", "numpy", "--format", "q4_K", "--format", "f32")
    by_place = {(c["op"], c["format"]): c for c in cells}
    assert by_place["matvec", "q4_K"]["precisions"] == ["int8", "fp32"]
    assert by_place["matvec", "q4_K"]["how"] == "run"
    assert by_place["matvec", "f32"]["precisions"] == ["fp32"]
    assert by_place["quantize", "f32"]["how"] == "none"
    assert "floats" in by_place["quantize", "f32"]["reason"]


def test_list_marks_what_is_decoded_lane_by_lane(unpackable: BlockFormat) -> None:
    text = run("list", "--target", "c", "--format", "unpackable,q4_0").stdout
    rows = {line.split()[0]: line for line in text.splitlines() if line.strip()}
    assert "run* int8 fp32" in rows["unpackable"] and "*" not in rows["q4_0"]
    assert "* unpackable: decoded lane by lane" in text


def test_list_gives_the_reason_where_a_target_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(c_runtime, "find_compiler", lambda: "no compiler was found")
    text = run("list", "--target", "c", "--format", "q4_0").stdout
    assert "none: no compiler was found" in text and "run" not in text.split("none", 1)[1]
    (cell, *_) = json_of("list", "--target", "c", "--format", "q4_0")
    assert cell["how"] == "none" and cell["reason"] == "no compiler was found"


def test_devices() -> None:
    found = {one["target"]: one for one in json_of("devices")}
    assert list(found) == list(target_list.NAMES)
    for one in found.values():
        assert one["available"] == (one["reason"] is None) == bool(one["devices"])
    text = run("devices").stdout
    assert all(name in text for name in found)
    assert found["numpy"]["devices"][0]["numpy"] == np.__version__ and np.__version__ in text


def test_devices_says_why_one_is_not_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(c_runtime, "find_compiler", lambda: "no compiler was found")
    assert "no compiler was found" in run("devices").stdout


def test_variants_in_the_manifest_are_those_of_the_runtime() -> None:
    assert target_list.get("c").variants == tuple(isa.name for isa in c_runtime.ISAS)


# ---- show -------------------------------------------------------------------------------------


def test_show_prints_the_source_and_nothing_else() -> None:
    for op in ("dequantize", "MatVec"):
        shown = run("show", op, "Q4_K", "--target", "numpy").stdout
        assert shown == kernelgen.source(op.lower(), "q4_K", "numpy")


def test_show_takes_precision_and_configuration() -> None:
    options = ("--precision", "fp32", "--config", "columns=2", "--config", "layout=native")
    shown = run("show", "matmul", "q4_0", "--target", "c", *options).stdout
    config = {"columns": 2, "layout": "native"}
    assert shown == kernelgen.source("matmul", "q4_0", "c", config, "fp32")


def test_show_has_every_op() -> None:
    for op in OPS:
        name = {"map": "silu", "rows": "softmax"}.get(op, "q8_0")
        able = [one for one in target_list.targets() if op in {w.op for w in one.walks}]
        assert able, op
        for one in able:
            text = run("show", op, name, "--target", one.name).stdout
            assert f"Generated by kernelgen {kernelgen.__version__}" in text, (op, one.name)


def test_show_takes_an_epilogue() -> None:
    shown = run("show", "matvec", "q4_K", "--target", "c", "--epilogue", "swiglu").stdout
    kernel = kernelgen.kernel("matvec", "q4_K", "c", precision="int8", fused=KINDS["swiglu"])
    assert shown == kernel.source


def test_show_paints_on_a_terminal() -> None:
    shown = run("show", "matvec", "q4_0", "--target", "c", FORCE_COLOR="1", COLUMNS="40").stdout
    assert "\x1b[" in shown
    plain = re.sub(r"\x1b\[[0-9;]*m", "", shown)
    assert plain.rstrip() == kernelgen.source("matvec", "q4_0", "c", precision="int8").rstrip()


def test_show_ir_has_every_stage() -> None:
    text = run("show", "matvec", "q4_K", "--target", "c", "--ir").stdout
    assert "code(i), 0..15" in text
    for stage in (
        "described                  (qs[32 * (i // 64) + i % 32] >> (4 * (i // 32 % 2))) & 15",
        "i = 32 * g + 4 * j + lane  (qs[g // 2 * 32 + j * 4 + lane] >> (g % 2 * 4)) & 15",
        "packed                     (word(qs, g // 2 * 8 + j) >> (g % 2 * 4)) & 0x0F0F0F0F",
        "word(scales, 0) & 0x3F3F3F3F",
        "scale(g)",
        "described  d * f32(sc(g))",
        "-(dmin * f32(mn(g)))",
        "in matvec of target c",
    ):
        assert stage in text


def test_show_ir_says_where_a_bias_moved() -> None:
    text = run("show", "matvec", "mxfp4", "--target", "c", "--ir").stdout
    assert "code(i), -12..12" in text and "packed codes are code(i) +12" in text


def test_show_ir_of_a_walk_that_does_not_pack() -> None:
    text = run("show", "dequantize", "q4_K", "--target", "numpy", "--ir").stdout
    assert "described" in text and "packed" not in text and "code(i), 0..15" in text


def test_show_ir_says_what_is_decoded_lane_by_lane(unpackable: BlockFormat) -> None:
    text = run("show", "matvec", "unpackable", "--target", "c", "--ir").stdout
    assert "lane by lane, because lanes take different branches" in text


@pytest.mark.parametrize("fmt", kernelgen.formats())
@pytest.mark.parametrize("op", ["dequantize", "matvec"])
def test_show_ir_of_every_format(op: str, fmt: str) -> None:
    for target in ("numpy", "c"):
        assert (
            f"in {op} of target {target}" in run("show", op, fmt, "--target", target, "--ir").stdout
        )


# ---- build ------------------------------------------------------------------------------------


def build(out: Path, *more: object, code: int = 0) -> Result:
    return run("build", "--target", "c", "--format", "q4_0", "--out", out, *more, code=code)


def test_build_writes_and_checks(tmp_path: Path) -> None:
    folder = tmp_path / "c"
    assert "manifest.json" in build(tmp_path).stdout
    listed = json.loads((folder / "manifest.json").read_text())["kernels"]
    assert {k["format"] for k in listed} == {"q4_0"}
    assert all((folder / k["file"]).exists() for k in listed)
    assert "no files changed" in build(tmp_path).stdout
    assert "all up to date" in build(tmp_path, "--check").stdout

    (folder / listed[0]["file"]).write_text("stale")
    (folder / listed[1]["file"]).unlink()
    (folder / "old.c").touch()
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    result = build(tmp_path, "--check", code=1)
    for state, name in (
        ("stale", listed[0]["file"]), ("missing", listed[1]["file"]), ("left over", "old.c")
    ):  # fmt: skip
        assert re.search(rf"{state} +{re.escape(str(folder / name))}", result.stdout)
    assert "error:" in result.stderr
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}
    assert "not of this build" in build(tmp_path).stdout


def test_build_for_programs(tmp_path: Path) -> None:
    arguments = ("build", "--target", "numpy,c", "--format", "q4_0", "--out", tmp_path)
    for one, target in zip(json_of(*arguments), ("numpy", "c"), strict=True):
        assert (
            one["target"] == target and str(tmp_path / target / "manifest.json") in one["written"]
        )
    assert all(one["written"] == [] for one in json_of(*arguments))
    (tmp_path / "c" / "manifest.json").unlink()
    checked = json_of(*arguments, "--check", code=1)
    assert checked[1]["stale"] == [str(tmp_path / "c" / "manifest.json")]


def test_build_for_one_op_brings_what_it_needs(tmp_path: Path) -> None:
    build(tmp_path, "--op", "matvec")
    kernels = json.loads((tmp_path / "c" / "manifest.json").read_text())["kernels"]
    assert {k["op"] for k in kernels} == {"matvec", "prepare"}


def test_build_for_a_model(tmp_path: Path, model: Path) -> None:
    run("build", "--target", "numpy", "--model", model, "--out", tmp_path)
    kernels = json.loads((tmp_path / "numpy" / "manifest.json").read_text())["kernels"]
    weights = {k["format"] for k in kernels if k["op"] != "attention"}
    assert weights == {"f32", "f16", "q8_0"}  # norm.weight is no matrix
    arguments = ("build", "--model", model, "--format", "q4_K", "--out", tmp_path)
    assert "q8_0" in error_of(*arguments)


def test_build_for_an_instruction_set_takes_its_capabilities(tmp_path: Path) -> None:
    columns = {}
    for isa in ("avx2", "avx512"):
        build(tmp_path / isa, "--isa", isa, "--op", "matmul")
        kernels = json.loads((tmp_path / isa / "c" / "manifest.json").read_text())["kernels"]
        rows = [k["config"] for k in kernels if k["op"] == "matmul" and "columns" in k["config"]]
        columns[isa] = [config["columns"] for config in rows]
    assert max(columns["avx2"]) < min(columns["avx512"])


# ---- verify -----------------------------------------------------------------------------------

FEW = ("--format", "q4_0", "--op", "dequantize,matvec")


def test_verify_prints_errors() -> None:
    text = run("verify", "--target", "numpy", "--format", "q4_0").stdout
    rows = [line.split() for line in text.splitlines()]
    assert ["run", "q4_0", "matvec", "int8"] in [row[1:5] for row in rows]
    assert all(row[-1] == "ok" for row in rows if row[:1] == ["numpy"])
    assert "none failed" in text


def test_verify_for_programs() -> None:
    results = json_of("verify", "--target", "c", *FEW)
    assert {(r["op"], r["precision"]) for r in results} == {
        ("dequantize", ""), ("matvec", "int8"), ("matvec", "fp32"),
    }  # fmt: skip
    assert all(r["ok"] and r["error"] <= r["bound"] for r in results)


def test_verify_fails_where_a_kernel_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "check", lambda *_: float("inf"))
    result = run("verify", "--target", "numpy", *FEW, code=1)
    assert "FAILED" in result.stdout and "3 failed" in result.stdout
    for one in json_of("verify", "--target", "numpy", *FEW, code=1):
        assert not one["ok"] and one["problem"] and one["error"] is None  # JSON has no infinity


def test_verify_takes_an_instruction_set_and_all_configurations() -> None:
    arguments = ("--isa", "scalar", "--format", "q8_0", "--op", "matvec")
    (default, *_) = json_of("verify", *arguments)
    assert default["target"] == "c" and default["ok"]
    text = run("verify", "--target", "numpy", *FEW, "--all-configs").stdout
    assert "none failed" in text


def test_verify_leaves_out_targets_that_are_not_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target_list, "NAMES", ("numpy", "c"))
    monkeypatch.setattr(c_runtime, "find_compiler", lambda: "no compiler was found")
    result = run("verify", "--format", "q4_0", "--op", "dequantize")
    assert "target c is left out: no compiler was found" in result.stderr
    assert "numpy" in result.stdout
    assert "no compiler was found" in error_of("verify", "--target", "c", "--format", "q4_0")


# ---- bench ------------------------------------------------------------------------------------


def test_bench_measures_what_was_asked_for() -> None:
    shapes = ("--shape", "1x64x256", "--shape", "9x64x256")
    arguments = ("bench", "--target", "numpy", "--format", "q4_0", *shapes, "--repeats", 1)
    measured = json_of(*arguments)
    assert [(one["m"], one["n"], one["k"]) for one in measured] == [(1, 64, 256), (9, 64, 256)]
    for one in measured:
        assert one["fused"] >= one["fused_best"] > 0 and one["numpy"] >= one["numpy_best"] > 0
        assert one["ratio"] == pytest.approx(one["numpy"] / one["fused"])
        assert one["gflop_per_s"] == pytest.approx(2e-9 * one["m"] * 64 * 256 / one["fused"])
    text = run(*arguments).stdout
    assert "1 x 64 x 256" in text and "times faster" in text and np.__version__ in text


def test_bench_says_that_the_machine_is_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ("bench", "--target", "numpy", "--shape", "1x8x256", "--repeats", 1)
    for load, said in ((0.0, False), (1000.0, True)):
        monkeypatch.setattr(os, "getloadavg", lambda load=load: (load, load, load))
        assert ("busy" in run(*arguments).stderr) == said


def test_compare_takes_turns() -> None:
    calls: list[str] = []

    def note(name: str) -> Callable[[], None]:
        return lambda: calls.append(name)

    times = bench.compare({"a": note("a"), "b": note("b")}, 2, burst=0, pause=0)
    assert calls == ["a", "b", *"aa", *"bb", *"bb", *"aa"]  # in a turn, the first is not timed
    assert {name: len(timing.samples) for name, timing in times.items()} == {"a": 2, "b": 2}


def test_compare_calls_for_as_long_as_it_is_told() -> None:
    times = bench.compare({"a": lambda: time.sleep(0.002)}, 1, burst=0.02, pause=0)
    assert 2 <= len(times["a"].samples) <= 10
    assert 0.002 <= times["a"].minimum <= times["a"].median < 0.02


# ---- quantize, inspect ------------------------------------------------------------------------


def test_quantize_a_model(tmp_path: Path, model: Path) -> None:
    out = tmp_path / "out.gguf"
    text = run("quantize", model, out, "--format", "Q4_k").stdout
    before, after = kernelgen.open(model), kernelgen.open(out)
    formats = {name: w.format.name for name, w in after.items()}
    assert formats == {
        "big.weight": "q4_K", "half.weight": "q4_K", "odd.weight": "f32", "norm.weight": "f32",
        "done.weight": "q8_0",
    }  # fmt: skip
    for name in ("odd.weight", "norm.weight", "done.weight"):
        assert after[name] == before[name]
    for key in ("general.name", "tokens", "long"):
        assert after.metadata[key] == before.metadata[key]
        assert after.metadata.types[key] == before.metadata.types[key]
    for words in ("100 columns, no multiple of 256", "no matrix", "q8_0 already", "%"):
        assert words in text


def test_quantize_reports_the_error_it_made(tmp_path: Path, model: Path) -> None:
    out = tmp_path / "out.gguf"
    report = json_of("quantize", model, out, "--format", "q4_0")
    by_name = {one["name"]: one for one in report["tensors"]}
    exact, got = kernelgen.open(model)["big.weight"], kernelgen.open(out)["big.weight"]
    difference = got.dequantize() - exact.dequantize()
    error = np.sqrt(np.mean(difference**2) / np.mean(exact.dequantize() ** 2))
    assert by_name["big.weight"]["error"] == pytest.approx(error, rel=1e-5)
    assert by_name["big.weight"]["bytes_after"] == got.nbytes
    assert by_name["done.weight"]["error"] is None and by_name["done.weight"]["because"]


def test_quantize_an_array_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from kernelgen.cli import tensors

    monkeypatch.setattr(tensors, "_CHUNK", 1000)  # 3 rows at once of 10
    x, out = RNG.standard_normal((2, 5, 256)), tmp_path / "out.gguf"
    np.save(tmp_path / "x.npy", x)
    run("quantize", tmp_path / "x.npy", out, "--format", "q5_0", "--name", "a.weight")
    found = kernelgen.open(out)
    assert list(found) == ["a.weight"] and found["a.weight"].shape == (2, 5, 256)
    assert found["a.weight"] == kernelgen.quantize(x, "q5_0")


def test_quantize_weighs_errors_by_importance(tmp_path: Path) -> None:
    x, weights, out = RNG.standard_normal((8, 256), np.float32), np.ones(256), tmp_path / "o.gguf"
    weights[::2] = 100
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "w.npy", weights)
    arguments = ("quantize", tmp_path / "x.npy", out, "--format", "q4_0")
    run(*arguments, "--importance", tmp_path / "w.npy")
    assert kernelgen.open(out)["weight"] == kernelgen.quantize(x, "q4_0", weights)
    np.save(tmp_path / "w.npy", weights[:100])
    assert "256" in error_of(*arguments, "--importance", tmp_path / "w.npy")


def test_quantize_refuses_what_it_cannot_read(tmp_path: Path, model: Path) -> None:
    array, out = tmp_path / "x.npy", tmp_path / "out.gguf"

    def refused(*more: object) -> str:
        return error_of("quantize", array, out, "--format", "q4_0", *more)

    array.write_bytes(b"nonsense")
    assert "numpy.save" in refused()
    np.save(array, np.arange(64))
    assert "int64" in refused()
    np.save(array, np.ones((4, 100), np.float32))
    assert "100" in refused()
    np.save(array, np.full((4, 32), np.nan, np.float32))
    assert "weight" in refused() and "nan" in refused()
    assert "--name" in error_of("quantize", model, out, "--format", "q4_0", "--name", "x")
    assert not out.exists()


def test_inspect(model: Path) -> None:
    text = run("inspect", model).stdout
    assert re.search(r"big\.weight +64 x 256 +f32 +65\.5 kB", text)
    assert "1000 values: 'token0', 'token1'" in text and "token999" not in text
    assert "x" * 50 in text and "x" * 100 not in text
    found = json_of("inspect", model)
    assert len(found["metadata"]["tokens"]) == 1000 and found["metadata"]["long"] == "x" * 500
    assert found["tensors"][0] == {
        "name": "big.weight", "shape": [64, 256], "format": "f32", "bytes": 65536,
    }  # fmt: skip


def test_tensors_of_unknown_types_are_named(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = kernelgen.open(model)
    found.skipped["strange.weight"] = "IQ1_S"
    monkeypatch.setattr(kernelgen.api, "open", lambda path: found)
    assert "strange.weight is in IQ1_S" in run("inspect", model).stdout
    sentence = error_of("quantize", model, tmp_path / "out.gguf", "--format", "q4_0")
    assert "strange.weight (IQ1_S)" in sentence
    result = run("build", "--target", "numpy", "--model", model, "--out", tmp_path)
    assert "strange.weight is in IQ1_S" in result.stderr


# ---- text -------------------------------------------------------------------------------------


def test_json_is_valid_whatever_is_in_it() -> None:
    strange = {
        "a": [float("nan"), float("inf"), 1.5], "b": b"\xff", "c": np.float32(2), "d": np.int64(3),
        "e": (True, None),
    }  # fmt: skip
    assert terminal.as_json(strange) == {
        "a": [None, None, 1.5], "b": "\\xff", "c": 2.0, "d": 3, "e": [True, None],
    }  # fmt: skip


def test_names_may_be_repeated_and_listed() -> None:
    assert terminal.split_names(["a, b", "b", "", "c,"]) == ["a", "b", "c"]
    assert terminal.pick_ops(["matvec,DEQUANTIZE"], verify.OPS) == ("dequantize", "matvec")


# ---- as users run it --------------------------------------------------------------------------


def process(*arguments: str, **more: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "kernelgen", *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, **more,
    )  # fmt: skip


def test_a_process_prints_its_result() -> None:
    one = process("show", "dequantize", "q4_0", "--target", "numpy")
    out, err = one.communicate(timeout=60)
    assert (one.returncode, err) == (0, "")
    assert out == kernelgen.source("dequantize", "q4_0", "numpy")


def test_a_process_answers_a_mistake() -> None:
    one = process("inspect", "pyproject.toml")
    out, err = one.communicate(timeout=60)
    assert (one.returncode, out) == (1, "")
    assert err.startswith("error: pyproject.toml is not a GGUF file") and err.count("\n") == 1


def test_a_process_whose_reader_leaves_is_quiet() -> None:
    one = process("show", "matvec", "q6_K", env={**os.environ, "PYTHONUNBUFFERED": "1"})
    assert one.stdout is not None and one.stderr is not None
    one.stdout.close()
    assert one.stderr.read() == ""
    assert one.wait(timeout=60) == 1


def test_a_process_can_be_interrupted() -> None:
    one = process(
        "verify", "--target", "numpy",
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell may ignore it
    )  # fmt: skip
    assert one.stdout is not None
    assert "target" in one.stdout.readline()
    one.send_signal(signal.SIGINT)
    _, err = one.communicate(timeout=60)
    assert one.returncode == 130
    assert "Traceback" not in err

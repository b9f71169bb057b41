"""The C library: every instruction set of this machine in one binary, and hosts that link it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kernelgen.ir import formats
from kernelgen.targets.c.package import ALL, ASKED_FOR
from kernelgen.targets.c.runtime import cpu_features
from tests.packages import making
from tests.packages.making import (
    BEST,
    EXAMPLES,
    HERE,
    ROOT,
    commands,
    environment,
    in_checkout,
    run,
    written,
)

HOME = BEST.machines
OPS = ("dequantize", "get_rows", "matvec", "matmul")
BUILT = (*HERE, *(isa.name for isa in ASKED_FOR if isa.needs <= cpu_features()))


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package with kernels for tuned shapes, and its library."""
    folder = written(tmp_path_factory.mktemp("c"), "c", "q4_K", tuned=True, ops=OPS)
    made = folder / "libkernelgen.so"
    done = subprocess.run(
        ["sh", str(folder / "build.sh"), str(made)], capture_output=True, text=True, check=False,
        env=environment(CFLAGS="-Wall -Wextra -Werror -O2", JOBS="2", ISAS=" ".join(BUILT)),
    )  # fmt: skip
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return made


@pytest.fixture
def package(library: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("KERNELGEN_LIBRARY", str(library))
    return making.imported(monkeypatch, library.parent, "kernelgen_c")


def test_the_best_instruction_set_is_taken(package: Any) -> None:
    assert package.isa() == BEST.name


@pytest.mark.parametrize("isa", HERE)
def test_multiplies(isa: str, package: Any) -> None:
    """One binary, each instruction set."""
    package.use_isa(isa)
    try:
        shapes = ((1, 5, 256), (3, 37, 768), (9, 33, 256), (40, 18, 512))
        used = making.multiplies(package, "q4_K", shapes)
        assert {re.sub(r"_columns.*|_prefetch.*|_share.*", "", one) for one in used} == {
            f"kernelgen_{op}_q4_K_{p}" for op in ("matvec", "matmul") for p in ("fp32", "int8")
        }
        making.decodes(package, "q4_K", 37, 512)
    finally:
        package.use_isa(BEST.name)


def test_matrix_units_are_for_programs_that_ask(package: Any) -> None:
    """Nothing else takes them, as the system has to be asked for them."""
    (amx,) = (isa for isa in ASKED_FOR if isa.name == "amx")
    many, few = (40, 64, 512), (16, 64, 512)
    vectors = "kernelgen_matmul_q4_K_int8"
    assert package.choose("q4_K", "int8", *many) == vectors
    if amx.needs - cpu_features():
        with pytest.raises(ValueError, match="instruction set"):
            package.use_isa("amx")
        pytest.skip("this CPU has no AMX, or the system keeps it")
    package.use_isa("amx")
    try:
        assert package.isa() == "amx"
        assert package.choose("q4_K", "int8", *many) == f"{vectors}_tiles"
        assert package.choose("q4_K", "int8", *few) == vectors
        used = making.multiplies(package, "q4_K", (many, (17, 37, 768), (200, 18, 256)))
        assert {f"{vectors}_tiles", "kernelgen_matmul_q4_K_bf16_tiles"} <= used
    finally:
        package.use_isa(BEST.name)


@pytest.mark.slow
def test_all_instruction_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of this architecture, optimized, and formats of all kinds."""
    names = ("f16", "iq4_nl")
    folder = written(tmp_path, "c", *names)
    made = folder / "libkernelgen.so"
    run(f"sh build.sh {made}", folder, ISAS="")
    monkeypatch.setenv("KERNELGEN_LIBRARY", str(made))
    package = making.imported(monkeypatch, folder, "kernelgen_c")
    for isa in ALL:
        if isa.needs <= cpu_features() and (not isa.machines or isa.machines == HOME):
            package.use_isa(isa.name)
            for name in names:
                block = formats.get(name).block
                shapes = (
                    (1, 5, block),
                    (3, 37, 3 * block),
                    (9, 33, block),
                    (40, 18, 512 // block * block),
                )
                making.multiplies(package, name, shapes)
                making.decodes(package, name, 37, 2 * block)


def test_mistakes(package: Any) -> None:
    making.refuses(package, "q4_K")
    with pytest.raises(ValueError, match="instruction set"):
        package.use_isa("z80")
    with pytest.raises(ValueError, match="instruction set"):
        package.use_isa("neon")  # known, but not in this library
    assert package.isa() == BEST.name


def test_tuned_shapes_are_for_their_instruction_set(package: Any) -> None:
    """The made-up ones are for AVX2."""
    if "avx2" not in BEST.needs:
        pytest.skip("this CPU has no AVX2")
    shape = (1, 4000, 4096)
    if BEST.name != "avx2":
        assert package.choose("q4_K", "fp32", *shape) == "kernelgen_matvec_q4_K_fp32"
    package.use_isa("avx2")
    try:
        tuned = package.choose("q4_K", "fp32", *shape)
        assert tuned.startswith("kernelgen_matvec_q4_K_fp32_")
        assert package.choose("q4_K", "fp32", 3, *shape[1:]) == "kernelgen_matvec_q4_K_fp32"
        assert tuned in making.multiplies(package, "q4_K", [(1, 1024, 1024)], ("fp32",))
    finally:
        package.use_isa(BEST.name)


def test_chooses_like_the_data(package: Any, library: Path) -> None:
    """dispatch.json, read by a few lines of Python, says what the library does."""
    import json

    rules = json.loads((library.parent / "dispatch.json").read_text())["rules"]
    for rule in rules:
        for m in (1, 2, 8, 9, 100, 10**6):
            if (m <= 8) == (rule["op"] == "matvec"):
                # far from all that was tuned
                found = package.choose(rule["format"], rule["precision"], m, 64, 256)
                assert found == rule["choices"][0]["kernel"]


ALONE = """
import sys
sys.path[:0] = sys.argv[1:4]
import multiply
multiply.main("kernelgen_c")
assert [m for m in sys.modules if m.split(".")[0] in ("kernelgen", "jinja2", "typer")] == []
"""


def test_python_with_numpy_alone(library: Path, tmp_path: Path) -> None:
    """No site-packages: numpy, the package, and the example."""
    packages = Path(np.__file__).parent.parent
    for name in ("numpy", "numpy.libs"):
        if (packages / name).exists():
            (tmp_path / name).symlink_to(packages / name)
    run = subprocess.run(
        [sys.executable, "-I", "-S", "-c", ALONE, str(tmp_path), str(library.parent / "python"),
         str(EXAMPLES / "python")],
        env=os.environ | {"KERNELGEN_LIBRARY": str(library)}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("error") == 6


def test_exact_kernels_do_not_fuse(library: Path) -> None:
    """Decoding is bit-exact, whatever flags are given: nothing in it is a fused multiply-add."""
    if shutil.which("objdump") is None:
        pytest.skip("there is no objdump on the path; on Debian: apt-get install binutils")
    text = subprocess.run(
        ["objdump", "-d", str(library)], capture_output=True, text=True, check=True
    ).stdout
    found = {}
    for part in text.split("\n\n"):
        head = re.match(r"[0-9a-f]+ <(kernelgen_(\w+?)_q4_K\w*_avx2(?:\.\w+)*)>:", part.strip())
        if head:
            found[head[1]] = (head[2], "vfmadd" in part)
    if not found:
        pytest.skip("this machine has no AVX2 part")
    assert not any(fused for op, fused in found.values() if op in ("dequantize", "get_rows"))


def test_every_instruction_set_has_its_sources() -> None:
    made = making.contents("c", "q4_K", ops=OPS)
    cmake, script = str(made["kernels.cmake"]), str(made["build.sh"])
    for isa in ALL:
        assert f"KERNELGEN_FLAGS_{isa.name} {' '.join(isa.flags)}" in cmake
        assert f'add {isa.name} "{" ".join(isa.flags)}"' in script
    listed = set(re.findall(r"^  (src/\S+)$", cmake, re.M))
    assert listed == {n for n in made if re.fullmatch(r"src/(table|\w+/\w+)\.c", n)}


# ---- hosts -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_example_in_c(checkout: Path) -> None:
    """What its README says: with CMake, and without."""
    lines = commands(checkout / "examples" / "c-library" / "README.md")
    with_cmake = [s for s in lines if s.startswith("cmake")]
    if shutil.which("cmake") is None:
        lines = [s for s in lines if s not in with_cmake]
    outputs = [in_checkout(checkout, line, CMAKE_BUILD_PARALLEL_LEVEL="2") for line in lines]
    assert "error" in outputs[-1]
    if shutil.which("cmake") is None:
        pytest.skip("there is no cmake on the path; without it the example ran")
    assert any("matvec_q8_0_fp32: error" in text for text in outputs[:-2])
    if shutil.which("pkg-config"):
        (found,) = (checkout / "prefix").rglob("kernelgen.pc")
        flags = in_checkout(
            checkout, "pkg-config --cflags --libs kernelgen", PKG_CONFIG_PATH=str(found.parent)
        )
        in_checkout(checkout, f"cc examples/c-library/main.c {flags.strip()} -lm -o by-pkg-config")
        said = in_checkout(checkout, "./by-pkg-config", LD_LIBRARY_PATH=str(found.parent.parent))
        assert "error" in said


@pytest.mark.slow
def test_one_line_compiles_for_this_machine(checkout: Path) -> None:
    in_checkout(
        checkout, "kernelgen build --package --target c --format q8_0 --op matvec,dequantize"
        " --out dist"
    )  # fmt: skip
    line = next(s for s in commands(checkout / "dist/c/README.md") if s.startswith("cc "))
    run(line, checkout / "dist" / "c")
    said = in_checkout(
        checkout, "cc -Idist/c/include examples/c-library/main.c dist/c/libkernelgen.so -lm"
        " -Wl,-rpath,dist/c -o example && ./example"
    )  # fmt: skip
    assert said.count("native, ") == 2


@pytest.mark.slow
def test_pip_installs_it(checkout: Path) -> None:
    """Without isolation, so that no registry is asked for setuptools."""
    lines = commands(EXAMPLES / "python" / "README.md")
    assert lines[1] == "pip install ./dist/c"
    in_checkout(checkout, lines[0])
    in_checkout(
        checkout, f"{lines[1]} --no-build-isolation --no-deps --no-index --target site"
    )  # fmt: skip
    said = in_checkout(checkout, lines[2], PYTHONPATH=str(checkout / "site"))
    assert said.count("error") == 6


@pytest.mark.slow
def test_example_in_rust(checkout: Path) -> None:
    """The C library from Rust, which compiles it; and the same rules for a GPU."""
    if shutil.which("cargo") is None:
        pytest.skip("there is no cargo on the path; https://rustup.rs has it")
    lines = commands(EXAMPLES / "rust" / "README.md")
    said = [in_checkout(checkout, line, CARGO_NET_OFFLINE="true") for line in lines][-1]
    assert said.count("error") == 2 and f"{BEST.name}, " in said
    assert "a GPU would run kernelgen_matvec_q4_K_int8_columns_4 on 16 x 1 groups" in said


def test_example_in_opencl(checkout: Path) -> None:
    from kernelgen import targets

    reason = targets.get("opencl").runtime().available()
    if reason:
        pytest.skip(reason)
    said = [in_checkout(checkout, line) for line in commands(EXAMPLES / "opencl" / "README.md")]
    assert "kernelgen_matvec_q8_0_fp32 on" in said[-1]


def test_commands_of_the_page_are_run(checkout: Path) -> None:
    """Each is of an example's README, whose lines the tests above run, or is run here."""
    page = (ROOT / "docs" / "embedding.md").read_text("utf-8")
    starts = ("kernelgen build", "cmake", "cc ", "sh ", "pip", "python", "cargo", "mkdir")
    found = [s for s in re.findall(r"^    (\S.*)$", page, re.M) if s.startswith(starts)]
    known = {line for one in EXAMPLES.glob("*/README.md") for line in commands(one)}
    (new,) = (line for line in found if line not in known)
    in_checkout(checkout, new)
    for name in ("c", "cuda", "metal"):
        assert (checkout / "dist" / f"{name}-huggingface" / "build.toml").exists()
    assert len(found) >= 15

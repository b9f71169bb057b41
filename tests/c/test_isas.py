"""Every instruction set against the numpy reference.  Compilers must have nothing to warn of."""

from __future__ import annotations

import hashlib
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from kernelgen import targets
from kernelgen.config import RowTileConfig
from kernelgen.generate import generate
from kernelgen.ir import formats
from kernelgen.targets.c.compiler import HEADERS, find_compiler
from kernelgen.targets.c.runtime import ISAS, Isa, isa_named, native_isa, runtime
from kernelgen.verify import OPS, verify_one
from tests.c.machines import ALL_FORMATS, ISA_NAMES, SOME_FORMATS, arm, here, problems, strict

SIMDE = Path(__file__).with_name("avx512_simde.h")

#: matmul is matvec under another name, get_rows is dequantize of some rows
FEW_OPS = ("dequantize", "quantize", "matvec")


def test_the_manifest_lists_what_the_runtime_has() -> None:
    assert targets.get("c").variants == ISA_NAMES


def test_the_best_is_chosen() -> None:
    assert native_isa() in ISAS
    assert runtime().isa is native_isa()
    assert runtime().available() is None


def test_formats_of_all_kinds_are_known() -> None:
    assert set(SOME_FORMATS) < set(ALL_FORMATS)


@pytest.mark.parametrize("fmt", SOME_FORMATS)
def test_best_instruction_set(fmt: str) -> None:
    assert problems(here(native_isa()), [fmt]) == []


@pytest.mark.parametrize("name", [name for name in ISA_NAMES if name != native_isa().name])
@pytest.mark.parametrize("fmt", ["q4_K", "q8_0", "mxfp4", "f16"])
def test_instruction_set(fmt: str, name: str) -> None:
    assert problems(here(isa_named(name)), [fmt], FEW_OPS) == []


def test_another_machine_is_named() -> None:
    other = "neon" if "x86_64" in native_isa().machines else "avx2"
    assert "this machine is" in str(runtime(other).available())


@pytest.mark.parametrize("name", ["q4_K", "q8_0"])
def test_arm(name: str) -> None:
    assert problems(arm("neondot", "max"), [name], FEW_OPS) == []


# ---- everything -----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("command", ["clang", "gcc"])
@pytest.mark.parametrize("fmt", ALL_FORMATS)
@pytest.mark.parametrize("name", ISA_NAMES)
def test_all(name: str, fmt: str, command: str, compiled_by: Callable[[str], None]) -> None:
    compiled_by(command)
    assert problems(here(isa_named(name)), [fmt]) == []


@pytest.mark.slow
@pytest.mark.parametrize("fmt", ["q4_K", "q8_0", "f16"])
@pytest.mark.parametrize("name", [native_isa().name, "scalar"])
def test_every_value(name: str, fmt: str) -> None:
    """Each number of columns in each layout, and else each value of a configuration by itself."""
    runtime, target = here(isa_named(name)), targets.get("c")
    caps, seen = runtime.capabilities(), 0
    for walk in target.walks:
        if walk.config is not RowTileConfig or walk.accepts(formats.get(fmt)) is not None:
            continue
        default = walk.config.default(caps).as_dict()
        for config in walk.config.space():
            other = {n for n, value in config.as_dict().items() if value != default[n]}
            alone = other <= {"columns", "layout"} or len(other) == 1
            if alone and walk.refuses(config, formats.get(fmt), caps) is None:
                seen += 1
                result = verify_one(target, runtime, formats.get(fmt), walk, config)
                assert result.ok, (config, result.problem)
    assert seen >= 40


@pytest.mark.slow
@pytest.mark.parametrize("fmt", ALL_FORMATS)
@pytest.mark.parametrize(
    ("isa", "cpu"),
    [("neondot", "max"), ("neondot", "cortex-a76"), ("neon", "cortex-a53"), ("scalar", "max")],
)
def test_all_on_arm(isa: str, cpu: str, fmt: str) -> None:
    assert problems(arm(isa, cpu), [fmt]) == []


@pytest.mark.slow
def test_a_cpu_without_dot_products_needs_other_words() -> None:
    """The emulator of a CPU is as strict as the CPU."""
    found = problems(arm("neondot", "cortex-a53"), ["q8_0"], ["matvec"])
    assert found
    assert "exit -4" in found[0] or "exit 132" in found[0]  # illegal instruction


@pytest.mark.slow
@pytest.mark.parametrize("fmt", ALL_FORMATS)
@pytest.mark.parametrize("vnni", [False, True], ids=["avx512", "avx512vnni"])
def test_avx512_on_machines_without_it(
    vnni: bool, fmt: str, compiled_by: Callable[[str], None]
) -> None:
    compiled_by("clang")  # gcc takes minutes for each kernel
    header = Path("/usr/include/simde/x86/avx512.h")
    if not header.exists():
        pytest.skip("SIMDe is not installed: apt-get install libsimde-dev")
    here(isa_named("avx2"))
    assert problems(strict(simde(vnni)), [fmt], OPS) == []


def simde(vnni: bool) -> Isa:
    """AVX-512 in terms of AVX2."""
    return Isa(
        name="avx512-simde",
        machines=isa_named("avx2").machines,
        needs=isa_named("avx2").needs,
        flags=(
            *isa_named("avx2").flags, f'-DKERNELGEN_AVX512="{SIMDE.name}"', f"-I{SIMDE.parent}",
            "-Wno-psabi", f"-DTEXT_OF_HEADER={hashlib.sha256(SIMDE.read_bytes()).hexdigest()}",
            *(["-DKERNELGEN_VNNI"] if vnni else []),
        ),
        capabilities=isa_named("avx512").capabilities,
    )  # fmt: skip


# ---- which words ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "lanes", "products"),
    [
        ("", 4, 4),
        ("-mavx2", 4, 4),  # AVX2 without the conversion of halves
        ("-mf16c", 4, 4),
        ("-mavx2 -mf16c", 8, 2),
        ("-mavxvnni -mf16c", 8, 4),
        ("-mavx512f -mavx2 -mf16c", 8, 2),  # no bytes in AVX512F alone
        ("-mavx512f -mavx512vnni -mavx2 -mf16c", 8, 2),
        ("-mavx512bw", 16, 2),
        ("-mavx512bw -mavx512vnni", 16, 4),
        ("-march=x86-64-v3", 8, 2),
        ("-march=x86-64-v4", 16, 2),
        ("-march=x86-64-v4 -DKERNELGEN_SCALAR", 4, 4),
    ],
)
def test_words_follow_the_flags(options: str, lanes: int, products: int) -> None:
    """Also flags that nobody would give: those of the words must all be there."""
    found = find_compiler()
    if isinstance(found, str) or "x86_64" not in native_isa().machines:
        pytest.skip("no compiler for x86 here")
    check = f'_Static_assert(LANES == {lanes} && PARTIAL_PRODUCTS == {products}, "words");'
    kernel = generate("matvec", formats.get("q8_0"), targets.get("c"), precision="int8")
    command = [*found.command, "-Werror", "-fsyntax-only", "-xc", "-", f"-I{HEADERS}"]
    for text in (f'#include "words.h"\n{check}\n', kernel.source):
        done = subprocess.run(
            [*command, *options.split()], input=text, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr

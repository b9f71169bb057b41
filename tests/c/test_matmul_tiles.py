"""Matmul on the tiles of matrix units against the reference: on AMX where the CPU has it, and
everywhere in plain C, which stands in for the instructions."""

from __future__ import annotations

import subprocess
from collections.abc import Callable

import numpy as np
import pytest

from kernelgen import targets
from kernelgen.config import Capabilities, RowTileConfig
from kernelgen.generate import generate_walk
from kernelgen.ir import formats
from kernelgen.problem import tolerance
from kernelgen.targets.base import Runtime, Walk
from kernelgen.targets.c.compiler import HEADERS, find_compiler
from kernelgen.targets.c.runtime import isa_named, native_isa
from kernelgen.tensor import QuantTensor
from kernelgen.verify import check, random_blocks
from tests.c.machines import ALL_FORMATS, find_clang, here
from tests.c.programs import ProgramRuntime
from tests.c.test_attention_tiles import STAND_INS, machine, stand_in
from tests.c.test_memory import SANITIZERS

WALKS = tuple(w for w in targets.get("c").walks if (w.op, w.style) == ("matmul", "tiles"))
#: rows of activations and of weights, and blocks: one, parts of tiles, pairs and of what is decoded
SHAPES = ((1, 1, 1), (9, 37, 3), (33, 16, 9), (70, 65, 17))


def problems(runtime: Runtime, name: str, walk: Walk, **config: int) -> list[str]:
    """What is wrong with a walk for a format, by shape."""
    fmt = formats.get(name)
    if walk.accepts(fmt) is not None:
        return []
    chosen = walk.config.from_dict(config)
    assert walk.refuses(chosen, fmt, runtime.capabilities()) is None
    kernel = generate_walk(walk, fmt, targets.get("c"), chosen)
    bound = tolerance(walk.op, walk.precision)
    found = {s: check(kernel, runtime, *s[:2], s[2] * fmt.block) for s in SHAPES}
    return [f"{walk.name} {name} {s}: {e:.3g}" for s, e in found.items() if not e <= bound]


@pytest.mark.parametrize("walk", WALKS, ids=lambda walk: walk.precision)
@pytest.mark.parametrize("fmt", ["q4_K", "q8_0", "mxfp4", "f16"])
def test_amx(fmt: str, walk: Walk) -> None:
    assert problems(machine("amx"), fmt, walk, rows=32) == []


@pytest.mark.parametrize("walk", WALKS, ids=lambda walk: walk.precision)
@pytest.mark.parametrize("isa", STAND_INS)
def test_stand_ins(isa: str, walk: Walk) -> None:
    assert problems(machine(isa), "q4_K", walk, rows=32) == []


def test_a_cpu_with_tiles_takes_them() -> None:
    """In matmul, where sums are of elements enough."""
    target = targets.get("c")
    with_tiles, without = (isa_named(n).capabilities for n in ("amx", "avx512vnni"))

    def style(op: str, fmt: str, precision: str, caps: object) -> str:
        return target.serve(op, formats.get(fmt), precision, caps).style  # type: ignore[arg-type]

    assert style("matmul", "q4_K", "int8", with_tiles) == "tiles"
    assert style("matmul", "f16", "bf16", with_tiles) == "tiles"
    assert style("matvec", "q4_K", "int8", with_tiles) == ""
    assert style("matmul", "q4_K", "int8", without) == ""
    assert target.walk("matmul", formats.get("q4_K"), "int8").config is RowTileConfig


def test_many_rows_are_multiplied_in_bfloat16_where_the_choice_is_free() -> None:
    target = targets.get("c")
    with_tiles, without = (isa_named(n).capabilities for n in ("amx", "avx512vnni"))

    def precision(asked: str, caps: Capabilities, rows: int, fmt: str = "q4_K") -> str:
        return target.serve("matmul", formats.get(fmt), asked, caps, rows).precision

    assert precision("auto", with_tiles, 64) == "bf16"
    assert precision("auto", with_tiles, 32) == "int8"
    assert precision("bf16", with_tiles, 1) == "bf16"
    assert precision("int8", with_tiles, 512) == "int8"
    assert precision("auto", without, 512) == "int8"
    assert precision("auto", with_tiles, 512, "f16") == "fp32"  # int8 is not what it stands for


@pytest.mark.parametrize("walk", WALKS, ids=lambda walk: walk.precision)
@pytest.mark.parametrize("scale", [0x7FFF, 0xFE01, 0x7C00])
def test_scales_that_are_no_numbers(scale: int, walk: Walk) -> None:
    """A NaN of any payload stays one where rounding adds to its bits; and so does infinity, of
    which codes of both signs make NaN."""
    fmt = formats.get("q4_0")
    blocks = random_blocks(fmt, 16, 4 * fmt.block).copy()
    blocks[5, fmt.nbytes : fmt.nbytes + 2] = (scale & 255, scale >> 8)
    w = QuantTensor(fmt, (16, 4 * fmt.block), blocks)
    y = np.zeros((3, 16), np.float32)
    x = np.ones((3, 4 * fmt.block), np.float32)
    machine("amx").matmul(generate_walk(walk, fmt, targets.get("c")))(x, w, y)
    assert np.isnan(y[:, 5]).all() if scale != 0x7C00 else not np.isfinite(y[:, 5]).any()
    assert np.isfinite(np.delete(y, 5, axis=1)).all()


@pytest.mark.parametrize(
    ("options", "plain"),
    [
        ("", 1),
        ("-mamx-int8 -mamx-bf16", 1),  # tiles alone: vectors do not round to bfloat16
        ("-march=x86-64-v4 -mamx-int8 -mamx-bf16", 1),
        ("-march=x86-64-v4 -mamx-int8 -mavx512bf16", 1),
        ("-march=x86-64-v4 -mamx-int8 -mamx-bf16 -mavx512bf16", 0),
        ("-march=sapphirerapids", 0),
        ("-march=sapphirerapids -DKERNELGEN_SCALAR", 1),
    ],
)
def test_words_follow_the_flags(options: str, plain: int) -> None:
    """Also flags that nobody would give: those of the words must all be there."""
    found = find_compiler()
    if isinstance(found, str) or "x86_64" not in native_isa().machines:
        pytest.skip("no compiler for x86 here")
    check = f'#include "words_tiles.h"\n#if {plain} != !defined(tile_load)\n#error words\n#endif\n'
    kernel = generate_walk(WALKS[0], formats.get("q8_0"), targets.get("c"))
    command = [*found.command, "-std=gnu11", "-Werror", "-fsyntax-only", "-xc", "-"]
    for text in (check, kernel.source):
        done = subprocess.run(
            [*command, f"-I{HEADERS}", *options.split()], input=text, capture_output=True,
            text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr


# ---- everything -------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("walk", WALKS, ids=lambda walk: walk.precision)
@pytest.mark.parametrize("fmt", ALL_FORMATS)
@pytest.mark.parametrize("isa", ["amx", *STAND_INS])
def test_all(isa: str, fmt: str, walk: Walk) -> None:
    assert problems(machine(isa), fmt, walk) == []


@pytest.mark.slow
@pytest.mark.parametrize("walk", WALKS, ids=lambda walk: walk.precision)
@pytest.mark.parametrize("fmt", ["q4_K", "q8_0", "q6_K", "f16"])
def test_every_configuration(fmt: str, walk: Walk) -> None:
    for config in walk.config.space():
        values = config.as_dict()
        assert problems(machine("amx"), fmt, walk, **values) == [], values


@pytest.mark.slow
def test_gcc(compiled_by: Callable[[str], None]) -> None:
    compiled_by("gcc")
    for walk in WALKS:
        assert problems(machine("amx"), "q4_K", walk) == []


@pytest.mark.slow
@pytest.mark.parametrize("walk", WALKS, ids=lambda walk: walk.precision)
@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_sanitizers(sanitizer: str, walk: Walk) -> None:
    """Of the stand-in: sanitizers do not see what tiles read and write."""
    clang = find_clang()
    if clang is None:
        pytest.skip("clang is not installed")
    isa = stand_in("avx2")
    here(isa)
    runtime = ProgramRuntime([clang], (*isa.flags, *SANITIZERS[sanitizer], "-g"), isa.capabilities)
    assert problems(runtime, "q4_K", walk, rows=32) == []

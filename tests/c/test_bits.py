"""The words that move bits of bytes do the same as shifts and masks, for every bit."""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from kernelgen.ir.expr import I32, U32, Expr, const, lookup, splat, spread, var
from kernelgen.targets.c.bits import Bits, bits, byte_at, nibbles, spread_bits
from kernelgen.targets.c.compiler import HEADERS, find_compiler, flags
from kernelgen.targets.c.runtime import isa_named
from tests.c.machines import here

Words = npt.NDArray[np.uint32]

WORD = Expr("element", U32, (const(0, I32),), "w")

#: numbers are constants, as in kernels, so that compilers choose the instructions of kernels
FUNCTIONS = """
#include "words.h"
static const int8_t table[16] = {ENTRIES};
#define OF(name, result)                                               \\
    void name(const uint32_t *x, const uint32_t *y, uint32_t *z) {     \\
        const u32v a = rows_u32((const uint8_t *)x, 0), b = rows_u32((const uint8_t *)y, 0); \\
        const u32v all = result;                                       \\
        (void)a, (void)b;                                              \\
        memcpy(z, &all, sizeof all);                                   \\
    }
int lanes(void) { return LANES; }
"""
#: of a table of codes
ENTRIES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


def one(x: Words, start: int, mask: int, up: int) -> Words:
    return ((x >> np.uint32(start)) & np.uint32(mask * 0x01010101)) << np.uint32(up)


#: bits of formats, and others: start, mask, moved up
FIELDS = [
    (start, mask, up)
    for mask in (1, 3, 5, 7, 15)
    for start in range(8)
    for up in (0, 2, 4)
    if mask <= 255 >> start and mask << up <= 255
]


def cases() -> dict[str, tuple[str, Callable[[Words, Words], Words]]]:
    found: dict[str, tuple[str, Callable[[Words, Words], Words]]] = {}

    def add(text: str, meaning: Callable[[Words, Words], Words]) -> None:
        found[f"f{len(found)}"] = text, meaning

    for f in FIELDS:
        add(f"bits_of(a, {f[0]}, {f[1] * 0x01010101}u, {f[2]})", lambda a, b, f=f: one(a, *f))
    for f in FIELDS:
        for g in FIELDS[:: 1 + len(FIELDS) // 6]:
            if not f[1] << f[2] & g[1] << g[2]:
                x, y = (f"{s}, {m * 0x01010101}u, {u}" for s, m, u in (f, g))
                add(
                    f"bits_of_two(a, {x}, b, {y})",
                    lambda a, b, f=f, g=g: one(a, *f) | one(b, *g),
                )
    for start in range(29):
        for up in (0, 2, 4, 7):

            def spreads(a: Words, b: Words, start: int = start, up: int = up) -> Words:
                lanes = [(a >> np.uint32(start + n) & 1) << np.uint32(8 * n + up) for n in range(4)]
                return np.bitwise_or.reduce(lanes)

            add(f"spread1_of(a, {start}, {up})", spreads)
    for start in range(5):

        def entries(a: Words, b: Words, start: int = start) -> Words:
            index = one(a, start, 15, 0).view(np.uint8)
            return np.array(ENTRIES, np.int8)[index].view(np.uint32)

        add(f"lookup_of(table, a, {start})", entries)
        add(f"signed_lookup_of(table, a, {start}) ^ SIGNED_BIAS * 0x01010101u", entries)
    for start in (0, 8, 16, 24):
        add(f"byte_of(a, {start})", lambda a, b, s=start: (a >> np.uint32(s)) & np.uint32(255))
    add("odd_bytes(a)", lambda a, b: (a >> np.uint32(8)) & np.uint32(0x00FF00FF))
    return found


@pytest.mark.parametrize("isa", ["avx512gfni", "avx512", "avx2", "scalar"])
def test_words_that_move_bits(isa: str, tmp_path: Path) -> None:
    here(isa_named(isa))
    compiler = find_compiler()
    assert not isinstance(compiler, str)
    text = FUNCTIONS.replace("ENTRIES", ", ".join(map(str, ENTRIES))) + "".join(
        f"OF({name}, {text})\n" for name, (text, _) in cases().items()
    )
    source, made = tmp_path / "bits.c", tmp_path / "bits.so"
    source.write_text(text)
    options = [*flags(isa_named(isa).flags, False, False), "-O1", "-Werror", f"-I{HEADERS}"]
    command = [*compiler.command, *options, "-shared", str(source), "-o", str(made)]
    subprocess.run(command, check=True)
    library = ctypes.CDLL(str(made))
    rng = np.random.default_rng(0)
    for name, (text, meaning) in cases().items():
        a, b = rng.integers(0, 1 << 32, (2, library.lanes()), dtype=np.uint32)
        seen = np.zeros_like(a)
        getattr(library, name)(*(ctypes.c_void_p(v.ctypes.data) for v in (a, b, seen)))
        assert np.array_equal(seen, meaning(a, b)), text


# ---- which expressions are such ---------------------------------------------------------------


def test_bits_that_stay_in_their_bytes() -> None:
    g = var("g", 4)
    assert bits((WORD >> 2 * g) & splat(3)) == Bits(WORD, 2 * g, 3, 0)
    assert bits(((WORD >> g) & splat(1)) << 4) == Bits(WORD, g, 1, 4)
    assert bits((WORD >> 2 * g) & splat(15)) is None  # from the next byte
    assert bits((WORD & splat(31)) << 4) is None  # into the next byte
    assert bits((WORD >> 4) & 0x0F0F) is None
    assert bits(WORD) is None


def test_other_forms() -> None:
    j = var("j", 8)
    found = spread_bits(spread(1, WORD >> 4 * j) << 4)
    assert found is not None and (found.start, found.up) == (4 * j, 4)
    assert spread_bits(spread(2, WORD)) is None
    assert byte_at((WORD >> 8) & 255) == (WORD, const(8, I32))
    index = lookup(range(16), (WORD >> 4) & splat(15)).args[0]
    assert nibbles(index) == Bits(WORD, const(4, I32), 15, 0)
    assert nibbles((WORD >> 4) & splat(7)) is None

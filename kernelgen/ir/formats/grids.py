"""ggml's formats whose codes come four or eight at a time from a list of rows, a grid.

Eight codes are one row: `index` names it, and a code is entry i % 8 (of iq3: four, i % 4).  Codes
of iq2 and iq3 are magnitudes, and have signs: a bit each, or seven bits for eight codes, of which
the eighth makes the number of minus signs even.  In bits from the lowest, of block_iq2_xxs ...
(ggml-common.h), for each run of 32 elements (a: of eight, of iq3 of four, in order):

    iq2_xxs  qs[2r], qs[2r + 1]     index 8 8 8 8 | signs 7 7 7 7, scale 4
    iq2_xs   qs[a]                  index 9, signs 7;        scales: 4 4, for 16 elements each
    iq2_s    qs[a], qh[r]           index 8 | 2 2 2 2;       signs[a]; scales as iq2_xs
    iq3_xxs  qs[a], sas[r]          index 8 | signs 7 7 7 7, scale 4
    iq3_s    qs[a], qh[r]           index 8 | 1 1 1 1 1 1 1 1;   signs[i // 8]; scales: 4
    iq1_s    qs[a], qh[r]           index 8 | 3 3 3 3, scale 3, shift 1
    iq1_m    qs[a], qh[a // 2]      index 8 | (3, shift 1) (3, shift 1)
             scales                 3 3 3 3 of 16 elements each, 4 bits of d

Codes of iq1 are -1, 0, 1, and all of 32 (iq1_m: 8) are shifted by 1/8, down where the bit is set.
Here they are counted in eighths, so that the shift is part of the code.
"""

from __future__ import annotations

import base64
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from kernelgen.ir.block import BlockFormat
from kernelgen.ir.expr import F32, I32, Expr, Scalar, Table, cast, const, equal, table, where
from kernelgen.ir.formats.grid_data import GRIDS

SOURCE = "ggml: ggml-common.h, block_iq2_xxs ... block_iq1_m and the grids; ggml-quants.c"

#: the values that entries of a grid have; those of iq1 are 8 * (code + 1)
_IQ1, _IQ2 = (0, 8, 16), (8, 25, 43)
_IQ3_XXS, _IQ3_S = (4, 12, 20, 28, 36, 44, 52, 62), (1, 3, 5, 7, 9, 11, 13, 15)


@functools.cache
def grid(name: str, values: Sequence[int]) -> Table:
    """A grid, row after row."""
    bits, packed = GRIDS[name]
    raw = np.frombuffer(base64.b64decode(packed), np.uint8)
    shifts = np.arange(0, 8, bits).astype(np.uint8)
    indices = raw[:, None] >> shifts & ((1 << bits) - 1)
    return Table(np.array(values)[indices].ravel().tolist())


def _bits(x: Expr, first: Scalar, count: int) -> Expr:
    """So many bits of an integer, from one on."""
    return cast(I32, (x >> first) & ((1 << count) - 1))


def _with_eighth(seven: Expr) -> Expr:
    """Seven sign bits, and the eighth that makes their number even."""
    four = (seven ^ (seven >> 4)) & 15
    odd = (const(0x6996, I32) >> four) & 1  # bit n: whether n has an odd number of bits
    return seven | (odd << 7)


def _signed(magnitude: Expr, signs: Expr, i: Expr) -> Expr:
    return where(equal((signs >> (i % 8)) & 1, 1), 0 - magnitude, magnitude)


def _iq2(name: str, index: Expr, signs: Expr, i: Expr) -> Expr:
    return _signed(table(grid(name, _IQ2), index * 8 + i % 8), signs, i)


def _iq3_xxs(b: Any, i: Expr) -> Expr:
    magnitude = table(grid("iq3_xxs", _IQ3_XXS), b.qs[i // 4] * 4 + i % 4)
    return _signed(magnitude, _with_eighth(_bits(b.sas[i // 32], 7 * (i // 8 % 4), 7)), i)


def _iq3_s(b: Any, i: Expr) -> Expr:
    index = b.qs[i // 4] | (_bits(b.qh[i // 32], i // 4 % 8, 1) << 8)
    return _signed(table(grid("iq3_s", _IQ3_S), index * 4 + i % 4), b.signs[i // 8], i)


def _iq1(index: Expr, shifted_down: Expr, i: Expr) -> Expr:
    return table(grid("iq1_s", _IQ1), index * 8 + i % 8) + ((shifted_down ^ 1) << 1)


def _nibble(b: Any, g: Expr) -> Expr:
    return (b.scales[g // 2] >> (4 * (g % 2))) & 15


def _d_of_iq1_m(b: Any) -> Expr:
    first, second, third, fourth = (b.scales[n] for n in range(4))
    return (first >> 12) | ((second >> 8) & 0xF0) | ((third >> 4) & 0xF00) | (fourth & 0xF000)


IQ2_XXS = BlockFormat(
    name="iq2_xxs", block=256, group=32, nbytes=66, source=SOURCE,
    fields={"d": "f16", "qs": "u32[16]"},
    ints={"sc": lambda b, g: _bits(b.qs[2 * g + 1], 28, 4)},
    code=lambda b, i: _iq2(
        "iq2_xxs", _bits(b.qs[2 * (i // 32)], 8 * (i // 8 % 4), 8),
        _with_eighth(_bits(b.qs[2 * (i // 32) + 1], 7 * (i // 8 % 4), 7)), i,
    ),
    scale=lambda b, g: b.d * (cast(F32, b.sc[g]) + 0.5) * 0.25,
)  # fmt: skip

IQ2_XS = BlockFormat(
    name="iq2_xs", block=256, group=16, nbytes=74, source=SOURCE,
    fields={"d": "f16", "qs": "u16[32]", "scales": "u8[8]"},
    ints={"sc": _nibble},
    code=lambda b, i: _iq2("iq2_xs", b.qs[i // 8] & 511, _with_eighth(b.qs[i // 8] >> 9), i),
    scale=lambda b, g: b.d * (cast(F32, b.sc[g]) + 0.5) * 0.25,
)  # fmt: skip

IQ2_S = BlockFormat(
    name="iq2_s", block=256, group=16, nbytes=82, source=SOURCE,
    fields={"d": "f16", "qs": "u8[32]", "signs": "u8[32]", "qh": "u8[8]", "scales": "u8[8]"},
    ints={"sc": _nibble},
    code=lambda b, i: _iq2(
        "iq2_s", b.qs[i // 8] | (_bits(b.qh[i // 32], 2 * (i // 8 % 4), 2) << 8),
        b.signs[i // 8], i,
    ),
    scale=lambda b, g: b.d * (cast(F32, b.sc[g]) + 0.5) * 0.25,
)  # fmt: skip

IQ3_XXS = BlockFormat(
    name="iq3_xxs", block=256, group=32, nbytes=98, source=SOURCE,
    fields={"d": "f16", "qs": "u8[64]", "sas": "u32[8]"},
    ints={"sc": lambda b, g: _bits(b.sas[g], 28, 4)},
    code=_iq3_xxs,
    scale=lambda b, g: b.d * (cast(F32, b.sc[g]) + 0.5) * 0.5,
)  # fmt: skip

IQ3_S = BlockFormat(
    name="iq3_s", block=256, group=32, nbytes=110, source=SOURCE,
    fields={"d": "f16", "qs": "u8[64]", "qh": "u8[8]", "signs": "u8[32]", "scales": "u8[4]"},
    ints={"sc": _nibble},
    code=_iq3_s,
    scale=lambda b, g: b.d * (b.sc[g] * 2 + 1),
)  # fmt: skip

IQ1_S = BlockFormat(
    name="iq1_s", block=256, group=32, nbytes=50, source=SOURCE,
    fields={"d": "f16", "qs": "u8[32]", "qh": "u16[8]"},
    ints={"sc": lambda b, g: _bits(b.qh[g], 12, 3)},
    code=lambda b, i: _iq1(
        b.qs[i // 8] | (_bits(b.qh[i // 32], 3 * (i // 8 % 4), 3) << 8), b.qh[i // 32] >> 15, i
    ),
    scale=lambda b, g: b.d * (b.sc[g] * 2 + 1) * 0.125,
    bias=9,
)  # fmt: skip

IQ1_M = BlockFormat(
    name="iq1_m", block=256, group=16, nbytes=56, source=SOURCE,
    fields={"qs": "u8[32]", "qh": "u8[16]", "scales": "u16[4]"},
    ints={"sc": lambda b, g: _bits(b.scales[g // 4], 3 * (g % 4), 3)},
    halves={"d": _d_of_iq1_m},
    code=lambda b, i: _iq1(
        b.qs[i // 8] | (_bits(b.qh[i // 16], 4 * (i // 8 % 2), 3) << 8),
        _bits(b.qh[i // 16], 4 * (i // 8 % 2) + 3, 1), i,
    ),
    scale=lambda b, g: b.d * (b.sc[g] * 2 + 1) * 0.125,
    bias=9,
)  # fmt: skip

"""ggml's K-quants: super-blocks of 256 with quantized group scales (ggml-common.h, ggml-quants.c).

How codes lie, for instance in q4_K (q5_K adds bit 4 in qh, element i%32 at bit i//32):

    qs[32*c + l]   7 6 5 4   |  3 2 1 0            c = 0..3, l = 0..31
                 x[64c+32+l]   x[64c+l]

q2_K, q3_K: qs[32*c + l] holds x[128c + 32s + l] at bits 2s, 2s+1 (c = 0..1, s = 0..3); the third
bit of q3_K is bit i//32 of hmask[i%32].  q6_K: four low bits in ql (64 at a time), two high bits
in qh (32 at a time).

The twelve bytes `scales` of q4_K and q5_K hold eight 6-bit scales and eight 6-bit minima:

    byte 0..3    mm ss ssss   sc[j] in the low six bits, top two bits of sc[j+4]     j = 0..3
    byte 4..7    mm mm mmmm   mn[j] in the low six bits, top two bits of mn[j+4]
    byte 8..11   mmmm ssss    low four bits of sc[j+4] and of mn[j+4]

q3_K packs sixteen 6-bit scales alike: low nibbles in bytes 0..7, top two bits in bytes 8..11.
"""

from __future__ import annotations

from typing import Any

from kernelgen.ir.block import BlockFormat, Derived
from kernelgen.ir.expr import Expr, where

SOURCE = "ggml: ggml-common.h, block_q2_K ... block_q8_K; ggml-quants.c, dequantize_row_*"


def _nibble(b: Any, i: Expr) -> Expr:
    return (b.qs[32 * (i // 64) + i % 32] >> (4 * (i // 32 % 2))) & 15


def _two_bits(b: Any, i: Expr) -> Expr:
    return (b.qs[32 * (i // 128) + i % 32] >> (2 * (i // 32 % 4))) & 3


def _sc(b: Any, g: Expr) -> Expr:
    high = (b.scales[g + 4] & 15) | ((b.scales[g - 4] >> 6) << 4)
    return where(g < 4, b.scales[g] & 63, high)


def _mn(b: Any, g: Expr) -> Expr:
    high = (b.scales[g + 4] >> 4) | ((b.scales[g] >> 6) << 4)
    return where(g < 4, b.scales[g + 4] & 63, high)


Q2_K = BlockFormat(
    name="q2_K", block=256, group=16, nbytes=84, source=SOURCE,
    fields={"scales": "u8[16]", "qs": "u8[64]", "d": "f16", "dmin": "f16"},
    ints={"sc": lambda b, g: b.scales[g] & 15, "mn": lambda b, g: b.scales[g] >> 4},
    code=_two_bits,
    scale=lambda b, g: b.d * b.sc[g],
    offset=lambda b, g: -(b.dmin * b.mn[g]),
)  # fmt: skip

Q3_K = BlockFormat(
    name="q3_K", block=256, group=16, nbytes=110, source=SOURCE,
    fields={"hmask": "u8[32]", "qs": "u8[64]", "scales": "u8[12]", "d": "f16"},
    ints={"sc": lambda b, g: (
        ((b.scales[g % 8] >> (4 * (g // 8))) & 15)
        | (((b.scales[8 + g % 4] >> (2 * (g // 4))) & 3) << 4)
    )},
    code=lambda b, i: _two_bits(b, i) | (((b.hmask[i % 32] >> (i // 32)) & 1) << 2),
    scale=lambda b, g: b.d * (b.sc[g] - 32),
    bias=4,
)  # fmt: skip

Q4_K = BlockFormat(
    name="q4_K", block=256, group=32, nbytes=144, source=SOURCE,
    fields={"d": "f16", "dmin": "f16", "scales": "u8[12]", "qs": "u8[128]"},
    ints={"sc": _sc, "mn": _mn},
    code=_nibble,
    scale=lambda b, g: b.d * b.sc[g],
    offset=lambda b, g: -(b.dmin * b.mn[g]),
)  # fmt: skip

Q5_K = BlockFormat(
    name="q5_K", block=256, group=32, nbytes=176, source=SOURCE,
    fields={"d": "f16", "dmin": "f16", "scales": "u8[12]", "qh": "u8[32]", "qs": "u8[128]"},
    ints={"sc": _sc, "mn": _mn},
    code=lambda b, i: _nibble(b, i) | (((b.qh[i % 32] >> (i // 32)) & 1) << 4),
    scale=lambda b, g: b.d * b.sc[g],
    offset=lambda b, g: -(b.dmin * b.mn[g]),
)  # fmt: skip

Q6_K = BlockFormat(
    name="q6_K", block=256, group=16, nbytes=210, source=SOURCE,
    fields={"ql": "u8[128]", "qh": "u8[64]", "scales": "i8[16]", "d": "f16"},
    ints={"sc": lambda b, g: b.scales[g]},
    code=lambda b, i: (
        ((b.ql[64 * (i // 128) + i % 64] >> (4 * (i // 64 % 2))) & 15)
        | (((b.qh[32 * (i // 128) + i % 32] >> (2 * (i // 32 % 4))) & 3) << 4)
    ),
    scale=lambda b, g: b.d * b.sc[g],
    bias=32,
)  # fmt: skip

Q8_K = BlockFormat(
    name="q8_K", block=256, group=256, nbytes=292, source=SOURCE,
    fields={"d": "f32", "qs": "i8[256]", "bsums": "i16[16]"},
    code=lambda b, i: b.qs[i],
    scale=lambda b, g: b.d,
    derived={"bsums": Derived(16, lambda b, total: total)},
)  # fmt: skip

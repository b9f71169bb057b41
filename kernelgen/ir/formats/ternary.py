"""ggml's formats of few values in blocks with one scale.

tq2_0: codes -1, 0, 1 as two bits; qs[32*c + l] holds x[128*c + 32*s + l] at bits 2*s, 2*s + 1.

tq1_0: five codes, digits of base 3, in a byte that is ceil(256 * digits / 243): the product of the
byte and 3**n has digit n above its lower eight bits, once the digits before it are cut off.

    byte             digit n
    qs[l]            x[32*n + l]            l = 0..31, n = 0..4
    qs[32 + l]       x[160 + 16*n + l]      l = 0..15, n = 0..4
    qh[l]            x[240 + 4*n + l]       l = 0..3,  n = 0..3

q2_0: codes -1, 0, 1, 2; qs[j] holds x[4*j + s] at bits 2*s, 2*s + 1.

q1_0: bit i of qs is 1 for d, 0 for -d.
"""

from __future__ import annotations

from typing import Any

from kernelgen.ir.block import BlockFormat
from kernelgen.ir.expr import Expr, Scalar, table, where

SOURCE = "ggml: ggml-common.h, block_tq1_0, block_tq2_0, block_q2_0, block_q1_0; ggml-quants.c"


def _digit(b: Any, i: Expr) -> Expr:
    def by_part(first: Scalar, second: Scalar, third: Scalar) -> Expr:
        return where(i < 160, first, where(i < 240, second, third))

    byte = by_part(b.qs[i % 32], b.qs[32 + i % 16], b.qh[i % 4])
    power = table((1, 3, 9, 27, 81), by_part(i // 32, (i - 160) // 16, (i - 240) // 4))
    return (((byte * power) & 255) * 3) >> 8


TQ1_0 = BlockFormat(
    name="tq1_0", block=256, group=16, nbytes=54, source=SOURCE,
    fields={"qs": "u8[48]", "qh": "u8[4]", "d": "f16"},
    code=_digit,
    scale=lambda b, g: b.d,
    bias=1,
)  # fmt: skip

TQ2_0 = BlockFormat(
    name="tq2_0", block=256, group=32, nbytes=66, source=SOURCE,
    fields={"qs": "u8[64]", "d": "f16"},
    code=lambda b, i: (b.qs[32 * (i // 128) + i % 32] >> (2 * (i // 32 % 4))) & 3,
    scale=lambda b, g: b.d,
    bias=1,
    largest={"code": 2},  # all decoders take 3 for 2 * d, and none expects it
)  # fmt: skip

Q2_0 = BlockFormat(
    name="q2_0", block=64, group=32, nbytes=18, source=SOURCE,
    fields={"d": "f16", "qs": "u8[16]"},
    code=lambda b, i: (b.qs[i // 4] >> (2 * (i % 4))) & 3,
    scale=lambda b, g: b.d,
    bias=1,
)  # fmt: skip

Q1_0 = BlockFormat(
    name="q1_0", block=128, group=32, nbytes=18, source=SOURCE,
    fields={"d": "f16", "qs": "u8[16]"},
    code=lambda b, i: table((-1, 1), (b.qs[i // 8] >> (i % 8)) & 1),
    scale=lambda b, g: b.d,
)  # fmt: skip

"""ggml's formats with one scale per block of 32 (ggml/src/ggml-common.h, ggml-quants.c).

A 4-bit block of 32 keeps element j in the low half and element j+16 in the high half of byte j:

    qs[j]   7 6 5 4 | 3 2 1 0        j = 0..15
             x[j+16]   x[j]

The fifth bits of a 5-bit block are the 32 bits of qh, element i at bit i.
"""

from __future__ import annotations

from typing import Any

from kernelgen.ir.block import BlockFormat, Derived
from kernelgen.ir.expr import Expr

SOURCE = "ggml: ggml-common.h, block_q4_0 ... block_q8_1; ggml-quants.c, dequantize_row_*"


def _nibble(b: Any, i: Expr) -> Expr:
    return (b.qs[i % 16] >> (4 * (i // 16))) & 15


def _five_bits(b: Any, i: Expr) -> Expr:
    return _nibble(b, i) | (((b.qh >> i) & 1) << 4)


Q4_0 = BlockFormat(
    name="q4_0", block=32, group=32, nbytes=18, source=SOURCE,
    fields={"d": "f16", "qs": "u8[16]"},
    code=_nibble,
    scale=lambda b, g: b.d,
    bias=8,
)  # fmt: skip

Q4_1 = BlockFormat(
    name="q4_1", block=32, group=32, nbytes=20, source=SOURCE,
    fields={"d": "f16", "m": "f16", "qs": "u8[16]"},
    code=_nibble,
    scale=lambda b, g: b.d,
    offset=lambda b, g: b.m,
)  # fmt: skip

Q5_0 = BlockFormat(
    name="q5_0", block=32, group=32, nbytes=22, source=SOURCE,
    fields={"d": "f16", "qh": "u32", "qs": "u8[16]"},
    code=_five_bits,
    scale=lambda b, g: b.d,
    bias=16,
)  # fmt: skip

Q5_1 = BlockFormat(
    name="q5_1", block=32, group=32, nbytes=24, source=SOURCE,
    fields={"d": "f16", "m": "f16", "qh": "u32", "qs": "u8[16]"},
    code=_five_bits,
    scale=lambda b, g: b.d,
    offset=lambda b, g: b.m,
)  # fmt: skip

Q8_0 = BlockFormat(
    name="q8_0", block=32, group=32, nbytes=34, source=SOURCE,
    fields={"d": "f16", "qs": "i8[32]"},
    code=lambda b, i: b.qs[i],
    scale=lambda b, g: b.d,
)  # fmt: skip

Q8_1 = BlockFormat(
    name="q8_1", block=32, group=32, nbytes=36, source=SOURCE,
    fields={"d": "f16", "s": "f16", "qs": "i8[32]"},
    code=lambda b, i: b.qs[i],
    scale=lambda b, g: b.d,
    derived={"s": Derived(32, lambda b, total: b.d * total)},
)  # fmt: skip

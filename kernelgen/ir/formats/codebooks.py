"""Formats whose 4-bit codes index a table of 16 values; nibbles lie as in q4_0.

qs[j]   7 6 5 4 | 3 2 1 0        j = 0..15
         x[j+16]   x[j]
"""

from __future__ import annotations

from typing import Any

from kernelgen.ir.block import BlockFormat
from kernelgen.ir.expr import F32, I32, Expr, bitcast, const, table, where

#: ggml: kvalues_iq4nl, a non-linear grid that suits weights better than equal steps
IQ4_NL_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)

#: twice the values of FP4 E2M1 (OCP Microscaling Formats v1.0, table 4), so that all are whole
MXFP4_VALUES = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)


def _nibble(b: Any, i: Expr) -> Expr:
    return (b.qs[i % 16] >> (4 * (i // 16))) & 15


def _half_e8m0(e: Expr) -> Expr:
    """2**(e - 128): half of the power of two that e8m0 stands for, as the table is doubled.

    Below e = 2 the result is subnormal: 2**-128 and 2**-127 are the bits 1<<21 and 1<<22.
    """
    return bitcast(F32, where(e < 2, const(1 << 21, I32) << (e & 1), (e - 1) << 23))


IQ4_NL = BlockFormat(
    name="iq4_nl", block=32, group=32, nbytes=18,
    source="ggml: ggml-common.h, block_iq4_nl, kvalues_iq4nl",
    fields={"d": "f16", "qs": "u8[16]"},
    code=lambda b, i: table(IQ4_NL_VALUES, _nibble(b, i)),
    scale=lambda b, g: b.d,
)  # fmt: skip

MXFP4 = BlockFormat(
    name="mxfp4", block=32, group=32, nbytes=17,
    source="OCP Microscaling Formats v1.0; ggml: block_mxfp4",
    fields={"e": "u8", "qs": "u8[16]"},
    code=lambda b, i: table(MXFP4_VALUES, _nibble(b, i)),
    scale=lambda b, g: _half_e8m0(b.e),
)  # fmt: skip

"""Formats whose 4-bit codes index a table of 16 values; nibbles lie as in q4_0.

qs[j]   7 6 5 4 | 3 2 1 0        j = 0..15
         x[j+16]   x[j]

iq4_xs has eight such runs of 32, nvfp4 four of 16: qs[8*s + l] holds x[16*s + l], x[16*s + l + 8].
The eight 6-bit scales of iq4_xs: scales_l[j] has the low nibbles of scales 2*j and 2*j + 1, bits
2*g and 2*g + 1 of scales_h the high bits of scale g.
"""

from __future__ import annotations

from typing import Any

from kernelgen.ir.block import BlockFormat
from kernelgen.ir.expr import Expr, table
from kernelgen.ir.formats.narrow_floats import half_e8m0, half_ue4m3

#: ggml: kvalues_iq4nl, a non-linear grid that suits weights better than equal steps
IQ4_NL_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)

#: twice the values of FP4 E2M1 (OCP Microscaling Formats v1.0, table 4), so that all are whole
MXFP4_VALUES = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)


def _nibble(b: Any, i: Expr) -> Expr:
    return (b.qs[i % 16] >> (4 * (i // 16))) & 15


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
    scale=lambda b, g: half_e8m0(b.e),
)  # fmt: skip

IQ4_XS = BlockFormat(
    name="iq4_xs", block=256, group=32, nbytes=136,
    source="ggml: ggml-common.h, block_iq4_xs, kvalues_iq4nl",
    fields={"d": "f16", "scales_h": "u16", "scales_l": "u8[4]", "qs": "u8[128]"},
    ints={"sc": lambda b, g: (
        ((b.scales_l[g // 2] >> (4 * (g % 2))) & 15) | (((b.scales_h >> (2 * g)) & 3) << 4)
    )},
    code=lambda b, i: table(
        IQ4_NL_VALUES, (b.qs[16 * (i // 32) + i % 16] >> (4 * (i // 16 % 2))) & 15
    ),
    scale=lambda b, g: b.d * (b.sc[g] - 32),
)  # fmt: skip

NVFP4 = BlockFormat(
    name="nvfp4", block=64, group=16, nbytes=36,
    source="NVFP4 (NVIDIA Blackwell), without its scale of a whole tensor; ggml: block_nvfp4",
    fields={"d": "u8[4]", "qs": "u8[32]"},
    code=lambda b, i: table(
        MXFP4_VALUES, (b.qs[8 * (i // 16) + i % 8] >> (4 * (i // 8 % 2))) & 15
    ),
    scale=lambda b, g: half_ue4m3(b.d[g]),
    largest={"d": 0x7E},  # there is no sign; 0x7F is no number
)  # fmt: skip

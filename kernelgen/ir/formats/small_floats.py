"""Floats of four, six and eight bits in groups with one scale.

    nf4_g64, fp4_g64        the codebooks of bitsandbytes, scale f32 (the largest magnitude)
    fp8_e4m3_g128           OCP FP8, scale f32; fp8_e5m2_g128 likewise
    mxfp8_e4m3, mxfp8_e5m2  OCP MX: groups of 32 with a power of two as scale
    mxfp6_e2m3, mxfp6_e3m2  likewise, six bits

Nibbles lie as in `kernelgen.ir.formats.groups`.  Of six bits, qs[j] has the low four of x[j] and
x[j+16], qh[j] the high two of x[j], x[j+8], x[j+16] and x[j+24].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kernelgen.ir.block import BlockFormat
from kernelgen.ir.expr import Expr, equal, table, where
from kernelgen.ir.formats.narrow_floats import e4m3fn, e5m2, e8m0, small_float

#: quantiles of the normal distribution (QLoRA, appendix E; bitsandbytes: get_4bit_type)
NF4_VALUES = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip

#: bitsandbytes: get_4bit_type("fp4"): one exponent more than E2M1 has, divided by the largest
FP4_VALUES = tuple(
    sign * value / 12.0
    for sign in (1, -1)
    for value in (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
)

BITSANDBYTES = "bitsandbytes: functional.py, get_4bit_type, dequantize_4bit"
OCP = "OCP 8-bit Floating Point Specification v1.0"
OCP_MX = "OCP Microscaling Formats v1.0"

Decode = Callable[[Expr], Expr]


def codebook_4bit(name: str, values: tuple[float, ...], group: int) -> BlockFormat:
    """Nibbles that index 16 floats, with an f32 scale."""
    half = group // 2
    return BlockFormat(
        name=f"{name}_g{group}", block=group, group=group, nbytes=4 + half, source=BITSANDBYTES,
        fields={"d": "f32", "qs": f"u8[{half}]"},
        code=lambda b, i: table(values, (b.qs[i % half] >> (4 * (i // half))) & 15),
        scale=lambda b, g: b.d,
    )  # fmt: skip


def fp8(name: str, decode: Decode, group: int) -> BlockFormat:
    """Bytes that are floats, with an f32 scale."""
    return BlockFormat(
        name=f"{name}_g{group}", block=group, group=group, nbytes=4 + group, source=OCP,
        fields={"d": "f32", "qs": f"u8[{group}]"},
        code=lambda b, i: decode(b.qs[i]),
        scale=lambda b, g: b.d,
    )  # fmt: skip


def mxfp8(name: str, decode: Decode) -> BlockFormat:
    """The same in groups of 32, with a power of two as scale."""
    return BlockFormat(
        name=name, block=32, group=32, nbytes=33, source=OCP_MX,
        fields={"e": "u8", "qs": "u8[32]"},
        code=lambda b, i: decode(b.qs[i]),
        scale=lambda b, g: e8m0(b.e),
    )  # fmt: skip


def _six_bits(b: Any, i: Expr) -> Expr:
    low, high = (b.qs[i % 16] >> (4 * (i // 16))) & 15, (b.qh[i % 8] >> (2 * (i // 8))) & 3
    return low | (high << 4)


def _eighths(x: Expr) -> Expr:
    """Eight times the number, bias 1, whose exponent is bits 3, 4 and mantissa bits 0..2."""
    whole = (x & 7) | 8
    beyond_2 = where(equal((x >> 3) & 1, 0), whole << 1, whole << 2)
    size = where(equal((x >> 4) & 1, 0), x & 15, beyond_2)
    return where(equal((x >> 5) & 1, 1), -size, size)


def mxfp6_e2m3() -> BlockFormat:
    """Six bits whose values are multiples of 1/8 up to 7.5: codes are integers."""
    return BlockFormat(
        name="mxfp6_e2m3", block=32, group=32, nbytes=25, source=OCP_MX,
        fields={"e": "u8", "qs": "u8[16]", "qh": "u8[8]"},
        code=lambda b, i: _eighths(_six_bits(b, i)),
        scale=lambda b, g: e8m0(b.e) * 0.125,
    )  # fmt: skip


def mxfp6_e3m2() -> BlockFormat:
    """Six bits whose values reach from 1/16 to 28: codes are floats."""
    return BlockFormat(
        name="mxfp6_e3m2", block=32, group=32, nbytes=25, source=OCP_MX,
        fields={"e": "u8", "qs": "u8[16]", "qh": "u8[8]"},
        code=lambda b, i: small_float(_six_bits(b, i), 3, 2, 3),
        scale=lambda b, g: e8m0(b.e),
    )  # fmt: skip


def small_floats(name: str, group: int) -> BlockFormat | None:
    """The format of this name, "nf4" or "mxfp6_e2m3"; None where there is none.

    group  elements with one scale, where that is not in the name
    """
    makers: dict[str, Callable[[], BlockFormat]] = {
        "nf4": lambda: codebook_4bit("nf4", NF4_VALUES, group),
        "fp4": lambda: codebook_4bit("fp4", FP4_VALUES, group),
        "fp8_e4m3": lambda: fp8("fp8_e4m3", e4m3fn, group),
        "fp8_e5m2": lambda: fp8("fp8_e5m2", e5m2, group),
        "mxfp8_e4m3": lambda: mxfp8("mxfp8_e4m3", e4m3fn),
        "mxfp8_e5m2": lambda: mxfp8("mxfp8_e5m2", e5m2),
        "mxfp6_e2m3": mxfp6_e2m3,
        "mxfp6_e3m2": mxfp6_e3m2,
    }
    return makers[name]() if name in makers else None

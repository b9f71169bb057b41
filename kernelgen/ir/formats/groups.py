"""Integers of 2, 3, 4 or 8 bits in groups that have one scale and perhaps one zero point each.

What GPTQ, AWQ, HQQ and compressed-tensors store in tensors of their own (planes), as blocks of one
group.  x = d * (code - zero), where the zero point is

    int4_g128     2**(bits - 1): the group is symmetric
    uint4_g128    an integer, 0 ... 2**bits - 1
    hqq4_g128     a float

Scales, and float zero points, are f16; with the suffix _f32 they are f32, which holds bf16 too.
In a group of G elements byte j of `low` has x[j], x[j + G/8 * 8/bits], ... from its lowest bits on:

    4 bits     low[j]    7 6 5 4  | 3 2 1 0                           j = 0 ... G/2 - 1
                         x[j+G/2]   x[j]
    2, 3 bits  low[j]    7 6       | 5 4      | 3 2     | 1 0         j = 0 ... G/4 - 1
                         x[j+3*G/4]  x[j+G/2]   x[j+G/4]  x[j]
    3 bits     high[j]   bit n is the third bit of x[j + n*G/8]       j = 0 ... G/8 - 1

Eight bits are bytes, with a sign in int8.
"""

from __future__ import annotations

from typing import Any

from kernelgen.ir.block import BlockFormat
from kernelgen.ir.expr import F32, Expr, cast

SOURCES = {
    "int": "GPTQ and compressed-tensors, symmetric",
    "uint": "GPTQ, AWQ and compressed-tensors, with integer zero points",
    "hqq": "HQQ (half-quadratic quantization), with float zero points",
}


def _part(field: Any, i: Expr, bits: int, group: int) -> Expr:
    """`bits` bits of element i of a field whose bytes have 8 / bits elements each."""
    count = group * bits // 8
    return (field[i % count] >> (bits * (i // count))) & ((1 << bits) - 1)


def grouped(kind: str, bits: int, group: int, scale: str = "f16") -> BlockFormat:
    """The format of a kind ("int", "uint", "hqq") for this many bits and elements of a group.

    scale  storage of scales and float zero points: "f16" or "f32"
    """

    def code(b: Any, i: Expr) -> Expr:
        if bits == 8:
            return b.low[i]
        if bits == 3:
            return _part(b.low, i, 2, group) | (_part(b.high, i, 1, group) << 2)
        return _part(b.low, i, bits, group)

    signed_bytes = kind == "int" and bits == 8
    fields = {"d": scale}
    if kind == "hqq":
        fields["zero"] = scale
    fields["low"] = f"{'i8' if signed_bytes else 'u8'}[{group * (bits & ~1) // 8}]"
    if bits == 3:
        fields["high"] = f"u8[{group // 8}]"
    if kind == "uint":
        fields["zero"] = "u8"
    ends = {"int": 0, "uint": 1, "hqq": 4 if scale == "f32" else 2}[kind]
    return BlockFormat(
        name=f"{kind}{bits}_g{group}" + "_f32" * (scale == "f32"),
        block=group, group=group, nbytes=(4 if scale == "f32" else 2) + group * bits // 8 + ends,
        source=SOURCES[kind],
        fields=fields,
        code=code,
        scale=lambda b, g: b.d,
        bias=0 if kind != "int" or signed_bytes else 1 << (bits - 1),
        offset=None if kind == "int" else lambda b, g: -(b.d * cast(F32, b.zero)),
        largest={"zero": (1 << bits) - 1} if kind == "uint" else {},
    )  # fmt: skip

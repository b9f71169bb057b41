"""Plain floats, as blocks of one element."""

from __future__ import annotations

from kernelgen.ir.block import BlockFormat
from kernelgen.ir.expr import F32 as FLOAT
from kernelgen.ir.expr import U32, bitcast, cast

F32 = BlockFormat(
    name="f32", block=1, group=1, nbytes=4, source="IEEE 754 binary32",
    fields={"x": "f32"}, code=lambda b, i: b.x,
)  # fmt: skip

F16 = BlockFormat(
    name="f16", block=1, group=1, nbytes=2, source="IEEE 754 binary16",
    fields={"x": "f16"}, code=lambda b, i: b.x,
)  # fmt: skip

#: the upper half of a binary32
BF16 = BlockFormat(
    name="bf16", block=1, group=1, nbytes=2, source="bfloat16: upper 16 bits of binary32",
    fields={"x": "u16"}, code=lambda b, i: bitcast(FLOAT, cast(U32, b.x) << 16),
)  # fmt: skip

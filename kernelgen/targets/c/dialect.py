"""The words of C11.

Two dialects: `scalar`, plain C on one element, and `rows`, the vector types and words of
`words.h`, in which a value belongs to each of LANES rows and ordinary operators work on all.
"""

from __future__ import annotations

from kernelgen.targets.base import Dialect

_OPERATORS = {"//": "/"}

_COMMON = {
    "constant.f32": "{x}f",
    "constant.u32": "{x}u",
    "select": "({condition} ? {a} : {b})",
}

SCALAR = Dialect(
    _COMMON
    | {
        "load.u8": "{field}[{index}]",
        "load.i8": "{field}[{index}]",
        "load.u16": "load_u16({field} + {index} * 2)",
        "load.i16": "(int16_t)load_u16({field} + {index} * 2)",
        "load.u32": "load_u32({field} + {index} * 4)",
        "load.f16": "f16_to_f32(load_u16({field} + {index} * 2))",
        "load.f32": "load_f32({field} + {index} * 4)",
        "cast.i32>f32": "(float)({x})",
        "cast.u32>f32": "(float)({x})",
        "cast.i32>u32": "(uint32_t)({x})",
        "cast.u32>i32": "(int32_t)({x})",
        "cast.f32>i32": "(int32_t)({x})",
        "cast.bool>i32": "({x})",
        "bitcast.i32>f32": "bits_to_f32((uint32_t)({x}))",
        "bitcast.u32>f32": "bits_to_f32({x})",
        "bitcast.f32>u32": "f32_to_bits({x})",
        "bitcast.i32>u32": "(uint32_t)({x})",
        "bitcast.u32>i32": "(int32_t)({x})",
        "blend": "({condition} ? {a} : {b})",
        "table": "{table}[{index}]",
    },
    _OPERATORS,
)

ROWS = Dialect(
    _COMMON
    | {
        "load.u8": "rows_u8({field}, {index})",
        "load.i8": "rows_i8({field}, {index})",
        "load.u16": "rows_u16({field}, {index})",
        "load.i16": "rows_i16({field}, {index})",
        "load.u32": "rows_u32({field}, {index})",
        "load.f16": "rows_f16({field}, {index})",
        "load.f32": "rows_f32({field}, {index})",
        "word": "rows_u32({field}, {index})",
        "element": "{name}[{index}]",
        "cast.i32>f32": "to_f32({x})",
        "cast.u32>i32": "(i32v)({x})",
        "cast.i32>u32": "(u32v)({x})",
        "bitcast.i32>f32": "(f32v)({x})",
        "bitcast.u32>f32": "(f32v)({x})",
        "bitcast.f32>u32": "(u32v)({x})",
        "bitcast.i32>u32": "(u32v)({x})",
        "bitcast.u32>i32": "(i32v)({x})",
        "blend": "blend({condition}, {a}, {b})",
        "table": "gather({table}, {index})",
        "lookup": "lookup({table}, {index})",
        "spread1": "spread1({x})",
    },
    _OPERATORS,
)

"""The words of C11.

Two dialects: `scalar`, plain C on one element, and `rows`, the vector types and words of
`words.h`, in which a value belongs to each of LANES rows and ordinary operators work on all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kernelgen.ir.expr import BOOL, Expr
from kernelgen.targets.base import ATOM, Dialect, Printer, varies

_OPERATORS = {"//": "/"}

_COMMON = {
    "constant.f32": "{x}f",
    "constant.u32": "{x}u",
    "select": "({condition} ? {a} : {b})",
}

#: of double precision, as the reference's are
_FUNCTIONS = ("exp", "log", "sqrt", "tanh", "sin", "cos", "erf")

SCALAR = Dialect(
    _COMMON
    | {
        "load.u8": "{field}[{index}]",
        "load.i8": "{field}[{index}]",
        "load.u16": "u16_at({field}, {index})",
        "load.i16": "i16_at({field}, {index})",
        "load.u32": "u32_at({field}, {index})",
        "load.f16": "f16_at({field}, {index})",
        "load.f32": "f32_at({field}, {index})",
        "cast.i32>f32": "(float)({x})",
        "cast.u32>f32": "(float)({x})",
        "cast.i32>u32": "(uint32_t)({x})",
        "cast.u32>i32": "(int32_t)({x})",
        "cast.f32>i32": "(int32_t)({x})",
        "cast.f32>u32": "(uint32_t)({x})",
        "cast.bool>i32": "({x})",
        "cast.bool>u32": "(uint32_t)({x})",
        "cast.bool>f32": "(float)({x})",
        "bitcast.i32>f32": "bits_to_f32((uint32_t)({x}))",
        "bitcast.u32>f32": "bits_to_f32({x})",
        "bitcast.f32>u32": "f32_to_bits({x})",
        "bitcast.f32>i32": "(int32_t)f32_to_bits({x})",
        "bitcast.i32>u32": "(uint32_t)({x})",
        "bitcast.u32>i32": "(int32_t)({x})",
        "blend": "({condition} ? {a} : {b})",
        "min": "({a} < {b} ? {a} : {b})",
        "max": "({a} < {b} ? {b} : {a})",
        "table": "{table}[{index}]",
        "call.abs": "fabsf({x})",
        "call.rsqrt": "(float)(1 / sqrt({x}))",
        **{f"call.{name}": f"(float){name}({{x}})" for name in _FUNCTIONS},
    },
    _OPERATORS,
)


class RowsPrinter(Printer):
    """Prints what belongs to each row of a tile as a vector, and the rest as plain C."""

    def __init__(
        self,
        dialect: Dialect,
        tables: Callable[[tuple[Any, ...]], str],
        rename: Callable[[str], str] = str,
    ) -> None:
        super().__init__(dialect, tables, rename)
        self._scalar = Printer(SCALAR, tables, rename)

    def vector(self, expr: Expr) -> str:
        """A vector, also of what is the same in all rows."""
        text = self(expr)
        return text if varies(expr) else f"splat_{expr.dtype.value}({text})"

    def _print(self, expr: Expr) -> tuple[str, int]:
        if not varies(expr):
            return self._scalar._print(expr)
        op, args = expr.op, expr.args
        if op in ("min", "max"):
            chosen = args if op == "min" else args[::-1]
            return self._print(Expr("select", expr.dtype, (Expr("<", BOOL, args), *chosen)))
        if op == "select" and expr.dtype is BOOL:
            if [a.attr for a in args[1:]] == [False, True]:
                return f"({self(args[0])} == 0)", ATOM
        elif op == "select":
            condition, a, b = self(args[0]), self.vector(args[1]), self.vector(args[2])
            if not varies(args[0]):
                return self._dialect.word("select").format(condition=condition, a=a, b=b), ATOM
            return f"blend_{expr.dtype.value}({condition}, {a}, {b})", ATOM
        return super()._print(expr)


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
        "cast.u32>f32": "unsigned_to_f32({x})",
        "cast.f32>i32": "to_i32({x})",
        "cast.u32>i32": "(i32v)({x})",
        "cast.i32>u32": "(u32v)({x})",
        "cast.bool>i32": "({x} & 1)",  # true is -1 in a vector
        "cast.bool>u32": "(u32v)({x} & 1)",
        "cast.bool>f32": "to_f32({x} & 1)",
        "bitcast.i32>f32": "(f32v)({x})",
        "bitcast.u32>f32": "(f32v)({x})",
        "bitcast.f32>u32": "(u32v)({x})",
        "bitcast.f32>i32": "(i32v)({x})",
        "bitcast.i32>u32": "(u32v)({x})",
        "bitcast.u32>i32": "(i32v)({x})",
        "table": "gather({table}, {index})",
        "lookup": "lookup({table}, {index})",
        "spread1": "spread1({x})",
        **{f"spread{bits}": f"spread({{x}}, {bits})" for bits in range(2, 9)},
        "call.abs": "each_row(fabsf, {x})",
        "call.rsqrt": "1 / each_row(sqrt, {x})",
        **{f"call.{name}": f"each_row({name}, {{x}})" for name in _FUNCTIONS},
    },
    _OPERATORS,
    RowsPrinter,
)

"""The words of numpy.

A value is an array: (blocks, n) where it depends on what is loaded and on the index, (blocks, 1)
or (n,) where on one of them.  Its dtype is the expression's own, so that results are exact to the
bit: constants are Python's, which take the dtype of the array beside them.
"""

from __future__ import annotations

import re

from kernelgen.ir.expr import (
    BOOL,
    F32,
    I32,
    PRECEDENCE,
    SHIFTS,
    U32,
    DType,
    Expr,
    cast,
    rebuild,
)
from kernelgen.ir.ranges import interval
from kernelgen.targets.printer import ATOM, Dialect, Printer, varies
from kernelgen.targets.printer import statement as statement

_TYPES: dict[DType, str] = {BOOL: "bool_", I32: "int32", U32: "uint32", F32: "float32"}


class ArrayPrinter(Printer):
    """Prints expressions on arrays: what needs more than words."""

    def _print(self, expr: Expr) -> tuple[str, int]:
        op, args = expr.op, expr.args
        if op == "named":  # an array that the walk has already made
            return self._rename(expr.attr), ATOM
        if op == "load":
            return self._load(expr), ATOM
        if op == "cast" and args[0].op == "const":
            return f"np.{_TYPES[expr.dtype]}({self._constant(args[0])})", ATOM
        if op == "table" and not _inside(args[0], len(expr.attr)):
            return f'np.take({self._tables(expr.attr)}, {self(args[0])}, mode="clip")', ATOM
        if op in SHIFTS and args[0].dtype is not args[1].dtype and args[1].op != "const":
            # numpy would compute int32 >> uint32 in 64 bits
            return super()._print(rebuild(expr, (args[0], cast(args[0].dtype, args[1]))))
        if op == "select" and expr.dtype is BOOL and [a.attr for a in args[1:]] == [False, True]:
            text, level = self._print(args[0])
            return f"~{text if level == ATOM else f'({text})'}", PRECEDENCE["neg"]
        operands = args[1:] if op == "select" else args
        if operands and all(a.op == "const" for a in operands):  # no array beside them
            typed = Expr("cast", operands[0].dtype, operands[:1])
            return super()._print(rebuild(expr, (*args[: -len(operands)], typed, *operands[1:])))
        return super()._print(expr)

    def _load(self, expr: Expr) -> str:
        name, count, index = self._rename(expr.attr.name), expr.attr.count, expr.args[0]
        if count == 1:
            return name
        if index.op == "const":
            at = min(max(index.attr, 0), count - 1)
            return f"{name}[:, {at}:{at + 1}]"
        text, inside = self(index), _inside(index, count)
        if varies(index):
            text = text if inside else f"np.clip({text}, 0, {count - 1})"
            return f"np.take_along_axis({name}, {text}, axis=1)"
        # np.where computes both of its branches, also where the other one is taken
        return f"{name}[:, {text}]" if inside else f'np.take({name}, {text}, axis=1, mode="clip")'

    def _constant(self, expr: Expr) -> str:
        if expr.dtype is BOOL:
            return str(bool(expr.attr))
        return re.sub(r"inf|nan", r"np.\g<0>", super()._constant(expr))


def _inside(index: Expr, count: int) -> bool:
    """Whether numpy takes an index without complaint: from the end where it is negative."""
    lo, hi = interval(index)
    return -count <= lo and hi < count


def _double(function: str) -> str:
    return f"{function}({{atom}}.astype(np.float64)).astype(np.float32)"


ARRAYS = Dialect(
    {
        "constant.f32": "{x}",
        "constant.u32": "{x}",
        "cast.i32>f32": "{atom}.astype(np.float32)",
        "cast.u32>f32": "{atom}.astype(np.float32)",
        "cast.i32>u32": "{atom}.astype(np.uint32)",
        "cast.u32>i32": "{atom}.astype(np.int32)",
        "cast.f32>i32": "{atom}.astype(np.int32)",
        "cast.f32>u32": "{atom}.astype(np.uint32)",
        "cast.bool>i32": "{atom}.astype(np.int32)",
        "cast.bool>u32": "{atom}.astype(np.uint32)",
        "cast.bool>f32": "{atom}.astype(np.float32)",
        "bitcast.i32>f32": "{atom}.view(np.float32)",
        "bitcast.u32>f32": "{atom}.view(np.float32)",
        "bitcast.f32>i32": "{atom}.view(np.int32)",
        "bitcast.f32>u32": "{atom}.view(np.uint32)",
        "bitcast.i32>u32": "{atom}.view(np.uint32)",
        "bitcast.u32>i32": "{atom}.view(np.int32)",
        "select": "np.where({condition}, {a}, {b})",
        "blend": "np.where({condition}, {a}, {b})",
        "min": "np.minimum({a}, {b})",
        "max": "np.maximum({a}, {b})",
        "table": "{table}[{index}]",
        "element": "{name}.reshape(-1)[{index}]",
        "call.abs": "np.abs({x})",
        "call.rsqrt": "(1 / np.sqrt({atom}.astype(np.float64))).astype(np.float32)",
        **{f"call.{f}": _double(f"np.{f}") for f in ("exp", "log", "sqrt", "tanh", "sin", "cos")},
    },
    printer=ArrayPrinter,
)

#: the same where arrays are flat already
MAPS = Dialect({**ARRAYS.words, "element": "{name}[{index}]"}, printer=ArrayPrinter)

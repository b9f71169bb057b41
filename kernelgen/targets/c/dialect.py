"""The words of C11.

Three dialects: `scalar`, plain C on one element; `rows`, the vector types and words of `words.h`,
in which a value belongs to each of LANES rows and ordinary operators work on all; and `lanes`, the
same where lanes follow one another: elements of a row, or keys.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kernelgen.ir.expr import BOOL, I32, SHIFTS, Expr, const, splat, walk
from kernelgen.ir.rules import simplify, sum_terms
from kernelgen.targets.c.bits import Bits, bits, byte_at, nibbles, spread_bits
from kernelgen.targets.printer import ATOM, Dialect, Printer, varies

_OPERATORS = {"//": "/"}

_COMMON = {
    "constant.f32": "{x}f",
    "constant.u32": "{x}u",
    "constant.least": "(-2147483647 - 1)",
    "constant.special": "bits_to_f32({x})",
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
        "load.i32": "(int32_t)u32_at({field}, {index})",
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
        "element": "{name}[{index}]",
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

    scalar = SCALAR

    def __init__(
        self,
        dialect: Dialect,
        tables: Callable[[tuple[Any, ...]], str],
        rename: Callable[[str], str] = str,
    ) -> None:
        super().__init__(dialect, tables, rename)
        self._scalar = Printer(self.scalar, tables, rename)

    def varies(self, expr: Expr) -> bool:
        """Whether lanes have values of their own."""
        return varies(expr)

    def vector(self, expr: Expr) -> str:
        """A vector, also of what is the same in all rows."""
        text = self(expr)
        if self.varies(expr):
            return text
        if expr.dtype is BOOL:  # true is -1 in a vector
            return f"splat_i32(-({text}))"
        return f"splat_{expr.dtype.value}({text})"

    def _print(self, expr: Expr) -> tuple[str, int]:
        if not self.varies(expr):
            return self._scalar._print(expr)
        op, args = expr.op, expr.args
        if op in ("min", "max"):
            chosen = args if op == "min" else args[::-1]
            return self._print(Expr("select", expr.dtype, (Expr("<", BOOL, args), *chosen)))
        if op == "select" and [a.attr for a in args[1:]] == [False, True]:
            text, level = self._print(args[0])
            return f"({text if level == ATOM else f'({text})'} == 0)", ATOM
        if op == "select":
            return self._select(expr), ATOM
        if "bits" in self._dialect.words and (moved := self._bits(expr)):
            return moved, ATOM
        return super()._print(expr)

    def _bits(self, expr: Expr) -> str | None:
        """Bits of bytes that are moved, if the expression is made of such."""
        word = self._dialect.word
        if expr.op == "|":
            both = [bits(a) for a in expr.args]
            if both[0] and both[1]:
                x, y = (self._arguments(one) for one in both if one)
                return word("bits2").format(x=x, y=y)
        if found := bits(expr):
            plain = found.up == 0 and found.start is const(0, I32)
            return None if plain else word("bits").format(x=self._arguments(found))
        if spread := spread_bits(expr):
            x, start = self(spread.word), self(spread.start)
            return word("bits.spread").format(x=x, start=start, up=spread.up)
        if expr.op == "lookup" and (index := nibbles(expr.args[0])):
            table, x = self._tables(expr.attr), self(index.word)
            return word("bits.lookup").format(table=table, x=x, start=self(index.start))
        if found_byte := byte_at(expr):
            x, start = (self(a) for a in found_byte)
            return word("bits.byte").format(x=x, start=start)
        return None

    def _arguments(self, found: Bits) -> str:
        mask = self(splat(found.mask))
        return f"{self(found.word)}, {self(found.start)}, {mask}, {found.up}"

    def _select(self, expr: Expr) -> str:
        condition, a, b = self(expr.args[0]), self.vector(expr.args[1]), self.vector(expr.args[2])
        if not self.varies(expr.args[0]):
            return self._dialect.word("select").format(condition=condition, a=a, b=b)
        name = "i32" if expr.dtype is BOOL else expr.dtype.value
        return f"blend_{name}({condition}, {a}, {b})"


_VECTORS = _COMMON | {
    "load.u8": "rows_u8({field}, {index})",
    "load.i8": "rows_i8({field}, {index})",
    "load.u16": "rows_u16({field}, {index})",
    "load.i16": "rows_i16({field}, {index})",
    "load.u32": "rows_u32({field}, {index})",
    "load.i32": "rows_i32({field}, {index})",
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
    "negate": "negate_bytes({x}, {bits})",
    **{f"spread{bits}": f"spread({{x}}, {bits})" for bits in range(2, 9)},
    "call.abs": "each_row(fabsf, {x})",
    "call.rsqrt": "1 / each_row(sqrt, {x})",
    **{f"call.{name}": f"each_row({name}, {{x}})" for name in _FUNCTIONS},
}

#: bits of bytes that are moved (`targets/c/bits.py`)
_BITS = {
    "bits": "bits_of({x})",
    "bits2": "bits_of_two({x}, {y})",
    "bits.spread": "spread1_of({x}, {start}, {up})",
    "bits.lookup": "lookup_of({table}, {x}, {start})",
    "bits.byte": "byte_of({x}, {start})",
}

ROWS = Dialect(_VECTORS | _BITS, _OPERATORS, RowsPrinter)


#: runs over elements that follow one another; how many depends on the vectors that there are
LANE = Expr("var", I32, attr=("lane", 0, 15))
#: the first of them
FIRST = Expr("var", I32, attr=("first", 0, 15))
_VARY = frozenset(("lane", "k", "s"))
_SIZES = {"u16": 2, "i16": 2, "u32": 4, "f16": 2, "f32": 4}


class LanesPrinter(RowsPrinter):
    """Prints, as a vector, what depends on `lane`, a number from the walk's `first` on, or on the
    walk's vectors `k` and `s`."""

    def varies(self, expr: Expr) -> bool:
        """Whether one of these occurs in it."""
        return any(node.op == "var" and node.attr[0] in _VARY for node in walk(expr))

    def _print(self, expr: Expr) -> tuple[str, int]:
        if not self.varies(expr):
            return super()._print(expr)
        op, args = expr.op, expr.args
        if expr is LANE:
            return "(LANE_IDS + first)", ATOM
        if op == "load":
            return self._load(expr), ATOM
        if op == "element":
            return f"gather({self._rename(expr.attr)}, {self(args[0])})", ATOM
        # a number that is the same in all lanes need not be a vector beside one, but for these
        if op in SHIFTS or (len(args) == 2 and args[0].dtype is BOOL):
            sides = [self._side(a) for a in args]
            return f"({sides[0]} {self._dialect.operators.get(op, op)} {sides[1]})", ATOM
        return super()._print(expr)

    def _side(self, expr: Expr) -> str:
        text, level = (self.vector(expr), ATOM) if not self.varies(expr) else self._print(expr)
        return text if level == ATOM else f"({text})"

    def _load(self, expr: Expr) -> str:
        storage, field = expr.attr.storage.name, self._rename(expr.attr.name)
        base = _beside_lane(expr.args[0])
        if base is None:
            index = self(expr.args[0])
            if storage in ("u8", "i8"):
                return f"gather({field}, {index})"
            return f"at_each({storage}_at, {field}, {index}, {expr.dtype.value}v)"
        at = self(simplify(base + FIRST))
        size = _SIZES.get(storage, 1)
        scaled = f"{size} * ({at})" if size > 1 else at
        return f"rows_{storage}((const uint8_t *)({field} + {scaled}), 0)"


def _beside_lane(index: Expr) -> Expr | None:
    """What is added to the lane, where an index is such a sum."""
    rest = const(0, I32)
    found = 0
    for term in sum_terms(index):
        if term is LANE:
            found += 1
        elif any(node is LANE for node in walk(term)):
            return None
        else:
            rest = rest + term
    return rest if found == 1 else None


LANES = Dialect(
    {
        **_VECTORS,
        "cast.bool>i32": "(({x}) & 1)",
        "cast.bool>u32": "(u32v)(({x}) & 1)",
        "cast.bool>f32": "to_f32(({x}) & 1)",
        "call.abs": "abs_f32({x})",
        "call.exp": "exp_f32({x})",
        "call.tanh": "tanh_f32({x})",
    },
    _OPERATORS,
    LanesPrinter,
)


class ResultsPrinter(LanesPrinter):
    """Prints what is computed from sums and operands, of which each lane has its own."""

    def varies(self, expr: Expr) -> bool:
        """Whether anything but constants occurs in it."""
        return any(node.op == "var" for node in walk(expr))


RESULTS = Dialect(LANES.words, _OPERATORS, ResultsPrinter)


#: one column
COLUMN = Dialect({**SCALAR.words, "min": "LEAST({a}, {b})", "max": "MOST({a}, {b})"}, _OPERATORS)
#: begin the names of values that each column has
OF_COLUMNS = ("each_", "kept_")
_TWO_SIDES = ("+", "-", "*", "/", "&", "|", "^", "<", "==", *SHIFTS)


class ColumnsPrinter(LanesPrinter):
    """Prints, as a vector, what depends on `lane`, a number from column `c` on, or on values that
    each column has."""

    scalar = COLUMN

    def varies(self, expr: Expr) -> bool:
        """Whether one of these occurs in it."""
        return any(
            node is LANE or (node.op == "var" and node.attr[0].startswith(OF_COLUMNS))
            for node in walk(expr)
        )

    def _print(self, expr: Expr) -> tuple[str, int]:
        if expr is LANE:
            return "LANE_IDS", ATOM
        if not self.varies(expr) or expr.op == "load":
            return super()._print(expr)
        if expr.op in _TWO_SIDES:
            left, right = (self._side(a) for a in expr.args)
            return f"({left} {expr.op} {right})", ATOM
        if expr.op in ("min", "max"):
            a, b = (self.vector(x) for x in expr.args)
            which = {"min": "least", "max": "most"}[expr.op]
            return f"{which}_{expr.dtype.value}({a}, {b})", ATOM
        return super()._print(expr)

    def _load(self, expr: Expr) -> str:
        storage, field = expr.attr.storage, self._rename(expr.attr.name)
        base = _beside_lane(expr.args[0])
        if base is None:
            index, vector = self(expr.args[0]), expr.dtype.value
            if storage.name in ("u8", "i8"):
                return f"gather({field}, {index})"
            if storage.name == "i32":
                return f"(i32v)at_each(u32_at, {field}, {index}, u32v)"
            return f"at_each({storage.name}_at, {field}, {index}, {vector}v)"
        at = self(simplify(base))
        scaled = f" + {storage.nbytes} * (ptrdiff_t)({at})" if base.op != "const" else ""
        return f"rows_{storage.name}((const uint8_t *){field}{scaled}, 0)"


#: columns of a row, side by side
COLUMNS = Dialect(
    {
        **LANES.words,
        "cast.f32>u32": "to_u32({x})",
        "call.exp": "exp_each({x})",
        "call.sqrt": "sqrt_f32({x})",
        "call.rsqrt": "(1 / sqrt_f32({x}))",
    },
    _OPERATORS,
    ColumnsPrinter,
)

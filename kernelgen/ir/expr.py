"""The expression language: small, typed, pure, immutable, hash-consed.

An expression is built with Python's operators and means what `kernelgen.ir.evaluate` computes.
Two expressions that are built alike are the same object, so equality is identity and a subtree
that occurs twice is shared.

Types
    i32, u32   32-bit integers that wrap; // and % round down, as Python's do
    f32        IEEE single precision
    bool       result of a comparison

Loads from a field of a block give i32 (u8, i8, u16, i16 fields), u32 (u32) or f32 (f16, f32).
The packed operations (`word`, `spread`, `lookup`, `negate`) are written by `kernelgen.ir.lanes`
only: they
treat a u32 as four bytes, lowest first.
"""

from __future__ import annotations

import enum
import functools
import math
import numbers
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Union
from weakref import WeakValueDictionary

from kernelgen.errors import ExprError


class DType(enum.Enum):
    """Type of an expression's value."""

    BOOL = "bool"
    I32 = "i32"
    U32 = "u32"
    F32 = "f32"

    @property
    def is_int(self) -> bool:
        """Whether values are 32-bit integers."""
        return self in (DType.I32, DType.U32)


BOOL, I32, U32, F32 = DType.BOOL, DType.I32, DType.U32, DType.F32


@dataclass(frozen=True)
class Storage:
    """How one element of a field lies in memory, and the type its load has."""

    name: str
    nbytes: int
    dtype: DType
    lo: int = 0
    hi: int = 0


STORAGES = {
    s.name: s
    for s in (
        Storage("u8", 1, I32, 0, 255),
        Storage("i8", 1, I32, -128, 127),
        Storage("u16", 2, I32, 0, 65535),
        Storage("i16", 2, I32, -32768, 32767),
        Storage("u32", 4, U32, 0, 2**32 - 1),
        Storage("f16", 2, F32),
        Storage("f32", 4, F32),
    )
}


@dataclass(frozen=True)
class Field:
    """`count` elements of one storage type, `offset` bytes from the start of a block."""

    name: str
    storage: Storage
    count: int
    offset: int

    @property
    def nbytes(self) -> int:
        """Bytes the whole field takes."""
        return self.storage.nbytes * self.count


class Table(tuple[Any, ...]):
    """The values of a table: of one type, and up to thousands, so that what is asked of them often
    is kept."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(self), (tuple(self),))

    @functools.cached_property
    def text(self) -> str:
        """The values as Python writes them, which tells 1 from 1.0 and 0.0 from -0.0."""
        return type(self).__name__ + tuple.__repr__(self)

    @functools.cached_property
    def bounds(self) -> tuple[int, int]:
        """Smallest and largest."""
        return min(self), max(self)

    @functools.cached_property
    def array(self) -> Any:
        """A numpy array of the type that a look-up has."""
        import numpy as np

        floats = any(isinstance(v, float) for v in self)
        return np.array(self, np.float32 if floats else self._integers)

    @functools.cached_property
    def words(self) -> WordTable:
        """Bytes, four to a u32, lowest first; a last word is filled up with zeros."""
        raw = bytes(v & 255 for v in self)
        fours = (raw[n : n + 4] for n in range(0, len(raw), 4))
        return WordTable(int.from_bytes(four, "little") for four in fours)

    _integers = "int32"


class WordTable(Table):
    """The values of a table of u32."""

    _integers = "uint32"


Scalar = Union[int, float, "Expr"]

#: operators by the sign that Python gives them
BITWISE = ("&", "|", "^")
SHIFTS = ("<<", ">>")
COMPARISONS = ("<", "==")
#: functions of one f32
FUNCTIONS = ("exp", "log", "sqrt", "rsqrt", "tanh", "sin", "cos", "abs", "erf")

#: operators that read memory
LOADS = ("load", "word", "element", "fetch")

#: of longer tables only the first values are shown
_SHOWN = 64

_interned: WeakValueDictionary[tuple[Any, ...], Expr] = WeakValueDictionary()


class Expr:
    """A node: an operator, its type, its operands, and what else the operator needs (`attr`)."""

    __slots__ = ("__weakref__", "args", "attr", "dtype", "op")

    op: str
    dtype: DType
    args: tuple[Expr, ...]
    attr: Any

    __array_ufunc__ = None  # a numpy number beside an expression leaves the operator to us

    def __new__(cls, op: str, dtype: DType, args: tuple[Expr, ...] = (), attr: Any = None) -> Expr:
        """The one object for this operator on these operands."""
        # repr() keeps 0.0 apart from -0.0, and 1 from 1.0 and True, which == does not
        exact = repr(attr) if op == "const" else attr.text if op == "table" else attr
        key = (op, dtype, tuple(map(id, args)), exact)
        found = _interned.get(key)
        if found is not None:
            return found
        self = super().__new__(cls)
        for name, value in (("op", op), ("dtype", dtype), ("args", args), ("attr", attr)):
            object.__setattr__(self, name, value)
        _interned[key] = self
        return self

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"an expression is immutable: {name} cannot be set; build a new one")

    def __reduce__(self) -> tuple[Any, ...]:
        return (Expr, (self.op, self.dtype, self.args, self.attr))

    def __copy__(self) -> Expr:
        return self

    def __deepcopy__(self, memo: object) -> Expr:
        return self

    def __repr__(self) -> str:
        return show(self)

    def __bool__(self) -> bool:
        raise ExprError(
            f"the truth of the expression {self} is not known while kernels are generated;"
            " use kernelgen.ir.where(condition, a, b) instead of if, and, or"
        )

    def __getitem__(self, index: object) -> Expr:
        raise ExprError(f"{self} is one value and has no elements; write it without [{index}]")

    # Operators. A Python number takes the type of the expression beside it.
    def __add__(self, other: Scalar) -> Expr:
        return _binary("+", self, other)

    def __radd__(self, other: Scalar) -> Expr:
        return _binary("+", other, self)

    def __sub__(self, other: Scalar) -> Expr:
        return _binary("-", self, other)

    def __rsub__(self, other: Scalar) -> Expr:
        return _binary("-", other, self)

    def __mul__(self, other: Scalar) -> Expr:
        return _binary("*", self, other)

    def __rmul__(self, other: Scalar) -> Expr:
        return _binary("*", other, self)

    def __truediv__(self, other: Scalar) -> Expr:
        return _binary("/", self, other)

    def __rtruediv__(self, other: Scalar) -> Expr:
        return _binary("/", other, self)

    def __floordiv__(self, other: Scalar) -> Expr:
        return _binary("//", self, other)

    def __mod__(self, other: Scalar) -> Expr:
        return _binary("%", self, other)

    def __and__(self, other: Scalar) -> Expr:
        return _binary("&", self, other)

    def __rand__(self, other: Scalar) -> Expr:
        return _binary("&", other, self)

    def __or__(self, other: Scalar) -> Expr:
        return _binary("|", self, other)

    def __ror__(self, other: Scalar) -> Expr:
        return _binary("|", other, self)

    def __xor__(self, other: Scalar) -> Expr:
        return _binary("^", self, other)

    def __rxor__(self, other: Scalar) -> Expr:
        return _binary("^", other, self)

    def __lshift__(self, other: Scalar) -> Expr:
        return _binary("<<", self, other)

    def __rlshift__(self, other: int) -> Expr:
        return _binary("<<", const(other, I32), self)

    def __rshift__(self, other: Scalar) -> Expr:
        return _binary(">>", self, other)

    def __rrshift__(self, other: int) -> Expr:
        return _binary(">>", const(other, I32), self)

    def __neg__(self) -> Expr:
        if self.dtype is F32:
            return Expr("neg", F32, (self,))
        return _binary("-", 0, self)

    def __lt__(self, other: Scalar) -> Expr:
        return _binary("<", self, other)

    def __gt__(self, other: Scalar) -> Expr:
        return _binary("<", other, self)

    def __le__(self, other: Scalar) -> Expr:
        return logical_not(_binary("<", other, self))

    def __ge__(self, other: Scalar) -> Expr:
        return logical_not(_binary("<", self, other))


def const(value: int | float, dtype: DType) -> Expr:
    """A constant; integers wrap to 32 bits, floats keep the value rounded to single precision."""
    if dtype is BOOL:
        return Expr("const", BOOL, attr=bool(value))
    if not _is_number(value):
        raise ExprError(f"{value!r} is not a number and cannot stand in an expression")
    if dtype is F32:
        # struct would raise on overflow where IEEE rounds to infinity; numpy does what IEEE says
        import numpy as np

        with np.errstate(over="ignore"):
            return Expr("const", F32, attr=float(np.float32(value)))
    if not math.isfinite(value) or value != int(value):
        raise ExprError(f"an {dtype.value} constant must be a whole number, not {value}")
    return Expr("const", dtype, attr=wrap(int(value), dtype))


def wrap(value: int, dtype: DType) -> int:
    """`value` modulo 2^32, in the range of `dtype`."""
    value &= 0xFFFFFFFF
    return value - (1 << 32) if dtype is I32 and value >> 31 else value


def var(name: str, count: int, dtype: DType = I32) -> Expr:
    """An integer variable in 0 <= name < count."""
    return Expr("var", dtype, attr=(name, 0, count - 1))


def number(name: str) -> Expr:
    """An f32 variable."""
    return Expr("var", F32, attr=(name, -math.inf, math.inf))


def load(field: Field, index: Scalar) -> Expr:
    """Element `index` of a field of the current block."""
    at = index if isinstance(index, Expr) else const(index, I32)
    if at.dtype is not I32:
        raise ExprError(f"index of field {field.name} must be i32, not {at.dtype.value}: {at}")
    return Expr("load", field.storage.dtype, (at,), field)


def table(values: Sequence[int] | Sequence[float], index: Expr) -> Expr:
    """`values[index]`; integers wrap to i32, floats give f32, a `WordTable` u32.

    A `Table` is taken as it is: use one for a long table, so that it is looked at once.
    """
    if len(values) == 0:
        raise ExprError(f"a table needs at least one value: table([], {index})")
    if not index.dtype.is_int:
        raise ExprError(f"a table is indexed by an integer, not by {index.dtype.value}: {index}")
    if isinstance(values, WordTable):
        return Expr("table", U32, (index,), values)
    dtype = F32 if any(_is_float(v) for v in values) else I32
    if not isinstance(values, Table):
        values = Table(const(v, dtype).attr for v in values)
    return Expr("table", dtype, (index,), values)


def cast(dtype: DType, x: Expr) -> Expr:
    """`x` converted by value (i32 <-> u32 keeps the bits; float to integer truncates)."""
    return x if x.dtype is dtype else Expr("cast", dtype, (x,))


def bitcast(dtype: DType, x: Expr) -> Expr:
    """The 32 bits of `x` read as another type."""
    if x.dtype is dtype:
        return x
    if BOOL in (dtype, x.dtype):
        raise ExprError(f"bool has no 32 bits to reinterpret: {x}")
    return Expr("bitcast", dtype, (x,))


def binary16(bits: Expr) -> Expr:
    """The number, f32, that 16 bits, 0..65535, stand for in IEEE 754 binary16,
    whatever a device does with subnormal ones."""
    exponent, mantissa = (bits >> 10) & 31, bits & 1023
    small = bitcast(I32, cast(F32, mantissa) * 2.0**-24)
    normal = ((exponent + 112) << 23) | (mantissa << 13)
    beyond = (mantissa << 13) | 0x7F800000
    size = where(equal(exponent, 0), small, where(equal(exponent, 31), beyond, normal))
    return bitcast(F32, size | ((bits >> 15) << 31))


def where(condition: Expr, a: Scalar, b: Scalar) -> Expr:
    """`a` where the condition holds, else `b`."""
    if not isinstance(condition, Expr):
        raise ExprError(
            f"the condition of where() must be an expression, not {condition!r};"
            " compare values with equal(a, b), as a == b compares the expressions themselves"
        )
    if condition.dtype is not BOOL:
        raise ExprError(f"the condition of where() must be bool, not {condition.dtype.value}")
    left, right = _same_type(a, b, "where")
    return Expr("select", left.dtype, (condition, left, right))


def equal(a: Scalar, b: Scalar) -> Expr:
    """Whether two values are equal (`==` itself compares expressions, not values)."""
    return _binary("==", a, b)


def logical_not(x: Expr) -> Expr:
    """The opposite of a condition."""
    return where(x, const(0, BOOL), const(1, BOOL))


def minimum(a: Scalar, b: Scalar) -> Expr:
    """The smaller of two values."""
    return _binary("min", a, b)


def maximum(a: Scalar, b: Scalar) -> Expr:
    """The larger of two values."""
    return _binary("max", a, b)


def call(function: str, x: Expr) -> Expr:
    """One of `FUNCTIONS` of an f32."""
    if function not in FUNCTIONS or x.dtype is not F32:
        raise ExprError(
            f"{function}({x.dtype.value}) is not a function of the IR; of f32 there are "
            + ", ".join(FUNCTIONS)
        )
    return Expr("call", F32, (x,), function)


def named(name: str, x: Expr, index: Expr) -> Expr:
    """`x` itself, remembered as element `index` of the quantity `name`; means what `x` means."""
    return Expr("named", x.dtype, (x, index), name)


def word(field: Field, unit: Expr) -> Expr:
    """Bytes 4*unit ... 4*unit+3 of a field as one u32, lowest byte first."""
    return Expr("word", U32, (unit,), field)


def fetch(storage: Storage, align: int, address: Expr) -> Expr:
    """An element at a byte address of the weights, which `align` divides."""
    return Expr("fetch", storage.dtype, (address,), (storage, align))


def spread(bits: int, x: Expr) -> Expr:
    """A u32 whose byte l is `(x >> bits*l) & (2**bits - 1)`, l = 0..3."""
    return Expr("spread", U32, (x,), bits)


def lookup(values: Sequence[int], x: Expr) -> Expr:
    """A u32 whose byte l is `values[byte l of x] & 255`; at most 16 values."""
    return Expr("lookup", U32, (x,), tuple(values))


def negate(x: Expr, bits: Expr) -> Expr:
    """A u32 whose byte l is byte l of x, 1..127, or its negative where byte l of `bits`, 0 or 1,
    is 1."""
    return Expr("negate", U32, (x, bits))


def splat(byte: int) -> Expr:
    """A u32 whose four bytes are all `byte`."""
    return const(0x01010101 * (byte & 255), U32)


def element(name: str, index: Expr) -> Expr:
    """Element `index` of a walk's local array `name` of u32 words."""
    return Expr("element", U32, (index,), name)


def _is_number(value: object) -> bool:
    """Whether it is a Python or numpy number."""
    return isinstance(value, numbers.Real)


def _is_float(value: object) -> bool:
    """Whether a Python or numpy number is no integer."""
    return not isinstance(value, numbers.Integral)


def _same_type(a: Scalar, b: Scalar, op: str) -> tuple[Expr, Expr]:
    if not isinstance(a, Expr) and not isinstance(b, Expr):
        dtype = F32 if _is_float(a) or _is_float(b) else I32
        return const(a, dtype), const(b, dtype)
    if not isinstance(a, Expr):
        assert isinstance(b, Expr)
        a = const(a, F32 if _is_float(a) else b.dtype)
    if not isinstance(b, Expr):
        b = const(b, F32 if _is_float(b) else a.dtype)
    if a.dtype is b.dtype:
        return a, b
    if F32 in (a.dtype, b.dtype):  # an integer beside a float becomes a float
        return cast(F32, a), cast(F32, b)
    if {a.dtype, b.dtype} == {I32, U32}:
        return cast(U32, a), cast(U32, b)
    raise ExprError(f"{a.dtype.value} {op} {b.dtype.value} has no meaning: {a} {op} {b}")


def _binary(op: str, a: Scalar, b: Scalar) -> Expr:
    if op in SHIFTS:  # the amount need not have the type of what is shifted
        left = a if isinstance(a, Expr) else const(a, I32)
        right = b if isinstance(b, Expr) else const(b, I32)
    else:
        left, right = _same_type(a, b, op)
    floats_ok = op in ("+", "-", "*", "/", "min", "max", *COMPARISONS)
    ints_ok = op != "/"
    if not (
        (left.dtype is F32 and floats_ok)
        or (left.dtype.is_int and right.dtype.is_int and ints_ok)
        or (left.dtype is BOOL and op in (*BITWISE, "=="))
    ):
        raise ExprError(
            f"{left.dtype.value} {op} {right.dtype.value} has no meaning: {left} {op} {right}"
        )
    return Expr(op, BOOL if op in COMPARISONS else left.dtype, (left, right))


def walk(expr: Expr) -> Iterator[Expr]:
    """Every distinct node below `expr`, operands before their users, `expr` last."""
    seen: set[int] = set()
    stack: list[tuple[Expr, bool]] = [(expr, False)]
    while stack:
        node, done = stack.pop()
        if done:
            yield node
        elif id(node) not in seen:
            seen.add(id(node))
            stack.append((node, True))
            stack.extend((arg, False) for arg in reversed(node.args))


def rebuild(expr: Expr, args: tuple[Expr, ...]) -> Expr:
    """The same operator on other operands."""
    return expr if args == expr.args else Expr(expr.op, expr.dtype, args, expr.attr)


def transform(expr: Expr, change: Callable[[Expr], Expr | None]) -> Expr:
    """Rewrite bottom-up: `change(node)` gives a replacement, or None to keep the node."""
    done: dict[Expr, Expr] = {}
    for node in walk(expr):
        kept = rebuild(node, tuple(done[a] for a in node.args))
        replaced = change(kept)
        done[node] = kept if replaced is None else replaced
    return done[expr]


def substitute(expr: Expr, values: dict[Expr, Expr]) -> Expr:
    """`expr` with each key of `values` replaced by its value."""
    return transform(expr, values.get)


def depends_on(expr: Expr, what: Expr) -> bool:
    """Whether `what` occurs in `expr`."""
    return any(node is what for node in walk(expr))


def loads(expr: Expr) -> list[Field]:
    """The fields that `expr` reads, in the order of their bytes."""
    found = {node.attr for node in walk(expr) if node.op in ("load", "word")}
    return sorted(found, key=lambda f: f.offset)


#: how tightly an operator binds, in Python and in C (where they differ, parentheses are written)
PRECEDENCE = {
    "select": 1, "==": 6, "<": 7, "|": 3, "^": 4, "&": 5, "<<": 8, ">>": 8, "+": 9, "-": 9,
    "*": 10, "//": 10, "%": 10, "/": 10, "neg": 11,
}  # fmt: skip


def show(expr: Expr) -> str:
    """The expression as a person would write it."""
    return _show(expr)[0]


def _show(expr: Expr) -> tuple[str, int]:
    atom = 99
    op, args = expr.op, expr.args
    if op == "const":
        if expr.dtype is U32 and expr.attr > 0xFFFF:  # a mask
            return f"0x{expr.attr:08X}", atom
        text = (
            f"{expr.attr:g}" if expr.dtype is F32 and math.isfinite(expr.attr) else f"{expr.attr}"
        )
        return text, atom if not text.startswith("-") else PRECEDENCE["neg"]
    if op == "var":
        return str(expr.attr[0]), atom
    if op == "load":
        return (expr.attr.name if expr.attr.count == 1 else f"{expr.attr.name}[{args[0]}]"), atom
    if op == "named":
        return f"{expr.attr}({args[1]})", atom
    if op == "word":
        return f"word({expr.attr.name}, {args[0]})", atom
    if op == "fetch":
        return f"{expr.attr[0].name}_at({args[0]})", atom
    if op == "element":
        return f"{expr.attr}[{args[0]}]", atom
    if op in ("spread", "cast", "bitcast", "call", "lookup", "negate", "table"):
        inside = ", ".join(map(show, args))
        if op in ("lookup", "table"):
            few = expr.attr if len(expr.attr) <= _SHOWN else expr.attr[:4]
            values = ", ".join(f"{v:g}" if isinstance(v, float) else f"{v}" for v in few)
            values += f", ... {len(expr.attr)} values" if few is not expr.attr else ""
            return f"{op}([{values}], {inside})", atom
        head = {"spread": f"spread{expr.attr}", "call": f"{expr.attr}", "negate": op}.get(
            op, expr.dtype.value
        )
        return f"{head}({inside})" if op != "bitcast" else f"bits_{head}({inside})", atom
    if op in ("min", "max"):
        return f"{op}({args[0]}, {args[1]})", atom
    level = PRECEDENCE[op]

    def side(arg: Expr, right: bool) -> str:
        text, inner = _show(arg)
        regrouped = op == arg.op == "+" and arg.dtype.is_int  # a + (b + c) needs none
        loose = inner < level or (inner == level and right and not regrouped)
        # & | ^ << >> beside arithmetic are misread by people, so these are always bracketed
        mixed = op in (*BITWISE, *SHIFTS) and arg.op in PRECEDENCE and arg.op != op
        # a < b == c compares three values in Python and two in C
        chained = op in COMPARISONS and arg.op in COMPARISONS
        return f"({text})" if loose or mixed or chained else text

    if op == "neg":
        return f"-{side(args[0], True)}", level
    if op == "select":
        return f"({show(args[1])} if {show(args[0])} else {show(args[2])})", atom
    return f"{side(args[0], False)} {op} {side(args[1], True)}", level

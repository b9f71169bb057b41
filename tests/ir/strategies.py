"""Random expressions, and the points at which two expressions are compared."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from hypothesis import strategies as st

from kernelgen.ir.evaluate import NUMPY_STORAGE, evaluate
from kernelgen.ir.expr import (
    BOOL,
    I32,
    STORAGES,
    U32,
    DType,
    Expr,
    Field,
    cast,
    const,
    equal,
    load,
    logical_not,
    named,
    table,
    var,
    where,
)

Array = npt.NDArray[Any]
Draw = Any

INT_MIN, INT_MAX, UINT_MAX = -(2**31), 2**31 - 1, 2**32 - 1
LIMITS = {I32: (INT_MIN, INT_MAX), U32: (0, UINT_MAX), BOOL: (0, 1)}


def _fields(**declared: tuple[str, int]) -> dict[str, Field]:
    result, offset = {}, 0
    for name, (storage, count) in declared.items():
        result[name] = Field(name, STORAGES[storage], count, offset)
        offset += result[name].nbytes
    return result


FIELDS = _fields(qs=("u8", 16), sc=("i8", 8), hw=("u16", 4), sh=("i16", 4), big=("u32", 4))


def signed_var(name: str, lo: int, hi: int) -> Expr:
    """A variable in lo ... hi, which var() offers only from 0."""
    return Expr("var", I32, attr=(name, lo, hi))


IX, G, N = var("i", 32), var("g", 8), signed_var("n", INT_MIN, INT_MAX)
T, U = signed_var("t", -5, 9), var("u", 1 << 32, U32)
VARIABLES = {I32: (IX, G, N, T), U32: (U,)}

# --- points -------------------------------------------------------------------------------------

LENGTH, BLOCKS = 48, 3
_rng = np.random.default_rng(20)


def _values(lo: int, hi: int, shape: tuple[int, ...]) -> Array:
    """Random values with the ends, and what lies near zero, among them."""
    values = _rng.integers(lo, hi, shape, np.int64, endpoint=True)
    edges = [v for v in (lo, lo + 1, -1, 0, 1, hi - 1, hi) if lo <= v <= hi]
    flat = values.reshape(-1)
    at = _rng.choice(flat.size, min(len(edges), flat.size // 2), replace=False)
    flat[at] = edges[: len(at)]
    return values


POINTS = {v.attr[0]: _values(*v.attr[1:], (LENGTH,)) for vs in VARIABLES.values() for v in vs}
STORED = {
    name: _values(f.storage.lo, f.storage.hi, (BLOCKS, f.count)).astype(
        NUMPY_STORAGE[f.storage.name]
    )
    for name, f in FIELDS.items()
}


def value(expr: Expr) -> Array:
    """The values of an expression of this file's variables and fields, at all points."""
    return evaluate(expr, POINTS, STORED)


def assert_same(before: Expr, after: Expr) -> None:
    """The two mean the same at all points."""
    assert after.dtype is before.dtype, f"{before} -> {after} changes the type"
    a, b = np.broadcast_arrays(value(before), value(after))
    assert a.dtype == b.dtype
    same = a == b if a.dtype != np.float32 else (a == b) | (np.isnan(a) & np.isnan(b))
    if not same.all():
        where_ = tuple(np.argwhere(~same)[0])
        raise AssertionError(f"{before} -> {after} turns {a[where_]} into {b[where_]} at {where_}")


# --- expressions --------------------------------------------------------------------------------

SMALL = (1, 2, 3, 4, 6, 8, 12, 16, 32, 64, 256)
EDGES = (0, -1, 5, 7, 15, 63, 255, 65535, 2**16, 2**20, 2**30, INT_MAX, INT_MIN)
NEGATIVE = (-2, -3, -4, -8, -16, -64)


def constants(dtype: DType = I32) -> st.SearchStrategy[Expr]:
    """Powers of two and their like more often than the rest."""
    chosen = st.one_of(*map(st.sampled_from, (SMALL, SMALL, EDGES, NEGATIVE)))
    return chosen.map(lambda v: const(v, dtype))


def _load(draw: Draw, dtype: DType, index: Expr) -> Expr:
    field = draw(st.sampled_from([f for f in FIELDS.values() if f.storage.dtype is dtype]))
    return load(field, cast(I32, index % field.count))


@st.composite
def leaves(draw: Draw, dtype: DType = I32) -> Expr:
    """A constant, a variable, or an element of a field."""
    kind = draw(st.sampled_from(("const", "var", "load", "load")))
    if kind == "const":
        return draw(constants(dtype))
    if kind == "var":
        return draw(st.sampled_from(VARIABLES[dtype]))
    return _load(draw, dtype, draw(st.sampled_from((IX, G))))


@st.composite
def ints(draw: Draw, dtype: DType = I32, depth: int = 3) -> Expr:
    """An integer expression of every kind of node that formats and walks write."""
    if depth == 0 or draw(st.integers(0, 4)) == 0:
        return draw(leaves(dtype))
    return draw(st.sampled_from(_KINDS))(draw, dtype, depth - 1)


@st.composite
def bools(draw: Draw, depth: int = 2) -> Expr:
    """A condition."""
    kind = draw(st.sampled_from(("<", "==", "not", "&")))
    if depth == 0 or kind in ("<", "=="):
        dtype = draw(st.sampled_from((I32, U32)))
        a, b = (draw(ints(dtype, max(depth - 1, 0))) for _ in range(2))
        return equal(a, b) if kind == "==" else a < b
    if kind == "not":
        return logical_not(draw(bools(depth - 1)))
    return draw(bools(depth - 1)) & draw(bools(depth - 1))


def _arithmetic(draw: Draw, dtype: DType, depth: int) -> Expr:
    op = draw(st.sampled_from(("+", "-", "*", "&", "|", "^", "min", "max")))
    return Expr(op, dtype, (draw(ints(dtype, depth)), draw(ints(dtype, depth))))


def _with_constant(draw: Draw, dtype: DType, depth: int) -> Expr:
    op = draw(st.sampled_from(("+", "-", "*", "*", "//", "%", "&", "|", "^")))
    by = draw(constants(dtype))
    if op in ("//", "%") and by.attr == 0:
        by = const(8, dtype)
    return Expr(op, dtype, (draw(ints(dtype, depth)), by))


def _divided(draw: Draw, dtype: DType, depth: int) -> Expr:
    """Mixed radix, as indices are written: (e // a) * b + e % a and parts of it."""
    e, a = draw(ints(dtype, depth)), draw(st.sampled_from(SMALL))
    parts = (e // a, e % a, e // a * a + e % a, e // a * draw(st.sampled_from(SMALL)) + e % a)
    return draw(st.sampled_from(parts))


def _shift(draw: Draw, dtype: DType, depth: int) -> Expr:
    op = draw(st.sampled_from(("<<", ">>")))
    amounts = st.one_of(st.integers(0, 31).map(lambda v: const(v, I32)), st.sampled_from((IX, G)))
    return Expr(op, dtype, (draw(ints(dtype, depth)), draw(amounts)))


def _select(draw: Draw, dtype: DType, depth: int) -> Expr:
    return where(draw(bools(min(depth, 1))), draw(ints(dtype, depth)), draw(ints(dtype, depth)))


def _table(draw: Draw, dtype: DType, depth: int) -> Expr:
    values = draw(st.lists(st.integers(INT_MIN, INT_MAX), min_size=1, max_size=16))
    return cast(dtype, table(values, draw(ints(dtype, depth)) % len(values)))


def _load_at(draw: Draw, dtype: DType, depth: int) -> Expr:
    return _load(draw, dtype, draw(ints(I32, depth)))


def _cast(draw: Draw, dtype: DType, depth: int) -> Expr:
    other = U32 if dtype is I32 else I32
    return cast(dtype, draw(st.one_of(ints(other, depth), bools(min(depth, 1)))))


def _named(draw: Draw, dtype: DType, depth: int) -> Expr:
    return named("q", draw(ints(dtype, depth)), G)


_KINDS = (
    _arithmetic, _with_constant, _with_constant, _divided, _shift, _select, _table, _load_at,
    _cast, _named,
)  # fmt: skip


# --- rules --------------------------------------------------------------------------------------


@st.composite
def operands(draw: Draw, dtype: DType) -> Expr:
    """What a pattern variable stands for: often a multiple, or small, so that laws apply."""
    e = draw(ints(dtype, draw(st.integers(0, 1))))
    c, m = draw(st.sampled_from(SMALL)), draw(st.sampled_from((4, 8, 12, 64)))
    multiple = (e % c) * m
    return draw(st.sampled_from((e, e % c, e % 3, multiple, multiple, const(c, dtype))))


@st.composite
def instances(draw: Draw, pattern: Expr) -> Expr:
    """`pattern`, the left side of a law, with expressions in the place of its variables."""
    dtype = draw(st.sampled_from((I32, U32)))
    chosen: dict[str, Expr] = {}

    def stands_for(name: str) -> Expr:
        if name not in chosen:
            kinds = {"?": bools(1) if name == "?p" else operands(dtype), "#": constants(dtype)}
            chosen[name] = draw(kinds[name[0]])
        return chosen[name]

    def build(node: Expr) -> Expr:
        if node.op == "var":
            return stands_for(node.attr[0])
        if node.op == "const":
            return const(node.attr, dtype)
        return _retyped(node, [build(a) for a in node.args])

    return build(pattern)


def _retyped(node: Expr, args: Sequence[Expr]) -> Expr:
    dtype = node.dtype if node.dtype is BOOL else args[-1].dtype
    if node.op in ("<<", ">>"):
        dtype = args[0].dtype
    return Expr(node.op, dtype, tuple(args), node.attr)

"""What is known of an expression holds for every value it takes, and is worth knowing."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernelgen.errors import ExprError
from kernelgen.ir.expr import (
    BOOL,
    F32,
    I32,
    U32,
    Expr,
    cast,
    const,
    equal,
    load,
    maximum,
    minimum,
    table,
    var,
    walk,
    where,
)
from kernelgen.ir.ranges import divisor, fits, interval, wraps
from tests.ir.strategies import (
    FIELDS,
    INT_MAX,
    INT_MIN,
    IX,
    LIMITS,
    UINT_MAX,
    G,
    N,
    T,
    U,
    bools,
    ints,
    value,
)

any_int = st.one_of(ints(I32), ints(U32))
QS, SC = FIELDS["qs"], FIELDS["sc"]


def assert_in_interval(expr: Expr) -> None:
    lo, hi = interval(expr)
    seen = value(expr).astype(np.int64)
    assert lo <= seen.min() and seen.max() <= hi, f"{expr}: {seen.min()}..{seen.max()}, {lo}..{hi}"


def assert_divides(expr: Expr) -> None:
    by = divisor(expr)
    seen = value(expr).astype(np.int64)
    rest = seen % by if by else seen
    assert not rest.any(), f"{expr} is {seen[rest != 0][0]}, which {by} does not divide"


@given(st.one_of(any_int, bools()))
def test_interval_contains_every_value(expr: Expr) -> None:
    for node in walk(expr):
        assert_in_interval(node)


@given(st.one_of(any_int, bools()))
def test_divisor_divides_every_value(expr: Expr) -> None:
    for node in walk(expr):
        assert_divides(node)


def exact(node: Expr) -> list[int]:
    """+ - * << of the operands' values as whole numbers, which do not wrap."""
    a, b = (np.broadcast_arrays(value(node), value(arg))[1].ravel().tolist() for arg in node.args)
    apply = {
        "+": int.__add__, "-": int.__sub__, "*": int.__mul__,
        "<<": lambda x, y: x << (y & 31),
    }[node.op]  # fmt: skip
    return [apply(x, y) for x, y in zip(a, b, strict=True)]


@given(any_int)
def test_what_wraps_is_known_to(expr: Expr) -> None:
    for node in walk(expr):
        if node.op in ("+", "-", "*", "<<") and not wraps(node):
            lo, hi = LIMITS[node.dtype]
            assert all(lo <= v <= hi for v in exact(node)), f"{node} wraps"


@pytest.mark.parametrize(
    ("expr", "expected"),
    [
        (N + 1, True), (N * 2, True), (N - N, True), (N << 1, True), (U + 1, True), (U - 1, True),
        (U * 2, True), (G - U, True), (const(1, I32) << IX, True), (const(1, U32) << IX, False),
        (G - 8, False), (G * 2**28, False), (G * 2**29, True), (G << 28, False), (G << 29, True),
        (cast(U32, G) - 1, True), (IX + G, False), (N // 2, False), (N & 3, False), (G << N, True),
        (cast(F32, N) * 2.0, False),
    ],
    ids=str,
)  # fmt: skip
def test_wraps(expr: Expr, expected: bool) -> None:
    assert wraps(expr) is expected


@pytest.mark.parametrize(
    ("expr", "expected"),
    [
        (const(-3, I32), (-3, -3)),
        (IX, (0, 31)),
        (load(QS, 0), (0, 255)),
        (load(SC, 0), (-128, 127)),
        (load(FIELDS["big"], 0), (0, UINT_MAX)),
        (load(FIELDS["hw"], 0) - load(FIELDS["sh"], 0), (-32767, 98303)),
        ((load(QS, IX % 16) >> 4) & 15, (0, 15)),
        (load(QS, 0) & 3 | (load(QS, 1) & 1) << 2, (0, 7)),
        (load(SC, 0) * load(SC, 1), (-16256, 16384)),
        (32 * G + IX, (0, 255)),
        (IX // 4, (0, 7)),
        (IX % 4, (0, 3)),
        (G % 16, (0, 7)),
        ((G + 16) % 16, (0, 7)),
        ((G + 12) % 16, (0, 15)),
        (T // 4, (-2, 2)),
        (T % 4, (0, 3)),
        (T >> 1, (-3, 4)),
        (T << 2, (-20, 36)),
        (T << G, (-640, 1152)),
        ((T + 6) << G, (1, 1920)),
        (T >> G, (-5, 9)),
        ((T + 6) >> G, (0, 15)),
        ((T - 10) >> G, (-15, -1)),
        (T // -4, (INT_MIN, INT_MAX)),
        (T & 7, (0, 7)),
        (T ^ 7, (-16, 15)),
        (T | T, (-16, 15)),
        (T & (T - 20), (-32, 31)),
        (load(SC, 0) ^ -1, (-128, 127)),
        (N ^ 1, (INT_MIN, INT_MAX)),
        (U ^ 1, (0, UINT_MAX)),
        (G ^ 9, (0, 15)),
        (minimum(T, G), (-5, 7)),
        (maximum(T, 3), (3, 9)),
        (where(IX < 3, T, G + 8), (-5, 15)),
        (table((3, -1, 4, 1, 5), G % 4), (-1, 4)),
        (N + 1, (INT_MIN, INT_MAX)),
        (U + 1, (0, UINT_MAX)),
        (cast(U32, T), (0, UINT_MAX)),
        (cast(I32, U), (INT_MIN, INT_MAX)),
        (cast(U32, G) + 1, (1, 8)),
        (cast(I32, IX < 3), (0, 1)),
        (IX < 32, (1, 1)),
        (IX < 0, (0, 0)),
        (IX < 7, (0, 1)),
        (equal(G, 8), (0, 0)),
        (equal(G * 0, 0), (1, 1)),
        (cast(I32, cast(F32, G)), (INT_MIN, INT_MAX)),
    ],
    ids=lambda v: str(v),
)
def test_interval(expr: Expr, expected: tuple[int, int]) -> None:
    assert interval(expr) == expected


@pytest.mark.parametrize(
    ("expr", "expected"),
    [
        (const(-12, I32), 12),
        (const(0, I32), 0),
        (G, 1),
        (12 * G, 12),
        (12 * G + 8 * IX, 4),
        (12 * G - 18, 6),
        ((6 * G) * (4 * IX), 24),
        (G << 3, 8),
        (24 * G % 36, 12),
        (where(IX < 3, 12 * G, 8 * IX), 4),
        (IX < 3, 1),
        (cast(F32, G), 1),
        # multiples of 3 and of 4 that wrap at 2^32 remain multiples of 4 only
        (N * 12, 4),
        (U * 6 + 3 * U, 1),
        (U * 12 + U * 24, 4),
        (N << 3, 8),
        (12 * U - 24, 4),
    ],
    ids=lambda v: str(v),
)
def test_divisor(expr: Expr, expected: int) -> None:
    assert divisor(expr) == expected


def test_a_division_is_not_by_more_than_the_divisor_of_what_wraps() -> None:
    assert_divides(N * 3)
    assert_divides(U * 5 * 5)
    assert_divides(cast(U32, G) * 6 - 12)


def test_fits() -> None:
    assert fits(G, 0, 7) and fits(G, -1, 8)
    assert not fits(G, 1, 7) and not fits(G, 0, 6)


def test_floats_have_no_interval() -> None:
    with pytest.raises(ExprError, match=r"only integers have an interval, not f32: f32\(g\)"):
        interval(cast(F32, G))


def test_one_value_of_a_variable_is_its_interval() -> None:
    assert interval(var("only", 1)) == (0, 0)
    assert interval(Expr("var", BOOL, attr=("p", 0, 1))) == (0, 1)

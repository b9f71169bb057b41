"""The meaning of every operation, against Python's own whole numbers and the math module."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from kernelgen.errors import ExprError
from kernelgen.ir.evaluate import NUMPY_STORAGE, evaluate
from kernelgen.ir.expr import (
    BOOL,
    F32,
    FUNCTIONS,
    I32,
    STORAGES,
    U32,
    DType,
    Expr,
    Field,
    bitcast,
    call,
    cast,
    const,
    element,
    equal,
    fetch,
    load,
    logical_not,
    lookup,
    maximum,
    minimum,
    named,
    spread,
    table,
    var,
    where,
    word,
    wrap,
)
from tests.ir.strategies import INT_MAX, INT_MIN, UINT_MAX, signed_var

NUMBERS = {
    I32: (INT_MIN, INT_MIN + 1, -65536, -7, -4, -3, -1, 0, 1, 2, 3, 4, 7, 100, 2**30, INT_MAX),
    U32: (0, 1, 2, 3, 4, 7, 100, 65536, 2**30, 2**31 - 1, 2**31, 2**31 + 1, UINT_MAX - 1, UINT_MAX),
}
VARIABLES = {
    I32: tuple(signed_var(name, INT_MIN, INT_MAX) for name in "ab"),
    U32: tuple(var(name, 1 << 32, U32) for name in "ab"),
}
QS = Field("qs", STORAGES["u8"], 8, 0)
I = var("i", 8)  # noqa: E741


def pairs(dtype: DType) -> dict[str, npt.NDArray[np.int64]]:
    a, b = np.meshgrid(NUMBERS[dtype], NUMBERS[dtype])
    return {"a": a.ravel(), "b": b.ravel()}


def assert_means(
    expr: Expr, expected: Callable[[int, int], int | bool], operands: DType, nonzero: bool = False
) -> None:
    """`expr` of a and b is what Python computes, wrapped to the type."""
    points = pairs(operands)
    if nonzero:
        points = {name: values[points["b"] != 0] for name, values in points.items()}
    seen = evaluate(expr, points)
    for a, b, value in zip(points["a"].tolist(), points["b"].tolist(), seen.tolist(), strict=True):
        want = expected(a, b)
        assert value == (want if expr.dtype is BOOL else wrap(int(want), expr.dtype)), (a, b)


@pytest.mark.parametrize("dtype", [I32, U32], ids=lambda t: t.value)
def test_integer_arithmetic_is_pythons_and_wraps(dtype: DType) -> None:
    a, b = VARIABLES[dtype]
    assert_means(a + b, lambda a, b: a + b, dtype)
    assert_means(a - b, lambda a, b: a - b, dtype)
    assert_means(a * b, lambda a, b: a * b, dtype)
    assert_means(a // b, lambda a, b: a // b, dtype, nonzero=True)
    assert_means(a % b, lambda a, b: a % b, dtype, nonzero=True)
    assert_means(a & b, lambda a, b: a & b, dtype)
    assert_means(a | b, lambda a, b: a | b, dtype)
    assert_means(a ^ b, lambda a, b: a ^ b, dtype)
    assert_means(-a, lambda a, b: -a, dtype)
    assert_means(minimum(a, b), min, dtype)
    assert_means(maximum(a, b), max, dtype)


@pytest.mark.parametrize("dtype", [I32, U32], ids=lambda t: t.value)
def test_comparisons(dtype: DType) -> None:
    a, b = VARIABLES[dtype]
    assert_means(a < b, lambda a, b: a < b, dtype)
    assert_means(a <= b, lambda a, b: a <= b, dtype)
    assert_means(a > b, lambda a, b: a > b, dtype)
    assert_means(a >= b, lambda a, b: a >= b, dtype)
    assert_means(equal(a, b), lambda a, b: a == b, dtype)
    assert_means(logical_not(a < b), lambda a, b: not a < b, dtype)
    assert_means((a < b) & (a < 0) | equal(a, b), lambda a, b: a <= b and (a < 0 or a == b), dtype)


@pytest.mark.parametrize("dtype", [I32, U32], ids=lambda t: t.value)
@pytest.mark.parametrize("by", [0, 1, 4, 7, 8, 24, 31])
def test_shifts(dtype: DType, by: int) -> None:
    a, _ = VARIABLES[dtype]
    assert_means(a << by, lambda a, b: a << by, dtype)
    assert_means(a >> by, lambda a, b: a >> by, dtype)
    assert_means(a >> const(by, U32), lambda a, b: a >> by, dtype)


def test_integers_of_two_types_meet_as_u32() -> None:
    a, _ = VARIABLES[I32]
    assert_means(a + const(1, U32), lambda a, b: a % 2**32 + 1, I32)
    assert_means(a < const(5, U32), lambda a, b: a % 2**32 < 5, I32)
    assert_means(cast(I32, cast(U32, a)), lambda a, b: a, I32)
    assert_means(cast(I32, VARIABLES[U32][0]), lambda a, b: a, U32)


@pytest.mark.parametrize(
    ("expr", "expected"),
    [
        (cast(I32, const(-2.7, F32)), -2), (cast(I32, const(2.7, F32)), 2),
        (cast(U32, const(3e9, F32)), 3_000_000_000), (cast(F32, const(UINT_MAX, U32)), 2.0**32),
        (cast(F32, const(2**24 + 1, I32)), 2.0**24), (cast(BOOL, const(-2, I32)), True),
        (cast(BOOL, const(0.0, F32)), False), (cast(F32, const(True, BOOL)), 1.0),
        (cast(I32, const(True, BOOL)), 1), (bitcast(U32, const(1.0, F32)), 0x3F800000),
        (bitcast(F32, const(0x3F800000, I32)), 1.0), (bitcast(I32, const(UINT_MAX, U32)), -1),
        (bitcast(U32, const(-0.0, F32)), 0x80000000), (const(1, F32) / 3.0, np.float32(1) / 3),
        (const(1, F32) / 0.0, math.inf), (const(16777216.0, F32) + 1.0, 16777216.0),
        (table((5, -6, 7), const(1, I32)), -6), (table((0.1,), const(0, U32)), np.float32(0.1)),
        (where(const(1, BOOL), 3, 4), 3), (named("q", const(3, I32), const(0, I32)), 3),
        (spread(4, const(0xABCD, U32)), 0x0A0B0C0D), (spread(1, const(0b0101, U32)), 0x00010001),
        (spread(8, const(0xDEADBEEF, U32)), 0xDEADBEEF),
        (lookup((10, -1, 12), const(0x02000103, U32)), 0x0C0AFF00),
    ],
    ids=str,
)  # fmt: skip
def test_value(expr: Expr, expected: float) -> None:
    seen = evaluate(expr)
    assert seen.shape == ()
    assert seen.item() == expected


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_are_rounded_once(name: str) -> None:
    exact = {"rsqrt": lambda v: 1 / math.sqrt(v), "abs": abs}
    for number in (0.25, 1.0, 1.7, 30.0):
        seen = evaluate(call(name, const(number, F32)))
        assert seen.dtype == np.float32
        of = float(np.float32(number))
        assert seen == np.float32(exact.get(name, getattr(math, name, None))(of)), number


def test_functions_at_the_edges() -> None:
    assert evaluate(call("exp", const(-1000.0, F32))) == 0
    assert evaluate(call("exp", const(1000.0, F32))) == np.inf
    assert evaluate(call("log", const(0.0, F32))) == -np.inf
    assert np.isnan(evaluate(call("sqrt", const(-1.0, F32))))
    assert evaluate(call("rsqrt", const(0.0, F32))) == np.inf
    assert evaluate(call("tanh", const(-1000.0, F32))) == -1


# --- loads and shapes ---------------------------------------------------------------------------

BLOCKS = np.arange(48, dtype=np.uint8).reshape(2, 3, 8)


@pytest.mark.parametrize(
    ("expr", "shape"),
    [
        (const(1, I32), ()), (I + 1, (8,)), (load(QS, 3), (2, 3, 1)), (load(QS, I), (2, 3, 8)),
        (load(QS, I) + load(QS, 0), (2, 3, 8)), (load(QS, 0) + I, (2, 3, 8)),
        (word(QS, const(1, I32)), (2, 3, 1)), (load(QS, load(QS, 0) % 8), (2, 3, 1)),
        (load(QS, (load(QS, I) + I) % 8), (2, 3, 8)), (table((1, 2), load(QS, I) % 2), (2, 3, 8)),
    ],
    ids=str,
)  # fmt: skip
def test_shape(expr: Expr, shape: tuple[int, ...]) -> None:
    assert evaluate(expr, {"i": np.arange(8)}, {"qs": BLOCKS}).shape == shape


def test_loads_take_the_elements_of_each_block() -> None:
    seen = evaluate(load(QS, 7 - I), {"i": np.arange(8)}, {"qs": BLOCKS})
    assert np.array_equal(seen, BLOCKS[..., ::-1])


def test_loads_may_be_indexed_by_loads() -> None:
    at = (load(QS, I) + I) % 8
    seen = evaluate(load(QS, at), {"i": np.arange(8)}, {"qs": BLOCKS})
    index = (BLOCKS.astype(int) + np.arange(8)) % 8
    assert np.array_equal(seen, np.take_along_axis(BLOCKS, index, -1))
    unit = evaluate(word(QS, load(QS, 1) % 2), {}, {"qs": BLOCKS})
    words = BLOCKS.view("<u4")
    assert np.array_equal(unit, np.take_along_axis(words, BLOCKS[..., 1:2].astype(int) % 2, -1))


@pytest.mark.parametrize(
    ("storage", "stored"),
    [
        ("u8", [0, 255]), ("i8", [-128, 127]), ("u16", [0, 65535]), ("i16", [-32768, 32767]),
        ("u32", [0, UINT_MAX]), ("f16", [-65504.0, 2.0**-24]), ("f32", [-1.5, 3e38]),
    ],
)  # fmt: skip
def test_loads_keep_the_value(storage: str, stored: list[float]) -> None:
    numpy = {"u": "<u", "i": "<i", "f": "<f"}[storage[0]] + str(STORAGES[storage].nbytes)
    fields = {"x": np.array(stored, numpy)}
    seen = evaluate(load(Field("x", STORAGES[storage], 2, 0), var("i", 2)), {"i": [0, 1]}, fields)
    assert np.array_equal(seen, fields["x"].astype(np.float64))


def test_words_are_little_endian() -> None:
    seen = evaluate(word(QS, var("j", 2)), {"j": [0, 1]}, {"qs": BLOCKS})
    assert np.array_equal(seen, BLOCKS.view("<u4"))
    assert seen.dtype == np.uint32


def test_words_of_a_walk_and_bytes_of_the_weights() -> None:
    words = np.array([[5, 2**32 - 1], [7, 9]], np.uint32)
    seen = evaluate(element("local", var("j", 2)), {"j": [1, 0]}, {"local": words})
    assert np.array_equal(seen, words[:, ::-1])
    weights = BLOCKS.reshape(-1)
    for storage in ("u8", "i8", "u16", "i16", "u32", "f16", "f32"):
        expr = fetch(STORAGES[storage], 4, var("at", 48))
        stored = np.dtype(NUMPY_STORAGE[storage])
        expected = [weights[a : a + stored.itemsize].view(stored)[0] for a in (0, 4, 40)]
        seen = evaluate(expr, {"at": [0, 4, 40]}, {"w": weights})
        assert seen.tolist() == expected, storage


def test_the_branch_not_taken_may_read_outside() -> None:
    short = Field("short", STORAGES["u8"], 4, 0)
    expr = where(I < 4, load(short, I), load(short, I - 4) + table((10, 20, 30, 40), I - 4))
    seen = evaluate(expr, {"i": np.arange(8)}, {"short": BLOCKS[..., :4]})
    expected = np.concatenate([BLOCKS[..., :4], BLOCKS[..., :4] + [10, 20, 30, 40]], axis=-1)
    assert np.array_equal(seen, expected)


@pytest.mark.parametrize(
    ("expr", "given", "text"),
    [
        (I + 1, {}, "no value given for variable i; given: []"),
        (I + 1, {"j": 3}, "no value given for variable i; given: ['j']"),
        (I + 1, {"i": 8}, "variable i must lie in 0..7, not 8"),
        (I + 1, {"i": [0, -1]}, "variable i must lie in 0..7, not [ 0 -1]"),
        (load(QS, 0), {}, "no values given for field qs; given: []"),
    ],
)
def test_missing_and_wrong_values(expr: Expr, given: dict[str, Any], text: str) -> None:
    with pytest.raises(ExprError) as caught:
        evaluate(expr, given)
    assert str(caught.value) == text


def test_shared_parts_are_computed_once() -> None:
    doubled = I
    for _ in range(200):  # 2^200 paths
        doubled = doubled + doubled
    assert evaluate(doubled, {"i": [1]})[0] == 0

"""Expressions: one object each, typed, immutable, and printed as a person would write them."""

from __future__ import annotations

import copy
import gc
import operator
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from kernelgen.errors import ExprError, KernelgenError
from kernelgen.ir.expr import (
    BOOL,
    F32,
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
    depends_on,
    equal,
    load,
    loads,
    logical_not,
    lookup,
    maximum,
    minimum,
    named,
    rebuild,
    show,
    splat,
    spread,
    substitute,
    table,
    transform,
    var,
    walk,
    where,
    word,
)
from kernelgen.ir.ranges import wraps
from tests.ir.strategies import FIELDS, IX, POINTS, STORED, G, N, T, U, bools, ints, value

QS, SC, BIG = FIELDS["qs"], FIELDS["sc"], FIELDS["big"]
D = Field("d", STORAGES["f16"], 1, 100)
d, x, q = load(D, 0), cast(F32, G), load(QS, IX % 16)

any_expr = st.one_of(ints(I32), ints(U32), bools())

# --- identity -----------------------------------------------------------------------------------


def test_alike_is_identical() -> None:
    assert (q >> 4) & 15 is (load(QS, var("i", 32) % 16) >> 4) & 15
    assert G + 1 is not 1 + G
    assert const(1, I32) is not const(1, U32)
    assert load(QS, 0) is not load(SC, 0)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (const(0.0, F32), const(-0.0, F32)),
        (const(1, I32), const(1.0, F32)),
        (const(1, I32), const(True, BOOL)),
        (table((0.0, 1.0), G), table((-0.0, 1.0), G)),
        (table((0, 1), G), table((0.0, 1.0), G)),
        (var("g", 8), var("g", 9)),
        (bitcast(F32, U), cast(F32, U)),
        (spread(2, U), spread(4, U)),
    ],
    ids=str,
)
def test_what_differs_is_another_object(a: Expr, b: Expr) -> None:
    assert a is not b
    assert a != b


def test_equality_and_hash_are_by_identity() -> None:
    assert G == var("g", 8)
    assert G != var("h", 8)
    assert {G + 1: "seen"}[var("g", 8) + 1] == "seen"


def test_unused_expressions_are_forgotten_and_can_be_built_again() -> None:
    text = repr(var("forgotten", 5) + 3)
    gc.collect()
    assert repr(var("forgotten", 5) + 3) == text


def test_copies_are_the_same_object() -> None:
    assert copy.copy(q) is q
    assert copy.deepcopy([q, {"q": q}])[1]["q"] is q


@given(any_expr)
def test_pickling_gives_the_same_object(expr: Expr) -> None:
    assert pickle.loads(pickle.dumps(expr)) is expr


@pytest.mark.parametrize("name", ["op", "dtype", "args", "attr", "anything"])
def test_expressions_are_immutable(name: str) -> None:
    with pytest.raises(AttributeError, match=f"immutable: {name} cannot be set"):
        setattr(q, name, None)


# --- types --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("expr", "dtype"),
    [
        (G + 1, I32), (1 + G, I32), (U + 1, U32), (G + 1.0, F32), (U * 2.5, F32), (x + 1, F32),
        (G + U, U32), (U - G, U32), (G * x, F32), (-G, I32), (-U, U32), (-x, F32), (G < 3, BOOL),
        (x < 3, BOOL), (3 > G, BOOL), (G <= 3, BOOL), (G >= U, BOOL), (equal(G, 3), BOOL),
        (G << U, I32), (U >> G, U32), (1 << G, I32), (256 >> G, I32), (x / 2, F32), (1 / x, F32),
        (7 - G, I32), (7 & G, I32), (7 | G, I32), (7 ^ G, I32), (minimum(G, 3), I32),
        (maximum(x, G), F32), ((G < 3) & (G < 5), BOOL), ((G < 3) | True, BOOL),
        (equal(G < 3, G < 5), BOOL), (where(G < 3, 1, 2), I32), (where(G < 3, 1, 2.0), F32),
        (where(G < 3, U, G), U32), (where(G < 3, G < 1, G < 2), BOOL), (table((1, 2), G), I32),
        (table((1, 2.5), G), F32), (cast(F32, G < 3), F32), (bitcast(U32, x), U32),
        (call("exp", x), F32), (word(QS, G), U32), (spread(4, U), U32), (lookup((1,), U), U32),
        (named("sc", x, G), F32), (logical_not(G < 3), BOOL), (splat(-1), U32),
    ],
    ids=str,
)  # fmt: skip
def test_type(expr: Expr, dtype: DType) -> None:
    assert expr.dtype is dtype


@pytest.mark.parametrize("name", STORAGES)
def test_type_of_a_load(name: str) -> None:
    expected = {"u32": U32, "f16": F32, "f32": F32}.get(name, I32)
    assert load(Field("f", STORAGES[name], 4, 0), G).dtype is expected


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (np.int64(3), "g * 3"), (np.uint8(3), "g * 3"), (np.float32(1.5), "f32(g) * 1.5"),
        (np.float64(1.5), "f32(g) * 1.5"), (True, "g * 1"),
    ],
)  # fmt: skip
def test_numbers_of_numpy(number: Any, expected: str) -> None:
    assert show(G * number) == expected
    left, right = (number * G).args
    assert (right, left) == (G * number).args


@pytest.mark.parametrize(
    ("number", "dtype", "expected"),
    [
        (2**31, I32, -(2**31)), (-1, U32, 2**32 - 1), (2**32 + 5, U32, 5), (3.0, I32, 3),
        (0.1, F32, float(np.float32(0.1))), (1e300, F32, float("inf")), (7, BOOL, True),
        (2**24 + 1, F32, 2.0**24),
    ],
)  # fmt: skip
def test_constants_have_the_value_of_their_type(number: Any, dtype: DType, expected: Any) -> None:
    assert const(number, dtype).attr == expected


def test_tables_hold_values_of_their_type() -> None:
    assert table((1, 2**31, 2**32 + 3), G).attr == (1, -(2**31), 3)
    assert table(np.arange(3), G) is table((0, 1, 2), G)
    assert table((0.1, 1), G).attr == (float(np.float32(0.1)), 1.0)


BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "shift a float": (lambda: x << 1, "f32 << i32 has no meaning: f32(g) << 1"),
    "shift by a float": (lambda: G << x, "i32 << f32 has no meaning: g << f32(g)"),
    "shift by 1.5": (lambda: G << 1.5, "an i32 constant must be a whole number, not 1.5"),
    "mask a float": (lambda: x & 1, "f32 & f32 has no meaning: f32(g) & 1"),
    "divide integers": (lambda: G / 2, "i32 / i32 has no meaning: g / 2"),
    "remainder of floats": (lambda: x % 2.0, "f32 % f32 has no meaning: f32(g) % 2"),
    "add conditions": (lambda: (G < 3) + (G < 4), "bool + bool has no meaning"),
    "condition and integer": (lambda: (G < 3) & G, "bool & i32 has no meaning"),
    "negate a condition": (lambda: -(G < 3), "bool - bool has no meaning"),
    "order conditions": (lambda: (G < 3) < (G < 4), "bool < bool has no meaning"),
    "where on an integer": (lambda: where(G, 1, 2), "condition of where() must be bool, not i32"),
    "where on ==": (lambda: where(G == 3, 1, 2), "compare values with equal(a, b)"),
    "branches that differ": (lambda: where(G < 3, G < 3, G), "bool where i32 has no meaning"),
    "truth": (lambda: bool(G < 3), "is not known while kernels are generated; use"),
    "if": (lambda: 1 if G < 3 else 2, "use kernelgen.ir.where(condition, a, b) instead of if"),
    "chained comparison": (lambda: 0 < G < 3, "the truth of the expression 0 < g is not known"),
    "and": (lambda: G < 3 and G < 4, "instead of if, and, or"),
    "element of a value": (lambda: d[G], "d is one value and has no elements; write it without [g"),
    "iteration": (lambda: list(q), "is one value and has no elements"),
    "float index": (lambda: load(QS, x), "index of field qs must be i32, not f32: f32(g)"),
    "u32 index": (lambda: load(QS, U), "index of field qs must be i32, not u32: u"),
    "index 1.5": (lambda: load(QS, 1.5), "must be a whole number, not 1.5"),
    "table by a float": (lambda: table((1, 2), x), "a table is indexed by an integer, not by f32"),
    "empty table": (lambda: table((), G), "a table needs at least one value"),
    "bits of a condition": (lambda: bitcast(U32, G < 3), "bool has no 32 bits to reinterpret"),
    "function of an integer": (lambda: call("exp", G), "exp(i32) is not a function of the IR"),
    "unknown function": (lambda: call("exq", x), "of f32 there are exp, log, sqrt"),
    "fraction": (lambda: const(0.5, I32), "an i32 constant must be a whole number, not 0.5"),
    "nan": (lambda: const(float("nan"), I32), "must be a whole number, not nan"),
    "infinity": (lambda: const(float("inf"), U32), "must be a whole number, not inf"),
    "text": (lambda: G + "1", "'1' is not a number and cannot stand in an expression"),
    "nothing": (lambda: None * G, "None is not a number"),
    "array": (lambda: np.arange(2) * G, "array([0, 1]) is not a number"),
    "array on the right": (lambda: G * np.arange(2), "array([0, 1]) is not a number"),
}


@pytest.mark.parametrize("build", BAD.values(), ids=BAD)
def test_what_has_no_meaning_is_an_error(build: tuple[Callable[[], Any], str]) -> None:
    make, text = build
    with pytest.raises(ExprError) as caught:
        make()
    message = str(caught.value)
    assert text in message
    assert "\n" not in message and not message.endswith(".")
    assert isinstance(caught.value, KernelgenError)


@pytest.mark.parametrize("function", [operator.invert, len, lambda e: 5 // e, lambda e: e**2])
def test_other_operators_are_not_defined(function: Callable[[Any], Any]) -> None:
    with pytest.raises(TypeError):
        function(G)


# --- walking ------------------------------------------------------------------------------------


@given(any_expr)
def test_walk_gives_operands_first_and_each_node_once(expr: Expr) -> None:
    order = list(walk(expr))
    place = {node: n for n, node in enumerate(order)}
    assert len(place) == len(order)
    assert order[-1] is expr
    assert all(place[arg] < place[node] for node in order for arg in node.args)


def test_walk_takes_time_by_distinct_nodes() -> None:
    shared = G
    for _ in range(60):  # 2^60 paths, 61 nodes
        shared = shared + shared
    assert len(list(walk(shared))) == 61
    assert depends_on(shared, G)
    assert substitute(shared, {G: N}).args[0] is not shared.args[0]


@given(any_expr)
def test_rebuilding_changes_nothing(expr: Expr) -> None:
    assert transform(expr, lambda node: None) is expr
    assert rebuild(expr, expr.args) is expr
    assert substitute(expr, {}) is expr


def test_substitute_replaces_everywhere() -> None:
    expr = where(G < 4, load(QS, G), load(QS, G + 4) >> G)
    assert substitute(expr, {G: IX}) is where(IX < 4, load(QS, IX), load(QS, IX + 4) >> IX)
    # what is put in is not searched again
    assert substitute(G + IX, {G: IX, IX: G}) is IX + G


def test_depends_on() -> None:
    assert depends_on(q, IX)
    assert not depends_on(q, G)


def test_loads_are_in_the_order_of_their_bytes() -> None:
    assert loads(load(BIG, 0) + load(QS, 0) + word(SC, G) + load(QS, 1)) == [QS, SC, BIG]
    assert loads(G) == []


# --- printing -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("expr", "text"),
    [
        ((q >> 4) & 15, "(qs[i % 16] >> 4) & 15"),
        (d * cast(F32, load(SC, G) - 32), "d * f32(sc[g] - 32)"),
        ((G + 1) * 2, "(g + 1) * 2"),
        (G + 2 * IX, "g + 2 * i"),
        (G - (IX - 1), "g - (i - 1)"),
        ((G - IX) - 1, "g - i - 1"),
        (G - (IX + 1), "g - (i + 1)"),
        (G * (IX // 2), "g * (i // 2)"),
        (G % 4 // 2, "g % 4 // 2"),
        ((G | 1) & 3, "(g | 1) & 3"),
        ((G << 1) + 1, "(g << 1) + 1"),
        (1 << (G + 1), "1 << (g + 1)"),
        (x - (d - 1.0), "f32(g) - (d - 1)"),
        (x + (d + 1.0), "f32(g) + (d + 1)"),
        (-(x * d), "-(f32(g) * d)"),
        (-x * d, "-f32(g) * d"),
        (0.0 - (-x), "0 - -f32(g)"),
        (x * -2.0, "f32(g) * -2"),
        (where(G < 4, G, IX) + 1, "(g if g < 4 else i) + 1"),
        (logical_not(G < 4), "(False if g < 4 else True)"),
        (equal(G < 4, IX < 4), "(g < 4) == (i < 4)"),
        ((G < 4) & (IX < 4), "(g < 4) & (i < 4)"),
        (minimum(G, 3), "min(g, 3)"),
        (table((-1, 2), G & 1), "table([-1, 2], g & 1)"),
        (table((0.5, 2.0), G), "table([0.5, 2], g)"),
        (table((1234567, -(2**31)), G), "table([1234567, -2147483648], g)"),
        (named("sc", load(SC, G), G), "sc(g)"),
        (const(0x0F0F0F0F, U32), "0x0F0F0F0F"),
        (const(15, U32), "15"),
        (const(-5, I32), "-5"),
        (const(float("inf"), F32), "inf"),
        (cast(U32, G), "u32(g)"),
        (bitcast(F32, U), "bits_f32(u)"),
        (call("rsqrt", x), "rsqrt(f32(g))"),
        (word(QS, G), "word(qs, g)"),
        (spread(2, U), "spread2(u)"),
        (lookup((1, 2), U), "lookup([1, 2], u)"),
    ],
)
def test_show(expr: Expr, text: str) -> None:
    assert show(expr) == text == repr(expr) == str(expr)


def _python(expr: Expr, point: int) -> Any:
    """What Python makes of the printed expression, at one point of the first block."""
    scope: dict[str, Any] = {name: int(values[point]) for name, values in POINTS.items()}
    scope |= {name: values[0].tolist() for name, values in STORED.items()}
    scope |= {
        "table": lambda values, at: values[at],
        "i32": lambda v: (v + 2**31) % 2**32 - 2**31,
        "u32": lambda v: v % 2**32,
    }
    return eval(show(expr), scope)


@given(st.one_of(ints(I32, 3), bools()), st.integers(0, len(POINTS["i"]) - 1))
def test_python_reads_what_show_writes(expr: Expr, point: int) -> None:
    expr = transform(expr, lambda e: e.args[0] if e.op == "named" else None)
    expr = substitute(expr, {N: T, U: cast(U32, G)})
    assume(not any(wraps(node) for node in walk(expr)))
    seen = value(expr)
    seen = np.broadcast_to(seen, (*seen.shape[:-1], len(POINTS["i"]))) if seen.ndim else seen
    first = seen if seen.ndim == 0 else seen[..., point].ravel()[0]
    assert _python(expr, point) == first, show(expr)

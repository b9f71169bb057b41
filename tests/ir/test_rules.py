"""Every law, and the simplifier made of them, keeps the value of random expressions."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from kernelgen.ir import rules
from kernelgen.ir.expr import (
    BOOL,
    F32,
    I32,
    U32,
    Expr,
    bitcast,
    cast,
    const,
    load,
    maximum,
    minimum,
    substitute,
    table,
    var,
    walk,
    where,
)
from kernelgen.ir.rules import LAWS, Law, fold_constants, order_sum, simplify, sum_terms
from tests.ir.strategies import (
    FIELDS,
    INT_MAX,
    INT_MIN,
    IX,
    G,
    N,
    T,
    U,
    assert_same,
    bools,
    instances,
    ints,
)

Step = Callable[[Expr], Expr | None]

U32_AS_INT = cast(I32, U)
EXAMPLES = settings().max_examples * 3 // 2
any_expr = st.one_of(ints(I32), ints(U32), bools())


def times_fired(law: Law, **how: Any) -> int:
    """How often a law fires on random instances of its left side, each of which is checked."""
    fired = 0

    @settings(**how)
    @given(instances(law.left))
    def holds(expr: Expr) -> None:
        nonlocal fired
        changed = law.apply(expr)
        if changed is not None:
            fired += 1
            assert_same(expr, changed)

    holds()
    return fired


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.text)
def test_law_holds_and_fires(law: Law) -> None:
    fired = times_fired(law, max_examples=EXAMPLES)
    if fired < EXAMPLES // 8:  # a condition that is rarely true is tried more often
        fired = times_fired(law, max_examples=5 * EXAMPLES)
    assert fired >= 10, "the law is dead: its condition is hardly ever true"


WRONG = (
    "x // a -> x >> 1",
    "x + y -> x | y",
    "(x + y) // a -> x // a + y // a if a > 0",
    "x % a -> x & (a - 1) if a > 0",
    "x & a -> x if 0 <= lo(x) and hi(x) <= a",
    "min(x, y) -> x if lo(x) <= lo(y)",
    "x + y < a -> x < a if div(x) and 0 <= lo(y) and hi(y) < div(x)",
    "where(p, x, y) -> x",
    # right for most numbers, wrong where the product of the constants wraps
    "(x // a) // b -> x // (a * b) if a > 0 and b > 0",
    # right for most numbers, wrong for negative divisors, which round the other way
    "(x + y) // a -> x // a if 0 <= lo(y) and hi(y) < gcd(div(x), a)",
    "(x + y) % a -> x % a + y if 0 <= lo(y) and hi(y) < gcd(div(x), a)",
)


@pytest.mark.parametrize("text", WRONG)
def test_wrong_law_is_detected(text: str) -> None:
    law = rules._parse(text)
    with pytest.raises(AssertionError, match="turns"):
        times_fired(law, max_examples=3000, phases=[Phase.generate])


def test_laws_need_the_guard_against_wrapping(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it, laws that hold for whole numbers only would be applied to numbers that wrap."""
    guarded = rules._parse("(x * a) // b -> x * (a // b) if b > 0 and a % b == 0")
    times_fired(guarded)
    monkeypatch.setattr(rules, "wraps", lambda expr: False)
    with pytest.raises(AssertionError, match="turns"):
        times_fired(guarded, max_examples=3000, phases=[Phase.generate])


WRAPPING = (
    (N * 4) // 4, (N * 4) % 8 // 4, (N + 1) // 1, (N * 2 + G) // 2, (N * 16 + G) % 16, N + INT_MAX,
    (U * 4) // 4, (U + 8) % 3, (U * 3) % 3, (U - 1) // 2, (U << 4) % 48, N - INT_MIN, (N + N) // 2,
    (N * 8 + IX % 8) // 8, N * 4 < 8, N + G < 8, (N << 3) // 8, minimum(N + 1, N), (N * N) % 4,
    ((N & INT_MAX) - 1) % 3, ((N & INT_MAX) - 1) // 3, (N - 1) // 4, (N + 5) % 4, (N - 5) // 4,
    (N - 8) // 4, (U + 8) // 4, (N % INT_MAX - 1) // 4,
    (cast(U32, N) + 0xFFFFFFFF) % 5, (N + INT_MAX) + INT_MAX, (N * 65536) * 65536, 0 - (0 - N),
    (N * INT_MIN) // INT_MIN, (U + 0x80000000) + 0x80000000, N // (1 << 20) // (1 << 20),
    (G * 6 + 1) // -2, (G * 6 + 1) % -2, N % INT_MIN, N // INT_MIN, (N // 3) * 3 + N % 3,
)  # fmt: skip


@pytest.mark.parametrize("expr", WRAPPING, ids=str)
def test_numbers_that_wrap_and_negative_divisors(expr: Expr) -> None:
    assert_same(expr, simplify(expr))


@given(any_expr)
def test_simplify_keeps_the_value(expr: Expr) -> None:
    assert_same(expr, simplify(expr))


@given(any_expr)
def test_simplify_is_idempotent(expr: Expr) -> None:
    once = simplify(expr)
    assert simplify(once) is once


@pytest.mark.parametrize("step", [fold_constants, order_sum])
def test_steps_keep_the_value(step: Step) -> None:
    changed_at_all = False

    @given(any_expr)
    def holds(expr: Expr) -> None:
        nonlocal changed_at_all
        for node in walk(expr):
            changed = step(node)
            if changed is not None and changed is not node:
                changed_at_all = True
                assert_same(node, changed)

    holds()
    assert changed_at_all


@given(st.permutations((32 * G, IX % 32, 4 * T, U32_AS_INT, const(7, I32), G // 2)))
def test_a_sum_has_one_normal_form(terms: list[Expr]) -> None:
    assert simplify(functools.reduce(operator.add, terms)) is simplify(sum(reversed(terms), 0))


@given(st.lists(ints(I32, 1), min_size=1, max_size=6))
def test_ordered_sums_put_the_constant_last(terms: list[Expr]) -> None:
    ordered = order_sum(sum(terms, const(0, I32)))
    parts = sum_terms(ordered) if ordered is not None else []
    assert all(p.op != "const" for p in parts[:-1])


J, L = var("j", 8), var("lane", 4)
AT = 32 * G + 4 * J + L  # element of a block of 256, as the packed decode writes it

#: what the packed decode of the formats needs to be found
SIMPLIFIED = (
    (AT // 32, "g"),
    (AT // 64, "g // 2"),
    (AT % 32, "j * 4 + lane"),
    (AT // 32 % 2, "g % 2"),
    (32 * (AT // 64) + AT % 32, "g // 2 * 32 + j * 4 + lane"),
    ((4 * J + L) % 16 // 4, "j % 4"),
    ((4 * J + L) // 4, "j"),
    ((G * 4 + 3) // 4, "g"),
    ((G * 4 + 4) // 4, "g + 1"),
    ((G + 8) // 8, "1"),
    ((L + 4) % 4, "lane"),
    ((G + 6) % 4, "(g + 2) % 4"),
    ((G + 6) // 4, "(g + 2) // 4 + 1"),
    ((G - 4) // 4, "g // 4 + -1"),
    ((G - 4) % 4, "g % 4"),
    (G % 16, "g"),
    (G // 8, "0"),
    (G // 2 * 2 + G % 2, "g"),
    (AT < 256, "True"),
    (4 * J + L < 16, "j < 4"),
    (where(G < 8, G, 0), "g"),
    (where(IX < 4, G, G), "g"),
    (load(FIELDS["qs"], IX % 16) & 255, "qs[i % 16]"),
    ((load(FIELDS["qs"], 0) >> 4) & 15, "qs[0] >> 4"),
    (((U >> 3) >> 4) & 0xFF & 0x0F, "(u >> 7) & 15"),
    (minimum(G, 7), "g"),
    (maximum(G, IX * 0 + 7), "7"),
    (const(3, I32) + G + 4, "g + 7"),
    (0 + G - 3 + 3, "g"),
)


@pytest.mark.parametrize(("expr", "text"), SIMPLIFIED, ids=lambda v: str(v))
def test_simplified_form(expr: Expr, text: str) -> None:
    assert str(simplify(expr)) == text
    assert str(expr) != text


def test_a_constant_that_is_nan_keeps_its_bits() -> None:
    words = [const(bits, U32) for bits in (0x7FC00000, 0xFFC01234)]
    floats = [simplify(bitcast(F32, word)) for word in words]
    for word, number in zip(words, floats, strict=True):
        assert_same(word, bitcast(U32, number))


def test_floats_are_not_reordered() -> None:
    x, y = (cast(F32, v) for v in (IX, G))
    for expr in ((x + y) * 3.0, x * 0.0, (x + 1.0) - 1.0, (x * 3.0) * 2.0, x + (y + 1.0), x - 0.5):
        assert simplify(expr) is expr


def test_a_branch_that_is_never_taken_may_read_outside_a_table() -> None:
    expr = where(G < 4, table((1, 2, 3, 4), G), table((5, 6, 7, 8), G - 4))
    for g in range(8):
        taken = simplify(substitute(expr, {G: const(g, I32)}))
        assert taken is const(g + 1, I32)


def test_where_on_floats_of_one_value() -> None:
    x = cast(F32, IX)
    assert simplify(where(G < 3, x, x)) is x


@given(bools())
def test_conditions_stay_conditions(condition: Expr) -> None:
    assert simplify(condition).dtype is BOOL

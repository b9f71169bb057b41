"""What is not well formed is found by trying every index, and only that is found."""

from __future__ import annotations

import pytest

from kernelgen.ir.check import problems
from kernelgen.ir.expr import (
    STORAGES,
    U32,
    Expr,
    Field,
    cast,
    const,
    load,
    named,
    table,
    var,
    where,
)

QS = Field("qs", STORAGES["u8"], 16, 0)
BITS = Field("bits", STORAGES["u32"], 1, 16)
I = var("i", 32)  # noqa: E741


@pytest.mark.parametrize(
    "expr",
    [
        load(QS, I % 16),
        load(QS, I // 2),
        load(QS, 31 - I - 16 * (1 - I // 16)),
        where(I < 16, load(QS, I), load(QS, I - 16)),
        where(I < 16, I >> (I + 16), I >> (I - 16)),
        table((1, 2, 3, 4), load(QS, 0) & 3),
        (load(BITS, 0) >> I) & 1,
        load(QS, 0) >> (load(QS, 1) & 31),
        named("q", load(QS, I // 2), I),
        load(QS, load(QS, I // 2) & 15),
        I // 3 + I % 7,
    ],
    ids=str,
)
def test_nothing_is_wrong(expr: Expr) -> None:
    assert problems(expr, "i", 32) == []


@pytest.mark.parametrize(
    ("expr", "text"),
    [
        (load(QS, I), "field qs has elements 0..15, but qs[i] reads 0..31"),
        (load(QS, I % 16 + 1), "reads 1..16"),
        (load(QS, I % 16 - 1), "reads -1..14"),
        (load(QS, load(QS, 0)), "field qs has elements 0..15, but qs[qs[0]] reads 0..255"),
        (load(BITS, I), "field bits has elements 0..0, but bits reads 0..31"),
        (where(I < 17, load(QS, I), load(QS, I - 16)), "but qs[i] reads 0..16"),
        (where(load(QS, 0) < 3, load(QS, I), I), "but qs[i] reads 0..31"),
        (table((1, 2), I % 3), "a table has elements 0..1, but table([1, 2], i % 3) reads 0..2"),
        (table((0, 16), table((0, 1, 2), I % 3)), "a table has elements 0..1"),
        (table((7,), load(QS, I % 16)), "reads 0..255"),
        (I >> (I + 1), "i >> (i + 1) shifts by 1..32 bits; 0..31 are possible"),
        (cast(U32, I) << (I - 1), "shifts by -1..30 bits"),
        (I << load(QS, 0), "shifts by 0..255 bits"),
        (I // (I + 1), "i // (i + 1) divides by what is not a positive constant"),
        (I % const(0, cast(U32, I).dtype), "divides by what is not a positive constant"),
        (I // -2, "i // -2 divides by what is not a positive constant"),
    ],
    ids=lambda v: str(v),
)
def test_one_thing_is_wrong(expr: Expr, text: str) -> None:
    (found,) = problems(expr, "i", 32)
    assert text in found


def test_every_problem_is_found_once() -> None:
    outside = load(QS, I)
    expr = where(I < 16, outside, 0) + (outside >> 40) + outside // 0
    found = problems(expr, "i", 32)
    assert len(found) == 3
    assert [word in text for word, text in zip(("reads", "shifts", "divides"), found, strict=True)]


def test_a_table_outside_an_outer_table_is_named_not_raised() -> None:
    inner = table((0, 1), I)
    found = problems(table((5, 6), inner), "i", 32)
    assert found == [f"a table has elements 0..1, but {inner} reads 0..31"]

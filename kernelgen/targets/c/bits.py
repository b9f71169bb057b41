"""Bits of bytes, which some CPUs move in one instruction: packed codes in words for that, where
others shift, mask and or."""

from __future__ import annotations

from dataclasses import dataclass

from kernelgen.ir.expr import I32, U32, Expr, const
from kernelgen.ir.ranges import interval

_BYTES = 0x01010101


@dataclass(frozen=True)
class Bits:
    """In each byte, the bits `mask` of word >> start, moved up: ((word >> start) & mask) << up,
    where none comes from another byte or leaves its own."""

    word: Expr
    start: Expr
    mask: int
    up: int


def bits(expr: Expr) -> Bits | None:
    """What a word of four bytes takes from another, if it is of that form."""
    inner, up = _moved_up(expr)
    if inner.op != "&" or inner.dtype is not U32 or inner.args[1].op != "const":
        return None
    mask, rest = divmod(inner.args[1].attr, _BYTES)
    x, start = inner.args[0], const(0, I32)
    if x.op == ">>":
        x, start = x.args
    if rest or not 0 <= interval(start)[0] <= interval(start)[1] <= 7:
        return None
    if mask > 255 >> interval(start)[1] or mask << up > 255:
        return None
    return Bits(x, start, mask, up)


@dataclass(frozen=True)
class Spread:
    """Four bits of a word that follow one another from `start` on, one in each byte, moved up."""

    word: Expr
    start: Expr
    up: int


def spread_bits(expr: Expr) -> Spread | None:
    """The bits that are spread, if that is its form."""
    inner, up = _moved_up(expr)
    if inner.op != "spread" or inner.attr != 1 or up > 7:
        return None
    x, start = inner.args[0], const(0, I32)
    if x.op == ">>":
        x, start = x.args
    if not 0 <= interval(start)[0] <= interval(start)[1] <= 28:
        return None
    return Spread(x, start, up)


def nibbles(expr: Expr) -> Bits | None:
    """The index of a look-up in a table of 16, if it is the lower or upper four bits of bytes."""
    found = bits(expr)
    return found if found and found.mask == 15 and not found.up else None


def byte_at(expr: Expr) -> tuple[Expr, Expr] | None:
    """x and n of (x >> n) & 255."""
    if expr.op == "&" and expr.args[1].op == "const" and expr.args[1].attr == 255:
        x = expr.args[0]
        if x.op == ">>" and x.dtype is U32:
            return x.args[0], x.args[1]
    return None


def _moved_up(expr: Expr) -> tuple[Expr, int]:
    if expr.op == "<<" and expr.args[1].op == "const":
        return expr.args[0], int(expr.args[1].attr)
    return expr, 0

"""What is known of an integer expression before it runs: its interval and a divisor."""

from __future__ import annotations

import functools
import math

from kernelgen.errors import ExprError
from kernelgen.ir.expr import BITWISE, BOOL, I32, Expr

Interval = tuple[int, int]

_LIMITS = {"i32": (-(2**31), 2**31 - 1), "u32": (0, 2**32 - 1), "bool": (0, 1)}


@functools.lru_cache(maxsize=65536)
def interval(expr: Expr) -> Interval:
    """Smallest and largest value an integer or bool expression can take, both inclusive.

    An operation that may wrap has the whole range of its type.  Floats have no interval.
    """
    if expr.dtype.value not in _LIMITS:
        raise ExprError(f"only integers have an interval, not {expr.dtype.value}: {expr}")
    whole = _LIMITS[expr.dtype.value]
    lo, hi = _interval(expr, whole)
    return (lo, hi) if whole[0] <= lo and hi <= whole[1] else whole


def _interval(expr: Expr, whole: Interval) -> Interval:
    op, args = expr.op, expr.args
    if op == "const":
        return int(expr.attr), int(expr.attr)
    if op == "var":
        return expr.attr[1], expr.attr[2]
    if op == "load":
        return expr.attr.storage.lo, expr.attr.storage.hi
    if op == "fetch":
        return expr.attr[0].lo, expr.attr[0].hi
    if op == "table":
        lo, hi = interval(args[0])
        reachable = expr.attr[max(lo, 0) : hi + 1]
        whole_table = len(reachable) in (0, len(expr.attr))
        return expr.attr.bounds if whole_table else (min(reachable), max(reachable))
    if op == "named":
        return interval(args[0])
    if op == "select":
        (a, b), (c, d) = interval(args[1]), interval(args[2])
        return min(a, c), max(b, d)
    if op == "cast" and args[0].dtype.value in _LIMITS:
        return interval(args[0])  # interval() widens it again if it does not fit
    if op in ("<", "=="):
        return _compare(expr)
    if len(args) != 2 or args[0].dtype.value not in _LIMITS:
        return whole
    return _binary(op, interval(args[0]), interval(args[1]), whole)


def _compare(expr: Expr) -> Interval:
    if expr.args[0].dtype.value not in _LIMITS:
        return 0, 1
    (a, b), (c, d) = interval(expr.args[0]), interval(expr.args[1])
    if expr.op == "<":
        return (1, 1) if b < c else (0, 0) if a >= d else (0, 1)
    return (0, 0) if b < c or d < a else (1, 1) if a == b == c == d else (0, 1)


def _binary(op: str, x: Interval, y: Interval, whole: Interval) -> Interval:
    (a, b), (c, d) = x, y
    if op == "+":
        return a + c, b + d
    if op == "-":
        return a - d, b - c
    if op == "*":
        products = (a * c, a * d, b * c, b * d)
        return min(products), max(products)
    if op in ("min", "max"):
        pick = min if op == "min" else max
        return pick(a, c), pick(b, d)
    if op == "//" and c > 0:
        return min(a // c, a // d), max(b // c, b // d)
    if op == "%" and c > 0:
        if c == d and a // c == b // c:  # all in one period
            return a % c, b % c
        return 0, d - 1
    if op == "<<" and c >= 0 and d < 32:
        return min(a << c, a << d), max(b << c, b << d)
    if op == ">>" and c >= 0 and d < 32:
        return min(a >> c, a >> d), max(b >> c, b >> d)
    if op == "&":
        if a >= 0 and c >= 0:
            return 0, min(b, d)
        if a >= 0 or c >= 0:
            return 0, b if a >= 0 else d
    if op in ("|", "^") and a >= 0 and c >= 0:
        return 0, (1 << max(b, d).bit_length()) - 1
    if op in BITWISE:  # the sign fills all bits above the highest of any operand
        beyond = 1 << max((v if v >= 0 else ~v).bit_length() for v in (a, b, c, d))
        return -beyond, beyond - 1
    return whole


@functools.lru_cache(maxsize=65536)
def divisor(expr: Expr) -> int:
    """The largest known number that divides the expression; 0 if the expression is zero."""
    if expr.dtype is BOOL or not expr.dtype.is_int:
        return 1
    known = _divisor(expr)
    # what wraps loses a multiple of 2^32, so that only a power of two still divides it
    return math.gcd(known, 1 << 32) if wraps(expr) else known


def _divisor(expr: Expr) -> int:
    op, args = expr.op, expr.args
    if op == "const":
        return abs(int(expr.attr))
    if op in ("+", "-"):
        return math.gcd(divisor(args[0]), divisor(args[1]))
    if op == "*":
        return divisor(args[0]) * divisor(args[1])
    if op == "<<" and args[1].op == "const" and 0 <= args[1].attr < 32:
        return divisor(args[0]) << int(args[1].attr)
    if op == "%" and args[1].op == "const":
        return math.gcd(divisor(args[0]), int(args[1].attr))
    if op == "select":
        return math.gcd(divisor(args[1]), divisor(args[2]))
    if op == "named":
        return divisor(args[0])
    return 1


def fits(expr: Expr, lo: int, hi: int) -> bool:
    """Whether the integer expression surely lies in lo ... hi."""
    a, b = interval(expr)
    return lo <= a and b <= hi


def wraps(expr: Expr) -> bool:
    """Whether + - * << of this node may leave the range of its type."""
    if expr.op not in ("+", "-", "*", "<<") or not expr.dtype.is_int:
        return False
    (a, b), (c, d) = interval(expr.args[0]), interval(expr.args[1])
    if expr.op == "<<" and not (0 <= c and d < 32):
        return True
    lo, hi = _binary(expr.op, (a, b), (c, d), (0, 0))
    low, high = _LIMITS["i32" if expr.dtype is I32 else "u32"]
    return lo < low or hi > high

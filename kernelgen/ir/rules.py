"""Rewrite rules: laws of integer arithmetic, one a line, and the simplifier that applies them.

In a law x, y, z stand for any integer expression and a, b, c for constants.  On the right and in
the condition a, b, c are plain numbers; lo(x), hi(x) bound x, and div(x) divides it (0 when x is
zero).  A law fires only where nothing on its left can wrap, so it may be read as a law of whole
numbers.  Every law is tested on random expressions: evaluate(before) == evaluate(after).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from types import CodeType
from typing import Any

from kernelgen.ir.evaluate import evaluate
from kernelgen.ir.expr import (
    BOOL,
    F32,
    LOADS,
    Expr,
    const,
    rebuild,
    show,
    var,
    walk,
    where,
)
from kernelgen.ir.ranges import divisor, interval, wraps

LAWS_TEXT = """
x + 0                    -> x
x - a                    -> x + -a
x * 0                    -> 0
x * 1                    -> x
(x + a) + b              -> x + (a + b)
(x * a) * b              -> x * (a * b)
(x + y) * a              -> x * a + y * a
x // 1                   -> x
x // a                   -> 0                      if 0 <= lo(x) and hi(x) < a
(x // a) // b            -> x // (a * b)           if a > 0 and b > 0 and a * b < 1 << 31
(x * a) // b             -> x * (a // b)           if b > 0 and a % b == 0
(x * a) // b             -> x // (b // a)          if a > 0 and b % a == 0
(x + y) // a             -> x // a + y // a        if a > 0 and div(x) % a == 0
(x + y) // a             -> x // a                 if a > 0 and 0 <= lo(y) and hi(y) < gcd(div(x), a)
(x + a) // b             -> (x + a % b) // b + a // b     if b > 0 and (b <= a or a % b == 0)
(x % a) // b             -> (x // b) % (a // b)    if b > 0 and a > 0 and a % b == 0
x % a                    -> 0                      if a > 0 and div(x) % a == 0
x % a                    -> x                      if 0 <= lo(x) and hi(x) < a
(x % a) % b              -> x % b                  if a > 0 and b > 0 and a % b == 0
(x * a) % b              -> (x % (b // a)) * a     if a > 0 and b > a and b % a == 0
(x + y) % a              -> y % a                  if a > 0 and div(x) % a == 0
(x + a) % b              -> (x + a % b) % b        if b > 0 and (b <= a or a % b == 0)
(x + y) % a              -> x % a + y              if a > 0 and 0 <= lo(y) and hi(y) < gcd(div(x), a)
x // a * a + x % a       -> x                      if a > 0
x & 0                    -> 0
x & a                    -> x                      if 0 <= lo(x) and hi(x) <= a and a & (a + 1) == 0
(x & a) & b              -> x & (a & b)
x | 0                    -> x
x ^ 0                    -> x
x << 0                   -> x
x >> 0                   -> x
(x >> a) >> b            -> x >> (a + b)           if a >= 0 and b >= 0 and a + b < 32
x * a < b                -> x < b // a             if a > 0 and b % a == 0
x + y < a                -> x < a                  if div(x) and a % div(x) == 0 and 0 <= lo(y) and hi(y) < div(x)
where(p, x, x)           -> x
min(x, y)                -> x                      if hi(x) <= lo(y)
min(x, y)                -> y                      if hi(y) <= lo(x)
max(x, y)                -> x                      if lo(x) >= hi(y)
max(x, y)                -> y                      if lo(y) >= hi(x)
"""

# Pattern variables are ordinary variables with names that no expression uses.
_ANY = {name: var(f"?{name}", 1 << 31) for name in "xyz"}
_CONSTANT = {name: var(f"#{name}", 1 << 31) for name in "abc"}
_CONDITION = {"p": Expr("var", BOOL, attr=("?p", 0, 1))}


def _minimum(a: Expr, b: Expr) -> Expr:
    return Expr("min", a.dtype, (a, b))


def _maximum(a: Expr, b: Expr) -> Expr:
    return Expr("max", a.dtype, (a, b))


@dataclass(frozen=True)
class Law:
    """One line of `LAWS_TEXT`."""

    text: str
    left: Expr
    right: CodeType
    condition: CodeType | None

    def apply(self, expr: Expr) -> Expr | None:
        """The right side for `expr`, or None where the law does not fire."""
        bound: dict[str, Any] = {}
        if not _match(self.left, expr, bound, root=True):
            return None
        scope = _SCOPE | bound
        if self.condition is not None and not eval(self.condition, scope):
            return None
        result = eval(self.right, scope)
        return result if isinstance(result, Expr) else const(result, expr.dtype)


_SCOPE: dict[str, Any] = {
    "__builtins__": {}, "where": where, "min": _minimum, "max": _maximum, "gcd": math.gcd,
    "lo": lambda x: interval(x)[0], "hi": lambda x: interval(x)[1], "div": divisor,
}  # fmt: skip


def _parse(line: str) -> Law:
    left, _, rest = line.partition("->")
    right, _, condition = rest.partition(" if ")
    scope = _SCOPE | _ANY | _CONSTANT | _CONDITION
    return Law(
        " ".join(line.split()),
        eval(left, scope),
        compile(right.strip(), "<law>", "eval"),
        compile(condition.strip(), "<law>", "eval") if condition else None,
    )


def _match(pattern: Expr, expr: Expr, bound: dict[str, Any], root: bool = False) -> bool:
    if pattern.op == "var":
        kind, name = pattern.attr[0][0], pattern.attr[0][1:]
        if kind == "#":
            if expr.op != "const" or not expr.dtype.is_int:
                return False
            return bool(bound.setdefault(name, expr.attr) == expr.attr)
        if expr.dtype is BOOL if pattern.dtype is not BOOL else expr.dtype is not BOOL:
            return False
        return bound.setdefault(name, expr) is expr
    if pattern.op != expr.op or len(pattern.args) != len(expr.args):
        return False
    if pattern.op == "const":
        return expr.dtype.is_int and bool(pattern.attr == expr.attr)
    # laws are about whole numbers; where(p, x, x) alone holds for floats too
    if expr.op != "select" and not all(a.dtype.is_int for a in expr.args):
        return False
    if not root and wraps(expr):
        return False
    return all(_match(p, e, bound) for p, e in zip(pattern.args, expr.args, strict=True))


LAWS = tuple(_parse(line) for line in LAWS_TEXT.strip().splitlines())
_BY_OP: dict[str, list[Law]] = {}
for _law in LAWS:
    _BY_OP.setdefault(_law.left.op, []).append(_law)


def fold_constants(expr: Expr) -> Expr | None:
    """An operation on constants, or an integer of which only one value is possible."""
    if expr.op in ("const", "var", "named", *LOADS):
        return None
    if expr.args and all(a.op == "const" for a in expr.args):
        value = evaluate(expr).item()
        return const(value, expr.dtype) if value == value else None  # a NaN would lose its bits
    if expr.op == "select" and expr.args[0].op == "const":
        return expr.args[1] if expr.args[0].attr else expr.args[2]
    if expr.dtype is not F32 and not any(n.op in LOADS for n in walk(expr)):
        lo, hi = interval(expr)
        if lo == hi:
            return const(lo, expr.dtype)
    return None


def sum_terms(expr: Expr) -> list[Expr]:
    """The terms of a sum; the expression itself where it is none."""
    if expr.op != "+":
        return [expr]
    return sum_terms(expr.args[0]) + sum_terms(expr.args[1])


def order_sum(expr: Expr) -> Expr | None:
    """Terms of an integer sum by decreasing divisor, so that the laws find what divides; the
    constant behind them.  Products, and, or, xor have their constant on the right."""
    if not expr.dtype.is_int:
        return None
    if expr.op in ("*", "&", "|", "^") and expr.args[0].op == "const":
        return expr if expr.args[1].op == "const" else Expr(expr.op, expr.dtype, expr.args[::-1])
    if expr.op != "+":
        return None
    terms, constant = [], 0
    for term in sum_terms(expr):
        if term.op == "const":
            constant += int(term.attr)
        else:
            terms.append(term)
    terms.sort(key=lambda t: (-divisor(t), show(t)))
    if constant or not terms:
        terms.append(const(constant, expr.dtype))
    # right-associated: (first) + (rest), so that one law splits off the term that divides most
    ordered = terms[-1]
    for term in reversed(terms[:-1]):
        ordered = term + ordered
    return ordered


_STEPS: tuple[Callable[[Expr], Expr | None], ...] = (fold_constants, order_sum)


@functools.lru_cache(maxsize=65536)
def simplify(expr: Expr) -> Expr:
    """The same value by fewer operations, in a normal form: sums ordered, constants folded."""
    node = rebuild(expr, tuple(simplify(a) for a in expr.args))
    for step in _STEPS:
        changed = step(node)
        if changed is not None and changed is not node:
            return simplify(changed)
    for law in _BY_OP.get(node.op, ()):
        changed = law.apply(node)
        if changed is not None and changed is not node:
            return simplify(changed)
    return node

"""What is known of a condition over a box of its variables, before any of them has a value.

For tiles of a mask: from a condition on positions q and k, two conditions on the first and last q
and k of a tile, which say that all of the tile satisfies it, or none.  Both are sound, and neither
is complete: where nothing is known, as of what is loaded, both are false.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from kernelgen.ir.expr import BOOL, Expr, const, equal, logical_not, maximum, minimum
from kernelgen.ir.rules import simplify


@dataclass(frozen=True)
class Box:
    """Smallest and largest value of an integer expression, both inclusive, as expressions."""

    lo: Expr
    hi: Expr


@dataclass(frozen=True)
class Truth:
    """Conditions under which another one holds everywhere in a box, or nowhere."""

    always: Expr
    never: Expr


_NO, _YES = const(0, BOOL), const(1, BOOL)
_UNKNOWN = Truth(_NO, _NO)


def truth(condition: Expr, boxes: Mapping[str, Box]) -> Truth:
    """When `condition` holds for all, or for no, values of the variables that `boxes` names."""
    found = _truth(condition, boxes)
    return Truth(simplify(found.always), simplify(found.never))


def _truth(x: Expr, boxes: Mapping[str, Box]) -> Truth:
    op, args = x.op, x.args
    if op == "const":
        return Truth(_YES, _NO) if x.attr else Truth(_NO, _YES)
    if op in ("<", "==") and args[0].dtype.is_int:
        return _comparison(op, *(_box(a, boxes) for a in args))
    if op in ("&", "|"):
        a, b = (_truth(arg, boxes) for arg in args)
        if op == "&":
            return Truth(_both(a.always, b.always), _either(a.never, b.never))
        return Truth(_either(a.always, b.always), _both(a.never, b.never))
    if op == "select":
        c, a, b = (_truth(arg, boxes) for arg in args)
        return Truth(
            _either(_both(a.always, b.always), _chosen(c, a.always, b.always)),
            _either(_both(a.never, b.never), _chosen(c, a.never, b.never)),
        )
    return _UNKNOWN


def _chosen(c: Truth, a: Expr, b: Expr) -> Expr:
    return _either(_both(c.always, a), _both(c.never, b))


def _comparison(op: str, a: Box | None, b: Box | None) -> Truth:
    if a is None or b is None:
        return _UNKNOWN
    if op == "<":
        return Truth(a.hi < b.lo, logical_not(a.lo < b.hi))
    same = _both(_both(equal(a.lo, a.hi), equal(b.lo, b.hi)), equal(a.lo, b.lo))
    return Truth(same, _either(a.hi < b.lo, b.hi < a.lo))


def _both(a: Expr, b: Expr) -> Expr:
    if _NO in (a, b):
        return _NO
    return b if a is _YES else a if b is _YES else a & b


def _either(a: Expr, b: Expr) -> Expr:
    if _YES in (a, b):
        return _YES
    return b if a is _NO else a if b is _NO else a | b


def _box(x: Expr, boxes: Mapping[str, Box]) -> Box | None:
    """The box of an integer expression that does not wrap; None where nothing is known."""
    op, args = x.op, x.args
    if op == "const":
        return Box(x, x)
    if op == "var":
        return boxes.get(x.attr[0], Box(x, x))
    if op not in ("+", "-", "*", "//", "min", "max"):
        return None
    a, b = (_box(arg, boxes) for arg in args)
    if a is None or b is None:
        return None
    if op == "+":
        return Box(a.lo + b.lo, a.hi + b.hi)
    if op == "-":
        return Box(a.lo - b.hi, a.hi - b.lo)
    if op == "min":
        return Box(minimum(a.lo, b.lo), minimum(a.hi, b.hi))
    if op == "max":
        return Box(maximum(a.lo, b.lo), maximum(a.hi, b.hi))
    by = args[1]
    if op == "*" and args[0].op == "const":
        a, by = b, args[0]
    if by.op != "const":
        return None
    if op == "*":
        ends = (a.lo * by, a.hi * by)
        return Box(*ends) if by.attr >= 0 else Box(*ends[::-1])
    return Box(a.lo // by, a.hi // by) if by.attr > 0 else None

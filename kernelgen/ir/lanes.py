"""Packed decode: four neighbouring elements at once, derived from the scalar description.

`pack(e, lane)` takes an integer expression e in which the variable `lane` runs over 0..3 and
writes a u32 expression whose byte l is e at lane = l.  A GPU holds such a word in a register and
feeds it to a four-way dot product; a CPU holds many of them in a vector register.

The pass looks at how each operation treats lanes:
  - what does not depend on the lane is the same in every byte: splat;
  - bytes at consecutive addresses are one word load;
  - and, or, xor never cross bytes: they are done on whole words;
  - a shift by an amount that is the same in all lanes is a word shift, and the bits that cross
    into the neighbour byte are masked off (often by the mask that is there anyway);
  - a shift by bits*lane takes consecutive bit fields of one value: spread;
  - a table of up to 16 entries is a byte shuffle: lookup.
What fits none of these is decoded lane by lane and put together, and the reason is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kernelgen.errors import ExprError
from kernelgen.ir.expr import (
    I32,
    U32,
    Expr,
    cast,
    const,
    depends_on,
    lookup,
    show,
    splat,
    spread,
    substitute,
    var,
    where,
    word,
)
from kernelgen.ir.ranges import divisor, fits, interval
from kernelgen.ir.rules import simplify, sum_terms

LANES = 4
#: the variable that runs over the four lanes of a word
LANE = var("lane", LANES)


@dataclass(frozen=True)
class Packed:
    """A u32 of four bytes, and why it had to be put together lane by lane (None: it packed)."""

    expr: Expr
    scalar_because: str | None


class _NotPackable(Exception):
    """Says in its text which part does not pack, and why."""


def pack(expr: Expr, lane: Expr = LANE) -> Packed:
    """A word of `expr` at lane = 0..3; see the module's text.

    Values must fit a byte: 0..255, or -128..127 as two's complement.
    """
    scalar = simplify(expr)
    if not (fits(scalar, 0, 255) or fits(scalar, -128, 127)):
        lo, hi = interval(scalar)
        raise ExprError(f"values in {lo}..{hi} do not fit a byte and cannot be packed: {scalar}")
    try:
        return Packed(simplify(_pack(scalar, lane)), None)
    except _NotPackable as reason:
        return Packed(simplify(_lane_by_lane(scalar, lane)), str(reason))


def _lane_by_lane(expr: Expr, lane: Expr) -> Expr:
    result = const(0, U32)
    for i in range(LANES):
        value = cast(U32, simplify(substitute(expr, {lane: const(i, I32)})))
        if not fits(expr, 0, 255):
            value = value & 255
        result = result | (value << (8 * i))
    return result


def _pack(expr: Expr, lane: Expr) -> Expr:
    if not depends_on(expr, lane):
        if expr.op == "const":
            return splat(expr.attr)
        value = cast(U32, expr)
        return (value if fits(expr, 0, 255) else value & 255) * 0x01010101
    handler = _HANDLERS.get(expr.op)
    if handler is None:
        raise _NotPackable(f"{expr.op} has no packed form: {show(expr)}")
    return handler(expr, lane)


def _stride(expr: Expr, lane: Expr) -> tuple[Expr, int] | None:
    """(base, s) with expr = base + s*lane and base free of the lane, if that is its form."""
    base, step = const(0, I32), 0
    for term in sum_terms(expr):
        if not depends_on(term, lane):
            base = base + term
        elif term is lane:
            step += 1
        elif term.op == "*" and term.args[0] is lane and term.args[1].op == "const":
            step += term.args[1].attr
        else:
            return None
    return simplify(base), step


def _pack_load(expr: Expr, lane: Expr) -> Expr:
    field, index = expr.attr, expr.args[0]
    affine = _stride(index, lane)
    if field.storage.nbytes != 1:
        raise _NotPackable(f"elements of {field.name} are not bytes: {show(expr)}")
    if affine is None or affine[1] != 1:
        raise _NotPackable(f"lanes do not read consecutive bytes of {field.name}: {show(expr)}")
    if divisor(affine[0]) % LANES:
        raise _NotPackable(f"{field.name} is not read at a multiple of {LANES}: {show(expr)}")
    return word(field, simplify(affine[0] // LANES))


def _pack_and(expr: Expr, lane: Expr) -> Expr:
    value, mask = expr.args
    if mask.op == "const" and value.op == ">>" and 0 <= mask.attr <= 255:
        shifted, amount = value.args
        affine = _stride(amount, lane)
        if affine is not None and affine[1] and not depends_on(shifted, lane):
            base, bits = affine
            fields = bits > 0 and mask.attr == (1 << bits) - 1  # which follow one another
            if fields and interval(base)[1] + LANES * bits <= 32:
                return spread(bits, simplify(cast(U32, shifted) >> base))
        if not depends_on(amount, lane) and mask.attr <= 255 >> interval(amount)[1]:
            return (_pack(shifted, lane) >> amount) & splat(mask.attr)
    return _pack(value, lane) & _pack(mask, lane)


def _require_unsigned(expr: Expr) -> None:
    if not fits(expr, 0, 255):
        raise _NotPackable(f"values in {interval(expr)} are not unsigned bytes: {show(expr)}")


def _pack_shift_right(expr: Expr, lane: Expr) -> Expr:
    value, amount = expr.args
    if depends_on(amount, lane):
        raise _NotPackable(f"lanes are shifted by different amounts: {show(expr)}")
    _require_unsigned(value)
    mask = (
        splat(255 >> amount.attr)
        if amount.op == "const"
        else (const(255, U32) >> amount) * 0x01010101
    )
    return (_pack(value, lane) >> amount) & mask


def _pack_no_carry(expr: Expr, lane: Expr) -> Expr:
    """+, * and << stay inside their byte as long as the result fits it."""
    _require_unsigned(expr.args[0])
    _require_unsigned(expr)
    if expr.op == "+":
        _require_unsigned(expr.args[1])
        return _pack(expr.args[0], lane) + _pack(expr.args[1], lane)
    if depends_on(expr.args[1], lane):
        raise _NotPackable(f"{expr.op} by different amounts in different lanes: {show(expr)}")
    by = expr.args[1] if expr.op == "<<" else cast(U32, expr.args[1])
    return Expr(expr.op, U32, (_pack(expr.args[0], lane), by))


def _pack_or(expr: Expr, lane: Expr) -> Expr:
    return Expr(expr.op, U32, (_pack(expr.args[0], lane), _pack(expr.args[1], lane)))


def _pack_cast(expr: Expr, lane: Expr) -> Expr:
    if not expr.args[0].dtype.is_int:
        raise _NotPackable(f"a conversion from {expr.args[0].dtype.value} has no packed form")
    return _pack(expr.args[0], lane)


def _pack_table(expr: Expr, lane: Expr) -> Expr:
    if len(expr.attr) > 16 or not fits(expr.args[0], 0, 15) or not expr.dtype.is_int:
        raise _NotPackable(f"a byte shuffle takes up to 16 integers: {show(expr)}")
    return lookup(expr.attr, _pack(expr.args[0], lane))


def _pack_select(expr: Expr, lane: Expr) -> Expr:
    if depends_on(expr.args[0], lane):
        raise _NotPackable(f"lanes take different branches: {show(expr)}")
    return where(expr.args[0], _pack(expr.args[1], lane), _pack(expr.args[2], lane))


_HANDLERS: dict[str, Callable[[Expr, Expr], Expr]] = {
    "load": _pack_load, "&": _pack_and, "|": _pack_or, "^": _pack_or, ">>": _pack_shift_right,
    "<<": _pack_no_carry, "+": _pack_no_carry, "*": _pack_no_carry, "cast": _pack_cast,
    "table": _pack_table, "select": _pack_select, "named": lambda e, lane: _pack(e.args[0], lane),
}  # fmt: skip

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
  - a table of up to 16 entries is a byte shuffle: lookup; where they rise evenly, arithmetic;
  - neighbouring entries of a table of bytes are one look-up in a table of words of four;
  - a selection by one bit of each lane is made by masks; between a value and its negative it is
    two operations;
  - numbers of more than eight bits on the way to a code have 16 bits for each lane, in two words.
What fits none of these is decoded lane by lane and put together, and the reason is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kernelgen.errors import ExprError
from kernelgen.ir.evaluate import evaluate
from kernelgen.ir.expr import (
    COMPARISONS,
    I32,
    U32,
    Expr,
    cast,
    const,
    depends_on,
    lookup,
    negate,
    rebuild,
    show,
    splat,
    spread,
    substitute,
    table,
    var,
    where,
    word,
)
from kernelgen.ir.ranges import divisor, fits, interval
from kernelgen.ir.rules import simplify, sum_terms

LANES = 4
#: the variable that runs over the four lanes of a word
LANE = var("lane", LANES)

_ONES, _ALL = splat(1), const(0xFFFFFFFF, U32)


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
    try:
        return handler(expr, lane)
    except _NotPackable as reason:
        if expr.op not in ("&", ">>") or not _is_wide(expr.args[0]) or not fits(expr, 0, 255):
            raise
        try:
            even, odd = _pack_wide(expr, lane)
        except _NotPackable:
            raise reason from None
        return even | (odd << 8)


# ---- lanes of 16 bits --------------------------------------------------------------------------

#: one in each of two lanes of 16 bits
_PAIR = 0x00010001


def _is_wide(expr: Expr) -> bool:
    """Whether values need more than eight bits, and no more than 16."""
    return not fits(expr, 0, 255) and fits(expr, 0, 0xFFFF)


def _pack_wide(expr: Expr, lane: Expr) -> tuple[Expr, Expr]:
    """Two words with 16 bits for each lane: lanes 0 and 2, lanes 1 and 3."""
    if not depends_on(expr, lane):
        both = cast(U32, expr) * _PAIR
        return both, both
    if expr.op in ("*", "+", "<<", ">>", "&") and _by_number(expr, lane) and fits(expr, 0, 0xFFFF):
        x, by = expr.args
        number = cast(U32, by) if expr.op != "+" else cast(U32, by) * _PAIR
        if expr.op == "&":
            number = number * _PAIR
        even, odd = (Expr(expr.op, U32, (half, number)) for half in _pack_wide(x, lane))
        if expr.op == ">>":  # bits that crossed into the lane below
            kept = (const(0xFFFF, U32) >> by) * _PAIR
            return even & kept, odd & kept
        return even, odd
    if expr.op == "+" and all(fits(e, 0, 0xFFFF) for e in (expr, *expr.args)):
        left, right = (_pack_wide(side, lane) for side in expr.args)
        return left[0] + right[0], left[1] + right[1]
    if not fits(expr, 0, 255):
        raise _NotPackable(f"{expr.op} has no packed form for 16 bits: {show(expr)}")
    word_ = _pack(expr, lane)
    return word_ & 0x00FF00FF, (word_ >> 8) & 0x00FF00FF


def _by_number(expr: Expr, lane: Expr) -> bool:
    """Whether the right operand is the same in all lanes, and none is negative."""
    x, by = expr.args
    return not depends_on(by, lane) and fits(x, 0, 0xFFFF) and fits(by, 0, 0xFFFF)


# ---- lanes of eight bits -----------------------------------------------------------------------


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
        fields_of = _bit_fields(value, mask.attr, lane)
        if fields_of is not None:
            return fields_of
        if not depends_on(amount, lane) and mask.attr <= 255 >> interval(amount)[1]:
            return (_pack(shifted, lane) >> amount) & splat(mask.attr)
    return _pack(value, lane) & _pack(mask, lane)


def _bit_fields(value: Expr, mask: int, lane: Expr) -> Expr | None:
    """(field[index] >> amount) & mask where the lanes' bits follow one another from byte to byte:
    a spread of a word of the field."""
    element, amount = value.args
    bits = mask.bit_length()
    if element.op != "load" or mask != (1 << bits) - 1 or element.attr.nbytes % 4:
        return None
    if not element.attr.storage.dtype.is_int or not depends_on(element, lane):
        return None
    position = element.args[0] * (8 * element.attr.storage.nbytes) + amount
    first, *others = (simplify(substitute(position, {lane: const(n, I32)})) for n in range(LANES))
    following = [simplify(first + bits * n) for n in range(1, LANES)]
    within = simplify(first % 32)
    if others != following or interval(within)[1] + LANES * bits > 32:
        return None
    return spread(bits, simplify(word(element.attr, simplify(first // 32)) >> within))


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
    values, index = expr.attr, expr.args[0]
    bytes_ = expr.dtype is I32 and -128 <= values.bounds[0] and values.bounds[1] <= 255
    affine = _stride(index, lane)
    if bytes_ and affine is not None and affine[1] == 1 and divisor(affine[0]) % LANES == 0:
        return table(values.words, simplify(affine[0] // LANES))
    if len(values) > 16 or not fits(index, 0, 15) or not expr.dtype.is_int:
        raise _NotPackable(f"a byte shuffle takes up to 16 integers: {show(expr)}")
    step = values[1] - values[0] if len(values) > 1 else 0
    even = all(v == values[0] + n * step for n, v in enumerate(values))
    if even and interval(index)[1] < len(values) and step >= 0 and values[0] >= 0 and bytes_:
        return _pack(index, lane) * step + splat(values[0])
    return lookup(tuple(values), _pack(index, lane))


def _pack_select(expr: Expr, lane: Expr) -> Expr:
    condition, a, b = expr.args
    if not depends_on(condition, lane):
        return where(condition, _pack(a, lane), _pack(b, lane))
    bits = _pack_condition(condition, lane)
    if _negated(b) is a:
        bits, a, b = bits ^ _ONES, b, a
    if _negated(a) is b and fits(b, 1, 127):
        return negate(_pack(b, lane), bits)
    mask = bits * 255
    return (_pack(a, lane) & mask) | (_pack(b, lane) & (mask ^ _ALL))


def _negated(expr: Expr) -> Expr | None:
    """x where the expression is -x."""
    if expr.op == "-" and expr.args[0].op == "const" and expr.args[0].attr == 0:
        return expr.args[1]
    return None


def _pack_condition(condition: Expr, lane: Expr) -> Expr:
    """A condition on one bit of each lane: bytes that are 0 or 1."""
    if condition.op in COMPARISONS:
        for number, bit in (condition.args, condition.args[::-1]):
            if number.op == "const" and bit.dtype.is_int and fits(bit, 0, 1):
                seen = [
                    evaluate(
                        rebuild(
                            condition,
                            tuple(const(n, a.dtype) if a is bit else a for a in condition.args),
                        )
                    ).item()
                    for n in (0, 1)
                ]
                if seen[0] != seen[1]:
                    return _pack(bit, lane) ^ splat(int(seen[0]))
    if condition.op == "select" and [a.attr for a in condition.args[1:]] == [False, True]:
        return _pack_condition(condition.args[0], lane) ^ _ONES
    raise _NotPackable(f"lanes take different branches, by more than a bit: {show(condition)}")


def _pack_minus(expr: Expr, lane: Expr) -> Expr:
    """Bytes are subtracted without borrowing from their neighbours (Hacker's Delight, 2-18)."""
    for side in expr.args:
        if not (fits(side, 0, 255) or fits(side, -128, 127)):
            raise _NotPackable(f"values in {interval(side)} are no bytes: {show(side)}")
    x, y = (_pack(side, lane) for side in expr.args)
    if all(fits(e, 0, 255) for e in (expr, *expr.args)):
        return x - y
    top = splat(0x80)
    return ((x | top) - (y & splat(0x7F))) ^ ((x ^ y ^ _ALL) & top)


_HANDLERS: dict[str, Callable[[Expr, Expr], Expr]] = {
    "load": _pack_load, "&": _pack_and, "|": _pack_or, "^": _pack_or, ">>": _pack_shift_right,
    "<<": _pack_no_carry, "+": _pack_no_carry, "*": _pack_no_carry, "-": _pack_minus,
    "cast": _pack_cast,
    "table": _pack_table, "select": _pack_select, "named": lambda e, lane: _pack(e.args[0], lane),
}  # fmt: skip

"""Blocks by the simple rule, as a row reduction, of which every target makes a kernel.

The scale of a block brings its element furthest out to the last code, or, where there is an offset,
its smallest and its largest to the first and the last; each element takes the nearest code.  That
is how ggml quantizes activations and caches (quantize_row_*_ref of ggml-quants.c).  Errors are
larger than those of the search that `kernelgen.quantize` makes, but there is next to nothing to do.

A row is a block: its reductions are the extremes of its elements, its columns are its bytes, and
what a byte is made of is found from the bits of the decoder (`kernelgen.ir.encode`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from kernelgen.errors import FormatError
from kernelgen.ir.block import BlockFormat
from kernelgen.ir.encode import CODE, bit_positions, is_shuffled
from kernelgen.ir.expr import (
    F32,
    I32,
    U32,
    Expr,
    Field,
    bitcast,
    cast,
    const,
    maximum,
    minimum,
    where,
)
from kernelgen.ir.floats import FLOATS, of_sort_key, order_key
from kernelgen.ir.ops.functions import absolute
from kernelgen.ir.ops.rows import Row, Rows
from kernelgen.ir.ops.tensors import COL, ROW, Output, Tensor
from kernelgen.quantizer.levels import Levels
from kernelgen.quantizer.plan import Factor, Plan, plan_of

#: with fewer codes, what is furthest out says too little about the others
_FEWEST = 8
#: of codes that are not whole numbers in order, each is a comparison
_MOST_UNEVEN = 16
#: scales below it, which half precision does not have, are taken for 0: 1 / scale is finite
_LEAST = 2.0**-120


@dataclass(frozen=True)
class _Piece:
    """Bits of a byte: `width` bits of a code from `low` on, at bit `at` of the byte.  In byte t of
    the field they are of element first + step * t."""

    at: int
    low: int
    width: int
    first: int
    step: int


def lacks_rule(fmt: BlockFormat) -> str | None:
    """Why blocks of a format are not made by the simple rule, or None."""
    try:
        by_rule(fmt)
    except FormatError as error:
        return str(error)
    return None


@functools.lru_cache(maxsize=256)
def by_rule(fmt: BlockFormat) -> Rows:
    """The row reduction from "x", f32 (blocks, block), to "out", u8 (blocks, nbytes).

    Raises FormatError for a format that has no such rule: all elements of a block share a float as
    scale, and perhaps another as offset; every bit of a code is a bit of the block.
    """
    plan = _checked(fmt)
    x = Tensor("x", "f32", (fmt.block, 1))
    row = Row()
    low, high = _extremes(fmt, x, row)
    levels = plan.codes
    if plan.offset is None:
        scale, scale_bits = _stored(plan.scale, _furthest(low, high, levels))
        offset, stored = const(0.0, F32), {plan.scale.field: scale_bits}
    else:
        scale, scale_bits = _stored(plan.scale, (high - low) * (1 / levels.span))
        # the smallest element is at the first code, with the scale as it is stored
        offset, offset_bits = _stored(plan.offset, low - scale * levels.low)
        stored = {plan.scale.field: scale_bits, plan.offset.field: offset_bits}
    inverse = where(absolute(scale) < _LEAST, 0.0, 1.0 / scale)

    def code(element: Expr) -> Expr:
        return _nearest((x[ROW, element] - offset) * inverse, levels)

    fields = [_bytes_of(one, fmt, stored.get(one), code) for one in fmt.layout_fields]
    value = fields[-1]
    for one, found in zip(fmt.layout_fields[-2::-1], fields[-2::-1], strict=True):
        value = where(COL < one.offset + one.nbytes, found, value)
    return row.done((x,), (Output("out", "u8", value),), label=f"blocks_{fmt.name}")


def _checked(fmt: BlockFormat) -> Plan:
    """The plan of a format that has the rule."""
    try:
        plan = plan_of(fmt)
    except FormatError:
        raise _no_rule(fmt, "it is not codes, a scale and an offset that are floats") from None
    levels, parts = plan.codes, [one for one in (plan.scale, plan.offset) if one is not None]
    reason = None
    if not is_shuffled(fmt) or type(levels) is not Levels:
        reason = "its codes share bits"
    elif plan.unit != fmt.block or any(one.field is None or one.integer for one in parts):
        reason = "its scale is not a float that a whole block shares"
    elif fmt.derived or fmt.halves or any(len(one.levels.values) > 1 for one in parts):
        reason = "it has more numbers than codes, a scale and an offset"
    elif len(levels.values) < _FEWEST:
        reason = f"it has only {len(levels.values)} codes"
    elif (np.diff(levels.stored) != 1).any():
        reason = "its codes are not in order"
    elif not levels.even and len(levels.values) > _MOST_UNEVEN:
        reason = f"its {len(levels.values)} codes are no whole numbers in order"
    if reason is not None:
        raise _no_rule(fmt, reason)
    return plan


def _no_rule(fmt: BlockFormat, reason: str) -> FormatError:
    return FormatError(
        f"blocks of {fmt.name} are not made by the simple rule, because {reason};"
        " kernelgen.quantize searches for them"
    )


def _extremes(fmt: BlockFormat, x: Tensor, row: Row) -> tuple[Expr, Expr]:
    """The smallest and the largest element of a block.  There are as many columns as bytes: each
    looks at some elements, and it does no harm to look at one twice."""
    each = -(-fmt.block // fmt.nbytes)

    def largest(sign: float, name: str) -> Expr:
        keys = [
            order_key(x[ROW, minimum(COL * each + n, fmt.block - 1)] * sign) for n in range(each)
        ]
        return of_sort_key(row.max(functools.reduce(maximum, keys), name))

    high = largest(1.0, "highest")
    return -largest(-1.0, "lowest"), high


def _furthest(low: Expr, high: Expr, levels: Levels) -> Expr:
    """The scale that brings the element furthest out to the last code, of the side that has more
    codes."""
    if levels.low == -levels.high:
        return maximum(-low, high) * (1 / levels.high)
    end = levels.low if -levels.low > levels.high else levels.high
    return where(-low < high, high, low) * (1 / end)


def _stored(factor: Factor, value: Expr) -> tuple[Expr, Expr]:
    """What a scale or offset is when it is read again, and the bits that are stored for it."""
    assert factor.field is not None
    unit = float(factor.levels.values[0])
    wanted = value if unit == 1 else value * (1 / unit)
    name = factor.field.storage.name
    if name == "f32":
        found, bits = wanted, bitcast(U32, wanted)
    else:
        kept = FLOATS[name]
        most = float(np.finfo(np.float16).max)
        bits = kept.encode(maximum(minimum(wanted, most), -most))
        found = kept.decode(bits)
    return (found if unit == 1 else found * unit), bits


def _nearest(level: Expr, levels: Levels) -> Expr:
    """The integer that stands for the level nearest to a number, i32."""
    first, last = int(levels.stored[0]), levels.last
    if levels.even:
        # truncated, as it is not negative
        place = cast(I32, minimum(maximum(level - (levels.low - 0.5), 0.0), last + 0.5))
    else:
        place = _count_below(levels.middles.tolist(), level, 0)
    return place + first if first else place


def _count_below(bounds: list[float], x: Expr, before: int) -> Expr:
    """How many ascending bounds are below a number, and `before`: by halving."""
    if not bounds:
        return const(before, I32)
    half = len(bounds) // 2
    more = _count_below(bounds[half + 1 :], x, before + half + 1)
    return where(bounds[half] < x, more, _count_below(bounds[:half], x, before))


def _bytes_of(
    field: Field, fmt: BlockFormat, stored: Expr | None, code: Callable[[Expr], Expr]
) -> Expr:
    """The byte of a field that is in this column, i32; in other columns anything."""
    at = minimum(maximum(COL - field.offset, 0), field.nbytes - 1)
    if stored is not None:
        return cast(I32, (stored >> (at * 8)) & 255)
    value: Expr = const(0, I32)
    for piece in _pieces(field, fmt):
        bits = (code(piece.first + piece.step * at) >> piece.low) & ((1 << piece.width) - 1)
        value = value | (bits << piece.at)
    return value


def _pieces(field: Field, fmt: BlockFormat) -> Iterator[_Piece]:
    """What each byte of a field is made of."""
    where_ = bit_positions(fmt)[CODE].position
    owner = np.full((fmt.nbytes * 8, 2), -1)
    for (element, bit), position in np.ndenumerate(where_):
        owner[position] = element, bit
    mine = owner.reshape(fmt.nbytes, 8, 2)[field.offset : field.offset + field.nbytes]
    found: list[_Piece] = []
    for at in range(8):
        elements, bits = mine[:, at, 0], mine[:, at, 1]
        step = int(elements[1] - elements[0]) if len(elements) > 1 else 0
        first, bit = int(elements[0]), int(bits[0])
        in_turn = np.array_equal(elements, first + step * np.arange(len(elements)))
        if bit < 0 or not in_turn or (bits != bit).any():
            raise _no_rule(fmt, f"bits of its field {field.name} are not those of codes in turn")
        last = found[-1] if found else None
        if last and (last.first, last.step, last.low + last.width) == (first, step, bit):
            found[-1] = _Piece(last.at, last.low, last.width + 1, first, step)
        else:
            found.append(_Piece(at, bit, 1, first, step))
    yield from found

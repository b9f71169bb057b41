"""How a format stores its codes, scales and offsets, found out from its expressions."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kernelgen.errors import FormatError
from kernelgen.ir.block import BlockFormat
from kernelgen.ir.cells import parts_of
from kernelgen.ir.encode import CODE, bit_positions, code_table, group_bits, is_shuffled
from kernelgen.ir.evaluate import evaluate
from kernelgen.ir.expr import F32, STORAGES, Expr, Field, cast, const, substitute, var
from kernelgen.ir.ranges import interval
from kernelgen.quantizer.grids import Grid
from kernelgen.quantizer.levels import Levels, ratio

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Factor:
    """A scale or offset: a float field (or 1) times a function of an integer of the group (or 1).

    field    the float field, each element of which serves as many consecutive groups
    integer  the format's group integer of this name, or else an integer field
    levels   the values of the function by stored integer
    """

    field: Field | None
    integer: str | None
    levels: Levels


@dataclass(frozen=True)
class Plan:
    """How a format stores its codes (less the bias), scales and offsets.

    unit   elements that share their floats
    group  elements that share all but the code
    signs  those that the scale of a group may have
    """

    codes: Levels
    scale: Factor
    offset: Factor | None
    unit: int
    group: int
    signs: tuple[int, ...]


@functools.lru_cache(maxsize=256)
def plan_of(fmt: BlockFormat) -> Plan:
    """The plan of a format, or a FormatError that says what is not understood."""
    g = var("g", fmt.groups)
    scale = _factor(fmt, "scale", fmt.scale_expr(g))
    offset = None if fmt.offset is None else _factor(fmt, "offset", fmt.offset_expr(g))
    codes = _codes(fmt)
    if offset is not None and (shift := _multiple(offset, scale)) is not None:
        codes, offset = Levels(codes.values + shift, codes.stored), None
    parts = [scale] if offset is None else [scale, offset]
    read = [name for part in parts for name in (part.field, part.integer) if name is not None]
    units = {part.field.count for part in parts if part.field is not None} or {fmt.groups}
    if len(set(read)) != len(read) or len(units) != 1:
        raise FormatError(
            f"format {fmt.name} has no quantizer, because its offset reads what its scale reads,"
            " or is shared by other groups; it may be a multiple of the scale, or have a float of"
            " its own for the same groups"
        )
    unit = fmt.block // units.pop()
    group = fmt.group if any(part.integer for part in parts) else unit
    alone = scale.field is not None and unit == group
    either = alone or scale.levels.low < 0 < scale.levels.high
    signs = (1, -1) if either and offset is None and codes.low != -codes.high else (1,)
    return Plan(codes, scale, offset, unit, group, signs)


def _multiple(offset: Factor, scale: Factor) -> float | None:
    """The number that always is offset / scale: a bias, written otherwise.  None if it varies."""
    o, s = (f.levels.values[np.argsort(f.levels.stored)] for f in (offset, scale))
    if (offset.field, offset.integer, len(o)) != (scale.field, scale.integer, len(s)):
        return None
    factor = float(ratio(o @ s, s @ s))
    return factor if np.allclose(o, factor * s) else None


def _codes(fmt: BlockFormat) -> Levels:
    if not is_shuffled(fmt):
        return _in_cells(fmt)
    width = bit_positions(fmt)[CODE].width
    table = code_table(fmt)
    if table is not None:
        values = np.array(table[: 1 << width], np.float64)
        return Levels(values - fmt.bias, np.arange(len(values)))
    lowest = -(1 << width - 1) if fmt.code_range[0] < 0 else 0
    stored = np.arange(lowest, lowest + (1 << width))
    if lowest == -128:  # as in ggml: kernels may negate a byte
        stored = stored[1:]
    stored = stored[stored <= fmt.largest.get(CODE, stored[-1])]
    return Levels(stored - fmt.bias, stored)


def _in_cells(fmt: BlockFormat) -> Levels:
    """Levels of codes that share bits, which may bind codes to each other."""
    parts = parts_of(fmt)
    cells = parts[0].cells
    if len(parts) == 1 and all(one.separable and one.mode is None for one in cells):
        stored = np.unique(np.concatenate([one.rows.ravel() for one in cells]))
        return Levels(stored.astype(np.float64) - fmt.bias, stored)
    return Grid(fmt, parts)


def _factor(fmt: BlockFormat, what: str, expr: Expr) -> Factor:
    """What `expr`, the scale or offset of group g, is made of."""
    leaves = list(dict.fromkeys(leaves_of(expr)))
    floats = [leaf for leaf in leaves if leaf.dtype is F32]
    integers = [leaf for leaf in leaves if leaf.dtype is not F32]
    field: Field | None = _field(floats[0]) if floats else None
    name: str | None = None
    lo, hi = 0, 0
    if integers:
        lo, hi = interval(integers[0])
        name = integers[0].attr if integers[0].op == "named" else integers[0].attr.name
        if name in fmt.ints:  # the interval may be wider than what the bits can hold
            hi = min(hi, lo + (1 << group_bits(fmt)[name].width) - 1)
        hi = min(hi, fmt.largest.get(str(name), hi))

    known = len(floats) < 2 and len(integers) < 2 and hi - lo < 1 << 16
    known = known and (field is None or in_order(floats[0], fmt.groups, field.count))
    known = known and all(in_order(leaf, fmt.groups, fmt.groups) for leaf in integers)
    if known:
        of_one, of_three = (_by_integer(fmt, expr, leaves, x, lo, hi) for x in (1.0, -3.0))
        known = all(np.array_equal(row, of_one[0], equal_nan=True) for row in of_one)
        known = known and (field is None or np.allclose(of_three, -3 * of_one, atol=0))
    if not known:
        raise FormatError(
            f"format {fmt.name} has no quantizer, because its {what} of group g, {expr}, is not a"
            " float field with as many groups for each element, in order, nor a function of one"
            " integer of the group, nor their product"
        )
    return Factor(field, name, Levels(of_one[0], np.arange(lo, hi + 1)))


def _field(leaf: Expr) -> Field:
    """The field that a float is in; of one whose bits are scattered, one like it."""
    return Field(leaf.attr, STORAGES["f16"], 1, -1) if leaf.op == "named" else leaf.attr


def leaves_of(expr: Expr) -> Iterator[Expr]:
    """The loads and group integers of an expression."""
    if expr.op in ("load", "named"):
        yield expr
    else:
        for arg in expr.args:
            yield from leaves_of(arg)


def in_order(leaf: Expr, readers: int, count: int, variable: str = "g") -> bool:
    """Whether consecutive readers read elements 0 ... count-1, equally many each."""
    each = np.arange(readers)
    at = evaluate(leaf.args[-1], {variable: each})
    return readers % count == 0 and bool((at == each // (readers // count)).all())


def _by_integer(
    fmt: BlockFormat, expr: Expr, leaves: list[Expr], x: float, lo: int, hi: int
) -> Array:
    """`expr` for each group and integer lo ... hi, (groups, hi - lo + 1), if floats are x."""
    count = hi - lo + 1
    integer = var("integer", count) + lo
    given = {e: const(x, F32) if e.dtype is F32 else cast(e.dtype, integer) for e in leaves}
    integers, g = np.tile(np.arange(count), fmt.groups), np.repeat(np.arange(fmt.groups), count)
    found = evaluate(substitute(expr, given), {"integer": integers, "g": g})
    return np.broadcast_to(found, g.shape).reshape(fmt.groups, count)

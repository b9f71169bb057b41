"""Float arrays into the blocks of any format, with small error.

A format says x = scale(g) * (code - bias) + offset(g).  `plan_of` finds out how it stores scale
and offset, by evaluating the two expressions; one method then serves all formats:

1. each group for itself: from several first scales (and offsets), round to codes and solve for the
   scale and offset of least squared error, which is linear once codes are known;
2. where groups share a float, round their scales to integer multiples of it by the same search;
3. in rounds: solve for the floats of least error with codes and integers fixed, round them to
   their stored type, then pick for what is stored the best of the neighbouring integers, and codes.

Steps 1 and 2 are the idea of ggml's make_qx_quants and make_qkx2_quants (ggml-quants.c), step 3
goes beyond them.  Elements lie as (group, groups), so that numpy sums whole rows at once.
"""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kernelgen.errors import FormatError, ShapeError
from kernelgen.ir.block import BlockFormat
from kernelgen.ir.encode import CODE, bit_positions, code_table, encode
from kernelgen.ir.evaluate import NUMPY_STORAGE, evaluate
from kernelgen.ir.expr import F32, Expr, Field, cast, const, substitute, var
from kernelgen.ir.ranges import interval

Array = npt.NDArray[Any]
Convert = Callable[[Array], Array]

#: elements a thread works on at once: temporaries of this size stay in a cache
CHUNK = 1 << 17
#: first scales: the element furthest out lies so many steps beyond the last code
MARGINS = (-0.5, 0.0, 0.5, 1.0, 1.5, 2.0)
#: the same with an offset, for the smallest and the largest element independently
MARGINS_BOTH_ENDS = (-0.25, 0.25, 0.75)
#: how often step 3 is done
ROUNDS = 2
#: cells of the table that finds the nearest of unevenly spaced levels
CELLS = 1 << 12


def quantize(
    x: npt.ArrayLike,
    fmt: BlockFormat,
    *,
    importance: npt.ArrayLike | None = None,
    progress: Callable[[int, int], object] | None = None,
    threads: int | None = None,
) -> npt.NDArray[np.uint8]:
    """Blocks, uint8 (..., K // block * nbytes), whose values are close to x.

    x           float16, float32 or float64 (..., K); K is a multiple of the format's block
    importance  weight of each column's squared error, (K,), not negative; default all alike
    progress    called with (rows done, all rows) now and then, from the calling thread
    threads     default: one per CPU

    The mean squared error, weighted by importance, is made small.  A scale beyond the range of
    its stored type becomes the largest it can hold, so values there saturate.  A format that
    stores floats gets the nearest, ties to even; there, NaN and infinity may occur in x too.

    ShapeError   x is empty, no float array, does not divide into blocks or holds values that are
                 not finite in float32; importance has another shape, is negative or not finite
    FormatError  scale, offset or codes of the format are stored in a way not known here
    """
    rows = _rows(x, fmt)
    weights = _weights(importance, rows.shape[1])
    convert: Convert
    if fmt.float_codes and code_table(fmt) is None:
        convert = _converter(fmt)
    else:
        _check_finite(rows)
        convert = functools.partial(_blocks, fmt, plan_of(fmt), weights)
    out = np.empty((len(rows), fmt.row_bytes(rows.shape[1])), np.uint8)
    step = max(1, CHUNK // rows.shape[1])

    def run(start: int) -> int:
        part = slice(start, min(start + step, len(rows)))
        with np.errstate(all="ignore"):
            out[part] = convert(rows[part]).reshape(out[part].shape)
        return int(part.stop)

    pool = ThreadPoolExecutor(max(1, threads or os.cpu_count() or 1))
    try:
        for done in pool.map(run, range(0, len(rows), step)):
            if progress is not None:
                progress(done, len(rows))
    finally:
        pool.shutdown(cancel_futures=True)  # what is left when one fails or the user interrupts
    return out.reshape(*np.shape(x)[:-1], -1)


def _rows(x: npt.ArrayLike, fmt: BlockFormat) -> Array:
    """x as (rows, K), in its own dtype."""
    array = np.asarray(x)
    if array.dtype.kind != "f" or array.dtype.itemsize > 8:
        raise ShapeError(
            f"{fmt.name} is made from float16, float32 or float64 arrays, not {array.dtype};"
            " convert with astype(numpy.float32)"
        )
    if array.ndim == 0 or array.size == 0:
        raise ShapeError(f"an array of shape {array.shape} has no rows to make {fmt.name} of")
    k = array.shape[-1]
    if k % fmt.block:
        raise ShapeError(
            f"rows of {k} elements do not divide into blocks of {fmt.name}, which hold"
            f" {fmt.block}; pad the last axis to a multiple of {fmt.block}"
        )
    return array.reshape(-1, k)


def _check_finite(rows: Array) -> None:
    limit = np.finfo(np.float32).max
    step = max(1, CHUNK // rows.shape[1])
    count, first = 0, ""
    for start in range(0, len(rows), step):
        bad = np.argwhere(~(np.abs(rows[start : start + step]) <= limit))
        if len(bad) and not count:
            row, column = start + bad[0][0], bad[0][1]
            first = f"{rows[row, column]} in row {row}, column {column}"
        count += len(bad)
    if count:
        raise ShapeError(
            f"{count} of {rows.size} values are not finite in float32, the first is {first};"
            " replace them before quantizing"
        )


def _weights(importance: npt.ArrayLike | None, k: int) -> Array | None:
    """Weights of mean 1, float32 (k,), none quite zero so that every group has a best scale."""
    if importance is None:
        return None
    weights = np.asarray(importance, np.float64)
    if weights.shape != (k,) or not np.isfinite(weights).all() or (weights < 0).any():
        raise ShapeError(
            f"importance is one finite weight, not negative, for each of the {k} columns; this"
            f" array has shape {weights.shape} and minimum {weights.min(initial=np.inf)}"
        )
    return (weights / (weights.mean() or 1.0) + 1e-6).astype(np.float32)


# ---- what a format stores ----------------------------------------------------------------------


class Levels:
    """Numbers that a format can express, ascending, and the integer that stands for each."""

    def __init__(self, values: Array, stored: Array) -> None:
        """`stored[j]` stands for `values[j]`; of two for one value the first is taken."""
        usable = np.isfinite(values)
        self.values, first = np.unique(values[usable].astype(np.float64), return_index=True)
        self.stored = stored[usable][first]
        self.low, self.high = float(self.values[0]), float(self.values[-1])
        self.span = self.high - self.low
        self.last = len(self.values) - 1
        self.middles = self.values[1:] / 2 + self.values[:-1] / 2
        gaps = np.diff(self.values)
        self.even = bool((gaps == 1).all())
        self.cells: Array | None = None
        if not self.even and gaps.min() * 256 > self.span:
            at = np.linspace(self.low, self.high, CELLS)
            self.cells = self.values[self.position(at)].astype(np.float32)

    def position(self, y: Array) -> Array:
        """Index of the level nearest to each y."""
        if self.even:
            return np.clip(np.rint(y - self.low), 0, self.last).astype(np.intp)
        return np.searchsorted(self.middles, y)

    def nearest(self, y: Array) -> Array:
        """The level nearest to each y, float32; overwrites y.

        Where levels are uneven, it is found in a table and may be the second nearest for a y
        within span / CELLS of the middle between two.
        """
        if self.even:
            y -= np.float32(self.low)
            np.clip(np.rint(y, out=y), 0, self.last, out=y)
            y += np.float32(self.low)
            return y
        if self.cells is None:
            return self.values[self.position(y)].astype(np.float32)
        np.clip(y, self.low, self.high, out=y)
        y -= np.float32(self.low)
        y *= np.float32((CELLS - 1) / self.span)
        y += np.float32(0.5)
        return self.cells.take(y.astype(np.int32))


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
    ratio = float(_ratio(o @ s, s @ s))
    return ratio if np.allclose(o, ratio * s) else None


def _codes(fmt: BlockFormat) -> Levels:
    width = bit_positions(fmt)[CODE].width
    table = code_table(fmt)
    if table is not None:
        values = np.array(table[: 1 << width], np.float64)
        return Levels(values - fmt.bias, np.arange(len(values)))
    lowest = -(1 << width - 1) if fmt.code_range[0] < 0 else 0
    stored = np.arange(lowest, lowest + (1 << width))
    if lowest == -128:  # as in ggml: kernels may negate a byte
        stored = stored[1:]
    return Levels(stored - fmt.bias, stored)


def _factor(fmt: BlockFormat, what: str, expr: Expr) -> Factor:
    """What `expr`, the scale or offset of group g, is made of."""
    leaves = list(dict.fromkeys(_leaves(expr)))
    floats = [leaf for leaf in leaves if leaf.dtype is F32]
    integers = [leaf for leaf in leaves if leaf.dtype is not F32]
    field: Field | None = floats[0].attr if floats else None
    name: str | None = None
    lo, hi = 0, 0
    if integers:
        lo, hi = interval(integers[0])
        name = integers[0].attr if integers[0].op == "named" else integers[0].attr.name
        if name in fmt.ints:  # the interval may be wider than what the bits can hold
            hi = min(hi, lo + (1 << bit_positions(fmt)[name].width) - 1)

    known = len(floats) < 2 and len(integers) < 2 and hi - lo < 1 << 16
    known = known and (field is None or _in_order(floats[0], fmt.groups, field.count))
    known = known and all(_in_order(leaf, fmt.groups, fmt.groups) for leaf in integers)
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


def _leaves(expr: Expr) -> Iterator[Expr]:
    """The loads and group integers of an expression."""
    if expr.op in ("load", "named"):
        yield expr
    else:
        for arg in expr.args:
            yield from _leaves(arg)


def _in_order(leaf: Expr, readers: int, count: int, variable: str = "g") -> bool:
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


class Elements:
    """Elements, float32 (group, groups), weights of that shape or None, and the levels of codes.

    With `offsets`, groups have an offset beside their scale.  Then `mid` is subtracted from each,
    which keeps small differences exact, and offsets here are relative to it.
    """

    def __init__(self, x: Array, weights: Array | None, levels: Levels, offsets: bool) -> None:
        """Owns x, and changes it."""
        self.levels, self.offsets = levels, offsets
        self.low, self.high = x.min(axis=0), x.max(axis=0)
        self.mid = (self.low / 2 + self.high / 2) * np.float32(offsets)
        if offsets:
            x -= self.mid
            self.low, self.high = self.low - self.mid, self.high - self.mid
        self.x, self.weights = x, weights
        self.weighted = self._weigh(x)
        self.sum_x = self.weighted.sum(axis=0)
        self.sum_w = self._weigh(np.ones_like(x)).sum(axis=0)

    def _weigh(self, a: Array) -> Array:
        return a if self.weights is None else a * self.weights

    def codes(self, s: Array, o: Array | None) -> Array:
        """The level of each element, given scale and offset of each group."""
        inverse = _ratio(np.float32(1), s)
        y = self.x * inverse
        if o is not None:
            y -= o * inverse
        return self.levels.nearest(y)

    def sums(self, codes: Array) -> tuple[Array, Array, Array]:
        """Weighted sums over each group: of codes, their squares, and their products with x."""
        weighted = self._weigh(codes)
        squares, products = (np.einsum("ij,ij->j", codes, a) for a in (weighted, self.weighted))
        return weighted.sum(axis=0), squares, products

    def solve(self, codes: Array) -> tuple[Array, Array | None, Array]:
        """Scale and offset of least squared error for given codes, and how much it is less."""
        c, cc, xc = self.sums(codes)
        if not self.offsets:
            s = _ratio(xc, cc)
            return s, None, s * xc
        det = cc * self.sum_w - c * c
        det[det < 1e-6 * cc * self.sum_w] = 0  # codes are equal: the offset alone matters
        s = _ratio(xc * self.sum_w - self.sum_x * c, det)
        o = _ratio(self.sum_x - s * c, self.sum_w)
        return s, o, s * xc + o * self.sum_x

    def error(self, s: Array, o: Array | None) -> Array:
        """Weighted squared error of each group."""
        r = self.codes(s, o) * s
        r -= self.x
        if o is not None:
            r += o
        return np.asarray(np.einsum("ij,ij->j", r, self._weigh(r)))

    def best(self, signs: tuple[int, ...]) -> tuple[Array, Array]:
        """Scale and offset (0 if there is none) of each group, before any rounding."""
        scale, offset, most = (np.zeros_like(self.mid) for _ in range(3))
        for s, o in self._both_ends() if self.offsets else self._far_end(signs):
            for _ in range(2):
                s, o, less = self.solve(self.codes(s, o))
            better = less > most
            np.copyto(most, less, where=better)
            np.copyto(scale, s, where=better)
            if o is not None:
                np.copyto(offset, o, where=better)
        return scale, offset

    def _far_end(self, signs: tuple[int, ...]) -> Iterator[tuple[Array, Array | None]]:
        """Scales that bring the element furthest out to a margin beyond the last level."""
        for sign in signs:
            low, high = (sign * end for end in (self.low, self.high)[::sign])
            reach = np.zeros_like(low)
            if self.levels.high > 0:
                reach = np.maximum(reach, high / self.levels.high)
            if self.levels.low < 0:
                reach = np.maximum(reach, low / self.levels.low)
            for margin in MARGINS:
                yield reach * (sign / (1 + 2 * margin / (self.levels.last + 2))), None

    def _both_ends(self) -> Iterator[tuple[Array, Array | None]]:
        """Scales and offsets that bring both ends of a group to margins beyond the levels."""
        step = self.levels.span / max(self.levels.last, 1)
        for below, above in itertools.product(MARGINS_BOTH_ENDS, repeat=2):
            s = (self.high - self.low) / (self.levels.span + (below + above) * step)
            yield s, self.low - s * (self.levels.low - below * step)


def _ratio(a: Array | np.float32, b: Array) -> Array:
    """a / b, and 0 where that is not finite."""
    quotient = np.asarray(np.divide(a, b))
    quotient[~np.isfinite(quotient)] = 0
    return quotient


# ---- what is stored ----------------------------------------------------------------------------


class Stored:
    """A factor in some blocks: a float for each unit, (units, 1), an integer for each group.

    `at` are the integers, (units, groups of a unit), as positions in the factor's levels; `raw`
    the floats that blocks hold; `floats`, float64, the same for elements times 2**-exponent.
    """

    def __init__(self, factor: Factor, exponent: Array) -> None:
        self.levels, self.field, self.integer = factor.levels, factor.field, factor.integer
        self.exponent = exponent
        self.raw = np.ones(exponent.shape)
        self.floats = np.ldexp(self.raw, -exponent)
        self.at = np.zeros(exponent.shape, np.intp)

    def share(self, wanted: Array, weight: Array) -> None:
        """Store values near `wanted`, (groups,), float32."""
        if self.field is not None:
            x, w = (a.reshape(len(self.floats), -1).T.copy() for a in (wanted, weight))
            floats, _ = Elements(x, w, self.levels, offsets=False).best((1, -1))
            self.set_floats(floats[:, None], first=True)
        self.set_integers(wanted)

    def set_floats(self, wanted: Array, first: bool = False) -> None:
        """Round floats to their type; none becomes infinite or vanishes, and subnormal ones, which
        are coarse, become at first rather too large than so small that codes saturate."""
        if self.field is None:
            return
        dtype = np.dtype(NUMPY_STORAGE[self.field.storage.name])
        info = np.finfo(dtype)
        exact = np.ldexp(wanted.astype(np.float64), self.exponent)
        self.raw = np.clip(exact, info.min, info.max).astype(dtype)
        coarse = ((self.raw == 0) | first) & (np.abs(exact) < info.smallest_normal)
        short = coarse & (np.abs(self.raw) < np.abs(exact))
        away = np.copysign(np.inf, exact[short]).astype(dtype)
        self.raw[short] = np.nextafter(self.raw[short], away)
        self.floats = np.ldexp(self.raw.astype(np.float64), -self.exponent)

    def set_integers(self, wanted: Array) -> None:
        """Choose the integers that, with the present floats, come nearest to `wanted`."""
        y = _ratio(wanted.reshape(len(self.floats), -1), self.floats)
        self.at = self.levels.position(y)

    def values(self) -> Array:
        """The factor of each group, float32 (groups,)."""
        return (self.floats * self.levels.values[self.at]).ravel().astype(np.float32)


def _blocks(fmt: BlockFormat, plan: Plan, weights: Array | None, rows: Array) -> Array:
    """Blocks, uint8 (n, nbytes), of finite rows (rows, K)."""

    def by_group(a: Array) -> Array:
        return np.ascontiguousarray(a.reshape(-1, plan.group).T)

    units = rows.astype(np.float32).reshape(-1, plan.unit)
    exponent = np.frexp(np.abs(units).max(axis=1, keepdims=True))[1]
    x = by_group(np.ldexp(units, -exponent))
    w = None if weights is None else by_group(np.broadcast_to(weights, rows.shape))
    elements = free = Elements(x, w, plan.codes, plan.offset is not None)
    s, o = elements.best(plan.signs)
    scale, offset = Stored(plan.scale, exponent), None
    if plan.offset is not None:
        offset = Stored(plan.offset, exponent)
        offset.share(o + elements.mid, elements.sum_w)
        free = Elements(elements.x - (offset.values() - elements.mid), w, plan.codes, offsets=False)
        s, _ = free.best(plan.signs)
    scale.share(s, free.sums(free.codes(s, None))[1])
    codes = _settle(elements, scale, offset)
    for _ in range(ROUNDS):
        _set_floats(elements, codes, scale, offset)
        codes = _settle(elements, scale, offset)

    stored = plan.codes.stored[plan.codes.position(codes)].T.reshape(-1, fmt.block)
    ints = {name: np.zeros((len(stored), fmt.groups), np.int64) for name in fmt.ints}
    fields: dict[str, Array] = {}
    for part in (scale, offset):
        if part is not None and part.field is not None:
            fields[part.field.name] = part.raw.reshape(len(stored), -1)
        if part is not None and part.integer is not None:
            integers = part.levels.stored[part.at].reshape(len(stored), -1)
            (ints if part.integer in ints else fields)[part.integer] = integers
    return encode(fmt, stored, ints, fields)


def _settle(elements: Elements, scale: Stored, offset: Stored | None) -> Array:
    """Move integers to their best neighbours; returns the codes for what is then stored."""

    def present() -> tuple[Array, Array | None]:
        return scale.values(), None if offset is None else offset.values() - elements.mid

    parts = [scale] if offset is None else [scale, offset]
    start = scale.at
    best, least = [part.at for part in parts], np.full_like(elements.mid, np.inf)
    for move in (0, -1, 1) if scale.integer else (0,):
        scale.at = np.clip(start + move, 0, scale.levels.last)
        s, o = present()
        if offset is not None and offset.integer:
            c, _, _ = elements.sums(elements.codes(s, o))
            offset.set_integers(_ratio(elements.sum_x - s * c, elements.sum_w) + elements.mid)
            s, o = present()
        error = elements.error(s, o)
        better = (error < least).reshape(start.shape)
        best = [np.where(better, part.at, old) for part, old in zip(parts, best, strict=True)]
        least = np.fmin(least, error)
    for part, at in zip(parts, best, strict=True):
        part.at = at
    return elements.codes(*present())


def _set_floats(elements: Elements, codes: Array, scale: Stored, offset: Stored | None) -> None:
    """Store the floats of least squared error for given codes and integers."""

    def total(a: Array) -> Array:
        return np.asarray(a.reshape(len(scale.floats), -1).sum(axis=1, keepdims=True))

    # x = d * (m * code) + q * k, with m and k known for each group, d and q wanted for each unit
    m, mid = scale.levels.values[scale.at].ravel(), elements.mid.astype(np.float64)
    c, cc, xc = elements.sums(codes)
    dd, dx = total(m * m * cc), total(m * (xc + mid * c))
    if offset is None:
        scale.set_floats(_ratio(dx, dd))
        return
    k = offset.levels.values[offset.at].ravel()
    dq, qq = total(m * k * c), total(k * k * elements.sum_w)
    qx = total(k * (elements.sum_x + mid * elements.sum_w))
    det = dd * qq - dq * dq
    solvable = (det > 1e-9 * dd * qq) & (offset.field is not None)
    alone = _ratio(dx - offset.floats * dq, dd)
    scale.set_floats(np.where(solvable, _ratio(dx * qq - qx * dq, det), alone))
    offset.set_floats(_ratio(qx - scale.floats * dq, qq))


# ---- formats that store floats -----------------------------------------------------------------


def _converter(fmt: BlockFormat) -> Convert:
    """The function from rows to their bytes, for a format whose codes are the values."""
    code = fmt.code_expr(var("i", fmt.block))
    leaf, *more = dict.fromkeys(_leaves(code))
    stored: Convert | None = None
    if leaf is code:
        stored = functools.partial(np.ndarray.astype, dtype=NUMPY_STORAGE[leaf.attr.storage.name])
    elif not more and leaf.op == "load" and interval(leaf) == (0, 65535):
        every = np.arange(1 << 16)
        of_word = substitute(code, {leaf: cast(leaf.dtype, var("word", 1 << 16))})
        if (evaluate(of_word, {"word": every}).view(np.uint32) == every << 16).all():
            stored = _upper_half
    plain = len(fmt.fields) == 1 and not (fmt.scale or fmt.offset or fmt.bias)
    if stored is None or not plain or not _in_order(leaf, fmt.block, fmt.block, "i"):
        raise FormatError(
            f"format {fmt.name} has no quantizer, because its values {code} are not the elements of"
            " its only field, in order, as f32, f16 or the upper 16 bits of f32"
        )
    name, convert = leaf.attr.name, stored
    return lambda rows: fmt.join({name: convert(rows.reshape(-1, fmt.block))})


def _upper_half(x: Array) -> Array:
    """The 16 bits of the nearest f32 whose lower 16 bits are zero, ties to even."""
    bits = x.astype(np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(x), bits >> 16 | 0x40, rounded)  # 0x40: NaN even if lower bits go

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
from kernelgen.ir.block import NUMPY_STORAGE, BlockFormat
from kernelgen.ir.encode import CODE, bit_positions, code_table, encode
from kernelgen.ir.evaluate import evaluate
from kernelgen.ir.expr import F32, Expr, cast, const, substitute, var
from kernelgen.ir.ranges import interval

Array = npt.NDArray[Any]
Progress = Callable[[int, int], object]
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
    progress: Progress | None = None,
    threads: int | None = None,
) -> npt.NDArray[np.uint8]:
    """Blocks, uint8 (..., K // block * nbytes), whose values are close to x.

    x           float16, float32 or float64 (..., K); K is a multiple of the format's block
    importance  weight of each column's squared error, (K,), not negative; default all alike
    progress    called with (rows done, all rows) now and then, from the calling thread
    threads     default: one per CPU

    The mean squared error, weighted by importance, is made small.  A scale beyond the range of
    its stored type becomes the largest it can hold, so values there saturate.  Formats whose
    codes are floats are conversions: nearest, ties to even, too large becomes infinite where the
    format has infinity, NaN stays NaN.

    ShapeError   x is empty, no float array, does not divide into blocks or holds values that are
                 not finite in float32 (NaN and infinity are fine if the format stores floats);
                 importance has another shape, or is negative or not finite
    FormatError  scale, offset or codes of the format are stored in a way not known here
    """
    rows = _rows(x, fmt)
    k = rows.shape[-1]
    work: Convert
    if fmt.float_codes and code_table(fmt) is None:
        work = _converter(fmt)
    else:
        _check_finite(rows)
        work = functools.partial(_blocks, fmt, plan_of(fmt), _weights(importance, k))
    out = np.empty((len(rows), fmt.row_bytes(k)), np.uint8)
    step = max(1, CHUNK // k)

    def run(start: int) -> int:
        with np.errstate(all="ignore"):
            out[start : start + step] = work(rows[start : start + step])
        return min(start + step, len(rows))

    with ThreadPoolExecutor(max(1, threads or os.cpu_count() or 1)) as pool:
        for done in pool.map(run, range(0, len(rows), step)):
            if progress is not None:
                progress(done, len(rows))
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
    count, first = 0, None
    step = max(1, CHUNK // rows.shape[1])
    with np.errstate(all="ignore"):
        for start in range(0, len(rows), step):
            bad = ~np.isfinite(rows[start : start + step].astype(np.float32, copy=False))
            found = np.count_nonzero(bad)
            if found and first is None:
                first = start + int(bad.argmax()) // rows.shape[1], int(bad.argmax()) % rows.shape[1]
            count += found
    if first is not None:
        raise ShapeError(
            f"{count} of {rows.size} values are not finite in float32, the first of them"
            f" {rows[first]} in row {first[0]}, column {first[1]}; replace them before quantizing"
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
    mean = weights.mean() or 1.0
    return (weights / mean + 1e-6).astype(np.float32)


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
        self.steps = max(len(self.values) - 1, 1)
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
            return np.clip(np.rint(y - self.low), 0, self.steps).astype(np.intp)
        return np.searchsorted(self.middles, y)

    def nearest(self, y: Array) -> Array:
        """The level nearest to each y, float32; overwrites y.

        Where levels are uneven, it may be the second nearest for a y within span / CELLS of the
        middle between two: that costs no accuracy to speak of, and is much faster.
        """
        if self.even:
            y -= np.float32(self.low)
            np.clip(np.rint(y, out=y), 0, self.steps, out=y)
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

    field    the float field, of `floats` elements, each serving as many consecutive groups
    integer  the format's group integer of this name, or else an integer field
    levels   the values of the function by stored integer
    """

    field: str | None
    floats: int
    integer: str | None
    levels: Levels


@dataclass(frozen=True)
class Plan:
    """How a format stores its codes (less the bias), scales and offsets.

    A unit is the elements that share one float.  `signs` are those a group's scale may have.
    """

    codes: Levels
    scale: Factor
    offset: Factor | None
    signs: tuple[int, ...]


@functools.lru_cache(maxsize=256)
def plan_of(fmt: BlockFormat) -> Plan:
    """The plan of a format, or a FormatError that says what is not understood."""
    g = var("g", fmt.groups)
    scale = _factor(fmt, "scale", fmt.scale_expr(g))
    offset = None if fmt.offset is None else _factor(fmt, "offset", fmt.offset_expr(g))
    codes = _codes(fmt)
    if offset is not None:
        same = {offset.field, offset.integer} & {scale.field, scale.integer} - {None}
        if same or offset.floats != scale.floats:
            why = f"both read {same.pop()}" if same else "are shared by different groups"
            raise FormatError(f"format {fmt.name} has no quantizer: its scale and offset {why}")
    alone = scale.field is not None and scale.floats == fmt.groups
    either = offset is None and (alone or scale.levels.low < 0)
    signs = (1, -1) if either and codes.low != -codes.high else (1,)
    return Plan(codes, scale, offset, signs)


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

    def unknown(why: str) -> FormatError:
        return FormatError(
            f"format {fmt.name} has no quantizer, because its {what} {why}; known are a float"
            " field, a function of one integer of the group, and their product"
        )

    def elements(leaf: Expr, count: int) -> bool:
        """Whether groups in order read elements 0 ... count-1 in order, equally many each."""
        at = evaluate(leaf.args[-1], {"g": np.arange(fmt.groups)})
        return fmt.groups % count == 0 and bool((at == np.arange(fmt.groups) * count // fmt.groups).all())

    if len(floats) > 1 or len(integers) > 1:
        raise unknown("reads " + " and ".join(map(str, leaves)))
    field, count = (floats[0].attr.name, floats[0].attr.count) if floats else (None, fmt.groups)
    if floats and not elements(floats[0], count):
        raise unknown(f"does not use the elements of {field} evenly and in order")
    lo, hi, integer = 0, 0, None
    if integers:
        lo, hi = interval(integers[0])
        integer = integers[0].attr if integers[0].op == "named" else integers[0].attr.name
        if not elements(integers[0], fmt.groups) or hi - lo > 65535:
            raise unknown(f"reads {integers[0]}, which is not a small integer of each group")
    one, three = (_function(fmt, expr, leaves, value, (lo, hi)) for value in (1.0, -3.0))
    if one is None or three is None:
        raise unknown("differs between groups in more than the fields it reads")
    if floats and not np.allclose(three, -3 * one, rtol=1e-6, atol=0):
        raise unknown(f"is not proportional to {field}")
    return Factor(field, count, integer, Levels(one, np.arange(lo, hi + 1)))


def _leaves(expr: Expr) -> Iterator[Expr]:
    """The loads and group integers of an expression."""
    if expr.op in ("load", "named"):
        yield expr
    else:
        for arg in expr.args:
            yield from _leaves(arg)


def _function(
    fmt: BlockFormat, expr: Expr, leaves: list[Expr], value: float, limits: tuple[int, int]
) -> Array | None:
    """`expr` with floats set to `value`, for each integer lo ... hi; None if groups differ."""
    lo, hi = limits
    integer = var("integer", hi - lo + 1) + lo
    stand_in = {
        leaf: const(value, F32) if leaf.dtype is F32 else cast(leaf.dtype, integer)
        for leaf in leaves
    }
    plain = substitute(expr, stand_in)
    integers = np.arange(hi - lo + 1)
    first, *others = (
        np.broadcast_to(evaluate(plain, {"integer": integers, "g": g}), integers.shape)
        for g in range(fmt.groups)
    )
    return first if all(np.array_equal(first, o, equal_nan=True) for o in others) else None


# ---- elements and codes ------------------------------------------------------------------------


@dataclass
class Sums:
    """Weighted sums over each group of its levels l and elements x, float32 (groups,)."""

    w: Array
    l: Array  # noqa: E741
    ll: Array
    x: Array
    xl: Array


class Elements:
    """Elements, float32 (group, groups), with weights of that shape or None.

    With `centred`, `mid` is subtracted from each group, which keeps small differences exact;
    offsets passed here are then relative to it.
    """

    def __init__(self, x: Array, w: Array | None, centred: bool) -> None:
        """Owns x, and changes it."""
        self.low, self.high = x.min(axis=0), x.max(axis=0)
        self.mid = np.zeros_like(self.low)
        if centred:
            self.mid = (self.low + self.high) / 2
            x -= self.mid
            self.low, self.high = self.low - self.mid, self.high - self.mid
        self.x, self.weights = x, w
        self.xw = x if w is None else x * w
        self.sum_w = np.full_like(self.mid, len(x)) if w is None else w.sum(axis=0)
        self.sum_x = self.xw.sum(axis=0)

    def codes(self, levels: Levels, s: Array, o: Array | None) -> Array:
        """The level of each element, float32, given scales and offsets (groups,)."""
        inverse = _ratio(np.float32(1), s)
        y = self.x * inverse
        if o is not None:
            y -= o * inverse
        return levels.nearest(y)

    def sums(self, l: Array) -> Sums:  # noqa: E741
        """The sums for levels l."""
        lw = l if self.weights is None else l * self.weights
        dot = functools.partial(np.einsum, "ij,ij->j")
        return Sums(self.sum_w, lw.sum(axis=0), dot(lw, l), self.sum_x, dot(self.xw, l))

    def error(self, l: Array, s: Array, o: Array | None) -> Array:  # noqa: E741
        """Weighted squared error of each group."""
        r = l * s
        r -= self.x
        if o is not None:
            r += o
        error: Array = np.einsum("ij,ij->j", r, r if self.weights is None else r * self.weights)
        return error


def _ratio(a: Array | np.float32, b: Array) -> Array:
    """a / b, and 0 where that is not finite."""
    quotient = np.asarray(a / b)
    quotient[~np.isfinite(quotient)] = 0
    return quotient


def _fit(
    elements: Elements, levels: Levels, signs: tuple[int, ...], with_offset: bool
) -> tuple[Array, Array]:
    """Scale and offset (groups,) of each group for itself, not yet rounded to what is stored."""
    scale, offset, most = (np.zeros_like(elements.mid) for _ in range(3))
    starts = _both_ends(elements, levels) if with_offset else _one_end(elements, levels, signs)
    for s, o in starts:
        for _ in range(2):
            sums = elements.sums(elements.codes(levels, s, o if with_offset else None))
            s, o = _solve(sums, with_offset)  # noqa: PLW2901
        explained = sums.xl * s + sums.x * o
        better = explained > most
        for best, new in ((scale, s), (offset, o), (most, explained)):
            np.copyto(best, new, where=better)
    return scale, offset


def _one_end(
    elements: Elements, levels: Levels, signs: tuple[int, ...]
) -> Iterator[tuple[Array, Array]]:
    """Scales at which all elements lie in the range of the levels, but for the margin."""
    zero = np.zeros_like(elements.mid)
    for sign in signs:
        low, high = sorted((sign * elements.low, sign * elements.high), key=lambda a: -sign)[::-1]
        yield zero, zero

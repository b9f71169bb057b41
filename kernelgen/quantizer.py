"""Float arrays into the blocks of any format, with small error.

A format says x = scale(g) * (code - bias) + offset(g).  `plan_of` finds out, by evaluating the two
expressions, how scale and offset are stored: as a float, a float times an integer of the group, or
an integer that a function turns into a float.  One method then serves every such format:

1. each group for itself: try several scales, round to codes, and solve for the scale (and offset)
   of least squared error, which is linear once codes are known (the idea of ggml's make_qx_quants
   and make_qkx2_quants, ggml-quants.c);
2. round the scales of groups that share a float to multiples of it, by the same search;
3. in rounds: solve for the shared floats with codes and integers fixed, round them to their stored
   type, then pick the best integers beside the present ones, and codes, for what is stored.

Arrays of elements have shape (group, groups): sums run over whole rows, which numpy does fast.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kernelgen.errors import FormatError, ShapeError
from kernelgen.ir.block import NUMPY_STORAGE, BlockFormat
from kernelgen.ir.encode import CODE, bit_positions, code_table, encode
from kernelgen.ir.evaluate import evaluate
from kernelgen.ir.expr import F32, I32, Expr, cast, const, substitute, var
from kernelgen.ir.ranges import interval

Array = npt.NDArray[Any]
Progress = Callable[[int, int], object]

#: elements worked on at once by a thread: a handful of temporaries of this size fit a cache
CHUNK = 1 << 16
#: cells of the table that finds the nearest of unequally spaced levels
CELLS = 1 << 12
#: scales tried for a group: the extreme element lies this many steps outside the range of codes
OUTSIDE = (-0.5, 0.0, 0.5, 1.0, 1.5, 2.0)
ROUNDS = 2


class Levels:
    """Numbers that can be stored, ascending, and the integer that stands for each."""

    def __init__(self, values: Array, stored: Array) -> None:
        """`values[j]` is stored as the integer `stored[j]`; those not finite are left out."""
        finite = np.isfinite(values)
        unique, first = np.unique(values[finite], return_index=True)
        self.values = unique.astype(np.float32)
        self.stored = stored[finite][first]
        self.low, self.high = float(unique[0]), float(unique[-1])
        gaps = np.diff(unique)
        self.uniform = bool((gaps == 1).all())
        self.middles = (self.values[1:] + self.values[:-1]) / 2
        span = self.high - self.low
        self.tabulated = not self.uniform and float(gaps.min()) * 256 > span
        if self.tabulated:
            self.per_unit = (CELLS - 1) / span
            cells = np.linspace(self.low, self.high, CELLS, dtype=np.float32)
            self.table = self.values[np.searchsorted(self.middles, cells)]

    def nearest(self, y: Array) -> Array:
        """The level nearest to each float32 of y, which may be overwritten.

        Unequal levels come from a table of CELLS, so a tie within 1/CELLS of the range may go
        either way.
        """
        if self.uniform:
            y -= self.low
            np.rint(y, out=y)
            np.clip(y, 0, self.high - self.low, out=y)
            y += self.low
            return y
        if self.tabulated:
            np.clip(y, self.low, self.high, out=y)
            y -= self.low
            y *= self.per_unit
            y += 0.5
            return self.table.take(y.astype(np.int32))
        return self.values.take(self.position(y))

    def position(self, y: Array) -> Array:
        """The index of the level nearest to each float of y."""
        return np.searchsorted(self.middles, y)


@dataclass(frozen=True)
class Factor:
    """What the format multiplies: an optional float field times a function of an optional integer.

    floats  elements of the float field in a block; each serves groups // floats groups
    levels  the values of the function, by the stored integer
    """

    field: str | None
    floats: int
    integer: str | None
    levels: Levels
    table: Array


@dataclass(frozen=True)
class Plan:
    """How a format stores codes, scales and offsets."""

    codes: Levels
    scale: Factor
    offset: Factor | None

    @property
    def units(self) -> int:
        return self.scale.floats


def _factor(fmt: BlockFormat, expr: Expr, what: str) -> Factor:
    """What `expr`, the scale or the offset of group g, is made of."""

    def bad(why: str) -> FormatError:
        return FormatError(
            f"format {fmt.name} has no quantizer, because its {what} {why}; a {what} may be a"
            " float field, a function of one integer of the group, or their product"
        )

    leaves = _leaves(expr)
    floats = [e for e in leaves if e.dtype is F32]
    integers = [e for e in leaves if e.dtype is not F32]
    if len(floats) > 1 or len(integers) > 1:
        raise bad(f"reads {', '.join(map(str, leaves))}")
    every = np.arange(fmt.groups)

    count = fmt.groups if not floats else floats[0].attr.count
    if floats:
        at = np.broadcast_to(evaluate(floats[0].args[0], {"g": every}), every.shape)
        if fmt.groups % count or (at != every // (fmt.groups // count)).any():
            raise bad(f"does not share the elements of {floats[0]} evenly among groups")
    lo, hi, integer = 0, 0, None
    if integers:
        leaf = integers[0]
        at = np.broadcast_to(evaluate(leaf.args[-1], {"g": every}), every.shape)
        if (at != every).any():
            raise bad(f"reads {leaf}, which is not an integer of the group alone")
        integer = leaf.attr if leaf.op == "named" else leaf.attr.name
        lo, hi = interval(leaf)
        if hi - lo > 65535:
            raise bad(f"reads {leaf}, an integer of more than 16 bits")
    stand_in = var("leaf", hi - lo + 1) + lo

    def values(x: float) -> Array:
        swap = {e: const(x, F32) if e.dtype is F32 else cast(e.dtype, stand_in) for e in leaves}
        plain = substitute(expr, swap)
        given = np.arange(hi - lo + 1)
        rows = [evaluate(plain, {"leaf": given, "g": g}) for g in range(fmt.groups)]
        if any((row != rows[0]).any() for row in rows):
            raise bad("depends on the group in other ways than through fields")
        return np.broadcast_to(rows[0], given.shape).astype(np.float64)

    table = values(1.0)
    if floats and not all(np.allclose(values(x), x * table, rtol=1e-6) for x in (0.0, -3.0)):
        raise bad(f"is not proportional to {floats[0]}")
    field = floats[0].attr.name if floats else None
    return Factor(field, count, integer, Levels(table, np.arange(lo, hi + 1)), table)


def _leaves(expr: Expr) -> list[Expr]:
    """The loads and named integers of an expression, without what named integers are made of."""
    if expr.op in ("load", "named"):
        return [expr]
    found = [leaf for arg in expr.args for leaf in _leaves(arg)]
    return list(dict.fromkeys(found))


@functools.lru_cache(maxsize=256)
def plan_of(fmt: BlockFormat) -> Plan:
    g = var("g", fmt.groups)
    scale = _factor(fmt, fmt.scale_expr(g), "scale")
    offset = None if fmt.offset is None else _factor(fmt, fmt.offset_expr(g), "offset")
    levels, stored = _codes(fmt)
    return Plan(Levels(levels, stored), scale, offset)


def _codes(fmt: BlockFormat) -> tuple[Array, Array]:
    table = code_table(fmt)
    width = bit_positions(fmt)[CODE].width
    if table is not None:
        stored = np.arange(1 << width)
        return np.array(table, np.float64)[: 1 << width] - fmt.bias, stored
    lo = 0
    if fmt.code_range[0] < 0:
        lo = -(1 << width - 1)
    stored = np.arange(lo, lo + (1 << width))
    if lo == -128:
        stored = stored[1:]
    return stored - float(fmt.bias), stored


def _dot(a: Array, b: Array) -> Array:
    return np.einsum("ij,ij->j", a, b)


def _inverse(s: Array) -> Array:
    with np.errstate(all="ignore"):
        inv = 1 / s
    return np.where(np.isfinite(inv), inv, 0).astype(np.float32)


@dataclass
class Sums:
    ll: Array
    l: Array
    w: Array
    xl: Array
    x: Array


class Groups:
    """Elements, float32 (group, n) and their weights."""

    def __init__(self, x, w):
        self.x, self.w = x, w
        self.xw = x if w is None else x * w
        self.sx = self.xw.sum(0)
        self.sw = np.float32(len(x)) if w is None else w.sum(0)

    def sums(self, l):
        lw = l if self.w is None else l * self.w
        return Sums(_dot(lw, l).astype(float), lw.sum(0).astype(float), self.sw*1.0, _dot(self.xw, l).astype(float), self.sx.astype(float))

    def codes(self, levels, s, o=None):
        inv = _inverse(s)
        y = self.x * inv
        if o is not None:
            y -= (o * inv)
        return levels.nearest(y)

    def error(self, l, s, o=None):
        r = l * s
        r -= self.x
        if o is not None:
            r += o
        return _dot(r, r if self.w is None else r * self.w)


def div(a, b):
    with np.errstate(all='ignore'):
        q = a / b
    return np.where(np.isfinite(q), q, 0)


def fit_scale(G, L, outside=OUTSIDE, lloyd=1):
    hi, lo = G.x.max(0), G.x.min(0)
    best = np.full(hi.shape, -1.0)
    scale = np.zeros(hi.shape)
    steps = len(L.values)
    # the step at the ends
    signs = (1,) if L.low == -L.high else (1, -1)
    for sign in signs:
        top, bottom = (hi, lo) if sign > 0 else (-lo, -hi)
        s0 = np.maximum(top / L.high if L.high > 0 else 0, bottom / L.low if L.low < 0 else 0)
        for d in outside:
            s = s0 * (sign / (1 + d * 2 / steps))
            for _ in range(1 + lloyd):
                l = G.codes(L, s.astype(np.float32))
                S = G.sums(l)
                s = div(S.xl, S.ll)
            gain = S.xl * s
            better = gain > best
            best = np.where(better, gain, best)
            scale = np.where(better, s, scale)
    return scale

def solve(S):
    det = S.ll * S.w - S.l * S.l
    ok = det > 1e-6 * S.ll * S.w
    s = np.where(ok, div(S.xl * S.w - S.x * S.l, det), 0)
    o = div(S.x - s * S.l, S.w)
    return s, o

def fit_affine(G, L, outside=OUTSIDE, lloyd=1):
    hi, lo = G.x.max(0), G.x.min(0)
    best = np.full(hi.shape, -1.0)
    scale = np.zeros(hi.shape); offset = np.zeros(hi.shape)
    steps = len(L.values)
    for d in outside:
        s = (hi - lo) / (L.high - L.low) / (1 + d * 2 / steps)
        o = (hi + lo) / 2 - s * (L.high + L.low) / 2
        for _ in range(1 + lloyd):
            l = G.codes(L, s.astype(np.float32), o.astype(np.float32))
            S = G.sums(l)
            s, o = solve(S)
        gain = S.xl * s + S.x * o
        better = gain > best
        best = np.where(better, gain, best)
        scale = np.where(better, s, scale)
        offset = np.where(better, o, offset)
    return scale, offset

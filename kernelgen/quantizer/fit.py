"""The search for scales, offsets and codes of least squared error."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from kernelgen.ir.block import BlockFormat
from kernelgen.ir.encode import encode
from kernelgen.ir.evaluate import NUMPY_STORAGE
from kernelgen.quantizer.levels import Levels, ratio
from kernelgen.quantizer.plan import Factor, Plan

Array = npt.NDArray[Any]

#: first scales with an offset: the smallest and the largest element independently lie so many
#: steps beyond the last code
MARGINS_BOTH_ENDS = (-0.25, 0.25, 0.75)


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
        inverse = ratio(np.float32(1), s)
        y = self.x * inverse
        if o is not None:
            y -= o * inverse
        return self.levels.nearest(y, self.weights)

    def sums(self, codes: Array) -> tuple[Array, Array, Array]:
        """Weighted sums over each group: of codes, their squares, and their products with x."""
        weighted = self._weigh(codes)
        squares, products = (np.einsum("ij,ij->j", codes, a) for a in (weighted, self.weighted))
        return weighted.sum(axis=0), squares, products

    def solve(self, codes: Array) -> tuple[Array, Array | None, Array]:
        """Scale and offset of least squared error for given codes, and how much it is less."""
        c, cc, xc = self.sums(codes)
        if not self.offsets:
            s = ratio(xc, cc)
            return s, None, s * xc
        det = cc * self.sum_w - c * c
        det[det < 1e-6 * cc * self.sum_w] = 0  # codes are equal: the offset alone matters
        s = ratio(xc * self.sum_w - self.sum_x * c, det)
        o = ratio(self.sum_x - s * c, self.sum_w)
        return s, o, s * xc + o * self.sum_x

    def error(self, codes: Array, s: Array, o: Array | None) -> Array:
        """Weighted squared error of each group."""
        r = codes * s
        r -= self.x
        if o is not None:
            r += o
        return np.asarray(np.einsum("ij,ij->j", r, self._weigh(r)))

    def best(self, signs: tuple[int, ...]) -> tuple[Array, Array]:
        """Scale and offset (0 if there is none) of each group, before any rounding."""
        scale, offset, most = (np.zeros_like(self.mid) for _ in range(3))
        for s, o in self._both_ends() if self.offsets else self._far_end(signs):
            for _ in range(self.levels.refinements):
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
            for margin in self.levels.margins:
                yield reach * (sign / (1 + 2 * margin / (self.levels.last + 2))), None
            for end in self.levels.ends:
                yield np.maximum(high, -low) * np.float32(sign / end), None

    def _both_ends(self) -> Iterator[tuple[Array, Array | None]]:
        """Scales and offsets that bring both ends of a group to margins beyond the levels."""
        step = self.levels.span / max(self.levels.last, 1)
        for below, above in itertools.product(MARGINS_BOTH_ENDS, repeat=2):
            s = (self.high - self.low) / (self.levels.span + (below + above) * step)
            yield s, self.low - s * (self.levels.low - below * step)


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
        y = ratio(wanted.reshape(len(self.floats), -1), self.floats)
        self.at = self.levels.position(y)

    def values(self) -> Array:
        """The factor of each group, float32 (groups,)."""
        return (self.floats * self.levels.values[self.at]).ravel().astype(np.float32)


def fitted(fmt: BlockFormat, plan: Plan, weights: Array | None, rows: Array) -> Array:
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
    for _ in range(plan.codes.rounds):
        _set_floats(elements, codes, scale, offset)
        codes = _settle(elements, scale, offset)

    stored = plan.codes.bits(codes).T.reshape(-1, fmt.block)
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
    chosen = None
    for move in (0, -1, 1) if scale.integer else (0,):
        scale.at = np.clip(start + move, 0, scale.levels.last)
        s, o = present()
        if offset is not None and offset.integer:
            c, _, _ = elements.sums(elements.codes(s, o))
            offset.set_integers(ratio(elements.sum_x - s * c, elements.sum_w) + elements.mid)
            s, o = present()
        codes = elements.codes(s, o)
        error = elements.error(codes, s, o)
        if chosen is None:
            chosen = codes
        np.copyto(chosen, codes, where=error < least)
        better = (error < least).reshape(start.shape)
        best = [np.where(better, part.at, old) for part, old in zip(parts, best, strict=True)]
        least = np.fmin(least, error)
    for part, at in zip(parts, best, strict=True):
        part.at = at
    assert chosen is not None
    return chosen


def _set_floats(elements: Elements, codes: Array, scale: Stored, offset: Stored | None) -> None:
    """Store the floats of least squared error for given codes and integers."""

    def total(a: Array) -> Array:
        return np.asarray(a.reshape(len(scale.floats), -1).sum(axis=1, keepdims=True))

    # x = d * (m * code) + q * k, with m and k known for each group, d and q wanted for each unit
    m, mid = scale.levels.values[scale.at].ravel(), elements.mid.astype(np.float64)
    c, cc, xc = elements.sums(codes)
    dd, dx = total(m * m * cc), total(m * (xc + mid * c))
    if offset is None:
        scale.set_floats(ratio(dx, dd))
        return
    k = offset.levels.values[offset.at].ravel()
    dq, qq = total(m * k * c), total(k * k * elements.sum_w)
    qx = total(k * (elements.sum_x + mid * elements.sum_w))
    det = dd * qq - dq * dq
    solvable = (det > 1e-9 * dd * qq) & (offset.field is not None)
    alone = ratio(dx - offset.floats * dq, dd)
    scale.set_floats(np.where(solvable, ratio(dx * qq - qx * dq, det), alone))
    offset.set_floats(ratio(qx - scale.floats * dq, qq))

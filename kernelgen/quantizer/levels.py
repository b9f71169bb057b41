"""Numbers that a format can express, and which of them comes nearest."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

#: cells of the table that finds the nearest of unevenly spaced levels
CELLS = 1 << 12


class Levels:
    """Numbers that a format can express, ascending, and the integer that stands for each.

    margins      first scales: the element furthest out lies so many steps beyond the last level
    ends         first scales besides: those that bring it to one of these levels
    refinements  how often codes are chosen, and the scale solved for, from each first scale
    rounds       how often stored floats are solved for again
    """

    margins: tuple[float, ...] = (-0.5, 0.0, 0.5, 1.0, 1.5, 2.0)
    ends: tuple[float, ...] = ()
    refinements = 2
    rounds = 2

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

    @property
    def free(self) -> bool:
        """Whether each element may have any level, whatever the others have."""
        return True

    def position(self, y: Array) -> Array:
        """Index of the level nearest to each y."""
        if self.even:
            return np.clip(np.rint(y - self.low), 0, self.last).astype(np.intp)
        return np.searchsorted(self.middles, y)

    def bits(self, codes: Array) -> Array:
        """The integers that stand for levels."""
        return self.stored[self.position(codes)]

    def nearest(self, y: Array, weights: Array | None = None) -> Array:
        """The level nearest to each y, float32; overwrites y.

        `weights` say how much each counts, which matters where levels are chosen together.

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


def ratio(a: Array | np.float32, b: Array) -> Array:
    """a / b, and 0 where that is not finite."""
    quotient = np.asarray(np.divide(a, b))
    quotient[~np.isfinite(quotient)] = 0
    return quotient

"""Codes that are chosen together: rows of a grid, with signs of their own or of an even number."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from kernelgen.errors import FormatError
from kernelgen.ir.block import BlockFormat
from kernelgen.ir.cells import Cells, Part
from kernelgen.quantizer.levels import Levels

Array = npt.NDArray[Any]

#: numbers that the comparison of cells with all rows makes at once
_AT_ONCE = 1 << 20


class Grid(Levels):
    """The codes of a format whose cells have rows to choose from; levels are those of any element.

    What is nearest has the least weighted squared error of all that the format can say, cell by
    cell; where cells share a bit (their mode), of those that agree in it.  Comparing a cell with
    all rows takes long, so fewer scales are tried than with levels that are free, and cells for
    which a row has the nearest level to each element need no comparison.
    """

    margins = (-0.25, 0.5, 1.25)
    refinements = 1
    rounds = 1

    def __init__(self, fmt: BlockFormat, parts: tuple[Part, ...]) -> None:
        """`parts`: of `kernelgen.ir.cells.parts_of`."""
        kinds, *signs = (part.cells for part in parts)
        if any(len(one) != 1 for one in (kinds, *signs)):
            raise _unknown(fmt)
        (cells,) = kinds
        self._signed = bool(signs)
        self._cell = cells.elements.shape[1]
        self._even = _even(fmt, signs[0]) if self._signed else 0
        self._bias = 0 if self._signed else fmt.bias
        modes = [rows - self._bias for rows in cells.rows]
        self._modes = [_lists(rows) for rows in modes]
        both = [np.concatenate([-rows, rows]) if self._signed else rows for rows in modes]
        values = np.unique(np.concatenate(both)).astype(np.float64)
        super().__init__(values, values)
        if self._signed:  # a row of equal codes is one of the smallest
            self.ends = (float(values[values > 0][0]),)
        runs = np.arange(fmt.block).reshape(-1, self._cell)
        if fmt.bias != self._bias or not np.array_equal(cells.elements, runs):
            raise _unknown(fmt)
        if self._even and (len(self._modes) > 1 or self._even % self._cell):
            raise _unknown(fmt)

    @property
    def free(self) -> bool:
        """See `Levels.free`: where a cell is one element, whose sign is its own."""
        return self._cell == 1 and not self._even and len(self._modes) == 1

    def bits(self, codes: Array) -> Array:
        """The codes themselves, which cells are found by."""
        return np.rint(codes).astype(np.int64) + self._bias

    def nearest(self, y: Array, weights: Array | None = None) -> Array:
        """The codes of a group that come nearest to y, float32 (group, groups)."""
        group, count = y.shape
        flat = np.ascontiguousarray(y.T)
        w = None if weights is None else np.ascontiguousarray(weights.T)
        best, least = self._of_mode(flat, w, self._modes[0]), None
        for lists in self._modes[1:]:
            other = self._of_mode(flat, w, lists)
            least = _error(flat, best, w) if least is None else least
            error = _error(flat, other, w)
            np.copyto(best, other, where=(error < least)[:, None])
            least = np.minimum(error, least)
        return np.ascontiguousarray(best.reshape(count, group).T)

    def _of_mode(self, y: Array, weights: Array | None, lists: list[Rows]) -> Array:
        cells = y.reshape(-1, self._cell)
        w = None if weights is None else weights.reshape(cells.shape)
        if self._signed:
            return self._with_signs(cells, w, lists[0]).reshape(y.shape)
        index, least = lists[0].nearest(cells, w)
        best = lists[0].rows[index]
        for rows in lists[1:]:
            index, cost = rows.nearest(cells, w)
            np.copyto(best, rows.rows[index], where=(cost < least)[:, None])
            least = np.minimum(cost, least)
        return best.reshape(y.shape)

    def _with_signs(self, cells: Array, w: Array | None, rows: Rows) -> Array:
        sizes, signs = np.abs(cells), np.where(cells < 0, np.float32(-1), np.float32(1))
        index, cost = rows.nearest(sizes, w)
        if self._even:
            self._flip(sizes, signs, w, rows, index, cost)
        return rows.rows[index] * signs

    def _flip(
        self, sizes: Array, signs: Array, w: Array | None, rows: Rows, index: Array, cost: Array
    ) -> None:
        """Change one sign, where the number of minus signs is odd, and the row with it, where that
        costs least."""
        together = self._even // self._cell  # cells whose signs are counted together
        odd = (signs < 0).reshape(-1, self._even).sum(axis=1) % 2 == 1
        cells = np.flatnonzero(np.repeat(odd, together))
        if len(cells) == 0:
            return
        size = sizes[cells]
        weight = None if w is None else w[cells]
        other, flipped = rows.nearest(size, weight, flipped=True)
        chosen = (flipped - cost[cells]).reshape(-1, together).argmin(axis=1)
        chosen += together * np.arange(len(chosen))
        at = cells[chosen]
        index[at] = other[chosen]
        loss = size[chosen] * rows.rows[index[at]]
        if weight is not None:
            loss *= weight[chosen]
        signs[at, loss.argmin(axis=1)] *= -1


class Rows:
    """Rows of one list, (R, n), and which of them comes nearest to a cell."""

    def __init__(self, rows: Array) -> None:
        """`rows`: integers."""
        self.rows = np.unique(rows, axis=0).astype(np.float32)
        self._levels = np.unique(self.rows)
        self._middles = (self._levels[1:] + self._levels[:-1]) / 2
        self._weights = len(self._levels) ** np.arange(rows.shape[1])
        # the row with given levels, by their numbers; -1: there is none
        self._of_levels = np.full(len(self._levels) ** rows.shape[1], -1, np.int32)
        digits = np.searchsorted(self._levels, self.rows)
        self._of_levels[digits @ self._weights] = np.arange(len(self.rows))
        self._doubled, self._squares = 2 * self.rows.T, self.rows.T**2
        self._augmented = np.concatenate([self._doubled, -self._squares.sum(axis=0)[None]])

    def nearest(
        self, x: Array, w: Array | None, flipped: bool = False
    ) -> tuple[npt.NDArray[np.intp], Array]:
        """The row of least weighted squared error for each cell (cells, n), and that error.

        `flipped`: after the sign of one element is changed, the one that costs least; x is not
        negative.
        """
        digits = np.searchsorted(self._middles, x)
        if flipped:
            levels = self._levels[digits]
            off, low = x - levels, x + self._levels[0]
            cost = low * low - off * off
            cost = cost if w is None else cost * w
            k, each = cost.argmin(axis=1), np.arange(len(x))
            digits[each, k] = 0
            x_signed = x.copy()
            x_signed[each, k] *= -1
        index = self._of_levels[digits @ self._weights].astype(np.intp)
        rest = np.flatnonzero(index < 0)
        some = None if w is None else w[rest]
        index[rest] = self._search(x[rest], some, flipped)
        off = x - self.rows[index]
        if flipped:
            loss = x * self.rows[index]
            loss = loss if w is None else loss * w
            off = np.square(off) if w is None else np.square(off) * w
            return index, off.sum(axis=1) + 4 * loss.min(axis=1)
        return index, np.einsum("ij,ij->i", off, off if w is None else off * w)

    def _search(self, x: Array, w: Array | None, flipped: bool) -> npt.NDArray[np.intp]:
        """The same, by trying all rows."""
        index = np.empty(len(x), np.intp)
        step = max(1, _AT_ONCE // len(self.rows))
        for start in range(0, len(x), step):
            part = slice(start, start + step)
            weighted = x[part] if w is None else x[part] * w[part]
            if w is None:
                one = np.ones((len(weighted), 1), np.float32)
                gain = np.concatenate([weighted, one], axis=1) @ self._augmented
            else:
                gain = weighted @ self._doubled
                gain -= w[part] @ self._squares
            if flipped:
                gain -= 4 * self._least_product(weighted)
            index[part] = gain.argmax(axis=1)
        return index

    def _least_product(self, weighted: Array) -> Array:
        """The smallest of weighted[k] * row[k], for each cell and row."""
        least = weighted[:, :1] * self.rows[:, 0]
        other = np.empty_like(least)
        for k in range(1, self.rows.shape[1]):
            np.multiply(weighted[:, k : k + 1], self.rows[:, k], out=other)
            np.minimum(least, other, out=least)
        return least


def _lists(rows: Array) -> list[Rows]:
    """Rows by the value of bits (2**width, n), in as many lists as there are shifts: bits that add
    the same to all rows."""
    numbers = np.arange(len(rows))
    for bit in range(len(rows).bit_length() - 1):
        without = numbers[numbers >> bit & 1 == 0]
        added = rows[without | 1 << bit] - rows[without]
        if added.any() and (added == added[0]).all():
            return [*_lists(rows[without]), *_lists(rows[without | 1 << bit])]
    return [Rows(rows)]


def _even(fmt: BlockFormat, kinds: tuple[Cells, ...]) -> int:
    """How many elements have an even number of signs together; 0 where each is free."""
    (cells,) = kinds
    n = int(cells.elements.shape[1])
    if n == 1:
        return 0
    rows = cells.rows[0]
    if len(cells.rows) == 1 and len(rows) == 1 << (n - 1) and not (rows.sum(axis=1) % 2).any():
        return n
    raise FormatError(
        f"format {fmt.name} has no quantizer, because the signs of its codes are bound to others"
        " in another way than by their number being even"
    )


def _error(y: Array, codes: Array, weights: Array | None) -> Array:
    """Weighted squared error of each group."""
    off = y - codes
    return np.asarray(np.einsum("ij,ij->i", off, off if weights is None else off * weights))


def _unknown(fmt: BlockFormat) -> FormatError:
    return FormatError(
        f"format {fmt.name} has no quantizer, because the codes that share bits do not follow one"
        " another in runs of equal length, or are signed and have a bias"
    )

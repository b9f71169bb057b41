"""Where the bytes of a matrix of blocks lie.

A layout is not a format: it is an order of axes.  The native layout of ggml keeps every block in
one piece, row after row; others are permutations of the same bytes.  One description gives both
the repacking (numpy's transpose) and the strides that loads use.

Axes: `tile` and `lane` (row = tile * lanes + lane), `block` within the row, `field` within the
block, `unit` within the field, `byte` within the unit.  A unit is what one load of one row takes:
four bytes where the field has whole 32-bit words, else one element.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kernelgen.errors import ShapeError
from kernelgen.ir.block import BlockFormat
from kernelgen.ir.expr import I32, Expr, Field, cast, transform, word

Array = npt.NDArray[Any]

AXES = ("tile", "lane", "block", "field", "unit", "byte")


def unit_bytes(one: Field) -> int:
    """Bytes of a unit of this field."""
    return 4 if one.nbytes % 4 == 0 else one.storage.nbytes


@dataclass(frozen=True)
class Layout:
    """An order of the axes, outermost first, for tiles of `lanes` rows."""

    name: str
    order: tuple[str, ...]
    lanes: int = 1

    def rows(self, n: int) -> int:
        """Rows stored for n rows: whole tiles."""
        return -(-n // self.lanes) * self.lanes

    def _extents(self, one: Field, n: int, blocks: int) -> dict[str, int]:
        unit = unit_bytes(one)
        return {
            "tile": self.rows(n) // self.lanes, "lane": self.lanes, "block": blocks,
            "unit": one.nbytes // unit, "byte": unit,
        }  # fmt: skip

    def strides(self, fmt: BlockFormat, one: Field, n: int, k: int) -> dict[str, int]:
        """Bytes from one index of an axis to the next, and under "field" where the field starts."""
        extents = self._extents(one, n, k // fmt.block)
        at = self.order.index("field")
        inside = [a for a in self.order[at + 1 :] if a not in ("unit", "byte")]
        copies = 1  # how often each field is repeated before the next field begins
        for axis in inside:
            copies *= extents[axis]
        result = {"field": one.offset * copies}
        stride = 1
        for axis in reversed(self.order[at + 1 :]):
            result[axis] = stride
            stride *= extents[axis]
        stride = fmt.nbytes * copies
        for axis in reversed(self.order[:at]):
            result[axis] = stride
            stride *= extents[axis]
        return result

    def _view(self, packed: Array, fmt: BlockFormat, one: Field, n: int, k: int) -> Array:
        """The field's bytes inside `packed`, as an array with axes tile, lane, block, unit, byte."""
        extents = self._extents(one, n, k // fmt.block)
        strides = self.strides(fmt, one, n, k)
        axes = [a for a in AXES if a != "field"]
        return np.lib.stride_tricks.as_strided(
            packed[strides["field"] :], [extents[a] for a in axes], [strides[a] for a in axes]
        )

    def pack(self, data: Array, fmt: BlockFormat, k: int) -> Array:
        """Repack native rows, uint8 (N, row_bytes); the last tile is filled up with zero bytes.

        Returns uint8 (rows(N) * row_bytes,).
        """
        n = data.shape[0]
        if data.dtype != np.uint8 or data.shape != (n, fmt.row_bytes(k)):
            raise ShapeError(
                f"rows of {k} {fmt.name} elements are uint8 (N, {fmt.row_bytes(k)}), not"
                f" {data.dtype} {data.shape}"
            )
        packed = np.zeros(self.rows(n) * fmt.row_bytes(k), np.uint8)
        blocks = data.reshape(n, k // fmt.block, fmt.nbytes)
        whole = n // self.lanes
        for one in fmt.layout_fields:
            target = self._view(packed, fmt, one, n, k)
            units = blocks[..., one.offset : one.offset + one.nbytes]
            shape = (-1, self.lanes, *target.shape[2:])
            target[:whole] = units[: whole * self.lanes].reshape(shape)
            if n % self.lanes:
                tail = units[whole * self.lanes :]
                target[whole, : len(tail)] = tail.reshape(len(tail), *target.shape[2:])
        return packed

    def unpack(self, packed: Array, fmt: BlockFormat, n: int, k: int) -> Array:
        """The inverse of `pack`: uint8 (N, row_bytes)."""
        blocks = np.empty((n, k // fmt.block, fmt.nbytes), np.uint8)
        for one in fmt.layout_fields:
            source = self._view(packed, fmt, one, n, k)
            flat = source.reshape(self.rows(n), k // fmt.block, one.nbytes)
            blocks[..., one.offset : one.offset + one.nbytes] = flat[:n]
        return blocks.reshape(n, -1)


#: ggml's order: every block in one piece
NATIVE = Layout("native", AXES)


def interleaved(lanes: int) -> Layout:
    """`lanes` rows side by side: one vector load takes the same unit of all of them."""
    return Layout("interleaved", ("tile", "block", "field", "unit", "lane", "byte"), lanes)


def lower_to_words(expr: Expr) -> Expr:
    """Loads of single bytes replaced by a word load and the byte's extraction, for layouts in
    which a unit is a word."""

    def change(node: Expr) -> Expr | None:
        if node.op != "load" or unit_bytes(node.attr) != 4 or node.attr.storage.nbytes == 4:
            return None
        one: Field = node.attr
        width = 8 * one.storage.nbytes
        per_word = 4 // one.storage.nbytes
        index = node.args[0]
        unit = word(one, index // per_word)
        lowest = index % per_word * width
        if one.storage.lo < 0:  # shift the element to the top, then back with its sign
            return (cast(I32, unit << (32 - width - lowest))) >> (32 - width)
        if one.storage.name == "f16":
            return None
        return cast(I32, (unit >> lowest) & ((1 << width) - 1))

    return transform(expr, change)

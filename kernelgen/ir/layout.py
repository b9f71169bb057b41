"""Where the bytes of a matrix of blocks lie.

A layout is not a format: it is an order of axes.  The native layout of ggml keeps every block in
one piece, row after row; others are permutations of the same bytes.  One description gives both
the repacking (numpy's transpose) and the strides that loads use.

Axes: `tile` and `lane` (row = tile * lanes + lane), `block` within the row, `field` within the
block, `unit` within the field, `byte` within the unit.  A unit is what one load of one row takes:
four bytes where the field has whole 32-bit words, else one element.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kernelgen.errors import ShapeError
from kernelgen.ir.block import BlockFormat
from kernelgen.ir.expr import (
    I32,
    STORAGES,
    U32,
    Expr,
    Field,
    cast,
    const,
    fetch,
    transform,
    var,
    word,
)
from kernelgen.ir.ranges import divisor
from kernelgen.ir.rules import simplify

Array = npt.NDArray[Any]

#: a number, or an expression of one
Size = Any

AXES = ("tile", "lane", "block", "field", "unit", "byte")


def unit_bytes(one: Field) -> int:
    """Bytes of a unit of this field."""
    # floats are not cut out of words
    whole_words = one.nbytes % 4 == 0 and one.storage.dtype.is_int
    return 4 if whole_words else one.storage.nbytes


@dataclass(frozen=True)
class Layout:
    """An order of the axes, outermost first, for tiles of `lanes` rows."""

    name: str
    order: tuple[str, ...]
    lanes: int = 1

    def rows(self, n: int) -> int:
        """Rows stored for n rows: whole tiles."""
        return -(-n // self.lanes) * self.lanes

    def _extents(self, one: Field, n: Size, blocks: Size) -> dict[str, Size]:
        unit = unit_bytes(one)
        tiles = (n + (self.lanes - 1)) // self.lanes if self.lanes > 1 else n
        return {
            "tile": tiles, "lane": self.lanes, "block": blocks,
            "unit": one.nbytes // unit, "byte": unit,
        }  # fmt: skip

    def field_start(self, fmt: BlockFormat, one: Field) -> int:
        """Bytes of a block that come before the field."""
        if self.order.index("field") > self.order.index("block"):
            return one.offset
        # planes: those of many bytes that powers of two divide first, so that every plane begins
        # where its blocks are aligned, up to the 16 bytes that the widest load takes
        order = sorted(fmt.layout_fields, key=lambda f: (-math.gcd(f.nbytes, 16), f.offset))
        return sum(f.nbytes for f in order[: order.index(one)])

    def strides(self, fmt: BlockFormat, one: Field, n: Size, blocks: Size) -> dict[str, Size]:
        """Bytes from one index of an axis to the next, and under "field" where the field starts.

        `n` rows of `blocks` blocks; either numbers or expressions.
        """
        extents = self._extents(one, n, blocks)
        at = self.order.index("field")
        copies: Size = 1  # how often each field is repeated before the next field begins
        for axis in self.order[at + 1 :]:
            if axis not in ("unit", "byte"):
                copies = copies * extents[axis]
        result: dict[str, Size] = {"field": copies * self.field_start(fmt, one)}
        stride: Size = 1
        for axis in reversed(self.order[at + 1 :]):
            result[axis] = stride
            stride = extents[axis] * stride
        stride = copies * fmt.nbytes
        for axis in reversed(self.order[:at]):
            result[axis] = stride
            stride = extents[axis] * stride
        return result

    def _view(self, packed: Array, fmt: BlockFormat, one: Field, n: int, k: int) -> Array:
        """The field's bytes inside `packed`, with axes tile, lane, block, unit, byte."""
        extents = self._extents(one, n, k // fmt.block)
        strides = self.strides(fmt, one, n, k // fmt.block)
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


def interleaved(lanes: int, name: str = "interleaved") -> Layout:
    """`lanes` rows side by side: one vector load takes the same unit of all of them."""
    return Layout(name, ("tile", "block", "field", "unit", "lane", "byte"), lanes)


#: each field of all blocks together, so that neighbouring threads load neighbouring words
PLANES = Layout("planes", ("field", "tile", "lane", "block", "unit", "byte"))

#: eight rows side by side: what eight threads with a row each load together is in one piece
ROWS8 = interleaved(8, "rows8")

_NAMED = {one.name: one for one in (NATIVE, PLANES, ROWS8)}


def named_layout(name: str, lanes: int = 1) -> Layout:
    """The layout of that name."""
    return _NAMED.get(name) or interleaved(lanes)


@dataclass(frozen=True)
class Place:
    """Where a field of one block of one row begins, and how its elements follow.

    start    u32 expression of the byte address, in the variables `row`, `block`, `N`, `blocks`
    at       the variable that a walk gives this value
    unit     bytes from one unit to the next
    align    divides every address of a unit
    """

    field: Field
    start: Expr
    at: Expr
    unit: int
    align: int


def places(layout: Layout, fmt: BlockFormat) -> dict[str, Place]:
    """The `Place` of every field, by its name."""
    size = 1 << 31
    row, block, n, blocks = (var(v, size, U32) for v in ("row", "block", "N", "blocks"))
    result = {}
    for one in fmt.layout_fields:
        strides = layout.strides(fmt, one, n, blocks)
        lane = row % layout.lanes if layout.lanes > 1 else const(0, U32)
        tile = row // layout.lanes if layout.lanes > 1 else row
        parts = [tile * strides["tile"], lane * strides["lane"], block * strides["block"]]
        start = strides["field"] + (parts[0] + parts[1] + parts[2])
        start = start if isinstance(start, Expr) else const(start, U32)
        unit = int(strides["unit"])
        align = math.gcd(divisor(start), unit, 4)
        at = var(f"{one.name}_at", size, U32)
        result[one.name] = Place(one, simplify(start), at, unit, align)
    return result


def lower_to_memory(expr: Expr, where_: dict[str, Place]) -> Expr:
    """Loads and words replaced by fetches from addresses."""

    def change(node: Expr) -> Expr | None:
        if node.op not in ("load", "word"):
            return None
        place = where_[node.attr.name]
        storage = STORAGES["u32"] if node.op == "word" else node.attr.storage
        index = cast(U32, node.args[0])
        if node.op == "load" and unit_bytes(node.attr) != storage.nbytes:
            # several elements to a unit: element index*nbytes bytes from the start of the unit
            per_unit = unit_bytes(node.attr) // storage.nbytes
            address = place.at + index // per_unit * place.unit + index % per_unit * storage.nbytes
            return fetch(storage, math.gcd(place.align, storage.nbytes), simplify(address))
        return fetch(storage, place.align, simplify(place.at + index * place.unit))

    return transform(expr, change)


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
        return cast(I32, (unit >> lowest) & ((1 << width) - 1))

    return transform(expr, change)

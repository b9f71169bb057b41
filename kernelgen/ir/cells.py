"""Codes that share bits: which belong together, and what their bits can say.

A cell is a few elements of a block whose codes the same bits decide: five ternary digits of a byte,
a row of a grid.  Setting bits of random blocks and decoding tells which bits change which codes;
trying all that the bits of a cell can be gives its rows, the codes that it can have.  Signs are
found apart from magnitudes where a code is a magnitude or its negative.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kernelgen.errors import FormatError
from kernelgen.ir.block import BlockFormat
from kernelgen.ir.evaluate import evaluate
from kernelgen.ir.expr import I32, Expr, cast, const, var, where

Array = npt.NDArray[Any]

#: random blocks in which every bit is set and cleared, to see which codes depend on it
_TRIED = 12
#: bits of the largest cell that is tried out
_MOST_BITS = 14


@dataclass(frozen=True)
class Bits:
    """Where the bits of one quantity lie: `position[j, k]` is the bit of the block (byte*8 + bit)
    that holds bit k of element j; `width` bits each."""

    position: npt.NDArray[np.int64]

    @property
    def width(self) -> int:
        """Bits of an element."""
        return int(self.position.shape[1])


@dataclass(frozen=True)
class Cells:
    """Cells that are alike.

    elements   (cells, n): their elements
    bits       of each cell
    rows       (modes, 2**width, n): the codes that bits say, by their value
    mode       the bit that several cells share, of each; None where there is one mode
    """

    elements: npt.NDArray[np.int64]
    bits: Bits
    rows: Array
    mode: npt.NDArray[np.int64] | None

    @property
    def separable(self) -> bool:
        """Whether each element may have any of its values, whatever the others have."""
        values = [len(np.unique(column)) for column in self.rows[0].T]
        return len(np.unique(self.rows[0], axis=0)) == int(np.prod(values))

    def stored(self, codes: Array) -> Iterator[tuple[Array, Bits]]:
        """Integers and where their bits go, for codes (blocks, block); -1 for codes that the cells
        cannot have."""
        wanted = codes[:, self.elements]  # (blocks, cells, n)
        found = [_find(rows, wanted) for rows in self.rows]
        if self.mode is None:
            (index,) = found
        else:
            shared, which = np.unique(self.mode, return_inverse=True)
            # a mode serves where it has the codes of all cells that share its bit
            missing = np.stack([index < 0 for index in found])  # (modes, blocks, cells)
            lacks = [missing[..., which == n].any(axis=-1) for n in range(len(shared))]
            chosen = np.stack(lacks, axis=-1).argmin(axis=0)  # (blocks, modes' bits)
            yield chosen, Bits(shared[:, None])
            index = np.take_along_axis(np.stack(found), chosen[None][..., which], axis=0)[0]
        yield index, self.bits


def _find(rows: Array, wanted: Array) -> Array:
    """The first of `rows`, (R, n), that each of `wanted`, (..., n), is; -1 where none is."""
    low = int(rows.min())
    base = int(rows.max()) - low + 1
    weights = base ** np.arange(rows.shape[1], dtype=np.int64)
    keys, first = np.unique((rows - low) @ weights, return_index=True)
    inside = ((wanted >= low) & (wanted < low + base)).all(axis=-1)
    key = np.where(inside, (wanted.astype(np.int64) - low) @ weights, -1)
    at = np.minimum(np.searchsorted(keys, key), len(keys) - 1)
    return np.where(keys[at] == key, first[at], -1)


@dataclass(frozen=True)
class Part:
    """What codes are made of: themselves, their magnitudes, or their signs (1: negative)."""

    kind: str
    cells: tuple[Cells, ...]

    def stored(self, codes: Array) -> Iterator[tuple[Array, Bits]]:
        """See `Cells.stored`."""
        codes = codes.astype(np.int64)
        seen = {"code": codes, "magnitude": abs(codes), "sign": (codes < 0).astype(np.int64)}
        for one in self.cells:
            yield from one.stored(seen[self.kind])


@functools.lru_cache(maxsize=64)
def parts_of(fmt: BlockFormat) -> tuple[Part, ...]:
    """What the codes of a format are made of."""
    code = fmt.code_expr(var("i", fmt.block))
    if code.op == "select":
        condition, a, b = code.args
        for yes, no, bits in ((a, b, (1, 0)), (b, a, (0, 1))):
            if yes.op == "-" and yes.args[0].op == "const" and yes.args[1] is no:
                sign = where(condition, const(bits[0], I32), const(bits[1], I32))
                return (
                    Part("magnitude", _cells(fmt, cast(I32, no))),
                    Part("sign", _cells(fmt, sign)),
                )
    return (Part("code", _cells(fmt, cast(I32, code))),)


def _cells(fmt: BlockFormat, expr: Expr) -> tuple[Cells, ...]:
    bits, touched = _influence(fmt, expr)  # (bits,), (bits, elements)
    modes = np.zeros(len(bits), bool)
    found = _components(touched) if len(bits) else [(bits, np.arange(fmt.block))]
    if max(len(b) for b, _ in found) > _MOST_BITS:
        # bits that several cells share hold them together
        reach = touched.sum(axis=1)
        modes = reach == reach.max()
        found = _components(touched & ~modes[:, None])
    found = [(b, e) for b, e in found if len(e)]
    if any(not 0 < len(b) <= _MOST_BITS for b, _ in found):
        raise _unknown(fmt)
    kinds: dict[tuple[int, int], list[tuple[Array, Array]]] = {}
    for b, e in found:
        kinds.setdefault((len(b), len(e)), []).append((b, e))
    return tuple(_kind(fmt, expr, bits, touched, modes, same) for same in kinds.values())


def _influence(fmt: BlockFormat, expr: Expr) -> tuple[Array, npt.NDArray[np.bool_]]:
    """Bits of the block that change some value, and which values each changes."""
    owned = [f for f in fmt.layout_fields if f.storage.dtype.is_int and f.name not in fmt.derived]
    bits = np.concatenate([8 * f.offset + np.arange(8 * f.nbytes) for f in owned])
    touched = np.zeros((len(bits), fmt.block), bool)
    for block in np.random.default_rng(0).integers(0, 256, (_TRIED, fmt.nbytes), np.uint8):
        flipped = np.repeat(block[None], len(bits) + 1, axis=0)
        flipped[np.arange(len(bits)), bits // 8] ^= (1 << (bits % 8)).astype(np.uint8)
        values = _values(fmt, expr, flipped)
        touched |= values[:-1] != values[-1]
    used = touched.any(axis=1)
    return bits[used], touched[used]


def _values(fmt: BlockFormat, expr: Expr, blocks: Array) -> Array:
    found = evaluate(expr, {"i": np.arange(fmt.block)}, fmt.split(blocks))
    return np.broadcast_to(found, (len(blocks), fmt.block))


def _components(touched: npt.NDArray[np.bool_]) -> list[tuple[Array, Array]]:
    """Bits and elements that hang together, by the first element of each."""
    label = np.arange(touched.shape[1])
    while True:
        lowest = np.where(touched, label, len(label)).min(axis=1)  # of each bit's elements
        bound = np.where(touched, lowest[:, None], len(label)).min(axis=0)
        lower = np.minimum(label, bound)
        if (lower == label).all():
            break
        label = lower
    of_bit = np.where(touched, label, len(label)).min(axis=1)
    return [(np.flatnonzero(of_bit == n), np.flatnonzero(label == n)) for n in np.unique(label)]


def _kind(
    fmt: BlockFormat, expr: Expr, bits: Array, touched: Array, modes: Array,
    same: list[tuple[Array, Array]],
) -> Cells:  # fmt: skip
    """Cells with as many bits and elements as each other, all of which can say the same."""
    position, elements = (np.array(side) for side in zip(*same, strict=True))
    mode = None
    if modes.any():
        numbers = np.flatnonzero(modes)
        shared = touched[numbers][:, elements].any(axis=2)  # (mode bits, cells)
        if (shared.sum(axis=0) != 1).any():
            raise _unknown(fmt)
        owner = shared.argmax(axis=0)
        mode = bits[numbers[owner]]
    values = np.arange(1 << position.shape[1])
    rows = []
    for state in (0, 1) if modes.any() else (0,):
        blocks = np.zeros((len(values), fmt.nbytes), np.uint8)
        for each in bits[modes] * state:
            blocks[:, each // 8] |= np.uint8(state << (each % 8))
        for k in range(position.shape[1]):
            for at in bits[position[:, k]]:
                blocks[:, at // 8] |= ((values >> k & 1) << (at % 8)).astype(np.uint8)
        seen = _values(fmt, expr, blocks)[:, elements]  # (values, cells, n)
        if (seen != seen[:, :1]).any():
            raise _unknown(fmt)
        rows.append(seen[:, 0].astype(np.int64))
    return Cells(elements, Bits(bits[position]), np.stack(rows), mode)


def _unknown(fmt: BlockFormat) -> FormatError:
    return FormatError(
        f"format {fmt.name} cannot be encoded from its description, because its codes do not depend"
        f" on bits of their own, nor on at most {_MOST_BITS} bits that few of them share, in the"
        " same way all over the block; it can be decoded and multiplied, but needs an encoder of"
        " its own"
    )

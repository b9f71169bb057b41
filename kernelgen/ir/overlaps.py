"""Codes and integers of groups that overlap by mistake: a shift or an index that is a little off.

Flipping bits of random blocks and evaluating tells what each bit of a block says.  One that always
flips one bit of a code, and no other, is *plain*.  Formats share bits on purpose, too: digits of
base 3, rows of a grid, signs whose number is even, an exponent or a last bit that several elements
have in common, states of a trellis, which overlap and are looked up.  So what is taken for a
mistake is only

- a plain bit that is bit j of one integer and bit k of another, unless these are looked up;
- a plain bit that several have, while bits of its field say nothing at all;
- a plain bit of a single code on which a scale or an offset depends.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kernelgen.ir.block import BlockFormat
from kernelgen.ir.check import unread
from kernelgen.ir.encode import code_index, code_table
from kernelgen.ir.evaluate import evaluate
from kernelgen.ir.expr import F32, Expr, show, var

Array = npt.NDArray[Any]

#: random blocks of which each bit is flipped, and of which those are that seem to be shared
_TRIED = (4, 32)
#: roles of a bit that are none: it says nothing of an integer, or something that is not one bit
_NOTHING, _MIXED = -1, -2


@dataclass(frozen=True)
class _Integers:
    """Integers of one kind: `name` of (index), and what is stored for it.  `alone` where nothing
    but these bits makes a value, so that two integers have no reason to overlap."""

    name: str
    stored: Expr
    index: str
    count: int
    written: str
    alone: bool


def overlap(fmt: BlockFormat) -> str | None:
    """What is wrong about bits that a description reads twice, in a sentence; None if nothing is.

    Tried with random blocks.
    """
    for one in _integers(fmt):
        roles = _roles(fmt, one)
        found = _between(fmt, one, roles)
        if found is None and one.alone and one.name == "code":
            found = _with_scale(fmt, one, roles)
        if found is not None:
            return f"{found}: {one.name}({one.index}) = {one.written}"
    return None


def _integers(fmt: BlockFormat) -> Iterator[_Integers]:
    i, g = var("i", fmt.block), var("g", fmt.groups)
    stored = code_index(fmt, i)
    if stored.dtype is not F32:
        alone = code_table(fmt) is None
        yield _Integers("code", stored, "i", fmt.block, show(fmt.code_expr(i)), alone)
    for name, body in fmt.ints.items():
        whole = body(fmt.view, g)
        yield _Integers(name, whole, "g", fmt.groups, show(whole), True)


def _roles(fmt: BlockFormat, one: _Integers) -> Array:
    """Which bit of each integer a bit of the block is, (8 * nbytes, count), or `_NOTHING`, or
    `_MIXED`."""
    bits = np.arange(8 * fmt.nbytes)
    roles = _flipped(fmt, one, bits, _TRIED[0])
    shared = bits[(roles != _NOTHING).sum(axis=1) > 1]
    if len(shared):  # a bit of few values may seem plain in few blocks
        roles[shared] = _flipped(fmt, one, shared, _TRIED[1])
    return roles


def _flipped(fmt: BlockFormat, one: _Integers, bits: Array, tried: int) -> Array:
    indices = {one.index: np.arange(one.count)}
    seen = []
    for block in np.random.default_rng(0).integers(0, 256, (tried, fmt.nbytes), np.uint8):
        found = evaluate(one.stored, indices, fmt.split(_flips(block, bits))).astype(np.int64)
        values = np.broadcast_to(found, (len(bits) + 1, one.count))
        seen.append((values[:-1] ^ values[-1]) & 0xFFFFFFFF)
    changes = np.stack(seen)
    lowest = changes[0] & -changes[0]
    # a sign is in all bits above its own as well
    plain = (changes == changes[0]).all(axis=0)
    plain &= (changes[0] == lowest) | (changes[0] == (-lowest & 0xFFFFFFFF))
    role = np.log2(np.maximum(lowest, 1)).astype(np.int64)
    return np.where(
        (changes == 0).all(axis=0), _NOTHING, np.where(plain & (lowest > 0), role, _MIXED)
    )


def _flips(block: Array, bits: Array) -> Array:
    """The block with each of the bits flipped, and behind these as it is."""
    flipped = np.repeat(block[None], len(bits) + 1, axis=0)
    flipped[np.arange(len(bits)), bits // 8] ^= (1 << (bits % 8)).astype(np.uint8)
    return flipped


def _between(fmt: BlockFormat, one: _Integers, roles: Array) -> str | None:
    """Two integers that have a bit in common, but not all."""
    idle: dict[str, int] | None = None
    for bit in np.flatnonzero((roles != _NOTHING).sum(axis=1) > 1).tolist():
        owners = np.flatnonzero(roles[bit] != _NOTHING)
        if (roles[bit, owners] == _MIXED).any() or len(set(roles[bit])) == 1:
            continue  # the latter is a switch for all
        first, *others = owners.tolist()
        for other in others:
            here, there = roles[bit, first], roles[bit, other]
            if here != there and one.alone:
                return (
                    f"{_place(fmt, bit)} is bit {here} of {one.name}({first}) and bit {there} of"
                    f" {one.name}({other}); see whether a shift is too small or a mask too wide"
                )
            if np.array_equal(roles[:, first], roles[:, other]):
                continue
            idle = unread(fmt) if idle is None else idle
            field = _field(fmt, bit).name
            if field in idle:
                return (
                    f"{_place(fmt, bit)} belongs to both {one.name}({first}) and"
                    f" {one.name}({other}), while no value depends on {idle[field]} bits of"
                    f" {field}; see whether an index leaves out a part of {one.index}, or declare"
                    " bits that mean nothing as a field of their own"
                )
    return None


def _with_scale(fmt: BlockFormat, one: _Integers, roles: Array) -> str | None:
    """A bit of one code that a scale or an offset reads, too."""
    own = np.flatnonzero(((roles != _NOTHING).sum(axis=1) == 1) & (roles.max(axis=1) >= 0))
    g = var("g", fmt.groups)
    for what, expr in (("scale", fmt.scale_expr(g)), ("offset", fmt.offset_expr(g))):
        for block in np.random.default_rng(1).integers(0, 256, (_TRIED[0], fmt.nbytes), np.uint8):
            fields = fmt.split(_flips(block, own))
            with np.errstate(all="ignore"):
                found = evaluate(expr, {"g": np.arange(fmt.groups)}, fields)
            values = np.broadcast_to(found, (len(own) + 1, fmt.groups)).astype(np.float32)
            changed = (values[:-1].view(np.uint32) != values[-1].view(np.uint32)).any(axis=1)
            if changed.any():
                bit = int(own[changed.argmax()])
                element = int(roles[bit].argmax())
                return (
                    f"{_place(fmt, bit)} is bit {roles[bit, element]} of code({element}), and"
                    f" {what}(g) = {show(expr)} depends on it as well; narrow the mask of one"
                )
    return None


def _field(fmt: BlockFormat, bit: int) -> Any:
    return next(f for f in fmt.layout_fields if bit // 8 < f.offset + f.nbytes)


def _place(fmt: BlockFormat, bit: int) -> str:
    """A bit of a block by field and element."""
    field = _field(fmt, bit)
    element, within = divmod(int(bit) - 8 * field.offset, 8 * field.nbytes // field.count)
    several = fmt.fields[field.name].endswith("]")
    return f"bit {within} of {field.name}" + f"[{element}]" * several

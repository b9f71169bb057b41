"""Blocks to decode: random bytes whose floats are finite, and the edges of every field."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from kernelgen.ir.block import BlockFormat
from kernelgen.ir.encode import group_bits, put_half
from kernelgen.ir.evaluate import evaluate
from kernelgen.ir.expr import Field

Array = npt.NDArray[Any]

#: zero, one, largest, smallest normal, largest and smallest subnormal; each with both signs
F16_EDGES = np.array([0x0000, 0x3C00, 0x7BFF, 0x0400, 0x03FF, 0x0001], np.uint16)
F32_EDGES = np.array([0, 0x3F800000, 0x7F7FFFFF, 0x00800000, 0x007FFFFF, 1], np.uint32)
EDGES = {
    "f16": np.concatenate([F16_EDGES, F16_EDGES | 0x8000]),
    "f32": np.concatenate([F32_EDGES, F32_EDGES | 0x80000000]),
}


def _floats(fmt: BlockFormat) -> list[Field]:
    return [f for f in fmt.layout_fields if f.storage.name in EDGES]


def _bits(blocks: Array, field: Field) -> Array:
    """The field's floats as integers; a copy."""
    raw = blocks[..., field.offset : field.offset + field.nbytes]
    return np.ascontiguousarray(raw).view(EDGES[field.storage.name].dtype)


def _put(blocks: Array, field: Field, bits: Array) -> None:
    raw = np.ascontiguousarray(bits).view(np.uint8)
    blocks[..., field.offset : field.offset + field.nbytes] = raw


def finite(fmt: BlockFormat, blocks: Array) -> Array:
    """The blocks with one bit of the exponent cleared where a float is infinite or not a number."""
    blocks = blocks.copy()
    for field in _floats(fmt):
        bits = _bits(blocks, field)
        top = bits.dtype.type(0x7C00 if field.storage.nbytes == 2 else 0x7F800000)
        lowered = bits & ~bits.dtype.type(0x4000 if field.storage.nbytes == 2 else 0x40000000)
        _put(blocks, field, np.where(bits & top == top, lowered, bits))
    for name in fmt.halves:
        value = evaluate(fmt.half_expr(name), {}, fmt.split(blocks))[..., 0]
        highest = int(group_bits(fmt)[name].position[0, 14])  # of the exponent
        blocks[~np.isfinite(value), highest // 8] &= 255 - (1 << (highest % 8))
    return blocks


def random_blocks(fmt: BlockFormat, count: int, seed: int = 0) -> Array:
    """Random bytes with finite floats, uint8 (count, nbytes)."""
    rng = np.random.default_rng([seed, fmt.nbytes])
    return finite(fmt, rng.integers(0, 256, (count, fmt.nbytes), np.uint8))


def edge_blocks(fmt: BlockFormat, seed: int = 1) -> Array:
    """Every edge of every float field, over codes that are zero, all ones and random."""
    whole = [finite(fmt, np.full((1, fmt.nbytes), byte, np.uint8)) for byte in (0, 255, 0x80, 0x7F)]
    backgrounds = [*whole, random_blocks(fmt, 1, seed)]
    result = list(backgrounds)
    for field in _floats(fmt):
        edges = EDGES[field.storage.name]
        for background in backgrounds:
            blocks = np.repeat(background, len(edges), axis=0)
            _put(blocks, field, np.repeat(edges[:, None], field.count, axis=1))
            result.append(blocks)
    for name in fmt.halves:
        for background in backgrounds:
            blocks = np.repeat(background, len(EDGES["f16"]), axis=0)
            put_half(fmt, blocks, name, EDGES["f16"].view("<f2"))
            result.append(blocks)
    return np.concatenate(result)


def all_blocks(fmt: BlockFormat) -> Array:
    """Edges and random blocks."""
    return np.concatenate([edge_blocks(fmt), random_blocks(fmt, 200)])

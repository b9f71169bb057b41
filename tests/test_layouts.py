"""Layouts: repacking moves every byte once, and the addresses that kernels use find it again."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from kernelgen import targets
from kernelgen.errors import ShapeError
from kernelgen.files import contents
from kernelgen.generate import generate_walk
from kernelgen.ir import BlockFormat, formats
from kernelgen.ir.evaluate import evaluate
from kernelgen.ir.expr import Expr
from kernelgen.ir.layout import (
    NATIVE,
    PLANES,
    ROWS8,
    Layout,
    interleaved,
    named_layout,
    places,
    unit_bytes,
)
from kernelgen.ir.steps import memory_steps
from kernelgen.verify import random_blocks
from tests.made_up import THREE_BITS
from tests.test_numpy_target import ODD

Array = npt.NDArray[Any]

FORMATS = (*formats.FORMATS, THREE_BITS, *ODD)
LAYOUTS = (NATIVE, PLANES, ROWS8, interleaved(4), interleaved(16))
#: (N, blocks): one row of one block, rows that fill no tile, a number of both that is odd
SHAPES = ((1, 1), (5, 3), (33, 2))


def name(value: Any) -> str:
    return f"{value.name}{value.lanes}" if isinstance(value, Layout) else str(value.name)


def origins(layout: Layout, fmt: BlockFormat, n: int, k: int) -> Array:
    """For each packed byte, the number of the native byte that is there, counted from 1; 0 where
    there is none."""
    numbers = np.arange(1, n * fmt.row_bytes(k) + 1, dtype=np.uint32)
    found = np.zeros(layout.rows(n) * fmt.row_bytes(k), np.uint32)
    for byte in range(4):  # repacking knows bytes only: the numbers go through in four parts
        part = (numbers >> (8 * byte) & 255).astype(np.uint8).reshape(n, -1)
        found |= layout.pack(part, fmt, k).astype(np.uint32) << (8 * byte)
    return found


@pytest.mark.parametrize("layout", LAYOUTS, ids=name)
@pytest.mark.parametrize("fmt", FORMATS, ids=name)
def test_packing_is_a_bijection(fmt: BlockFormat, layout: Layout) -> None:
    for n, blocks in SHAPES:
        k = blocks * fmt.block
        moved = origins(layout, fmt, n, k)
        count = n * fmt.row_bytes(k)
        assert sorted(moved[moved > 0]) == list(range(1, count + 1))  # each byte is there, once
        assert len(moved) == layout.rows(n) * fmt.row_bytes(k)
        data = random_blocks(fmt, n, k)
        assert np.array_equal(layout.unpack(layout.pack(data, fmt, k), fmt, n, k), data)


def fetched(fmt: BlockFormat, layout: Layout, n: int, k: int, data: Array) -> Array:
    """What a kernel decodes: values (N, K), by addresses into the packed bytes alone."""
    memory = {"w": layout.pack(data, fmt, k)}
    steps = memory_steps(fmt, layout)
    blocks = k // fmt.block
    row, block = np.divmod(np.arange(n * blocks), blocks)
    where = {"row": row, "block": block, "N": n, "blocks": blocks}
    where |= {p.at.attr[0]: evaluate(p.start, where) for p in steps.places}

    def value(expr: Expr | None, **at: int) -> Array:
        assert expr is not None
        return np.broadcast_to(evaluate(expr, where | at, memory), len(row))

    out = np.empty((n * blocks, fmt.block), np.float32)
    if steps.values is not None:
        for i in range(fmt.block):
            out[:, i] = value(steps.values, element=i)
        return out.reshape(n, k)
    for start in range(0, fmt.block, 4):
        g, j = start // fmt.group, start % fmt.group // 4
        word = value(steps.codes, g=g, j=j).astype("<u4")
        codes = word[:, None].view(np.int8 if steps.signed else np.uint8).astype(np.int32)
        scaled = value(steps.scale, g=g)[:, None] * (codes - steps.bias).astype(np.float32)
        offset = 0 if steps.pure_offset is None else value(steps.pure_offset, g=g)[:, None]
        out[:, start : start + 4] = scaled + offset
    return out.reshape(n, k)


@pytest.mark.parametrize("layout", LAYOUTS, ids=name)
@pytest.mark.parametrize("fmt", FORMATS, ids=name)
def test_addresses_find_the_elements(fmt: BlockFormat, layout: Layout) -> None:
    for n, blocks in SHAPES:
        k = blocks * fmt.block
        data = random_blocks(fmt, n, k)
        want = fmt.decode(data.reshape(n, blocks, fmt.nbytes)).reshape(n, k)
        with np.errstate(all="ignore"):
            np.testing.assert_array_equal(fetched(fmt, layout, n, k, data), want)


@pytest.mark.parametrize("layout", LAYOUTS, ids=name)
@pytest.mark.parametrize("fmt", FORMATS, ids=name)
def test_alignment_is_as_claimed(fmt: BlockFormat, layout: Layout) -> None:
    rng = np.random.default_rng(fmt.nbytes)
    for one, place in places(layout, fmt).items():
        assert place.align in (1, 2, 4)
        field = place.field
        if layout is not NATIVE and field.storage.dtype.is_int and unit_bytes(field) == 4:
            assert place.align == 4, f"{one}: units of a repacked layout are whole, aligned words"
        for n, blocks in (*SHAPES, *rng.integers(1, 4000, (20, 2)).tolist()):
            row, block = rng.integers(0, n, 50), rng.integers(0, blocks, 50)
            where = {"row": row, "block": block, "N": n, "blocks": blocks}
            start = evaluate(place.start, where).astype(np.int64)
            assert not np.any((start % place.align) | (place.unit % place.align))


def test_planes_of_words_come_first() -> None:
    """So that each plane begins where its words are aligned, whatever the number of blocks."""
    for fmt in FORMATS:
        found = sorted(places(PLANES, fmt).values(), key=lambda p: -p.align)
        starts = [PLANES.field_start(fmt, p.field) for p in found if p.align == 4]
        others = [PLANES.field_start(fmt, p.field) for p in found if p.align < 4]
        assert not starts or not others or max(starts) < min(others)


def test_names() -> None:
    assert named_layout("native") is NATIVE and named_layout("planes") is PLANES
    assert named_layout("interleaved", 8) == interleaved(8)


def test_what_is_not_rows_of_blocks() -> None:
    fmt = formats.get("q4_0")
    for wrong in (np.zeros((2, 17), np.uint8), np.zeros((2, 18), np.int8), np.zeros(18, np.uint8)):
        with pytest.raises(ShapeError, match=r"uint8 \(N, 18\)"):
            PLANES.pack(wrong, fmt, 32)


@pytest.mark.parametrize("fmt", [formats.get(n) for n in ("q4_K", "q6_K", "q5_0", "f16")], ids=name)
def test_manifests_tell_how_to_repack_eight_rows(fmt: BlockFormat) -> None:
    """What a host without kernelgen would do gives what `pack` does."""
    cuda = targets.get("cuda")
    walk = next(w for w in cuda.walks if w.config().as_dict().get("layout") == ROWS8.name)
    made = generate_walk(walk, fmt, cuda)
    entry = json.loads(contents(cuda, [made])["manifest.json"])["kernels"][0]
    n, blocks = 11, 3
    native = random_blocks(fmt, n, blocks * fmt.block)
    packed = np.zeros(-(-n // 8) * 8 * native.shape[1], np.uint8)
    for r in range(n):
        for b in range(blocks):
            for field in entry["rows8"]:
                unit, offset = field["unit"], field["offset"]
                start = (r // 8 * blocks + b) * 8 * entry["block_bytes"] + 8 * offset
                for u in range(field["units"]):
                    to = start + (8 * u + r % 8) * unit
                    at = b * entry["block_bytes"] + offset + u * unit
                    packed[to : to + unit] = native[r, at : at + unit]
    np.testing.assert_array_equal(packed, ROWS8.pack(native, fmt, blocks * fmt.block))

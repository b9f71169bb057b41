"""Blocks in which everything comes up that cells of codes can say, such as all rows of a grid."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import numpy.typing as npt

from kernelgen.errors import FormatError
from kernelgen.ir.block import BlockFormat
from kernelgen.ir.cells import Cells, parts_of
from kernelgen.ir.encode import is_shuffled, overwrite

Array = npt.NDArray[Any]


@functools.lru_cache(maxsize=256)
def _cells(fmt: BlockFormat) -> tuple[Cells, ...]:
    """Cells of codes or of their magnitudes; none where every bit of a code is a bit of its own."""
    if fmt.float_codes or is_shuffled(fmt):
        return ()
    try:
        parts = parts_of(fmt)
    except FormatError:
        return ()
    return tuple(one for part in parts if part.kind != "sign" for one in part.cells)


def blocks_to_cover(fmt: BlockFormat) -> int:
    """Blocks that it takes until each cell's value has come up; 0 where there are no cells."""
    return max((-(-(1 << c.bits.width) // len(c.elements)) for c in _cells(fmt)), default=0)


def with_every_row(fmt: BlockFormat, blocks: Array) -> Array:
    """Blocks, uint8 (n, nbytes), with values of cells that go through all there are, in random
    order; all else is as it was."""
    made, rng = blocks.copy(), np.random.default_rng(0)
    for one in _cells(fmt):
        count, width = len(made) * len(one.elements), one.bits.width
        values = np.resize(rng.permutation(1 << width), count).reshape(len(made), -1)
        overwrite(made, values, one.bits)
    return made

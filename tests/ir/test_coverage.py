"""Blocks in which all rows of a grid come up."""

from __future__ import annotations

import numpy as np
import pytest

from kernelgen.ir import formats
from kernelgen.ir.cells import parts_of
from kernelgen.ir.coverage import blocks_to_cover, with_every_row
from kernelgen.ir.evaluate import evaluate
from kernelgen.ir.expr import var

GRIDS = ("iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs", "iq3_s", "tq1_0")


@pytest.mark.parametrize("name", GRIDS)
def test_every_row_comes_up_and_nothing_else_changes(name: str) -> None:
    fmt = formats.get(name)
    count = blocks_to_cover(fmt)
    before = np.random.default_rng(1).integers(0, 256, (count, fmt.nbytes), np.uint8)
    after = with_every_row(fmt, before)
    first, *_ = parts_of(fmt)
    codes = evaluate(fmt.code_expr(var("i", fmt.block)), {"i": np.arange(fmt.block)},
                     fmt.split(after)).astype(np.int64)  # fmt: skip
    if first.kind == "magnitude":
        codes = abs(codes)
    for one in first.cells:
        seen = {tuple(row) for row in codes[:, one.elements].reshape(-1, one.elements.shape[1])}
        modes = [[tuple(row) in seen for row in rows] for rows in one.rows]
        assert np.any(modes, axis=0).all()
    mine = {int(at) for one in first.cells for at in one.bits.position.ravel()}
    others = [at for at in range(8 * fmt.nbytes) if at not in mine]
    bits = [np.unpackbits(b, axis=1, bitorder="little")[:, others] for b in (before, after)]
    assert np.array_equal(*bits)


@pytest.mark.parametrize("name", ["q4_K", "mxfp4", "f16", "nf4_g64", "q1_0"])
def test_codes_with_bits_of_their_own_are_left_alone(name: str) -> None:
    fmt = formats.get(name)
    blocks = np.random.default_rng(0).integers(0, 256, (3, fmt.nbytes), np.uint8)
    assert blocks_to_cover(fmt) == 0 and np.array_equal(with_every_row(fmt, blocks), blocks)

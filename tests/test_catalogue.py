"""What `kernelgen list` shows: every format has kernels for every op on every target, packed."""

from __future__ import annotations

import pytest

from kernelgen import targets
from kernelgen.cli.catalogue import decoded
from kernelgen.cli.terminal import PLANES
from kernelgen.ir import formats
from kernelgen.ir.block import BlockFormat
from kernelgen.ir.formats.families import FAMILIES
from kernelgen.ir.ops.attention import Attention
from tests.test_cli import json_of

ALL = (*formats.FORMATS, *map(formats.get, FAMILIES))
PRODUCTS = ("dequantize", "get_rows", "matvec", "matmul")

#: how many formats may be decoded one code at a time
MOST_SCALAR = 3


def ops_of(fmt: BlockFormat) -> tuple[str, ...]:
    """Elements that are floats have no use for quantized activations."""
    return (*PRODUCTS, "attention", *(() if fmt.float_codes else ("quantize",)))


def test_few_formats_are_decoded_one_by_one() -> None:
    found = {fmt.name: decoded(fmt) for fmt in ALL}
    assert [name for name, how in found.items() if how == "scalar"][MOST_SCALAR:] == []
    assert list(found.values()).count("packed") > 90


@pytest.mark.parametrize("target", targets.NAMES)
def test_every_op_of_every_format_has_a_walk(target: str) -> None:
    walks = targets.get(target).walks
    for fmt in ALL:
        heads = Attention(max(64, fmt.block), fmt, fmt)
        for op in ops_of(fmt):
            subject = heads if op == "attention" else fmt
            refusals = [walk.accepts(subject) for walk in walks if walk.op == op]
            assert None in refusals, (fmt.name, op, refusals)


def check_cells(target: str, *named: str) -> None:
    """What the command says of some formats, or of all."""
    chosen = [option for name in named for option in ("--format", name)]
    cells = json_of("list", "--target", target, *chosen)
    reasons = {cell["reason"] for cell in cells if cell["op"] == "matmul"}
    if len(reasons) == 1 and None not in reasons:
        pytest.skip(reasons.pop())
    able = {(cell["format"], cell["op"]) for cell in cells if cell["how"] != "none"}
    known = map(formats.get, {cell["format"] for cell in cells if cell["decode"]})
    wanted = {(fmt.name, op) for fmt in known for op in ops_of(fmt)}
    assert wanted - able == set() != wanted
    assert {cell["format"] for cell in cells if cell["notes"]} == set()  # nothing lane by lane


def test_the_command_shows_them() -> None:
    check_cells("c", "tq1_0", "iq1_m", "hqq3_g64")


@pytest.mark.slow
@pytest.mark.parametrize("target", targets.NAMES)
def test_the_command_shows_all(target: str) -> None:
    check_cells(target)
    check_cells(target, PLANES)

"""How tiles of rows are shared out to threads, of whose part several are read in turns."""

from __future__ import annotations

import pytest

from kernelgen import targets
from kernelgen.generate import generate_walk
from kernelgen.ir import formats
from kernelgen.problem import tolerance
from kernelgen.targets.c.runtime import isa_named, native_isa
from kernelgen.verify import check
from tests.c.machines import here

#: of weights: less than a tile of the widest vectors, whole tiles, and one more than these; as many
#: tiles as are read in turns, and numbers that neither they nor shares nor threads divide
ROWS = (5, 16, 17, 33, 64, 81, 135, 208)


@pytest.mark.parametrize(
    ("streams", "share", "layout"),
    [
        (1, 0, "interleaved"), (2, 0, "interleaved"), (2, 1, "interleaved"),
        (2, 4, "native"), (4, 0, "native"), (4, 4, "interleaved"),
    ],
)  # fmt: skip
@pytest.mark.parametrize(("fmt", "precision"), [("q8_0", "int8"), ("q4_K", "fp32")])
@pytest.mark.parametrize("isa", [native_isa().name, "scalar"])
def test_all_tiles(
    isa: str, fmt: str, precision: str, streams: int, share: int, layout: str
) -> None:
    """Also of the last run of blocks, which is shorter; results that are not written stay NaN."""
    target, runtime = targets.get("c"), here(isa_named(isa))
    walk = target.walk("matmul", formats.get(fmt), precision)
    config = walk.config.from_dict(
        {"columns": 2, "streams": streams, "share": share, "layout": layout}
    )
    kernel = generate_walk(walk, formats.get(fmt), target, config)
    found = {n: check(kernel, runtime, 3, n, 11 * kernel.format.block) for n in ROWS}
    bound = tolerance(walk.op, precision)
    assert {n: error for n, error in found.items() if not error <= bound} == {}

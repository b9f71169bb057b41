"""Formats that nobody uses: each asks something of the words that the known formats do not."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from kernelgen import register_format, targets, unregister_format
from kernelgen.files import kernels
from kernelgen.generate import generate
from kernelgen.ir import BlockFormat, formats
from kernelgen.ir.expr import (
    F32,
    I32,
    call,
    cast,
    equal,
    logical_not,
    maximum,
    minimum,
    table,
    where,
)
from kernelgen.targets.c.runtime import isa_named, native_isa
from tests.c.machines import here, problems

BYTES = BlockFormat(
    name="bytes", block=32, group=32, nbytes=32, source=__name__,
    fields={"q": "i8[32]"},
    code=lambda b, i: b.q[i],
)  # fmt: skip

FIVE_BIT_TABLE = BlockFormat(
    name="five_bit_table", block=32, group=16, nbytes=24, source=__name__,
    fields={"d": "f16[2]", "low": "u8[16]", "high": "u32"},
    code=lambda b, i: table(
        [round(127 * (v / 31) ** 3) for v in range(-16, 16)],
        ((b.low[i % 16] >> (4 * (i // 16))) & 15) | (cast(I32, b.high >> i) & 1) << 4,
    ),
    scale=lambda b, g: b.d[g],
)  # fmt: skip

WIDE_TABLE = BlockFormat(
    name="wide_table", block=16, group=4, nbytes=12, source=__name__,
    fields={"d": "f32", "q": "u8[8]"},
    code=lambda b, i: table([17 * v for v in range(16)], (b.q[i % 8] >> (4 * (i // 8))) & 15),
    scale=lambda b, g: b.d,
    bias=120,
)  # fmt: skip

#: two-bit codes one after the other; scales by shifts, from 16-bit fields
NATURAL_ORDER = BlockFormat(
    name="natural_order", block=48, group=12, nbytes=22, source=__name__,
    fields={"d": "f16", "lift": "i16[2]", "shift": "u16[2]", "q": "u8[12]"},
    code=lambda b, i: (b.q[i // 4] >> (2 * (i % 4))) & 3,
    scale=lambda b, g: b.d * (1 + (b.shift[g // 2] >> (4 * (g % 2)) & 15)),
    offset=lambda b, g: b.d * b.lift[g // 2] * 0.0001,
)  # fmt: skip

#: conditions on what is loaded, on what is not, and constants on their branches
CHOICES = BlockFormat(
    name="choices", block=64, group=16, nbytes=44, source=__name__,
    fields={"d": "f16[2]", "kind": "u8[4]", "s": "i8[4]", "q": "u32[8]"},
    code=lambda b, i: cast(I32, b.q[i // 8] >> (4 * (i % 8))) & 15,
    scale=lambda b, g: (
        where(g < 2, b.d[0], 0.5)
        * where(b.kind[g] < 100, 1.0, 2.0)
        * where(logical_not(equal(b.kind[g] & 1, 0)), 1.5, b.d[1])
        * minimum(maximum(b.s[g], -7), 9)
    ),
    offset=lambda b, g: call("sqrt", cast(F32, b.kind[g])) * cast(F32, g + 1),
    bias=8,
)  # fmt: skip

#: elements that are floats and share a scale
SCALED_FLOATS = BlockFormat(
    name="scaled_floats", block=8, group=8, nbytes=12, source=__name__,
    fields={"d": "f32", "q": "u8[8]"},
    code=lambda b, i: table([float(v * abs(v)) / 64 for v in range(-8, 8)], b.q[i] & 15),
    scale=lambda b, g: b.d,
)  # fmt: skip

#: names that C or the templates use
NAMES = BlockFormat(
    name="names", block=32, group=8, nbytes=50, source=__name__,
    fields={"double": "f16", "tile": "u8[32]", "block": "u8[4]", "x": "u8[12]"},
    ints={"codes": lambda b, g: b.block[g], "scale": lambda b, g: b.x[3 * g]},
    code=lambda b, i: b.tile[i],
    scale=lambda b, g: b.double * b.codes[g],
    offset=lambda b, g: b.double * b.scale[g],
)  # fmt: skip

MADE_UP = (BYTES, FIVE_BIT_TABLE, WIDE_TABLE, NATURAL_ORDER, CHOICES, SCALED_FLOATS, NAMES)


@pytest.fixture(autouse=True)
def _known() -> Iterator[None]:
    for fmt in MADE_UP:
        register_format(fmt)
    yield
    for fmt in MADE_UP:
        unregister_format(fmt.name)


@pytest.mark.parametrize("fmt", MADE_UP, ids=lambda fmt: fmt.name)
def test_made_up(fmt: BlockFormat) -> None:
    ops = ("dequantize", "quantize", "matvec")
    assert problems(here(native_isa()), [fmt.name], ops) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", [native_isa().name, "avx2", "scalar"])
@pytest.mark.parametrize("fmt", MADE_UP, ids=lambda fmt: fmt.name)
def test_made_up_in_all_ways(fmt: BlockFormat, name: str) -> None:
    assert problems(here(isa_named(name)), [fmt.name]) == []


def test_no_name_of_a_field_can_hide_one_of_the_source() -> None:
    """Every name in the sources is a format's own, or is kept from formats."""
    target = targets.get("c")
    config = target.walk("matmul", NAMES).config
    unknown: set[str] = set()
    for fmt in formats.formats():
        made = list(kernels(target, [fmt]))
        for layout in ("native", "interleaved"):
            chosen = config.from_dict({"columns": 4, "layout": layout})
            made.append(generate("matmul", fmt, target, chosen, precision="fp32"))
            if not fmt.float_codes:
                made.append(generate("matmul", fmt, target, chosen, precision="int8"))
        own = {*fmt.fields, *fmt.ints}
        own |= {f"{name}_" for name in own}
        for one in made:
            text = re.sub(r'//.*|#include.*|"[^"]*"|\b\d[\w.]*', " ", one.source)
            unknown |= set(re.findall(r"[A-Za-z_]\w*", text)) - own - target.reserved
    entries = {name for name in unknown if name.startswith("kernelgen_")}
    functions_without_fields = {"d"}
    assert unknown - entries <= functions_without_fields

"""Bits that a description reads twice: mistakes are explained, what is shared on purpose passes."""

from __future__ import annotations

from typing import Any

import pytest

from kernelgen.errors import FormatError
from kernelgen.ir import formats
from kernelgen.ir.block import BlockFormat
from kernelgen.ir.expr import Expr, equal, table, where
from kernelgen.ir.formats.families import FAMILIES
from kernelgen.ir.overlaps import overlap

GOOD: dict[str, Any] = {
    "name": "made_up", "block": 32, "group": 16, "nbytes": 20,
    "fields": {"d": "f16[2]", "qs": "u8[16]"},
    "code": lambda b, i: (b.qs[i % 16] >> (4 * (i // 16))) & 15,
    "scale": lambda b, g: b.d[g],
}  # fmt: skip


def five_bits(fifth: Any, count: int) -> dict[str, Any]:
    """Four bits as above, and where the fifth is."""
    return {
        "fields": {"d": "f16[2]", "qs": "u8[16]", "qh": f"u8[{count}]"}, "nbytes": 20 + count,
        "code": lambda b, i: GOOD["code"](b, i) | (fifth(b, i) << 4),
    }  # fmt: skip


def six_bits_each(distance: int) -> dict[str, Any]:
    """Two integers of six bits in one of 16."""
    return {
        "fields": {"d": "f16", "s": "u16", "qs": "u8[16]"},
        "ints": {"sc": lambda b, g: (b.s >> (distance * g)) & 63},
        "scale": lambda b, g: b.d * b.sc[g],
    }


def side_by_side(b: Any, i: Expr) -> Expr:
    """Twelve bits, 16 with those of the next element: states of a trellis."""
    low, high = b.qs[3 * (i // 2) + i % 2], b.qs[3 * (i // 2) + i % 2 + 1]
    return (low | (high << 8)) >> (4 * (i % 2))


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "a small shift": (
        {"code": lambda b, i: (b.qs[i % 16] >> (3 * (i // 16))) & 15},
        "bit 3 of qs[0] is bit 3 of code(0) and bit 0 of code(16); see whether a shift is too"),
    "a small shift of signed codes": (
        {"code": lambda b, i: ((b.qs[i % 16] >> (3 * (i // 16))) & 15) - 8},
        "bit 3 of qs[0] is bit 3 of code(0) and bit 0 of code(16)"),
    "a wide mask": (
        {"code": lambda b, i: (b.qs[i % 16] >> (4 * (i // 16))) & 31},
        "bit 4 of qs[0] is bit 4 of code(0) and bit 0 of code(16)"),
    "an index that leaves out a part": (
        five_bits(lambda b, i: (b.qh[i % 2] >> (i // 8)) & 1, 4),
        "bit 0 of qh[0] belongs to both code(0) and code(2), while no value depends on 24 bits"),
    "a small shift in a table": (
        {"code": lambda b, i: table(tuple(range(16)), (b.qs[i % 16] >> (3 * (i // 16))) & 15)},
        "bit 3 of qs[0] belongs to both code(0) and code(16), while no value depends on 16 bits"),
    "groups": (six_bits_each(5), "bit 5 of s is bit 5 of sc(0) and bit 0 of sc(1)"),
    "a code that its scale reads": (
        {"scale": lambda b, g: b.d[g] * (b.qs[0] & 31)},
        "bit 0 of qs[0] is bit 0 of code(0), and scale(g) = d[g] * f32(qs[0] & 31) depends on it"),
    "a code that its offset reads": (
        {"offset": lambda b, g: b.d[g] * (b.qs[g] >> 6)},
        "bit 6 of qs[0] is bit 2 of code(16), and offset(g)"),
}  # fmt: skip

#: a last bit for four elements, a selector for all, states that overlap, a scale for two groups
RIGHT: dict[str, dict[str, Any]] = {
    "as it was meant": {},
    "a last bit for four": five_bits(lambda b, i: (b.qh[i // 32] >> (i % 32 // 4)) & 1, 1),
    "a bit for all that the scale reads": {
        "fields": {"s": "u8[4]", "qs": "u8[16]"},
        "scale": lambda b, g: b.s[g] * where(equal(b.s[3] & 1, 0), 1.0, 0.5),
        "code": lambda b, i: GOOD["code"](b, i) | ((b.s[3] & 1) << 4),
    },
    "a trellis": {
        "fields": {"d": "f16[2]", "qs": "u8[49]"}, "nbytes": 53,
        "code": lambda b, i: table(tuple(n * 37 % 251 for n in range(1 << 12)),
                                   side_by_side(b, i) & 4095),
    },
    "groups apart": six_bits_each(6),
    "a scale for two groups": {
        "group": 8, "fields": {"d": "f16", "s": "u8[2]", "qs": "u8[16]"},
        "ints": {"sc": lambda b, g: b.s[g // 2] & 63},
        "scale": lambda b, g: b.d * b.sc[g],
    },
    "integers with several names": {
        "fields": {"d": "f16", "s": "u8[2]", "qs": "u8[16]"},
        "ints": {"both": lambda b, g: b.s[g], "sc": lambda b, g: b.both[g] & 15},
        "scale": lambda b, g: b.d * b.sc[g], "offset": lambda b, g: -b.d * (b.both[g] >> 4),
    },
}  # fmt: skip


@pytest.mark.parametrize(("changes", "text"), WRONG.values(), ids=WRONG)
def test_a_mistake_is_explained_when_it_is_registered(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(FormatError) as caught:
        formats.register(BlockFormat(**GOOD | changes))
    message = str(caught.value)
    assert message.startswith("format made_up: ") and text in message and "\n" not in message


@pytest.mark.parametrize("changes", RIGHT.values(), ids=RIGHT)
def test_bits_that_are_shared_on_purpose(changes: dict[str, Any]) -> None:
    assert overlap(BlockFormat(**GOOD | changes)) is None


def test_nothing_overlaps_in_formats_that_are_in_use() -> None:
    for fmt in (*formats.FORMATS, *map(formats.get, FAMILIES)):
        assert overlap(fmt) is None, fmt.name

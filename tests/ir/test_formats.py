"""Formats decode bit for bit as ggml's own Python package does, and bad ones are refused."""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from gguf import quants
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from kernelgen.errors import FormatError
from kernelgen.ir import formats
from kernelgen.ir.block import BlockFormat, Derived
from kernelgen.ir.check import twins, unread
from kernelgen.ir.evaluate import evaluate
from kernelgen.ir.expr import Expr, table, var, where
from kernelgen.ir.formats import FORMATS
from tests.ir.blocks import all_blocks, edge_blocks, random_blocks

Array = npt.NDArray[Any]

TYPES = {t.name.lower(): t for t in GGMLQuantizationType}
#: formats whose blocks only ever hold activations: gguf has no decoder for them
ACTIVATIONS = ("q8_1", "q8_K")
#: those for which it has none, as yet
UNDECODED = ("q1_0", "q2_0")
#: those that gguf 0.19 does not know: elements and bytes of a block by ggml-common.h
NEWER = {"q2_0": (64, 18)}

every_format = pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.name)


def assert_same_bits(seen: Array, expected: Array) -> None:
    """Equal to the last bit, the sign of zero included."""
    assert seen.dtype == expected.dtype == np.float32
    assert seen.shape == expected.shape
    wrong = np.argwhere(seen.view(np.uint32) != expected.view(np.uint32))
    where = tuple(wrong[0]) if len(wrong) else ()
    assert len(wrong) == 0, f"{len(wrong)} differ; at {where} {seen[where]} != {expected[where]}"


# --- decoding -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fmt", [f for f in FORMATS if f.name not in ACTIVATIONS + UNDECODED], ids=repr
)
def test_decode_is_that_of_gguf(fmt: BlockFormat) -> None:
    blocks = all_blocks(fmt)
    with np.errstate(all="ignore"):
        expected = quants.dequantize(blocks, TYPES[fmt.name.lower()])
    assert_same_bits(fmt.decode(blocks), expected.reshape(-1, fmt.block))


def test_f16_beyond_the_finite() -> None:
    blocks = np.arange(1 << 16, dtype="<u2").view(np.uint8).reshape(-1, 2)
    seen = formats.get("f16").decode(blocks)[:, 0]
    assert np.array_equal(seen, blocks.view("<f2")[:, 0].astype(np.float32), equal_nan=True)


def test_q8_1_against_its_definition() -> None:
    """block_q8_1: half d, half s, int8 qs[32]; x = d * qs, and s = d * sum of qs is no part."""
    fmt = formats.get("q8_1")
    blocks = all_blocks(fmt)
    d = blocks[:, :2].copy().view("<f2").astype(np.float32)
    assert_same_bits(fmt.decode(blocks), d * blocks[:, 4:].view(np.int8).astype(np.float32))


def test_q8_k_against_its_definition() -> None:
    """block_q8_K: float d, int8 qs[256], int16 bsums[16]; x = d * qs, bsums are no part."""
    fmt = formats.get("q8_K")
    blocks = all_blocks(fmt)
    d = blocks[:, :4].copy().view("<f4")
    with np.errstate(over="ignore"):
        expected = d * blocks[:, 4:260].view(np.int8).astype(np.float32)
    assert_same_bits(fmt.decode(blocks), expected)


def test_q1_0_against_its_definition() -> None:
    """block_q1_0: half d, uint8 qs[16]; x[i] is d where bit i is set, -d where it is not."""
    fmt = formats.get("q1_0")
    blocks = all_blocks(fmt)
    d = blocks[:, :2].copy().view("<f2").astype(np.float32)
    bits = np.unpackbits(blocks[:, 2:], axis=1, bitorder="little")
    assert_same_bits(fmt.decode(blocks), np.where(bits == 1, d, -d))


def test_q2_0_against_its_definition() -> None:
    """block_q2_0: half d, uint8 qs[16]; x[4*j + s] is d times (two bits of qs[j], less 1)."""
    fmt = formats.get("q2_0")
    blocks = all_blocks(fmt)
    d = blocks[:, :2].copy().view("<f2").astype(np.float32)
    pairs = np.unpackbits(blocks[:, 2:], axis=1, bitorder="little").reshape(len(blocks), 64, 2)
    codes = pairs[..., 0] + np.float32(2) * pairs[..., 1]
    assert_same_bits(fmt.decode(blocks), (codes - np.float32(1)) * d)


@pytest.mark.parametrize("name", ["iq1_m", "iq2_xxs", "nvfp4", "tq1_0"])
def test_every_pair_of_bytes_decodes_as_gguf_does(name: str) -> None:
    """All values of two neighbouring bytes at once, everywhere in a block."""
    fmt = formats.get(name)
    pairs = np.arange(1 << 16, dtype="<u2").view(np.uint8).reshape(-1, 2)[::7]
    blocks = np.tile(pairs, (1, fmt.nbytes // 2))
    blocks = np.roll(blocks, 1, axis=1) if name == "iq1_m" else blocks
    with np.errstate(all="ignore"):
        expected = quants.dequantize(blocks, TYPES[name]).reshape(-1, fmt.block)
    known = np.isfinite(expected).all(axis=1)  # of NaN the bits may differ
    assert known.mean() > 0.9
    assert_same_bits(fmt.decode(blocks)[known], expected[known])


@every_format
def test_sizes_are_those_of_ggml(fmt: BlockFormat) -> None:
    expected = NEWER.get(fmt.name) or GGML_QUANT_SIZES[TYPES[fmt.name.lower()]]
    if fmt.name == "q8_1":
        # gguf counts two floats as ggml once had; ggml-common.h has two halves since 2024
        assert expected == (32, 40)
        expected = (32, 36)
    assert (fmt.block, fmt.nbytes) == expected


def test_gguf_knows_no_format_of_this_family_that_is_missing() -> None:
    ours = {f.name.lower() for f in FORMATS}
    family = {t.name.lower() for t in TYPES.values() if GGML_QUANT_SIZES[t][0] > 1}
    assert family <= ours


@pytest.mark.parametrize("shape", [(), (1,), (0,), (3,), (2, 3), (2, 1, 4)], ids=str)
@every_format
def test_decode_keeps_leading_dimensions(fmt: BlockFormat, shape: tuple[int, ...]) -> None:
    blocks = random_blocks(fmt, int(np.prod(shape, dtype=int)))
    seen = fmt.decode(blocks.reshape(*shape, fmt.nbytes))
    assert seen.shape == (*shape, fmt.block)
    assert_same_bits(seen.reshape(-1, fmt.block), fmt.decode(blocks))


def test_decode_of_more_blocks_than_one_step_takes() -> None:
    fmt = formats.get("q8_K")
    few = random_blocks(fmt, 7)
    many = np.tile(few, (300, 1))
    assert_same_bits(fmt.decode(many), np.tile(fmt.decode(few), (300, 1)))


def test_decode_of_blocks_that_are_not_contiguous() -> None:
    fmt = formats.get("q5_K")
    blocks = random_blocks(fmt, 8)
    assert_same_bits(fmt.decode(blocks[::-2]), fmt.decode(blocks)[::-2])
    assert_same_bits(fmt.decode(np.asfortranarray(blocks)), fmt.decode(blocks))


@pytest.mark.parametrize(
    "blocks",
    [np.zeros((2, 17), np.uint8), np.zeros((2, 18), np.int8), np.zeros((2, 9), np.uint16)],
    ids=lambda b: f"{b.dtype}{b.shape}",
)
def test_decode_of_other_arrays_is_an_error(blocks: Array) -> None:
    with pytest.raises(FormatError, match=r"q4_0 blocks are uint8 arrays of shape \(\.\.\., 18\)"):
        formats.get("q4_0").decode(blocks)


@every_format
def test_split_and_join_are_inverse(fmt: BlockFormat) -> None:
    blocks = edge_blocks(fmt)
    fields = fmt.split(blocks)
    assert list(fields) == list(fmt.fields)
    assert all(fields[f.name].shape == (len(blocks), f.count) for f in fmt.layout_fields)
    assert np.array_equal(fmt.join(fields), blocks)


# --- what is derived from a description ---------------------------------------------------------


def values_of(fmt: BlockFormat, expr: Expr, name: str, count: int, blocks: Array) -> Array:
    """An expression in `name` for all its values, double precision."""
    seen = evaluate(expr, {name: np.arange(count)}, fmt.split(blocks))
    return np.broadcast_to(seen, (len(blocks), count)).astype(np.float64)


def finite_values(fmt: BlockFormat, blocks: Array) -> Array:
    """The blocks with no value beyond what f32 holds."""
    return blocks[np.isfinite(fmt.decode(blocks)).all(axis=1)]


@every_format
def test_value_is_scale_times_code_plus_offset(fmt: BlockFormat) -> None:
    blocks = finite_values(fmt, random_blocks(fmt, 50))
    i, g = var("i", fmt.block), var("g", fmt.groups)
    code = values_of(fmt, fmt.code_expr(i), "i", fmt.block, blocks) - fmt.bias
    of_group = [
        values_of(fmt, expr, "g", fmt.groups, blocks)
        for expr in (fmt.scale_expr(g), fmt.offset_expr(g))
    ]
    scale, offset = (np.repeat(one, fmt.group, axis=1) for one in of_group)
    size = np.abs(scale * code) + np.abs(offset)
    assert (np.abs(scale * code + offset - fmt.decode(blocks)) <= 1e-6 * size).all()


@every_format
def test_codes_stay_in_their_range(fmt: BlockFormat) -> None:
    if fmt.float_codes:
        return
    lo, hi = fmt.code_range
    codes = values_of(fmt, fmt.code_expr(var("i", fmt.block)), "i", fmt.block, all_blocks(fmt))
    assert (codes.min(), codes.max()) == (lo, hi)


RANGES = {
    "q4_0": (0, 15), "q4_1": (0, 15), "q5_0": (0, 31), "q5_1": (0, 31), "q8_0": (-128, 127),
    "q8_1": (-128, 127), "q2_K": (0, 3), "q3_K": (0, 7), "q4_K": (0, 15), "q5_K": (0, 31),
    "q6_K": (0, 63), "q8_K": (-128, 127), "iq4_nl": (-127, 113), "mxfp4": (-12, 12),
    "iq4_xs": (-127, 113), "nvfp4": (-12, 12), "iq2_xxs": (-43, 43), "iq2_xs": (-43, 43),
    "iq2_s": (-43, 43), "iq3_xxs": (-62, 62), "iq3_s": (-15, 15), "iq1_s": (0, 18),
    "iq1_m": (0, 18), "tq1_0": (0, 2), "tq2_0": (0, 3), "q1_0": (-1, 1),
}  # fmt: skip


@pytest.mark.parametrize("name", RANGES)
def test_code_range(name: str) -> None:
    assert formats.get(name).code_range == RANGES[name]


def test_properties() -> None:
    fmt = formats.get("q6_K")
    assert (fmt.groups, fmt.bits, fmt.float_codes) == (16, 6.5625, False)
    assert [f.offset for f in fmt.layout_fields] == [0, 128, 192, 208]
    assert formats.get("bf16").float_codes
    assert repr(fmt) == "BlockFormat(q6_K)"


def test_row_bytes() -> None:
    assert formats.get("q4_K").row_bytes(1024) == 4 * 144
    assert formats.get("f16").row_bytes(3) == 6


@pytest.mark.parametrize("k", [0, -32, 31, 33])
def test_row_bytes_of_part_of_a_block_is_an_error(k: int) -> None:
    text = f"a row of {k} elements was asked for in q4_0, .* positive multiple of 32: pad"
    with pytest.raises(FormatError, match=text):
        formats.get("q4_0").row_bytes(k)


# --- the list of formats ------------------------------------------------------------------------


@every_format
def test_formats_are_found_by_name_in_any_case(fmt: BlockFormat) -> None:
    assert formats.get(fmt.name) is formats.get(fmt.name.upper()) is fmt
    assert fmt in formats.formats()
    assert fmt.source


@every_format
def test_pickling_gives_the_same_format(fmt: BlockFormat) -> None:
    assert pickle.loads(pickle.dumps(fmt)) is fmt


@every_format
def test_a_written_format_means_the_same(fmt: BlockFormat) -> None:
    """What another process gets of a format that it does not know: the very same expressions."""
    other = BlockFormat(**pickle.loads(pickle.dumps(fmt.written())))
    assert other is not fmt and other.written() == fmt.written()
    i, g = var("i", fmt.block), var("g", fmt.groups)
    assert other.value_expr(i) is fmt.value_expr(i)
    assert other.total_offset_expr(g) is fmt.total_offset_expr(g)


def test_unknown_format() -> None:
    with pytest.raises(FormatError, match="format 'q4_9' is not known; known are f32, f16,"):
        formats.get("q4_9")


# --- formats of users ---------------------------------------------------------------------------

GOOD: dict[str, Any] = {
    "name": "made_up", "block": 32, "group": 16, "nbytes": 20,
    "fields": {"d": "f16[2]", "qs": "u8[16]"},
    "code": lambda b, i: (b.qs[i % 16] >> (4 * (i // 16))) & 15,
    "scale": lambda b, g: b.d[g],
}  # fmt: skip


@pytest.fixture
def made_up() -> Iterator[BlockFormat]:
    yield formats.register(BlockFormat(**GOOD))
    formats.unregister("made_up")


def test_a_registered_format_is_known(made_up: BlockFormat) -> None:
    assert formats.get("Made_Up") is made_up
    assert made_up in formats.formats()
    assert made_up not in FORMATS
    assert pickle.loads(pickle.dumps(made_up)) is made_up
    other = BlockFormat(**GOOD | {"bias": 8})  # of the same name: the two are kept apart
    assert pickle.loads(pickle.dumps(other)).bias == 8
    assert formats.register(made_up) is made_up
    with pytest.raises(FormatError, match="format MADE_UP is already registered"):
        formats.register(dataclasses.replace(made_up, name="MADE_UP"))


def test_an_unregistered_format_is_forgotten() -> None:
    formats.register(BlockFormat(**GOOD))
    formats.unregister("made_up")
    with pytest.raises(FormatError, match="'made_up' is not known"):
        formats.get("made_up")


def test_formats_of_kernelgen_stay() -> None:
    with pytest.raises(FormatError, match="q4_0 comes with kernelgen and cannot be unregistered"):
        formats.unregister("q4_0")
    with pytest.raises(FormatError, match="already registered"):
        formats.register(BlockFormat(**GOOD | {"name": "Q4_0"}))


def test_a_made_up_format_decodes() -> None:
    fmt = BlockFormat(**GOOD)
    blocks = random_blocks(fmt, 9)
    d = blocks[:, :4].copy().view("<f2").astype(np.float32)
    nibbles = np.concatenate([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], axis=1)
    assert_same_bits(fmt.decode(blocks), np.repeat(d, 16, axis=1) * nibbles.astype(np.float32))


def test_every_kind_of_field_decodes() -> None:
    fmt = BlockFormat(
        name="all_kinds", block=4, group=4, nbytes=18,
        fields={"a": "i8", "b": "u8", "c": "u16", "d": "i16", "e": "u32", "f": "f32", "g": "i8[4]"},
        code=lambda b, i: b.g[i],
        scale=lambda b, g: b.a * b.f,
        offset=lambda b, g: (b.b + b.c) * 1.0 - b.d + (b.e & 255),
    )  # fmt: skip
    blocks = np.array([[255, 200, 1, 2, 0, 128, 7, 0, 0, 1, 0, 0, 0, 63, 1, 2, 128, 255]], np.uint8)
    offset = 200 + 513 + 32768 + 7
    assert fmt.decode(blocks).tolist() == [[-0.5 * v + offset for v in (1, 2, -128, -1)]]


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "size": (
        {"nbytes": 19}, "fields take 20 bytes, but nbytes says 19; correct one: d 4, qs 16"),
    "storage": ({"fields": {"d": "f16[2]", "qs": "u7[16]"}}, "qs is declared 'u7[16]'; write a"),
    "count": ({"fields": {"d": "f16[2]", "qs": "u8[x]"}}, "qs is declared 'u8[x]'; write a type"),
    "name": ({"name": "my format"}, "a name is letters, digits and underscores"),
    "name begins with a digit": ({"name": "4bit"}, "begins with a letter"),
    "group": ({"group": 12}, "group 12 must divide block 32"),
    "no group": ({"group": 0}, "group 0 must divide block 32"),
    "no block": ({"block": 0}, "group 16 must divide block 0"),
    "small group": ({"group": 2, "scale": None}, "group 2 must be a multiple of 4"),
    "wide code": (
        {"code": lambda b, i: b.qs[i % 16] << 1},
        "code(i) = qs[i % 16] << 1 ranges over 0..510; it must fit a byte"),
    "signed and wide code": (
        {"code": lambda b, i: b.qs[i % 16] - 100}, "ranges over -100..155; it must fit a byte"),
    "unknown field": (
        {"code": lambda b, i: b.qz[i]}, "format made_up has no field qz; it has d, qs"),
    "unknown field of a scale": (
        {"scale": lambda b, g: b.dd[g]}, "format made_up has no field dd; it has d, qs"),
    "load outside": (
        {"code": lambda b, i: b.qs[i] & 15},
        "code(i): field qs has elements 0..15, but qs[i] reads 0..31"),
    "load outside of a scale": (
        {"scale": lambda b, g: b.d[g + 1]},
        "scale(g): field d has elements 0..1, but d[g + 1] reads 1..2"),
    "load outside of an offset": (
        {"offset": lambda b, g: b.d[2 * g]}, "offset(g): field d has elements 0..1, but d["),
    "negative index": ({"code": lambda b, i: b.qs[i % 16 - 1] & 15}, "reads -1..14"),
    "shift": (
        {"code": lambda b, i: (b.qs[i % 16] >> (2 * i)) & 3}, "shifts by 0..62 bits; 0..31 are"),
    "division": (
        {"code": lambda b, i: b.qs[i % 16] // i & 15}, "by what is not a positive constant"),
    "table": (
        {"code": lambda b, i: table((1, 2, 3), b.qs[i % 16] & 3)},
        "a table has elements 0..2, but table([1, 2, 3], qs[i % 16] & 3) reads 0..3"),
    "types": (
        {"scale": lambda b, g: b.d[g] << 1}, "f32 << i32 has no meaning: d[g] << 1"),
    "truth": (
        {"scale": lambda b, g: b.d[0] if g < 1 else b.d[1]},
        "the truth of the expression g < 1 is not known"),
    "types of a code": (
        {"code": lambda b, i: b.d[0] & 15}, "f32 & f32 has no meaning: d[0] & 15"),
    "truth of a code": (
        {"code": lambda b, i: 1 if i < 1 else 2}, "the truth of the expression i < 1 is not known"),
    "no index": ({"code": lambda b, i: b.qs & 15}, "qs has several elements; write qs[index]"),
    "no index of a scale": ({"scale": lambda b, g: b.d}, "d has several elements; write d[index]"),
    "an index of a single value": (
        {"fields": {"d": "f16", "m": "f16", "qs": "u8[16]"}}, "d is one value and has no elements"),
    "a number for a scale": ({"scale": lambda b, g: 0.5}, "scale"),
    "an attribute of a field": (
        {"code": lambda b, i: b.qs.shape}, "qs has several elements; write qs[index]"),
    "a number for a code": ({"code": lambda b, i: 3}, "code"),
    "nothing for a code": ({"code": lambda b, i: None}, "code"),
    "a condition for a code": ({"code": lambda b, i: b.qs[i % 16] < 3}, "code"),
    "a condition for an offset": (
        {"offset": lambda b, g: b.d[g] < 1.0}, "offset(g) = d[g] < 1 is a condition; it must be"),
    "true division": (
        {"code": lambda b, i: b.qs[i / 2] & 15}, "code(i): i32 / i32 has no meaning: i / 2"),
    "a list": (
        {"code": lambda b, i: [1, 2][b.qs[i % 16] & 1]},
        "code(i) cannot be written down, as its function raised TypeError: list indices must be"),
    "an array": (
        {"code": lambda b, i: np.arange(16)[b.qs[i % 16] & 15]}, "table(values, index) for a list"),
    "one parameter": ({"scale": lambda b: b.d[0]}, "it gets a block and an index"),
    "an empty field": ({"fields": {"d": "f16[2]", "qs": "u8[0]"}}, "leave out a field of nothing"),
    "a keyword": (
        {"fields": {"d": "f16[2]", "class": "u8[16]"}}, "b.class cannot be written in Python"),
    "a field with a space": ({"fields": {"d": "f16[2]", "q s": "u8[16]"}}, "choose another name"),
    "two things of a name": (
        {"ints": {"d": lambda b, g: b.qs[g]}}, "b.d would be several things; names of"),
    "a group integer that is a float": (
        {"ints": {"m": lambda b, g: b.d[g]}}, "m(g) = d[g] is f32; what ints name are integers"),
    "a group integer without its index": (
        {"ints": {"m": lambda b, g: b.qs[g]}, "scale": lambda b, g: b.d[g] * b.m},
        "scale(g): m, which has several elements (write m[index]), is not a number"),
    "an unknown integer": (
        {"scale": lambda b, g: b.d[g] * b.m[g]}, "format made_up has no field m; it has d, qs"),
    "a derived field that is none": (
        {"derived": {"s": Derived(16, lambda b, total: total)}}, "derived speaks of 's'; there is"),
    "the largest of nothing": ({"largest": {"m": 3}}, "largest speaks of 'm'; there is code, d"),
    "a bias between integers": ({"bias": 7.5}, "bias is 7.5; it must be an integer"),
    "a size in text": ({"block": "32"}, "block is '32'; it must be an integer"),
    "fields in a list": (
        {"fields": [("d", "f16")]}, "fields is [('d', 'f16')]; write it as a dictionary, by name"),
    "a number for a name": ({"name": 5}, "a name is letters, digits and underscores"),
}  # fmt: skip


def check_refused(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(FormatError) as caught:
        BlockFormat(**GOOD | changes)
    message = str(caught.value)
    assert text in message
    assert message.startswith(f"format {changes.get('name', 'made_up')}")
    assert "\n" not in message and not message.endswith(".")


@pytest.mark.parametrize(("changes", "text"), BAD.values(), ids=BAD)
def test_a_bad_description_is_refused(changes: dict[str, Any], text: str) -> None:
    check_refused(changes, text)


@pytest.mark.parametrize(
    ("code", "which"),
    [
        (lambda b, i: b.qs[i % 16] & 15, "elements 0 and 16"),
        (lambda b, i: (b.qs[i % 16] >> i) & 15, "elements 8 and 9"),
        (lambda b, i: (b.qs[i // 4] >> (2 * (i % 4))) & 0, "elements 0 and 1"),
    ],
)
def test_elements_that_read_the_same_bits_are_refused(code: Any, which: str) -> None:
    """When it is registered, which kernelgen's own need not be."""
    fmt = BlockFormat(**GOOD | {"code": code})
    with pytest.raises(FormatError, match=f"format made_up: {which} of a block have the same code"):
        formats.register(fmt)
    with pytest.raises(FormatError, match="'made_up' is not known"):
        formats.get("made_up")


@every_format
def test_all_elements_and_bits_are_apart(fmt: BlockFormat) -> None:
    assert fmt.block == 1 or twins(fmt) is None
    # scales of nvfp4 have a bit for a sign that they do not have
    assert unread(fmt) == ({"d": 4} if fmt.name == "nvfp4" else {})


def test_bits_that_nothing_reads_are_found() -> None:
    seven = {"code": lambda b, i: (b.qs[i % 16] >> (4 * (i // 16))) & 7}
    assert unread(BlockFormat(**GOOD | seven)) == {"qs": 32}


def test_a_group_integer_that_reads_outside_is_refused() -> None:
    """Even where no scale uses it: the packed decode and the encoder read it."""
    check_refused({"ints": {"sc": lambda b, g: b.qs[16 + g]}}, "field qs has elements 0..15")


def test_a_branch_not_taken_may_read_outside_its_field() -> None:
    fmt = BlockFormat(**GOOD | {"scale": lambda b, g: where(g < 1, b.d[g], b.d[1 - (g - 1)])})
    assert fmt.decode(random_blocks(fmt, 2)).shape == (2, 32)

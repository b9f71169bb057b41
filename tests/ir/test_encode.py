"""Encoding is the inverse of decoding, bit for bit, or refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from gguf import GGMLQuantizationType, quants

from kernelgen.errors import FormatError
from kernelgen.ir import formats
from kernelgen.ir.block import BlockFormat
from kernelgen.ir.encode import bit_positions, code_index, code_table, encode, is_shuffled
from kernelgen.ir.evaluate import evaluate
from kernelgen.ir.expr import I32, const, equal, minimum, table, var, where
from kernelgen.ir.formats import FORMATS
from tests.ir.blocks import all_blocks, random_blocks

Array = npt.NDArray[Any]

INTEGER = [f for f in FORMATS if not f.float_codes and is_shuffled(f)]
#: formats whose codes share bits
IN_CELLS = [f for f in FORMATS if not f.float_codes and not is_shuffled(f)]


def parts(fmt: BlockFormat, blocks: Array) -> tuple[Array, dict[str, Array], dict[str, Array]]:
    """What is stored in blocks: codes, group integers, and the fields that hold neither."""
    fields = fmt.split(blocks)
    i, g = var("i", fmt.block), var("g", fmt.groups)
    codes = evaluate(code_index(fmt, i), {"i": np.arange(fmt.block)}, fields)
    at = {"g": np.arange(fmt.groups)}
    ints = {name: evaluate(fmt.int_expr(name, g), at, fields) for name in fmt.ints}
    holding = {int(bit) // 8 for b in bit_positions(fmt).values() for bit in b.position.ravel()}
    others = {
        f.name: fields[f.name]
        for f in fmt.layout_fields
        if f.name not in fmt.derived and not holding & set(range(f.offset, f.offset + f.nbytes))
    }
    return codes, ints, others


def with_sums(fmt: BlockFormat, blocks: Array) -> Array:
    """The blocks with the fields that ggml computes from the codes, by ggml's definition; a sum
    beyond what a half holds is infinite there, too."""
    blocks = blocks.copy()
    if fmt.name == "q8_1":
        d = blocks[:, :2].copy().view("<f2").astype(np.float32)
        total = blocks[:, 4:].view(np.int8).sum(axis=1, keepdims=True, dtype=np.int32)
        with np.errstate(over="ignore"):
            blocks[:, 2:4] = (d * total.astype(np.float32)).astype("<f2").view(np.uint8)
    if fmt.name == "q8_K":
        sums = blocks[:, 4:260].view(np.int8).reshape(-1, 16, 16).sum(axis=2, dtype=np.int32)
        blocks[:, 260:] = sums.astype("<i2").view(np.uint8)
    return blocks


def of_cells(fmt: BlockFormat, blocks: Array) -> tuple[Array, dict[str, Array], dict[str, Array]]:
    """The same where codes share bits: codes, group integers, floats."""
    fields = fmt.split(blocks)
    codes = evaluate(fmt.code_expr(var("i", fmt.block)), {"i": np.arange(fmt.block)}, fields)
    at = {"g": np.arange(fmt.groups)}
    ints = {n: evaluate(fmt.int_expr(n, var("g", fmt.groups)), at, fields) for n in fmt.ints}
    floats = {f.name: fields[f.name] for f in fmt.layout_fields if not f.storage.dtype.is_int}
    halves = {name: evaluate(fmt.half_expr(name), {}, fields) for name in fmt.halves}
    return codes, ints, floats | halves


def assert_round_trip(fmt: BlockFormat, blocks: Array) -> None:
    assert np.array_equal(encode(fmt, *parts(fmt, blocks)), blocks)


@pytest.mark.parametrize("fmt", INTEGER, ids=repr)
def test_encoding_what_was_decoded_gives_the_block(fmt: BlockFormat) -> None:
    assert_round_trip(fmt, with_sums(fmt, all_blocks(fmt)))


@pytest.mark.parametrize("fmt", INTEGER, ids=repr)
def test_every_bit_of_a_block_has_one_owner(fmt: BlockFormat) -> None:
    owned = np.concatenate([b.position.ravel() for b in bit_positions(fmt).values()])
    assert len(set(owned.tolist())) == len(owned)
    codes, _, others = parts(fmt, random_blocks(fmt, 1))
    derived = sum(8 * f.nbytes for f in fmt.layout_fields if f.name in fmt.derived)
    rest = sum(8 * one.nbytes for one in others.values()) + derived
    assert len(owned) + rest == 8 * fmt.nbytes
    assert bit_positions(fmt)["code"].position.shape[0] == codes.shape[1]


def test_which_formats_have_codes_that_share_bits() -> None:
    names = "iq1_s iq1_m iq2_xxs iq2_xs iq2_s iq3_xxs iq3_s tq1_0"
    assert [f.name for f in IN_CELLS] == names.split()


@pytest.mark.parametrize("fmt", IN_CELLS, ids=repr)
def test_encoding_codes_that_share_bits_gives_the_block(fmt: BlockFormat) -> None:
    blocks = random_blocks(fmt, 200)
    again = encode(fmt, *of_cells(fmt, blocks))
    assert np.array_equal(fmt.decode(again).view(np.uint32), fmt.decode(blocks).view(np.uint32))
    if fmt.name != "tq1_0":  # of which 13 of 256 bytes say what others say
        assert np.array_equal(again, blocks)


def test_ternary_digits_are_packed_as_gguf_does() -> None:
    fmt = formats.get("tq1_0")
    x = np.random.default_rng(0).integers(-1, 2, (50, 256)).astype(np.float32)
    x[:, 0] = 1
    expected = quants.quantize(x, GGMLQuantizationType.TQ1_0)
    again = encode(fmt, x + 1, {}, {"d": np.ones((50, 1))})
    assert np.array_equal(again, expected)


@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 3)], ids=str)
@pytest.mark.parametrize("fmt", INTEGER, ids=repr)
def test_leading_dimensions_are_kept(fmt: BlockFormat, shape: tuple[int, ...]) -> None:
    count = int(np.prod(shape, dtype=int))
    blocks = with_sums(fmt, random_blocks(fmt, count))
    codes, ints, others = parts(fmt, blocks)

    def shaped(one: Array) -> Array:
        return np.broadcast_to(one, (count, one.shape[-1])).reshape(*shape, one.shape[-1])

    groups = {name: shaped(one) for name, one in ints.items()}
    fields = {name: shaped(one) for name, one in others.items()}
    seen = encode(fmt, shaped(codes), groups, fields)
    assert np.array_equal(seen, blocks.reshape(*shape, fmt.nbytes))


def test_position_of_bits() -> None:
    nibbles = bit_positions(formats.get("q4_0"))["code"].position
    assert nibbles[0].tolist() == [16, 17, 18, 19]
    assert nibbles[16].tolist() == [20, 21, 22, 23]
    five = bit_positions(formats.get("q5_0"))["code"]
    assert five.width == 5
    assert five.position[3].tolist() == [72, 73, 74, 75, 19]


def test_codebooks_are_encoded_by_index() -> None:
    assert code_table(formats.get("iq4_nl")) == formats.get("iq4_nl").code_expr(var("i", 32)).attr
    assert code_table(formats.get("q4_0")) is None


# --- made-up formats ----------------------------------------------------------------------------


def made_up(**changes: Any) -> BlockFormat:
    description: dict[str, Any] = {
        "name": "made_up", "block": 16, "group": 16, "nbytes": 16, "fields": {"qs": "u8[16]"},
        "code": lambda b, i: b.qs[i],
    }  # fmt: skip
    return BlockFormat(**description | changes)


SHUFFLED = {
    "bits of a code in three fields, high before low": made_up(
        nbytes=10, fields={"top": "u32", "mid": "i16", "d": "f16", "low": "u16"},
        code=lambda b, i: (
            ((b.low >> (15 - i)) & 1) | (((b.mid >> i) & 1) << 1) | (((b.top >> i) & 1) << 2)
        ),
        scale=lambda b, g: b.d,
    ),
    "group integers spread over the codes' bytes": made_up(
        group=8, nbytes=18, fields={"d": "f16", "qs": "u8[16]"},
        code=lambda b, i: b.qs[i] & 31,
        ints={"sc": lambda b, g: (b.qs[g] >> 5) | ((b.qs[g + 2] >> 5) << 3)},
        scale=lambda b, g: b.d * b.sc[g],
    ),
    "a three-bit stream": made_up(
        block=8, group=8, nbytes=4, fields={"qs": "u8[4]"},
        code=lambda b, i: ((b.qs[3 * i // 8] | (b.qs[3 * i // 8 + 1] << 8)) >> (3 * i % 8)) & 7,
    ),
    "signed codes of four bits": made_up(
        nbytes=8, fields={"qs": "i8[8]"},
        code=lambda b, i: where(i < 8, (b.qs[i % 8] << 28) >> 28, b.qs[i % 8] >> 4),
    ),
}  # fmt: skip


@pytest.mark.parametrize("fmt", SHUFFLED.values(), ids=SHUFFLED)
def test_made_up_formats(fmt: BlockFormat) -> None:
    blocks = random_blocks(fmt, 100)
    again = encode(fmt, *parts(fmt, blocks))
    assert np.array_equal(fmt.decode(again), fmt.decode(blocks))
    # bits that belong to nothing become zero
    owned = np.zeros(8 * fmt.nbytes, np.uint8)
    for one in bit_positions(fmt).values():
        owned[one.position.ravel()] = 1
    for field in fmt.layout_fields:
        if field.storage.name == "f16":
            owned[8 * field.offset : 8 * (field.offset + field.nbytes)] = 1
    assert np.array_equal(again, blocks & np.packbits(owned, bitorder="little"))


def test_group_integers_of_more_than_eight_bits() -> None:
    fmt = made_up(
        group=8, nbytes=20, fields={"qs": "u8[16]", "pair": "u16[2]"},
        ints={"sc": lambda b, g: b.pair[g] & 0xFFF}, scale=lambda b, g: b.sc[g] * 1.0,
    )  # fmt: skip
    codes, ints = np.zeros((1, 16), np.int32), {"sc": np.array([[0x123, 0xFED]])}
    assert encode(fmt, codes, ints, {})[0, 16:].tolist() == [0x23, 0x01, 0xED, 0x0F]


#: codes that share bits, or are no plain bits, and what says so
SHARED: dict[str, tuple[Callable[[Any, Any], Any], str]] = {
    "base 3": (lambda b, i: (((b.qs[i // 4] * table((1, 3, 9, 27), i % 4)) & 255) * 3) >> 8, ""),
    "quotient": (lambda b, i: b.qs[i] // 3, "code[0] are not bits of the block"),
    "multiple": (lambda b, i: (b.qs[i] & 15) * 3, "bits of code are not bits of the block"),
    "not zero": (lambda b, i: b.qs[i] ^ 128, "code is not 0 in a block of zeros"),
    "bias": (lambda b, i: (b.qs[i] & 15) + 1, "code is not 0 in a block of zeros"),
    "shared": (lambda b, i: b.qs[i // 2], "code shares bits with another value"),
    "widths": (
        lambda b, i: b.qs[i] & where(i < 8, 15, 7), "elements of code differ in width"),
    "gaps": (lambda b, i: b.qs[i] & 5, "code[0] are not bits of the block"),
    "a row of eight": (lambda b, i: table(range(256), (b.qs[i // 8] & 31) * 8 + i % 8), ""),
    "a row with signs": (
        lambda b, i: where(
            equal((b.qs[i // 4] >> (4 + i % 4)) & 1, 1),
            0 - table(range(1, 65), (b.qs[i // 4] & 15) * 4 + i % 4),
            table(range(1, 65), (b.qs[i // 4] & 15) * 4 + i % 4),
        ), ""),
    "a shift of all": (
        lambda b, i: table(range(0, 128, 2), (b.qs[i // 4] & 15) * 4 + i % 4) + (b.rs[0] & 1), ""),
}  # fmt: skip
#: codes of which too many share bits
NOT_INVERTIBLE: dict[str, Callable[[Any, Any], Any]] = {
    "xor": lambda b, i: b.qs[i] ^ (b.qs[15 - i] & 1),
    "and of two": lambda b, i: b.qs[i] & b.rs[i],
    "smaller of two": lambda b, i: minimum(b.qs[i], b.rs[i]),
    "a constant": lambda b, i: const(3, I32),
    "neighbours": lambda b, i: (b.qs[i] + b.qs[(i + 1) % 16]) >> 1,
}


def with_rest(code: Callable[[Any, Any], Any]) -> BlockFormat:
    return made_up(nbytes=32, fields={"qs": "u8[16]", "rs": "u8[16]"}, code=code)


@pytest.mark.parametrize(("code", "why"), SHARED.values(), ids=SHARED)
def test_codes_that_share_bits_are_found_again(code: Callable[[Any, Any], Any], why: str) -> None:
    fmt = with_rest(code)
    with pytest.raises(FormatError, match=re.escape(why)):
        bit_positions(fmt)
    blocks = random_blocks(fmt, 50)
    again = encode(fmt, *of_cells(fmt, blocks))
    assert np.array_equal(fmt.decode(again), fmt.decode(blocks))


def test_codes_that_cells_cannot_have_are_refused() -> None:
    fmt = with_rest(SHARED["shared"][0])
    with pytest.raises(FormatError, match=r"^codes that made_up cannot say were to be encoded"):
        encode(fmt, np.arange(16)[None], {}, {})


@pytest.mark.parametrize("code", NOT_INVERTIBLE.values(), ids=NOT_INVERTIBLE)
def test_what_shares_too_many_bits_is_refused(code: Callable[[Any, Any], Any]) -> None:
    fmt = with_rest(code)
    with pytest.raises(FormatError) as caught:
        encode(fmt, np.zeros((1, 16), np.int32), {}, {})
    message = str(caught.value)
    assert message.startswith("format made_up cannot be encoded from its description, because ")
    assert message.endswith("it can be decoded and multiplied, but needs an encoder of its own")


def test_integers_that_share_bits_with_codes_are_refused() -> None:
    fmt = made_up(ints={"sc": lambda b, g: b.qs[g] & 3})
    with pytest.raises(FormatError, match="sc shares bits with another value"):
        bit_positions(fmt)


@pytest.mark.parametrize("name", ["f32", "f16", "bf16"])
def test_floats_have_no_codes_to_encode(name: str) -> None:
    with pytest.raises(FormatError, match=f"format {name} cannot be encoded"):
        encode(formats.get(name), np.zeros((1, 1), np.int32), {}, {})

"""Packed decode: the four bytes of the word are the scalar expression at the four lanes."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from kernelgen.errors import ExprError
from kernelgen.ir import lanes
from kernelgen.ir.block import BlockFormat
from kernelgen.ir.evaluate import evaluate
from kernelgen.ir.expr import (
    I32,
    U32,
    Expr,
    Field,
    cast,
    const,
    equal,
    load,
    maximum,
    named,
    substitute,
    table,
    var,
    walk,
    where,
    word,
)
from kernelgen.ir.formats import FORMATS, get
from kernelgen.ir.lanes import LANE, LANES, Packed, pack
from kernelgen.ir.rules import simplify
from kernelgen.ir.steps import steps
from tests.ir.strategies import FIELDS, IX, G, T, U, value

Array = npt.NDArray[Any]

QS, SC, HW, BIG = (FIELDS[name] for name in ("qs", "sc", "hw", "big"))
INTEGER = [f for f in FORMATS if not f.float_codes]


def four_lanes(expr: Expr) -> list[Expr]:
    return [substitute(expr, {LANE: const(lane, I32)}) for lane in range(LANES)]


def as_bytes(words: Array) -> Array:
    return np.stack([(words >> np.uint32(8 * lane)) & np.uint32(255) for lane in range(LANES)])


def assert_packs(expr: Expr) -> Packed:
    """The bytes of the packed expression are the values at the four lanes, at all points."""
    packed = pack(expr)
    assert packed.expr.dtype is U32
    assert LANE not in set(walk(packed.expr))
    got = as_bytes(value(packed.expr))
    for lane, scalar in enumerate(four_lanes(expr)):
        seen, expected = np.broadcast_arrays(got[lane], value(scalar).astype(np.int64) & 255)
        assert np.array_equal(seen, expected), f"lane {lane} of {expr} is wrong in {packed.expr}"
    return packed


# --- formats ------------------------------------------------------------------------------------


def random_blocks(fmt: BlockFormat, count: int = 24) -> dict[str, Array]:
    rng = np.random.default_rng(fmt.nbytes)
    blocks = rng.integers(0, 256, (count, fmt.nbytes), np.uint8)
    blocks[0], blocks[1] = 0, 255
    return fmt.split(blocks)


@pytest.mark.parametrize("fmt", INTEGER, ids=lambda f: f.name)
def test_codes_of_a_format_pack(fmt: BlockFormat) -> None:
    g, j = var("g", fmt.groups), var("j", fmt.group // LANES)
    packed = pack(fmt.code_expr(fmt.group * g + LANES * j + LANE))
    assert packed.scalar_because is None
    fields = random_blocks(fmt)
    at = np.arange(fmt.block // LANES)
    words = evaluate(
        packed.expr, {"g": at * LANES // fmt.group, "j": at % (fmt.group // LANES)}, fields
    )
    codes = evaluate(fmt.code_expr(var("i", fmt.block)), {"i": np.arange(fmt.block)}, fields)
    expected = np.moveaxis(codes.astype(np.int64).reshape(len(codes), -1, LANES) & 255, -1, 0)
    assert np.array_equal(as_bytes(words), expected)


#: formats whose group integers lie in words of their own, beside other things
APART = ("iq1_s", "iq2_xxs", "iq3_xxs")
WITH_INTS = [(f, name) for f in INTEGER for name in f.ints]


@pytest.mark.parametrize(("fmt", "name"), WITH_INTS, ids=lambda v: getattr(v, "name", v))
def test_group_integers_of_a_format_pack(fmt: BlockFormat, name: str) -> None:
    fields = random_blocks(fmt)
    g = var("g", fmt.groups)
    expected = evaluate(fmt.int_expr(name, g), {"g": np.arange(fmt.groups)}, fields) & 255
    for first in range(0, fmt.groups, LANES):
        packed = pack(fmt.int_expr(name, const(first, I32) + LANE))
        # those that lie apart are decoded where their group is, instead
        assert packed.scalar_because is None or fmt.name in APART
        seen = as_bytes(evaluate(packed.expr, {}, fields))[..., 0]
        assert np.array_equal(seen, expected[:, first : first + LANES].T)


@pytest.mark.parametrize("name", APART)
def test_group_integers_that_do_not_pack_are_decoded_with_their_group(name: str) -> None:
    found = steps(get(name))
    assert not found.ints and not found.scalar_because
    assert found.scale is not None and not any(n.op == "element" for n in walk(found.scale))


def test_packed_words_are_whole_word_operations() -> None:
    def codes(name: str) -> str:
        fmt = get(name)
        g, j = var("g", fmt.groups), var("j", fmt.group // LANES)
        return str(pack(fmt.code_expr(fmt.group * g + LANES * j + LANE)).expr)

    assert codes("q8_0") == "word(qs, j)"
    assert codes("q4_K") == "(word(qs, g // 2 * 8 + j) >> (g % 2 * 4)) & 0x0F0F0F0F"
    assert codes("q6_K").count("word(") == 2
    assert "spread1" in codes("q5_0")
    assert codes("iq4_nl").startswith("lookup([-127, -104,")


# --- expressions --------------------------------------------------------------------------------

BYTE = load(QS, 4 * (G % 4) + LANE)
SIGNED = load(SC, 4 * (G % 2) + LANE)
SAME = load(QS, G)

PACKABLE = {
    "constant": const(200, I32),
    "negative constant": const(-3, I32),
    "same in all lanes": SAME,
    "same, signed": load(SC, G),
    "bytes": BYTE,
    "signed bytes": SIGNED,
    "mask": BYTE & 0x35,
    "negative mask": BYTE & -16,
    "shift, mask": (BYTE >> 4) & 15,
    "half of a signed byte": (SIGNED >> 4) & 15,
    "a signed byte's bits by g": (SIGNED >> (G % 4 * 2)) & 3,
    "shift by g, mask": (BYTE >> (G % 4 * 2)) & 3,
    "shift alone": BYTE >> 3,
    "shift by g alone": BYTE >> G,
    "shift by more than a byte": BYTE >> 9,
    "shift by g, wide mask": (BYTE >> G) & 0x7F,
    "shift left": (BYTE & 15) << 4,
    "shift left by g": (BYTE & 1) << G,
    "two fields": (BYTE & 15) | (((load(QS, LANE) >> 2) & 3) << 4),
    "xor": BYTE ^ 0x88,
    "xor of signed": SIGNED ^ -1,
    "sum": (BYTE & 15) + (BYTE >> 4),
    "sum with a constant": (BYTE >> 1) + 100,
    "sum with a lane-free part": (BYTE & 127) + (SAME & 127),
    "product": (BYTE & 15) * 17,
    "product with a lane-free part": (BYTE & 15) * (SAME & 15),
    "bits of a u32": (load(BIG, G % 4) >> (LANE + 4 * G)) & 1,
    "pairs of bits of a u32": (load(BIG, 0) >> (2 * LANE + 8)) & 3,
    "nibbles of a u16": (load(HW, G % 4) >> (4 * LANE)) & 15,
    "bytes of a u32": (load(BIG, 0) >> (8 * LANE)) & 255,
    "table": table((-8, 3, 127, -128), BYTE & 3),
    "table of 16": table(tuple(range(-100, 60, 10)), BYTE >> 4),
    "sum beyond a byte": (BYTE + 1) & 255,
    "product beyond a byte": (BYTE * 3) & 255,
    "product with a lane-free part beyond a byte": ((BYTE * (SAME & 31)) >> 3) & 31,
    "shift beyond a byte": (BYTE << 1) & 255,
    "mean with a constant": (BYTE + 101) >> 1,
    "digit of base 3": (((BYTE * 27) & 255) * 3) >> 8,
    "digit of base 3 by g": (((BYTE * table((1, 3, 9, 27, 81), G % 5)) & 255) * 3) >> 8,
    "table of words": table(tuple(range(-30, 34)), (SAME & 15) * 4 + LANE),
    "table of words, by two indices": table(tuple(range(128)), (SAME & 15) * 8 + G % 2 * 4 + LANE),
    "table of even steps": table((3, 8, 13, 18), BYTE & 3),
    "nibbles from byte to byte": (load(QS, 2 * G + LANE // 2) >> (4 * (LANE % 2))) & 15,
    "negated by a bit": where(equal((SAME >> LANE) & 1, 1), 0 - ((BYTE & 31) + 1), (BYTE & 31) + 1),
    "negated without a bit": where((SAME >> LANE) & 1 < 1, 0 - ((BYTE & 31) + 1), (BYTE & 31) + 1),
    "zero may be negated": where(equal((SAME >> LANE) & 1, 1), 0 - (BYTE & 31), BYTE & 31),
    "kept by a bit": where(0 < ((SAME >> LANE) & 1), BYTE >> 1, BYTE & 15),
    "difference of bytes": (BYTE >> 1) - (load(QS, LANE) >> 1),
    "sum of bytes": (BYTE + load(QS, LANE)) >> 1,
    "branches": where(G < 4, BYTE >> 4, BYTE & 15),
    "branches by a load": where(SAME < 9, BYTE, SAME),
    "casts": cast(I32, cast(U32, BYTE) >> 4),
    "named": named("q", BYTE & 63, G),
}


@pytest.mark.parametrize("expr", PACKABLE.values(), ids=PACKABLE)
def test_packs(expr: Expr) -> None:
    assert assert_packs(expr).scalar_because is None


FALLS_BACK = {
    "the lane itself": (LANE, "var has no packed form: lane"),
    "unaligned": (load(QS, LANE + 1), "qs is not read at a multiple of 4"),
    "alignment unknown": (load(QS, G + LANE), "qs is not read at a multiple of 4"),
    "every other byte": (load(QS, LANE * 2), "do not read consecutive bytes of qs: qs[lane * 2]"),
    "backwards": (load(QS, 3 - LANE), "do not read consecutive bytes"),
    "not bytes": (load(HW, LANE) & 255, "elements of hw are not bytes: hw[lane]"),
    "lanes shift apart": (BYTE >> LANE, "lanes are shifted by different amounts"),
    "lanes shift left apart": ((BYTE & 1) << LANE, "by different amounts in different lanes"),
    "lanes multiply apart": ((SAME & 3) * LANE, "* by different amounts in different lanes"),
    "fields from the top": (
        (load(BIG, 0) >> (24 - 8 * LANE)) & 255, "lanes are shifted by different amounts"),
    "fields from the top, as a sum": (
        (load(BIG, 0) >> (LANE * -8 + 24)) & 255, "lanes are shifted by different amounts"),
    "gaps between the fields": (
        (load(BIG, 0) >> (5 * LANE)) & 3, "lanes are shifted by different amounts"),
    "fields beyond the word": (
        (load(BIG, 0) >> (8 * LANE + G)) & 255, "lanes are shifted by different amounts"),
    "signed shift": (SIGNED >> 4, "values in (-128, 127) are not unsigned bytes: sc["),
    "signed sum": ((SIGNED >> 1) + (SIGNED >> 2), "are not unsigned bytes"),
    "a signed byte moved up": (SIGNED + 128, "values in (-128, 127) are not unsigned bytes"),
    "sum with a signed part": (
        table((100, 150), BYTE & 1) + table((50, -50), BYTE >> 7),
        "values in (-50, 50) are not unsigned bytes",
    ),
    "more than 16 bits": ((BYTE * 300) & 255, "values in (0, 76500) are not unsigned bytes"),
    "difference": ((BYTE & 15) - 8, "are not unsigned bytes"),
    "a large table": (table(tuple(range(32)), BYTE & 31), "a byte shuffle takes up to 16"),
    "branches by lane": (where(LANE < 2, BYTE, SAME), "lanes take different branches"),
    "branches by byte": (where(BYTE < 2, BYTE, SAME), "lanes take different branches"),
    "quotient": (BYTE // 3, "// has no packed form: qs["),
    "remainder": (BYTE % 5, "% has no packed form: qs["),
    "maximum": (maximum(BYTE, 3), "max has no packed form: max("),
    "comparison": (cast(I32, BYTE < 3), "conversion from bool has no packed form"),
    "bits that cross bytes": (
        ((load(QS, 3 * LANE // 8) | load(QS, 3 * LANE // 8 + 1) << 8) >> (3 * LANE % 8)) & 7,
        "lanes are shifted by different amounts"),
}  # fmt: skip


@pytest.mark.parametrize(("expr", "reason"), FALLS_BACK.values(), ids=FALLS_BACK)
def test_falls_back_and_says_why(expr: Expr, reason: str) -> None:
    said = assert_packs(expr).scalar_because
    assert said is not None
    assert reason in said


@pytest.mark.parametrize("expr", [BYTE + 1, BYTE - 1, U, load(HW, LANE), T * 64], ids=str)
def test_what_does_not_fit_a_byte_is_an_error(expr: Expr) -> None:
    with pytest.raises(ExprError, match="do not fit a byte and cannot be packed"):
        pack(expr)


def test_another_variable_may_be_the_lane() -> None:
    lane = var("l", 4)
    packed = pack(load(QS, 4 * (G % 4) + lane) >> 4, lane)
    assert packed == pack(BYTE >> 4)


def test_a_bit_stream_is_decoded_lane_by_lane() -> None:
    """3-bit codes one after the other in a stream of bytes: no format of ggml is like this."""
    stream = BlockFormat(
        name="stream3", block=32, group=32, nbytes=13, fields={"qs": "u8[13]"},
        code=lambda b, i: (
            ((b.qs[3 * i // 8] | (b.qs[3 * i // 8 + 1] << 8)) >> (3 * i % 8)) & 7
        ),
    )  # fmt: skip
    j = var("j", 8)
    packed = pack(stream.code_expr(LANES * j + LANE))
    assert packed.scalar_because is not None
    assert "lanes are shifted by different amounts" in packed.scalar_because
    fields = random_blocks(stream)
    words = evaluate(packed.expr, {"j": np.arange(8)}, fields)
    bits = np.unpackbits(fields["qs"], axis=-1, bitorder="little")[:, :96].reshape(-1, 8, 4, 3)
    assert np.array_equal(as_bytes(words), np.moveaxis(bits @ [1, 2, 4], -1, 0))


# --- random expressions -------------------------------------------------------------------------

_LEAVES = (
    BYTE, BYTE, SIGNED, load(QS, LANE), load(QS, 4 * (IX // 8) + LANE), SAME, G, const(15, I32),
    const(0x35, I32), (load(BIG, G % 4) >> (2 * LANE + G)) & 3, load(QS, 2 * LANE + G % 4),
    (load(BIG, 1) >> (24 - 8 * LANE)) & 255, LANE,
)  # fmt: skip
_AMOUNTS = (const(1, I32), const(3, I32), const(4, I32))


@st.composite
def lane_ints(draw: Any, depth: int = 3) -> Expr:
    """What a decode might do to bytes, packable or not."""
    if depth == 0:
        return draw(st.sampled_from(_LEAVES))
    e = draw(lane_ints(draw(st.integers(0, depth - 1))))
    kind = draw(st.sampled_from(("mask", "mask", ">>", "<<", "|", "^", "+", "*", "table", "where")))
    if kind == "mask":
        return e & draw(st.sampled_from((1, 3, 7, 15, 48, 63, 127, 240, -16)))
    if kind == ">>":
        return e >> draw(st.sampled_from((*_AMOUNTS, const(7, I32), G, G % 2 * 4)))
    if kind == "<<":
        return (e & draw(st.sampled_from((15, 127)))) << draw(st.sampled_from((*_AMOUNTS, G % 4)))
    if kind == "*":
        return (e & draw(st.sampled_from((7, 127)))) * draw(st.sampled_from((*_AMOUNTS, G, LANE)))
    if kind == "table":
        values = draw(st.lists(st.integers(-128, 127), min_size=16, max_size=16))
        return table(values, e & 15)
    other = draw(lane_ints(draw(st.integers(0, depth - 1))))
    if kind == "where":
        return where(draw(st.sampled_from((G < 3, SAME < 100, LANE < 2))), e, other)
    if kind == "+":
        return (e & 127) + (other & draw(st.sampled_from((63, 127, 255))))
    return Expr(kind, I32, (e, other))


def reasons_on_random_expressions(**how: Any) -> list[str | None]:
    """Why random expressions were not packed; each is checked."""
    reasons: list[str | None] = []

    @settings(**how)
    @given(lane_ints(), st.sampled_from((255, 15, 63)))
    def check(expr: Expr, mask: int) -> None:
        reasons.append(assert_packs(expr & mask).scalar_because)

    check()
    return reasons


def test_random_expressions_pack_right() -> None:
    reasons = reasons_on_random_expressions(max_examples=400)
    assert reasons.count(None) >= 50
    assert len(reasons) - reasons.count(None) >= 50


def _unmasked(expr: Expr, lane: Expr) -> Expr:
    if lanes.depends_on(expr.args[1], lane):
        return lanes._pack_shift_right(expr, lane)
    return lanes._pack(expr.args[0], lane) >> expr.args[1]


def _carrying(expr: Expr, lane: Expr) -> Expr:
    a, b = expr.args
    if lanes.depends_on(b, lane) and expr.op != "+":
        return lanes._pack_no_carry(expr, lane)
    right = cast(U32, b) if expr.op != "+" else lanes._pack(b, lane)
    return Expr(expr.op, U32, (lanes._pack(a, lane), right))


def _unaligned(expr: Expr, lane: Expr) -> Expr:
    base, _ = lanes._stride(expr.args[0], lane) or (const(0, I32), 1)
    field: Field = expr.attr
    return word(field, simplify(base // LANES))


SEEDED = {
    "a shift without its mask": (">>", _unmasked),
    "a sum that carries": ("+", _carrying),
    "a product that carries": ("*", _carrying),
    "a shift left that carries": ("<<", _carrying),
    "a load that is not aligned, or not of neighbours": ("load", _unaligned),
    "a table of 32 as a shuffle of 16": (
        "table", lambda e, lane: lanes.lookup(e.attr[:8], lanes._pack(e.args[0], lane))),
}  # fmt: skip


@pytest.mark.parametrize(("op", "handler"), SEEDED.values(), ids=SEEDED)
def test_a_seeded_bug_is_caught(op: str, handler: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(lanes._HANDLERS, op, handler)
    with pytest.raises(AssertionError, match="is wrong in"):
        reasons_on_random_expressions(max_examples=2000, phases=[Phase.generate])

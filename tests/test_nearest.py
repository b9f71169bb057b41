"""Blocks by the simple rule: kernels of every target against a reference of its own."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import kernelgen
from kernelgen.errors import FormatError, ShapeError
from kernelgen.ir import formats
from kernelgen.ir.formats import FORMATS
from kernelgen.kv_cache import KVCache
from kernelgen.quantizer import nearest
from tests.map_cases import VARIANTS, apply

Array = npt.NDArray[Any]

#: name, smallest and largest code less its bias, whether it has an offset
RULES = {
    "q8_0": (-127, 127, False), "q4_0": (-8, 7, False), "q5_0": (-16, 15, False),
    "q4_1": (0, 15, True), "q5_1": (0, 31, True),
}  # fmt: skip
IQ4_NL = formats.get("iq4_nl")


def sample(blocks: int, block: int) -> Array:
    """Blocks of any size and sign, of one value, of zeros, and with a scale beyond f16."""
    rng = np.random.default_rng(blocks)
    x = rng.standard_normal((blocks, block)) * 10.0 ** rng.integers(-6, 4, (blocks, 1))
    x[1 % blocks] = 0.0
    x[2 % blocks] = -3.25
    x[3 % blocks] = np.abs(x[3 % blocks])
    x[4 % blocks, 5:] = 0.0
    x[5 % blocks, 0] = 3e7
    return x.astype(np.float32)


def half(x: Array) -> Array:
    return np.clip(x, -65504, 65504).astype(np.float16).astype(np.float64)


def wanted(x: Array, low: int, high: int, offset: bool) -> tuple[Array, Array]:
    """Values by the rule, and the scales, in double precision but for what is stored."""
    x = x.astype(np.float64)
    least, most = x.min(axis=1, keepdims=True), x.max(axis=1, keepdims=True)
    furthest = np.where(-least < most, most, least)
    if offset:
        scale = half((most - least) / (high - low))
        start = half(least - low * scale)
    else:
        scale = half(np.abs(furthest) / high if low == -high else furthest / low)
        start = np.zeros_like(scale)
    inverse = np.divide(1, scale, out=np.zeros_like(scale), where=scale != 0)
    codes = np.clip(np.floor((x - start) * inverse + 0.5), low, high)
    return codes * scale + start, scale


def check(got: Array, x: Array, name: str) -> None:
    """Values are those of the rule, but that an element half way between two codes may have the
    other; and they are as near as the scale allows, where that is not beyond f16."""
    values, scale = wanted(x, *RULES[name])
    step = np.abs(scale)
    differs = np.abs(got - values) > 2e-3 * step + 1e-7
    assert (np.abs(got - values) <= 1.002 * step + 1e-7).all() and differs.mean() < 0.01
    inside = np.abs(x).max(axis=1) < 1e6
    # half a step, or a whole one where codes of one sign are one fewer, and what rounding scale and
    # offset to f16 adds at the last code and in all; below its normal numbers f16 is 2^-25 off
    low, high, offset = RULES[name]
    beyond = (x / np.where(scale == 0, 1, scale) > high + 0.5) & (not offset)
    reach = np.abs(x).max(axis=1, keepdims=True)
    bound = (
        (0.5 + 0.5 * beyond) * step
        + reach * 2.0**-10 * (1 + offset)
        + (max(-low, high) + 1) * 2.0**-25
    )
    assert (np.abs(got - x) <= bound)[inside].all()


def made(target: str, name: str, x: Array) -> Array:
    """Values of the blocks that a target makes, written into poisoned memory."""
    fmt = formats.get(name)
    out = np.full((len(x), fmt.nbytes), 0xA5, np.uint8)
    apply(target, nearest.by_rule(fmt))({"x": x}, len(x), fmt.nbytes, {"out": out})
    return fmt.decode(out)


@pytest.mark.parametrize("target", VARIANTS)
@pytest.mark.parametrize("name", ["q8_0", "q4_1"])
def test_every_target_follows_the_rule(target: str, name: str) -> None:
    x = sample(9, 32)
    check(made(target, name, x), x, name)


@pytest.mark.slow
@pytest.mark.parametrize("target", VARIANTS)
@pytest.mark.parametrize("name", RULES)
def test_every_target_follows_the_rule_in_every_format(target: str, name: str) -> None:
    for blocks in (1, 6, 67):
        x = sample(blocks, 32)
        check(made(target, name, x), x, name)


@pytest.mark.parametrize("name", RULES)
def test_formats_follow_the_rule(name: str) -> None:
    for blocks in (1, 67):
        x = sample(blocks, 32)
        check(made("numpy", name, x), x, name)


@pytest.mark.parametrize("target", ["numpy", "c"])
def test_codes_of_a_table_are_the_nearest(target: str) -> None:
    x = sample(40, 32)[6:]
    got = made(target, "iq4_nl", x)
    scale = half(np.where(-x.min(1) < x.max(1), x.max(1), x.min(1)) / -127)[:, None]
    table = np.unique(IQ4_NL.decode(blocks_of_every_code()))
    best = np.abs(x[..., None] - scale[..., None] * table).min(axis=-1)
    assert (np.abs(got - x) <= best + 1e-4 * np.abs(scale)).all()


def blocks_of_every_code() -> Array:
    """One block with scale 1 and each code twice."""
    codes = np.array([n % 16 * 17 for n in range(16)], np.uint8)
    return np.concatenate([np.ones(1, np.float16).view(np.uint8), codes])


def test_all_formats_that_have_a_rule_come_near() -> None:
    rng = np.random.default_rng(3)
    named = [*FORMATS, *map(formats.get, ("int3_g32", "int4_g64", "int8_g128_f32", "nf4_g64"))]
    rules = [fmt for fmt in named if not fmt.float_codes or fmt.scale is not None]
    rules = [fmt for fmt in rules if nearest.lacks_rule(fmt) is None]
    assert {*RULES, "iq4_nl", "int3_g32", "int4_g64", "int8_g128_f32", "nf4_g64"} == {
        fmt.name for fmt in rules
    }
    for fmt in rules:
        x = rng.standard_normal((16, 2 * fmt.block)).astype(np.float32)
        simple = kernelgen.round_to_nearest(x, fmt, target="numpy").dequantize()
        searched = kernelgen.quantize(x, fmt).dequantize()
        assert np.square(simple - x).mean() <= 2 * np.square(searched - x).mean(), fmt.name


@pytest.mark.parametrize("name", ["q4_K", "mxfp4", "iq2_xxs", "q8_1", "q1_0", "uint4_g32"])
def test_formats_without_a_rule_say_why(name: str) -> None:
    x = np.ones((1, 256), np.float32)
    with pytest.raises(FormatError, match=r"because it.*kernelgen\.quantize searches") as caught:
        kernelgen.round_to_nearest(x, name, target="numpy")
    assert "\n" not in str(caught.value)


def test_floats_are_rounded() -> None:
    x = np.linspace(-2, 2, 64, dtype=np.float32).reshape(2, 32)
    assert (kernelgen.round_to_nearest(x, "f16").dequantize() == x.astype(np.float16)).all()
    assert (kernelgen.round_to_nearest(x.astype(np.float64), "f32").dequantize() == x).all()


@pytest.mark.parametrize(
    ("x", "said"),
    [(np.ones((2, 32), np.int32), "rows of floats"), (np.float32(1), "rows of floats"),
     (np.full((1, 32), np.nan, np.float32), "finite"), (np.ones((1, 33), np.float32), "multiple")],
)  # fmt: skip
def test_what_is_no_such_array_is_refused(x: Array, said: str) -> None:
    with pytest.raises((ShapeError, FormatError), match=said):
        kernelgen.round_to_nearest(x, "q8_0", target="numpy")


def test_large_sums_are_not_taken_for_infinity() -> None:
    x = np.full((1, 32), 3e38, np.float32)
    got = kernelgen.round_to_nearest(x, "q8_0", target="numpy").dequantize()
    assert np.isfinite(got).all() and (got > 8e6).all()  # the largest scale of f16
    assert kernelgen.round_to_nearest(x[:0], "q8_0", target="numpy").shape == (0, 32)


@pytest.mark.parametrize("formats_", [("q8_0", "q8_0"), ("q8_0", "q4_0"), ("q4_K", "f16")])
def test_caches_keep_what_the_rule_makes_or_search(formats_: tuple[str, str]) -> None:
    rng = np.random.default_rng(5)
    k, v = rng.standard_normal((2, 1, 2, 3, 256)).astype(np.float32)
    for search in (False, True):
        cache = KVCache(
            2, 256, capacity=8, format=formats_[0], value_format=formats_[1], search=search
        )
        cache.append(k, v, target="numpy")
        for x, w in ((k, cache.keys), (v, cache.values)):
            simple = not search and nearest.lacks_rule(w.format) is None
            made = kernelgen.round_to_nearest if simple else kernelgen.quantize
            assert (w.data[:, :, :3] == made(x, w.format).data).all()

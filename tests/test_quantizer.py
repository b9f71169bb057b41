"""The quantizer: accuracy, what it chooses, strange data, strange formats, and its errors."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import dequantize

from kernelgen.errors import FormatError, ShapeError
from kernelgen.ir.block import BlockFormat
from kernelgen.ir.cells import parts_of
from kernelgen.ir.encode import code_table
from kernelgen.ir.evaluate import evaluate
from kernelgen.ir.expr import F32, STORAGES, Expr, bitcast, cast, const, equal, table, var, where
from kernelgen.ir.formats import FORMATS, get
from kernelgen.quantizer import quantize
from kernelgen.quantizer.grids import Grid
from kernelgen.quantizer.plan import plan_of

Array = npt.NDArray[Any]

BLOCKS = [f for f in FORMATS if not f.float_codes]

#: relative error on standard normal data that a careful implementation of ggml's searches reaches
FIGURES = {
    "q4_0": 0.0858, "q4_1": 0.0781, "q5_0": 0.0425, "q5_1": 0.0379, "q8_0": 0.0053,
    "q2_K": 0.296, "q3_K": 0.151, "q4_K": 0.0712, "q5_K": 0.0361, "q6_K": 0.0177,
    "iq4_nl": 0.0761, "mxfp4": 0.115,
    # one scale for 32 or 256 elements: absmax / 127 gives this
    "q8_1": 0.0053, "q8_K": 0.0070,
    # what the best quantizer of single elements errs by whose levels are as many as the format's
    # bits pay for, 2**bits rounded down (J. Max, 1960, table I); of tq2_0, three are used, and q2_0
    # has two on one side of zero
    "q1_0": 0.3634**0.5, "tq1_0": 0.1902**0.5, "tq2_0": 0.1902**0.5, "q2_0": 0.1902**0.5,
    "iq1_s": 0.3634**0.5,
    "iq1_m": 0.1902**0.5, "iq2_xxs": 0.1175**0.5, "iq2_xs": 0.1175**0.5, "iq2_s": 0.07994**0.5,
    "iq3_xxs": 0.03454**0.5, "iq3_s": 0.02293**0.5, "iq4_xs": 0.009497**0.5,
    "nvfp4": 0.009497**0.5,
}  # fmt: skip
#: formats whose codes are chosen together, which takes longer
GRIDS = tuple(f.name for f in FORMATS if not f.float_codes and isinstance(plan_of(f).codes, Grid))
#: the measure is a statistic of 262,144 elements and depends a little on the numpy in use
SLACK = 1.02


def normal(*shape: int) -> npt.NDArray[np.float32]:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def decoded(blocks: Array, fmt: BlockFormat) -> Array:
    values = fmt.decode(blocks.reshape(*blocks.shape[:-1], -1, fmt.nbytes))
    return values.reshape(*blocks.shape[:-1], -1)


def there_and_back(x: Array, fmt: BlockFormat, **options: Any) -> Array:
    return decoded(quantize(x, fmt, **options), fmt)


def relative_error(x: Array, y: Array) -> float:
    x = x.astype(np.float64)
    return float(np.sqrt(np.mean((x - y) ** 2) / np.mean(x**2)))


# ---- accuracy ----------------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", BLOCKS, ids=str)
def test_error_on_normal_data(fmt: BlockFormat) -> None:
    x = normal(64, 4096)[: 4 if fmt.name in GRIDS else 64]
    assert relative_error(x, there_and_back(x, fmt)) < SLACK * FIGURES[fmt.name]


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_an_independent_decoder_agrees(fmt: BlockFormat) -> None:
    x, name = normal(4, 512), fmt.name.upper()
    if name in ("Q8_1", "Q8_K", "Q1_0", "Q2_0"):
        pytest.skip("the gguf package does not decode this format")
    back = dequantize(quantize(x, fmt), GGMLQuantizationType[name])
    limit = SLACK * FIGURES.get(fmt.name, 2**-9)  # bf16 has 8 bits of mantissa, f16 more
    assert relative_error(x, back) < 1.05 * limit  # 1.05: 128 times fewer elements


@pytest.mark.parametrize("fmt", BLOCKS, ids=str)
@pytest.mark.parametrize("power", [3, 9])
def test_powers_of_two_change_nothing(fmt: BlockFormat, power: int) -> None:
    x = normal(2, 1024)
    scaled = there_and_back(np.ldexp(x, power), fmt)
    np.testing.assert_array_equal(np.ldexp(there_and_back(x, fmt), power), scaled)


@pytest.mark.parametrize("fmt", [f for f in BLOCKS if f.name not in GRIDS], ids=str)
def test_codes_are_the_nearest_for_what_is_stored(fmt: BlockFormat) -> None:
    """For the scale and offset that are in the blocks, no other code of any element is better."""
    x = normal(4, 512) * np.float32(0.02)
    blocks = quantize(x, fmt).reshape(-1, fmt.nbytes)
    fields, g = fmt.split(blocks), np.arange(fmt.groups)
    scale, offset = (
        np.broadcast_to(evaluate(e(var("g", fmt.groups)), {"g": g}, fields), (len(blocks), len(g)))
        for e in (fmt.scale_expr, fmt.offset_expr)
    )
    levels = np.array(code_table(fmt) or range(fmt.code_range[0], fmt.code_range[1] + 1))
    levels = levels[: fmt.largest.get("code", 255) + 1]
    if levels[0] == -128:  # a byte's lowest code is not used
        levels = levels[1:]
    possible = scale[..., None] * (levels - fmt.bias) + offset[..., None]
    groups = x.reshape(len(blocks), fmt.groups, fmt.group)
    least = np.abs(groups[..., None] - possible[..., None, :]).min(axis=-1)
    got = np.abs(groups - fmt.decode(blocks).reshape(groups.shape))
    # uneven levels are found in a table of 4096 cells
    tolerance = (np.ptp(levels) / 4096 + 1e-4) * np.abs(scale)
    assert (got - least <= tolerance[..., None]).all()


@pytest.mark.parametrize("name", ["q2_K", "q4_K", "q5_K", "q4_1", "q5_1"])
@pytest.mark.parametrize("sign", [1, -1])
def test_data_far_from_zero_uses_the_offset(name: str, sign: int) -> None:
    fmt = get(name)
    x = sign * np.random.default_rng(1).uniform(10, 11, (8, 512))
    y, steps = there_and_back(x, fmt), fmt.code_range[1]
    # equal steps from 10 to 11 err by 1 / (steps * sqrt(12)); clipping pays for rounded offsets
    assert np.sqrt(np.mean((x - y) ** 2)) < 1.05 / (steps * 12**0.5)
    assert np.abs(x - y).max() < 2.5 / steps


def test_a_byte_never_holds_its_lowest_code() -> None:
    """Kernels may negate codes within a byte."""
    for fmt in (get("q8_0"), get("q8_1"), get("q8_K")):
        codes = fmt.split(quantize(-np.abs(normal(16, 512)), fmt).reshape(-1, fmt.nbytes))["qs"]
        assert codes.min() == -127


def test_what_no_decoder_expects_is_not_written() -> None:
    """The fourth value of two bits for three, and a scale that is no number or has a sign."""
    x = normal(16, 1024) * np.repeat([1, 1e30], 8)[:, None]
    bits = get("tq2_0").split(quantize(x, get("tq2_0")).reshape(-1, 66))["qs"]
    assert max((bits >> shift & 3).max() for shift in (0, 2, 4, 6)) == 2
    assert get("nvfp4").split(quantize(x, get("nvfp4")).reshape(-1, 36))["d"].max() == 0x7E


def test_importance_lowers_the_weighted_error() -> None:
    weights = np.random.default_rng(2).exponential(size=1024) ** 3
    for fmt in BLOCKS:
        x = normal(32, 1024)[: 4 if fmt.name in GRIDS else 32]
        plain = np.mean(weights * (x - there_and_back(x, fmt)) ** 2)
        weighted = np.mean(weights * (x - there_and_back(x, fmt, importance=weights)) ** 2)
        # by 8 bits there is less to choose; a power of two is hardly a choice
        assert weighted < plain * (0.99 if fmt.code_range[1] > 31 else 0.95), fmt.name


@pytest.mark.parametrize("fmt", BLOCKS, ids=str)
def test_importance_that_says_nothing(fmt: BlockFormat) -> None:
    x = normal(4, 512)
    error = relative_error(x, there_and_back(x, fmt))
    for weight in (0.0, 1.0, 1e30):
        same = there_and_back(x, fmt, importance=np.full(512, weight))
        assert relative_error(x, same) == pytest.approx(error, rel=0.01)


def test_columns_without_importance_are_still_quantized() -> None:
    x = normal(4, 512)
    weights = np.ones(512)
    weights[:256] = 0
    for fmt in BLOCKS:
        y = there_and_back(x, fmt, importance=weights)
        assert relative_error(x[:, :256], y[:, :256]) < 1.2 * FIGURES[fmt.name], fmt.name


# ---- strange data ------------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", BLOCKS, ids=str)
@pytest.mark.filterwarnings("error")
class TestStrangeData:
    def test_zeros_stay_zeros(self, fmt: BlockFormat) -> None:
        x = normal(4, 512)
        x[1:3] = 0
        y = there_and_back(x, fmt)
        assert not y[1:3].any()
        assert relative_error(x[[0, 3]], y[[0, 3]]) < 1.2 * FIGURES[fmt.name]

    @pytest.mark.parametrize("value", [5.0, -5.0, 3e-3, 1.0, -60000.0])
    def test_constants(self, fmt: BlockFormat, value: float) -> None:
        y = there_and_back(np.full((2, 256), value), fmt)
        # the best of 15 magnitudes times a power of two may err by a fifth, times four bits of a
        # float by a 32nd; all others reach 11 bits or, with a scale that is an integer times a
        # float, nearly that, as long as the float is no subnormal one
        bound = {"mxfp4": 0.2, "nvfp4": 1 / 32}.get(fmt.name, 4e-3)
        if fmt.name == "nvfp4":
            value = max(value, -12 * 224.0)  # the largest of its numbers
        if fmt.name == "iq4_xs" and value == 3e-3:
            bound = 0.02  # d is 31 * 127 times smaller, a small multiple of 6e-8
        np.testing.assert_allclose(y, value, rtol=bound)

    @pytest.mark.parametrize("magnitude", [1e30, 1e38])
    def test_huge_values_saturate(self, fmt: BlockFormat, magnitude: float) -> None:
        x = np.clip(normal(2, 512), -1, 1) * np.float32(magnitude)
        y = there_and_back(x, fmt)
        assert np.isfinite(y).all()
        if fmt.offset is None:
            big = np.abs(x) > magnitude / 2
            largest = 12 * 224 if fmt.name == "nvfp4" else 65504  # the largest f16
            far = y[big] * np.sign(x[big]) > largest / 4
            # codes that are chosen together are large where most should be
            assert far.all() if fmt.name not in GRIDS else far.mean() > 0.9

    @pytest.mark.parametrize("magnitude", [1e-7, 1e-20, 1e-40])
    def test_tiny_values(self, fmt: BlockFormat, magnitude: float) -> None:
        x = normal(2, 512) * np.float32(magnitude)
        y = there_and_back(x, fmt)
        # f16 is a multiple of 6e-8, which with a K-quant's integer offset and the codes of the
        # table without a zero leaves at most a few of them
        assert np.isfinite(y).all()
        assert np.abs(y - x).max() <= max(3e-7, np.abs(x).max())

    @pytest.mark.parametrize("magnitude", [1e-5, 1e-6])
    def test_scales_that_f16_would_lose(self, fmt: BlockFormat, magnitude: float) -> None:
        """Times its integer a float of a K-quant may be far below 6e-8, the smallest f16."""
        x = normal(4, 512) * np.float32(magnitude)
        # codes of the smallest scale err by 6e-8 / sqrt(12) on their own
        limit = 3 * FIGURES[fmt.name] + 6e-8 / 12**0.5 / magnitude
        if fmt.name == "nvfp4":  # whose smallest number is 2**-10
            limit = 1.0
        assert relative_error(x, there_and_back(x, fmt)) <= limit

    def test_one_large_element(self, fmt: BlockFormat) -> None:
        x = normal(2, 512) * np.float32(1e-3)
        x[:, ::64] = -100
        y = there_and_back(x, fmt)
        if fmt.name in (*GRIDS, "q1_0"):  # of which none has one large code among small ones
            assert relative_error(x, y) < 1
        else:
            assert y[:, ::64] == pytest.approx(-100, rel=0.1)

    def test_negative_rows(self, fmt: BlockFormat) -> None:
        x = -np.abs(normal(8, 512))
        mirrored = relative_error(-x, there_and_back(-x, fmt))
        assert relative_error(x, there_and_back(x, fmt)) == pytest.approx(mirrored, rel=0.1)


def test_shapes_and_types() -> None:
    fmt = get("q4_K")
    x = normal(6, 512)
    expected = quantize(x, fmt)
    assert expected.shape == (6, 288) and expected.dtype == np.uint8
    np.testing.assert_array_equal(quantize(x.reshape(2, 3, 512), fmt), expected.reshape(2, 3, 288))
    np.testing.assert_array_equal(quantize(x[0], fmt), expected[0])
    np.testing.assert_array_equal(quantize(np.asfortranarray(x), fmt), expected)
    np.testing.assert_array_equal(quantize(x.repeat(2, axis=1)[:, ::2], fmt), expected)
    np.testing.assert_array_equal(quantize(x.astype(np.float64), fmt), expected)
    np.testing.assert_array_equal(quantize(x.astype(">f4"), fmt), expected)
    half = x.astype(np.float16)
    np.testing.assert_array_equal(quantize(half, fmt), quantize(half.astype(np.float32), fmt))


def test_input_is_not_changed() -> None:
    x = normal(2, 512)
    for fmt in FORMATS:
        quantize(x, fmt, importance=np.ones(512))
    np.testing.assert_array_equal(x, normal(2, 512))


def test_threads_and_progress() -> None:
    fmt, x = get("q4_1"), normal(300, 1024)
    calls: list[tuple[int, int, int]] = []
    one = quantize(x, fmt, threads=1)
    three = quantize(
        x, fmt, threads=3, progress=lambda *rows: calls.append((*rows, threading.get_ident()))
    )
    np.testing.assert_array_equal(one, three)
    done = [call[0] for call in calls]
    assert len(done) > 1 and done == sorted(set(done)) and done[-1] == 300
    assert {call[1:] for call in calls} == {(300, threading.get_ident())}


def test_an_error_in_progress_ends_the_work() -> None:
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(normal(300, 1024), get("q4_0"), progress=stop)


# ---- formats that store floats -----------------------------------------------------------------

EVERY_HALF = np.arange(1 << 16, dtype=np.uint16)


def test_f32_and_f16_are_conversions() -> None:
    bits = np.random.default_rng(3).integers(0, 1 << 32, 4096, dtype=np.uint32)
    ends = np.array([np.nan, np.inf, -np.inf, -0.0, 65520, 1e-8, 65519], np.float32)
    x = np.concatenate([bits.view(np.float32), ends])[None]
    assert quantize(x, get("f32")).tobytes() == x.tobytes()
    with np.errstate(all="ignore"):
        assert quantize(x, get("f16")).tobytes() == x.astype(np.float16).tobytes()


def test_bf16_rounds_to_nearest_even() -> None:
    values = (EVERY_HALF.astype(np.uint32) << 16).view(np.float32)
    finite = EVERY_HALF[np.isfinite(values)][:-1]
    below = finite[finite & 0x7FFF < 0x7F7F].astype(np.uint32) << 16
    for extra, up in ((0, 0), (0x7FFF, 0), (0x8000, below >> 16 & 1), (0x8001, 1), (0xFFFF, 1)):
        x = (below + np.uint32(extra)).view(np.float32)
        got = quantize(x, get("bf16")).view("<u2")
        np.testing.assert_array_equal(got, (below >> 16) + up)


def test_bf16_at_the_ends() -> None:
    x = np.array([np.nan, -np.nan, np.inf, -np.inf, 3.4e38, 0.0, -0.0], np.float32)
    x = np.append(x, np.array([0x7F800001], np.uint32).view(np.float32))  # NaN in the lower bits
    y = there_and_back(x, get("bf16"))
    inf = np.inf
    np.testing.assert_array_equal(y, [np.nan, np.nan, inf, -inf, inf, 0, 0, np.nan])
    np.testing.assert_array_equal(np.signbit(y[5:7]), [False, True])


# ---- formats nobody has heard of ---------------------------------------------------------------


def described(name: str, fields: dict[str, str], groups: int = 4, **rest: Any) -> BlockFormat:
    """A format with groups of 32, by default 4 of them with 4-bit codes in `qs`, less 8."""
    rest = {
        "code": lambda b, i: (b.qs[16 * (i // 32) + i % 16] >> (4 * (i // 16 % 2))) & 15,
        "scale": lambda b, g: b.d,
        **rest,
    }
    every = {**fields, "qs": f"u8[{16 * groups}]"}
    nbytes = 0
    for text in every.values():
        kind, _, count = text.rstrip("]").partition("[")
        nbytes += STORAGES[kind].nbytes * int(count or 1)
    return BlockFormat(name=name, block=32 * groups, group=32, nbytes=nbytes, fields=every, **rest)


def small_float(byte: Expr) -> Expr:
    """1.mmmm * 2**(xxxx - 11), from a byte xxxxmmmm."""
    return bitcast(F32, (((byte >> 4) + 116) << 23) | ((byte & 15) << 19))


def half_byte(b: Any, g: Expr) -> Any:
    return (b.s[g // 2] >> (4 * (g % 2))) & 15


THREE_BIT = BlockFormat(
    name="three_bit", block=64, group=64, nbytes=26,
    fields={"low": "u8[16]", "d": "f16", "high": "u8[8]"},
    code=lambda b, i: (
        ((b.low[i % 16] >> (2 * (i // 16))) & 3) | (((b.high[i % 8] >> (i // 8)) & 1) << 2)
    ),
    scale=lambda b, g: b.d,
    bias=4,
)  # fmt: skip

#: 16 values of which a normal distribution takes equally many, largest 1
NORMAL_VALUES = (
    -1.0, -0.696, -0.525, -0.395, -0.284, -0.185, -0.091, 0.0,
    0.080, 0.161, 0.246, 0.338, 0.441, 0.563, 0.723, 1.0,
)  # fmt: skip

FOUR_BIT = [
    described("float_per_group", {"d": "f16[4]"}, scale=lambda b, g: b.d[g], bias=8),
    described("float_per_two", {"d": "f32[2]"}, scale=lambda b, g: b.d[g // 2], bias=8),
    described("plain_bytes", {"d": "f16", "s": "i8[4]"}, scale=lambda b, g: b.s[g] * b.d, bias=8),
    described(
        "odd_numbers", {"d": "f16", "s": "u8[2]"}, ints={"sc": half_byte},
        scale=lambda b, g: b.d * (2 * b.sc[g] + 1), bias=8,
    ),
    described(
        "powers", {"d": "f32", "s": "u8[2]"}, ints={"sc": half_byte},
        scale=lambda b, g: -b.d * table((1, 2, 3, 4, 6, 8, 12, 16) * 2, b.sc[g]), bias=8,
    ),
    described("bytes_alone", {"s": "u8[4]"}, scale=lambda b, g: small_float(b.s[g]), bias=8),
    described(
        "bytes_and_float", {"s": "u8[4]", "d": "f32"},
        scale=lambda b, g: b.d * small_float(b.s[g]), bias=8,
    ),
    described(
        "needlessly_wide", {"d": "f16", "s": "u8[4]"}, bias=8, scale=lambda b, g: b.d * b.sc[g],
        ints={"sc": lambda b, g: where(b.s[g] < 8, b.s[g], b.s[g] & 15)},  # 0..255 by intervals
    ),
    described("words", {"s": "u16[4]"}, scale=lambda b, g: cast(F32, b.s[g]) / 65536.0, bias=8),
    described(
        "added_minimum", {"d": "f16", "m": "f16", "s": "i8[4]"}, ints={"mn": lambda b, g: b.s[g]},
        offset=lambda b, g: b.mn[g] * b.m,
    ),
    described(
        "offset_per_group", {"d": "f32[4]", "m": "f16[4]"},
        scale=lambda b, g: b.d[g], offset=lambda b, g: -b.m[g],
    ),
    described(
        "all_of_it", {"d": "f16", "m": "f16", "s": "u8[2]", "t": "u8[4]"}, ints={"sc": half_byte},
        scale=lambda b, g: b.d * (b.sc[g] + 1), offset=lambda b, g: b.m * (b.t[g] - 128), bias=3,
    ),
    described("shifted", {"d": "f16"}, 1, offset=lambda b, g: b.d * -7.5),
    described("constant_offset", {"d": "f16"}, 1, offset=lambda b, g: const(-0.25, F32), bias=8),
    described(
        "signed", {"d": "f16"}, 1,
        code=lambda b, i: ((b.qs[i % 16] >> (4 * (i // 16))) << 28) >> 28,
    ),
    described(
        "float_table", {"d": "f32"}, 1,
        code=lambda b, i: table(NORMAL_VALUES, (b.qs[i % 16] >> (4 * (i // 16))) & 15),
    ),
]  # fmt: skip


def test_a_made_up_three_bit_format() -> None:
    x = normal(64, 4096)
    # 8 equal steps, the same for all elements, err by 0.1935 at best (J. Max, 1960)
    assert relative_error(x, there_and_back(x, THREE_BIT)) < 0.1935
    quiet = x * np.float32(1e-3)
    assert relative_error(quiet, there_and_back(quiet, THREE_BIT)) < 0.1935


@pytest.mark.parametrize("fmt", FOUR_BIT, ids=str)
def test_made_up_formats(fmt: BlockFormat) -> None:
    x = normal(16, 2048)
    # 16 equal steps, the same for all elements, err by 0.1074 at best (J. Max, 1960)
    assert relative_error(x, there_and_back(x, fmt)) < 0.1074
    assert np.isfinite(there_and_back(x * np.float32(1e30), fmt)).all()
    assert np.abs(there_and_back(x * 0, fmt)).max() < 0.26  # the constant offset
    ramp = np.linspace(0.01, 1, 2048, dtype=np.float32) * x
    assert relative_error(ramp, there_and_back(ramp, fmt)) < 0.1074


def test_a_made_up_format_whose_codes_come_in_pairs() -> None:
    """A byte is one of 256 pairs of codes, not all of which there are."""
    pairs = np.random.default_rng(5).integers(0, 32, (256, 2))
    fmt = BlockFormat(
        name="pairs", block=64, group=32, nbytes=34, fields={"d": "f16", "qs": "u8[32]"},
        code=lambda b, i: table(pairs.ravel().tolist(), b.qs[i // 2] * 2 + i % 2),
        scale=lambda b, g: b.d, bias=16,
    )  # fmt: skip
    x = normal(4, 1024)
    # 16 equal steps for each element err by 0.1074 at best (J. Max, 1960); these lie at random, and
    # the mean squared distance to the nearest of n points in a plane is 2 / pi of that in a lattice
    assert relative_error(x, there_and_back(x, fmt)) < 1.5 * 0.1074


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("name", GRIDS)
def test_no_other_codes_of_a_grid_are_nearer(name: str, weighted: bool) -> None:
    """Against all that a group can say, tried one by one, signs included."""
    fmt = get(name)
    rng = np.random.default_rng(6)
    grid = plan_of(fmt).codes
    assert isinstance(grid, Grid)
    y = rng.normal(0, grid.high / 2, (fmt.group, 6)).astype(np.float32)
    w = rng.exponential(size=y.shape).astype(np.float32) if weighted else np.ones_like(y)
    got = grid.nearest(y.copy(), w if weighted else None)
    for column in range(y.shape[1]):
        error = float((w[:, column] * (y[:, column] - got[:, column]) ** 2).sum())
        least = least_error(fmt, y[:, column], w[:, column])
        assert error == pytest.approx(least, rel=1e-4)


def least_error(fmt: BlockFormat, y: Array, w: Array) -> float:
    """The least weighted squared error of a group of codes that the format can say, by trying every
    row, and every pattern of signs, of each run."""
    parts = {part.kind: part.cells[0] for part in parts_of(fmt)}
    if "code" in parts:
        rows = parts["code"].rows.astype(np.float64) - fmt.bias  # (modes, rows, n)
        n = rows.shape[2]
        cost = sum(
            (w[s : s + n] * (y[s : s + n] - rows) ** 2).sum(axis=2).min(axis=1)
            for s in range(0, len(y), n)
        )
        return float(np.min(cost))
    rows = parts["magnitude"].rows[0].astype(np.float64)
    signs = 1 - 2 * parts["sign"].rows[0].astype(np.float64)
    n, m = rows.shape[1], max(signs.shape[1], rows.shape[1])
    if signs.shape[1] == 1:
        signs = 1 - 2.0 * (np.arange(1 << m)[:, None] >> np.arange(m) & 1)
    total = 0.0
    for start in range(0, len(y), m):
        cost = np.zeros(len(signs))
        for s in range(0, m, n):
            at = slice(start + s, start + s + n)
            product = (w[at] * y[at] * signs[:, s : s + n]) @ (2 * rows.T)
            cost -= (product - w[at] @ (rows**2).T).max(axis=1)
        total += cost.min() + (w[start : start + m] * y[start : start + m] ** 2).sum()
    return float(total)


def test_groups_that_share_everything_are_searched_as_one() -> None:
    fmt, x = next(f for f in FOUR_BIT if f.name == "float_per_two"), normal(16, 2048)
    # the mean of the best scales of each gives 0.103
    assert relative_error(x, there_and_back(x, fmt)) < 0.095


def test_a_bias_may_be_written_as_an_offset() -> None:
    x = normal(4, 512)
    same = described("same", {"d": "f16"}, 1, offset=lambda b, g: -(8 * b.d))
    np.testing.assert_array_equal(there_and_back(x, same), there_and_back(x, get("q4_0")))


NO_QUANTIZER: list[BlockFormat] = [
    described("two_floats", {"d": "f16", "e": "f16"}, scale=lambda b, g: b.d * b.e),
    described("squared", {"d": "f16"}, scale=lambda b, g: b.d * b.d),
    described("plus_one", {"d": "f16"}, scale=lambda b, g: b.d + 1.0),
    described("by_group", {"d": "f16"}, scale=lambda b, g: b.d * cast(F32, g + 1)),
    described("backwards", {"d": "f16[4]"}, scale=lambda b, g: b.d[3 - g]),
    described("unnamed", {"s": "u8[2]"}, scale=lambda b, g: cast(F32, half_byte(b, g))),
    described("long", {"s": "u32[4]"}, scale=lambda b, g: cast(F32, b.s[g])),
    described(
        "zero_point", {"d": "f16", "z": "u8[4]"}, offset=lambda b, g: -(b.d * b.z[g])
    ),
    described("other_units", {"d": "f16", "m": "f16[4]"}, offset=lambda b, g: b.m[g]),
    described(
        "bound", {"d": "f16"}, code=lambda b, i: (b.qs[i // 2] + b.qs[(i // 2 + 1) % 64]) >> 1
    ),
    described(
        "signs_bound", {"d": "f16"},
        code=lambda b, i: where(
            equal(b.qs[i // 4] >> 7, 1), 0 - ((b.qs[i // 4] & 15) + 1), (b.qs[i // 4] & 15) + 1
        ),
    ),
    described("scaled_floats", {"d": "f16"}, code=lambda b, i: small_float(b.qs[i // 4])),
]  # fmt: skip


@pytest.mark.parametrize("fmt", NO_QUANTIZER, ids=str)
def test_formats_that_are_not_understood(fmt: BlockFormat) -> None:
    with pytest.raises(FormatError, match=rf"^format {fmt.name} .*[^.\n]$"):
        quantize(normal(2, fmt.block), fmt)


# ---- errors ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (np.zeros((2, 300), np.float32), "rows of 300 elements .* 256"),
        (np.zeros((2, 256), np.int32), "not int32"),
        (np.zeros((2, 256), np.complex64), "not complex64"),
        (np.zeros((0, 256), np.float32), r"shape \(0, 256\)"),
        (np.zeros((2, 0), np.float32), r"shape \(2, 0\)"),
        (np.float32(1), r"shape \(\)"),
    ],
)
def test_wrong_arrays(x: Any, message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        quantize(x, get("q4_K"))


def test_values_that_are_not_finite() -> None:
    x = normal(300, 1024).astype(np.float64)
    x[210, 77], x[210, 78], x[299, 0] = np.nan, np.inf, -1e300
    with pytest.raises(ShapeError, match=r"^3 of 307200 values .* nan in row 210, column 77;"):
        quantize(x, get("q4_0"))


@pytest.mark.parametrize(
    "importance", [np.ones(255), np.ones((1, 256)), -np.ones(256), np.full(256, np.nan), 1.0]
)
def test_wrong_importance(importance: Any) -> None:
    with pytest.raises(ShapeError, match="for each of the 256 columns"):
        quantize(normal(2, 256), get("q6_K"), importance=importance)

"""Formats of other ecosystems: what their blocks mean, their quantizers, and kernels for them."""

from __future__ import annotations

import pickle
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from kernelgen import targets
from kernelgen.errors import FormatError
from kernelgen.ir import formats
from kernelgen.ir.block import BlockFormat
from kernelgen.ir.formats.families import FAMILIES, GROUPS, find, group_of
from kernelgen.ir.steps import steps
from kernelgen.quantizer import quantize
from kernelgen.quantizer.zero_points import zero_point_of
from kernelgen.verify import verify

Array = npt.NDArray[Any]
get = formats.get

KINDS = ("int", "uint", "hqq")
ONE_OF_EACH = ("int2_g32", "int3_g64", "int4_g128", "int8_g32", "uint2_g64", "uint3_g32",
               "uint4_g64", "uint8_g32", "hqq2_g32", "hqq3_g32", "hqq4_g64_f32", "hqq8_g32",
               "int4_g32_f32", "uint4_g8", "int3_g8", "hqq2_g16", "nf4_g64", "fp4_g32",
               "fp8_e4m3_g128", "fp8_e5m2_g32", "mxfp8_e4m3", "mxfp8_e5m2", "mxfp6_e2m3",
               "mxfp6_e3m2")  # fmt: skip


def blocks_of(fmt: BlockFormat, count: int, seed: int = 0) -> Array:
    """Random blocks whose floats are finite."""
    rng = np.random.default_rng(seed)
    fields = fmt.split(rng.integers(0, 256, (count, fmt.nbytes), np.uint8))
    for name, values in fields.items():
        if values.dtype.kind == "f":
            fields[name] = rng.standard_normal(values.shape).astype(values.dtype)
    return fmt.join(fields)


# ---- names -------------------------------------------------------------------------------------


def test_names_are_made_once_and_pickle() -> None:
    assert len(set(FAMILIES)) == len(FAMILIES) > 80
    for name in ONE_OF_EACH:
        fmt = get(name.upper())
        assert fmt.name == name and get(name) is fmt and pickle.loads(pickle.dumps(fmt)) is fmt
        assert fmt not in formats.formats()
    assert set(ONE_OF_EACH) - set(FAMILIES) == {"uint4_g8", "int3_g8", "hqq2_g16"}


@pytest.mark.parametrize("name", ["int5_g32", "int4_g48", "nf4", "nf4_g0", "mxfp6_e2m3_g32", "fp8"])
def test_names_that_are_none(name: str) -> None:
    assert find(name) is None
    with pytest.raises(FormatError, match="families such as int4_g128"):
        get(name)


def test_a_family_cannot_be_registered_or_forgotten() -> None:
    taken = get("f32").written() | {"name": "int4_g64"}
    with pytest.raises(FormatError, match="already registered"):
        formats.register(BlockFormat(**taken))
    get("int4_g64")
    with pytest.raises(FormatError, match="cannot be unregistered"):
        formats.unregister("int4_g64")


def test_the_longest_block_of_a_run() -> None:
    assert [group_of(run) for run in (4096, 192, 96, 48, 24, 12, 1)] == [128, 64, 32, 16, 8, 0, 0]


@pytest.mark.parametrize("name", FAMILIES)
def test_all_decode_packed(name: str) -> None:
    assert steps(get(name)).scalar_because == ()


# ---- values ------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_integers(kind: str, bits: int, group: int) -> None:
    """The bit pictures of kernelgen/ir/formats/groups.py, read bit by bit."""
    fmt = get(f"{kind}{bits}_g{group}")
    blocks = blocks_of(fmt, 5)
    fields = {name: a.astype(np.float64) for name, a in fmt.split(blocks).items()}
    low, high = (fmt.split(blocks).get(name) for name in ("low", "high"))
    assert low is not None
    codes = np.zeros((5, group), np.int64)
    per_byte = {2: 4, 3: 4, 4: 2, 8: 1}[bits]
    for i in range(group):
        part, byte = divmod(i, group // per_byte)
        codes[:, i] = (
            low[:, byte]
            if bits == 8
            else low[:, byte] >> (part * (8 // per_byte)) & (2 ** (8 // per_byte) - 1)
        )
        if high is not None:
            part, byte = divmod(i, group // 8)
            codes[:, i] += (high[:, byte] >> part & 1).astype(np.int64) << 2
    middle = 0 if bits == 8 else 2 ** (bits - 1)
    want = fields["d"] * (codes - fields.get("zero", middle))
    # the products are exact; with a zero point their sum is rounded once
    np.testing.assert_allclose(fmt.decode(blocks), want, rtol=2**-23, atol=1e-12)
    if kind != "hqq":
        np.testing.assert_array_equal(fmt.decode(blocks), want.astype(np.float32))


def minifloat(codes: Array, exponent: int, mantissa: int, bias: int) -> Array:
    """By the definition: sign, exponent, mantissa."""
    sign = codes >> (exponent + mantissa)
    e, m = codes >> mantissa & (2**exponent - 1), (codes & (2**mantissa - 1)) / 2**mantissa
    size = np.where(e == 0, m * 2.0 ** (1 - bias), (1 + m) * 2.0 ** (e - float(bias)))
    return np.where(sign & 1, -size, size)


@pytest.mark.parametrize(
    ("name", "exponent", "mantissa", "bias"),
    [("mxfp8_e4m3", 4, 3, 7), ("mxfp8_e5m2", 5, 2, 15), ("mxfp6_e2m3", 2, 3, 1),
     ("mxfp6_e3m2", 3, 2, 3)],
)  # fmt: skip
def test_microscaled_floats(name: str, exponent: int, mantissa: int, bias: int) -> None:
    """Every code with every scale that keeps float32 from its ends, and the special ones."""
    fmt = get(name)
    bits = 1 + exponent + mantissa
    codes = np.arange(1 << bits).reshape(-1, 32)
    want = minifloat(codes, exponent, mantissa, bias)
    if name == "mxfp8_e4m3":
        want[codes & 127 == 127] = np.nan
    if name == "mxfp8_e5m2":
        want[codes >> 2 & 31 == 31] = np.nan
        want[codes & 127 == 124] = np.inf
        want[codes == 252] = -np.inf
    for scale in (20, 126, 127, 128, 140, 230):
        blocks = np.zeros((len(codes), fmt.nbytes), np.uint8)
        fields = fmt.split(blocks)
        fields["e"][:] = scale
        if bits == 8:
            fields["qs"][:] = codes
        else:
            fields["qs"][:] = codes[:, :16] & 15 | (codes[:, 16:] & 15) << 4
            parts = codes.reshape(-1, 4, 8) >> 4
            fields["qh"][:] = sum(parts[:, n] << 2 * n for n in range(4))
        got = fmt.decode(fmt.join(fields))
        np.testing.assert_array_equal(got, (want * 2.0 ** (scale - 127)).astype(np.float32))
    fields["e"][:] = 255
    assert np.isnan(fmt.decode(fmt.join(fields))).all()


def test_codebooks() -> None:
    """NF4 from the quantiles of the normal distribution (QLoRA), FP4 from its bits."""
    quantile, offset = NormalDist().inv_cdf, 0.9677083
    above = np.array([quantile(p) for p in np.linspace(offset, 0.5, 9)[:-1]])
    below = [-quantile(p) for p in np.linspace(offset, 0.5, 8)[:-1]]
    quantiles = np.sort([*above, 0.0, *below]) / above.max()
    codes = np.arange(16)
    # a sign, two bits of exponent, one of mantissa; 1 is 0.0625 and 3 is 12, in twelfths
    sizes = np.array([0, 0.0625, 8, 12, 4, 6, 2, 3], np.float32) / np.float32(12)
    for name, want in (("nf4_g32", quantiles), ("fp4_g32", np.concatenate([sizes, -sizes]))):
        fmt = get(name)
        fields = fmt.split(np.zeros((1, fmt.nbytes), np.uint8))
        fields["d"][:] = 1
        fields["qs"][:] = codes | codes[::-1] << 4
        np.testing.assert_allclose(fmt.decode(fmt.join(fields))[0, :16], want, atol=2e-7)


# ---- quantizers --------------------------------------------------------------------------------

#: relative error on standard normal data: a little above what was seen, and below what the ends of
#: a group alone give (a range of 5 in 2**bits - 1 steps)
ERRORS = {
    "int4_g128": 0.098, "uint2_g64": 0.36, "uint3_g32": 0.17, "uint4_g64": 0.089,
    "uint8_g32": 0.0052, "hqq2_g32": 0.31, "hqq3_g32": 0.155, "hqq4_g64_f32": 0.088,
    "nf4_g64": 0.087, "fp4_g32": 0.107, "fp8_e4m3_g128": 0.0245, "fp8_e5m2_g32": 0.047,
    "mxfp8_e4m3": 0.027, "mxfp8_e5m2": 0.054, "mxfp6_e2m3": 0.0287, "mxfp6_e3m2": 0.054,
}  # fmt: skip


def there_and_back(x: Array, fmt: BlockFormat, **options: Any) -> Array:
    blocks = quantize(x, fmt, **options)
    return fmt.decode(blocks.reshape(*blocks.shape[:-1], -1, fmt.nbytes)).reshape(x.shape)


@pytest.mark.parametrize("name", ERRORS)
def test_error_on_normal_data(name: str) -> None:
    x = np.random.default_rng(0).standard_normal((16, 1024)).astype(np.float32)
    y = there_and_back(x, get(name))
    assert np.sqrt(np.mean((x - y) ** 2) / np.mean(x**2)) < ERRORS[name]


@pytest.mark.parametrize("name", ["uint4_g32", "hqq4_g32", "uint8_g32_f32", "hqq2_g32_f32"])
def test_zero_points_on_strange_data(name: str) -> None:
    fmt = get(name)
    found = zero_point_of(fmt)
    assert found is not None
    steps_ = found.largest
    rng = np.random.default_rng(1)
    half = "f32" not in name
    for x in (np.zeros((2, 64)), np.full((2, 64), -3.0), rng.uniform(-1, 1, (4, 64)) * 1e-3):
        x = x.astype(np.float32)
        allowed = np.ptp(x, axis=1).max() / steps_ + 2**-10 * np.abs(x).max()
        assert np.abs(there_and_back(x, fmt) - x).max() <= allowed
    extreme = rng.uniform(-1, 1, (2, 64)).astype(np.float32) * np.float32(1e30)
    assert np.isfinite(there_and_back(extreme, fmt)).all() or not half
    if "hqq" in name:  # a float zero point reaches groups that are far from zero
        far = rng.uniform(10, 11, (4, 64)).astype(np.float32)
        assert np.abs(there_and_back(far, fmt) - far).max() < 1.5 / steps_ + 0.01


@pytest.mark.parametrize("name", ["uint3_g32", "hqq3_g32"])
def test_importance_lowers_the_weighted_error(name: str) -> None:
    x = np.random.default_rng(3).standard_normal((64, 256)).astype(np.float32)
    weights = np.random.default_rng(2).exponential(size=256) ** 3
    plain = np.mean(weights * (x - there_and_back(x, get(name))) ** 2)
    weighted = np.mean(weights * (x - there_and_back(x, get(name), importance=weights)) ** 2)
    assert weighted < plain


def test_other_formats_have_no_zero_point() -> None:
    for fmt in (*formats.FORMATS, get("int4_g32"), get("nf4_g32"), get("mxfp6_e2m3")):
        assert zero_point_of(fmt) is None


def test_ends_are_kept_by_symmetric_data() -> None:
    """Codes 0 and 2**bits - 1 are reached, and zero is exact where the zero point is an integer."""
    x = np.linspace(-1, 1, 64, dtype=np.float32)[None] * np.ones((3, 1), np.float32)
    x[:, 31] = 0
    fmt = get("uint4_g64")
    blocks = quantize(x, fmt).reshape(-1, fmt.nbytes)
    codes = np.concatenate([fmt.split(blocks)["low"] & 15, fmt.split(blocks)["low"] >> 4])
    assert codes.min() == 0 and codes.max() == 15
    assert (fmt.decode(blocks)[:, 31] == 0).all()


# ---- kernels -----------------------------------------------------------------------------------

#: for `make test`: target -> formats and ops
SAMPLE = {
    "numpy": (
        ("uint3_g32", "hqq4_g64_f32", "nf4_g64", "fp8_e4m3_g128", "mxfp6_e2m3", "mxfp8_e5m2"),
        ("dequantize", "matvec"),
    ),
    "c": (("uint4_g64", "nf4_g64"), ("matvec",)),
    "opencl": (("hqq3_g32",), ("dequantize", "get_rows")),
    "triton": (("nf4_g64",), ("dequantize",)),
}


def problems(target: str, name: str, ops: tuple[str, ...] = ()) -> list[Any]:
    """What `kernelgen verify` has to say; skips where the target cannot run."""
    manifest = targets.get(target)
    runtime = manifest.reach()
    if reason := runtime.available():
        pytest.skip(reason)
    options: dict[str, Any] = {"ops": ops} if ops else {}
    results = list(verify(manifest, [get(name)], runtime=runtime, **options))
    assert results
    return [(r.op, r.precision, r.problem) for r in results if not r.ok]


@pytest.mark.parametrize(
    ("target", "name"), [(target, name) for target, (names, _) in SAMPLE.items() for name in names]
)
def test_a_sample_of_kernels(target: str, name: str) -> None:
    assert problems(target, name, SAMPLE[target][1]) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ONE_OF_EACH)
@pytest.mark.parametrize("target", targets.NAMES)
def test_all_kernels(target: str, name: str) -> None:
    assert problems(target, name) == []


# ---- the document ------------------------------------------------------------------------------


def test_the_document_has_the_lines_of_descriptions() -> None:
    """Its table says how many lines the descriptions of a family take."""
    root = Path(__file__).resolve().parent.parent
    page = (root / "docs" / "formats-in-planes.md").read_text("utf-8")
    for file in ("groups.py", "small_floats.py"):
        text = (root / "kernelgen" / "ir" / "formats" / file).read_text("utf-8")
        assert f"| `{file}` | {len(text.splitlines())} |" in page, file

"""OpenCL and Metal kernels that know nothing of kernelgen give the right results, and their bugs
are found."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from kernelgen.emulator import Emulator, EmulatorError, Local, emulate
from tests.emulator.tools import needs_clang

pytestmark = needs_clang

FOLDER = Path(__file__).parent
OPENCL = (FOLDER / "kernels.cl").read_text()
METAL = (FOLDER / "kernels.metal").read_text()


@pytest.fixture(scope="module")
def opencl() -> Emulator:
    return Emulator(OPENCL, "opencl", name="kernels.cl", subgroup=16)


@pytest.fixture(scope="module")
def metal() -> Emulator:
    return Emulator(METAL, "metal", name="kernels.metal")


@pytest.fixture(params=[False, True], ids=["plain", "checked"])
def sanitize(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


def marked_lines(text: str, kernel: str) -> set[int]:
    lines = text.splitlines()
    first = next(i for i, s in enumerate(lines) if f" {kernel}(" in s)
    last = next(i for i in range(first, len(lines)) if lines[i] == "}")
    return {i + 1 for i in range(first, last) if "// BUG" in lines[i]}


# ---- OpenCL


@pytest.mark.parametrize("size", [4, 8, 16, 32, 64])
def test_sub_groups_of_every_size(size: int) -> None:
    emulator = Emulator(OPENCL, "opencl", subgroup=size)
    random = np.random.default_rng(0)
    x = random.integers(-8, 9, (21, 128)).astype(np.float16)
    y = np.zeros(21, np.float32)
    groups = -(-21 // (64 // size))
    report = emulator.run("row_sums", groups, 64, [x, y, 128, 21])
    assert report.ok, report
    np.testing.assert_array_equal(y, x.sum(1, dtype=np.float32))

    v, out = random.integers(-9, 9, 64).astype(np.int32), np.zeros((64, 4), np.int32)
    report = emulator.run("shuffles", 1, 64, [v, out])
    assert report.ok, report
    groups_of = v.reshape(-1, size)
    np.testing.assert_array_equal(out[:, 0], v + v[np.arange(64) ^ 1])
    np.testing.assert_array_equal(out[:, 1], groups_of.cumsum(1).reshape(-1))
    np.testing.assert_array_equal(out[:, 2], np.repeat(groups_of[:, 2], size))
    np.testing.assert_array_equal(out[:, 3], out[:, 1] - v)


def test_integer_dot_products(opencl: Emulator) -> None:
    a, b = np.random.default_rng(1).integers(0, 2**32, (2, 128), dtype=np.uint32)
    y = np.zeros(128, np.int32)
    report = opencl.run("dots", 2, 64, [a, b, y])
    assert report.ok, report
    signed_a, signed_b = (v.view(np.int8).reshape(-1, 4).astype(int) for v in (a, b))
    unsigned_a = a.view(np.uint8).reshape(-1, 4).astype(int)
    want = 2 * (signed_a * signed_b).sum(1) + (unsigned_a * signed_b).sum(1) + 100 + 2
    np.testing.assert_array_equal(y, want)


def test_local_memory_of_the_launch(opencl: Emulator, sanitize: bool) -> None:
    x = np.random.default_rng(2).integers(-9, 9, 1000).astype(np.float32)
    total = np.zeros(1, np.int32)
    report = opencl.run("total", 3, 64, [x, total, Local(256), x.size], sanitize=sanitize)
    assert report.ok, report
    assert total[0] == x.sum()


def test_local_memory_of_the_kernel(opencl: Emulator, sanitize: bool) -> None:
    x = np.random.default_rng(3).random((32, 48)).astype(np.float32)
    y = np.zeros((48, 32), np.float32)
    report = opencl.run("transpose", (3, 2), (16, 16), [x, y], sanitize=sanitize)
    assert report.ok, report
    np.testing.assert_array_equal(y, x.T)


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [("missing_barrier", "race"), ("divergent_shuffle", "barrier"), ("unwritten", "uninitialised")],
)
def test_opencl_bugs(opencl: Emulator, kernel: str, kind: str, sanitize: bool) -> None:
    x, y = np.arange(64, dtype=np.float32), np.zeros(64, np.float32)
    args = [x, y, *([Local(256)] if kernel == "unwritten" else [])]
    report = opencl.run(kernel, 1, 64, args, sanitize=sanitize)
    lines = marked_lines(OPENCL, kernel)
    assert any(f.kind == kind and f.line in lines for f in report.findings), report


def test_address_spaces_are_checked() -> None:
    text = "__kernel void f(__global float *x) { __local float *p = x; p[0] = 1; }"
    with pytest.raises(EmulatorError, match="cannot initialize a variable of type '__local float"):
        emulate(text, "f", 1, 1, [np.zeros(1, np.float32)], language="opencl")


# ---- Metal


def test_metal_matrix_times_vector(metal: Emulator, sanitize: bool) -> None:
    random = np.random.default_rng(4)
    rows, k = 5, 2048
    blocks = np.zeros((rows, k // 32), np.dtype([("d", "f2"), ("qs", "i1", 32)]))
    blocks["d"] = random.random((rows, k // 32))
    blocks["qs"] = random.integers(-127, 128, (rows, k // 32, 32))
    x, y = random.standard_normal(k).astype(np.float32), np.zeros(rows, np.float32)
    sizes = np.array([rows, k], np.uint32)
    report = metal.run("mul_mv_q8_0", 3, 64, [blocks, x, y, sizes], sanitize=sanitize)
    assert report.ok, report
    weights = (blocks["d"].astype(np.float64)[..., None] * blocks["qs"]).reshape(rows, k)
    np.testing.assert_allclose(y, weights @ x.astype(np.float64), rtol=1e-4, atol=1e-2)


def test_metal_matrix_product(metal: Emulator, sanitize: bool) -> None:
    random = np.random.default_rng(5)
    m, n, k = 64, 32, 48
    a, b = random.standard_normal((m, k)).astype("f2"), random.standard_normal((k, n)).astype("f2")
    c = np.zeros((m, n), np.float32)
    args = [a, b, c, n, k, Local(32 * 16 * 2)]
    report = metal.run("mul_mm", (n // 32, m // 32), 128, args, sanitize=sanitize)
    assert report.ok, report
    np.testing.assert_allclose(c, a.astype(np.float64) @ b.astype(np.float64), atol=1e-4)


def test_metal_softmax(metal: Emulator, sanitize: bool) -> None:
    x = np.random.default_rng(6).standard_normal((3, 520)).astype(np.float32)
    y, done = np.zeros((3, 520), np.uint16), np.zeros(1, np.uint32)
    report = metal.run("softmax", 3, 128, [x, y, done, 520], sanitize=sanitize)
    assert report.ok, report
    got = (y.astype(np.uint32) << 16).view(np.float32)
    want = np.exp(x) / np.exp(x).sum(1, keepdims=True)
    np.testing.assert_allclose(got, want, rtol=2**-8)
    assert done[0] == 3


def test_metal_atomics_of_a_threadgroup(metal: Emulator, sanitize: bool) -> None:
    x = np.random.default_rng(7).integers(0, 256, 5000).astype(np.uint8)
    counts = np.zeros(64, np.uint32)
    report = metal.run("histogram", 3, 96, [x, counts, x.size], sanitize=sanitize)
    assert report.ok, report
    np.testing.assert_array_equal(counts, np.bincount(x & 63, minlength=64))


def test_metal_shuffles(metal: Emulator, sanitize: bool) -> None:
    x = np.random.default_rng(8).integers(-99, 99, (3, 2 * 160)).astype(np.int32)
    y = np.zeros_like(x)
    report = metal.run("running_sums", 3, 160, [x, y], sanitize=sanitize)
    assert report.ok, report
    np.testing.assert_array_equal(y, x.cumsum(1))


def test_metal_tiles_loaded_ahead(metal: Emulator, sanitize: bool) -> None:
    random = np.random.default_rng(9)
    m, n, k = 32, 48, 80
    a, b = random.integers(-8, 9, (m, k)), random.integers(-8, 9, (n, k))
    # small integers are exact in bfloat, which is the upper half of a float
    halves = [(v.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16) for v in (a, b)]
    c = np.full((m, n), np.nan, np.float32)
    args = [*halves, c, np.array([n, k], np.uint32)]
    report = metal.run("mul_mm_ahead", (n // 16, m // 16), 32, args, sanitize=sanitize)
    assert report.ok, report
    np.testing.assert_array_equal(c, a @ b.T)


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("missing_barrier", "race"), ("early_return", "barrier"), ("too_far", "bounds"),
        ("some_lanes", "barrier"), ("tile_of_another", "race"),
    ],
)  # fmt: skip
def test_metal_bugs(metal: Emulator, kernel: str, kind: str, sanitize: bool) -> None:
    x, y = np.arange(64, dtype=np.float32), np.zeros(64, np.float32)
    report = metal.run(kernel, 1, 64, [x, y], sanitize=sanitize)
    lines = marked_lines(METAL, kernel)
    assert any(f.kind == kind and f.line in lines for f in report.findings), report


def test_an_unknown_language() -> None:
    with pytest.raises(EmulatorError, match="'hlsl' is not one of cuda, opencl, metal"):
        Emulator("", "hlsl")


def test_a_subgroup_that_no_device_has() -> None:
    with pytest.raises(EmulatorError, match="a subgroup of 24 lanes"):
        Emulator(OPENCL, "opencl", subgroup=24)

"""CUDA kernels that know nothing of kernelgen give the right results."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from kernelgen.emulator import Emulator, emulate
from tests.emulator.test_ptx import all_text
from tests.emulator.tools import needs_compiler

pytestmark = needs_compiler

FOLDER = Path(__file__).parent


@pytest.fixture(scope="module")
def cuda() -> Emulator:
    return Emulator((FOLDER / "kernels.cu").read_text(), name="kernels.cu")


@pytest.fixture(params=[False, True], ids=["plain", "checked"])
def sanitize(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


def test_scan(cuda: Emulator, sanitize: bool) -> None:
    x = np.random.default_rng(0).integers(-50, 50, 700).astype(np.int32)
    y = np.zeros_like(x)
    report = cuda.run("scan", 3, 256, [x, y, x.size], sanitize=sanitize)
    assert report.ok, report
    want = np.concatenate([x[i : i + 256].cumsum() for i in range(0, 700, 256)])
    np.testing.assert_array_equal(y, want)


def test_matmul_on_tensor_cores(cuda: Emulator, sanitize: bool) -> None:
    random = np.random.default_rng(1)
    m, n, k = 128, 64, 96
    a = random.standard_normal((m, k)).astype(np.float16)
    b = random.standard_normal((k, n)).astype(np.float16)
    c = np.zeros((m, n), np.float32)
    report = cuda.run("matmul", (n // 64, m // 64), 128, [a, b, c, m, n, k], sanitize=sanitize)
    assert report.ok, report
    np.testing.assert_allclose(c, a.astype(np.float64) @ b.astype(np.float64), atol=1e-4)


def test_reduction(cuda: Emulator, sanitize: bool) -> None:
    x = np.random.default_rng(2).random(5000).astype(np.float32)
    total, largest = np.zeros(1, np.float32), np.zeros(1, np.int32)
    report = cuda.run(
        "reduce", 7, 256, [x, total, largest, x.size], shared_bytes=1024, sanitize=sanitize
    )
    assert largest.view(np.float32)[0] == x.max()
    np.testing.assert_allclose(total[0], x.astype(np.float64).sum(), rtol=1e-5)
    assert report.ok, report


def test_histogram(cuda: Emulator, sanitize: bool) -> None:
    x = np.random.default_rng(3).integers(0, 256, 3000).astype(np.uint8)
    bins = np.zeros(256, np.uint32)
    report = cuda.run("histogram", 4, 96, [x, bins, x.size], sanitize=sanitize)
    assert report.ok, report
    np.testing.assert_array_equal(bins, np.bincount(x, minlength=256))


@pytest.mark.parametrize("workers", [1, 3])
def test_blocks_that_wait_for_each_other(cuda: Emulator, sanitize: bool, workers: int) -> None:
    """Also if later blocks begin first, and in several processes: all blocks are resident."""
    turn, values = np.zeros(1, np.int32), np.zeros(20, np.int32)
    drawn = np.zeros(20, np.uint32)
    report = cuda.run("in_turn", 20, 64, [turn, values, drawn], workers=workers, sanitize=sanitize)
    assert report.ok, report
    np.testing.assert_array_equal(values, np.arange(1, 21).cumsum())
    assert drawn.all()


def test_barriers_of_some_threads(cuda: Emulator, sanitize: bool) -> None:
    x, y = np.arange(128, dtype=np.int32) ** 2, np.zeros(128, np.int32)
    report = cuda.run("pairs", 1, 128, [x, y], sanitize=sanitize)
    assert report.ok, report
    turned = x.reshape(2, 64)[:, ::-1].reshape(-1)
    np.testing.assert_array_equal(y, turned + np.repeat(turned[::32], 32))


def test_votes(cuda: Emulator, sanitize: bool) -> None:
    x = np.random.default_rng(4).integers(-2, 3, 64).astype(np.int32)
    y = np.zeros((5, 64), np.uint32)
    report = cuda.run("votes", 1, 64, [x, y], sanitize=sanitize)
    assert report.ok, report
    for t in range(64):
        warp, lane = x[t // 32 * 32 :][:32], t % 32
        assert y[0, t] == sum(1 << i for i in range(32) if warp[i] > 0)
        assert y[1, t] == sum(1 << i for i in range(32) if warp[i] == x[t])
        want = int(warp[:8].sum() if lane < 8 else warp[8])
        assert y[2, t] == want % 2**32
        assert y[3, t] == (int(x[t ^ 1]) + 100 * (t % 4)) % 2**32
    assert (y[4] == (x > 0).sum() * 10 + 1).all()


def test_small_floats(cuda: Emulator) -> None:
    random = np.random.default_rng(5)
    h = random.standard_normal((32, 2)).astype(np.float16)
    exact = random.integers(-100, 100, (32, 2)) / 16
    b = (exact.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    y = np.zeros((32, 4), np.float32)
    report = cuda.run("small_floats", 1, 32, [h, b, y])
    assert report.ok, report
    wide = h.astype(np.float64)
    np.testing.assert_array_equal(y[:, 0], (wide[:, 0] * 0.5 + 1).astype(np.float16))
    np.testing.assert_array_equal(y[:, 1], (wide[:, 1] * 0.5 + wide[:, 0]).astype(np.float16))
    np.testing.assert_allclose(y[:, 2], exact[:, 0] + 3, rtol=2**-8)
    np.testing.assert_allclose(y[:, 3], exact[:, 1] + 3 + h[:, 0] * h[:, 1], rtol=2**-7, atol=0.02)


def test_integers(cuda: Emulator) -> None:
    random = np.random.default_rng(6)
    a = random.integers(-(2**31), 2**31, 32).astype(np.int32)
    b = random.integers(0, 2**32, 32, dtype=np.uint32)
    y = np.zeros((32, 4), np.int32)
    report = cuda.run("integers", 1, 32, [a, b, y])
    assert report.ok, report
    bytes_a, bytes_b = (v.view(np.int8).reshape(-1, 4).astype(int) for v in (a, b))
    np.testing.assert_array_equal(y[:, 0], (bytes_a * bytes_b).sum(1) + 7)
    both = np.concatenate([a.view(np.uint8).reshape(-1, 4), b.view(np.uint8).reshape(-1, 4)], 1)
    np.testing.assert_array_equal(
        y[:, 1].copy().view(np.uint8).reshape(-1, 4), both[:, [1, 2, 5, 6]]
    )
    want = np.clip(bytes_a - bytes_b, -128, 127).astype(np.int8)
    np.testing.assert_array_equal(y[:, 2].copy().view(np.int8).reshape(-1, 4), want)


def test_a_template_and_a_struct(cuda: Emulator) -> None:
    """A pointer inside a struct stays the caller's own, and can be read."""
    x, y, bias = np.arange(40, dtype="f4"), np.zeros(40, "f4"), np.full(40, 0.5, "f4")
    struct = np.zeros(1, np.dtype([("scale", "f4"), ("shift", "i4"), ("bias", "u8")]))
    struct[0] = (2, 3, bias.ctypes.data)
    report = cuda.run("affine<float, 40>", 1, 16, [x, y, struct])
    assert report.ok, report
    np.testing.assert_array_equal(y, x * 2 + 3.5)


def test_text_is_compiled_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In one process and in the next: the library lies in the cache."""
    text = 'extern "C" __global__ void f(int* x) { x[threadIdx.x] += 1; }'
    x = np.zeros(32, np.int32)
    monkeypatch.setenv("KERNELGEN_CACHE", str(tmp_path))
    for _ in range(3):
        assert emulate(text, "f", 1, 32, [x]).ok
    assert x.tolist() == [3] * 32
    assert len(list(tmp_path.glob("emulator/kernel-*.so"))) == 1


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("nvcc"), reason="nvcc is not installed")
@pytest.mark.parametrize("name", ["kernels.cu", "ptx.cu"])
def test_the_kernels_here_are_cuda(tmp_path: Path, name: str) -> None:
    """NVIDIA's own compiler takes what the emulator is tested with."""
    path = FOLDER / name
    if name == "ptx.cu":
        path = tmp_path / name
        path.write_text(all_text())
    command = ["nvcc", "-arch=sm_90", "-cubin", "-o", str(tmp_path / "out.cubin"), str(path)]
    subprocess.run(command, check=True, timeout=120)

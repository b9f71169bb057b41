"""What users call: `kernelgen.matmul` and its neighbours, through the machine's own target."""

from __future__ import annotations

import threading

import numpy as np
import pytest

import kernelgen
from kernelgen.errors import ConfigError, FormatError, ShapeError, TargetError

RNG = np.random.default_rng(5)
N, K = 24, 512


@pytest.fixture(scope="module")
def w() -> kernelgen.QuantTensor:
    return kernelgen.quantize(RNG.standard_normal((N, K), np.float32), "q4_K")


def product(x: np.ndarray, w: kernelgen.QuantTensor) -> np.ndarray:
    return np.asarray(x, np.float64) @ w.dequantize().astype(np.float64).T


def error(y: np.ndarray, want: np.ndarray) -> float:
    return float(np.sqrt(np.mean((y - want) ** 2) / np.mean(want**2)))


@pytest.mark.parametrize("shape", [(K,), (1, K), (9, K), (2, 3, K), (2, 2, 2, 2, K)])
@pytest.mark.parametrize(("precision", "bound"), [("fp32", 1e-5), ("int8", 0.02), ("auto", 0.02)])
def test_matmul(
    w: kernelgen.QuantTensor, shape: tuple[int, ...], precision: str, bound: float
) -> None:
    x = RNG.standard_normal(shape, np.float32)
    y = kernelgen.matmul(x, w, precision=precision)
    assert y.shape == (*shape[:-1], N) and y.dtype == np.float32
    assert error(y, product(x, w)) < bound


def test_half_precision_comes_back_as_half(w: kernelgen.QuantTensor) -> None:
    x = RNG.standard_normal((3, K)).astype(np.float16)
    y = kernelgen.matmul(x, w, precision="fp32")
    assert y.dtype == np.float16 and error(y, product(x, w)) < 1e-3


def test_strided_activations(w: kernelgen.QuantTensor) -> None:
    x = RNG.standard_normal((8, 2 * K), np.float32)[::2, ::2]
    assert error(kernelgen.matmul(x, w, precision="fp32"), product(x, w)) < 1e-5


def test_into_out(w: kernelgen.QuantTensor) -> None:
    x = RNG.standard_normal((2, 3, K), np.float32)
    out = np.full((2, 3, N), np.nan, np.float32)
    assert kernelgen.matmul(x, w, out=out) is out
    np.testing.assert_array_equal(out, kernelgen.matmul(x, w))
    half = np.zeros((2, 3, N), np.float16)
    kernelgen.matmul(x.astype(np.float16), w, out=half)
    assert error(half, product(x, w)) < 0.02


def test_no_rows(w: kernelgen.QuantTensor) -> None:
    assert kernelgen.matmul(np.empty((0, K), np.float32), w).shape == (0, N)
    assert kernelgen.matmul(np.ones((2, K), np.float32), w[:0]).shape == (2, 0)


def test_what_is_not_finite_stays_in_its_row(w: kernelgen.QuantTensor) -> None:
    x = RNG.standard_normal((4, K), np.float32)
    x[1, 7], x[2, 300] = np.nan, np.inf
    for precision in ("fp32", "int8"):
        y = kernelgen.matmul(x, w, precision=precision)
        assert np.isfinite(y[[0, 3]]).all() and not np.isfinite(y[1]).any()
        assert not np.isfinite(y[2]).any()


@pytest.mark.parametrize(
    ("x", "options", "kind", "text"),
    [
        (np.ones((2, K + 1), np.float32), {}, ShapeError, "x needs 512 columns"),
        (np.ones((), np.float32), {}, ShapeError, "x needs 512 columns"),
        (np.ones((2, K)), {}, ShapeError, "float32 or float16, not float64"),
        (np.ones((2, K), np.float32), {"precision": "fp8"}, ConfigError, "allowed are fp32"),
        (np.ones((2, K), np.float32), {"target": "abacus"}, TargetError, "known are numpy, c"),
        (
            np.ones((2, K), np.float32), {"out": np.empty((2, N + 1), np.float32)},
            ShapeError, r"shape \(2, 24\)",
        ),
        (np.ones((2, K), np.float32), {"out": np.empty((2, N))}, ShapeError, "float64"),
    ],
)  # fmt: skip
def test_wrong_input(
    w: kernelgen.QuantTensor,
    x: np.ndarray,
    options: dict[str, object],
    kind: type[Exception],
    text: str,
) -> None:
    with pytest.raises(kind, match=text):
        kernelgen.matmul(x, w, **options)  # type: ignore[arg-type]


def test_a_stack_is_not_a_matrix() -> None:
    stack = kernelgen.quantize(RNG.standard_normal((2, 4, 64), np.float32), "q8_0")
    with pytest.raises(ShapeError, match="takes one of a stack"):
        kernelgen.matmul(np.ones((1, 64), np.float32), stack)
    assert kernelgen.matmul(np.ones((1, 64), np.float32), stack[1]).shape == (1, 4)


def test_floats_have_no_integer_walk() -> None:
    w = kernelgen.quantize(RNG.standard_normal((3, 8), np.float32), "f16")
    with pytest.raises(TargetError, match="floats, which have no integer dot product"):
        kernelgen.matmul(np.ones((1, 8), np.float32), w, precision="int8")


def test_get_rows(w: kernelgen.QuantTensor) -> None:
    ids = np.array([[0, 23], [5, 5]])
    np.testing.assert_array_equal(kernelgen.get_rows(w, ids), w.dequantize()[ids])
    for wrong in ([24], [-1]):
        with pytest.raises(ShapeError, match=r"rows 0\.\.23"):
            kernelgen.get_rows(w, np.array(wrong))


def test_dequantize_is_exact(w: kernelgen.QuantTensor) -> None:
    np.testing.assert_array_equal(kernelgen.dequantize(w), w.dequantize())


def test_prepared_once(w: kernelgen.QuantTensor) -> None:
    fresh = w[:8]
    kernelgen.prepare(fresh)
    before = dict(fresh.prepared)
    kernelgen.matmul(np.ones((1, K), np.float32), fresh)
    assert before and dict(fresh.prepared).keys() == before.keys()


def test_many_threads_at_once(w: kernelgen.QuantTensor) -> None:
    """First use included: a tensor that nobody prepared."""
    fresh = w[:16]
    x = RNG.standard_normal((8, 2, K), np.float32)
    results: list[np.ndarray | None] = [None] * 8

    def work(i: int) -> None:
        for _ in range(20):
            results[i] = kernelgen.matmul(x[i], fresh)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    for i, y in enumerate(results):
        assert y is not None and error(y, product(x[i], fresh)) < 0.02


def test_names() -> None:
    assert "q4_K" in kernelgen.formats() and kernelgen.targets()[:2] == ["numpy", "c"]
    source = kernelgen.source("matvec", "Q4_K", target="c", precision="int8")
    assert "dot_unsigned" in source and source == kernelgen.source("matvec", "q4_k", "c")
    wider = kernelgen.source("matvec", "q4_K", "c", {"columns": 2}, "int8")
    assert "COLUMNS = 2" in wider
    with pytest.raises(ConfigError, match="columns=7 was asked for"):
        kernelgen.source("matvec", "q4_K", "c", {"columns": 7})
    with pytest.raises(FormatError, match="known are f32"):
        kernelgen.source("matvec", "q9_K", "c")
    with pytest.raises(AttributeError):
        _ = kernelgen.nothing

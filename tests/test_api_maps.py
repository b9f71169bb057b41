"""kernelgen.map and the ops between matmuls: what they compute, in numpy's words, and what they
refuse."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest

import kernelgen
from kernelgen import api_maps, ir
from kernelgen.errors import KernelgenError, TargetError
from kernelgen.ir.ops import rope as turning
from tests.map_cases import gelu, gelu_tanh, layer_norm, rms_norm, sigmoid, silu, softmax, turned

Array = npt.NDArray[Any]

RNG = np.random.default_rng(0)
X, Y = RNG.standard_normal((2, 4, 3, 22)).astype(np.float32)
W, B = RNG.standard_normal((2, 22)).astype(np.float32)
WIDE, OTHER = X.astype(np.float64), Y.astype(np.float64)


@pytest.fixture(params=["numpy", pytest.param("c", marks=pytest.mark.slow)], autouse=True)
def target(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The target that serves where none is asked for."""
    name: str = request.param
    monkeypatch.setattr(api_maps.api, "default_target", lambda: name)
    return name


def close(got: Any, want: Any, bound: float = 2e-6) -> None:
    assert got.shape == np.shape(want)
    np.testing.assert_allclose(got.astype(np.float64), want, rtol=bound, atol=bound)


# ---- element by element


def test_functions_of_elements() -> None:
    wanted: dict[Callable[[Any], Any], Array] = {
        kernelgen.silu: silu(WIDE), kernelgen.gelu: gelu(WIDE), kernelgen.sigmoid: sigmoid(WIDE),
        kernelgen.tanh: np.tanh(WIDE), kernelgen.relu: np.maximum(WIDE, 0),
    }  # fmt: skip
    for function, want in wanted.items():
        got = function(X)
        assert got.dtype == np.float32
        close(got, want)
    close(kernelgen.gelu(X, approximate="tanh"), gelu_tanh(WIDE))
    close(kernelgen.swiglu(X, Y), silu(WIDE) * OTHER)
    close(kernelgen.geglu(X, Y, approximate="tanh"), gelu_tanh(WIDE) * OTHER)


def test_a_function_is_traced_once_for_arrays_of_a_kind() -> None:
    traced = []

    def five(x: Any, y: Any) -> Any:
        traced.append(x)
        return kernelgen.silu(x) * y + kernelgen.tanh(x - 0.5)

    function = kernelgen.map(five)
    for _ in range(2):
        close(function(X, Y), silu(WIDE) * OTHER + np.tanh(WIDE - 0.5))
    assert len(traced) == 1 and function.__name__ == "five"
    close(function(X[0], Y[1]), silu(WIDE[0]) * OTHER[1] + np.tanh(WIDE[0] - 0.5))
    assert len(traced) == 1
    function(X.astype(np.float16), Y)
    assert len(traced) == 2


def test_any_name_will_do() -> None:
    """Also those of kernels' own values, of languages' words, and of other alphabets."""
    function = kernelgen.map(
        lambda stored0, x_row, row, float, λ: stored0 + x_row * row - float * λ
    )
    got = function(X, Y, W, B, np.float32(2))
    np.testing.assert_allclose(got, X + Y * W - B * np.float32(2), rtol=1e-5, atol=1e-6)


BROADCASTS: tuple[tuple[Any, Any], ...] = (
    (X, W), (X, X[:, :1]), (X, X[..., :1]), (X[:, 0], X[0, 0]), (X.T, Y.T), (X[::2, :, ::3], 2.5),
    (X[:, ::-1], Y), (X[0, 0, 0], Y), (X.transpose(1, 0, 2), Y[:1].transpose(1, 0, 2)),
    (X[:, None], Y[:, :, None]), (np.asfortranarray(X[0]), Y[0]), (X[:0], W), (np.float32(3), X),
)  # fmt: skip


@pytest.mark.parametrize("number", range(len(BROADCASTS)))
def test_arrays_broadcast(number: int) -> None:
    x, y = BROADCASTS[number]
    got = kernelgen.add(x, y)
    np.testing.assert_array_equal(got, np.asarray(x + y, np.float32))


def test_types_of_results() -> None:
    half = X.astype(np.float16)
    assert kernelgen.silu(half).dtype == np.float16
    assert kernelgen.mul(half, X).dtype == np.float32
    assert kernelgen.silu(X.astype(ml_dtypes.bfloat16)).dtype == ml_dtypes.bfloat16
    bytes_ = np.arange(250, 256, dtype=np.uint8)
    wrapped = kernelgen.add(bytes_, bytes_)
    assert wrapped.dtype == np.uint8 and np.array_equal(wrapped, bytes_ + bytes_)
    below = kernelgen.map(lambda x, y: (x < y, ir.where(x < y, x, y)))
    less, least = below(X, Y)
    assert less.dtype == np.bool_ and np.array_equal(less, X < Y)
    assert np.array_equal(least, np.minimum(X, Y))
    whole = kernelgen.map(lambda x: x * 100.0, dtype="i8")(X)
    assert np.array_equal(whole, np.clip(np.trunc(X * np.float32(100)), -128, 127))


@pytest.mark.parametrize("dtype", ["f16", "bf16", np.float32])
def test_results_are_kept_in_a_type_that_is_asked_for(dtype: Any) -> None:
    """Computed in float32 and rounded once."""
    small = X.astype(np.float16)
    wanted = api_maps.numpy_dtype(api_maps.type_of(dtype))
    for name in ("silu", "gelu", "relu", "sigmoid", "tanh"):
        function = getattr(kernelgen, name)
        got = function(small, dtype=dtype)
        assert got.dtype == wanted
        exact = function(small.astype(np.float32))
        assert np.array_equal(got, exact.astype(wanted)), name
    for name in ("add", "mul", "swiglu", "geglu"):
        function = getattr(kernelgen, name)
        got, exact = function(small, Y, dtype=dtype), function(small.astype(np.float32), Y)
        assert got.dtype == wanted and np.array_equal(got, exact.astype(wanted)), name


def test_casts() -> None:
    for dtype in (np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2):
        got = kernelgen.cast(X, dtype)
        want = X.astype(dtype)
        assert got.dtype == want.dtype and got.tobytes() == want.tobytes()
        back = kernelgen.cast(got, "f32")
        assert np.array_equal(back, want.astype(np.float32))
    assert kernelgen.cast(X, "f16").dtype == np.float16


def test_results_may_be_written_into_an_input() -> None:
    x = X.copy()
    assert kernelgen.silu(x, out=x) is x
    close(x, silu(WIDE))
    with pytest.raises(KernelgenError, match="it must be contiguous"):
        kernelgen.silu(X, out=np.empty((4, 3, 21), np.float32))
    with pytest.raises(KernelgenError, match="it must be contiguous"):
        kernelgen.silu(X, out=np.empty((4, 3, 22), np.float16))


def test_large_arrays_come_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api_maps, "_PIECE", 50)
    np.testing.assert_array_equal(kernelgen.add(X, Y), X + Y)  # one row
    np.testing.assert_array_equal(kernelgen.mul(X, W), X * W)  # many
    sunk = softmax(WIDE.reshape(12, 22), None, np.tile(W[:3].astype(np.float64), 4))
    close(kernelgen.softmax(X, sinks=W[:3]), sunk.reshape(X.shape))
    close(kernelgen.rms_norm(X, W), rms_norm(WIDE, W))
    places = np.arange(12).reshape(4, 3)
    want = turned(WIDE.reshape(12, 22), places.reshape(-1), turning.frequencies(22), False)
    close(kernelgen.rope(X, places), want.reshape(X.shape))


# ---- rows


def test_softmax() -> None:
    close(kernelgen.softmax(X), softmax(WIDE))
    close(kernelgen.softmax(X, scale=0.3, mask=Y), softmax(0.3 * WIDE + OTHER))
    seen = Y > -1
    close(kernelgen.softmax(X, mask=seen), softmax(WIDE, seen))
    close(kernelgen.softmax(X, mask=seen[0, :1].astype(np.int32)), softmax(WIDE, seen[0, :1]))
    assert kernelgen.softmax(X.astype(np.float16)).dtype == np.float16
    assert kernelgen.softmax(X[:0]).shape == (0, 3, 22)


def test_norms() -> None:
    close(kernelgen.rms_norm(X, W), rms_norm(WIDE, W))
    close(kernelgen.rms_norm(X), rms_norm(WIDE, np.ones(1)))
    got, total = kernelgen.rms_norm(X, W, residual=Y)
    close(got, rms_norm(WIDE + OTHER, W))
    np.testing.assert_array_equal(total, X + Y)
    close(kernelgen.layer_norm(X, W, B), layer_norm(WIDE, W, B))
    got, total = kernelgen.layer_norm(X[..., ::2], residual=Y[..., ::2])
    close(got, layer_norm(WIDE[..., ::2] + OTHER[..., ::2], np.ones(1), np.zeros(1)))
    close(kernelgen.rms_norm(X * 1e4, eps=1.0), rms_norm(WIDE * 1e4, np.ones(1)))


def test_extremes_and_sums() -> None:
    whole = RNG.integers(-9, 9, (5, 40)).astype(np.int32)
    for x in (X, whole):
        np.testing.assert_array_equal(kernelgen.row_max(x), x.max(-1))
        np.testing.assert_array_equal(kernelgen.row_min(x), x.min(-1))
        np.testing.assert_array_equal(kernelgen.argmax(x), x.argmax(-1))
        close(kernelgen.row_sum(x), x.sum(-1, dtype=np.float64))
        values, places = kernelgen.topk(x, 3)
        order = np.argsort(-x, axis=-1, kind="stable")[..., :3]
        np.testing.assert_array_equal(places, order)
        np.testing.assert_array_equal(values, np.take_along_axis(x, order, -1))


# ---- rotary positions


@pytest.mark.parametrize("pairing", ["half", "neighbours"])
def test_rope(pairing: str) -> None:
    places = np.array([0, 1, 77, 131_071, 2**20])
    x = RNG.standard_normal((2, 5, 32)).astype(np.float32)
    want = x.astype(np.float64)
    angles = turning.frequencies(24, 5e5)
    for batch in want:
        batch[:, :24] = turned(batch[:, :24], places, angles, pairing == "neighbours")
    close(kernelgen.rope(x, places, dims=24, base=5e5, pairing=pairing), want)


def test_positions_are_those_of_the_last_axis_but_one() -> None:
    want = turned(WIDE, np.arange(3), turning.frequencies(22), False)
    close(kernelgen.rope(X), want)
    first_heads = X.transpose(1, 0, 2)  # positions, heads
    close(kernelgen.rope(first_heads, np.arange(3)[:, None]), want.transpose(1, 0, 2))


def test_scaling() -> None:
    """By formulas of the papers and of Llama's reference code, written anew."""
    plain = 10000.0 ** (-np.arange(0, 64, 2) / 64)
    np.testing.assert_allclose(turning.frequencies(64), plain)
    np.testing.assert_allclose(turning.frequencies(64, scaling=kernelgen.Linear(4)), plain / 4)
    found = turning.frequencies(64, scaling=kernelgen.Llama3(8, 8192))
    for one, f in zip(found, plain, strict=True):
        wave = 2 * math.pi / f
        smooth = (8192 / wave - 1) / (4 - 1)
        mixed = (1 - smooth) * f / 8 + smooth * f
        want = f / 8 if wave > 8192 else f if wave < 8192 / 4 else mixed
        assert one == pytest.approx(want)
    found = turning.frequencies(64, scaling=kernelgen.Yarn(16, 4096))
    low = math.floor(64 * math.log(4096 / (32 * 2 * math.pi)) / (2 * math.log(10000)))
    high = math.ceil(64 * math.log(4096 / (2 * math.pi)) / (2 * math.log(10000)))
    for i, (one, f) in enumerate(zip(found, plain, strict=True)):
        ramp = min(max((i - low) / (high - low), 0), 1)
        assert one == pytest.approx(f / 16 * ramp + f * (1 - ramp))
    assert turning.magnitude(kernelgen.Yarn(16, 4096)) == pytest.approx(0.1 * math.log(16) + 1)
    x = RNG.standard_normal((6, 64)).astype(np.float32)
    got = kernelgen.rope(x, scaling=kernelgen.Yarn(16, 4096, magnitude=1.5))
    close(got, 1.5 * turned(x.astype(np.float64), np.arange(6), found, False))


# ---- what is refused


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: kernelgen.add(X, np.zeros(5, np.float32)), "must broadcast to one shape"),
        (lambda: kernelgen.silu(WIDE), "float64 were given"),
        (lambda: kernelgen.map(lambda x: x)(X, Y), "2 arrays were given"),
        (lambda: kernelgen.map(lambda *x: x[0]), "one for each array"),
        (
            lambda: kernelgen.map(lambda x: (x, x), dtype=("f32",))(X),
            "1 types were given for the 2 results",
        ),
        (lambda: kernelgen.map(lambda x: x if x < 0 else -x)(X), "truth of the expression"),
        (lambda: kernelgen.cast(X, "f64"), "f64 were given"),
        (lambda: kernelgen.softmax(X, mask=X[:, :, :5]), "mask of shape"),
        (lambda: kernelgen.softmax(np.float32(1)), "a last axis with"),
        (lambda: kernelgen.rms_norm(X, W[:5]), "weight of shape"),
        (lambda: kernelgen.row_sum(X[..., :0]), "a last axis with"),
        (lambda: kernelgen.topk(X, 23), "1 to 22 are allowed"),
        (lambda: kernelgen.topk(X, 0), "1 to 22 are allowed"),
        (lambda: kernelgen.rope(X, dims=5), "even number"),
        (lambda: kernelgen.rope(X, dims=24), "even number"),
        (lambda: kernelgen.rope(X, pairing="other"), "half and neighbours"),
        (lambda: kernelgen.rope(X, np.array([-1, 0, 1])), "from 0 to"),
        (lambda: kernelgen.rope(X, np.arange(4)), "positions of shape"),
        (lambda: kernelgen.rope(X[0, 0]), "no axis of positions"),
        (lambda: kernelgen.gelu(X, approximate="erf"), "none, tanh"),
    ],
)
def test_refusals(call: Any, says: str) -> None:
    with pytest.raises(KernelgenError, match=says):
        call()


def test_a_target_that_cannot_run_is_named() -> None:
    reason = kernelgen.targets.get("metal").runtime().available()
    if reason is None:
        pytest.skip("this machine has the device")
    with pytest.raises(TargetError, match="target metal cannot run here"):
        kernelgen.silu(X, target="metal")

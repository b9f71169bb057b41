"""What is fused with kernelgen.matmul, and kernelgen.gated_matmul: in numpy's words."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from typer.testing import CliRunner

import kernelgen
from kernelgen import api_fused, ir
from kernelgen.cli import app
from kernelgen.errors import KernelgenError
from kernelgen.ir import formats
from kernelgen.ir.ops.epilogue import Fusion, RmsNorm
from kernelgen.tensor import QuantTensor

Array = npt.NDArray[Any]

M, N, K = 3, 13, 64
RNG = np.random.default_rng(5)
X = RNG.standard_normal((M, K), np.float32)
W, GATE, UP = (
    kernelgen.quantize(RNG.standard_normal((N, K), np.float32), "q8_0") for _ in range(3)
)
BIAS = RNG.standard_normal(N).astype(np.float32)
RESIDUAL = RNG.standard_normal((M, N)).astype(np.float32)
NORM = RNG.uniform(0.5, 2, K).astype(np.float32)
SUMS = X.astype(np.float64) @ W.dequantize().astype(np.float64).T
HOW: dict[str, Any] = {"target": "numpy", "precision": "fp32"}


def silu(x: Array) -> Array:
    return x / (1 + np.exp(-x))


def normalized(x: Array, eps: float = 1e-6) -> Array:
    x = x.astype(np.float64)
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + eps) * NORM


def close(got: Array, want: Array, tolerance: float = 2e-6) -> None:
    assert got.shape == want.shape
    np.testing.assert_allclose(got, want, atol=tolerance * np.sqrt(np.mean(want**2)), rtol=1e-5)


def ramp(y: Any, low: Any, row: Any) -> Any:
    return ir.where(y < low, low, y) * row


ROW = np.array([[1.0], [2.0], [-0.5]], np.float32)

CASES: dict[str, tuple[dict[str, Any], Array]] = {
    "scale": ({"scale": 0.25}, SUMS * 0.25),
    "scale of rows": ({"scale": ROW}, SUMS * ROW),
    "scale of columns": ({"scale": BIAS}, SUMS * BIAS),
    "scale of results": ({"scale": RESIDUAL}, SUMS * RESIDUAL),
    "bias": ({"bias": BIAS}, SUMS + BIAS),
    "residual": ({"residual": RESIDUAL}, SUMS + RESIDUAL),
    "activation": ({"activation": "relu"}, np.maximum(SUMS, 0)),
    "own activation": ({"activation": lambda y: y * y}, SUMS**2),
    "own": (
        {"epilogue": ramp, "operands": (0.5, ROW)},
        np.maximum(SUMS, 0.5) * ROW,
    ),
    "norm": ({"norm": NORM}, normalized(X) @ W.dequantize().T.astype(np.float64)),
    "eps": (
        {"norm": NORM, "norm_eps": 0.5},
        normalized(X, 0.5) @ W.dequantize().T.astype(np.float64),
    ),
    "all": (
        {"scale": 2.0, "bias": BIAS, "activation": "silu", "residual": RESIDUAL,
         "epilogue": lambda y: y - 1.0},
        silu(SUMS * 2 + BIAS) - 1 + RESIDUAL,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_what_is_fused_is_what_numpy_computes(case: str) -> None:
    given, want = CASES[case]
    close(kernelgen.matmul(X, W, **given, **HOW), want)


def test_the_fastest_target_computes_the_same() -> None:
    given, want = CASES["all"]
    for m in (1, 3):
        rows = {k: v[:m] if k == "residual" else v for k, v in given.items()}
        close(kernelgen.matmul(X[:m], W, **rows, precision="fp32"), want[:m], 1e-5)
    got = kernelgen.gated_matmul(X, GATE, UP, norm=NORM, precision="int8")
    want = _gated(normalized(X))
    assert np.sqrt(np.mean((got - want) ** 2)) < 0.02 * np.sqrt(np.mean(want**2))


def _gated(x: Array) -> Array:
    gate, up = (x @ w.dequantize().T.astype(np.float64) for w in (GATE, UP))
    return np.asarray(silu(gate) * up)


def test_gated_products() -> None:
    close(kernelgen.gated_matmul(X, GATE, UP, **HOW), _gated(X.astype(np.float64)), 1e-5)
    own = kernelgen.gated_matmul(X, GATE, UP, lambda g: g * 0.0 + 1.0, **HOW)
    close(own, X.astype(np.float64) @ UP.dequantize().T.astype(np.float64), 1e-5)
    close(kernelgen.gated_matmul(X, GATE, UP, norm=NORM, **HOW), _gated(normalized(X)), 1e-5)


def test_one_copy_of_a_pair_is_kept() -> None:
    gate, up = (QuantTensor("q8_0", W.shape, W.data) for _ in range(2))
    for _ in range(2):
        kernelgen.gated_matmul(X, gate, up, **HOW)
    assert [key[0] for key in gate.prepared if isinstance(key, tuple)] == ["gated"]
    kernelgen.gated_matmul(X, gate, gate, **HOW)
    assert len(gate.prepared) == 2 and not up.prepared


def test_shapes_and_types_are_those_of_the_plain_product() -> None:
    x = np.stack([X, X + 1]).astype(np.float16)
    y = kernelgen.matmul(x, W, bias=BIAS, residual=np.zeros((2, M, N), np.float16), **HOW)
    assert y.shape == (2, M, N) and y.dtype == np.float16
    np.testing.assert_array_equal(y, kernelgen.matmul(x, W, bias=BIAS, **HOW))
    row = kernelgen.matmul(X[0], W, bias=BIAS, **HOW)
    assert row.shape == (N,)
    close(row, SUMS[0] + BIAS)
    empty = kernelgen.matmul(X[:0], W, bias=BIAS, **HOW)
    assert empty.shape == (0, N)
    assert kernelgen.gated_matmul(X[:0], GATE, UP, **HOW).shape == (0, N)


def test_out_is_filled_and_may_be_the_residual() -> None:
    out = np.full((M, N), np.nan, np.float32)
    assert kernelgen.matmul(X, W, bias=BIAS, out=out, **HOW) is out
    close(out, SUMS + BIAS)
    residual = RESIDUAL.copy()
    assert kernelgen.matmul(X, W, residual=residual, out=residual, **HOW) is residual
    close(residual, SUMS + RESIDUAL)
    half = np.empty((M, N), np.float16)
    assert kernelgen.matmul(X.astype(np.float16), W, bias=BIAS, out=half, **HOW) is half
    np.testing.assert_allclose(half, SUMS + BIAS, atol=0.05, rtol=0.01)


LARGE = np.zeros(2 * M * N, np.float32)

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "bias": ({"bias": BIAS[:-1]}, r"bias of shape \(12,\) was given; it must be of shape \(13,\)"),
    "residual": ({"residual": BIAS}, r"it must be of shape \(3, 13\)"),
    "norm": ({"norm": BIAS}, r"norm of shape \(13,\) was given; it must be of shape \(64,\)"),
    "eps": ({"norm": NORM, "norm_eps": -1}, "it must be a number from 0 on"),
    "scale": ({"scale": np.ones(5)}, r"must broadcast to the result, \(3, 13\)"),
    "text": ({"scale": "large"}, "numbers are allowed"),
    "activation": ({"activation": "selu"}, "there are silu, gelu"),
    "operands": ({"operands": (BIAS,)}, "without an epilogue that takes them"),
    "too many": ({"epilogue": lambda y: y, "operands": (BIAS,)}, "does not take 2 expressions"),
    "numpy": ({"epilogue": np.tanh}, "kernelgen.ir"),
    "if": ({"epilogue": lambda y: y if y < 0 else -y}, "where"),
    "overlap": (
        {"residual": LARGE[: M * N].reshape(M, N), "out": LARGE[N : N + M * N].reshape(M, N)},
        "out overlaps residual",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_in_one_sentence(case: str) -> None:
    given, said = REFUSED[case]
    with pytest.raises(KernelgenError, match=said) as error:
        kernelgen.matmul(X, W, **given, **HOW)
    assert "\n" not in str(error.value)


def test_gated_products_want_two_of_a_kind() -> None:
    other = kernelgen.quantize(np.ones((N, K), np.float32), "q4_0")
    with pytest.raises(KernelgenError, match="both have one format and one shape"):
        kernelgen.gated_matmul(X, GATE, other, **HOW)
    with pytest.raises(KernelgenError, match="both have one format and one shape"):
        kernelgen.gated_matmul(X, GATE, UP[:4], **HOW)
    with pytest.raises(KernelgenError, match="x needs 64 columns"):
        kernelgen.gated_matmul(X[:, :32], GATE, UP, **HOW)


def test_equal_functions_share_a_kernel() -> None:
    q8 = formats.get("q8_0")
    found = {
        api_fused.kernel_for("numpy", q8, (M, N, K), "fp32", None, _fusion_of(lambda y: y + 0.5))
        for _ in range(3)
    }
    assert len(found) == 1


def _fusion_of(function: Any) -> Fusion:
    return api_fused._fusion(None, False, function, None, (), False, None)


def test_where_no_kernel_normalizes_the_norm_runs_before() -> None:
    q8 = formats.get("q8_0")
    fused = Fusion(norm=RmsNorm())
    inside = {p: api_fused.kernel_for("c", q8, (M, N, K), p, None, fused).normalizes
              for p in ("fp32", "int8")}  # fmt: skip
    assert inside == {"fp32": False, "int8": True}
    close(kernelgen.matmul(X, W, norm=NORM, target="c", precision="fp32"), CASES["norm"][1], 1e-5)


def _said(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == 0, result.output
    return result.output


def test_the_command_line_knows_epilogues() -> None:
    explained = _said("explain", "matmul", "q8_0", "--shape", "3x13x64", "--target", "c",
                      "--precision", "fp32", "--epilogue", "rms_swiglu")  # fmt: skip
    assert "the norm runs before" in explained and "gate and up in one kernel" in explained
    assert "def finish(" in _said(
        "show", "matmul", "q8_0", "--target", "numpy", "--epilogue", "own"
    )
    told = _said("verify", "--target", "numpy", "--format", "q8_0", "--op", "matvec",
                 "--epilogue", "swiglu,rms", "--json")  # fmt: skip
    results = json.loads(told)
    assert {r["op"] for r in results} == {"matvec swiglu", "matvec rms"}
    assert all(r["ok"] and r["cases"] for r in results)
    assert "RMSNorm (fp32, int8)" in _said("list", "--target", "numpy", "--format", "q8_0")
    refused = CliRunner().invoke(app, ["verify", "--epilogue", "nothing"])
    assert refused.exit_code == 1

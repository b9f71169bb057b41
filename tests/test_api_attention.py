"""kernelgen.attention: what it computes, in numpy's words, and what it refuses."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import kernelgen
from kernelgen import ir
from kernelgen.api_attention import alibi_slopes
from kernelgen.errors import KernelgenError

Array = npt.NDArray[Any]

B, H, HK, T, S, D = 2, 4, 2, 5, 9, 32
RNG = np.random.default_rng(0)
Q = RNG.standard_normal((B, H, T, D), np.float32)
K, V = RNG.standard_normal((2, B, HK, S, D), np.float32)
AT_Q, AT_K = np.arange(T)[:, None] + S - T, np.arange(S)[None, :]


def plain(bias: Array | float = 0.0, change: Any = None, sinks: Array | None = None) -> Array:
    """softmax(change(q @ k.T / sqrt(D)) + bias) @ v."""
    k, v = (np.repeat(x, H // HK, axis=1).astype(np.float64) for x in (K, V))
    scores = np.einsum("bhtd,bhsd->bhts", Q, k) / np.sqrt(D)
    scores = (change(scores) if change else scores) + bias
    if sinks is not None:
        own = np.broadcast_to(sinks[None, :, None, None], (B, H, T, 1))
        scores = np.concatenate([scores, own], axis=-1)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    return np.einsum("bhts,bhsd->bhtd", weights[..., :S], v)


def never(mask: Array) -> Array:
    return np.where(mask, -np.inf, 0.0)


DOCUMENTS = np.array([[0, 0, 0, 1, 1, 1, 1, 2, 2], [0, 1, 1, 1, 1, 1, 1, 1, 1]])
SLOPES = alibi_slopes(H)
BIAS = RNG.standard_normal((1, H, T, S)).astype(np.float32)
SINKS = RNG.standard_normal(H).astype(np.float32)


def same_document(b: Any, h: Any, q: Any, k: Any) -> Any:
    return ir.equal(CAPTURED[b, q], CAPTURED[b, k])


CAPTURED = kernelgen.captured(DOCUMENTS)
OTHER = DOCUMENTS[:, None, S - T :, None] != DOCUMENTS[:, None, None, :]

CASES = {
    "full": ({}, plain()),
    "causal": ({"causal": True}, plain(never(AT_K > AT_Q))),
    "window": ({"window": 3}, plain(never((AT_K > AT_Q) | (AT_Q - AT_K >= 3)))),
    "softcap": ({"softcap": 0.5}, plain(change=lambda s: 0.5 * np.tanh(s / 0.5))),
    "alibi": ({"alibi": SLOPES}, plain(SLOPES[:, None, None] * (AT_K - AT_Q))),
    "booleans": ({"mask": AT_K != 4}, plain(never(np.broadcast_to(AT_K == 4, (T, S))))),
    "floats": ({"mask": BIAS}, plain(BIAS)),
    "documents": ({"mask": same_document}, plain(never(OTHER))),
    "own score": (
        {"score": lambda s, b, h, q, k: ir.where(k < 3, s * 2.0, s - 0.5)},
        plain(change=lambda s: np.where(AT_K < 3, s * 2, s - 0.5)),
    ),
    "both": (
        {"causal": True, "mask": lambda b, h, q, k: ir.logical_not(ir.equal(k, 0)) | (q < 5)},
        plain(never((AT_K > AT_Q) | ((AT_K == 0) & (AT_Q >= 5)))),
    ),
    "sinks": ({"sinks": SINKS}, plain(sinks=SINKS)),
}


@pytest.mark.parametrize("target", ["c", "numpy", "opencl"])
@pytest.mark.parametrize("name", CASES)
def test_computes(name: str, target: str) -> None:
    reason = kernelgen.targets.get(target).runtime().available()
    if reason is not None:
        pytest.skip(reason)
    given, want = CASES[name]
    got = kernelgen.attention(Q, K, V, target=target, **given)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_quantized_keys_and_half_queries() -> None:
    k, v = kernelgen.quantize(K, "q8_0"), kernelgen.quantize(V, "q4_0")
    want = kernelgen.attention(Q, k.dequantize(), v.dequantize(), causal=True, scale=0.1)
    got = kernelgen.attention(Q, k, v, causal=True, scale=0.1)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    half = kernelgen.attention(Q.astype(np.float16), K.astype(np.float16), V.astype(np.float16))
    assert half.dtype == np.float16
    np.testing.assert_allclose(half, plain(), rtol=0.02, atol=0.01)


def test_a_query_that_sees_nothing_gives_zeros() -> None:
    assert (kernelgen.attention(Q, K, V, mask=lambda b, h, q, k: k < 0) == 0).all()


def test_no_query_gives_no_row() -> None:
    assert kernelgen.attention(Q[:, :, :0], K, V).shape == (B, H, 0, D)


def test_slopes_are_those_of_the_paper() -> None:
    np.testing.assert_allclose(alibi_slopes(8), 2.0 ** -np.arange(1, 9))
    assert len(alibi_slopes(12)) == 12
    np.testing.assert_allclose(
        alibi_slopes(12)[8:], 2.0 ** -np.array([0.5, 1.5, 2.5, 3.5]), rtol=1e-6
    )


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: kernelgen.attention(Q[0], K, V), "batch, head, query, element"),
        (lambda: kernelgen.attention(Q, K[:, :, :4], V), "positions of k and v"),
        (lambda: kernelgen.attention(Q[:, :3], K, V), "multiple"),
        (lambda: kernelgen.attention(Q, K.astype(np.float64), V), "float32, float16"),
        (lambda: kernelgen.attention(Q, K, V, mask=np.ones((3, 3), bool)), "must broadcast to"),
        (lambda: kernelgen.attention(Q, K, V, alibi=SLOPES[:2]), "slope for each head"),
        (lambda: kernelgen.attention(Q, K, V, sinks=SINKS[:2]), "one for each head"),
        (lambda: kernelgen.attention(Q, K, V, precision="int8"), "allowed are auto"),
        (lambda: kernelgen.attention(Q, K, V, mask=lambda b, h, q, k: q + k), "must be bool"),
        (lambda: CAPTURED[0, 0], "outside of a score or mask function"),
    ],
)
def test_refusals(call: Any, says: str) -> None:
    with pytest.raises(KernelgenError, match=says):
        call()

"""Attention: the reference against torch, flash against the reference, tiles against the mask."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from kernelgen.errors import KernelgenError
from kernelgen.ir import formats
from kernelgen.ir.evaluate import evaluate
from kernelgen.ir.expr import F32, Expr, call, cast, const, equal, where
from kernelgen.ir.ops.attention import (
    Attention,
    Mask,
    Operand,
    Score,
    alibi,
    attention,
    causal,
    flash_attention,
    operand,
    prefix,
    trace,
    window,
)

Array = npt.NDArray[Any]

F32_FORMAT = formats.get("f32")
SLOPES = operand("slopes", "f32", 1)
DOCUMENTS = operand("documents", "i32", 2)


def kind(score: Score | None = None, mask: Mask | None = None, **values: Any) -> Attention:
    scored, masked = trace(score, mask)
    return Attention(16, F32_FORMAT, F32_FORMAT, score=scored, mask=masked, **values)


def soft_cap(s: Expr, b: Expr, h: Expr, q: Expr, k: Expr) -> Expr:
    return 5.0 * call("tanh", s / 5.0)


def same_document(b: Expr, h: Expr, q: Expr, k: Expr) -> Expr:
    return equal(DOCUMENTS[b, q], DOCUMENTS[b, k]) & (k <= q)


def of_its_own(s: Expr, b: Expr, h: Expr, q: Expr, k: Expr) -> Expr:
    return where(q - k < 3, s * 2.0, s - cast(F32, h) * 0.5) + 0.01 * cast(F32, k)


KINDS = {
    "full": kind(),
    "causal": kind(mask=causal),
    "window": kind(mask=window(4)),
    "prefix": kind(mask=prefix(3)),
    "soft-cap": kind(score=soft_cap),
    "ALiBi": kind(score=alibi(SLOPES), mask=causal, operands=(SLOPES,)),
    "documents": kind(mask=same_document, operands=(DOCUMENTS,)),
    "own": kind(score=of_its_own, mask=lambda b, h, q, k: (q + k) % 3 < 2),
    "nothing": kind(mask=lambda b, h, q, k: k < 0),
    "sinks": kind(mask=causal, sinks=True),
}
SHAPES = ((1, 1, 1), (7, 7, 2), (1, 33, 4), (33, 40, 4), (9, 5, 1))


def inputs(t: int, s: int, group: int, d: int = 16) -> tuple[Array, Array, Array]:
    rng = np.random.default_rng(t * 100 + s)
    q = rng.standard_normal((2, 2 * group, t, d)).astype(np.float32)
    k, v = rng.standard_normal((2, 2, 2, s, d)).astype(np.float32)
    return q, k, v


def operands(one: Attention, heads: int, s: int) -> tuple[dict[str, Array], Array | None]:
    rng = np.random.default_rng(s)
    arrays: dict[str, Array] = {}
    for each in one.operands:
        if each is SLOPES:
            arrays["slopes"] = (2.0 ** -np.arange(1, heads + 1)).astype(np.float32)
        if each is DOCUMENTS:
            arrays["documents"] = np.sort(rng.integers(0, 3, (2, s)).astype(np.int32), axis=1)
    sinks = rng.standard_normal(heads).astype(np.float32) if one.sinks else None
    return arrays, sinks


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", KINDS)
def test_tiles_change_nothing(name: str, shape: tuple[int, int, int]) -> None:
    t, s, _ = shape
    one = KINDS[name]
    if name == "documents" and t > s:
        return  # positions before the first key have no document
    q, k, v = inputs(*shape)
    arrays, sinks = operands(one, q.shape[1], s)
    plain = attention(one, q, k, v, arrays, sinks)
    for tile in ((16, 16), (4, 8), (64, 64)):
        flash = flash_attention(one, q, k, v, arrays, sinks, tile)
        np.testing.assert_allclose(flash, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("name", ["full", "causal", "window", "ALiBi"])
def test_against_torch(name: str, group: int) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed: pip install torch")
    one = KINDS[name]
    q, k, v = inputs(13, 21, group)
    heads, shift = q.shape[1], 21 - 13
    arrays, _ = operands(one, heads, 21)
    at_q, at_k = np.arange(13)[:, None] + shift, np.arange(21)[None, :]
    bias = np.zeros((heads, 13, 21))
    if name != "full":
        bias[:, (at_k > at_q)] = -np.inf
    if name == "window":
        bias[:, (at_q - at_k >= 4)] = -np.inf
    if name == "ALiBi":
        bias = bias + arrays["slopes"][:, None, None] * (at_k - at_q)
    given = [torch.from_numpy(x.astype(np.float64)) for x in (q, k, v)]
    given[1:] = [x.repeat_interleave(group, dim=1) for x in given[1:]]
    want = torch.nn.functional.scaled_dot_product_attention(
        *given, attn_mask=torch.from_numpy(bias)
    )
    np.testing.assert_allclose(attention(one, q, k, v, arrays), want.numpy(), rtol=1e-6, atol=1e-6)


def test_masked_rows_are_zero_and_large_scores_are_safe() -> None:
    q, k, v = inputs(7, 7, 1)
    assert (attention(KINDS["nothing"], q, k, v) == 0).all()
    assert (flash_attention(KINDS["nothing"], q, k, v) == 0).all()
    more_queries = attention(KINDS["causal"], *inputs(9, 5, 1))
    assert (more_queries[:, :, :4] == 0).all() and (more_queries[:, :, 4:] != 0).all()
    large = flash_attention(KINDS["full"], q * 1e4, k * 1e4, v)
    np.testing.assert_allclose(large, attention(KINDS["full"], q * 1e4, k * 1e4, v), rtol=1e-5)
    assert np.isfinite(large).all()


@pytest.mark.parametrize("name", KINDS)
def test_tiles_are_classified_soundly(name: str) -> None:
    """What is said to hold of a tile holds of each pair in it; a causal mask is told exactly."""
    one = KINDS[name]
    if one.mask is None or one.operands:
        return
    found = one.tiles()
    for q0, k0, rows, keys in itertools.product((-4, 0, 3, 8), (0, 4, 7, 12), (1, 4), (1, 3, 8)):
        ends = {"q_lo": q0, "q_hi": q0 + rows - 1, "k_lo": k0, "k_hi": k0 + keys - 1}
        at_q, at_k = np.meshgrid(np.arange(q0, q0 + rows), np.arange(k0, k0 + keys))
        zero = np.zeros(at_q.size, np.int64)
        mask = evaluate(one.mask, {"b": zero, "h": zero, "q": at_q.ravel(), "k": at_k.ravel()})
        always, never = (bool(evaluate(e, ends, {}).all()) for e in (found.always, found.never))
        assert not always or mask.all()
        assert not never or not mask.any()
        if name in ("causal", "nothing"):
            assert always == mask.all() and never == (not mask.any())


def test_names_tell_kinds_apart() -> None:
    names = {one.name for one in KINDS.values()}
    assert len(names) == len(KINDS)
    assert KINDS["full"].name == "d16_f32"
    assert kind(mask=causal, label="causal").name == "d16_f32_causal"
    assert kind(mask=causal) == kind(mask=causal, label="causal")


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Attention(80, formats.get("q8_0"), F32_FORMAT), "80"),
        (lambda: Attention(16, F32_FORMAT, F32_FORMAT, mask=const(1.0, F32)), "must be bool"),
        (lambda: attention(KINDS["full"], *inputs(3, 3, 1, 8)), "heads of 16"),
        (lambda: attention(KINDS["full"], *(x[0] for x in inputs(3, 3, 1))), "four axes"),
        (lambda: Operand("x", "f32", ("x_0", "x_1"))[const(0, F32)], "2 axes"),
    ],
)
def test_refusals(make: Any, says: str) -> None:
    with pytest.raises(KernelgenError, match=says):
        make()

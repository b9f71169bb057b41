"""Kinds of attention that tests run, and data for them."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kernelgen import targets
from kernelgen.generate import generate
from kernelgen.ir import formats
from kernelgen.ir.block import BlockFormat
from kernelgen.ir.expr import F32, Expr, call, cast, const, equal, where
from kernelgen.ir.ops.attention import (
    Attention,
    Mask,
    Operand,
    Score,
    alibi,
    attention,
    causal,
    operand,
    trace,
    window,
)
from kernelgen.problem import relative_error
from kernelgen.targets.base import Runtime
from kernelgen.tensor import QuantTensor, quantize

Array = npt.NDArray[Any]

#: largest error in units of the reference's root mean square
BOUND = 1e-5

SLOPES = operand("slopes", "f32", 1)
DOCUMENTS = operand("documents", "i32", 2)
BIAS = operand("bias", "f32", 3)


def _soft_cap(s: Expr, b: Expr, h: Expr, q: Expr, k: Expr) -> Expr:
    return 5.0 * call("tanh", s / 5.0)


def _document(b: Expr, h: Expr, q: Expr, k: Expr) -> Expr:
    return equal(DOCUMENTS[b, q], DOCUMENTS[b, k]) & (k <= q)


def _own_score(s: Expr, b: Expr, h: Expr, q: Expr, k: Expr) -> Expr:
    return where(q - k < 3, s * 2.0, s - cast(F32, h) * 0.5) + 0.01 * cast(F32, k % 7)


def _own_mask(b: Expr, h: Expr, q: Expr, k: Expr) -> Expr:
    return ((q + k + b) % 3 < 2) & (k < q + 9) | (h < 1)


def _with_bias(s: Expr, b: Expr, h: Expr, q: Expr, k: Expr) -> Expr:
    return s + BIAS[h, 0, k]


def _nothing_for_some(s: Expr, b: Expr, h: Expr, q: Expr, k: Expr) -> Expr:
    return where(q % 3 < 1, const(-math.inf, F32), where(k % 2 < 1, const(-math.inf, F32), s))


@dataclass(frozen=True)
class Case:
    """Score, mask, and what they read."""

    score: Score | None = None
    mask: Mask | None = None
    operands: tuple[Operand, ...] = ()
    sinks: bool = False


CASES = {
    "full": Case(),
    "causal": Case(mask=causal),
    "window": Case(mask=window(33)),
    "soft-cap": Case(_soft_cap),
    "ALiBi": Case(alibi(SLOPES), causal, (SLOPES,)),
    "documents": Case(mask=_document, operands=(DOCUMENTS,)),
    "own": Case(_own_score, _own_mask),
    "bias": Case(_with_bias, operands=(BIAS,)),
    "infinite": Case(_nothing_for_some, causal),
    "sinks": Case(_soft_cap, causal, sinks=True),
}


@functools.cache
def kind(name: str, k: str, v: str, d: int, dv: int = 0) -> Attention:
    """The kind of attention of a case."""
    case = CASES[name]
    score, mask = trace(case.score, case.mask)
    return Attention(
        d, formats.get(k), formats.get(v), dv, score=score, mask=mask, operands=case.operands,
        sinks=case.sinks,
    )  # fmt: skip


def tensors(
    one: Attention, t: int, s: int, group: int, heads: int = 2
) -> tuple[Array, QuantTensor, QuantTensor]:
    """q, k, v of two batches and `heads` heads of K and V."""
    rng = np.random.default_rng(1000 * t + s)
    q = rng.standard_normal((2, heads * group, t, one.head_dim), np.float32)
    k, v = (
        _quantized(rng.standard_normal((2, heads, s, n), np.float32), fmt)
        for fmt, n in ((one.k, one.head_dim), (one.v, one.value_dim))
    )
    return q, k, v


def _quantized(x: Array, fmt: BlockFormat) -> QuantTensor:
    return quantize(x, fmt) if x.size else QuantTensor(fmt, x.shape, np.empty(0, np.uint8))


def arrays_of(one: Attention, heads: int, s: int) -> dict[str, Array]:
    """The operands, and sinks."""
    rng = np.random.default_rng(s)
    made = {
        "slopes": (2.0 ** -np.arange(1.0, heads + 1)).astype(np.float32),
        "documents": np.sort(rng.integers(0, 3, (2, s)).astype(np.int32), axis=1),
        "bias": rng.standard_normal((heads, 1, s)).astype(np.float32),
    }
    found = {each.name: made[each.name] for each in one.operands}
    if one.sinks:
        found["sinks"] = rng.standard_normal(heads).astype(np.float32)
    return found


def reference(one: Attention, q: Array, k: Array, v: Array, arrays: dict[str, Array]) -> Array:
    """What it should be."""
    others = {name: array for name, array in arrays.items() if name != "sinks"}
    return attention(one, q, k, v, others, arrays.get("sinks"))


def run(
    runtime: Runtime, one: Attention, q: Array, k: Any, v: Any, arrays: dict[str, Array],
    **config: int,
) -> Array:  # fmt: skip
    """What a kernel gives, in the default configuration but for what is named; its output is
    poisoned before."""
    target = targets.get("c")
    walk = target.walk("attention", one, "fp32")
    chosen = walk.default(one, runtime.capabilities())
    chosen = type(chosen).from_dict(chosen.as_dict() | config)
    assert chosen.legal(runtime.capabilities()) is None
    y = np.full((*q.shape[:3], one.value_dim), np.nan, np.float32)
    runtime.attention(generate("attention", one, target, chosen, "fp32"))(q, k, v, arrays, y)
    return y


def error(runtime: Runtime, one: Attention, t: int, s: int, group: int = 1, **config: int) -> float:
    """How far a kernel is from the reference."""
    q, k, v = tensors(one, t, s, group)
    arrays = arrays_of(one, q.shape[1], s)
    want = reference(one, q, k.dequantize(), v.dequantize(), arrays)
    return relative_error(run(runtime, one, q, k, v, arrays, **config), want)

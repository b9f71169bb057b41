"""Runs attention against the numpy reference: what `kernelgen verify --op attention` does.

The whole product is every variant of score, mask and keeping, with K and V in every format, in
heads of every size, each with all numbers of queries, once with as many keys (prefill) and once
with more (a cache).  A sample of it has every variant and every format and size at least once.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kernelgen import targets
from kernelgen.errors import KernelgenError
from kernelgen.generate import generate_walk
from kernelgen.ir.block import BlockFormat
from kernelgen.ir.expr import F32, Expr, call, cast, where
from kernelgen.ir.ops import attention as ops
from kernelgen.ir.ops.attention import Attention, Mask, Operand, Score
from kernelgen.problem import relative_error, rounded, tolerance
from kernelgen.targets.base import Runtime, Target, Walk
from kernelgen.tensor import QuantTensor, quantize
from kernelgen.verify import Result

Array = npt.NDArray[Any]

SLOPES = ops.operand("slopes", "f32", 1)

#: elements of heads
HEAD_DIMS = (64, 80, 128, 256)

#: queries; with as many keys for prefill, with more for decoding
QUERIES = (1, 7, 64, 257)

#: queries, too, where a CPU does not stand in for the device that kernels are for
MANY_QUERIES = 1024

#: keys beyond the queries, when a cache is there
_CACHED = 100

#: up to so many queries there are two batches, which some masks tell apart, and four heads; with
#: more, one batch and as few heads as tell heads apart, which saves time
_FEW_QUERIES = 64


def _soft_cap(s: Expr, b: Expr, h: Expr, q: Expr, k: Expr) -> Expr:
    return 20.0 * call("tanh", s / 20.0)


def _own_score(s: Expr, b: Expr, h: Expr, q: Expr, k: Expr) -> Expr:
    return where(q - k < 5, s * 1.5, s - cast(F32, h) * 0.25)


def _own_mask(b: Expr, h: Expr, q: Expr, k: Expr) -> Expr:
    return ((q + k + b) % 3 < 2) & (k < q + 9)


@dataclass(frozen=True)
class Variant:
    """A kind of score and mask, how many heads share one of K and V, and how these are kept."""

    name: str
    score: Score | None = None
    mask: Mask | None = None
    operands: tuple[Operand, ...] = ()
    sinks: bool = False
    sharing: int = 1
    lengths: bool = False
    page: int = 0


VARIANTS = (
    Variant("full"),
    Variant("causal", mask=ops.causal),
    Variant("window", mask=ops.window(33)),
    Variant("softcap", score=_soft_cap),
    Variant("alibi", score=ops.alibi(SLOPES), mask=ops.causal, operands=(SLOPES,)),
    Variant("gqa", mask=ops.causal, sharing=4),
    Variant("own", score=_own_score, mask=_own_mask),
    Variant("sinks", mask=ops.causal, sinks=True),
    Variant("lengths", mask=ops.causal, sharing=2, lengths=True),
    Variant("pages", mask=ops.causal, sharing=2, page=16),
)


def kind_of(variant: Variant, fmt: BlockFormat, head_dim: int) -> Attention:
    """The kind of attention of a variant."""
    score, mask = ops.trace(variant.score, variant.mask)
    return Attention(
        head_dim, fmt, fmt, score=score, mask=mask, operands=variant.operands,
        sinks=variant.sinks, lengths=variant.lengths, page=variant.page, label=variant.name,
    )  # fmt: skip


def kinds(
    formats: Iterable[BlockFormat],
    head_dims: Iterable[int] = HEAD_DIMS,
    variants: Iterable[Variant] = VARIANTS,
    *,
    every: bool = True,
) -> list[tuple[Variant, Attention]]:
    """The product of these, without heads that are no multiple of a block; or, unless `every` one
    is wanted, a diagonal of it, in which each variant and each format and size comes up."""
    heads = [(f, d) for f, d in itertools.product(formats, head_dims) if d % f.block == 0]
    listed = list(variants)
    if every:
        pairs = list(itertools.product(heads, listed))
    else:
        count = max(len(heads), len(listed)) if heads and listed else 0
        pairs = [(heads[i % len(heads)], listed[i % len(listed)]) for i in range(count)]
    return [(variant, kind_of(variant, fmt, head_dim)) for (fmt, head_dim), variant in pairs]


def verify(
    target: Target,
    formats: Iterable[BlockFormat],
    *,
    runtime: Runtime | None = None,
    head_dims: Iterable[int] = HEAD_DIMS,
    variants: Iterable[Variant] = VARIANTS,
    queries: Iterable[int] = (),
    every: bool = True,
) -> Iterator[Result]:
    """Run every kind of attention of a target with K and V in these formats, or a sample (see
    `kinds`); by default for all numbers of queries."""
    reach = runtime or target.runtime()
    caps = reach.capabilities()
    at_home = target.name in targets.PREFERENCE or not reach.on_cpu()
    chosen = tuple(queries) or (*QUERIES, *((MANY_QUERIES,) if at_home else ()))
    for variant, kind in kinds(formats, head_dims, variants, every=every):
        for one in (w for w in target.walks if w.op == "attention"):
            if one.accepts(kind) is None and not one.refuses(one.default(kind, caps), kind, caps):
                yield _one(target, reach, one, variant, kind, chosen)


def _one(
    target: Target, runtime: Runtime, one: Walk, variant: Variant, kind: Attention,
    queries: tuple[int, ...],
) -> Result:  # fmt: skip
    errors: list[float] = []
    problem = None
    bound = tolerance(one.op, one.precision)
    config = one.default(kind, runtime.capabilities())
    try:
        for t in queries:
            config = one.default(kind, runtime.capabilities(), t)
            run = runtime.attention(generate_walk(one, kind, target, config))
            for s in (t, t + _CACHED):
                errors.append(_error(run, variant, kind, t, s, one.precision))
        if max(errors) > bound:
            problem = f"error {max(errors):.3g} exceeds {bound:.3g}"
    except KernelgenError as error:
        problem = str(error)
    return Result(
        target.name, one.op, kind.name, one.precision, runtime.how(), config.as_dict(),
        len(errors), max(errors, default=float("inf")), bound, None, None, problem,
    )  # fmt: skip


def _error(run: Any, variant: Variant, kind: Attention, t: int, s: int, precision: str) -> float:
    q, k, v, arrays = _inputs(variant, kind, t, s)
    # as a precision sees the inputs, and as they are, which is right as well: for few queries some
    # walks round nothing
    wanted = [_wanted(variant, kind, t, s, one) for one in dict.fromkeys((precision, "fp32"))]
    y = np.full(wanted[0].shape, np.nan, np.float32)  # what is not written stays visible
    run(q, k, v, arrays, y)
    return min(row_error(y, want) for want in wanted)


def row_error(y: Array, want: Array) -> float:
    """Largest difference in units of the reference's root mean square, or of the row's own where
    that is larger: what a query makes of two or three keys, as they are, is several times as large
    as most means of hundreds, and rounded as any number is."""
    own = np.sqrt(np.mean(np.square(want), axis=-1, keepdims=True))
    units = np.maximum(own, np.sqrt(np.mean(np.square(want))) or 1.0)
    return relative_error(y / units, want / units, 1.0)


@functools.lru_cache(maxsize=32)
def _inputs(
    variant: Variant, kind: Attention, t: int, s: int
) -> tuple[Array, QuantTensor, QuantTensor, Mapping[str, Array]]:
    """Queries, keys, values, and what else the kind reads."""
    rng = np.random.default_rng(1000 * t + s)
    few = t <= _FEW_QUERIES
    batches, heads = (2, 4) if few else (1, max(2, variant.sharing))
    shared = (batches, heads // variant.sharing, s)
    arrays: dict[str, Array] = {}
    if kind.lengths:
        # perhaps fewer than queries
        arrays["lengths"] = np.array([s, s * 2 // 3][-batches:], np.int32)
    if kind.page:
        each = -(-s // kind.page)
        pool = rng.permutation(batches * each + 1)  # one is in no batch
        arrays["pages"] = pool[:-1].reshape(batches, each).astype(np.int32)
        shared = (len(pool), heads // variant.sharing, kind.page)
    q = rng.standard_normal((batches, heads, t, kind.head_dim), np.float32)
    k = quantize(rng.standard_normal((*shared, kind.head_dim), np.float32), kind.k)
    v = quantize(rng.standard_normal((*shared, kind.value_dim), np.float32), kind.v)
    if variant.operands:
        arrays["slopes"] = (2.0 ** -np.arange(1, heads + 1)).astype(np.float32)
    if variant.sinks:
        arrays["sinks"] = rng.standard_normal(heads).astype(np.float32)
    return q, k, v, arrays


@functools.lru_cache(maxsize=64)
def _wanted(variant: Variant, kind: Attention, t: int, s: int, precision: str) -> Array:
    """The reference's results of these inputs in a precision."""
    q, k, v, arrays = _inputs(variant, kind, t, s)
    q, keys, values = (rounded(x, precision) for x in (q, k.dequantize(), v.dequantize()))
    return ops.attention(kind, q, keys, values, arrays, arrays.get("sinks"))

"""What users call from Python: attention."""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from kernelgen import api
from kernelgen import targets as target_list
from kernelgen.errors import ShapeError, TargetError
from kernelgen.generate import generate_walk
from kernelgen.ir.expr import F32, I32, Expr, call, cast, const
from kernelgen.ir.ops import attention as ops
from kernelgen.ir.ops.attention import Attention, Mask, Operand, Score
from kernelgen.targets.base import Runtime
from kernelgen.tensor import QuantTensor

Array = npt.NDArray[Any]

_tracing = threading.local()


class Captured:
    """An array that a score or mask function reads: indexed by expressions, as captured[h] or
    captured[b, k]; float32, or integers below 2**31."""

    def __init__(self, array: Array) -> None:
        array = np.asarray(array)
        if array.dtype.kind not in "iubf" or not array.ndim:
            raise ShapeError(
                f"an array of {array.dtype} with {array.ndim} axes was given; score and mask"
                " functions read arrays of floats or integers with at least one axis"
            )
        dtype = np.float32 if array.dtype.kind == "f" else np.int32
        self.array = np.ascontiguousarray(array, dtype)

    def __getitem__(self, index: Any) -> Expr:
        found: dict[int, tuple[Operand, Captured]] | None = getattr(_tracing, "found", None)
        if found is None:
            raise ShapeError(
                "a captured array was indexed outside of a score or mask function; index the"
                " array itself"
            )
        if id(self) not in found:
            dtype = "f32" if self.array.dtype == np.float32 else "i32"
            name = f"operand{len(found)}"
            found[id(self)] = ops.operand(name, dtype, self.array.ndim), self
        return found[id(self)][0][index]


def captured(array: Array) -> Captured:
    """An array that a score or mask function may index by expressions."""
    return Captured(array)


def _trace(
    score: Score | None, mask: Mask | None
) -> tuple[Expr | None, Expr | None, tuple[Operand, ...], dict[str, Array]]:
    found: dict[int, tuple[Operand, Captured]] = {}
    _tracing.found = found
    try:
        scored, masked = ops.trace(score, mask)
    finally:
        _tracing.found = None
    operands = tuple(operand for operand, _ in found.values())
    return scored, masked, operands, {o.name: c.array for o, c in found.values()}


def _both(first: Mask | None, second: Mask | None) -> Mask | None:
    if first is None or second is None:
        return first or second
    return lambda b, h, q, k: first(b, h, q, k) & second(b, h, q, k)


def _of_array(array: Array, shape: tuple[int, int, int, int]) -> tuple[Score | None, Mask | None]:
    """What an array (B, H, T, S), or one that broadcasts to it, adds to scores or admits."""
    try:
        full = np.broadcast_shapes(array.shape, shape)
    except ValueError:
        full = ()
    if full != shape:
        raise ShapeError(
            f"a mask of shape {array.shape} was given; it must broadcast to {shape}, batch, head,"
            " query, key"
        )
    _, _, t, s = shape
    if t > s:
        raise ShapeError(
            f"{t} queries were given with a mask array for {s} keys; an array needs no more queries"
            " than keys, as the last query stands at the last key"
        )
    whole = array.reshape((1,) * (4 - array.ndim) + array.shape)
    there = Captured(whole)

    def at(b: Expr, h: Expr, q: Expr, k: Expr) -> Expr:
        places = (b, h, q - (s - t), k)
        return there[tuple(p if n > 1 else 0 for p, n in zip(places, whole.shape, strict=True))]

    if array.dtype.kind == "f":
        return (lambda x, b, h, q, k: x + at(b, h, q, k)), None
    return None, lambda b, h, q, k: const(0, I32) < at(b, h, q, k)


def as_tensor(x: Array | QuantTensor, what: str) -> QuantTensor:
    if isinstance(x, QuantTensor):
        return x
    names = {"float32": "f32", "float16": "f16"}
    if x.dtype.name not in names:
        raise ShapeError(
            f"{what} is an array of {x.dtype}; float32, float16 and quantized tensors are allowed"
        )
    data = np.ascontiguousarray(x).reshape(-1).view(np.uint8)
    return QuantTensor(names[x.dtype.name], x.shape, data)


@functools.lru_cache(maxsize=1024)
def _runner(
    target: str, kind: Attention, queries: int
) -> Callable[[Array, QuantTensor, QuantTensor, Mapping[str, Array], Array], None]:
    """The compiled kernel of a kind, ready to be called."""
    runtime: Runtime = api.runtime_of(target)
    manifest = target_list.get(target)
    walk = manifest.serve("attention", kind, "fp32", runtime.capabilities())
    config = walk.default(kind, runtime.capabilities(), queries)
    return runtime.attention(generate_walk(walk, kind, manifest, config))


def attention(
    q: Array,
    k: Array | QuantTensor,
    v: Array | QuantTensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    alibi: Array | None = None,
    mask: Mask | Array | None = None,
    score: Score | None = None,
    sinks: Array | None = None,
    target: str | None = None,
    precision: str = "auto",
) -> Array:
    """softmax(scale * q @ k.T) @ v for each batch and head, without the matrix of scores.

    q        float32 or float16 (B, H, T, D)
    k, v     (B, HK, S, D) and (B, HK, S, DV): arrays like q, or quantized tensors; H is a multiple
             of HK, whose heads are shared
    causal   a query sees keys up to its own position; query t stands at t + S - T
    scale    1 / sqrt(D) by default
    window   a query sees this many keys up to its own position
    softcap  scores become softcap * tanh(s / softcap)
    alibi    slopes (H,): scores get slope * (position of the key - position of the query)
    mask     a function of expressions (b, h, q, k) that says whether query position q sees key k,
             or an array that broadcasts to (B, H, T, S): booleans, or floats that are added
    score    a function of expressions (s, b, h, q, k) that gives the new score; it comes after
             softcap and alibi
    sinks    (H,): scores that take part in the softmax and add nothing
    target   default: the first of the machine's targets that can run
    precision   "fp32" or "auto"

    Functions are written with Python's operators and `kernelgen.ir` (where, equal, exp...), and
    may index arrays that `kernelgen.captured` wraps.  Returns (B, H, T, DV) of q's dtype; a query
    that sees no key gives zeros.  Raises ShapeError, TargetError, CompileError.
    """
    if q.ndim != 4:
        raise ShapeError(f"q of shape {q.shape} was given; it is (batch, head, query, element)")
    keys, values = as_tensor(k, "k"), as_tensor(v, "v")
    ops.check_shapes(q.shape, keys.shape, values.shape)
    if precision not in ("auto", "fp32"):
        raise TargetError(f"attention in {precision} was asked for; it is computed in fp32 (auto)")
    shape = (*q.shape[:3], keys.shape[2])
    masks: list[Mask | None] = [ops.causal if causal else None]
    masks.append(None if window is None else ops.window(window))
    scores: list[Score] = []
    if softcap is not None:
        scores.append(lambda s, b, h, q, k: softcap * call("tanh", s / softcap))
    if alibi is not None:
        if np.shape(alibi) != (q.shape[1],):
            raise ShapeError(f"alibi of shape {np.shape(alibi)}; it has a slope for each head of q")
        slopes = Captured(np.asarray(alibi, np.float32))
        scores.append(lambda s, b, h, q, k: s + slopes[h] * cast(F32, k - q))
    if isinstance(mask, np.ndarray):
        added, admitted = _of_array(mask, shape)
        scores += [added] if added else []
        masks.append(admitted)
    else:
        masks.append(mask)
    scores += [score] if score else []
    scored, masked, operands, arrays = _trace(_chain(scores), functools.reduce(_both, masks))
    kind = Attention(
        q.shape[3], keys.format, values.format, values.shape[3], scale or 0.0, scored, masked,
        operands, sinks is not None,
    )  # fmt: skip
    if sinks is not None:
        arrays["sinks"] = np.ascontiguousarray(sinks, np.float32)
        if arrays["sinks"].shape != (q.shape[1],):
            raise ShapeError(f"sinks of shape {np.shape(sinks)}; there is one for each head of q")
    y = np.empty((*q.shape[:3], kind.value_dim), np.float32)
    if y.size:
        run = _runner(target or api.default_target(), kind, shape[2])
        run(np.ascontiguousarray(q, np.float32), keys, values, arrays, y)
    return y if q.dtype == np.float32 else y.astype(q.dtype)


def _chain(scores: list[Score]) -> Score | None:
    """One function after the other."""
    if not scores:
        return None

    def change(s: Expr, b: Expr, h: Expr, q: Expr, k: Expr) -> Expr:
        for one in scores:
            s = one(s, b, h, q, k)
        return s

    return change


def slopes_of(heads: int) -> Array:
    """ALiBi's slopes of so many heads (Press et al., 2021): float32 (H,)."""
    whole = 2 ** math.floor(math.log2(heads))
    first = 2.0 ** (-8.0 * np.arange(1, whole + 1) / whole)
    rest = 2.0 ** (-4.0 * np.arange(1, 2 * (heads - whole), 2) / whole)
    return np.concatenate([first, rest]).astype(np.float32)

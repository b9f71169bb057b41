"""What users call from Python: attention."""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kernelgen import api
from kernelgen import arrays as arrays_of
from kernelgen import targets as target_list
from kernelgen.dispatch import any_array, once, runtime_of, takes
from kernelgen.errors import ShapeError, TargetError
from kernelgen.generate import generate_walk
from kernelgen.ir import formats as format_list
from kernelgen.ir.block import BlockFormat
from kernelgen.ir.expr import F32, I32, Expr, call, cast, const
from kernelgen.ir.ops import attention as ops
from kernelgen.ir.ops.attention import Attention, Mask, Operand, Score
from kernelgen.problem import power_of_two, row_bucket
from kernelgen.recording import launch
from kernelgen.targets import resident
from kernelgen.targets.base import Kernel
from kernelgen.targets.device import DeviceRuntime
from kernelgen.tensor import QuantTensor
from kernelgen.tuner import lookup
from kernelgen.tuner.problems import AttentionProblem

Array = npt.NDArray[Any]

#: in which attention is computed
_PRECISIONS = ("auto", "fp32", "fp16", "bf16")

_tracing = threading.local()


class Captured:
    """An array that a score or mask function reads: indexed by expressions, as captured[h] or
    captured[b, k]; float32, or integers below 2**31."""

    def __init__(self, array: Any) -> None:
        if arrays_of.is_foreign(array):  # it lies where the kernel will read it
            self.array = arrays_of.as_operand(array)
            self.dtype = "f32" if arrays_of.is_float(array) else "i32"
            return
        array = np.asarray(array)
        if array.dtype.kind not in "iubf" or not array.ndim:
            raise ShapeError(
                f"an array of {array.dtype} with {array.ndim} axes was given; score and mask"
                " functions read arrays of floats or integers with at least one axis"
            )
        dtype = np.float32 if array.dtype.kind == "f" else np.int32
        self.array = np.ascontiguousarray(array, dtype)
        self.dtype = "f32" if array.dtype.kind == "f" else "i32"

    def __getitem__(self, index: Any) -> Expr:
        found: dict[int, tuple[Operand, Captured]] | None = getattr(_tracing, "found", None)
        if found is None:
            raise ShapeError(
                "a captured array was indexed outside of a score or mask function; index the"
                " array itself"
            )
        if id(self) not in found:
            name = f"operand{len(found)}"
            found[id(self)] = ops.operand(name, self.dtype, self.array.ndim), self
        return found[id(self)][0][index]


def captured(array: Any) -> Captured:
    """An array that a score or mask function may index by expressions; read on the host."""
    return Captured(_plain(array))


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


def _of_array(
    array: Any, shape: tuple[int, int, int, int], lengths: Captured | None
) -> tuple[Score | None, Mask | None]:
    """What an array (B, H, T, S), or one that broadcasts to it, adds to scores or admits.
    `lengths`: keys of each batch, where they differ."""
    try:
        full = np.broadcast_shapes(tuple(array.shape), shape)
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
    whole = array.reshape((1,) * (4 - array.ndim) + tuple(array.shape))
    there = Captured(whole)

    def at(b: Expr, h: Expr, q: Expr, k: Expr) -> Expr:
        places = (b, h, q - ((s if lengths is None else lengths[b]) - t), k)
        return there[tuple(p if n > 1 else 0 for p, n in zip(places, whole.shape, strict=True))]

    if there.dtype == "f32":
        return (lambda x, b, h, q, k: x + at(b, h, q, k)), None
    return None, lambda b, h, q, k: const(0, I32) < at(b, h, q, k)


@dataclass(frozen=True)
class _Lying:
    """K or V that lies on the target's device: an array of another library."""

    array: Any
    format: BlockFormat

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.array.shape)


def as_tensor(x: Any, what: str) -> Any:
    if isinstance(x, QuantTensor):
        return x
    names = dict(zip(arrays_of.FLOATS, ("f32", "f16", "bf16"), strict=True))
    name = arrays_of.dtype_name(x)
    if name not in names:
        raise ShapeError(
            f"{what} is an array of {name}; {', '.join(names)} and quantized tensors are allowed"
        )
    if arrays_of.is_foreign(x):
        return _Lying(arrays_of.contiguous(x), format_list.get(names[name]))
    data = np.ascontiguousarray(x).reshape(-1).view(np.uint8)
    return QuantTensor(names[name], x.shape, data)


def _on_host(x: Any) -> Any:
    """An array of another library for what follows: bfloat16, which numpy does not know, as a
    tensor of that format, on the same memory."""
    if arrays_of.dtype_name(x) != "bfloat16":
        return arrays_of.host(x)
    bits = np.ascontiguousarray(arrays_of.bits_of(x))
    return QuantTensor("bf16", bits.shape, bits.reshape(-1).view(np.uint8))


def _plain(x: Any, target: str = "") -> Any:
    """A mask, slopes or sinks: as they are if they lie where the target reads them, else numpy's
    array of them."""
    if target and arrays_of.is_foreign(x) and takes(target, x):
        return x
    x = _on_host(x) if arrays_of.is_foreign(x) else x
    return x.dequantize() if isinstance(x, QuantTensor) else x


#: a kind of attention, and a shape (B, H, HK, T, S) of a bucket
Shape = tuple[int, int, int, int, int]


def _floats(x: Any, target: str) -> Any:
    """The same as float32, contiguous."""
    x = _plain(x, target)
    if arrays_of.is_foreign(x):
        return arrays_of.as_float32(x)
    return np.ascontiguousarray(x, np.float32)


@once
def _kernel(target: str, kind: Attention, shape: Shape, precision: str) -> Kernel:
    """The kernel of a kind, in the configuration that the tuner's cache has for the shape."""
    runtime = api.require(target)
    manifest, caps = target_list.get(target), runtime.capabilities()
    problem = AttentionProblem(kind.plain, *shape, precision=precision)
    choice = lookup.choose_for(manifest, runtime, problem)
    walk, config = choice.walk, choice.config
    if walk.accepts(kind) or walk.refuses(config, kind, caps):
        # what serves the plain kind does not fit this one
        walk = manifest.serve("attention", kind, precision, caps, problem.rows)
        config = walk.default(kind, caps, problem.rows)
    return generate_walk(walk, kind, manifest, config)


@once
def _runner(
    target: str, kind: Attention, shape: Shape, precision: str
) -> Callable[[Array, QuantTensor, QuantTensor, Mapping[str, Array], Array], None]:
    """The compiled kernel of a kind, ready to be called."""
    return runtime_of(target).attention(_kernel(target, kind, shape, precision))


@once
def _runner_on_device(
    target: str, kind: Attention, shape: Shape, precision: str
) -> Callable[[Any, Any, Any, Mapping[str, Array], Any], None]:
    """The same for q, y, and K and V where these are arrays, on the device."""
    runtime = runtime_of(target)
    assert isinstance(runtime, DeviceRuntime)
    return resident.attention(runtime, _kernel(target, kind, shape, precision))


def _bucket(shape: tuple[int, ...], kv_heads: int) -> Shape:
    """(B, H, T, S) as kernels are told apart by it: a cache that grows has the same one for
    long."""
    b, h, t, s = shape
    return b, h, kv_heads, row_bucket(t), max(64, power_of_two(s))


def _there(*args: Any, **options: Any) -> Any:
    """`attention` of arrays that lie where the target's kernels work."""
    return attention.__wrapped__(*args, **options)  # type: ignore[attr-defined]


@any_array(_there, _on_host)
def attention(
    q: Any,
    k: Any,
    v: Any,
    *,
    causal: bool = False,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    alibi: Any = None,
    mask: Mask | Any = None,
    score: Score | None = None,
    sinks: Any = None,
    lengths: Any = None,
    pages: Any = None,
    target: str | None = None,
    precision: str = "auto",
    on_fallback: str | None = None,
) -> Any:
    """softmax(scale * q @ k.T) @ v for each batch and head, without the matrix of scores.

    q        float32, float16 or bfloat16 (B, H, T, D): a numpy array, or one of torch, cupy or any
             library that speaks DLPack; so with all arrays, and the result is of q's library, on
             q's device
    k, v     (B, HK, S, D) and (B, HK, S, DV): arrays like q, or quantized tensors; H is a multiple
             of HK, whose heads are shared
    causal   a query sees keys up to its own position; query t stands at t + S - T
    scale    1 / sqrt(D) by default
    window   a query sees this many keys up to its own position
    softcap  scores become softcap * tanh(s / softcap)
    alibi    slopes (H,), such as `alibi_slopes` gives: scores get slope * (position of the key -
             position of the query)
    mask     a function of expressions (b, h, q, k) that says whether query position q sees key k,
             or an array that broadcasts to (B, H, T, S): booleans, or floats that are added
    score    a function of expressions (s, b, h, q, k) that gives the new score; it comes after
             softcap and alibi
    sinks    (H,): scores that take part in the softmax and add nothing
    lengths  integers (B,): how many of the S keys each batch has; S, for what is said of
             positions, is then this number
    pages    integers (B, P), with `lengths`: k and v are pools of pages, (pages, HK, page, D), and
             key s of batch b is in page pages[b, s // page]
    target   default: what serves the place where q lies; for numpy arrays the best device here
    precision   "fp32", which "auto" is; "fp16" or "bf16": q, k, v and the weights of the softmax
             are rounded where the target has such a kernel for this machine, float32 where not
    on_fallback   as in `kernelgen.matmul`

    Functions are written with Python's operators and `kernelgen.ir` (where, equal, exp...), and
    may index arrays that `kernelgen.captured` wraps.  Returns (B, H, T, DV) of q's dtype; a query
    that sees no key gives zeros.  Raises ShapeError, TargetError, CompileError.
    """
    q = q.dequantize() if isinstance(q, QuantTensor) else q
    where = target or api.default_target(on_fallback)
    there = where if arrays_of.is_foreign(q) else ""
    mask = _plain(mask, there)
    alibi, sinks = (None if one is None else _floats(one, there) for one in (alibi, sinks))
    if q.ndim != 4:
        raise ShapeError(f"q of shape {q.shape} was given; it is (batch, head, query, element)")
    keys, values = as_tensor(k, "k"), as_tensor(v, "v")
    held = _held(tuple(q.shape), keys.shape, values.shape, _plain(lengths), _plain(pages))
    page = keys.shape[2] if held and pages is not None else 0
    if precision not in _PRECISIONS:
        raise TargetError(
            f"attention in {precision} was asked for; allowed are {', '.join(_PRECISIONS)}"
        )
    shape = (*q.shape[:3], page * held["pages"].shape[1] if page else keys.shape[2])
    chosen = "fp32" if precision == "auto" else precision
    masks: list[Mask | None] = [ops.causal if causal else None]
    masks.append(None if window is None else ops.window(window))
    scores: list[Score] = []
    if softcap is not None:
        scores.append(lambda s, b, h, q, k: softcap * call("tanh", s / softcap))
    if alibi is not None:
        if tuple(alibi.shape) != (q.shape[1],):
            raise ShapeError(
                f"alibi of shape {tuple(alibi.shape)}; it has a slope for each head of q"
            )
        slopes = Captured(alibi)
        scores.append(lambda s, b, h, q, k: s + slopes[h] * cast(F32, k - q))
    if hasattr(mask, "dtype"):
        added, admitted = _of_array(mask, shape, Captured(held["lengths"]) if held else None)
        scores += [added] if added else []
        masks.append(admitted)
    else:
        masks.append(mask)
    scores += [score] if score else []
    scored, masked, operands, arrays = _trace(_chain(scores), functools.reduce(_both, masks))
    kind = Attention(
        q.shape[3], keys.format, values.format, values.shape[3], scale or 0.0, scored, masked,
        operands, sinks is not None, bool(held), page,
    )  # fmt: skip
    arrays |= held
    if sinks is not None:
        arrays["sinks"] = sinks
        if tuple(sinks.shape) != (q.shape[1],):
            raise ShapeError(
                f"sinks of shape {tuple(sinks.shape)}; there is one for each head of q"
            )
    sizes = _bucket(shape, keys.shape[1])
    if arrays_of.is_foreign(q):
        return _run_there(where, kind, sizes, chosen, q, keys, values, arrays)
    y = np.empty((*q.shape[:3], kind.value_dim), np.float32)
    if y.size:
        run = _runner(where, kind, sizes, chosen)
        launch(run, np.ascontiguousarray(q, np.float32), keys, values, arrays, y, fills=(y,))
    return y if q.dtype == np.float32 else y.astype(q.dtype)


def _held(
    q: tuple[int, ...],
    k: tuple[int, ...],
    v: tuple[int, ...],
    lengths: Array | None,
    pages: Array | None,
) -> dict[str, Array]:
    """`lengths` and `pages` as kernels read them, where they are given; raises ShapeError where
    they, q, k and v of these shapes do not fit."""
    if lengths is None:
        if pages is not None:
            raise ShapeError("pages were given without lengths, which say how many keys count")
        ops.check_shapes(q, k, v)
        return {}
    lengths = _integers(lengths, "lengths", (q[0],))
    if pages is None:
        ops.check_shapes(q, k, v)
        room, found = k[2], {"lengths": lengths}
    else:
        ops.check_shapes(q, (q[0], *k[1:]), (q[0], *v[1:]))
        pages = _integers(pages, "pages", (q[0], -1))
        room, found = k[2] * pages.shape[1], {"lengths": lengths, "pages": pages}
        used = pages[np.arange(pages.shape[1]) * k[2] < lengths[:, None]]
        if len(k) != 4 or k[0] != v[0] or (used.size and not 0 <= used.min() <= used.max() < k[0]):
            raise ShapeError(
                f"pages of k {k} and v {v} were named by numbers up to {used.max(initial=0)}; they"
                f" are counted from 0 to {k[0] - 1}, in both"
            )
    if lengths.size and not 0 <= lengths.min() <= lengths.max() <= room:
        raise ShapeError(
            f"lengths from {lengths.min()} to {lengths.max()} were given; there is room for {room}"
            " keys"
        )
    return found


def _integers(array: Array, what: str, shape: tuple[int, int] | tuple[int]) -> Array:
    """The array as i32; raises ShapeError where it is of another shape (-1: any size)."""
    found = np.asarray(array)
    fits = len(found.shape) == len(shape) and all(
        size in (n, -1) for n, size in zip(found.shape, shape, strict=True)
    )
    if found.dtype.kind not in "iu" or not fits:
        wanted = ", ".join("any" if n == -1 else str(n) for n in shape)
        raise ShapeError(
            f"{what} of {found.dtype} {found.shape} were given; they are integers ({wanted})"
        )
    return np.ascontiguousarray(found, np.int32)


def _run_there(
    target: str,
    kind: Attention,
    shape: Shape,
    precision: str,
    q: Any,
    k: Any,
    v: Any,
    operands: Mapping[str, Array],
) -> Any:
    """The result beside q, on the device; nothing waits for it."""
    y = arrays_of.empty_like(q, (*q.shape[:3], kind.value_dim))
    k, v = (one.array if isinstance(one, _Lying) else one for one in (k, v))
    run = _runner_on_device(target, kind, shape, precision)
    run(arrays_of.as_float32(q), k, v, operands, y)
    return arrays_of.as_type_of(y, q)


def _chain(scores: list[Score]) -> Score | None:
    """One function after the other."""
    if not scores:
        return None

    def change(s: Expr, b: Expr, h: Expr, q: Expr, k: Expr) -> Expr:
        for one in scores:
            s = one(s, b, h, q, k)
        return s

    return change


def alibi_slopes(heads: int) -> Array:
    """ALiBi's slopes of so many heads (Press et al., 2021): float32 (H,)."""
    whole = 2 ** math.floor(math.log2(heads))
    first = 2.0 ** (-8.0 * np.arange(1, whole + 1) / whole)
    rest = 2.0 ** (-4.0 * np.arange(1, 2 * (heads - whole), 2) / whole)
    return np.concatenate([first, rest]).astype(np.float32)

"""Attention: which it is (`Attention`), and what it computes, plainly and as flash kernels do.

    s[t, k] = scale * sum over d of q[t, d] * k[k, d]        of each batch and head
    y[t]    = sum over k of softmax(score(s))[t, k] * v[k]   over the keys that the mask admits

Heads of K and V may be fewer than those of Q, which then share them in equal parts.  Where T
queries meet S keys, query t stands at position q = t + S - T: the last one at the last key.

K and V may be caches of which each batch has filled a part (`Attention.lengths`), in one piece or
in pages (`Attention.page`; Kwon et al., 2023).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from kernelgen.errors import ShapeError
from kernelgen.ir.block import BlockFormat
from kernelgen.ir.evaluate import evaluate
from kernelgen.ir.expr import BOOL, F32, I32, Expr, cast, const, number, show, var, walk
from kernelgen.ir.ops.tensors import MANY, position
from kernelgen.ir.truth import Box, Truth, truth

Array = npt.NDArray[Any]

#: variables of score and mask: batch, head of Q, position of the query, position of the key
B, H, K = (var(name, MANY) for name in ("b", "h", "k"))
#: negative where there are more queries than keys
Q = Expr("var", I32, attr=("q", -MANY, MANY))
#: the score before the user's expression
S = number("s")

Score = Callable[[Expr, Expr, Expr, Expr, Expr], Any]
Mask = Callable[[Expr, Expr, Expr, Expr], Any]


@dataclass(frozen=True)
class Operand:
    """An array that score or mask read: f32 or i32 elements, and the names of the integers, given
    at the launch, that say how many elements an index along each axis skips."""

    name: str
    dtype: str
    strides: tuple[str, ...]

    def __getitem__(self, index: Any) -> Expr:
        """An element, by one expression or number for each axis."""
        at = position(self.name, self.strides, index)
        return Expr("element", F32 if self.dtype == "f32" else I32, (at,), self.name)


def operand(name: str, dtype: str, axes: int) -> Operand:
    """An array of so many axes."""
    return Operand(name, dtype, tuple(f"{name}_{i}" for i in range(axes)))


@dataclass(frozen=True)
class Attention:
    """One kind of attention, all that a kernel is specialized for.

    head_dim    elements of a query and of a key, `value_dim` of a value
    k, v        formats of keys and values
    scale       of scores
    score       f32, in s, b, h, q, k (see the module) and operands; None: s itself
    mask        bool, in b, h, q, k and operands; None: all keys count
    operands    arrays that these two read
    sinks       whether each head has a score of its own that takes part in the softmax and adds
                nothing to the sum (f32 `sinks`, one a head)
    lengths     whether batch b has `lengths[b]` keys (i32, one a batch), of the S that there is
                room for; S is that number, then, for what is said of positions
    page        keys of a page, where K and V are (pages, heads, page, D): key k of batch b lies in
                page `pages[b, k // page]` (i32); 0 where they are (B, heads, S, D).  Implies
                `lengths`
    label       what it is called in names; by default a hash of the expressions
    """

    head_dim: int
    k: BlockFormat
    v: BlockFormat
    value_dim: int = 0
    scale: float = 0.0
    score: Expr | None = None
    mask: Expr | None = None
    operands: tuple[Operand, ...] = ()
    sinks: bool = False
    lengths: bool = False
    page: int = 0
    label: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        if self.page < 0:
            raise ShapeError(f"pages of {self.page} keys were asked for; they have at least one")
        object.__setattr__(self, "lengths", self.lengths or self.page > 0)
        object.__setattr__(self, "value_dim", self.value_dim or self.head_dim)
        object.__setattr__(self, "scale", float(self.scale or 1 / math.sqrt(self.head_dim)))
        self.k.row_bytes(self.head_dim)
        self.v.row_bytes(self.value_dim)
        for what, expr, dtype in (("score", self.score, F32), ("mask", self.mask, BOOL)):
            if expr is not None and expr.dtype is not dtype:
                raise ShapeError(
                    f"the {what} expression is {expr.dtype.value}; it must be {dtype.value}"
                )

    @property
    def name(self) -> str:
        """What it is called in names of kernels and files."""
        dims = f"d{self.head_dim}"
        if self.value_dim != self.head_dim:
            dims += f"_{self.value_dim}"
        parts = [dims, self.k.name, *([self.v.name] if self.v is not self.k else [])]
        plain = self.score is None and self.mask is None and not self.sinks
        if self.label or not plain:
            parts.append(self.label or self._digest())
        if self.lengths:
            parts.append(f"pages{self.page}" if self.page else "lengths")
        return "_".join(parts)

    @property
    def plain(self) -> Attention:
        """Its heads and formats alone."""
        return Attention(self.head_dim, self.k, self.v, self.value_dim)

    @property
    def names(self) -> tuple[str, ...]:
        """Names that authors chose, which a kernel's source uses: of fields, and of operands."""
        of_formats = (name for fmt in (self.k, self.v) for name in fmt.names)
        return tuple(dict.fromkeys((*of_formats, *(one.name for one in self.operands))))

    def _digest(self) -> str:
        text = "; ".join(show(e) if e is not None else "" for e in (self.score, self.mask))
        return hashlib.sha256(f"{text}; {self.sinks}".encode()).hexdigest()[:8]

    def tiles(self, *over: Expr) -> Truth:
        """When all, or none, of a tile of queries q_lo..q_hi and keys k_lo..k_hi is admitted; or of
        a tile over other variables of the mask."""
        if self.mask is None:
            return Truth(const(1, BOOL), const(0, BOOL))
        boxes = {x.attr[0]: Box(_renamed(x, "lo"), _renamed(x, "hi")) for x in (over or (Q, K))}
        return truth(self.mask, boxes)


def _renamed(x: Expr, end: str) -> Expr:
    name, lo, hi = x.attr
    return Expr("var", x.dtype, attr=(f"{name}_{end}", lo, hi))


def trace(score: Score | None, mask: Mask | None) -> tuple[Expr | None, Expr | None]:
    """Python functions of expressions as expressions: score(s, b, h, q, k), mask(b, h, q, k)."""
    scored = None if score is None else score(S, B, H, Q, K)
    masked = None if mask is None else mask(B, H, Q, K)
    if scored is not None and not isinstance(scored, Expr):
        scored = const(scored, F32)
    if masked is not None and not isinstance(masked, Expr):
        masked = const(bool(masked), BOOL)
    return (None if scored is None else cast(F32, scored)), masked


# ---- masks and scores in wide use --------------------------------------------------------------


def causal(b: Expr, h: Expr, q: Expr, k: Expr) -> Expr:
    """A query sees keys up to its own position."""
    return k <= q


def window(length: int) -> Mask:
    """A query sees the last `length` keys up to its own position."""

    def admit(b: Expr, h: Expr, q: Expr, k: Expr) -> Expr:
        return (k <= q) & (q - k < length)

    return admit


def prefix(length: int) -> Mask:
    """A query sees keys up to its own position, and all of the first `length`."""

    def admit(b: Expr, h: Expr, q: Expr, k: Expr) -> Expr:
        return (k <= q) | (k < length)

    return admit


def alibi(slopes: Operand) -> Score:
    """A bias that falls with the distance, by a slope of each head (Press et al., 2021)."""

    def change(s: Expr, b: Expr, h: Expr, q: Expr, k: Expr) -> Expr:
        return s + slopes[h] * cast(F32, k - q)

    return change


# ---- what it computes ---------------------------------------------------------------------------


def _shapes(kind: Attention, q: Array, k: Array, v: Array) -> tuple[int, int, int, int, int]:
    """(B, H, T, heads of K and V, S); raises ShapeError where arrays do not fit each other."""
    check_shapes(q.shape, k.shape, v.shape)
    (b, h, t, d), (_, kh, s, dv) = q.shape, v.shape
    if (d, dv) != (kind.head_dim, kind.value_dim):
        raise ShapeError(
            f"q, k, v of shapes {q.shape}, {k.shape}, {v.shape} were given for heads of"
            f" {kind.head_dim} and values of {kind.value_dim} elements"
        )
    return b, h, t, kh, s


def _batches(
    kind: Attention, q: Array, k: Array, v: Array, arrays: Mapping[str, Array]
) -> Iterator[tuple[int, Array, Array, Array]]:
    """What K and V hold, in one piece: (first batch, q, k, v) of all batches at once, or of each by
    itself where they differ in length."""
    if not kind.lengths:
        yield 0, q, k, v
        return
    for b, count in enumerate(arrays["lengths"]):
        if kind.page:
            there = arrays["pages"][b, : -(-int(count) // kind.page)]
            held = (x[there].swapaxes(0, 1) for x in (k, v))
            keys, values = (x.reshape(1, x.shape[0], -1, x.shape[-1]) for x in held)
        else:
            keys, values = k[b : b + 1], v[b : b + 1]
        yield b, q[b : b + 1], keys[:, :, :count], values[:, :, :count]


def check_shapes(q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...]) -> None:
    """Raises ShapeError where q (B, H, T, D), k (B, HK, S, D) and v (B, HK, S, DV) do not fit."""
    if not len(q) == len(k) == len(v) == 4:
        raise ShapeError(
            f"q, k, v of shapes {q}, {k}, {v} were given; all have four axes: batch, head,"
            " position, element"
        )
    fits = q[0] == k[0] and q[3] == k[3] and k[:3] == v[:3]
    if not fits or not k[1] or q[1] % k[1]:
        raise ShapeError(
            f"q, k, v of shapes {q}, {k}, {v} were given: batches must agree, elements of q and k,"
            " positions of k and v, and heads of q must be a multiple of those of k and v"
        )


def strides(kind: Attention, arrays: Mapping[str, Array]) -> dict[str, int]:
    """How many elements an index along each axis of each operand skips, by the stride's name; none
    where there is one element for all."""
    found: dict[str, int] = {}
    for one in kind.operands:
        array = arrays[one.name]
        for name, size, step in zip(one.strides, array.shape, array.strides, strict=True):
            found[name] = step // array.itemsize if size > 1 else 0
    return found


def _evaluated(
    kind: Attention,
    expr: Expr,
    first: int,
    tile: Array,
    q0: int,
    k0: int,
    arrays: Mapping[str, Array],
) -> Array:
    """Score or mask over a tile of scaled products (B, H, T, S), of batches from the `first` on, at
    positions from q0 and k0 on.  One batch or head is enough where it is the same for all."""
    read = reads(expr)
    batches, heads = (
        n if name in read or "s" in read else 1 for name, n in zip("bh", tile.shape, strict=False)
    )
    counts = (batches, heads, *tile.shape[2:])
    starts = dict(zip("bhqk", (first, 0, q0, k0), strict=True))
    given = {
        name: (start + indices).reshape(-1)
        for (name, start), indices in zip(starts.items(), np.indices(counts), strict=True)
    }
    given |= {name: np.asarray(step) for name, step in strides(kind, arrays).items()}
    if "s" in read:
        given["s"] = tile.astype(np.float32).reshape(-1)
    fields = {name: np.ascontiguousarray(a).reshape(-1) for name, a in arrays.items()}
    return np.broadcast_to(evaluate(expr, given, fields), math.prod(counts)).reshape(counts)


def _scores(
    kind: Attention, first: int, q: Array, k: Array, t: range, s: range, arrays: Mapping[str, Array]
) -> Array:
    """Scores of a tile (B, H, T, S), float64, -inf where the mask does not admit a key; `first`:
    the number of the first batch."""
    products = q[:, :, t.start : t.stop] @ k[:, :, s.start : s.stop].swapaxes(2, 3)
    tile: Array = kind.scale * products
    position = t.start + k.shape[2] - q.shape[2]
    if kind.score is not None:
        scored = _evaluated(kind, kind.score, first, tile, position, s.start, arrays)
        tile = np.broadcast_to(scored.astype(np.float64), tile.shape)
    if kind.mask is not None:
        admitted = _evaluated(kind, kind.mask, first, tile, position, s.start, arrays)
        tile = np.where(admitted, tile, -np.inf)
    return tile


def attention(
    kind: Attention,
    q: Array,
    k: Array,
    v: Array,
    arrays: Mapping[str, Array] | None = None,
    sinks: Array | None = None,
) -> Array:
    """Attention in double precision: q (B, H, T, D), k (B, HK, S, D), v (B, HK, S, DV) to
    (B, H, T, DV).  A query that the mask admits no key gives zeros.

    `arrays`: the operands by name, contiguous, with `lengths` and `pages` where the kind has them;
    `sinks`: f32 (H,).
    """
    given = arrays or {}
    parts = [_plain(kind, *part, given, sinks) for part in _batches(kind, q, k, v, given)]
    return np.concatenate(parts)


def _plain(
    kind: Attention,
    first: int,
    q: Array,
    k: Array,
    v: Array,
    arrays: Mapping[str, Array],
    sinks: Array | None,
) -> Array:
    _, h, t, kh, s = _shapes(kind, q, k, v)
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    k, v = (np.repeat(x, h // kh, axis=1) for x in (k, v))
    scores = _scores(kind, first, q, k, range(t), range(s), arrays)
    largest = scores.max(axis=-1, keepdims=True, initial=-np.inf)
    if sinks is not None:
        largest = np.maximum(largest, np.asarray(sinks, np.float64)[None, :, None, None])
    base = np.where(np.isneginf(largest), 0.0, largest)
    with np.errstate(invalid="ignore"):
        weights = np.exp(scores - base)
    total = weights.sum(axis=-1, keepdims=True)
    if sinks is not None:
        total = total + np.exp(np.asarray(sinks, np.float64)[None, :, None, None] - base)
    out: Array = weights @ v
    np.divide(out, np.where(total == 0, 1, total), out=out)
    return out


def flash_attention(
    kind: Attention,
    q: Array,
    k: Array,
    v: Array,
    arrays: Mapping[str, Array] | None = None,
    sinks: Array | None = None,
    tile: tuple[int, int] = (16, 16),
) -> Array:
    """The same in tiles of (queries, keys), with a running maximum and a running sum in float32,
    as kernels do it (Milakov and Gimelshein, 2018; Dao et al., 2022): memory does not grow with
    T * S.  Tiles that the mask does not admit are skipped."""
    given = arrays or {}
    parts = [_flash(kind, *part, given, sinks, tile) for part in _batches(kind, q, k, v, given)]
    return np.concatenate(parts)


def _flash(
    kind: Attention,
    first: int,
    q: Array,
    k: Array,
    v: Array,
    arrays: Mapping[str, Array],
    sinks: Array | None,
    tile: tuple[int, int],
) -> Array:
    b, h, t, kh, s = _shapes(kind, q, k, v)
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    k, v = (np.repeat(x, h // kh, axis=1) for x in (k, v))
    never = kind.tiles().never
    out = np.zeros((b, h, t, kind.value_dim))
    for t0 in range(0, t, tile[0]):
        rows = range(t0, min(t0 + tile[0], t))
        largest = np.full((b, h, len(rows), 1), -np.inf, np.float32)
        total = np.zeros((b, h, len(rows), 1), np.float32)
        if sinks is not None:
            largest[:] = np.asarray(sinks, np.float32)[None, :, None, None]
            total[:] = 1
        sums = np.zeros((b, h, len(rows), kind.value_dim))
        for s0 in range(0, s, tile[1]):
            keys = range(s0, min(s0 + tile[1], s))
            box = {"q_lo": rows.start + s - t, "q_hi": rows.stop - 1 + s - t}
            box |= {"k_lo": keys.start, "k_hi": keys.stop - 1}
            if evaluate(never, box, {}).all():
                continue
            scores = _scores(kind, first, q, k, rows, keys, arrays)
            higher = np.maximum(largest, scores.max(axis=-1, keepdims=True)).astype(np.float32)
            base = np.where(np.isneginf(higher), np.float32(0), higher)
            with np.errstate(invalid="ignore"):
                shrink = np.exp(largest - base)
                weights = np.exp(scores - base)
            total = (total * shrink + weights.sum(axis=-1, keepdims=True)).astype(np.float32)
            part = weights @ v[:, :, keys.start : keys.stop]
            sums, largest = sums * shrink + part, higher
        np.divide(sums, total, out=out[:, :, rows.start : rows.stop], where=total != 0)
    return out


def reads(expr: Expr | None) -> frozenset[str]:
    """Names of the variables that an expression has."""
    if expr is None:
        return frozenset()
    return frozenset(node.attr[0] for node in walk(expr) if node.op == "var")

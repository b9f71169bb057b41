"""What users call from Python: the ops between matmuls.

Functions of elements take arrays or, inside a `kernelgen.map`, expressions.  `dtype` is that of the
result, by default that of the arrays where these agree; all compute in float32.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from kernelgen.api_maps import Kind, MapFunction, as_array, outputs, raw, run, tensor, type_of
from kernelgen.errors import ShapeError
from kernelgen.ir.expr import F32, Expr
from kernelgen.ir.ops import functions as f
from kernelgen.ir.ops import maps, rows
from kernelgen.ir.ops import rope as turning
from kernelgen.ir.ops.rope import Linear as Linear
from kernelgen.ir.ops.rope import Llama3 as Llama3
from kernelgen.ir.ops.rope import Scaling
from kernelgen.ir.ops.rope import Yarn as Yarn
from kernelgen.ir.ops.rows import Rows
from kernelgen.ir.ops.tensors import COL, ROW, Tensor

Array = npt.NDArray[Any]


# ---- element by element ------------------------------------------------------------------------


@functools.cache
def _library(function: Callable[..., Expr], name: str) -> MapFunction:
    return MapFunction(function, name)


def _each(function: Callable[..., Expr], name: str, *given: Any, **options: Any) -> Any:
    """A function of elements on arrays, or on expressions."""
    if any(isinstance(one, Expr) for one in given):
        return function(*given)
    return _library(function, name)(*given, **options)


def silu(x: Any, *, dtype: Any = None, target: str | None = None, out: Array | None = None) -> Any:
    """x * sigmoid(x)."""
    return _each(f.silu, "silu", x, dtype=dtype, target=target, out=out)


def gelu(
    x: Any,
    approximate: str = "none",
    *,
    dtype: Any = None,
    target: str | None = None,
    out: Array | None = None,
) -> Any:
    """x * (1 + erf(x / sqrt(2))) / 2; with approximate="tanh" by its usual approximation."""
    function, suffix = _gelu_of(approximate)
    return _each(function, f"gelu{suffix}", x, dtype=dtype, target=target, out=out)


def _gelu_of(approximate: str) -> tuple[Callable[..., Expr], str]:
    """The function, and what its name ends with."""
    known = {"none": (f.gelu, ""), "tanh": (f.gelu_tanh, "_tanh")}
    if approximate not in known:
        raise ShapeError(f"gelu was asked for with approximate={approximate!r}; none, tanh are")
    return known[approximate]


def relu(x: Any, *, dtype: Any = None, target: str | None = None, out: Array | None = None) -> Any:
    """x where it is above 0, else 0; NaN stays."""
    return _each(f.relu, "relu", x, dtype=dtype, target=target, out=out)


def sigmoid(
    x: Any, *, dtype: Any = None, target: str | None = None, out: Array | None = None
) -> Any:
    """1 / (1 + exp(-x))."""
    return _each(f.sigmoid, "sigmoid", x, dtype=dtype, target=target, out=out)


def tanh(x: Any, *, dtype: Any = None, target: str | None = None, out: Array | None = None) -> Any:
    """The hyperbolic tangent."""
    return _each(f.tanh, "tanh", x, dtype=dtype, target=target, out=out)


def _swiglu(gate: Expr, up: Expr) -> Expr:
    return f.silu(gate) * f.number(up)


def swiglu(
    gate: Any, up: Any, *, dtype: Any = None, target: str | None = None, out: Array | None = None
) -> Any:
    """silu(gate) * up (Shazeer, 2020)."""
    return _each(_swiglu, "swiglu", gate, up, dtype=dtype, target=target, out=out)


@functools.cache
def _geglu_of(function: Callable[..., Expr]) -> Callable[..., Expr]:
    def geglu(gate: Expr, up: Expr) -> Expr:
        return function(gate) * f.number(up)

    return geglu


def geglu(
    gate: Any,
    up: Any,
    approximate: str = "none",
    *,
    dtype: Any = None,
    target: str | None = None,
    out: Array | None = None,
) -> Any:
    """gelu(gate) * up (Shazeer, 2020)."""
    function, suffix = _gelu_of(approximate)
    gated = _geglu_of(function)
    return _each(gated, f"geglu{suffix}", gate, up, dtype=dtype, target=target, out=out)


def _add(x: Expr, y: Expr) -> Expr:
    return x + y


def _mul(x: Expr, y: Expr) -> Expr:
    return x * y


def add(
    x: Any, y: Any, *, dtype: Any = None, target: str | None = None, out: Array | None = None
) -> Any:
    """x + y."""
    return _each(_add, "add", x, y, dtype=dtype, target=target, out=out)


def mul(
    x: Any, y: Any, *, dtype: Any = None, target: str | None = None, out: Array | None = None
) -> Any:
    """x * y."""
    return _each(_mul, "mul", x, y, dtype=dtype, target=target, out=out)


def _same(x: Expr) -> Expr:
    return x


def cast(x: Any, dtype: Any, *, target: str | None = None, out: Array | None = None) -> Array:
    """x in another type, by name ("f16", "bf16", "f8_e4m3", "f8_e5m2", "i8", ...) or numpy dtype.

    Floats are rounded to the nearest, to even where two are as near; what is too large becomes
    infinite, in f8_e4m3, which has no infinity, NaN.  A float becomes the nearest integer towards
    zero that the type has, NaN 0; an integer that does not fit another type loses its highest bits.
    """
    named = type_of(dtype)
    label = f"cast_{named}"
    result: Array = _library(_same, label)(x, target=target, dtype=named, out=out)
    return result


# ---- rows --------------------------------------------------------------------------------------


def _rows_of(x: Any, what: str) -> Array:
    found = as_array(x)
    if not found.ndim or not found.shape[-1]:
        raise ShapeError(
            f"{what} of an array of shape {found.shape} was asked for; it needs a last axis with"
            " elements"
        )
    return found


class _Call:
    """Collects the arrays of one call."""

    def __init__(self, x: Array) -> None:
        self.shape = x.shape
        self.arrays: dict[str, Array] = {}
        self.shared: list[str] = []

    def rows(self, name: str, x: Any) -> Tensor:
        """An array that broadcasts to all elements."""
        return self._add(name, x, self.shape, 2)

    def row(self, name: str, x: Any) -> Tensor:
        """An array that broadcasts to all rows."""
        return self._add(name, x, self.shape[:-1], 1)

    def columns(self, name: str, x: Any, count: int = 0) -> Tensor:
        """An array of elements that all rows share."""
        given = as_array(x)
        if given.shape != (count or self.shape[-1],):
            raise ShapeError(
                f"{name} of shape {given.shape} was given for rows of {self.shape[-1]} elements"
            )
        self.shared.append(name)
        return self._keep(name, given)

    def _add(self, name: str, x: Any, shape: tuple[int, ...], axes: int) -> Tensor:
        given = as_array(x)
        try:
            full = given if given.shape == shape else np.broadcast_to(given, shape)
        except ValueError:
            raise ShapeError(
                f"{name} of shape {given.shape} was given; it must broadcast to {shape}"
            ) from None
        size = (math.prod(self.shape[:-1]), self.shape[-1])[:axes]
        return self._keep(name, full.reshape(size))

    def _keep(self, name: str, given: Array) -> Tensor:
        dtype = type_of(given.dtype)
        found = raw(given, dtype)
        if any(step % found.itemsize for step in found.strides):
            found = np.ascontiguousarray(found)
        self.arrays[name] = found
        return tensor(name, found, dtype, shared=name in self.shared)

    def run(self, kind: Kind, target: str | None, out: Any = None) -> Any:
        """The results."""
        made, filled = outputs(kind, self.shape, out)
        size = (math.prod(self.shape[:-1]), self.shape[-1])
        run(target, kind, self.arrays, self.shared, size, filled)
        return made[0] if len(made) == 1 else made


def _float_type(x: Array, dtype: Any) -> str:
    if dtype is not None:
        return type_of(dtype)
    own = type_of(x.dtype)
    return own if own.startswith(("f", "bf")) else "f32"


def softmax(
    x: Any,
    *,
    scale: float = 1.0,
    mask: Any = None,
    sinks: Any = None,
    dtype: Any = None,
    target: str | None = None,
    out: Any = None,
) -> Array:
    """Softmax of scale * x over the last axis.

    mask    broadcasts to x: floats are added to the scaled scores; booleans or integers say which
            elements take part
    sinks   broadcasts to the rows: scores that take part in the sum and give no output
    dtype   of the result; by default that of x, of floats

    A row whose scores are all -inf, or of which one is NaN, gives NaN, as in numpy.
    """
    x = _rows_of(x, "softmax")
    call = _Call(x)
    kind = rows.softmax(
        call.rows("x", x),
        dtype=_float_type(x, dtype),
        scale=float(scale),
        mask=None if mask is None else call.rows("mask", mask),
        sinks=None if sinks is None else call.row("sinks", sinks),
    )
    result: Array = call.run(kind, target, out)
    return result


def rms_norm(
    x: Any,
    weight: Any = None,
    eps: float = 1e-6,
    *,
    residual: Any = None,
    dtype: Any = None,
    target: str | None = None,
    out: Any = None,
) -> Any:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis.

    With `residual` it is of x + residual, and the result is (norm, x + residual).
    """
    return _normed(rows.rms_norm, x, eps, residual, dtype, target, out, weight=weight)


def layer_norm(
    x: Any,
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
    *,
    residual: Any = None,
    dtype: Any = None,
    target: str | None = None,
    out: Any = None,
) -> Any:
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last axis.

    With `residual` it is of x + residual, and the result is (norm, x + residual).
    """
    return _normed(rows.layer_norm, x, eps, residual, dtype, target, out, weight=weight, bias=bias)


def _normed(
    norm: Callable[..., Rows], x: Any, eps: float, residual: Any, dtype: Any, target: str | None,
    out: Any, **shared: Any,
) -> Any:  # fmt: skip
    """A norm of x, or of x + residual; `shared`: arrays that all rows share, or None."""
    x = _rows_of(x, norm.__name__)
    call = _Call(x)
    kind = norm(
        call.rows("x", x),
        **{name: None if a is None else call.columns(name, a) for name, a in shared.items()},
        eps=float(eps),
        residual=None if residual is None else call.rows("residual", residual),
        dtype=_float_type(x, dtype),
    )
    return call.run(kind, target, out)


def _reduced(x: Any, make: Callable[..., Rows], what: str, target: str | None) -> Array:
    x = _rows_of(x, what)
    call = _Call(x)
    element = call.rows("x", x)
    dtype = _float_type(x, None)
    whole = element[ROW, COL].dtype is not F32
    result: Array = call.run(make(element, dtype="i32" if whole else dtype), target)
    return result


def row_sum(x: Any, *, target: str | None = None) -> Array:
    """Sums over the last axis, of x's dtype or, of integers, int32, which wraps."""
    return _reduced(x, rows.row_sum, "a sum", target)


def row_max(x: Any, *, target: str | None = None) -> Array:
    """The largest of the last axis, of x's dtype or, of integers, int32; NaN where there is one."""
    return _reduced(x, rows.row_max, "the largest", target)


def row_min(x: Any, *, target: str | None = None) -> Array:
    """The smallest of the last axis, of x's dtype or, of integers, int32; NaN where there is
    one."""
    return _reduced(x, rows.row_min, "the smallest", target)


def argmax(x: Any, *, target: str | None = None) -> Array:
    """The place of the largest element of the last axis, int32: the first of several; that of NaN
    where there is one."""
    x = _rows_of(x, "argmax")
    call = _Call(x)
    result: Array = call.run(rows.argmax(call.rows("x", x)), target)
    return result


#: above it, sorting is the better way
MOST_LARGEST = 64


def topk(x: Any, k: int, *, target: str | None = None) -> tuple[Array, Array]:
    """The k largest elements of the last axis, from the largest down, and their places, int32:
    (..., k) both.  Of equal ones the first comes first; NaN counts as the largest.

    Each takes two passes over the row, so this is for a few, at most 64.
    """
    x = _rows_of(x, "topk")
    if not 1 <= k <= min(x.shape[-1], MOST_LARGEST):
        raise ShapeError(
            f"the {k} largest of {x.shape[-1]} elements were asked for; 1 to"
            f" {min(x.shape[-1], MOST_LARGEST)} are allowed"
        )
    call = _Call(x)
    element = call.rows("x", x)
    whole = element[ROW, COL].dtype is not F32
    kind = rows.topk(element, k, dtype="i32" if whole else _float_type(x, None))
    largest, places = call.run(kind, target)
    shape = (*x.shape[:-1], k)
    return largest.reshape(shape), places.reshape(shape)


def rope(
    x: Any,
    positions: Any = None,
    *,
    dims: int | None = None,
    base: float = 10000.0,
    pairing: str = "half",
    scaling: Scaling | None = None,
    dtype: Any = None,
    target: str | None = None,
    out: Any = None,
) -> Array:
    """Rotary positions: pairs of elements of the last axis turn by an angle of their position.

    x          (..., positions, elements)
    positions  integers from 0 on that broadcast to x's shape without the last axis; by default
               0, 1, ... along the last but one
    dims       elements that turn, an even number; all by default, and the others are copied
    base       the angle of pair i is position * base^(-2i / dims)
    pairing    "half": elements i and i + dims / 2 (as GPT-NeoX has it); "neighbours": 2i and 2i + 1
    scaling    Linear, Yarn or Llama3, for contexts longer than the trained one

    An angle is off by position * 2^-49 + 2^-32 of a turn at most (1e-8 radians at position
    2^20), sine and cosine of it by 1.1e-7.
    """
    x = _rows_of(x, "rope")
    dims = x.shape[-1] if dims is None else dims
    if not 0 < dims <= x.shape[-1] or dims % 2:
        raise ShapeError(
            f"dims={dims} was given for rows of {x.shape[-1]} elements; it is an even number above"
            " 0, and not more"
        )
    if pairing not in ("half", "neighbours"):
        raise ShapeError(f"pairing {pairing!r} was asked for; half and neighbours are allowed")
    if x.ndim < 2 and positions is None:
        raise ShapeError(f"x of shape {x.shape} has no axis of positions; give positions=")
    where = np.arange(x.shape[-2], dtype=np.int32) if positions is None else np.asarray(positions)
    if where.dtype.kind not in "iu" or (where.size and not 0 <= where.min() <= where.max() < 2**31):
        raise ShapeError("positions must be integers from 0 to 2^31 - 1")
    whole, rest = turning.turns_of(dims, base, scaling)
    call = _Call(x)
    kind = maps.rotated(
        call.rows("x", x),
        call.row("positions", where.astype(np.int32, copy=False)),
        call.columns("turns", whole, dims // 2),
        call.columns("rest", rest, dims // 2),
        dims=dims,
        neighbours=pairing == "neighbours",
        magnitude=turning.magnitude(scaling),
        dtype=_float_type(x, dtype),
        label="rope" if pairing == "half" else "rope_neighbours",
    )
    result: Array = call.run(kind, target, out)
    return result

"""What users call from Python: products with an epilogue, gated ones, and a norm in front."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from kernelgen import api
from kernelgen import targets as target_list
from kernelgen.api_rows import rms_norm
from kernelgen.dispatch import Fallback, any_array, of_choice, once, report
from kernelgen.errors import ShapeError
from kernelgen.generate import generate_walk
from kernelgen.ir.block import BlockFormat
from kernelgen.ir.expr import Expr
from kernelgen.ir.ops import epilogue as ops
from kernelgen.ir.ops.epilogue import NORM_WEIGHT, Activation, Epilogue, Fusion, Operand, RmsNorm
from kernelgen.problem import row_bucket
from kernelgen.recording import launch
from kernelgen.targets.base import Kernel, Product
from kernelgen.tensor import Interleaved, QuantTensor, Stacked
from kernelgen.tuner import lookup
from kernelgen.tuner.lookup import Choice
from kernelgen.tuner.problems import MatmulProblem

Array = npt.NDArray[Any]

#: a function of the sum, or what was made of it so far, and of operands
Function = Callable[..., Any]


@functools.lru_cache(maxsize=1024)
def _fusion(
    scale: str | None, bias: bool, activation: str | Activation | None, function: Function | None,
    axes: tuple[str, ...], residual: bool, eps: float | None,
) -> Fusion:  # fmt: skip
    """The epilogue and norm of a call: `scale` and `axes` are axes of operands."""
    operands = [Operand("multiplier", scale)] if scale is not None else []
    operands += [Operand("bias", "n")] * bias + [Operand("residual", "mn")] * residual
    own = [Operand(f"operand{i}", one) for i, one in enumerate(axes)]

    def add(name: str) -> Activation:
        return lambda value: value + Operand(name, "").value

    def user(value: Expr) -> Expr:
        assert function is not None
        return ops.trace(function, value, *(one.value for one in own))

    name = activation if isinstance(activation, str) else "own"
    value, label = ops.chain(
        ("scale", (lambda s: s * Operand("multiplier", "").value) if scale is not None else None),
        ("bias", add("bias") if bias else None),
        (name, None if activation is None else ops.activation(activation)),
        ("own", user if function else None),
        ("residual", add("residual") if residual else None),
    )
    norm = None if eps is None else RmsNorm(eps)
    if not label:
        return Fusion(norm=norm)
    named = function is None and not callable(activation)
    return Fusion(Epilogue(value, (*operands, *own), label=label if named else ""), norm)


@functools.lru_cache(maxsize=64)
def _gated(activation: str | Activation, eps: float | None) -> Fusion:
    return Fusion(ops.gated(activation), None if eps is None else RmsNorm(eps))


def kernel_for(
    target: str, fmt: BlockFormat, shape: tuple[int, int, int], precision: str,
    max_error: float | None, fused: Fusion,
) -> Kernel:  # fmt: skip
    """The kernel that serves a product (M, N, K), N the rows of weights: in the configuration that
    the tuner's cache has for the plain product, or the default where that does not suit."""
    runtime, manifest = api.require(target), target_list.get(target)
    choice = lookup.choose(manifest, runtime, fmt, precision, shape, max_error)
    return _kernel(target, fmt, choice, shape[0], fused)


def _kernel(target: str, fmt: BlockFormat, choice: Choice, m: int, fused: Fusion) -> Kernel:
    runtime, manifest, config = api.require(target), target_list.get(target), choice.config
    gated = fused.epilogue is not None and fused.epilogue.gated
    if gated and choice.walk.pairs(config):
        config = choice.walk.default(fmt, runtime.capabilities(), m)
    return generate_walk(choice.walk, fmt, manifest, config, fused)


@once
def _runner(
    target: str, fmt: BlockFormat, m: int, n: int, k: int, precision: str,
    max_error: float | None, fused: Fusion,
) -> tuple[Kernel, Product, tuple[Fallback, ...]]:  # fmt: skip
    """The kernel, compiled, and what it does less well than could be wished; the one look-up of a
    warm call."""
    runtime, manifest = api.require(target), target_list.get(target)
    choice = lookup.choose(manifest, runtime, fmt, precision, (m, n, k), max_error)
    kernel = _kernel(target, fmt, choice, m, fused)
    found = of_choice(manifest, choice, fmt, precision, max_error)
    return kernel, runtime.matmul(kernel), found


def matmul(
    x: Array,
    w: QuantTensor | Stacked,
    *,
    scale: Any = None,
    bias: Any = None,
    activation: str | Activation | None = None,
    epilogue: Function | None = None,
    operands: Sequence[Any] = (),
    residual: Any = None,
    norm: Any = None,
    norm_eps: float = 1e-6,
    target: str | None = None,
    precision: str = "auto",
    max_error: float | None = None,
    out: Array | None = None,
    on_fallback: str | None = None,
) -> Array:
    """`kernelgen.matmul` where something is fused with it; it says what each argument is."""
    if operands and epilogue is None:
        raise ShapeError(
            f"{len(operands)} operands were given without an epilogue that takes them; give a"
            " function of the sum and these"
        )
    n, k = w.shape if len(w.shape) == 2 else api.not_a_matrix(w)
    rows = _ordered(_rows(x, k, w.shape), w)
    wanted = (*x.shape[:-1], n)
    given: dict[str, Array] = {}
    axes = []
    scale_axes = None
    if scale is not None:
        scale_axes, given["multiplier"] = _operand(scale, wanted, "scale")
    if bias is not None:
        given["bias"] = _exactly(bias, (n,), "bias")
    if residual is not None:
        given["residual"] = _exactly(residual, wanted, "residual").reshape(-1, n)
    for i, one in enumerate(operands):
        found, given[f"operand{i}"] = _operand(one, wanted, f"operand {i}")
        axes.append(found)
    if norm is not None:
        given[NORM_WEIGHT] = _ordered(_exactly(norm, (k,), "norm"), w)
    fused = _fusion(
        scale_axes, bias is not None, activation, epilogue, tuple(axes), residual is not None,
        None if norm is None else float(norm_eps),
    )  # fmt: skip
    name = target or api.default_target(on_fallback)
    return _run(x, rows, wanted, given, out, name, w.format, n, precision, max_error, fused,
                lambda kernel: w, on_fallback)  # fmt: skip


@any_array()
def gated_matmul(
    x: Any,
    gate: QuantTensor,
    up: QuantTensor,
    activation: str | Activation = "silu",
    *,
    norm: Any = None,
    norm_eps: float = 1e-6,
    target: str | None = None,
    precision: str = "auto",
    max_error: float | None = None,
    out: Any = None,
    on_fallback: str | None = None,
) -> Any:
    """y = activation(x @ gate.T) * (x @ up.T) in one kernel: SwiGLU, GEGLU and their like.

    x           (..., K) float32, float16 or bfloat16, of any library
    gate, up    (N, K) in the same format
    activation  a name (see `kernelgen.matmul`), or a function of an expression
    norm, norm_eps, target, precision, max_error, out, on_fallback   as `kernelgen.matmul` has them

    Returns (..., N) of x's dtype and library.  The first call makes one matrix of both, whose rows
    alternate, and repacks it; `gate` keeps that copy, as large as both, as long as it lives.
    Raises ShapeError, TargetError, CompileError.
    """
    n, k = gate.shape if len(gate.shape) == 2 else api.not_a_matrix(gate)
    rows = _rows(x, k, gate.shape)
    if up.shape != gate.shape or up.format is not gate.format:
        raise ShapeError(
            f"gate is {gate.format.name} of shape {gate.shape} and up {up.format.name} of shape"
            f" {up.shape}; both have one format and one shape"
        )
    if gate.columns is not up.columns and not np.array_equal(
        np.asarray(gate.columns), np.asarray(up.columns)
    ):
        raise ShapeError("gate and up have their columns in different orders; multiply one by one")
    rows = _ordered(rows, gate)
    given = {} if norm is None else {NORM_WEIGHT: _ordered(_exactly(norm, (k,), "norm"), gate)}
    fused = _gated(activation, None if norm is None else float(norm_eps))
    name = target or api.default_target(on_fallback)
    return _run(x, rows, (*x.shape[:-1], n), given, out, name, gate.format, 2 * n, precision,
                max_error, fused, lambda kernel: _both(gate, up, kernel.walk.apart),
                on_fallback)  # fmt: skip


def _both(gate: QuantTensor, up: QuantTensor, apart: int) -> Interleaved:
    """The two as one, kept by the first."""
    key = ("gated", id(up), apart)  # of a tensor that lives as long as the entry, which holds it
    found: Interleaved | None = gate.prepared.get(key)
    if found is None:
        found = gate.prepared.setdefault(key, Interleaved(gate, up, apart))
    return found


def _run(
    x: Array, rows: Array, wanted: tuple[int, ...], given: Mapping[str, Array], out: Array | None,
    target: str, fmt: BlockFormat, weight_rows: int, precision: str, max_error: float | None,
    fused: Fusion, weights: Callable[[Kernel], Any], on_fallback: str | None,
) -> Array:  # fmt: skip
    """Call the kernel of a fusion, and give what it made in x's dtype and shape."""
    m, n = len(rows), wanted[-1]
    if out is not None:
        _check_apart(out, api.writable(out, x.shape, n, x), given)
    y = out.reshape(m, n) if out is not None and out.dtype == np.float32 else None
    if y is None:
        y = np.empty((m, n), np.float32)
    if y.size:
        kernel, run, fallbacks = _runner(
            target, fmt, row_bucket(m), weight_rows, rows.shape[1], precision, max_error, fused
        )
        if fallbacks:
            report(fallbacks, on_fallback)
        if fused.norm is not None and not kernel.normalizes:
            rows = rms_norm(rows, given[NORM_WEIGHT], fused.norm.eps, target=target)
        w = weights(kernel)
        launch(run, rows, w, y, given, fills=(y,))
        if isinstance(w, Interleaved | Stacked) and w.prepared:
            w.forget()
    if out is not None:
        if out.dtype != np.float32:
            out[...] = y.reshape(wanted)
        return out
    result = y.reshape(wanted)
    return result if x.dtype == np.float32 else result.astype(x.dtype)


def _rows(x: Array, k: int, weights: tuple[int, ...]) -> Array:
    """Activations as contiguous float32 (M, K)."""
    if not x.shape or x.shape[-1] != k:
        raise ShapeError(
            f"x of shape {x.shape} was given for weights of shape {weights}: x needs {k} columns"
        )
    rows = x if x.dtype == np.float32 else api.as_float32(x)
    return np.ascontiguousarray(rows.reshape(x.size // k if k else 0, k))


def _ordered(array: Array, w: QuantTensor | Stacked) -> Array:
    """Columns in the order in which the weights have them."""
    return array if w.columns is None else np.ascontiguousarray(array[..., w.columns])


def _exactly(given: Any, shape: tuple[int, ...], what: str) -> Array:
    """An array of exactly this shape, as float32."""
    array = _numbers(given, what)
    if array.shape != shape:
        raise ShapeError(f"{what} of shape {array.shape} was given; it must be of shape {shape}")
    return np.ascontiguousarray(array, np.float32)


def _operand(given: Any, shape: tuple[int, ...], what: str) -> tuple[str, Array]:
    """The axes of an array that broadcasts to a result of this shape (..., N), and its numbers as
    these axes have them."""
    array = _numbers(given, what)
    try:
        fits = np.broadcast_shapes(array.shape, shape) == shape
    except ValueError:
        fits = False
    if not fits:
        raise ShapeError(
            f"{what} of shape {array.shape} was given; it must broadcast to the result, {shape}"
        )
    array = array.astype(np.float32, copy=False)
    if array.size == 1:
        return "", array.reshape(1)
    if array.size == array.shape[-1]:
        return "n", array.reshape(-1)
    if array.shape[-1] == 1:
        return "m", np.ascontiguousarray(np.broadcast_to(array, (*shape[:-1], 1))).reshape(-1)
    return "mn", np.ascontiguousarray(np.broadcast_to(array, shape)).reshape(-1, shape[-1])


def _numbers(given: Any, what: str) -> Array:
    array = np.asarray(given)
    if array.dtype.kind not in "fiu":
        raise ShapeError(f"{what} is an array of {array.dtype}; numbers are allowed")
    return array


def _check_apart(out: Array, same: Array, given: Mapping[str, Array]) -> None:
    """Raises ShapeError where `out` overlaps what is read, and is not the residual itself."""
    place = out.__array_interface__["data"]
    for name, array in given.items():
        whole = name == "residual" and array.__array_interface__["data"] == place
        if not whole and np.may_share_memory(out, array):
            raise ShapeError(
                f"out overlaps {name}; it may be the residual itself, and nothing else that is read"
            )


def launches_of(target: str, problem: MatmulProblem, fused: Fusion) -> list[str]:
    """What runs, in order, for a product with N columns of y that something is fused with."""
    (m, n, k), gated = problem.shape, fused.epilogue is not None and fused.epilogue.gated
    kernel = kernel_for(
        target, problem.fmt, (m, 2 * n if gated else n, k), problem.precision, problem.max_error,
        fused,
    )  # fmt: skip
    before = [one for op, one in kernel.needs.items() if op != "prepare"]
    lines = [one.name for one in (*before, kernel)]
    if fused.norm is not None and not kernel.normalizes:
        reason = f"no kernel of walk {kernel.walk.name} takes activations on its own"
        lines.insert(0, f"the norm runs before, in a kernel of its own: {reason}")
    if gated:
        lines[-1] += " (gate and up in one kernel)"
    return lines


__all__ = ["gated_matmul", "kernel_for", "launches_of", "matmul"]

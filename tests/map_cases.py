"""Maps and row reductions that tests run: what they should give in double precision, and where."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from math import erf
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest

from kernelgen import targets
from kernelgen.generate import generate_walk
from kernelgen.ir.ops import library, rope
from kernelgen.ir.ops.maps import Map
from kernelgen.ir.ops.samples import poisoned, sample
from kernelgen.targets.base import EMULATED, Runtime
from kernelgen.targets.device import DeviceRuntime
from kernelgen.targets.maps import Kind, written
from tests.device_checks import GuardedDriver

Array = npt.NDArray[Any]

#: targets, and the variant of each that runs here
VARIANTS = {
    "numpy": "", "c": "", "opencl": "", "wgsl": "", "cuda": EMULATED, "metal": EMULATED,
    "triton": "",
}  # fmt: skip

#: numpy's types for what bits stand for
FLOATS: dict[str, Any] = {
    "f32": np.float32, "f16": np.float16, "bf16": ml_dtypes.bfloat16,
    "f8_e4m3": ml_dtypes.float8_e4m3fn, "f8_e5m2": ml_dtypes.float8_e5m2,
}  # fmt: skip

#: units in the last place of results of these types, relative to the largest of them
STEPS = {"f32": 2e-6, "f16": 2.0**-10, "bf16": 2.0**-7}


@functools.cache
def device(name: str) -> Runtime:
    """The runtime of a target, its results poisoned and guarded; skips the test without one."""
    found = targets.get(name).runtime(VARIANTS[name])
    reason = found.available()
    if reason is not None:
        pytest.skip(reason)
    if VARIANTS[name] == EMULATED or not isinstance(found, DeviceRuntime):
        return found  # emulated buffers are poisoned, and end where memory ends
    fresh, guarded = type(found)(), GuardedDriver(found.driver())
    fresh.driver = lambda: guarded  # type: ignore[method-assign, return-value, assignment]
    return fresh


def apply(name: str, kind: Kind, **changes: Any) -> Any:
    """The kernel of a kind, ready to run, in the default configuration but for the changes."""
    target = targets.get(name)
    walk = target.walk("map" if isinstance(kind, Map) else "rows", kind)
    caps = device(name).capabilities()
    config = walk.config.from_dict(walk.default(kind, caps).as_dict() | changes)
    assert walk.refuses(config, kind, caps) is None
    return device(name).apply(generate_walk(walk, kind, target, config))


def widened(dtype: str, array: Array) -> Array:
    """Elements as they lie in memory, as float64."""
    if dtype in FLOATS and array.dtype.kind != "f":
        array = np.ascontiguousarray(array).view(FLOATS[dtype])
    return array.astype(np.float64)


def arrays_of(kind: Kind, m: int, n: int) -> dict[str, Array]:
    """Inputs as they lie in memory; rows lie apart."""
    rng = np.random.default_rng(100 * m + n)
    return {one.name: sample(one, m, n, rng) for one in kind.inputs}


def results(run: Any, kind: Kind, arrays: Mapping[str, Array], m: int, n: int) -> list[Array]:
    """Outputs as float64, in their order."""
    found = poisoned(kind, m, n)
    run(arrays, m, n, found)
    return [widened(one.dtype, found[one.name]) for one in written(kind)]


def largest_error(run: Any, name: str, dtype: str, m: int, n: int) -> float:
    """Of one of the library, relative to the largest number, against double precision."""
    kind = library.get(name, dtype)
    arrays = arrays_of(kind, m, n)
    got = results(run, kind, arrays, m, n)
    given = [widened(one.dtype, arrays[one.name]) for one in kind.inputs]
    want = WANTED[name](*given)
    want = want if isinstance(want, tuple) else (want,)
    assert len(want) == len(got)
    return max(error(a, b) for a, b in zip(got, want, strict=True))


def error(got: Array, want: Array) -> float:
    """The largest difference, relative to the largest number."""
    assert got.shape == want.shape and np.isfinite(got).all()
    return float(np.abs(got - want).max(initial=0) / max(1e-30, np.abs(want).max(initial=0)))


# ---- in double precision -------------------------------------------------------------------------


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def silu(x: Array) -> Array:
    return x * sigmoid(x)


def gelu(x: Array) -> Array:
    return 0.5 * x * (1 + np.vectorize(erf, otypes=[float])(x / np.sqrt(2)))


def gelu_tanh(x: Array) -> Array:
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def softmax(x: Array, mask: Array | None = None, sinks: Array | None = None) -> Array:
    x = x if mask is None else np.where(mask != 0, x, -np.inf)
    top = x.max(-1, keepdims=True)
    top = top if sinks is None else np.maximum(top, sinks[:, None])
    e = np.exp(x - top)
    return e / (e.sum(-1, keepdims=True) + (0 if sinks is None else np.exp(sinks[:, None] - top)))


def rms_norm(x: Array, weight: Array) -> Array:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * weight


def layer_norm(x: Array, weight: Array, bias: Array) -> Array:
    away = x - x.mean(-1, keepdims=True)
    return away / np.sqrt((away**2).mean(-1, keepdims=True) + 1e-5) * weight + bias


def turned(x: Array, positions: Array, frequencies: Array, neighbours: bool) -> Array:
    """Rotary positions of all elements of x, (rows, elements)."""
    half = x.shape[-1] // 2
    first, second = (
        (np.s_[..., ::2], np.s_[..., 1::2])
        if neighbours
        else (np.s_[..., :half], np.s_[..., half:])
    )
    angle = positions[:, None] * frequencies
    y = np.empty_like(x)
    y[first] = x[first] * np.cos(angle) - x[second] * np.sin(angle)
    y[second] = x[first] * np.sin(angle) + x[second] * np.cos(angle)
    return y


def _rope(neighbours: bool) -> Callable[..., Array]:
    return lambda x, positions, *_: turned(
        x, positions, rope.frequencies(library.HEAD_DIM), neighbours
    )


def top(x: Array, k: int) -> tuple[Array, Array]:
    order = np.argsort(-x, axis=-1, kind="stable")[:, :k]
    found = np.take_along_axis(x, order, -1)
    return found, order.astype(np.float64)


def rounded(dtype: str) -> Callable[[Array], Array]:
    def to(x: Array) -> Array:
        return x.astype(np.float32).astype(FLOATS[dtype]).astype(np.float64)

    return to


WANTED: dict[str, Callable[..., Any]] = {
    "add": lambda x, y: x + y, "mul": lambda x, y: x * y, "relu": lambda x: np.maximum(x, 0),
    "sigmoid": sigmoid, "tanh": np.tanh, "silu": silu, "gelu": gelu, "gelu_tanh": gelu_tanh,
    "swiglu": lambda gate, up: silu(gate) * up, "geglu": lambda gate, up: gelu(gate) * up,
    **{f"cast_{dtype}": rounded(dtype) for dtype in FLOATS},
    "rope": _rope(False), "rope_neighbours": _rope(True),
    "softmax": softmax, "softmax_mask": softmax, "rms_norm": rms_norm,
    "rms_norm_residual": lambda x, weight, other: (rms_norm(x + other, weight), x + other),
    "layer_norm": layer_norm, "sum": lambda x: x.sum(-1), "max": lambda x: x.max(-1),
    "min": lambda x: x.min(-1), "argmax": lambda x: x.argmax(-1).astype(np.float64),
    "top8": lambda x: top(x, 8),
}  # fmt: skip

"""Runs the generated Python: compiles its text, with lines that tracebacks can show."""

from __future__ import annotations

import functools
import linecache
import platform
import threading
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from kernelgen.config import Capabilities
from kernelgen.ir.ops import Activations
from kernelgen.targets.attention import arrays
from kernelgen.targets.base import NONE, Array, Kernel, Product, Weights, check_rows
from kernelgen.targets.maps import Apply, dense, strides, written


class NumpyRuntime:
    """The numpy target on this machine."""

    def __init__(self) -> None:
        self._functions: dict[str, Callable[..., Any]] = {}
        self._lock = threading.Lock()

    def available(self) -> str | None:
        """None: kernelgen itself needs numpy."""
        return None

    def expected(self) -> str | None:
        """A CPU is always there."""
        return "the CPU is always there"

    def on_cpu(self) -> bool:
        """It is."""
        return True

    def how(self) -> str:
        """What results here are worth."""
        return "run"

    def capabilities(self) -> Capabilities:
        """Nothing that a configuration could count on."""
        return Capabilities()

    def describe(self) -> list[dict[str, Any]]:
        """numpy, and the library that multiplies for it."""
        return [{"device": platform.machine(), "numpy": np.__version__, "blas": blas()}]

    def dequantize(self, kernel: Kernel, w: Weights) -> Array:
        """Values of w, float32, of its shape."""
        blocks = w.data.reshape(-1, w.format.nbytes)
        values: Array = self.function(kernel)(blocks).reshape(w.shape)
        return values

    def get_rows(self, kernel: Kernel, w: Weights, ids: Array) -> Array:
        """Values of the rows of w that `ids`, integers (R,), names: float32 (R, K)."""
        blocks = w.data.reshape(-1, w.data.shape[-1])
        check_rows(ids, len(blocks))
        rows: Array = self.function(kernel)(blocks, ids)
        return rows

    def quantize(
        self, kernel: Kernel, x: Array, operands: Mapping[str, Array] = NONE
    ) -> Activations:
        """Activations x, float32 (M, K), as int8 in the form of the kernel's format."""
        kernel.format.row_bytes(x.shape[1])
        return Activations(*self.function(kernel)(x, *operands.values()))

    def prepare(self, kernel: Kernel, w: Weights) -> Array:
        """The native blocks."""
        return w.data

    def attention(
        self, kernel: Kernel
    ) -> Callable[[Array, Weights, Weights, Mapping[str, Array], Array], None]:
        """A function of q, k, v, operands by name, and y, which it fills."""
        function = self.function(kernel)
        names = [a.name for a in arrays(kernel.subject)]

        def run(q: Array, k: Weights, v: Weights, operands: Mapping[str, Array], y: Array) -> None:
            y[...] = function(q, k.data, v.data, *(operands[name] for name in names))

        return run

    def matmul(self, kernel: Kernel) -> Product:
        """A function of x, float32 (M, K), w (N, K) and y, float32 (M, N), which it fills, and of
        operands by name."""
        function = self.function(kernel)
        names = [a.name for a in kernel.arguments if a.role == "in"][2:]

        def run(x: Array, w: Weights, y: Array, operands: Mapping[str, Array] = NONE) -> None:
            y[...] = function(x, w.data, *(operands[name] for name in names))

        return run

    def apply(self, kernel: Kernel) -> Apply:
        """A function of arrays by name, rows, columns, and arrays that it fills."""
        function, kind = self.function(kernel), kernel.subject

        def run(inputs: Mapping[str, Array], m: int, n: int, outputs: Mapping[str, Array]) -> None:
            arrays = {one.name: dense(inputs[one.name]) for one in kind.inputs}
            found = function(*arrays.values(), m, n, *strides(kind, arrays).values())
            for one, values in zip(written(kind), found, strict=True):
                outputs[one.name][...] = values

        return run

    def function(self, kernel: Kernel) -> Callable[..., Any]:
        """The entry point of a kernel's source."""
        with self._lock:
            found = self._functions.get(kernel.hash)
            if found is None:
                found = self._functions[kernel.hash] = _load(kernel)
            return found


def _load(kernel: Kernel) -> Callable[..., Any]:
    name = f"<kernelgen {kernel.entry} {kernel.hash}>"
    # entries without a time of change are never looked for on disk
    lines = kernel.source.splitlines(keepends=True)
    linecache.cache[name] = (len(kernel.source), None, lines, name)
    module: dict[str, Any] = {"__name__": f"kernelgen_generated_{kernel.entry}"}
    exec(compile(kernel.source, name, "exec"), module)
    function: Callable[..., Any] = module[kernel.entry]
    return function


def blas() -> str:
    """Name and version of the BLAS that numpy was built with."""
    config: Any = np.show_config(mode="dicts")
    found = config.get("Build Dependencies", {}).get("blas", {})
    return " ".join(filter(None, (found.get("name"), found.get("version")))) or "unknown"


@functools.cache
def runtime(variant: str = "") -> NumpyRuntime:
    """The runtime."""
    return NumpyRuntime()

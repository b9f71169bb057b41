"""Calls kernels with arrays that end where memory ends:  python -m tests.c.guarded ISA FORMAT...

A step beyond an array, or a write into an input, ends the process with a signal.  Results are
compared, and outputs are poisoned before.  It prints the number of calls.
"""

from __future__ import annotations

import ctypes
import itertools
import mmap
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from kernelgen import targets
from kernelgen.generate import generate
from kernelgen.ir import formats
from kernelgen.ir.block import BlockFormat
from kernelgen.ir.ops import matmul, quantize_activations
from kernelgen.problem import relative_error, tolerance
from kernelgen.targets.base import Kernel
from kernelgen.targets.c.runtime import CRuntime, isa_named
from kernelgen.tensor import QuantTensor
from kernelgen.verify import activations, sample_weights

Array = npt.NDArray[Any]

_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_NOTHING, _READ = 0, 1


class Guarded:
    """An array between two pages that nobody may touch, as near to one of them as its alignment
    allows; read-only unless it is an output."""

    def __init__(self, data: Array, *, writable: bool, at_end: bool) -> None:
        page = mmap.PAGESIZE
        pages = -(-max(data.nbytes, 1) // page)
        self._map = mmap.mmap(-1, (pages + 2) * page)
        base = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        offset = page + (pages * page - data.nbytes if at_end else 0)
        self.array: Array = np.frombuffer(
            self._map, data.dtype, data.size, offset
        ).reshape(data.shape)  # fmt: skip
        self.array[...] = data
        _protect(base, page, _NOTHING)
        _protect(base + (pages + 1) * page, page, _NOTHING)
        if not writable:
            _protect(base + page, pages * page, _READ)


def _protect(address: int, size: int, how: int) -> None:
    if _LIBC.mprotect(address, size, how) != 0:
        raise OSError(ctypes.get_errno(), "mprotect failed")


class Caller:
    """Calls kernels with guarded arrays."""

    def __init__(self, isa: str, at_end: bool) -> None:
        self.runtime = CRuntime(isa_named(isa))
        self.at_end = at_end

    def __call__(self, kernel: Kernel, *given: Array | int) -> list[Array]:
        """The outputs of a kernel; what is given for them has their shape and dtype."""
        kept: list[Guarded | int] = []
        outputs: list[Array] = []
        for argument, value in zip(kernel.arguments, given, strict=True):
            if isinstance(value, int):
                kept.append(value)
                continue
            reads = argument.role == "in"
            if not reads:
                value = np.full(value.nbytes, 0xFF, np.uint8).view(value.dtype).reshape(value.shape)
            kept.append(Guarded(value, writable=not reads, at_end=self.at_end))
            if argument.role == "out":
                outputs.append(kept[-1].array)  # type: ignore[union-attr]
        self.runtime.program(kernel)(*(a if isinstance(a, int) else a.array for a in kept))
        return outputs

    def size(self, kernel: Kernel, what: str, *sizes: int) -> int:
        """What a kernel says it needs."""
        return self.runtime.program(kernel).sizes(what)(*sizes)


def shapes(fmt: BlockFormat, lanes: int) -> Iterator[tuple[int, int, int]]:
    """(M, N, K) in which no tile is full, one is just full, or one has a single row."""
    yield from itertools.product((1, 7), (1, lanes, lanes + 1), (fmt.block, 3 * fmt.block))


def check(call: Caller, fmt: BlockFormat, m: int, n: int, k: int) -> Iterator[str]:
    """Runs every kernel of a format; what is wrong, or "" for each call that is right."""
    target = targets.get("c")
    w = QuantTensor(fmt, (n, k), sample_weights(fmt, n, k))
    x, values = activations(m, k), w.dequantize()

    kernel = generate("dequantize", fmt, target)
    got = call(kernel, w.data, np.empty((n, k), np.float32), n * k // fmt.block)
    yield _say(kernel, got, [values])

    kernel = generate("get_rows", fmt, target)
    ids = np.array([n - 1, 0, n - 1])
    got = call(kernel, w.data, ids, np.empty((3, k), np.float32), 3, k)
    yield _say(kernel, got, [values[ids]])

    seen = {"fp32": x}
    if not fmt.float_codes:
        quantized = quantize_activations(x, fmt.block, fmt.group)
        seen["int8"] = quantized.values()
        kernel = generate("quantize", fmt, target)
        wanted = [quantized.q, quantized.scale, quantized.sums]
        yield _say(kernel, call(kernel, x, *wanted, m, k), wanted)

    prepare = generate("prepare", fmt, target)
    (tiles,) = call(prepare, w.data, np.empty(call.size(prepare, "bytes", n, k), np.uint8), n, k)
    config = target.walk("matmul", fmt).config
    for precision, layout in itertools.product(seen, ("interleaved", "native")):
        chosen = config.from_dict({"columns": 4, "layout": layout})
        kernel = generate("matmul", fmt, target, chosen, precision)
        given = [x, tiles if layout == "interleaved" else w.data, np.empty((m, n), np.float32)]
        if precision == "int8":
            given.append(np.empty(call.size(kernel, "scratch", m, k), np.uint8))
        yield _say(kernel, call(kernel, *given, m, n, k), [matmul(seen[precision], values)])


def _say(kernel: Kernel, got: list[Array], wanted: list[Array]) -> str:
    # a sum may cancel where there are few results, so that its error is no measure: bytes beyond
    # the arrays would change more than this
    bound = 100 * tolerance(kernel.op)
    errors = [relative_error(a, b) for a, b in zip(got, wanted, strict=True)]
    return "" if max(errors) <= bound else f"{kernel.entry} {kernel.config}: error {max(errors)}"


def main(isa: str, names: list[str]) -> int:
    calls = 0
    for at_end in (True, False):
        call = Caller(isa, at_end)
        for name in names:
            fmt = formats.get(name)
            for m, n, k in shapes(fmt, call.runtime.isa.capabilities.lanes):
                for problem in check(call, fmt, m, n, k):
                    calls += 1
                    if problem:
                        print(f"{problem} at {m} x {n} x {k}")
                        return 1
    print(calls)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))

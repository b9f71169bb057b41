"""The two limits of a CPU's matmul: bytes read in a second, int8 products in a second.

Measured by a small C program (cpu_limits.c), compiled by the compiler and for the instruction set
that the kernels beside it are made with.
"""

from __future__ import annotations

import ctypes
import itertools
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from kernelgen.errors import CompileError, TargetError
from kernelgen.targets.c.compiler import find_compiler, flags
from kernelgen.targets.c.runtime import runtime

#: streams of each thread, and cache lines that they are asked for ahead: the best one counts
WAYS_TO_READ = tuple((streams, ahead) for streams in (1, 2, 4) for ahead in (0, 24, 64))

#: seconds that a measurement of products takes, about
_SECONDS = 0.05


class Limits:
    """The limits of this machine; compiles on the first use of each process.

    Raises TargetError where there is no C compiler with OpenMP, CompileError where it fails.
    """

    def __init__(self) -> None:
        compiler = find_compiler()
        if isinstance(compiler, str):
            raise TargetError(compiler)
        if not compiler.openmp:
            raise TargetError(f"{compiler.version} has no OpenMP, so two threads cannot be timed")
        self._folder = tempfile.TemporaryDirectory(prefix="kernelgen-limits-")
        made = Path(self._folder.name) / "limits.so"
        done = subprocess.run(
            [*compiler.command, *flags(runtime().isa.flags, True, True), "-shared",
             str(Path(__file__).with_suffix(".c")), "-o", str(made)],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode != 0:
            raise CompileError(f"{compiler.version} rejected cpu_limits.c: {done.stderr.strip()}")
        self._library = ctypes.CDLL(str(made))
        self._library.read_all.restype = ctypes.c_uint64
        self._library.read_all.argtypes = [ctypes.c_void_p, *[ctypes.c_int64] * 3]
        for name in ("dot_vectors", "dot_tiles"):
            function = getattr(self._library, name)
            function.restype, function.argtypes = ctypes.c_int64, [ctypes.c_int64, ctypes.c_void_p]

    def reads(self, nbytes: int, memory: int = 0) -> dict[str, Callable[[], int]]:
        """Functions that read as many bytes, in each way: the same every time, as weights are, or
        the next of parts that come to `memory` bytes together."""
        line = 64
        parts = max(1, -(-memory // nbytes))
        whole = np.ones(parts * nbytes + line, np.uint8)
        start = whole.ctypes.data + -whole.ctypes.data % line
        addresses = itertools.cycle([start + part * nbytes // line * line for part in range(parts)])
        read = self._library.read_all

        def way(streams: int, ahead: int) -> Callable[[], int]:
            return lambda _kept=whole: int(read(next(addresses), nbytes, streams, ahead))  # type: ignore[misc]

        return {f"{s} streams, {a} lines ahead": way(s, a) for s, a in WAYS_TO_READ}

    def operations(self, turns: int = 5) -> dict[str, float]:
        """Multiplications and additions of bytes in a second, all threads, in 10^9: in "vectors"
        and in "tiles", of which a machine may lack either.  Medians of so many turns."""
        found = {}
        for name in ("vectors", "tiles"):
            function = getattr(self._library, f"dot_{name}")
            sink = ctypes.c_int32()
            each = function(1, ctypes.byref(sink))
            if not each:
                continue
            rounds = self._rounds(function, sink)
            samples = []
            for _ in range(turns):
                begin = time.perf_counter()
                function(rounds, ctypes.byref(sink))
                samples.append(time.perf_counter() - begin)
            found[name] = each * rounds * self.threads() / float(np.median(samples)) / 1e9
        return found

    def _rounds(self, function: Callable[..., int], sink: ctypes.c_int32) -> int:
        rounds = 1000
        while True:
            begin = time.perf_counter()
            function(rounds, ctypes.byref(sink))
            took = time.perf_counter() - begin
            if took > _SECONDS / 4:
                return max(1, int(rounds * _SECONDS / took))
            rounds *= 4

    def threads(self) -> int:
        """Threads of OpenMP."""
        return int(self._library.omp_get_max_threads())

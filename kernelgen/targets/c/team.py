"""Whose threads run the kernels: those of the compiler's OpenMP, or of another library's.

Two sets of threads on the same cores wait for each other: those of one spin, for milliseconds after
their work is done, where those of the other should run.  So kernels that clang made call OpenMP
through a library of ours (team.c), which can give them the threads of any OpenMP in the process.

Linux only; elsewhere, and for other compilers, kernels are linked with the compiler's OpenMP.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import logging
import os
import sys
import threading
from pathlib import Path
from typing import Any

from kernelgen.errors import CompileError
from kernelgen.targets.base import Kernel
from kernelgen.targets.c.compiler import (
    HEADERS,
    PLAIN,
    Compiler,
    Linking,
    find_compiler,
    helper,
)

log = logging.getLogger("kernelgen")

#: GCC's entry points, in the order of `struct pool` in team.c
_ENTRIES = ("GOMP_parallel", "GOMP_barrier", "omp_get_thread_num", "omp_get_num_threads",
            "omp_get_max_threads")  # fmt: skip

#: libraries of arrays that compute with threads, and the file of theirs that calls OpenMP
_OTHERS = {"torch": "lib/libtorch_cpu.so"}

#: a library of which nothing is wanted but the compiler's OpenMP
_OWN = "#include <omp.h>\nint kernelgen_own(void) { return omp_get_max_threads(); }\n"

#: arguments of a kernel, beside which a region may have 64 names of its own (MOST in team.c)
_MOST_ARGUMENTS = 64


class Team:
    """The library between kernels and threads."""

    def __init__(self, path: Path, own: ctypes.CDLL) -> None:
        self.own = own
        self._path = path
        self._use = ctypes.CDLL(str(path)).kernelgen_use
        self._use.argtypes, self._use.restype = [ctypes.c_void_p], None
        self._pools: dict[int, Any] = {}
        self._lock = threading.Lock()
        self._alone = self.shared = False
        self.use(own)
        os.register_at_fork(after_in_child=self._part)

    def linking(self, kernel: Kernel) -> Linking:
        """How a kernel is compiled."""
        if len(kernel.arguments) > _MOST_ARGUMENTS:
            return PLAIN
        options = ("-Xclang", "-fopenmp", "-Domp_get_max_threads=kernelgen_max_threads")
        return Linking((*options, "-Wl,-z,defs", "-Wl,--no-as-needed"), (self._path,))

    def use(self, library: ctypes.CDLL) -> None:
        """Regions that begin later run on the threads of a library with GCC's entry points; raises
        AttributeError where it has none."""
        with self._lock:
            pool = self._pools.get(id(library))
            if pool is None:  # kept for good: a region may still be at work on it
                found = [ctypes.cast(getattr(library, one), ctypes.c_void_p) for one in _ENTRIES]
                pool = (ctypes.c_void_p * len(found))(*(one.value for one in found))
                self._pools[id(library)] = pool
            self._use(pool)
            self.shared = library is not self.own

    def share(self) -> bool:
        """Use the threads of another library in this process from now on; whether there is one."""
        if not self.shared and not self._alone and (other := _another()) is not None:
            self.use(other)
        return self.shared

    def _part(self) -> None:
        """In a child, whose threads are gone, which not all of these libraries notice."""
        self._alone = True
        self.use(self.own)


def _another() -> ctypes.CDLL | None:
    """The OpenMP of a library of arrays, if one is loaded."""
    for name, file in _OTHERS.items():
        folder = getattr(sys.modules.get(name), "__path__", None)
        if not folder:
            continue
        path = Path(folder[0]) / file
        with contextlib.suppress(OSError):  # none that is loaded
            # a function is looked for in all that it was linked with, whatever that is called
            found = ctypes.CDLL(str(path), mode=os.RTLD_NOLOAD | os.RTLD_NOW)
            if all(hasattr(found, entry) for entry in _ENTRIES):
                return found
    return None


def team() -> Team | None:
    """That of this process's compiler, built and loaded once; None where there can be none."""
    compiler = find_compiler()
    if isinstance(compiler, str) or not compiler.openmp or sys.platform != "linux":
        return None
    return _team(compiler) if "clang" in compiler.version else None


@functools.cache
def _team(compiler: Compiler) -> Team | None:
    try:
        own = helper(compiler, "own_threads", _OWN, ["-fopenmp"])
        path = helper(compiler, "team", (HEADERS / "team.c").read_text("utf-8"), [])
        return Team(path, ctypes.CDLL(str(own)))
    except (CompileError, OSError, AttributeError) as error:
        log.debug("kernels share no threads with other libraries: %s", error)
        return None

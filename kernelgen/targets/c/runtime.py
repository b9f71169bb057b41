"""Compiles C kernels with the machine's compiler and loads them with ctypes."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import platform
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kernelgen.config import Capabilities
from kernelgen.errors import CompileError, TargetError
from kernelgen.ir.ops import Activations
from kernelgen.targets.attention import held, strides
from kernelgen.targets.base import (
    NONE,
    NY,
    Array,
    Kernel,
    Product,
    Weights,
    check_rows,
)
from kernelgen.targets.c.compiler import find_compiler, library
from kernelgen.targets.c.launch import Launch, address
from kernelgen.targets.c.team import team
from kernelgen.targets.maps import Apply, written
from kernelgen.targets.maps import strides as strides_of_maps

Operands = Mapping[str, Array]


@dataclass(frozen=True)
class Isa:
    """An instruction set: the CPU features it needs, the flags that choose it, what it offers."""

    name: str
    machines: tuple[str, ...]
    needs: frozenset[str]
    flags: tuple[str, ...]
    capabilities: Capabilities


def _isa(
    name: str, machines: str, needs: str, flags: str, lanes: int, registers: int, features: str = ""
) -> Isa:
    caps = Capabilities(lanes, registers, frozenset(features.split()))
    return Isa(name, tuple(machines.split()), frozenset(needs.split()), tuple(flags.split()), caps)


_X86, _ARM = "x86_64 amd64", "aarch64 arm64"
_AVX2, _WITH_AVX2 = "avx2 fma f16c", "-mavx2 -mfma -mf16c"
_AVX512 = f"avx512f avx512bw avx512vl avx512dq {_AVX2}"
_VNNI = f"{_AVX512} avx512_vnni"
_WITH_AVX512 = f"-mavx512f -mavx512bw -mavx512vl -mavx512dq {_WITH_AVX2}"
_GFNI = f"{_VNNI} avx512vbmi gfni"
_WITH_GFNI = f"{_WITH_AVX512} -mavx512vnni -mavx512vbmi -mgfni"
_AMX = f"{_GFNI} avx512_bf16 amx_tile amx_int8 amx_bf16"
_WITH_AMX = f"{_WITH_GFNI} -mavx512bf16 -mamx-tile -mamx-int8 -mamx-bf16"

#: best first; features are spelt as Linux spells them
ISAS = (
    _isa("amx", _X86, _AMX, _WITH_AMX, 16, 32, "dot matrix"),
    _isa("avx512gfni", _X86, _GFNI, _WITH_GFNI, 16, 32, "dot"),
    _isa("avx512vnni", _X86, _VNNI, f"{_WITH_AVX512} -mavx512vnni", 16, 32, "dot"),
    _isa("avx512", _X86, _AVX512, _WITH_AVX512, 16, 32),
    _isa("avxvnni", _X86, f"{_AVX2} avx_vnni", f"{_WITH_AVX2} -mavxvnni", 8, 16, "dot"),
    _isa("avx2", _X86, _AVX2, _WITH_AVX2, 8, 16),
    _isa("neondot", _ARM, "asimd asimddp", "-march=armv8.2-a+dotprod", 4, 32, "dot"),
    _isa("neon", _ARM, "asimd", "-march=armv8-a", 4, 32),
    _isa("scalar", "", "", "-DKERNELGEN_SCALAR", 4, 16),
)  # fmt: skip


def isa_named(name: str) -> Isa:
    """The instruction set of that name."""
    for isa in ISAS:
        if isa.name == name:
            return isa
    raise TargetError(
        f"instruction set {name!r} is not known; known are {', '.join(i.name for i in ISAS)}"
    )


@functools.cache
def cpu_features() -> frozenset[str]:
    """Features of this CPU, spelt as Linux spells them; empty where nobody tells."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() in ("flags", "Features"):
                found = frozenset(value.split())
                return found if "amx_tile" not in found or _may_use_tiles() else found - _TILES
    if sys.platform == "darwin":
        asked = {"asimd": "hw.optional.neon", "asimddp": "hw.optional.arm.FEAT_DotProd",
                 "avx2": "hw.optional.avx2_0", "fma": "hw.optional.fma",
                 "f16c": "hw.optional.f16c"}  # fmt: skip
        return frozenset(name for name, key in asked.items() if _sysctl(key) == "1")
    return frozenset()


_TILES = frozenset(("amx_tile", "amx_int8", "amx_bf16"))


def _may_use_tiles() -> bool:
    """Whether the system lets this process use the tile registers of AMX, which must be asked for
    (Documentation/arch/x86/xstate.rst of Linux)."""
    arch_prctl, request_permission, tile_data = 158, 0x1023, 18
    try:
        return bool(ctypes.CDLL(None).syscall(arch_prctl, request_permission, tile_data) == 0)
    except (OSError, AttributeError):
        return False


def _sysctl(key: str) -> str:
    result = subprocess.run(["sysctl", "-n", key], capture_output=True, text=True, check=False)
    return result.stdout.strip()


@functools.cache
def native_isa() -> Isa:
    """The best instruction set of this CPU."""
    machine = platform.machine().lower()
    for isa in ISAS:
        if (not isa.machines or machine in isa.machines) and isa.needs <= cpu_features():
            return isa
    return ISAS[-1]


class CProgram:
    """A loaded kernel.  Pointers are passed as addresses, sizes as ints, in manifest order."""

    def __init__(self, library: ctypes.CDLL, kernel: Kernel) -> None:
        self.function = getattr(library, kernel.entry)
        self.function.restype = None
        self.function.argtypes = [
            ctypes.c_int64 if a.role == "size" else ctypes.c_void_p for a in kernel.arguments
        ]
        self.library = library
        self._entry = kernel.entry

    def sizes(self, what: str) -> Callable[[int, int], int]:
        """The function `<entry>_<what>` beside the entry point: bytes for two sizes."""
        function = getattr(self.library, f"{self._entry}_{what}")
        function.restype = ctypes.c_int64
        function.argtypes = [ctypes.c_int64] * 2
        typed: Callable[[int, int], int] = function
        return typed

    def __call__(self, *arguments: Array | int) -> None:
        """Arrays must be C-contiguous and of the manifest's dtypes."""
        self.function(*(a if isinstance(a, int) else a.ctypes.data for a in arguments))


class CRuntime:
    """The C target on this machine, for one instruction set."""

    def __init__(self, isa: Isa) -> None:
        self.isa = isa
        self._programs: dict[str, CProgram] = {}
        self._lock = threading.RLock()

    def available(self) -> str | None:
        """Why kernels cannot run here, or None."""
        found = find_compiler()
        if isinstance(found, str):
            return found
        machine = platform.machine().lower()
        if self.isa.machines and machine not in self.isa.machines:
            return f"{self.isa.name} is for {self.isa.machines[0]}, and this machine is {machine}"
        missing = self.isa.needs - cpu_features()
        if missing:
            return f"this CPU lacks {', '.join(sorted(missing))}, which {self.isa.name} needs"
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

    def share_cores(self) -> bool:
        """Run kernels on the threads of the library of arrays that the calling thread computes with
        besides.  Where that cannot be, have the threads that run kernels of the calling thread
        sleep as soon as they have nothing to do: those of LLVM's OpenMP would spin for 0.2 s and
        take the cores from the other library's.  Whether that is settled: not before a kernel was
        loaded."""
        between = team()
        if between is not None and between.share():
            return True
        if "KMP_BLOCKTIME" in os.environ:  # the user has decided
            return True
        for program in self._programs.values():
            with contextlib.suppress(AttributeError):  # another compiler's OpenMP, or none
                (program.library if between is None else between.own).kmp_set_blocktime(0)
            return True
        return False

    def capabilities(self) -> Capabilities:
        """Lanes and registers of the instruction set."""
        return self.isa.capabilities

    def describe(self) -> list[dict[str, Any]]:
        """The CPU, its instruction set and the compiler."""
        found = find_compiler()
        return [
            {
                "device": cpu_name(),
                "isa": self.isa.name,
                "threads": threads(),
                "compiler": found if isinstance(found, str) else found.version,
                "openmp": not isinstance(found, str) and found.openmp,
            }
        ]

    def dequantize(self, kernel: Kernel, w: Weights) -> Array:
        """Values of w, float32, of its shape."""
        y = np.empty(w.shape, np.float32)
        self.program(kernel)(w.data, y, y.size // w.format.block)
        return y

    def get_rows(self, kernel: Kernel, w: Weights, ids: Array) -> Array:
        """Values of the rows of w that `ids`, integers (R,), names: float32 (R, K)."""
        ids = np.ascontiguousarray(ids, np.int64)
        check_rows(ids, w.shape[0])
        y = np.empty((len(ids), w.shape[-1]), np.float32)
        self.program(kernel)(w.data, ids, y, *y.shape)
        return y

    def bind_rows(self, kernel: Kernel, w: Weights, ids: Array, y: Array) -> Callable[[], None]:
        """A function that fills y (R, K) with the rows that `ids`, int64 (R,), names by then; all
        of them are rows of w, which is not checked again."""
        return Launch(self.program(kernel).function, lambda *given: (given, y.shape)).bind(
            w.data, ids, y
        )

    def quantize(self, kernel: Kernel, x: Array, operands: Operands = NONE) -> Activations:
        """Activations x, float32 (M, K), as int8 in the form of the kernel's format."""
        fmt = kernel.format
        x = np.ascontiguousarray(x, np.float32)
        m, k = x.shape
        fmt.row_bytes(k)
        q = np.empty((m, k), np.int8)
        scale = np.empty((m, k // fmt.block), np.float32)
        sums = np.empty((m, k // fmt.group), np.float32)
        self.program(kernel)(x, q, scale, sums, *operands.values(), m, k)
        return Activations(q, scale, sums)

    def prepare(self, kernel: Kernel, w: Weights) -> Array:
        """The bytes that `matmul` of this kernel reads: interleaved tiles, made once and kept in
        w.prepared, or the native blocks, as the configuration's layout says."""
        if "prepare" not in kernel.needs:
            return w.data
        key = ("c", "interleaved", self.isa.capabilities.lanes)
        tiles: Array | None = w.prepared.get(key)
        if tiles is None:
            with self._lock:
                tiles = w.prepared.get(key)
                if tiles is None:
                    tiles = self._interleave(kernel.needs["prepare"], w)
                    w.prepared[key] = tiles
        return tiles

    def _interleave(self, kernel: Kernel, w: Weights) -> Array:
        n, k = w.shape
        program = self.program(kernel)
        tiles = _aligned(program.sizes("bytes")(n, k))
        program(w.data, tiles, n, k)
        return tiles

    def matmul(self, kernel: Kernel) -> Product:
        """A function of x, float32 (M, K), w (N, K) and y, float32 (M, N), which it fills, and of
        operands by name."""
        program, prepare = self.program(kernel), self.prepare
        names = [a.name for a in kernel.arguments if a.role == "in" and a.name not in ("x", "w")]
        gated = any(a.name == NY for a in kernel.arguments)
        scratch_bytes = program.sizes("scratch") if _has_scratch(kernel) else None

        def given(
            x: Array, w: Weights, y: Array, operands: Operands = NONE
        ) -> tuple[list[Array], tuple[int, ...]]:
            (m, k), n = x.shape, w.shape[0]
            arrays = [x, prepare(kernel, w), y]
            if scratch_bytes is not None:
                arrays.append(np.empty(scratch_bytes(m, k), np.uint8))
            arrays += [operands[name] for name in names]
            return arrays, (m, n, k, y.shape[1]) if gated else (m, n, k)

        return Launch(program.function, given)

    def attention(
        self, kernel: Kernel
    ) -> Callable[[Array, Weights, Weights, Mapping[str, Array], Array], None]:
        """A function of q (B, H, T, D), k, v, the operands by name, and y, which it fills."""
        kind = kernel.subject

        def given(
            q: Array, k: Weights, v: Weights, operands: Mapping[str, Array], y: Array
        ) -> tuple[list[Array], list[int]]:
            arrays, sizes = attention_arguments(kind, q, k, v, operands)
            return [q, k.data, v.data, y, *arrays], sizes

        return Launch(self.program(kernel).function, given)

    def apply(self, kernel: Kernel) -> Apply:
        """A function of arrays by name, rows, columns, and arrays that it fills."""
        kind = kernel.subject
        names = [one.name for one in kind.inputs], [one.name for one in written(kind)]

        def given(
            inputs: Mapping[str, Array], m: int, n: int, outputs: Mapping[str, Array]
        ) -> tuple[list[Array], list[int]]:
            arrays = [inputs[name] for name in names[0]] + [outputs[name] for name in names[1]]
            return arrays, [m, n, *strides_of_maps(kind, inputs).values()]

        return Launch(self.program(kernel).function, given)

    def program(self, kernel: Kernel) -> CProgram:
        """The kernel, compiled and loaded; safe under many threads and processes."""
        program = self._programs.get(kernel.hash)
        if program is None:
            made = CProgram(self._library(kernel), kernel)
            program = self._programs.setdefault(kernel.hash, made)
        return program

    def _library(self, kernel: Kernel) -> ctypes.CDLL:
        between = team()
        if between is not None:
            # what it does not have a kernel may call of the compiler's own
            with contextlib.suppress(CompileError):
                return library(kernel, self.isa.flags, between.linking(kernel))
        return library(kernel, self.isa.flags)


def _has_scratch(kernel: Kernel) -> bool:
    return any(a.role == "scratch" for a in kernel.arguments)


def attention_arguments(
    kind: Any, q: Array, k: Weights, v: Weights, operands: Mapping[str, Array]
) -> tuple[list[Array], list[int]]:
    """The arrays that come after q, k, v and y, and the sizes, in the kernel's order: of a kernel
    whose subject, an `Attention`, is `kind`."""
    names = [*(["sinks"] if kind.sinks else []), *(one.name for one in kind.operands)]
    names += [one.name for one in held(kind)]
    pages = [operands["pages"].shape[1]] if kind.page else []
    room = kind.page * pages[0] if pages else k.shape[2]
    sizes = [*q.shape[:2], k.shape[1], q.shape[2], room]
    return [operands[name] for name in names], [*sizes, *strides(kind, operands).values(), *pages]


#: bytes of a cache line, and of the larger pages that x86 and ARM have
LINE, LARGE_PAGE = 64, 1 << 21


def _aligned(size: int) -> Array:
    """Bytes that begin at a cache line, so that no vector of a tile lies across two of them; where
    there are many, at a large page, of which Linux makes what numpy allocates from 4 MB on: reading
    does not wait for a table of small pages then."""
    begin = LINE if size < 2 * LARGE_PAGE else LARGE_PAGE
    whole = np.empty(size + begin, np.uint8)
    start = -address(whole) % begin
    return whole[start : start + size]


def cpu_name() -> str:
    """The CPU's name for people."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def threads() -> int:
    """Threads that a kernel will use."""
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    if wanted.isdecimal():
        return int(wanted)
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:
        return os.cpu_count() or 1


@functools.cache
def runtime(isa: str = "") -> CRuntime:
    """The runtime for an instruction set, by default the best of this CPU."""
    return CRuntime(isa_named(isa) if isa else native_isa())

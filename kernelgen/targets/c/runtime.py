"""Compiles C kernels with the machine's compiler and loads them with ctypes."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import importlib.util
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kernelgen.config import Capabilities
from kernelgen.errors import CompileError, TargetError
from kernelgen.ir.ops import Activations
from kernelgen.targets.base import Array, Kernel, Weights, check_rows

log = logging.getLogger("kernelgen")

HEADERS = Path(__file__).parent


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
_AVX512 = "avx512f avx512bw avx512vl avx512dq"

#: best first; features are spelt as Linux spells them
ISAS = (
    _isa("avx512vnni", _X86, f"{_AVX512} avx512_vnni avx2 fma f16c",
         "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512vnni -mavx2 -mfma -mf16c", 16, 32, "dot"),
    _isa("avx512", _X86, f"{_AVX512} avx2 fma f16c",
         "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx2 -mfma -mf16c", 16, 32),
    _isa("avxvnni", _X86, "avx_vnni avx2 fma f16c", "-mavxvnni -mavx2 -mfma -mf16c", 8, 16, "dot"),
    _isa("avx2", _X86, "avx2 fma f16c", "-mavx2 -mfma -mf16c", 8, 16),
    _isa("neon", _ARM, "asimddp", "-march=armv8.2-a+dotprod+fp16", 4, 32, "dot"),
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
                return frozenset(value.split())
    if sys.platform == "darwin":
        asked = {"asimddp": "hw.optional.arm.FEAT_DotProd", "avx2": "hw.optional.avx2_0",
                 "fma": "hw.optional.fma", "f16c": "hw.optional.f16c"}  # fmt: skip
        return frozenset(name for name, key in asked.items() if _sysctl(key) == "1")
    return frozenset()


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


@dataclass(frozen=True)
class Compiler:
    """A C compiler that works, its version, and whether it has OpenMP."""

    command: tuple[str, ...]
    version: str
    openmp: bool


@functools.cache
def find_compiler() -> Compiler | str:
    """CC if set; else the first of clang, gcc, cc, ziglang that has OpenMP; else the first that
    compiles at all; else a sentence that says what was tried."""
    wanted = os.environ.get("CC")
    if wanted:
        found = _try_compiler(tuple(shlex.split(wanted)))
        return found or f"CC is set to {wanted!r}, which does not compile C; set it right or unset it"
    working = []
    for command in _candidates():
        found = _try_compiler(command)
        if found and found.openmp:
            return found
        if found:
            working.append(found)
    if working:
        return working[0]
    return (
        "no C compiler was found (tried clang, gcc, cc and the ziglang package);"
        " install one, or pip install kernelgen[c]"
    )


def _candidates() -> list[tuple[str, ...]]:
    names = ["clang", *(f"clang-{n}" for n in range(24, 14, -1)), "gcc", "cc"]
    commands = [(name,) for name in names if shutil.which(name)]
    # newer clangs first: plain "clang" may be an old one
    commands.sort(key=lambda c: (not c[0].startswith("clang-"),))
    if importlib.util.find_spec("ziglang") is not None:
        commands.append((sys.executable, "-m", "ziglang", "cc"))  # type: ignore[arg-type]
    return commands  # type: ignore[return-value]


def _try_compiler(command: tuple[str, ...]) -> Compiler | None:
    try:
        shown = subprocess.run([*command, "--version"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return None
    version = shown.stdout.strip().splitlines()[0] if shown.stdout.strip() else "unknown version"
    if _compiles(command, ["-fopenmp"], "#include <omp.h>\nint f(void){return omp_get_max_threads();}"):
        return Compiler(command, version, True)
    return Compiler(command, version, False) if _compiles(command, [], "int f(void){return 1;}") else None


def _compiles(command: tuple[str, ...], flags: list[str], source: str) -> bool:
    with tempfile.TemporaryDirectory(prefix="kernelgen-") as folder:
        path = Path(folder) / "try.c"
        path.write_text(source)
        out = str(path.with_suffix(".so"))
        try:
            done = subprocess.run(
                [*command, "-shared", "-fPIC", *flags, str(path), "-o", out],
                capture_output=True, timeout=120, check=False,
            )  # fmt: skip
        except (OSError, subprocess.SubprocessError):
            return False
        return done.returncode == 0


def flags(isa: Isa, contract: bool, openmp: bool) -> list[str]:
    """Compiler flags for a kernel."""
    return [
        "-std=gnu11", "-O3", "-fPIC", "-fno-math-errno", "-fno-trapping-math", "-Wall", "-Wextra",
        f"-ffp-contract={'fast' if contract else 'off'}", *isa.flags,
        *(["-fopenmp"] if openmp else []),
    ]  # fmt: skip


@functools.cache
def headers_digest() -> str:
    """Hash of the headers that every kernel includes."""
    digest = hashlib.sha256()
    for path in sorted(HEADERS.glob("*.h")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def cache_folder() -> Path:
    """Where compiled kernels are kept; the user's cache folder, or KERNELGEN_CACHE."""
    import platformdirs

    root = os.environ.get("KERNELGEN_CACHE") or platformdirs.user_cache_dir("kernelgen")
    return Path(root) / "c"


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

    def size(self, what: str, *sizes: int) -> int:
        """What the function `<entry>_<what>` beside the entry point says of these sizes."""
        function = getattr(self.library, f"{self._entry}_{what}")
        function.restype = ctypes.c_int64
        function.argtypes = [ctypes.c_int64] * len(sizes)
        return int(function(*sizes))

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
        missing = self.isa.needs - cpu_features()
        if missing:
            return f"this CPU lacks {', '.join(sorted(missing))}, which {self.isa.name} needs"
        return None

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

    def quantize(self, kernel: Kernel, x: Array) -> Activations:
        """Activations x, float32 (M, K), as int8 in the form of the kernel's format."""
        fmt = kernel.format
        x = np.ascontiguousarray(x, np.float32)
        m, k = x.shape
        fmt.row_bytes(k)
        q = np.empty((m, k), np.int8)
        scale = np.empty((m, k // fmt.block), np.float32)
        sums = np.empty((m, k // fmt.group), np.float32)
        self.program(kernel)(x, q, scale, sums, m, k)
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
        tiles = np.empty(program.size("bytes", n, k), np.uint8)
        program(w.data, tiles, n, k)
        return tiles

    def matmul(self, kernel: Kernel) -> Callable[[Array, Weights, Array], None]:
        """A function of x, float32 (M, K), w (N, K) and y, float32 (M, N), which it fills."""
        program = self.program(kernel)
        function, prepare = program.function, self.prepare
        if not any(a.role == "scratch" for a in kernel.arguments):

            def run(x: Array, w: Weights, y: Array) -> None:
                (m, k), n = x.shape, w.shape[0]
                function(_address(x), _address(prepare(kernel, w)), _address(y), m, n, k)

            return run

        program.size("scratch", 1, kernel.format.block)  # sets the types of what follows
        scratch_bytes = getattr(program.library, f"{kernel.entry}_scratch")

        def run_with_scratch(x: Array, w: Weights, y: Array) -> None:
            (m, k), n = x.shape, w.shape[0]
            scratch = np.empty(scratch_bytes(m, k), np.uint8)
            function(
                _address(x), _address(prepare(kernel, w)), _address(y), _address(scratch), m, n, k
            )

        return run_with_scratch

    def program(self, kernel: Kernel) -> CProgram:
        """Load the kernel, compiling it first where the cache has no binary of the same source,
        flags and compiler.  Safe under many threads and processes."""
        program = self._programs.get(kernel.hash)
        if program is None:
            with self._lock:
                program = self._programs.get(kernel.hash)
                if program is None:
                    program = CProgram(ctypes.CDLL(str(self.binary(kernel))), kernel)
                    self._programs[kernel.hash] = program
        return program

    def binary(self, kernel: Kernel) -> Path:
        """Path of the kernel's shared library in the cache; made if it is not there."""
        compiler = find_compiler()
        if isinstance(compiler, str):
            raise TargetError(compiler)
        options = flags(self.isa, kernel.contract, compiler.openmp)
        key = "\0".join([kernel.source, headers_digest(), *options, *compiler.command, compiler.version])
        name = f"{kernel.entry}-{hashlib.sha256(key.encode()).hexdigest()[:24]}.so"
        path = cache_folder() / name
        if not path.exists():
            _build(compiler, options, kernel, path)
        return path


def _build(compiler: Compiler, options: Sequence[str], kernel: Kernel, path: Path) -> None:
    from filelock import FileLock

    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):  # many processes may want the same kernel at once
        if path.exists():
            return
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".build-") as folder:
            source = Path(folder) / f"{kernel.entry}.c"
            source.write_text(kernel.source)
            built = source.with_suffix(".so")
            command = [*compiler.command, *options, "-shared", f"-I{HEADERS}", str(source),
                       "-o", str(built), "-lm"]  # fmt: skip
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                kept = path.with_suffix(".c")
                kept.write_text(kernel.source)
                raise CompileError(
                    f"{compiler.version} rejected {kernel.op} {kernel.format.name}"
                    f" (source kept in {kept}): {done.stderr.strip() or done.stdout.strip()}"
                )
            if done.stderr.strip():
                log.debug("%s: %s", kernel.entry, done.stderr.strip())
            os.replace(built, path)  # a reader sees the whole file or none


def _address(array: Array) -> int:
    # a third of what array.ctypes.data costs
    address: int = array.__array_interface__["data"][0]
    return address


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
    if wanted.isdigit():
        return int(wanted)
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:
        return os.cpu_count() or 1


@functools.cache
def runtime(isa: str = "") -> CRuntime:
    """The runtime for an instruction set, by default the best of this CPU."""
    return CRuntime(isa_named(isa) if isa else native_isa())

"""Finds a C++ compiler, and keeps what it built in the user's cache folder."""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from kernelgen.errors import KernelgenError

HERE = Path(__file__).resolve().parent
NATIVE = HERE / "native"
INCLUDE = HERE / "include"

#: tried in this order where CXX does not say
CANDIDATES = ("g++", "clang++", *(f"clang++-{n}" for n in range(21, 15, -1)), "c++")
CLANGS = ("clang", *(f"clang-{n}" for n in range(21, 15, -1)))
#: below, _Float16 is missing
OLDEST = {"gcc": 12, "clang": 16}


class EmulatorError(KernelgenError):
    """The emulator cannot run the kernel at all: no compiler, text that does not compile, or
    arguments that do not fit.  What a kernel does wrong is a finding in the report instead."""


@dataclass(frozen=True)
class Compiler:
    """A program, which family it is of, and its version in its own words."""

    path: str
    family: str
    version: str

    def run(self, arguments: Iterable[str], folder: Path) -> None:
        """Runs the compiler; its complaints become the error."""
        command = [self.path, *arguments]
        result = subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)
        if result.returncode:
            complaint = result.stderr or result.stdout
            raise EmulatorError(
                f"{self.path} did not compile the text:\n{complaint.strip()[:6000]}"
            )


@functools.cache
def _identify(path: str) -> Compiler | None:
    run = subprocess.run([path, "--version"], capture_output=True, text=True, check=False)
    first = run.stdout.splitlines()[0] if run.stdout else ""
    family = "clang" if "clang" in first else "gcc"
    number = re.search(r"(\d+)\.\d+\.\d+", first)
    apple = "Apple" in first  # whose numbers are others
    if run.returncode or not number or (int(number[1]) < OLDEST[family] and not apple):
        return None
    return Compiler(path, family, first)


@functools.cache
def _find(named: str, candidates: tuple[str, ...]) -> Compiler:
    seen = []
    for name in (named,) if named else candidates:
        path = shutil.which(name)
        if not path:
            continue
        if compiler := _identify(path):
            return compiler
        seen.append(name)
    old = f" ({', '.join(seen)} is too old)" if seen else ""
    wanted = named or ", ".join(candidates[:2])
    raise EmulatorError(
        f"the emulator found no usable compiler: looked for {wanted}{old}; it needs g++ 12 or"
        " later or clang 16 or later; install one, or name one in the variable CXX"
    )


def cxx() -> Compiler:
    """The C++ compiler: CXX, or the first that is there and new enough."""
    return _find(os.environ.get("CXX", ""), CANDIDATES)


def clang() -> Compiler:
    """A clang, which alone compiles OpenCL: CLANG, or the first that is there and new enough."""
    return _find(os.environ.get("CLANG", ""), CLANGS)


def cache_folder() -> Path:
    """Where compiled kernels and the engine are kept: KERNELGEN_CACHE, or the user's folder."""
    import platformdirs

    root = os.environ.get("KERNELGEN_CACHE") or platformdirs.user_cache_dir("kernelgen")
    return Path(root) / "emulator"


def machine_flags(compiler: Compiler) -> list[str]:
    """The CPU at hand, whose instructions convert 16-bit floats and multiply-add in one."""
    if platform.machine() in ("arm64", "aarch64"):
        return ["-mcpu=native"]
    flags = ["-march=native"]
    # some clangs warn of the CPU that they detect themselves
    return [*flags, "-Wno-invalid-feature-combination"] if compiler.family == "clang" else flags


def shared_flags() -> list[str]:
    """Flags of the link: on macOS names of the engine are left for load time too."""
    return ["-shared", *(["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else [])]


def digest(*parts: str) -> str:
    """A short name for all that a file was made from."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]


@functools.cache
def tree_digest(folder: Path) -> str:
    """A name for the text of all files in a folder."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.suffix != ".pyc")
    return digest(*(f"{p.relative_to(folder)}\0{p.read_text()}" for p in files))


def built(name: str, build: Callable[[Path, Path], None]) -> Path:
    """The file of that name in the cache; `build` makes it in a folder where it is missing.

    Processes that want the same file at once wait for the first of them.
    """
    from filelock import FileLock

    folder = cache_folder()
    path = folder / name
    if path.exists():
        return path
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EmulatorError(
            f"the cache folder {folder} cannot be made ({error.strerror}); set KERNELGEN_CACHE to"
            " a folder that can be written"
        ) from error
    with FileLock(f"{path}.lock"):
        if not path.exists():
            work = folder / f"{name}.{os.getpid()}.work"
            work.mkdir(exist_ok=True)
            try:
                build(work, work / name)
                (work / name).replace(path)
            finally:
                shutil.rmtree(work, ignore_errors=True)
    Path(f"{path}.lock").unlink(missing_ok=True)
    return path


def engine_library() -> Path:
    """The engine as a shared library, built when it or the compiler is new."""
    compiler = cxx()
    sources = sorted(NATIVE.glob("*.cpp"))
    flags = ["-std=c++17", "-O2", "-fPIC", "-fno-strict-aliasing", "-U_FORTIFY_SOURCE"]
    flags += ["-fno-semantic-interposition"]
    flags += machine_flags(compiler)
    key = digest(tree_digest(NATIVE), compiler.path, compiler.version, *flags, _cpu())

    def build(work: Path, target: Path) -> None:
        def compile_one(source: Path) -> None:
            compiler.run([*flags, "-c", str(source), "-o", f"{source.stem}.o"], work)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(compile_one, sources))
        objects = [f"{s.stem}.o" for s in sources]
        libraries = ["-ldl"] if sys.platform == "linux" else []
        compiler.run([*shared_flags(), *objects, "-o", str(target), *libraries], work)

    return built(f"engine-{key}.so", build)


@functools.cache
def _cpu() -> str:
    """The CPU's features, since what was built for this one may not run on another."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor()
    return next((s for s in text.splitlines() if s.startswith(("flags", "Features"))), "")


def kernel_key(compiler: Compiler, language: str, text: str, flags: Sequence[str]) -> str:
    """A name for a compiled kernel."""
    headers = tree_digest(INCLUDE)
    return digest(headers, tree_digest(NATIVE), compiler.path, compiler.version, language, text,
                  *flags, _cpu())  # fmt: skip

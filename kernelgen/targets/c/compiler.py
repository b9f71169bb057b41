"""Finds a C compiler, and keeps what it made: shared libraries in a folder on disk.

The folder is safe under many processes.  A library is there once its checksum is, and both are
put in place whole; one that does not match its checksum is made again.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import hashlib
import importlib.util
import json
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from kernelgen.errors import CompileError, TargetError
from kernelgen.targets.base import Kernel

log = logging.getLogger("kernelgen")

HEADERS = Path(__file__).parent


@dataclass(frozen=True)
class Compiler:
    """A C compiler that works, its version, and whether it has OpenMP."""

    command: tuple[str, ...]
    version: str
    openmp: bool


# ---- which compiler -------------------------------------------------------------------------


@functools.cache
def find_compiler() -> Compiler | str:
    """CC if set; else the first of clang, gcc, cc, ziglang that has OpenMP; else the first that
    compiles at all; else a sentence that says what was tried."""
    wanted = os.environ.get("CC")
    if wanted:
        return _asked_for(wanted)
    working = []
    for command in _candidates():
        found = _remembered(command)
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


def _asked_for(wanted: str) -> Compiler | str:
    try:
        command = tuple(shlex.split(wanted))
    except ValueError:  # quotes that do not close
        command = ()
    found = _remembered(command) if command else None
    return found or (
        f"CC is set to {wanted!r}, which makes no C program that this Python can load;"
        " set it to a C compiler of this machine, or unset it"
    )


def _candidates() -> Iterator[tuple[str, ...]]:
    # newer clangs first: plain "clang" may be an old one
    for name in (*(f"clang-{n}" for n in range(24, 14, -1)), "clang", "gcc", "cc"):
        if shutil.which(name):
            yield (name,)
    if importlib.util.find_spec("ziglang") is not None:
        yield (sys.executable, "-m", "ziglang", "cc")


def _remembered(command: tuple[str, ...]) -> Compiler | None:
    """`_try_compiler`, which takes a quarter of a second; what has all that is wanted is noted on
    disk, what lacks OpenMP may get it later."""
    note = _note(command)
    if note is not None:
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
            return Compiler(command, str(json.loads(note.read_text("utf-8"))["version"]), True)
    found = _try_compiler(command)
    if note is not None and found is not None and found.openmp:
        with contextlib.suppress(OSError):
            note.parent.mkdir(parents=True, exist_ok=True)
            _replace(note, json.dumps({"command": command, "version": found.version}).encode())
    return found


def _forget(compiler: Compiler) -> None:
    """The next process tries the compiler again: it may have lost its OpenMP."""
    note = _note(compiler.command)
    if note is not None:
        with contextlib.suppress(OSError):
            note.unlink(missing_ok=True)


def _note(command: tuple[str, ...]) -> Path | None:
    """Where it is kept what a compiler can do; None for commands that say little about what they
    run, such as wrappers with arguments."""
    program = shutil.which(command[0])
    if program is None or len(command) > 1:
        return None
    try:
        found = os.stat(program)
    except OSError:
        return None
    seen = f"{os.path.realpath(program)}\0{found.st_size}\0{found.st_mtime_ns}\0{_machine()}"
    return cache_folder() / f"compiler-{_digest(seen.encode())[:24]}.json"


def _machine() -> str:
    """What must agree for a binary to be of use: folders may be shared by many machines."""
    return f"{sys.platform}-{platform.machine()}-{8 * ctypes.sizeof(ctypes.c_void_p)}"


def _try_compiler(command: tuple[str, ...]) -> Compiler | None:
    try:
        shown = subprocess.run(
            [*command, "--version"], capture_output=True, text=True, timeout=60, check=False
        )
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
    version = shown.stdout.strip().splitlines()[0] if shown.stdout.strip() else "unknown version"
    with_threads = "#include <omp.h>\nint f(void) { return omp_get_max_threads(); }\n"
    if _works(command, ["-fopenmp"], with_threads):
        return Compiler(command, version, True)
    if _works(command, [], "int f(void) { return 1; }\n"):
        return Compiler(command, version, False)
    return None


def _works(command: tuple[str, ...], options: list[str], source: str) -> bool:
    """Whether the command makes a library that can be loaded."""
    with tempfile.TemporaryDirectory(prefix="kernelgen-") as folder:
        path = Path(folder) / "try.c"
        path.write_text(source)
        made = path.with_suffix(".so")
        try:
            done = subprocess.run(
                [*command, "-shared", "-fPIC", *options, str(path), "-o", str(made)],
                capture_output=True, timeout=120, check=False,
            )  # fmt: skip
            if done.returncode != 0:
                return False
            ctypes.CDLL(str(made))
        except (OSError, subprocess.SubprocessError):
            return False
        return True


# ---- what it made ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Linking:
    """How a kernel comes to threads.

    options    flags for the compiler
    libraries  paths of libraries that are linked, and loaded already
    """

    options: tuple[str, ...]
    libraries: tuple[Path, ...] = ()


#: with the compiler's OpenMP
PLAIN = Linking(("-fopenmp",))


def flags(
    instructions: Sequence[str], contract: bool, openmp: bool, linking: Linking = PLAIN
) -> list[str]:
    """Compiler flags for a kernel; `instructions` choose the instruction set."""
    return [
        "-std=gnu11", "-O3", "-fPIC", "-fno-math-errno", "-fno-trapping-math", "-Wall", "-Wextra",
        f"-ffp-contract={'fast' if contract else 'off'}", *instructions,
        *(linking.options if openmp else ()),
    ]  # fmt: skip


@functools.cache
def headers_digest() -> str:
    """Hash of the headers that every kernel includes."""
    parts = [p.name.encode() + b"\0" + p.read_bytes() for p in sorted(HEADERS.glob("*.h"))]
    return _digest(b"\0".join(parts))


def cache_folder() -> Path:
    """Where compiled kernels are kept; the user's cache folder, or KERNELGEN_CACHE."""
    import platformdirs

    root = os.environ.get("KERNELGEN_CACHE") or platformdirs.user_cache_dir("kernelgen")
    return Path(root) / "c"


def library(kernel: Kernel, instructions: Sequence[str], linking: Linking = PLAIN) -> ctypes.CDLL:
    """The kernel as a shared library, compiled unless the cache has it: a binary of the same
    source, headers, flags and compiler.  Safe under many threads and processes.

    Where the folder cannot be written, a folder of this process serves, and a warning says so.
    Raises TargetError where there is no compiler, CompileError where it rejects the source or
    makes what cannot be loaded.
    """
    compiler = find_compiler()
    if isinstance(compiler, str):
        raise TargetError(compiler)
    options = flags(instructions, kernel.contract, compiler.openmp, linking)
    key = [kernel.source, headers_digest(), *options, *(one.name for one in linking.libraries)]
    linked = [*options, *map(str, linking.libraries)]
    path = _kept(
        _place(compiler, kernel.entry, key), lambda path: _build(compiler, linked, kernel, path)
    )
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        _forget(compiler)
        raise CompileError(
            f"{kernel.entry}, made by {compiler.version}, cannot be loaded: {error}; if something"
            f" that it needs was removed, delete {path} to have it made again"
        ) from error


def helper(compiler: Compiler, stem: str, source: str, options: Sequence[str]) -> Path:
    """A shared library of our own source that kernels are linked with, kept as they are; they find
    it by its file's name, once it is loaded.  Raises CompileError."""
    options = ["-std=gnu11", "-O2", "-fPIC", "-Wall", "-Wextra", *options]
    path = _place(compiler, stem, [source, *options])
    named = [*options, f"-Wl,-soname,{path.name}"]

    def build(path: Path) -> None:
        _install(path, lambda built: _compile(compiler, source, named, built, stem))

    return _kept(path, build)


def _place(compiler: Compiler, stem: str, key: Sequence[str]) -> Path:
    """Where a binary is kept: its name tells it from those of other sources, flags, compilers."""
    digest = _digest("\0".join([*key, _machine(), *compiler.command, compiler.version]).encode())
    return cache_folder() / f"{stem}-{digest[:24]}.so"


def _kept(path: Path, build: Callable[[Path], None]) -> Path:
    """The path of a binary, built unless it is there; in a folder of this process where that one
    cannot be written."""
    if not _intact(path):
        try:
            build(path)
        except OSError as error:
            folder = _private_folder(path.parent, error.strerror or type(error).__name__)
            path = folder / path.name
            build(path)
    return path


def _build(compiler: Compiler, options: Sequence[str], kernel: Kernel, path: Path) -> None:
    def build(built: Path) -> None:
        what = f"{kernel.op} {kernel.subject.name}"
        _compile(
            compiler, kernel.source, [*options, f"-I{HEADERS}"], built, what, path.with_suffix(".c")
        )

    _install(path, build)


def _compile(
    compiler: Compiler, source: str, options: Sequence[str], built: Path, what: str,
    kept: Path | None = None,
) -> None:  # fmt: skip
    """Compile a source; where it is rejected, it is kept for who wants to read it."""
    text = built.with_suffix(".c")
    text.write_text(source, "utf-8")
    command = [*compiler.command, *options, "-shared", str(text), "-o", str(built), "-lm"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise CompileError(f"{compiler.command[0]} cannot be run: {error}") from error
    said = done.stderr.strip() or done.stdout.strip()
    if done.returncode != 0:
        _forget(compiler)
        where = ""
        if kept is not None:
            _replace(kept, source.encode())
            where = f" (source kept in {kept})"
        raise CompileError(
            f"{compiler.version} rejected {what}{where}: {said or f'exit status {done.returncode}'}"
        )
    if said:
        log.debug("%s: %s", built.stem, said)


def _install(path: Path, build: Callable[[Path], None]) -> None:
    """Have a binary built, and put it in place whole, beside its checksum."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with _one_at_a_time(path):
        if _intact(path):  # another process was first
            return
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".build-") as folder:
            built = Path(folder) / f"{path.stem.rpartition('-')[0]}.so"
            build(built)
            # a reader finds the whole file or none, and believes it when its checksum is there
            checksum = _digest(built.read_bytes())
            os.replace(built, path)
            _replace(path.with_suffix(".sha256"), checksum.encode())


@contextlib.contextmanager
def _one_at_a_time(path: Path) -> Iterator[None]:
    """Among threads and processes; the lock of one that died is free.  Where a file system has no
    locks some work is done twice, which is harmless."""
    from filelock import FileLock

    lock = FileLock(f"{path}.lock")
    try:
        lock.acquire()
    except NotImplementedError:
        yield
        return
    try:
        yield
    finally:
        lock.release()


def _intact(path: Path) -> bool:
    """Whether a library is there and is what was put there: a crash may leave half a file."""
    try:
        wanted = path.with_suffix(".sha256").read_bytes()
        return wanted == _digest(path.read_bytes()).encode()
    except OSError:
        return False


def _replace(path: Path, data: bytes) -> None:
    """Write a file that others see whole or not at all."""
    handle, partial = tempfile.mkstemp(dir=path.parent, prefix=".partial-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(partial)
        raise


@functools.cache
def _private_folder(instead_of: Path, reason: str) -> Path:
    folder = tempfile.mkdtemp(prefix="kernelgen-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    log.warning(
        "compiled kernels cannot be kept in %s (%s); this process keeps its own, and the next one"
        " compiles again: set KERNELGEN_CACHE to a folder that can be written",
        instead_of, reason,
    )  # fmt: skip
    return Path(folder)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()

"""The compiler, its absence, and the folder of compiled kernels."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from kernelgen import targets
from kernelgen.errors import CompileError, TargetError
from kernelgen.generate import generate
from kernelgen.ir import formats
from kernelgen.targets.base import Kernel
from kernelgen.targets.c import compiler
from kernelgen.targets.c.runtime import CRuntime, isa_named, native_isa
from kernelgen.tensor import QuantTensor
from kernelgen.verify import check
from tests.c.machines import problems

ROOT = Path(__file__).resolve().parent.parent.parent


def kernel(name: str = "q8_0") -> Kernel:
    return generate("dequantize", formats.get(name), targets.get("c"))


def fresh() -> CRuntime:
    """A runtime that has loaded nothing yet."""
    return CRuntime(native_isa())


def is_right(runtime: CRuntime, one: Kernel) -> bool:
    return check(one, runtime, 1, 3, 2 * one.format.block) <= 1e-6


def script(path: Path, text: str) -> Path:
    """An executable shell script."""
    path.write_text("#!/bin/sh\n" + textwrap.dedent(text))
    path.chmod(0o755)
    return path


def a_compiler() -> str:
    """The path of a compiler that this machine has."""
    found = shutil.which("gcc") or shutil.which("clang-19") or shutil.which("cc")
    if found is None:
        pytest.skip("no C compiler here")
    return found


@pytest.fixture
def counted(
    tmp_path: Path, empty_cache: Path, compiled_by: Callable[[str], None]
) -> Iterator[Callable[[], list[str]]]:
    """A compiler that keeps a list of the kernels it compiled, which the value gives."""
    log = tmp_path / "compiled"
    log.touch()
    wrapper = script(
        tmp_path / "counting-cc",
        f"""
        case "$*" in *kernelgen_*) echo "$*" | grep -o 'kernelgen_[a-zA-Z0-9_]*[.]c' >>{log};; esac
        exec {a_compiler()} "$@"
        """,
    )
    compiled_by(str(wrapper))
    yield lambda: log.read_text().split()


IN_ANOTHER_PROCESS = """
import sys, threading
from tests.c.test_runtime import fresh, is_right, kernel
runtime, one = fresh(), kernel()
right = []
threads = [threading.Thread(target=lambda: right.append(is_right(runtime, one))) for _ in range(8)]
for thread in threads: thread.start()
for thread in threads: thread.join()
sys.exit(0 if right == [True] * 8 else 1)
"""


def another_process() -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", IN_ANOTHER_PROCESS], cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


# ---- the cache ------------------------------------------------------------------------------


def test_compiled_once_for_all_processes(counted: Callable[[], list[str]]) -> None:
    """Four processes of eight threads at once, and one that comes later."""
    first = [another_process() for _ in range(4)]
    for process in first:
        assert process.wait(120) == 0, process.communicate()[1]
    assert counted() == ["kernelgen_dequantize_q8_0.c"]
    later = another_process()
    assert later.wait(60) == 0
    assert is_right(fresh(), kernel())
    assert len(counted()) == 1


def test_threads_with_different_kernels(counted: Callable[[], list[str]]) -> None:
    runtime, names = fresh(), ("q4_0", "q8_0", "q4_K", "f16")
    right: list[bool] = []
    threads = [
        threading.Thread(target=lambda n=name: right.append(is_right(runtime, kernel(n))))
        for name in names * 2
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert right == [True] * 8
    assert sorted(counted()) == sorted(f"kernelgen_dequantize_{n}.c" for n in names)


def test_what_a_binary_depends_on(
    counted: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Source, flags, headers, and the compiler's version."""

    def compiled(one: Kernel, isa: str = native_isa().name) -> int:
        assert is_right(CRuntime(isa_named(isa)), one)
        return len(counted())

    one = kernel()
    assert compiled(one) == 1
    assert compiled(one) == 1
    assert compiled(replace(one, source=one.source + "// changed\n", hash="1")) == 2
    assert compiled(one, "scalar") == 3
    monkeypatch.setattr(compiler, "headers_digest", lambda: "other headers")
    assert compiled(one) == 4
    found = compiler.find_compiler()
    assert isinstance(found, compiler.Compiler)
    monkeypatch.setattr(compiler, "find_compiler", lambda: replace(found, version="2.0"))
    assert compiled(one) == 5
    monkeypatch.undo()


def test_the_headers_are_hashed() -> None:
    names = {path.name for path in compiler.HEADERS.glob("*.h")}
    assert {"words.h", "words_plain.h"} <= names
    assert names == set(targets.get("c").support_files)


@pytest.mark.parametrize("damage", ["truncated", "empty", "garbage", "no checksum"])
def test_a_damaged_binary_is_made_again(
    damage: str, counted: Callable[[], list[str]], empty_cache: Path
) -> None:
    assert is_right(fresh(), kernel())
    (binary,) = empty_cache.glob("*.so")
    whole = binary.read_bytes()
    binary.unlink()  # this process has it mapped
    if damage == "no checksum":
        binary.write_bytes(whole)
        binary.with_suffix(".sha256").unlink()
    else:
        parts = {"truncated": whole[: len(whole) // 2], "empty": b"", "garbage": b"x" * 5000}
        binary.write_bytes(parts[damage])
    process = another_process()
    assert process.wait(60) == 0, process.communicate()[1]
    assert len(counted()) == 2
    assert empty_cache.joinpath(binary.name).stat().st_size == len(whole)


def test_nothing_is_left_behind(empty_cache: Path) -> None:
    runtime = fresh()
    before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0
    for name in ("q8_0", "q4_0"):
        assert is_right(runtime, kernel(name))
    after = len(os.listdir("/proc/self/fd")) if before else 0
    assert after <= before
    # beside them is what a process makes once: what the compiler can do, and the team of threads
    kinds = sorted(path.suffix for path in empty_cache.glob("kernelgen_*"))
    assert kinds == [".lock", ".lock", ".sha256", ".sha256", ".so", ".so"]


def test_a_folder_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A file in its place stops root as well."""
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("KERNELGEN_CACHE", str(tmp_path / "file"))
    with caplog.at_level(logging.WARNING, "kernelgen"):
        for name in ("q8_0", "q4_0"):
            assert is_right(fresh(), kernel(name))
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1
    assert str(tmp_path / "file") in said[0]
    assert "KERNELGEN_CACHE" in said[0]


def test_a_folder_that_can_only_be_read(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is in it serves, as in an image that was built with its kernels."""
    assert is_right(fresh(), kernel())

    def no_writing(*_: object) -> None:
        raise AssertionError("a binary that is there was built")

    monkeypatch.setattr(compiler, "_build", no_writing)
    assert is_right(fresh(), kernel())


def test_the_users_folder_unless_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KERNELGEN_CACHE", str(tmp_path))
    assert compiler.cache_folder() == tmp_path / "c"
    monkeypatch.delenv("KERNELGEN_CACHE")
    assert compiler.cache_folder().parent.name == "kernelgen"


# ---- the compiler ---------------------------------------------------------------------------


def test_what_the_compiler_rejects(empty_cache: Path) -> None:
    broken = kernel()
    broken = replace(broken, source=broken.source.replace("float scale", "flaot scale"), hash="2")
    with pytest.raises(CompileError) as caught:
        fresh().program(broken)
    said = str(caught.value)
    assert "dequantize q8_0" in said
    assert "flaot" in said
    kept = next(word for word in said.split() if word.endswith(".c):")).rstrip("):")
    assert "flaot scale" in Path(kept).read_text()
    assert kept.startswith(str(empty_cache))


@pytest.mark.parametrize("command", ["/bin/false", "/no/such/cc", "'unclosed", "echo hello", "   "])
def test_cc_that_is_no_compiler(
    command: str, empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CC", command)
    compiler.find_compiler.cache_clear()
    reason = fresh().available()
    assert reason is not None
    assert repr(command) in reason
    assert "\n" not in reason
    with pytest.raises(TargetError, match="CC is set to"):
        fresh().program(kernel())


def test_a_compiler_for_another_machine(
    empty_cache: Path, compiled_by: Callable[[str], None]
) -> None:
    arm_here = "aarch64" in native_isa().machines
    compiled_by("x86_64-linux-gnu-gcc" if arm_here else "aarch64-linux-gnu-gcc")
    assert "that this Python can load" in str(fresh().available())


def test_no_compiler_at_all(
    tmp_path: Path, empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    compiler.find_compiler.cache_clear()
    reason = fresh().available()
    assert reason is not None
    assert "pip install" in reason
    assert "\n" not in reason


def test_without_openmp(
    tmp_path: Path, empty_cache: Path, compiled_by: Callable[[str], None]
) -> None:
    without = script(
        tmp_path / "plain-cc",
        f"""
        for word in "$@"; do [ "$word" = -fopenmp ] && exit 1; done
        exec {a_compiler()} "$@"
        """,
    )
    compiled_by(str(without))
    found = compiler.find_compiler()
    assert isinstance(found, compiler.Compiler)
    assert not found.openmp
    assert fresh().describe()[0]["openmp"] is False
    assert problems(fresh(), ["q4_K"], ["dequantize", "quantize", "matvec"]) == []


def test_a_compiler_is_tried_once(
    counted: Callable[[], list[str]], empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Later processes know what it can do, unless it changes."""
    found = compiler.find_compiler()
    assert isinstance(found, compiler.Compiler)
    assert found.openmp
    assert len(list(empty_cache.glob("compiler-*.json"))) == 1

    tried: list[tuple[str, ...]] = []
    original = compiler._try_compiler

    def trying(command: tuple[str, ...]) -> compiler.Compiler | None:
        tried.append(command)
        return original(command)

    monkeypatch.setattr(compiler, "_try_compiler", trying)
    compiler.find_compiler.cache_clear()
    assert compiler.find_compiler() == found
    assert tried == []
    os.utime(found.command[0], (1, 1))
    compiler.find_compiler.cache_clear()
    assert compiler.find_compiler() == found
    assert tried == [found.command]


# ---- weights --------------------------------------------------------------------------------


def test_tiles_begin_at_a_cache_line_and_are_kept() -> None:
    fmt = formats.get("q4_K")
    runtime = fresh()
    multiply = generate("matvec", fmt, targets.get("c"), precision="int8")
    for n in (1, 40):
        w = QuantTensor(fmt, (n, 256), np.zeros(n * 144, np.uint8))
        tiles = runtime.prepare(multiply, w)
        assert tiles.ctypes.data % 64 == 0
        assert runtime.prepare(multiply, w) is tiles
        other = generate("matmul", fmt, targets.get("c"), precision="fp32")
        assert runtime.prepare(other, w) is tiles


def test_many_threads_multiply_at_once() -> None:
    """Of one matrix that nobody has prepared yet."""
    rng = np.random.default_rng(5)
    fmt = formats.get("q8_0")
    runtime = fresh()
    w = QuantTensor(fmt, (40, 256), np.zeros((40, 272), np.uint8))
    w = QuantTensor(fmt, (40, 256), rng.integers(0, 60, w.data.shape, np.uint8))
    run = runtime.matmul(generate("matvec", fmt, targets.get("c"), precision="fp32"))
    xs = [rng.standard_normal((2, 256), np.float32) for _ in range(8)]
    ys = [np.empty((2, 40), np.float32) for _ in xs]
    threads = [threading.Thread(target=run, args=(x, w, y)) for x, y in zip(xs, ys, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(w.prepared) == 1
    for x, y in zip(xs, ys, strict=True):
        assert np.allclose(y, x @ w.dequantize().T, rtol=1e-4, atol=1e-4)

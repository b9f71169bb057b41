"""Kernels stay inside their arrays, write all of their outputs, and do nothing undefined."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest

from kernelgen.targets.c.runtime import isa_named, native_isa
from tests.c.machines import ALL_FORMATS, ISA_NAMES, find_clang, here, problems
from tests.c.programs import ProgramRuntime

ROOT = Path(__file__).resolve().parent.parent.parent

SANITIZERS = {
    "address, undefined": ("-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
    "memory": ("-fsanitize=memory", "-fno-sanitize-recover=all", "-DUNINITIALIZED"),
}


def python(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *words], cwd=ROOT, capture_output=True, text=True, timeout=600, check=False
    )


def guarded(isa: str, names: tuple[str, ...]) -> None:
    here(isa_named(isa))
    done = python("-m", "tests.c.guarded", isa, *names)
    assert done.returncode == 0, f"{done.returncode}: {done.stdout[-500:]} {done.stderr[-2000:]}"
    assert int(done.stdout) > 100


def test_arrays_that_end_where_memory_ends() -> None:
    guarded(native_isa().name, ("q4_K", "q4_0", "mxfp4", "f16"))


def test_a_step_beyond_is_seen() -> None:
    done = python("-c", STEP_BEYOND)
    assert done.returncode == -11, done.stderr  # SIGSEGV
    assert done.stdout == "right\n"


STEP_BEYOND = """
import numpy as np
from kernelgen import targets
from kernelgen.generate import generate
from kernelgen.ir import formats
from kernelgen.targets.c.runtime import native_isa
from tests.c.guarded import Caller
fmt = formats.get("f32")
call = Caller(native_isa().name, True)
kernel = generate("dequantize", fmt, targets.get("c"))
call(kernel, np.ones(12, np.uint8), np.ones(3, np.float32), 3)
print("right", flush=True)
call(kernel, np.ones(12, np.uint8), np.ones(3, np.float32), 4)
"""


@pytest.mark.slow
@pytest.mark.parametrize("isa", ISA_NAMES)
@pytest.mark.parametrize("some", range(3))
def test_all_arrays_that_end_where_memory_ends(isa: str, some: int) -> None:
    guarded(isa, ALL_FORMATS[some::3])


@pytest.mark.slow
@pytest.mark.parametrize("isa", [native_isa().name, "avx2", "scalar"])
@pytest.mark.parametrize("name", ["q4_K", "q3_K", "q8_0", "iq4_nl", "mxfp4", "bf16"])
@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_sanitizers(sanitizer: str, name: str, isa: str) -> None:
    clang = find_clang()
    if clang is None:
        pytest.skip("clang is not installed")
    here(isa_named(isa))
    options = (*isa_named(isa).flags, *SANITIZERS[sanitizer], "-g")
    runtime = ProgramRuntime([clang], options, isa_named(isa).capabilities)
    assert problems(runtime, [name]) == []


@pytest.mark.slow
@pytest.mark.parametrize("isa", [native_isa().name, "scalar"])
def test_a_process_that_flushes_subnormal_numbers(isa: str) -> None:
    """Some libraries switch that on for everybody; halves below 2^-14 must survive it."""
    if platform.machine() != "x86_64":
        pytest.skip("the driver knows how to switch it on for x86 alone")
    options = (*isa_named(isa).flags, "-DFLUSH_SUBNORMALS")
    runtime = ProgramRuntime([find_clang() or "gcc"], options, isa_named(isa).capabilities)
    assert problems(runtime, ["f16", "q4_0"]) == []

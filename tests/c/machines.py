"""Instruction sets, compilers and emulators that tests run on, and what verification says."""

from __future__ import annotations

import dataclasses
import functools
import shutil
from collections.abc import Iterable, Iterator

import pytest

from kernelgen import targets
from kernelgen.ir import formats
from kernelgen.targets.base import Runtime
from kernelgen.targets.c.runtime import ISAS, CRuntime, Isa, isa_named
from kernelgen.verify import OPS, verify
from tests.c.programs import ProgramRuntime

ALL_FORMATS = tuple(f.name for f in formats.formats())

#: each decodes in its own way: group integers, signed codes, tables, halves, plain floats, a grid
#: with signs, digits of base 3
SOME_FORMATS = ("q4_K", "q8_0", "iq4_nl", "mxfp4", "q3_K", "f16", "iq2_xs", "tq1_0")

CROSS_COMPILER = "aarch64-linux-gnu-gcc"
QEMU = "qemu-aarch64"


@functools.cache
def find_clang() -> str | None:
    """The newest clang here."""
    names = (*(f"clang-{n}" for n in range(24, 14, -1)), "clang")
    return next((name for name in names if shutil.which(name)), None)


def strict(isa: Isa) -> CRuntime:
    """A runtime for which a warning of the compiler is an error."""
    return CRuntime(dataclasses.replace(isa, flags=(*isa.flags, "-Werror")))


def here(isa: Isa) -> CRuntime:
    """`strict` for an instruction set of this machine; skips where it has it not."""
    runtime = strict(isa)
    reason = runtime.available()
    if reason is not None:
        pytest.skip(reason)
    return runtime


def arm(isa: str, cpu: str) -> ProgramRuntime:
    """64-bit ARM in an emulator; skips where it or the cross compiler is not installed."""
    for program in (QEMU, CROSS_COMPILER):
        if shutil.which(program) is None:
            pytest.skip(
                f"{program} is not installed: apt-get install qemu-user gcc-aarch64-linux-gnu"
                " libc6-dev-arm64-cross"
            )
    found = isa_named(isa)
    return ProgramRuntime(
        [CROSS_COMPILER, "-static"], found.flags, found.capabilities, [QEMU, "-cpu", cpu]
    )


def problems(runtime: Runtime, names: Iterable[str], ops: Iterable[str] = OPS) -> list[str]:
    """What verification has to say against kernels of these formats and ops."""
    return list(_problems(runtime, names, ops))


def _problems(runtime: Runtime, names: Iterable[str], ops: Iterable[str]) -> Iterator[str]:
    wanted = [formats.get(name) for name in names]
    done = 0
    for one in verify(targets.get("c"), wanted, ops, runtime=runtime):
        done += 1
        if not one.ok:
            yield f"{one.op} {one.format} {one.precision} {one.config}: {one.problem}"
    if not done:
        yield "nothing was verified"


#: names of all instruction sets, for parametrized tests
ISA_NAMES = tuple(isa.name for isa in ISAS)

"""Compiles a kernel for the CPU and launches it."""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kernelgen.emulator import launch as engine
from kernelgen.emulator.compiler import EmulatorError
from kernelgen.emulator.languages import LANGUAGES, Compiled, Language
from kernelgen.emulator.report import Finding, Place, Report

Array = npt.NDArray[Any]
#: an array is a pointer, None a null pointer, bytes a struct, Local memory of the block
Argument = Any
Size = int | Sequence[int]

ORDERS = ("forward", "reverse", "both", "random")
_NUMBER = {"forward": 0, "reverse": 1, "random": 2}
#: sizes of a grid or block, and of dynamic shared memory in bytes, end there, as CUDA's do
_LARGEST = 2**31 - 1


class Local:
    """An argument that is a pointer to shared memory of so many bytes (OpenCL's __local,
    Metal's threadgroup)."""

    def __init__(self, size: int) -> None:
        self.size = size


def _three(size: Size, what: str) -> Place:
    sizes = (size,) if isinstance(size, int) else tuple(int(s) for s in size)
    if not 1 <= len(sizes) <= 3 or min(sizes) < 1 or max(sizes) > _LARGEST:
        raise EmulatorError(
            f"{what} is {size!r}; it must be one to three numbers from 1 to {_LARGEST}"
        )
    x, y, z = (*sizes, 1, 1)[:3]
    return x, y, z


def _is_integer(value: Any, bits: int) -> bool:
    """Whether a number is an integer of so many bits, with a sign or without one."""
    if isinstance(value, float | np.floating) and not value.is_integer():
        return False
    return -(1 << bits - 1) <= int(value) < 1 << bits


class _Arguments:
    """A launch's arguments as bytes, and the arrays behind them as buffers of their own."""

    def __init__(self, entry: str, kinds: Sequence[str], names: Sequence[str],
                 args: Sequence[Argument], shared_bytes: int) -> None:  # fmt: skip
        if len(args) != len(kinds):
            raise EmulatorError(
                f"{entry} takes {len(kinds)} arguments ({', '.join(names)}), but got {len(args)}"
            )
        self.names = list(names)
        self.arrays: list[Array] = []
        self.argument_of: list[int] = []
        self.values: list[bytes] = []
        self.pointers: list[tuple[int, int]] = []
        self.shared_bytes = shared_bytes
        for i, (kind, value) in enumerate(zip(kinds, args, strict=True)):
            where = f"argument {i} ({names[i] if i < len(names) else '?'}) of {entry}"
            self.values.append(self._bytes(i, kind[0], int(kind[1:]), value, where))

    def _bytes(self, i: int, kind: str, size: int, value: Argument, where: str) -> bytes:
        if kind == "p":
            if isinstance(value, Local):
                at = (self.shared_bytes + 127) // 128 * 128
                self.shared_bytes = at + value.size
                return (engine.dynamic_shared_address() + at).to_bytes(8, "little")
            if value is not None:
                self.pointers.append((i, self._buffer(i, value, where)))
            return bytes(8)
        if isinstance(value, bytes | np.generic | np.ndarray) and kind == "o":
            raw = value if isinstance(value, bytes) else value.tobytes()
            if len(raw) == size:
                return raw
        if isinstance(value, int | float | bool | np.generic) and kind in "iuf":
            if kind == "f":
                return np.array(value, {2: "f2", 4: "f4", 8: "f8"}[size]).tobytes()
            if _is_integer(value, 8 * size):
                return (int(value) % (1 << 8 * size)).to_bytes(size, "little")
        raise EmulatorError(
            f"{where} is {_KIND[kind]} of {size} bytes, but got"
            f" {type(value).__name__} {value!r:.60}"
        )

    def _buffer(self, i: int, value: Argument, where: str) -> int:
        if not isinstance(value, np.ndarray):
            raise EmulatorError(f"{where} is a pointer, but got {type(value).__name__}")
        if not value.flags.c_contiguous:
            raise EmulatorError(f"{where} must be contiguous; pass numpy.ascontiguousarray of it")
        for number, array in enumerate(self.arrays):
            if array.ctypes.data == value.ctypes.data and array.nbytes == value.nbytes:
                return number
        self.arrays.append(value)
        self.argument_of.append(i)
        return len(self.arrays) - 1


_KIND = {"p": "a pointer", "i": "an integer", "u": "an unsigned integer", "f": "a float",
         "o": "a struct"}  # fmt: skip


class Emulator:
    """A kernel file, compiled for the CPU once and launched as often as one likes.

    `defines` are macros, `include` folders with the file's own headers, `name` what messages and
    __FILE__ call it.
    """

    def __init__(self, source: str, language: str = "cuda", *,
                 defines: Mapping[str, str | int] | None = None, include: Sequence[str | Path] = (),
                 name: str = "", subgroup: int = 32) -> None:  # fmt: skip
        if language not in LANGUAGES:
            raise EmulatorError(f"language {language!r} is not one of {', '.join(LANGUAGES)}")
        self.language: Language = LANGUAGES[language]
        if subgroup not in self.language.subgroups:
            raise EmulatorError(
                f"a subgroup of {subgroup} lanes; {language} has {self.language.subgroups}"
            )
        self.source = source
        self.subgroup = subgroup
        self.name = name or f"kernel{self.language.suffix}"
        self._defines = dict(defines or {})
        self._include = [str(Path(p).resolve()) for p in include]
        self._entries = self.language.entries(source)

    @property
    def entries(self) -> tuple[str, ...]:
        """The names of the kernels in the file."""
        return tuple(e.name for e in self._entries)

    def parameters(self, entry: str) -> tuple[str, ...]:
        """The names of what a launch of a kernel gives; none are known of a template's instance."""
        return next((e.parameters for e in self._entries if e.name == entry), ())

    @functools.cache  # noqa: B019 - one emulator is one file, and lives as long
    def _compiled(self, entry: str, checked: bool) -> Compiled:
        return self.language.compile(
            self.source, entry, self.entries, checked, self.name, self._defines, self._include
        )

    def run(self, entry: str, grid: Size, block: Size, args: Sequence[Argument], *,
            shared_bytes: int = 0, order: str = "both", sanitize: bool = False, seed: int = 0,
            seconds: float = 20.0, workers: int = 0) -> Report:  # fmt: skip
        """Launches a kernel; arrays among the arguments hold its results afterwards."""
        if order not in ORDERS:
            raise EmulatorError(f"order {order!r} is not one of {', '.join(ORDERS)}")
        if not 0 <= shared_bytes <= _LARGEST:
            raise EmulatorError(
                f"{shared_bytes} bytes of shared memory were asked for; 0 to {_LARGEST} are allowed"
            )
        begin = time.perf_counter()
        compiled = self._compiled(entry, sanitize)
        kinds = engine.describe(str(compiled.library), compiled.describe).split()
        arguments = _Arguments(entry, kinds, self.parameters(entry), args, shared_bytes)
        shape = (_three(grid, "the grid"), _three(block, "the block"))
        options = engine.Options(
            seed=seed, seconds=seconds, workers=workers, subgroup=self.subgroup,
            flags=engine.EXIT_IS_DIVERGENCE if self.language.exit_is_divergence else 0,
        )  # fmt: skip
        report = Report()
        results: list[list[Array]] = []
        atomics = False
        for one in ("forward", "reverse") if order == "both" else (order,):
            arrays, used = self._once(compiled, shape, arguments, options, one, report)
            results.append(arrays)
            atomics |= used
        if len(results) == 2 and report.ok:
            self._compare(entry, shape, arguments, options, results, atomics, sanitize, report)
        for array, result in zip(arguments.arrays, results[0], strict=True):
            if array.flags.writeable:
                array[...] = result
        report.seconds = time.perf_counter() - begin
        return report

    def _once(self, compiled: Compiled, shape: tuple[Place, Place], arguments: _Arguments,
              options: engine.Options, order: str, report: Report,
              ) -> tuple[list[Array], bool]:  # fmt: skip
        """One run in one order on copies of the arrays."""
        arrays = [a.copy() for a in arguments.arrays]
        flags = options.flags | (engine.CHECKED if compiled.checked else 0)
        poison = 0xFF
        if order != "forward":
            # what must not matter is different each time: where buffers begin, when copies arrive,
            # and what memory holds that nobody wrote
            flags |= engine.BUFFERS_AT_START
            flags |= 0 if compiled.checked else engine.EAGER_COPIES
            poison = 0x7F
        options = replace(options, order=_NUMBER[order], flags=flags, poison=poison)
        buffers = [(a.ctypes.data, a.nbytes) for a in arrays]
        found, atomics = engine.launch(
            str(compiled.library), compiled.symbol, *shape, arguments.shared_bytes, buffers,
            arguments.values, arguments.pointers, options,
        )  # fmt: skip
        lines = _Lines(compiled.library, self.name, found)
        for raw in found:
            finding = lines.finding(raw, arguments, order)
            # one per line, and none without a line where another has it
            same = [f for f in report.findings if f.kind == finding.kind]
            if not any(finding.line in (f.line, 0) for f in same):
                report.findings.append(finding)
        return arrays, atomics

    def _compare(self, entry: str, shape: tuple[Place, Place], arguments: _Arguments,
                 options: engine.Options, results: list[list[Array]], atomics: bool,
                 checked: bool, report: Report) -> None:  # fmt: skip
        """Results that differ between the orders: a checked run says why."""
        where = ""
        for number, (a, b) in enumerate(zip(*results, strict=True)):
            bytes_a, bytes_b = (x.reshape(-1).view(np.uint8) for x in (a, b))
            differing = np.flatnonzero(bytes_a != bytes_b)
            if differing.size:
                at = int(differing[0]) // a.itemsize
                i = arguments.argument_of[number]
                name = arguments.names[i] if i < len(arguments.names) else f"argument {i}"
                where = f"{name}[{at}] is {a.reshape(-1)[at]} or {b.reshape(-1)[at]}"
                break
        if not where:
            return
        if not checked:
            compiled = self._compiled(entry, True)
            for one in ("forward", "reverse"):
                self._once(compiled, shape, arguments, options, one, report)
            if report.findings:
                return
        sentence = f"the result depends on the order of the threads: {where}"
        if atomics:
            report.notes.append(f"{sentence}; the kernel uses atomics, which may explain it")
        else:
            message = f"{sentence}; a race on global memory or between blocks?"
            report.findings.append(Finding("order", message, 0, (0, 0, 0), (0, 0, 0)))


class _Lines:
    """Turns offsets of machine code into lines of the kernel."""

    def __init__(self, library: Path, name: str, found: Sequence[engine.RawFinding]) -> None:
        wanted = {o for f in found for o in (f.pc, f.other_pc) if o}
        self._line = dict.fromkeys(wanted, 0)
        tool = _addr2line()
        if not wanted or not tool:
            return
        command = [tool, "-a", "-i", "-e", str(library), *(hex(o) for o in wanted)]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        offset = 0
        for line in run.stdout.splitlines():
            if line.startswith("0x"):
                offset = int(line, 16)
                continue
            place = re.match(r"(.*):(\d+)", line)
            # of inlined calls the innermost comes first; what lies in a header is not the kernel's
            if place and Path(place[1]).name == Path(name).name and not self._line.get(offset):
                self._line[offset] = int(place[2])

    def finding(self, raw: engine.RawFinding, arguments: _Arguments, order: str) -> Finding:
        line = raw.line or self._line.get(raw.pc, 0)
        other = raw.other_line or self._line.get(raw.other_pc, 0)
        text = raw.text.decode(errors="replace").replace("{other}", str(other or "?"))

        def named(match: re.Match[str]) -> str:
            i = arguments.argument_of[int(match[1])]
            name = arguments.names[i] if i < len(arguments.names) else ""
            return f"argument {i} ({name})" if name else f"argument {i}"

        text = re.sub(r"buffer (\d+)", named, text)
        block, thread = (tuple(int(v) for v in three) for three in (raw.block, raw.thread))
        return Finding(raw.kind.decode(), text, line, block, thread, raw.count, order)  # type: ignore[arg-type]


@functools.cache
def _addr2line() -> str | None:
    # binutils' own is last: it does not see where clang has inlined a function
    names = (*(f"llvm-addr2line-{n}" for n in range(21, 15, -1)), "llvm-addr2line", "addr2line")
    return next((path for n in names if (path := shutil.which(n))), None)


def emulate(source: str, entry: str, grid: Size, block: Size, args: Sequence[Argument], *,
            shared_bytes: int = 0, language: str = "cuda", order: str = "both",
            subgroup: int = 32, sanitize: bool = False, seconds: float = 20.0,
            defines: Mapping[str, str | int] | None = None) -> Report:  # fmt: skip
    """Compiles a kernel for the CPU and launches it once; see Emulator for several launches."""
    emulator = Emulator(source, language, defines=defines, subgroup=subgroup)
    return emulator.run(
        entry, grid, block, args,
        shared_bytes=shared_bytes, order=order, sanitize=sanitize, seconds=seconds,
    )  # fmt: skip

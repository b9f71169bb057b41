"""The engine's launch function, as ctypes sees it (native/internal.h has the same structures)."""

from __future__ import annotations

import ctypes
import functools
import os
import struct
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kernelgen.emulator.compiler import EmulatorError, engine_library

CHECKED, EAGER_COPIES, BUFFERS_AT_START, EXIT_IS_DIVERGENCE = 1, 2, 4, 8
MAX_FINDINGS = 64
_ONE_AT_A_TIME = threading.Lock()  # the engine's state is a process's
_SYMBOL_TABLE, _THREAD_LOCAL = 2, 6  # of ELF
_U32x3 = ctypes.c_uint32 * 3


class RawBuffer(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p), ("bytes", ctypes.c_uint64), ("base", ctypes.c_void_p),
        ("map", ctypes.c_void_p), ("map_bytes", ctypes.c_uint64),
    ]  # fmt: skip


class RawPointer(ctypes.Structure):
    _fields_ = [("slot", ctypes.c_void_p), ("buffer", ctypes.c_uint64)]


class RawFinding(ctypes.Structure):
    _fields_ = [
        ("kind", ctypes.c_char * 16), ("text", ctypes.c_char * 256), ("line", ctypes.c_int32),
        ("other_line", ctypes.c_int32), ("block", _U32x3), ("thread", _U32x3),
        ("pc", ctypes.c_uint64), ("other_pc", ctypes.c_uint64), ("count", ctypes.c_uint32),
        ("reserved", ctypes.c_uint32),
    ]  # fmt: skip


class RawLaunch(ctypes.Structure):
    _fields_ = [
        ("library", ctypes.c_char_p), ("symbol", ctypes.c_char_p), ("grid", _U32x3),
        ("block", _U32x3), ("dynamic_shared", ctypes.c_uint32), ("subgroup", ctypes.c_uint32),
        ("order", ctypes.c_uint32), ("seed", ctypes.c_uint32), ("flags", ctypes.c_uint32),
        ("workers", ctypes.c_uint32), ("poison", ctypes.c_uint32),
        ("buffer_count", ctypes.c_uint32), ("seconds", ctypes.c_double),
        ("buffers", ctypes.POINTER(RawBuffer)), ("pointers", ctypes.POINTER(RawPointer)),
        ("args", ctypes.POINTER(ctypes.c_void_p)), ("findings", ctypes.POINTER(RawFinding)),
        ("hidden", ctypes.POINTER(ctypes.c_uint32)), ("hidden_count", ctypes.c_uint64),
        ("finding_count", ctypes.c_uint32), ("max_findings", ctypes.c_uint32),
        ("atomics", ctypes.c_uint32), ("pointer_count", ctypes.c_uint32),
        ("error", ctypes.c_char * 256),
    ]  # fmt: skip


@functools.cache
def engine() -> ctypes.CDLL:
    """The engine, loaded so that kernels find its functions."""
    library = ctypes.CDLL(str(engine_library()), mode=ctypes.RTLD_GLOBAL)
    library.emu_struct_bytes.restype = ctypes.c_uint64
    for which, structure in enumerate((RawLaunch, RawBuffer, RawFinding)):
        if library.emu_struct_bytes(which) != ctypes.sizeof(structure):
            raise EmulatorError(f"a bug of the emulator: {structure.__name__} differs in size")
    return library


def dynamic_shared_address() -> int:
    """Where shared memory lies whose size a launch gives."""
    return ctypes.addressof(ctypes.c_char.in_dll(engine(), "emu_dynamic_shared"))


def describe(library: str, symbol: str) -> str:
    """The kinds and sizes of a kernel's arguments: "p8 i4 f4"."""
    text = ctypes.create_string_buffer(4096)
    error = ctypes.create_string_buffer(256)
    if engine().emu_describe(library.encode(), symbol.encode(), text, error):
        raise EmulatorError(f"the compiled kernel cannot be loaded: {error.value.decode()}")
    return text.value.decode()


@functools.cache
def construction_flags(library: str) -> tuple[int, ...]:
    """Offsets into a library's thread-local storage of bytes that the compiler keeps there.

    GCC notes for each variable of a class whether it has been constructed; the names begin with
    _ZGV.  They lie among shared memory, and no kernel writes them.
    """
    data = Path(library).read_bytes()
    if data[:5] != b"\x7fELF\x02":
        return ()
    table, entry, count = struct.unpack_from("<Q10xHH", data, 0x28)
    sections = [struct.unpack_from("<IIQQQQII", data, table + entry * i) for i in range(count)]
    found: list[int] = []
    for _, kind, _, _, start, size, strings, _ in sections:
        if kind != _SYMBOL_TABLE:
            continue
        names = sections[strings][4]
        for at in range(start, start + size, 24):
            name, info, value, length = struct.unpack_from("<IB3xQQ", data, at)
            if info & 15 == _THREAD_LOCAL and data.startswith(b"_ZGV", names + name):
                found.extend(range(value, value + max(1, length)))
    return tuple(found)


@dataclass(frozen=True)
class Options:
    """How a launch runs: what does not depend on the kernel."""

    order: int = 0
    seed: int = 0
    flags: int = 0
    poison: int = 0xFF
    subgroup: int = 32
    seconds: float = 20.0
    workers: int = 0


def workers_here() -> int:
    """Processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def launch(
    library: str,
    symbol: str,
    grid: Sequence[int],
    block: Sequence[int],
    dynamic_shared: int,
    buffers: Sequence[tuple[int, int]],
    values: Sequence[bytes],
    pointers: Sequence[tuple[int, int]],
    options: Options,
) -> tuple[list[RawFinding], bool]:
    """Runs a kernel; (findings, whether it used atomics).

    `buffers` are addresses and sizes, `values` the arguments' bytes, and `pointers` say which
    argument is to hold the address of which buffer.
    """
    slots = [ctypes.create_string_buffer(v + bytes(8), len(v) + 8) for v in values]
    raw = RawLaunch()
    raw.library, raw.symbol = library.encode(), symbol.encode()
    raw.grid, raw.block = _U32x3(*grid), _U32x3(*block)
    raw.dynamic_shared, raw.subgroup = dynamic_shared, options.subgroup
    raw.order, raw.seed, raw.flags = options.order, options.seed, options.flags
    raw.workers = options.workers or workers_here()
    raw.poison, raw.seconds = options.poison, options.seconds
    raw.buffer_count, raw.pointer_count = len(buffers), len(pointers)
    raw.buffers = (RawBuffer * max(1, len(buffers)))(
        *(RawBuffer(data=address, bytes=size) for address, size in buffers)
    )
    raw.pointers = (RawPointer * max(1, len(pointers)))(
        *(RawPointer(ctypes.addressof(slots[i]), buffer) for i, buffer in pointers)
    )
    raw.args = (ctypes.c_void_p * max(1, len(slots)))(*(ctypes.addressof(s) for s in slots))
    hidden = construction_flags(library)
    raw.hidden, raw.hidden_count = (ctypes.c_uint32 * max(1, len(hidden)))(*hidden), len(hidden)
    found = (RawFinding * MAX_FINDINGS)()
    raw.findings, raw.max_findings = found, MAX_FINDINGS
    with _ONE_AT_A_TIME:
        failed = engine().emu_launch(ctypes.byref(raw))
    if failed:
        raise EmulatorError(f"the launch is not possible: {raw.error.decode()}")
    return list(found[: raw.finding_count]), bool(raw.atomics)

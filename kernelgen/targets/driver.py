"""How a grid of threads is reached: a device's memory, its programs, launches."""

from __future__ import annotations

import contextlib
import glob
import math
import os
import platform
import sys
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np

from kernelgen.errors import CompileError
from kernelgen.ir.block import BlockFormat
from kernelgen.targets.base import Argument, Array, Kernel
from kernelgen.targets.codebook import codebook_of

Buffer = Any


def bytes_of(array: Array) -> Array:
    """The bytes of an array, uint8 (nbytes,): a view where it is C-contiguous, else a copy."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


class Driver(Protocol):
    """A device and its memory."""

    #: bytes that one buffer may have
    largest: int

    def key(self) -> Hashable:
        """Tells buffers of this device from those of others."""
        ...

    def upload(self, array: Array) -> Buffer:
        """A buffer with the bytes of a C-contiguous array."""
        ...

    def empty(self, nbytes: int) -> Buffer:
        """A buffer of that many bytes, of any content."""
        ...

    def write(self, buffer: Buffer, offset: int, array: Array) -> None:
        """Put the bytes of a C-contiguous array into a buffer from byte `offset` on, before what is
        launched later; they begin and end at whole words, or at the buffer's end."""
        ...

    def download(self, buffer: Buffer, out: Array) -> None:
        """Wait for what was launched, and fill a C-contiguous array from the buffer."""
        ...

    def program(self, kernel: Kernel) -> Any:
        """The kernel, compiled."""
        ...

    def launch(
        self, program: Any, groups: tuple[int, int], threads: int,
        buffers: Sequence[Buffer], sizes: Sequence[int],
    ) -> None:  # fmt: skip
        """Start a grid; buffers and sizes in the kernel's order."""
        ...


@runtime_checkable
class Timed(Protocol):
    """What a driver has besides, whose device says how long launches take."""

    def timed(self, call: Callable[[], None]) -> float:
        """Seconds that the device spends on what `call` launches."""
        ...


class TimedByEvents:
    """`Timed` for drivers whose device notes the moment when it comes by an event."""

    #: begin and end of each launch, where somebody asks for them
    _events: list[tuple[Any, Any]] | None = None

    def _moment(self) -> Any:
        """An event that has its place in the current stream."""
        raise NotImplementedError

    def _milliseconds(self, begin: Any, end: Any) -> float:
        """Between two events that have come."""
        return float(begin.elapsed_time(end))

    def _noted(self, start: Callable[[], object]) -> None:
        """Launch something, with events before and after it where somebody asks for them."""
        events = self._events
        if events is None:
            start()
            return
        begin = self._moment()
        start()
        events.append((begin, self._moment()))

    def timed(self, call: Callable[[], None]) -> float:
        """Seconds of the launches in a call, by events before and after each; for one thread at a
        time."""
        events: list[tuple[Any, Any]] = []
        self._events = events
        try:
            call()
        finally:
            self._events = None
        for _, end in events[-1:]:
            end.synchronize()
        return 1e-3 * sum(self._milliseconds(begin, end) for begin, end in events)


@runtime_checkable
class Resident(Protocol):
    """What a driver has besides, whose kernels work on arrays that another library has put on the
    device, in that library's order of things: on its current stream."""

    def takes(self, array: Any) -> bool:
        """Whether an array of any library lies where the kernels can work on it."""
        ...

    def at(self, array: Any) -> contextlib.AbstractContextManager[None]:
        """Launches inside go to the array's device, and to the stream on which the caller's
        library works there."""
        ...

    def borrow(self, array: Any) -> Buffer:
        """The memory of a C-contiguous array as a buffer; nothing is copied."""
        ...

    def zeros(self, nbytes: int) -> Buffer:
        """A buffer of zeros; nobody waits for it."""
        ...

    def wait(self) -> None:
        """Wait for what was uploaded, so that any stream may read it."""
        ...


#: what Linux shows where there is a GPU of any kind
GPU_FILES = ("/dev/dri/renderD*", "/dev/nvidia[0-9]*", "/dev/kfd", "/dev/dxg")


def visible(*patterns: str) -> str | None:
    """What says that a device may be here: a file that the system has for it.  Where systems have
    no such files, that nobody tells; None where there would be one, and is not."""
    if platform.system() != "Linux":
        return f"{platform.system()} may have one"
    found = next((path for one in patterns for path in sorted(glob.glob(one))), None)
    return None if found is None else f"{found} is there"


@contextlib.contextmanager
def own_symbols() -> Iterator[None]:
    """Libraries loaded inside use their own copy of LLVM; they would else call into that of another
    driver which was loaded before, and crash the process."""
    if not hasattr(os, "RTLD_DEEPBIND"):
        yield
        return
    before = sys.getdlopenflags()
    sys.setdlopenflags(os.RTLD_NOW | os.RTLD_LOCAL | os.RTLD_DEEPBIND)
    try:
        yield
    finally:
        sys.setdlopenflags(before)


@dataclass(frozen=True)
class Held:
    """Some heads of K or V in device memory: `batches` and `heads` of the tensor."""

    driver: Driver
    buffer: Buffer
    batches: slice
    heads: slice

    def renew(self, data: Array, batch: int, rows: slice) -> None:
        """Bring `rows` of all heads of a batch up to date, from the tensor's bytes (batches, heads,
        rows, bytes of a row)."""
        if not self.batches.start <= batch < self.batches.stop:
            return
        mine = data[self.batches, self.heads]
        flat, width = mine.reshape(-1), mine.shape[-1]
        for head in range(mine.shape[1]):
            first = ((batch - self.batches.start) * mine.shape[1] + head) * mine.shape[2]
            # in whole words
            start = (first + rows.start) * width // 4 * 4
            stop = min(-(-(first + rows.stop) * width // 4) * 4, flat.size)
            self.driver.write(self.buffer, start, flat[start:stop])


#: bytes of an element
ITEM_BYTES = {
    "u8": 1, "i8": 1, "u16": 2, "i16": 2, "f16": 2, "bf16": 2, "u32": 4, "i32": 4, "f32": 4,
}  # fmt: skip


class Launcher:
    """A compiled kernel that takes buffers and sizes by name."""

    def __init__(self, driver: Driver, kernel: Kernel) -> None:
        launch = kernel.walk.launch(kernel.config, kernel.subject)
        assert launch is not None
        self._driver = driver
        self._zeros = driver.zeros if isinstance(driver, Resident) else self._upload_zeros
        self._program = driver.program(kernel)
        self._threads = launch.threads
        # expressions of our own manifest, evaluated at every launch
        self._groups = [compile(text, "<grid>", "eval") for text in launch.groups]
        self._buffers = [a for a in kernel.arguments if a.role != "size"]
        self._sizes = [a.name for a in kernel.arguments if a.role == "size"]
        self._tables: dict[str, Buffer] = {
            a.name: driver.upload(np.array(codebook_of(kernel.subject), np.uint32))
            for a in self._buffers
            if a.role == "table"
        }
        self._known: dict[str, int] = {}
        if isinstance(kernel.subject, BlockFormat):
            fmt = kernel.subject
            self._known = {"block": fmt.block, "group": fmt.group, "block_bytes": fmt.nbytes}
        symbols = {**kernel.walk.symbols, **launch.symbols}
        self._shapes = {
            a.name: [compile(symbols.get(s, s), "<shape>", "eval") for s in a.shape]
            for a in self._buffers
        }

    def __call__(self, buffers: Mapping[str, Buffer], sizes: Mapping[str, int]) -> None:
        """Start the kernel; nothing is launched where the grid is empty."""
        self.bound(buffers, sizes)()

    def bound(self, buffers: Mapping[str, Buffer], sizes: Mapping[str, int]) -> Callable[[], None]:
        """A launch with all that it needs looked up and allocated before, to be made many times."""
        x, y = (eval(code, {"min": min}, dict(sizes)) for code in self._groups)
        if not x or not y:
            return lambda: None
        given = [self._buffer(one, buffers, sizes) for one in self._buffers]
        numbers = [sizes[n] for n in self._sizes]
        return lambda: self._driver.launch(self._program, (x, y), self._threads, given, numbers)

    def _buffer(
        self, one: Argument, buffers: Mapping[str, Buffer], sizes: Mapping[str, int]
    ) -> Buffer:
        """What was given, or memory that nobody else uses."""
        if one.role == "table":
            return self._tables[one.name]
        if one.name in buffers:
            return buffers[one.name]
        if one.role == "scratch":
            return self._driver.empty(self._nbytes(one, sizes))
        if one.role == "zero":
            return self._zeros(self._nbytes(one, sizes))
        raise KeyError(one.name)

    def _upload_zeros(self, nbytes: int) -> Buffer:
        return self._driver.upload(np.zeros(nbytes, np.uint8))

    def _nbytes(self, one: Argument, sizes: Mapping[str, int]) -> int:
        known = {**self._known, **sizes}
        counts = (eval(code, {"min": min}, known) for code in self._shapes[one.name])
        return int(math.prod(counts)) * ITEM_BYTES[one.dtype]

    def results(
        self,
        sizes: Mapping[str, int],
        roles: tuple[str, ...] = ("out",),
        given: Collection[str] = (),
    ) -> dict[str, Buffer]:
        """Buffers for all that the kernel gives back, but for those that are `given`; with
        "scratch", for what it leaves there."""
        return {
            one.name: self._driver.empty(self._nbytes(one, sizes))
            for one in self._buffers
            if one.role in roles and one.name not in given
        }


def rejected(who: str, kernel: Kernel, message: str, line: int | None) -> CompileError:
    """The error for a driver that does not take a kernel: what it says, and the line of source
    that it says it about."""
    text = " ".join(message.split()) or "the driver does not say why"
    lines = kernel.source.splitlines()
    if line is not None and 0 < line <= len(lines):
        text += f" at line {line}: {lines[line - 1].strip()}"
    return CompileError(
        f"{who} rejected {kernel.op} {kernel.subject.name}"
        f" ({', '.join(f'{k}={v}' for k, v in kernel.config.as_dict().items())}): {text}"
    )

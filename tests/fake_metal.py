"""Stand-ins for what reaches Apple's GPUs from Python: torch's MPS device, and pyobjc's Metal.

They have what kernelgen calls, as the documentation describes it, and are strict about it.  Kernels
are compiled when these say so, and run in the emulator as late as the interfaces allow: what is
launched but not waited for has not happened.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt

from kernelgen.emulator import Emulator, EmulatorError

Array = npt.NDArray[Any]


@dataclass
class Launched:
    """A launch: the grid in threadgroups, the threads of each, and what was bound, in order."""

    entry: str
    groups: tuple[int, int, int]
    threads: tuple[int, int, int]
    arguments: list[Any]


@dataclass
class Queue:
    """Launches that wait to be run, and all that there were."""

    waiting: list[Callable[[], None]] = field(default_factory=list)
    launched: list[Launched] = field(default_factory=list)

    def add(self, emulator: Emulator, launch: Launched) -> None:
        """Launch a kernel; it runs when somebody waits."""

        def run() -> None:
            report = emulator.run(launch.entry, launch.groups, launch.threads, launch.arguments)
            assert report.ok, report

        self.launched.append(launch)
        self.waiting.append(run)

    def finish(self) -> None:
        """Wait for all that was launched."""
        while self.waiting:
            self.waiting.pop(0)()


def _compiled(source: str) -> Emulator:
    """Raises EmulatorError with messages about "program_source", as Metal's compiler calls it."""
    emulator = Emulator(source, "metal", name="program_source")
    for entry in emulator.entries:
        emulator._compiled(entry, False)
    return emulator


# ---- torch


@dataclass
class Tensor:
    """Bytes on a device."""

    bytes: Array
    device: str
    queue: Queue

    def to(self, device: str) -> Tensor:
        """A copy on another device."""
        assert (self.device, device) == ("cpu", "mps")
        return Tensor(self.bytes.copy(), device, self.queue)

    def cpu(self) -> Tensor:
        """Wait for the device, and copy."""
        self.queue.finish()
        return Tensor(self.bytes.copy(), "cpu", self.queue)

    def numpy(self) -> Array:
        """The bytes, which must be on the CPU."""
        assert self.device == "cpu"
        return self.bytes


class _Mps(str):
    """The device, as torch prints it."""

    type = "mps"


class Floats:
    """A tensor of float32 on the GPU, with what kernelgen calls of one that users give."""

    device, dtype, requires_grad = _Mps("mps:0"), "torch.float32", False

    def __init__(self, memory: Array, queue: Queue) -> None:
        self.memory, self.queue = memory, queue

    shape = property(lambda self: self.memory.shape)

    def __array_namespace__(self) -> Any:
        return SimpleNamespace(float32=np.float32)

    def __dlpack_device__(self) -> tuple[int, int]:
        raise ValueError("Unknown device type mps for Dlpack")

    def detach(self) -> Floats:
        return self

    float = contiguous = detach

    def reshape(self, *shape: Any) -> Floats:
        return Floats(self.memory.reshape(*shape), self.queue)

    def __getitem__(self, key: Any) -> Floats:
        return Floats(self.memory[key], self.queue)

    def view(self, dtype: object) -> Tensor:
        return Tensor(self.memory.view(np.uint8), "mps", self.queue)

    def new_empty(self, shape: Any, dtype: Any) -> Floats:
        return Floats(np.full(shape, np.nan, dtype), self.queue)


class _TorchKernel:
    def __init__(self, emulator: Emulator, entry: str, queue: Queue) -> None:
        self._emulator, self._entry, self._queue = emulator, entry, queue

    def __call__(
        self, *args: Any, threads: Sequence[int], group_size: Sequence[int], arg_casts: str
    ) -> None:
        """torch takes threads, not groups; integers have 64 bits unless they are cast."""
        assert arg_casts == "int32" and len(threads) == len(group_size) == 3
        assert all(t % g == 0 for t, g in zip(threads, group_size, strict=True))
        arguments: list[Any] = []
        for one in args:
            if isinstance(one, Tensor):
                assert one.device == "mps"
                arguments.append(one.bytes)
            else:
                assert type(one) is int
                arguments.append(one)
        x, y, z = (t // g for t, g in zip(threads, group_size, strict=True))
        wide, high, deep = group_size
        launch = Launched(self._entry, (x, y, z), (wide, high, deep), arguments)
        self._queue.add(self._emulator, launch)


class _TorchLibrary:
    def __init__(self, emulator: Emulator, queue: Queue) -> None:
        self._emulator, self._queue = emulator, queue

    def __getattr__(self, name: str) -> _TorchKernel:
        if name not in self._emulator.entries:
            raise RuntimeError(f"Failed to create function state object for: {name}")
        return _TorchKernel(self._emulator, name, self._queue)


def torch(queue: Queue) -> SimpleNamespace:
    """The module torch of a Mac."""
    uint8 = object()

    def from_numpy(array: Array) -> Tensor:
        assert array.dtype == np.uint8 and array.flags.writeable and array.flags.c_contiguous
        return Tensor(array, "cpu", queue)

    def empty(nbytes: int, *, dtype: object, device: str) -> Tensor:
        assert dtype is uint8 and nbytes
        return Tensor(np.full(nbytes, 0xFF, np.uint8), device, queue)

    def compile_shader(source: str) -> _TorchLibrary:
        try:
            return _TorchLibrary(_compiled(source), queue)
        except EmulatorError as error:
            raise SyntaxError(str(error)) from error

    return SimpleNamespace(
        __version__="2.13.0", uint8=uint8, from_numpy=from_numpy, empty=empty,
        mps=SimpleNamespace(compile_shader=compile_shader),
        backends=SimpleNamespace(
            mps=SimpleNamespace(is_available=lambda: True, get_name=lambda: "Apple M9")
        ),
    )  # fmt: skip


# ---- pyobjc


class _Buffer:
    def __init__(self, nbytes: int) -> None:
        self.bytes = np.full(nbytes, 0xFF, np.uint8)

    def contents(self) -> SimpleNamespace:
        return SimpleNamespace(as_buffer=lambda count: memoryview(self.bytes)[:count])


class _Error:
    def __init__(self, text: str) -> None:
        self._text = text

    def localizedDescription(self) -> str:
        return self._text


class _Encoder:
    def __init__(self, queue: Queue) -> None:
        self._queue = queue
        self._bound: dict[int, Any] = {}
        self.encoded: list[tuple[Emulator, Launched]] = []
        self.ended = False

    def setComputePipelineState_(self, pipeline: tuple[Emulator, str]) -> None:
        self._emulator, self._entry = pipeline

    def setBuffer_offset_atIndex_(self, buffer: _Buffer, offset: int, at: int) -> None:
        assert offset == 0 and at not in self._bound
        self._bound[at] = buffer.bytes

    def setBytes_length_atIndex_(self, raw: bytes, length: int, at: int) -> None:
        assert len(raw) == length == 4 and at not in self._bound
        self._bound[at] = int.from_bytes(raw, "little")

    def dispatchThreadgroups_threadsPerThreadgroup_(
        self, groups: tuple[int, int, int], threads: tuple[int, int, int]
    ) -> None:
        arguments = [self._bound[n] for n in range(len(self._bound))]
        self.encoded.append((self._emulator, Launched(self._entry, groups, threads, arguments)))

    def endEncoding(self) -> None:
        self.ended = True


class _Command:
    def __init__(self, queue: Queue, fail: str) -> None:
        self._queue, self._fail = queue, fail
        self._encoder = _Encoder(queue)

    def computeCommandEncoder(self) -> _Encoder:
        return self._encoder

    def commit(self) -> None:
        assert self._encoder.ended
        for emulator, launch in self._encoder.encoded:
            self._queue.add(emulator, launch)

    def waitUntilCompleted(self) -> None:
        self._queue.finish()

    def error(self) -> _Error | None:
        return _Error(self._fail) if self._fail else None


class _Options:
    fast = True

    @classmethod
    def alloc(cls) -> SimpleNamespace:
        return SimpleNamespace(init=cls)

    def setFastMathEnabled_(self, on: bool) -> None:
        self.fast = on


class _Device:
    def __init__(self, queue: Queue) -> None:
        self._queue = queue
        self.fail = ""
        self.most = 2**30

    def newCommandQueue(self) -> SimpleNamespace:
        return SimpleNamespace(commandBuffer=lambda: _Command(self._queue, self.fail))

    def newBufferWithLength_options_(self, nbytes: int, options: str) -> _Buffer | None:
        assert options == "shared" and nbytes
        return _Buffer(nbytes) if nbytes <= self.most else None

    def newLibraryWithSource_options_error_(
        self, source: str, options: _Options, error: None
    ) -> tuple[Any, _Error | None]:
        assert not options.fast
        try:
            emulator = _compiled(source)
        except EmulatorError as found:
            return None, _Error(str(found))
        return SimpleNamespace(newFunctionWithName_=lambda name: (emulator, name)), None

    def newComputePipelineStateWithFunction_error_(
        self, function: tuple[Emulator, str], error: None
    ) -> tuple[Any, _Error | None]:
        found = function[1] in function[0].entries
        return (function, None) if found else (None, _Error("there is no such function"))

    def maxBufferLength(self) -> int:
        return self.most

    def registryID(self) -> int:
        return 7

    def name(self) -> str:
        return "Apple M9"

    def maxThreadsPerThreadgroup(self) -> SimpleNamespace:
        return SimpleNamespace(width=1024)

    def maxThreadgroupMemoryLength(self) -> int:
        return 32768


def pyobjc(queue: Queue) -> tuple[SimpleNamespace, SimpleNamespace]:
    """The modules Metal and objc of a Mac."""
    device = _Device(queue)

    @contextlib.contextmanager
    def autorelease_pool() -> Iterator[None]:
        yield

    metal = SimpleNamespace(
        MTLCreateSystemDefaultDevice=lambda: device,
        MTLCompileOptions=_Options,
        MTLResourceStorageModeShared="shared",
        MTLSizeMake=lambda x, y, z: (x, y, z),
        device=device,
    )
    return metal, SimpleNamespace(autorelease_pool=autorelease_pool)

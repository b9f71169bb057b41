"""A stand-in for cupy over the emulator: enough of it for the CUDA target and for bench/gpu.py.

Kernels run, as they are, on the CPU; nothing about times is meant.  `install()` puts it where
`import cupy` finds it.
"""

from __future__ import annotations

import sys
import time
import types
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np

from kernelgen.emulator import Emulator, EmulatorError


class CompileException(Exception):
    """What NVRTC rejects."""


class CUDARuntimeError(RuntimeError):
    """What the driver rejects."""


class DeviceArray:
    """An array on the device, which the host reads only by `get`; `memory` is where it lies."""

    def __init__(self, memory: np.ndarray) -> None:
        self.memory = memory
        self.device = Device()

    shape = property(lambda self: self.memory.shape)
    ndim = property(lambda self: self.memory.ndim)
    dtype = property(lambda self: self.memory.dtype)

    def __array_namespace__(self) -> Any:
        return sys.modules["cupy"]

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, 0

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("implicit conversion to a host array is not allowed, as cupy says")

    def __getitem__(self, key: Any) -> DeviceArray:
        return DeviceArray(self.memory[key])

    def __setitem__(self, key: Any, value: Any) -> None:
        source = value.memory if isinstance(value, DeviceArray) else value
        view = self.memory[key]
        _submit(lambda: np.copyto(view, source))

    def reshape(self, *shape: Any) -> DeviceArray:
        """A view, of which a kernel that runs later is seen."""
        made = self.memory.reshape(*shape)
        assert np.shares_memory(made, self.memory) or not made.size
        return DeviceArray(made)

    def view(self, dtype: Any) -> DeviceArray:
        """The same bytes as another type."""
        return DeviceArray(self.memory.view(dtype))

    def astype(self, dtype: Any) -> DeviceArray:
        """A copy, made in the stream's order."""
        made = np.empty(self.shape, dtype)
        _submit(lambda: np.copyto(made, self.memory, casting="unsafe"))
        return DeviceArray(made)

    def get(self) -> np.ndarray:
        """A copy on the host, which waits for the device."""
        _waits()
        return self.memory.copy()


class Function:
    """A kernel of a module."""

    #: the stream of each launch, and its arguments
    launched: ClassVar[list[tuple[Any, list[Any]]]] = []

    def __init__(self, emulator: Emulator, entry: str) -> None:
        self._emulator, self._entry = emulator, entry
        self.max_dynamic_shared_size_bytes = 49152

    def __call__(
        self, grid: tuple[int, ...], block: tuple[int, ...], args: Sequence[Any],
        shared_mem: int = 0,
    ) -> None:  # fmt: skip
        """Launch, or have the graph that is being captured remember it."""
        if shared_mem > self.max_dynamic_shared_size_bytes:
            raise CUDARuntimeError(f"{shared_mem} bytes of shared memory were not asked for")
        given = [a.memory if isinstance(a, DeviceArray) else a for a in args]
        kept = [a if isinstance(a, np.ndarray) else int(a) for a in given]
        Function.launched.append((Stream.current, kept))

        def run() -> None:
            report = self._emulator.run(
                self._entry, grid, block, kept, shared_bytes=shared_mem, order="forward"
            )
            if not report.ok:
                raise CUDARuntimeError(str(report.findings[0]))

        _submit(run)


class RawModule:
    """A file of kernels."""

    def __init__(self, code: str = "", path: str = "", options: Sequence[str] = ()) -> None:
        if path:
            with open(path, encoding="utf-8") as file:
                code = file.read()
        self._code = code

    def compile(self) -> None:
        """All is done on use."""

    def get_function(self, name: str) -> Function:
        """A kernel."""
        try:
            return Function(Emulator(self._code, "cuda", name=name), name)
        except EmulatorError as error:
            raise CompileException(str(error)) from error


class Graph:
    """Work that was recorded."""

    def __init__(self, work: list[Callable[[], None]]) -> None:
        self._work = work

    def launch(self, stream: Any = None) -> None:
        """Do it."""
        for one in self._work:
            one()

    def upload(self, stream: Any = None) -> None:
        """Nothing to do."""


class Stream:
    """A queue, which is never longer than one: work is done at once, or recorded."""

    recording: list[Callable[[], None]] | None = None
    current: Any = None

    def __init__(self, non_blocking: bool = False) -> None:
        self.before: Any = None

    def __enter__(self) -> Stream:
        self.before, Stream.current = Stream.current, self
        return self

    def __exit__(self, *_: object) -> None:
        Stream.current = self.before

    def begin_capture(self) -> None:
        """Record from now on."""
        Stream.recording = []

    def end_capture(self) -> Graph:
        """What was recorded."""
        work, Stream.recording = Stream.recording, None
        assert work is not None
        return Graph(work)

    def synchronize(self) -> None:
        """All is done already, unless it is recorded, when nobody may wait."""
        _waits()


class ExternalStream(Stream):
    """Another library's stream, by its address."""

    def __init__(self, ptr: int) -> None:
        super().__init__()
        self.ptr = ptr


def _waits() -> None:
    if Stream.recording is not None:
        raise CUDARuntimeError("cudaErrorStreamCaptureUnsupported: the host waits in a capture")


def _to_host(array: Any) -> np.ndarray:
    _waits()
    return np.array(array.memory if isinstance(array, DeviceArray) else array)


def _submit(work: Callable[[], None]) -> None:
    if Stream.recording is None:
        work()
    else:
        Stream.recording.append(work)


class Event:
    """A moment."""

    def __init__(self) -> None:
        self.at = 0.0

    def record(self, stream: Any = None) -> None:
        """Now."""
        self.at = time.perf_counter()

    def synchronize(self) -> None:
        """It is over."""


class Device:
    """The emulator as a device."""

    id = 0
    attributes = {  # noqa: RUF012 - nobody changes it
        "ComputeCapabilityMajor": 9, "ComputeCapabilityMinor": 0, "MaxThreadsPerBlock": 1024,
        "MaxSharedMemoryPerBlock": 49152, "MaxSharedMemoryPerBlockOptin": 232448,
        "L2CacheSize": 2**16,
    }  # fmt: skip

    def __init__(self, number: int = 0) -> None:
        pass

    def __enter__(self) -> Device:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def synchronize(self) -> None:
        """Nothing is under way."""


class _Nvrtc(types.ModuleType):
    """The compiler, for architectures by name: a binary is the source."""

    NVRTCError = CompileException

    def createProgram(self, source: str, *_: Any) -> list[str]:
        """A program."""
        return [source]

    def compileProgram(self, program: list[str], options: Sequence[str]) -> None:
        """Nothing yet."""

    def getCUBIN(self, program: list[str]) -> bytes:
        """The binary."""
        return program[0].encode()

    def getProgramLog(self, program: list[str]) -> str:
        """What the compiler says."""
        return ""

    def destroyProgram(self, program: list[str]) -> None:
        """Nothing to do."""


def _properties(number: int) -> dict[str, Any]:
    return {
        "name": b"fake GPU", "major": 9, "minor": 0, "multiProcessorCount": 4,
        "totalGlobalMem": 2**30, "sharedMemPerBlock": 49152,
    }  # fmt: skip


def _copy(to: Any, source: Any) -> None:
    def run() -> None:
        to[...] = source

    _submit(run)


def _matmul(a: Any, b: Any, out: Any = None) -> Any:
    def run() -> None:
        out[...] = np.matmul(a.astype(np.float32), b.astype(np.float32)).astype(out.dtype)

    _submit(run)
    return out


def _empty(shape: Any, dtype: Any) -> Any:
    """Poisoned memory; what is handed out as a result is an array that the host cannot read."""
    made = np.full(shape, -1 if dtype != np.uint8 else 255, dtype)
    return DeviceArray(made) if dtype == np.float32 else made


def _contiguous(x: DeviceArray, dtype: Any) -> DeviceArray:
    same = x.memory.flags.c_contiguous and x.dtype == dtype
    return x if same else x.astype(dtype)


def install() -> types.ModuleType:
    """Make `import cupy` find this."""
    cupy: Any = types.ModuleType("cupy")
    cupy.__version__ = "0.fake"
    cupy.uint8, cupy.float16, cupy.float32 = np.uint8, np.float16, np.float32
    cupy.asarray, cupy.asnumpy, cupy.copyto = np.array, _to_host, _copy
    cupy.ndarray, cupy.from_dlpack = DeviceArray, lambda x: DeviceArray(x.memory)
    cupy.ascontiguousarray = lambda x, dtype=None: _contiguous(x, dtype or x.dtype)
    cupy.empty = _empty
    cupy.zeros, cupy.ones, cupy.matmul = np.zeros, np.ones, _matmul
    cupy.RawModule = RawModule
    cupy.get_default_memory_pool = lambda: types.SimpleNamespace(free_all_blocks=lambda: None)
    cupy.random = types.SimpleNamespace(standard_normal=np.random.default_rng(0).standard_normal)
    runtime = types.SimpleNamespace(
        getDeviceCount=lambda: 1, getDeviceProperties=_properties,
        CUDARuntimeError=CUDARuntimeError, runtimeGetVersion=lambda: 13000,
        driverGetVersion=lambda: 13000,
    )  # fmt: skip
    cupy.cuda = types.SimpleNamespace(
        Device=Device, Stream=Stream, Event=Event, runtime=runtime, ExternalStream=ExternalStream,
        get_current_stream=lambda: Stream.current or Stream(),
        compiler=types.SimpleNamespace(CompileException=CompileException),
        get_elapsed_time=lambda a, b: 1e3 * max(b.at - a.at, 1e-9),
    )  # fmt: skip
    backends = [types.ModuleType(n) for n in ("cupy_backends", "cupy_backends.cuda")]
    libs: Any = types.ModuleType("cupy_backends.cuda.libs")
    libs.nvrtc = _Nvrtc("cupy_backends.cuda.libs.nvrtc")
    for one in (cupy, *backends, libs, libs.nvrtc):
        sys.modules[one.__name__] = one
    return cupy  # type: ignore[no-any-return]

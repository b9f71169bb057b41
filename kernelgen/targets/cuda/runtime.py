"""NVIDIA GPUs through cupy, which compiles with NVRTC and keeps the binaries."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import re
import sys
import tempfile
from collections.abc import Hashable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kernelgen.config import Capabilities
from kernelgen.errors import CompileError
from kernelgen.targets.base import EMULATED, Array, Kernel
from kernelgen.targets.cuda import CAPABILITIES
from kernelgen.targets.device import DeviceRuntime
from kernelgen.targets.driver import Buffer, TimedByEvents, bytes_of, rejected, visible
from kernelgen.targets.emulated import EmulatedRuntime

#: features of `Capabilities`, and the compute capability (times ten) that brought them
_SINCE = {"half2": 60, "dot": 61, "mma": 80}
#: those of one architecture alone, which must be compiled for it by name
_ONLY = {"wgmma": 90}

#: DLPack's number of CUDA devices
_CUDA = 2

#: bytes of shared memory that any launch may use
_WITHOUT_ASKING = 49152


class CupyDriver(TimedByEvents):
    """The current CUDA device (see kernelgen.targets.driver.Driver)."""

    def __init__(self) -> None:
        import cupy

        self._cupy = cupy
        # kernels address bytes with 32 bits
        self.largest = 2**32 - 4

    def key(self) -> Hashable:
        """The device itself."""
        return int(self._cupy.cuda.Device().id)

    def upload(self, array: Array) -> Buffer:
        """A buffer with the bytes of an array."""
        return self._cupy.asarray(bytes_of(array))

    def empty(self, nbytes: int) -> Buffer:
        """A buffer of that many bytes."""
        return self._cupy.empty(nbytes, self._cupy.uint8)

    def write(self, buffer: Buffer, offset: int, array: Array) -> None:
        """Put bytes into a buffer."""
        raw = bytes_of(array)
        buffer[offset : offset + raw.size] = self._cupy.asarray(raw)

    def download(self, buffer: Buffer, out: Array) -> None:
        """Wait, and fill an array."""
        out.reshape(-1).view(np.uint8)[:] = self._cupy.asnumpy(buffer)

    def takes(self, array: Any) -> bool:
        """Whether an array of any library lies on a CUDA device."""
        where = getattr(array, "__dlpack_device__", None)
        return where is not None and int(where()[0]) == _CUDA

    @contextlib.contextmanager
    def at(self, array: Any) -> Iterator[None]:
        """The array's device, and torch's current stream for what is torch's; cupy's own current
        stream serves all others, with which DLPack keeps them in order."""
        torch = sys.modules.get("torch")
        cuda = self._cupy.cuda
        with cuda.Device(int(array.__dlpack_device__()[1])):
            if torch is None or not isinstance(array, torch.Tensor):
                yield
                return
            with cuda.ExternalStream(torch.cuda.current_stream(array.device).cuda_stream):
                yield

    def borrow(self, array: Any) -> Buffer:
        """The memory of an array as one of bytes."""
        if not isinstance(array, self._cupy.ndarray):
            array = self._cupy.from_dlpack(array)
        return array.reshape(-1).view(self._cupy.uint8)

    def zeros(self, nbytes: int) -> Buffer:
        """A buffer of zeros."""
        return self._cupy.zeros(nbytes, self._cupy.uint8)

    def wait(self) -> None:
        """Wait for the current stream."""
        self._cupy.cuda.get_current_stream().synchronize()

    def program(self, kernel: Kernel) -> Any:
        """The kernel, compiled for this device."""
        options = ("--std=c++17",) if kernel.contract else ("--std=c++17", "--fmad=false")
        special = [_ONLY[name] for name in kernel.features if name in _ONLY]
        if special:
            module = self._special(kernel, (*options, f"-arch=sm_{special[0]}a"))
        else:
            module = self._cupy.RawModule(code=kernel.source, options=options)
        try:
            function = module.get_function(kernel.entry)
        except self._cupy.cuda.compiler.CompileException as error:
            raise _rejected(kernel, str(error)) from error
        launch = kernel.walk.launch(kernel.config, kernel.subject)
        shared_bytes = launch.shared_bytes if launch else 0
        if shared_bytes > _WITHOUT_ASKING:
            function.max_dynamic_shared_size_bytes = shared_bytes
        return function, shared_bytes

    def _special(self, kernel: Kernel, options: tuple[str, ...]) -> Any:
        """A module for an architecture by name, which cupy does not ask the compiler for."""
        from cupy_backends.cuda.libs import nvrtc

        program = nvrtc.createProgram(kernel.source, f"{kernel.entry}.cu", (), ())
        try:
            nvrtc.compileProgram(program, options)
            binary = nvrtc.getCUBIN(program)
        except nvrtc.NVRTCError as error:
            raise _rejected(kernel, nvrtc.getProgramLog(program) or str(error)) from error
        finally:
            nvrtc.destroyProgram(program)
        with tempfile.TemporaryDirectory(prefix="kernelgen-") as folder:
            path = Path(folder) / f"{kernel.entry}.cubin"
            path.write_bytes(binary)
            module = self._cupy.RawModule(path=str(path))
            module.compile()  # loads the file
        return module

    def launch(
        self,
        program: Any,
        groups: tuple[int, int],
        threads: int,
        buffers: Sequence[Buffer],
        sizes: Sequence[int],
    ) -> None:
        """Start a grid on the current stream."""
        function, shared_bytes = program
        arguments = (*buffers, *(np.uint32(s) for s in sizes))
        grid, block = (groups[0], groups[1], 1), (threads, 1, 1)
        self._noted(lambda: function(grid, block, arguments, shared_mem=shared_bytes))

    def _moment(self) -> Any:
        event = self._cupy.cuda.Event()
        event.record()
        return event

    def _milliseconds(self, begin: Any, end: Any) -> float:
        return float(self._cupy.cuda.get_elapsed_time(begin, end))


def features_of(chip: int) -> frozenset[str]:
    """Features of `Capabilities` that a compute capability, times ten, has."""
    since = (name for name, first in _SINCE.items() if chip >= first)
    return frozenset((*since, *(name for name, only in _ONLY.items() if chip == only)))


def _rejected(kernel: Kernel, said: str) -> CompileError:
    """The error for a kernel that NVRTC does not take, with the line that it complains about."""
    found = re.search(r"\((\d+)\): (?:catastrophic )?error: (.*)", said)
    line, message = (int(found[1]), found[2]) if found else (None, said)
    return rejected("NVRTC", kernel, message, line)


class CudaRuntime(DeviceRuntime):
    """The machine's NVIDIA GPU."""

    name = "cuda"

    def available(self) -> str | None:
        """Why kernels cannot run here, or None."""
        return why_not()

    def expected(self) -> str | None:
        """A GPU's file, or cupy, which nobody installs for nothing."""
        if "cupy" in sys.modules or importlib.util.find_spec("cupy") is not None:
            return "cupy is installed"
        return visible("/dev/nvidia[0-9]*") if sys.platform == "linux" else None

    @functools.cached_property
    def _opened(self) -> CupyDriver:
        return CupyDriver()

    def driver(self) -> CupyDriver:
        """The device; opened on first use."""
        return self._opened

    def capabilities(self) -> Capabilities:
        """Limits of the device."""
        import cupy

        attributes = cupy.cuda.Device().attributes
        chip = 10 * attributes["ComputeCapabilityMajor"] + attributes["ComputeCapabilityMinor"]
        return Capabilities(
            max_threads=int(attributes["MaxThreadsPerBlock"]),
            shared_bytes=int(attributes["MaxSharedMemoryPerBlock"]),
            launch_bytes=int(attributes["MaxSharedMemoryPerBlockOptin"]),
            features=features_of(chip),
        )

    def describe(self) -> list[dict[str, Any]]:
        """Every CUDA device of the machine."""
        if why_not():
            return []
        import cupy

        result = []
        for number in range(cupy.cuda.runtime.getDeviceCount()):
            found = cupy.cuda.runtime.getDeviceProperties(number)
            result.append(
                {
                    "device": found["name"].decode(),
                    "compute_capability": f"{found['major']}.{found['minor']}",
                    "multiprocessors": found["multiProcessorCount"],
                    "memory": found["totalGlobalMem"],
                    "shared_bytes": found["sharedMemPerBlock"],
                }
            )
        return result


@functools.cache
def why_not() -> str | None:
    """Why CUDA cannot be used here, or None."""
    try:
        import cupy
    except ImportError as error:
        return f"cupy cannot be imported ({error}); pip install kernelgen[cuda]"
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        return f"no CUDA device can be used ({error}); check the driver with nvidia-smi"
    return None if count else "no CUDA device was found; check the driver with nvidia-smi"


@functools.cache
def runtime(variant: str = "") -> DeviceRuntime:
    """The runtime of the current CUDA device, or of the emulator (variant "emulated")."""
    if variant == EMULATED:
        features = CAPABILITIES.features | {"wgmma"}
        return EmulatedRuntime("cuda", "cuda", dataclasses.replace(CAPABILITIES, features=features))
    return CudaRuntime()

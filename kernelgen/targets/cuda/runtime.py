"""NVIDIA GPUs through cupy, which compiles with NVRTC and keeps the binaries."""

from __future__ import annotations

import functools
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np

from kernelgen.config import Capabilities
from kernelgen.errors import CompileError
from kernelgen.targets.base import Array, Kernel
from kernelgen.targets.device import Buffer, DeviceRuntime
from kernelgen.targets.emulated import EmulatedRuntime


class CupyDriver:
    """The current CUDA device (see kernelgen.targets.device.Driver)."""

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
        return self._cupy.asarray(np.ascontiguousarray(array).reshape(-1).view(np.uint8))

    def empty(self, nbytes: int) -> Buffer:
        """A buffer of that many bytes."""
        return self._cupy.empty(nbytes, self._cupy.uint8)

    def download(self, buffer: Buffer, out: Array) -> None:
        """Wait, and fill an array."""
        out.reshape(-1).view(np.uint8)[:] = self._cupy.asnumpy(buffer)

    def program(self, kernel: Kernel) -> Any:
        """The kernel, compiled for this device."""
        options = ("--std=c++17",) if kernel.contract else ("--std=c++17", "--fmad=false")
        try:
            module = self._cupy.RawModule(code=kernel.source, options=options)
            return module.get_function(kernel.entry)
        except self._cupy.cuda.compiler.CompileException as error:
            raise CompileError(
                f"NVRTC rejected {kernel.op} {kernel.format.name}: {error}"
            ) from error

    def launch(
        self,
        program: Any,
        groups: tuple[int, int],
        threads: int,
        buffers: Sequence[Buffer],
        sizes: Sequence[int],
    ) -> None:
        """Start a grid on the current stream."""
        arguments = (*buffers, *(np.uint32(s) for s in sizes))
        program((groups[0], groups[1], 1), (threads, 1, 1), arguments)


class CudaRuntime(DeviceRuntime):
    """The machine's NVIDIA GPU."""

    name = "cuda"

    def available(self) -> str | None:
        """Why kernels cannot run here, or None."""
        return why_not()

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
        return Capabilities(
            max_threads=int(attributes["MaxThreadsPerBlock"]),
            shared_bytes=int(attributes["MaxSharedMemoryPerBlock"]),
            features=frozenset({"dot"}),
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
    if variant == "emulated":
        caps = Capabilities(max_threads=1024, shared_bytes=49152, features=frozenset({"dot"}))
        return EmulatedRuntime("cuda", "cuda", caps)
    return CudaRuntime()

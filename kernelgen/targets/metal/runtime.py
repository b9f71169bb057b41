"""Apple's GPUs, through torch where it is there, else through pyobjc.

Both drivers were written from the documentation of torch.mps.compile_shader and of Metal, and are
tested with stand-ins for these that run the kernels in the emulator.  They have not been tried on
a Mac.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import platform
import re
import threading
from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import numpy as np

from kernelgen.config import Capabilities
from kernelgen.errors import TargetError
from kernelgen.targets.base import EMULATED, Array, Kernel
from kernelgen.targets.device import DeviceRuntime
from kernelgen.targets.driver import Buffer, Driver, bytes_of, rejected
from kernelgen.targets.emulated import EmulatedRuntime
from kernelgen.targets.metal import CAPABILITIES

#: kernels address bytes with 32 bits
_LARGEST = 2**32 - 4


class TorchDriver:
    """Torch's MPS device (see kernelgen.targets.driver.Driver)."""

    name = "torch"
    largest = _LARGEST

    def __init__(self) -> None:
        import torch

        self._torch = torch

    def key(self) -> Hashable:
        """There is one device."""
        return self.name

    def upload(self, array: Array) -> Buffer:
        """A tensor with the bytes of an array."""
        # torch wants to be able to write, which it cannot into a mapped file
        raw = (
            np.require(array, requirements=["C_CONTIGUOUS", "WRITEABLE"]).reshape(-1).view(np.uint8)
        )
        return self._torch.from_numpy(raw).to("mps") if raw.size else self.empty(0)

    def empty(self, nbytes: int) -> Buffer:
        """A tensor of that many bytes."""
        return self._torch.empty(max(nbytes, 4), dtype=self._torch.uint8, device="mps")

    def write(self, buffer: Buffer, offset: int, array: Array) -> None:
        """Put bytes into a buffer."""
        raw = bytes_of(array)
        buffer[offset : offset + raw.size] = self._torch.from_numpy(raw.copy()).to(buffer.device)

    def download(self, buffer: Buffer, out: Array) -> None:
        """Wait, and fill an array."""
        out.reshape(-1).view(np.uint8)[:] = buffer.cpu().numpy()[: out.nbytes]

    def takes(self, array: Any) -> bool:
        """Whether an array is a tensor of torch's on the GPU."""
        return str(getattr(array, "device", "")).partition(":")[0] == "mps"

    @contextlib.contextmanager
    def at(self, array: Any) -> Iterator[None]:
        """There is one GPU, and torch has one queue for it."""
        yield

    def borrow(self, array: Any) -> Buffer:
        """The memory of a tensor as one of bytes."""
        return array.detach().reshape(-1).view(self._torch.uint8)

    def zeros(self, nbytes: int) -> Buffer:
        """A tensor of zeros."""
        return self._torch.zeros(max(nbytes, 4), dtype=self._torch.uint8, device="mps")

    def wait(self) -> None:
        """Nothing to do: there is one queue, which keeps its order."""

    def program(self, kernel: Kernel) -> Any:
        """The kernel, compiled."""
        try:
            return getattr(self._torch.mps.compile_shader(kernel.source), kernel.entry)
        except (RuntimeError, SyntaxError) as error:
            raise rejected("torch", kernel, *_complaint(str(error))) from error

    def launch(
        self,
        program: Any,
        groups: tuple[int, int],
        threads: int,
        buffers: Sequence[Buffer],
        sizes: Sequence[int],
    ) -> None:
        """Start a grid, whose size torch wants in threads; sizes are cast from 64 bits."""
        program(
            *buffers,
            *map(int, sizes),
            threads=[groups[0] * threads, groups[1], 1],
            group_size=[threads, 1, 1],
            arg_casts="int32",
        )

    def describe(self) -> dict[str, Any]:
        """The device."""
        name = getattr(self._torch.backends.mps, "get_name", None)  # newer than the rest
        return {"device": name() if name else "Apple GPU", "driver": "torch"}

    @staticmethod
    def missing() -> str | None:
        """Why torch does not do, or None."""
        try:
            import torch
        except ImportError as error:
            return f"torch cannot be imported ({error})"
        if not hasattr(torch.mps, "compile_shader"):
            return f"torch {torch.__version__} has no torch.mps.compile_shader, which 2.7 has"
        return None if torch.backends.mps.is_available() else "torch finds no MPS device"


class MetalDriver:
    """Metal's own interface, through pyobjc (see kernelgen.targets.driver.Driver)."""

    name = "pyobjc"

    def __init__(self) -> None:
        import Metal
        import objc

        self._metal = Metal
        self._pool = objc.autorelease_pool
        self._device = Metal.MTLCreateSystemDefaultDevice()
        self._queue = self._device.newCommandQueue()
        # a queue works in order: all is done when the command that was committed last is
        self._last: Any = None
        self._lock = threading.Lock()
        self.largest = min(int(self._device.maxBufferLength()), _LARGEST)

    def key(self) -> Hashable:
        """The device itself."""
        return (self.name, int(self._device.registryID()))

    def upload(self, array: Array) -> Buffer:
        """A buffer with the bytes of an array, in memory that the CPU and the GPU share."""
        buffer = self.empty(array.nbytes)
        raw = bytes_of(array)
        np.frombuffer(buffer.contents().as_buffer(raw.nbytes), np.uint8)[:] = raw
        return buffer

    def empty(self, nbytes: int) -> Buffer:
        """A buffer of that many bytes."""
        shared = self._metal.MTLResourceStorageModeShared
        buffer = self._device.newBufferWithLength_options_(max(nbytes, 4), shared)
        if buffer is None:
            raise TargetError(
                f"Metal gave no buffer of {nbytes} bytes; close what uses the GPU's memory"
            )
        return buffer

    def write(self, buffer: Buffer, offset: int, array: Array) -> None:
        """Put bytes into a buffer that no kernel reads any more."""
        self._wait()
        raw = bytes_of(array)
        np.frombuffer(buffer.contents().as_buffer(buffer.length()), np.uint8)[
            offset : offset + raw.size
        ] = raw

    def download(self, buffer: Buffer, out: Array) -> None:
        """Wait, and fill an array."""
        self._wait()
        found = np.frombuffer(buffer.contents().as_buffer(out.nbytes), np.uint8)
        out.reshape(-1).view(np.uint8)[:] = found

    def _wait(self) -> None:
        """Until all that was launched has ended."""
        with self._lock:
            last = self._last
        if last is not None:
            last.waitUntilCompleted()
            if last.error() is not None:
                raise TargetError(f"a kernel failed: {last.error().localizedDescription()}")

    def program(self, kernel: Kernel) -> Any:
        """The kernel's pipeline."""
        options = self._metal.MTLCompileOptions.alloc().init()
        options.setFastMathEnabled_(False)  # for compilers that do not know the pragma
        make = self._device.newLibraryWithSource_options_error_
        library, error = make(kernel.source, options, None)
        if library is not None:
            function = library.newFunctionWithName_(kernel.entry)
            pipeline, error = self._device.newComputePipelineStateWithFunction_error_(
                function, None
            )
            if pipeline is not None:
                return pipeline
        said = "" if error is None else str(error.localizedDescription())
        raise rejected("Metal", kernel, *_complaint(said))

    def launch(
        self,
        program: Any,
        groups: tuple[int, int],
        threads: int,
        buffers: Sequence[Buffer],
        sizes: Sequence[int],
    ) -> None:
        """Start a grid: the buffers are bound in order, the sizes behind them."""
        size = self._metal.MTLSizeMake
        with self._pool(), self._lock:
            command = self._queue.commandBuffer()
            encoder = command.computeCommandEncoder()
            encoder.setComputePipelineState_(program)
            for number, buffer in enumerate(buffers):
                encoder.setBuffer_offset_atIndex_(buffer, 0, number)
            for number, value in enumerate(sizes, len(buffers)):
                encoder.setBytes_length_atIndex_(int(value).to_bytes(4, "little"), 4, number)
            encoder.dispatchThreadgroups_threadsPerThreadgroup_(
                size(groups[0], groups[1], 1), size(threads, 1, 1)
            )
            encoder.endEncoding()
            command.commit()
            self._last = command

    def describe(self) -> dict[str, Any]:
        """The device."""
        return {
            "device": str(self._device.name()),
            "driver": "pyobjc",
            "max_threads": int(self._device.maxThreadsPerThreadgroup().width),
            "shared_bytes": int(self._device.maxThreadgroupMemoryLength()),
            "largest_buffer": int(self._device.maxBufferLength()),
        }

    @staticmethod
    def missing() -> str | None:
        """Why pyobjc does not do, or None."""
        try:
            import Metal
        except ImportError as error:
            return f"pyobjc's Metal cannot be imported ({error})"
        return None if Metal.MTLCreateSystemDefaultDevice() else "Metal finds no device"


def _complaint(log: str) -> tuple[str, int | None]:
    """The first error in what the compiler says, and its line."""
    found = re.search(r"program_source:(\d+):\d+: (?:fatal )?error: (.*)", log)
    return (found[2], int(found[1])) if found else (log, None)


def _is_mac() -> bool:
    return platform.system() == "Darwin" and platform.machine() == "arm64"


def find_driver() -> type[TorchDriver] | type[MetalDriver] | str:
    """What reaches the GPU here, or a sentence that says why nothing does."""
    if not _is_mac():
        return (
            f"Metal kernels need a Mac with Apple silicon, and this is {platform.system()} on"
            f" {platform.machine()}; there, pip install kernelgen[metal]"
        )
    reasons = []
    for driver in (TorchDriver, MetalDriver):
        reason = driver.missing()
        if reason is None:
            return driver
        reasons.append(reason)
    return f"{', and '.join(reasons)}; pip install kernelgen[metal]"


class MetalRuntime(DeviceRuntime):
    """The GPU of a Mac."""

    name = "metal"

    def available(self) -> str | None:
        """Why kernels cannot run here, or None."""
        found = find_driver()
        return found if isinstance(found, str) else None

    def expected(self) -> str | None:
        """Whether this is such a Mac."""
        return "this is a Mac with Apple silicon" if _is_mac() else None

    @functools.cached_property
    def _opened(self) -> TorchDriver | MetalDriver:
        found = find_driver()
        if isinstance(found, str):
            raise TargetError(found)
        return found()

    def driver(self) -> Driver:
        """The device; opened on first use."""
        return self._opened

    def capabilities(self) -> Capabilities:
        """What all of Apple's own GPUs have; numbers of type bfloat came with macOS 14."""
        if int(platform.mac_ver()[0].partition(".")[0] or 0) >= 14:
            return CAPABILITIES
        return dataclasses.replace(CAPABILITIES, features=CAPABILITIES.features - {"bf16"})

    def describe(self) -> list[dict[str, Any]]:
        """The Mac's GPU."""
        return [] if self.available() else [self._opened.describe()]


@functools.cache
def runtime(variant: str = "") -> DeviceRuntime:
    """The runtime of the Mac's GPU, or of the emulator (variant "emulated")."""
    if variant == EMULATED:
        return EmulatedRuntime("metal", "metal", CAPABILITIES)
    return MetalRuntime()

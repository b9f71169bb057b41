"""OpenCL devices through pyopencl."""

from __future__ import annotations

import functools
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np

from kernelgen.config import Capabilities
from kernelgen.errors import CompileError, TargetError
from kernelgen.targets.base import Array, Kernel
from kernelgen.targets.device import Buffer, DeviceRuntime


class OpenCLDriver:
    """One OpenCL device (see kernelgen.targets.device.Driver)."""

    def __init__(self, device: Any) -> None:
        import pyopencl as cl

        self._cl = cl
        self._device = device
        self._context = cl.Context([device])
        self._queue = cl.CommandQueue(self._context)
        # kernels address bytes with 32 bits
        self.largest = min(int(device.max_mem_alloc_size), 2**32 - 4)

    def key(self) -> Hashable:
        """The device itself."""
        return (self._device.platform.name, self._device.name, self._device.int_ptr)

    def upload(self, array: Array) -> Buffer:
        """A buffer with the bytes of an array."""
        flags = self._cl.mem_flags
        return self._cl.Buffer(
            self._context, flags.READ_ONLY | flags.COPY_HOST_PTR, hostbuf=np.ascontiguousarray(array)
        )

    def empty(self, nbytes: int) -> Buffer:
        """A buffer of that many bytes."""
        return self._cl.Buffer(self._context, self._cl.mem_flags.READ_WRITE, max(nbytes, 4))

    def download(self, buffer: Buffer, out: Array) -> None:
        """Wait, and fill an array."""
        self._cl.enqueue_copy(self._queue, out, buffer, is_blocking=True)

    def program(self, kernel: Kernel) -> Any:
        """The kernel, compiled by the device's driver, which keeps its own cache."""
        options = ["-cl-std=CL1.2"]
        try:
            built = self._cl.Program(self._context, kernel.source).build(options)
        except self._cl.Error as error:
            raise CompileError(
                f"{self._device.name} rejected {kernel.op} {kernel.format.name}:"
                f" {_with_source(str(error), kernel.source)}"
            ) from error
        return built

    def launch(
        self,
        program: Any,
        groups: tuple[int, int],
        threads: int,
        buffers: Sequence[Buffer],
        sizes: Sequence[int],
    ) -> None:
        """Start a grid.  A kernel object keeps its arguments, so that each launch takes its own."""
        kernel = program.all_kernels()[0]
        kernel.set_args(*buffers, *(np.uint32(s) for s in sizes))
        self._cl.enqueue_nd_range_kernel(
            self._queue, kernel, (groups[0] * threads, groups[1]), (threads, 1)
        )


def _with_source(message: str, source: str) -> str:
    """The driver's message, with the line of source behind the first line number in it."""
    import re

    lines = source.splitlines()
    found = re.search(r":(\d+):\d+: error", message)
    if found and 0 < int(found[1]) <= len(lines):
        return f"{message.strip()} at line {found[1]}: {lines[int(found[1]) - 1].strip()}"
    return message.strip()


class OpenCLRuntime(DeviceRuntime):
    """An OpenCL device: a GPU where there is one, else the first of any kind."""

    name = "opencl"

    def available(self) -> str | None:
        """Why kernels cannot run here, or None."""
        found = find_device()
        return found if isinstance(found, str) else None

    def driver(self) -> OpenCLDriver:
        """The device; opened on first use."""
        return _driver()

    def capabilities(self) -> Capabilities:
        """Limits of the device."""
        found = find_device()
        if isinstance(found, str):
            raise TargetError(found)
        return Capabilities(
            max_threads=int(found.max_work_group_size), shared_bytes=int(found.local_mem_size)
        )

    def describe(self) -> list[dict[str, Any]]:
        """Every OpenCL device of the machine."""
        return [
            {
                "device": d.name.strip(),
                "platform": f"{d.platform.name} {d.platform.version}",
                "version": d.version.strip(),
                "compute_units": d.max_compute_units,
                "max_threads": d.max_work_group_size,
                "shared_bytes": d.local_mem_size,
                "largest_buffer": d.max_mem_alloc_size,
                "fp16": "cl_khr_fp16" in d.extensions,
                "subgroups": "cl_khr_subgroups" in d.extensions,
                "dot": "cl_khr_integer_dot_product" in d.extensions,
            }
            for d in _devices()
        ]


def _devices() -> list[Any]:
    import pyopencl as cl

    try:
        platforms = cl.get_platforms()
    except cl.Error:  # no driver at all is an error to OpenCL's loader
        return []
    result = []
    for platform in platforms:
        try:
            result += platform.get_devices()
        except cl.Error:
            continue
    return result


@functools.cache
def find_device() -> Any:
    """The device to run on, or a sentence that says why there is none."""
    try:
        import pyopencl as cl
    except ImportError as error:
        return f"pyopencl cannot be imported ({error}); pip install kernelgen[opencl]"
    found = _devices()
    if not found:
        return "no OpenCL driver was found; install the GPU's, or pip install pyopencl[pocl]"
    gpus = [d for d in found if d.type & cl.device_type.GPU]
    return (gpus or found)[0]


@functools.cache
def _driver() -> OpenCLDriver:
    found = find_device()
    if isinstance(found, str):
        raise TargetError(found)
    return OpenCLDriver(found)


@functools.cache
def runtime(variant: str = "") -> OpenCLRuntime:
    """The runtime of the machine's OpenCL device."""
    return OpenCLRuntime()

"""OpenCL devices through pyopencl."""

from __future__ import annotations

import functools
import re
import threading
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np

from kernelgen.config import Capabilities
from kernelgen.errors import TargetError
from kernelgen.targets.base import EMULATED, Array, Kernel
from kernelgen.targets.device import DeviceRuntime
from kernelgen.targets.driver import Buffer, rejected
from kernelgen.targets.emulated import EmulatedRuntime


class _Program:
    """A compiled kernel.  Its object keeps arguments between two calls, so each thread has one."""

    def __init__(self, built: Any) -> None:
        self._built = built
        self._local = threading.local()

    def kernel(self) -> Any:
        """This thread's object."""
        found = getattr(self._local, "kernel", None)
        if found is None:
            found = self._local.kernel = self._built.all_kernels()[0]
        return found


class OpenCLDriver:
    """One OpenCL device (see kernelgen.targets.driver.Driver)."""

    def __init__(self, device: Any) -> None:
        import pyopencl as cl

        self._cl = cl
        self._device = device
        self._context = cl.Context([device])
        self._queue = cl.CommandQueue(self._context)
        self._profiling: Any = None
        self._events: list[Any] | None = None
        # kernels address bytes with 32 bits
        self.largest = min(int(device.max_mem_alloc_size), 2**32 - 4)

    def key(self) -> Hashable:
        """The device itself."""
        return (self._device.platform.name, self._device.name, self._device.int_ptr)

    def upload(self, array: Array) -> Buffer:
        """A buffer with the bytes of an array."""
        flags = self._cl.mem_flags
        return self._cl.Buffer(
            self._context,
            flags.READ_ONLY | flags.COPY_HOST_PTR,
            hostbuf=np.ascontiguousarray(array),
        )

    def empty(self, nbytes: int) -> Buffer:
        """A buffer of that many bytes."""
        return self._cl.Buffer(self._context, self._cl.mem_flags.READ_WRITE, max(nbytes, 4))

    def write(self, buffer: Buffer, offset: int, array: Array) -> None:
        """Put bytes into a buffer."""
        raw = np.ascontiguousarray(array)
        self._cl.enqueue_copy(self._queue, buffer, raw, dst_offset=offset, is_blocking=True)

    def download(self, buffer: Buffer, out: Array) -> None:
        """Wait, and fill an array."""
        self._cl.enqueue_copy(self._queue, out, buffer, is_blocking=True)

    def program(self, kernel: Kernel) -> Any:
        """The kernel, compiled by the device's driver, which keeps its own cache."""
        try:
            built = self._cl.Program(self._context, kernel.source).build([self._standard(kernel)])
        except self._cl.Error as error:
            message, line = _complaint(str(error))
            raise rejected(self._device.name.strip(), kernel, message, line) from error
        return _Program(built)

    def _standard(self, kernel: Kernel) -> str:
        """The oldest version of the language that has what the kernel needs."""
        if set(kernel.features) <= {"fp16"}:  # kept as bits: see words.cl
            return "-cl-std=CL1.2"
        newest = re.match(r"OpenCL (\d+)", self._device.version)
        return "-cl-std=CL3.0" if newest and int(newest[1]) >= 3 else "-cl-std=CL2.0"

    def launch(
        self,
        program: Any,
        groups: tuple[int, int],
        threads: int,
        buffers: Sequence[Buffer],
        sizes: Sequence[int],
    ) -> None:
        """Start a grid."""
        kernel = program.kernel()
        kernel.set_args(*buffers, *(np.uint32(s) for s in sizes))
        event = self._cl.enqueue_nd_range_kernel(
            self._queue, kernel, (groups[0] * threads, groups[1]), (threads, 1)
        )
        if self._events is not None:
            self._events.append(event)

    def timed(self, call: Callable[[], None]) -> float:
        """Seconds of the launches in a call, by their events; for one thread at a time."""
        if self._profiling is None:
            wanted = self._cl.command_queue_properties.PROFILING_ENABLE
            self._profiling = self._cl.CommandQueue(self._context, properties=wanted)
        plain = self._queue
        events: list[Any] = []
        self._queue, self._events = self._profiling, events
        try:
            call()
            self._profiling.finish()
        finally:
            self._queue, self._events = plain, None
        return float(sum(one.profile.end - one.profile.start for one in events)) * 1e-9


def _complaint(log: str) -> tuple[str, int | None]:
    """The first error in a driver's log, without the names of temporary files, and its line."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    found = [
        (line, at)
        for line in lines
        if "warning" not in line.lower() and (at := re.search(r":(\d+):\d+", line))
    ]
    # a line that says "error" is one, but not every compiler says so
    for line, at in sorted(found, key=lambda pair: "error" not in pair[0].lower()):
        return re.sub(r"^[: ]*(<Spelling=[^>]*>: )?", "", line[at.end() :]), int(at[1])
    return " ".join(lines), None


class OpenCLRuntime(DeviceRuntime):
    """An OpenCL device: a GPU where there is one, else the first of any kind."""

    name = "opencl"

    def available(self) -> str | None:
        """Why kernels cannot run here, or None."""
        found = find_device()
        return found if isinstance(found, str) else None

    def on_cpu(self) -> bool:
        """Whether the device is the CPU, as PoCL's is."""
        found = find_device()
        return not isinstance(found, str) and _kind(found) == "CPU"

    def driver(self) -> OpenCLDriver:
        """The device; opened on first use."""
        return _driver()

    def capabilities(self) -> Capabilities:
        """Limits of the device."""
        found = find_device()
        if isinstance(found, str):
            raise TargetError(found)
        return Capabilities(
            max_threads=int(found.max_work_group_size),
            shared_bytes=int(found.local_mem_size),
            # every device keeps half precision in memory
            features=frozenset({"fp16"} | {f for f, on in _features(found).items() if on}),
        )

    def describe(self) -> list[dict[str, Any]]:
        """Every OpenCL device of the machine, the one that kernels run on first."""
        return [
            {
                "device": d.name.strip(),
                "kind": _kind(d),
                "platform": f"{d.platform.name} {d.platform.version}",
                "version": d.version.strip(),
                "driver": d.driver_version.strip(),
                "compute_units": d.max_compute_units,
                "memory": d.global_mem_size,
                "max_threads": d.max_work_group_size,
                "shared_bytes": d.local_mem_size,
                "largest_buffer": d.max_mem_alloc_size,
                "fp16_arithmetic": "cl_khr_fp16" in d.extensions,
                "fp64": "cl_khr_fp64" in d.extensions,
                **_features(d),
                "threads_multiple": _threads_multiple(d),
            }
            for d in sorted(_devices(), key=lambda one: one != find_device())
        ]


def _kind(device: Any) -> str:
    import pyopencl as cl

    kinds = {"CPU": cl.device_type.CPU, "GPU": cl.device_type.GPU}
    return next((name for name, bit in kinds.items() if device.type & bit), "accelerator")


def _features(device: Any) -> dict[str, bool]:
    """Which features of `Capabilities` are extensions that a device has."""
    known = device.extensions.split()
    names = {"subgroups": "cl_khr_subgroups", "dot": "cl_khr_integer_dot_product"}
    return {feature: name in known for feature, name in names.items()}


def _threads_multiple(device: Any) -> int | None:
    """What the threads of a group are best a multiple of: a subgroup, where there are any."""
    import pyopencl as cl

    try:
        source = "__kernel void nothing(__global int *x) { x[get_global_id(0)] = 0; }"
        built = cl.Program(cl.Context([device]), source).build()
        wanted = cl.kernel_work_group_info.PREFERRED_WORK_GROUP_SIZE_MULTIPLE
        return int(built.nothing.get_work_group_info(wanted, device))
    except cl.Error:  # a device that compiles nothing is listed all the same
        return None


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
def runtime(variant: str = "") -> DeviceRuntime:
    """The runtime of the machine's OpenCL device, or of the emulator (variant "emulated")."""
    return emulated() if variant == EMULATED else OpenCLRuntime()


@functools.cache
def emulated(subgroup: int = 32) -> EmulatedRuntime:
    """The emulator as a device that has every extension, and subgroups of that many threads."""
    features = frozenset({"fp16", "subgroups", "dot"})
    caps = Capabilities(max_threads=256, shared_bytes=32768, features=features)
    return EmulatedRuntime("opencl", "opencl", caps, subgroup)

"""WebGPU devices through wgpu."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import re
import sys
from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import numpy as np

from kernelgen.config import Capabilities
from kernelgen.errors import TargetError
from kernelgen.targets.base import Array, Kernel
from kernelgen.targets.device import DeviceRuntime
from kernelgen.targets.driver import Buffer, bytes_of, own_symbols, rejected

#: features that kernels use where an adapter has them
WANTED_FEATURES = ("shader-f16", "subgroup")

#: bytes up to which wgpu's own way to read a buffer is the faster one, though it copies twice:
#: 0.17 against 0.28 ms for 16 kB, 53 against 20 ms for 64 MB (llvmpipe, wgpu 0.32)
_SMALL = 1 << 20

#: limits that are raised to what the adapter allows
WANTED_LIMITS = (
    "max-storage-buffer-binding-size", "max-buffer-size", "max-compute-workgroup-storage-size",
    "max-compute-invocations-per-workgroup", "max-compute-workgroup-size-x",
)  # fmt: skip


class WgpuDriver:
    """One WebGPU device (see kernelgen.targets.driver.Driver)."""

    def __init__(self, adapter: Any) -> None:
        import wgpu

        self._wgpu = wgpu
        features = [f for f in WANTED_FEATURES if f in adapter.features]
        limits = {name: adapter.limits[name] for name in WANTED_LIMITS if name in adapter.limits}
        self.device = adapter.request_device_sync(
            required_features=features, required_limits=limits
        )
        self.largest = min(
            int(self.device.limits["max-storage-buffer-binding-size"]),
            int(self.device.limits["max-buffer-size"]),
        ) // 4 * 4  # fmt: skip
        self._name = (adapter.info.get("device"), adapter.info.get("vendor"))

    def key(self) -> Hashable:
        """The device itself."""
        return (self._name, id(self.device))

    def upload(self, array: Array) -> Buffer:
        """A buffer with the bytes of an array, filled up to whole words."""
        raw = bytes_of(array)
        buffer = self.empty(raw.nbytes)
        whole = raw.nbytes // 4 * 4
        if whole:
            self.device.queue.write_buffer(buffer, 0, raw[:whole])
        if whole < raw.nbytes:
            tail = np.zeros(4, np.uint8)
            tail[: raw.nbytes - whole] = raw[whole:]
            self.device.queue.write_buffer(buffer, whole, tail)
        return buffer

    def empty(self, nbytes: int) -> Buffer:
        """A buffer of that many bytes, filled up to whole words."""
        usage = self._wgpu.BufferUsage
        return self.device.create_buffer(
            size=max(-(-nbytes // 4) * 4, 4),
            usage=usage.STORAGE | usage.COPY_SRC | usage.COPY_DST,
        )

    def write(self, buffer: Buffer, offset: int, array: Array) -> None:
        """Put bytes into a buffer."""
        raw = bytes_of(array)
        filled = np.zeros(-(-raw.size // 4) * 4, np.uint8)
        filled[: raw.size] = raw
        self.device.queue.write_buffer(buffer, offset, filled)

    def download(self, buffer: Buffer, out: Array) -> None:
        """Wait, and fill an array."""
        if buffer.size <= _SMALL:
            self._fill(out, self.device.queue.read_buffer(buffer))
            return
        usage = self._wgpu.BufferUsage
        copy = self.device.create_buffer(size=buffer.size, usage=usage.COPY_DST | usage.MAP_READ)
        encoder = self.device.create_command_encoder()
        encoder.copy_buffer_to_buffer(buffer, 0, copy, 0, buffer.size)
        self.device.queue.submit([encoder.finish()])
        copy.map_sync(self._wgpu.MapMode.READ)
        self._fill(out, copy.read_mapped(copy=False))
        copy.unmap()
        copy.destroy()

    def _fill(self, out: Array, data: Any) -> None:
        out.reshape(-1).view(np.uint8)[:] = np.frombuffer(data, np.uint8, count=out.nbytes)

    def program(self, kernel: Kernel) -> Any:
        """The kernel's pipeline and the layout of its bindings.

        The layout is written out: an automatic one leaves out what a kernel does not read.
        """
        kinds = [
            "read-only-storage" if a.role in ("in", "table") else "storage"
            for a in kernel.arguments
            if a.role != "size"
        ]
        layout = self.device.create_bind_group_layout(
            entries=[
                {"binding": n, "visibility": self._wgpu.ShaderStage.COMPUTE, "buffer": {"type": t}}
                for n, t in enumerate([*kinds, "uniform"])
            ]
        )
        try:
            pipeline = self.device.create_compute_pipeline(
                layout=self.device.create_pipeline_layout(bind_group_layouts=[layout]),
                compute={
                    "module": self.device.create_shader_module(code=_accepted(kernel.source)),
                    "entry_point": kernel.entry,
                },
            )
        except self._wgpu.GPUError as error:
            message, line = _complaint(str(error))
            raise rejected("wgpu", kernel, message, line) from error
        return pipeline, layout

    def launch(
        self,
        program: Any,
        groups: tuple[int, int],
        threads: int,
        buffers: Sequence[Buffer],
        sizes: Sequence[int],
    ) -> None:
        """Start a grid: the buffers are bound in order, the sizes behind them."""
        usage = self._wgpu.BufferUsage
        uniform = self.device.create_buffer_with_data(
            data=np.array(sizes, np.uint32), usage=usage.UNIFORM
        )
        entries = [
            {"binding": n, "resource": {"buffer": b, "offset": 0, "size": b.size}}
            for n, b in enumerate([*buffers, uniform])
        ]
        pipeline, layout = program
        group = self.device.create_bind_group(layout=layout, entries=entries)
        encoder = self.device.create_command_encoder()
        compute = encoder.begin_compute_pass()
        compute.set_pipeline(pipeline)
        compute.set_bind_group(0, group)
        compute.dispatch_workgroups(*groups, 1)
        compute.end()
        self.device.queue.submit([encoder.finish()])


def _accepted(source: str) -> str:
    """The text as naga, which is behind wgpu, takes it: browsers require a line that it refuses.
    The number of lines stays."""
    return source.replace("enable subgroups;\n", "\n")


def _complaint(text: str) -> tuple[str, int | None]:
    """What naga says, without its picture of the source, and the line that it says it about."""
    line = re.search(r"wgsl:(\d+):\d+", text)
    said = [s.strip() for s in text.splitlines() if not re.match(r"\s*\d*\s*[│┌└=]", s)]
    text = " ".join(s for s in said if s)
    return re.sub(r".*Shader '\w*' (parsing error: )?", "", text), int(line[1]) if line else None


class WgpuRuntime(DeviceRuntime):
    """The machine's WebGPU adapter."""

    name = "wgsl"

    def available(self) -> str | None:
        """Why kernels cannot run here, or None."""
        found = find_adapter()
        return found if isinstance(found, str) else None

    def on_cpu(self) -> bool:
        """Whether the adapter is software on the CPU."""
        found = find_adapter()
        return not isinstance(found, str) and found.info.get("adapter_type") == "CPU"

    def driver(self) -> WgpuDriver:
        """The device; opened on first use."""
        return _driver()

    def capabilities(self) -> Capabilities:
        """Limits of the adapter."""
        found = _adapter()
        features = {"subgroup": "subgroups", "shader-f16": "fp16"}
        known = {ours for theirs, ours in features.items() if theirs in found.features}
        return Capabilities(
            max_threads=int(found.limits["max-compute-invocations-per-workgroup"]),
            shared_bytes=int(found.limits["max-compute-workgroup-storage-size"]),
            features=frozenset({"dot"} | known),  # naga writes the product out where it must
        )

    def describe(self) -> list[dict[str, Any]]:
        """Every adapter of the machine, the one that kernels run on first."""
        found = find_adapter()
        if isinstance(found, str):
            return []
        import wgpu

        with _without_display():
            every = wgpu.gpu.enumerate_adapters_sync()
        return [_describe(a) for a in sorted(every, key=lambda one: one.info != found.info)]


def _describe(adapter: Any) -> dict[str, Any]:
    limits, info = adapter.limits, adapter.info
    size = _subgroup_size(adapter)
    return {
        "device": info.get("device"),
        "kind": info.get("adapter_type"),
        "backend": info.get("backend_type"),
        "driver": info.get("description"),
        "max_threads": limits.get("max-compute-invocations-per-workgroup"),
        "shared_bytes": limits.get("max-compute-workgroup-storage-size"),
        "largest_buffer": limits.get("max-buffer-size"),
        "largest_binding": limits.get("max-storage-buffer-binding-size"),
        "fp16": "shader-f16" in adapter.features,
        "fp64": "shader-f64" in adapter.features,
        # naga writes the product out where the device has no instruction, and does not tell
        "dot": True,
        "subgroups": "subgroup" in adapter.features,
        **({} if size is None else {"subgroup_size": size}),
    }


_SUBGROUP_SIZE = """
@group(0) @binding(0) var<storage, read_write> found: array<u32>;
@compute @workgroup_size(128) fn main(@builtin(subgroup_size) size: u32) { found[0] = size; }
"""


def _subgroup_size(adapter: Any) -> int | None:
    """Threads of a subgroup, seen by a kernel: what wgpu says of it are WebGPU's own limits."""
    import wgpu

    if "subgroup" not in adapter.features:
        return None
    try:
        device = adapter.request_device_sync(required_features=["subgroup"])
        usage = wgpu.BufferUsage.STORAGE | wgpu.BufferUsage.COPY_SRC
        found = device.create_buffer(size=4, usage=usage)
        pipeline = device.create_compute_pipeline(
            layout="auto", compute={"module": device.create_shader_module(code=_SUBGROUP_SIZE)}
        )
        group = device.create_bind_group(
            layout=pipeline.get_bind_group_layout(0),
            entries=[{"binding": 0, "resource": {"buffer": found}}],
        )
        encoder = device.create_command_encoder()
        compute = encoder.begin_compute_pass()
        compute.set_pipeline(pipeline)
        compute.set_bind_group(0, group)
        compute.dispatch_workgroups(1)
        compute.end()
        device.queue.submit([encoder.finish()])
        return int.from_bytes(device.queue.read_buffer(found), "little")
    except (wgpu.GPUError, RuntimeError):  # a device that runs nothing is listed all the same
        return None


@contextlib.contextmanager
def _without_display() -> Iterator[None]:
    """While drivers look for devices: where no display server can be reached, say so to them, or
    Mesa asks for one, and Wayland's library complains on stderr.  Nothing here draws."""
    name = "XDG_RUNTIME_DIR"
    if os.environ.get(name):
        yield
        return
    os.environ[name] = os.devnull  # any absolute path under which there is no socket
    try:
        yield
    finally:
        os.environ.pop(name, None)


def _let_torch_be_first() -> None:
    """Where torch is loaded, torch.compile will load Triton; after a software Vulkan driver, whose
    LLVM it would then call, that crashes the process.  So it is loaded now, with its own."""
    torch = sys.modules.get("torch")
    if torch is None or "triton" in sys.modules or importlib.util.find_spec("triton") is None:
        return
    if not torch.cuda.is_available():  # what Triton's own runtime would set, and for good
        os.environ.setdefault("TRITON_INTERPRET", "1")
    with own_symbols(), contextlib.suppress(ImportError):
        import triton  # noqa: F401


@functools.cache
def find_adapter() -> Any:
    """The adapter to run on, or a sentence that says why there is none."""
    try:
        import wgpu
    except (ImportError, OSError) as error:
        return f"wgpu cannot be imported ({error}); pip install kernelgen[wgsl]"
    _let_torch_be_first()
    try:
        with _without_display():
            return wgpu.gpu.request_adapter_sync(power_preference="high-performance")
    except Exception as error:  # wgpu raises plain RuntimeError, and panics as others
        said = (str(error).splitlines() or ["no reason given"])[0]
        return (
            f"no WebGPU adapter was found ({said});"
            " install the GPU's Vulkan driver, or a software one (Debian: mesa-vulkan-drivers)"
        )


def _adapter() -> Any:
    found = find_adapter()
    if isinstance(found, str):
        raise TargetError(found)
    return found


@functools.cache
def _driver() -> WgpuDriver:
    return WgpuDriver(_adapter())


@functools.cache
def runtime(variant: str = "") -> WgpuRuntime:
    """The runtime of the machine's adapter."""
    return WgpuRuntime()

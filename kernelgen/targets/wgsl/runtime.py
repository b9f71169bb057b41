"""WebGPU devices through wgpu."""

from __future__ import annotations

import functools
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np

from kernelgen.config import Capabilities
from kernelgen.errors import CompileError, TargetError
from kernelgen.targets.base import Array, Kernel
from kernelgen.targets.device import Buffer, DeviceRuntime

#: features that kernels use where an adapter has them
WANTED_FEATURES = ("shader-f16", "subgroup")

#: limits that are raised to what the adapter allows
WANTED_LIMITS = (
    "max-storage-buffer-binding-size", "max-buffer-size", "max-compute-workgroup-storage-size",
    "max-compute-invocations-per-workgroup", "max-compute-workgroup-size-x",
)  # fmt: skip


class WgpuDriver:
    """One WebGPU device (see kernelgen.targets.device.Driver)."""

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
        raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
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

    def download(self, buffer: Buffer, out: Array) -> None:
        """Wait, and fill an array."""
        data = self.device.queue.read_buffer(buffer)
        raw = np.frombuffer(data, np.uint8, count=out.nbytes)
        out.reshape(-1).view(np.uint8)[:] = raw

    def program(self, kernel: Kernel) -> Any:
        """The kernel's pipeline and the layout of its bindings.

        The layout is written out: an automatic one leaves out what a kernel does not read.
        """
        kinds = [
            "read-only-storage" if a.role == "in" else "storage"
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
                    "module": self.device.create_shader_module(code=kernel.source),
                    "entry_point": kernel.entry,
                },
            )
        except self._wgpu.GPUError as error:
            raise CompileError(
                f"wgpu rejected {kernel.op} {kernel.format.name}: {error}"
            ) from error
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


class WgpuRuntime(DeviceRuntime):
    """The machine's WebGPU adapter."""

    name = "wgsl"

    def available(self) -> str | None:
        """Why kernels cannot run here, or None."""
        found = find_adapter()
        return found if isinstance(found, str) else None

    def driver(self) -> WgpuDriver:
        """The device; opened on first use."""
        return _driver()

    def capabilities(self) -> Capabilities:
        """Limits of the adapter."""
        found = _adapter()
        features = {"subgroup": "subgroups", "shader-f16": "fp16"}
        return Capabilities(
            max_threads=int(found.limits["max-compute-invocations-per-workgroup"]),
            shared_bytes=int(found.limits["max-compute-workgroup-storage-size"]),
            features=frozenset(v for k, v in features.items() if k in found.features),
        )

    def describe(self) -> list[dict[str, Any]]:
        """Every adapter of the machine."""
        found = find_adapter()
        if isinstance(found, str):
            return []
        import wgpu

        return [_describe(a) for a in wgpu.gpu.enumerate_adapters_sync()]


def _describe(adapter: Any) -> dict[str, Any]:
    limits, info = adapter.limits, adapter.info
    return {
        "device": info.get("device"),
        "backend": info.get("backend_type"),
        "kind": info.get("adapter_type"),
        "driver": info.get("description"),
        "max_threads": limits.get("max-compute-invocations-per-workgroup"),
        "shared_bytes": limits.get("max-compute-workgroup-storage-size"),
        "largest_buffer": limits.get("max-storage-buffer-binding-size"),
        "fp16": "shader-f16" in adapter.features,
        "subgroups": "subgroup" in adapter.features,
        "subgroup_sizes": [limits.get("min-subgroup-size"), limits.get("max-subgroup-size")],
    }


@functools.cache
def find_adapter() -> Any:
    """The adapter to run on, or a sentence that says why there is none."""
    try:
        import wgpu
    except (ImportError, OSError) as error:
        return f"wgpu cannot be imported ({error}); pip install kernelgen[wgsl]"
    try:
        return wgpu.gpu.request_adapter_sync(power_preference="high-performance")
    except Exception as error:  # wgpu raises plain RuntimeError, and panics as others
        return (
            f"no WebGPU adapter was found ({str(error).splitlines()[0] if str(error) else 'no reason given'});"
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

"""Ops on arrays that another library has on the device: nothing is copied, nobody waits, and all
is launched in that library's order of things (`kernelgen.targets.driver.Resident`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from kernelgen.arrays import empty_like
from kernelgen.errors import TargetError
from kernelgen.ir.ops.attention import Attention
from kernelgen.targets.base import Kernel, Weights
from kernelgen.targets.device import AttentionLaunch, DeviceRuntime
from kernelgen.targets.driver import Buffer, Resident


def _driver(runtime: DeviceRuntime) -> Any:
    driver = runtime.driver()
    if not isinstance(driver, Resident):
        raise TargetError(
            f"target {runtime.name} cannot work on arrays of other libraries; give numpy arrays"
        )
    return driver


def matmul(runtime: DeviceRuntime, kernel: Kernel) -> Callable[[Any, Weights, Any], None]:
    """A function of x, float32 (M, K), w (N, K) and y, float32 (M, N), which it fills; x and y are
    C-contiguous arrays of one library on one device.  It returns when all is launched."""
    driver = _driver(runtime)

    def launch(x: Any, n: int, weights: Buffer, buffers: Mapping[str, Buffer], y: Any) -> None:
        m, k = x.shape
        found = {**buffers, "w": weights, "y": driver.borrow(y)}
        runtime.made(kernel, found, {"M": m, "N": n, "K": k})

    def run(x: Any, w: Weights, y: Any) -> None:
        if 0 in y.shape:
            return
        with driver.at(x):
            pieces = runtime.prepare(kernel, w)
            widest = max(x.shape[1], *(p.stop - p.start for p in pieces))
            for start, stop in runtime.windows(x.shape[0], 4 * widest):
                rows = x[start:stop]
                buffers = runtime.after_needed(kernel, {"x": driver.borrow(rows)}, *rows.shape)
                for piece in pieces:
                    n = piece.stop - piece.start
                    if len(pieces) == 1:
                        launch(rows, n, piece.buffer, buffers, y[start:stop])
                        continue
                    columns = empty_like(y, (stop - start, n))
                    launch(rows, n, piece.buffer, buffers, columns)
                    y[start:stop, piece.start : piece.stop] = columns

    return run


def attention(
    runtime: DeviceRuntime, kernel: Kernel
) -> Callable[[Any, Any, Any, Mapping[str, Any], Any], None]:
    """A function of q, float32 (B, H, T, D), k and v, the operands by name, and y,
    float32 (B, H, T, DV), which it fills; q and y lie on the device, k and v are `Weights` or
    arrays there in the element types of the kernel's formats, operands lie there or on the host.
    It returns when all is launched."""
    driver, launch = _driver(runtime), AttentionLaunch(runtime, kernel)
    kind = launch.kind

    def run(q: Any, k: Any, v: Any, operands: Mapping[str, Any], y: Any) -> None:
        (b, h, t, d), hk = q.shape, k.shape[1]
        keys, s = k.shape[0] * hk * k.shape[2], launch.keys(k.shape[2], operands)
        if 0 in y.shape or s == 0:
            y[...] = 0
            return
        row_bytes = kind.k.row_bytes(d), kind.v.row_bytes(kind.value_dim)
        rows = b * h * t * launch.row_bytes(d)
        if max(rows, *(keys * nbytes for nbytes in row_bytes)) > driver.largest:
            raise TargetError(
                f"q of shape {tuple(q.shape)} with {s} keys was given on the device, where target"
                f" {runtime.name} addresses {driver.largest} bytes of an array; call it for fewer"
                " batches or heads at a time"
            )
        with driver.at(q):
            given, skipped = _read(driver, kind, operands)
            sizes = launch.sizes((b, h, t), hk, s, skipped, operands)
            buffers = {"q": driver.borrow(q), "y": driver.borrow(y)}
            buffers |= {"k": _held(runtime, driver, k), "v": _held(runtime, driver, v)}
            launch({**given, **buffers}, sizes)

    return run


def _read(
    driver: Any, kind: Attention, operands: Mapping[str, Any]
) -> tuple[dict[str, Buffer], dict[str, int]]:
    """Arrays that score and mask read, and how many elements an index skips: those of the host are
    uploaded, those on the device are as `kernelgen.arrays.as_operand` gives them."""
    buffers, skipped = {}, {}
    names = {one.name: one.strides for one in kind.operands}
    for name, x in operands.items():
        on_host = isinstance(x, np.ndarray)
        buffers[name] = driver.upload(np.ascontiguousarray(x)) if on_host else driver.borrow(x)
        step = 1
        for axis, size in reversed(list(zip(names.get(name, ()), x.shape, strict=False))):
            skipped[axis] = step if size > 1 else 0
            step *= int(size)
    return buffers, skipped


def _held(runtime: DeviceRuntime, driver: Any, x: Any) -> Buffer:
    """K or V as a buffer: an array's memory, or a tensor's copy on the device."""
    if hasattr(x, "prepared"):
        return runtime.held(x, slice(0, x.shape[0]), slice(0, x.shape[1]))
    return driver.borrow(x)

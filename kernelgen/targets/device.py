"""Runtimes of targets whose kernels run over a grid of threads in a device's own memory.

A target brings a `Driver`: buffers, programs, launches.  What an op needs of them is here.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from kernelgen.config import Capabilities
from kernelgen.errors import CompileError, TargetError
from kernelgen.ir.layout import Layout, named_layout
from kernelgen.ir.ops import Activations
from kernelgen.targets.base import Array, Kernel, Weights, check_rows

Buffer = Any


class Driver(Protocol):
    """A device and its memory."""

    #: bytes that one buffer may have
    largest: int

    def key(self) -> Hashable:
        """Tells buffers of this device from those of others."""
        ...

    def upload(self, array: Array) -> Buffer:
        """A buffer with the bytes of a C-contiguous array."""
        ...

    def empty(self, nbytes: int) -> Buffer:
        """A buffer of that many bytes, of any content."""
        ...

    def download(self, buffer: Buffer, out: Array) -> None:
        """Wait for what was launched, and fill a C-contiguous array from the buffer."""
        ...

    def program(self, kernel: Kernel) -> Any:
        """The kernel, compiled."""
        ...

    def launch(
        self, program: Any, groups: tuple[int, int], threads: int,
        buffers: Sequence[Buffer], sizes: Sequence[int],
    ) -> None:  # fmt: skip
        """Start a grid; buffers and sizes in the kernel's order."""
        ...


@dataclass(frozen=True)
class Piece:
    """Rows start..stop of a matrix in a buffer of their own: as many as one binding may hold."""

    start: int
    stop: int
    buffer: Buffer


class Launcher:
    """A compiled kernel that takes buffers and sizes by name."""

    def __init__(self, driver: Driver, kernel: Kernel) -> None:
        launch = kernel.walk.launch(kernel.config, kernel.format)
        assert launch is not None
        self._driver = driver
        self._program = driver.program(kernel)
        self._threads = launch.threads
        # two expressions of our own manifest, evaluated at every launch
        self._groups = [compile(text, "<grid>", "eval") for text in launch.groups]
        self._buffers = [a.name for a in kernel.arguments if a.role != "size"]
        self._sizes = [a.name for a in kernel.arguments if a.role == "size"]

    def __call__(self, buffers: Mapping[str, Buffer], sizes: Mapping[str, int]) -> None:
        """Start the kernel; nothing is launched where the grid is empty."""
        x, y = (eval(code, {"min": min}, dict(sizes)) for code in self._groups)
        if x and y:
            self._driver.launch(
                self._program, (x, y), self._threads,
                [buffers[n] for n in self._buffers], [sizes[n] for n in self._sizes],
            )  # fmt: skip


class DeviceRuntime:
    """The ops of `kernelgen.targets.base.Runtime` over a driver.

    Subclasses add `available`, `capabilities` and `describe`, and give the driver on first use.
    """

    name: str

    def __init__(self) -> None:
        self._launchers: dict[Kernel, Launcher] = {}
        self._lock = threading.RLock()

    def how(self) -> str:
        """What results here are worth."""
        return "run"

    def driver(self) -> Driver:
        """The device; opened on first use."""
        raise NotImplementedError

    def capabilities(self) -> Capabilities:
        """What configurations may count on here."""
        raise NotImplementedError

    def launcher(self, kernel: Kernel) -> Launcher:
        """The kernel, compiled once."""
        found = self._launchers.get(kernel)
        if found is None:
            with self._lock:
                found = self._launchers.get(kernel)
                if found is None:
                    found = self._launchers[kernel] = Launcher(self.driver(), kernel)
        return found

    def prepare(self, kernel: Kernel, w: Weights) -> list[Piece]:
        """The weights in device memory, in the layout of the kernel; kept in w.prepared."""
        layout = named_layout(kernel.config.as_dict()["layout"])
        key = (self.name, self.driver().key(), layout)
        found: list[Piece] | None = w.prepared.get(key)
        if found is None:
            with self._lock:
                found = w.prepared.get(key)
                if found is None:
                    found = w.prepared[key] = self._upload(layout, w)
        return found

    def _upload(self, layout: Layout, w: Weights) -> list[Piece]:
        k, driver = w.shape[-1], self.driver()
        row_bytes = w.format.row_bytes(k)
        rows = w.data.reshape(-1, row_bytes)
        pieces = []
        for start, stop in self._windows(len(rows), row_bytes):
            part = rows[start:stop]
            packed = part if layout.name == "native" else layout.pack(part, w.format, k)
            pieces.append(Piece(start, stop, driver.upload(packed)))
        return pieces

    def _windows(self, rows: int, row_bytes: int) -> Iterator[tuple[int, int]]:
        """Ranges of rows of which each fits a buffer."""
        largest = self.driver().largest
        step = largest // row_bytes
        if not step:
            raise TargetError(
                f"a row of {row_bytes} bytes does not fit a buffer of target {self.name}, which"
                f" holds {largest} bytes; use another target"
            )
        for start in range(0, rows, step):
            yield start, min(start + step, rows)

    def dequantize(self, kernel: Kernel, w: Weights) -> Array:
        """Values of w, float32, of its shape."""
        y = np.empty(w.shape, np.float32)
        k, driver = w.shape[-1], self.driver()
        flat = y.reshape(-1, k)
        for piece in self.prepare(kernel, w):
            n = piece.stop - piece.start
            for start, stop in self._windows(n, 4 * k):
                part = flat[piece.start + start : piece.start + stop]
                out = driver.empty(part.nbytes)
                sizes = {"START": start, "ROWS": stop - start, "N": n, "K": k}
                self.launcher(kernel)({"w": piece.buffer, "y": out}, sizes)
                driver.download(out, part)
        return y

    def get_rows(self, kernel: Kernel, w: Weights, ids: Array) -> Array:
        """Values of the rows of w that `ids`, integers (R,), names: float32 (R, K)."""
        n, k = w.shape
        check_rows(ids, n)
        y = np.empty((len(ids), k), np.float32)
        for piece in self.prepare(kernel, w):
            here = np.flatnonzero((piece.start <= ids) & (ids < piece.stop))
            for start, stop in self._windows(len(here), 4 * k):
                y[here[start:stop]] = self._rows(kernel, piece, ids[here[start:stop]], k)
        return y

    def _rows(self, kernel: Kernel, piece: Piece, ids: Array, k: int) -> Array:
        driver = self.driver()
        y = np.empty((len(ids), k), np.float32)
        buffers = {
            "w": piece.buffer, "ids": driver.upload((ids - piece.start).astype(np.uint32)),
            "y": driver.empty(y.nbytes),
        }  # fmt: skip
        sizes = {"ROWS": len(ids), "N": piece.stop - piece.start, "K": k}
        self.launcher(kernel)(buffers, sizes)
        driver.download(buffers["y"], y)
        return y

    def quantize(self, kernel: Kernel, x: Array) -> Activations:
        """Activations x, float32 (M, K), as int8 in the form of the kernel's format."""
        x = np.ascontiguousarray(x, np.float32)
        m, k = x.shape
        fmt, driver = kernel.format, self.driver()
        fmt.row_bytes(k)
        q = np.empty((m, k), np.int8)
        scale = np.empty((m, k // fmt.block), np.float32)
        sums = np.empty((m, k // fmt.group), np.float32)
        for start, stop in self._windows(m, 4 * k):
            buffers = self._quantized(kernel, driver.upload(x[start:stop]), stop - start, k)
            for name, array in (("xq", q), ("xd", scale), ("xs", sums)):
                driver.download(buffers[name], array[start:stop])
        return Activations(q, scale, sums)

    def _quantized(self, kernel: Kernel, x: Buffer, m: int, k: int) -> dict[str, Buffer]:
        empty, fmt = self.driver().empty, kernel.format
        buffers = {
            "x": x, "xq": empty(m * k), "xd": empty(4 * m * k // fmt.block),
            "xs": empty(4 * m * k // fmt.group),
        }  # fmt: skip
        self.launcher(kernel)(buffers, {"M": m, "K": k})
        return buffers

    def matmul(self, kernel: Kernel) -> Callable[[Array, Weights, Array], None]:
        """A function of x, float32 (M, K), w (N, K) and y, float32 (M, N), which it fills."""
        launcher, driver = self.launcher(kernel), self.driver()
        quantize = kernel.needs.get("quantize")

        def launch(x: Array, piece: Piece, buffers: Mapping[str, Buffer]) -> Buffer:
            (m, k), n = x.shape, piece.stop - piece.start
            out = driver.empty(4 * m * n)
            launcher({**buffers, "w": piece.buffer, "y": out}, {"M": m, "N": n, "K": k})
            return out

        def run(x: Array, w: Weights, y: Array) -> None:
            if y.size == 0:
                return
            pieces = self.prepare(kernel, w)
            widest = max(x.shape[1], *(p.stop - p.start for p in pieces))
            for start, stop in self._windows(len(x), 4 * widest):
                rows, part = x[start:stop], y[start:stop]
                buffers = {"x": driver.upload(rows)}
                if quantize is not None:
                    buffers = self._quantized(quantize, buffers["x"], *rows.shape)
                outs = [launch(rows, piece, buffers) for piece in pieces]
                if len(pieces) == 1:
                    driver.download(outs[0], part)
                    continue
                for piece, out in zip(pieces, outs, strict=True):
                    columns = np.empty((len(rows), piece.stop - piece.start), np.float32)
                    driver.download(out, columns)
                    part[:, piece.start : piece.stop] = columns

        return run


def rejected(who: str, kernel: Kernel, message: str, line: int | None) -> CompileError:
    """The error for a driver that does not take a kernel: what it says, and the line of source
    that it says it about."""
    text = " ".join(message.split()) or "the driver does not say why"
    lines = kernel.source.splitlines()
    if line is not None and 0 < line <= len(lines):
        text += f" at line {line}: {lines[line - 1].strip()}"
    return CompileError(
        f"{who} rejected {kernel.op} {kernel.format.name}"
        f" ({', '.join(f'{k}={v}' for k, v in kernel.config.as_dict().items())}): {text}"
    )

"""Runtimes of targets whose kernels run over a grid of threads in a device's own memory.

A target brings a `Driver`: buffers, programs, launches.  What an op needs of them is here.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np

from kernelgen.config import Capabilities
from kernelgen.errors import CompileError, TargetError
from kernelgen.ir.block import BlockFormat
from kernelgen.ir.layout import Layout, named_layout
from kernelgen.ir.ops import Activations
from kernelgen.ir.ops.attention import Attention
from kernelgen.targets.attention import arrays, strides
from kernelgen.targets.base import Argument, Array, Kernel, Weights, check_rows
from kernelgen.targets.maps import Apply, dense, written
from kernelgen.targets.maps import strides as map_strides

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


@runtime_checkable
class Timed(Protocol):
    """What a driver has besides, whose device says how long launches take."""

    def timed(self, call: Callable[[], None]) -> float:
        """Seconds that the device spends on what `call` launches."""
        ...


@dataclass(frozen=True)
class Piece:
    """Rows start..stop of a matrix in a buffer of their own: as many as one binding may hold."""

    start: int
    stop: int
    buffer: Buffer


_ITEM_TYPES = {"f32": np.float32, "i32": np.int32}
_ITEM_BYTES = {
    "u8": 1, "i8": 1, "u16": 2, "i16": 2, "f16": 2, "bf16": 2, "u32": 4, "i32": 4, "f32": 4,
}  # fmt: skip


class Launcher:
    """A compiled kernel that takes buffers and sizes by name."""

    def __init__(self, driver: Driver, kernel: Kernel) -> None:
        launch = kernel.walk.launch(kernel.config, kernel.subject)
        assert launch is not None
        self._driver = driver
        self._program = driver.program(kernel)
        self._threads = launch.threads
        # expressions of our own manifest, evaluated at every launch
        self._groups = [compile(text, "<grid>", "eval") for text in launch.groups]
        self._buffers = [a for a in kernel.arguments if a.role != "size"]
        self._sizes = [a.name for a in kernel.arguments if a.role == "size"]
        self._known: dict[str, int] = {}
        if isinstance(kernel.subject, BlockFormat):
            fmt = kernel.subject
            self._known = {"block": fmt.block, "group": fmt.group, "block_bytes": fmt.nbytes}
        symbols = {**kernel.walk.symbols, **launch.symbols}
        self._shapes = {
            a.name: [compile(symbols.get(s, s), "<shape>", "eval") for s in a.shape]
            for a in self._buffers
        }

    def __call__(self, buffers: Mapping[str, Buffer], sizes: Mapping[str, int]) -> None:
        """Start the kernel; nothing is launched where the grid is empty."""
        self.bound(buffers, sizes)()

    def bound(self, buffers: Mapping[str, Buffer], sizes: Mapping[str, int]) -> Callable[[], None]:
        """A launch with all that it needs looked up and allocated before, to be made many times."""
        x, y = (eval(code, {"min": min}, dict(sizes)) for code in self._groups)
        if not x or not y:
            return lambda: None
        given = [self._buffer(one, buffers, sizes) for one in self._buffers]
        numbers = [sizes[n] for n in self._sizes]
        return lambda: self._driver.launch(self._program, (x, y), self._threads, given, numbers)

    def _buffer(
        self, one: Argument, buffers: Mapping[str, Buffer], sizes: Mapping[str, int]
    ) -> Buffer:
        """What was given, or memory that nobody else uses."""
        if one.name in buffers:
            return buffers[one.name]
        if one.role == "scratch":
            return self._driver.empty(self._nbytes(one, sizes))
        if one.role == "zero":
            return self._driver.upload(np.zeros(self._nbytes(one, sizes), np.uint8))
        raise KeyError(one.name)

    def _nbytes(self, one: Argument, sizes: Mapping[str, int]) -> int:
        known = {**self._known, **sizes}
        counts = (eval(code, {"min": min}, known) for code in self._shapes[one.name])
        return int(math.prod(counts)) * _ITEM_BYTES[one.dtype]

    def results(
        self, sizes: Mapping[str, int], roles: tuple[str, ...] = ("out",)
    ) -> dict[str, Buffer]:
        """Buffers for all that the kernel gives back; with "scratch", for what it leaves there."""
        return {
            one.name: self._driver.empty(self._nbytes(one, sizes))
            for one in self._buffers
            if one.role in roles
        }


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

    def timed(self, call: Callable[[], None]) -> float | None:
        """Seconds that the device spends on what `call` launches; None, without a call, where it
        does not say."""
        driver = self.driver()
        return driver.timed(call) if isinstance(driver, Timed) else None

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
            buffers = self._made(
                kernel, {"x": driver.upload(x[start:stop])}, {"M": stop - start, "K": k}
            )
            for name, array in (("xq", q), ("xd", scale), ("xs", sums)):
                driver.download(buffers[name], array[start:stop])
        return Activations(q, scale, sums)

    def _made(
        self, kernel: Kernel, buffers: Mapping[str, Buffer], sizes: Mapping[str, int]
    ) -> dict[str, Buffer]:
        """Buffers, and what a kernel makes of them."""
        launcher = self.launcher(kernel)
        found = {**buffers, **launcher.results(sizes)}
        launcher(found, sizes)
        return found

    def inputs(self, kernel: Kernel, x: Array) -> dict[str, Buffer]:
        """Activations x, float32 (M, K), in device memory, as the kernel takes them: after all
        kernels that it needs."""
        m, k = x.shape
        buffers: dict[str, Buffer] = {"x": self.driver().upload(x)}
        for first in kernel.needs.values():
            buffers = self._made(first, buffers, {"M": m, "K": k})
        return buffers

    def matmul(self, kernel: Kernel) -> Callable[[Array, Weights, Array], None]:
        """A function of x, float32 (M, K), w (N, K) and y, float32 (M, N), which it fills."""
        driver = self.driver()
        self.launcher(kernel)  # compiled now

        def launch(x: Array, piece: Piece, buffers: Mapping[str, Buffer]) -> Buffer:
            sizes = {"M": len(x), "N": piece.stop - piece.start, "K": x.shape[1]}
            return self._made(kernel, {**buffers, "w": piece.buffer}, sizes)["y"]

        def run(x: Array, w: Weights, y: Array) -> None:
            if y.size == 0:
                return
            pieces = self.prepare(kernel, w)
            widest = max(x.shape[1], *(p.stop - p.start for p in pieces))
            for start, stop in self._windows(len(x), 4 * widest):
                rows, part = x[start:stop], y[start:stop]
                buffers = self.inputs(kernel, rows)
                outs = [launch(rows, piece, buffers) for piece in pieces]
                if len(pieces) == 1:
                    driver.download(outs[0], part)
                    continue
                for piece, out in zip(pieces, outs, strict=True):
                    columns = np.empty((len(rows), piece.stop - piece.start), np.float32)
                    driver.download(out, columns)
                    part[:, piece.start : piece.stop] = columns

        return run

    def apply(self, kernel: Kernel) -> Apply:
        """A function of arrays by name, rows, columns, and arrays that it fills."""
        launcher, driver, kind = self.launcher(kernel), self.driver(), kernel.subject
        count = len(kind.inputs)
        ins, outs = kernel.arguments[:count], kernel.arguments[count:]
        given_names = [one.name for one in kind.inputs]
        filled = list(zip(outs, written(kind), strict=False))

        def run(inputs: Mapping[str, Array], m: int, n: int, outputs: Mapping[str, Array]) -> None:
            arrays = {name: dense(inputs[name]) for name in given_names}
            sizes = {"ROWS": m, "COLUMNS": n, **map_strides(kind, arrays)}
            buffers = {
                one.name: driver.upload(_whole(a, _ITEM_BYTES[one.dtype]))
                for one, a in zip(ins, arrays.values(), strict=True)
            }
            results = {}
            for argument, one in filled:  # each row, or result of a row, begins with a word
                lines = outputs[one.name].reshape(-1, n if one in kind.outputs else 1)
                unit = _ITEM_BYTES[argument.dtype]
                width = -(-lines[:1].nbytes // unit) * unit
                results[one.name] = np.empty((len(lines), width), np.uint8)
                buffers[argument.name] = driver.empty(results[one.name].nbytes)
            self._check_size([*arrays.values(), *results.values()])
            launcher(buffers, sizes)
            for argument, one in filled:
                found, out = results[one.name], outputs[one.name]
                driver.download(buffers[argument.name], found)
                lines = out.reshape(len(found), -1)
                lines[...] = found[:, : lines[:1].nbytes].copy().view(out.dtype)

        return run

    def _check_size(self, arrays: Sequence[Array]) -> None:
        """Raises TargetError where one does not fit a buffer."""
        nbytes = max(a.nbytes for a in arrays)
        if nbytes > self.driver().largest:
            raise TargetError(
                f"an array of {nbytes} bytes does not fit a buffer of target {self.name}, which"
                f" holds {self.driver().largest} bytes; use another target"
            )

    def attention(
        self, kernel: Kernel
    ) -> Callable[[Array, Weights, Weights, Mapping[str, Array], Array], None]:
        """A function of q, float32 (B, H, T, D), k, v, operands by name, and y, which it fills.

        K and V are kept on the device, as weights are.
        """
        launcher, driver, kind = self.launcher(kernel), self.driver(), kernel.subject
        assert isinstance(kind, Attention)
        combine = kernel.then.get("attention_combine")
        add_up = None if combine is None else self.launcher(combine)
        splits = kernel.config.as_dict()["splits"]

        def run(q: Array, k: Weights, v: Weights, operands: Mapping[str, Array], y: Array) -> None:
            (b, h, t, d), (hk, s) = q.shape, k.shape[1:3]
            if y.size == 0 or s == 0:
                y[...] = 0
                return
            given, skipped = _given(driver, kind, operands)
            # bytes that belong to one head of K and V
            rows = h // hk * t * max(4 * d, (splits if add_up else 1) * 4 * (kind.value_dim + 2))
            widest = max(rows, *(s * w.format.row_bytes(w.shape[-1]) for w in (k, v)))
            for batches, heads in self._shares(b, hk, widest):
                part = (batches, slice(heads.start * (h // hk), heads.stop * (h // hk)))
                sizes = dict(zip(("B", "H", "T"), q[part].shape, strict=False))
                sizes |= {"HK": heads.stop - heads.start, "S": s, **skipped}
                sizes |= {"B0": part[0].start, "H0": part[1].start, "SPLITS": splits}
                buffers = {**given, "q": driver.upload(q[part]), **launcher.results(sizes)}
                buffers |= {"k": self._held(k, batches, heads), "v": self._held(v, batches, heads)}
                if add_up:
                    buffers |= launcher.results(sizes, ("scratch",))
                launcher(buffers, sizes)
                if add_up:
                    add_up(buffers, sizes)
                if y[part].flags.c_contiguous:
                    driver.download(buffers["y"], y[part])
                else:
                    found = np.empty(y[part].shape, np.float32)
                    driver.download(buffers["y"], found)
                    y[part] = found

        return run

    def _shares(self, batches: int, heads: int, nbytes: int) -> Iterator[tuple[slice, slice]]:
        """Ranges of batches and heads of K and V of which each fits a buffer, where each of these
        heads takes so many bytes."""
        most = self.driver().largest // nbytes
        if not most:
            raise TargetError(
                f"a head of {nbytes} bytes does not fit a buffer of target {self.name}, which"
                f" holds {self.driver().largest} bytes; use another target"
            )
        step_b, step_h = max(1, min(batches, most // heads)), min(heads, most)
        for b in range(0, batches, step_b):
            for h in range(0, heads, step_h):
                yield slice(b, min(b + step_b, batches)), slice(h, min(h + step_h, heads))

    def _held(self, w: Weights, batches: slice, heads: slice) -> Buffer:
        """Some heads of K or V in device memory; kept in w.prepared."""
        place = (batches.start, batches.stop, heads.start, heads.stop)
        key = (self.name, self.driver().key(), place)
        with self._lock:
            found = w.prepared.get(key)
            if found is None:
                found = w.prepared[key] = self.driver().upload(w.data[batches, heads])
        return found


def _given(
    driver: Driver, kind: Attention, operands: Mapping[str, Array]
) -> tuple[dict[str, Buffer], dict[str, int]]:
    """Arrays that score and mask read, in device memory, and how many elements an index skips."""
    found = {
        one.name: np.ascontiguousarray(operands[one.name], _ITEM_TYPES[one.dtype])
        for one in arrays(kind)
    }
    return {name: driver.upload(array) for name, array in found.items()}, strides(kind, found)


def _whole(array: Array, unit: int) -> Array:
    """An array's bytes, filled up to whole units."""
    raw = array.reshape(-1).view(np.uint8)
    missing = -raw.nbytes % unit
    return np.concatenate([raw, np.zeros(missing, np.uint8)]) if missing else raw


def rejected(who: str, kernel: Kernel, message: str, line: int | None) -> CompileError:
    """The error for a driver that does not take a kernel: what it says, and the line of source
    that it says it about."""
    text = " ".join(message.split()) or "the driver does not say why"
    lines = kernel.source.splitlines()
    if line is not None and 0 < line <= len(lines):
        text += f" at line {line}: {lines[line - 1].strip()}"
    return CompileError(
        f"{who} rejected {kernel.op} {kernel.subject.name}"
        f" ({', '.join(f'{k}={v}' for k, v in kernel.config.as_dict().items())}): {text}"
    )

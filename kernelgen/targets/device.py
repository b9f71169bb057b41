"""Runtimes of targets whose kernels run over a grid of threads in a device's own memory.

A target brings a `Driver`: buffers, programs, launches.  What an op needs of them is here.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kernelgen.config import Capabilities
from kernelgen.errors import TargetError
from kernelgen.ir.layout import Layout, named_layout
from kernelgen.ir.ops import Activations
from kernelgen.ir.ops.attention import Attention
from kernelgen.ir.ops.epilogue import NORM_WEIGHT, Operand
from kernelgen.targets.attention import arrays, strides
from kernelgen.targets.base import NONE, NY, Array, Kernel, Product, Weights, check_rows
from kernelgen.targets.driver import (
    GPU_FILES,
    ITEM_BYTES,
    Buffer,
    Driver,
    Held,
    Launcher,
    Resident,
    Timed,
    bytes_of,
    visible,
)
from kernelgen.targets.maps import Apply, dense, written
from kernelgen.targets.maps import strides as map_strides

_ITEM_TYPES = {"f32": np.float32, "i32": np.int32}


@dataclass(frozen=True)
class Piece:
    """Rows start..stop of a matrix in a buffer of their own: as many as one binding may hold."""

    start: int
    stop: int
    buffer: Buffer


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

    def expected(self) -> str | None:
        """What speaks for the device here, or None."""
        return visible(*GPU_FILES)

    def on_cpu(self) -> bool:
        """Whether the device is the CPU."""
        return False

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
                    found = w.prepared[key] = self._upload(layout, w, _together(kernel))
        return found

    def _upload(self, layout: Layout, w: Weights, together: int) -> list[Piece]:
        k, driver = w.shape[-1], self.driver()
        row_bytes = w.format.row_bytes(k)
        rows = w.data.reshape(-1, row_bytes)
        pieces = []
        for start, stop in self.windows(len(rows), row_bytes, together):
            part = rows[start:stop]
            packed = part if layout.name == "native" else layout.pack(part, w.format, k)
            pieces.append(Piece(start, stop, driver.upload(packed)))
        if isinstance(driver, Resident):
            driver.wait()
        return pieces

    def windows(self, rows: int, row_bytes: int, together: int = 1) -> Iterator[tuple[int, int]]:
        """Ranges of rows of which each fits a buffer, cut at multiples of so many."""
        largest = self.driver().largest
        step = largest // row_bytes // together * together
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
            for start, stop in self.windows(n, 4 * k):
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
            for start, stop in self.windows(len(here), 4 * k):
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

    def quantize(
        self, kernel: Kernel, x: Array, operands: Mapping[str, Array] = NONE
    ) -> Activations:
        """Activations x, float32 (M, K), as int8 in the form of the kernel's format."""
        x = np.ascontiguousarray(x, np.float32)
        m, k = x.shape
        fmt, driver = kernel.format, self.driver()
        fmt.row_bytes(k)
        q = np.empty((m, k), np.int8)
        scale = np.empty((m, k // fmt.block), np.float32)
        sums = np.empty((m, k // fmt.group), np.float32)
        for start, stop in self.windows(m, 4 * k):
            given = {"x": driver.upload(x[start:stop]), **self._norm_weight(operands)}
            buffers = self.made(kernel, given, {"M": stop - start, "K": k})
            for name, array in (("xq", q), ("xd", scale), ("xs", sums)):
                driver.download(buffers[name], array[start:stop])
        return Activations(q, scale, sums)

    def made(
        self, kernel: Kernel, buffers: Mapping[str, Buffer], sizes: Mapping[str, int]
    ) -> dict[str, Buffer]:
        """Buffers, and what a kernel makes of them."""
        launcher = self.launcher(kernel)
        found = {**launcher.results(sizes, given=buffers), **buffers}
        launcher(found, sizes)
        return found

    def _norm_weight(self, operands: Mapping[str, Array]) -> dict[str, Buffer]:
        """The norm's weight in device memory, where there is a norm."""
        found = operands.get(NORM_WEIGHT)
        return {} if found is None else {NORM_WEIGHT: self.driver().upload(found)}

    def inputs(
        self, kernel: Kernel, x: Array, operands: Mapping[str, Array] = NONE
    ) -> dict[str, Buffer]:
        """Activations x, float32 (M, K), in device memory, as the kernel takes them: after all
        kernels that it needs."""
        given = {"x": self.driver().upload(x), **self._norm_weight(operands)}
        return self.after_needed(kernel, given, *x.shape)

    def after_needed(
        self, kernel: Kernel, buffers: dict[str, Buffer], m: int, k: int
    ) -> dict[str, Buffer]:
        """The same for activations "x" (M, K), and what else they take, that are in device memory
        already."""
        for first in kernel.needs.values():
            buffers = self.made(first, buffers, {"M": m, "K": k})
        return buffers

    def matmul(self, kernel: Kernel) -> Product:
        """A function of x, float32 (M, K), w (N, K) and y, float32 (M, N), which it fills, and of
        operands by name."""
        driver = self.driver()
        self.launcher(kernel)  # compiled now
        epilogue = kernel.fused.epilogue
        read = epilogue.operands if epilogue is not None else ()
        each = 1 if _together(kernel) == 1 else 2

        def run(x: Array, w: Weights, y: Array, operands: Mapping[str, Array] = NONE) -> None:
            if y.size == 0:
                return
            pieces = self.prepare(kernel, w)
            widest = max(x.shape[1], *(p.stop - p.start for p in pieces))
            for start, stop in self.windows(len(x), 4 * widest):
                rows, part = x[start:stop], y[start:stop]
                buffers = self.inputs(kernel, rows, operands)
                outs = []
                for piece in pieces:
                    columns = slice(piece.start // each, min(piece.stop // each, y.shape[1]))
                    sizes = {"M": len(rows), "N": piece.stop - piece.start, "K": x.shape[1]}
                    sizes[NY] = columns.stop - columns.start
                    given = {
                        one.name: driver.upload(_cut(one, operands, slice(start, stop), columns))
                        for one in read
                    }
                    made = self.made(kernel, {**buffers, **given, "w": piece.buffer}, sizes)
                    outs.append((columns, made["y"]))
                if len(pieces) == 1:
                    driver.download(outs[0][1], part)
                    continue
                for columns, out in outs:
                    found = np.empty((len(rows), columns.stop - columns.start), np.float32)
                    driver.download(out, found)
                    part[:, columns] = found

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
                one.name: driver.upload(_padded(a, ITEM_BYTES[one.dtype]))
                for one, a in zip(ins, arrays.values(), strict=True)
            }
            results = {}
            for argument, one in filled:  # each row, or result of a row, begins with a word
                lines = outputs[one.name].reshape(-1, n if one in kind.outputs else 1)
                unit = ITEM_BYTES[argument.dtype]
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
        launch, driver = AttentionLaunch(self, kernel), self.driver()
        kind = launch.kind

        def run(q: Array, k: Weights, v: Weights, operands: Mapping[str, Array], y: Array) -> None:
            (b, h, t, d), hk = q.shape, k.shape[1]
            s = launch.keys(k.shape[2], operands)
            if y.size == 0 or s == 0:
                y[...] = 0
                return
            given, skipped = _given(driver, kind, operands)
            # bytes that belong to one head of K and V
            rows = h // hk * t * launch.row_bytes(d)
            widest = max(rows, *(s * w.format.row_bytes(w.shape[-1]) for w in (k, v)))
            shares = self._whole(b, k, v) if kind.page else self._shares(b, hk, widest)
            for batches, heads in shares:
                part = (batches, slice(heads.start * (h // hk), heads.stop * (h // hk)))
                sizes = launch.sizes(q[part].shape, heads.stop - heads.start, s, skipped, operands)
                sizes |= {"B0": part[0].start, "H0": part[1].start}
                held = slice(0, len(k.data)) if kind.page else batches
                buffers = {**given, "q": driver.upload(q[part])}
                buffers |= {"k": self.held(k, held, heads), "v": self.held(v, held, heads)}
                result = launch(buffers, sizes)
                if y[part].flags.c_contiguous:
                    driver.download(result, y[part])
                else:
                    found = np.empty(y[part].shape, np.float32)
                    driver.download(result, found)
                    y[part] = found

        return run

    def _whole(self, batches: int, *pools: Weights) -> list[tuple[slice, slice]]:
        """All batches and heads at once, as any of them may have any page."""
        largest, nbytes = self.driver().largest, max(w.data.nbytes for w in pools)
        if nbytes > largest:
            raise TargetError(
                f"a pool of {nbytes} bytes of pages does not fit a buffer of target {self.name},"
                f" which holds {largest} bytes; make it of fewer pages"
            )
        return [(slice(0, batches), slice(0, pools[0].shape[1]))]

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

    def held(self, w: Weights, batches: slice, heads: slice) -> Buffer:
        """Some heads of K or V in device memory; kept in w.prepared as `Held`."""
        place = (batches.start, batches.stop, heads.start, heads.stop)
        driver = self.driver()
        key = (self.name, driver.key(), place)
        with self._lock:
            found = w.prepared.get(key)
            if found is None:
                buffer = driver.upload(w.data[batches, heads])
                found = w.prepared[key] = Held(driver, buffer, batches, heads)
        return found.buffer


class AttentionLaunch:
    """An attention kernel, and the one that adds up where several blocks share the keys."""

    def __init__(self, runtime: DeviceRuntime, kernel: Kernel) -> None:
        assert isinstance(kernel.subject, Attention)
        self.kind = kernel.subject
        self._launcher = runtime.launcher(kernel)
        combine = kernel.then.get("attention_combine")
        self._add_up = None if combine is None else runtime.launcher(combine)
        self._splits = kernel.config.as_dict()["splits"]

    def keys(self, stored: int, operands: Mapping[str, Any]) -> int:
        """Keys that a query may see, of so many that each batch, or page, has room for."""
        return self.kind.page * operands["pages"].shape[1] if self.kind.page else stored

    def row_bytes(self, head_dim: int) -> int:
        """Bytes of a row of q, or of what is made of it."""
        made = (self._splits if self._add_up else 1) * 4 * (self.kind.value_dim + 2)
        return int(max(4 * head_dim, made))

    def sizes(
        self, q: Sequence[int], heads: int, keys: int, skipped: Mapping[str, int],
        operands: Mapping[str, Any],
    ) -> dict[str, int]:  # fmt: skip
        """Sizes for q (B, H, T, D), so many heads and keys of K, and what indices of the operands
        skip, with the first batch and head."""
        sizes = dict(zip(("B", "H", "T"), q, strict=False))
        sizes |= {"HK": heads, "S": keys, **skipped, "B0": 0, "H0": 0, "SPLITS": self._splits}
        if self.kind.page:
            sizes["PAGES"] = operands["pages"].shape[1]
        return sizes

    def __call__(self, given: Mapping[str, Buffer], sizes: Mapping[str, int]) -> Buffer:
        """Launch on these buffers; gives that of y, which is made unless it is given."""
        results = self._launcher.results(sizes, given=given)
        if self._add_up:
            results |= self._launcher.results(sizes, ("scratch",))
        buffers = {**results, **given}
        self._launcher(buffers, sizes)
        if self._add_up:
            self._add_up(buffers, sizes)
        return buffers["y"]


def _together(kernel: Kernel) -> int:
    """Rows of weights that must not be parted: those of which results are made."""
    epilogue = kernel.fused.epilogue
    return 2 * kernel.walk.apart if epilogue is not None and epilogue.gated else 1


def _cut(one: Operand, operands: Mapping[str, Array], rows: slice, columns: slice) -> Array:
    """An operand's elements for some rows and columns of y."""
    where = {"": (), "m": (rows,), "n": (columns,), "mn": (rows, columns)}
    return np.ascontiguousarray(operands[one.name][where[one.axes]], np.float32)


def _given(
    driver: Driver, kind: Attention, operands: Mapping[str, Array]
) -> tuple[dict[str, Buffer], dict[str, int]]:
    """Arrays that score and mask read, in device memory, and how many elements an index skips."""
    found = {
        one.name: np.ascontiguousarray(operands[one.name], _ITEM_TYPES[one.dtype])
        for one in arrays(kind)
    }
    return {name: driver.upload(array) for name, array in found.items()}, strides(kind, found)


def _padded(array: Array, unit: int) -> Array:
    """An array's bytes, filled up to whole units."""
    raw = bytes_of(array)
    missing = -raw.nbytes % unit
    return np.concatenate([raw, np.zeros(missing, np.uint8)]) if missing else raw

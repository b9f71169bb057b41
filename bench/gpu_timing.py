"""Seconds that work takes on a device, without what it costs the host to start it.

A kernel for one row of activations takes some microseconds, and to launch it from Python takes
longer.  So launches are recorded once as a graph, which the driver starts by itself, and the
device's own clock is read before and after.  Where there are no graphs, batches are timed by the
host's clock, launches included.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from kernelgen.targets.base import Kernel
from kernelgen.targets.device import DeviceRuntime
from kernelgen.targets.driver import Launcher

Call = Callable[[], None]

#: launches in a graph, where there is time for so many
_LAUNCHES = 20


class Timer(Protocol):
    """Times launches."""

    #: what the clock is, for reports
    clock: str

    def seconds(self, calls: Sequence[Call], budget: float) -> float:
        """Median seconds of one of these launches, made in turns, in about `budget` seconds."""
        ...


class GraphTimer:
    """Over graphs and events of a driver; subclasses say how these are called."""

    clock = "the device's, over graphs of launches"

    def record(self, calls: Sequence[Call]) -> Call:
        """The launches as a graph; what is returned starts it."""
        raise NotImplementedError

    def elapsed(self, start: Call, times: int) -> float:
        """Seconds on the device from before the first start to after the last."""
        raise NotImplementedError

    def seconds(self, calls: Sequence[Call], budget: float) -> float:
        """Median over starts of a graph."""
        calls[0]()  # loads what is loaded on first use
        single = max(self.elapsed(calls[0], 2) / 2, 1e-9)
        count = max(1, min(max(len(calls), _LAUNCHES), int(budget / single)))
        repeated = list(itertools.islice(itertools.cycle(calls), count))
        start = self._start(repeated)
        once = self.elapsed(start, 1)
        # long enough for the clock, and for the chip to reach the pace that it keeps
        times = max(1, min(100, int(0.01 / max(once, 1e-6))))
        samples: list[float] = []
        end = time.perf_counter() + budget
        while not samples or (time.perf_counter() < end and len(samples) < 50):
            samples.append(self.elapsed(start, times) / times / count)
        return statistics.median(samples)

    def _start(self, calls: Sequence[Call]) -> Call:
        try:
            return self.record(calls)
        except Exception as error:  # whatever a driver raises where something cannot be recorded
            self.clock = f"the device's, over launches one by one ({type(error).__name__}: {error})"

        def one_by_one() -> None:
            for call in calls:
                call()

        return one_by_one


class CupyTimer(GraphTimer):
    """cupy's graphs and events."""

    def __init__(self) -> None:
        import cupy

        self._cuda = cupy.cuda
        self._stream = cupy.cuda.Stream(non_blocking=True)

    def record(self, calls: Sequence[Call]) -> Call:
        """Captured from a stream."""
        self._cuda.Device().synchronize()
        self._stream = self._cuda.Stream(non_blocking=True)  # the last may have failed to record
        with self._stream:
            self._stream.begin_capture()
            try:
                for call in calls:
                    call()
            finally:
                graph = self._stream.end_capture()
        return lambda: graph.launch(self._stream)

    def elapsed(self, start: Call, times: int) -> float:
        """Between two events."""
        begin, end = self._cuda.Event(), self._cuda.Event()
        begin.record(self._stream)
        with self._stream:
            for _ in range(times):
                start()
        end.record(self._stream)
        end.synchronize()
        return float(self._cuda.get_elapsed_time(begin, end)) / 1e3


class TorchTimer(GraphTimer):
    """The same of torch."""

    def __init__(self, torch: Any) -> None:
        self._cuda = torch.cuda

    def record(self, calls: Sequence[Call]) -> Call:
        """Captured by torch's context."""
        self._cuda.synchronize()
        graph = self._cuda.CUDAGraph()
        with self._cuda.graph(graph):
            for call in calls:
                call()
        replay: Call = graph.replay
        return replay

    def elapsed(self, start: Call, times: int) -> float:
        """Between two events."""
        begin, end = (self._cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(times):
            start()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3


class HostTimer:
    """The host's clock over batches of launches, for what has no graphs."""

    clock = "the host's, over batches of launches"

    def __init__(self, wait: Call) -> None:
        """`wait` returns when all that was launched is done."""
        self._wait = wait

    def seconds(self, calls: Sequence[Call], budget: float) -> float:
        """Median over batches."""
        turn = itertools.cycle(calls)
        for _ in range(2):  # the first compiles, loads, allocates
            begin = time.perf_counter()
            next(turn)()
            self._wait()
            once = max(time.perf_counter() - begin, 1e-6)
        batch = max(1, min(100, int(0.02 / once)))
        samples: list[float] = []
        end = time.perf_counter() + budget
        while len(samples) < 3 or (time.perf_counter() < end and len(samples) < 50):
            begin = time.perf_counter()
            for _ in range(batch):
                next(turn)()
            self._wait()
            samples.append((time.perf_counter() - begin) / batch)
            if once > budget:
                break
        return statistics.median(samples)


def timer_of(runtime: DeviceRuntime) -> Timer:
    """The best timer for a runtime."""
    if runtime.name == "cuda":
        return CupyTimer()
    if runtime.name == "triton":
        import torch

        if torch.cuda.is_available():
            return TorchTimer(torch)
    driver = runtime.driver()
    tiny, out = driver.upload(np.zeros(1, np.float32)), np.empty(1, np.float32)
    return HostTimer(lambda: driver.download(tiny, out))


def launches(
    runtime: DeviceRuntime, kernel: Kernel, launcher: Launcher, weights: Sequence[Any],
    x: np.ndarray, n: int,
) -> list[Call]:  # fmt: skip
    """A launch of a matmul for each copy of its weights, with activations in the form that the
    kernel takes and memory for results there already."""
    (m, k), driver = x.shape, runtime.driver()
    buffers = {**runtime.inputs(kernel, x), "y": driver.empty(4 * m * n)}
    sizes = {"M": m, "N": n, "K": k}
    return [launcher.bound({**buffers, "w": one}, sizes) for one in weights]

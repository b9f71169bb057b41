"""Times kernels beside their rivals: what `kernelgen bench` does.

Every speed is a ratio of two things that ran in turns, on one machine, in one process.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kernelgen import api
from kernelgen.ir.block import BlockFormat
from kernelgen.problem import choose_precision
from kernelgen.targets.base import Target
from kernelgen.tensor import QuantTensor
from kernelgen.verify import sample_weights

Array = npt.NDArray[Any]

#: rows of random weights that are different from one another; more would only cost time to make
_DISTINCT_ROWS = 64


@dataclass(frozen=True)
class Timing:
    """Seconds that single calls took."""

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        """Half of the calls were faster: what to compare."""
        return statistics.median(self.samples)

    @property
    def minimum(self) -> float:
        """The fastest call."""
        return min(self.samples)


def compare(
    functions: Mapping[str, Callable[[], object]],
    repeats: int = 7,
    *,
    burst: float = 0.02,
    pause: float = 0.25,
    warm: float = 0.0,
) -> dict[str, Timing]:
    """Time functions in turns, so that what disturbs the machine disturbs all of them alike.

    repeats  turns; every other one goes through the functions backwards
    burst    seconds for which a function is called in its turn, at least once
    warm     seconds for which it is called before that without counting, at least once: where
             calls are short, the first 10 ms of them are slower, as clocks rise and caches fill
    pause    seconds before a function's turn.  Threads that have nothing to do spin before they
             sleep, those of OpenMP for 0.2 s, and would take cores from the next function: on two
             cores, in turns without a pause, numpy's matmul was five times slower than alone
    """
    for function in functions.values():
        function()  # compiles, allocates

    def timed(function: Callable[[], object]) -> Callable[[], list[float]]:
        return lambda: calls(function, burst, warm)

    return in_turns({name: timed(one) for name, one in functions.items()}, repeats, pause)


def in_turns(
    bursts: Mapping[str, Callable[[], list[float]]], repeats: int, pause: float
) -> dict[str, Timing]:
    """`compare` of functions that time themselves, in processes of their own for example: each
    gives the seconds of the calls of its turn."""
    samples: dict[str, list[float]] = {name: [] for name in bursts}
    for turn in range(repeats):
        order = list(bursts.items())
        for name, burst in order if turn % 2 == 0 else reversed(order):
            time.sleep(pause)
            samples[name] += burst()
    return {name: Timing(tuple(seconds)) for name, seconds in samples.items()}


def calls(function: Callable[[], object], burst: float, warm: float) -> list[float]:
    """Seconds of single calls, one after the other: see `compare`."""
    _burst(function, warm)
    return _burst(function, burst)


def _burst(function: Callable[[], object], seconds: float) -> list[float]:
    """Times of calls, one after the other, until so many seconds are over."""
    times: list[float] = []
    begin = before = time.perf_counter()
    while not times or before - begin < seconds:
        function()
        now = time.perf_counter()
        times.append(now - before)
        before = now
    return times


def busy() -> str | None:
    """Why times taken now are not to be trusted, or None."""
    if not hasattr(os, "getloadavg"):
        return None
    load, cpus = os.getloadavg()[0], os.cpu_count() or 1
    if load <= 0.5 * cpus:
        return None
    return (
        f"this machine is busy (load {load:.1f} on {cpus} CPUs), so times and ratios are not to be"
        " trusted"
    )


@dataclass(frozen=True)
class Measured:
    """A fused matmul beside numpy's on the same matrix, dequantized beforehand to float32.

    fused, numpy  seconds of a call, medians; `fused_best` and `numpy_best` the fastest calls
    ratio         how many times faster the fused one is
    gb_per_s      bytes of blocks read by the fused one in a second, 10^9
    gflop_per_s   its multiplications and additions in a second, 10^9
    """

    target: str
    format: str
    precision: str
    m: int
    n: int
    k: int
    fused: float
    fused_best: float
    numpy: float
    numpy_best: float
    ratio: float
    gb_per_s: float
    gflop_per_s: float

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for --json."""
        return asdict(self)


def matmul(
    target: Target,
    fmt: BlockFormat,
    m: int,
    n: int,
    k: int,
    precision: str = "auto",
    repeats: int = 7,
) -> Measured:
    """Time kernelgen.matmul of x (M, K) and w (N, K) against numpy's x @ W.T."""
    w = sample_matrix(fmt, n, k)
    dequantized = np.resize(w[:_DISTINCT_ROWS].dequantize(), (n, k))
    x = np.random.default_rng(m).standard_normal((m, k), np.float32)
    y, other = np.empty((m, n), np.float32), np.empty((m, n), np.float32)
    times = compare(
        {
            "fused": lambda: api.matmul(x, w, target=target.name, precision=precision, out=y),
            "rival": lambda: np.matmul(x, dequantized.T, out=other),
        },
        repeats,
    )
    fused, numpy = times["fused"], times["rival"]
    return Measured(
        target.name, fmt.name, choose_precision(precision, fmt), m, n, k,
        fused.median, fused.minimum, numpy.median, numpy.minimum, numpy.median / fused.median,
        w.nbytes / fused.median / 1e9, 2 * m * n * k / fused.median / 1e9,
    )  # fmt: skip


def sample_matrix(fmt: BlockFormat, n: int, k: int) -> QuantTensor:
    """A matrix of quantized normal weights, some rows over and over."""
    rows = sample_weights(fmt, min(n, _DISTINCT_ROWS), k)
    return QuantTensor(fmt, (n, k), np.resize(rows, (n, fmt.row_bytes(k))))

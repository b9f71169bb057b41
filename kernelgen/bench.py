"""Times kernels beside their rivals: what `kernelgen bench` does.

Every speed is a ratio of two things that ran in turns, on one machine, in one process.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kernelgen import api
from kernelgen.ir.block import BlockFormat
from kernelgen.problem import choose_precision, op_for
from kernelgen.targets.base import Target
from kernelgen.tensor import QuantTensor
from kernelgen.verify import random_blocks

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
    repeats: int = 20,
    *,
    warmup: int = 2,
    calls: int = 1,
    settle: int = 1,
) -> dict[str, Timing]:
    """Time functions in turns, so that what disturbs the machine disturbs all of them alike.

    repeats  turns; every other one goes backwards
    warmup   calls of each before the first turn
    calls    timed calls of a function in its turn, each a sample
    settle   calls of a function in its turn before those, not timed: the threads that the function
             before has left spinning go to sleep, and caches hold what this one leaves in them
    """
    for function in functions.values():
        for _ in range(warmup):
            function()
    samples: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(repeats):
        order = list(functions.items())
        for name, function in order if turn % 2 == 0 else reversed(order):
            for _ in range(settle):
                function()
            samples[name] += [_seconds(function) for _ in range(calls)]
    return {name: Timing(tuple(seconds)) for name, seconds in samples.items()}


def _seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start

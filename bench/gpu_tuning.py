"""A measurer for the tuner that reads the device's clock (see kernelgen.tuner.measure.Measurer).

The tuner's own measures whole calls from the host, copies of activations and results included,
beside which a kernel for few rows of activations takes no time.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from gpu_timing import Call, Timer, launches

from kernelgen.errors import CompileError, KernelgenError
from kernelgen.generate import generate_walk
from kernelgen.ir.layout import named_layout
from kernelgen.targets.base import Kernel, Target
from kernelgen.targets.device import DeviceRuntime
from kernelgen.tuner import gate
from kernelgen.tuner.measure import FAILED, OK, PRUNED, Outcome
from kernelgen.tuner.problems import MatmulProblem, Problem
from kernelgen.tuner.space import Candidate

#: a candidate that is so many times slower than the best is not measured again
_CLEARLY_SLOWER = 1.3

#: most copies of the weights that are rotated through
_MOST_COPIES = 64


class DeviceMeasurer:
    """Measures in this process: what crashes the device ends the study."""

    def __init__(self, target: Target, runtime: DeviceRuntime, timer: Timer, past: int) -> None:
        """`past`: bytes of weights to rotate through."""
        self._target, self._runtime, self._timer, self._past = target, runtime, timer, past
        self._calls: dict[str, list[Call]] = {}
        self._verdicts: dict[str, gate.Verdict] = {}
        self._weights: dict[str, list[object]] = {}

    def prepare(self, problem: Problem, end: float = math.inf) -> None:
        """Make the inputs."""
        assert isinstance(problem, MatmulProblem)  # `launches` are of these
        self._problem, self._case = problem, gate.MatmulCase(problem, many=False)

    def compile(self, candidates: Sequence[Candidate], limit: float) -> dict[str, Outcome]:
        """All at once; the driver keeps the binaries."""

        def failed(one: Candidate) -> Outcome | None:
            begin = time.perf_counter()
            try:
                self._runtime.driver().program(self._kernel(one))
            except CompileError as error:
                return Outcome(FAILED, "compile", str(error), spent=time.perf_counter() - begin)
            return None

        with ThreadPoolExecutor(8) as pool:
            outcomes = zip(candidates, pool.map(failed, candidates), strict=True)
            return {one.id: outcome for one, outcome in outcomes if outcome is not None}

    def measure(
        self, candidate: Candidate, against: Candidate | None, *, seconds: float, limit: float,
        prune: bool = True, expect: float | None = None, turns: int = 15,
    ) -> Outcome:  # fmt: skip
        """Check it, then time it in turns with the other."""
        begin = time.perf_counter()
        try:
            verdict = self._judged(candidate)
            if verdict.kind is not None:
                spent = time.perf_counter() - begin
                return Outcome(FAILED, verdict.kind, verdict.reason, spent=spent)
            mine, theirs = [], []
            status, each = OK, seconds / 8
            while len(mine) < turns and (len(mine) < 3 or time.perf_counter() - begin < seconds):
                mine.append(self._timer.seconds(self._ready(candidate), each))
                if against is not None:
                    theirs.append(self._timer.seconds(self._ready(against), each))
                if prune and theirs and min(mine) > _CLEARLY_SLOWER * max(theirs):
                    status = PRUNED
                    break
        except KernelgenError as error:
            return Outcome(FAILED, "error", str(error), spent=time.perf_counter() - begin)
        return Outcome(
            status, None, None, tuple(mine), tuple(theirs), verdict.error, verdict.bound,
            verdict.rms_error, spent=time.perf_counter() - begin,
        )  # fmt: skip

    def bandwidth(self) -> float | None:
        """Unknown here."""
        return None

    def close(self) -> None:
        """Let go of the weights."""
        self._calls.clear()
        self._weights.clear()

    def _kernel(self, one: Candidate) -> Kernel:
        return generate_walk(one.walk, self._problem.fmt, self._target, one.config)

    def _judged(self, one: Candidate) -> gate.Verdict:
        if one.id not in self._verdicts:
            kernel = self._kernel(one)
            run = self._runtime.matmul(kernel)
            self._verdicts[one.id] = gate.judge(
                kernel, run, self._runtime, self._target, self._case, self._problem.max_error
            )
        return self._verdicts[one.id]

    def _ready(self, one: Candidate) -> list[Call]:
        if one.id not in self._calls:
            kernel = self._kernel(one)
            weights = self._copies(str(kernel.config.as_dict()["layout"]))
            self._calls[one.id] = launches(
                self._runtime, kernel, self._runtime.launcher(kernel), weights, self._case.sample.x,
                self._problem.n,
            )  # fmt: skip
        return self._calls[one.id]

    def _copies(self, layout: str) -> list[object]:
        if layout not in self._weights:
            w, named = self._case.sample.w, named_layout(layout)
            rows = w.data.reshape(w.shape[0], -1)
            packed = rows if layout == "native" else named.pack(rows, w.format, w.shape[1])
            count = max(1, min(_MOST_COPIES, -(-self._past // w.nbytes)))
            self._weights[layout] = [self._runtime.driver().upload(packed) for _ in range(count)]
        return self._weights[layout]

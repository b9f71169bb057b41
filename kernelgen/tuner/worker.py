"""The child process that runs candidates: `python -m kernelgen.tuner.worker FACTORY TARGET`.

It reads requests as JSON lines and answers each with one.  Whatever a candidate does to it, its
parent (kernelgen.tuner.measure) lives, and starts another.
"""

from __future__ import annotations

import base64
import contextlib
import importlib
import json
import os
import pickle
import queue
import signal
import statistics
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from kernelgen import targets
from kernelgen.errors import CompileError, KernelgenError, TargetError, TuningError
from kernelgen.generate import generate_walk
from kernelgen.targets.base import Kernel, Runtime, Target
from kernelgen.tuner import energy, gate, space
from kernelgen.tuner.problems import Problem

Array = npt.NDArray[Any]


def from_memory(nbytes: int) -> bool:
    """Whether inputs of that size are read from memory when they are timed, not from a cache."""
    return nbytes * gate.MOST_COPIES >= gate.PAST_THE_CACHE


#: seconds of calls one after the other in a turn
_BURST = 0.004

#: the same where energy counts, in updates of the meter
_PERIODS = 20

#: seconds and joules of a call
Burst = tuple[float, float]

#: how much slower than the best a candidate may look while it is still measured, after how many
#: turns
_CLEARLY_SLOWER = ((2, 2.0), (3, 1.3), (5, 1.12))
#: by how many times in its first two calls
_HOPELESS = 4.0

#: the factory of targets that are not made up
STANDARD = "kernelgen.tuner.worker:standard"


def standard(name: str, variant: str = "") -> tuple[Target, Runtime]:
    """A target and its runtime."""
    target = targets.get(name)
    return target, target.runtime(variant)


def resolve(factory: str) -> Callable[..., tuple[Target, Runtime]]:
    """A function by "module:name"."""
    module, _, name = factory.partition(":")
    found: Callable[..., tuple[Target, Runtime]] = getattr(importlib.import_module(module), name)
    return found


class Failure(Exception):
    """A candidate failed: kind and reason."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


class Worker:
    """Answers requests about one target and one problem."""

    def __init__(self, target: Target, runtime: Runtime) -> None:
        self.target, self.runtime = target, runtime
        self._problem: Problem | None = None
        self._case: gate.Case | None = None
        self._runs: dict[str, tuple[Kernel, gate.Run]] = {}
        self._verdicts: dict[str, gate.Verdict] = {}
        self._turn = 0
        self._meter: energy.Meter | None = None
        self._least = _BURST
        self._clock = "wall"

    def problem(self, problem: str) -> dict[str, Any]:
        """Make the inputs of a problem, once for all candidates; it comes pickled."""
        one = self._problem = pickle.loads(base64.b64decode(problem))
        meter = energy.find((self.runtime.describe() or [{}])[0])
        self._meter = None if isinstance(meter, str) else meter
        self._least = _BURST
        if one.objective == "energy":
            if isinstance(meter, str):
                raise TuningError(f"least energy was asked for, but {meter}; tune for time")
            self._least = max(_BURST, _PERIODS * meter.period)
        elif self._meter is not None and self._meter.period > _BURST:
            self._meter = None  # it would miss a burst
        self._runs.clear()
        self._verdicts.clear()
        self._case = gate.case(one)
        return {"nbytes": self._case.nbytes}

    def compile(self, candidate: Mapping[str, Any]) -> dict[str, Any]:
        """Compile a candidate for all processes, as far as the target keeps binaries on disk."""
        begin = time.perf_counter()
        self._load(candidate)
        return {"seconds": time.perf_counter() - begin}

    def launch(self, candidate: Mapping[str, Any]) -> dict[str, Any]:
        """Run a candidate on little: some drivers compile for all processes only then."""
        _, kernel, run = self._load(candidate)
        assert self._case is not None
        self._case.little(run, kernel)
        return {}

    def _load(self, candidate: Mapping[str, Any]) -> tuple[str, Kernel, gate.Run]:
        assert self._problem is not None and self._case is not None
        name = json.dumps(candidate, sort_keys=True)
        if name not in self._runs:
            walk = space.walk_named(self.target, candidate["op"], candidate["walk"])
            if walk is None:
                raise TargetError(f"target {self.target.name} has no walk {candidate['walk']}")
            config = walk.config.from_dict(candidate["config"])
            kernel = generate_walk(walk, self._problem.subject, self.target, config)
            self._runs[name] = kernel, self._case.runner(self.runtime, kernel)
        return name, *self._runs[name]

    def measure(
        self,
        candidate: Mapping[str, Any],
        against: Mapping[str, Any] | None = None,
        seconds: float = 0.5,
        rounds: int = 15,
        prune: bool = True,
        expect: float | None = None,
    ) -> dict[str, Any]:
        """Check a candidate, then time it in turns with another, for about so many seconds;
        `expect`: seconds that a call of the other takes."""
        name, kernel, run = self._load(candidate)
        problem, case = self._problem, self._case
        assert problem is not None and case is not None
        verdict = self._verdicts.get(name)
        if verdict is None:
            verdict = self._verdicts[name] = gate.judge(
                kernel, run, self.runtime, self.target, case, problem.max_error
            )
        if verdict.kind is not None:
            raise Failure(verdict.kind, verdict.reason or "")
        about = {"error": verdict.error, "bound": verdict.bound, "rms_error": verdict.rms_error}
        case.prepare(self.runtime, kernel)  # repacks or uploads what no other candidate did
        case.call(run, 0)
        if prune and expect is not None:
            # what is far too slow is not worth a second look, nor that of its rival
            once = self._once(run)
            if once > _HOPELESS * expect:
                once = min(once, self._once(run))  # the machine may have done something else
            if once > _HOPELESS * expect:
                found = {"samples": [once], "against": [expect], "pruned": True}
                return {**found, "clock": self._clock, **about}
        other = None
        if against is not None:
            _, rival, other = self._load(against)
            case.prepare(self.runtime, rival)
            case.call(other, 0)
        return self._time(run, other, seconds, rounds, prune) | about

    def _once(self, run: gate.Run) -> float:
        """Seconds of one call with the next copy of the inputs: of its launches, where the device
        says how long they take, else of all of it."""
        self._turn += 1
        case, turn = self._case, self._turn
        assert case is not None
        timed = getattr(self.runtime, "timed", None)
        if timed is not None:
            found: float | None = timed(lambda: case.call(run, turn))
            if found is not None:
                self._clock = "device"
                return found
        begin = time.perf_counter()
        case.call(run, turn)
        return time.perf_counter() - begin

    def _time(
        self, run: gate.Run, other: gate.Run | None, seconds: float, rounds: int, prune: bool
    ) -> dict[str, Any]:
        """Bursts of both, in turns; and whether the first was given up as worse."""
        mine: list[Burst] = []
        theirs: list[Burst] = []
        pruned = False
        by_energy = self._problem is not None and self._problem.objective == "energy"
        end = time.perf_counter() + seconds
        while len(mine) < rounds and (len(mine) < 3 or time.perf_counter() < end):
            if other is not None and len(mine) % 2 == 0:
                theirs.append(self._burst(other))
                mine.append(self._burst(run))
            else:
                mine.append(self._burst(run))
                if other is not None:
                    theirs.append(self._burst(other))
            if prune and theirs:
                pairs = zip(mine, theirs, strict=True)
                ratio = statistics.median_low(a[by_energy] / (b[by_energy] or 1) for a, b in pairs)
                pruned = any(len(mine) >= n and ratio > most for n, most in _CLEARLY_SLOWER)
                if pruned:
                    break
        found = {"samples": [t for t, _ in mine], "against": [t for t, _ in theirs]}
        if self._meter is not None:
            found |= {"joules": [j for _, j in mine], "joules_against": [j for _, j in theirs]}
        return {**found, "pruned": pruned, "clock": self._clock}

    def _burst(self, run: gate.Run) -> Burst:
        """Calls, each with the next copy of the inputs: the median of their seconds, and the mean
        of their joules (0 without a meter)."""
        times: list[float] = []
        used = self._meter.joules() if self._meter else 0.0
        begin = time.perf_counter()
        while not times or time.perf_counter() - begin < self._least:
            times.append(self._once(run))
        used = self._meter.joules() - used if self._meter else 0.0
        return statistics.median(times), used / len(times)

    def bandwidth(self) -> dict[str, Any]:
        """Bytes that can be read from the device's memory in a second; None where that cannot be
        measured from here."""
        about = self.runtime.describe()
        threads = about[0].get("threads") if about else None
        return {"bytes_per_s": host_bandwidth(threads) if isinstance(threads, int) else None}


def host_bandwidth(threads: int, megabytes: int = 96, turns: int = 6) -> float:
    """Bytes that so many threads read from the host's memory in a second: the best of a few, and
    of two ways to read."""
    from concurrent.futures import ThreadPoolExecutor

    data = np.empty(megabytes * 2**20, np.uint8)
    data[:] = 0  # memory that was never written is one page over and over
    readers: dict[Callable[..., Any], Array] = {
        np.max: data.view(np.float32),
        np.any: data.view(np.bool_),
    }
    best = 0.0
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(turns):
            for read, array in readers.items():
                parts = np.array_split(array, threads)
                begin = time.perf_counter()
                list(pool.map(read, parts))
                best = max(best, data.nbytes / (time.perf_counter() - begin))
    return best


def answer(worker: Worker, request: Mapping[str, Any]) -> dict[str, Any]:
    """The answer to one request: {"ok": true, ...}, or kind and reason of a failure."""
    do: dict[str, Callable[..., dict[str, Any]]] = {
        "problem": worker.problem,
        "compile": worker.compile,
        "launch": worker.launch,
        "measure": worker.measure,
        "bandwidth": worker.bandwidth,
    }
    try:
        return {"ok": True, **do[request["do"]](**request.get("with", {}))}
    except Failure as error:
        return {"ok": False, "kind": error.kind, "reason": str(error)}
    except CompileError as error:
        return {"ok": False, "kind": "compile", "reason": str(error)}
    except MemoryError as error:
        return {"ok": False, "kind": "memory", "reason": f"out of memory: {error}"}
    except KernelgenError as error:
        return {"ok": False, "kind": "error", "reason": str(error)}
    except Exception as error:  # a driver's own errors have no common class
        return {"ok": False, "kind": "error", "reason": f"{type(error).__name__}: {error}"}


def main(factory: str, name: str, variant: str = "") -> None:
    """Answer requests until the parent closes the pipe, or is no more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides when this ends
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what drivers print is not an answer
    waiting: queue.SimpleQueue[str] = queue.SimpleQueue()

    def listen() -> None:
        for line in sys.stdin:
            waiting.put(line)
        os._exit(0)  # even out of a candidate that never ends

    threading.Thread(target=listen, daemon=True).start()
    worker = Worker(*resolve(factory)(name, variant))
    while True:
        reply = answer(worker, json.loads(waiting.get()))
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps(reply), file=out, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])

"""A rival in a process of its own.

Libraries of one process get in each other's way: they share OpenMP's threads, whose tile registers
(AMX) some configure once and believe to be theirs.  So each multiplies, and takes the time, in its
own process; one that crashes is absent.
"""

from __future__ import annotations

import gc
import multiprocessing
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from bench.cpu_rivals import AbsentError, Problem, Rival, Ways
from kernelgen.bench import calls

#: seconds in which what threads of OpenMP, of OpenBLAS and of engines spin is over
PAUSE = 0.06
#: a way that takes so many times as long as another in a single call is not tried for this M, nor
#: for more rows
SLOW = 8.0
#: seconds of a call after which it is not called with more rows to prepare it
LONG = 2.0

#: seconds of calls before those that count, and of those.  After others' turns the weights are in
#: no cache, and with 15 ms of calls some rivals had not come to their speed
WARM, BURST = 0.1, 0.03


@dataclass(frozen=True)
class Best:
    """The way that is fastest, seconds of a call in the trial, and the error of its result."""

    way: str
    trial: float
    error: float


def tried(run: Callable[[], object]) -> float:
    """Seconds of a call: the least of a few, after some that warm up."""
    begin, least = time.perf_counter(), float("inf")
    count = 0
    while count < 3 or time.perf_counter() - begin < WARM:
        before = time.perf_counter()
        run()
        least = min(least, time.perf_counter() - before)
        count += 1
    return least


class _Service:
    """What the process does."""

    def __init__(self, rival: Rival) -> None:
        self.rival = rival
        self.ways: Ways = {}
        self.trials: dict[int, dict[str, float]] = {}
        self.out: dict[str, str] = {}

    def make(self, problem: Problem) -> list[str]:
        self.ways = {}
        gc.collect()  # what was there before goes first
        self.problem = problem
        self.ways = self.rival.made(problem)
        self.trials, self.out = {}, {}
        for by_m in self.ways.values():
            for product in by_m.values():  # compiles, packs
                begin = time.perf_counter()
                product.run()
                if time.perf_counter() - begin > LONG:
                    break
        return list(self.ways)

    def best(self, m: int, beginning: str) -> Best:
        if m not in self.trials:
            self.trials[m] = self._tried(m)
        found = {way: t for way, t in self.trials[m].items() if way.startswith(beginning)}
        for way in sorted(found, key=lambda one: found[one]):
            product = self.ways[way][m]
            product.run()
            error = self.problem.error(m, product.result())
            if error <= self.rival.error:
                return Best(way, found[way], error)
            self.out[way] = f"error {error:.3g} exceeds {self.rival.error}"
        said = "; ".join(f"{way}: {why}" for way, why in self.out.items())
        raise AbsentError(said or f"no way called {beginning}")

    def _tried(self, m: int) -> dict[str, float]:
        seconds: dict[str, float] = {}
        for way, by_m in self.ways.items():
            if way in self.out:
                continue
            by_m[m].run()
            once = calls(by_m[m].run, 0, 0)[0]
            if once > SLOW * min(seconds.values(), default=once):
                self.out[way] = f"slow from M={m} on"
            else:
                seconds[way] = tried(by_m[m].run)
        return seconds

    def burst(self, m: int, way: str) -> list[float]:
        return calls(self.ways[way][m].run, BURST, WARM)


def _serve(connection: Connection, rival: Rival) -> None:
    service = _Service(rival)
    while True:
        try:
            what, *arguments = connection.recv()
        except (EOFError, OSError):
            return
        try:
            answer = getattr(service, what)(*arguments)
        except AbsentError as error:
            answer = error
        except Exception as error:  # of whichever library it is
            answer = AbsentError(f"{type(error).__name__}: {error}")
        connection.send(answer)


class Worker:
    """The process of a rival.

    All methods raise AbsentError where the rival is not there, or its process has ended.
    """

    def __init__(self, rival: Rival) -> None:
        self.rival = rival
        spawn = multiprocessing.get_context("spawn")
        self._connection, theirs = spawn.Pipe()
        self._process = spawn.Process(target=_serve, args=(theirs, rival), daemon=True)
        self._process.start()
        theirs.close()

    def _ask(self, *message: Any) -> Any:
        try:
            self._connection.send(message)
            answer = self._connection.recv()
        except (EOFError, OSError) as error:
            self._process.join()
            code = self._process.exitcode
            raise AbsentError(f"its process ended with status {code} at {message[0]!r}") from error
        if isinstance(answer, AbsentError):
            raise answer
        return answer

    def make(self, problem: Problem) -> list[str]:
        """Quantizes, repacks, compiles; names the ways that there are."""
        names: list[str] = self._ask("make", problem)
        return names

    def best(self, m: int, beginning: str = "") -> Best:
        """The fastest way, of those whose names begin so, whose result is right."""
        found: Best = self._ask("best", m, beginning)
        return found

    def burst(self, m: int, way: str) -> list[float]:
        """Seconds of calls, one after the other, after some that warm up."""
        seconds: list[float] = self._ask("burst", m, way)
        return seconds

    def close(self) -> None:
        """End the process."""
        self._connection.close()
        self._process.terminate()
        self._process.join()

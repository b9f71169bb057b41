"""Measures candidates and survives them: the parent's side of `kernelgen.tuner.worker`."""

from __future__ import annotations

import base64
import contextlib
import json
import math
import os
import pickle
import queue
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import IO, Any, Protocol

from kernelgen.errors import TuningError
from kernelgen.tuner.problems import Problem
from kernelgen.tuner.space import Candidate
from kernelgen.tuner.worker import STANDARD

OK, PRUNED, FAILED = "ok", "pruned", "failed"

#: seconds in which a worker may start and make the inputs of a problem
_START = 300.0
#: seconds for a first launch ahead of time, which is not worth more
_FIRST_LAUNCH = 5.0


@dataclass(frozen=True)
class Outcome:
    """What became of a candidate.

    status     "ok", "pruned" (given up as clearly slower) or "failed"
    kind       of a failure: "compile", "crash", "hang", "nan", "wrong", "memory", "error"; "late"
               where the study's time was over, which says nothing about the candidate
    reason     of a failure, a sentence
    samples    seconds of a call, medians of bursts
    against    the same of what it was timed in turns with
    error, bound, rms_error   see kernelgen.tuner.gate.Verdict
    joules, joules_against    energy of a call, means of bursts, of both; where there is a meter
    clock      "device": its own events timed the launches; "wall": all of a call was timed
    spent      seconds that finding out took
    """

    status: str
    kind: str | None = None
    reason: str | None = None
    samples: tuple[float, ...] = ()
    against: tuple[float, ...] = ()
    error: float | None = None
    bound: float | None = None
    rms_error: float | None = None
    joules: tuple[float, ...] = ()
    joules_against: tuple[float, ...] = ()
    clock: str = "wall"
    spent: float = field(default=0.0, compare=False)

    @property
    def seconds(self) -> float:
        """Median of the samples."""
        return statistics.median(self.samples)

    def cost(self, objective: str) -> float:
        """What is to be least: seconds, or joules."""
        return self.seconds if objective == "time" else statistics.median(self.joules)

    def _pairs(self, objective: str) -> list[tuple[float, float]]:
        both = (self.samples, self.against)
        if objective != "time":
            both = (self.joules, self.joules_against)
        return [(a, b) for a, b in zip(*both, strict=False) if b]

    def ratio(self, objective: str = "time") -> float | None:
        """Its cost in units of that of what it was measured with: the median over turns, so that a
        machine that changes its pace between turns changes little here."""
        pairs = self._pairs(objective)
        return statistics.median(a / b for a, b in pairs) if pairs else None

    def better(self, objective: str = "time") -> float:
        """The share of turns in which it was the better one."""
        pairs = self._pairs(objective)
        return sum(a < b for a, b in pairs) / len(pairs) if pairs else 0.0

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Outcome:
        """The inverse of `as_dict`."""
        values: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in data.items()
        }
        return cls(**values)


class Measurer(Protocol):
    """What a study measures with."""

    def prepare(self, problem: Problem, end: float = math.inf) -> None:
        """Get ready for the candidates of a problem.  Nothing is waited for after `end`, a time of
        time.perf_counter()."""
        ...

    def compile(self, candidates: Sequence[Candidate], limit: float) -> dict[str, Outcome]:
        """Compile ahead; outcomes of those that failed, by their ids."""
        ...

    def measure(
        self, candidate: Candidate, against: Candidate | None, *, seconds: float, limit: float,
        prune: bool = True, expect: float | None = None,
    ) -> Outcome:  # fmt: skip
        """Check and time a candidate in turns with another, for about `seconds`; over after
        `limit` seconds whatever it does.  `expect`: seconds that a call of the other takes."""
        ...

    def bandwidth(self) -> float | None:
        """Bytes read from memory in a second, if that is known."""
        ...

    def close(self) -> None:
        """Let go of everything."""
        ...


class WorkerDied(Exception):
    """The worker crashed ("crash"), did not answer in time ("hang"), or time was over ("late")."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


class Child:
    """One worker process, started on first use and again after each end."""

    def __init__(self, factory: str, target: str, variant: str = "") -> None:
        self._command = [sys.executable, "-m", "kernelgen.tuner.worker", factory, target, variant]
        self._process: subprocess.Popen[str] | None = None
        self._answers: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._errors: IO[bytes] | None = None
        self.problem: dict[str, Any] | None = None
        #: after this time nothing is waited for
        self.end = math.inf
        self._ready = False

    def request(self, limit: float, do: str, **values: Any) -> dict[str, Any]:
        """The answer to a request.  Raises WorkerDied where there is none within the limit, in
        which the start of a process and the making of inputs are not counted, or before the end,
        in which they are."""
        self._start()
        return self._ask(limit, {"do": do, "with": values})

    def tell(self, problem: dict[str, Any], end: float = math.inf) -> None:
        """The problem that requests are about from now on, and when they end."""
        self.problem, self.end = problem, end
        self._ready = False

    def _start(self) -> None:
        alive = self._process is not None and self._process.poll() is None
        if alive and self._ready:
            return
        if not alive:
            self._spawn()
        if self.problem is not None:
            reply = self._ask(_START, {"do": "problem", "with": self.problem})
            if not reply["ok"]:
                raise TuningError(f"the problem cannot be set up: {reply['reason']}")
        self._ready = True

    def _spawn(self) -> None:
        self.kill()
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  # closed by `kill`
        self._process = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors,
            text=True, start_new_session=True,  # so that compilers that it calls end with it
        )  # fmt: skip
        self._answers = queue.SimpleQueue()
        threading.Thread(
            target=_forward, args=(self._process.stdout, self._answers), daemon=True
        ).start()

    def _ask(self, limit: float, request: dict[str, Any]) -> dict[str, Any]:
        process = self._process
        assert process is not None and process.stdin is not None
        left = self.end - time.perf_counter()
        if left <= 0:
            raise WorkerDied("late", "there was no time left to ask")
        with contextlib.suppress(BrokenPipeError):  # a dead one is seen below
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
        try:
            line = self._answers.get(timeout=max(min(limit, left), 0.05))
        except queue.Empty:
            self.kill()
            if left < limit:
                raise WorkerDied("late", "the time was over before it answered") from None
            raise WorkerDied("hang", f"no answer within {limit:.1f} s, so it was killed") from None
        if line is None:
            code = process.wait()
            said = self._said()
            self.kill()
            raise WorkerDied("crash", _ending(code) + (f": {said}" if said else ""))
        reply: dict[str, Any] = json.loads(line)
        return reply

    def _said(self) -> str:
        """The last line on the worker's stderr."""
        if self._errors is None:
            return ""
        self._errors.seek(0)
        lines = self._errors.read().decode("utf-8", "replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "")[:300]

    def kill(self) -> None:
        """End the process, whatever it does, and those that it started."""
        if self._process is not None:
            if self._process.returncode is None and hasattr(os, "killpg"):
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(self._process.pid, signal.SIGKILL)
            self._process.kill()
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                with contextlib.suppress(OSError):
                    if pipe is not None:
                        pipe.close()
        if self._errors is not None:
            self._errors.close()
        self._process = self._errors = None
        self._ready = False


def _forward(pipe: IO[str] | None, answers: queue.SimpleQueue[str | None]) -> None:
    with contextlib.suppress(ValueError, OSError):  # closed under us
        for line in pipe or ():
            answers.put(line)
    answers.put(None)


def _ending(code: int) -> str:
    if code >= 0:
        return f"its process ended with code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    text = f"its process was killed by {name}"
    if code == -signal.SIGKILL:
        text += ", as the system does where memory runs out"
    return text


class WorkerMeasurer:
    """Measures in a child process, and compiles in some others.

    factory   "module:function" that gives the target and its runtime, in the worker
    compilers processes that compile at once, the one that measures among them; nothing is
              timed meanwhile
    """

    def __init__(
        self, target: str, variant: str = "", *, factory: str = STANDARD, compilers: int = 0
    ) -> None:
        self._child = Child(factory, target, variant)
        count = compilers or min(4, os.cpu_count() or 1)
        # the one that measures has nothing else to do while others compile
        others = [Child(factory, target, variant) for _ in range(count - 1)]
        self._compilers = [self._child, *others]

    def prepare(self, problem: Problem, end: float = math.inf) -> None:
        """Tell the workers."""
        self._child.tell(request_for(problem), end)
        for child in self._compilers[1:]:
            child.tell(request_for(problem.smallest), end)  # needs no inputs

    def compile(self, candidates: Sequence[Candidate], limit: float) -> dict[str, Outcome]:
        """Compile in parallel."""
        idle: queue.SimpleQueue[Child] = queue.SimpleQueue()
        for child in self._compilers:
            idle.put(child)

        def one(candidate: Candidate) -> Outcome | None:
            child, begin = idle.get(), time.perf_counter()
            try:
                reply = child.request(limit, "compile", candidate=candidate.as_dict())
            except WorkerDied as died:
                reply = {"ok": False, "kind": died.kind, "reason": f"compiling: {died}"}
            else:
                if reply["ok"]:
                    with contextlib.suppress(WorkerDied):  # found out when it is checked
                        child.request(_FIRST_LAUNCH, "launch", candidate=candidate.as_dict())
            finally:
                idle.put(child)
            return None if reply["ok"] else _failed(reply, time.perf_counter() - begin)

        with ThreadPoolExecutor(len(self._compilers)) as pool:
            outcomes = list(pool.map(one, candidates))
        return {c.id: o for c, o in zip(candidates, outcomes, strict=True) if o is not None}

    def measure(
        self, candidate: Candidate, against: Candidate | None, *, seconds: float, limit: float,
        prune: bool = True, expect: float | None = None, turns: int = 15,
    ) -> Outcome:  # fmt: skip
        """Measure in the child, in so many turns at most."""
        begin = time.perf_counter()
        try:
            reply = self._child.request(
                limit, "measure", candidate=candidate.as_dict(),
                against=against.as_dict() if against else None,
                seconds=seconds, prune=prune, expect=expect, rounds=turns,
            )  # fmt: skip
        except WorkerDied as died:
            reply = {"ok": False, "kind": died.kind, "reason": str(died)}
        spent = time.perf_counter() - begin
        if not reply["ok"]:
            if reply["kind"] != "compile":
                self._child.kill()  # what went wrong may have harmed more than itself
            return _failed(reply, spent)
        known = {name: value for name, value in reply.items() if name not in ("ok", "pruned")}
        status = PRUNED if reply["pruned"] else OK
        return Outcome.from_dict({"status": status, "spent": spent, **known})

    def bandwidth(self) -> float | None:
        """Measured in the child."""
        try:
            found = self._child.request(20, "bandwidth").get("bytes_per_s")
        except WorkerDied:
            return None
        return float(found) if found else None

    def close(self) -> None:
        """End the processes."""
        for child in self._compilers:
            child.kill()


def request_for(problem: Problem) -> dict[str, Any]:
    """A problem as workers are told it: with its format as that is described, as a worker knows
    only those that come with kernelgen."""
    return {"problem": base64.b64encode(pickle.dumps(problem)).decode()}


def _failed(reply: dict[str, Any], spent: float) -> Outcome:
    return Outcome(FAILED, reply["kind"], reply["reason"], spent=spent)

"""The search for the best candidate of a problem: Optuna asked and told, within a budget."""

from __future__ import annotations

import contextlib
import itertools
import platform
import random
import time
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import numpy as np

from kernelgen import __version__
from kernelgen.errors import TuningError
from kernelgen.targets.base import Runtime, Target
from kernelgen.tuner import cache, device, lookup, samplers, space
from kernelgen.tuner.cache import Entry, Key
from kernelgen.tuner.measure import FAILED, OK, PRUNED, Measurer, Outcome
from kernelgen.tuner.replay import Recorder
from kernelgen.tuner.space import Candidate, Problem
from kernelgen.tuner.storage import Trials, fastest
from kernelgen.tuner.worker import from_memory

#: budgets in seconds by name
EFFORTS = {"quick": 10.0, "normal": 60.0, "full": 600.0}

#: of the budget, kept for measuring the finalists against the default once more
_RESERVE = 0.2
_FINALISTS = 3

#: a winner must be so much faster than the default
_WORTH = 0.99
#: in more than this share of the turns
_USUALLY = 0.6

#: so close to the roofline there is nothing to find
_NEAR_ROOFLINE = 1.03

#: trials that give nothing new, after which the study picks itself
_CIRCLES = 12

#: a candidate may take so many seconds before it is killed, at least and at most
_PATIENCE = (2.0, 30.0)


@dataclass(frozen=True)
class Options:
    """How to search.

    budget     seconds for all of it
    max_error  RMS error that a result may have, besides what rounding allows
    storage    URL of one of Optuna's storages; None for a journal file in the cache folder, ""
               for memory
    resume     whether to go on with the trials of an earlier study
    write      whether the winner is written to the cache
    record     whether trials are recorded, for replay
    trials     most candidates to measure, or None
    prune      whether candidates that are clearly slower are given up early
    """

    budget: float = EFFORTS["normal"]
    sampler: str = samplers.DEFAULT
    seed: int = 0
    max_error: float | None = None
    storage: str | None = None
    resume: bool = False
    write: bool = True
    record: bool = True
    warm_start: bool = True
    batch: int = 2
    trials: int | None = None
    prune: bool = True


@dataclass(frozen=True)
class Status:
    """Where a study is: times in seconds."""

    problem: Problem
    tried: int
    failed: int
    space: int
    default: float | None
    best: float | None
    roofline: float | None
    left: float
    doing: str


@dataclass
class Report:
    """What a study found.

    trials     candidates and their outcomes, in the order in which they were tried
    default    the default's seconds, None where it failed
    best       the winner, None where nothing passed
    ratio      how many times faster than the default it is, measured in turns
    stopped    why the study ended
    """

    problem: Problem
    device: device.Device
    space: space.Space
    default: Candidate
    default_seconds: float | None = None
    best: Candidate | None = None
    seconds: float | None = None
    ratio: float | None = None
    roofline: float | None = None
    stopped: str = ""
    spent: float = 0.0
    trials: list[tuple[Candidate, Outcome]] = field(default_factory=list)
    values: dict[str, float] = field(default_factory=dict)
    entry: Entry | None = None
    path: str | None = None

    @property
    def failures(self) -> list[tuple[Candidate, Outcome]]:
        """Candidates that failed."""
        return [(c, o) for c, o in self.trials if o.status == FAILED]

    def value(self, candidate: Candidate) -> float | None:
        """Seconds of a candidate at the pace that the machine had when the study began: each was
        timed in turns with the best before it, and these ratios are multiplied up."""
        return self.values.get(candidate.id)

    def front(self) -> list[tuple[Candidate, Outcome]]:
        """Trials than which no other is both faster and more accurate, the fastest first."""
        found: list[tuple[Candidate, Outcome]] = []
        done = [(c, o) for c, o in self.trials if o.status == OK and o.rms_error is not None]
        for one, outcome in sorted(done, key=lambda pair: pair[1].seconds):
            if all(outcome.rms_error < o.rms_error for _, o in found):  # type: ignore[operator]
                found.append((one, outcome))
        return found


class Study:
    """One search."""

    def __init__(
        self,
        target: Target,
        runtime: Runtime,
        problem: Problem,
        measurer: Measurer,
        options: Options | None = None,
        progress: Callable[[Status], None] = lambda status: None,
        only: AbstractSet[str] | None = None,
    ) -> None:
        """`only`: ids of the candidates to choose from, for what was recorded on another device;
        by default all that are legal on this one."""
        self.options = options or Options()
        self._target, self._runtime, self._problem = target, runtime, problem
        self._measurer, self._progress = measurer, progress
        caps = runtime.capabilities()
        self._space = space.explore(target, caps, problem, only)
        if not self._space.legal:
            raise TuningError(
                f"{problem} has no legal configuration on this device: "
                + "; ".join(self._space.examples.values())
            )
        self._codec = samplers.Codec(self._space)
        default = space.default(target, caps, problem)
        if default.id not in self._space.by_id:  # a device smaller than what is assumed
            default = self._space.legal[0]
        self.report = Report(problem, device.of(target, runtime), self._space, default)
        self._hash = space.walk_hash(default.walk, problem.fmt, target)
        self._rng = random.Random(self.options.seed)
        self._done: dict[str, Outcome] = {}
        self._values = self.report.values
        self._best: Candidate | None = None
        self._patience = _PATIENCE[1]
        self._recorder: Recorder | None = None

    def run(self) -> Report:
        """Search until the budget is spent, everything was tried, the roofline is near, or the
        user interrupts; the winner is written to the cache.  The measurer can be used again; who
        made it closes it."""
        self._begin = time.perf_counter()
        self._end = self._begin + self.options.budget
        report = self.report
        try:
            self._set_up()
            self._search()
            self._final()
        except KeyboardInterrupt:
            report.stopped = "interrupted"
            with contextlib.suppress(KeyboardInterrupt):
                self._measurer.close()  # in the middle of something
        report.best = self._best
        if self._best is not None and report.seconds is None:
            report.seconds = self._values[self._best.id]
            if report.default_seconds is not None:
                report.ratio = report.default_seconds / report.seconds
        report.spent = time.perf_counter() - self._begin
        if self._best is not None:
            report.entry = self._entry()
            if self.options.write:
                report.path = str(cache.append(report.entry))
        return report

    # ---- before -------------------------------------------------------------------------------

    def _set_up(self) -> None:
        self._say("making inputs")
        problem, options = self._problem, self.options
        self._measurer.prepare(problem)
        name = "-".join(
            [self._target.name, self.report.device.name, self.report.device.isa, problem.op,
             problem.fmt.name, problem.precision, "x".join(map(str, problem.shape)), self._hash]
        ).replace(" ", "_").replace("/", "_")  # fmt: skip
        about = {
            "target": self._target.name, "op": problem.op, "format": problem.fmt.name,
            "precision": problem.precision, "shape": problem.shape, "hash": self._hash,
            "device": vars(self.report.device), "space": len(self._space.legal),
        }  # fmt: skip
        self._trials = Trials(name, options.storage, options.resume, options.sampler, options.seed)
        if options.record:
            stamp = f"{datetime.now(UTC):%Y%m%dT%H%M%S}"
            place = cache.root() / "trials" / f"{name[:150]}-{stamp}.jsonl"
            self._recorder = Recorder(place, about)
        for text, outcome in self._trials.known():
            if text in self._space.by_id:
                self._note(self._space.by_id[text], outcome)
        nbytes = problem.n * problem.fmt.row_bytes(problem.k)
        if from_memory(nbytes):
            wide = fastest(self.report.device) or self._bandwidth()
            self.report.roofline = nbytes / wide if wide else None
        default = self.report.default
        if default.id not in self._done:
            self._measurer.compile([default], _PATIENCE[1])
            self._try(default, self._trial_of(default), patience=_PATIENCE[1])
        first = self._done[default.id]
        if first.status != FAILED:
            self.report.default_seconds = first.seconds
            lo, hi = _PATIENCE
            self._patience = min(hi, max(lo, 3 * first.spent + self._slice))
        if options.warm_start:
            for one in self._neighbours():
                self._trials.enqueue(self._codec.parameters(one))

    def _neighbours(self) -> list[Candidate]:
        """What won in similar problems."""
        found: dict[str, Candidate] = {}
        for one in lookup.search(self._target, self._runtime, self._problem):
            if one.candidate is not None:
                found.setdefault(one.candidate.id, one.candidate)
        for entry in reversed(cache.entries()):
            if entry.key.target == self._target.name and entry.key.op == self._problem.op:
                for one_walk in space.walks(self._target, self._problem):
                    if one_walk.name == entry.walk:
                        with contextlib.suppress(ValueError, TypeError):
                            config = one_walk.config.from_dict(entry.config)
                            candidate = Candidate(one_walk, config)
                            found.setdefault(candidate.id, candidate)
        return [c for name, c in found.items() if name in self._space.by_id][:4]

    # ---- meanwhile ----------------------------------------------------------------------------

    @property
    def _slice(self) -> float:
        """Seconds for which a candidate is timed."""
        return min(0.6, max(0.08, self.options.budget / 60))

    def _left(self) -> float:
        reserve = _RESERVE * self.options.budget
        return self._end - reserve - time.perf_counter()

    def _search(self) -> None:
        most = self.options.trials
        while not self._over():
            batch: list[tuple[Any, Candidate]] = []
            for _ in range(self.options.batch if most is None else 1):
                picked = self._ask({one.id for _, one in batch})
                if picked is not None:
                    batch.append(picked)
            if not batch:
                self.report.stopped = "everything was tried"
                return
            self._say("compiling")
            failed = self._measurer.compile(
                [one for _, one in batch], min(_PATIENCE[1], max(self._left(), 1.0))
            )
            for trial, one in batch:
                if one.id in failed:
                    if self._left() > 0:
                        self._tell(trial, one, failed[one.id])
                elif self._over():
                    return
                else:
                    self._try(one, trial)

    def _over(self) -> bool:
        """Whether to stop, and why."""
        report, most = self.report, self.options.trials
        if self._left() <= 0:
            report.stopped = "the budget is spent"
        elif most is not None and len(self._done) >= most:
            report.stopped = f"{most} candidates were tried"
        elif (
            self._best is not None
            and report.roofline
            and self._values[self._best.id] <= report.roofline * _NEAR_ROOFLINE
        ):
            # measured once for the device, perhaps while others worked on it: ask again
            wide = self._bandwidth()
            if wide:
                problem = self._problem
                report.roofline = problem.n * problem.fmt.row_bytes(problem.k) / wide
            if self._values[self._best.id] <= report.roofline * _NEAR_ROOFLINE:
                report.stopped = "the roofline is reached"
        return bool(report.stopped)

    def _bandwidth(self) -> float | None:
        """Measured now, and remembered as the device's if no faster one is known."""
        return fastest(self.report.device, self._measurer.bandwidth())

    def _ask(self, taken: set[str]) -> tuple[Any, Candidate] | None:
        """A trial for a candidate that was not measured yet; None where there is none."""
        taken = taken | set(self._done) | self._trials.elsewhere()
        rest = [one for one in self._space.legal if one.id not in taken]
        if not rest:
            return None
        greedy = self.options.sampler == "greedy" and self._best is not None
        for attempt in itertools.count():
            # after a while: the sampler goes in circles, as it does where little is left
            if greedy or attempt >= _CIRCLES:
                one = self._codec.pick(self._best, rest, self._rng)
                self._trials.enqueue(self._codec.parameters(one))
            trial = self._trials.ask()
            picked = self._codec.suggest(trial)
            if picked is None:
                self._trials.skip(trial, "not legal")
            elif picked.id in taken:
                known = self._done.get(picked.id)
                self._trials.repeat(trial, known, self._values.get(picked.id))
            else:
                self._trials.start(trial, picked.id)
                return trial, picked
            if attempt > 2 * _CIRCLES and time.perf_counter() > self._end:
                break
        return None

    def _trial_of(self, one: Candidate) -> Any:
        """A trial of this very candidate."""
        self._trials.enqueue(self._codec.parameters(one))
        while True:
            trial = self._trials.ask()
            picked = self._codec.suggest(trial)
            if picked is not None and picked.id == one.id:
                self._trials.start(trial, one.id)
                return trial
            self._trials.skip(trial, "left from before")

    def _try(self, one: Candidate, trial: Any, patience: float | None = None) -> None:
        self._say(str(one))
        # beyond the budget nothing is waited for, and what did not end says nothing
        left = patience or max(0.3, self._end - time.perf_counter())
        outcome = self._measurer.measure(
            one, self._best, seconds=self._slice, limit=min(self._patience, left),
            max_error=self.options.max_error, prune=self.options.prune,
            expect=self._values[self._best.id] if self._best else None,
        )  # fmt: skip
        if outcome.kind == "hang" and left < self._patience:
            self._trials.skip(trial, "the budget ended")
            return
        self._tell(trial, one, outcome)

    def _tell(self, trial: Any, one: Candidate, outcome: Outcome) -> None:
        self._note(one, outcome)
        self._trials.tell(trial, outcome, self._values.get(one.id))
        if self._recorder is not None:
            self._recorder.add(one, outcome)

    def _note(self, one: Candidate, outcome: Outcome) -> None:
        """Remember an outcome, and who is best."""
        self._done[one.id] = outcome
        self.report.trials.append((one, outcome))
        if outcome.status == FAILED:
            return
        # relative to the best, which ran in turns with it: the machine may have changed its pace
        ratio, best = outcome.ratio, self._best
        value = outcome.seconds if ratio is None or best is None else ratio * self._values[best.id]
        self._values[one.id] = value
        if outcome.status == OK and (best is None or value < self._values[best.id]):
            self._best = one

    def _say(self, doing: str) -> None:
        report, best = self.report, self._best
        failed = sum(o.status == FAILED for o in self._done.values())
        self._progress(
            Status(
                self._problem, len(self._done), failed, len(self._space.legal),
                report.default_seconds, self._values[best.id] if best else None, report.roofline,
                max(0.0, self._end - time.perf_counter()), doing,
            )
        )  # fmt: skip

    # ---- after --------------------------------------------------------------------------------

    def _ranked(self) -> list[Candidate]:
        done = [n for n, o in self._done.items() if o.status == OK and n in self._values]
        return [self._space.by_id[n] for n in sorted(done, key=lambda name: self._values[name])]

    def _final(self) -> None:
        """Measure the first few against the default once more: the best of many noisy times is
        partly luck."""
        report, default = self.report, self.report.default
        ranked = [one for one in self._ranked() if one.id != default.id][:_FINALISTS]
        if report.default_seconds is None or not ranked:
            return
        results: list[tuple[float, Outcome, Candidate]] = []
        for place, one in enumerate(ranked):
            left = self._end - time.perf_counter()
            if place and left < 0.2:
                break
            self._say(f"final: {one}")
            share = max(0.15, left / (len(ranked) - place) * 0.7)
            outcome = self._measurer.measure(
                one,
                default,
                seconds=share,
                limit=max(share + self._patience, 1.0),
                max_error=self.options.max_error,
                prune=False,
            )
            if outcome.status == OK and outcome.ratio is not None:
                results.append((outcome.ratio, outcome, one))
        if not results:
            return
        ratio, outcome, winner = min(results, key=lambda one: one[0])
        report.default_seconds = outcome.seconds / ratio
        if ratio < _WORTH and outcome.faster > _USUALLY:
            self._best, report.seconds, report.ratio = winner, outcome.seconds, 1 / ratio
        else:
            self._best, report.seconds, report.ratio = default, report.default_seconds, 1.0

    def _entry(self) -> Entry:
        import optuna

        report, best, problem = self.report, self.report.best, self._problem
        assert best is not None and report.seconds is not None
        outcome = self._done[best.id]
        key = Key(
            problem.op, problem.fmt.name, problem.precision, self._target.name, *problem.shape,
            report.device, space.walk_hash(best.walk, problem.fmt, self._target),
        )  # fmt: skip
        second = next((one for one in self._ranked() if one.id != best.id), None)
        return Entry(
            key, best.walk.name, best.precision, best.config.as_dict(), report.seconds,
            tuple(outcome.samples[:32]),
            _said(report.default, report.default_seconds),
            _said(second, self._values[second.id]) if second else None,
            outcome.error, outcome.bound, outcome.rms_error, report.roofline,
            tuple({**_said(c, o.seconds), "rms_error": o.rms_error} for c, o in report.front()),
            len(report.trials), len(report.failures), report.spent,
            {"kernelgen": __version__, "python": platform.python_version(),
             **{m.__name__: m.__version__ for m in (np, optuna)}},
            datetime.now(UTC).isoformat(timespec="seconds"), platform.node(),
        )  # fmt: skip


def _said(one: Candidate, seconds: float | None) -> dict[str, Any]:
    return {
        "walk": one.walk.name, "precision": one.precision, "config": one.config.as_dict(),
        "seconds": seconds,
    }  # fmt: skip


def summary(reports: Iterable[Report]) -> Mapping[str, Any]:
    """What a program wants to know of studies: ratios, and their geometric mean."""
    ratios = {str(r.problem): r.ratio for r in reports if r.ratio}
    mean = float(np.exp(np.mean(np.log(list(ratios.values()))))) if ratios else None
    return {"ratios": ratios, "geometric_mean": mean}


__all__ = ["EFFORTS", "FAILED", "OK", "PRUNED", "Options", "Report", "Status", "Study", "summary"]

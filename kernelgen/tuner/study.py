"""The search for the best candidate of a problem: Optuna asked and told, within a budget."""

from __future__ import annotations

import contextlib
import platform
import time
from collections.abc import Callable
from collections.abc import Set as AbstractSet
from datetime import UTC, datetime
from typing import Any

import numpy as np

from kernelgen import __version__
from kernelgen.errors import TuningError
from kernelgen.targets.base import Runtime, Target
from kernelgen.tuner import cache, device, lookup, samplers, space
from kernelgen.tuner.cache import Entry, Key
from kernelgen.tuner.measure import FAILED, OK, PRUNED, Measurer, Outcome
from kernelgen.tuner.pickers import PICKERS, Greedy
from kernelgen.tuner.problems import Problem
from kernelgen.tuner.replay import Recorder
from kernelgen.tuner.report import EFFORTS, Options, Report, Status, summary
from kernelgen.tuner.space import Candidate
from kernelgen.tuner.storage import Trials, fastest
from kernelgen.tuner.worker import from_memory

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

#: seconds between two looks at what others do
_POLL = 0.1


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
        self._hash = space.walk_hash(default.walk, problem.like, target)
        picker = PICKERS.get(self.options.sampler)
        seed = self.options.seed
        self._picker = picker(self._space, default, seed) if picker else None
        self._fallback = Greedy(self._space, default, seed)
        self._queue: list[Candidate] = []
        self._done: dict[str, Outcome] = {}
        self._values = self.report.values
        self._best: Candidate | None = None
        self._goal = problem.objective
        self._patience = _PATIENCE[1]
        self._recorder: Recorder | None = None

    def run(self) -> Report:
        """Search until the budget is spent, everything was tried, the roofline is near, or the
        user interrupts; the winner is written to the cache.  The measurer can be used again; who
        made it closes it."""
        self._begin = time.perf_counter()
        self._end = self._begin + self.options.budget
        report, options = self.report, self.options
        self._trials = Trials(
            self._name(), options.storage, options.resume, options.sampler, options.seed
        )
        try:
            self._set_up()
            self._search()
            self._final()
        except KeyboardInterrupt:
            report.stopped = "interrupted"
            with contextlib.suppress(KeyboardInterrupt):
                self._measurer.close()  # in the middle of something
        finally:
            self._trials.close()
        report.best = self._best
        if self._best is not None and report.cost is None:
            report.cost = self._values[self._best.id]
            if report.default_cost is not None:
                report.ratio = report.default_cost / report.cost
        report.spent = time.perf_counter() - self._begin
        if self._best is not None:
            report.entry = self._entry()
            if self.options.write:
                report.path = str(cache.append(report.entry))
        return report

    # ---- before -------------------------------------------------------------------------------

    def _name(self) -> str:
        """The study's: processes that give it the same name share trials."""
        problem, about = self._problem, self.report.device
        gate = "" if problem.max_error is None else f"error-{problem.max_error:g}"
        goal = "" if problem.objective == "time" else problem.objective
        shape = "x".join(map(str, problem.shape))
        parts = (
            self._target.name, about.name, about.isa, problem.op, problem.name,
            problem.precision, gate, goal, shape, self._hash,
        )  # fmt: skip
        return "-".join(filter(None, parts)).replace(" ", "_").replace("/", "_")

    def _set_up(self) -> None:
        self._say("making inputs")
        problem, options, about = self._problem, self.options, self.report.device
        self._measurer.prepare(problem, self._end)
        if options.record:
            stamp = f"{datetime.now(UTC):%Y%m%dT%H%M%S}"
            place = cache.root() / "trials" / f"{self._name()[:150]}-{stamp}.jsonl"
            self._recorder = Recorder(
                place,
                {
                    "target": self._target.name, "op": problem.op, "format": problem.name,
                    "precision": problem.precision, "shape": problem.shape, "hash": self._hash,
                    "max_error": problem.max_error, "device": vars(about),
                    "space": len(self._space.legal),
                },
            )  # fmt: skip
        self._measure_default()
        if self._left() > 0:
            self._find_roofline()
        if options.warm_start:
            self._queue = self._neighbours()

    def _measure_default(self) -> None:
        """First of all, so that there is something to compare with."""
        default, report = self.report.default, self.report
        while True:
            self._learn()
            if default.id in self._done or self._end <= time.perf_counter():
                break
            if default.id in self._trials.elsewhere():
                time.sleep(_POLL)
                continue
            trial = self._trials.ask(self._codec.parameters(default))
            self._codec.suggest(trial)
            if self._trials.claim(trial, default.id):
                self._measurer.compile([default], _PATIENCE[1])
                self._try(default, trial, self._end)
        first = self._done.get(default.id)
        if first is None:
            report.stopped = "the budget ended before the default was measured: give more"
        elif first.status != FAILED:
            report.default_cost = self._values[default.id]
            lo, hi = _PATIENCE
            self._patience = min(hi, max(lo, 3 * first.spent + self._slice))

    def _find_roofline(self) -> None:
        nbytes = self._problem.nbytes
        if from_memory(nbytes) and self._goal == "time":
            wide = fastest(self.report.device) or self._bandwidth()
            self.report.roofline = nbytes / wide if wide else None

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
        """Seconds left to search in."""
        return self._end - _RESERVE * self.options.budget - time.perf_counter()

    def _search(self) -> None:
        most = self.options.trials
        while not self._over():
            batch: dict[str, tuple[Any, Candidate]] = {}
            for _ in range(self.options.batch if most is None else 1):
                picked = self._ask(batch.keys())
                if picked is not None:
                    batch[picked[1].id] = picked
            if not batch:
                if not self._over():
                    self.report.stopped = "everything was tried"
                return
            self._say("compiling")
            limit = min(_PATIENCE[1], max(self._left(), 0.3))
            failed = self._measurer.compile([one for _, one in batch.values()], limit)
            for trial, one in batch.values():
                outcome = failed.get(one.id)
                if self._over() or (outcome is not None and outcome.kind == "late"):
                    self._trials.skip(trial, "the budget ended")
                elif outcome is not None:
                    self._tell(trial, one, outcome)
                else:
                    self._try(one, trial, self._end - _RESERVE * self.options.budget)

    def _over(self) -> bool:
        """Whether to stop, and why."""
        report, most = self.report, self.options.trials
        if report.stopped:
            return True
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
                report.roofline = self._problem.nbytes / wide
            if self._values[self._best.id] <= report.roofline * _NEAR_ROOFLINE:
                report.stopped = "the roofline is reached"
        return bool(report.stopped)

    def _bandwidth(self) -> float | None:
        """Measured now, and remembered as the device's if no faster one is known."""
        return fastest(self.report.device, self._measurer.bandwidth())

    def _learn(self) -> None:
        """What was measured before, and what others who share the study have measured since."""
        for known in self._trials.news():
            if known.candidate in self._space.by_id and known.candidate not in self._done:
                self._note(self._space.by_id[known.candidate], known.outcome, known.value)

    def _ask(self, taken: AbstractSet[str]) -> tuple[Any, Candidate] | None:
        """A trial for a candidate that nobody has measured; None where there is none, or no time.
        `taken`: what this process is about to measure."""
        while self._left() > 0:
            self._learn()
            elsewhere = self._trials.elsewhere()
            mine = self._done.keys() | taken
            rest = [one for one in self._space.legal if one.id not in mine | elsewhere]
            if rest:
                trial, picked = self._draw(rest, taken)
                if self._trials.claim(trial, picked.id):
                    return trial, picked
            elif taken or not elsewhere:
                return None
            else:  # should they die, what they have is to be measured here
                self._say("waiting for others")
                time.sleep(_POLL)
        return None

    def _draw(self, rest: list[Candidate], taken: AbstractSet[str]) -> tuple[Any, Candidate]:
        """A trial for one of the rest."""
        among = {one.id for one in rest}
        queued = next((one for one in self._queue if one.id in among), None)
        failed = [name for name, o in self._done.items() if o.status == FAILED]
        if queued is None and self._picker is not None:
            queued = self._picker.pick(self._values, failed, taken, rest)
        attempt = 0
        while queued is None:
            trial = self._trials.ask()
            picked = self._codec.suggest(trial)
            if picked is not None and picked.id in among:
                return trial, picked
            if picked is None:
                self._trials.skip(trial, "not legal")
            else:
                known = self._done.get(picked.id)
                self._trials.repeat(trial, known, self._values.get(picked.id))
            attempt += 1
            if attempt >= _CIRCLES:  # the sampler goes in circles, as it does where little is left
                queued = self._fallback.pick(self._values, failed, taken, rest)
        trial = self._trials.ask(self._codec.parameters(queued))
        self._codec.suggest(trial)
        return trial, queued

    def _try(self, one: Candidate, trial: Any, end: float) -> None:
        """Measure a candidate.  After `end` nothing is waited for, and what has not ended by then
        says nothing."""
        self._say(str(one))
        if not self._trials.alive(trial):
            return
        limit = min(self._patience, max(0.3, end - time.perf_counter()))
        outcome = self._measurer.measure(
            one, self._best, seconds=self._slice, limit=limit, prune=self.options.prune,
            expect=self._values[self._best.id] if self._best and self._goal == "time" else None,
        )  # fmt: skip
        if outcome.kind == "late" or (outcome.kind == "hang" and limit < self._patience):
            self._trials.skip(trial, "the budget ended")
        else:
            self._tell(trial, one, outcome)

    def _tell(self, trial: Any, one: Candidate, outcome: Outcome) -> None:
        self._note(one, outcome)
        self._trials.tell(trial, outcome, self._values.get(one.id))
        if self._recorder is not None:
            self._recorder.add(one, outcome)

    def _note(self, one: Candidate, outcome: Outcome, value: float | None = None) -> None:
        """Remember an outcome, and who is best; `value`: seconds, where they are known."""
        self._done[one.id] = outcome
        self.report.trials.append((one, outcome))
        if outcome.status == FAILED:
            return
        # relative to the best, which ran in turns with it: the machine may have changed its pace
        ratio, best = outcome.ratio(self._goal), self._best
        if value is None:
            value = outcome.cost(self._goal)
            if ratio is not None and best is not None:
                value = ratio * self._values[best.id]
        self._values[one.id] = value
        if outcome.status == OK and (best is None or value < self._values[best.id]):
            self._best = one

    def _say(self, doing: str) -> None:
        report, best = self.report, self._best
        failed = sum(o.status == FAILED for o in self._done.values())
        self._progress(
            Status(
                self._problem, len(self._done), failed, len(self._space.legal),
                report.default_cost, self._values[best.id] if best else None, report.roofline,
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
        if report.default_cost is None or not ranked:
            return
        results: list[tuple[float, Outcome, Candidate]] = []
        for place, one in enumerate(ranked):
            left = self._end - time.perf_counter()
            if left < 0.2:
                break
            self._say(f"final: {one}")
            share = left / (len(ranked) - place) * 0.7
            outcome = self._measurer.measure(
                one, default, seconds=share, limit=share + self._patience, prune=False
            )
            ratio = outcome.ratio(self._goal) if outcome.status == OK else None
            if ratio is not None:
                results.append((ratio, outcome, one))
        if not results:
            return
        ratio, outcome, winner = min(results, key=lambda one: one[0])
        cost = outcome.cost(self._goal)
        report.default_cost = cost / ratio
        if ratio < _WORTH and outcome.better(self._goal) > _USUALLY:
            self._best, report.cost, report.ratio = winner, cost, 1 / ratio
        else:
            self._best, report.cost, report.ratio = default, report.default_cost, 1.0

    def _joules(self, outcome: Outcome) -> float | None:
        if self._goal == "energy":
            return self.report.cost
        return outcome.cost("energy") if outcome.joules else None

    def _entry(self) -> Entry:
        import optuna

        report, best, problem = self.report, self.report.best, self._problem
        assert best is not None and report.cost is not None
        outcome, goal = self._done[best.id], self._goal
        key = Key(
            problem.op, problem.name, problem.precision, self._target.name,
            tuple(problem.sizes.items()), report.device,
            space.walk_hash(best.walk, problem.like, self._target),
            problem.objective, problem.max_error,
        )  # fmt: skip
        second = next((one for one in self._ranked() if one.id != best.id), None)
        return Entry(
            key, best.walk.name, best.precision, best.config.as_dict(),
            report.cost if goal == "time" else outcome.seconds,
            outcome.samples[:32],
            _said(report.default, report.default_cost, goal),
            _said(second, self._values[second.id], goal) if second else None,
            outcome.error, outcome.bound, outcome.rms_error, report.roofline,
            tuple(
                {**_said(c, o.cost(goal), goal), "rms_error": o.rms_error}
                for c, o in report.front()
            ),
            len(report.trials), len(report.failures), report.spent,
            {"kernelgen": __version__, "python": platform.python_version(),
             **{m.__name__: m.__version__ for m in (np, optuna)}},
            datetime.now(UTC).isoformat(timespec="seconds"), platform.node(),
            clock=outcome.clock, joules=self._joules(outcome),
        )  # fmt: skip


def _said(one: Candidate, cost: float | None, goal: str) -> dict[str, Any]:
    return {
        "walk": one.walk.name, "precision": one.precision, "config": one.config.as_dict(),
        "seconds" if goal == "time" else "joules": cost,
    }  # fmt: skip


__all__ = ["EFFORTS", "FAILED", "OK", "PRUNED", "Options", "Report", "Status", "Study", "summary"]

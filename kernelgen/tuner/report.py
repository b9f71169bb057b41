"""What a search is asked for, what it says meanwhile, and what it found."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kernelgen.tuner import device, samplers, space
from kernelgen.tuner.cache import Entry
from kernelgen.tuner.measure import FAILED, OK, Outcome
from kernelgen.tuner.problems import Problem
from kernelgen.tuner.space import Candidate

#: budgets in seconds by name
EFFORTS = {"quick": 10.0, "normal": 60.0, "full": 600.0}


@dataclass(frozen=True)
class Options:
    """How to search.

    budget     seconds for all of it
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
    default    the default; its cost, in seconds or joules, is None where it failed
    best       the winner, None where nothing passed
    ratio      how many times faster than the default it is, measured in turns
    stopped    why the study ended
    """

    problem: Problem
    device: device.Device
    space: space.Space
    default: Candidate
    default_cost: float | None = None
    best: Candidate | None = None
    cost: float | None = None
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
        """Cost of a candidate at the pace that the machine had when the study began: each was
        timed in turns with the best before it, and these ratios are multiplied up."""
        return self.values.get(candidate.id)

    def front(self) -> list[tuple[Candidate, Outcome]]:
        """Trials than which no other is both faster and more accurate, the fastest first."""
        found: list[tuple[Candidate, Outcome]] = []
        done = [(c, o) for c, o in self.trials if o.status == OK and o.rms_error is not None]
        goal = self.problem.objective
        for one, outcome in sorted(done, key=lambda pair: pair[1].cost(goal)):
            if all(outcome.rms_error < o.rms_error for _, o in found):  # type: ignore[operator]
                found.append((one, outcome))
        return found


def summary(reports: Iterable[Report]) -> Mapping[str, Any]:
    """What a program wants to know of studies: ratios, and their geometric mean."""
    found = [(f"{r.problem} on {r.device.name}", r.ratio) for r in reports if r.ratio]
    mean = float(np.exp(np.mean(np.log([ratio for _, ratio in found])))) if found else None
    return {"ratios": dict(found), "count": len(found), "geometric_mean": mean}


def amount(cost: float | None, objective: str = "time", unknown: str = "") -> str:
    """Seconds or joules, for people."""
    return unknown if cost is None else f"{cost * 1e3:.3f} {'ms' if objective == 'time' else 'mJ'}"

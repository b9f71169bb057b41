"""Optuna's samplers by the names that users say, and how candidates are parameters there."""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

from kernelgen.errors import TuningError
from kernelgen.tuner import space
from kernelgen.tuner.space import Candidate, Space

DEFAULT = "tpe"
NAMES = ("tpe", "gp", "cmaes", "nsga2", "qmc", "random", "greedy")

#: random trials before a model is made of them
_STARTUP = 8


def make(name: str, seed: int) -> Any:
    """An Optuna sampler.  "greedy" is none of Optuna's: the study asks for neighbours itself, and
    the sampler serves until there is a best."""
    import optuna

    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    samplers = optuna.samplers
    makers: dict[str, Any] = {
        "tpe": lambda: samplers.TPESampler(
            seed=seed, n_startup_trials=_STARTUP, multivariate=True, group=True
        ),
        "gp": lambda: samplers.GPSampler(seed=seed, n_startup_trials=_STARTUP),
        "cmaes": lambda: samplers.CmaEsSampler(
            seed=seed, n_startup_trials=_STARTUP, warn_independent_sampling=False
        ),
        "nsga2": lambda: samplers.NSGAIISampler(seed=seed, population_size=10),
        "qmc": lambda: samplers.QMCSampler(seed=seed, warn_independent_sampling=False),
        "random": lambda: samplers.RandomSampler(seed=seed),
        "greedy": lambda: samplers.RandomSampler(seed=seed),
    }
    if name not in makers:
        raise TuningError(f"sampler {name!r} was asked for; known are {', '.join(NAMES)}")
    return makers[name]()


class Codec:
    """Candidates of a space as Optuna's parameters, and back.

    Numbers become their position among the values, so that neighbours are near; a trial's user
    attributes have the values themselves.
    """

    def __init__(self, legal: Space) -> None:
        self.space = legal
        self._values = space.parameters(legal)
        self._of = {one.id: space.values_of(legal, one) for one in legal.legal}
        self._back = {_frozen(values): legal.by_id[name] for name, values in self._of.items()}
        walks = {one.walk.name: self._of[one.id] for one in legal.legal}
        self._names = {walk: [n for n in values if n != "walk"] for walk, values in walks.items()}

    def suggest(self, trial: Any) -> Candidate | None:
        """The candidate that a trial stands for; None where that is not legal."""
        walk = trial.suggest_categorical("walk", self._values["walk"])
        values = {"walk": walk}
        for name in self._names[walk]:
            known = self._values[name]
            if _ordered(known):
                values[name] = known[trial.suggest_int(_index(name), 0, len(known) - 1)]
            else:
                values[name] = trial.suggest_categorical(name, known)
        return self._back.get(_frozen(values))

    def parameters(self, candidate: Candidate) -> dict[str, Any]:
        """A candidate as what a trial would suggest for it."""
        result = {}
        for name, value in self._of[candidate.id].items():
            known = self._values[name]
            ordered = name != "walk" and _ordered(known)
            result[_index(name) if ordered else name] = known.index(value) if ordered else value
        return result

    def neighbours(self, best: Candidate, among: Iterable[Candidate]) -> list[Candidate]:
        """Those that are nearest to the best."""
        mine = self._of[best.id]
        far = {one.id: space.distance(mine, self._of[one.id]) for one in among}
        nearest = min(far.values(), default=0.0)
        return [self.space.by_id[name] for name, value in far.items() if value <= nearest]

    def pick(self, best: Candidate | None, among: list[Candidate], rng: random.Random) -> Candidate:
        """One of the nearest neighbours of the best, or of all where there is no best."""
        return rng.choice(self.neighbours(best, among) if best else among)


def _ordered(values: list[Any]) -> bool:
    return len(values) > 2 and all(type(v) is int for v in values)


def _index(name: str) -> str:
    return f"{name}, position"


def _frozen(values: Mapping[str, Any]) -> frozenset[tuple[str, Any]]:
    return frozenset(values.items())

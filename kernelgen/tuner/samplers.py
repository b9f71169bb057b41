"""Samplers by the names that users say, and how candidates are parameters in Optuna's studies."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from kernelgen.errors import TuningError
from kernelgen.tuner import space
from kernelgen.tuner.pickers import PICKERS
from kernelgen.tuner.space import Candidate, Space

DEFAULT = "model"
#: those of kernelgen.tuner.pickers, then Optuna's
NAMES = (*PICKERS, "tpe", "gp", "cmaes", "nsga2", "qmc", "random")

#: random trials before a model is made of them
_STARTUP = 8


def check(name: str) -> None:
    """Raises TuningError where no sampler has that name."""
    if name not in NAMES:
        raise TuningError(f"sampler {name!r} was asked for; known are {', '.join(NAMES)}")


def make(name: str, seed: int) -> Any:
    """An Optuna sampler that can be told what to suggest, by its attribute `told`: as it is for
    every trial where a picker decides.  Else it suggests what the one of that name does."""
    import optuna

    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    samplers = optuna.samplers
    makers: dict[str, Any] = {
        "tpe": lambda: samplers.TPESampler(
            seed=seed, n_startup_trials=_STARTUP, multivariate=True, group=True
        ),
        "gp": lambda: samplers.GPSampler(
            seed=seed, n_startup_trials=_STARTUP, warn_independent_sampling=False
        ),
        "cmaes": lambda: samplers.CmaEsSampler(
            seed=seed, n_startup_trials=_STARTUP, warn_independent_sampling=False
        ),
        "nsga2": lambda: samplers.NSGAIISampler(seed=seed, population_size=10),
        "qmc": lambda: samplers.QMCSampler(seed=seed, warn_independent_sampling=False),
        "random": lambda: samplers.RandomSampler(seed=seed),
    }
    check(name)
    inner = makers.get(name, makers["random"])()

    class Told(samplers.BaseSampler):
        """Suggests `told` where that is set."""

        told: Mapping[str, Any] | None = None

        def infer_relative_search_space(self, study: Any, trial: Any) -> Any:
            if self.told is not None:
                return {}
            return inner.infer_relative_search_space(study, trial)

        def sample_relative(self, study: Any, trial: Any, search_space: Any) -> Any:
            if self.told is not None:
                return {}
            return inner.sample_relative(study, trial, search_space)

        def sample_independent(self, study: Any, trial: Any, name: str, among: Any) -> Any:
            if self.told is not None:
                return self.told[name]
            return inner.sample_independent(study, trial, name, among)

        def before_trial(self, study: Any, trial: Any) -> None:
            inner.before_trial(study, trial)

        def after_trial(self, study: Any, trial: Any, state: Any, values: Any) -> None:
            inner.after_trial(study, trial, state, values)

    return Told()


class Codec:
    """Candidates of a space as Optuna's parameters, and back.

    Numbers become their position among the values, so that neighbours are near; a trial's user
    attributes have the values themselves.
    """

    def __init__(self, legal: Space) -> None:
        self._values = space.parameters(legal)
        self._of = {one.id: space.values_of(one) for one in legal.legal}
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


def _ordered(values: list[Any]) -> bool:
    return len(values) > 2 and all(type(v) is int for v in values)


def _index(name: str) -> str:
    return f"{name}, position"


def _frozen(values: Mapping[str, Any]) -> frozenset[tuple[str, Any]]:
    return frozenset(values.items())

"""Searches of our own, where Optuna's samplers know less: what to measure next.

A space is small enough to be listed, so that a picker scores every candidate that is left.  Both
begin with the default, which was chosen by reasoning.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from kernelgen.tuner import space
from kernelgen.tuner.space import Candidate, Space

Floats = npt.NDArray[np.float64]
Places = npt.NDArray[np.intp]

#: how much alike two settings are that are one step of a factor of two apart, or not ordered
_STEP, _OTHER = 0.6, 0.35
#: variance of log time that parameters explain one by one, each, and together
_ALONE, _TOGETHER = 0.2, 0.05
#: how much worse in log time a candidate is expected to be for each step away from the default
_SLOPE = 0.05
#: of a measurement, in log time
_NOISE = 0.02**2


class Greedy:
    """The nearest neighbours of the best, in random order."""

    def __init__(self, legal: Space, default: Candidate, seed: int) -> None:
        self._of = {one.id: space.values_of(one) for one in legal.legal}
        self._rng = random.Random(seed)

    def pick(
        self, values: Mapping[str, float], failed: Iterable[str], taken: Iterable[str],
        rest: Sequence[Candidate],
    ) -> Candidate:  # fmt: skip
        """One of the rest.  By their ids: `values` are seconds, `taken` is under way."""
        if not values:
            return self._rng.choice(rest)
        mine = self._of[min(values, key=lambda name: values[name])]
        far = [space.distance(mine, self._of[one.id]) for one in rest]
        nearest = min(far)
        return self._rng.choice([o for o, f in zip(rest, far, strict=True) if f <= nearest])


class Model:
    """A Gaussian process over log time, and the candidate of largest expected improvement.

    It says what is known of kernels before any is measured.  The default was chosen by reasoning,
    so that candidates are expected to be worse the further they are from it.  Each parameter has
    an effect of its own, and near numbers are alike on a logarithmic scale, so that a few trials
    tell about all candidates that share a setting with them.
    """

    def __init__(self, legal: Space, default: Candidate, seed: int) -> None:
        self._rng = np.random.default_rng(seed)
        mine = space.values_of(default)
        far = [space.distance(mine, space.values_of(one)) for one in legal.legal]
        self._expected = _SLOPE * np.array(far)
        self._place = {one.id: n for n, one in enumerate(legal.legal)}
        self._alike = [np.asarray(one) for one in _alike(legal.legal)]

    def pick(
        self, values: Mapping[str, float], failed: Iterable[str], taken: Iterable[str],
        rest: Sequence[Candidate],
    ) -> Candidate:  # fmt: skip
        """One of the rest.  By their ids: `values` are seconds, `taken` is under way."""
        logs = {name: math.log(value) for name, value in values.items()}
        worst = max(logs.values(), default=0.0)
        logs |= dict.fromkeys(failed, worst)  # whatever is like them is worth less
        if not logs:
            return rest[int(self._rng.integers(len(rest)))]
        seen = np.array([self._place[name] for name in logs])
        y = np.array(list(logs.values()))
        waiting = np.array([self._place[name] for name in taken], dtype=np.intp)
        if len(waiting):  # as if they were what is expected of them
            y = np.append(y, self._predict(seen, waiting, y)[0])
            seen = np.append(seen, waiting)
        left = np.array([self._place[one.id] for one in rest])
        mean, deviation = self._predict(seen, left, y)
        gain = _improvement(y.min() - mean, deviation)
        # rounding may leave less than nothing to gain
        most = gain.max()
        best = np.flatnonzero(gain >= most - 1e-9 * abs(most))
        return rest[int(self._rng.choice(best))]

    def _predict(self, seen: Places, left: Places, y: Floats) -> tuple[Floats, Floats]:
        """Mean and standard deviation of those that are left."""
        among = self._covariance(seen, seen) + _NOISE * np.eye(len(seen))
        across = self._covariance(left, seen)
        above = y - self._expected[seen]
        level = above.mean()
        solved = np.linalg.solve(among, np.column_stack([above - level, across.T]))
        mean = level + self._expected[left] + across @ solved[:, 0]
        prior = _ALONE * len(self._alike) + _TOGETHER
        variance = prior - np.einsum("ij,ji->i", across, solved[:, 1:])
        return mean, np.sqrt(np.maximum(variance, 1e-12))

    def _covariance(self, rows: Places, columns: Places) -> Floats:
        parts = [one[np.ix_(rows, columns)] for one in self._alike]
        return np.asarray(_ALONE * sum(parts) + _TOGETHER * np.prod(parts, axis=0))


def _alike(legal: Sequence[Candidate]) -> list[Floats]:
    """How much alike candidates are, 0 to 1, by each of their settings."""
    rows = [space.values_of(one) for one in legal]
    names = dict.fromkeys(name for row in rows for name in row)
    found = []
    for name in names:
        values = list(dict.fromkeys(row.get(name) for row in rows))
        if len(values) > 1:
            table = np.array([[_likeness(a, b) for b in values] for a in values])
            at = np.array([values.index(row.get(name)) for row in rows])
            found.append(table[np.ix_(at, at)])
    return found


def _likeness(a: object, b: object) -> float:
    if a == b or a is None or b is None:  # one of the two has no such setting
        return 1.0
    if type(a) is int and type(b) is int and a > 0 and b > 0:
        return float(_STEP ** abs(math.log2(a / b)))
    return _OTHER


def _improvement(gain: Floats, deviation: Floats) -> Floats:
    """Expected improvement where a value is normal and better than the best by `gain` on
    average."""
    z = gain / deviation
    density = np.exp(-0.5 * z**2) / math.sqrt(2 * math.pi)
    below = 0.5 * (1 + np.vectorize(math.erf)(z / math.sqrt(2)))
    return np.asarray(gain * below + deviation * density)


#: by the names that users say
PICKERS: dict[str, type[Greedy] | type[Model]] = {"greedy": Greedy, "model": Model}

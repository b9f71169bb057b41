"""Trials as Optuna keeps them: in a journal file of the cache folder, or where a URL says."""

from __future__ import annotations

import glob
import json
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from kernelgen.tuner import cache, samplers
from kernelgen.tuner.device import Device
from kernelgen.tuner.measure import FAILED, OK, Outcome

#: user attributes of trials
_CANDIDATE, _OUTCOME, _SKIPPED = "candidate", "outcome", "skipped"

#: seconds after which a worker that says nothing is taken for dead, where a storage is shared
_HEARTBEAT, _GRACE = 10, 40


class Trials:
    """An Optuna study, asked and told.

    storage  a URL; None for the journal file; "" for memory
    resume   whether earlier trials of that name count; a shared storage always resumes
    """

    def __init__(
        self, name: str, storage: str | None, resume: bool, sampler: str, seed: int
    ) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._optuna = optuna
        self._shared = bool(storage)
        self._mine: set[int] = set()
        self._study = optuna.create_study(
            study_name=name, storage=_open(name, storage, resume), load_if_exists=True,
            direction="minimize", sampler=samplers.make(sampler, seed),
        )  # fmt: skip
        if not self._shared:
            for trial in self._running():  # left by a study that was killed
                self._study.tell(trial.number, state=optuna.trial.TrialState.FAIL)

    def _running(self) -> list[Any]:
        states = (self._optuna.trial.TrialState.RUNNING,)
        return list(self._study.get_trials(deepcopy=False, states=states))

    def known(self) -> Iterator[tuple[str, Outcome]]:
        """Ids of candidates that were measured, with their outcomes."""
        for trial in self._study.get_trials(deepcopy=False):
            attrs = trial.user_attrs
            if _OUTCOME in attrs and _SKIPPED not in attrs:
                yield attrs[_CANDIDATE], _outcome(attrs[_OUTCOME])

    def elsewhere(self) -> set[str]:
        """Ids of candidates that others who share the storage measured, or are measuring."""
        if not self._shared:
            return set()
        fail = self._optuna.trial.TrialState.FAIL
        return {
            trial.user_attrs[_CANDIDATE]
            for trial in self._study.get_trials(deepcopy=False)
            if trial.number not in self._mine and _CANDIDATE in trial.user_attrs
            and (trial.state != fail or _OUTCOME in trial.user_attrs)
        }  # fmt: skip

    def enqueue(self, parameters: Mapping[str, Any]) -> None:
        """Ask for these next."""
        self._study.enqueue_trial(dict(parameters))

    def ask(self) -> Any:
        """The next trial."""
        return self._study.ask()

    def start(self, trial: Any, candidate: str) -> None:
        """Say what a trial is about to measure."""
        self._mine.add(trial.number)
        trial.set_user_attr(_CANDIDATE, candidate)
        trial.set_user_attr("config", json.loads(candidate)["config"])

    def tell(self, trial: Any, outcome: Outcome, value: float | None) -> None:
        """What came of it."""
        trial.set_user_attr(_OUTCOME, outcome.as_dict())
        self._finish(trial, outcome, value)

    def _finish(self, trial: Any, outcome: Outcome | None, value: float | None) -> None:
        state = self._optuna.trial.TrialState
        if outcome is not None and outcome.status == OK and value is not None:
            self._study.tell(trial, value)
        elif outcome is None or outcome.status == FAILED or value is None:
            self._study.tell(trial, state=state.FAIL if outcome else state.PRUNED)
        else:
            trial.report(value, 0)
            self._study.tell(trial, state=state.PRUNED)

    def repeat(self, trial: Any, outcome: Outcome | None, value: float | None) -> None:
        """A trial that asks for what is known gets what is known."""
        trial.set_user_attr(_SKIPPED, "known")
        self._finish(trial, outcome, value)

    def skip(self, trial: Any, reason: str) -> None:
        """A trial that is not measured."""
        trial.set_user_attr(_SKIPPED, reason)
        self._study.tell(trial, state=self._optuna.trial.TrialState.PRUNED)


def _open(name: str, storage: str | None, resume: bool) -> Any:
    import optuna

    if storage == "":
        return optuna.storages.InMemoryStorage()
    if storage is None:
        return _journal(str(_own_file(name, resume)))
    if storage.endswith(".log"):
        return _journal(storage)
    if "://" not in storage or storage.startswith("sqlite"):
        url = storage if "://" in storage else f"sqlite:///{storage}"
        return optuna.storages.RDBStorage(url)
    return optuna.storages.RDBStorage(storage, heartbeat_interval=_HEARTBEAT, grace_period=_GRACE)


def _own_file(name: str, resume: bool) -> Path:
    """A file of its own for each study, so that none grows for ever and none meets another; to
    resume is to go on with the last."""
    place = cache.root() / "studies"
    place.mkdir(parents=True, exist_ok=True)
    short = name[:150]
    earlier = sorted(place.glob(f"{glob.escape(short)}-*.log"))
    if resume and earlier:
        return earlier[-1]
    return place / f"{short}-{datetime.now(UTC):%Y%m%dT%H%M%S%f}.log"


def fastest(of: Device, measured: float | None = None) -> float | None:
    """The most bytes that were ever read from a device's memory in a second, this time included: a
    busy machine is slower, and a roofline that is too low would end studies early."""
    path = cache.root() / "bandwidth.json"
    with cache.locked(path):
        try:
            known = json.loads(path.read_text(encoding="utf-8"))
            before = float(known.get(of.digest, 0.0))
        except (OSError, ValueError, TypeError, AttributeError):
            known, before = {}, 0.0
        if measured is None or measured <= before:
            return before or None
        cache.rewrite(path, [json.dumps({**known, of.digest: measured})])
        return measured


def _journal(path: str) -> Any:
    import optuna
    from optuna.storages.journal import JournalFileBackend

    return optuna.storages.JournalStorage(JournalFileBackend(path))


def _outcome(data: Mapping[str, Any]) -> Outcome:
    known = dict(data)
    known["samples"], known["against"] = tuple(known["samples"]), tuple(known["against"])
    return Outcome(**known)

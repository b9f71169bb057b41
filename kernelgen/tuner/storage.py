"""Trials as Optuna keeps them: in a journal file of the cache folder, or where a URL says.

Many processes may share a study.  Each candidate is measured by one of them: trials are numbered,
and of two that want the same candidate the one with the lower number has it.  So that this can be
told, who has a number says its candidate at once, and who wants to begin waits for all lower
numbers to have said theirs.  A running trial says now and then that it is alive; once it has been
silent for long, by the clock of whoever looks on, its process is taken for dead and the candidate
is free again.
"""

from __future__ import annotations

import glob
import itertools
import json
import threading
import time
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from kernelgen.errors import TuningError
from kernelgen.tuner import cache, samplers
from kernelgen.tuner.device import Device
from kernelgen.tuner.measure import FAILED, OK, Outcome

#: user attributes of trials
_CANDIDATE, _OUTCOME, _VALUE, _SKIPPED = "candidate", "outcome", "value", "skipped"
_ALIVE = "alive"

#: seconds between two signs of life, and without any until a process is taken for dead
_BEAT, _SILENCE = 2.0, 15.0
#: how often to try to open a database
_OPENINGS = 4


class Known(NamedTuple):
    """A trial that ended: its candidate by id, what became of it, and its value in seconds."""

    candidate: str
    outcome: Outcome
    value: float | None


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
        self._states = optuna.trial.TrialState
        self.shared = bool(storage)
        self._seen: set[int] = set()
        #: what running trials of others said last, and when that was seen first
        self._said: dict[int, tuple[Any, float]] = {}
        self._running: dict[int, Any] = {}
        self._closed = threading.Event()
        self._sampler = samplers.make(sampler, seed)
        self._study = optuna.create_study(
            study_name=name, storage=_open(name, storage, resume), load_if_exists=True,
            direction="minimize", sampler=self._sampler,
        )  # fmt: skip
        if not self.shared:
            for trial in self._all(self._states.RUNNING):  # left by a study that was killed
                self._study.tell(trial.number, state=self._states.FAIL)
        else:
            threading.Thread(target=self._live, daemon=True).start()

    def _live(self) -> None:
        """Say that one's own trials are alive, until the end."""
        for count in itertools.count():
            if self._closed.wait(_BEAT):
                return
            for trial in list(self._running.values()):
                self._say(trial, _ALIVE, count)

    def alive(self, trial: Any) -> bool:
        """Whether a trial was not taken for dead meanwhile."""
        return not self.shared or self._say(trial, _ALIVE, -2)

    def close(self) -> None:
        """Leave the study; what still runs is free for others."""
        self._closed.set()
        for trial in list(self._running.values()):
            self.skip(trial, "its process left")

    def _all(self, *states: Any) -> list[Any]:
        return list(self._study.get_trials(deepcopy=False, states=states or None))

    def news(self) -> Iterator[Known]:
        """Trials that ended since the last call, but for one's own."""
        for trial in self._all():
            if trial.number in self._seen or not trial.state.is_finished():
                continue
            self._seen.add(trial.number)
            attrs = trial.user_attrs
            if _OUTCOME in attrs and _SKIPPED not in attrs:
                yield Known(
                    attrs[_CANDIDATE], Outcome.from_dict(attrs[_OUTCOME]), attrs.get(_VALUE)
                )

    def elsewhere(self) -> set[str]:
        """Ids of candidates that others are measuring now."""
        return {trial.user_attrs[_CANDIDATE] for trial in self._alive() if self._claims(trial)}

    def _claims(self, trial: Any) -> bool:
        return _CANDIDATE in trial.user_attrs and _SKIPPED not in trial.user_attrs

    def _alive(self) -> list[Any]:
        """Trials of others that run; those that have been silent for long fail here."""
        if not self.shared:
            return []
        now, found = time.monotonic(), []
        for trial in self._all(self._states.RUNNING):
            if trial.number in self._seen:
                continue
            said = trial.user_attrs.get(_ALIVE, -1)
            if trial.number not in self._said or self._said[trial.number][0] != said:
                self._said[trial.number] = said, now
            if now > self._said[trial.number][1] + _SILENCE:
                self._end(trial.number, state=self._states.FAIL)
            else:
                found.append(trial)
        return found

    def _end(self, trial: Any, value: float | None = None, state: Any = None) -> None:
        self._running.pop(getattr(trial, "number", trial), None)
        # it may have been taken for dead, and then nothing is left to say
        self._study.tell(trial, value, state=state, skip_if_finished=True)

    def ask(self, parameters: Mapping[str, Any] | None = None) -> Any:
        """The next trial: the sampler's, or one with these parameters."""
        self._sampler.told = parameters
        trial = self._study.ask()
        self._seen.add(trial.number)
        self._running[trial.number] = trial
        return trial

    def claim(self, trial: Any, candidate: str) -> bool:
        """Say what a trial is about to measure; False where another process has that candidate, and
        the trial has ended."""
        for name, value in (
            (_CANDIDATE, candidate), ("config", json.loads(candidate)["config"]),
        ):  # fmt: skip
            if not self._say(trial, name, value):
                return False
        while self.shared:
            before = [one for one in self._alive() if one.number < trial.number]
            taken = {one.user_attrs.get(_CANDIDATE) for one in before if self._claims(one)}
            if candidate in taken | self._measured(trial.number):
                self.skip(trial, "another process has it")
                return False
            if all(_CANDIDATE in one.user_attrs for one in before):
                break
            time.sleep(0.02)
        return True

    def _measured(self, number: int) -> set[str]:
        return {
            one.user_attrs[_CANDIDATE]
            for one in self._all()
            if one.number != number and one.state.is_finished() and _OUTCOME in one.user_attrs
        }

    def _say(self, trial: Any, name: str, value: Any) -> bool:
        import optuna

        try:
            trial.set_user_attr(name, value)
        except (optuna.exceptions.UpdateFinishedTrialError, RuntimeError):
            return False  # it was taken for dead
        return True

    def tell(self, trial: Any, outcome: Outcome, value: float | None) -> None:
        """What came of it."""
        # first the value: who sees an outcome sees all
        if self._say(trial, _VALUE, value) and self._say(trial, _OUTCOME, outcome.as_dict()):
            self._finish(trial, outcome, value)

    def _finish(self, trial: Any, outcome: Outcome | None, value: float | None) -> None:
        state = self._states
        if outcome is not None and outcome.status == OK and value is not None:
            self._end(trial, value)
        elif outcome is None or outcome.status == FAILED or value is None:
            self._end(trial, state=state.FAIL if outcome else state.PRUNED)
        else:
            trial.report(value, 0)
            self._end(trial, state=state.PRUNED)

    def repeat(self, trial: Any, outcome: Outcome | None, value: float | None) -> None:
        """A trial that asks for what is known gets what is known."""
        self._say(trial, _SKIPPED, "known")
        self._finish(trial, outcome, value)

    def skip(self, trial: Any, reason: str) -> None:
        """A trial that is not measured."""
        self._say(trial, _SKIPPED, reason)
        self._end(trial, state=self._states.PRUNED)


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
        return _database(url, {"connect_args": {"timeout": 60}})  # one writer at a time
    if storage.startswith("grpc://"):
        host, _, port = storage.removeprefix("grpc://").partition(":")
        return optuna.storages.GrpcStorageProxy(host=host, port=int(port or 13000))
    return _database(storage, {})


def _database(url: str, arguments: dict[str, Any]) -> Any:
    """A database; where many open a new one at once, one of them makes its tables, and the others
    fail and try again."""
    import optuna
    from sqlalchemy.exc import SQLAlchemyError

    for attempt in range(_OPENINGS):
        try:
            return optuna.storages.RDBStorage(url, engine_kwargs=arguments)
        except (ImportError, SQLAlchemyError) as error:
            if attempt + 1 == _OPENINGS or isinstance(error, ImportError):
                said = str(error).strip().split("\n")[0]
                raise TuningError(
                    f"storage {url} was given and cannot be opened: {said}; give the URL of a"
                    " database that runs and whose driver is installed, or a file's name"
                ) from error
            time.sleep(0.2 * 2**attempt)
    raise AssertionError


def _own_file(name: str, resume: bool) -> Path:
    """A file of its own for each study, so that none grows for ever and none meets another; to
    resume is to go on with the last."""
    place = cache.made(cache.root() / "studies")
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

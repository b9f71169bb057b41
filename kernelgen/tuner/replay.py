"""Recorded trials: files of what was measured, and a measurer that reads them instead of a device.

A file has JSON lines: one with the problem, then one for each trial.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from kernelgen.errors import FileError
from kernelgen.tuner.measure import FAILED, Outcome
from kernelgen.tuner.problems import Problem
from kernelgen.tuner.space import Candidate


class Recorder:
    """Writes trials as they come."""

    def __init__(self, path: Path, about: dict[str, Any]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        if not path.exists() or not path.stat().st_size:
            self._write({"problem": about})
        elif not path.read_bytes().endswith(b"\n"):  # a crash tore the last line
            with path.open("a", encoding="utf-8") as file:
                file.write("\n")

    def add(self, candidate: Candidate, outcome: Outcome) -> None:
        """One trial."""
        self._write({"candidate": candidate.as_dict(), "outcome": outcome.as_dict()})

    def _write(self, data: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(data, separators=(",", ":")) + "\n")


def read(path: Path) -> tuple[dict[str, Any], dict[str, Outcome]]:
    """What a file is about, and its outcomes by the ids of candidates."""
    about: dict[str, Any] = {}
    outcomes: dict[str, Outcome] = {}
    for number, data in _lines(path):
        try:
            if "problem" in data:
                about = data["problem"]
                continue
            outcome = Outcome.from_dict(data["outcome"])
            outcomes[json.dumps(data["candidate"], sort_keys=True)] = outcome
        except (KeyError, TypeError) as error:
            raise FileError(f"{path}:{number} is no recorded trial ({error})") from None
    return about, outcomes


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    texts = path.read_text(encoding="utf-8").splitlines()
    for number, text in enumerate(texts, 1):
        try:
            yield number, json.loads(text)
        except ValueError:
            if number < len(texts):  # the last may have been torn by a crash
                raise FileError(f"{path}:{number} is not JSON; record it again") from None


class Replay:
    """A measurer that answers from recorded outcomes, at once."""

    def __init__(self, outcomes: dict[str, Outcome], bytes_per_s: float | None = None) -> None:
        self.outcomes = outcomes
        self.asked: list[str] = []
        self._bytes_per_s = bytes_per_s

    def prepare(self, problem: Problem, end: float = math.inf) -> None:
        """Nothing."""

    def compile(self, candidates: Sequence[Candidate], limit: float) -> dict[str, Outcome]:
        """None fails here."""
        return {}

    def measure(
        self, candidate: Candidate, against: Candidate | None, *, seconds: float, limit: float,
        prune: bool = True, expect: float | None = None,
    ) -> Outcome:  # fmt: skip
        """What was recorded; beside what it is to be timed with, where that was recorded too."""
        self.asked.append(candidate.id)
        found = self.outcomes.get(candidate.id)
        if found is None:
            return Outcome(FAILED, "error", "it was not recorded")
        other = self.outcomes.get(against.id) if against else None
        if found.status == FAILED or other is None or other.status == FAILED:
            return found
        return dataclasses.replace(found, against=other.samples, joules_against=other.joules)

    def bandwidth(self) -> float | None:
        """As recorded."""
        return self._bytes_per_s

    def close(self) -> None:
        """Nothing."""

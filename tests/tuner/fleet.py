"""A process of a fleet: one study, a storage that others share, made-up times.

    python -m tests.tuner.fleet URL LOG NUMBER [HANG]

Each measurement writes "begin" and "end" to the log.  With HANG, that measurement of it never ends.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

from kernelgen.tuner import space, storage
from kernelgen.tuner.measure import OK, Outcome
from kernelgen.tuner.replay import Replay
from kernelgen.tuner.report import Options
from kernelgen.tuner.study import Study
from tests.tuner import made_up_target
from tests.tuner.made_up_target import SMALL


class Logged(Replay):
    """Made-up times, and a log that survives its process."""

    def __init__(self, outcomes: dict[str, Outcome], log: str, number: int, hang: int) -> None:
        super().__init__(outcomes)
        self._file = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        self._number, self._hang = number, hang

    def measure(self, candidate: Any, *given: Any, **named: Any) -> Outcome:
        """A moment for each, and for ever for one."""
        if not named["prune"]:  # the finalists, which every process measures again
            return super().measure(candidate, *given, **named)
        self._say("begin", candidate.id)
        if len(self.asked) + 1 == self._hang:
            self._say("hangs", candidate.id)
            time.sleep(3600)
        time.sleep(0.05)
        found = super().measure(candidate, *given, **named)
        self._say("end", candidate.id)
        return found

    def _say(self, what: str, name: str) -> None:
        os.write(self._file, (json.dumps([what, self._number, name]) + "\n").encode())


def main(url: str, log: str, number: str, hang: str = "0") -> None:
    """Search until everything was tried."""
    storage._SILENCE = 10.0  # a dead process is noticed soon
    target, runtime = made_up_target.factory()
    legal = space.explore(target, runtime.capabilities(), SMALL).legal
    outcomes = {
        one.id: Outcome(OK, samples=(1e-3 * (n + 1),), rms_error=1e-3)
        for n, one in enumerate(legal)
    }
    options = Options(
        120, "random", int(number), storage=url, record=False, write=False, prune=True
    )
    measurer = Logged(outcomes, log, int(number), int(hang))
    report = Study(target, runtime, SMALL, measurer, options).run()
    print(json.dumps({"trials": len(report.trials), "stopped": report.stopped,
                      "best": report.best.id if report.best else None}))  # fmt: skip


if __name__ == "__main__":
    main(*sys.argv[1:])

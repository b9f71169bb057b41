"""Records landscapes: the time of every legal configuration of a kernel, on this machine.

    python bench/landscapes.py --list             # what there is to record, and how large it is
    python bench/landscapes.py                    # record what bench/landscapes/ lacks
    python bench/landscapes.py --only opencl-q4_K-1x2048x2048 --seconds 60

Made for a machine that is not quiet, and to run unattended.  All candidates are compiled and
checked first.  Then come passes: each goes through all candidates in another random order, a burst
of calls each, so that a slow minute of the machine meets no candidate in every pass.  What counts
is the least of the medians of bursts.  Candidates that are many times slower than the best (`NEAR`)
are measured in the first passes only: they are no winners, whatever the machine did.

Each burst is written as it ends, to NAME.part: started again, the recording goes on there.  A
complete landscape is NAME.jsonl, which bench/samplers.py reads.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import random
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kernelgen import targets
from kernelgen.ir import formats
from kernelgen.targets.base import Runtime, Target
from kernelgen.tuner import device, space
from kernelgen.tuner.measure import FAILED, OK, Outcome, WorkerMeasurer
from kernelgen.tuner.problems import MatmulProblem, Problem
from kernelgen.tuner.replay import Recorder
from kernelgen.tuner.space import Candidate

FOLDER = Path(__file__).parent / "landscapes"

#: target, format, shape, precision
KERNELS = (
    ("c", "q4_K", "1x4096x4096", "int8"), ("c", "q4_K", "32x4096x4096", "int8"),
    ("c", "q8_0", "1x4096x4096", "int8"),
    ("opencl", "q4_K", "1x2048x2048", "auto"), ("opencl", "q8_0", "1x2048x2048", "auto"),
    ("opencl", "q6_K", "4x2048x1024", "auto"), ("opencl", "q4_0", "16x256x512", "int8"),
)  # fmt: skip


def passes(size: int) -> int:
    """How often to go through so many candidates: small spaces take no time."""
    return max(7, min(25, 2500 // size))


#: how many times slower than the best a candidate may look and be measured again, after the first
#: pass, the second, and so on: each of its bursts may have met another's work
NEAR = (4.0, 3.0, 2.5, 2.0, 1.6)
#: seconds that a candidate may take, compiled and checked
LIMIT = 30.0


@dataclass
class Landscape:
    """A kernel's configurations, and what is known of them."""

    name: str
    target: Target
    runtime: Runtime
    problem: Problem

    @classmethod
    def named(cls, target: str, fmt: str, shape: str, precision: str) -> Landscape:
        """From what the table says."""
        manifest = targets.get(target)
        m, n, k = map(int, shape.split("x"))
        problem = MatmulProblem(formats.get(fmt), m, n, k, precision=precision)
        name = f"{target}-{fmt}-{shape}" + f"-{precision}" * (precision != "auto")
        return cls(name, manifest, manifest.runtime(), problem)

    @property
    def path(self) -> Path:
        """Where it is when it is complete."""
        return FOLDER / f"{self.name}.jsonl"

    @property
    def part(self) -> Path:
        """Where it is before."""
        return FOLDER / f"{self.name}.part"

    def candidates(self) -> tuple[Candidate, ...]:
        """All that are legal here."""
        return space.explore(self.target, self.runtime.capabilities(), self.problem).legal

    def about(self) -> dict[str, Any]:
        """The first line: the problem, and the machine by the names of its device alone."""
        one = self.problem
        found = device.of(self.target, self.runtime)
        return {
            "target": self.target.name, "op": one.op, "format": one.name,
            "precision": one.precision, "shape": one.shape, "device": dataclasses.asdict(found),
            "space": len(self.candidates()), "passes": passes(len(self.candidates())),
        }  # fmt: skip


def read_part(path: Path) -> dict[str, list[Outcome]]:
    """Bursts by candidate, in their order."""
    found: dict[str, list[Outcome]] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            data = json.loads(line)
            outcome = Outcome.from_dict(data["outcome"])
        except (ValueError, KeyError):  # torn, or the head
            continue
        found.setdefault(json.dumps(data["candidate"], sort_keys=True), []).append(outcome)
    return found


def condensed(bursts: list[Outcome]) -> Outcome:
    """One outcome of all bursts: the first failure, or the least of their medians."""
    for one in bursts:
        if one.status == FAILED:
            return one
    least = min(one.seconds for one in bursts)
    return dataclasses.replace(bursts[0], status=OK, samples=(least,), against=(), spent=0.0)


def todo(known: dict[str, list[Outcome]], every: dict[str, Candidate], turn: int) -> list[str]:
    """Candidates that a pass is yet to measure."""
    ok = {n: condensed(b).seconds for n, b in known.items() if condensed(b).status == OK}
    most = NEAR[min(turn - 2, len(NEAR) - 1)] * min(ok.values(), default=0.0)
    return [
        name for name in every
        if len(known.get(name, ())) < turn
        and (turn == 1 or (name in ok and ok[name] <= most))
    ]  # fmt: skip


def record(one: Landscape, end: float, rng: random.Random) -> Iterator[str]:
    """Measure what is missing until it is complete or time is over; says how far it is."""
    every = {c.id: c for c in one.candidates()}
    known = {name: b for name, b in read_part(one.part).items() if name in every}
    recorder = Recorder(one.part, one.about())
    measurer = WorkerMeasurer(one.target.name)
    measurer.prepare(one.problem, end + LIMIT)

    def note(name: str, outcome: Outcome) -> None:
        known.setdefault(name, []).append(outcome)
        recorder.add(every[name], outcome)

    try:
        for turn in range(1, passes(len(every)) + 1):
            left = todo(known, every, turn)
            rng.shuffle(left)
            for count in itertools.count(0, 8):
                batch = left[count : count + 8]
                if not batch:
                    break
                if time.perf_counter() > end:
                    yield f"time is over in pass {turn}, {len(left) - count} candidates were left"
                    return
                failed = measurer.compile([every[n] for n in batch], LIMIT) if turn == 1 else {}
                for name in batch:
                    outcome = failed.get(name) or measurer.measure(
                        every[name], None, seconds=0, limit=LIMIT, prune=False, turns=1
                    )
                    note(name, outcome)
            if turn == 1:
                yield f"{len(left)} candidates checked"
    finally:
        measurer.close()
    one.path.unlink(missing_ok=True)
    final = Recorder(one.path, one.about())
    for name, candidate in every.items():
        final.add(candidate, condensed(known[name]))
    one.part.unlink()
    yield summary(known)


def summary(known: dict[str, list[Outcome]]) -> str:
    """What a complete landscape looks like, and how noisy the machine was."""
    done = [condensed(b) for b in known.values()]
    times = sorted(o.seconds for o in done if o.status == OK)
    spread = [
        statistics.median(o.seconds for o in b) / condensed(b).seconds
        for b in known.values()
        if len(b) == passes(len(known))
    ]
    noise = f"{statistics.median(spread) - 1:.1%}" if spread else "unknown"
    near = sum(t <= 1.03 * times[0] for t in times)
    return (
        f"complete: {len(done)} candidates, {len(done) - len(times)} failed; best"
        f" {times[0] * 1e3:.3f} ms, {near} within 3% of it, median"
        f" {statistics.median(times) / times[0]:.2f} and worst {times[-1] / times[0]:.2f} times"
        f" slower; a median burst is {noise} slower than the least"
    )


def main() -> None:
    """Record what is missing."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--list", action="store_true", help="show what there is to record")
    parser.add_argument("--only", action="append", metavar="NAME", help="a landscape, by its name")
    parser.add_argument("--seconds", type=float, default=900, help="stop after so many")
    given = parser.parse_args()
    end = time.perf_counter() + given.seconds
    for row in KERNELS:
        one = Landscape.named(*row)
        if given.only and one.name not in given.only:
            continue
        reason = one.runtime.available()
        if reason is not None:
            print(f"{one.name:26} is left out: {reason}")
            continue
        if given.list or one.path.exists():
            state = "recorded" if one.path.exists() else "begun" if one.part.exists() else "missing"
            print(f"{one.name:26} {len(one.candidates()):5} candidates, {state}")
            continue
        begin = time.perf_counter()
        for said in record(one, end, random.Random(one.name)):
            print(f"{one.name:26} {said} ({time.perf_counter() - begin:.0f} s)", flush=True)
        if time.perf_counter() > end:
            sys.exit(1)


if __name__ == "__main__":
    main()

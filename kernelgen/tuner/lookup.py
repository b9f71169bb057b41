"""Which configuration serves a problem, and by what rule.

In this order: an entry of this very problem on this device; of the nearest shape; of a device of
the same family; a preset that is shipped; the walk's default.  An entry is used only if the walk
is still what it was when it was measured, and the device can run the configuration.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass

from kernelgen.config import Capabilities, Config
from kernelgen.errors import ConfigError, TuningError
from kernelgen.ir.block import BlockFormat
from kernelgen.targets.base import Runtime, Target, Walk
from kernelgen.tuner import cache, device, space
from kernelgen.tuner.cache import Entry
from kernelgen.tuner.problems import MatmulProblem, Problem
from kernelgen.tuner.space import Candidate

log = logging.getLogger("kernelgen")

#: rules, in their order
EXACT, NEAREST, FAMILY, PRESET, DEFAULT = (
    "exact", "nearest shape", "same family", "preset", "default"
)  # fmt: skip

#: makes a miss an error
REQUIRE = "KERNELGEN_REQUIRE_TUNED"


@dataclass(frozen=True)
class Found:
    """An entry that could serve, and why it does not (None where it would).

    rule      by which it was found
    distance  of the shape, in powers of two
    candidate what it says, where that still exists
    """

    rule: str
    entry: Entry
    distance: float
    candidate: Candidate | None
    refused: str | None


@dataclass(frozen=True)
class Choice:
    """What serves a problem: the configuration, and the entry it came from, if any."""

    candidate: Candidate
    rule: str
    found: Found | None
    why: str

    @property
    def walk(self) -> Walk:
        """The walk."""
        return self.candidate.walk

    @property
    def config(self) -> Config:
        """Its configuration."""
        return self.candidate.config

    @property
    def entry(self) -> Entry | None:
        """Where it came from."""
        return self.found.entry if self.found else None


def search(
    target: Target, runtime: Runtime, problem: Problem, *, presets: bool = True
) -> Iterator[Found]:
    """Entries for a problem, best first; whether they can be used is known when they are taken."""
    mine, caps = device.of(target, runtime), runtime.capabilities()
    ranked = []
    for shipped in (False, True)[: 1 + presets]:
        place = cache.presets() if shipped else None
        for entry in cache.winners(cache.entries(place)):
            unlike = mine.unlike(entry.key.device)
            far = _far(target, problem, entry)
            if unlike is None or far is None:
                continue
            same = mine == entry.key.device
            rule = PRESET if shipped else FAMILY if not same else NEAREST if far else EXACT
            order = (EXACT, NEAREST, FAMILY, PRESET).index(rule)
            asked = entry.key.precision != problem.precision
            ranked.append(((order, unlike, far, asked, _later(entry)), rule, entry, far))
    for _, rule, entry, far in sorted(ranked, key=lambda one: one[0]):
        candidate, refused = _still(target, caps, problem, entry)
        yield Found(rule, entry, far, candidate, refused)


def _later(entry: Entry) -> tuple[int, ...]:
    """Sorts what was measured last first."""
    return tuple(-ord(c) for c in entry.time)


def _far(target: Target, problem: Problem, entry: Entry) -> float | None:
    """The distance of an entry's shape; None where it is about something else."""
    key = entry.key
    if (key.target, key.op, key.format, key.objective, key.max_error) != (
        target.name, problem.op, problem.name, problem.objective, problem.max_error
    ):  # fmt: skip
        return None
    # an "auto" study whose winner computes in a precision is the best of that precision, too
    if key.precision != problem.precision and not (
        key.precision == "auto" and entry.used == problem.precision
    ):
        return None
    return problem.apart(key.shape)


def _still(
    target: Target, caps: Capabilities, problem: Problem, entry: Entry
) -> tuple[Candidate | None, str | None]:
    """What an entry says as a candidate of today, or why there is no such thing."""
    one = space.walk_named(target, problem.op, entry.walk)
    if one is None or one not in space.walks(target, problem):
        return None, f"there is no walk {entry.walk} for it any more"
    if space.walk_hash(one, problem.like, target) != entry.key.hash:
        return None, "it is stale: the walk or the format has changed since"
    try:
        candidate = Candidate(one, one.config.from_dict(entry.config))
    except (ConfigError, TypeError) as error:
        return None, f"its configuration is none any more: {error}"
    return candidate, space.refusal(candidate, problem.subject, caps)


def choose(
    target: Target,
    runtime: Runtime,
    fmt: BlockFormat,
    precision: str,
    shape: tuple[int, int, int],
    max_error: float | None = None,
) -> Choice:
    """What serves a problem.  Raises TuningError on a miss where KERNELGEN_REQUIRE_TUNED is set."""
    m, n, k = shape
    problem = MatmulProblem(fmt, m, max(n, 1), k, precision=precision, max_error=max_error)
    return choose_for(target, runtime, problem)


def choose_for(target: Target, runtime: Runtime, problem: Problem) -> Choice:
    """The same for a `Problem`."""
    caps = runtime.capabilities()
    refused: list[str] = []
    for found in search(target, runtime, problem):
        if found.refused is None and found.candidate is not None:
            return Choice(found.candidate, found.rule, found, _why(found))
        refused.append(f"an entry of {found.entry.time or 'some time'}: {found.refused}")
    plain = space.default(target, caps, problem)
    choice = Choice(plain, DEFAULT, None, "; ".join(["no usable entry", *refused]))
    if os.environ.get(REQUIRE, "") not in ("", "0") and _open(target, caps, problem):
        raise TuningError(
            f"{problem} was asked for on {device.of(target, runtime)} with {REQUIRE} set, and there"
            f" is {choice.why}; run kernelgen tune --target {target.name} {problem.flags}"
            f" --precision {problem.precision}"
        )
    log.debug("%s on target %s: default, %s", problem, target.name, choice.why)
    return choice


def _open(target: Target, caps: Capabilities, problem: Problem) -> bool:
    """Whether a walk leaves anything open: the reference has two, and nothing to tune."""
    legal = space.explore(target, caps, problem).legal
    return len(legal) > len({one.walk.name for one in legal})


def _why(found: Found) -> str:
    key = found.entry.key
    shape = "x".join(map(str, key.shape))
    if found.rule == EXACT:
        return f"tuned for this problem on this device ({shape})"
    if found.rule == NEAREST:
        return f"tuned on this device for {shape}, {2**found.distance:.2g} times off in all"
    return f"tuned for {shape} on {key.device}"

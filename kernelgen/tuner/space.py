"""What may be chosen for a problem: the walk, with its precision, and the walk's configuration."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from kernelgen.config import Capabilities, Config
from kernelgen.errors import TargetError
from kernelgen.generate import generate_walk
from kernelgen.problem import PRECISIONS, acceptable, row_bucket
from kernelgen.targets.base import Subject, Target, Walk
from kernelgen.tuner.problems import Problem


@dataclass(frozen=True)
class Candidate:
    """One choice."""

    walk: Walk
    config: Config

    @property
    def precision(self) -> str:
        """That it computes in."""
        return self.walk.precision

    def as_dict(self) -> dict[str, Any]:
        """Plain data, as entries and workers have it."""
        return {
            "op": self.walk.op, "walk": self.walk.name, "precision": self.precision,
            "config": self.config.as_dict(),
        }  # fmt: skip

    @functools.cached_property
    def id(self) -> str:
        """Text that tells it from all others of its problem."""
        return json.dumps(self.as_dict(), sort_keys=True)

    def __str__(self) -> str:
        values = ", ".join(f"{k}={v}" for k, v in self.config.as_dict().items())
        return f"{self.walk.name}({values})"


def precisions(problem: Problem) -> tuple[str, ...]:
    """Precisions that may serve a problem, the best guess first.

    "auto" leaves all open that err no more than what it stands for: where that is int8, every
    other rounds less.  Where it is float32, others do if a largest error was asked for, which the
    gate holds them to.  "fp16" has to be asked for by name: it has no numbers above 65504, which
    no sample of activations can rule out.
    """
    found = acceptable(problem.precision, problem.subject)
    if problem.precision == "auto" and (found[0] != "fp32" or problem.max_error is not None):
        found = tuple(
            dict.fromkeys((*found, *(p for p in PRECISIONS if p not in ("auto", "fp16"))))
        )
    return found


def walks(target: Target, problem: Problem) -> list[Walk]:
    """Walks that may serve a problem."""
    stands_for, *others = precisions(problem)
    allowed = {"", stands_for, *others}
    op, subject = problem.op, problem.subject
    found = [
        one for one in target.walks
        if one.op == op and one.precision in allowed and one.accepts(subject) is None
    ]  # fmt: skip
    if not found:
        target.serve(op, subject, problem.precision, target.capabilities)  # says why
        raise TargetError(f"target {target.name} has no walk for {problem}")
    # the order of the manifest is that of preference, but what was asked for comes first
    return sorted(found, key=lambda one: one.precision not in ("", stands_for))


def default(target: Target, caps: Capabilities, problem: Problem) -> Candidate:
    """What serves a problem that was never tuned.  Where a largest error is asked for and nobody
    measured, "auto" stands for float32."""
    unsure = problem.precision == "auto" and problem.max_error is not None
    asked = "fp32" if unsure else problem.precision
    rows = row_bucket(problem.rows)
    one = target.serve(problem.op, problem.subject, asked, caps, rows)
    return Candidate(one, one.default(problem.subject, caps, rows))


def refusal(candidate: Candidate, subject: Subject, caps: Capabilities) -> str | None:
    """Why a device cannot run a candidate for a subject, or None."""
    return candidate.walk.refuses(candidate.config, subject, caps)


def every(target: Target, problem: Problem) -> Iterator[Candidate]:
    """All candidates, legal or not, each once."""
    for one in walks(target, problem):
        for config in dict.fromkeys(one.config.space()):
            yield Candidate(one, config)


@dataclass(frozen=True)
class Space:
    """The candidates of a problem on a device, and those that are forbidden, by reason.

    The numbers in a reason are replaced by "#", so that one rule is one line.
    """

    legal: tuple[Candidate, ...]
    forbidden: dict[str, int]
    examples: dict[str, str]

    @property
    def size(self) -> int:
        """Candidates, legal or not."""
        return len(self.legal) + sum(self.forbidden.values())

    @functools.cached_property
    def by_id(self) -> dict[str, Candidate]:
        """The legal ones."""
        return {one.id: one for one in self.legal}


def explore(
    target: Target, caps: Capabilities, problem: Problem, only: AbstractSet[str] | None = None
) -> Space:
    """Go through all candidates of a problem.  `only`: ids of those that count as legal, instead
    of what the device can run."""
    legal: list[Candidate] = []
    forbidden: Counter[str] = Counter()
    examples: dict[str, str] = {}
    for one in every(target, problem):
        reason = refusal(one, problem.subject, caps)
        if only is not None:
            reason = None if one.id in only else "it is not among those given"
        if reason is None:
            legal.append(one)
            continue
        rule = re.sub(r"\d+", "#", reason)
        forbidden[rule] += 1
        examples.setdefault(rule, reason)
    return Space(tuple(legal), dict(forbidden.most_common()), examples)


def parameters(space: Space) -> dict[str, list[Any]]:
    """Names of what is open, with the values that legal candidates have there: "walk", then the
    fields of configurations, which mean the same in all of them."""
    found: dict[str, dict[Any, None]] = {}
    for one in space.legal:
        for name, value in values_of(one).items():
            found.setdefault(name, {})[value] = None
    return {
        name: sorted(values) if all(isinstance(v, int) for v in values) else list(values)
        for name, values in found.items()
    }


def values_of(candidate: Candidate) -> dict[str, Any]:
    """The parameters of a candidate by name."""
    return {"walk": candidate.walk.name, **candidate.config.as_dict()}


def distance(one: dict[str, Any], other: dict[str, Any]) -> float:
    """How many steps two candidates are apart, by the parameters that both have: numbers on a
    logarithmic scale, other values equal or not."""
    total = 0.0
    for name in one.keys() & other.keys():
        a, b = one[name], other[name]
        if a == b:
            continue
        numbers = isinstance(a, int) and isinstance(b, int) and a > 0 and b > 0
        total += abs(math.log2(a / b)) if numbers else 1.0
    return total


def walk_named(target: Target, op: str, name: str) -> Walk | None:
    """A walk by its name, or None."""
    return next((w for w in target.walks if w.op == op and w.name == name), None)


@functools.lru_cache(maxsize=1024)
def walk_hash(one: Walk, subject: Subject, target: Target) -> str:
    """Hash of all that makes the kernels of a walk for a subject: the text of the default one, and
    the files that it includes.  The version of kernelgen alone changes nothing."""
    kernel = generate_walk(one, subject, target)
    text = re.sub(r"Generated by kernelgen \S+ walk.*", "", kernel.source)
    digest = hashlib.sha256(text.replace(kernel.hash, "").encode())
    for name, included in sorted(_included(text, target).items()):
        digest.update(f"{name}{included}".encode())
    digest.update(json.dumps([f.name for f in dataclasses.fields(one.config)]).encode())
    return digest.hexdigest()[:16]


def _included(text: str, target: Target) -> dict[str, str]:
    """The support files of a target that a text includes, itself or through others, by name."""
    place = files("kernelgen") / "targets" / target.name
    found: dict[str, str] = {}
    waiting = [text]
    while waiting:
        for name in re.findall(r'#include "([^"]+)"', waiting.pop()):
            if name in target.support_files and name not in found:
                found[name] = (place / name).read_text("utf-8")
                waiting.append(found[name])
    return found

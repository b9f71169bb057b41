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
from kernelgen.errors import ShapeError, TargetError
from kernelgen.generate import generate_walk
from kernelgen.ir.block import BlockFormat
from kernelgen.problem import choose_precision, op_for
from kernelgen.targets.base import Target, Walk

#: rows of activations above which kernels behave alike
_MOST_ROWS = 4096


def row_bucket(m: int) -> int:
    """M as problems are told apart: each of the first eight, then powers of two."""
    return m if m <= 8 else min(1 << (m - 1).bit_length(), _MOST_ROWS)


@dataclass(frozen=True)
class Problem:
    """What is tuned: x (M, K) times weights (N, K) of a format, in a precision that is asked for
    ("fp32", "int8", or "auto", which leaves it open)."""

    fmt: BlockFormat
    m: int
    n: int
    k: int
    precision: str = "auto"

    def __post_init__(self) -> None:
        choose_precision(self.precision, self.fmt)
        if min(self.m, self.n, self.k) < 1:
            raise ShapeError(f"shape {self.m}x{self.n}x{self.k} was given; M, N and K are above 0")
        self.fmt.row_bytes(self.k)

    @property
    def op(self) -> str:
        """The op that serves it."""
        return op_for(self.m)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(M, N, K)."""
        return self.m, self.n, self.k

    def __str__(self) -> str:
        return f"{self.op} {self.fmt.name} {self.m}x{self.n}x{self.k} ({self.precision})"


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

    @property
    def id(self) -> str:
        """Text that tells it from all others of its problem."""
        return json.dumps(self.as_dict(), sort_keys=True)

    def __str__(self) -> str:
        values = ", ".join(f"{k}={v}" for k, v in self.config.as_dict().items())
        return f"{self.walk.name}({values})"


def walks(target: Target, problem: Problem) -> list[Walk]:
    """Walks that may serve a problem.  "auto" allows float32 as well: it is never less accurate
    than what "auto" stands for."""
    stands_for = choose_precision(problem.precision, problem.fmt)
    allowed = {"", stands_for} | ({"fp32"} if problem.precision == "auto" else set())
    found = [
        one for one in target.walks
        if one.op == problem.op and one.precision in allowed and one.applies(problem.fmt) is None
    ]  # fmt: skip
    if not found:
        target.walk(problem.op, problem.fmt, stands_for)  # says why
        raise TargetError(f"target {target.name} has no walk for {problem}")
    # the order of the manifest is that of preference, but what was asked for comes first
    return sorted(found, key=lambda one: one.precision not in ("", stands_for))


def default(target: Target, caps: Capabilities, problem: Problem) -> Candidate:
    """What serves a problem that was never tuned."""
    one = target.walk(problem.op, problem.fmt, choose_precision(problem.precision, problem.fmt))
    return Candidate(one, one.config.default(caps, row_bucket(problem.m)))


def refusal(candidate: Candidate, caps: Capabilities) -> str | None:
    """Why a device cannot run a candidate, or None."""
    lacking = [f for f in candidate.walk.features if f not in caps.features]
    if lacking:
        return f"the device lacks {', '.join(lacking)}"
    if candidate.config.rounding:
        # no precision stands for it yet, and "auto" must not lose what larger numbers need
        return "it keeps numbers with fewer bits than was asked for"
    return candidate.config.legal(caps)


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
        reason = refusal(one, caps)
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
    fields of configurations, under the name of their class where there is more than one."""
    found: dict[str, dict[Any, None]] = {}
    for one in space.legal:
        for name, value in values_of(space, one).items():
            found.setdefault(name, {})[value] = None
    return {
        name: sorted(values) if all(isinstance(v, int) for v in values) else list(values)
        for name, values in found.items()
    }


def values_of(space: Space, candidate: Candidate) -> dict[str, Any]:
    """The parameters of a candidate by name."""
    classes = {type(one.config) for one in space.legal}
    prefix = f"{type(candidate.config).__name__}." if len(classes) > 1 else ""
    fields = {prefix + name: value for name, value in candidate.config.as_dict().items()}
    return {"walk": candidate.walk.name, **fields}


def distance(one: dict[str, Any], other: dict[str, Any]) -> float:
    """How unlike two candidates are, by their parameters: numbers on a logarithmic scale, other
    values equal or not."""
    total = 0.0
    for name in one.keys() | other.keys():
        a, b = one.get(name), other.get(name)
        if a == b:
            continue
        numbers = isinstance(a, int) and isinstance(b, int) and a > 0 and b > 0
        total += abs(math.log2(a / b)) if numbers else 1.5  # type: ignore[operator]
    return total


def walk_named(target: Target, op: str, name: str) -> Walk | None:
    """A walk by its name, or None."""
    return next((w for w in target.walks if w.op == op and w.name == name), None)


@functools.lru_cache(maxsize=1024)
def walk_hash(one: Walk, fmt: BlockFormat, target: Target) -> str:
    """Hash of all that makes the kernels of a walk for a format: the text of the default one, and
    the files that it includes.  The version of kernelgen alone changes nothing."""
    kernel = generate_walk(one, fmt, target, one.config.default(target.capabilities))
    text = re.sub(r"Generated by kernelgen \S+ walk.*", "", kernel.source)
    digest = hashlib.sha256(text.replace(kernel.hash, "").encode())
    place = files("kernelgen") / "targets" / target.name
    for name in target.support_files:
        digest.update(name.encode() + (place / name).read_bytes())
    digest.update(json.dumps([f.name for f in dataclasses.fields(one.config)]).encode())
    return digest.hexdigest()[:16]

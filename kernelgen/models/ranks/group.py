"""What ranks do together; in one process, nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Self, TypeVar

import numpy.typing as npt

from kernelgen.models.hyperparameters import Hyperparameters
from kernelgen.models.ranks.plan import Part, Plan, shares

Array = npt.NDArray[Any]
#: a sequence, counted from 0, and the tokens that it gets
Turn = tuple[int, Sequence[int]]
T = TypeVar("T")


class Ranks:
    """One process alone, which holds all of a model.

    `kernelgen.models.connect` gives one of many: each calls the same methods in the same order,
    and every array is the same on all of them afterwards.

    rank, count       of all ranks
    replica, replicas of those that share out prompts
    stages            that a call of the model goes through
    """

    rank = replica = 0
    count = replicas = stages = 1

    def plan(self, shape: Hyperparameters, tensors: Mapping[str, Any], where: str) -> Part:
        """What this rank holds of a model; see `Plan` for what it refuses."""
        return Plan(shape, tensors, where=where).part()

    def __str__(self) -> str:
        return "1 process"

    def pieces(self, turns: Sequence[Turn]) -> list[list[Turn]]:
        """The same tokens in micro-batches, which go through the stages one behind the other."""
        return [list(turns)]

    def sum(self, x: Array) -> Array:
        """The sum of x over the tensor ranks."""
        return x

    def receive(self, shape: tuple[int, ...]) -> Array:
        """float32 of a shape, from the stage before this one."""
        raise AssertionError("a first stage has none before it")

    def send(self, x: Array) -> None:
        """Send x to the stage behind this one, and go on."""
        raise AssertionError("a last stage has none behind it")

    def logits(self, make: Callable[[], Array], rows: int, vocabulary: int) -> Array:
        """float32 (rows, vocabulary) on all ranks: each tensor rank of the last stage makes those
        of its part of the vocabulary."""
        return make()

    def together(self) -> contextlib.AbstractContextManager[None]:
        """A context that ends on no rank as long as another is in it; where it failed on one, it
        fails on all, each with the same sentence."""
        return contextlib.nullcontext()

    def own(self, prompts: Sequence[T]) -> list[T]:
        """Those of rank 0's prompts that are for this replica; all ranks call it."""
        return list(prompts)

    def collect(self, answers: Sequence[T]) -> list[T]:
        """What all replicas made of `own` prompts, in the order of the prompts."""
        return list(answers)

    def everywhere(self, what: T) -> list[T]:
        """What every rank says, by rank; all wait for it."""
        return [what]

    def close(self, failure: str | None = None) -> None:
        """Wait until all are done; with a failure, leave at once and tell the others."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self.close(None if error is None else str(error) or type(error).__name__)


def split(turns: Sequence[Turn], pieces: int) -> list[list[Turn]]:
    """Tokens in the order of `turns` in so many lists that differ by at most one token."""
    ends = [0]
    for _, tokens in turns:
        ends.append(ends[-1] + len(tokens))
    found = []
    for some in shares(ends[-1], min(pieces, ends[-1])):
        piece: list[Turn] = []
        for (sequence, tokens), start in zip(turns, ends, strict=False):
            a, b = max(some.start - start, 0), min(some.stop - start, len(tokens))
            if a < b:
                piece.append((sequence, tokens[a:b]))
        found.append(piece)
    return found


def dealt(items: Sequence[T], to: int, of: int) -> list[T]:
    """Every `of`th item, from number `to` on."""
    return list(items[to::of])


def undealt(hands: Sequence[Sequence[T]]) -> Iterator[T]:
    """Items that were `dealt` to all, in their first order."""
    for n in range(max(map(len, hands), default=0)):
        for hand in hands:
            if n < len(hand):
                yield hand[n]

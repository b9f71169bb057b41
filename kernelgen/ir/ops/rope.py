"""How far rotary positions turn: frequencies of pairs, and how models with long contexts change
them.

Sources: Su et al., "RoFormer" (2021); Chen et al., "Extending context window of large language
models via positional interpolation" (2023) for linear scaling; Peng et al., "YaRN" (2023); the
configuration of Llama 3.1 and its reference code for the last.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kernelgen.errors import ShapeError

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Linear:
    """All angles are divided by a factor."""

    factor: float


@dataclass(frozen=True)
class Yarn:
    """Pairs that turn often over the trained context stay as they are, those that do not turn once
    are slowed down by a factor, and between there is a ramp.

    factor     new context over trained context
    context    positions that the model was trained with
    fast, slow   turns over the context from which, and up to which, a pair is one or the other
    magnitude  of sine and cosine; by default 0.1 * log(factor) + 1
    """

    factor: float
    context: int
    fast: float = 32.0
    slow: float = 1.0
    magnitude: float | None = None


@dataclass(frozen=True)
class Llama3:
    """Pairs of long waves are slowed down by a factor, those of short waves are not, and between
    there is a ramp in their number of turns over the trained context."""

    factor: float
    context: int
    low: float = 1.0
    high: float = 4.0


@dataclass(frozen=True)
class Factors:
    """Each pair is slowed down by a factor of its own, as files that were converted say it."""

    factors: tuple[float, ...]


Scaling = Linear | Yarn | Llama3 | Factors


def frequencies(dims: int, base: float = 10000.0, scaling: Scaling | None = None) -> Array:
    """Radians that each of dims / 2 pairs turns from one position to the next, float64."""
    if dims <= 0 or dims % 2:
        raise ShapeError(f"{dims} elements were to be turned; they are pairs, so an even number")
    plain = float(base) ** (-np.arange(0, dims, 2, dtype=np.float64) / dims)
    if scaling is None:
        return plain
    if isinstance(scaling, Linear):
        slowed: Array = plain / scaling.factor
        return slowed
    if isinstance(scaling, Factors):
        if len(scaling.factors) != dims // 2:
            raise ShapeError(
                f"{len(scaling.factors)} factors were given for {dims // 2} pairs; each has one"
            )
        each: Array = plain / np.asarray(scaling.factors, np.float64)
        return each
    if isinstance(scaling, Yarn):

        def pair_of(turns: float) -> float:
            """The pair that turns so often over the context."""
            ratio = scaling.context / (turns * 2 * math.pi)
            return dims * math.log(ratio) / (2 * math.log(base))

        first = max(0, math.floor(pair_of(scaling.fast)))
        last = min(dims - 1, math.ceil(pair_of(scaling.slow)))
        width = last - first if last > first else 0.001
        ramp = np.clip((np.arange(dims // 2) - first) / width, 0, 1)
        mixed: Array = plain * (1 - ramp) + plain / scaling.factor * ramp
        return mixed
    turns = scaling.context * plain / (2 * math.pi)
    part = np.clip((turns - scaling.low) / (scaling.high - scaling.low), 0, 1)
    between: Array = plain * part + plain / scaling.factor * (1 - part)
    return between


@functools.lru_cache(maxsize=64)
def turns_of(dims: int, base: float, scaling: Scaling | None) -> tuple[Array, Array]:
    """`turns` of `frequencies`; both read-only."""
    found = turns(frequencies(dims, base, scaling))
    for one in found:
        one.flags.writeable = False
    return found


def magnitude(scaling: Scaling | None) -> float:
    """What sine and cosine are multiplied by."""
    if not isinstance(scaling, Yarn):
        return 1.0
    if scaling.magnitude is not None:
        return scaling.magnitude
    return 0.1 * math.log(scaling.factor) + 1.0 if scaling.factor > 1 else 1.0


def turns(radians: Array) -> tuple[Array, Array]:
    """Angles as whole numbers, u32: of 2^-32 of a turn, and the rest of 2^-48 of a turn."""
    # 53 bits of a float64 hold 48 below the point, as a turn and more is none
    whole = np.floor(radians / (2 * math.pi) % 1.0 * 2.0**48 + 0.5).astype(np.uint64)
    low, high = whole & np.uint64(0xFFFF), (whole >> np.uint64(16)) & np.uint64(0xFFFFFFFF)
    return high.astype(np.uint32), low.astype(np.uint32)

"""How fast a model is: tokens of a prompt, and tokens that follow, in a second."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from kernelgen.errors import ShapeError
from kernelgen.models.generation import BATCH
from kernelgen.models.llama import Decoder, Sequences
from kernelgen.models.ranks.group import Ranks


@dataclass(frozen=True)
class Speed:
    """A test: `test` is called as llama-bench calls it, pp512 or tg128.

    tenants   sequences at once; tokens of all count
    mean, deviation  tokens in a second, over the repeats
    cache_bytes      of keys and values of all tenants
    """

    test: str
    tenants: int
    mean: float
    deviation: float
    cache_bytes: int

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for --json."""
        return asdict(self)


def speeds(
    model: Decoder,
    *,
    prompt: int = 512,
    tokens: int = 128,
    tenants: int = 1,
    repeats: int = 5,
    format: str = "f16",
    value_format: str | None = None,
) -> list[Speed]:
    """Time a prompt of `prompt` random tokens, and `tokens` tokens one after the other, from an
    empty cache, for `tenants` sequences at once; 0 leaves a test out.

    The first run of each test, which compiles and repacks, is not timed.  Of several replicas each
    has as many tenants, and tokens of all count; bytes are those of all ranks.
    """
    longest = max(prompt, tokens)
    if min(prompt, tokens) < 0 or min(longest, tenants, repeats) < 1:
        raise ShapeError(
            f"{prompt} and {tokens} tokens of {tenants} tenants were to be timed {repeats} times;"
            " none is below 0, and there is something to do"
        )
    if longest > model.shape.context:
        raise ShapeError(
            f"{longest} tokens do not fit the model's context of {model.shape.context}"
        )
    cache = model.sequences(tenants, capacity=longest, format=format, value_format=value_format)
    random, size = np.random.default_rng(0), BATCH * model.ranks.stages

    def ids(count: int) -> list[int]:
        return [int(one) for one in random.integers(0, model.vocabulary, count)]

    def read() -> None:
        for sequence in range(tenants):
            for start in range(0, prompt, size):
                model.forward([(sequence, ids(min(size, prompt - start)))], cache)

    def write() -> None:
        for _ in range(tokens):
            model.forward([(sequence, ids(1)) for sequence in range(tenants)], cache)

    tests = (("pp", prompt, read), ("tg", tokens, write))
    return [
        _of_all(
            model.ranks,
            _timed(f"{name}{count}", run, count * tenants, tenants, repeats, cache, model.ranks),
        )
        for name, count, run in tests
        if count
    ]


def _of_all(ranks: Ranks, one: Speed) -> Speed:
    """What all replicas reached together, from what one did."""
    found = ranks.collect([one])
    return replace(
        one,
        tenants=one.tenants * ranks.replicas,
        mean=sum(each.mean for each in found),
        deviation=math.hypot(*(each.deviation for each in found)),
        cache_bytes=sum(ranks.everywhere(one.cache_bytes)),
    )


def _timed(
    name: str, run: Callable[[], None], count: int, tenants: int, repeats: int, cache: Sequences,
    ranks: Ranks,
) -> Speed:  # fmt: skip
    found = []
    for _ in range(repeats + 1):
        cache.truncate()
        ranks.everywhere(None)  # so that replicas begin together
        begin = time.perf_counter()
        run()
        found.append(count / (time.perf_counter() - begin))
    timed = found[1:]
    deviation = statistics.stdev(timed) if len(timed) > 1 else 0.0
    return Speed(name, tenants, statistics.mean(timed), deviation, cache.nbytes)

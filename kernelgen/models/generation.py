"""Text from a model, one token after the other; and how well a model foretells a text."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from kernelgen.errors import ShapeError
from kernelgen.models.llama import Decoder, Sequences
from kernelgen.models.sampling import Sampler

Array = npt.NDArray[Any]

#: tokens of a prompt that go through the model together, for each of its stages
BATCH = 512


class Generation:
    """The tokens that follow a prompt; iterate over it, once.

    model    the decoder
    prompt   its tokens, at least one
    count    tokens at most
    sampler  by default takes the most probable token
    ends     tokens after which nothing follows; they are not given out
    cache    an empty one of one sequence; by default one that is large enough

    `prompt_seconds` and `seconds` are what the prompt and the rest took so far, `tokens` is how
    many were given out.  Where the context of the model is full, generation ends.
    """

    def __init__(
        self,
        model: Decoder,
        prompt: Sequence[int],
        count: int,
        *,
        sampler: Sampler | None = None,
        ends: Collection[int] = (),
        cache: Sequences | None = None,
    ) -> None:
        if not prompt or count < 0:
            raise ShapeError(
                f"{count} tokens after a prompt of {len(prompt)} were asked for; a prompt has at"
                " least one"
            )
        if len(prompt) > model.shape.context:
            raise ShapeError(
                f"the prompt has {len(prompt)} tokens, and the model a context of"
                f" {model.shape.context}; shorten it"
            )
        self.model, self.prompt, self.ends = model, list(prompt), frozenset(ends)
        self._count = min(count, model.shape.context - len(prompt) + 1)
        self._sampler = sampler or Sampler()
        self._cache = cache or model.sequences(capacity=len(prompt) + max(1, self._count))
        self.prompt_seconds = self.seconds = 0.0
        self.tokens = 0

    def __iter__(self) -> Iterator[int]:
        if not self._count:
            return
        begin = time.perf_counter()
        logits = read_prompt(self.model, self.prompt, self._cache)
        self.prompt_seconds = time.perf_counter() - begin
        while True:
            begin = time.perf_counter()
            token = self._sampler(logits)
            self.seconds += time.perf_counter() - begin
            if token in self.ends:
                return
            self.tokens += 1
            yield token
            if self.tokens >= self._count:
                return
            begin = time.perf_counter()
            logits = self.model.forward([(0, [token])], self._cache)[0]
            self.seconds += time.perf_counter() - begin


def read_prompt(model: Decoder, prompt: Sequence[int], cache: Sequences) -> Array:
    """Logits (vocabulary,) after a prompt, which goes into sequence 0 of the cache."""
    logits = np.empty((1, 0), np.float32)
    size = BATCH * model.ranks.stages
    for start in range(0, len(prompt), size):
        logits = model.forward([(0, prompt[start : start + size])], cache)
    found: Array = logits[-1]
    return found


def perplexity(
    model: Decoder,
    tokens: Sequence[int],
    *,
    context: int = 512,
    bos: int | None = None,
    format: str = "f16",
    value_format: str | None = None,
    tell: Callable[[int, int, float], object] = lambda done, of, value: None,
) -> float:
    """exp of the mean of -log p over tokens, as llama.cpp computes it: the text is cut into parts
    of `context` tokens, each begins anew (with `bos` in the place of its first token), and only the
    second half of each counts.

    tell   is called after each part: parts done, parts in all, perplexity so far
    Replicas share the parts.
    Raises ShapeError for a text shorter than two parts.
    """
    parts = len(tokens) // context if context >= 4 else 0
    if parts < 2 or context > model.shape.context:
        raise ShapeError(
            f"a text of {len(tokens)} tokens was given for parts of {context}; a part has 4 to"
            f" {model.shape.context} tokens, and a text at least two parts"
        )
    cache = model.sequences(capacity=context, format=format, value_format=value_format)
    total, count = 0.0, 0
    for n in model.ranks.own(range(parts)):
        part = list(tokens[n * context : (n + 1) * context])
        following = part[context // 2 + 1 :]
        if bos is not None:
            part[0] = bos
        cache.truncate()
        seen = [
            model.forward([(0, part[at : at + BATCH])], cache, every=True)
            for at in range(0, context, BATCH)
        ]
        logits = np.concatenate(seen)[context // 2 : -1]
        total += float(-_log_probabilities(logits, following).sum())
        count += len(following)
        tell(n + 1, parts, math.exp(total / count))
    totals, counts = zip(*model.ranks.collect([(total, count)]), strict=True)
    return math.exp(sum(totals) / sum(counts))


def _log_probabilities(logits: Array, tokens: Sequence[int]) -> Array:
    """log p of tokens (T,), each after logits (T, vocabulary)."""
    x = logits.astype(np.float64)
    x -= x.max(axis=-1, keepdims=True)
    sums = np.log(np.exp(x).sum(axis=-1))
    found: Array = x[np.arange(len(tokens)), np.asarray(tokens)] - sums
    return found

"""Which token comes next: the most probable one, or one by chance.

Sources: Fan et al., "Hierarchical neural story generation" (2018) for top-k; Holtzman et al., "The
curious case of neural text degeneration" (2020) for top-p.  The order of steps is llama.cpp's.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from kernelgen.errors import ConfigError, KernelgenError

Array = npt.NDArray[Any]


class Sampler:
    """Picks tokens from logits.

    temperature  0 takes the largest logit; else logits are divided by it
    top_k        only so many of the largest take part; 0: all
    top_p        of these only the fewest, from the largest down, that together have this
                 probability (before the temperature); 1: all
    seed         of the random numbers: the same seed gives the same tokens from the same logits
    """

    def __init__(
        self, temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0, seed: int = 0
    ) -> None:
        if not (temperature >= 0 and top_k >= 0 and 0 < top_p <= 1 and seed >= 0):
            raise ConfigError(
                f"temperature {temperature}, top-k {top_k}, top-p {top_p} and seed {seed} were"
                " given; none is below 0, and top-p is above 0 and at most 1"
            )
        self.temperature, self.top_k, self.top_p = temperature, top_k, top_p
        self._random = np.random.default_rng(seed)

    def probabilities(self, logits: Array) -> Array:
        """What each token is picked with, float64 (vocabulary,), from logits of that shape."""
        x = np.asarray(_checked(logits), np.float64)
        found = np.zeros_like(x)
        if self.temperature == 0:
            found[x.argmax()] = 1.0
            return found
        order = _largest(x, self.top_k or x.size)
        if self.top_p < 1:
            reached = np.cumsum(_softmax(x[order]))
            order = order[: int(np.searchsorted(reached, self.top_p)) + 1]
        found[order] = _softmax(x[order] / self.temperature)
        return found

    def __call__(self, logits: Array) -> int:
        """The next token."""
        if self.temperature == 0:
            return int(_checked(logits).argmax())
        found = self.probabilities(logits)
        # the first whose share of the sum is above a random number; rounding may leave out the last
        at = np.searchsorted(np.cumsum(found), self._random.random() * found.sum(), side="right")
        return int(min(at, np.flatnonzero(found)[-1]))


def _checked(logits: Array) -> Array:
    x = np.asarray(logits)
    if x.ndim != 1 or not x.size or not np.isfinite(x.max()):
        raise KernelgenError(
            f"logits of shape {x.shape} that are not all numbers cannot be sampled; the"
            " model's weights, or its cache, are damaged"
        )
    return x


def _largest(x: Array, count: int) -> Array:
    """The places of the largest numbers, from the largest down; of equal ones the first come first.
    All are not sorted for a few of them."""
    places = np.arange(x.size)
    if count < x.size:
        places = np.flatnonzero(x >= np.partition(x, -count)[-count])
    found: Array = places[np.argsort(-x[places], kind="stable")][:count]
    return found


def _softmax(x: Array) -> Array:
    powers = np.exp(x - x.max())
    found: Array = powers / powers.sum()
    return found

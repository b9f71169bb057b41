"""New tokens on their way through the layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from kernelgen import recording
from kernelgen.kv_cache import KVCache
from kernelgen.models.ranks.group import Turn

Array = npt.NDArray[Any]


class Batch:
    """Equally many new tokens of each of some sequences; rows of activations are in their order.

    turns     the sequences and their tokens
    lengths   tokens that each sequence of a cache has, (all sequences,)

    ids      the tokens, int64 (tokens,)
    lengths  that the sequences will have with these, int32 (sequences,)
    decodes  whether these are single tokens that follow, not (pieces of) prompts
    """

    def __init__(self, turns: Sequence[Turn], lengths: Array, decodes: bool) -> None:
        self.decodes = decodes
        self._each = len(turns[0][1])
        self._sequences = [0] * len(turns)
        self.ids = np.empty(len(turns) * self._each, np.int64)
        self.lengths = np.empty(len(turns), np.int32)
        self._positions: dict[int, Array] = {}
        self.load(turns, lengths)

    def load(self, turns: Sequence[Turn], lengths: Array) -> None:
        """Take as many other tokens of as many sequences, in the same arrays."""
        self._sequences[:] = [sequence for sequence, _ in turns]
        self.ids[:] = [token for _, tokens in turns for token in tokens]
        self.lengths[:] = lengths[self._sequences] + self._each

    def positions(self, heads: int) -> Array:
        """Where each token stands, for each of so many heads: int32 (tokens, heads)."""
        found = self._positions.get(heads)
        if found is None:
            found = self._positions[heads] = np.empty((len(self.ids), heads), np.int32)
            by_sequence = found.reshape(len(self.lengths), self._each, heads)
            steps = np.arange(-self._each, 0, dtype=np.int32)[:, None]

            def fill() -> None:
                np.add(self.lengths[:, None, None], steps, out=by_sequence)

            recording.on_host(fill, (self.lengths,), (found,))
        return found

    def append(self, cache: KVCache, k: Array, v: Array, target: str) -> Array | None:
        """Keep keys and values (tokens, heads, elements); gives the pages of the sequences."""
        k, v = self.heads_first(k), self.heads_first(v)
        pool, pages = cache.pages, None
        if pool is not None:
            pages = np.empty((len(self.lengths), pool.shape[1]), np.int32)

        append = cache.appender(k, v, target=target)

        def keep() -> None:
            append(self._sequences)
            if pool is not None and pages is not None:
                np.take(pool, self._sequences, axis=0, out=pages)

        recording.on_host(keep, (k, v), () if pages is None else (pages,))
        return pages

    def heads_first(self, x: Array) -> Array:
        """Of (tokens, heads, elements) a view (sequences, heads, tokens of each, elements)."""
        return x.reshape(len(self.lengths), self._each, *x.shape[1:]).swapaxes(1, 2)

    def tokens_first(self, x: Array) -> Array:
        """Of what `heads_first` gives (tokens, heads * elements)."""
        return x.swapaxes(1, 2).reshape(len(self.ids), -1)

"""Configurations of walks that multiply tiles on the matrix units of a CPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from kernelgen.config.base import Capabilities, Config, choice


@dataclass(frozen=True)
class TileAttentionConfig(Config):
    """Tiles of 16 rows of queries, 16 keys and 32 elements, two by two.

    queries   rows that a thread has at once: positions times heads that share a head of K and V;
              their results and a span of K and V are to fit a core's second cache
    rows      of these, those that share what is loaded of a span, and
    keys      keys of a span: a softmax goes over both at once, and the scores are to fit the same
              cache
    few       up to so many rows take no tiles, and their keys are shared out to the threads where
              heads are too few for them
    """

    queries: int = choice(256, 32, 64, 128, 256, 512)
    rows: int = choice(64, 32, 64, 128)
    keys: int = choice(1024, 64, 128, 256, 512, 1024)
    few: int = choice(8, 0, 4, 8, 16)

    def legal(self, caps: Capabilities) -> str | None:
        """Parts are no larger than the whole."""
        if self.rows > self.queries:
            return f"{self.rows} rows at once; a thread has {self.queries}"
        return None


@dataclass(frozen=True)
class PartAttentionConfig(TileAttentionConfig):
    """The same for numbers that are sums of three: their tiles of weights and values take more of
    the cache."""

    keys: int = choice(512, 64, 128, 256, 512, 1024)


@dataclass(frozen=True)
class TileMatmulConfig(Config):
    """Two tiles of 16 rows of weights against tiles of 16 rows of activations.

    rows      of activations that meet what is decoded of the weights before it is decoded again;
              their sums, 128 bytes each, are to fit a core's cache
    pairs     of tiles of weights that meet the same activations before others are loaded
    depth     elements of a row of weights that are decoded at a time, or one block if that is more
    layout    weights are repacked once with `prepare`
    """

    rows: int = choice(256, 32, 64, 128, 256, 512)
    pairs: int = choice(8, 1, 2, 4, 8)
    depth: int = choice(256, 64, 128, 256, 512)
    layout: str = choice("interleaved", "interleaved")


@dataclass(frozen=True)
class FloatTileMatmulConfig(TileMatmulConfig):
    """The same in bfloat16."""

    rows: int = choice(512, 32, 64, 128, 256, 512)
    depth: int = choice(512, 64, 128, 256, 512)

    @classmethod
    def default(cls, caps: Capabilities, m: int = 0) -> Self:
        """Sums are loaded less often where more is decoded at a time; with few rows, time goes to
        the decode, whose results are to stay in the first cache besides what it reads."""
        return cls(depth=512 if m > 64 else 256)

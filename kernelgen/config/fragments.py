"""Configurations of walks on tensor cores, and of walks of warps."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Self

from kernelgen.config.base import Capabilities, Config, choice
from kernelgen.config.grids import ThreadsConfig


@dataclass(frozen=True)
class FragmentTileConfig(Config):
    """A block of `warps` warps multiplies on matrix units of 16 x 8 results: each warp has warp_n
    rows of weights to itself, which it decodes in registers, and all share tile_m rows of
    activations in shared memory.

    depth    elements along K of a stage
    stages   stages of shared memory, all but one of which are being filled
    split    blocks that share the K of one tile and add up
    workers  blocks in all, which share all tiles evenly, however many these are ("stream-K"); 0
             where `split` says it
    layout   "rows8": eight rows side by side
    """

    tile_m: int = choice(64, 8, 16, 32, 64, 128)
    warp_n: int = choice(32, 16, 32, 64)
    warps: int = choice(4, 2, 4, 8)
    depth: int = choice(64, 64, 128)
    stages: int = choice(3, 2, 3, 4)
    split: int = choice(1, 1, 2, 4, 8, 16)
    workers: int = choice(0, 0, 108, 132, 148, 264)
    layout: str = choice("rows8", "rows8")

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return 32 * self.warps

    @property
    def tile_n(self) -> int:
        """Rows of weights of a block."""
        return self.warp_n * self.warps

    @property
    def sums(self) -> int:
        """Results in the registers of each thread."""
        return self.warp_n * self.tile_m // 32

    def legal(self, caps: Capabilities) -> str | None:
        """Threads must fit the device, sums the registers."""
        if reason := caps.crowded(self.threads):
            return reason
        if self.sums > 128:
            return f"{self.sums} sums in each thread; 128 fit the registers"
        if self.workers and self.split > 1:
            return f"{self.workers} workers share all tiles, so that split must be 1"
        return self.lacks(caps)

    @classmethod
    def default(cls, caps: Capabilities, m: int = 0) -> Self:
        """A tile as high as there are rows of activations, at most 64; for few of them more
        blocks, as there are not enough tiles to fill a device."""
        tile_m = next(t for t in (8, 16, 32, 64) if t >= min(m or 64, 64))
        return cls(tile_m=tile_m, split=4 if tile_m <= 16 else 1)

    def smaller(self) -> Self | None:
        """Fewer stages, then fewer rows of weights."""
        if self.stages > 2:
            return dataclasses.replace(self, stages=self.stages - 1)
        if self.warp_n > 16:
            return dataclasses.replace(self, warp_n=self.warp_n // 2)
        return None


@dataclass(frozen=True)
class FragmentRowsConfig(FragmentTileConfig):
    """The same for at most eight rows of activations."""

    @classmethod
    def default(cls, caps: Capabilities, m: int = 1) -> Self:
        """The lowest tile."""
        return super().default(caps, m or 1)


@dataclass(frozen=True)
class BulkTileConfig(Config):
    """A block of `warps` warps, and one more that has the copy engine bring what they need,
    multiplies on matrix units of 64 x tile_m results, which four warps use together: each warp has
    warp_n rows of weights to itself, which it decodes in registers.

    stages   of 64 elements along K
    layout   "rows8": eight rows side by side
    """

    tile_m: int = choice(128, 16, 32, 64, 128, 256)
    warp_n: int = choice(16, 16, 32)
    warps: int = choice(8, 4, 8, 12)
    depth: int = choice(64, 64)
    stages: int = choice(4, 2, 3, 4, 6)
    layout: str = choice("rows8", "rows8")

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return 32 * self.warps + 32

    @property
    def tile_n(self) -> int:
        """Rows of weights of a block."""
        return self.warp_n * self.warps

    @property
    def sums(self) -> int:
        """Results in the registers of each thread."""
        return self.warp_n * self.tile_m // 32

    def legal(self, caps: Capabilities) -> str | None:
        """Threads must fit the device, sums the registers."""
        if reason := caps.crowded(self.threads):
            return reason
        if self.sums > 128:
            return f"{self.sums} sums in each thread; 128 fit the registers"
        return self.lacks(caps)

    @classmethod
    def default(cls, caps: Capabilities, m: int = 0) -> Self:
        """A tile as high as there are rows of activations, at most 128."""
        return cls(tile_m=next(t for t in (16, 32, 64, 128) if t >= min(m or 128, 128)))

    def smaller(self) -> Self | None:
        """Fewer stages."""
        fewer = next((n for n in (4, 3, 2) if n < self.stages), None)
        return dataclasses.replace(self, stages=fewer) if fewer else None


@dataclass(frozen=True)
class WarpMatvecConfig(ThreadsConfig):
    """Each group of 32 threads takes `rows` rows of weights, for `columns` rows of activations, and
    each thread of it `groups` groups of elements next to each other at once."""

    threads: int = choice(128, 64, 128, 256)
    rows: int = choice(2, 1, 2, 4)
    columns: int = choice(1, 1, 2, 4, 8)
    groups: int = choice(4, 1, 2, 4)

    def legal(self, caps: Capabilities) -> str | None:
        """All sums must fit the registers."""
        if self.rows * self.columns > 16:
            return f"{self.rows * self.columns} sums in each thread; 16 fit beside the words"
        return super().legal(caps)

    @classmethod
    def default(cls, caps: Capabilities, m: int = 1) -> Self:
        """As many columns as there are rows of activations, at most 8."""
        return cls(columns=next(c for c in (1, 2, 4, 8) if c >= min(m or 1, 8)))

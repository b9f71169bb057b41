"""Configurations of walks over grids of threads."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Self

from kernelgen.config.base import Capabilities, Config, choice


@dataclass(frozen=True)
class ThreadsConfig(Config):
    """A grid of groups of threads, each thread with its own elements.

    threads   threads of a group
    layout    "native": ggml's blocks; "planes": each field of all blocks together, which was the
              faster one, or as fast, for every kind of format where it was measured
    """

    threads: int = choice(64, 32, 64, 128, 256)
    layout: str = choice("planes", "native", "planes")

    def legal(self, caps: Capabilities) -> str | None:
        """A group must fit the device."""
        return caps.crowded(self.threads) or self.lacks(caps)


@dataclass(frozen=True)
class MatvecConfig(ThreadsConfig):
    """A group of threads shares the groups of `rows` rows of weights, for `columns` rows of
    activations at once.

    reduce    how the threads add their sums up: "shared": by halves, in shared memory;
              "subgroup": by the device's own sum over a subgroup, of whatever size, and the few
              that are left in shared memory
    """

    rows: int = choice(4, 1, 2, 4, 8)
    columns: int = choice(1, 1, 2, 4, 8)
    reduce: str = choice("shared", "shared", "subgroup")

    @property
    def features(self) -> tuple[str, ...]:
        """Sums over subgroups."""
        return ("subgroups",) if self.reduce == "subgroup" else ()

    def legal(self, caps: Capabilities) -> str | None:
        """The sums of all threads must fit shared memory."""
        needed = 4 * self.threads * self.rows * self.columns
        if needed > caps.shared_bytes:
            return f"{needed} bytes of shared memory; the device has {caps.shared_bytes}"
        return super().legal(caps)

    @classmethod
    def default(cls, caps: Capabilities, m: int = 1) -> Self:
        """As many columns as there are rows of activations, at most 8, and subgroups if any."""
        columns = next(c for c in (1, 2, 4, 8) if c >= min(m or 1, 8))
        reduce = "subgroup" if "subgroups" in caps.features else "shared"
        return cls(columns=columns, reduce=reduce)


@dataclass(frozen=True)
class DotMatvecConfig(MatvecConfig):
    """The same in integers.

    dot       four products of bytes: "plain": one by one; "packed": by an instruction
    """

    dot: str = choice("plain", "plain", "packed")

    @property
    def features(self) -> tuple[str, ...]:
        """The instruction, besides."""
        return super().features + (("dot",) if self.dot == "packed" else ())

    @classmethod
    def default(cls, caps: Capabilities, m: int = 1) -> Self:
        """With the instruction where there is one."""
        chosen = super().default(caps, m)
        return dataclasses.replace(chosen, dot="packed" if "dot" in caps.features else "plain")


@dataclass(frozen=True)
class TileConfig(Config):
    """A group computes tile_m x tile_n results, each thread thread_m x thread_n of them, from
    tiles of 32 k in shared memory."""

    tile_m: int = choice(32, 16, 32, 64)
    tile_n: int = choice(32, 16, 32, 64, 128)
    thread_m: int = choice(4, 1, 2, 4, 8)
    thread_n: int = choice(2, 1, 2, 4, 8)
    layout: str = choice("planes", "native", "planes")

    @property
    def threads(self) -> int:
        """Threads of a group."""
        return (self.tile_m // self.thread_m) * (self.tile_n // self.thread_n)

    @property
    def row_bytes(self) -> int:
        """Shared memory for a row of a tile, of either side."""
        return 4 * 32

    def legal(self, caps: Capabilities) -> str | None:
        """Threads and tiles must fit the device."""
        if not 32 <= self.threads <= caps.max_threads:
            return f"{self.threads} threads in a group; 32..{caps.max_threads} are allowed"
        needed = self.row_bytes * (self.tile_m + self.tile_n)
        if needed > caps.shared_bytes:
            return f"{needed} bytes of shared memory; the device has {caps.shared_bytes}"
        return self.lacks(caps)

    @classmethod
    def default(cls, caps: Capabilities, m: int = 0) -> Self:
        """For few rows of activations a tile that is not much higher.  Each thread has so many
        results that what it loads from shared memory serves several products."""
        fits = cls(tile_m=16, tile_n=64, thread_m=4, thread_n=4)
        for tile_m in (32, 64):
            larger = cls(tile_m=tile_m, tile_n=64, thread_m=8, thread_n=4)
            if (m == 0 or m > tile_m // 2) and larger.legal(caps) is None:
                fits = larger
        return fits


@dataclass(frozen=True)
class HalfTileConfig(TileConfig):
    """The same with tiles of half precision, which take half the memory; sums are float32."""

    @property
    def row_bytes(self) -> int:
        """Shared memory for a row of a tile, of either side."""
        return 2 * 32


@dataclass(frozen=True)
class DotTileConfig(TileConfig):
    """The same in integers.

    dot       four products of bytes: "plain": of floats, which hold them; "packed": by an
              instruction
    """

    dot: str = choice("plain", "plain", "packed")

    @property
    def features(self) -> tuple[str, ...]:
        """The instruction."""
        return ("dot",) if self.dot == "packed" else ()

    @property
    def row_bytes(self) -> int:
        """Shared memory for a row of a tile: codes, scale and offset."""
        return (32 if self.dot == "packed" else 4 * 32) + 8

    @classmethod
    def default(cls, caps: Capabilities, m: int = 0) -> Self:
        """With the instruction where there is one."""
        chosen = super().default(caps, m)
        return dataclasses.replace(chosen, dot="packed" if "dot" in caps.features else "plain")

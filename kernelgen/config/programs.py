"""Configurations of walks of programs that work on tensors."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Self

from kernelgen.config.base import Capabilities, Config, choice


@dataclass(frozen=True)
class ProgramConfig(Config):
    """A grid of programs that work on tensors; a compiler deals the elements out to threads.

    warps     groups of threads, as the hardware has them, of a program
    stages    turns of a loop whose loads are under way at once
    layout    "native": ggml's blocks; "planes": each field of all blocks together
    """

    warps: int = choice(4, 1, 2, 4, 8)
    stages: int = choice(2, 1, 2, 3, 4)
    layout: str = choice("native", "native", "planes")


@dataclass(frozen=True)
class ProgramBlocksConfig(ProgramConfig):
    """A program takes whole blocks, about `elements` elements together."""

    elements: int = choice(1024, 256, 512, 1024, 2048, 4096)


@dataclass(frozen=True)
class ProgramRowsConfig(ProgramConfig):
    """A program takes `rows` rows, and of each at least a group, about `elements` elements."""

    rows: int = choice(4, 1, 2, 4, 8)
    elements: int = choice(512, 128, 256, 512, 1024)


@dataclass(frozen=True)
class ProgramMatvecConfig(ProgramConfig):
    """A program takes `rows` rows of weights, `depth` elements of each at once, for `columns` rows
    of activations."""

    rows: int = choice(4, 1, 2, 4, 8, 16)
    columns: int = choice(1, 1, 2, 4, 8)
    depth: int = choice(512, 128, 256, 512, 1024, 2048)

    def legal(self, caps: Capabilities) -> str | None:
        """All sums must fit the registers."""
        sums = self.rows * self.columns * self.depth // (32 * self.warps)
        if sums > 128:
            return f"{sums} sums in each thread; 128 fit the registers"
        return self.lacks(caps)

    @classmethod
    def default(cls, caps: Capabilities, m: int = 1) -> Self:
        """As many columns as there are rows of activations, at most 8, and about as many sums.
        Where kernels are interpreted, many rows: each operation costs the same, whatever its size.
        """
        columns = next(c for c in (1, 2, 4, 8) if c >= min(m or 1, 8))
        if "interpreted" in caps.features:
            return cls(columns=columns, rows=16 if columns < 4 else 4)
        return cls(columns=columns, rows=4 if columns < 4 else 2)


@dataclass(frozen=True)
class ProgramDotMatvecConfig(ProgramMatvecConfig):
    """The same in integers.

    dot    four products of bytes: "plain": one by one; "packed": by an instruction
    """

    dot: str = choice("plain", "plain", "packed")

    @property
    def features(self) -> tuple[str, ...]:
        """The instruction."""
        return ("dot",) if self.dot == "packed" else ()

    @classmethod
    def default(cls, caps: Capabilities, m: int = 1) -> Self:
        """With the instruction where there is one."""
        chosen = super().default(caps, m)
        return dataclasses.replace(chosen, dot="packed" if "dot" in caps.features else "plain")


@dataclass(frozen=True)
class FloatDots(ProgramConfig):
    """Tiles that are multiplied in float32.

    dot    how: "ieee": as such; "tf32x3": on matrix units, in parts of fewer bits that together
           keep all
    """

    dot: str = choice("ieee", "ieee", "tf32x3")

    @property
    def features(self) -> tuple[str, ...]:
        """Matrix units that multiply parts of float32."""
        return ("tf32x3",) if self.dot == "tf32x3" else ()

    @property
    def element_bytes(self) -> int:
        """Bytes of a number in a tile."""
        return 4


@dataclass(frozen=True)
class ProgramHalfTileConfig(ProgramConfig):
    """A program computes tile_m x tile_n results from tiles of about `depth` elements of each row,
    which are rounded to half precision and multiplied on matrix units; sums are float32."""

    tile_m: int = choice(64, 16, 32, 64, 128)
    tile_n: int = choice(64, 16, 32, 64, 128)
    depth: int = choice(32, 16, 32, 64, 128)

    @property
    def element_bytes(self) -> int:
        """Bytes of a weight in a tile."""
        return 2

    def legal(self, caps: Capabilities) -> str | None:
        """Tiles must fit shared memory."""
        activations = 4 * self.tile_m * max(1, self.stages - 1)
        needed = self.depth * (self.element_bytes * self.tile_n + activations)
        if needed > caps.shared_bytes:
            return f"{needed} bytes of shared memory; the device has {caps.shared_bytes}"
        return self.lacks(caps)


@dataclass(frozen=True)
class ProgramTileConfig(FloatDots, ProgramHalfTileConfig):
    """The same in float32."""


@dataclass(frozen=True)
class ProgramDotTileConfig(ProgramConfig):
    """A program computes tile_m x tile_n results in integers, from at most `depth` elements of a
    group at once.

    unroll    whether the groups of a block are written out, each with its own constants
    """

    tile_m: int = choice(64, 16, 32, 64, 128)
    tile_n: int = choice(64, 16, 32, 64, 128)
    depth: int = choice(32, 32, 64, 128)
    unroll: bool = choice(False, False, True)

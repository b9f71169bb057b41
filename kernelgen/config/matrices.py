"""Configurations of what only this target has: products of 8 x 8 matrices by SIMD-groups."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from kernelgen.config.base import Capabilities, Config, choice

#: threads of a SIMD-group, on every GPU of Apple's
SIMD = 32

#: registers of each thread that sums may take; a matrix takes two
SUM_REGISTERS = 64


@dataclass(frozen=True)
class MatrixTileConfig(Config):
    """A threadgroup computes tile_m x tile_n results, shared among simd_m x simd_n SIMD-groups,
    from tiles of `depth` k in threadgroup memory.

    words      words of four codes that a thread decodes in a row, where a group has as many
    padding    units of 16 bytes behind each row of a tile, so that the rows of a matrix lie in
               different banks
    buffers    pairs of tiles: with two, one is filled while the other is multiplied
    """

    tile_m: int = choice(32, 16, 32, 64, 128)
    tile_n: int = choice(64, 32, 64, 128)
    depth: int = choice(32, 16, 32, 64)
    simd_m: int = choice(2, 1, 2, 4)
    simd_n: int = choice(2, 1, 2, 4)
    words: int = choice(4, 1, 2, 4)
    padding: int = choice(1, 0, 1)
    buffers: int = choice(1, 1, 2)
    layout: str = choice("planes", "native", "planes")

    @property
    def threads(self) -> int:
        """Threads of a threadgroup."""
        return SIMD * self.simd_m * self.simd_n

    @property
    def number_bytes(self) -> int:
        """Bytes of a number in a tile."""
        return 4

    @property
    def longest_sum(self) -> int | None:
        """Elements along k that are summed in a row, a multiple of any depth, where the sum is to
        be as exact as the numbers are; None where it need not be."""
        return 128

    @property
    def pitch(self) -> int:
        """Numbers from one row of a tile to the next."""
        return self.depth + self.padding * 16 // self.number_bytes

    @property
    def shared_bytes(self) -> int:
        """Threadgroup memory: the tiles, and for each SIMD-group an 8 x 8 matrix of results."""
        tiles = self.buffers * (self.tile_m + self.tile_n) * self.pitch * self.number_bytes
        return tiles + 4 * 64 * self.simd_m * self.simd_n

    def legal(self, caps: Capabilities) -> str | None:
        """SIMD-groups must divide the tile into matrices; these, and the tiles, must fit."""
        for side, tile, groups in (
            ("m", self.tile_m, self.simd_m),
            ("n", self.tile_n, self.simd_n),
        ):
            if tile % (8 * groups):
                return f"a tile of {tile} along {side} does not divide into {groups} times 8"
        if reason := caps.crowded(self.threads):
            return reason
        kept = 1 if self.longest_sum is None else 2
        registers = kept * self.tile_m * self.tile_n // self.threads
        if registers > SUM_REGISTERS:
            return f"{registers} registers of each thread for sums; {SUM_REGISTERS} are allowed"
        if self.shared_bytes > caps.shared_bytes:
            return f"{self.shared_bytes} bytes of shared memory; the device has {caps.shared_bytes}"
        return self.lacks(caps)

    @classmethod
    def default(cls, caps: Capabilities, m: int = 0) -> Self:
        """For few rows of activations, a tile that is not much higher."""
        return cls(tile_m=16, simd_m=1, simd_n=4) if 0 < m <= 16 else cls()


@dataclass(frozen=True)
class HalfMatrixTileConfig(MatrixTileConfig):
    """The same with tiles of numbers of 16 bits, which take half the memory; sums are float32."""

    @property
    def number_bytes(self) -> int:
        """Bytes of a number in a tile."""
        return 2

    @property
    def longest_sum(self) -> int | None:
        """The numbers themselves are off by far more than their sum."""
        return None

"""Configurations of attention: which queries share what is loaded of K and V, and in what parts."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Self

from kernelgen.config.base import Capabilities, Config, choice
from kernelgen.config.programs import FloatDots, ProgramConfig


@dataclass(frozen=True)
class AttentionConfig(Config):
    """A group of threads takes `rows` queries, and `keys` keys at a time, which it decodes into
    shared memory, at most `depth` elements of each at once.

    rows         queries of a group
    thread_rows  of a thread, which has thread_rows x thread_keys scores of a tile and a part of
                 thread_rows rows of the result
    share        what these queries are: "query": of one head; "group": of all heads that share K
                 and V, so that these are loaded once for all of them
    splits       groups that share the keys of the same queries; another kernel adds up
    """

    rows: int = choice(32, 1, 2, 4, 8, 16, 32, 64)
    thread_rows: int = choice(4, 1, 2, 4, 8)
    keys: int = choice(32, 16, 32, 64, 128)
    thread_keys: int = choice(4, 1, 2, 4, 8)
    depth: int = choice(32, 16, 32, 64, 128)
    share: str = choice("query", "query", "group")
    splits: int = choice(1, 1, 2, 4, 8, 16, 32)

    @property
    def lanes(self) -> int:
        """Threads that share a row."""
        return self.keys // self.thread_keys

    @property
    def threads(self) -> int:
        """Threads of a group."""
        return self.rows // self.thread_rows * self.lanes

    def legal(self, caps: Capabilities) -> str | None:
        """Threads must fit the device, and have a row at least."""
        if self.thread_rows > self.rows:
            return f"{self.thread_rows} rows in each thread; a group has {self.rows}"
        if not 32 <= self.threads <= caps.max_threads:
            return f"{self.threads} threads in a group; 32..{caps.max_threads} are allowed"
        return self.lacks(caps)

    @classmethod
    def default(cls, caps: Capabilities, m: int = 0) -> Self:
        """For `m` queries of each head: for a few, as when one token follows the other, no more
        rows than heads are likely to give, and many groups that share the keys."""
        if m == 0 or m >= 16:
            return cls()
        rows = 4 if m == 1 else 8 if m == 2 else 16
        return cls(rows=rows, thread_rows=rows // 4, keys=64, depth=64, share="group", splits=8)

    def smaller(self) -> Self | None:
        """Half the depth while it is large, half the rows, half the keys, then half the depth."""
        if self.depth > 32:
            return dataclasses.replace(self, depth=self.depth // 2)
        if self.rows > 8:
            fewer = max(1, self.thread_rows // 2)
            return dataclasses.replace(self, rows=self.rows // 2, thread_rows=fewer)
        if self.keys > 32:
            fewer = max(1, self.thread_keys // 2)
            return dataclasses.replace(self, keys=self.keys // 2, thread_keys=fewer)
        if self.depth > 16:
            return dataclasses.replace(self, depth=self.depth // 2)
        return None


@dataclass(frozen=True)
class CombineConfig(Config):
    """A grid of groups of threads, each thread with elements of its own."""

    threads: int = choice(64, 32, 64, 128, 256)

    def legal(self, caps: Capabilities) -> str | None:
        """A group must fit the device."""
        return caps.crowded(self.threads) or self.lacks(caps)


@dataclass(frozen=True)
class ProgramHalfAttentionConfig(ProgramConfig):
    """A program takes `rows` rows and `keys` keys at once, which are rounded to half precision and
    multiplied on matrix units; sums are float32.

    rows     queries, of all heads that share a head of K and V
    splits   programs that share the keys of the same rows; another kernel adds up
    """

    layout: str = choice("native", "native")
    rows: int = choice(64, 16, 32, 64, 128)
    keys: int = choice(64, 16, 32, 64, 128)
    splits: int = choice(1, 1, 2, 4, 8, 16, 32)

    @property
    def element_bytes(self) -> int:
        """Bytes of a number that is multiplied."""
        return 2

    def legal(self, caps: Capabilities) -> str | None:
        """Features must be there; what memory it takes depends on the kind of attention."""
        return self.lacks(caps)

    @classmethod
    def default(cls, caps: Capabilities, m: int = 0) -> Self:
        """For `m` queries of each head: for a few, as when one token follows the other, as few rows
        as matrix units take, and many programs that share the keys.  Where kernels are interpreted,
        large tiles: each operation costs about the same, whatever its size."""
        few = 0 < m <= 8
        if "interpreted" in caps.features:
            return cls(rows=32 if few else 128, keys=128, splits=2 if few else 1)
        return cls(rows=16, splits=8) if few else cls()

    def smaller(self) -> Self | None:
        """Half the keys, then half the rows."""
        if self.keys > 32:
            return dataclasses.replace(self, keys=self.keys // 2)
        if self.rows > 16:
            return dataclasses.replace(self, rows=self.rows // 2)
        if self.keys > 16:
            return dataclasses.replace(self, keys=self.keys // 2)
        return None


@dataclass(frozen=True)
class ProgramAttentionConfig(FloatDots, ProgramHalfAttentionConfig):
    """The same in float32."""


@dataclass(frozen=True)
class ProgramCombineConfig(ProgramConfig):
    """A program adds up the parts of `rows` rows."""

    layout: str = choice("native", "native")
    rows: int = choice(4, 1, 2, 4, 8)


@dataclass(frozen=True)
class CAttentionConfig(Config):
    """Tiles of queries and keys.

    rows      rows of scores that registers hold at once, times `vectors` vectors
    queries   rows of a tile of queries: positions times heads that share a head of K and V
    keys      keys of a tile, whose K and V are decoded once for all of them
    few       up to so many rows K and V are decoded in registers, and the keys are shared out to
              the threads where heads are too few for them
    """

    rows: int = choice(8, 2, 3, 4, 5, 6, 7, 8, 12)
    vectors: int = choice(2, 1, 2, 3, 4, 6)
    queries: int = choice(192, 24, 48, 72, 96, 144, 192, 384)
    keys: int = choice(64, 32, 48, 64, 96, 128)
    few: int = choice(8, 0, 4, 8, 16)

    def legal(self, caps: Capabilities) -> str | None:
        """Sums and what they are made of must fit the registers, vectors the tile."""
        needed = self.rows * self.vectors + self.vectors + 1
        if needed > caps.registers:
            return (
                f"{self.rows} rows of {self.vectors} vectors need {needed} registers, the device"
                f" has {caps.registers}"
            )
        if self.keys % (self.vectors * caps.lanes):
            return (
                f"{self.keys} keys are no multiple of {self.vectors} vectors of {caps.lanes} lanes"
            )
        return None

    @classmethod
    def default(cls, caps: Capabilities, m: int = 0) -> Self:
        """As many rows as the registers hold sums of, with two vectors each."""
        return cls(rows=8 if caps.registers >= 32 else 6)


@dataclass(frozen=True)
class FragmentAttentionConfig(Config):
    """A block of `warps` warps multiplies on matrix units of 16 x 8 results, with K and V in shared
    memory in half precision; sums are float32 and stay in registers.

    warps       of a block, in `warps / key_warps` parts of as many rows
    warp_rows   queries of a warp
    key_warps   warps that have the same queries and share the keys of a tile
    keys        keys of a tile
    stages      tiles in shared memory, all but one of which are being filled
    share       what the queries of a block are: "query": of one head; "group": of all heads that
                share K and V, so that these are loaded once for all of them
    splits      blocks that share the keys of the same queries; another kernel adds up
    """

    warps: int = choice(4, 1, 2, 4, 8)
    warp_rows: int = choice(32, 16, 32)
    key_warps: int = choice(1, 1, 2, 4, 8)
    keys: int = choice(64, 16, 32, 64, 128)
    stages: int = choice(2, 2, 3)
    share: str = choice("query", "query", "group")
    splits: int = choice(1, 1, 2, 4, 8, 16, 32)

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return 32 * self.warps

    @property
    def rows(self) -> int:
        """Queries of a block."""
        return self.warp_rows * self.warps // self.key_warps

    @property
    def warp_keys(self) -> int:
        """Keys of a tile that a warp has."""
        return self.keys // self.key_warps

    def legal(self, caps: Capabilities) -> str | None:
        """Threads must fit the device; each warp needs rows, and 16 keys of a tile."""
        if reason := caps.crowded(self.threads):
            return reason
        if self.key_warps > self.warps:
            return f"{self.key_warps} warps share the keys; a block has {self.warps}"
        if self.warp_keys < 16:
            return f"{self.warp_keys} keys in each warp; matrix units take 16"
        return self.lacks(caps)

    @classmethod
    def default(cls, caps: Capabilities, m: int = 0) -> Self:
        """For `m` queries of each head: for a few, as when one token follows the other, as few rows
        as matrix units take, of all heads that share K and V, and many blocks that share the
        keys."""
        if 0 < m <= 8:
            return cls(warp_rows=16, key_warps=4, share="group", splits=16)
        if 0 < m <= 64:
            return cls(warp_rows=16, share="group", splits=4)
        return cls()

    def smaller(self) -> Self | None:
        """Fewer stages; then half the keys, of each warp or with half the warps where these share
        them; fewer rows."""
        if self.stages > 2:
            return dataclasses.replace(self, stages=self.stages - 1)
        if self.warp_rows > 16 and self.warp_keys <= 32:
            return dataclasses.replace(self, warp_rows=16, keys=min(2 * self.keys, 128))
        if self.warp_keys > 16:
            return dataclasses.replace(self, keys=self.keys // 2)
        if self.key_warps > 1:
            return dataclasses.replace(
                self, keys=self.keys // 2, warps=self.warps // 2, key_warps=self.key_warps // 2
            )
        if self.warps > 1:
            return dataclasses.replace(self, warps=self.warps // 2)
        return None


@dataclass(frozen=True)
class WarpgroupAttentionConfig(Config):
    """A block of `warps` warps multiplies on matrix units of 64 x 8 n results, which four warps use
    together, with Q, K and V in shared memory in half precision.

    keys     keys of a tile, of which two are in shared memory
    share    as in `FragmentAttentionConfig`
    splits   likewise
    """

    warps: int = choice(8, 4, 8, 12)
    keys: int = choice(128, 32, 64, 128)
    share: str = choice("query", "query", "group")
    splits: int = choice(1, 1, 2, 4, 8, 16, 32)

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return 32 * self.warps

    @property
    def rows(self) -> int:
        """Queries of a block."""
        return 16 * self.warps

    @property
    def stages(self) -> int:
        """Tiles in shared memory."""
        return 2

    @property
    def key_warps(self) -> int:
        """Warps that share queries."""
        return 1

    def legal(self, caps: Capabilities) -> str | None:
        """Threads must fit the device."""
        return caps.crowded(self.threads) or self.lacks(caps)

    @classmethod
    def default(cls, caps: Capabilities, m: int = 0) -> Self:
        """For `m` queries of each head: for few of them, those of heads that share K and V, and
        several blocks that share the keys."""
        return cls(warps=4, share="group", splits=4) if 0 < m <= 64 else cls()

    def smaller(self) -> Self | None:
        """64 keys, then fewer warps, then fewer keys."""
        if self.keys > 64:
            return dataclasses.replace(self, keys=64)
        if self.warps > 4:
            return dataclasses.replace(self, warps=self.warps - 4)
        return dataclasses.replace(self, keys=32) if self.keys > 32 else None


#: threads of a SIMD-group, and rows of a matrix
_SIMD, _MATRIX = 32, 8


@dataclass(frozen=True)
class MatrixAttentionConfig(Config):
    """A threadgroup of `simds` SIMD-groups, each with `simd_rows` queries, multiplies in matrices
    of 8 x 8, with K and then V of `keys` keys in threadgroup memory in half precision; sums are
    float32 and stay in matrices.

    share    what the queries of a threadgroup are: "query": of one head; "group": of all heads that
             share K and V, so that these are loaded once for all of them
    splits   threadgroups that share the keys of the same queries; another kernel adds up
    """

    simds: int = choice(4, 1, 2, 4, 8)
    simd_rows: int = choice(8, 8, 16)
    keys: int = choice(32, 16, 32, 64)
    share: str = choice("query", "query", "group")
    splits: int = choice(1, 1, 2, 4, 8, 16, 32)

    @property
    def threads(self) -> int:
        """Threads of a threadgroup."""
        return _SIMD * self.simds

    @property
    def rows(self) -> int:
        """Queries of a threadgroup."""
        return self.simds * self.simd_rows

    @property
    def lanes(self) -> int:
        """Threads that share a row."""
        return _SIMD // self.simd_rows

    def legal(self, caps: Capabilities) -> str | None:
        """Threads must fit the device."""
        return caps.crowded(self.threads) or self.lacks(caps)

    @classmethod
    def default(cls, caps: Capabilities, m: int = 0) -> Self:
        """For `m` queries of each head: for a few, no more rows than heads are likely to give, and
        many threadgroups that share the keys."""
        if 0 < m <= 8:
            return cls(simds=1 if m == 1 else 2, share="group", splits=16)
        return cls()

    def smaller(self) -> Self | None:
        """Half the rows of each SIMD-group, half the keys, half the SIMD-groups."""
        if self.simd_rows > _MATRIX:
            return dataclasses.replace(self, simd_rows=self.simd_rows // 2)
        if self.keys > 16:
            return dataclasses.replace(self, keys=self.keys // 2)
        if self.simds > 1:
            return dataclasses.replace(self, simds=self.simds // 2)
        return None

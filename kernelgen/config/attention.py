"""Configurations of attention: which queries share what is loaded of K and V, and in what parts."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Self

from kernelgen.config.base import Capabilities, Config, choice


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
        if self.threads > caps.max_threads:
            return f"{self.threads} threads in a group; the device allows {caps.max_threads}"
        return self.lacks(caps)

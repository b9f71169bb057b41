"""Configurations of maps and row reductions."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Self

from kernelgen.config.base import Capabilities, Config, choice
from kernelgen.config.programs import ProgramConfig


@dataclass(frozen=True)
class CMapConfig(Config):
    """Rows in chunks of columns, shared out to threads.

    chunk    columns
    stream   MiB of results from which on these are written past the caches, which then need not
             read what is overwritten; 0: never
    """

    chunk: int = choice(16384, 4096, 16384, 65536)
    stream: int = choice(4, 0, 1, 4, 16, 64)


@dataclass(frozen=True)
class CRowsConfig(Config):
    """Rows shared out to threads, each read once while it is in the caches.

    stream   as in maps
    ahead    rows ahead of the one that is written that are asked for from memory; 0: the machine
             sees for itself
    during   the pass over a row that asks for them: the last of the reductions, or that of outputs,
             which has memory to itself to write to
    """

    stream: int = choice(4, 0, 1, 4, 16, 64)
    ahead: int = choice(1, 0, 1, 2)
    during: str = choice("reductions", "reductions", "outputs")


@dataclass(frozen=True)
class MapGridConfig(Config):
    """Groups of threads along the columns, each thread with a word of each result; groups go on to
    further rows."""

    threads: int = choice(256, 32, 64, 128, 256, 512)

    def legal(self, caps: Capabilities) -> str | None:
        """A group must fit the device."""
        return caps.crowded(self.threads) or self.lacks(caps)

    def smaller(self) -> Self | None:
        """Half the threads."""
        return dataclasses.replace(self, threads=self.threads // 2) if self.threads > 32 else None


@dataclass(frozen=True)
class RowGridConfig(MapGridConfig):
    """A group of threads for each row; groups go on to further rows."""

    threads: int = choice(128, 32, 64, 128, 256, 512, 1024)


@dataclass(frozen=True)
class ProgramMapConfig(ProgramConfig):
    """A program takes `rows` rows of `elements` columns."""

    layout: str = choice("native", "native")
    rows: int = choice(1, 1, 2, 4, 8, 16)
    elements: int = choice(1024, 128, 256, 512, 1024, 2048, 4096)

    @classmethod
    def default(cls, caps: Capabilities, m: int = 0) -> Self:
        """Where kernels are interpreted, large tiles: each operation costs about the same."""
        return cls(rows=16, elements=4096) if "interpreted" in caps.features else cls()


@dataclass(frozen=True)
class ProgramReduceConfig(ProgramMapConfig):
    """A program takes `rows` rows, `elements` columns at a time."""

    elements: int = choice(1024, 128, 256, 512, 1024, 2048, 4096)

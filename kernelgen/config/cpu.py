"""Configurations of walks that go through tiles of rows with vectors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from kernelgen.config.base import Capabilities, Config, choice


@dataclass(frozen=True)
class RowTileConfig(Config):
    """A tile of as many rows as a vector has lanes, times `columns` rows of activations.

    columns   activations rows (columns of the product's transpose) that share one decoded word
    layout    "interleaved": weights repacked once with `prepare`; "native": repacked tile by tile
              inside the kernel
    prefetch  bytes ahead of what is multiplied that the second cache is asked for; 0: none, the
              machine sees for itself
    near      the same of the first cache
    share     tiles that a thread takes at a time when it is free; 0: all threads have as many
    streams   tiles of a thread's part, as far apart as can be, that it reads in turns
    """

    columns: int = choice(4, 1, 2, 3, 4, 5, 6, 8, 10, 12)
    prefetch: int = choice(4096, 0, 2048, 3072, 4096, 8192)
    near: int = choice(2048, 0, 512, 1024, 2048)
    share: int = choice(0, 0, 1, 4)
    streams: int = choice(2, 1, 2, 4)
    layout: str = choice("interleaved", "interleaved", "native")

    def legal(self, caps: Capabilities) -> str | None:
        """Accumulators must fit the registers, or every step spills."""
        needed = 2 * self.columns + 4
        if needed > caps.registers:
            return (
                f"{self.columns} columns need {needed} vector registers, the device has"
                f" {caps.registers}"
            )
        return None

    @classmethod
    def default(cls, caps: Capabilities, m: int = 0) -> Self:
        """As many columns as leave registers for the decode: 8 of 32, 4 of 16."""
        return cls(columns=8 if caps.registers >= 32 else 4)

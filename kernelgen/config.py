"""Configurations: what a walk leaves open.  Frozen dataclasses, with the choices beside the fields.

A configuration says how, never what: every legal one computes the same result.  What a device can
do is given as `Capabilities`, so that no rule here knows any device.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from kernelgen.errors import ConfigError


@dataclass(frozen=True)
class Capabilities:
    """What a configuration may count on.

    lanes      32-bit lanes of a vector register (1 where there are none)
    registers  vector registers
    features   names of optional features that are there
    max_threads   threads that a group may have
    shared_bytes  memory that the threads of a group share
    """

    lanes: int = 1
    registers: int = 16
    features: frozenset[str] = frozenset()
    max_threads: int = 256
    shared_bytes: int = 16384


def choice(default: Any, *values: Any) -> Any:
    """A field that may take one of `values`."""
    return field(default=default, metadata={"choices": values})


@dataclass(frozen=True)
class Config:
    """Base of all configurations."""

    def __post_init__(self) -> None:
        for one in dataclasses.fields(self):
            value, choices = getattr(self, one.name), one.metadata["choices"]
            if value not in choices:
                raise ConfigError(
                    f"{one.name}={value!r} was asked for; {type(self).__name__} allows"
                    f" {one.name} in {', '.join(map(repr, choices))}"
                )

    @classmethod
    def space(cls) -> Iterator[Self]:
        """Every combination of the choices, legal or not."""
        names = [f.name for f in dataclasses.fields(cls)]
        for values in itertools.product(*(f.metadata["choices"] for f in dataclasses.fields(cls))):
            yield cls(**dict(zip(names, values, strict=True)))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """A configuration from named values; unknown names are an error."""
        known = [f.name for f in dataclasses.fields(cls)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ConfigError(
                f"{', '.join(unknown)} is no field of {cls.__name__}; it has {', '.join(known)}"
            )
        return cls(**values)

    def as_dict(self) -> dict[str, Any]:
        """The fields by name."""
        return dataclasses.asdict(self)

    def legal(self, caps: Capabilities) -> str | None:
        """Why this configuration cannot run on a device, or None."""
        return None

    @classmethod
    def default(cls, caps: Capabilities, m: int = 0) -> Self:
        """A good guess for a device that was never tuned; `m`: rows of activations, if known."""
        return cls()


@dataclass(frozen=True)
class NoConfig(Config):
    """For walks that leave nothing open."""


@dataclass(frozen=True)
class RowTileConfig(Config):
    """A tile of as many rows as a vector has lanes, times `columns` rows of activations.

    columns   activations rows (columns of the product's transpose) that share one decoded word
    layout    "interleaved": weights repacked once with `prepare`; "native": repacked tile by tile
              inside the kernel
    """

    columns: int = choice(4, 1, 2, 3, 4, 5, 6, 8, 10, 12)
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


@dataclass(frozen=True)
class ThreadsConfig(Config):
    """A grid of groups of threads, each thread with its own elements.

    threads   threads of a group
    layout    "native": ggml's blocks; "planes": each field of all blocks together
    """

    threads: int = choice(64, 32, 64, 128, 256)
    layout: str = choice("native", "native", "planes")

    def legal(self, caps: Capabilities) -> str | None:
        """A group must fit the device."""
        if self.threads > caps.max_threads:
            return f"{self.threads} threads in a group; the device allows {caps.max_threads}"
        return None


@dataclass(frozen=True)
class MatvecConfig(ThreadsConfig):
    """A group of threads shares the groups of `rows` rows of weights, for `columns` rows of
    activations at once, and adds its sums up in shared memory."""

    rows: int = choice(4, 1, 2, 4, 8)
    columns: int = choice(1, 1, 2, 4, 8)

    def legal(self, caps: Capabilities) -> str | None:
        """The sums of all threads must fit shared memory."""
        needed = 4 * self.threads * self.rows * self.columns
        if needed > caps.shared_bytes:
            return f"{needed} bytes of shared memory; the device has {caps.shared_bytes}"
        return super().legal(caps)

    @classmethod
    def default(cls, caps: Capabilities, m: int = 1) -> Self:
        """As many columns as there are rows of activations, at most 8."""
        columns = next(c for c in (1, 2, 4, 8) if c >= min(m or 1, 8))
        return cls(columns=columns, rows=4 if columns < 8 else 2)


@dataclass(frozen=True)
class TileConfig(Config):
    """A group computes tile_m x tile_n results, each thread thread_m x thread_n of them, from
    tiles of `depth` k in shared memory."""

    tile_m: int = choice(32, 16, 32, 64)
    tile_n: int = choice(32, 16, 32, 64, 128)
    thread_m: int = choice(4, 1, 2, 4, 8)
    thread_n: int = choice(2, 1, 2, 4, 8)
    layout: str = choice("native", "native", "planes")

    @property
    def threads(self) -> int:
        """Threads of a group."""
        return (self.tile_m // self.thread_m) * (self.tile_n // self.thread_n)

    def legal(self, caps: Capabilities) -> str | None:
        """Threads and tiles must fit the device."""
        if not 32 <= self.threads <= caps.max_threads:
            return f"{self.threads} threads in a group; 32..{caps.max_threads} are allowed"
        needed = 4 * 36 * (self.tile_m + self.tile_n)
        if needed > caps.shared_bytes:
            return f"{needed} bytes of shared memory; the device has {caps.shared_bytes}"
        return None


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
    of activations.

    dot    int8 only: "products": multiply and add; "dp4a": an instruction for four products
    """

    rows: int = choice(4, 1, 2, 4, 8, 16)
    columns: int = choice(1, 1, 2, 4, 8)
    depth: int = choice(512, 128, 256, 512, 1024, 2048)
    dot: str = choice("products", "products", "dp4a")

    def legal(self, caps: Capabilities) -> str | None:
        """The device must have the instruction, and registers for all sums."""
        if self.dot == "dp4a" and "dp4a" not in caps.features:
            return "the device has no instruction dp4a"
        sums = self.rows * self.columns * self.depth // (32 * self.warps)
        if sums > 128:
            return f"{sums} sums in each thread; 128 fit the registers"
        return None

    @classmethod
    def default(cls, caps: Capabilities, m: int = 1) -> Self:
        """As many columns as there are rows of activations, at most 8, with as many sums."""
        columns = next(c for c in (1, 2, 4, 8) if c >= min(m or 1, 8))
        return cls(columns=columns, rows=4 if columns < 4 else 2)


@dataclass(frozen=True)
class ProgramTileConfig(ProgramConfig):
    """A program computes tile_m x tile_n results from tiles of about `depth` elements of each row.

    dot    how float32 is multiplied: "ieee", or on matrix units in three parts of fewer bits
    """

    tile_m: int = choice(64, 16, 32, 64, 128)
    tile_n: int = choice(64, 16, 32, 64, 128)
    depth: int = choice(32, 16, 32, 64, 128)
    dot: str = choice("ieee", "ieee", "tf32x3")

    def legal(self, caps: Capabilities) -> str | None:
        """Tiles must fit shared memory, and "tf32x3" the device."""
        if self.dot != "ieee" and self.dot not in caps.features:
            return f"the device does not multiply as {self.dot}"
        needed = 4 * self.depth * (self.tile_n + self.tile_m * max(1, self.stages - 1))
        if needed > caps.shared_bytes:
            return f"{needed} bytes of shared memory; the device has {caps.shared_bytes}"
        return None


@dataclass(frozen=True)
class ProgramIntegerTileConfig(ProgramConfig):
    """A program computes tile_m x tile_n results, at most `depth` elements of a group at once.

    unroll    whether the groups of a block are written out, each with its own constants
    """

    tile_m: int = choice(64, 16, 32, 64, 128)
    tile_n: int = choice(64, 16, 32, 64, 128)
    depth: int = choice(32, 32, 64, 128)
    unroll: bool = choice(True, True, False)

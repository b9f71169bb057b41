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
    features   names of optional features that are there, such as "subgroups" (sums over them),
               "dot" (an instruction for four products of bytes), "fp16"
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

    @property
    def features(self) -> tuple[str, ...]:
        """Features of a device that this configuration cannot do without."""
        return ()

    @property
    def rounding(self) -> float:
        """How much it may be off, relative to the result's RMS, because of numbers that it keeps
        with fewer bits; 0 where it keeps all."""
        return 0.0

    def lacks(self, caps: Capabilities) -> str | None:
        """What of `features` a device does not have, as a reason, or None."""
        missing = [one for one in self.features if one not in caps.features]
        return f"the device lacks {', '.join(missing)}" if missing else None

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
    layout    "native": ggml's blocks; "planes": each field of all blocks together, which was the
              faster one, or as fast, for every kind of format where it was measured
    """

    threads: int = choice(64, 32, 64, 128, 256)
    layout: str = choice("planes", "native", "planes")

    def legal(self, caps: Capabilities) -> str | None:
        """A group must fit the device."""
        if self.threads > caps.max_threads:
            return f"{self.threads} threads in a group; the device allows {caps.max_threads}"
        return self.lacks(caps)


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
        return cls(columns=columns, rows=4 if columns < 8 else 2, reduce=reduce)


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
        """For few rows of activations, a tile that is not much higher."""
        return cls(tile_m=16, thread_m=2) if 0 < m <= 16 else cls()


@dataclass(frozen=True)
class FloatTileConfig(TileConfig):
    """The same in floats.

    tile_type  what the tiles hold: "f32", or "f16", which takes half the memory; sums are float32
               in both.  Half precision has 11 bits, and no numbers above 65504: larger ones
               become infinite.
    """

    tile_type: str = choice("f32", "f32", "f16")

    @property
    def features(self) -> tuple[str, ...]:
        """Half precision in shared memory."""
        return ("fp16",) if self.tile_type == "f16" else ()

    @property
    def rounding(self) -> float:
        """Two factors that are off by 2**-12 or less each; errors of a sum average out."""
        return 2e-3 if self.tile_type == "f16" else 0.0

    @property
    def row_bytes(self) -> int:
        """Shared memory for a row of a tile, of either side."""
        return 2 * 32 if self.tile_type == "f16" else 4 * 32


@dataclass(frozen=True)
class DotTileConfig(TileConfig):
    """The same in integers.

    dot       four products of bytes: "plain": one by one; "packed": by an instruction
    """

    dot: str = choice("plain", "plain", "packed")

    @property
    def features(self) -> tuple[str, ...]:
        """The instruction."""
        return ("dot",) if self.dot == "packed" else ()

    @property
    def row_bytes(self) -> int:
        """Shared memory for a row of a tile: codes, scale and offset."""
        return 32 + 8

    @classmethod
    def default(cls, caps: Capabilities, m: int = 0) -> Self:
        """With the instruction where there is one."""
        chosen = super().default(caps, m)
        return dataclasses.replace(chosen, dot="packed" if "dot" in caps.features else "plain")


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
class ProgramTileConfig(ProgramConfig):
    """A program computes tile_m x tile_n results from tiles of about `depth` elements of each row.

    dot    how float32 is multiplied: "ieee": as such; "tf32x3": on matrix units, in parts of fewer
           bits that together keep all; "f16": on matrix units, rounded to half precision, which
           has 11 bits, and no numbers above 65504: larger ones become infinite.  Sums are float32.
    """

    tile_m: int = choice(64, 16, 32, 64, 128)
    tile_n: int = choice(64, 16, 32, 64, 128)
    depth: int = choice(32, 16, 32, 64, 128)
    dot: str = choice("ieee", "ieee", "tf32x3", "f16")

    @property
    def features(self) -> tuple[str, ...]:
        """Matrix units that multiply parts of float32."""
        return ("tf32x3",) if self.dot == "tf32x3" else ()

    @property
    def rounding(self) -> float:
        """Two factors that are off by 2**-12 or less each; errors of a sum average out."""
        return 2e-3 if self.dot == "f16" else 0.0

    def legal(self, caps: Capabilities) -> str | None:
        """Tiles must fit shared memory."""
        size = 2 if self.dot == "f16" else 4
        needed = self.depth * (size * self.tile_n + 4 * self.tile_m * max(1, self.stages - 1))
        if needed > caps.shared_bytes:
            return f"{needed} bytes of shared memory; the device has {caps.shared_bytes}"
        return self.lacks(caps)


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

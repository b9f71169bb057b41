"""Configurations: what a walk leaves open, as frozen dataclasses with the choices beside the fields.

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
    """

    lanes: int = 1
    registers: int = 16
    features: frozenset[str] = frozenset()


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
    def default(cls, caps: Capabilities) -> Self:
        """A good guess for a device that was never tuned."""
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
    def default(cls, caps: Capabilities) -> Self:
        """As many columns as leave registers for the decode: 8 of 32, 4 of 16."""
        return cls(columns=8 if caps.registers >= 32 else 4)

"""What every configuration is, and what it may ask of a device."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping
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
    shared_bytes  memory that the threads of a group share, and that a kernel may declare
    launch_bytes  such memory that a launch may ask for instead, where that is more
    """

    lanes: int = 1
    registers: int = 16
    features: frozenset[str] = frozenset()
    max_threads: int = 256
    shared_bytes: int = 16384
    launch_bytes: int = 0

    def lacks(self, features: Iterable[str]) -> str | None:
        """What of these features is not there, as a reason, or None."""
        missing = [one for one in features if one not in self.features]
        return f"the device lacks {', '.join(missing)}" if missing else None

    def crowded(self, threads: int) -> str | None:
        """Why so many threads do not make a group, or None."""
        if threads <= self.max_threads:
            return None
        return f"{threads} threads in a group; the device allows {self.max_threads}"


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

    def lacks(self, caps: Capabilities) -> str | None:
        """What of `features` a device does not have, as a reason, or None."""
        return caps.lacks(self.features)

    @classmethod
    def default(cls, caps: Capabilities, m: int = 0) -> Self:
        """A good guess for a device that was never tuned; `m`: rows of activations, if known."""
        return cls()

    def smaller(self) -> Self | None:
        """What to try instead where a format does not fit this one, or None."""
        return None


@dataclass(frozen=True)
class NoConfig(Config):
    """For walks that leave nothing open."""

"""What a device is called in the cache: named fields that times depend on."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from kernelgen.targets.base import Runtime, Target

#: what runtimes call these, in the order in which they are looked for
_DRIVER = ("compiler", "driver", "version", "platform", "backend")
_UNITS = ("threads", "compute_units", "multiprocessors", "cores")
_ISA = ("isa", "compute_capability", "architecture", "arch")


@dataclass(frozen=True)
class Device:
    """The fingerprint of a device, as one target reaches it.

    name    of the device, as its driver gives it
    driver  its driver or compiler, with the version: another one makes other code
    units   threads, compute units or multiprocessors; 0 where nobody tells
    isa     instruction set or compute capability; empty where nobody tells
    """

    name: str
    driver: str = ""
    units: int = 0
    isa: str = ""

    @property
    def family(self) -> str:
        """What similar devices share: the instruction set, else the name without its numbers."""
        return self.isa or re.sub(r"[\d\W_]+", " ", self.name).strip().lower()

    @property
    def digest(self) -> str:
        """Eight characters that stand for all fields."""
        text = "\0".join(map(str, asdict(self).values()))
        return hashlib.sha256(text.encode()).hexdigest()[:8]

    def unlike(self, other: Device) -> tuple[int, float] | None:
        """How far another device of the family is (smaller is nearer), None for other families."""
        if self.family != other.family:
            return None
        ratio = max(self.units, 1) / max(other.units, 1)
        return int(self.name != other.name), abs(ratio - 1) + (self.driver != other.driver)

    def __str__(self) -> str:
        parts = (self.name, self.isa, f"{self.units} units" if self.units else "", self.driver)
        return ", ".join(filter(None, parts))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Device:
        """A fingerprint from named values; what is missing is unknown."""
        return cls(
            str(values.get("name", "")), str(values.get("driver", "")),
            int(values.get("units", 0)), str(values.get("isa", "")),
        )  # fmt: skip


def described(about: Mapping[str, Any]) -> Device:
    """The fingerprint of a device from what its runtime says about it."""

    def first(names: tuple[str, ...]) -> Any:
        return next((about[name] for name in names if about.get(name)), "")

    units = str(first(_UNITS))
    return Device(
        str(about.get("device", "unknown")), str(first(_DRIVER)),
        int(units) if units.isdigit() else 0, str(first(_ISA)),
    )  # fmt: skip


def of(target: Target, runtime: Runtime) -> Device:
    """The fingerprint of the device that a runtime runs kernels on: the first it describes."""
    about = runtime.describe()
    return described(about[0] if about else {"device": target.name})

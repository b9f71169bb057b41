"""Meters of energy: joules that a device has used, where something counts them.

RAPL counts for a CPU's packages and their memory, NVML for a GPU.  Both are counters that are
brought up to date now and then, so that only what takes many periods can be measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

#: where Linux shows the counters of CPUs
POWERCAP = Path("/sys/class/powercap")

#: zones that count what is not part of another: packages, and memory beside them
_ZONES = ("package", "dram")


class Meter(Protocol):
    """A counter of joules.

    name    what counts
    period  seconds between two updates
    """

    name: str
    period: float

    def joules(self) -> float:
        """Used since some time in the past."""
        ...


class Rapl:
    """The CPU's own counters, read as files.  They begin again at 0 now and then."""

    period = 0.001

    def __init__(self, zones: list[Path]) -> None:
        self.name = f"RAPL ({', '.join((z / 'name').read_text().strip() for z in zones)})"
        self._zones = [(z / "energy_uj", _number(z / "max_energy_range_uj")) for z in zones]
        self._last = [_number(path) for path, _ in self._zones]
        self._total = 0

    def joules(self) -> float:
        """The sum over all zones."""
        for n, (path, wraps) in enumerate(self._zones):
            now = _number(path)
            self._total += now - self._last[n] + (wraps if now < self._last[n] else 0)
            self._last[n] = now
        return self._total * 1e-6


class Nvml:
    """A GPU's own counter."""

    period = 0.1

    def __init__(self, name: str) -> None:
        import pynvml

        pynvml.nvmlInit()
        self._read = pynvml.nvmlDeviceGetTotalEnergyConsumption
        for index in range(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            found = pynvml.nvmlDeviceGetName(handle)
            if (found.decode() if isinstance(found, bytes) else found) == name:
                self._handle = handle
                self._read(handle)  # GPUs before 2017 do not count
                break
        else:
            raise LookupError(f"NVML knows no {name}")
        self.name = "NVML"

    def joules(self) -> float:
        """Of the whole board."""
        return float(self._read(self._handle)) * 1e-3


def _number(path: Path) -> int:
    return int(path.read_text())


def find(about: Mapping[str, Any]) -> Meter | str:
    """The meter of a device, by what its runtime says of it; or why there is none."""
    if about.get("kind") == "CPU" or isinstance(about.get("threads"), int):
        return _rapl(POWERCAP)
    name = str(about.get("device", "unknown"))
    try:
        return Nvml(name)
    except ImportError:
        return (
            f"energy of {name} is not counted by anything known here (for NVIDIA GPUs: pip"
            " install kernelgen[energy])"
        )
    except Exception as error:  # the driver's own errors
        return f"energy of {name} is not counted: {error}"


def _rapl(root: Path) -> Meter | str:
    """The meter of this machine's CPU."""
    try:
        zones = sorted(
            zone.parent for zone in root.glob("*/energy_uj")
            if (zone.parent / "name").read_text().startswith(_ZONES)
        )  # fmt: skip
        if not zones:
            return f"energy of the CPU is not counted here: {root} has no RAPL zones"
        return Rapl(zones)
    except PermissionError as error:
        return (
            f"energy of the CPU is counted, but {error.filename} may not be read by this user;"
            " allow it with chmod a+r, or run as one who may"
        )
    except (OSError, ValueError) as error:
        return f"energy of the CPU is not counted here: {error}"

"""The list of targets."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from types import ModuleType

from kernelgen.arrays import HOST_KINDS
from kernelgen.errors import TargetError
from kernelgen.targets.base import Target

#: every target, the reference first
NAMES = ("numpy", "c", "opencl", "wgsl", "cuda", "metal", "triton")

#: which to run on where the data is the CPU's: the first that can
PREFERENCE = ("c", "numpy")

#: the same by the kind of device on which the data lies, as DLPack numbers these: 2 CUDA, 8 Metal,
#: 10 ROCm.  None is data that nobody chose a device for, such as a numpy array.
SERVING: dict[int | None, tuple[str, ...]] = {
    None: ("cuda", "metal", "opencl", "wgsl", *PREFERENCE),
    2: ("cuda", "triton"),
    8: ("metal",),
    10: ("triton",),
}


def serving(kind: int | None) -> tuple[str, ...]:
    """Targets that may work on data where it lies, the best first; of a kind of device that no
    target reaches none, of the CPU's own memory those of the CPU."""
    return PREFERENCE if kind in HOST_KINDS else SERVING.get(kind, ())


def get(name: str) -> Target:
    """The manifest of a target."""
    if name.lower() not in NAMES:
        raise TargetError(f"target {name!r} is not known; known are {', '.join(NAMES)}")
    module = importlib.import_module(f"kernelgen.targets.{name.lower()}")
    target: Target = module.TARGET
    return target


def targets() -> tuple[Target, ...]:
    """All targets."""
    return tuple(get(name) for name in NAMES)


def settle_torch() -> None:
    """After torch was imported: load what torch.compile would load later, if a driver is in this
    process whose libraries would be in its way (see the runtimes of these targets)."""
    if "wgpu" in sys.modules and importlib.util.find_spec("triton") is not None:
        get("triton").runtime().available()


class _Module(ModuleType):
    """`kernelgen.targets` is this package, and for users also the function that names them all."""

    def __call__(self) -> list[str]:
        """Names of all targets."""
        return list(NAMES)


sys.modules[__name__].__class__ = _Module

"""The list of targets."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

from kernelgen.errors import TargetError
from kernelgen.targets.base import Target

#: every target, the reference first
NAMES = ("numpy", "c", "opencl", "wgsl", "cuda", "metal", "triton")

#: which to run on where the user does not say: the first that can
PREFERENCE = ("c", "numpy")


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


class _Module(ModuleType):
    """`kernelgen.targets` is this package, and for users also the function that names them all."""

    def __call__(self) -> list[str]:
        """Names of all targets."""
        return list(NAMES)


sys.modules[__name__].__class__ = _Module

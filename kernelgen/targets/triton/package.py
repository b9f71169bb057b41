"""Triton modules that import Triton only, and a Python package over torch."""

from __future__ import annotations

from kernelgen.targets.device_package import Binding, device_package
from kernelgen.targets.package import Content, Plan

BINDING = Binding(
    package="kernelgen_triton",
    api="Triton",
    requires=("torch>=2.6", "triton>=3.2"),
)


def package(plan: Plan) -> dict[str, Content]:
    """The files of the package."""
    made = device_package(plan, BINDING)
    made[f"python/{BINDING.package}/kernels/__init__.py"] = (
        '"""One kernel a module; each imports Triton only."""\n'
    )
    return made

"""Triton modules that import Triton only, and a Python package over torch."""

from __future__ import annotations

from kernelgen.targets.device_package import Binding, device_package
from kernelgen.targets.package import Content, Plan

BINDING = Binding(
    package="kernelgen_triton",
    api="Triton",
    requires=("torch>=2.6", "triton>=3.2"),
    evidence=(
        "Kernels like these run in Triton's interpreter in kernelgen's tests, and are compiled ahead\n"
        "of time for GPUs of NVIDIA and AMD; this build was not run anywhere yet. `kernelgen verify\n"
        "--target triton` runs them on your device."
    ),
    more=(
        "- Each module's docstring says how to start its kernel: it takes torch's tensors. It imports",
        "  triton and nothing else, so that it may be copied alone.",
    ),
)


def package(plan: Plan) -> dict[str, Content]:
    """The files of the package."""
    made = device_package(plan, BINDING)
    made[f"python/{BINDING.package}/kernels/__init__.py"] = (
        '"""One kernel a module; each imports Triton only."""\n'
    )
    return made

"""OpenCL sources, a header for hosts in C, and a Python package over pyopencl."""

from __future__ import annotations

from kernelgen.targets.device_package import Binding, c_header, device_package
from kernelgen.targets.package import Content, Plan

BINDING = Binding(
    package="kernelgen_opencl",
    api="OpenCL",
    requires=("pyopencl>=2023.1",),
)


def package(plan: Plan) -> dict[str, Content]:
    """The files of the package."""
    return {**device_package(plan, BINDING), "kernels.h": c_header(plan)}

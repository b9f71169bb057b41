"""OpenCL sources, a header for hosts in C, and a Python package over pyopencl."""

from __future__ import annotations

from kernelgen.targets.device_package import Binding, c_header, device_package
from kernelgen.targets.package import Content, Plan

BINDING = Binding(
    package="kernelgen_opencl",
    api="OpenCL",
    requires=("pyopencl>=2023.1",),
    evidence=(
        "Kernels like these were run on OpenCL's CPU implementation PoCL, those with sub-groups and\n"
        "integer dot products in kernelgen's emulator; this build was not run anywhere yet. `kernelgen\n"
        "verify --target opencl` runs them on your device."
    ),
    more=(
        "- `kernels.h` has the same for hosts in C and C++: grids, features, and the choice as a",
        "  function. A kernel takes buffers and sizes (`cl_uint`) in the manifest's order; the global",
        "  size is groups times threads.",
    ),
)


def package(plan: Plan) -> dict[str, Content]:
    """The files of the package."""
    return {**device_package(plan, BINDING), "kernels.h": c_header(plan)}

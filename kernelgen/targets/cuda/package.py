"""CUDA sources, a header with launch geometry, binaries where nvcc is, and a Python package over
cupy."""

from __future__ import annotations

from kernelgen.targets.cuda import binaries
from kernelgen.targets.device_package import Binding, c_header, device_package
from kernelgen.targets.package import Content, PackageError, Plan

BINDING = Binding(
    package="kernelgen_cuda",
    api="CUDA",
    requires=("cupy-cuda12x>=13.3",),
)


def package(plan: Plan) -> dict[str, Content]:
    """The files of the package."""
    units = {
        "kernels": (binaries.unit(k for k in plan.kernels if k.contract), True),
        "kernels_exact": (binaries.unit(k for k in plan.kernels if not k.contract), False),
    }
    made, said = _binaries(plan, {name: one for name, one in units.items() if one[0]})
    made |= {f"{name}.cu": text for name, (text, _) in units.items()}
    return {**device_package(plan, BINDING, said), **made, "kernels.h": c_header(plan)}


def _binaries(plan: Plan, units: dict[str, tuple[str, bool]]) -> tuple[dict[str, Content], str]:
    """Binaries by path, and what the README says of them."""
    wanted = binaries.ARCHITECTURES if plan.binaries is None else plan.binaries
    reason = binaries.why_no_compiler()
    if reason is not None and plan.binaries:
        raise PackageError(
            f"binaries for {', '.join(wanted)} were asked for, and {reason}; install CUDA's"
            " toolkit, or leave out --arch"
        )
    if reason is not None or not wanted:
        return {}, f"- There are no binaries: {reason or 'none were asked for'}.\n"
    made = binaries.binaries(units, wanted)
    said = (
        f"- `binaries/` has what {binaries.compiler()} made of them: machine code for\n"
        f"  {', '.join(wanted)}, PTX that a driver compiles for later chips, and a\n"
        "  fat binary of all, as `cuModuleLoad` takes them.\n"
    )
    return {f"binaries/{name}": data for name, data in made.items()}, said

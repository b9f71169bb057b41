"""The kernels as a project of Hugging Face's kernel-builder, for torch tensors on CUDA devices.

The layout is that of kernel-builder 0.17 (edition 5 of build.toml).  Kernels are compiled by nvcc,
in one file for each set of compute capabilities that has what they want, and started by one op of
torch, by name; which one, and on what, the Python module decides.
"""

from __future__ import annotations

from kernelgen.targets.base import Kernel
from kernelgen.targets.cuda import binaries
from kernelgen.targets.cuda.runtime import features_of
from kernelgen.targets.device_package import c_header, torch_project
from kernelgen.targets.package import Content, Plan, refuse_binaries

#: name of the project, and of its Python module
NAME = "kernelgen_cuda"

#: files, by what their kernels want: the oldest capability that has it, those to compile for (none
#: named: all that the builder knows), and whether a*b + c may be rounded once
_FILES = {
    "exact": (75, (), False),
    "plain": (75, (), True),
    "tensor": (80, ("8.0", "8.6", "8.9", "9.0", "10.0", "12.0"), True),
    "tensor_exact": (80, ("8.0", "8.6", "8.9", "9.0", "10.0", "12.0"), False),
    "hopper": (90, ("9.0a",), True),
    "hopper_exact": (90, ("9.0a",), False),
}


def package(plan: Plan) -> dict[str, Content]:
    """The files of the project."""
    refuse_binaries(plan)
    parts: dict[str, list[Kernel]] = {}
    for kernel in plan.kernels:
        parts.setdefault(_file(kernel), []).append(kernel)
    units = [
        {"name": name, "capabilities": _FILES[name][1], "contract": _FILES[name][2]}
        for name in _FILES
        if name in parts
    ]
    made = torch_project(plan, NAME, units=units)
    for name, kernels in parts.items():
        made[f"{NAME}/{name}.cu"] = binaries.unit(kernels, guarded=False) + plan.render(
            "huggingface/table.cu.j2", name=name, kernels=kernels
        )
    made |= {
        f"{NAME}/kernels.h": c_header(plan),
        f"{NAME}/table.h": plan.render("huggingface/table.h"),
        "torch-ext/torch_binding.cpp": plan.render(
            "huggingface/torch_binding.cpp.j2", name=NAME, units=units
        ),
        "torch-ext/torch_binding.h": plan.render("huggingface/torch_binding.h"),
    }
    files = {k.entry: f"{NAME}/{name}.cu" for name, some in parts.items() for k in some}
    # as a host reads it that starts kernels itself; the module's own names no files
    made["manifest.json"] = plan.relocated(files)
    return made


def _file(kernel: Kernel) -> str:
    """The first of the files whose capabilities have all that a kernel wants."""
    return next(
        name
        for name, (chip, _, contract) in _FILES.items()
        if contract == kernel.contract and features_of(chip).issuperset(kernel.features)
    )

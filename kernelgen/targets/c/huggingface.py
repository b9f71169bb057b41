"""The kernels as a project of Hugging Face's kernel-builder, for torch tensors on the CPU.

The layout is that of kernel-builder 0.17 (edition 5 of build.toml).  Its projects are C++, and all
files of a backend get the same flags; so there is one C++ file for each instruction set, which
chooses it by a pragma of GCC's, and has every kernel in a namespace of its own.
"""

from __future__ import annotations

from typing import Any

from kernelgen.ir.block import BlockFormat
from kernelgen.targets.base import Kernel
from kernelgen.targets.c.compiler import HEADERS
from kernelgen.targets.c.package import ISAS, beside, stem
from kernelgen.targets.c.runtime import Isa
from kernelgen.targets.package import Content, PackageError, Plan, refuse_binaries

#: name of the project, and of its Python module
NAME = "kernelgen_cpu"

#: what is offered as ops of torch
_OPS = ("dequantize", "matvec", "matmul", "prepare")

#: what GCC's __builtin_cpu_supports calls features that Linux spells otherwise
_BUILTIN = {"avx512_vnni": "avx512vnni", "avx_vnni": "avxvnni"}


def package(plan: Plan) -> dict[str, Content]:
    """The files of the project."""
    refuse_binaries(plan)
    offered = {isa.name: _offered(plan, isa) for isa in ISAS}
    kernels = offered[ISAS[-1].name]
    if not any(k.op in ("matvec", "matmul") for k in kernels):
        raise PackageError(
            "no matmul of target c was asked for, and the project is for these; name more ops"
        )
    context: dict[str, Any] = {
        "name": NAME, "isas": ISAS, "kernels": kernels, "rules": plan.rules,
        "formats": list(dict.fromkeys(k.format for k in kernels)),
        "by_entry": {k.entry: k for k in kernels}, "stem": stem, "beside": beside,
        "pragma": _pragma, "condition": _condition, "supports": _supports,
        "scratch": lambda k: any(a.role == "scratch" for a in k.arguments),
        "folder": lambda isa: f"{isa.capabilities.registers}_registers",
    }  # fmt: skip
    made: dict[str, Content] = {}
    for isa in ISAS:
        folder = f"{NAME}/{isa.capabilities.registers}_registers"
        # words.h is there before them, outside of their namespaces
        made |= {
            f"{folder}/{stem(k)}.inc": k.source.replace('#include "words.h"\n', "")
            for k in offered[isa.name]
        }
        made[f"{NAME}/{isa.name}.cpp"] = plan.render("huggingface/isa.cpp.j2", isa=isa, **context)
        made[f"{folder}/all.inc"] = plan.render("huggingface/all.inc.j2", **context)
    for name in ("words.h", "words_avx2.h", "words_avx512.h", "words_neon.h", "words_plain.h"):
        made[f"{NAME}/{name}"] = (HEADERS / name).read_text("utf-8")
    made[f"{NAME}/table.h"] = plan.render("huggingface/table.h")
    context["sources"] = sorted(made)
    files = {path.rpartition("/")[2]: path for path in made}
    made["manifest.json"] = plan.relocated({k.entry: files[f"{stem(k)}.inc"] for k in kernels})
    for path, template in {
        "build.toml": "build.toml.j2", "CARD.md": "CARD.md.j2",
        "torch-ext/torch_binding.cpp": "torch_binding.cpp.j2",
        "torch-ext/torch_binding.h": "torch_binding.h",
        f"torch-ext/{NAME}/__init__.py": "init.py.j2",
        f"tests/test_{NAME}.py": "test.py.j2",
    }.items():  # fmt: skip
        made[path] = plan.render(f"huggingface/{template}", **context)
    return made | {"flake.nix": plan.render("flake.nix"), "tests/__init__.py": ""}


def _offered(plan: Plan, isa: Isa) -> list[Kernel]:
    found = plan.defaults(isa.capabilities)
    return [k for k in found if k.op in _OPS and isinstance(k.subject, BlockFormat)]


def _pragma(isa: Isa) -> str:
    """The instruction set as GCC's pragma takes it; empty where the machine has it anyway."""
    return ",".join(flag.removeprefix("-m") for flag in isa.flags if flag.startswith("-m"))


def _condition(isa: Isa) -> str:
    """When the preprocessor takes an instruction set: pragmas set macros with GCC only."""
    if not isa.machines:
        return "1"
    machine = f"defined(__{isa.machines[0]}__)"
    return f"{machine} && !defined(__clang__)" if isa.machines[0] == "x86_64" else machine


def _supports(isa: Isa) -> str:
    """A condition on the CPU that runs."""
    if isa.machines[:1] == ("x86_64",):
        names = (_BUILTIN.get(one, one) for one in sorted(isa.needs))
        return " && ".join(f'__builtin_cpu_supports("{one}")' for one in names)
    return "has_dot_products()" if "asimddp" in isa.needs else "true"

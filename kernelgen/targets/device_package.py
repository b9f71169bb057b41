"""Packages for targets whose kernels run over a grid of threads in a device's own memory.

The host's part is the same for all: templates/packages has it, and a target adds its driver.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kernelgen.ir.block import BlockFormat
from kernelgen.targets.base import Kernel
from kernelgen.targets.package import (
    Arithmetic,
    Content,
    PackageError,
    Plan,
    refuse_binaries,
    spelt,
)

#: bytes of an element
ITEM_BYTES = {"u8": 1, "i8": 1, "f16": 2, "bf16": 2, "u32": 4, "i32": 4, "f32": 4}

#: how C spells sizes of 64 bits
C_SIZES = Arithmetic("{a} / {b}", "CEIL({a}, {b})", "LEAST({a}, {b})")


@dataclass(frozen=True)
class Binding:
    """How Python reaches the device.

    package   its name
    api       what people call the API
    requires  packages that it needs besides numpy, as pip takes them
    """

    package: str
    api: str
    requires: tuple[str, ...]


def device_package(plan: Plan, binding: Binding, binaries: str | None = None) -> dict[str, Content]:
    """Sources, README and Python package.  The target adds, in package/: driver.py.j2; evidence.md,
    what kernels like these were run on; files.md, what else there is.

    binaries  what the README says of them; None: the target has none, and none may be asked for
    """
    if binaries is None:
        refuse_binaries(plan)
    if not plan.kernels:
        raise PackageError(
            f"no kernel of target {plan.target.name} was asked for; name other formats or ops"
        )
    formats = list(dict.fromkeys(
        k.format for k in plan.kernels if isinstance(k.subject, BlockFormat)
    ))  # fmt: skip
    context: dict[str, Any] = {
        "package": binding.package, "api": binding.api, "requires": binding.requires,
        "needs": " and ".join(_plain(one) for one in binding.requires),
        "formats": formats, "kernels": plan.kernels, "evidence": plan.render("package/evidence.md"),
        "files": plan.render("package/files.md") + (binaries or ""),
        "folder": f"python/{binding.package}/kernels",
    }  # fmt: skip
    root = f"python/{binding.package}"
    made: dict[str, Content] = {
        f"{root}/kernels/{plan.entry(one)['file']}": one.source for one in plan.kernels
    }
    made |= {
        "README.md": plan.render("README.md.j2", **context),
        "pyproject.toml": plan.render("pyproject.toml.j2", **context),
        f"{root}/__init__.py": plan.render("init.py.j2", **context),
        f"{root}/host.py": plan.render("host.py.j2", **context),
        f"{root}/manifest.py": plan.render("manifest.py.j2", **context),
        f"{root}/decide.py": plan.render("decide.py.j2", **context),
        f"{root}/driver.py": plan.render("package/driver.py.j2", **context),
        f"{root}/py.typed": "",
        f"{root}/manifest.json": plan.manifest,
        f"{root}/dispatch.json": plan.dispatch,
    }
    return made


def _plain(requirement: str) -> str:
    """The name in a requirement."""
    return next(requirement[:n] for n, c in enumerate(requirement + ">") if c in "[<>=!~; ")


def torch_project(plan: Plan, name: str, **more: Any) -> dict[str, Content]:
    """What projects for Hugging Face's kernel-builder share whose Python part launches kernels on
    torch's tensors; the target adds, in huggingface/: build.toml.j2, driver.py.j2, evidence.md."""
    if not any(k.op in ("matvec", "matmul") for k in plan.kernels):
        raise PackageError(
            f"no matmul of target {plan.target.name} was asked for, and the project is for these;"
            " name more ops"
        )
    formats = list(dict.fromkeys(
        k.format for k in plan.kernels if isinstance(k.subject, BlockFormat)
    ))  # fmt: skip
    context: dict[str, Any] = {"name": name, "formats": formats, **more}
    context["evidence"] = plan.render("package/evidence.md")
    root = f"torch-ext/{name}"
    made: dict[str, Content] = {
        path: plan.render(template, **context)
        for path, template in {
            "build.toml": "huggingface/build.toml.j2", "flake.nix": "flake.nix",
            "CARD.md": "CARD.md.j2",
            f"tests/test_{name}.py": "test_torch.py.j2",
            f"{root}/__init__.py": "torch_host.py.j2", f"{root}/manifest.py": "manifest.py.j2",
            f"{root}/decide.py": "decide.py.j2", f"{root}/driver.py": "huggingface/driver.py.j2",
        }.items()
    }  # fmt: skip
    made |= {f"{root}/manifest.json": plan.manifest, f"{root}/dispatch.json": plan.dispatch}
    return made | {"tests/__init__.py": ""}


def c_header(plan: Plan) -> str:
    """A header for hosts in C and C++: what each kernel takes, how it is launched, and which one
    serves."""
    features = sorted({name for one in plan.entries for name in one["features"]})

    def groups(kernel: Kernel) -> list[str]:
        return [spelt(one, C_SIZES) for one in plan.entry(kernel)["launch"]["groups"]]

    def bits(names: Sequence[str]) -> str:
        return " | ".join(f"KERNELGEN_HAS_{one.replace('-', '_')}" for one in names) or "0"

    return plan.render(
        "kernels.h.j2", kernels=plan.kernels, entry=plan.entry, rules=plan.rules,
        known={k.entry: n for n, k in enumerate(plan.kernels)}, features=features, groups=groups,
        bytes_of=functools.partial(_memory, plan), bits=bits,
        subject=lambda e: e.get("format") or e["attention"],
        needs=lambda e: next((f'"{one}"' for one in e["needs"].values()), "NULL"),
    )  # fmt: skip


def _memory(plan: Plan, kernel: Kernel) -> list[tuple[str, str]]:
    """Memory that a launch wants besides what a host gives: role, bytes."""
    entry = plan.entry(kernel)
    symbols = {**entry["symbols"], **entry["launch"]["symbols"]}
    found = []
    for one in entry["arguments"]:
        if one["role"] in ("scratch", "zero"):
            parts = [spelt(symbols.get(s, s), C_SIZES) for s in one["shape"]]
            found.append((one["role"], " * ".join((*parts, str(ITEM_BYTES[one["dtype"]])))))
    return found

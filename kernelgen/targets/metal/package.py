"""Metal sources, a header for hosts in C, Objective-C and Swift, a metallib where Xcode is, and a
Python package over torch."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path

from kernelgen.targets.base import Kernel
from kernelgen.targets.device_package import Binding, c_header, device_package
from kernelgen.targets.package import Content, PackageError, Plan

BINDING = Binding(
    package="kernelgen_metal",
    api="Metal",
    requires=("torch>=2.7",),
)

#: what --arch calls the one binary there is
_LIBRARY = "metallib"


def package(plan: Plan) -> dict[str, Content]:
    """The files of the package."""
    if plan.binaries and plan.binaries != (_LIBRARY,):
        raise PackageError(
            f"{', '.join(plan.binaries)} was asked for; target metal makes {_LIBRARY} only"
        )
    made: dict[str, Content] = {}
    said = "none was asked for"
    if plan.binaries is None or plan.binaries:
        if shutil.which("xcrun"):
            made["kernels.metallib"] = library(plan.kernels)
            said = ""
        elif plan.binaries:
            raise PackageError(
                "a metallib was asked for, and xcrun is not on the path; install Xcode on a Mac, or"
                " leave out --arch"
            )
        else:
            said = "xcrun is not on the path of the machine that built this"
    line = f"- There is no metallib: {said}." if said else "- `kernels.metallib` has all kernels."
    return {**device_package(plan, BINDING, line + "\n"), **made, "kernels.h": c_header(plan)}


def library(kernels: tuple[Kernel, ...]) -> bytes:
    """All kernels compiled into one metallib, by the compiler of Xcode."""
    with tempfile.TemporaryDirectory(prefix="kernelgen-") as place:
        folder = Path(place)
        parts = []
        for kernel in kernels:
            (folder / f"{kernel.entry}.metal").write_text(kernel.source, "utf-8")
            part = f"{kernel.entry}.air"
            _run(folder, "metal", "-fno-fast-math", "-c", f"{kernel.entry}.metal", "-o", part)
            parts.append(part)
        _run(folder, "metallib", *parts, "-o", "kernels.metallib")
        return (folder / "kernels.metallib").read_bytes()


def _run(folder: Path, *command: str) -> None:
    done = subprocess.run(
        ["xcrun", "-sdk", "macosx", *command], cwd=folder, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["no reason given"])[0]
        raise PackageError(f"xcrun {command[0]} failed: {said}; --arch none makes no metallib")

"""Kernels compiled ahead of time by nvcc: machine code for architectures, PTX, and both in one."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from kernelgen.targets.base import Kernel
from kernelgen.targets.cuda.runtime import features_of
from kernelgen.targets.package import Content, PackageError

#: architectures that packages have binaries for; those with a letter are for one chip alone
ARCHITECTURES = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90a", "sm_100a", "sm_120a")
#: as PTX, which drivers compile for chips that came later
_VIRTUAL = ("compute_75", "compute_80")

#: 177: a variable that is never used; every head of a kernel names what some templates want
_FLAGS = ("-std=c++17", "-diag-suppress", "177")


def unit(kernels: Iterable[Kernel], guarded: bool = True) -> str:
    """Kernels of different entry points as one file: each in a namespace of its own, with its
    macros gone after it, and, if `guarded`, only where the architecture has what it wants."""
    parts = []
    for number, kernel in enumerate(kernels):
        macros = dict.fromkeys(re.findall(r"^#define (\w+)", kernel.source, re.M))
        undone = "".join(f"#undef {name}\n" for name in macros)
        source = f"namespace kernel_{number} {{\n{kernel.source}\n}}\n{undone}"
        guard = _guard(kernel) if guarded else ""
        parts.append(f"#if {guard}\n{source}#endif\n" if guard else source)
    return "\n".join(parts)


def _guard(kernel: Kernel) -> str:
    """A condition on the architecture that is compiled for."""
    chips = [one for one in (75, 80) if features_of(one).issuperset(kernel.features)]
    if chips:
        return "" if chips[0] == 75 else "__CUDA_ARCH__ >= 800"
    return "defined(__CUDA_ARCH_FEAT_SM90_ALL)"


def why_no_compiler() -> str | None:
    """Why nothing can be compiled here, or None."""
    return None if shutil.which("nvcc") else "nvcc is not on the path"


def compiler() -> str:
    """The compiler and its version."""
    said = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=False).stdout
    found = re.search(r"release (\S+), V(\S+)", said)
    return f"nvcc {found[2]}" if found else "nvcc"


def binaries(units: dict[str, tuple[str, bool]], wanted: Sequence[str]) -> dict[str, Content]:
    """Machine code, PTX and fat binaries of units, by file name.

    units   text of each, and whether a*b + c may be rounded once
    Raises PackageError where an architecture is unknown or a kernel does not compile.
    """
    for arch in wanted:
        if not re.fullmatch(r"sm_\d+[af]?", arch):
            raise PackageError(
                f"architecture {arch!r} was asked for; name one as sm_80 or sm_90a, for instance"
                f" {', '.join(ARCHITECTURES)}"
            )
    with tempfile.TemporaryDirectory(prefix="kernelgen-") as place:
        folder = Path(place)
        jobs = []
        for name, (text, contract) in units.items():
            (folder / f"{name}.cu").write_text(text, "utf-8")
            flags = () if contract else ("-fmad=false",)
            jobs += [(name, arch, "cubin", flags) for arch in wanted]
            jobs += [(name, arch, "ptx", flags) for arch in _VIRTUAL]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            made = dict(pool.map(lambda job: _compile(folder, *job), jobs))
        for name in units:
            path = folder / f"{name}.fatbin"
            images = [
                f"--image3=kind={kind},sm={arch.partition('_')[2]},file={folder / file}"
                for one, arch, kind, file in (
                    (n, a, "elf" if k == "cubin" else "ptx", f"{n}.{a}.{k}") for n, a, k, _ in jobs
                )
                if one == name
            ]
            _run(["fatbinary", "-64", f"--create={path}", *images])
            made[path.name] = path.read_bytes()
    return made


def _compile(
    folder: Path, name: str, arch: str, kind: str, flags: tuple[str, ...]
) -> tuple[str, Content]:
    file = f"{name}.{arch}.{kind}"
    # from inside the folder, so that no path of this machine gets into what is made
    _run(["nvcc", f"-arch={arch}", f"-{kind}", *_FLAGS, *flags, "-o", file, f"{name}.cu"], folder)
    data = (folder / file).read_bytes()
    return file, data if kind == "cubin" else data.decode()


def _run(command: list[str], folder: Path | None = None) -> None:
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    except OSError as error:
        raise PackageError(f"{command[0]} cannot be run: {error.strerror}") from error
    if done.returncode:
        said = next((s for s in done.stderr.splitlines() if "error" in s or "fatal" in s), "")
        raise PackageError(
            f"{' '.join(command[:3])} failed: {said or done.stderr.strip()[-200:]}; leave out the"
            " architecture with --arch, or --arch none for no binaries"
        )

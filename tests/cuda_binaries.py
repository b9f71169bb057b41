"""CUDA kernels as machine code: what nvcc makes of them, and what there is in it."""

from __future__ import annotations

import functools
import importlib.util
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from kernelgen.targets.base import Kernel
from kernelgen.targets.cuda.runtime import features_of

#: architectures that kernels must compile for; those with a letter are for one chip alone
ARCHITECTURES = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90a", "sm_100a", "sm_120a")


@dataclass(frozen=True)
class Binary:
    """One kernel of one architecture.

    registers     of a thread
    stack         bytes of local memory of a thread
    spilled       bytes of it that hold what registers could not
    instructions  how often each occurs, by its full name
    said          warnings of the compiler
    """

    arch: str
    registers: int
    stack: int
    spilled: int
    instructions: Counter[str]
    said: tuple[str, ...]

    def count(self, name: str) -> int:
        """Instructions of that name, with whatever modifiers: "LDG" counts LDG.E.128, too."""
        wanted = name.split(".")
        return sum(
            n
            for full, n in self.instructions.items()
            if full.split(".")[0] == wanted[0] and set(wanted) <= set(full.split("."))
        )


def why_no_compiler() -> str | None:
    """Why nothing can be compiled here, or None."""
    return None if shutil.which("nvcc") else "nvcc is not on the path"


@functools.cache
def disassembler() -> str | None:
    """cuobjdump: of CUDA, or the one that Triton brings along."""
    found = shutil.which("cuobjdump")
    spec = None if found else importlib.util.find_spec("triton")
    if spec and spec.origin:
        path = Path(spec.origin).parent / "backends/nvidia/bin/cuobjdump"
        found = str(path) if path.exists() else None
    return found


def serves(kernel: Kernel, arch: str) -> bool:
    """Whether an architecture has the features that a kernel wants."""
    return features_of(int(arch[3:].rstrip("a"))).issuperset(kernel.features)


def compiled(made: Iterable[Kernel], arch: str, folder: Path) -> dict[str, Binary]:
    """Kernels of different entry points by these, compiled in one go, which takes a fraction of
    the time: each in a namespace of its own, with its macros gone after it."""
    parts = []
    for number, kernel in enumerate(made):
        macros = dict.fromkeys(re.findall(r"^#define (\w+)", kernel.source, re.M))
        undone = "".join(f"#undef {name}\n" for name in macros)
        parts.append(f"namespace kernel_{number} {{\n{kernel.source}\n}}\n{undone}")
    source, binary = folder / f"{arch}.cu", folder / f"{arch}.cubin"
    source.write_text("".join(parts))
    # 177: a variable that is never used; every head of a kernel names what some templates want
    done = _run([
        "nvcc", f"-arch={arch}", "-cubin", "-std=c++17", "-Xptxas", "-v", "-diag-suppress", "177",
        "-o", str(binary), str(source),
    ])  # fmt: skip
    said = tuple(s for s in done.splitlines() if re.search(r"\bwarning\b|C75\d\d", s, re.I))
    code = _instructions(binary)
    result = {}
    for part in done.split("Compiling entry function '")[1:]:
        entry = part.split("'")[0]
        stack, *spills = map(int, re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part
        ).groups())  # type: ignore[union-attr]  # fmt: skip
        registers = int(re.search(r"Used (\d+) registers", part)[1])  # type: ignore[index]
        result[entry] = Binary(
            arch, registers, stack, sum(spills), code.get(entry, Counter()), said
        )
    return result


def _run(command: Sequence[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}:\n{done.stderr}"
    return done.stdout + done.stderr


def _instructions(binary: Path) -> dict[str, Counter[str]]:
    """The instructions of each function of a file; of none where nothing can take it apart."""
    tool = disassembler()
    if tool is None:
        return {}
    found: dict[str, Counter[str]] = {}
    for part in _run([tool, "-sass", str(binary)]).split("Function : ")[1:]:
        names = re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)", part, re.M)
        found[part.split()[0]] = Counter(names)
    return found

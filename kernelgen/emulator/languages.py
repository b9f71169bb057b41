"""How the text of each language becomes a library that the engine loads."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from kernelgen.emulator.compiler import (
    INCLUDE,
    Compiler,
    EmulatorError,
    built,
    cxx,
    digest,
    kernel_key,
    machine_flags,
    shared_flags,
)
from kernelgen.emulator.source import Entry, entries, rewrite_cuda

#: GPUs wrap, alias and do not trap; float arithmetic is rounded as it is written
_FLAGS = (
    "-O2", "-fPIC", "-fno-strict-aliasing", "-fwrapv", "-fno-math-errno", "-ffp-contract=off",
    "-fno-exceptions", "-fstack-clash-protection", "-w",
)  # fmt: skip
#: the engine supplies what these call
_CHECKS = ("-fsanitize=thread,alignment,bounds,shift-exponent,integer-divide-by-zero",)


@dataclass(frozen=True)
class Compiled:
    """A kernel's library, and the names of its function and of the description of it."""

    library: Path
    symbol: str
    describe: str
    checked: bool


@dataclass(frozen=True)
class Language:
    """What the emulator knows of a language."""

    suffix: str
    subgroups: tuple[int, ...]
    #: whether a thread that returns before a barrier breaks the language's rules
    exit_is_divergence: bool
    entries: Callable[[str], tuple[Entry, ...]]
    compile: Callable[
        [str, str, Sequence[str], bool, str, Mapping[str, str | int], Sequence[str]], Compiled
    ]


def _defines(defines: Mapping[str, str | int], include: Iterable[str]) -> list[str]:
    return [*(f"-D{k}={v}" for k, v in defines.items()), *(f"-I{p}" for p in include)]


def _debug(compiler: Compiler) -> list[str]:
    return ["-gline-tables-only" if compiler.family == "clang" else "-g"]


def _cuda_entries(source: str) -> tuple[Entry, ...]:
    return tuple(entries(source))


def _cuda_compile(
    source: str, entry: str, known: Sequence[str], checked: bool, name: str,
    defines: Mapping[str, str | int], include: Sequence[str],
) -> Compiled:  # fmt: skip
    # a template's instance, or what a macro makes, is not among the known
    word = entry.split("<")[0].split("::")[-1]
    if entry not in known and not re.search(rf"\b{re.escape(word)}\b", source):
        raise EmulatorError(f"no kernel {entry!r} in {name}; it has {', '.join(known) or 'none'}")
    compiler = cxx()
    plain = entry in known
    # all kernels of a file in one library, but an instance of a template is one of its own
    wanted = known if plain else [entry]
    symbols = {k: k if plain else "instance_" + digest(k) for k in wanted}
    thunks = "".join(f"EMU_ENTRY({symbols[k]}, {k})\n" for k in symbols)
    text = f'#line 1 "{name}"\n{rewrite_cuda(source)}\n#line 1 "entries of the emulator"\n{thunks}'
    flags = [
        "-std=c++17", *_FLAGS, *_debug(compiler), *machine_flags(compiler),
        *(_CHECKS if checked else ()), *_defines(defines, include),
        *(["-fno-gnu-unique"] if compiler.family == "gcc" else []),
        f"-I{INCLUDE / 'cuda'}", "-include", "emu_cuda.h",
    ]  # fmt: skip

    def build(work: Path, target: Path) -> None:
        (work / "kernel.cpp").write_text(text)
        compiler.run([*flags, "-c", "kernel.cpp", "-o", "kernel.o"], work)
        # linked without the checks' own libraries: the engine has what they call
        compiler.run([*shared_flags(), "kernel.o", "-o", str(target)], work)

    library = built(f"kernel-{kernel_key(compiler, 'cuda', text, flags)}.so", build)
    symbol = symbols[entry]
    return Compiled(library, f"emu_entry_{symbol}", f"emu_describe_{symbol}", checked)


LANGUAGES: dict[str, Language] = {
    "cuda": Language(".cu", (32,), False, _cuda_entries, _cuda_compile),
}

"""How the text of each language becomes a library that the engine loads."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from kernelgen.emulator.compiler import (
    INCLUDE,
    Compiler,
    EmulatorError,
    built,
    clang,
    cxx,
    digest,
    kernel_key,
    machine_flags,
    shared_flags,
)
from kernelgen.emulator.source import Entry, dynamic_offset, entries, rewrite_cuda

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
    return ["-gline-tables-only" if compiler.family == "clang" else "-g1"]


def _cuda_entries(source: str) -> tuple[Entry, ...]:
    return tuple(entries(source))


def _header(
    compiler: Compiler, kind: str, path: Path, flags: Sequence[str], defines: Mapping[str, Any]
) -> list[str]:
    """Flags that include the header that every kernel of a language has, compiled beforehand: it
    takes longer than a kernel.  Macros may change it, so with any it is compiled anew."""
    plain = ["-include", path.name]
    if defines:
        return plain
    ending = ".h.gch" if compiler.family == "gcc" else ".pch"
    extra = [] if compiler.family == "gcc" else ["-Xclang", "-fno-pch-timestamp"]

    def build(work: Path, target: Path) -> None:
        compiler.run([*flags, *extra, "-x", f"{kind}-header", str(path), "-o", str(target)], work)

    try:
        made = built(f"header-{kernel_key(compiler, kind, str(path), flags)}{ending}", build)
    except EmulatorError:  # an old compiler may not do this
        return plain
    if compiler.family != "gcc":
        return ["-include-pch", str(made)]
    # GCC looks beside a header for its compiled form, and need not find the header itself
    return ["-include", str(made.with_suffix(""))]


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
    thunks += f'extern "C" const unsigned emu_dynamic_offset = {dynamic_offset(source)};\n'
    text = f'#line 1 "{name}"\n{rewrite_cuda(source)}\n#line 1 "entries of the emulator"\n{thunks}'
    always = [
        "-std=c++17", *_FLAGS, *_debug(compiler), *machine_flags(compiler),
        *(_CHECKS if checked else ()),
        *(["-fno-gnu-unique"] if compiler.family == "gcc" else []), f"-I{INCLUDE / 'cuda'}",
    ]  # fmt: skip
    flags = [*always, *_defines(defines, include)]

    def build(work: Path, target: Path) -> None:
        (work / "kernel.cpp").write_text(text)
        header = _header(compiler, "c++", INCLUDE / "cuda" / "emu_cuda.h", always, defines)
        compiler.run([*flags, *header, "-c", "kernel.cpp", "-o", "kernel.o"], work)
        # linked without the checks' own libraries: the engine has what they call
        compiler.run([*shared_flags(), "kernel.o", "-o", str(target)], work)

    library = built(f"kernel-{kernel_key(compiler, 'cuda', text, flags)}.so", build)
    symbol = symbols[entry]
    return Compiled(library, f"emu_entry_{symbol}", f"emu_describe_{symbol}", checked)


# ---- OpenCL and Metal: clang's C++ for OpenCL, compiled for this CPU

_CL = (
    "-cl-std=clc++2021", "-cl-no-stdinc", "-Xclang",
    "-cl-ext=+cl_khr_fp16,+cl_khr_fp64,-__opencl_c_generic_address_space,-__opencl_c_pipes,"
    "-__opencl_c_device_enqueue",
)  # fmt: skip
#: attributes of Metal's parameters that a launch gives a value to
_GIVEN = ("buffer", "threadgroup")
_STATICS = """
#include <stddef.h>
extern char __start_emu_shared[] __attribute__((weak));
extern char __stop_emu_shared[] __attribute__((weak));
extern "C" void *emu_statics(size_t *bytes) {
    *bytes = size_t(__stop_emu_shared - __start_emu_shared);
    return __start_emu_shared;
}
"""


def _thunks(entry: Entry) -> str:
    """A function that calls a kernel with void**, and one that describes its arguments."""
    values: list[str] = []
    descriptions: list[str] = []
    for p in entry.declared:
        if p.attribute and p.attribute not in _GIVEN:
            values.append(f"emu_builtin<{p.type}>(emu_{p.attribute})")
            continue
        at = f"args[{len(descriptions)}]"
        kept = p.type
        if p.type.endswith("&"):
            referred = p.type[:-1].strip()
            if "constant" in referred.split():  # its bytes are the argument
                kept = " ".join(w for w in referred.split() if w not in ("constant", "const"))
                values.append(f"*({referred} *)(ulong){at}")
            else:
                kept = f"{referred} *"
                values.append(f"*emu_argument<{kept}>({at})")
        else:
            values.append(f"emu_argument<{p.type}>({at})")
        descriptions.append(f"text = emu_describe<{kept}>(text);")
    return (
        f'extern "C" void emu_entry_{entry.name}(void **args) {{'
        f" {entry.name}({', '.join(values)}); }}\n"
        f'extern "C" void emu_describe_{entry.name}(char *text) {{'
        f" *text = 0; {' '.join(descriptions)} }}\n"
    )


def _metal_entries(source: str) -> tuple[Entry, ...]:
    return tuple(entries(source, ("kernel",)))


def _opencl_entries(source: str) -> tuple[Entry, ...]:
    return tuple(entries(source, ("kernel", "__kernel")))


def _given(found: Iterable[Entry]) -> tuple[Entry, ...]:
    """Entries whose parameters that a launch gives have no attribute left."""
    return tuple(
        Entry(e.name, tuple(
            replace(p, attribute="") if p.attribute in _GIVEN else p for p in e.declared
        )) for e in found
    )  # fmt: skip


def _objcopy() -> str:
    for name in ("objcopy", "llvm-objcopy", *(f"llvm-objcopy-{n}" for n in range(21, 15, -1))):
        if path := shutil.which(name):
            return path
    raise EmulatorError("the emulator found no objcopy; install binutils or LLVM")


def _statics(compiler: Compiler) -> Path:
    """The object that tells the engine where a kernel's local memory is."""

    def build(work: Path, target: Path) -> None:
        (work / "statics.cpp").write_text(_STATICS)
        compiler.run(["-fPIC", "-O1", "-c", "statics.cpp", "-o", str(target)], work)

    return built(f"statics-{kernel_key(compiler, 'statics', _STATICS, ())}.o", build)


def _cl_compile(
    header: str, find: Callable[[str], tuple[Entry, ...]], extra: Sequence[str],
    source: str, entry: str, known: Sequence[str], checked: bool, name: str,
    defines: Mapping[str, str | int], include: Sequence[str],
) -> Compiled:  # fmt: skip
    if entry not in known:
        raise EmulatorError(f"no kernel {entry!r} in {name}; it has {', '.join(known) or 'none'}")
    compiler, linker = clang(), cxx()
    thunks = "".join(_thunks(e) for e in find(source))
    text = f'#line 1 "{name}"\n{source}\n#line 1 "entries of the emulator"\n{thunks}'
    folder = INCLUDE / header.split("_")[1].split(".")[0]
    always = [
        *_CL, *extra, *_FLAGS, "-gline-tables-only", *machine_flags(compiler),
        "-Xclang", "-ffloat16-excess-precision=none", *(_CHECKS if checked else ()), f"-I{folder}",
    ]  # fmt: skip
    flags = [*always, *_defines(defines, include)]

    def build(work: Path, target: Path) -> None:
        (work / "kernel.cl").write_text(text)
        known = _header(compiler, "cl", folder / header, always, defines)
        compiler.run([*flags, "-x", "cl", *known, "-c", "kernel.cl", "-o", "kernel.o"], work)
        # all local memory in a section of its own, to be poisoned and watched
        move = [_objcopy(), "--rename-section", ".bss=emu_shared", "kernel.o"]
        subprocess.run(move, check=True, cwd=work)
        files = ["kernel.o", str(_statics(linker))]
        linker.run([*shared_flags(), *files, "-o", str(target), "-lm"], work)

    library = built(f"kernel-{kernel_key(compiler, header, text, flags)}.so", build)
    return Compiled(library, f"emu_entry_{entry}", f"emu_describe_{entry}", checked)


LANGUAGES: dict[str, Language] = {
    "cuda": Language(".cu", (32,), False, _cuda_entries, _cuda_compile),
    "opencl": Language(
        ".cl", (1, 2, 4, 8, 16, 32, 64), True, _opencl_entries,
        partial(_cl_compile, "emu_opencl.h", _opencl_entries, ("-Wno-c++11-narrowing",)),
    ),
    "metal": Language(
        ".metal", (32,), True, lambda source: _given(_metal_entries(source)),
        partial(_cl_compile, "emu_metal.h", _metal_entries, ("-cl-single-precision-constant",)),
    ),
}  # fmt: skip


def missing(language: str) -> str | None:
    """What the emulator lacks here to run a language, as a sentence, or None."""
    try:
        cxx()
        if language != "cuda":
            clang()
            _objcopy()
    except EmulatorError as error:
        return str(error)
    return None

"""A C library: every kernel for every instruction set, and the choice between them at load time.

Its Python package calls it through ctypes, its Rust crate through the C interface.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from kernelgen.targets.base import Kernel
from kernelgen.targets.c import TARGET
from kernelgen.targets.c.compiler import HEADERS
from kernelgen.targets.c.runtime import ISAS as EVERY_ISA
from kernelgen.targets.c.runtime import Isa
from kernelgen.targets.package import (
    MOST_ROWS,
    Content,
    PackageError,
    Plan,
    Rule,
    refuse_binaries,
)

#: instruction sets that any program may use, and those that it asks the system for, by their name
ISAS = tuple(isa for isa in EVERY_ISA if not isa.capabilities.features & TARGET.unpackaged)
ASKED_FOR = tuple(isa for isa in EVERY_ISA if isa not in ISAS)

#: instruction sets of the library
ALL = (*ASKED_FOR, *ISAS)

#: what the library calls the precisions that may be asked for
_PRECISIONS = ("auto", "fp32", "fp16", "bf16", "int8")

#: for kernels whose results must not depend on how a*b + c is rounded
_UNFUSED = """\
#if defined(__clang__)
#pragma STDC FP_CONTRACT OFF
#else
#pragma GCC optimize("fp-contract=off")
#endif
"""


def package(plan: Plan) -> dict[str, Content]:
    """The files of the library."""
    if not plan.rules and not plan.kernels:
        raise PackageError("no kernel of target c was asked for; name other formats or ops")
    refuse_binaries(plan)
    by_isa = {isa.name: plan.defaults(isa.capabilities) for isa in ALL}
    first = by_isa[ISAS[-1].name]
    special = {isa.name: plan.unpackaged(isa.capabilities) for isa in ASKED_FOR}
    tuned = _tuned(plan)
    for name, (kernels, _) in special.items():
        known = {k.entry for k in (*by_isa[name], *tuned.get(name, ()))}
        tuned.setdefault(name, []).extend(k for k in kernels if k.entry not in known)
    files, folders = _sources(by_isa, tuned)
    formats = list(dict.fromkeys(k.format for k in first if k.op != "attention"))
    context: dict[str, Any] = {
        "isas": ALL, "asked_for": ASKED_FOR, "kernels": first, "formats": formats,
        "tuned": {name: made for name, made in tuned.items() if made},
        "beside": beside, "stem": stem, "given": _given, "matvec_rows": 8,
        "names": [n for k in (*first, *_every(tuned)) for n in _functions(k)],
        "rules": _rules(plan, tuned, {k.entry for k in first}, special),
        "features": sorted({name for isa in ALL for name in isa.needs}),
        "needs": _needs, "folders": folders,
        "sources": {isa.name: _listed(files, folders[isa.name]) for isa in ALL},
        "machines": _machines(), "plain": folders[ISAS[-1].name],
    }  # fmt: skip
    made: dict[str, Content] = dict(files)
    for name, template in _TEMPLATES.items():
        made[name] = plan.render(f"package/{template}", **context)
    for name in TARGET.support_files:
        made[f"src/{name}"] = (HEADERS / name).read_text("utf-8")
    made["manifest.json"] = _manifest(plan, by_isa, files, folders, _every(tuned))
    return made


_TEMPLATES = {
    "README.md": "README.md.j2",
    "CMakeLists.txt": "CMakeLists.txt",
    "kernels.cmake": "kernels.cmake.j2",
    "kernelgen-config.cmake": "kernelgen-config.cmake",
    "kernelgen.pc.in": "kernelgen.pc.in",
    "build.sh": "build.sh.j2",
    "include/kernelgen.h": "kernelgen.h.j2",
    "src/names.h": "names.h.j2",
    "src/table.h": "table.h.j2",
    "src/table.c": "table.c.j2",
    "src/dispatch.c": "dispatch.c.j2",
    "pyproject.toml": "pyproject.toml.j2",
    "setup.py": "setup.py.j2",
    "python/kernelgen_c/__init__.py": "init.py.j2",
    "python/kernelgen_c/py.typed": "py.typed",
    "rust/Cargo.toml": "Cargo.toml.j2",
    "rust/build.rs": "build.rs",
    "rust/src/lib.rs": "lib.rs.j2",
}


def stem(kernel: Kernel) -> str:
    return kernel.entry.removeprefix(TARGET.prefix)


def beside(kernel: Kernel) -> list[tuple[str, str]]:
    """The functions beside a kernel that say how much memory it wants: name, parameters."""
    found = [("bytes", "int64_t N, int64_t K")] if kernel.op == "prepare" else []
    if any(one.role == "scratch" for one in kernel.arguments):
        found.append(("scratch", "int64_t M, int64_t K"))
    return found


def _given(parameters: str) -> str:
    """The names of parameters."""
    return ", ".join(one.rsplit(" ", 1)[1] for one in parameters.split(", "))


def _functions(kernel: Kernel) -> list[str]:
    return [kernel.entry, *(f"{kernel.entry}_{what}" for what, _ in beside(kernel))]


def _needs(isa: Isa) -> str:
    return " | ".join(f"HAS_{name}" for name in sorted(isa.needs)) or "0"


def _machines() -> dict[str, list[str]]:
    """Instruction sets by what uname calls the machine."""
    found: dict[str, list[str]] = {}
    for isa in ALL:
        if isa.machines:
            found.setdefault(" | ".join(isa.machines), []).append(isa.name)
    return found


def _source(kernel: Kernel) -> str:
    return ("" if kernel.contract else _UNFUSED) + '#include "names.h"\n' + kernel.source


def _tuned(plan: Plan) -> dict[str, list[Kernel]]:
    """Kernels for tuned shapes, by the instruction set that they were tuned for.

    Those that read the native layout are left out: weights of the library are prepared.
    """
    wanted = {(p.family, p.kernel) for rule in plan.rules for p in rule.points}
    known = {isa.name for isa in ALL}
    found: dict[str, list[Kernel]] = {}
    for kernel in plan.kernels:
        for family, entry in sorted(wanted):
            if entry == kernel.entry and family in known and "prepare" in kernel.needs:
                found.setdefault(family, []).append(kernel)
    return found


def _every(tuned: Mapping[str, Iterable[Kernel]]) -> list[Kernel]:
    """All tuned kernels, each name once, without those that are there anyway."""
    found = {k.entry: k for kernels in tuned.values() for k in kernels}
    return list(found.values())


def _sources(
    by_isa: Mapping[str, Iterable[Kernel]], tuned: dict[str, list[Kernel]]
) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Files of kernels, and for each instruction set what a shell calls those it is made of."""
    texts = {name: {stem(k): _source(k) for k in made} for name, made in by_isa.items()}
    last = texts[ISAS[-1].name]
    same = [one for one in last if len({texts[name][one] for name in texts}) == 1]
    files = {f"src/any/{one}.c": last[one] for one in same}
    folders: dict[str, list[str]] = {}
    for isa in ALL:
        own = f"src/{isa.capabilities.registers}_registers"
        folders[isa.name] = ["src/table.c"] + ["src/any/*.c"] * bool(same)
        rest = {f"{own}/{s}.c": t for s, t in texts[isa.name].items() if s not in same}
        for path, text in rest.items():
            assert files.setdefault(path, text) == text, path
        folders[isa.name] += [f"{own}/*.c"] * bool(rest)
        mine = [k for k in tuned.get(isa.name, ()) if stem(k) not in texts[isa.name]]
        files |= {f"src/tuned_{isa.name}/{stem(k)}.c": _source(k) for k in mine}
        folders[isa.name] += [f"src/tuned_{isa.name}/*.c"] * bool(mine)
        tuned[isa.name] = mine
    return files, folders


def _listed(files: Mapping[str, str], patterns: list[str]) -> list[str]:
    found = [p for p in patterns if "*" not in p]
    for pattern in patterns:
        folder = pattern.removesuffix("*.c")
        if folder != pattern:
            found += sorted(path for path in files if path.startswith(folder))
    return found


def _rules(
    plan: Plan,
    tuned: Mapping[str, list[Kernel]],
    plain: set[str],
    special: Mapping[str, tuple[list[Kernel], list[Rule]]],
) -> dict[str, list[str]]:
    """Initializers of rules by the instruction set that they are for, which come first; "" for
    all."""
    kernels = {k.entry: k for k in (*plan.kernels, *_every(tuned))}
    found: dict[str, list[str]] = {}
    for isa in ALL:
        here = plain | {k.entry for k in tuned.get(isa.name, ())}
        lines = [
            _initializer(rule, kernels[point.kernel], (point.m, point.n, point.k), point.rows)
            for rule in plan.rules
            for point in rule.points
            if point.family == isa.name and point.kernel in here
        ]
        for rule in special.get(isa.name, ((), ()))[1]:
            lines += [
                _initializer(rule, kernels[one.kernel], rows=(one.m_from, one.m_to))
                for one in rule.choices
            ]
        if lines:
            found[isa.name] = lines
    # every CPU can run the first of each rule
    found[""] = [_initializer(rule, kernels[rule.choices[0].kernel]) for rule in plan.rules]
    return found


def _initializer(
    rule: Rule,
    kernel: Kernel,
    shape: tuple[int, int, int] = (0, 0, 0),
    rows: tuple[int, int] | None = None,
) -> str:
    """A rule for a shape, or for some rows of activations, by default all of its op."""
    first, most = rows or ((1, 8) if rule.op == "matvec" else (9, MOST_ROWS))
    last = "INT64_MAX" if most == MOST_ROWS else str(most)
    one = kernel.entry
    scratch = any(a.role == "scratch" for a in kernel.arguments)
    run = f".run_with_scratch = {one}, .scratch = {one}_scratch" if scratch else f".run = {one}"
    return (
        f"{{KERNELGEN_{rule.format.upper()}, KERNELGEN_{rule.precision.upper()}, {first}, {last},"
        f' {", ".join(map(str, shape))}, "{one}", {run}}}'
    )


def _manifest(
    plan: Plan,
    by_isa: Mapping[str, Iterable[Kernel]],
    files: Mapping[str, str],
    folders: Mapping[str, list[str]],
    special: Iterable[Kernel],
) -> str:
    """The manifest, with every file of a kernel and the instruction sets that it is for."""
    import json

    found: dict[str, dict[str, Any]] = {}
    tuned = {k.entry: k for k in (*plan.kernels, *special)}
    for isa in ALL:
        mine = {stem(k): k for k in by_isa[isa.name]}
        for path in _listed(files, folders[isa.name]):
            found_as = path.rpartition("/")[2].removesuffix(".c")
            kernel = mine.get(found_as) or tuned.get(TARGET.prefix + found_as)
            if kernel is None or path == "src/table.c":
                continue
            one = found.setdefault(path, {
                **plan.describe(kernel), "file": path, "isas": [],
            })  # fmt: skip
            one["isas"].append(isa.name)
    data = {"target": TARGET.name, "kernels": list(found.values())}
    return json.dumps(data, indent=1, sort_keys=True) + "\n"

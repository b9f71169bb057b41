"""Kernels as files: `build`."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from kernelgen import api, files
from kernelgen.cli.packaging import build_packages
from kernelgen.cli.terminal import (
    OF_ARRAYS,
    AsJson,
    FormatNames,
    Names,
    OpNames,
    TargetNames,
    Variant,
    complain,
    pick_formats,
    pick_ops,
    pick_targets,
    print_json,
    split_names,
)
from kernelgen.errors import FormatError, TargetError
from kernelgen.ir import formats as format_list
from kernelgen.ir.block import BlockFormat
from kernelgen.targets.base import OPS, Target

#: so many names of written files are printed, and the rest counted
_SHOWN = 12


def build(
    target: TargetNames = None,
    format: FormatNames = None,
    op: OpNames = None,
    model: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Only the formats of this file's matrices."),
    ] = None,
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="Where the folders of the targets are made.")
    ] = Path("generated"),
    isa: Variant = "",
    check: Annotated[
        bool,
        typer.Option(
            "--check", help="Write nothing; list what is not up to date, and exit with 1."
        ),
    ] = False,
    package: Annotated[
        bool,
        typer.Option(
            "--package", help="Write what hosts take as it is, without kernelgen, into --out."
        ),
    ] = False,
    layout: Annotated[
        str, typer.Option(metavar="L", help="Of packages: huggingface, or the target's own.")
    ] = "",
    arch: Annotated[
        list[str] | None,
        typer.Option(metavar="A", help="Of packages: architectures to compile for, or none."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write kernels in their default configurations, or packages of them."""
    formats, ops = _formats_of(model, format), pick_ops(op, OPS)
    if not op and (format or model):  # formats alone were asked for
        ops = tuple(one for one in ops if one not in OF_ARRAYS)
    if package:
        if check:
            raise TargetError("--check is about sources, not packages; leave out one of the two")
        chosen = [_assuming(one, isa) for one in pick_targets(target, isa)]
        archs = None if arch is None else tuple(a for a in split_names(arch) if a != "none")
        where = Path("dist") if out == Path("generated") else out
        build_packages(
            chosen, formats, ops, where, layout=layout, binaries=archs, every=not target,
            as_json=as_json,
        )  # fmt: skip
        return
    if layout or arch:
        raise TargetError("--layout and --arch are about packages; give --package, too")
    result: list[dict[str, Any]] = []
    for one in pick_targets(target, isa):
        start = time.perf_counter()
        assumed = _assuming(one, isa)
        changed = files.build(assumed, out, formats, ops, check=check)
        made = list(files.all_kernels(assumed, formats, ops))
        left_over = _left_over(out / one.name, set(files.contents(assumed, made)))
        built = {
            "target": one.name,
            "folder": str(out / one.name),
            "kernels": len(made),
            "stale" if check else "written": [str(p) for p in changed if p not in left_over],
            "left_over": [str(p) for p in left_over],
            "seconds": round(time.perf_counter() - start, 3),
        }
        result.append(built)
        if not as_json:
            (_report_check if check else _report)(built)
    if as_json:
        print_json(result)
    if check and any(one["stale"] or one["left_over"] for one in result):
        complain(
            "error: these files are not what kernelgen writes; build without --check, and delete"
            " what is left over"
        )
        raise typer.Exit(1)


def _left_over(folder: Path, wanted: set[str]) -> list[Path]:
    """Files that a build did not write and does not need."""
    present = sorted(folder.iterdir()) if folder.is_dir() else []
    return [path for path in present if path.name not in wanted]


def _assuming(target: Target, variant: str) -> Target:
    """The target, its default configurations made for a variant."""
    if not variant:
        return target
    return dataclasses.replace(target, capabilities=target.runtime(variant).capabilities())


def _formats_of(model: Path | None, format: Names) -> list[BlockFormat]:
    """The formats of a file's matrices, as far as they are wanted."""
    wanted = pick_formats(format)
    if model is None:
        return wanted
    tensors = api.open(model)
    for name, kind in tensors.skipped.items():
        complain(f"{model}: tensor {name} is in {kind}, which kernelgen does not know: left out")
    listing = tensors.listing()
    used = dict.fromkeys(format_list.get(kind) for _, shape, kind, _ in listing if len(shape) > 1)
    # those of families are not among the formats that are there by default
    found = [fmt for fmt in dict.fromkeys(wanted if format else [*wanted, *used]) if fmt in used]
    if not found:
        has = ", ".join(fmt.name for fmt in used) or "no matrices of known formats"
        raise FormatError(
            f"{model} has {has}, none of the formats asked for; leave out --format to build for it"
        )
    return found


def _report_check(built: dict[str, Any]) -> None:
    for path in built["stale"]:
        print(f"  {'stale' if Path(path).exists() else 'missing':9} {path}")
    for path in built["left_over"]:
        print(f"  left over {path}")
    wrong = len(built["stale"]) + len(built["left_over"])
    said = f"{wrong} files are not as they should be" if wrong else "all up to date"
    print(
        f"{built['target']}: {built['kernels']} kernels in {built['folder']}, {said},"
        f" {built['seconds']:.1f} s"
    )


def _report(built: dict[str, Any]) -> None:
    written, left_over = built["written"], built["left_over"]
    for path in written[:_SHOWN]:
        print(f"  {path}")
    if len(written) > _SHOWN:
        print(f"  and {len(written) - _SHOWN} more")
    print(
        f"{built['target']}: {built['kernels']} kernels in {built['folder']},"
        f" {len(written) or 'no'} files changed, {built['seconds']:.1f} s"
    )
    if left_over:
        print(f"  not of this build: {left_over[0]}{' and others' * (len(left_over) > 1)}")

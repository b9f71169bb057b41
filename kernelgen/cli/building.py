"""Kernels as files: `build`."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from kernelgen import api, files
from kernelgen.cli.terminal import (
    AsJson,
    FormatNames,
    OpNames,
    TargetNames,
    Variant,
    complain,
    pick_formats,
    pick_ops,
    pick_targets,
    print_json,
)
from kernelgen.errors import FormatError
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
        typer.Option(metavar="FILE.gguf", help="Only the formats of this file's matrices."),
    ] = None,
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="Where the folders of the targets are made.")
    ] = Path("generated"),
    isa: Variant = "",
    check: Annotated[
        bool,
        typer.Option("--check", help="Write nothing; list what is not up to date, and exit with 1."),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Write kernels in their default configurations."""
    formats, ops = _formats_of(model, pick_formats(format)), pick_ops(op, OPS)
    result: list[dict[str, Any]] = []
    for one in pick_targets(target, isa):
        start = time.perf_counter()
        assumed = _assuming(one, isa)
        changed = files.build(assumed, out, formats, ops, check=check)
        made = len(list(files.kernels(assumed, formats, ops)))
        result.append(
            {
                "target": one.name,
                "folder": str(out / one.name),
                "kernels": made,
                "stale" if check else "written": [str(path) for path in changed],
                "seconds": round(time.perf_counter() - start, 3),
            }
        )
        if not as_json:
            _report(result[-1], check)
    if as_json:
        print_json(result)
    if check and any(one["stale"] for one in result):
        complain("error: these files are not what kernelgen writes; run kernelgen build without --check")
        raise typer.Exit(1)


def _assuming(target: Target, variant: str) -> Target:
    """The target, its default configurations made for a variant."""
    if not variant:
        return target
    return dataclasses.replace(target, capabilities=target.runtime(variant).capabilities())


def _formats_of(model: Path | None, wanted: list[BlockFormat]) -> list[BlockFormat]:
    """The formats of a file's matrices, as far as they are wanted."""
    if model is None:
        return wanted
    tensors = api.open(model)
    for name, kind in tensors.skipped.items():
        complain(f"{model}: tensor {name} is in {kind}, which kernelgen does not know: left out")
    used = {w.format for w in tensors.values() if len(w.shape) > 1}
    found = [fmt for fmt in wanted if fmt in used]
    if not found:
        has = ", ".join(fmt.name for fmt in used) or "no matrices of known formats"
        raise FormatError(
            f"{model} has {has}, none of the formats asked for; leave out --format to build for it"
        )
    return found


def _report(built: dict[str, Any], check: bool) -> None:
    changed = built["stale" if check else "written"]
    for path in changed[: None if check else _SHOWN]:
        state = "stale   " if Path(path).exists() else "missing "
        print(f"  {state * check}{path}")
    if not check and len(changed) > _SHOWN:
        print(f"  and {len(changed) - _SHOWN} more")
    said = "stale, missing or left over" if check else "written"
    print(
        f"{built['target']}: {built['kernels']} kernels in {built['folder']}, {len(changed)} files"
        f" {said}, {built['seconds']:.1f} s"
    )

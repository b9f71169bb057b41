"""Packages: `build --package`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from kernelgen.cli.terminal import print_json
from kernelgen.errors import TargetError
from kernelgen.ir.block import BlockFormat
from kernelgen.packages import plan, write
from kernelgen.targets.base import Target

#: layouts of packages besides the target's own, with what `--layout` calls them
LAYOUTS = ("huggingface",)


def build_packages(
    targets: list[Target],
    formats: list[BlockFormat],
    ops: tuple[str, ...],
    out: Path,
    *,
    layout: str = "",
    binaries: tuple[str, ...] | None = None,
    every: bool = False,
    as_json: bool = False,
) -> None:
    """Write a package for each target; `every`: the user named none, so those without are left
    out."""
    if layout and layout not in LAYOUTS:
        raise TargetError(
            f"layout {layout!r} was asked for; known are {', '.join(LAYOUTS)}; leave it out for"
            " the target's own"
        )
    if every:
        targets = [one for one in targets if write.packageable(one, layout) is None]
    result: list[dict[str, Any]] = []
    for one in targets:
        start = time.perf_counter()
        wanted = plan.plan(one, formats, ops, binaries=binaries)
        made = write.contents(wanted, layout)
        folder = out / "-".join(filter(None, (one.name, layout)))
        changed = write.write(made, folder)
        found = {
            "target": one.name,
            "folder": str(folder),
            "kernels": len(wanted.kernels),
            "tuned": sum(len(rule.points) for rule in wanted.rules),
            "written": [str(path) for path in changed],
            "seconds": round(time.perf_counter() - start, 3),
        }
        result.append(found)
        if not as_json:
            print(
                f"{one.name}: a package of {len(wanted.kernels)} kernels in {folder},"
                f" {found['tuned'] or 'no'} tuned shapes, {len(changed) or 'no'} files changed,"
                f" {found['seconds']:.1f} s"
            )
    if as_json:
        print_json(result)

"""A target's package as files."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import json
from pathlib import Path
from typing import Any

from kernelgen.errors import FileError, TargetError
from kernelgen.files import manifest_of
from kernelgen.problem import MATVEC_ROWS
from kernelgen.targets.base import Target
from kernelgen.targets.package import Content, PackageError, Plan

#: in every package: the files that were written, so that another build can tell them from others
LIST = "files.txt"


def packageable(target: Target) -> str | None:
    """Why a target has no packages, or None."""
    if importlib.util.find_spec(f"kernelgen.targets.{target.name}.package") is None:
        return f"target {target.name} has no packages: its files are for reading"
    return None


def offers(target: Target, layout: str) -> bool:
    """Whether a target has packages, in a layout."""
    if packageable(target) is not None:
        return False
    module = importlib.import_module(f"kernelgen.targets.{target.name}.package")
    return hasattr(module, layout or "package")


def contents(plan: Plan, layout: str = "") -> dict[str, Content]:
    """Every file of a package by its path.  Raises TargetError where the target cannot make it."""
    target = plan.target
    reason = packageable(target)
    if reason is not None:
        raise TargetError(f"{reason}; `kernelgen build` without --package writes them")
    module = importlib.import_module(f"kernelgen.targets.{target.name}.package")
    make = getattr(module, layout or "package", None)
    if make is None:
        raise TargetError(f"target {target.name} has no packages in the layout {layout!r}")
    try:
        made: dict[str, Content] = make(plan)
    except PackageError as error:
        raise TargetError(str(error)) from error
    if not layout:
        made.setdefault("manifest.json", manifest_of(target, plan.entries))
        made["dispatch.json"] = dispatch(plan)
    return dict(sorted(made.items()))


def dispatch(plan: Plan) -> str:
    """The rules as JSON; docs/embedding.md says how they are meant."""
    data = {
        "version": 1, "kernelgen": plan.version, "target": plan.target.name,
        "matvec_rows": MATVEC_ROWS, "rules": [_rule(one) for one in plan.rules],
    }  # fmt: skip
    return json.dumps(data, indent=1) + "\n"


def _rule(rule: Any) -> dict[str, Any]:
    found = dataclasses.asdict(rule)
    found["choices"] = [
        {"m": [one.m_from, one.m_to], "kernel": one.kernel} for one in rule.choices
    ]
    return found


def write(made: dict[str, Content], folder: Path) -> list[Path]:
    """Write a package into a folder that is new, empty, or has an older one of ours, whose files go
    if they are no longer of it.  Returns the files that changed."""
    listed = folder / LIST
    before: list[str] = []
    try:
        if listed.is_file():
            before = listed.read_text("utf-8").split("\n")
        elif folder.exists() and any(folder.iterdir()):
            raise FileError(
                f"{folder} is not empty and holds no package of kernelgen's; choose another folder"
                " with --out, or empty it"
            )
        changed = []
        everything = {**made, LIST: "\n".join(made) + "\n"}
        for name, content in everything.items():
            path = folder / name
            data = content.encode() if isinstance(content, str) else content
            if not path.is_file() or path.read_bytes() != data:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)
                changed.append(path)
            if name.endswith(".sh"):
                path.chmod(0o755)
        for name in before:
            if name and name not in everything and (gone := _inside(folder, name)).is_file():
                gone.unlink()
                changed.append(gone)
    except (OSError, UnicodeDecodeError) as error:
        what = error.strerror if isinstance(error, OSError) else f"{LIST} is no text"
        raise FileError(
            f"a package could not be written to {folder}: {what}; choose another folder with --out"
        ) from error
    return sorted(changed)


def _inside(folder: Path, name: str) -> Path:
    """A path of a list that somebody may have changed."""
    path = (folder / name).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise FileError(f"{folder / LIST} lists {name!r}, which is outside; delete the folder")
    return path

"""A target's package as files."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path

from kernelgen.errors import FileError, TargetError
from kernelgen.targets.base import Target
from kernelgen.targets.package import Content, PackageError, Plan

#: in every package: the files that were written, so that another build can tell them from others
LIST = "files.txt"


def packageable(target: Target, layout: str = "") -> str | None:
    """Why a target has no packages, in a layout, or None."""
    if _module(target, "") is None:
        return (
            f"target {target.name} has no packages: its files are for reading; `kernelgen build`"
            " without --package writes them"
        )
    if _module(target, layout) is None:
        return f"target {target.name} has no packages in the layout {layout}; leave out --layout"
    return None


def _module(target: Target, layout: str) -> str | None:
    """The module that makes packages in a layout, by default the target's own."""
    name = f"kernelgen.targets.{target.name}.{layout or 'package'}"
    return name if importlib.util.find_spec(name) else None


def contents(plan: Plan, layout: str = "") -> dict[str, Content]:
    """Every file of a package by its path.  Raises TargetError where the target cannot make it."""
    reason, name = packageable(plan.target, layout), _module(plan.target, layout)
    if reason is not None or name is None:
        raise TargetError(reason)
    try:
        made: dict[str, Content] = importlib.import_module(name).package(plan)
    except PackageError as error:
        raise TargetError(str(error)) from error
    made = {"manifest.json": plan.manifest, "dispatch.json": plan.dispatch, **made}
    return dict(sorted(made.items()))


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

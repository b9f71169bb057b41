"""Words in, words out: names that the user typed, and what is printed."""

from __future__ import annotations

import contextlib
import json
import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any

import numpy as np
import typer
from rich import box
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from kernelgen import targets as target_list
from kernelgen.cli import format_files
from kernelgen.errors import ShapeError, TargetError
from kernelgen.ir import formats as format_list
from kernelgen.ir.block import BlockFormat
from kernelgen.ir.formats.families import FAMILIES
from kernelgen.targets.base import Target
from kernelgen.verify_epilogue import KINDS

Names = list[str] | None

#: ops whose kernels are about arrays, not about a format
OF_ARRAYS = ("map", "rows")

#: stands for all formats of other ecosystems (docs/formats-in-planes.md)
PLANES = "planes"

#: options that several commands have; each may be repeated, or given a list with commas
TargetNames = Annotated[
    Names, typer.Option("--target", metavar="T", help="Targets; all that are known by default.")
]
FormatNames = Annotated[
    Names,
    typer.Option(
        "--format",
        metavar="F",
        help="Formats in any case, or a file that describes yours; ggml's and installed ones by"
        f" default, those of GPTQ, HQQ, FP8... by name, or all of them as {PLANES}.",
    ),
]
OpNames = Annotated[Names, typer.Option("--op", metavar="O", help="Ops; all by default.")]
Variant = Annotated[
    str,
    typer.Option(
        "--isa",
        metavar="I",
        help="The variant of a target, such as an instruction set; the best here by default.",
    ),
]
Epilogues = Annotated[
    Names,
    typer.Option(
        "--epilogue",
        metavar="E",
        help=f"What is fused with matvec and matmul: {', '.join(KINDS)}; or all.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]


def split_names(given: Names) -> list[str]:
    """Names of a repeated option, commas split, each once."""
    parts = (part.strip() for one in given or () for part in one.split(","))
    return list(dict.fromkeys(part for part in parts if part))


def pick_numbers(given: Names, option: str, wanted: str) -> list[int]:
    """Numbers above 0; ShapeError, which says what is `wanted`, where one is none."""
    names = split_names(given)
    if not all(one.isdecimal() and int(one) for one in names):
        raise ShapeError(f"{option} {','.join(names)} was given; write {wanted}")
    return list(map(int, names))


def pick_formats(given: Names) -> list[BlockFormat]:
    """Formats by name, of which `PLANES` is many; all but these where none is given."""
    names = [
        one for name in split_names(given) for one in (FAMILIES if name == PLANES else (name,))
    ]
    found = [fmt for name in names for fmt in format_files.formats_of(name)]
    return list(dict.fromkeys(found)) or list(format_list.formats())


def pick_ops(given: Names, known: Sequence[str]) -> tuple[str, ...]:
    """Ops by name, in the order in which they are known; all where none is given."""
    names = [pick_op(name, known) for name in split_names(given)]
    return tuple(op for op in known if op in names) or tuple(known)


def pick_kinds(given: Names) -> tuple[str, ...]:
    """Kinds of epilogues by name; none where none is given."""
    names = split_names(given)
    unknown = [name for name in names if name != "all" and name not in KINDS]
    if unknown:
        raise TargetError(
            f"epilogue {unknown[0]!r} was asked for; there are {', '.join(KINDS)}, and all"
        )
    return tuple(KINDS) if "all" in names else tuple(names)


def pick_op(given: str, known: Sequence[str]) -> str:
    """An op by name, in any case."""
    if given.lower() not in known:
        raise TargetError(f"op {given!r} was asked for; known here are {', '.join(known)}")
    return given.lower()


def pick_targets(given: Names, variant: str = "") -> list[Target]:
    """Targets by name; where none is given all, or all that have the variant asked for."""
    names = split_names(given)
    if names:
        return list(dict.fromkeys(map(target_list.get, names)))
    every = target_list.targets()
    found = [one for one in every if not variant or variant in one.variants]
    if not found:
        known = ", ".join(v for one in every for v in one.variants)
        raise TargetError(f"no target has a variant {variant!r}; known are {known}")
    return found


def said_of(device: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What is known of a device, in words."""
    words = {True: "yes", False: "no"}
    return [
        (key.replace("_", " "), words[value] if isinstance(value, bool) else str(value))
        for key, value in device.items()
    ]


def console(*, stderr: bool = False) -> Console:
    """A console that leaves text as it is, and lines as long as they are when piped."""
    made = Console(stderr=stderr, markup=False, emoji=False, highlight=False, soft_wrap=False)
    if not made.is_terminal:
        made.width = 10_000
    return made


def complain(text: str) -> None:
    """A sentence on stderr."""
    print(text, file=sys.stderr)


def table(*columns: str, right: Iterable[str] = (), title: str | None = None) -> Table:
    """An empty table of these columns; those in `right` hold numbers."""
    made = Table(
        box=box.SIMPLE_HEAD, title=title, title_justify="left", title_style="bold", pad_edge=False
    )
    for name in columns:
        made.add_column(name, justify="right" if name in right else "left", overflow="fold")
    return made


@contextlib.contextmanager
def progress_bar(on: Console) -> Iterator[Progress]:
    """A bar that is gone when the work is done, and not there at all when piped."""
    bar = Progress(
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=on,
        transient=True,
        disable=not on.is_terminal,
    )
    if bar.disable:
        yield bar  # rich 13 ends even a disabled one with an empty line
        return
    with bar:
        yield bar


def print_json(data: Any) -> None:
    """Valid JSON on stdout."""
    print(json.dumps(as_json(data), indent=1, allow_nan=False))


def as_json(value: Any) -> Any:
    """Plain data as JSON has it: a float that is not finite becomes null, bytes become text."""
    if isinstance(value, Mapping):
        return {str(key): as_json(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_json(one) for one in value]
    if isinstance(value, np.generic):
        return as_json(value.item())
    if isinstance(value, bytes):
        return value.decode("utf-8", "backslashreplace")
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value

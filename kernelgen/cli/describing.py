"""Formats: `vectors` for those who decode them, `new-format` for those who describe one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from kernelgen import vectors as vector_files
from kernelgen.cli.terminal import AsJson, FormatNames, pick_formats, print_json
from kernelgen.errors import FileError
from kernelgen.starter import starter


def vectors(
    out: Annotated[
        Path, typer.Option("--out", metavar="DIR", help="Folder that the files go to.")
    ] = Path("vectors"),
    format: FormatNames = None,
    as_json: AsJson = False,
) -> None:
    """Write blocks and what decoders must make of them, to check other decoders against."""
    files = {fmt.name: vector_files.write(fmt, out) for fmt in pick_formats(format)}
    if as_json:
        print_json({name: [str(path) for path in paths] for name, paths in files.items()})
        return
    for paths in files.values():
        for path in paths:
            print(path)


def new_format(
    name: Annotated[str, typer.Argument(metavar="NAME", help="What the format is called.")],
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE", help="The file to write; NAME.py by default."),
    ] = None,
) -> None:
    """Write a description to start from: a file with comments, which works as it is."""
    text = starter(name)
    path = out or Path(f"{name.lower()}.py")
    try:
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), "w") as file:
            file.write(text)
    except FileExistsError:
        raise FileError(f"{path} is there already; choose another file with --out") from None
    except OSError as error:
        raise FileError(
            f"{path} could not be written: {error.strerror}; choose another file with --out"
        ) from error
    print(path)

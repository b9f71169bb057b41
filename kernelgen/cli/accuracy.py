"""How far results are from exact ones: `accuracy`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated

import typer

from kernelgen import accuracy as measuring
from kernelgen import api
from kernelgen import targets as target_list
from kernelgen.accuracy import COLUMNS, Measured
from kernelgen.cli import accuracy_page
from kernelgen.cli.terminal import (
    AsJson,
    FormatNames,
    Names,
    console,
    pick_formats,
    pick_numbers,
    print_json,
    progress_bar,
    said_of,
    split_names,
    table,
)
from kernelgen.errors import ConfigError, FormatError, ShapeError
from kernelgen.ir.block import BlockFormat
from kernelgen.problem import PRECISIONS


def accuracy(
    model: Annotated[
        Path | None,
        typer.Option(metavar="FILE.gguf", help="Measure with the matrices of this file."),
    ] = None,
    format: FormatNames = None,
    precision: Annotated[
        Names,
        typer.Option("--precision", metavar="P", help="Precisions; all that the target has."),
    ] = None,
    columns: Annotated[
        Names,
        typer.Option("--columns", metavar="K", help=f"{','.join(map(str, COLUMNS))} by default."),
    ] = None,
    target: Annotated[
        str, typer.Option("--target", metavar="T", help="By default that of matmul.")
    ] = "",
    layer: Annotated[
        bool, typer.Option("--layer/--no-layer", help="Whether a whole layer is measured, too.")
    ] = True,
    svg: Annotated[
        Path | None, typer.Option("--svg", metavar="FILE.svg", help="Draw the errors.")
    ] = None,
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE.html", help="Write tables and figure.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure the error of matmul, and of a transformer layer, against double precision.

    Errors are RMS, relative to the exact result; what the format costs and what the kernel with its
    precision adds are told apart.
    """
    name = target_list.get(target or api.default_target()).name
    formats, wanted = pick_formats(format), _precisions(precision)
    if svg is not None or html is not None:
        accuracy_page.require()
    if model is None:
        found = _products(name, formats, wanted, _columns(columns, formats), layer)
    else:
        tensors = api.open(model)
        found = measuring.of_model(name, tensors, formats, wanted)
    results: list[Measured] = []
    with progress_bar(console(stderr=True)) as progress:
        task = progress.add_task("measuring", total=None)
        for result in found:
            results.append(result)
            progress.update(task, description=f"{result.what} {result.format}")
    if not results:
        raise FormatError(
            "there is nothing to measure: no such format can be quantized to, or no matrix has"
            " columns for it; `kernelgen list` shows formats"
        )
    if svg is not None:
        accuracy_page.draw(svg, results)
    device = ", ".join(f"{k} {v}" for k, v in said_of(api.runtime_of(name).describe()[0]))
    if html is not None:
        accuracy_page.write(html, f"{name}: {device}", results)
    if as_json:
        print_json([one.as_dict() for one in results])
        return
    print(f"{name}: {device}")
    for what, rows in accuracy_page.by_subject(results):
        _print(what, rows)


def _products(
    target: str, formats: list[BlockFormat], wanted: tuple[str, ...], columns: tuple[int, ...],
    layer: bool,
) -> Iterator[Measured]:  # fmt: skip
    yield from measuring.products(target, formats, wanted, columns)
    if layer:
        yield from measuring.layers(target, formats, wanted)


def _precisions(given: Names) -> tuple[str, ...]:
    names = tuple(split_names(given))
    allowed = tuple(one for one in PRECISIONS if one != "auto")
    unknown = [one for one in names if one not in allowed]
    if unknown:
        raise ConfigError(
            f"precision {unknown[0]!r} was asked for; allowed are {', '.join(allowed)}"
        )
    return names


def _columns(given: Names, formats: Iterable[BlockFormat]) -> tuple[int, ...]:
    asked = pick_numbers(given, "--columns", "numbers, as 256,4096")
    for one in asked:
        if all(one % fmt.block for fmt in formats):
            raise ShapeError(
                f"{one} columns were asked for, which no format here divides into blocks;"
                " multiples of 256 suit all"
            )
    return tuple(asked) or COLUMNS


def _print(what: str, rows: list[Measured]) -> None:
    """A table: a row for each format, precision and kind of data, what the kernel adds by K."""
    ks = sorted({one.k for one in rows})
    added = [f"adds, K = {k}" for k in ks] if ks != [0] else ["kernel adds"]
    numbers = ["bits", "format costs", *added, "total", "1 - cosine"]
    names = [str(one) for one in numbers]
    shown = table("format", "precision", "data", *names, right=names, title=what)
    for (name, precision, data), group in accuracy_page.by_case(rows):
        last = group[max(group)]
        found = [accuracy_page.percent(group[k].added if k in group else None) for k in ks]
        shown.add_row(
            name, precision, data, f"{last.bits:g}", accuracy_page.percent(last.own), *found,
            accuracy_page.percent(last.total), accuracy_page.percent(last.distance),
        )  # fmt: skip
    console().print(shown)

"""Kernels run: `verify`, and `bench`."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from typing import Annotated

import typer
from rich.text import Text

from kernelgen import api, verify_attention, verify_epilogue, verify_maps
from kernelgen import bench as benchmark
from kernelgen import verify as verifier
from kernelgen.cli.terminal import (
    AsJson,
    Epilogues,
    FormatNames,
    Names,
    OpNames,
    TargetNames,
    Variant,
    complain,
    console,
    pick_formats,
    pick_kinds,
    pick_ops,
    pick_targets,
    print_json,
    progress_bar,
    said_of,
    split_names,
    table,
)
from kernelgen.errors import ShapeError, TargetError
from kernelgen.ir import formats as format_list
from kernelgen.problem import PRECISIONS, choose_precision
from kernelgen.targets.base import EMULATED, Runtime, Target
from kernelgen.verify import Result

_OPS = (*verifier.OPS, "attention", *verify_maps.OPS)

#: formats of keys and values in wide use
_CACHE_FORMATS = ("f16", "q8_0", "q4_0")

#: whose products are verified with some epilogues, where no format is asked for
_SAMPLE_FORMAT = "q4_K"

#: widths of the columns of `verify`, whose rows are printed as they come
_COLUMNS = {
    "target": 8, "how": 10, "format": 16, "op": 20, "precision": 11, "error": 10, "allowed": 10,
    "int8 adds": 11, "format has": 12,
}  # fmt: skip


def verify(
    target: TargetNames = None,
    format: FormatNames = None,
    op: OpNames = None,
    isa: Variant = "",
    emulate: Annotated[
        bool,
        typer.Option("--emulate", help="Run in the emulator, also where the device is there."),
    ] = False,
    all_configs: Annotated[
        bool, typer.Option("--all-configs", help="Every legal configuration, not only the default.")
    ] = False,
    full: Annotated[
        bool,
        typer.Option("--full", help="Attention in all kinds, formats and sizes, not a sample."),
    ] = False,
    epilogue: Epilogues = None,
    as_json: AsJson = False,
) -> None:
    """Run kernels against the numpy reference; exit with 1 if any is wrong."""
    asked = list(_OPS) if op and [one.lower() for one in op] == ["all"] else op
    formats, ops = pick_formats(format), pick_ops(asked or list(verifier.OPS), _OPS)
    kinds = pick_kinds(epilogue)
    # K and V in all formats, all kinds and head sizes, are too many to be a default
    caches = formats if format else [format_list.get(name) for name in _CACHE_FORMATS]
    runtimes = list(_runtimes(target, EMULATED if emulate else isa))
    out = console(stderr=as_json)
    results: list[Result] = []
    attends, mapped = "attention" in ops, [one for one in ops if one in verify_maps.OPS]
    if not as_json:
        out.print("".join(f"{name:<{width}}" for name, width in _COLUMNS.items()), style="bold")
    with progress_bar(out) as progress:
        task = progress.add_task("verifying", total=len(runtimes) * len(formats))
        for one, runtime in runtimes:
            for fmt in formats:
                progress.update(task, description=f"{one.name} {fmt.name}")
                products = verify_epilogue.verify(one, [fmt], ops, kinds, runtime=runtime)
                plain = verifier.verify(one, [fmt], ops, runtime=runtime, all_configs=all_configs)
                for result in products if kinds else plain:
                    results.append(result)
                    if not as_json:
                        progress.console.print(_row(result, all_configs), soft_wrap=True)
                progress.advance(task)
            if not (kinds or format):
                sample = [format_list.get(_SAMPLE_FORMAT)]
                for result in verify_epilogue.verify(
                    one, sample, ops, verify_epilogue.SAMPLE, runtime=runtime
                ):
                    results.append(result)
                    if not as_json:
                        progress.console.print(_row(result, all_configs), soft_wrap=True)
            attended = [] if kinds or not attends else caches
            for result in itertools.chain(
                verify_attention.verify(one, attended, runtime=runtime, every=full),
                verify_maps.verify(one, mapped, runtime=runtime),
            ):
                results.append(result)
                if not as_json:
                    progress.console.print(_row(result, all_configs), soft_wrap=True)
    failed = sum(not result.ok for result in results)
    if as_json:
        print_json([result.as_dict() for result in results])
    elif results:
        out.print(f"{len(results)} kernels, {failed or 'none'} failed")
    if not results:
        raise TargetError(
            "there is no kernel to verify for these formats and ops; `kernelgen list` shows all"
        )
    if failed:
        raise typer.Exit(1)


def _runtimes(names: Names, variant: str) -> Iterator[tuple[Target, Runtime]]:
    """Targets that can run here.  One that was asked for and cannot is an error, any other is
    left out, and said to be."""
    some = False
    for one in pick_targets(names, variant):
        runtime = one.reach(variant)
        reason = runtime.available()
        if reason is None:
            some = True
            yield one, runtime
        elif names or variant:
            raise TargetError(f"target {one.name} cannot run here: {reason}")
        else:
            complain(f"target {one.name} is left out: {reason}")
    if not some:
        raise TargetError("no target can run here; `kernelgen devices` says why")


def _row(result: Result, with_config: bool) -> Text:
    """A result as a line of the table, its problem behind it."""
    added, own = result.added, result.own
    cells = (
        result.target, result.how, result.format, result.op, result.precision,
        f"{result.error:.2g}" if result.cases else "", f"{result.bound:.2g}",
        "" if added is None else f"{added:.2g}", "" if own is None else f"{own:.2g}",
    )  # fmt: skip
    widths = _COLUMNS.values()
    line = Text("".join(f"{cell:<{width - 1}} " for cell, width in zip(cells, widths, strict=True)))
    line.append("ok" if result.ok else "FAILED", style="green" if result.ok else "bold red")
    if with_config and result.config:
        line.append("  " + ", ".join(f"{name}={value}" for name, value in result.config.items()))
    if result.problem is not None:
        line.append(f": {result.problem}")
    return line


def bench(
    target: Annotated[
        Names, typer.Option("--target", metavar="T", help="Targets; by default that of matmul.")
    ] = None,
    format: Annotated[
        Names, typer.Option("--format", metavar="F", help="Formats, or all; q4_K by default.")
    ] = None,
    shape: Annotated[
        Names,
        typer.Option(
            "--shape",
            metavar="MxNxK",
            help="Rows of activations x rows of weights x columns;"
            " 1x4096x4096 and 128x4096x4096 by default.",
        ),
    ] = None,
    precision: Annotated[
        str, typer.Option("--precision", metavar="P", help=f"{', '.join(PRECISIONS)}.")
    ] = "auto",
    repeats: Annotated[int, typer.Option(min=1, help="Turns of five calls.")] = 7,
    as_json: AsJson = False,
) -> None:
    """Time fused matmuls against numpy's float32 x @ W.T on the dequantized matrix."""
    names = split_names(format) or ["q4_K"]
    formats = pick_formats([] if names == ["all"] else names)
    shapes = [_shape(one) for one in split_names(shape) or ("1x4096x4096", "128x4096x4096")]
    for fmt in formats:
        choose_precision(precision, fmt)
        for _, _, k in shapes:
            fmt.row_bytes(k)  # refuses what does not divide, before anything is timed
    wanted = pick_targets(target or [api.default_target()])
    runtimes = [(one, api.require(one.name)) for one in wanted]
    warning = benchmark.busy()
    if warning:
        complain(f"warning: {warning}")
    problems = [(t, fmt, s) for t, _ in runtimes for fmt in formats for s in shapes]
    results: list[benchmark.Measured] = []
    with progress_bar(console(stderr=True)) as progress:
        for one, fmt, (m, n, k) in progress.track(problems, description="timing"):
            results.append(benchmark.matmul(one, fmt, m, n, k, precision, repeats))
    if as_json:
        print_json([result.as_dict() for result in results])
        return
    for one, runtime in runtimes:
        for device in runtime.describe():
            print(f"{one.name}: " + ", ".join(f"{k} {v}" for k, v in said_of(device)))
    _print_measured(results)


def _shape(text: str) -> tuple[int, int, int]:
    found = re.fullmatch(r"(\d+)x(\d+)x(\d+)", text.lower())
    sizes = tuple(map(int, found.groups())) if found else ()
    if len(sizes) != 3 or not all(sizes):
        raise ShapeError(
            f"shape {text!r} was given; write MxNxK with three numbers above 0, as 1x4096x4096"
        )
    return sizes


def _print_measured(results: list[benchmark.Measured]) -> None:
    numbers = ["fused", "numpy float32", "times faster", "GB/s", "GFLOP/s"]
    shown = table("target", "format", "precision", "M x N x K", *numbers, right=numbers)
    for one in results:
        shown.add_row(
            one.target, one.format, one.precision, f"{one.m} x {one.n} x {one.k}",
            f"{one.fused * 1e3:.3f} ms", f"{one.numpy * 1e3:.3f} ms", f"{one.ratio:.2f}",
            f"{one.gb_per_s:.1f}", f"{one.gflop_per_s:.0f}",
        )  # fmt: skip
    console().print(shown)

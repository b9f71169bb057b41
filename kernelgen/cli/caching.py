"""`kernelgen cache`: what the tuner remembers, and moving it between machines."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated

import typer

from kernelgen import targets as target_list
from kernelgen.cli.terminal import (
    AsJson,
    FormatNames,
    TargetNames,
    complain,
    console,
    print_json,
    split_names,
    table,
)
from kernelgen.errors import FileError, TuningError
from kernelgen.tuner import cache, ledger
from kernelgen.tuner.cache import Entry
from kernelgen.tuner.problems import wanted

app = typer.Typer(help="What the tuner remembers.", no_args_is_help=True)

File = Annotated[Path, typer.Argument(metavar="FILE.jsonl")]


def _ms(seconds: float | None) -> str:
    return "?" if seconds is None else f"{seconds * 1e3:.3f} ms"


def _config(values: object) -> str:
    return ", ".join(f"{k}={v}" for k, v in values.items()) if isinstance(values, dict) else ""


def one_line(entry: Entry) -> str:
    """An entry in a few words."""
    key = entry.key
    shape = "x".join(map(str, key.shape))
    return (
        f"{key.op} {key.format} {shape} ({wanted(key)}) on {key.device.name}:"
        f" {entry.walk}({_config(entry.config)}) {_ms(entry.seconds)}"
    )


def facts(entry: Entry) -> Iterator[tuple[str, str]]:
    """What an entry says of itself, by name."""
    expected = _ms(entry.seconds) + " on the device" * (entry.clock == "device")
    if entry.joules is not None:
        expected += f", {entry.joules * 1e3:.3f} mJ"
    if entry.ratio:
        expected += f", {entry.ratio:.2f} times better than the default"
    yield "expects", expected
    if entry.roofline:
        yield "roofline", f"{_ms(entry.roofline)}, {entry.roofline / entry.seconds:.0%} reached"
    if entry.runner_up:
        second = entry.runner_up
        took = _ms(second["seconds"]) if second.get("seconds") else ""
        yield "second", f"{second['walk']}({_config(second['config'])}) {took}"
    if entry.error is not None and entry.tolerance is not None:
        more = f"; {entry.rms_error:.2g} RMS with rounded activations" if entry.rms_error else ""
        yield "error", f"{entry.error:.2g}, allowed {entry.tolerance:.2g}{more}"
    yield (
        "found",
        (
            f"{entry.time or 'some time'} on {entry.host or 'some machine'}, {entry.trials}"
            f" candidates tried, {entry.failures} failed, {entry.spent:.0f} s"
        ),
    )
    if entry.versions:
        yield "versions", ", ".join(f"{k} {v}" for k, v in entry.versions.items())
    if entry.provenance:
        yield "from", ", ".join(entry.provenance)


def _picked(
    entries: Iterable[Entry], target: list[str] | None, format: list[str] | None
) -> list[Entry]:
    targets = {name.lower() for name in split_names(target)}
    formats = {name.lower() for name in split_names(format)}
    return [
        one for one in cache.winners(entries)
        if (not targets or one.key.target in targets)
        and (not formats or one.key.format.lower() in formats)
    ]  # fmt: skip


def _stale(entry: Entry) -> str | None:
    known = entry.key.target in target_list.NAMES
    return ledger.stale(entry, target_list.get(entry.key.target) if known else None)


@app.command("list")
def list_entries(
    target: TargetNames = None, format: FormatNames = None, as_json: AsJson = False
) -> None:
    """Show the winners."""
    found = _picked(cache.entries(), target, format)
    if as_json:
        print_json([one.as_dict() | {"stale": _stale(one)} for one in found])
        return
    if not found:
        asked = " of what was asked for" if target or format else ""
        print(f"nothing{asked} was tuned yet ({cache.folder()})")
        return
    numbers = ["time", "ratio"]
    shown = table("target", "kernel", "shape", *numbers, "configuration", "device", "",
                  right=numbers)  # fmt: skip
    for one in found:
        key = one.key
        shown.add_row(
            key.target, f"{key.op} {key.format} ({wanted(key)})", "x".join(map(str, key.shape)),
            _ms(one.seconds), f"{one.ratio:.2f}" if one.ratio else "",
            f"{one.walk}({_config(one.config)})", key.device.name, "stale" if _stale(one) else "",
        )  # fmt: skip
    console().print(shown)


@app.command("show")
def show(
    format: Annotated[str, typer.Argument(metavar="FORMAT", help="A format, in any case.")],
    shape: Annotated[str, typer.Option("--shape", metavar="MxNxK")] = "",
    target: TargetNames = None,
    as_json: AsJson = False,
) -> None:
    """Show all that is known about the winners of a format."""
    found = [
        one for one in _picked(cache.entries(), target, [format])
        if not shape or "x".join(map(str, one.key.shape)) == shape.lower()
    ]  # fmt: skip
    if not found:
        asked = " ".join(filter(None, (format, shape, *split_names(target))))
        raise TuningError(f"the cache has nothing about {asked}; `kernelgen cache list` shows all")
    if as_json:
        print_json([one.as_dict() for one in found])
        return
    for one in found:
        print(one_line(one))
        print(f"  {'device':9} {one.key.device}")
        for name, said in facts(one):
            print(f"  {name:9} {said}")
        reason = _stale(one)
        if reason:
            print(f"  {'stale':9} {reason}")


@app.command("export")
def export(
    file: File,
    target: TargetNames = None,
    format: FormatNames = None,
    preset: Annotated[
        bool,
        typer.Option(
            "--preset",
            help="Without names of machines and files, to be shipped in kernelgen/tuner/presets/.",
        ),
    ] = False,
) -> None:
    """Write the winners to a file, for other machines."""
    chosen = _picked(cache.entries(), target, format)
    if preset:
        chosen = [one for one in chosen if _stale(one) is None]
    count = ledger.export(file, chosen, preset)
    print(f"{count} entries written to {file}")


def _load(file: Path) -> list[Entry]:
    found, wrong = ledger.load(file)
    if wrong and not found:
        raise FileError(
            f"{file} has no entry of kernelgen's in {len(wrong)} lines; `kernelgen cache export`"
            " writes files that have"
        )
    for sentence in wrong:
        complain(sentence)
    return found


def _merge(files: list[Path]) -> None:
    for file in files:
        done = ledger.merge(_load(file), str(file))
        print(
            f"{file}: {len(done.added)} entries added, {len(done.replaced)} replaced older ones,"
            f" {len(done.kept)} were older than what is here, {len(done.known)} were here already"
        )


@app.command("import")
def import_file(file: File) -> None:
    """Take the winners of a file into the cache; the later of two with the same key wins."""
    _merge([file])


@app.command("merge")
def merge(files: Annotated[list[Path], typer.Argument(metavar="FILE.jsonl...")]) -> None:
    """Take the winners of several files into the cache, one file after the other."""
    _merge(files)


@app.command("diff")
def diff(file: File, as_json: AsJson = False) -> None:
    """Show what an import of a file would do."""
    found = ledger.compare(cache.entries(), _load(file))
    if as_json:
        print_json(
            {
                "added": [one.as_dict() for one in found.added],
                "replaced": [[a.as_dict(), b.as_dict()] for a, b in found.replaced],
                "kept": [[a.as_dict(), b.as_dict()] for a, b in found.kept],
                "known": len(found.known),
            }
        )
        return
    for one in found.added:
        print(f"+ {one_line(one)}")
    for old, new in found.replaced:
        print(f"- {one_line(old)}\n+ {one_line(new)}")
    for old, new in found.kept:
        print(f"= {one_line(old)}, later than {_ms(new.seconds)} of {new.time} there")
    print(f"{len(found.known)} entries are the same")


@app.command("prune")
def prune(
    stale: Annotated[
        bool, typer.Option("--stale", help="Also entries that this kernelgen cannot use.")
    ] = False,
) -> None:
    """Take away entries that later ones replaced, and lines that are damaged."""
    targets = {one.name: one for one in target_list.targets()}
    done = ledger.prune(targets, stale_too=stale)
    print(
        f"{done.count} lines taken away: {done.replaced} replaced by later ones,"
        f" {done.damaged} damaged, {done.stale} stale"
    )

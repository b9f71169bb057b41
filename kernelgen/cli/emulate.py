"""Any GPU kernel on this CPU: `emulate`, the emulator without Python."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import typer
from rich.text import Text

from kernelgen.cli.terminal import AsJson, Names, complain, console, print_json
from kernelgen.emulator import Emulator, EmulatorError, Finding, Local, Report
from kernelgen.emulator.emulator import ORDERS
from kernelgen.emulator.languages import LANGUAGES
from kernelgen.problem import relative_error

Array = npt.NDArray[Any]

#: of files, by language
_SUFFIXES = [language.suffix for language in LANGUAGES.values()]
#: element types by the names that arguments have here; numpy has no bf16, whose bits are kept
_TYPES = {
    **{f"f{n}": f"f{n // 8}" for n in (16, 32, 64)}, "bf16": "u2",
    **{f"{kind}{n}": f"{kind}{n // 8}" for kind in "iu" for n in (8, 16, 32, 64)},
}  # fmt: skip

#: contents of a new array, by name: random numbers, their count and numpy's name of their type
_Fill = Callable[[np.random.Generator, int, str], Array]
_FILLS: dict[str, _Fill] = {
    "random": lambda rng, n, kind: (
        rng.standard_normal(n)
        if kind[0] == "f"
        else rng.integers(np.iinfo(kind).min, np.iinfo(kind).max, n, kind, endpoint=True)
    ),
    "range": lambda rng, n, kind: np.arange(n),
    "zeros": lambda rng, n, kind: np.zeros(n),
    "ones": lambda rng, n, kind: np.ones(n),
}

_HOW = (
    "write NAME=TYPE[SIZES]:FILL for an array (x=f32[64,32]:random), NAME=@FILE.npy for one from a"
    " file, NAME=NUMBER, NAME=local:BYTES or NAME=null"
)


@dataclass(frozen=True)
class Given:
    """An argument as the user wrote it: the parameter's name or "", the type of the elements or
    "", and what the emulator takes."""

    name: str
    kind: str
    value: Any


def _bits(values: Array, kind: str) -> Array:
    """Numbers as elements of a type; of bf16 the upper halves of float32, rounded to even."""
    if kind != "bf16":
        return values.astype(_TYPES[kind])
    words = values.astype(np.float32).view(np.uint32)
    rounded = (words + 0x7FFF + (words >> 16 & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)


def _numbers(array: Array, kind: str) -> Array:
    """The numbers that elements stand for."""
    if kind != "bf16":
        return array
    return (array.astype(np.uint32) << 16).view(np.float32)


def _filled(text: str, kind: str, sizes: tuple[int, ...], fill: str, seed: int) -> Array:
    count = int(np.prod(sizes))
    if fill in ("", "nan"):  # bytes that make NaNs of floats: what is not written stays visible
        dtype = np.dtype(_TYPES[kind])
        return np.full(count * dtype.itemsize, 0xFF, np.uint8).view(dtype).reshape(sizes)
    if fill in _FILLS:
        drawn = "f4" if kind == "bf16" else _TYPES[kind]
        made = _FILLS[fill](np.random.default_rng(seed), count, drawn)
    else:
        number = _number(fill)
        if number is None:
            known = ", ".join(["nan", *_FILLS])
            raise EmulatorError(
                f"argument {text!r}: {fill!r} is no content of an array; write a number, or one"
                f" of {known}"
            )
        dtype = np.dtype(_TYPES[kind])
        if dtype.kind in "iu" and not np.iinfo(dtype).min <= number <= np.iinfo(dtype).max:
            raise EmulatorError(f"argument {text!r}: {fill} does not fit {kind}; take a wider type")
        made = np.full(count, number)
    return _bits(made, kind).reshape(sizes)


def _number(text: str) -> int | float | None:
    """A number as C has it, its suffix included."""
    if text in ("true", "false"):
        return int(text == "true")
    if found := re.fullmatch(r"([+-]?(?:0[xX][0-9a-fA-F]+|\d+))[uUlL]*", text):
        return int(found[1], 0 if "x" in text.lower() else 10)
    try:
        return float(text.rstrip("fF") if "x" not in text else text)
    except ValueError:
        return None


def _from_file(text: str, path: str, kind: str = "") -> Array:
    if kind:
        whole = np.fromfile(path, np.uint8)
        dtype = np.dtype(_TYPES[kind])
        if whole.size % dtype.itemsize:
            raise EmulatorError(
                f"{text!r}: {path} has {whole.size} bytes, no multiple of the {dtype.itemsize} of"
                f" {kind}; give the type that it holds"
            )
        return whole.view(dtype)
    try:
        found = np.load(path, allow_pickle=False)
    except (ValueError, EOFError):
        found = None
    if not isinstance(found, np.ndarray) or found.dtype.kind not in "biuf":
        raise EmulatorError(
            f"{text!r}: {path} is no .npy file of numbers; save one with numpy.save, or write"
            f" TYPE@{path} for an argument of just these bytes"
        )
    return np.ascontiguousarray(found)


def argument(text: str, seed: int = 0) -> Given:
    """An argument of the kernel from its words; `seed` is that of random numbers."""
    found = re.fullmatch(r"(?:([A-Za-z_]\w*)=)?(.*)", text, re.DOTALL)
    name, value = (found[1] or "", found[2]) if found else ("", text)
    array = re.fullmatch(r"(\w+)\[([\d,\sx*]+)\](?::(.*))?", value)
    file = re.fullmatch(r"(\w*)@(.+)", value)
    kind = (array or file or ("", ""))[1]
    if kind and kind not in _TYPES:
        known = ", ".join(_TYPES)
        raise EmulatorError(
            f"argument {text!r}: {kind!r} is no type of elements; known are {known}"
        )
    if array:
        sizes = tuple(int(n) for n in re.findall(r"\d+", array[2]))
        if not sizes or min(sizes) < 1:
            raise EmulatorError(f"argument {text!r}: an array needs sizes above zero, as [64,32]")
        return Given(name, kind, _filled(text, kind, sizes, (array[3] or "").strip(), seed))
    if file:
        return Given(name, kind, _from_file(text, file[2], kind))
    if value == "null":
        return Given(name, "", None)
    if local := re.fullmatch(r"local:(\d+)", value):
        return Given(name, "", Local(int(local[1])))
    number = _number(value)
    if number is None:
        raise EmulatorError(f"argument {text!r} is not understood; {_HOW}")
    return Given(name, "", number)


def in_order(given: Sequence[Given], names: Sequence[str], entry: str) -> list[Given]:
    """Arguments as the kernel takes them: named ones in their places, the others in between."""
    if not names:  # an instance of a template: its parameters are not known by name
        return list(given)
    places: dict[str, Given] = {}
    for one in (g for g in given if g.name):
        if one.name not in names:
            raise EmulatorError(f"{entry} has no parameter {one.name!r}; it has {', '.join(names)}")
        if one.name in places:
            raise EmulatorError(f"the argument {one.name!r} is given twice")
        places[one.name] = one
    rest = [g for g in given if not g.name]
    free = [n for n in names if n not in places]
    if len(rest) != len(free):
        missing = f"; {', '.join(free[len(rest) :])} is missing" if len(rest) < len(free) else ""
        raise EmulatorError(
            f"{entry} takes {len(names)} arguments ({', '.join(names)}), but got"
            f" {len(given)}{missing}; {_HOW}"
        )
    places.update(zip(free, (Given(n, g.kind, g.value) for n, g in zip(free, rest, strict=True)),
                      strict=True))  # fmt: skip
    return [places[name] for name in names]


def _three(text: str, what: str) -> tuple[int, ...]:
    found = tuple(int(n) for n in re.findall(r"\d+", text))
    if not re.fullmatch(r"\d+([,x]\d+){0,2}", text) or min(found) < 1:
        raise EmulatorError(f"{what} {text!r}: write one to three numbers above zero, as 4,2")
    return found


def _language(path: Path, asked: str) -> str:
    if asked:
        return asked
    for name, language in LANGUAGES.items():
        if path.suffix == language.suffix:
            return name
    suffixes = ", ".join(f"{one.suffix} ({name})" for name, one in LANGUAGES.items())
    raise EmulatorError(
        f"{path.name} has a suffix that says nothing of its language; known are {suffixes}, or say"
        f" --language"
    )


def _words(given: Names) -> list[str]:
    """The arguments in texts that have several each."""
    found: list[str] = []
    for text in given or ():
        try:
            found += shlex.split(text)
        except ValueError:
            raise EmulatorError(
                f"--args {text!r} has a quotation that does not end; close it"
            ) from None
    return found


def _macros(given: Names) -> dict[str, str]:
    """Macros by name; 1 where no value is given, as compilers have it."""
    found: dict[str, str] = {}
    for text in given or ():
        name, sign, value = text.partition("=")
        if not (name.isascii() and name.isidentifier()):
            raise EmulatorError(f"-D {text!r}: write a name, as -D FAST, or a value, as -D WIDTH=4")
        found[name] = value if sign else "1"
    return found


def _pairs(given: Names, option: str, example: str) -> dict[str, str]:
    pairs: dict[str, str] = {}
    for text in given or ():
        name, sign, value = text.partition("=")
        if not sign or not name or not value:
            raise EmulatorError(f"{option} {text!r}: write {option} {example}")
        pairs[name] = value
    return pairs


def _pick(arrays: dict[str, Given], name: str, option: str) -> Given:
    if name not in arrays:
        known = ", ".join(arrays) or "none"
        raise EmulatorError(f"{option} {name!r}: no argument of that name is an array; arrays are"
                            f" {known}")  # fmt: skip
    return arrays[name]


def _summary(given: Given) -> dict[str, Any]:
    """What is to be said of an array in one line."""
    values = _numbers(given.value, given.kind).reshape(-1)
    wide = values.astype(np.float64)
    finite = wide[np.isfinite(wide)]
    return {
        "type": given.kind or str(given.value.dtype),
        "shape": list(given.value.shape),
        "first": [v.item() for v in values[:8]],
        "min": finite.min() if finite.size else None,
        "max": finite.max() if finite.size else None,
        "mean": finite.mean() if finite.size else None,
        "not_finite": int(wide.size - finite.size),
    }


def _expected(given: Given, path: str, tolerance: float) -> dict[str, Any]:
    """How far an array is from the one in a file; exact where it holds integers."""
    want, got = _from_file(f"--expect {path}", path), _numbers(given.value, given.kind)
    if want.size != got.size:
        raise EmulatorError(
            f"--expect {given.name}={path}: the file has {want.size} elements, the argument"
            f" {got.size}"
        )
    want = want.reshape(got.shape)
    error = relative_error(got, want)
    with np.errstate(invalid="ignore"):
        off = np.abs(got.astype(np.float64) - want.astype(np.float64))
        worst = int(np.argmax(np.where(np.isnan(off), np.inf, off)))
    return {
        "error": error, "tolerance": tolerance, "ok": error <= tolerance,
        "at": [int(i) for i in np.unravel_index(worst, got.shape)],
        "got": got.reshape(-1)[worst].item(), "want": want.reshape(-1)[worst].item(),
    }  # fmt: skip


def _print_finding(path: Path, lines: Sequence[str], one: Finding) -> None:
    """A finding as compilers print theirs, with the line that it is about."""
    out = console()
    text = Text(f"{path}:{one.line or '?'}: ", style="bold")
    text.append(one.kind, style="bold red")
    times = f", {one.count} times" if one.count > 1 else ""
    text.append(f": {one.message}; block {one.block}, thread {one.thread}{times}", style="not bold")
    out.print(text, soft_wrap=True)
    if 0 < one.line <= len(lines):
        out.print(Text(f"{one.line:>6} | {lines[one.line - 1].rstrip()}"), soft_wrap=True)


def _print_summary(name: str, said: dict[str, Any]) -> None:
    shape = " x ".join(map(str, said["shape"]))
    first = ", ".join(f"{v:.6g}" for v in said["first"])
    more = ", ..." if int(np.prod(said["shape"])) > len(said["first"]) else ""
    text = f"{name}: {said['type']} {shape}: {first}{more}"
    if said["min"] is not None:
        text += f"; {said['min']:.6g} to {said['max']:.6g}, mean {said['mean']:.6g}"
    if said["not_finite"]:
        text += f"; {said['not_finite']} not finite"
    print(text)


def _print(path: Path, source: str, report: Report, orders: str) -> None:
    for one in report.findings:
        _print_finding(path, source.splitlines(), one)
    for note in report.notes:
        complain(f"note: {note}")
    count = len(report.findings)
    said = f"{count} finding{'s' * (count > 1)}" if count else "nothing found"
    print(f"{said}; {orders}, {report.seconds:.1f} s")


def emulate(
    path: Annotated[Path, typer.Argument(metavar="FILE", help=f"Kernels: {', '.join(_SUFFIXES)}.")],
    args: Annotated[
        Names,
        typer.Argument(
            metavar="ARGUMENT",
            help="The kernel's, in order or by name: x=f32[64,32]:random (or range, zeros, ones,"
            " nan, a number), x=@FILE.npy, x=u8@FILE (its bytes), n=64, p=null,"
            " tile=local:256 (bytes of shared memory).",
        ),
    ] = None,
    more: Annotated[
        Names,
        typer.Option(
            "--args", metavar="ARGUMENTS", help="The same, before these; several in one text."
        ),
    ] = None,
    entry: Annotated[
        str, typer.Option("--entry", metavar="F", help="The kernel, if the file has several.")
    ] = "",
    grid: Annotated[
        str, typer.Option("--grid", metavar="X,Y,Z", help="Blocks (work-groups, threadgroups).")
    ] = "1",
    block: Annotated[
        str, typer.Option("--block", metavar="X,Y,Z", help="Threads of a block.")
    ] = "32",
    shared: Annotated[
        int, typer.Option("--shared", metavar="BYTES", help="Bytes of extern __shared__ memory.")
    ] = 0,
    save: Annotated[
        Names, typer.Option("--save", metavar="Y=FILE", help="Write an array afterwards, as .npy.")
    ] = None,
    show: Annotated[
        Names, typer.Option("--print", metavar="Y", help="Summarise an array; all names all.")
    ] = None,
    expect: Annotated[
        Names, typer.Option("--expect", metavar="Y=FILE", help="What an array must be: a .npy.")
    ] = None,
    tolerance: Annotated[
        float,
        typer.Option(min=0, help="Largest difference to what is expected, relative to its RMS."),
    ] = 1e-5,
    language: Annotated[
        str, typer.Option("--language", metavar="L", help=f"{', '.join(LANGUAGES)}; by suffix.")
    ] = "",
    define: Annotated[
        Names, typer.Option("--define", "-D", metavar="NAME=VALUE", help="A macro.")
    ] = None,
    include: Annotated[
        Names, typer.Option("--include", "-I", metavar="FOLDER", help="Where headers are.")
    ] = None,
    order: Annotated[
        str, typer.Option("--order", metavar="O", help=f"Of the threads: {', '.join(ORDERS)}.")
    ] = "both",
    subgroup: Annotated[int, typer.Option("--subgroup", help="Threads of a subgroup.")] = 32,
    fast: Annotated[
        bool, typer.Option("--fast", help="Leave out the checks of each access to memory.")
    ] = False,
    seed: Annotated[
        int, typer.Option(min=0, help="Of random arrays, and of the random order.")
    ] = 0,
    seconds: Annotated[float, typer.Option(min=0.1, help="CPU time that a run may take.")] = 20.0,
    as_json: AsJson = False,
) -> None:
    """Run any GPU kernel on the CPU; exit with 1 if it has a bug."""
    args = [*_words(more), *(args or ())]
    source = path.read_text(encoding="utf-8", errors="replace")
    emulator = Emulator(
        source, _language(path, language),
        defines=_macros(define), include=[path.parent, *(include or ())], name=path.name,
        subgroup=subgroup,
    )  # fmt: skip
    if not entry:
        if not emulator.entries:
            raise EmulatorError(
                f"{path.name} has no kernel; of a template name an instance, as --entry"
                " 'scale<float, 4>'"
            )
        if len(emulator.entries) > 1:
            known = ", ".join(emulator.entries)
            raise EmulatorError(f"{path.name} has the kernels {known}; say which with --entry")
        (entry,) = emulator.entries
    given = [argument(text, seed + i) for i, text in enumerate(args or ())]
    given = in_order(given, emulator.parameters(entry), entry)
    arrays = {g.name: g for g in given if isinstance(g.value, np.ndarray) and g.name}
    saved, expected = _pairs(save, "--save", "y=out.npy"), _pairs(expect, "--expect", "y=want.npy")
    for option, names in (("--save", saved), ("--expect", expected)):
        for name in names:
            _pick(arrays, name, option)
    shown = list(arrays) if show == ["all"] else list(show or ())
    for name in shown:
        _pick(arrays, name, "--print")
    report = emulator.run(
        entry, _three(grid, "--grid"), _three(block, "--block"), [g.value for g in given],
        shared_bytes=shared, order=order, sanitize=not fast, seed=seed, seconds=seconds,
    )  # fmt: skip
    for name, file in saved.items():
        np.save(file, arrays[name].value)
    outputs = {name: _summary(arrays[name]) for name in shown}
    held = {n: _expected(arrays[n], file, tolerance) for n, file in expected.items()}
    ok = report.ok and all(one["ok"] for one in held.values())
    if as_json:
        print_json(
            {"ok": ok, "findings": [vars(f) for f in report.findings], "notes": report.notes,
             "outputs": outputs, "expected": held, "seconds": report.seconds}
        )  # fmt: skip
    else:
        _print(path, source, report, "threads in both orders" if order == "both" else order)
        for name, said in outputs.items():
            _print_summary(name, said)
        for name, one in held.items():
            place = "][".join(map(str, one["at"]))
            verdict = "as expected" if one["ok"] else "NOT as expected"
            print(
                f"{name}: {verdict}: error {one['error']:.2g}, allowed {tolerance:.2g}; furthest"
                f" off is {name}[{place}]: {one['got']:.6g}, expected {one['want']:.6g}"
            )
    if not ok:
        raise typer.Exit(1)

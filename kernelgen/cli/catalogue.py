"""What there is: `list`, `devices`, `show`."""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import typer
from rich.syntax import Syntax

from kernelgen import api
from kernelgen import targets as target_list
from kernelgen.cli import dispatching, format_files, stages
from kernelgen.cli.terminal import (
    OF_ARRAYS,
    AsJson,
    FormatNames,
    Names,
    TargetNames,
    console,
    pick_formats,
    pick_kinds,
    pick_op,
    pick_targets,
    print_json,
    said_of,
    table,
)
from kernelgen.errors import ConfigError, TargetError
from kernelgen.generate import generate_walk
from kernelgen.ir.block import BlockFormat
from kernelgen.ir.ops import library
from kernelgen.ir.ops.attention import Attention
from kernelgen.ir.steps import code_word
from kernelgen.problem import PRECISIONS, choose_precision
from kernelgen.targets.base import OPS, Kernel, Subject, Target, Walk
from kernelgen.verify_epilogue import KINDS

_OF_FORMATS = tuple(op for op in OPS if op not in (*OF_ARRAYS, "attention_combine"))
#: ops whose kernels are about heads, with keys and values in a format
_OF_HEADS = ("attention", "attention_combine")

#: elements of a head
_HEAD_DIM = 128


@dataclass(frozen=True)
class Cell:
    """What one target does about one op on one format.

    how         "run", "emulated", "compiled": what its results are worth here; or "none"
    precisions  that it offers; empty where the op has no such choice
    decode      "packed", "scalar" or "floats"; empty where there is no format
    notes       what is slower than it should be, such as decode lane by lane
    reason      why there is none
    """

    target: str
    op: str
    format: str
    how: str
    precisions: tuple[str, ...]
    decode: str
    notes: tuple[str, ...]
    reason: str | None


def _subject(op: str, fmt: BlockFormat) -> BlockFormat | Attention:
    """What a kernel of an op about this format is specialized for: of attention, keys and values in
    it, of heads of the usual size."""
    if op not in _OF_HEADS:
        return fmt
    return Attention(fmt.block if _HEAD_DIM % fmt.block else _HEAD_DIM, fmt, fmt)


def _cell(target: Target, op: str, fmt: BlockFormat, how: str, unavailable: str | None) -> Cell:
    walks = [walk for walk in target.walks if walk.op == op]
    subject = _subject(op, fmt)
    refusals = {walk.name: walk.accepts(subject) for walk in walks}
    offers = list(dict.fromkeys(w.precision for w in walks if refusals[w.name] is None))
    able = [walk for walk in walks if refusals[walk.name] is None]
    notes = [note for walk in able for note in generate_walk(walk, subject, target).notes]
    reason = unavailable
    if not offers:
        reason = next(filter(None, refusals.values()), "it has no walk for this op")
    return Cell(
        target.name, op, fmt.name, how if reason is None else "none",
        tuple(filter(None, offers)), decoded(fmt), tuple(dict.fromkeys(notes)), reason,
    )  # fmt: skip


def list_kernels(
    target: TargetNames = None, format: FormatNames = None, as_json: AsJson = False
) -> None:
    """Show which kernels there are: format x op x target, and what their results are worth here."""
    formats = pick_formats(format)
    result: list[Cell] = []
    for one in pick_targets(target):
        runtime = one.reach()
        unavailable = runtime.available()
        how = "none" if unavailable else runtime.how()
        cells = [_cell(one, op, fmt, how, unavailable) for fmt in formats for op in _OF_FORMATS]
        result += cells
        if not as_json:
            _print_cells(one, formats, cells, unavailable)
        if not format:  # what is not about formats
            maps = [cell for op in OF_ARRAYS for cell in _map_cells(one, op, how, unavailable)]
            result += maps
            if not as_json:
                _print_maps(maps)
    if as_json:
        print_json([asdict(cell) for cell in result])


def _print_cells(
    target: Target, formats: Sequence[BlockFormat], cells: list[Cell], unavailable: str | None
) -> None:
    by_place = {(cell.format, cell.op): cell for cell in cells}
    ops = [op for op in _OF_FORMATS if any(walk.op == op for walk in target.walks)]
    shown = table(
        "format",
        "bits",
        "decode",
        *ops,
        right=["bits"],
        title=f"{target.name}: {target.description}",
    )
    for fmt in formats:
        row = [by_place[fmt.name, op] for op in ops]
        shown.add_row(fmt.name, f"{fmt.bits:g}", decoded(fmt), *map(_words, row))
    out = console()
    out.print(shown)
    said = [f"* {cell.format}: {note}" for cell in cells for note in cell.notes]
    if unavailable:
        said.append(f"none: {unavailable}")
    else:
        said += [
            f"none for {cell.op} {cell.format}: {cell.reason}"
            for cell in cells
            if cell.reason is not None and cell.op in ops
        ]
    for line in dict.fromkeys(said):
        out.print(f"  {line}", soft_wrap=True)
    if not unavailable and {"matvec", "matmul"} & set(ops):
        out.print(f"  fused with matvec and matmul: {_fused_words(target)}", soft_wrap=True)
    out.print()


def _fused_words(target: Target) -> str:
    """What products of a target do besides, in one kernel."""
    products = [walk for walk in target.walks if walk.op in ("matvec", "matmul")]
    before = {(w.op, w.precision, w.style) for w in target.walks if w.norms}
    inside = {
        walk.precision
        for walk in products
        for op in (walk.op, *walk.needs(walk.config.default(target.capabilities, 1)))
        if {(op, walk.precision, walk.style), (op, walk.precision, "")} & before
    }
    norm = f"RMSNorm ({', '.join(sorted(inside))})" if inside else "no RMSNorm"
    return f"epilogues, gated pairs, {norm}; `verify --epilogue` names them"


def decoded(fmt: BlockFormat) -> str:
    """How codes are decoded: "packed" (four at once), "scalar" (one by one), or that there are none
    but "floats"."""
    if fmt.float_codes:
        return "floats"
    return "scalar" if code_word(fmt).scalar_because else "packed"


def _map_cells(target: Target, op: str, how: str, unavailable: str | None) -> list[Cell]:
    """The maps or row reductions of the library on a target; each is a cell whose format is its
    name."""
    able = [walk for walk in target.walks if walk.op == op]
    none = unavailable or (None if able else "it has no walk for this op")
    return [
        Cell(target.name, op, name, how if none is None else "none", (), "", (), none)
        for name in library.NAMES
        if library.op_of(library.get(name)) == op
    ]


def _print_maps(cells: list[Cell]) -> None:
    """A line for each op."""
    for op in OF_ARRAYS:
        some = [cell for cell in cells if cell.op == op]
        how = " ".join(dict.fromkeys(cell.how for cell in some))
        console().print(f"  {op}, {how}: {', '.join(cell.format for cell in some)}")
    console().print()


def _words(cell: Cell) -> str:
    """run, run* (decoded lane by lane), run int8 fp32."""
    return " ".join([cell.how + "*" * bool(cell.notes), *cell.precisions])


def devices(as_json: AsJson = False) -> None:
    """Show which targets can run on this machine, and why the others cannot."""
    found: list[dict[str, Any]] = []
    for target in target_list.targets():
        runtime = target.runtime()
        reason = runtime.available()
        found.append(
            {
                "target": target.name,
                "description": target.description,
                "how": "none" if reason else runtime.how(),
                "available": reason is None,
                "reason": reason,
                "serves": dispatching.serves(target.name),
                "variants": {name: target.runtime(name).available() for name in target.variants},
                "devices": runtime.describe() if reason is None else [],
            }
        )
    if as_json:
        print_json(found)
        return
    for line in dispatching.lines():
        print(line)
    for one in found:
        print(f"{one['target']}: {one['how']}, {one['description']}")
        if one["reason"]:
            print(f"  {one['reason']}")
        for device in one["devices"]:
            width = max(map(len, device))
            for key, text in said_of(device):
                print(f"  {key:{width}}  {text}")
        able = [name for name, reason in one["variants"].items() if reason is None]
        if able:
            print(f"  --isa can be {', '.join(able)}")


def show(
    op: Annotated[str, typer.Argument(metavar="OP", help=f"One of {', '.join(OPS)}.")],
    format: Annotated[
        str,
        typer.Argument(
            metavar="FORMAT", help="A format, in any case; of map and rows one of `kernelgen list`."
        ),
    ],
    target: Annotated[
        str, typer.Option("--target", metavar="T", help="The target whose kernel is shown.")
    ] = target_list.PREFERENCE[0],
    precision: Annotated[
        str, typer.Option("--precision", metavar="P", help=f"{', '.join(PRECISIONS)}.")
    ] = "auto",
    config: Annotated[
        Names,
        typer.Option(
            "--config", metavar="K=V", help="A value of the configuration; may be repeated."
        ),
    ] = None,
    epilogue: Annotated[
        str,
        typer.Option("--epilogue", metavar="E", help=f"What is fused with it: {', '.join(KINDS)}."),
    ] = "",
    ir: Annotated[
        bool, typer.Option("--ir", help="Show how the format's description became packed code.")
    ] = False,
) -> None:
    """Print the source of a kernel, or the stages of the IR behind it."""
    op, manifest, values = pick_op(op, OPS), target_list.get(target), _parsed(config)
    out = console()
    if op in OF_ARRAYS:
        made = _map_kernel(op, format, manifest, values)
    elif op in _OF_HEADS:
        made = _attention_kernel(op, format_files.format_of(format), manifest, precision, values)
    else:
        fmt = format_files.format_of(format)
        chosen = _precision(op, fmt, manifest, precision)
        made = api.kernel(op, fmt, manifest.name, values or None, chosen)
    if epilogue:
        made = _fused_kernel(made, epilogue, manifest)
    if ir:
        for line in stages.lines(made):
            out.print(line, soft_wrap=True)
        return
    if not out.is_terminal:
        print(made.source, end="")
        return
    lexer = Syntax.guess_lexer(f"kernel{manifest.suffix}", made.source)
    painted = Syntax("", lexer, background_color="default").highlight(made.source.rstrip("\n"))
    out.print(painted, soft_wrap=True)


def _precision(op: str, fmt: BlockFormat, target: Target, asked: str) -> str:
    """The precision of the kernel that is shown; "", the first that there is, where nobody asked
    and the op has not the usual one."""
    chosen = choose_precision(asked, fmt)
    offers = {walk.precision for walk in target.walks if walk.op == op}
    return chosen if asked != "auto" or offers & {chosen, ""} else ""


def _map_kernel(op: str, name: str, target: Target, values: Mapping[str, Any]) -> Kernel:
    """A map or a row reduction of the library."""
    kind = library.get(name)
    if library.op_of(kind) != op:
        raise TargetError(f"{op} {name} was asked for; {name} is one of {library.op_of(kind)}")
    return _configured(target.walk(op, kind), kind, target, values)


def _attention_kernel(
    op: str, fmt: BlockFormat, target: Target, precision: str, values: Mapping[str, Any]
) -> Kernel:
    """Attention with K and V in a format, of heads of the usual size."""
    choose_precision(precision, fmt)  # refuses those that there are not
    kind = _subject(op, fmt)
    walk = target.walk(op, kind, "fp32" if precision == "auto" else precision)
    return _configured(walk, kind, target, values)


def _configured(walk: Walk, subject: Subject, target: Target, values: Mapping[str, Any]) -> Kernel:
    """The kernel of a walk in its default configuration but for some values."""
    chosen = walk.default(subject, target.capabilities)
    merged = walk.config.from_dict(chosen.as_dict() | dict(values))
    return generate_walk(walk, subject, target, merged)


def _fused_kernel(made: Kernel, epilogue: str, target: Target) -> Kernel:
    """The same kernel with what is fused with it."""
    kinds = pick_kinds([epilogue])
    if len(kinds) != 1:
        raise TargetError(f"--epilogue {epilogue} was given; a kernel is shown with one of them")
    fused = generate_walk(made.walk, made.subject, target, made.config, KINDS[kinds[0]])
    if not fused.fused.name:
        raise TargetError(
            f"{made.op} with {kinds[0]} was asked for; epilogues are fused with matvec and matmul,"
            " and a norm with what takes their activations first"
        )
    return fused


def _parsed(given: Names) -> dict[str, Any]:
    """Values of --config by name; what reads as a Python literal is one."""
    values: dict[str, Any] = {}
    for one in given or ():
        name, sign, text = one.partition("=")
        if not sign or not name:
            raise ConfigError(f"--config {one} was given; write a name and a value, as columns=4")
        try:
            values[name.strip()] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            values[name.strip()] = text
    return values

"""The tuner's commands: `tune` and `explain`."""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.live import Live
from rich.text import Text

from kernelgen import api
from kernelgen import targets as target_list
from kernelgen.api_fused import launches_of
from kernelgen.bench import busy
from kernelgen.cli import caching, dispatching, format_files
from kernelgen.cli.terminal import (
    AsJson,
    FormatNames,
    Names,
    Variant,
    complain,
    console,
    pick_formats,
    pick_kinds,
    pick_numbers,
    print_json,
    split_names,
    table,
)
from kernelgen.dispatch import decide, of_choice
from kernelgen.errors import ShapeError, TargetError, TuningError
from kernelgen.ir import formats as format_list
from kernelgen.ir.block import BlockFormat
from kernelgen.ir.ops import library
from kernelgen.ir.ops.attention import Attention, causal, trace
from kernelgen.problem import PRECISIONS
from kernelgen.targets.base import Runtime, Target
from kernelgen.tuner import lookup, samplers, space
from kernelgen.tuner.device import of as device_of
from kernelgen.tuner.measure import WorkerMeasurer
from kernelgen.tuner.problems import (
    OBJECTIVES,
    Asked,
    AttentionProblem,
    MapProblem,
    MatmulProblem,
    Problem,
)
from kernelgen.tuner.report import EFFORTS, Options, Report, Status, amount, summary
from kernelgen.tuner.study import Study
from kernelgen.verify_epilogue import KINDS

#: rows of activations that a model's matrices are tuned for: one token, and a prompt
_MODEL_ROWS = (1, 128)

Precision = Annotated[
    str, typer.Option("--precision", metavar="P", help=f"{', '.join(PRECISIONS)}.")
]
Objective = Annotated[
    str,
    typer.Option("--objective", help=f"What is to be least: {' or '.join(OBJECTIVES)}."),
]
MaxError = Annotated[
    float | None,
    typer.Option(
        "--max-error", metavar="X",
        help="Largest RMS error, relative to the output's RMS, that rounded activations included"
        " may make; by default what the precision stands for.",
    ),
]  # fmt: skip


_SHAPES = (
    "Of matmul MxNxK: rows of activations, rows of weights, columns. Of attention BxHxHKxTxSxD:"
    " batches, heads of q, heads of k and v, queries, keys, elements of a head. Of a map or row"
    " reduction RxC: rows, columns."
)
TunedOp = Annotated[
    str,
    typer.Option(
        "--op",
        help="matmul (matvec for a few rows), attention (causal), or a map or row reduction by its"
        " name, as softmax.",
    ),
]

_OF_MAPS = "RxC"

#: sizes of a shape as it is written, by op
_SIZES = {
    "matmul": "MxNxK", "matvec": "MxNxK", "attention": "BxHxHKxTxSxD",
    **dict.fromkeys(library.NAMES, _OF_MAPS),
}  # fmt: skip

#: shapes of as many sizes, for messages
_EXAMPLES = {2: "4096x4096", 3: "1x4096x4096", 6: "1x32x8x1x4096x128"}


def tune(
    model: Annotated[
        Path | None,
        typer.Argument(metavar="[MODEL.gguf]", help="Tune the shapes of this file's matrices."),
    ] = None,
    target: Annotated[
        Names, typer.Option("--target", metavar="T", help="Targets; by default that of matmul.")
    ] = None,
    op: TunedOp = "matmul",
    format: FormatNames = None,
    shape: Annotated[Names, typer.Option("--shape", metavar="SHAPE", help=_SHAPES)] = None,
    rows: Annotated[
        Names, typer.Option("--rows", metavar="M", help="With a model: rows; 1 and 128 by default.")
    ] = None,
    precision: Precision = "auto",
    budget: Annotated[
        float | None,
        typer.Option("--budget", min=0.5, metavar="S", help="Seconds for all that is tuned."),
    ] = None,
    effort: Annotated[
        str,
        typer.Option(
            "--effort",
            help="Without --budget, seconds for each kernel: "
            + ", ".join(f"{name} {seconds:g}" for name, seconds in EFFORTS.items())
            + ".",
        ),
    ] = "normal",
    max_error: MaxError = None,
    objective: Objective = "time",
    pareto: Annotated[
        bool, typer.Option("--pareto", help="Show the trials that none beats in both.")
    ] = False,
    sampler: Annotated[
        str, typer.Option("--sampler", help=f"One of {', '.join(samplers.NAMES)}.")
    ] = samplers.DEFAULT,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the sampler.")] = 0,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the trials of the last study.")
    ] = False,
    storage: Annotated[
        str | None,
        typer.Option(
            "--storage", metavar="URL", help="A storage of Optuna's that many processes share."
        ),
    ] = None,
    report: Annotated[
        Path | None, typer.Option("--report", metavar="FILE.html", help="Write a page about it.")
    ] = None,
    isa: Variant = "",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only show what there is to choose from.")
    ] = False,
    as_json: AsJson = False,
) -> None:  # fmt: skip
    """Find the best configuration for shapes on this machine, and remember it."""
    begin = time.perf_counter()
    asked = Asked(precision=precision, max_error=max_error, objective=objective)
    problems = list(_problems(model, op, format, shape, rows, asked))
    pairs = [(one, _runtime(one, isa)) for one in _targets(target)]
    if dry_run:
        _dry_run(pairs, problems, as_json)
        return
    if effort not in EFFORTS:
        raise TuningError(f"effort {effort!r} was asked for; known are {', '.join(EFFORTS)}")
    samplers.check(sampler)
    options = Options(EFFORTS[effort], sampler, seed, storage, resume)
    _need_optuna()
    waiting = len(problems) * len(pairs)
    warning = busy()
    if warning:
        complain(f"warning: {warning}")
    reports: list[tuple[Target, Report]] = []
    for one, runtime in pairs:
        measurer = WorkerMeasurer(one.name, isa)
        try:
            for problem in problems:
                if budget:  # what others left over is shared by the rest
                    left = budget - (time.perf_counter() - begin)
                    options = dataclasses.replace(options, budget=max(left, 0.0) / waiting)
                waiting -= 1
                found = _study(one, runtime, problem, measurer, options, as_json)
                reports.append((one, found))
                if found.stopped == "interrupted":
                    break
        finally:
            measurer.close()
        if reports[-1][1].stopped == "interrupted":
            break
    if as_json:
        print_json(
            {"studies": [_as_dict(t, r) for t, r in reports], **summary(r for _, r in reports)}
        )
    else:
        _print_reports(reports, pareto)
    if report is not None:
        from kernelgen.tuner import page

        page.write(report, [(t.name, r) for t, r in reports])
        complain(f"wrote {report}")
    if any(r.stopped == "interrupted" for _, r in reports):
        raise typer.Exit(130)
    if not any(r.best for _, r in reports):
        raise typer.Exit(1)


def _need_optuna() -> None:
    try:
        import optuna  # noqa: F401
    except ImportError as error:
        raise TuningError(
            f"tuning needs optuna, which cannot be imported ({error}); pip install kernelgen[tune]"
        ) from None


def _targets(names: Names) -> list[Target]:
    wanted = split_names(names) or [api.default_target()]
    return list(dict.fromkeys(map(target_list.get, wanted)))


def _runtime(target: Target, isa: str) -> Runtime:
    runtime = target.runtime(isa)
    reason = runtime.available()
    if reason is not None:
        raise TargetError(f"target {target.name} cannot run here: {reason}")
    return runtime


def _problems(
    model: Path | None, op: str, format: Names, shape: Names, rows: Names, asked: Asked
) -> Iterator[Problem]:
    if model is not None:
        if shape:
            raise ShapeError("a model and --shape were given; a model has its own: leave out one")
        wanted = {fmt.name for fmt in pick_formats(format)} if format else None
        matrices: set[tuple[BlockFormat, int, int]] = {
            (format_list.get(kind), shape[-2], shape[-1])
            for _, shape, kind, _ in api.open(model).listing()
            if len(shape) > 1 and (wanted is None or kind in wanted)
        }
        if not matrices:
            raise ShapeError(f"{model} has no matrices of the formats asked for")
        counts = pick_numbers(rows, "--rows", "numbers above 0, as 1,128") or _MODEL_ROWS
        for fmt, n, k in sorted(matrices, key=lambda one: (one[0].name, one[1:])):
            for m in counts:
                yield MatmulProblem(fmt, m, n, k, **vars(asked))
        return
    shapes = split_names(shape)
    if _sizes_of(op) == _OF_MAPS and not format:
        format = ["f32"]
    if not shapes or not format:
        raise ShapeError(
            "nothing was said about what to tune; give --format and --shape, as --format q4_K"
            " --shape 1x4096x14336, or a GGUF file"
        )
    names = split_names(format)
    for fmt in pick_formats([] if names == ["all"] else names):
        for text in shapes:
            yield problem_of(op, fmt, text, asked)


def _sizes_of(op: str) -> str:
    """The sizes of a shape of an op, as they are written."""
    if op not in _SIZES:
        raise TuningError(
            f"{op} was asked about; what is tuned is matmul, attention, {', '.join(library.NAMES)}"
        )
    return _SIZES[op]


def problem_of(op: str, fmt: BlockFormat, shape: str, asked: Asked) -> Problem:
    """The problem that the command line describes; attention is causal, with K and V in one
    format, and a map or row reduction one of the library, of elements of the format's type."""
    sizes = _sizes_of(op)
    count = sizes.count("x") + 1
    numbers = re.findall(r"\d+", shape)
    if "x".join(numbers) != shape.lower() or len(numbers) != count or "0" in numbers:
        raise ShapeError(
            f"shape {shape!r} was given; write {sizes} with {count} numbers above 0, as"
            f" {_EXAMPLES[count]}"
        )
    if count == 2:
        r, c = map(int, numbers)
        return MapProblem.of(op, fmt.name, r, c, asked)
    given = vars(asked)
    if count == 3:
        m, n, k = map(int, numbers)
        return MatmulProblem(fmt, m, n, k, **given)
    *outer, head_dim = map(int, numbers)
    kind = Attention(head_dim, fmt, fmt, mask=trace(None, causal)[1], label="causal")
    b, h, hk, t, s = outer
    return AttentionProblem(kind, b, h, hk, t, s, **given)


# ---- tune -------------------------------------------------------------------------------------


def _dry_run(pairs: list[tuple[Target, Runtime]], problems: list[Problem], as_json: bool) -> None:
    found: list[dict[str, Any]] = []
    for target, runtime in pairs:
        for problem in problems:
            explored = space.explore(target, runtime.capabilities(), problem)
            values = space.parameters(explored)
            found.append(
                {
                    "target": target.name, "problem": str(problem), "size": explored.size,
                    "legal": len(explored.legal), "forbidden": explored.forbidden,
                    "parameters": values,
                }
            )  # fmt: skip
            if as_json:
                continue
            print(f"{problem} on {target.name}: {explored.size} candidates,"
                  f" {len(explored.legal)} legal")  # fmt: skip
            for name, choices in values.items():
                print(f"  {name:12} {', '.join(map(str, choices))}")
            for rule, count in explored.forbidden.items():
                print(f"  {count:6} forbidden: {rule} (as: {explored.examples[rule]})")
    if as_json:
        print_json(found)


def _study(
    target: Target,
    runtime: Runtime,
    problem: Problem,
    measurer: WorkerMeasurer,
    options: Options,
    quiet: bool,
) -> Report:
    out = console(stderr=True)
    if quiet or not out.is_terminal:
        return Study(target, runtime, problem, measurer, options).run()
    with Live(console=out, transient=True, refresh_per_second=8) as live:

        def show(status: Status) -> None:
            live.update(_status(target, status))

        return Study(target, runtime, problem, measurer, options, show).run()


def _status(target: Target, now: Status) -> Text:
    goal = now.problem.objective
    best = "nothing yet" if now.best is None else f"best {amount(now.best, goal)}"
    if now.best is not None and now.default:
        best += f", {now.default / now.best:.2f}x the default's {amount(now.default, goal)}"
    if now.best is not None and now.roofline:
        best += f", {now.roofline / now.best:.0%} of the roofline"
    return Text(
        f"{target.name} {now.problem}\n  {best}\n  {now.tried} of {now.space} tried,"
        f" {now.failed} failed, {now.left:.0f} s left; {now.doing}"
    )


def _print_reports(reports: list[tuple[Target, Report]], pareto: bool) -> None:
    numbers = ["old", "new", "ratio", "roofline", "tried", "failed"]
    shown = table("target", "kernel", *numbers, right=numbers)
    for target, one in reports:
        goal = one.problem.objective
        roof = one.roofline / one.cost if one.roofline and one.cost else None
        shown.add_row(
            target.name, str(one.problem), amount(one.default_cost, goal), amount(one.cost, goal),
            f"{one.ratio:.2f}" if one.ratio else "", f"{roof:.0%}" if roof else "",
            f"{len(one.trials)}/{len(one.space.legal)}", str(len(one.failures)),
        )  # fmt: skip
    out = console()
    out.print(shown)
    for target, one in reports:
        goal = one.problem.objective
        where = f"; written to {one.path}" if one.path else ""
        out.print(
            f"{target.name} {one.problem}: {one.best or 'nothing passed'}; {one.stopped} after"
            f" {one.spent:.1f} s{where}",
            soft_wrap=True,
        )
        for candidate, outcome in one.failures:
            out.print(f"  {outcome.kind}: {candidate}: {outcome.reason}", soft_wrap=True)
        if pareto and one.front():
            front = table(goal, "RMS error", "configuration", right=[goal, "RMS error"])
            for candidate, outcome in one.front():
                front.add_row(
                    amount(outcome.cost(goal), goal), f"{outcome.rms_error:.2g}", str(candidate)
                )
            out.print(front)
    found = summary(r for _, r in reports)
    if found["count"] > 1:
        mean, count = found["geometric_mean"], found["count"]
        out.print(f"tuned over default: {mean:.2f} times, the geometric mean of {count}")


def _as_dict(target: Target, one: Report) -> dict[str, Any]:
    return {
        "target": target.name, "problem": str(one.problem), "device": vars(one.device),
        "old": one.default_cost, "new": one.cost, "ratio": one.ratio,
        "roofline": one.roofline, "tried": len(one.trials), "space": len(one.space.legal),
        "stopped": one.stopped, "seconds": one.spent, "path": one.path,
        "config": one.best.as_dict() if one.best else None,
        "failures": [{"candidate": str(c), "kind": o.kind, "reason": o.reason}
                     for c, o in one.failures],
        "front": [{"candidate": str(c), "seconds": o.seconds, "rms_error": o.rms_error}
                  for c, o in one.front()],
    }  # fmt: skip


# ---- explain ----------------------------------------------------------------------------------


def explain(
    op: Annotated[
        str, typer.Argument(metavar="OP", help="matmul, or matvec: one of few rows; or as in tune.")
    ],
    format: Annotated[str, typer.Argument(metavar="FORMAT", help="A format, in any case.")],
    shape: Annotated[
        str, typer.Option("--shape", metavar="SHAPE", help=_SHAPES)
    ] = "1x4096x4096",
    target: Annotated[
        str, typer.Option("--target", metavar="T", help="By default that of matmul.")
    ] = "",
    precision: Precision = "auto",
    max_error: MaxError = None,
    objective: Objective = "time",
    isa: Variant = "",
    epilogue: Annotated[
        str, typer.Option("--epilogue", metavar="E", help="What is fused with it, or all.")
    ] = "",
    as_json: AsJson = False,
) -> None:  # fmt: skip
    """Say which configuration serves a problem, by what rule, and what others there were."""
    manifest = target_list.get(target or api.default_target())
    runtime = _runtime(manifest, isa)
    asked = Asked(precision=precision, max_error=max_error, objective=objective)
    problem = problem_of(op, format_files.format_of(format), shape, asked)
    choice = lookup.choose_for(manifest, runtime, problem)
    others = [
        found for found in lookup.search(manifest, runtime, problem)
        if choice.entry is None or found.entry is not choice.entry
    ]  # fmt: skip
    entry = choice.entry
    fallbacks = of_choice(manifest, choice, problem.subject, problem.precision, problem.max_error)
    launches: list[str] = []
    for kind in pick_kinds([epilogue] if epilogue else None):
        if not isinstance(problem, MatmulProblem):
            raise TuningError(f"{op} with {kind} was asked about; only matmul has epilogues")
        launches += launches_of(manifest.name, problem, KINDS[kind])
    if as_json:
        print_json(
            {
                "launches": launches,
                "problem": str(problem), "target": manifest.name,
                "device": vars(device_of(manifest, runtime)), "rule": choice.rule,
                "why": choice.why, "choice": choice.candidate.as_dict(),
                "dispatch": None if target else dispatching.as_dict(),
                "fallbacks": list(map(str, fallbacks)),
                # another problem's seconds are not this one's
                "expected_seconds": entry.seconds if entry and choice.rule == "exact" else None,
                "entry": entry.as_dict() if entry else None,
                "others": [
                    {"rule": f.rule, "refused": f.refused, "entry": f.entry.as_dict()}
                    for f in others
                ],
            }
        )  # fmt: skip
        return
    print(f"{problem} on {manifest.name}: {choice.candidate}")
    print(f"  device    {device_of(manifest, runtime)}")
    print(f"  rule      {choice.rule}: {choice.why}")
    if not target:
        print(f"  target    {decide().target}: {decide().why}")
        for line in dispatching.passed(decide()):
            print(f"          {line}")
    for one in fallbacks:
        print(f"  fallback  {one}")
    if entry is not None:
        for name, said in caching.facts(entry):
            elsewhere = name == "expects" and choice.rule != "exact"
            print(f"  {'took' if elsewhere else name:9} {said}")
    else:
        print(f"  expects   unknown; kernelgen tune --target {manifest.name} {problem.flags}"
              " finds out")  # fmt: skip
    for line in launches:
        print(f"  launches  {line}")
    for found in others:
        used = found.refused or f"{found.rule}, further away"
        print(f"  other     {caching.one_line(found.entry)}: {used}")


def register(app: typer.Typer) -> None:
    """Add the tuner's commands to the command line."""
    app.command("tune")(tune)
    app.command("explain")(explain)
    app.add_typer(caching.app, name="cache")

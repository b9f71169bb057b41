"""`plan`: which rank holds what of a model, and what that costs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

import kernelgen
from kernelgen import models
from kernelgen.cli.terminal import AsJson, console, print_json, table
from kernelgen.errors import FileError
from kernelgen.gguf_files import Model
from kernelgen.models.hyperparameters import Hyperparameters
from kernelgen.models.ranks import outline, probe
from kernelgen.models.ranks.costs import Costs, Estimate, Link, Machine
from kernelgen.tensor import human_bytes

GIGA, MICRO = 1e9, 1e-6

Bandwidth = Annotated[
    float | None,
    typer.Option("--memory", metavar="GB/S", min=1e-3, help="That a rank reads; else measured."),
]
Inside = Annotated[
    float | None,
    typer.Option("--link", metavar="GB/S", min=1e-3, help="In a node; else of gloo, measured."),
]
Between = Annotated[
    float | None,
    typer.Option("--network", metavar="GB/S", min=1e-3, help="Between nodes; else as in a node."),
]
InsideLatency = Annotated[
    float | None, typer.Option("--link-latency", metavar="US", min=0.0, help="Of a message.")
]
BetweenLatency = Annotated[
    float | None, typer.Option("--network-latency", metavar="US", min=0.0, help="Of a message.")
]
Compute = Annotated[
    float | None,
    typer.Option("--compute", metavar="TOP/S", min=1e-6, help="Of a rank; else takes no time."),
]


def plan(
    file: Annotated[Path, typer.Argument(metavar="MODEL", help="A GGUF file, or a shape in JSON.")],
    tp: Annotated[int, typer.Option("--tp", min=1, help="Ranks that cut each matrix.")] = 1,
    pp: Annotated[int, typer.Option("--pp", min=1, help="Stages of some layers each.")] = 1,
    dp: Annotated[int, typer.Option("--dp", min=1, help="Replicas.")] = 1,
    per_node: Annotated[
        int | None, typer.Option(min=1, help="Ranks of a node; by default it has them all.")
    ] = None,
    memory: Bandwidth = None,
    link: Inside = None,
    link_latency: InsideLatency = None,
    network: Between = None,
    network_latency: BetweenLatency = None,
    compute: Compute = None,
    context: Annotated[int, typer.Option(min=1, help="Tokens of a sequence in the cache.")] = 4096,
    sequences: Annotated[int, typer.Option(min=1, help="Of each replica, at once.")] = 1,
    micro: Annotated[
        int | None, typer.Option(min=1, help="Micro-batches of a prompt; else 4 for each stage.")
    ] = None,
    cache: Annotated[
        str, typer.Option("--cache", metavar="F[,F]", help="Format of keys and of values.")
    ] = "f16",
    as_json: AsJson = False,
) -> None:
    """Say which rank would hold what of a model, what ranks would send, and how long it takes."""
    shape, tensors = _model(file)
    made = models.Plan(shape, tensors, tp=tp, pp=pp, dp=dp, where=str(file))
    node = min(per_node or made.ranks, made.ranks)
    machine = _machine(
        node, made.ranks, memory, (link, link_latency), (network, network_latency), compute
    )
    keys, _, values = cache.partition(",")
    costs = Costs(made, machine, context=context, format=keys, value_format=values or None)
    steps = [costs.decode(), *([costs.decode(sequences)] if sequences > 1 else [])]
    if compute is not None:
        steps.append(costs.prompt(context, micro or (4 * pp if pp > 1 else 1)))
    if as_json:
        _print_json(made, costs, steps)
        return
    _print(file, made, costs, steps)


def _model(file: Path) -> tuple[Hyperparameters, Any]:
    if file.suffix.lower() == ".json" and not file.is_dir():
        return outline.read(file)
    found = kernelgen.open(file)
    if not isinstance(found, Model):
        raise FileError(f"{file} is no GGUF file and no shape in JSON; plans are made for these")
    for name in found.skipped:
        found[name]  # says which formats are known
    return Hyperparameters.of(found.metadata, str(file)), found


def _machine(
    node: int, ranks: int, memory: float | None, inside: tuple[float | None, float | None],
    between: tuple[float | None, float | None], compute: float | None,
) -> Machine:  # fmt: skip
    """What is not given is measured here, where the ranks of a node share the memory."""
    reads = memory * GIGA if memory is not None else probe.memory() / node
    measured = None
    if ranks > 1 and None in inside:
        measured = probe.link()
    own = _link(inside, measured)
    return Machine(
        reads, own, _link(between, own), node, None if compute is None else compute * 1e12
    )


def _link(given: tuple[float | None, float | None], otherwise: Link | None) -> Link:
    bandwidth, latency = given
    known = otherwise or Link(float("inf"), 0.0)  # of one rank alone, which needs none
    return Link(
        known.bandwidth if bandwidth is None else bandwidth * GIGA,
        known.latency if latency is None else latency * MICRO,
    )


def _print(file: Path, made: models.Plan, costs: Costs, steps: list[Estimate]) -> None:
    machine, shape = costs.machine, made.shape
    whole = models.Plan(shape, made.tensors).part()
    nbytes = sum(size for _, size in made.held(whole))
    out = console()
    out.print(
        f"{file.stem}: {shape.architecture}, {shape.layers} layers, {human_bytes(nbytes)};"
        f" {_count(made.ranks, 'rank')}: {_count(made.dp, 'replica')} of"
        f" {_count(made.pp, 'stage')} of {_count(made.tp, 'tensor rank')}"
    )
    said = f"a rank reads {human_bytes(machine.memory)}/s"
    if made.ranks > 1:
        said += f"; {machine.per_node} ranks of a node: {_spelt(machine.inside)}"
    if made.ranks > machine.per_node:
        said += f"; between nodes: {_spelt(machine.between)}"
    if machine.compute is not None:
        said += f"; {machine.compute / 1e12:g} TOP/s"
    out.print(said)
    numbers = ["heads", "of keys", "hidden", "weights", "read a token"]
    kept = f"cache of {costs.context}"
    shown = table("ranks", "layers", *numbers, kept, right=[*numbers, kept])
    for one in costs.shares():
        shown.add_row(
            _range(one.ranks), _range(one.layers), str(one.heads), str(one.kv_heads),
            str(one.hidden), human_bytes(one.weights), human_bytes(one.read),
            human_bytes(one.kept),
        )  # fmt: skip
    out.print(shown)
    for step in steps:
        _print_step(step, made)


def _print_step(step: Estimate, made: models.Plan) -> None:
    out = console()
    each = step.sequences * made.dp / step.seconds
    what, speed = f"a token of {_count(step.sequences, 'sequence')}", f"{each:.1f} tokens/s"
    if step.tokens > 1:
        what = f"a prompt of {step.tokens} tokens in {_count(step.micro, 'micro-batch', 'es')}"
        speed = f"{step.tokens * made.dp / step.seconds:.0f} tokens/s"
    out.print(
        f"{what}: {_ms(step.seconds)}, {speed} (reading weights and cache {_ms(step.reading)},"
        f" computing {_ms(step.computing)}, messages {_ms(step.telling)})"
    )
    if not step.messages:
        out.print()
        return
    numbers = ["times", "bytes", "sent by all", "time"]
    shown = table("message", *numbers, "over the", right=numbers)
    for one in step.messages:
        shown.add_row(
            one.what, str(one.times), human_bytes(one.nbytes), human_bytes(one.sent),
            _ms(one.seconds), one.link,
        )  # fmt: skip
    out.print(shown)


def _print_json(made: models.Plan, costs: Costs, steps: list[Estimate]) -> None:
    machine = costs.machine
    shares = [
        {
            "ranks": list(one.ranks), "layers": list(one.layers), "heads": one.heads,
            "kv_heads": one.kv_heads, "hidden": one.hidden, "weights": one.weights,
            "read": one.read, "cache": one.kept,
        }
        for one in costs.shares()
    ]  # fmt: skip
    print_json(
        {
            "tp": made.tp, "pp": made.pp, "dp": made.dp, "shares": shares,
            "memory": machine.memory, "per_node": machine.per_node,
            "link": vars(machine.inside), "network": vars(machine.between),
            "compute": machine.compute, "context": costs.context,
            "steps": [one.as_dict() for one in steps],
        }
    )  # fmt: skip


def _spelt(link: Link) -> str:
    return f"{human_bytes(link.bandwidth)}/s and {link.latency / MICRO:.1f} us"


def _range(some: range) -> str:
    return str(some.start) if len(some) == 1 else f"{some.start}-{some.stop - 1}"


def _count(count: int, what: str, more: str = "s") -> str:
    return f"{count} {what}{more if count > 1 else ''}"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms"


def register(app: typer.Typer) -> None:
    """Add this command to the command line."""
    app.command("plan")(plan)

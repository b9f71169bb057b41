"""From an op, a format, a target and a configuration to source text."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from importlib.resources import files
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

from kernelgen import __version__
from kernelgen.config import Config
from kernelgen.errors import ConfigError
from kernelgen.ir.block import BlockFormat
from kernelgen.ir.expr import Expr, show, walk
from kernelgen.ir.layout import unit_bytes
from kernelgen.ir.ops.epilogue import PLAIN, Fusion, in_words, statements
from kernelgen.targets.base import Argument, Kernel, Subject, Target, Walk
from kernelgen.targets.printer import Printer

if TYPE_CHECKING:
    import jinja2


@functools.cache
def environment(target: Target) -> jinja2.Environment:
    """The template environment of a target; its own, so that no target's words leak into another.

    Delimiters are ones that no language of a target uses, and a misspelt name is an error.
    """
    import jinja2

    folders = [f"templates/{name}" for name in (target.name, *target.templates, "packages")]
    loaders = [
        jinja2.PackageLoader("kernelgen", folder)
        for folder in (*folders, f"targets/{target.name}")
        if (files("kernelgen") / folder).is_dir()
    ]
    return jinja2.Environment(
        loader=jinja2.ChoiceLoader(loaders),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        variable_start_string="${",
        variable_end_string="}",
        block_start_string="<%",
        block_end_string="%>",
        comment_start_string="<#",
        comment_end_string="#>",
        line_statement_prefix="%%",
        line_comment_prefix="%#",
        autoescape=False,  # kernels are not HTML
    )


def generate(
    op: str,
    subject: Subject,
    target: Target,
    config: Config | None = None,
    precision: str = "",
    fused: Fusion = PLAIN,
) -> Kernel:
    """Source for one kernel: deterministic in its arguments.

    `config` defaults to the walk's default for the target's assumed capabilities.
    """
    return generate_walk(target.walk(op, subject, precision), subject, target, config, fused)


def generate_walk(
    one: Walk, subject: Subject, target: Target, config: Config | None = None,
    fused: Fusion = PLAIN,
) -> Kernel:  # fmt: skip
    """Source for one kernel of a named walk, where `generate` takes the first that serves.

    Of what is fused with a product the kernel does its own part, and those that it needs theirs;
    `Kernel.normalizes` says whether any of them does the norm.
    """
    chosen = config or one.default(subject, target.capabilities)
    reason = one.pairs(chosen) if fused.epilogue and fused.epilogue.gated else None
    if reason is not None:
        raise ConfigError(f"a gated {one.op} was asked for in {_config_text(chosen)}: {reason}")
    return _render(one, subject, target, chosen, fused)


#: kernels by their hashes, in the order in which they were generated, while anybody has them
_generated: WeakValueDictionary[tuple[str, str], Kernel] = WeakValueDictionary()


def generated() -> tuple[Kernel, ...]:
    """The kernels that were generated in this process and are in use, with those that they need."""
    return tuple(_generated.values())


@functools.lru_cache(maxsize=1024)
def _render(one: Walk, subject: Subject, target: Target, config: Config, asked: Fusion) -> Kernel:
    steps = one.steps(subject, config)
    fused = one.part_of(asked)
    finish = _finish(fused, target)
    tables = _tables((steps, finish))
    # by text, as (0,) == (0.0,) == (-0.0,)
    names = {repr(values): name for name, values in tables.items()}
    parts = (one.op, subject.name, fused.name, one.precision, one.style)
    entry = target.prefix + "_".join(filter(None, parts))
    notes = tuple(f"decoded lane by lane: {r}" for r in getattr(steps, "scalar_because", ()))
    spelt = _spelling(subject.names, target.reserved | set(tables) | fused.names)

    def table_name(values: tuple[Any, ...]) -> str:
        return names[repr(values)]

    def rename(name: str) -> str:
        return spelt[name]

    context: dict[str, Any] = {
        name: (dialect.printer or Printer)(dialect, table_name, rename)
        for name, dialect in target.dialects.items()
    }
    context |= {
        f"{name}_{buffer}": (dialect.printer or Printer)(dialect, table_name, rename, buffer)
        for name, dialect in target.dialects.items()
        for buffer in one.buffers
    }
    context |= {
        "entry": entry, "fmt": subject, "steps": steps, "config": config, "notes": notes,
        "walk": one.name, "version": __version__, "tables": tables, "unit_bytes": unit_bytes,
        "name": lambda one: rename(one.name), "int_name": rename,
        "op": one.op, "precision": one.precision, "halves": _halves,
        "arguments": _arguments(one, subject, fused, spelt),
        "epilogue": fused.epilogue, "norm": fused.norm, "finish": finish,
        "features": one.features + config.features, "contract": one.contract,
        "title": _title(one, subject, fused), "config_text": _config_text(config), **target.globals,
    }  # fmt: skip
    template = environment(target).get_template(one.template)
    # the hash is of the text without itself: of all that makes this kernel what it is
    digest = hashlib.sha256(template.render(context | {"hash": ""}).encode()).hexdigest()[:16]
    source = template.render(context | {"hash": digest}).lstrip("\n")
    before = Fusion(norm=asked.norm)
    needs = {op: _needed(op, one, subject, target, before) for op in one.needs(config)}
    then = {op: _needed(op, one, subject, target, PLAIN) for op in one.then(config)}
    made = Kernel(
        target=target.name, op=one.op, subject=subject, walk=one, config=config, entry=entry,
        source=source, hash=digest, notes=notes,
        needs=needs, then=then, fused=fused,
    )  # fmt: skip
    _generated[target.name, digest] = made
    return made


def _finish(fused: Fusion, target: Target) -> tuple[tuple[tuple[str, Expr], ...], Expr] | None:
    """An epilogue's values, by name, and its result, in what the target's language has."""
    if fused.epilogue is None:
        return None

    def has(name: str) -> bool:
        return all(f"call.{name}" in dialect.words for dialect in target.dialects.values())

    return statements(in_words(fused.epilogue.value, has))


def _needed(op: str, one: Walk, subject: Subject, target: Target, fused: Fusion) -> Kernel:
    """The kernel that must run before one of this walk: of its style where there is one."""
    served = [
        w for w in target.walks if (w.op, w.precision, w.style) == (op, one.precision, one.style)
    ]
    if served:
        return generate_walk(served[0], subject, target, fused=fused)
    return generate(op, subject, target, precision=one.precision, fused=fused)


def _arguments(
    one: Walk, subject: Subject, fused: Fusion, spelt: Mapping[str, str]
) -> tuple[Argument, ...]:
    """The arguments as the source spells them: those that depend on the subject have names of its
    author's."""
    own = {a.name for a in one.operands(subject)} - {a.name for a in one.arguments}
    return tuple(
        dataclasses.replace(a, name=spelt.get(a.name, a.name)) if a.name in own else a
        for a in one.arguments_for(subject, fused)
    )


def _halves(count: int) -> list[int]:
    """count / 2, count / 4, ..., 1: the steps of a reduction by halves."""
    return [count >> n for n in range(1, count.bit_length())]


def _title(one: Walk, subject: Subject, fused: Fusion) -> str:
    with_precision = f", {one.precision} activations" if one.precision not in ("", "fp32") else ""
    norm = ", normalized" if fused.norm else ""
    ended = f", {show(fused.epilogue.value)}" if fused.epilogue else ""
    return f"{one.op} {subject.name}{with_precision}{norm}{ended}"


def _config_text(config: Config) -> str:
    values = config.as_dict()
    return ", ".join(f"{k}={v}" for k, v in values.items()) or "nothing to configure"


def _spelling(names: Iterable[str], reserved: AbstractSet[str]) -> dict[str, str]:
    """The names of a format's author as the source spells them: with an underscore where the walk
    or the language uses the name itself."""
    spelt = {name: name for name in names}
    taken = reserved | set(spelt)
    for name in spelt:
        if name in reserved:
            while spelt[name] in taken:
                spelt[name] += "_"
            taken |= {spelt[name]}
    return spelt


def _tables(steps: Any) -> dict[str, tuple[Any, ...]]:
    """The tables that the steps look into, by the name they get in the source."""
    found = {
        repr(node.attr): node.attr
        for expr in _expressions(steps)
        for node in walk(expr)
        if node.op in ("table", "lookup")
    }
    names = ["values"] if len(found) == 1 else [f"values_{n}" for n in range(len(found))]
    return dict(zip(names, found.values(), strict=True))


def _expressions(value: Any) -> Iterator[Expr]:
    """The expressions in a record, or a tuple, of expressions and other things."""
    if isinstance(value, Expr):
        yield value
    elif isinstance(value, tuple):
        for one in value:
            yield from _expressions(one)
    elif dataclasses.is_dataclass(value) and not isinstance(value, BlockFormat):
        for field in dataclasses.fields(value):
            yield from _expressions(getattr(value, field.name))


def render_index(template: str, target: Target, kernels: list[Kernel]) -> str:
    """A file that is written once for all kernels of a build, such as a header."""
    found = environment(target).get_template(template)
    text = found.render(kernels=kernels, version=__version__, **target.globals)
    return text.lstrip("\n")

"""From an op, a format, a target and a configuration to source text."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from typing import TYPE_CHECKING, Any

from kernelgen import __version__
from kernelgen.config import Config, NoConfig
from kernelgen.ir.block import BlockFormat
from kernelgen.ir.expr import Expr, walk
from kernelgen.ir.layout import unit_bytes
from kernelgen.ir.steps import scalar_steps, steps
from kernelgen.targets.base import Kernel, Printer, Target, Walk

if TYPE_CHECKING:
    import jinja2

@functools.cache
def environment(target: str) -> jinja2.Environment:
    """The template environment of a target; its own, so that no target's words leak into another.

    Delimiters are ones that no language of a target uses, and a misspelt name is an error.
    """
    import jinja2

    return jinja2.Environment(
        loader=jinja2.PackageLoader("kernelgen", f"templates/{target}"),
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
    fmt: BlockFormat,
    target: Target,
    config: Config | None = None,
    precision: str = "",
) -> Kernel:
    """Source for one kernel: deterministic in its arguments.

    `config` defaults to the walk's default for the target's assumed capabilities.
    """
    one = target.walk(op, fmt, precision)
    chosen = config or one.config.default(target.capabilities)
    return _render(one, fmt, target, chosen)


@functools.lru_cache(maxsize=1024)
def _render(one: Walk, fmt: BlockFormat, target: Target, config: Config) -> Kernel:
    per_word = steps(fmt)
    per_element = scalar_steps(fmt)
    uses_words = one.op in ("matvec", "matmul")
    context_steps: Any = per_word if uses_words else per_element
    tables = _tables(context_steps)
    names = {values: name for name, values in tables.items()}
    entry = "_".join(filter(None, ("kernelgen", one.op, fmt.name, one.precision)))
    notes = tuple(f"decoded lane by lane: {r}" for r in per_word.scalar_because) * uses_words

    def rename(name: str) -> str:
        return f"{name}_" if name in target.reserved else name

    context: dict[str, Any] = {
        name: Printer(dialect, names.__getitem__, rename) for name, dialect in target.dialects.items()
    }
    context |= {
        "entry": entry, "fmt": fmt, "steps": context_steps, "config": config, "notes": notes,
        "walk": one.name, "version": __version__, "tables": tables, "unit_bytes": unit_bytes,
        "name": lambda one: rename(one.name), "int_name": rename,
        "title": _title(one, fmt), "config_text": _config_text(config), **target.globals,
    }  # fmt: skip
    template = environment(target.name).get_template(one.template)
    # the hash is of the text without itself: of all that makes this kernel what it is
    digest = hashlib.sha256(template.render(context | {"hash": ""}).encode()).hexdigest()[:16]
    source = template.render(context | {"hash": digest}).lstrip("\n")
    repacked = getattr(config, "layout", "native") != "native"
    prepare = target.walk("prepare", fmt) if repacked else None
    return Kernel(
        target=target.name, op=one.op, format=fmt, walk=one, config=config, entry=entry,
        source=source, hash=digest, notes=notes,
        prepare=_render(prepare, fmt, target, NoConfig()) if prepare else None,
    )  # fmt: skip


def _title(one: Walk, fmt: BlockFormat) -> str:
    with_precision = f", {one.precision} activations" if one.precision == "int8" else ""
    return f"{one.op} {fmt.name}{with_precision}"


def _config_text(config: Config) -> str:
    values = config.as_dict()
    return ", ".join(f"{k}={v}" for k, v in values.items()) or "nothing to configure"


def _tables(source: Any) -> dict[str, tuple[int, ...]]:
    """The tables that the steps look into, by the name they get in the source."""
    found: list[tuple[int, ...]] = []
    for field in dataclasses.fields(source):
        value = getattr(source, field.name)
        if not isinstance(value, Expr):
            continue
        for node in walk(value):
            if node.op in ("table", "lookup") and node.attr not in found:
                found.append(node.attr)
    names = ["values"] if len(found) == 1 else [f"values_{n}" for n in range(len(found))]
    return {
        name: values + (0,) * (16 - len(values)) for name, values in zip(names, found, strict=True)
    }


def render_index(template: str, target: Target, kernels: list[Kernel]) -> str:
    """A file that is written once for all kernels of a build, such as a header."""
    found = environment(target.name).get_template(template)
    text = found.render(kernels=kernels, version=__version__, **target.globals)
    return text.lstrip("\n")

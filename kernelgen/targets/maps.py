"""What maps and row reductions take on every target: arguments of entry points, steps, arrays."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kernelgen.ir.expr import BOOL, F32, Expr, number, rebuild, transform
from kernelgen.ir.ops.rows import Kind as Kind
from kernelgen.ir.ops.rows import Reduction, Rows, per_row, result_arrays
from kernelgen.ir.ops.rows import written as written
from kernelgen.ir.ops.tensors import Output, brief, reads_of, strides_of
from kernelgen.ir.ranges import interval
from kernelgen.ir.rules import simplify
from kernelgen.targets.base import Argument

Array = npt.NDArray[Any]

#: runs a kernel: arrays that are read by name, as they lie in memory; rows; columns; arrays that
#: are written by name, C-contiguous, of integers as wide as their elements, or of float32
Apply = Callable[[Mapping[str, Array], int, int, Mapping[str, Array]], None]

SIZES = ("ROWS", "COLUMNS")


def passes_of(kind: Kind) -> tuple[tuple[Reduction, ...], ...]:
    """Reductions by pass."""
    return kind.passes if isinstance(kind, Rows) else ()


def stride_names(kind: Kind) -> tuple[str, ...]:
    """Strides that are given at the launch, after `SIZES`."""
    return tuple(name for one in kind.inputs for name in one.names)


def strides(kind: Kind, arrays: Mapping[str, Array]) -> dict[str, int]:
    """What these are for some arrays."""
    return strides_of(kind.inputs, arrays)


def arguments(
    kind: Kind, dtype: Callable[[str], str] = str, role: str = "out", size: str = "u32"
) -> tuple[Argument, ...]:
    """Arrays, then sizes; `dtype` says what a target calls the storage of elements."""
    ins = (Argument(one.name, "in", dtype(one.storage.name), ("...",)) for one in kind.inputs)
    outs = (Argument(o.name, role, dtype(stored_type(o)), SIZES) for o in kind.outputs)
    results = (
        Argument(
            o.name, role, dtype(stored_type(o)), ("ROWS",) if o.of == 1 else ("ROWS", str(o.of))
        )
        for o in result_arrays(kind)
    )
    sizes = (Argument(name, "size", size) for name in (*SIZES, *stride_names(kind)))
    return (*ins, *outs, *results, *sizes)


def stored_type(one: Output) -> str:
    """The type of what is written: an integer, but for f32."""
    return "u16" if one.storage.name == "f16" else one.storage.name


def dense(array: Array) -> Array:
    """The same elements one after the other, where an axis that repeats them has one."""
    for axis, step in enumerate(array.strides):
        if step == 0 and array.shape[axis] > 1:
            array = array.take([0], axis)
    return np.ascontiguousarray(array)


@dataclass(frozen=True)
class Let:
    """A value with a name; `kept`: the number under which it is kept for later, or None."""

    name: str
    value: Expr
    kept: int | None = None


@dataclass(frozen=True)
class Stage:
    """Expressions that are computed together.

    once     what is the same in all columns, by name
    old      what was kept of the column by an earlier stage: its name, type and number
    lets     what several expressions use, by name, in order
    values   the expressions, in these names
    """

    once: tuple[Let, ...]
    old: tuple[Let, ...]
    lets: tuple[Let, ...]
    values: tuple[Expr, ...]


@dataclass(frozen=True)
class MapSteps:
    """What a walk asks of a map or a row reduction, in its language's operations.

    passes   a stage for the reductions that one pass over a row serves
    results  of what is stored for each row, and `outputs` for each element
    kept     how many values are kept for each column
    reads    names of variables and arrays that any of these has
    """

    passes: tuple[Stage, ...]
    results: Stage
    outputs: Stage
    kept: int
    reads: frozenset[str]


class _Shared:
    """Makes stages: finds what has to have a name."""

    def __init__(self, column: frozenset[str]) -> None:
        self._column = column
        self.kept: dict[str, Let] = {}
        self._once: dict[Expr, Expr] = {}
        self._free: dict[Expr, bool] = {}

    def free(self, expr: Expr) -> bool:
        """Whether a value is the same in all columns."""
        found = self._free.get(expr)
        if found is None:
            own = expr.op != "var" or not (
                expr.attr[0] in self._column or expr.attr[0].startswith((EACH, KEPT))
            )
            found = own and all(self.free(a) for a in expr.args)
            self._free[expr] = found
        return found

    def stage(self, exprs: Sequence[Expr]) -> Stage:
        """The stage of these expressions."""
        nodes = list(_nodes(exprs, set(self.kept)))
        used: dict[Expr, int] = dict.fromkeys(exprs, 0)
        for one in exprs:
            used[one] += 1
        for node in nodes:
            for arg in () if node.op in _OPAQUE else node.args:
                # what is the same everywhere is computed before, if it takes time
                apart = self.free(arg) and not self.free(node) and arg.op in ("call", "/")
                used[arg] = used.get(arg, 0) + 1 + apart
        spelt: dict[Expr, Expr] = {}
        once: list[Let] = []
        lets: list[Let] = []
        old: list[Let] = []
        for node in nodes:
            args = node.args if node.op in _OPAQUE else tuple(spelt.get(a, a) for a in node.args)
            if node.op == "named":
                spelt[node] = self._named(node, args, old, lets)
                continue
            made = rebuild(node, args)
            if used.get(node, 0) > 1 and node.dtype is not BOOL and not _small(node):
                made = self._let(node, made, once, lets)
            spelt[node] = made
        return Stage(tuple(once), tuple(old), tuple(lets), tuple(spelt[e] for e in exprs))

    def _let(self, node: Expr, made: Expr, once: list[Let], lets: list[Let]) -> Expr:
        """What stands for a value that gets a name; what is the same in all columns keeps it."""
        if not self.free(node):
            lets.append(Let(f"{EACH}{len(lets)}", made))
            return variable(lets[-1].name, made)
        if node not in self._once:
            once.append(Let(f"same_{len(self._once)}", made))
            self._once[node] = variable(once[-1].name, made)
        return self._once[node]

    def _named(self, node: Expr, args: tuple[Expr, ...], old: list[Let], lets: list[Let]) -> Expr:
        """What stands for a value that may be kept."""
        name = f"{KEPT}{node.attr}"
        found = self.kept.get(name)
        if found is None:
            found = self.kept[name] = Let(name, args[0], len(self.kept))
            lets.append(found)
        elif found not in lets and found not in old:
            old.append(found)
        return variable(name, found.value)


#: begin the names of what each column has, and of what is kept
EACH, KEPT = "each_", "kept_"

#: what is read, whose index stays as it is
_OPAQUE = ("load", "element")


def _nodes(exprs: Sequence[Expr], known: Set[str]) -> Iterator[Expr]:
    """Every distinct node, operands first: not those of indexes, nor of what is kept already."""
    seen: set[Expr] = set()

    def visit(node: Expr) -> Iterator[Expr]:
        if node in seen:
            return
        seen.add(node)
        named = node.op == "named"
        if node.op not in _OPAQUE and not (named and f"{KEPT}{node.attr}" in known):
            for arg in node.args[:1] if named else node.args:
                yield from visit(arg)
        yield node

    for one in exprs:
        yield from visit(one)


def _small(node: Expr) -> bool:
    """Whether it is as short as a name."""
    return not node.args or (
        node.op in ("cast", "bitcast", "neg") and node.args[0].op in ("var", "const")
    )


def _plain(value: Expr) -> bool:
    """Whether a value is read as fast from where it is."""
    return value.op == "load" and value.attr.storage.name == "f32"


def variable(name: str, like: Expr) -> Expr:
    """What stands for a value under a name."""
    if like.dtype is F32:
        return number(name)
    return Expr("var", like.dtype, attr=(name, *interval(like)))


def map_steps(
    kind: Kind,
    lower: Callable[[Expr], Expr | None],
    column: frozenset[str] = frozenset({"col"}),
    *,
    keeps: bool = False,
) -> MapSteps:
    """The steps of a map or a row reduction; `lower` replaces what a language spells its way, and
    `column` names the variables that differ between columns; `keeps`: whether the walk keeps
    `named` values."""
    shared = _Shared(column)
    keeps = keeps and isinstance(kind, Rows)

    def change(node: Expr) -> Expr | None:
        if node.op == "named" and (not keeps or _plain(node.args[0])):
            return node.args[0]
        return lower(node)

    def spelt(expr: Expr) -> Expr:
        return simplify(transform(simplify(expr), change))

    passes = tuple(shared.stage([spelt(one.value) for one in some]) for some in passes_of(kind))
    results = shared.stage([spelt(one.stored) for one in per_row(kind)])
    outputs = shared.stage([spelt(one.stored) for one in kind.outputs])
    exprs = [
        e for s in (*passes, outputs, results)
        for e in (*s.values, *(one.value for one in (*s.once, *s.lets)))
    ]  # fmt: skip
    return MapSteps(passes, results, outputs, len(shared.kept), reads_of(exprs))


def about(kind: Kind) -> tuple[str, ...]:
    """Lines that say what a kernel computes, for the head of its source."""
    lines = [f"{one.name}: {one.dtype}, strides {one.strides}" for one in kind.inputs]
    for one in kind.reductions if isinstance(kind, Rows) else ():
        lines.append(f"{one.name} = {one.kind} over a row of {brief(one.value)}")
    every = (
        (f"{o.name} {o.place}" if o.of > 1 else o.name, o) for o in (*kind.outputs, *per_row(kind))
    )
    return (*lines, *(f"{name}: {o.dtype} = {brief(o.value)}" for name, o in every))


def wrapped(head: str, text: str, indent: int) -> str:
    """A statement, without its end, in lines that are short enough to read, for languages to which
    the end of a line means nothing."""
    margin = " " * indent
    lines = textwrap.wrap(
        f"{head}{text}", 98, initial_indent=margin, subsequent_indent=margin + "    ",
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip
    return "\n".join(lines)


#: what the templates may call
GLOBALS: dict[str, Any] = {
    "about": about, "passes_of": passes_of, "results_of": per_row, "stored_type": stored_type,
    "wrapped": wrapped,
}  # fmt: skip

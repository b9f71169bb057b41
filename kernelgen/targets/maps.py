"""What maps and row reductions take on every target: arguments of their entry points, and arrays."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kernelgen.ir.expr import Expr, show, transform
from kernelgen.ir.ops.maps import Map
from kernelgen.ir.ops.rows import Rows
from kernelgen.ir.ops.tensors import Output, reads_of, strides_of
from kernelgen.ir.rules import simplify
from kernelgen.targets.base import Argument

Array = npt.NDArray[Any]

Kind = Map | Rows

#: runs a kernel: arrays that are read by name, as they lie in memory; rows; columns; arrays that
#: are written by name, C-contiguous, of integers as wide as their elements, or of float32
Apply = Callable[[Mapping[str, Array], int, int, Mapping[str, Array]], None]

SIZES = ("ROWS", "COLUMNS")


def per_row(kind: Kind) -> tuple[Output, ...]:
    """What is written for each row."""
    return kind.results if isinstance(kind, Rows) else ()


def written(kind: Kind) -> tuple[Output, ...]:
    """All that is written."""
    return (*kind.outputs, *per_row(kind))


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
    results = (Argument(o.name, role, dtype(stored_type(o)), SIZES[:1]) for o in per_row(kind))
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
class MapSteps:
    """What a walk asks of a map or a row reduction, in its language's operations.

    passes   reductions that one pass over a row serves: name, kind, value, what nothing gives
    outputs  for each element: name, bytes, what is stored
    results  for each row
    reads    names of variables and arrays that any of these has
    """

    passes: tuple[tuple[tuple[str, str, Expr, Expr], ...], ...]
    outputs: tuple[tuple[str, int, Expr], ...]
    results: tuple[tuple[str, int, Expr], ...]
    reads: frozenset[str]


def map_steps(kind: Kind, lower: Callable[[Expr], Expr | None]) -> MapSteps:
    """The steps of a map or a row reduction; `lower` replaces what a language spells its way."""

    def spelt(expr: Expr) -> Expr:
        return transform(simplify(expr), lower)

    reductions = kind.passes if isinstance(kind, Rows) else ()
    passes = tuple(
        tuple((one.name, one.kind, spelt(one.value), one.start) for one in together)
        for together in reductions
    )
    outputs, results = (
        tuple((one.name, one.storage.nbytes, spelt(one.stored)) for one in some)
        for some in (kind.outputs, per_row(kind))
    )
    values = (one[2] for together in passes for one in together)
    reads = reads_of((*values, *(one[2] for one in (*outputs, *results))))
    return MapSteps(passes, outputs, results, reads)


def about(kind: Kind) -> tuple[str, ...]:
    """Lines that say what a kernel computes, for the head of its source."""
    lines = [f"{one.name}: {one.dtype}, strides {one.strides}" for one in kind.inputs]
    for one in kind.reductions if isinstance(kind, Rows) else ():
        lines.append(f"{one.name} = {one.kind} over a row of {show(one.value)}")
    lines += [f"{one.name}: {one.dtype} = {show(one.value)}" for one in written(kind)]
    return tuple(line if len(line) <= 400 else f"{line[:397]}..." for line in lines)


#: what the templates may call
GLOBALS: dict[str, Any] = {"about": about, "results_of": per_row, "stored_type": stored_type}

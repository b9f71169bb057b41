"""Row reductions: sums and extremes of each row, one after the other, and outputs made of these.

A reduction sees an element, its column, and the results of those before it.  Sums are float32 (or
i32, which wrap), in an order that a target chooses.  Extremes are those of numpy: NaN above all
other numbers, both zeros alike; of places that hold the same, the first counts.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from kernelgen.errors import ShapeError
from kernelgen.ir.evaluate import NUMPY_DTYPES, evaluate
from kernelgen.ir.expr import (
    F32,
    I32,
    Expr,
    cast,
    const,
    equal,
    maximum,
    minimum,
    named,
    where,
)
from kernelgen.ir.expr import number as f32_variable
from kernelgen.ir.floats import of_sort_key, order_key, sort_key
from kernelgen.ir.ops import functions as f
from kernelgen.ir.ops.maps import Map, flat
from kernelgen.ir.ops.tensors import (
    COL,
    COLUMNS,
    ROW,
    Output,
    Tensor,
    check_names,
    digest,
    reads_of,
    strides_of,
)

Array = npt.NDArray[Any]

LEAST, MOST = -(2**31), 2**31 - 1

#: kinds of reductions of two values, and what they begin with
KINDS = ("sum", "max", "min")
_START = {"sum": 0, "max": LEAST, "min": MOST}


@dataclass(frozen=True)
class Reduction:
    """One value of a row: of `value` at each column.  Sums are f32 or i32, extremes i32: those of
    floats are of their `sort_key`."""

    name: str
    kind: str
    value: Expr

    def __post_init__(self) -> None:
        allowed = (F32, I32) if self.kind == "sum" else (I32,)
        if self.kind not in KINDS or self.value.dtype not in allowed:
            raise ShapeError(
                f"a {self.kind} of {self.value.dtype.value} was asked for; there are sums of f32"
                " and i32, and max and min of i32"
            )

    @property
    def start(self) -> Expr:
        """What nothing gives."""
        return const(_START[self.kind], self.value.dtype)

    @property
    def result(self) -> Expr:
        """The variable that stands for the result."""
        if self.value.dtype is F32:
            return f32_variable(self.name)
        return Expr("var", I32, attr=(self.name, LEAST, MOST))

    def join(self, a: Expr, b: Expr) -> Expr:
        """Two values as one."""
        return {"sum": lambda: a + b, "max": lambda: maximum(a, b), "min": lambda: minimum(a, b)}[
            self.kind
        ]()


@dataclass(frozen=True)
class Rows:
    """A row reduction, all that a kernel is specialized for.

    inputs      arrays that expressions read
    reductions  in their order; a value may use results of those before it
    outputs     for each element, (ROWS, COLUMNS), in ROW, COL, inputs and results
    results     for each row, (ROWS,) or (ROWS, `of`), in ROW, inputs and results
    label       what it is called in names; a hash of the expressions always follows

    A `named` node is a value that a walk may compute once for each element and keep until later.
    """

    inputs: tuple[Tensor, ...]
    reductions: tuple[Reduction, ...]
    outputs: tuple[Output, ...] = ()
    results: tuple[Output, ...] = ()
    label: str = field(default="rows")

    def __post_init__(self) -> None:
        if not (self.outputs or self.results) or not self.reductions:
            raise ShapeError(
                f"{len(self.reductions)} reductions and {len(self.outputs + self.results)} outputs"
                " were given; a row reduction needs one of each at least"
            )
        names = [*(o.name for o in written(self)), *(r.name for r in self.reductions)]
        check_names(self.inputs, names)
        if "col" in reads_of(o.value for o in self.results):
            raise ShapeError("a result of a whole row was made of single elements; reduce them")

    @property
    def name(self) -> str:
        """What it is called in names of kernels and files."""
        stored = (*self.outputs, *self.results)
        kinds = (*(i.dtype for i in self.inputs), *(o.dtype for o in stored))
        types = "_".join(dict.fromkeys(kinds))
        parts: list[object] = [(i.name, i.dtype, i.strides) for i in self.inputs]
        parts += [x for r in self.reductions for x in (r.name, r.kind, r.value)]
        parts += [x for o in stored for x in (o.name, o.dtype, o.value, o.place)]
        return f"{self.label}_{types}_{digest(len(self.outputs), *parts)}"

    @property
    def names(self) -> tuple[str, ...]:
        """Names that its author chose, of arrays."""
        return tuple(
            dict.fromkeys((*(i.name for i in self.inputs), *(o.name for o in written(self))))
        )

    @property
    def passes(self) -> tuple[tuple[Reduction, ...], ...]:
        """Reductions that one pass over a row serves: none needs another of the same pass."""
        found: list[list[Reduction]] = []
        for one in self.reductions:
            here = {r.name for r in found[-1]} if found else set()
            if found and not here & reads_of([one.value]):
                found[-1].append(one)
            else:
                found.append([one])
        return tuple(tuple(one) for one in found)


Kind = Map | Rows


def per_row(kind: Kind) -> tuple[Output, ...]:
    """What is written for each row."""
    return kind.results if isinstance(kind, Rows) else ()


def result_arrays(kind: Kind) -> tuple[Output, ...]:
    """Arrays that are written for each row: of results that share one, the first."""
    return tuple(one for one in per_row(kind) if one.place == 0)


def written(kind: Kind) -> tuple[Output, ...]:
    """Arrays that are written: of outputs, then of results."""
    return (*kind.outputs, *result_arrays(kind))


class Row:
    """Collects reductions: each method adds one, and gives what stands for its result."""

    def __init__(self) -> None:
        self.reductions: list[Reduction] = []

    def _add(self, kind: str, value: Expr, name: str) -> Expr:
        taken = {one.name for one in self.reductions}
        number = len(taken)
        made = Reduction(name if name not in taken else f"{name}_{number}", kind, value)
        self.reductions.append(made)
        return made.result

    def sum(self, value: Expr, name: str = "total") -> Expr:
        """The sum."""
        return self._add("sum", value, name)

    def mean(self, value: Expr, name: str = "total") -> Expr:
        """The mean, f32."""
        return self.sum(f.number(value), name) / cast(F32, COLUMNS)

    def max(self, value: Expr, name: str = "largest") -> Expr:
        """The largest value."""
        if value.dtype is F32:
            return of_sort_key(self._add("max", order_key(value), name))
        return self._add("max", cast(I32, value), name)

    def min(self, value: Expr, name: str = "smallest") -> Expr:
        """The smallest value; NaN where one is, as numpy says, through the largest opposite."""
        if value.dtype is F32:
            return -self.max(-value, name)
        return self._add("min", cast(I32, value), name)

    def first(self, condition: Expr, name: str = "place") -> Expr:
        """The first column where a condition holds."""
        return self._add("min", where(condition, COL, MOST), name)

    def done(
        self,
        inputs: tuple[Tensor, ...],
        outputs: tuple[Output, ...] = (),
        results: tuple[Output, ...] = (),
        label: str = "rows",
    ) -> Rows:
        """All of it."""
        return Rows(inputs, tuple(self.reductions), outputs, results, label)


def evaluate_rows(
    kind: Rows, arrays: Mapping[str, Array], rows: int, columns: int
) -> dict[str, Array]:
    """What outputs (rows, columns) and results (rows,) store, as `evaluate_map` gives it; sums of
    floats in double precision, rounded once."""
    fields = {one.name: flat(arrays[one.name]) for one in kind.inputs}
    known: dict[str, Any] = {"COLUMNS": columns, **strides_of(kind.inputs, arrays)}
    known |= {"row": np.repeat(np.arange(rows), columns), "col": np.tile(np.arange(columns), rows)}

    def whole(expr: Expr) -> Array:
        return np.broadcast_to(evaluate(expr, known, fields).reshape(-1), rows * columns).reshape(
            rows, columns
        )

    per_row: dict[str, Array] = {}
    for one in kind.reductions:
        values = whole(one.value)
        kept = NUMPY_DTYPES[one.value.dtype]
        if one.kind == "sum":
            wide = np.float64 if one.value.dtype is F32 else np.int64
            found = values.sum(axis=1, dtype=wide).astype(kept)
        else:
            pick = np.max if one.kind == "max" else np.min
            found = pick(values, axis=1, initial=_START[one.kind]).astype(kept)
        per_row[one.name] = found
        known[one.name] = np.repeat(found, columns)
    result = {one.name: whole(one.stored) for one in kind.outputs}
    parts: dict[str, list[Array]] = {}
    known |= per_row | {"row": np.arange(rows), "col": np.zeros(rows, np.int32)}
    for out in kind.results:
        value = evaluate(out.stored, known, fields).reshape(-1)
        parts.setdefault(out.name, []).append(np.broadcast_to(value, rows))
    result |= {k: p[0] if len(p) == 1 else np.stack(p, axis=-1) for k, p in parts.items()}
    return result


# ---- row reductions in wide use ----------------------------------------------------------------


def softmax(
    x: Tensor,
    *,
    dtype: str = "f32",
    scale: float = 1.0,
    mask: Tensor | None = None,
    sinks: Tensor | None = None,
) -> Rows:
    """exp(scale * x) / sum(exp(scale * x)) of each row, relative to its largest.

    mask   floats that are added to scaled scores, or integers: those that are 0 take part in
           nothing
    sinks  (rows,): a score that takes part in the sum and gives no output
    A row without a number above -inf gives NaN, as it does in numpy.
    """
    row = Row()
    score = f.number(x[ROW, COL])
    if scale != 1.0:
        score = score * scale
    if mask is not None:
        there = mask[ROW, COL]
        score = score + there if there.dtype is F32 else where(f.nonzero(there), score, _NOTHING)
    largest = row.max(score)
    own = None
    if sinks is not None:
        own = f.number(sinks[ROW])
        largest = of_sort_key(maximum(order_key(largest), order_key(own)))
    weight = named("weight", f.exp(score - largest), COL)
    total = row.sum(weight)
    if own is not None:
        total = total + f.exp(own - largest)
    inputs = tuple(one for one in (x, mask, sinks) if one is not None)
    return row.done(inputs, (Output("out", dtype, weight * (1.0 / total)),), label="softmax")


_NOTHING = float("-inf")


def _summed(x: Tensor, residual: Tensor | None) -> Expr:
    """The elements that a norm is of: of x, or of x + residual, kept for later."""
    value = f.number(x[ROW, COL])
    if residual is not None:
        value = value + f.number(residual[ROW, COL])
    return named("element", value, COL)


def _norm_outputs(value: Expr, element: Expr, dtype: str, residual: Tensor | None) -> tuple[
    Output, ...
]:  # fmt: skip
    out = Output("out", dtype, value)
    return (out,) if residual is None else (out, Output("sum", dtype, element))


@functools.lru_cache(maxsize=256)
def rms_norm(
    x: Tensor,
    weight: Tensor | None = None,
    *,
    eps: float = 1e-6,
    residual: Tensor | None = None,
    dtype: str = "f32",
) -> Rows:
    """x / sqrt(mean(x^2) + eps) * weight (Zhang and Sennrich, 2019); of x + residual where there is
    one, which is a second output then."""
    row = Row()
    element = _summed(x, residual)
    factor = f.rsqrt(row.mean(element * element, "squares") + eps)
    value = element * factor
    if weight is not None:
        value = value * f.number(weight[COL])
    inputs = tuple(one for one in (x, weight, residual) if one is not None)
    return row.done(inputs, _norm_outputs(value, element, dtype, residual), label="rms_norm")


@functools.lru_cache(maxsize=256)
def layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    dtype: str = "f32",
) -> Rows:
    """(x - mean) / sqrt(variance + eps) * weight + bias (Ba, Kiros, Hinton, 2016); of x + residual
    where there is one, which is a second output then."""
    row = Row()
    element = _summed(x, residual)
    mean = row.mean(element)
    away = element - mean
    value = away * f.rsqrt(row.mean(away * away, "squares") + eps)
    if weight is not None:
        value = value * f.number(weight[COL])
    if bias is not None:
        value = value + f.number(bias[COL])
    inputs = tuple(one for one in (x, weight, bias, residual) if one is not None)
    return row.done(inputs, _norm_outputs(value, element, dtype, residual), label="layer_norm")


def row_sum(x: Tensor, *, dtype: str = "f32") -> Rows:
    """The sum of each row."""
    row = Row()
    value = x[ROW, COL]
    found = row.sum(value if value.dtype in (F32, I32) else f.number(value))
    return row.done((x,), results=(Output("out", dtype, found),), label="sum")


def row_max(x: Tensor, *, dtype: str = "f32") -> Rows:
    """The largest element of each row."""
    row = Row()
    return row.done((x,), results=(Output("out", dtype, row.max(x[ROW, COL])),), label="max")


def row_min(x: Tensor, *, dtype: str = "f32") -> Rows:
    """The smallest element of each row."""
    row = Row()
    return row.done((x,), results=(Output("out", dtype, row.min(x[ROW, COL])),), label="min")


def argmax(x: Tensor) -> Rows:
    """The column of the largest element of each row, i32: the first of several, of NaN where there
    is one."""
    row = Row()
    key = named("key", _key(x[ROW, COL]), COL)
    best = row._add("max", key, "largest")
    place = row.first(equal(key, best))
    return row.done((x,), results=(Output("out", "i32", place),), label="argmax")


def _key(value: Expr) -> Expr:
    return sort_key(value) if value.dtype is F32 else cast(I32, value)


def topk(x: Tensor, count: int, *, dtype: str = "f32") -> Rows:
    """The `count` largest elements of each row and their columns, i32, from the largest down: a
    pass for each, and one for its place, so it is for few.  Of equal ones the first comes first.

    A row has `count` columns at least.  Results are `largest` and `places`, (rows, count).
    """
    row = Row()
    value = x[ROW, COL]
    key = named("key", _key(value), COL)
    results: list[Output] = []
    left: Expr | None = None
    for n in range(count):
        best = row._add("max", key if left is None else where(left, key, LEAST), f"best{n}")
        here = equal(key, best) if left is None else equal(key, best) & left
        place = row.first(here, f"at{n}")
        found = of_sort_key(best) if value.dtype is F32 else best
        results.append(Output("largest", dtype, found, n, count))
        results.append(Output("places", "i32", place, n, count))
        left = (key < best) | (equal(key, best) & (place < COL))
    return row.done((x,), results=tuple(results), label=f"top{count}")

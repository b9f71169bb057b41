"""Runs maps and row reductions against the numpy reference: what `kernelgen verify --op map` and
`--op rows` do."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from kernelgen.errors import KernelgenError
from kernelgen.generate import generate_walk
from kernelgen.ir.ops import library
from kernelgen.ir.ops.library import Kind
from kernelgen.ir.ops.rows import written
from kernelgen.ir.ops.samples import (
    columns,
    converts,
    numbers_of,
    poisoned,
    raw_type,
    reference,
    sample,
    tolerance,
    unit,
    values,
)
from kernelgen.ir.ops.tensors import Output
from kernelgen.problem import relative_error
from kernelgen.targets.base import Runtime, Target, Walk
from kernelgen.verify import Result

Array = npt.NDArray[Any]

#: ops of this module
OPS = ("map", "rows")

#: rows and columns: one element, few and odd, a model's width, a vocabulary
SHAPES = ((1, 1), (3, 7), (5, 33), (2, 4096), (1, 32000))


def verify(
    target: Target,
    ops: Iterable[str] = OPS,
    *,
    runtime: Runtime | None = None,
    dtypes: Iterable[str] = library.DTYPES,
    shapes: Iterable[tuple[int, int]] = SHAPES,
) -> Iterator[Result]:
    """Run the library on a target, for elements of these types."""
    reach = runtime or target.runtime()
    for op in ops:
        for kind in library.kinds(op, tuple(dtypes)):
            for one in (w for w in target.walks if w.op == op):
                if one.accepts(kind) is None:
                    yield _one(target, reach, one, kind, tuple(shapes))


def _one(
    target: Target, runtime: Runtime, one: Walk, kind: Kind, shapes: tuple[tuple[int, int], ...]
) -> Result:
    errors: list[float] = []
    problem = None
    bound = tolerance(kind)
    config = one.default(kind, runtime.capabilities())
    try:
        run = runtime.apply(generate_walk(one, kind, target, config))
        for m, n in shapes:
            errors.append(check(run, kind, m, columns(kind, n)))
        if converts(kind):
            numbers = numbers_of(kind.inputs[0].dtype)
            wrong = wrong_conversions(run, kind, numbers)
            errors.append(0.0 if not wrong else float("inf"))
            if wrong:
                problem = f"{wrong} of {numbers.size} numbers are converted wrongly"
        if problem is None and max(errors) > bound:
            problem = f"error {max(errors):.3g} exceeds {bound:.3g}"
    except KernelgenError as error:
        problem = str(error)
    return Result(
        target.name, one.op, kind.name, "", runtime.how(), config.as_dict(), len(errors),
        max(errors, default=float("inf")), bound, None, None, problem,
    )  # fmt: skip


def check(run: Any, kind: Kind, m: int, n: int) -> float:
    """Largest error of the outputs for rows of that size, relative to the largest number of
    each."""
    rng = np.random.default_rng(1000 * m + n)
    arrays = {one.name: sample(one, m, n, rng) for one in kind.inputs}
    found = poisoned(kind, m, n)
    run(arrays, m, n, found)
    stored = reference(kind, arrays, m, n)

    def error(one: Output) -> float:
        want = values(one, stored[one.name])
        return relative_error(values(one, found[one.name]), want, unit(want))

    return max(map(error, written(kind)))


def wrong_conversions(run: Any, kind: Kind, numbers: Array) -> int:
    """How many of these numbers do not become what they should, to the bit; NaN is NaN."""
    arrays = {kind.inputs[0].name: numbers.reshape(1, -1)}
    found, want = poisoned(kind, 1, numbers.size), reference(kind, arrays, 1, numbers.size)
    run(arrays, 1, numbers.size, found)
    (one,) = kind.outputs
    got, right = found[one.name], want[one.name].astype(raw_type(one))
    same = np.isnan(values(one, got)) & np.isnan(values(one, right))
    width = f"u{one.storage.nbytes}"
    return int(np.count_nonzero((got.view(width) != right.view(width)) & ~same))

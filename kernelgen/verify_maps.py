"""Runs maps and row reductions against the numpy reference: what `kernelgen verify --op map` and
`--op rows` do."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from kernelgen.errors import KernelgenError
from kernelgen.generate import generate_walk
from kernelgen.ir.evaluate import evaluate
from kernelgen.ir.expr import U32, var
from kernelgen.ir.floats import FLOATS
from kernelgen.ir.ops import library, rope
from kernelgen.ir.ops.maps import Map, evaluate_map
from kernelgen.ir.ops.rows import Rows, evaluate_rows
from kernelgen.ir.ops.tensors import STORED, Output, Tensor
from kernelgen.problem import relative_error
from kernelgen.targets.base import Runtime, Target, Walk
from kernelgen.targets.maps import written
from kernelgen.verify import Result

Array = npt.NDArray[Any]
Kind = Map | Rows

#: ops of this module
OPS = ("map", "rows")

#: types of elements
DTYPES = ("f32", "f16", "bf16")

#: rows and columns: one element, few and odd, a model's width, a vocabulary
SHAPES = ((1, 1), (3, 7), (5, 33), (2, 4096), (1, 32000))

_RAW: dict[int, npt.DTypeLike] = {1: np.uint8, 2: np.uint16, 4: np.uint32}


def tolerance(kind: Kind) -> float:
    """Largest `relative_error` of a map or row reduction against the reference.

    Functions of f32 are off by a few units in the last place, sums by as many as there are levels
    of them.  The error is relative to the root mean square, and the largest of 32000 weights of a
    softmax may be a hundred times that.  A result of fewer bits may come out as its neighbour.
    """
    steps = {"f16": 2.0**-10, "bf16": 2.0**-7, "f8_e4m3": 2.0**-3, "f8_e5m2": 2.0**-2}
    return max(2e-5, *(8 * steps.get(one.dtype, 0.0) for one in written(kind)))


def raw_type(one: Output) -> npt.DTypeLike:
    """The numpy type of what is stored."""
    integers = {"i8": np.int8, "i16": np.int16, "i32": np.int32}
    if one.dtype == "f32":
        return np.float32
    return integers.get(one.dtype, _RAW[one.storage.nbytes])


def values(one: Output, stored: Array) -> Array:
    """What is stored, as float64."""
    if one.dtype not in FLOATS:
        return stored.astype(raw_type(one)).astype(np.float64)
    bits = var("bits", 1 << 32, U32)
    known = {"bits": stored.reshape(-1).astype(np.uint32)}
    return evaluate(FLOATS[one.dtype].decode(bits), known).reshape(stored.shape).astype(np.float64)


def sample(one: Tensor, m: int, n: int, rng: np.random.Generator) -> Array:
    """Elements as they lie in memory, in rows with a gap behind each."""
    storage = STORED[one.dtype]
    if one.name == "positions":
        return rng.integers(0, 1 << 20, m).astype(np.int32)
    if one.name in ("turns", "rest"):
        return rope.turns(rope.frequencies(library.HEAD_DIM))[one.name == "rest"]
    size = {"sinks": (m,), "weight": (n,), "bias": (n,)}.get(one.name, (m, n + 3))
    normal = (3 * rng.standard_normal(size)).astype(np.float32)
    if one.dtype == "f32":
        found: Array = normal
    elif one.dtype == "f16":
        found = normal.astype(np.float16)
    elif one.dtype == "bf16":
        found = (normal.view(np.uint32) >> 16).astype(np.uint16)
    elif one.dtype == "bool":
        found = (normal > -2).astype(np.uint8)
    else:
        found = rng.integers(storage.lo, storage.hi, size).astype(_RAW[storage.nbytes])
    return found[:, :n] if found.ndim == 2 else found


def verify(
    target: Target,
    ops: Iterable[str] = OPS,
    *,
    runtime: Runtime | None = None,
    dtypes: Iterable[str] = DTYPES,
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
            # the library's rotary positions are of one head size, top-k takes as many columns
            width = library.HEAD_DIM if kind.label.startswith("rope") else n
            errors.append(check(run, kind, m, max(width, 8 if kind.label == "top8" else 1)))
        if max(errors) > bound:
            problem = f"error {max(errors):.3g} exceeds {bound:.3g}"
    except KernelgenError as error:
        problem = str(error)
    return Result(
        target.name, one.op, kind.name, "", runtime.how(), config.as_dict(), len(errors),
        max(errors, default=float("inf")), bound, None, None, problem,
    )  # fmt: skip


def check(run: Any, kind: Kind, m: int, n: int) -> float:
    """Largest `relative_error` of the outputs for rows of that size."""
    rng = np.random.default_rng(1000 * m + n)
    arrays = {one.name: sample(one, m, n, rng) for one in kind.inputs}
    found = poisoned(kind, m, n)
    run(arrays, m, n, found)
    want = reference(kind, arrays, m, n)
    return max(
        relative_error(values(one, found[one.name]), values(one, want[one.name]))
        for one in written(kind)
    )


def poisoned(kind: Kind, m: int, n: int) -> dict[str, Array]:
    """Arrays for the results, of bytes that make NaNs, so that what is not written is seen."""
    result: dict[str, Array] = {}
    for one in written(kind):
        size = (m, n) if one in kind.outputs else (m,) if one.of == 1 else (m, one.of)
        raw = np.full(math.prod(size) * one.storage.nbytes, 0xFF, np.uint8)
        result[one.name] = raw.view(raw_type(one)).reshape(size)
    return result


def reference(kind: Kind, arrays: Mapping[str, Array], m: int, n: int) -> dict[str, Array]:
    """What is stored, by `kernelgen.ir.evaluate`."""
    if isinstance(kind, Map):
        return evaluate_map(kind, arrays, m, n)
    return evaluate_rows(kind, arrays, m, n)

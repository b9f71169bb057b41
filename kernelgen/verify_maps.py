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
    Conversions have one right result.
    """
    if converts(kind):
        return 0.0
    steps = {"f16": 2.0**-10, "bf16": 2.0**-7, "f8_e4m3": 2.0**-3, "f8_e5m2": 2.0**-2}
    return max(2e-5, *(8 * steps.get(one.dtype, 0.0) for one in written(kind)))


def converts(kind: Kind) -> bool:
    """Whether it is a conversion alone."""
    return kind.label.startswith("cast_")


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
    """Elements as they lie in memory, in rows an odd number of elements apart."""
    storage = STORED[one.dtype]
    if one.name == "positions":
        return rng.integers(0, 1 << 20, m).astype(np.int32)
    if one.name in ("turns", "rest"):
        return rope.turns(rope.frequencies(library.HEAD_DIM))[one.name == "rest"]
    odd = (n | 1) + 2
    size = {"sinks": (m,), "weight": (n,), "bias": (n,)}.get(one.name, (m, odd))
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


def numbers_of(dtype: str) -> Array:
    """Numbers of a type, as they lie in memory: all where it has 16 bits or fewer.  Of f32 those
    next to numbers of fewer bits and to what lies halfway between two, and random ones."""
    if dtype != "f32":
        every = np.arange(1 << FLOATS[dtype].width, dtype=_RAW[STORED[dtype].nbytes])
        return every.view(np.float16) if dtype == "f16" else every
    top = np.arange(1 << 16, dtype=np.uint32) << 16
    near: list[Array] = [top + np.uint32(d) for d in (0, 0x7FFF, 0x8000, 0x8001)]
    half = np.arange(0x33000000, 0x48000000, 1 << 12, dtype=np.uint32)  # where float16 lies
    near += [half, half + np.uint32(1), half - np.uint32(1), half | np.uint32(1 << 31)]
    near.append(np.random.default_rng(1).integers(0, 1 << 32, 1 << 16, np.uint32))
    return np.concatenate(near).view(np.float32)


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

"""Inputs to try maps and row reductions on, and what these should give."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from kernelgen.ir.evaluate import evaluate
from kernelgen.ir.expr import U32, var
from kernelgen.ir.floats import FLOATS
from kernelgen.ir.ops import library, rope
from kernelgen.ir.ops.library import Kind
from kernelgen.ir.ops.maps import Map, evaluate_map
from kernelgen.ir.ops.rows import evaluate_rows, written
from kernelgen.ir.ops.tensors import STORED, Output, Tensor

Array = npt.NDArray[Any]

_RAW: dict[int, npt.DTypeLike] = {1: np.uint8, 2: np.uint16, 4: np.uint32}


#: largest errors of results of few bits: one unit in the last place of the largest, as a result
#: may come out as its neighbour
_ALLOWED = {"f16": 2.0**-10, "bf16": 2.0**-7, "f8_e4m3": 2.0**-3, "f8_e5m2": 2.0**-2}


def tolerance(kind: Kind) -> float:
    """Largest error that a map or row reduction may have, in units of `unit`.

    Functions of f32 are off by a few units in the last place, sums by as many as there are levels
    of them.  Conversions have one right result.
    """
    if converts(kind):
        return 0.0
    return max(_ALLOWED.get(one.dtype, 2e-6) for one in written(kind))


def unit(want: Array) -> float:
    """What errors are measured in: the largest number.  One weight of a softmax may be all of its
    row, and most next to nothing, so that a root mean square says little."""
    return float(np.abs(want).max(initial=0, where=np.isfinite(want)))


def converts(kind: Kind) -> bool:
    """Whether it is a conversion alone."""
    return kind.label.startswith("cast_")


def columns(kind: Kind, n: int) -> int:
    """Columns that one of the library takes, where n are wanted: rotary positions are those of one
    size of heads, and the largest of a row must be there."""
    if kind.label.startswith("rope"):
        return library.HEAD_DIM
    return max(n, library.LARGEST if kind.label.startswith("top") else 1)


# ---- inputs ------------------------------------------------------------------------------------


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


# ---- results -----------------------------------------------------------------------------------


def raw_type(one: Output) -> npt.DTypeLike:
    """The numpy type of what is stored."""
    integers = {"i8": np.int8, "i16": np.int16, "i32": np.int32}
    if one.dtype == "f32":
        return np.float32
    return integers.get(one.dtype, _RAW[one.storage.nbytes])


def values(one: Output, stored: Array) -> Array:
    """What is stored, as float64."""
    if one.dtype not in FLOATS:
        with np.errstate(invalid="ignore"):  # a signalling NaN makes a conversion warn
            return stored.astype(raw_type(one)).astype(np.float64)
    bits = var("bits", 1 << 32, U32)
    known = {"bits": stored.reshape(-1).astype(np.uint32)}
    return evaluate(FLOATS[one.dtype].decode(bits), known).reshape(stored.shape).astype(np.float64)


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

"""Maps: outputs that are computed element by element, at (row, column), from arrays that are read
at any index.  So element by element arithmetic, broadcasts, permutations, casts and rotary
positions are all maps.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from kernelgen.errors import ShapeError
from kernelgen.ir.evaluate import evaluate
from kernelgen.ir.expr import U32, Expr, cast, equal, minimum, where
from kernelgen.ir.ops import functions as f
from kernelgen.ir.ops.tensors import (
    COL,
    ROW,
    Output,
    Tensor,
    check_names,
    digest,
    strides_of,
)

Array = npt.NDArray[Any]

#: elements of an output that a reference computes at a time
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Map:
    """A map, all that a kernel is specialized for.

    inputs    arrays that the outputs' expressions read
    outputs   (ROWS, COLUMNS), C-contiguous; their values are in ROW, COL and inputs
    label     what it is called in names; a hash of the expressions always follows
    """

    inputs: tuple[Tensor, ...]
    outputs: tuple[Output, ...]
    label: str = field(default="map")

    def __post_init__(self) -> None:
        if not self.outputs:
            raise ShapeError("a map without outputs was given; it needs one at least")
        check_names(self.inputs, (one.name for one in self.outputs))

    @property
    def name(self) -> str:
        """What it is called in names of kernels and files."""
        kinds = (*(i.dtype for i in self.inputs), *(o.dtype for o in self.outputs))
        types = "_".join(dict.fromkeys(kinds))
        parts = ((i.name, i.dtype, i.strides) for i in self.inputs)
        values = (x for o in self.outputs for x in (o.name, o.dtype, o.value))
        return f"{self.label}_{types}_{digest(*parts, *values)}"

    @property
    def names(self) -> tuple[str, ...]:
        """Names that its author chose."""
        return (*(i.name for i in self.inputs), *(o.name for o in self.outputs))


def evaluate_map(
    kind: Map, arrays: Mapping[str, Array], rows: int, columns: int
) -> dict[str, Array]:
    """What the outputs store, (rows, columns), by name: integers of which the lowest bits count, or
    float32.  `arrays` hold elements as they lie in memory (16 bits of bf16 as uint16, ...)."""
    strides = strides_of(kind.inputs, arrays)
    fields = {one.name: flat(arrays[one.name]) for one in kind.inputs}
    found: dict[str, list[Array]] = {one.name: [] for one in kind.outputs}
    step = max(1, _CHUNK // max(1, columns))
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        row = np.repeat(np.arange(start, stop), columns)
        col = np.tile(np.arange(columns), stop - start)
        known = {"row": row, "col": col, "COLUMNS": columns, **strides}
        for one in kind.outputs:
            value = evaluate(one.stored, known, fields)
            full = np.broadcast_to(value.reshape(-1), row.shape)
            found[one.name].append(full.reshape(stop - start, columns))
    return {name: np.concatenate(parts) for name, parts in found.items()}


def flat(array: Array) -> Array:
    """All elements that an array's strides reach from its first one; they must not be negative."""
    if not array.size:
        return np.zeros(1, array.dtype)
    reach = 1 + sum((n - 1) * abs(s) for n, s in zip(array.shape, array.strides, strict=True))
    count = -(-reach // array.itemsize)
    return np.lib.stride_tricks.as_strided(array, (count,), (array.itemsize,))


# ---- maps in wide use --------------------------------------------------------------------------

#: gives an expression, or a tuple of them
Function = Callable[..., Any]


def trace(
    function: Function, inputs: tuple[Tensor, ...], dtypes: tuple[str, ...], label: str = "map"
) -> Map:
    """A Python function of elements as a map: function(element of each input) gives one element,
    or a tuple of them, of these types."""
    elements = [one[ROW, COL] for one in inputs]
    result = function(*elements)
    values = result if isinstance(result, tuple) else (result,)
    if len(values) != len(dtypes):
        raise ShapeError(
            f"the function gave {len(values)} values for outputs of {', '.join(dtypes)}"
        )
    exprs = [v if isinstance(v, Expr) else f.number(v) for v in values]
    taken = {one.name for one in inputs}
    stem = "out" if "out" not in taken else "result"
    names = [stem if len(values) == 1 else f"{stem}{n}" for n in range(len(values))]
    outputs = map(Output, names, dtypes, exprs)
    return Map(inputs, tuple(outputs), label)


@functools.lru_cache(maxsize=256)
def rotated(
    x: Tensor,
    positions: Tensor,
    turns: Tensor,
    rest: Tensor,
    *,
    dims: int,
    neighbours: bool = False,
    magnitude: float = 1.0,
    dtype: str = "f32",
    label: str = "rope",
) -> Map:
    """Rotary positions (Su et al., 2021): pairs of the first `dims` elements of each column vector
    turn by an angle that grows with the position.  Others are copied.

    x          (rows, elements)
    positions  (rows), i32, 0 and above
    turns, rest  (dims / 2), u32: how far a pair turns from one position to the next, in 2^-32 of a
               turn, and what this lacks, in 2^-48 of a turn, below 2^16.  With these an angle is
               off by position * 2^-49 + 2^-32 of a turn at most
    neighbours whether pairs are elements 2i and 2i + 1; else they are i and i + dims / 2
    magnitude  of sine and cosine
    """
    half = dims // 2
    inside = minimum(COL, dims - 1)  # those beyond are not turned, and read what is there
    if neighbours:
        pair, first = inside >> 1, equal(inside & 1, 0)
        partner = where(first, inside + 1, inside - 1)
    else:
        first = inside < half
        pair = where(first, inside, inside - half)
        partner = where(first, inside + half, inside - half)
    position = positions[ROW]
    high, low = turns[pair], rest[pair]
    p = cast(U32, position)
    phase = p * high + (p >> 16) * low + (((p & 0xFFFF) * low) >> 16)
    sine, cosine = f.sin_cos_of_turns(phase)
    own, other = f.number(x[ROW, COL]), f.number(x[ROW, partner])
    signed = where(first, -(other * sine), other * sine)
    turned = (own * cosine + signed) * magnitude
    value = where(COL < dims, turned, own)
    return Map((x, positions, turns, rest), (Output("out", dtype, value),), label)

"""Maps and row reductions that are built, listed and verified without being asked for, by name."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

from kernelgen.errors import ShapeError
from kernelgen.ir.expr import Expr
from kernelgen.ir.ops import functions as f
from kernelgen.ir.ops import maps, rows
from kernelgen.ir.ops.maps import Map
from kernelgen.ir.ops.rows import Kind as Kind
from kernelgen.ir.ops.tensors import Tensor

#: types of elements that it is for
DTYPES = ("f32", "f16", "bf16")

#: elements of a head whose rotary positions are in the library, and how many largest elements
HEAD_DIM, LARGEST = 128, 8


def matrix(name: str, dtype: str = "f32") -> Tensor:
    """An array (rows, columns) whose rows may lie apart."""
    return Tensor(name, dtype, (f"{name}_row", 1))


def one_row(name: str, dtype: str = "f32") -> Tensor:
    """An array (1, columns)."""
    return Tensor(name, dtype, (0, 1))


def of_columns(name: str, dtype: str = "f32") -> Tensor:
    """An array (columns,) that all rows share."""
    return Tensor(name, dtype, (1,))


def of_rows(name: str, dtype: str = "f32") -> Tensor:
    """An array (rows,), whose elements may lie apart."""
    return Tensor(name, dtype, (f"{name}_row",))


@dataclass(frozen=True)
class _Each:
    """A function of single elements of arrays; `to`: the type of what it gives, "" for theirs."""

    label: str
    function: Callable[..., Expr]
    names: tuple[str, ...] = ("x",)
    to: str = ""

    def __call__(self, dtype: str, array: Callable[[str, str], Tensor] = matrix) -> Kind:
        inputs = tuple(array(name, dtype) for name in self.names)
        return maps.trace(self.function, inputs, (self.to or dtype,), self.label)


def _cast(to: str) -> _Each:
    return _Each(f"cast_{to}", lambda x: x, to=to)


def _rope(neighbours: bool) -> Callable[[str], Kind]:
    label = "rope_neighbours" if neighbours else "rope"

    def make(dtype: str) -> Kind:
        turns, rest = of_columns("turns", "u32"), of_columns("rest", "u32")
        return maps.rotated(
            matrix("x", dtype), of_rows("positions", "i32"), turns, rest, dims=HEAD_DIM,
            neighbours=neighbours, dtype=dtype, label=label,
        )  # fmt: skip

    return make


def _norm(residual: bool) -> Callable[[str], Kind]:
    def make(dtype: str) -> Kind:
        other = matrix("residual", dtype) if residual else None
        return rows.rms_norm(
            matrix("x", dtype), of_columns("weight", dtype), residual=other, dtype=dtype
        )

    return make


_EACH = (
    _Each("add", lambda x, y: x + y, ("x", "y")),
    _Each("mul", lambda x, y: x * y, ("x", "y")),
    _Each("relu", f.relu),
    _Each("sigmoid", f.sigmoid),
    _Each("tanh", f.tanh),
    _Each("silu", f.silu),
    _Each("gelu", f.gelu),
    _Each("gelu_tanh", f.gelu_tanh),
    _Each("swiglu", lambda gate, up: f.silu(gate) * f.number(up), ("gate", "up")),
    _Each("geglu", lambda gate, up: f.gelu(gate) * f.number(up), ("gate", "up")),
    *map(_cast, ("f32", "f16", "bf16", "f8_e4m3", "f8_e5m2")),
)

#: what makes them, for a type of elements
_LIBRARY: dict[str, Callable[[str], Kind]] = {
    **{one.label: one for one in _EACH},
    "rope": _rope(False),
    "rope_neighbours": _rope(True),
    "softmax": lambda dtype: rows.softmax(matrix("x", dtype), dtype=dtype),
    "softmax_mask": lambda dtype: rows.softmax(
        matrix("x", dtype), mask=matrix("mask", "bool"), sinks=of_rows("sinks"), dtype=dtype
    ),
    "rms_norm": _norm(False),
    "rms_norm_residual": _norm(True),
    "layer_norm": lambda dtype: rows.layer_norm(
        matrix("x", dtype), of_columns("weight", dtype), of_columns("bias", dtype), dtype=dtype
    ),
    "sum": lambda dtype: rows.row_sum(matrix("x", dtype), dtype=dtype),
    "max": lambda dtype: rows.row_max(matrix("x", dtype), dtype=dtype),
    "min": lambda dtype: rows.row_min(matrix("x", dtype), dtype=dtype),
    "argmax": lambda dtype: rows.argmax(matrix("x", dtype)),
    "top8": lambda dtype: rows.topk(matrix("x", dtype), LARGEST, dtype=dtype),
}

#: names of all
NAMES = tuple(_LIBRARY)


@functools.cache
def get(name: str, dtype: str = "f32") -> Kind:
    """One of the library, for elements of a type."""
    if name.lower() not in _LIBRARY:
        raise ShapeError(
            f"{name!r} was asked for; known maps and row reductions are {', '.join(NAMES)}"
        )
    return _LIBRARY[name.lower()](dtype)


@functools.cache
def contiguous(name: str, dtype: str = "f32") -> Kind:
    """The same for arrays that are contiguous, which functions of single elements take as one
    row."""
    for one in _EACH:
        if one.label == name.lower():
            return one(dtype, one_row)
    return get(name, dtype)


@functools.cache
def _by_name() -> dict[str, tuple[str, str, Kind]]:
    made = ((n, t, make(n, t)) for make in (get, contiguous) for n in NAMES for t in DTYPES)
    return {kind.name: (name, dtype, kind) for name, dtype, kind in made}


def named(name: str) -> tuple[str, str, Kind] | None:
    """The one of the library, for `DTYPES`, that has this name of kernels: its name here, the type
    of its elements, itself; None where there is none."""
    return _by_name().get(name)


def op_of(kind: Kind) -> str:
    """The op that it is: "map" or "rows"."""
    return "map" if isinstance(kind, Map) else "rows"


def kinds(op: str, dtypes: tuple[str, ...] = ("f32",)) -> tuple[Kind, ...]:
    """All of an op, for elements of these types."""
    every = (get(name, dtype) for name in NAMES for dtype in dtypes)
    return tuple(kind for kind in every if op_of(kind) == op)

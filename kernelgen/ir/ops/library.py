"""Maps and row reductions that are built, listed and verified without being asked for, by name."""

from __future__ import annotations

import functools
from collections.abc import Callable

from kernelgen.errors import ShapeError
from kernelgen.ir.expr import Expr
from kernelgen.ir.ops import functions as f
from kernelgen.ir.ops import maps, rows
from kernelgen.ir.ops.maps import Map
from kernelgen.ir.ops.rows import Rows
from kernelgen.ir.ops.tensors import Tensor

Kind = Map | Rows

#: elements of a head whose rotary positions are in the library
HEAD_DIM = 128


def matrix(name: str, dtype: str = "f32") -> Tensor:
    """An array (rows, columns) whose rows may lie apart."""
    return Tensor(name, dtype, (f"{name}_row", 1))


def vector(name: str, dtype: str = "f32") -> Tensor:
    """An array that all rows share, or with an element for each row."""
    return Tensor(name, dtype, (1,))


def _map(label: str, function: Callable[..., Expr], *names: str) -> Callable[[str], Kind]:
    def make(dtype: str) -> Kind:
        inputs = tuple(matrix(name, dtype) for name in names or ("x",))
        return maps.trace(function, inputs, (dtype,), label)

    return make


def _cast(to: str) -> Callable[[str], Kind]:
    return lambda dtype: maps.trace(lambda x: x, (matrix("x", dtype),), (to,), f"cast_{to}")


def _rope(neighbours: bool) -> Callable[[str], Kind]:
    label = "rope_neighbours" if neighbours else "rope"

    def make(dtype: str) -> Kind:
        positions, turns, rest = vector("positions", "i32"), vector("turns", "u32"), "rest"
        return maps.rotated(
            matrix("x", dtype), positions, turns, vector(rest, "u32"), dims=HEAD_DIM,
            neighbours=neighbours, dtype=dtype, label=label,
        )  # fmt: skip

    return make


def _norm(residual: bool) -> Callable[[str], Kind]:
    def make(dtype: str) -> Kind:
        other = matrix("residual", dtype) if residual else None
        return rows.rms_norm(
            matrix("x", dtype), vector("weight", dtype), residual=other, dtype=dtype
        )

    return make


#: what makes them, for a type of elements
_LIBRARY: dict[str, Callable[[str], Kind]] = {
    "add": _map("add", lambda x, y: x + y, "x", "y"),
    "mul": _map("mul", lambda x, y: x * y, "x", "y"),
    "relu": _map("relu", f.relu),
    "sigmoid": _map("sigmoid", f.sigmoid),
    "tanh": _map("tanh", f.tanh),
    "silu": _map("silu", f.silu),
    "gelu": _map("gelu", f.gelu),
    "gelu_tanh": _map("gelu_tanh", f.gelu_tanh),
    "swiglu": _map("swiglu", lambda gate, up: f.silu(gate) * f.number(up), "gate", "up"),
    "geglu": _map("geglu", lambda gate, up: f.gelu(gate) * f.number(up), "gate", "up"),
    "cast_f32": _cast("f32"),
    "cast_f16": _cast("f16"),
    "cast_bf16": _cast("bf16"),
    "cast_f8_e4m3": _cast("f8_e4m3"),
    "cast_f8_e5m2": _cast("f8_e5m2"),
    "rope": _rope(False),
    "rope_neighbours": _rope(True),
    "softmax": lambda dtype: rows.softmax(matrix("x", dtype), dtype=dtype),
    "softmax_mask": lambda dtype: rows.softmax(
        matrix("x", dtype), mask=matrix("mask", "bool"), sinks=vector("sinks"), dtype=dtype
    ),
    "rms_norm": _norm(False),
    "rms_norm_residual": _norm(True),
    "layer_norm": lambda dtype: rows.layer_norm(
        matrix("x", dtype), vector("weight", dtype), vector("bias", dtype), dtype=dtype
    ),
    "sum": lambda dtype: rows.row_sum(matrix("x", dtype), dtype=dtype),
    "max": lambda dtype: rows.row_max(matrix("x", dtype), dtype=dtype),
    "min": lambda dtype: rows.row_min(matrix("x", dtype), dtype=dtype),
    "argmax": lambda dtype: rows.argmax(matrix("x", dtype)),
    "top8": lambda dtype: rows.topk(matrix("x", dtype), 8, dtype=dtype),
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


def op_of(kind: Kind) -> str:
    """The op that it is: "map" or "rows"."""
    return "map" if isinstance(kind, Map) else "rows"


def kinds(op: str, dtypes: tuple[str, ...] = ("f32",)) -> tuple[Kind, ...]:
    """All of an op, for elements of these types."""
    every = (get(name, dtype) for name in NAMES for dtype in dtypes)
    return tuple(kind for kind in every if op_of(kind) == op)

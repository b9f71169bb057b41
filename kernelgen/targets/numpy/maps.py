"""Maps and row reductions on arrays: all rows and columns at once."""

from __future__ import annotations

import functools

from kernelgen.config import Config, NoConfig
from kernelgen.ir.expr import Expr
from kernelgen.ir.ops.maps import Map
from kernelgen.ir.ops.rows import Rows
from kernelgen.targets.base import Argument, Walk
from kernelgen.targets.maps import Kind, MapSteps, arguments, map_steps

#: how numpy calls the types of elements, and those they are computed with
STORED = {
    "f32": "float32", "f16": "float16", "i32": "int32", "u32": "uint32", "i16": "int16",
    "u16": "uint16", "i8": "int8", "u8": "uint8",
}  # fmt: skip
WIDE = {"f32": "float32", "f16": "float32", "u32": "uint32"}


@functools.lru_cache(maxsize=256)
def _steps(kind: Kind, config: Config) -> MapSteps:
    return map_steps(kind, _lower)


def _lower(node: Expr) -> Expr | None:
    """Arrays are there as flat ones, of the types that are computed with."""
    if node.op != "load":
        return None
    return Expr("element", node.dtype, node.args, node.attr.name)


def _operands(kind: Kind) -> tuple[Argument, ...]:
    return arguments(kind, role="result", size="int")


WALKS = tuple(
    Walk(
        "arrays", op, "", "maps.py.j2", NoConfig, (),
        symbols={"ROWS": "rows", "COLUMNS": "elements of a row"},
        steps=_steps, operands=_operands, kind=kind,
    )
    for op, kind in (("map", Map), ("rows", Rows))
)  # fmt: skip

GLOBALS = {"stored_types": STORED, "wide_types": WIDE}

RESERVED = frozenset(("ROWS", "COLUMNS", "row", "col", "values"))

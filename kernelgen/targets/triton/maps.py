"""Maps and row reductions with Triton: a program takes a tile of rows and columns."""

from __future__ import annotations

import functools
from typing import Any

from kernelgen.config import Config
from kernelgen.config.maps import ProgramMapConfig, ProgramReduceConfig
from kernelgen.ir.expr import Expr
from kernelgen.ir.ops.maps import Map
from kernelgen.ir.ops.rows import Rows
from kernelgen.ir.ops.tensors import Output
from kernelgen.targets.base import Argument, Launch, Walk
from kernelgen.targets.maps import GLOBALS as SHARED
from kernelgen.targets.maps import Kind, MapSteps, arguments, map_steps
from kernelgen.targets.triton.attention import tanh
from kernelgen.targets.triton.steps import WARP

#: types of pointers; those that the language does not tell apart are loaded as the same
_POINTERS = {"u16": "i16", "u32": "i32"}


@functools.lru_cache(maxsize=256)
def _steps(kind: Kind, config: Config) -> MapSteps:
    return map_steps(kind, _lower)


def _lower(node: Expr) -> Expr | None:
    if node.op == "call" and node.attr == "tanh":  # the language has none
        (x,) = node.args
        return tanh(x, x * x)
    return None


def _operands(kind: Kind) -> tuple[Argument, ...]:
    return arguments(kind, lambda name: _POINTERS.get(name, name), size="i32")


def _map_launch(config: Config, kind: Kind) -> Launch:
    assert isinstance(config, ProgramMapConfig)
    groups = f"-(-ROWS // {config.rows}) * -(-COLUMNS // {config.elements})"
    return Launch((groups, "1"), WARP * config.warps)


def _rows_launch(config: Config, kind: Kind) -> Launch:
    assert isinstance(config, ProgramReduceConfig)
    return Launch((f"-(-ROWS // {config.rows})", "1"), WARP * config.warps)


def _walk(op: str, kind: type, config: type[Config], launch: Any) -> Walk:
    return Walk(
        name="tiles", op=op, precision="", template=f"{op}.py.j2", config=config, arguments=(),
        steps=_steps, launch=launch, operands=_operands, kind=kind,
    )  # fmt: skip


WALKS = (
    _walk("map", Map, ProgramMapConfig, _map_launch),
    _walk("rows", Rows, ProgramReduceConfig, _rows_launch),
)


def _stored(one: Output, text: str, value: Expr) -> str:
    """What is stored, of the type of its pointer."""
    if one.storage.name == "u32":
        return f"({text}).to(tl.int32, bitcast=True)"
    types = {"u8": "uint8", "i8": "int8", "u16": "int16", "i16": "int16", "f16": "int16"}
    name = types.get(one.storage.name)
    # a number that is the same everywhere is no tensor before it is added to one
    return f"({text}).to(tl.{name})" if name else text


GLOBALS: dict[str, Any] = SHARED | {"stored_as": _stored}

#: names that the templates use
RESERVED = frozenset("COLUMNS ELEMENTS ROWS TILE blocks col first inside line row there".split())

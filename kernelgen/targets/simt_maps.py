"""Maps and row reductions on the targets with grids of threads: two walks, in the words of each
language.

Elements of fewer than 32 bits are read and written as whole words, as some languages know no
smaller ones.  So each row of such a result begins with a word, and a value of a whole row has a
word to itself.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

from kernelgen.config import Config
from kernelgen.config.maps import MapGridConfig, RowGridConfig
from kernelgen.ir.expr import (
    BOOL,
    F32,
    I32,
    U32,
    Expr,
    cast,
    equal,
    logical_not,
)
from kernelgen.ir.floats import FLOATS
from kernelgen.ir.ops.maps import Map
from kernelgen.ir.ops.rows import Rows
from kernelgen.targets.base import Argument, Launch, Walk
from kernelgen.targets.maps import (
    GLOBALS as SHARED,
)
from kernelgen.targets.maps import (
    Kind,
    MapSteps,
    arguments,
    map_steps,
    stride_names,
)
from kernelgen.targets.simt import MOST_GROUPS

#: bits of an element that is a part of a word, and of a byte's place in it
_PARTS = {"u8": (8, 3), "i8": (8, 3), "u16": (16, 1), "i16": (16, 1), "f16": (16, 1)}


@functools.lru_cache(maxsize=256)
def _steps(kind: Kind, config: Config) -> MapSteps:
    sizes = frozenset(("COLUMNS", *stride_names(kind)))

    def lower(node: Expr) -> Expr | None:
        if node.op == "load":
            return _element(node)
        if node.op == "var" and node.attr[0] in sizes:  # u32 in a kernel
            return cast(I32, Expr("var", U32, attr=node.attr))
        if node.op == "^" and node.dtype is BOOL:  # some languages have no xor of truths
            return logical_not(equal(*node.args))
        return None

    return map_steps(kind, lower)


def _element(node: Expr) -> Expr:
    """An element of an array of words."""
    (at,), storage, name = node.args, node.attr.storage, node.attr.name
    if storage.nbytes == 4:
        return Expr("element", node.dtype, (at,), name)
    bits, last = _PARTS[storage.name]
    word = Expr("element", U32, (at >> (2 if bits == 8 else 1),), name)
    shift = (at & last) * bits
    if storage.lo < 0:
        return cast(I32, word << (32 - bits - shift)) >> (32 - bits)
    part = (word >> shift) & ((1 << bits) - 1)
    return FLOATS[storage.name].decode(part) if node.dtype is F32 else cast(I32, part)


def items(kind: Kind) -> int:
    """Elements that a thread computes at once: what fills a word of each result."""
    return 4 // min((one.storage.nbytes for one in kind.outputs), default=4)


def _words(storage: str) -> str:
    return storage if storage in ("f32", "i32", "u32") else "u32"


def _operands(kind: Kind) -> tuple[Argument, ...]:
    """Arguments, in words where elements are parts of these."""
    pitches = {
        one.name: f"-(-COLUMNS // {4 // one.storage.nbytes})"
        for one in kind.outputs
        if one.storage.nbytes < 4
    }
    return tuple(
        replace(one, shape=("ROWS", pitches[one.name])) if one.name in pitches else one
        for one in arguments(kind, _words)
    )


def _map_launch(config: Config, kind: Kind) -> Launch:
    assert isinstance(config, MapGridConfig)
    groups = f"-(-COLUMNS // {items(kind) * config.threads})"
    return Launch((f"min({groups}, {MOST_GROUPS})", f"min(ROWS, {MOST_GROUPS})"), config.threads)


def _rows_launch(config: Config, kind: Kind) -> Launch:
    assert isinstance(config, RowGridConfig)
    return Launch((f"min(ROWS, {MOST_GROUPS})", "1"), config.threads)


def walks() -> tuple[Walk, ...]:
    """The walks that every language with grids of threads has."""
    return (
        Walk(
            name="words", op="map", precision="", template="map.j2", config=MapGridConfig,
            arguments=(), steps=_steps, launch=_map_launch, operands=_operands,
            kind=Map,
        ),
        Walk(
            name="groups", op="rows", precision="", template="rows.j2", config=RowGridConfig,
            arguments=(), steps=_steps, launch=_rows_launch, operands=_operands,
            kind=Rows,
        ),
    )  # fmt: skip


def parts(kind: Rows, config: Config) -> dict[str, tuple[str, int]]:
    """Arrays in shared memory: a number of each thread, of every type that is reduced."""
    assert isinstance(config, RowGridConfig)
    types = dict.fromkeys(one.value.dtype.value for one in kind.reductions)
    return {f"part_{name}": (name, config.threads) for name in types}


#: what the templates may call
GLOBALS: dict[str, Any] = SHARED | {"items_of_map": items, "parts_of_rows": parts}

#: names that the templates use
RESERVED = frozenset(
    "COLUMNS ITEMS ROWS THREADS col group_x group_y groups_x groups_y item j part_f32 part_i32 r"
    " row thread".split()
)

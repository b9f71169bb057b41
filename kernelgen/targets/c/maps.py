"""Maps and row reductions on the C target: their walks, and the expressions that these ask for."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass

from kernelgen.config import Config
from kernelgen.config.maps import CMapConfig, CRowsConfig
from kernelgen.ir.expr import F32, I32, Expr, const, substitute, var
from kernelgen.ir.expr import walk as nodes_of
from kernelgen.ir.ops.maps import Map
from kernelgen.ir.ops.rows import Rows
from kernelgen.ir.ops.tensors import COL, MANY, ROW
from kernelgen.ir.rules import simplify, sum_terms
from kernelgen.targets.base import Argument, Walk
from kernelgen.targets.c.dialect import LANE
from kernelgen.targets.maps import Kind, MapSteps, Stage, arguments, map_steps

#: the first column of a vector, or the column of a single element
_C = var("c", MANY)


@dataclass(frozen=True)
class ColumnSteps:
    """Steps of vectors of columns, and of single ones.

    ahead   loads of what lies side by side in a row, of the row that `next` names
    """

    vector: MapSteps
    single: MapSteps
    ahead: tuple[Expr, ...]

    @property
    def kept(self) -> int:
        """How many values are kept for each column."""
        return self.vector.kept


@functools.lru_cache(maxsize=256)
def _steps(kind: Kind, config: Config) -> ColumnSteps:
    columns = frozenset({"c", "lane"})
    vector, single = (
        map_steps(kind, {COL: column}.get, columns, keeps=True) for column in (_C + LANE, _C)
    )
    first = vector.passes[0] if vector.passes else vector.outputs
    return ColumnSteps(vector, single, tuple(_ahead(first)))


def _ahead(stage: Stage) -> Iterable[Expr]:
    """The loads of whole vectors that other rows have as well, in the next row."""
    found: dict[Expr, None] = {}
    for expr in (*(one.value for one in stage.lets), *stage.values):
        for node in nodes_of(expr):
            if (
                node.op == "load"
                and LANE in sum_terms(node.args[0])
                and ROW in nodes_of(node.args[0])
            ):
                found[substitute(node, {ROW: var("next", MANY), LANE: const(0, I32)})] = None
    return (simplify(node) for node in found)


def _operands(kind: Kind) -> tuple[Argument, ...]:
    return arguments(kind, size="i64")


def _walk(op: str, kind: type, config: type[Config]) -> Walk:
    return Walk(
        name="columns", op=op, precision="", template=f"{op}.c.j2", config=config, arguments=(),
        symbols={"ROWS": "rows", "COLUMNS": "elements of a row"},
        steps=_steps, operands=_operands, kind=kind,
    )  # fmt: skip


WALKS = (_walk("map", Map, CMapConfig), _walk("rows", Rows, CRowsConfig))


def _parts(arguments: Iterable[Argument]) -> str:
    """Parameters of what is inside: elements are bytes there."""
    parts = []
    for one in arguments:
        if one.role == "size":
            parts.append(f"const int64_t {one.name}")
        else:
            signed = "" if one.dtype == "i8" and one.role == "in" else "u"
            parts.append(f"{'const ' * (one.role == 'in')}{signed}int8_t *{one.name}")
    return ", ".join(parts)


def _handed_on(arguments: Iterable[Argument]) -> str:
    """What they are given."""
    return ", ".join(
        one.name if one.role == "size" else f"({'const ' * (one.role == 'in')}void *){one.name}"
        for one in arguments
    )


def _bits(expr: Expr, text: str, vector: bool) -> str:
    """The bits of a value, as an integer."""
    if vector:
        return f"(u32v)({text})"
    return f"f32_to_bits({text})" if expr.dtype is F32 else f"(uint32_t)({text})"


def _streams(kind: Kind, config: Config) -> bool:
    """Whether results may be written past the caches: one array, of elements of 2 or 4 bytes."""
    sizes = [one.storage.nbytes for one in kind.outputs]
    return bool(config.as_dict()["stream"]) and sizes in ([2], [4])


#: what the templates may call
GLOBALS = {
    "bits_of": _bits, "c_type": {"f32": "float", "i32": "int32_t", "u32": "uint32_t"},
    "handed_on": _handed_on, "parts_of": _parts, "streams": _streams,
}  # fmt: skip

#: names that the templates use
RESERVED = frozenset(
    "CHUNK COLUMNS JOIN_MAX JOIN_MIN JOIN_SUM KEPT_PITCH PARALLEL_IF RUN STREAM all at"
    " before_aligned c chunks free from kept join_max join_min join_sum max_across min_across next"
    " one_row put1 put2 put4 row run some_columns store1 store2 store4 stream streamed sum_across"
    " to vectors whole written".split()
)

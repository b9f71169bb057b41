"""Attention on the C target: its walk, its configuration, and the expressions that it asks for."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from kernelgen.config import Config
from kernelgen.config.attention import CAttentionConfig
from kernelgen.config.tiles import PartAttentionConfig, TileAttentionConfig
from kernelgen.ir.block import BlockFormat
from kernelgen.ir.expr import F32, I32, Expr, Field, cast, load, transform, var
from kernelgen.ir.expr import walk as nodes_of
from kernelgen.ir.ops.attention import Attention, Operand, reads
from kernelgen.ir.rules import simplify
from kernelgen.ir.steps import ScalarSteps, scalar_steps
from kernelgen.ir.truth import Truth
from kernelgen.targets.attention import held, paged
from kernelgen.targets.base import Argument, Walk
from kernelgen.targets.c.dialect import LANE

#: elements that lanes run over at once, in an expression that serves vectors of 4, 8 and 16
_RUN = 16


@dataclass(frozen=True)
class RowSteps:
    """How elements of a row of K or V are decoded.

    With `lanes`, expressions in `unit` (of 16 elements, of a block) and LANE for codes, and in `g`
    for scale and offset; without, `scalar` serves, element by element.
    """

    fmt: BlockFormat
    lanes: bool
    fields: tuple[Field, ...]
    code: Expr
    bias: int
    scale: Expr | None
    offset: Expr | None
    scalar: ScalarSteps


@dataclass(frozen=True)
class AttentionSteps:
    """The expressions of one kind of attention: `always` and `never` of a tile (`truth`)."""

    k: RowSteps
    v: RowSteps
    score: Expr | None
    mask: Expr | None
    always: Expr
    never: Expr
    scalar_because: tuple[str, ...]


@functools.lru_cache(maxsize=256)
def row_steps(fmt: BlockFormat) -> RowSteps:
    """The steps of a row in this format."""
    scalar = scalar_steps(fmt)
    if fmt.block == 1:
        # elements are blocks, and lie one after the other where they are one field
        one = len(fmt.layout_fields) == 1 and fmt.scale is None and fmt.offset is None

        def follow(node: Expr) -> Expr | None:
            return load(node.attr, LANE) if node.op == "load" else None

        code = transform(scalar.code, follow)
        lanes = one and code.dtype is F32
    else:
        unit = var("unit", max(1, fmt.block // _RUN))
        lanes = fmt.group % _RUN == 0
        code = simplify(fmt.code_expr(_RUN * unit + LANE))
        code = code if code.dtype is F32 else cast(I32, code)
    return RowSteps(
        fmt, lanes, scalar.fields, code, scalar.bias, scalar.scale, scalar.offset, scalar
    )


@functools.lru_cache(maxsize=256)
def attention_steps(kind: Attention, config: Config) -> AttentionSteps:
    """The steps of one kind; no configuration changes them."""
    k, v = row_steps(kind.k), row_steps(kind.v)
    tiles: Truth = kind.tiles()
    score = None if kind.score is None else simplify(kind.score)
    mask = None if kind.mask is None else simplify(kind.mask)
    reasons = tuple(
        f"groups of {one.fmt.group} elements of {one.fmt.name} are no multiple of {_RUN}"
        for one in dict.fromkeys((k, v))
        if not one.lanes
    )
    return AttentionSteps(k, v, score, mask, tiles.always, tiles.never, reasons)


def operand_arguments(kind: Attention) -> tuple[Argument, ...]:
    """What score and mask read, and the strides of it."""
    return (
        *paged(kind),
        *(Argument("sinks", "in", "f32", ("H",)) for _ in range(kind.sinks)),
        *(Argument(one.name, "in", one.dtype, _elements(one)) for one in kind.operands),
        *held(kind),
        *(Argument(s, "size", "i64") for one in kind.operands for s in one.strides),
        *(Argument("PAGES", "size", "i64") for _ in range(kind.page > 0)),
    )


def _elements(one: Operand) -> tuple[str, ...]:
    return (f"{one.name.upper()}_ELEMENTS",)


def mentions(expr: Expr | None, name: str) -> bool:
    """Whether an expression has a variable, an array, or a field of that name."""
    if expr is None:
        return False
    arrays = {node.attr for node in nodes_of(expr) if node.op == "element"}
    return name in reads(expr) or name in arrays


_TAKEN = frozenset("q k v y B H HK T S PAGES lengths pages sinks".split())


def _applies(kind: Attention) -> str | None:
    """Operands are parameters, beside those that are always there."""
    taken = sorted(_TAKEN.intersection(one.name for one in kind.operands))
    if taken:
        return f"an operand is called {taken[0]}, as the kernel calls one of its own arguments"
    return None


_ARGUMENTS = (
    Argument("q", "in", "f32", ("B", "H", "T", "head_dim")),
    Argument("k", "in", "u8", ("B", "HK", "S", "K_ROW_BYTES")),
    Argument("v", "in", "u8", ("B", "HK", "S", "V_ROW_BYTES")),
    Argument("y", "out", "f32", ("B", "H", "T", "value_dim")),
    *(Argument(name, "size", "i64") for name in ("B", "H", "HK", "T", "S")),
)
_SYMBOLS = {
    "K_ROW_BYTES": "head_dim / block * block_bytes of K's format",
    "V_ROW_BYTES": "value_dim / block * block_bytes of V's format",
}


def _tiles(precision: str) -> Walk:
    """Attention on matrix units, in bfloat16 or in sums of two or three such."""
    return Walk(
        name=f"key_tiles_{precision}",
        op="attention",
        kind=Attention,
        precision=precision,
        template="attention_tiles.c.j2",
        config=PartAttentionConfig if precision == "fp32" else TileAttentionConfig,
        arguments=_ARGUMENTS,
        symbols=_SYMBOLS,
        features=("matrix",),
        applies=_applies,
        steps=attention_steps,
        operands=operand_arguments,
        style="tiles",
    )


#: the first that a CPU can run serves
WALKS = (
    *(_tiles(precision) for precision in ("bf16", "fp16", "fp32")),
    Walk(
        name="key_tiles",
        op="attention",
        kind=Attention,
        precision="fp32",
        template="attention.c.j2",
        config=CAttentionConfig,
        arguments=_ARGUMENTS,
        symbols=_SYMBOLS,
        applies=_applies,
        steps=attention_steps,
        operands=operand_arguments,
    ),
)

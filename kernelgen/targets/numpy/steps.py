"""What a walk over arrays asks of a format: expressions for all groups and all elements at once."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass

from kernelgen.config import Config
from kernelgen.ir.block import BlockFormat
from kernelgen.ir.expr import (
    F32,
    I32,
    U32,
    Expr,
    Field,
    cast,
    const,
    depends_on,
    loads,
    named,
    transform,
    var,
    walk,
)
from kernelgen.ir.ops.attention import Attention, reads
from kernelgen.ir.rules import simplify


@dataclass(frozen=True)
class GroupInts:
    """A group integer of the format, by its name, as an expression in `g`."""

    name: str
    value: Expr


@dataclass(frozen=True)
class ArraySteps:
    """The expressions of one format, in `g`, the array of all groups, and `i`, that of all
    elements.  A `named` node stands for an array that is there under that name.

    fields   fields that are read
    ints     group integers that scale and offset mention, if they are more than a field
    scale    f32, in `g`; None where it is 1
    offset   f32, in `g`; None where it is 0
    code     in `i`: i32 before the bias is subtracted, or f32 where elements are floats
    bias     subtracted from the code, as integers
    """

    fmt: BlockFormat
    fields: tuple[Field, ...]
    ints: tuple[GroupInts, ...]
    scale: Expr | None
    offset: Expr | None
    code: Expr
    bias: int

    @property
    def uses_g(self) -> bool:
        """Whether any expression has `g` in its text."""
        group = (*(one.value for one in self.ints), self.scale, self.offset)
        return any(_mentions(e, "g") for e in group if e is not None)

    @property
    def uses_i(self) -> bool:
        """Whether the code has `i` in its text."""
        return _mentions(self.code, "i")

    def per_group(self, expr: Expr) -> bool:
        """Whether an expression in `g` has a value for each group, not one for the block."""
        return depends_on(expr, _index("g", self.fmt.groups)) and self.fmt.groups > 1


def array_steps(fmt: BlockFormat, config: Config) -> ArraySteps:
    """The steps of a decode that treats whole arrays; no configuration changes them."""
    g, i = _index("g", fmt.groups), _index("i", fmt.block)
    scale = None if fmt.scale is None else fmt.scale_expr(g)
    offset = None if fmt.offset is None else fmt.offset_expr(g)
    ints = {}
    for node in (n for e in (scale, offset) if e is not None for n in walk(e)):
        if node.op == "named" and node.args[1] is g:
            ints[node.attr] = _prepared(node.args[0], g)
    # those that are a field or a constant need no second name
    known = {name for name, value in ints.items() if value.op not in ("named", "const")}
    scale, offset = (None if e is None else _prepared(e, g, known) for e in (scale, offset))
    group = [e for e in (scale, offset) if e is not None]
    ints = {name: ints[name] for name in ints if any(_mentions(e, name) for e in group)}
    code = fmt.code_expr(i)
    code = _prepared(code if code.dtype is F32 and not fmt.bias else cast(I32, code), i)
    if code.op == "const":
        code = Expr("cast", code.dtype, (code,))  # with a type of its own
    used = {f for e in (*group, code, *ints.values()) for f in loads(e)}
    return ArraySteps(
        fmt=fmt,
        fields=tuple(f for f in fmt.layout_fields if f in used),
        ints=tuple(GroupInts(name, value) for name, value in ints.items()),
        scale=scale,
        offset=offset,
        code=code,
        bias=fmt.bias,
    )


@dataclass(frozen=True)
class AttentionSteps:
    """What attention computes: the decoders of K and V, score and mask."""

    k: ArraySteps
    v: ArraySteps
    score: Expr | None
    mask: Expr | None

    @property
    def reads(self) -> frozenset[str]:
        """Variables of score and mask."""
        return reads(self.score) | reads(self.mask)


def attention_steps(kind: Attention, config: Config) -> AttentionSteps:
    """The steps of a kind of attention."""
    score, mask = (None if e is None else simplify(e) for e in (kind.score, kind.mask))
    return AttentionSteps(array_steps(kind.k, config), array_steps(kind.v, config), score, mask)


def _index(name: str, count: int) -> Expr:
    return var(name, count) if count > 1 else const(0, I32)


def _mentions(expr: Expr, name: str) -> bool:
    """Whether the variable, or the array that is there under that name, is in the text."""
    if expr.op == "named":
        return bool(expr.attr == name)
    if expr.op == "var":
        return bool(expr.attr[0] == name)
    return any(_mentions(a, name) for a in expr.args)


def _prepared(expr: Expr, index: Expr, known: Set[str] = frozenset()) -> Expr:
    """`expr` in as few operations as it can be written, with arrays that are there named.

    Those are the `known` integers of exactly this index, and fields with as many elements as the
    index has: taken element for element they are the field itself.
    """

    def unname(node: Expr) -> Expr | None:
        if node.op != "named" or (node.attr in known and node.args[1] is index):
            return None
        return node.args[0]

    def name(node: Expr) -> Expr | None:
        if node.op != "load" or node.args[0] is not index or index.op != "var":
            return None
        return named(node.attr.name, node, index) if node.attr.count == index.attr[2] + 1 else None

    return transform(simplify(_signed(simplify(transform(expr, unname)))), name)


def _signed(expr: Expr) -> Expr:
    """Conversions to i32 moved inwards, where they meet their opposites."""

    def change(node: Expr) -> Expr | None:
        if node.op != "cast" or node.dtype is not I32 or node.args[0].dtype is not U32:
            return None
        inner = node.args[0]
        if inner.op == "cast" and inner.args[0].dtype is I32:
            return inner.args[0]
        if inner.op not in ("&", "|", "^", "<<"):
            return None
        left, right = inner.args
        right = right if inner.op == "<<" else _signed(cast(I32, right))
        return Expr(inner.op, I32, (_signed(cast(I32, left)), right))

    return transform(expr, change)

"""What a walk asks of a format: expressions, sorted by the loop in which they belong.

A walk over a quantized matrix has loops over blocks, groups of a block, and words (four codes)
of a group.  `Steps` holds, for one format, the expression that belongs into each loop, in the
variables `g` and `j`; the walk decides what threads and memory do around them.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from kernelgen.ir.block import BlockFormat
from kernelgen.ir.encode import code_table
from kernelgen.ir.expr import (
    F32,
    I32,
    U32,
    Expr,
    Field,
    WordTable,
    cast,
    const,
    element,
    loads,
    splat,
    table,
    transform,
    var,
    walk,
)
from kernelgen.ir.lanes import LANE, LANES, pack
from kernelgen.ir.layout import Layout, Place, lower_to_memory, lower_to_words, places
from kernelgen.ir.ranges import fits, interval
from kernelgen.ir.rules import simplify


@dataclass(frozen=True)
class GroupInts:
    """The group integers of one name: packed words, four groups in each."""

    name: str
    words: tuple[Expr, ...]
    scalar_because: str | None


@dataclass(frozen=True)
class SplitScale:
    """A scale that is a float of the block times an integer of the group, so that the products of
    codes and integers can be summed over a whole block.

    factor   f32 of the block
    integer  i32, in `g`
    bias     what is to be subtracted from the codes before they are multiplied
    lo, hi   range of the products
    offset   f32, in `g`: what is added besides; None where it is 0
    """

    factor: Expr
    integer: Expr
    bias: int
    lo: int
    hi: int
    offset: Expr | None


@dataclass(frozen=True)
class SplitOffset:
    """An offset that is a float of the block times a group integer in unsigned bytes, so that
    products of integers and sums of activations can be summed over a whole block.

    factor   f32 of the block
    name     of the group integers, which are packed
    """

    factor: Expr
    name: str


@dataclass(frozen=True)
class Steps:
    """The expressions of one format.

    fields     fields that are read
    ints       packed group integers, belonging to the block loop
    scale      f32, in `g`; None where it is 1
    offset     f32, in `g`: what is added to scale * code; None where it is 0
    codes      u32, in `g` and `j`: four codes as bytes; None where elements are floats
    code_max   largest absolute code, at most 128
    signed     whether codes are signed bytes; else they are at most 127
    values     f32, in `i`: the element itself, where elements are floats
    words      words in a group
    split      the scale as a float of the block and an integer of the group; None where it is not
    bias       what is to be subtracted from the codes: `offset` has it, too
    pure_offset  f32, in `g`: what is added where the bias was subtracted; None where it is 0
    mins       `pure_offset` as a float of the block and an integer of the group; None where it is
               not
    scalar_because  reasons for which something was decoded lane by lane; empty: all packed
    """

    fmt: BlockFormat
    fields: tuple[Field, ...]
    ints: tuple[GroupInts, ...]
    scale: Expr | None
    offset: Expr | None
    codes: Expr | None
    code_max: int
    signed: bool
    values: Expr | None
    scalar_because: tuple[str, ...]
    split: SplitScale | None = None
    bias: int = 0
    pure_offset: Expr | None = None
    mins: SplitOffset | None = None

    @property
    def words(self) -> int:
        """WordTable in a group."""
        return self.fmt.group // LANES

    @property
    def reach(self) -> int:
        """Largest absolute code after the bias was subtracted."""
        return max(abs(self.code_max - self.bias), self.bias + self.code_max * self.signed)


def group_var(fmt: BlockFormat) -> Expr:
    """The variable of the loop over groups."""
    return var("g", fmt.groups)


def word_var(fmt: BlockFormat) -> Expr:
    """The variable of the loop over the words of a group."""
    return var("j", fmt.group // LANES)


@functools.lru_cache(maxsize=256)
def steps(fmt: BlockFormat) -> Steps:
    """The steps of a format, for layouts whose units are words."""
    if fmt.float_codes:
        value = simplify(lower_to_words(fmt.value_expr(var("i", fmt.block))))
        return Steps(fmt, tuple(loads(value)), (), None, None, None, 0, False, value, ())
    g = group_var(fmt)
    word = code_word(fmt)
    codes = simplify(lower_to_words(word.codes))
    packed = (pack_ints(fmt, name) for name in fmt.ints if _packs(fmt, name))
    # what is decoded lane by lane is not packed first, but decoded where its group is
    ints = tuple(one for one in packed if one.scalar_because is None)
    scale = None if fmt.scale is None else fmt.scale_expr(g)
    offset = fmt.total_offset_expr(g, word.bias)
    pure = None if fmt.offset is None else fmt.offset_expr(g)
    by_name = {i.name for i in ints}
    lowered = [None if e is None else _lower_group(e, by_name) for e in (scale, offset, pure)]
    used = [e for e in (codes, *lowered, *(w for i in ints for w in i.words)) if e is not None]
    fields = {f.name: f for e in used for f in loads(e)}
    reasons = [word.scalar_because]
    return Steps(
        fmt=fmt,
        fields=tuple(sorted(fields.values(), key=lambda f: f.offset)),
        ints=tuple(i for i in ints if any(_mentions(e, i.name) for e in lowered if e is not None)),
        scale=lowered[0],
        offset=lowered[1],
        codes=codes,
        code_max=word.code_max,
        signed=word.signed,
        values=None,
        scalar_because=tuple(r for r in reasons if r),
        split=_split_scale(fmt, word, by_name),
        bias=word.bias,
        pure_offset=lowered[2],
        mins=None if pure is None else _split_offset(fmt, pure, by_name),
    )


def _split_scale(fmt: BlockFormat, word: CodeWord, packed: set[str]) -> SplitScale | None:
    """How the scale splits, if it is a product of two such numbers."""
    g = group_var(fmt)
    scale = None if fmt.scale is None else fmt.scale_expr(g)
    if scale is None or scale.op != "*":
        return None
    for factor, whole in (scale.args, scale.args[::-1]):
        of_block = not any(node is g for node in walk(factor))
        if of_block and whole.op == "cast" and whole.args[0].dtype is I32:
            integer = whole.args[0]
            codes = [c - word.bias for c in ((-word.code_max if word.signed else 0), word.code_max)]
            ends = [c * i for c in codes for i in interval(integer)]
            offset = None if fmt.offset is None else fmt.offset_expr(g)
            return SplitScale(
                _lower_group(factor, packed), _lower_group(integer, packed), word.bias,
                min(ends), max(ends), None if offset is None else _lower_group(offset, packed),
            )  # fmt: skip
    return None


def _split_offset(fmt: BlockFormat, offset: Expr, packed: set[str]) -> SplitOffset | None:
    """How an offset splits, if it is a product of two such numbers, or less than zero by one, and
    sums over groups and blocks fit 16 and 32 bits."""
    product = offset.args[0] if offset.op == "neg" else offset
    if product.op != "*" or fmt.group * 127 >= 1 << 15 or fmt.block * 127 * 255 >= 1 << 31:
        return None
    g = group_var(fmt)
    for factor, whole in (product.args, product.args[::-1]):
        integer = whole.args[0] if whole.op == "cast" else whole
        named = integer.op == "named" and integer.attr in packed and fits(integer.args[0], 0, 255)
        if named and integer.args[1] is g and not any(node is g for node in walk(factor)):
            signed = -factor if offset.op == "neg" else factor
            return SplitOffset(_lower_group(signed, packed), integer.attr)
    return None


def unsigned_code(fmt: BlockFormat, i: Expr) -> tuple[Expr, int]:
    """The code of element i and what is to be subtracted from it.

    A table with negative values is shifted to begin at zero if seven bits hold it: unsigned codes
    multiply faster on most machines, and the shift moves into the offset.
    """
    code = fmt.code_expr(i)
    values = code_table(fmt)
    lo, hi = fmt.code_range
    if values is None or lo >= 0 or hi - lo > 127:
        return code, fmt.bias
    return table([v - lo for v in values], code.args[0]), fmt.bias - lo


@dataclass(frozen=True)
class CodeWord:
    """Four codes of a format in a word, as integer dot products want them.

    codes     u32, in `g` and `j`, of loads and words
    code_max  largest absolute code, at most 128
    signed    whether codes are signed bytes; else they are at most 127
    bias      what is to be subtracted from these codes
    scalar_because  why they had to be decoded lane by lane; None: they packed
    """

    codes: Expr
    code_max: int
    signed: bool
    bias: int
    scalar_because: str | None


@functools.lru_cache(maxsize=256)
def code_word(fmt: BlockFormat) -> CodeWord:
    """The `CodeWord` of a format.

    Unsigned codes of eight bits become signed: no machine multiplies such by signed bytes safely.
    """
    code, bias = unsigned_code(fmt, fmt.group * group_var(fmt) + LANES * word_var(fmt) + LANE)
    lo, hi = interval(code)
    packed = pack(code)
    codes = packed.expr
    if hi > 127:
        codes, bias, lo, hi = codes ^ splat(0x80), bias - 128, lo - 128, hi - 128
    return CodeWord(codes, max(abs(lo), abs(hi)), lo < 0, bias, packed.scalar_because)


@functools.lru_cache(maxsize=256)
def codebook(fmt: BlockFormat) -> WordTable | None:
    """The table of words, four codes each, that `code_word` looks into; None where there is none.

    Languages that have no constant arrays take it as an argument.
    """
    if fmt.float_codes:
        return None
    found = {n.attr for n in walk(code_word(fmt).codes) if n.op == "table" and n.dtype is U32}
    return found.pop() if found else None


def _packs(fmt: BlockFormat, name: str) -> bool:
    """Whether group integers fill whole words of bytes."""
    body = fmt.int_expr(name, group_var(fmt))
    return fmt.groups % LANES == 0 and (fits(body, 0, 255) or fits(body, -128, 127))


def pack_ints(fmt: BlockFormat, name: str) -> GroupInts:
    """Group integers `name`, four groups a word."""
    words, reason = [], None
    for q in range(fmt.groups // LANES):
        body = fmt.ints[name](fmt.view, const(LANES * q, I32) + LANE)
        packed = pack(body)
        reason = reason or packed.scalar_because
        words.append(simplify(lower_to_words(packed.expr)))
    return GroupInts(name, tuple(words), reason)


def _lower_group(expr: Expr, packed: set[str]) -> Expr:
    """Named group integers as bytes of the packed words, other loads as words."""

    def change(node: Expr) -> Expr | None:
        if node.op != "named" or node.attr not in packed:
            return None
        body, g = node.args
        at = element(node.attr, g // LANES)
        if fits(body, 0, 255):
            return cast(I32, (at >> (g % LANES * 8)) & 255)
        return cast(I32, at << (24 - g % LANES * 8)) >> 24

    return simplify(lower_to_words(transform(expr, change)))


def _mentions(expr: Expr, name: str) -> bool:
    return any(node.op == "element" and node.attr == name for node in walk(expr))


@dataclass(frozen=True)
class ScalarSteps:
    """One element at a time, for walks that read native blocks: expressions in `g` and `l`
    (element i = group*g + l); `code` is an i32 before the bias is subtracted."""

    fmt: BlockFormat
    fields: tuple[Field, ...]
    scale: Expr | None
    offset: Expr | None
    code: Expr
    bias: int


@functools.lru_cache(maxsize=256)
def scalar_steps(fmt: BlockFormat) -> ScalarSteps:
    """The steps of a decode that goes element by element."""
    g = group_var(fmt)
    i = fmt.group * g + var("l", fmt.group)
    code = simplify(fmt.code_expr(i))
    code = code if code.dtype is F32 else cast(I32, code)
    scale = None if fmt.scale is None else simplify(fmt.scale_expr(g))
    offset = None if fmt.offset is None else simplify(fmt.offset_expr(g))
    used = {f.name: f for e in (code, scale, offset) if e is not None for f in loads(e)}
    fields = tuple(sorted(used.values(), key=lambda f: f.offset))
    return ScalarSteps(fmt, fields, scale, offset, code, fmt.bias)


@dataclass(frozen=True)
class MemorySteps:
    """Like `Steps`, but every load is a fetch from a byte address, for walks in which a thread
    follows a row: expressions in `g`, `j` and the addresses of `places`, `values` in `element`.

    places   where the fields that are read begin; a walk declares them where a block begins
    bias, pure_offset   for an exact decode: scale * (code - bias) + pure_offset
    """

    fmt: BlockFormat
    places: tuple[Place, ...]
    scale: Expr | None
    offset: Expr | None
    codes: Expr | None
    signed: bool
    values: Expr | None
    bias: int
    pure_offset: Expr | None
    scalar_because: tuple[str, ...]


@functools.lru_cache(maxsize=512)
def memory_steps(fmt: BlockFormat, layout: Layout) -> MemorySteps:
    """The steps of a format in a layout."""
    found = places(layout, fmt)

    def lower(expr: Expr | None) -> Expr | None:
        if expr is None:
            return None
        return simplify(lower_to_memory(lower_to_words(simplify(expr)), found))

    if fmt.float_codes:
        at = const(0, I32) if fmt.block == 1 else var("element", fmt.block)
        value = lower(fmt.value_expr(at))
        return MemorySteps(fmt, tuple(found.values()), None, None, None, False, value, 0, None, ())
    g = group_var(fmt)
    code = code_word(fmt)
    scale = lower(fmt.scale_expr(g))
    offset, codes = lower(fmt.total_offset_expr(g, code.bias)), lower(code.codes)
    read = {
        node.attr
        for e in (scale, offset, codes)
        if e is not None
        for node in walk(e)
        if node.op == "var"
    }
    return MemorySteps(
        fmt=fmt,
        places=tuple(p for p in found.values() if p.at.attr in read),
        scale=scale,
        offset=offset,
        codes=codes,
        signed=code.signed,
        values=None,
        bias=code.bias,
        pure_offset=None if fmt.offset is None else lower(fmt.offset_expr(g)),
        scalar_because=(code.scalar_because,) if code.scalar_because else (),
    )

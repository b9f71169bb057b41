"""What a walk over tensors asks of a format: expressions, and pointer tensors that they load from.

A program holds rows, groups and words of weights as the axes of a tensor.  The expressions are in
`g` (groups), `j` (words of a group) and `index` (codes that a table turns into others), and load
from pointers that the walk declares: one to each field of each row's first block, and one to the
field in the block at hand.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kernelgen.errors import TargetError
from kernelgen.ir.block import BlockFormat
from kernelgen.ir.evaluate import evaluate
from kernelgen.ir.expr import (
    F32,
    I32,
    LOADS,
    STORAGES,
    U32,
    Expr,
    Field,
    Storage,
    cast,
    const,
    element,
    maximum,
    minimum,
    rebuild,
    splat,
    transform,
    var,
    walk,
    where,
)
from kernelgen.ir.lanes import LANE, LANES, pack
from kernelgen.ir.layout import Layout, places, unit_bytes
from kernelgen.ir.ranges import interval
from kernelgen.ir.rules import simplify
from kernelgen.ir.steps import group_var, word_var

#: threads of a warp, where a launch must name a number of threads
WARP = 32

#: a table has no memory: it is a tree of selections, which must stay small
LONGEST_TABLE = 64

#: the variable that a code before its table is
INDEX = var("index", 256)


def padded(count: int) -> int:
    """The next power of two, as axes of tensors have."""
    return 1 << (count - 1).bit_length()


@dataclass(frozen=True)
class Pointer:
    """Where a field lies.

    field   the field
    row     name of the pointers to the field in the first block of each row
    at      name of the pointers to the field in the block at hand
    dtype   what they point to: the largest element that the field's alignment allows
    begin   from the first byte of the weights to the field in the first block of row 0, in
            `count` (rows) and `blocks` (of a row); this and the next two in elements of dtype
    pitch   from one row to the next, in `blocks`
    stride  from one block to the next
    """

    field: Field
    row: str
    at: str
    dtype: str
    begin: Expr
    pitch: Expr
    stride: int


#: what has a pointer: a field, as elements of a type
Pointers = dict[tuple[Field, str], Pointer]


@dataclass(frozen=True)
class TensorSteps:
    """The expressions of one format in a layout.

    pointers     what they load from
    scale        f32, in `g`; None where it is 1
    offset       f32, in `g`: what is added to scale * (code - bias); None where it is 0
    bias         what is to be subtracted from a code
    words        u32, in `g` and `j`, by name: words of `codes` that take several loads
    codes        u32, in `g`, `j` and `words`: four codes as bytes
    code         i32: what a byte of `codes` stands for, in `index`; None where it is the code
                 itself, a signed byte
    values       f32, in `i`: the element itself, where elements are floats
    """

    fmt: BlockFormat
    pointers: tuple[Pointer, ...]
    scale: Expr | None
    offset: Expr | None
    bias: int
    words: tuple[tuple[str, Expr], ...]
    codes: Expr | None
    code: Expr | None
    values: Expr | None
    scalar_because: tuple[str, ...]

    @property
    def views(self) -> tuple[str, ...]:
        """The types that the weights are read as, apart from the bytes that they are."""
        return tuple(dict.fromkeys(p.dtype for p in self.pointers if p.dtype != "uint8"))


@functools.lru_cache(maxsize=512)
def tensor_steps(fmt: BlockFormat, layout: Layout, unrolled: bool = False) -> TensorSteps:
    """The steps of a format in a layout.

    `unrolled`: `g` is a number when the kernel is compiled, so that only those branches of a
    selection by `g` are compiled that are taken.
    """
    pointers: Pointers = {}

    def lower(expr: Expr | None) -> Expr | None:
        if expr is None:
            return None
        return _pointed(_inside(plain(expr), fmt, unrolled), fmt, layout, pointers)

    if fmt.float_codes:
        values = lower(fmt.value_expr(var("i", fmt.block)))
        return TensorSteps(fmt, tuple(pointers.values()), None, None, 0, (), None, None, values, ())
    g, bias = group_var(fmt), fmt.bias
    code = fmt.code_expr(fmt.group * g + LANES * word_var(fmt) + LANE)
    packed = pack(code)
    codes, of_index = packed.expr, None
    if codes.op == "lookup":
        of_index = simplify(_selected(codes.attr, INDEX))
        codes = codes.args[0]
    elif interval(code)[1] > 127:  # bytes are multiplied as signed ones
        codes, bias = codes ^ splat(0x80), bias - 128
    scale = None if fmt.scale is None else lower(fmt.scale_expr(g))
    offset = None if fmt.offset is None else lower(fmt.offset_expr(g))
    lowered, words = _named_words(lower(codes))
    reasons = (packed.scalar_because,) if packed.scalar_because else ()
    return TensorSteps(
        fmt, tuple(pointers.values()), scale, offset, bias, words, lowered, of_index, None, reasons
    )


def _named_words(expr: Expr | None) -> tuple[Expr | None, tuple[tuple[str, Expr], ...]]:
    """An expression with the words that take several loads under names of their own."""
    names: dict[Expr, str] = {}

    def change(node: Expr) -> Expr | None:
        if node.op != "fetch" or node.attr[1] == 4 or node.attr[0].name != "u32":
            return None
        stem = node.args[0].attr[0].removesuffix("_at") + "_word"
        same = sum(name.startswith(stem) for name in names.values())
        name = names.setdefault(node, f"{stem}{same + 1}" if same else stem)
        return element(name, const(0, I32))

    if expr is None or any(node.op == "select" for node in walk(expr)):
        return expr, ()  # a branch that is not taken need not be loaded
    named = transform(expr, change)
    return named, tuple((name, node) for node, name in names.items())


def plain(expr: Expr) -> Expr:
    """The same in operations that the language has."""
    return simplify(_without_tables(simplify(transform(expr, _unnamed))))


def _unnamed(node: Expr) -> Expr | None:
    return node.args[0] if node.op == "named" else None


# ---- tables and other packed operations, in plain ones ----------------------------------------


def _without_tables(expr: Expr) -> Expr:
    """The same without the packed operations and tables, but for one that is an argument."""

    def change(node: Expr) -> Expr | None:
        if node.op == "table" and node.dtype is not U32:
            return _selected(node.attr, node.args[0])
        if node.op == "lookup":
            return _by_lane(lambda x: _selected(node.attr, cast(I32, x & 255)), node.args[0], 8)
        if node.op == "negate":
            return (node.args[0] ^ (node.args[1] * 255)) + node.args[1]
        if node.op == "spread":
            bits = node.attr
            if bits == 1:  # the product puts copies of the four bits at distances of 7
                return ((node.args[0] & 15) * 0x00204081) & splat(1)
            return _by_lane(lambda x: x & ((1 << bits) - 1), node.args[0], bits)
        return None

    return transform(expr, change)


def _by_lane(function: Callable[[Expr], Expr], x: Expr, step: int) -> Expr:
    """A u32 whose byte l is function(x >> step * l)."""
    word = const(0, U32)
    for lane in range(LANES):
        word = word | ((cast(U32, function(x >> (step * lane))) & 255) << (8 * lane))
    return simplify(word)


def _selected(values: tuple[int, ...] | tuple[float, ...], index: Expr) -> Expr:
    """values[index], selected by the bits of the index.

    Signed bytes lie four to a constant, so that 16 of them take three selections and a shift.
    """
    if len(values) > LONGEST_TABLE:
        raise TargetError(
            f"a table of {len(values)} values was met; selections serve up to {LONGEST_TABLE}"
        )
    if all(isinstance(v, int) and -128 <= v <= 127 for v in values):
        raw = bytes(int(v) & 255 for v in values).ljust(-(-len(values) // 4) * 4, b"\0")
        words = [int.from_bytes(raw[n : n + 4], "little") for n in range(0, len(raw), 4)]
        word = _tree([const(w, U32) for w in words], index, 4)
        return cast(I32, word << (24 - index % 4 * 8)) >> 24
    dtype = F32 if any(isinstance(v, float) for v in values) else I32
    return _tree([const(v, dtype) for v in values], index, 1)


def _tree(values: list[Expr], index: Expr, each: int) -> Expr:
    """values[index // each] by halving; an index beyond the end gives the last value."""
    if len(values) == 1:
        return values[0]
    half = 1 << ((len(values) - 1).bit_length() - 1)
    rest = index - half * each
    return where(
        index < half * each, _tree(values[:half], index, each), _tree(values[half:], rest, each)
    )


# ---- memory -----------------------------------------------------------------------------------


def _inside(expr: Expr, fmt: BlockFormat, unrolled: bool) -> Expr:
    """Loads kept inside of their fields: all branches of a selection are computed, and those
    that are not taken may have any index."""
    g = group_var(fmt)
    numbers = np.arange(fmt.groups)
    done: dict[tuple[Expr, bytes], Expr] = {}

    def known(node: Expr) -> bool:
        """Whether the value is a number when the kernel is compiled."""
        return unrolled and not any(n.op in ("var", *LOADS) and n is not g for n in walk(node))

    def visit(node: Expr, live: npt.NDArray[np.bool_]) -> Expr:
        key = (node, live.tobytes())
        if key not in done:
            done[key] = bounded(node, live) if live.any() else node
        return done[key]

    def bounded(node: Expr, live: npt.NDArray[np.bool_]) -> Expr:
        args = node.args
        if node.op == "select" and known(args[0]):
            chosen = np.broadcast_to(evaluate(args[0], {"g": numbers}), live.shape)
            branches = visit(args[1], live & chosen), visit(args[2], live & ~chosen)
            return rebuild(node, (visit(args[0], live), *branches))
        inner = tuple(visit(a, live) for a in args)
        if node.op in ("load", "word"):
            last = (node.attr.nbytes // 4 if node.op == "word" else node.attr.count) - 1
            if known(args[0]):
                at = np.broadcast_to(evaluate(args[0], {"g": numbers}), live.shape)[live]
                lo, hi = int(at.min()), int(at.max())
            else:
                lo, hi = interval(args[0])
            index = inner[0] if lo >= 0 else maximum(inner[0], 0)
            inner = (index if hi <= last else minimum(index, last),)
        return rebuild(node, inner)

    return visit(expr, np.ones(fmt.groups, np.bool_))


def _pointed(expr: Expr, fmt: BlockFormat, layout: Layout, pointers: Pointers) -> Expr:
    """Loads replaced by fetches: from a pointer of the walk, and how many of its elements on."""

    def change(node: Expr) -> Expr | None:
        if node.op not in ("load", "word"):
            return None
        one: Field = node.attr
        storage = STORAGES["u32"] if node.op == "word" else one.storage
        place = places(layout, fmt)[one.name]
        if place.unit != unit_bytes(one):
            raise TargetError(f"layout {layout.name} tears fields apart, which tensors do not read")
        unit = math.gcd(place.align, storage.nbytes)
        dtype = _pointer_type(storage, unit)
        if (one, dtype) not in pointers:
            another = any(field is one for field, _ in pointers)
            name = f"{one.name}_as_{dtype}" if another else one.name
            pointers[one, dtype] = _pointer(fmt, layout, one, name, dtype, unit)
        index = simplify(node.args[0] * (storage.nbytes // unit))
        at = var(pointers[one, dtype].at, 1 << 31)
        return Expr("fetch", node.dtype, (at, index), (storage, unit))

    return transform(expr, change)


def _pointer_type(storage: Storage, unit: int) -> str:
    """What a pointer points to whose addresses `unit` divides."""
    if unit < storage.nbytes:
        return f"uint{8 * unit}"
    return {"u": "uint", "i": "int", "f": "float"}[storage.name[0]] + str(8 * storage.nbytes)


def _pointer(
    fmt: BlockFormat, layout: Layout, one: Field, name: str, dtype: str, unit: int
) -> Pointer:
    # ranges so small that nothing wraps let the rules divide by the unit
    count, blocks = var("count", 1 << 8), var("blocks", 1 << 8)
    strides = layout.strides(fmt, one, count, blocks)
    begin, pitch = (_divided(strides[axis], unit) for axis in ("field", "tile"))
    stride = int(strides["block"]) // unit
    return Pointer(one, f"{name}_row", f"{name}_at", dtype, begin, pitch, stride)


def _divided(stride: Any, unit: int) -> Expr:
    """A number, or an expression of one, divided by what divides it."""
    return simplify((stride if isinstance(stride, Expr) else const(stride, I32)) // unit)

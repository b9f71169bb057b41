"""Arrays that maps and row reductions read and write, element by element.

Elements are known by their types: floats ("f32", "f16", "bf16", "f8_e4m3", "f8_e5m2") and
integers ("i32", "u32", "i16", "u16", "i8", "u8", and "bool", a byte that is not zero).  An
expression computes with f32, i32 or u32, and what is stored is rounded, or cut, to its type.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kernelgen.errors import ShapeError
from kernelgen.ir.expr import (
    BOOL,
    F32,
    I32,
    STORAGES,
    U32,
    Expr,
    Field,
    Storage,
    cast,
    const,
    equal,
    logical_not,
    maximum,
    minimum,
    show,
    var,
    walk,
    where,
)
from kernelgen.ir.floats import FLOATS, is_nan

Array = npt.NDArray[Any]

#: positions and strides are below this
MANY = 2**30

#: the place of an element, and how many columns there are
ROW, COL = var("row", MANY), var("col", MANY)
COLUMNS = Expr("var", I32, attr=("COLUMNS", 1, MANY))

#: how elements of a type lie in memory
STORED = {
    **{name: STORAGES[name] for name in ("f32", "f16", "u32", "i16", "u16", "i8", "u8")},
    "i32": Storage("i32", 4, I32, -(2**31), 2**31 - 1),
    "bf16": STORAGES["u16"],
    "f8_e4m3": STORAGES["u8"],
    "f8_e5m2": STORAGES["u8"],
    "bool": STORAGES["u8"],
}

#: all types
TYPES = tuple(STORED)


def check_type(dtype: str) -> str:
    """The type itself; raises ShapeError where it is not known."""
    if dtype not in STORED:
        raise ShapeError(f"elements of {dtype} were asked for; known are {', '.join(TYPES)}")
    return dtype


def position(name: str, strides: tuple[str | int, ...], index: Any) -> Expr:
    """Which element of the array of that name an index is, an expression or a number for each
    axis; raises ShapeError where it has other axes."""
    indexes = index if isinstance(index, tuple) else (index,)
    if len(indexes) != len(strides):
        raise ShapeError(
            f"{name} was indexed with {len(indexes)} numbers; it has {len(strides)} axes"
        )
    at: Expr = const(0, I32)
    for one, stride in zip(indexes, strides, strict=True):
        step = const(stride, I32) if isinstance(stride, int) else var(stride, MANY)
        place = one if isinstance(one, Expr) else const(one, I32)
        at = at + cast(I32, place) * step
    return at


@dataclass(frozen=True)
class Tensor:
    """An array that expressions read, by an index along each axis.

    strides   how many elements an index along each axis skips: a number, or the name of an integer
              that is given at the launch
    """

    name: str
    dtype: str
    strides: tuple[str | int, ...]

    def __post_init__(self) -> None:
        check_type(self.dtype)

    @property
    def storage(self) -> Storage:
        """How an element lies in memory."""
        return STORED[self.dtype]

    @property
    def names(self) -> tuple[str, ...]:
        """Strides that are given at the launch."""
        return tuple(one for one in self.strides if isinstance(one, str))

    def __getitem__(self, index: Any) -> Expr:
        """An element as f32, i32, u32 or bool, by an expression or a number for each axis."""
        at = position(self.name, self.strides, index)
        field = Field(self.name, self.storage, MANY, 0)
        stored = Expr("load", self.storage.dtype, (at,), field)
        if self.dtype == "bool":
            return logical_not(equal(stored, 0))
        if self.dtype in FLOATS and self.storage.dtype is not F32:
            return FLOATS[self.dtype].decode(stored)
        return stored


@dataclass(frozen=True)
class Output:
    """What a kernel writes: `value`, in the place of the element, as elements of a type.

    place, of   of a whole row: which element of how many that the row has in the array; such
                elements have outputs of their own, with the name of the array
    """

    name: str
    dtype: str
    value: Expr
    place: int = 0
    of: int = 1

    @property
    def storage(self) -> Storage:
        """How an element lies in memory."""
        return STORED[self.dtype]

    @property
    def stored(self) -> Expr:
        """What is written: f32, or an integer of which the lowest bits count."""
        return to_stored(self.value, self.dtype)


def to_stored(x: Expr, dtype: str) -> Expr:
    """A value as it is kept in a type.  Integers that do not fit lose their highest bits; floats
    become the nearest integer towards zero that there is, and NaN becomes 0."""
    check_type(dtype)
    if dtype == "bool":
        return cast(I32, x if x.dtype is BOOL else logical_not(equal(x, 0)))
    if x.dtype is BOOL:
        x = cast(I32, x)
    if dtype == "f32":
        return cast(F32, x)
    if dtype in FLOATS:
        return FLOATS[dtype].encode(cast(F32, x))
    storage = STORED[dtype]
    wanted = U32 if dtype == "u32" else I32
    if x.dtype is not F32:
        return cast(wanted, x)
    number = where(is_nan(x), 0.0, x)
    lo = maximum(number, float(storage.lo))
    if storage.nbytes < 4:
        return cast(I32, minimum(lo, float(storage.hi)))
    # the largest integers are no f32
    below = float(np.nextafter(np.float32(storage.hi), np.float32(0)))
    return where(below < lo, const(storage.hi, wanted), cast(wanted, minimum(lo, below)))


# ---- what is common to maps and row reductions -------------------------------------------------


def check_names(inputs: Iterable[Tensor], others: Iterable[str]) -> tuple[str, ...]:
    """Names of arrays; raises ShapeError where two things are called alike."""
    given = tuple(inputs)
    names = (*(one.name for one in given), *others)
    strides = dict.fromkeys(stride for one in given for stride in one.names)
    every = (*names, *strides)
    twice = sorted({name for name in every if every.count(name) > 1})
    if twice:
        raise ShapeError(f"two things are called {twice[0]}; give arrays names of their own")
    return names


def digest(*parts: object) -> str:
    """Tells descriptions apart, in a name."""
    numbers: dict[Expr, int] = {}
    lines: list[str] = []
    for part in parts:
        for node in walk(part) if isinstance(part, Expr) else ():
            if node not in numbers:
                numbers[node] = len(numbers)
                args = [numbers[a] for a in node.args]
                lines.append(f"{node.op} {node.dtype.value} {node.attr!r} {args}")
        lines.append(str(numbers[part]) if isinstance(part, Expr) else repr(part))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:8]


def brief(expr: Expr, most: int = 80) -> str:
    """An expression as a person would write it, or only what it is made of where that is long."""
    sizes: dict[Expr, int] = {}
    for node in walk(expr):
        sizes[node] = 1 + sum(sizes[a] for a in node.args)
    if sizes[expr] <= most:
        return show(expr)
    return f"{len(sizes)} operations on {', '.join(sorted(reads_of([expr])))}"


def reads_of(exprs: Iterable[Expr]) -> frozenset[str]:
    """Names of the variables, and of the arrays, that expressions have."""
    found: set[str] = set()
    for expr in exprs:
        for node in walk(expr):
            if node.op == "var":
                found.add(node.attr[0])
            elif node.op == "load":
                found.add(node.attr.name)
    return frozenset(found)


def strides_of(inputs: Iterable[Tensor], arrays: Mapping[str, Array]) -> dict[str, int]:
    """What the names of strides are for these arrays; raises ShapeError where an array does not
    have the strides that a kernel was made for."""
    found: dict[str, int] = {}
    for one in inputs:
        array = arrays[one.name]
        if array.ndim != len(one.strides):
            raise ShapeError(
                f"{one.name} of shape {array.shape} was given; it has {len(one.strides)} axes"
            )
        for name, size, step in zip(one.strides, array.shape, array.strides, strict=True):
            skipped = step // array.itemsize if size > 1 else 0
            if isinstance(name, str):
                found[name] = skipped
            elif size > 1 and name != skipped:
                raise ShapeError(
                    f"an index of {one.name} skips {skipped} elements; the kernel was made for"
                    f" {name}"
                )
    return found

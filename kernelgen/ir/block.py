"""What a block format is: fields, and three expressions.

Every block format is  x[i] = scale(g) * (code(i) - bias) + offset(g)  with g = i // group.  From
this one description come the reference, the scalar and packed decode of every target, the integer
dot products, the layouts, the encoder and the quantizer.
"""

from __future__ import annotations

import dataclasses
import functools
import keyword
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from kernelgen.errors import ExprError, FormatError
from kernelgen.ir.check import problems
from kernelgen.ir.evaluate import NUMPY_STORAGE, evaluate
from kernelgen.ir.expr import (
    BOOL,
    F32,
    I32,
    STORAGES,
    Expr,
    Field,
    binary16,
    cast,
    const,
    load,
    named,
    show,
    substitute,
    var,
)
from kernelgen.ir.ranges import fits, interval

Array = npt.NDArray[Any]


class FieldView:
    """A field with several elements, as seen by a format's expressions: `b.qs[i]`."""

    def __init__(self, name: str, element: Callable[[Expr | int], Expr]) -> None:
        self._name = name
        self._element = element

    def __getitem__(self, index: Expr | int) -> Expr:
        return self._element(index)

    def __repr__(self) -> str:
        return f"{self._name}, which has several elements (write {self._name}[index]),"

    def _no_value(self, *_: object) -> Any:
        raise ExprError(f"{self._name} has several elements; write {self._name}[index]")

    __getattr__ = __neg__ = __lt__ = __le__ = __gt__ = __ge__ = _no_value
    __add__ = __sub__ = __mul__ = __truediv__ = __floordiv__ = __mod__ = _no_value
    __radd__ = __rsub__ = __rmul__ = __rtruediv__ = _no_value
    __and__ = __or__ = __xor__ = __lshift__ = __rshift__ = _no_value
    __rand__ = __ror__ = __rxor__ = __rlshift__ = __rrshift__ = _no_value


class Block:
    """One block, as seen by a format's expressions: its fields and group integers by name."""

    def __init__(self, fmt: BlockFormat) -> None:
        self._format = fmt

    def __getattr__(self, name: str) -> Any:
        fmt = self._format
        for one in fmt.layout_fields:
            if one.name == name:
                if fmt.fields[name].endswith("]"):
                    return FieldView(name, functools.partial(load, one))
                return load(one, 0)
        if name in fmt.halves:
            return fmt.half_expr(name)
        if name in fmt.ints:
            return FieldView(name, functools.partial(fmt.int_expr, name))
        known = ", ".join([*fmt.fields, *fmt.halves, *fmt.ints])
        raise FormatError(f"format {fmt.name} has no field {name}; it has {known}")


@dataclass(frozen=True)
class Derived:
    """A field that repeats what the codes say: element j is `value(block, sum)`, with the sum of
    the codes of the j-th `chunk` elements.  Decoders ignore it, encoders must fill it."""

    chunk: int
    value: Callable[[Any, Expr], Expr]


GroupExpr = Callable[[Any, Expr], Expr]


@dataclass(frozen=True)
class Written:
    """A function of a description, as the expression that it writes: what other processes get."""

    expr: Expr
    index: Expr

    def __call__(self, block: object, index: Expr) -> Expr:
        """The expression for another index."""
        return substitute(self.expr, {self.index: index})


@dataclass(frozen=True)
class WrittenBits:
    """The same of a function of the block alone."""

    expr: Expr

    def __call__(self, block: object) -> Expr:
        """The expression."""
        return self.expr


@dataclass(frozen=True, eq=False)
class BlockFormat:
    """A block quantization format.

    name      ggml's name where ggml has the format
    block     elements in a block; K must be a multiple of it
    group     elements that share one scale (and offset); divides `block`
    nbytes    bytes of a block, checked against the fields
    fields    name -> storage, in the order of the bytes: "f16", "u8[12]", ...
              (u8 i8 u16 i16 u32 f16 f32; little endian)
    code      (b, i) -> the i-th code: an integer that fits a byte, or an f32 when the elements
              are floats themselves
    scale     (b, g) -> f32, default 1
    bias      integer subtracted from every code before it is scaled, default 0: codes stay small
              unsigned integers, which pack and multiply best
    offset    (b, g) -> f32, default 0
    ints      integers that belong to a group, by name, usable as b.name[g] in scale and offset
    halves    f16 numbers of the block whose bits are not a field: name -> (b) -> the 16 bits, an
              integer; usable as b.name
    derived   fields computed from the codes (see `Derived`)
    largest   largest integers that encoders write where more would fit: by the name of a group
              integer or an integer field, or "code"
    source    where the format is defined
    """

    name: str
    block: int
    group: int
    nbytes: int
    fields: Mapping[str, str]
    code: GroupExpr
    scale: GroupExpr | None = None
    bias: int = 0
    offset: GroupExpr | None = None
    ints: Mapping[str, GroupExpr] = field(default_factory=dict)
    halves: Mapping[str, Callable[[Any], Expr]] = field(default_factory=dict)
    derived: Mapping[str, Derived] = field(default_factory=dict)
    largest: Mapping[str, int] = field(default_factory=dict)
    source: str = ""

    def __post_init__(self) -> None:
        self._check()

    def __repr__(self) -> str:
        return f"BlockFormat({self.name})"

    def __reduce__(self) -> str | tuple[Any, ...]:
        from kernelgen.ir.formats import FORMATS, get, restore

        if self in FORMATS:
            return (get, (self.name,))
        return (restore, (self.written(),))

    def written(self) -> dict[str, Any]:
        """The description as plain data: with expressions in place of functions."""

        def of(body: GroupExpr | None, name: str, count: int) -> Written | None:
            index = var(name, count)
            return None if body is None else Written(body(self.view, index), index)

        values = {one.name: getattr(self, one.name) for one in dataclasses.fields(self)}
        return values | {
            "fields": dict(self.fields),
            "code": of(self.code, "i", self.block),
            "scale": of(self.scale, "g", self.groups),
            "offset": of(self.offset, "g", self.groups),
            "ints": {name: of(body, "g", self.groups) for name, body in self.ints.items()},
            "halves": {name: WrittenBits(body(self.view)) for name, body in self.halves.items()},
            "largest": dict(self.largest),
            "derived": {
                name: Derived(one.chunk, of(one.value, "total", 1 << 30))  # type: ignore[arg-type]
                for name, one in self.derived.items()
            },
        }

    @functools.cached_property
    def layout_fields(self) -> tuple[Field, ...]:
        """The fields with their offsets."""
        result: list[Field] = []
        offset = 0
        for name, text in self.fields.items():
            match = re.fullmatch(r"(\w+)(?:\[(\d+)\])?", str(text))
            if match is None or match[1] not in STORAGES:
                raise self._bad(
                    f"field {name} is declared {text!r}; write a type or type[count], types are"
                    f" {', '.join(STORAGES)}"
                )
            count = int(match[2] or 1)
            if count == 0:
                raise self._bad(f"field {name} is declared {text!r}; leave out a field of nothing")
            result.append(Field(name, STORAGES[match[1]], count, offset))
            offset += result[-1].nbytes
        return tuple(result)

    @property
    def groups(self) -> int:
        """Groups in a block."""
        return self.block // self.group

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the fields, of the integers of groups, and of other floats."""
        return (*self.fields, *self.ints, *self.halves)

    @property
    def bits(self) -> float:
        """Bits per element, scales included."""
        return 8 * self.nbytes / self.block

    @functools.cached_property
    def view(self) -> Block:
        """The block that expressions are written against."""
        return Block(self)

    def code_expr(self, i: Expr) -> Expr:
        """The code of element i."""
        return self.code(self.view, i)

    def half_expr(self, name: str) -> Expr:
        """The number `name` of `halves`."""
        return named(name, binary16(self.halves[name](self.view)), const(0, I32))

    def int_expr(self, name: str, g: Expr | int) -> Expr:
        """Group integer `name` of group g."""
        at = g if isinstance(g, Expr) else const(g, var("g", 1).dtype)
        return named(name, self.ints[name](self.view, at), at)

    def scale_expr(self, g: Expr) -> Expr:
        """The scale of group g, f32."""
        return const(1.0, F32) if self.scale is None else cast(F32, self.scale(self.view, g))

    def offset_expr(self, g: Expr) -> Expr:
        """The offset of group g, f32, without the bias."""
        return const(0.0, F32) if self.offset is None else cast(F32, self.offset(self.view, g))

    def value_of(self, code: Expr, g: Expr) -> Expr:
        """The value, f32, of an element of group g with this code: what decoding means."""
        unbiased = cast(F32, cast(I32, code) - self.bias if self.bias else code)
        scaled = unbiased if self.scale is None else self.scale_expr(g) * unbiased
        return scaled if self.offset is None else scaled + self.offset_expr(g)

    def value_expr(self, i: Expr) -> Expr:
        """The value of element i, f32."""
        return self.value_of(self.code_expr(i), i // self.group)

    def total_offset_expr(self, g: Expr, bias: int | None = None) -> Expr | None:
        """What is added to scale(g) * code: -bias * scale(g) + offset(g); None where it is zero.

        An integer dot product multiplies it by the sum of the group's activations.  `bias` is the
        format's own unless codes are shifted.
        """
        bias = self.bias if bias is None else bias
        if not bias:
            return None if self.offset is None else self.offset_expr(g)
        biased = self.scale_expr(g) * float(-bias)
        return biased if self.offset is None else biased + self.offset_expr(g)

    @functools.cached_property
    def float_codes(self) -> bool:
        """Whether elements are floats themselves, so that there is no integer dot product."""
        return self.code_expr(var("i", self.block)).dtype is F32

    @functools.cached_property
    def code_range(self) -> tuple[int, int]:
        """Smallest and largest code."""
        return interval(self.code_expr(var("i", self.block)))

    def row_bytes(self, k: int) -> int:
        """Bytes of a row of k elements."""
        if k <= 0 or k % self.block:
            raise FormatError(
                f"a row of {k} elements was asked for in {self.name}, whose blocks hold"
                f" {self.block}; K must be a positive multiple of {self.block}: pad the matrix"
            )
        return k // self.block * self.nbytes

    def split(self, blocks: Array) -> dict[str, Array]:
        """Fields of an array of blocks, uint8 (..., nbytes): name -> (..., count), stored dtype."""
        result = {}
        for one in self.layout_fields:
            raw = np.ascontiguousarray(blocks[..., one.offset : one.offset + one.nbytes])
            result[one.name] = raw.view(NUMPY_STORAGE[one.storage.name])
        return result

    def join(self, fields: Mapping[str, Array]) -> Array:
        """The inverse of `split`."""
        parts = [
            np.ascontiguousarray(fields[f.name], NUMPY_STORAGE[f.storage.name]).view(np.uint8)
            for f in self.layout_fields
        ]
        return np.concatenate(parts, axis=-1)

    def decode(self, blocks: Array) -> Array:
        """Values, float32 (..., block), of an array of blocks, uint8 (..., nbytes)."""
        if blocks.dtype != np.uint8 or blocks.shape[-1] != self.nbytes:
            raise FormatError(
                f"{self.name} blocks are uint8 arrays of shape (..., {self.nbytes}), not"
                f" {blocks.dtype} {blocks.shape}"
            )
        flat = blocks.reshape(-1, self.nbytes)
        out = np.empty((len(flat), self.block), np.float32)
        value = self._value
        step = max(1, (1 << 18) // self.block)  # temporaries that stay in the cache
        for start in range(0, len(flat), step):
            fields = self.split(flat[start : start + step])
            part = evaluate(value, {"i": np.arange(self.block)}, fields)
            out[start : start + step] = part
        return out.reshape(*blocks.shape[:-1], self.block)

    @functools.cached_property
    def _value(self) -> Expr:
        return self.value_expr(var("i", self.block))

    def _bad(self, text: str) -> FormatError:
        return FormatError(f"format {self.name}: {text}")

    def _check(self) -> None:
        self._check_types()
        if self.block <= 0 or self.group <= 0 or self.block % self.group:
            raise self._bad(f"group {self.group} must divide block {self.block}")
        size = sum(f.nbytes for f in self.layout_fields)
        if size != self.nbytes:
            each = ", ".join(f"{f.name} {f.nbytes}" for f in self.layout_fields)
            raise self._bad(
                f"fields take {size} bytes, but nbytes says {self.nbytes}; correct one: {each}"
            )
        self._check_names()
        self._check_code(self._checked("code(i)", self.code, var("i", self.block)))
        for name, bits in self.halves.items():
            whole = self._checked(name, lambda b, _, bits=bits: bits(b), var("g", 1))  # type: ignore[misc]
            if not whole.dtype.is_int or not fits(whole, 0, 0xFFFF):
                raise self._bad(f"{name} = {show(whole)} is not an integer of 16 bits")
        for name, body in self.ints.items():
            whole = self._checked(f"{name}(g)", body, var("g", self.groups))
            if not whole.dtype.is_int:
                raise self._bad(
                    f"{name}(g) = {show(whole)} is {whole.dtype.value}; what ints name are integers"
                )
        for name, of_group in (("scale(g)", self.scale), ("offset(g)", self.offset)):
            if of_group is None:
                continue
            seen = self._checked(name, of_group, var("g", self.groups))
            if seen.dtype is BOOL:
                raise self._bad(f"{name} = {show(seen)} is a condition; it must be a number")

    def _check_types(self) -> None:
        if not isinstance(self.name, str) or not re.fullmatch(r"[A-Za-z]\w*", self.name):
            raise self._bad("a name is letters, digits and underscores, and begins with a letter")
        for name in ("block", "group", "nbytes", "bias"):
            value = getattr(self, name)
            if not isinstance(value, int):
                raise self._bad(f"{name} is {value!r}; it must be an integer")
        for name in ("fields", "ints", "halves", "derived", "largest"):
            value = getattr(self, name)
            if not isinstance(value, Mapping):
                raise self._bad(f"{name} is {value!r}; write it as a dictionary, by name")

    def _check_names(self) -> None:
        """Names that expressions use, and what is said of them elsewhere."""
        for name, count in Counter(self.names).items():
            if not name.isidentifier() or keyword.iskeyword(name):
                raise self._bad(f"b.{name} cannot be written in Python; choose another name")
            if count > 1:
                raise self._bad(
                    f"b.{name} would be several things; names of fields, ints and halves differ"
                )
        for what, given, allowed in (
            ("derived", self.derived, self.fields),
            ("largest", self.largest, ("code", *self.fields, *self.ints)),
        ):
            for name in given:
                if name not in allowed:
                    raise self._bad(f"{what} speaks of {name!r}; there is {', '.join(allowed)}")

    def _checked(self, name: str, body: GroupExpr, index: Expr) -> Expr:
        """The expression that `body` writes, after a look at every index."""
        try:
            expr: object = body(self.view, index)
            if isinstance(expr, FieldView):
                expr._no_value()
        except ExprError as error:
            raise self._bad(f"{name}: {error}") from error
        except FormatError:
            raise
        except Exception as error:  # of any kind: the function is not ours
            raise self._bad(
                f"{name} cannot be written down, as its function raised {type(error).__name__}:"
                f" {str(error).rstrip('.')}; it gets a block and an index, which are expressions,"
                " no numbers: use where(condition, a, b) for if, table(values, index) for a list"
            ) from error
        if not isinstance(expr, Expr):
            raise self._bad(
                f"{name} must be an expression, not {expr!r}; a constant is const(value, F32) or"
                " const(value, I32)"
            )
        variable, lo, hi = index.attr
        for problem in problems(expr, variable, hi - lo + 1):
            raise self._bad(f"{name}: {problem}")
        return expr

    def _check_code(self, code: Expr) -> None:
        if code.dtype is F32:
            return
        if not code.dtype.is_int:
            raise self._bad(f"code(i) = {show(code)} is a condition; it must be an integer or f32")
        if self.group % 4 and self.block > 1:
            raise self._bad(
                f"group {self.group} must be a multiple of 4, the codes of one 32-bit word"
            )
        lo, hi = interval(code)
        if not (0 <= lo and hi <= 255) and not (lo >= -128 and hi <= 127):
            raise self._bad(
                f"code(i) = {show(code)} ranges over {lo}..{hi}; it must fit a byte"
                " (0..255 or -128..127): mask it, or move the bias into offset"
            )

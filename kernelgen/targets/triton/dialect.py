"""The words of Triton's language.

A value is a tensor, or a number where nothing of it is loaded: such a number is known when the
kernel is compiled, or a scalar.  Types follow Triton's promotion: a number beside a tensor takes
the tensor's type, an unsigned operand makes the result unsigned.  Triton's // and % round towards
zero and so serve only where nothing is negative; a >> follows the sign of what is shifted.
"""

from __future__ import annotations

from kernelgen.errors import TargetError
from kernelgen.ir.expr import (
    BOOL,
    F32,
    I32,
    LOADS,
    PRECEDENCE,
    SHIFTS,
    U32,
    Expr,
    cast,
    rebuild,
    walk,
)
from kernelgen.ir.ranges import interval
from kernelgen.ir.rules import simplify
from kernelgen.targets.codebook import CODEBOOK
from kernelgen.targets.printer import ATOM, Dialect, Printer, varies

_TYPES = {BOOL: "int1", I32: "int32", U32: "uint32", F32: "float32"}


class TensorPrinter(Printer):
    """Prints expressions on tensors: what needs more than words."""

    #: variables that are numbers when the kernel is compiled
    numbers: frozenset[str] = frozenset()

    def _print(self, expr: Expr) -> tuple[str, int]:
        op, args = expr.op, expr.args
        if op == "cast":
            return self._cast(expr)
        if op == "bitcast" and not varies(args[0]):
            return f"tl.cast({self(args[0])}, tl.{_TYPES[expr.dtype]}, bitcast=True)", ATOM
        if op == "fetch":
            return self._fetch(expr), ATOM
        if op == "table":  # of words: an argument
            return f"tl.load({CODEBOOK} + {self._bracketed(args[0])}).to(tl.uint32)", ATOM
        if op == "element":  # a word that the walk has already loaded
            return str(expr.attr), ATOM
        if op == "select":
            return self._select(expr)
        if op in ("min", "max") and expr.dtype is F32:  # a NaN is kept, as numpy does
            a, b = (self(x) for x in args)
            which = {"min": "minimum", "max": "maximum"}[op]
            return f"tl.{which}({a}, {b}, propagate_nan=tl.PropagateNan.ALL)", ATOM
        if op == "/":
            a, b = (self(x) for x in args)
            return f"tl.div_rn({a}, {b})", ATOM
        if op in ("//", "%") and not (_small(args[0]) and interval(args[1])[0] > 0):
            return self._floored(expr)
        if op in SHIFTS and args[0].dtype is not args[1].dtype and args[0].dtype is I32:
            # an unsigned amount would make the result unsigned
            return self._print(rebuild(expr, (args[0], cast(I32, args[1]))))
        if expr.dtype is U32 and len(args) == 2 and not any(map(_typed, args)) and not _small(expr):
            # no operand has the type that the result must have
            return super()._print(rebuild(expr, (Expr("typed", U32, args[:1]), *args[1:])))
        if op == "typed":
            return f"tl.cast({self(args[0])}, tl.{_TYPES[expr.dtype]})", ATOM
        return super()._print(expr)

    def _fetch(self, expr: Expr) -> str:
        """A load of one element or, where the address is not aligned, of its parts."""
        (at, index), (storage, unit) = expr.args, expr.attr
        pointers = []
        for part in range(storage.nbytes // unit):
            text = self._bracketed(simplify(index + part))
            pointers.append(str(at.attr[0]) + (f" + {text}" if text != "0" else ""))
        return self._dialect.word(f"fetch.{storage.name}.{unit}").format(*pointers)

    def _cast(self, expr: Expr) -> tuple[str, int]:
        (x,) = expr.args
        if x.dtype.is_int and expr.dtype.is_int and not varies(x) and _small(x):  # an index
            return self._print(x)
        text, level = self._print(x)
        if not varies(x):
            return f"tl.cast({text}, tl.{_TYPES[expr.dtype]})", ATOM
        atom = text if level == ATOM else f"({text})"
        if expr.dtype is BOOL:
            return f"({atom} != 0)", ATOM
        return f"{atom}.to(tl.{_TYPES[expr.dtype]})", ATOM

    def _select(self, expr: Expr) -> tuple[str, int]:
        condition, a, b = expr.args
        if expr.dtype is BOOL and a.op == b.op == "const" and (a.attr, b.attr) == (False, True):
            return f"({self._bracketed(condition)} == 0)", ATOM
        if self._known(condition):  # only the branch that is taken is compiled
            return (
                f"({self._bracketed(a)} if {self._bracketed(condition)} else {self._bracketed(b)})",
                ATOM,
            )
        if expr.dtype is U32 and a.op == b.op == "const":
            a = Expr("typed", U32, (a,))
        return f"tl.where({self(condition)}, {self(a)}, {self(b)})", ATOM

    def _floored(self, expr: Expr) -> tuple[str, int]:
        """// and % that round down, where an operand may be negative."""
        if expr.dtype is U32:
            return super()._print(expr)
        x, n = (self._bracketed(a) for a in expr.args)
        lo, hi = interval(expr.args[1])
        if lo <= 0 <= hi:
            raise TargetError(f"a division by what may be 0 cannot be printed: {expr}")
        off = f"{x} % {n} {'<' if lo > 0 else '>'} 0"  # the remainder has the sign of x
        if expr.op == "%":
            return f"tl.where({off}, {x} % {n} + {n}, {x} % {n})", ATOM
        return f"tl.where({off}, {x} // {n} - 1, {x} // {n})", ATOM

    def _bracketed(self, expr: Expr) -> str:
        text, level = self._print(expr)
        return text if level == ATOM else f"({text})"

    def _known(self, expr: Expr) -> bool:
        return all(
            n.op not in LOADS and (n.op != "var" or n.attr[0] in self.numbers) for n in walk(expr)
        )

    def _constant(self, expr: Expr) -> str:
        if expr.dtype is BOOL:
            return str(bool(expr.attr))
        text = super()._constant(expr)
        return f'float("{text}")' if text.lstrip("-") in ("inf", "nan") else text


class UnrolledPrinter(TensorPrinter):
    """The same where the loop over groups is unrolled."""

    numbers = frozenset({"g"})


class PositionPrinter(TensorPrinter):
    """Expressions in positions, which read arrays: an element whose index is no good unless a
    condition holds has the condition as a second argument."""

    def _print(self, expr: Expr) -> tuple[str, int]:
        if expr.op == "element":
            index, *guard = (self._bracketed(a) for a in expr.args)
            safe = f", mask={guard[0]}, other=0" if guard else ""
            return f"tl.load({self._rename(expr.attr)} + {index}{safe})", ATOM
        return super()._print(expr)

    def _select(self, expr: Expr) -> tuple[str, int]:
        condition, a, b = expr.args
        opposite = expr.dtype is BOOL and (a.op, b.op, a.attr, b.attr) == ("const",) * 2 + (0, 1)
        if opposite and condition.op == "<" and condition.args[0].dtype.is_int:
            left, right = (self._bracketed(x) for x in reversed(condition.args))
            return f"{left} <= {right}", PRECEDENCE["<"]
        return super()._select(expr)


def _small(expr: Expr) -> bool:
    """Whether an integer is the same in i32 and u32."""
    lo, hi = interval(expr)
    return 0 <= lo and hi < 2**31


def _typed(expr: Expr) -> bool:
    """Whether a u32 is printed as a tensor of that type, not as a number or an index."""
    return expr.dtype is U32 and (
        varies(expr) or expr.op in ("typed", "select") or any(map(_typed, expr.args))
    )


def _parts(count: int, width: int, dtype: str) -> str:
    """A little-endian number of which so many parts are loaded."""
    loads = [f"tl.load({{{n}}}).to(tl.{dtype})" for n in range(count)]
    shifted = [f"({load} << {n * width})" if n else load for n, load in enumerate(loads)]
    return f"({' | '.join(shifted)})"


_WORDS = {
    "constant.f32": "{x}",
    "constant.u32": "{x}",
    "bitcast.i32>f32": "{atom}.to(tl.float32, bitcast=True)",
    "bitcast.u32>f32": "{atom}.to(tl.float32, bitcast=True)",
    "bitcast.f32>i32": "{atom}.to(tl.int32, bitcast=True)",
    "bitcast.f32>u32": "{atom}.to(tl.uint32, bitcast=True)",
    "bitcast.i32>u32": "{atom}.to(tl.uint32)",
    "bitcast.u32>i32": "{atom}.to(tl.int32)",
    "min": "tl.minimum({a}, {b})",
    "max": "tl.maximum({a}, {b})",
    "call.abs": "tl.abs({x})",
    "call.erf": "tl.erf({x})",
    "call.exp": "tl.exp({x})",
    "call.log": "tl.log({x})",
    "call.sqrt": "tl.sqrt_rn({x})",
    "call.rsqrt": "tl.div_rn(1.0, tl.sqrt_rn({x}))",
    "call.sin": "tl.sin({x})",
    "call.cos": "tl.cos({x})",
    "fetch.u8.1": "tl.load({0}).to(tl.int32)",
    "fetch.i8.1": "tl.load({0}).to(tl.int32)",
    "fetch.u16.1": _parts(2, 8, "int32"),
    "fetch.u16.2": "tl.load({0}).to(tl.int32)",
    "fetch.i16.1": _parts(2, 8, "uint16") + ".to(tl.int16, bitcast=True).to(tl.int32)",
    "fetch.i16.2": "tl.load({0}).to(tl.int32)",
    "fetch.u32.1": _parts(4, 8, "uint32"),
    "fetch.u32.2": _parts(2, 16, "uint32"),
    "fetch.u32.4": "tl.load({0})",
    "fetch.f16.1": _parts(2, 8, "uint16") + ".to(tl.float16, bitcast=True).to(tl.float32)",
    "fetch.f16.2": "tl.load({0}).to(tl.float32)",
    "fetch.f32.1": _parts(4, 8, "uint32") + ".to(tl.float32, bitcast=True)",
    "fetch.f32.2": _parts(2, 16, "uint32") + ".to(tl.float32, bitcast=True)",
    "fetch.f32.4": "tl.load({0})",
}

#: where `g` is a tensor
TENSORS = Dialect(_WORDS, printer=TensorPrinter)

#: where `g` is a number when the kernel is compiled
UNROLLED = Dialect(_WORDS, printer=UnrolledPrinter)

#: where positions are tensors or numbers
POSITIONS = Dialect(_WORDS, printer=PositionPrinter)


_INTEGER = "tl.load({field} + ({index})).to(tl.int32)"

#: where rows and columns are tensors, and arrays are read element by element
TILES = Dialect(
    {
        **_WORDS,
        "load.f32": "tl.load({field} + ({index}))",
        "load.f16": "tl.load({field} + ({index})).to(tl.float32)",
        "load.i32": "tl.load({field} + ({index}))",
        "load.u32": "tl.load({field} + ({index})).to(tl.uint32, bitcast=True)",
        "load.u16": f"({_INTEGER} & 0xFFFF)",
        "load.i16": _INTEGER,
        "load.u8": _INTEGER,
        "load.i8": _INTEGER,
    },
    printer=PositionPrinter,
)

"""Expressions as text: the words of a language (`Dialect`), the printer, and lines that fit."""

from __future__ import annotations

import math
import re
import struct
import textwrap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from kernelgen.errors import TargetError
from kernelgen.ir.expr import (
    BITWISE,
    BOOL,
    COMPARISONS,
    F32,
    I32,
    LOADS,
    PRECEDENCE,
    SHIFTS,
    U32,
    Expr,
    walk,
    where,
)
from kernelgen.ir.ranges import interval


@dataclass(frozen=True, eq=False)
class Dialect:
    """The words of a language: how each thing that an expression can contain is spelt.

    Templates are str.format strings.  A missing word is an error that names it.  For {x} there is
    also {atom}: the same, in brackets where it is an operation.

    constant   by dtype name
    load       by storage name, of {field} and {index}
    cast       by "from>to" dtype names, of {x}; likewise bitcast
    call       by function name, of {x}
    word, element, spread1, lookup, negate   the packed operations; negate of {x} and {bits}
    select     of {condition} {a} {b}, where the condition is the same in all lanes
    blend      the same where it differs between lanes
    min, max   of {a} {b}
    shift      what a signed amount of a shift is wrapped in, where the language wants that
    constant.special   of the bits {x} of an f32 that is not finite
    constant.least   the smallest i32, where it is no constant with a sign
    constant.True, constant.False   where these are not 1 and 0
    not        of {x}, where there is a sign for it
    fetch      by storage name and alignment, of {address}; {buffer} names the bytes, and {suffix}
               is "" for those that are called w, else "_" and their name

    operators  by operator, where its sign is not Python's; a language in which // is / rounds
               integers to zero
    printer    a kind of `Printer`, for languages that need more than words
    """

    words: Mapping[str, str]
    operators: Mapping[str, str] = field(default_factory=dict)
    printer: type[Printer] | None = None

    def word(self, key: str) -> str:
        """The spelling of `key`."""
        found = self.words.get(key)
        if found is None:
            raise TargetError(f"this language has no word for {key}; add it to its dialect")
        return found


#: how tightly names and calls bind, tighter than any operator
ATOM = 99


class Printer:
    """Prints expressions of a language whose operators bind as C's or Python's, through its
    dialect."""

    def __init__(
        self,
        dialect: Dialect,
        tables: Callable[[tuple[Any, ...]], str],
        rename: Callable[[str], str] = str,
        buffer: str = "w",
    ) -> None:
        """`tables` names a table by its values; `rename` gives a name of the format's author that
        the walk or the language uses itself another spelling; `buffer` is what is fetched from."""
        self._dialect = dialect
        self._tables = tables
        self._rename = rename
        self._buffer = buffer

    def __call__(self, expr: Expr) -> str:
        return self._print(expr)[0]

    def _print(self, expr: Expr) -> tuple[str, int]:
        op, word, atom = expr.op, self._dialect.word, ATOM
        if op == "const":
            text = self._constant(expr)
            return text, atom if not text.startswith("-") else PRECEDENCE["neg"]
        if op == "var":
            return str(expr.attr[0]), atom
        if op in PRECEDENCE and op != "select":
            return self._operator(expr)
        parts = [self._print(a) for a in expr.args]
        args = [text for text, _ in parts]
        x = {"x": args[0], "atom": args[0] if parts[0][1] == ATOM else f"({args[0]})"}
        if op == "load":
            key = f"load.{expr.attr.storage.name}"
            return word(key).format(field=self._rename(expr.attr.name), index=args[0]), atom
        if op == "word":
            return word("word").format(field=self._rename(expr.attr.name), index=args[0]), atom
        if op == "fetch":
            storage, align = expr.attr
            return word(f"fetch.{storage.name}.{min(align, storage.nbytes)}").format(
                address=args[0],
                buffer=self._buffer,
                suffix="" if self._buffer == "w" else f"_{self._buffer}",
            ), atom
        if op == "element":
            return word("element").format(name=self._rename(expr.attr), index=args[0]), atom
        if op in ("cast", "bitcast"):
            key = f"{op}.{expr.args[0].dtype.value}>{expr.dtype.value}"
            return word(key).format(**x), atom
        if op == "select":
            no = [a.op == "const" and a.dtype is BOOL and not a.attr for a in expr.args[1:]]
            if no == [True, False] and expr.args[2].op == "const" and "not" in self._dialect.words:
                return word("not").format(**x), atom
            key = "blend" if varies(expr.args[0]) else "select"
            return word(key).format(condition=args[0], a=args[1], b=args[2]), atom
        if op in ("table", "lookup"):
            return word(op).format(table=self._tables(expr.attr), index=args[0]), atom
        if op == "negate":
            return word(op).format(x=args[0], bits=args[1]), atom
        if op == "spread":
            return word(f"spread{expr.attr}").format(**x), atom
        if op in ("min", "max"):
            return word(op).format(a=args[0], b=args[1]), atom
        if op == "call":
            return word(f"call.{expr.attr}").format(**x), atom
        if op == "named":
            return self._print(expr.args[0])
        raise TargetError(f"{op} cannot be printed")

    def _constant(self, expr: Expr) -> str:
        special = self._dialect.words.get("constant.special")
        if expr.dtype is F32 and special and not math.isfinite(expr.attr):
            bits = struct.unpack("<I", struct.pack("<f", expr.attr))[0]
            return special.format(x=self._dialect.word("constant.u32").format(x=hex(bits)))
        if expr.dtype is F32:
            return self._dialect.word("constant.f32").format(x=repr(float(expr.attr)))
        if expr.dtype is U32:
            text = f"0x{expr.attr:08X}" if expr.attr > 0xFFFF else str(expr.attr)
            return self._dialect.word("constant.u32").format(x=text)
        if expr.dtype is BOOL:
            return self._dialect.words.get(f"constant.{expr.attr}", str(int(expr.attr)))
        if expr.attr == -(2**31):  # its opposite is no i32
            return self._dialect.words.get("constant.least", str(expr.attr))
        return str(expr.attr)

    def _operator(self, expr: Expr) -> tuple[str, int]:
        op = expr.op
        level = PRECEDENCE[op]
        if op == "neg":
            text, inner = self._print(expr.args[0])
            return f"-{text if inner > level else f'({text})'}", level
        left, right = expr.args
        rounds_to_zero = self._dialect.operators.get("//") == "/"
        if op in ("//", "%") and rounds_to_zero and interval(left)[0] < 0:
            return self._print(_floored(expr))
        # the opposite of -2**31 is no i32
        if op == "+" and right.op == "const" and -(2**31) < right.attr < 0:
            op, right = "-", Expr("const", right.dtype, attr=-right.attr)
        sides = []
        for arg, is_right in ((left, False), (right, True)):
            text, inner = self._print(arg)
            if is_right and op in SHIFTS and arg.dtype is I32 and "shift" in self._dialect.words:
                text, inner = self._dialect.word("shift").format(x=text), 99
            regrouped = op == arg.op == "+" and arg.dtype.is_int  # a + (b + c) needs none
            loose = inner < level or (inner == level and is_right and not regrouped)
            mixed = op in (*BITWISE, *SHIFTS) and arg.op in PRECEDENCE and arg.op != op
            # a < b == c compares three values in some languages and two in others
            chained = op in COMPARISONS and arg.op in COMPARISONS
            bracketed = loose or chained or (mixed and inner != ATOM)
            sides.append(f"({text})" if bracketed else text)
        return f"{sides[0]} {self._dialect.operators.get(op, op)} {sides[1]}", level


def _floored(expr: Expr) -> Expr:
    """x // c or x % c, which round down, in operations that agree where division rounds to zero."""
    x, by = expr.args
    if by.op == "const" and by.attr > 0 and by.attr & (by.attr - 1) == 0:
        return x & (by.attr - 1) if expr.op == "%" else x >> int(by.attr).bit_length() - 1
    # the masks change nothing in the branch that is taken, and say that there is no sign
    above = Expr("//", I32, (x & 0x7FFFFFFF, by))
    below = -1 - Expr("//", I32, ((-1 - x) & 0x7FFFFFFF, by))
    floor = where(x < 0, below, above)
    return floor if expr.op == "//" else x - floor * by


def varies(expr: Expr) -> bool:
    """Whether the value depends on what is loaded, and so may differ between the rows of a tile."""
    return any(node.op in LOADS for node in walk(expr))


# ---- layout of the text -----------------------------------------------------------------------

#: columns of generated text
WIDTH = 100


def prose(text: str) -> str:
    """Text of a format's author that can stand in a docstring, in lines that are short enough."""
    plain = " ".join(text.replace("\\", "\\\\").replace('"', "'").split())
    return "\n".join(textwrap.wrap(plain, WIDTH))


def statement(head: str, text: str, indent: int = 4) -> str:
    """`head` and an expression's text as lines that are short enough to read: broken in the
    outermost brackets, at commas or operators."""
    return "\n".join(_lines(" " * indent + head, text, "", " " * indent))


def _lines(before: str, text: str, after: str, indent: str) -> Iterator[str]:
    if len(before + text + after) <= WIDTH:
        yield before + text + after
        return
    if cuts := _cuts(text):
        if before == indent:  # inside of brackets already
            yield from _parts(text, cuts, "", after, indent)
            return
        text = f"({text})"
    opening, closing = _longest_bracket(text)
    if opening == closing:
        yield before + text + after
        return
    inside, deeper = text[opening + 1 : closing], indent + " " * 4
    yield before + text[: opening + 1]
    if commas := _cuts(inside, ","):
        yield from _parts(inside, commas, ",", ",", deeper)
    else:
        yield from _parts(inside, _cuts(inside), "", "", deeper)
    yield indent + text[closing:] + after


def _parts(text: str, cuts: list[int], between: str, after: str, indent: str) -> Iterator[str]:
    """`text` cut into lines, each behind its operator or with a comma (`between`) behind it."""
    for a, b in pairwise([0, *cuts, len(text)]):
        part = text[a:b].removeprefix(",").strip()
        operator = f"{part.split()[0]} " if a and not between else ""
        end = after if b == len(text) else between
        yield from _lines(indent + operator, part.removeprefix(operator), end, indent)


def _cuts(text: str, what: str = "") -> list[int]:
    """Where `what`, or else the operators that bind least, stand outside of brackets."""
    found: dict[int, list[int]] = {}
    depth = 0
    for at, letter in enumerate(text):
        depth += (letter in "([") - (letter in ")]")
        sign = re.match(r" (\S+) ", text[at:])
        if depth == 0 and what and letter == what:
            found.setdefault(0, []).append(at)
        elif depth == 0 and not what and sign and sign[1] in PRECEDENCE:
            found.setdefault(PRECEDENCE[sign[1]], []).append(at)
    return found[min(found)] if found else []


def _longest_bracket(text: str) -> tuple[int, int]:
    """Where the longest of the outermost brackets opens and closes."""
    best, opening, depth = (0, 0), 0, 0
    for at, letter in enumerate(text):
        if letter in "([":
            opening = opening if depth else at
            depth += 1
        elif letter in ")]":
            depth -= 1
            if depth == 0:
                best = max(best, (opening, at), key=lambda pair: pair[1] - pair[0])
    return best

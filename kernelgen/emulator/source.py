"""Reads kernel text: its entries, and the few places that a C++ compiler does not understand.

Nothing here parses C++.  It tells code from comments and literals, and matches brackets.
"""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from kernelgen.emulator.compiler import EmulatorError

_TOKEN = re.compile(
    r"""(?P<skip>//(?:[^\n\\]|\\.|\\\n)*|/\*.*?\*/)
      | (?P<text>R"(?P<delim>[^(\s]*)\(.*?\)(?P=delim)"
               | "(?:[^"\\\n]|\\.|\\\n)*" | '(?:[^'\\\n]|\\.)+')
      | (?P<word>[A-Za-z_]\w*)
      | (?P<number>\.?\d(?:[\w.']|[eEpP][+-])*)
      | (?P<sign>.)""",
    re.VERBOSE | re.DOTALL,
)


class Token(NamedTuple):
    """A word, a sign or a literal, and where it lies in the text."""

    kind: str
    value: str
    start: int
    end: int


@functools.lru_cache(maxsize=64)
def tokens(source: str) -> tuple[Token, ...]:
    """The tokens of a text without comments and white space."""
    found = []
    for match in _TOKEN.finditer(source):
        kind = match.lastgroup or ""
        if match["text"] is not None:
            kind = "text"
        if kind != "skip" and not match[0].isspace() and match[0] != "\\":
            found.append(Token(kind, match[0], match.start(), match.end()))
    return tuple(found)


def _closing(found: Sequence[Token], at: int) -> int:
    """The index of the bracket that closes the one at `at`."""
    depth = 0
    for i in range(at, len(found)):
        if found[i].kind == "sign":
            depth += (found[i].value in "([{") - (found[i].value in ")]}")
            if depth == 0:
                return i
    return len(found) - 1


def _split(found: Sequence[Token], separator: str) -> list[list[Token]]:
    """Parts between separators that no bracket encloses; none if there is nothing."""
    parts: list[list[Token]] = [[]]
    depth = 0
    for token in found:
        if token.kind == "sign":
            depth += (token.value in "([{") - (token.value in ")]}")
            if token.value == separator and depth == 0:
                parts.append([])
                continue
        parts[-1].append(token)
    return parts if found else []


def _slice(source: str, found: Sequence[Token]) -> str:
    return source[found[0].start : found[-1].end] if found else ""


def _in_directive(source: str, position: int) -> bool:
    """Whether a position is inside a #define or the like."""
    start = source.rfind("\n", 0, position) + 1
    while start > 1 and source[start - 2] == "\\":
        start = source.rfind("\n", 0, start - 1) + 1
    return source[start:].lstrip(" \t").startswith("#")


def line_of(source: str, position: int) -> int:
    """The number of the line that a position is on."""
    return source.count("\n", 0, position) + 1


# ---- asm statements

#: parameters of a macro, or None if it takes no arguments, and its text
_Macros = dict[str, tuple[list[str] | None, str]]


def _macros(source: str) -> _Macros:
    """The macros that a file defines, the last definition of each."""
    found: _Macros = {}
    for match in re.finditer(
        r"^[ \t]*#[ \t]*define[ \t]+(\w+)(?:\(([^)]*)\))?((?:\\\n|[^\n])*)", source, re.MULTILINE
    ):
        parameters = None if match[2] is None else [p.strip() for p in match[2].split(",")]
        found[match[1]] = (parameters, match[3].replace("\\\n", " ").strip())
    return found


def _expanded(text: str, macros: _Macros, depth: int = 0) -> str:
    """A text with the file's own macros replaced, as operands of asm may come from some."""
    found, pieces, copied, i = tokens(text), [], 0, 0
    while i < len(found) and depth < 20:
        token, end = found[i], i
        parameters, body = macros.get(token.value, (None, ""))
        if token.kind == "word" and token.value in macros:
            if parameters is not None and i + 1 < len(found) and found[i + 1].value == "(":
                end = _closing(found, i + 1)
                given = [_slice(text, part) for part in _split(found[i + 2 : end], ",")]
                values = dict(zip(parameters, given, strict=False))
                body = "".join(
                    values.get(part, part) for part in re.split(r'("(?:[^"\\]|\\.)*"|\w+)', body)
                )
            if parameters is None or end > i:
                pieces.append(text[copied : token.start] + _expanded(body, macros, depth + 1))
                copied = found[end].end
        i = end + 1
    return "".join(pieces) + text[copied:]


def _operand(text: str, found: Sequence[Token], is_output: bool, line: int) -> str:
    constraint = found[0].value.strip('"')
    kind = constraint.strip("=+&")
    if found[0].kind != "text" or kind not in tuple("rlfdhn"):
        raise EmulatorError(f"line {line}: the asm operand {_slice(text, found)} has a constraint"
                            " that is not one of r, l, f, d, h, n")  # fmt: skip
    function = "in" if not is_output else "inout" if "+" in constraint else "out"
    return f"::emu::{function}<'{kind}'>{_slice(text, found[1:])}"


def _asm_call(source: str, inside: Sequence[Token], line: int, macros: _Macros) -> str:
    sections = _split(inside, ":")
    text = _slice(source, sections[0])
    operands = []
    for number, section in enumerate(sections[1:3]):
        plain = _expanded(_slice(source, section), macros)
        for operand in _split(tokens(plain), ","):
            operands.append(_operand(plain, operand, number == 0, line))
    array = f"EmuOperand emu_operands[] = {{{', '.join(operands)}}}; " if operands else ""
    values = f"emu_operands, {len(operands)}" if operands else "nullptr, 0"
    call = (
        f"do {{ static void *emu_place; {array}"
        f"emu_ptx(&emu_place, {text}, {values}, {line}); }} while (0)"
    )
    return call.replace("\n", " ") if "\n" not in text else call


def _extern_shared(found: Sequence[Token], i: int) -> int:
    """Where the declaration of an extern __shared__ array that begins at `i` ends, else 0."""
    if found[i].value != "extern" or i + 1 == len(found) or found[i + 1].kind != "word":
        return 0
    end = i
    while end < len(found) and found[end].value not in (";", "{", "="):
        end += 1
    shared = any(t.value == "__shared__" for t in found[i:end])
    return end if shared and end < len(found) and found[end].value == ";" else 0


def dynamic_offset(source: str) -> int:
    """How far from a well aligned address dynamic shared memory is to begin, so that it is aligned
    as a file declares it, and no better."""
    found = tokens(source)
    alignment = 16
    for i in range(len(found)):
        end = _extern_shared(found, i)
        for at in range(i, end - 3):
            if found[at].value in ("__align__", "alignas", "aligned", "__aligned__"):
                number = found[at + 2].value
                plain = number.isdigit() and found[at + 3].value == ")"
                alignment = max(alignment, int(number) if plain else 1024)
    return alignment if alignment < 1024 else 0


def _check_clusters(source: str, found: Sequence[Token]) -> None:
    """Raises where a kernel asks for clusters of several blocks."""
    for i, token in enumerate(found):
        if token.value == "__cluster_dims__" and token.kind == "word":
            inside = found[i + 2 : _closing(found, i + 1)]
            if any(t.kind == "number" and t.value != "1" for t in inside):
                raise EmulatorError(
                    f"line {line_of(source, token.start)}: clusters of more than one block are not"
                    " emulated; compile the kernel without __cluster_dims__"
                )


def rewrite_cuda(source: str) -> str:
    """Text that a C++ compiler takes: asm statements are calls, extern shared arrays the engine's.

    Every line stays on its number.
    """
    found = tokens(source)
    _check_clusters(source, found)
    macros = _macros(source)
    offset = dynamic_offset(source)
    pieces: list[str] = []
    copied = 0

    def replace(start: int, end: int, text: str) -> None:
        nonlocal copied
        missing = source.count("\n", start, end) - text.count("\n")
        # a macro's lines end in a backslash, and must go on to
        ending = "\\\n" if "\\\n" in source[start:end] else "\n"
        pieces.append(source[copied:start] + text + ending * missing)
        copied = end

    i = 0
    while i < len(found):
        token = found[i]
        if token.value in ("asm", "__asm__", "__asm") and token.kind == "word":
            at = i + 1
            while found[at].value in ("volatile", "__volatile__", "__volatile"):
                at += 1
            if found[at].value == "(":
                end = _closing(found, at)
                line = line_of(source, token.start)
                call = _asm_call(source, found[at + 1 : end], line, macros)
                replace(token.start, found[end].end, call)
                i = end
        elif end := _extern_shared(found, i):
            name = f"emu_dynamic_shared_{offset}" if offset else "emu_dynamic_shared"
            label = f' __asm__("{"_" if sys.platform == "darwin" else ""}{name}")'
            declaration = source[token.start : found[end].start].replace("__shared__", "")
            replace(token.start, found[end].start, declaration + label)
            i = end
        i += 1
    return "".join(pieces) + source[copied:]


# ---- entries


@dataclass(frozen=True)
class Parameter:
    """A parameter's name, its type's text, and the first word of its [[attribute]]."""

    name: str
    type: str
    attribute: str = ""


@dataclass(frozen=True)
class Entry:
    """A kernel and its parameters."""

    name: str
    declared: tuple[Parameter, ...]

    @property
    def parameters(self) -> tuple[str, ...]:
        """The names of the parameters that a launch gives."""
        return tuple(p.name for p in self.declared if not p.attribute)


def _parameter(source: str, found: Sequence[Token]) -> Parameter:
    attribute = ""
    end = len(found)
    for i, token in enumerate(found):
        if token.value == "[" and found[i + 1].value == "[" and i + 2 < len(found):
            attribute = found[i + 2].value
        if token.value in ("[", "="):
            end = min(end, i)
    words = [i for i in range(end) if found[i].kind == "word"]
    if not words:
        return Parameter("", _slice(source, found))
    type_text = " ".join(t.value for t in found[: words[-1]])
    return Parameter(found[words[-1]].value, type_text, attribute)


def _is_template(found: Sequence[Token], at: int) -> bool:
    """Whether the declaration that a token is in is a template or an instance of one."""
    while at > 0 and found[at - 1].value not in (";", "{", "}"):
        at -= 1
        if found[at].value == "template":
            return True
    return False


def entries(source: str, words: tuple[str, ...] = ("__global__",)) -> Iterator[Entry]:
    """Functions that follow one of the words; not those that macros and templates make."""
    found = tokens(source)
    for i, token in enumerate(found):
        if token.value not in words or token.kind != "word":
            continue
        if _in_directive(source, token.start) or _is_template(found, i):
            continue
        at = i + 1
        while at + 1 < len(found):
            if found[at].value in (";", "{", ")"):
                break
            if found[at].kind == "word" and found[at + 1].value == "(":
                end = _closing(found, at + 1)
                after = found[end + 1].value if end + 1 < len(found) else ""
                if after in ("{", ";", "["):
                    parts = _split(found[at + 2 : end], ",")
                    parameters = (_parameter(source, p) for p in parts if p[0].value != "void")
                    yield Entry(found[at].value, tuple(parameters))
                    break
                at = end
            at += 1

"""The stages of the IR, from a format's description to what a kernel computes, as text.

The stages of the format come first: its expressions as they are described, simplified for four
neighbouring elements, and packed.  The last stage is what the kernel's walk got to print.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from kernelgen.errors import TargetError
from kernelgen.ir.block import BlockFormat
from kernelgen.ir.check import unread
from kernelgen.ir.expr import I32, Expr, const, show, var
from kernelgen.ir.lanes import LANE, LANES, pack
from kernelgen.ir.ranges import interval
from kernelgen.ir.rules import simplify
from kernelgen.ir.steps import code_word, group_var, word_var
from kernelgen.targets.base import Kernel

#: a stage and its expression
Stage = tuple[str, Expr]

#: ops whose kernels read no elements
_NO_DECODE = ("quantize", "prepare")


def lines(kernel: Kernel) -> Iterator[str]:
    """All stages of the decode that a kernel contains."""
    if kernel.op in _NO_DECODE or not isinstance(kernel.subject, BlockFormat):
        raise TargetError(
            f"the stages of {kernel.op} were asked for, which decodes nothing; ask for those of"
            " dequantize, matvec or matmul"
        )
    fmt = kernel.format
    steps = kernel.walk.steps(fmt, kernel.config)
    packed = hasattr(steps, "scalar_because")
    yield (
        f"{fmt.name}: blocks of {fmt.block} elements in {fmt.nbytes} bytes, groups of {fmt.group},"
        f" {fmt.bits:g} bits an element"
    )
    for name, count in unread(fmt).items():
        yield f"no value depends on {count} bit{'s' * (count > 1)} of {name}"
    yield f"element i = {_formula(fmt)}, g = i // {fmt.group}"
    if packed and not fmt.float_codes:
        yield "word(f, n) holds bytes 4n..4n+3 of field f; lane = 0..3 counts the bytes of a word"
    if fmt.float_codes:
        yield from _float_code(fmt)
    else:
        yield from _code(fmt, packed)
    for name in fmt.ints:
        yield from _group_integer(fmt, name, packed)
    yield from _scale_and_offset(fmt)
    yield from _kernel(kernel, steps)


def _formula(fmt: BlockFormat) -> str:
    code = f"(code(i) - {fmt.bias})" if fmt.bias else "code(i)"
    scaled = code if fmt.scale is None else f"scale(g) * {code}"
    return scaled if fmt.offset is None else f"{scaled} + offset(g)"


def _float_code(fmt: BlockFormat) -> Iterator[str]:
    described = fmt.code_expr(var("i", fmt.block))
    stages = [("described", described), ("simplified", simplify(described))]
    yield from _block("code(i), a float", stages)


def _code(fmt: BlockFormat, packed: bool) -> Iterator[str]:
    lo, hi = fmt.code_range
    described = fmt.code_expr(var("i", fmt.block))
    stages = [("described", described)]
    if not packed:
        yield from _block(f"code(i), {lo}..{hi}", [*stages, ("simplified", simplify(described))])
        return
    at = fmt.group * group_var(fmt) + LANES * word_var(fmt) + LANE
    four = code_word(fmt)
    stages += [(f"i = {show(at)}", simplify(fmt.code_expr(at))), ("packed", four.codes)]
    yield from _block(f"code(i), {lo}..{hi}", stages, four.scalar_because)
    if four.bias != fmt.bias:
        yield f"  packed codes are code(i) {four.bias - fmt.bias:+d}; offset(g) makes up for it"


def _group_integer(fmt: BlockFormat, name: str, packed: bool) -> Iterator[str]:
    body = fmt.ints[name](fmt.view, group_var(fmt))
    lo, hi = interval(body)
    packs = packed and fmt.groups % LANES == 0 and (0 <= lo <= hi <= 255 or -128 <= lo <= hi <= 127)
    stages, reason = [("described", body)], None
    for q in range(fmt.groups // LANES if packs else 0):
        at = const(LANES * q, I32) + LANE
        placed = simplify(fmt.ints[name](fmt.view, at))
        four = pack(placed)
        reason = reason or four.scalar_because
        stages += [(f"g = {show(simplify(at))}", placed), ("packed", four.expr)]
    yield from _block(f"{name}(g), {lo}..{hi}", stages, reason)


def _scale_and_offset(fmt: BlockFormat) -> Iterator[str]:
    g = group_var(fmt)
    if fmt.scale is not None:
        yield from _block("scale(g)", [("described", fmt.scale_expr(g))])
    if fmt.offset is not None:
        yield from _block("offset(g)", [("described", fmt.offset_expr(g))])


def _kernel(kernel: Kernel, steps: Any) -> Iterator[str]:
    stages = list(_expressions("", steps))
    title = f"in {kernel.op} of target {kernel.target}, walk {kernel.walk.name}"
    yield from _block(title, stages)
    for note in kernel.notes:
        yield f"  {note}"


def _expressions(name: str, value: Any) -> Iterator[Stage]:
    """The expressions in what a walk got, under the names by which it asks for them."""
    if isinstance(value, Expr):
        if value.op != "var":  # such as the variable that holds a field's address
            yield name, value
    elif isinstance(value, tuple):
        for n, one in enumerate(value):
            named = getattr(one, "field", one)
            yield from _expressions(getattr(named, "name", f"{name} {n}"), one)
    elif dataclasses.is_dataclass(value) and not isinstance(value, BlockFormat):
        for field in dataclasses.fields(value):
            inner = getattr(value, field.name)
            own = isinstance(inner, Expr) and name
            yield from _expressions(name if own else f"{name} {field.name}".strip(), inner)


def _block(title: str, stages: list[Stage], scalar_because: str | None = None) -> Iterator[str]:
    """A quantity's stages; one that changed nothing says so."""
    yield ""
    yield title
    width = max((len(name) for name, _ in stages), default=0)
    before = None
    for name, expr in stages:
        text = show(expr)
        yield f"  {name:{width}}  {text if text != before else 'the same'}"
        before = text
    if scalar_because:
        yield f"  lane by lane, because {scalar_because}"

"""The stages of the IR, from a format's description to what kernels compute, as text.

Kernels that multiply take four codes at once; their stages end in what `kernelgen.ir.steps` gives
to the walks.  Kernels that dequantize go element by element, and have two stages.
"""

from __future__ import annotations

from collections.abc import Iterator

from kernelgen.errors import TargetError
from kernelgen.ir.block import BlockFormat
from kernelgen.ir.expr import I32, Expr, const, show, var
from kernelgen.ir.lanes import LANE, LANES, pack
from kernelgen.ir.layout import lower_to_words
from kernelgen.ir.ranges import interval
from kernelgen.ir.rules import simplify
from kernelgen.ir.steps import Steps, group_var, scalar_steps, steps, unsigned_code, word_var

#: a stage and its expression
Stage = tuple[str, Expr]

_FOUR_CODES = ("matvec", "matmul")


def lines(op: str, fmt: BlockFormat) -> Iterator[str]:
    """All stages of the decode that a kernel of this op contains."""
    if op not in ("dequantize", *_FOUR_CODES):
        raise TargetError(
            f"the stages of {op} were asked for, which decodes nothing;"
            f" dequantize, {' and '.join(_FOUR_CODES)} do"
        )
    yield (
        f"{fmt.name}: blocks of {fmt.block} elements in {fmt.nbytes} bytes, groups of {fmt.group},"
        f" {fmt.bits:g} bits an element"
    )
    yield f"element i = {_formula(fmt)}, g = i // {fmt.group}"
    if op not in _FOUR_CODES:
        yield from _one_at_a_time(fmt)
    elif fmt.float_codes:
        yield from _float_elements(fmt)
    else:
        yield from _four_at_once(fmt, steps(fmt))


def _formula(fmt: BlockFormat) -> str:
    code = f"(code(i) - {fmt.bias})" if fmt.bias else "code(i)"
    scaled = code if fmt.scale is None else f"scale(g) * {code}"
    return scaled if fmt.offset is None else f"{scaled} + offset(g)"


def _four_at_once(fmt: BlockFormat, made: Steps) -> Iterator[str]:
    yield from _codes(fmt, made)
    for name, body in fmt.ints.items():
        yield from _group_integers(fmt, name, body(fmt.view, group_var(fmt)), made)
    g = group_var(fmt)
    if made.scale is not None:
        yield from _block("scale(g)", [("described", fmt.scale_expr(g)), ("in words", made.scale)])
    total = fmt.total_offset_expr(g)
    if made.offset is not None:
        described = [("described", fmt.offset_expr(g))] if fmt.offset is not None else []
        with_bias = [("with the bias", total)] if fmt.bias and total is not None else []
        yield from _block("offset(g)", [*described, *with_bias, ("in words", made.offset)])


def _codes(fmt: BlockFormat, made: Steps) -> Iterator[str]:
    i = var("i", fmt.block)
    at = fmt.group * group_var(fmt) + LANES * word_var(fmt) + LANE
    code, bias = unsigned_code(fmt, at)
    packed = pack(code)
    assert made.codes is not None
    lo, hi = fmt.code_range
    yield from _block(
        f"code(i), {lo}..{hi}",
        [
            ("described", fmt.code_expr(i)),
            (f"i = {show(at)}", simplify(code)),
            ("packed", packed.expr),
            ("in words", made.codes),
        ],
        packed.scalar_because,
    )
    if bias != fmt.bias:
        yield f"  the table begins at 0 instead of {lo}: the rest moves into the offset"
    if made.signed and lo >= 0:
        yield "  128 is taken off, so that a code fits a signed byte, and put into the offset"


def _group_integers(fmt: BlockFormat, name: str, body: Expr, made: Steps) -> Iterator[str]:
    lo, hi = interval(body)
    title = f"{name}(g), {lo}..{hi}"
    words = {one.name: one for one in made.ints}.get(name)
    if words is None:
        lowered = simplify(lower_to_words(body))
        yield from _block(title, [("described", body), ("in words", lowered)])
        return
    result: list[Stage] = [("described", body)]
    for q, expr in enumerate(words.words):
        first = const(LANES * q, I32) + LANE
        placed = simplify(fmt.ints[name](fmt.view, first))
        result.append((f"g = {show(simplify(first))}", placed))
        result.append(("packed", pack(placed).expr))
        result.append((f"word {q}", expr))
    yield from _block(title, result, words.scalar_because)


def _float_elements(fmt: BlockFormat) -> Iterator[str]:
    i = var("i", fmt.block)
    described = fmt.value_expr(i)
    result = [("described", described), ("simplified", simplify(described))]
    last = steps(fmt).values
    yield from _block("element(i), a float", [*result, *([("in words", last)] if last else [])])


def _one_at_a_time(fmt: BlockFormat) -> Iterator[str]:
    i, g, made = var("i", fmt.block), group_var(fmt), scalar_steps(fmt)
    at = fmt.group * g + var("l", fmt.group)
    what = "a float" if fmt.float_codes else "{}..{}".format(*fmt.code_range)
    described = fmt.code_expr(i)
    yield from _block(f"code(i), {what}", [("described", described), (f"i = {show(at)}", made.code)])
    for name, body in fmt.ints.items():
        yield from _block(f"{name}(g)", [("described", body(fmt.view, g))])
    if made.scale is not None:
        yield from _block("scale(g)", [("described", fmt.scale_expr(g)), ("simplified", made.scale)])
    if made.offset is not None:
        offset = fmt.offset_expr(g)
        yield from _block("offset(g)", [("described", offset), ("simplified", made.offset)])


def _block(title: str, found: list[Stage], scalar_because: str | None = None) -> Iterator[str]:
    """A quantity's stages; one that changed nothing says so."""
    yield ""
    yield title
    width = max(len(name) for name, _ in found)
    before = None
    for name, expr in found:
        text = show(expr)
        yield f"  {name:{width}}  {text if text != before else 'the same'}"
        before = text
    if scalar_because:
        yield f"  lane by lane, because {scalar_because}"

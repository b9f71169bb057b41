"""Well-formedness of format descriptions, proved by trying every index a block has."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from kernelgen.ir.evaluate import evaluate
from kernelgen.ir.expr import Expr, show, var
from kernelgen.ir.ranges import interval

if TYPE_CHECKING:
    from kernelgen.ir.block import BlockFormat

#: random blocks in which codes are compared: two of one bit are alike in all by a chance of 2^-64
_TRIED = 64
#: random blocks of which each bit is flipped
_FLIPPED = 8


def problems(expr: Expr, variable: str, count: int) -> list[str]:
    """What is wrong with `expr` for some value of `variable` in 0 ... count-1; empty if nothing.

    Looked for: a load outside its field, a table index outside its table, a division by what is
    not a positive constant, a shift by more than 31 bits.  An operand of `where` counts only for
    the values that select it.
    """
    found: list[str] = []
    values = np.arange(count)

    def visit(node: Expr, live: npt.NDArray[np.bool_]) -> None:
        if not live.any():
            return
        if node.op == "select" and not _reads(node.args[0]):
            chosen = np.broadcast_to(evaluate(node.args[0], {variable: values}), live.shape)
            visit(node.args[0], live)
            visit(node.args[1], live & chosen)
            visit(node.args[2], live & ~chosen)
            return
        for arg in node.args:
            visit(arg, live)
        message = _problem(node, variable, values, live)
        if message and message not in found:
            found.append(message)

    visit(expr, np.ones(count, dtype=np.bool_))
    return found


def twins(fmt: BlockFormat) -> tuple[int, int] | None:
    """Two elements of a block that are the same code whatever the bytes are: bits that were meant
    for one are read for both.  None where all are apart; tried with random blocks."""
    blocks = np.random.default_rng(0).integers(0, 256, (_TRIED, fmt.nbytes), np.uint8)
    numbers = np.arange(fmt.block)
    codes = evaluate(fmt.code_expr(var("i", fmt.block)), {"i": numbers}, fmt.split(blocks))
    each = np.ascontiguousarray(np.broadcast_to(codes, (_TRIED, fmt.block)).T)
    _, first, which = np.unique(each, axis=0, return_index=True, return_inverse=True)
    found = np.flatnonzero(first[which.reshape(-1)] != numbers)
    return (int(first[which.reshape(-1)[found[0]]]), int(found[0])) if len(found) else None


def unread(fmt: BlockFormat) -> dict[str, int]:
    """Bits of the fields that change no value, by the field's name; of what repeats the codes none
    are read.  Tried with random blocks."""
    rng = np.random.default_rng(0)
    bits = np.arange(8 * fmt.nbytes)
    seen = np.zeros(len(bits), np.bool_)
    for block in rng.integers(0, 256, (_FLIPPED, fmt.nbytes), np.uint8):
        flipped = np.repeat(block[None], len(bits) + 1, axis=0)
        flipped[bits, bits // 8] ^= (1 << (bits % 8)).astype(np.uint8)
        with np.errstate(all="ignore"):
            values = fmt.decode(flipped).view(np.uint32)
        seen |= (values[:-1] != values[-1]).any(axis=1)
    of_field = {
        f.name: int((~seen[8 * f.offset : 8 * (f.offset + f.nbytes)]).sum())
        for f in fmt.layout_fields
        if f.name not in fmt.derived
    }
    return {name: count for name, count in of_field.items() if count}


def _reads(expr: Expr) -> bool:
    return expr.op in ("load", "word") or any(_reads(a) for a in expr.args)


def _range(
    expr: Expr, variable: str, values: npt.NDArray[Any], live: npt.NDArray[np.bool_]
) -> tuple[int, int]:
    if _reads(expr):
        return interval(expr)
    exact = np.broadcast_to(evaluate(expr, {variable: values}), live.shape)[live]
    return int(exact.min()), int(exact.max())


def _problem(
    node: Expr, variable: str, values: npt.NDArray[Any], live: npt.NDArray[np.bool_]
) -> str | None:
    if node.op in ("load", "table"):
        name, size = (
            (f"field {node.attr.name}", node.attr.count)
            if node.op == "load"
            else ("a table", len(node.attr))
        )
        lo, hi = _range(node.args[0], variable, values, live)
        if lo < 0 or hi >= size:
            return f"{name} has elements 0..{size - 1}, but {show(node)} reads {lo}..{hi}"
    if node.op in ("//", "%") and (node.args[1].op != "const" or node.args[1].attr <= 0):
        return f"{show(node)} divides by what is not a positive constant"
    if node.op in ("<<", ">>"):
        lo, hi = _range(node.args[1], variable, values, live)
        if lo < 0 or hi > 31:
            return f"{show(node)} shifts by {lo}..{hi} bits; 0..31 are possible"
    return None

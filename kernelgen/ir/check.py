"""Well-formedness of format descriptions, proved by trying every index a block has."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from kernelgen.ir.evaluate import evaluate
from kernelgen.ir.expr import Expr, show
from kernelgen.ir.ranges import interval


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

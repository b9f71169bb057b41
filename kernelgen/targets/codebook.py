"""Tables of words as an argument, for languages that have no constant arrays, or make one for each
thread."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

from kernelgen.ir.block import BlockFormat
from kernelgen.ir.expr import Expr, WordTable, table, transform
from kernelgen.ir.ops.attention import Attention
from kernelgen.ir.steps import codebook
from kernelgen.targets.base import Argument

#: what a kernel's source calls the argument
CODEBOOK = "codebook"


@functools.lru_cache(maxsize=256)
def codebook_of(subject: Any) -> WordTable | None:
    """The words of the argument: a format's table, or those of the formats of keys and values, one
    behind the other where they differ; None where there is none."""
    if isinstance(subject, BlockFormat):
        return codebook(subject)
    if not isinstance(subject, Attention):
        return None
    found = dict.fromkeys(filter(None, map(codebook, (subject.k, subject.v))))
    return WordTable(itertools.chain.from_iterable(found)) if found else None


def in_codebook(kind: Attention, expr: Expr) -> Expr:
    """An expression that looks into the argument where it looked into a format's own table."""
    whole = codebook_of(kind)

    def change(node: Expr) -> Expr | None:
        if whole is None or node.op != "table" or not isinstance(node.attr, WordTable):
            return None
        # that of the values is the last
        begin = 0 if node.attr == codebook(kind.k) else len(whole) - len(node.attr)
        return table(whole, node.args[0] + begin if begin else node.args[0])

    return transform(expr, change)


def codebook_argument(dtype: str) -> Callable[[Any], tuple[Argument, ...]]:
    """Operands of a walk: the table of words of its subject, where there is one."""

    def operands(subject: Any) -> tuple[Argument, ...]:
        found = codebook_of(subject)
        return (Argument(CODEBOOK, "table", dtype, (str(len(found)),)),) if found else ()

    return operands

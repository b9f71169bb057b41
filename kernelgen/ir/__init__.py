"""The intermediate representation: expressions, formats, ops, and the passes over them.

What a format's author needs is importable from here.
"""

from __future__ import annotations

from kernelgen.ir.block import BlockFormat, Derived
from kernelgen.ir.expr import (
    BOOL,
    F32,
    I32,
    U32,
    Expr,
    bitcast,
    call,
    cast,
    const,
    equal,
    logical_not,
    maximum,
    minimum,
    table,
    var,
    where,
)

__all__ = [
    "BOOL", "F32", "I32", "U32", "BlockFormat", "Derived", "Expr", "bitcast", "call", "cast",
    "const", "equal", "logical_not", "maximum", "minimum", "table", "var", "where",
]  # fmt: skip

"""The numpy target: the reference as Python source that needs numpy alone."""

from __future__ import annotations

import builtins
import keyword
import textwrap

from kernelgen.config import Capabilities, NoConfig
from kernelgen.ir.expr import Expr, Field
from kernelgen.ir.ops.attention import Attention
from kernelgen.targets.attention import TENSORS, arrays, paged
from kernelgen.targets.base import Argument, Target, Walk, integer_codes
from kernelgen.targets.maps import GLOBALS as MAP_GLOBALS
from kernelgen.targets.numpy import maps
from kernelgen.targets.numpy.dialect import ARRAYS, MAPS, statement
from kernelgen.targets.numpy.steps import ArraySteps, array_steps, attention_steps
from kernelgen.targets.printer import Printer, prose

_WEIGHTS = Argument("w", "in", "u8", ("N", "ROW_BYTES"))
_X = Argument("x", "in", "f32", ("M", "K"))
_SYMBOLS = {
    "M": "rows of x",
    "N": "rows of w",
    "R": "rows asked for",
    "K": "elements in a row",
    "COUNT": "rows of blocks",
    "ROW_BYTES": "K / block * block_bytes",
    "BLOCKS": "K / block",
    "GROUPS": "K / group",
}

#: what Python and the templates call something; a format's field of that name gets an underscore
_RESERVED = frozenset(
    (
        *keyword.kwlist, *keyword.softkwlist, *dir(builtins),
        "np", "npt", "BLOCK", "BLOCK_BYTES", "CHUNK", "GROUP", "SMALLEST", "decode",
        "blocks", "code", "g", "i", "offset", "scale",
    )
)  # fmt: skip


_ATTENTION_SYMBOLS = {
    "B": "batches", "H": "heads of q", "HK": "heads of k and v", "T": "queries", "S": "keys",
    "D": "elements of a head", "DV": "elements of a value",
    "K_BYTES": "bytes of a row of blocks of k", "V_BYTES": "bytes of a row of blocks of v",
}  # fmt: skip


#: what is handed on batch by batch
_EACH = ("q", "k", "v", "lengths", "pages")


def _given(arguments: tuple[Argument, ...]) -> str:
    """Operands as they are handed on."""
    first = [a.name for a in arguments if a.role == "in" and a.name not in _EACH]
    return "".join(f", {name}" for name in first)


def _matmul(op: str, precision: str) -> Walk:
    return Walk(
        name=f"rows_{precision}",
        op=op,
        precision=precision,
        template=f"matmul_{precision}.py.j2",
        config=NoConfig,
        arguments=(_X, _WEIGHTS, Argument("y", "result", "f32", ("M", "N"))),
        symbols=_SYMBOLS,
        applies=integer_codes if precision == "int8" else lambda fmt: None,
        steps=array_steps,
        norms=True,
    )


#: how a field's bytes are read, and the type that its elements are computed with
_READS = {
    "u8": ("", "int32"),
    "i8": (".view(np.int8)", "int32"),
    "u16": ('.view("<u2")', "int32"),
    "i16": ('.view("<i2")', "int32"),
    "u32": ('.view("<u4")', "uint32"),
    "f16": ('.view("<f2")', "float32"),
    "f32": ('.view("<f4")', "float32"),
}


def _read(one: Field) -> str:
    """A field of the array `blocks`: (blocks, elements of the field)."""
    view, dtype = _READS[one.storage.name]
    return f"blocks[:, {one.offset}:{one.offset + one.nbytes}]{view}.astype(np.{dtype})"


def _of_elements(steps: ArraySteps, expr: Expr, arrays: Printer) -> str:
    """An expression of groups as it is used for elements."""
    repeat = steps.fmt.group > 1 and steps.per_group(expr)
    return f"np.repeat({arrays(expr)}, {steps.fmt.group}, axis=-1)" if repeat else arrays(expr)


#: values of the longest table that is written as a list
_LISTED = 256


def _table(name: str, values: tuple[int | float, ...]) -> str:
    """The definition of a table; of bytes, a long one is written by their digits."""
    if len(values) > _LISTED and not any(isinstance(v, float) or not 0 <= v < 256 for v in values):
        digits = bytes(int(v) for v in values).hex()
        lines = "".join(f'\n    "{digits[n : n + 94]}"' for n in range(0, len(digits), 94))
        return f"{name} = np.frombuffer(bytes.fromhex({lines}\n), np.uint8).astype(np.int32)"
    dtype = "float32" if any(isinstance(v, float) for v in values) else "int32"
    inside = ", ".join(repr(v).replace("inf", "np.inf").replace("nan", "np.nan") for v in values)
    line = f"{name} = np.array([{inside}], np.{dtype})"
    if len(line) <= 100:
        return line
    wrapped = textwrap.fill(inside, 100, initial_indent="    ", subsequent_indent="    ")
    return f"{name} = np.array([\n{wrapped},\n], np.{dtype})"


TARGET = Target(
    name="numpy",
    description="readable Python on numpy arrays: the reference",
    suffix=".py",
    walks=(
        Walk(
            "blocks", "dequantize", "", "dequantize.py.j2", NoConfig,
            (
                Argument("blocks", "in", "u8", ("COUNT", "BLOCK_BYTES")),
                Argument("y", "result", "f32", ("COUNT", "BLOCK")),
            ),
            symbols=_SYMBOLS, contract=False, steps=array_steps,
        ),
        Walk(
            "rows", "get_rows", "", "get_rows.py.j2", NoConfig,
            (
                _WEIGHTS,
                Argument("ids", "in", "i64", ("R",)),
                Argument("y", "result", "f32", ("R", "K")),
            ),
            symbols=_SYMBOLS, contract=False, steps=array_steps,
        ),
        Walk(
            "absmax", "quantize", "int8", "quantize.py.j2", NoConfig,
            (
                _X,
                Argument("q", "result", "i8", ("M", "K")),
                Argument("scale", "result", "f32", ("M", "BLOCKS")),
                Argument("sums", "result", "f32", ("M", "GROUPS")),
            ),
            symbols=_SYMBOLS, applies=integer_codes, contract=False, steps=array_steps,
            norms=True,
        ),
        _matmul("matvec", "int8"),
        _matmul("matvec", "fp32"),
        _matmul("matmul", "int8"),
        _matmul("matmul", "fp32"),
        Walk(
            "plain", "attention", "fp32", "attention.py.j2", NoConfig,
            (
                *TENSORS[:3],
                Argument("y", "result", "f32", ("B", "H", "T", "DV")),
            ),
            symbols=_ATTENTION_SYMBOLS, steps=attention_steps,
            operands=lambda kind: (*paged(kind), *arrays(kind)),
            kind=Attention,
        ),
        *maps.WALKS,
    ),
    dialects={"arrays": ARRAYS, "maps": MAPS},
    capabilities=Capabilities(),
    globals={
        "given_to": _given, "of_elements": _of_elements, "prose": prose, "read": _read,
        "statement": statement, "table": _table, **MAP_GLOBALS, **maps.GLOBALS,
    },
    reserved=_RESERVED | maps.RESERVED,
    prefix="",
)  # fmt: skip

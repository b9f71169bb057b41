"""What an expression means: its value, computed by numpy.

Everything that kernelgen generates is judged by this file.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from kernelgen.errors import ExprError
from kernelgen.ir.expr import BOOL, F32, I32, U32, DType, Expr, walk

Array = npt.NDArray[Any]

NUMPY_DTYPES: dict[DType, npt.DTypeLike] = {
    BOOL: np.bool_, I32: np.int32, U32: np.uint32, F32: np.float32,
}  # fmt: skip

#: how the storage types of fields lie in numpy arrays
NUMPY_STORAGE: dict[str, npt.DTypeLike] = {
    "u8": np.uint8, "i8": np.int8, "u16": "<u2", "i16": "<i2", "u32": "<u4",
    "f16": "<f2", "f32": "<f4",
}  # fmt: skip

#: functions of one f32, computed in double precision and rounded once
_FUNCTIONS: dict[str, Any] = {
    "exp": np.exp, "log": np.log, "sqrt": np.sqrt, "rsqrt": lambda x: 1 / np.sqrt(x),
    "tanh": np.tanh, "sin": np.sin, "cos": np.cos, "abs": np.abs,
}  # fmt: skip

_BINARY: dict[str, Any] = {
    "+": np.add, "-": np.subtract, "*": np.multiply, "/": np.divide, "//": np.floor_divide,
    "%": np.mod, "&": np.bitwise_and, "|": np.bitwise_or, "^": np.bitwise_xor,
    "<": np.less, "==": np.equal, "min": np.minimum, "max": np.maximum,
}  # fmt: skip


def evaluate(
    expr: Expr,
    variables: Mapping[str, Any] | None = None,
    fields: Mapping[str, Array] | None = None,
) -> Array:
    """The value of `expr`.

    `variables` maps names to integers or one-dimensional integer arrays of one length I.
    `fields` maps field names to arrays of shape (..., count) with the field's stored dtype.
    For `fetch`, "w" holds all bytes of the weights, uint8.
    The result has shape (..., I), (..., 1) where no load depends on an array, and no field
    dimensions where nothing is loaded.  Integer arithmetic wraps.
    """
    variables = variables or {}
    fields = fields or {}
    values: dict[Expr, Array] = {}
    with np.errstate(all="ignore"):
        for node in walk(expr):
            args = [values[a] for a in node.args]
            values[node] = np.asarray(_apply(node, args, variables, fields))
    return values[expr]


def _apply(
    node: Expr, args: list[Array], variables: Mapping[str, Any], fields: Mapping[str, Array]
) -> Any:
    op, dtype = node.op, NUMPY_DTYPES[node.dtype]
    if op == "const":
        return np.asarray(node.attr, dtype=dtype)
    if op == "var":
        name, lo, hi = node.attr
        if name not in variables:
            raise ExprError(f"no value given for variable {name}; given: {sorted(variables)}")
        value = np.asarray(variables[name])
        if value.size and (value.min() < lo or value.max() > hi):
            raise ExprError(f"variable {name} must lie in {lo}..{hi}, not {value}")
        return value.astype(dtype)
    if op == "load":
        return _elements(_given(node.attr.name, fields), args[0]).astype(dtype)
    if op == "element":
        return _elements(_given(node.attr, fields), args[0]).astype(dtype)
    if op == "fetch":
        storage = NUMPY_STORAGE[node.attr[0].name]
        raw = _given("w", fields)
        size = np.dtype(storage).itemsize
        bytes_ = np.stack([_elements(raw, args[0].astype(np.int64) + i) for i in range(size)], -1)
        return bytes_.view(storage)[..., 0].astype(dtype)
    if op == "table":
        return np.take(node.attr.array, args[0], mode="clip")
    if op == "cast":
        if node.dtype.is_int and node.args[0].dtype.is_int:
            return args[0].astype(np.int64).astype(dtype)
        return args[0].astype(dtype)
    if op == "bitcast":
        return np.ascontiguousarray(args[0]).view(dtype).reshape(args[0].shape)
    if op == "select":
        return np.where(args[0], args[1], args[2])
    if op == "named":
        return args[0]
    if op == "neg":
        return np.negative(args[0])
    if op == "call":
        if node.attr == "erf":
            return _erf(args[0]).astype(np.float32)
        return _FUNCTIONS[node.attr](args[0].astype(np.float64)).astype(np.float32)
    if op in ("<<", ">>"):
        # a shift by 32 or more has no meaning in C or in the IR: ir.check proves there is none
        function = np.left_shift if op == "<<" else np.right_shift
        return function(args[0], (args[1] & 31).astype(dtype))
    if op == "word":
        bytes_ = np.ascontiguousarray(_given(node.attr.name, fields)).view(np.uint8)
        lanes = [_elements(bytes_, 4 * args[0] + i).astype(np.uint32) for i in range(4)]
        words = [lane << np.uint32(8 * i) for i, lane in enumerate(lanes)]
        return words[0] | words[1] | words[2] | words[3]
    if op == "spread":
        bits, mask = node.attr, np.uint32((1 << node.attr) - 1)
        lanes = [((args[0] >> np.uint32(bits * i)) & mask) << np.uint32(8 * i) for i in range(4)]
        return lanes[0] | lanes[1] | lanes[2] | lanes[3]
    if op == "negate":  # ~b + 1, which leaves no byte as b is not 0
        return (args[0] ^ (args[1] * np.uint32(255))) + args[1]
    if op == "lookup":
        values = np.asarray([v & 255 for v in node.attr] + [0] * (256 - len(node.attr)), np.uint32)
        codes = [(args[0] >> np.uint32(8 * i)) & np.uint32(255) for i in range(4)]
        lanes = [values[code] << np.uint32(8 * i) for i, code in enumerate(codes)]
        return lanes[0] | lanes[1] | lanes[2] | lanes[3]
    return _BINARY[op](args[0], args[1])


def _given(name: str, fields: Mapping[str, Array]) -> Array:
    if name not in fields:
        raise ExprError(f"no values given for field {name}; given: {sorted(fields)}")
    return fields[name]


def _elements(array: Array, index: Array) -> Array:
    """Elements of the last axis; `index` is one-dimensional, or depends on the blocks itself.

    An index outside reads the nearest element.  In a well-formed expression (see ir.check) only a
    branch of where() that is not taken has one.
    """
    index = np.atleast_1d(index)
    if index.ndim == 1:
        return np.take(array, index, axis=-1, mode="clip")
    blocks = np.broadcast_shapes(array.shape[:-1], index.shape[:-1])
    array = np.broadcast_to(array, (*blocks, array.shape[-1]))
    index = np.broadcast_to(index, (*blocks, index.shape[-1]))
    found: Array = np.take_along_axis(array, np.clip(index, 0, array.shape[-1] - 1), axis=-1)
    return found


def _erf(x: Array) -> Array:
    """The error function in double precision (Abramowitz & Stegun has 7 digits; math.erf all)."""
    import math

    result: Array = np.vectorize(math.erf, otypes=[np.float64])(x.astype(np.float64))
    return result

"""Formats that store floats: conversions."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from kernelgen.errors import FormatError
from kernelgen.ir.block import BlockFormat
from kernelgen.ir.evaluate import NUMPY_STORAGE, evaluate
from kernelgen.ir.expr import cast, substitute, var
from kernelgen.ir.ranges import interval
from kernelgen.quantizer.plan import in_order, leaves_of

Array = npt.NDArray[Any]
Convert = Callable[[Array], Array]


def converter(fmt: BlockFormat) -> Convert:
    """The function from rows to their bytes, for a format whose codes are the values."""
    code = fmt.code_expr(var("i", fmt.block))
    leaf, *more = dict.fromkeys(leaves_of(code))
    stored: Convert | None = None
    if leaf is code:
        stored = functools.partial(np.ndarray.astype, dtype=NUMPY_STORAGE[leaf.attr.storage.name])
    elif not more and leaf.op == "load" and interval(leaf) == (0, 65535):
        every = np.arange(1 << 16)
        of_word = substitute(code, {leaf: cast(leaf.dtype, var("word", 1 << 16))})
        if (evaluate(of_word, {"word": every}).view(np.uint32) == every << 16).all():
            stored = _upper_half
    plain = len(fmt.fields) == 1 and not (fmt.scale or fmt.offset or fmt.bias)
    if stored is None or not plain or not in_order(leaf, fmt.block, fmt.block, "i"):
        raise FormatError(
            f"format {fmt.name} has no quantizer, because its values {code} are not the elements of"
            " its only field, in order, as f32, f16 or the upper 16 bits of f32"
        )
    name, convert = leaf.attr.name, stored
    return lambda rows: fmt.join({name: convert(rows.reshape(-1, fmt.block))})


def _upper_half(x: Array) -> Array:
    """The 16 bits of the nearest f32 whose lower 16 bits are zero, ties to even."""
    bits = x.astype(np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(x), bits >> 16 | 0x40, rounded)  # 0x40: NaN even if lower bits go

"""What users call from Python: blocks by the simple rule, made by a generated kernel."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import numpy.typing as npt

from kernelgen import api_maps, quantizer
from kernelgen.errors import ShapeError
from kernelgen.ir import formats
from kernelgen.ir.block import BlockFormat
from kernelgen.quantizer import nearest
from kernelgen.quantizer.floats import Convert, converter
from kernelgen.tensor import QuantTensor

Array = npt.NDArray[Any]


@functools.cache
def _converter(fmt: BlockFormat) -> Convert:
    return converter(fmt)


def round_to_nearest(
    x: Any, format: str | BlockFormat, *, target: str | None = None
) -> QuantTensor:
    """x, floats (..., K), in a format by the simple rule: the scale of a block brings its element
    furthest out to the last code (with an offset, its smallest and its largest to the first and the
    last), and each element takes the nearest code.

    A kernel of the target does that, so it takes a thousandth of the time of `kernelgen.quantize`,
    which searches for scales of less error.  It is for what is made anew all the time, such as keys
    and values.  Formats that store floats are rounded by numpy.

    Raises ShapeError where x is not of finite floats or does not divide into blocks, FormatError
    where a format has no such rule, TargetError.
    """
    fmt = formats.get(format) if isinstance(format, str) else format
    values = np.asarray(x)
    if values.dtype.kind != "f" or not values.ndim:
        raise ShapeError(
            f"an array of {values.dtype} and shape {values.shape} was given; it has rows of floats"
        )
    data = blocks_of(np.ascontiguousarray(values, np.float32), fmt, target)
    return QuantTensor(fmt, values.shape, data)


def blocks_of(x: Array, fmt: BlockFormat, target: str | None) -> Array:
    """The bytes (..., row_bytes) of contiguous float32 (..., K), as `round_to_nearest` has it."""
    shape = (*x.shape[:-1], fmt.row_bytes(x.shape[-1]))
    if fmt.float_codes and fmt.scale is None:
        few = x.size <= quantizer.CHUNK  # threads would take longer to start
        return (_converter(fmt)(x) if few else quantizer.quantize(x, fmt)).reshape(shape)
    kind = nearest.by_rule(fmt)
    if not np.isfinite(x).all():
        raise ShapeError(
            f"values to be kept in {fmt.name} are not all finite; what made them is damaged, or"
            " overflows"
        )
    blocks = x.reshape(-1, fmt.block)
    out = np.empty((len(blocks), fmt.nbytes), np.uint8)
    api_maps.run(target, kind, {"x": blocks}, (), out.shape, {"out": out})
    return out.reshape(shape)

"""Quantizing by the rule of OCP Microscaling Formats v1.0, section 6.3, for what has to agree with
others bit by bit: the shared scale of a group is 2**(floor(log2(largest magnitude)) - emax), where
emax is the exponent of the largest element there is; elements are rounded to nearest, ties to even,
and saturate.

The error is larger than that of the best power of two: what lies above the largest element times
the scale, up to 1/3 more in four bits, is cut off.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from kernelgen.errors import FormatError
from kernelgen.ir.block import BlockFormat
from kernelgen.ir.encode import encode
from kernelgen.quantizer.levels import Levels
from kernelgen.quantizer.plan import Plan

Array = npt.NDArray[Any]


def check(fmt: BlockFormat, plan: Plan) -> None:
    """FormatError where the rule says nothing about a format: it is about powers of two that are
    the only scale, and elements of either sign."""
    scale, codes = plan.scale, plan.codes
    powers = np.frexp(scale.levels.values)[0] == 0.5
    if (
        plan.offset is not None or scale.field is not None or scale.integer is None
        or not powers.all() or not codes.free or codes.low != -codes.high
    ):  # fmt: skip
        raise FormatError(
            f"the OCP rule for scales was asked for in {fmt.name}, whose groups do not share just a"
            " power of two, as those of OCP MX do; leave out scale"
        )


def shared(fmt: BlockFormat, plan: Plan, rows: Array) -> Array:
    """Blocks, uint8 (n, nbytes), of finite rows (rows, K)."""
    scale = plan.scale
    x = rows.astype(np.float32).astype(np.float64).reshape(-1, fmt.group)
    largest = np.abs(x).max(axis=1)
    # codes may be multiples of the elements that the specification speaks of
    exponent = np.frexp(largest)[1] - np.frexp(plan.codes.high)[1]
    wanted = np.where(largest == 0, 0, np.ldexp(1.0, exponent))
    at = scale.levels.position(wanted)
    codes = nearest_even(plan.codes, x / scale.levels.values[at][:, None])
    integers = scale.levels.stored[at].reshape(-1, fmt.groups)
    stored = plan.codes.bits(codes).reshape(-1, fmt.block)
    named = {str(scale.integer): integers}
    ints = {name: named.get(name, np.zeros_like(integers)) for name in fmt.ints}
    return encode(fmt, stored, ints, {} if scale.integer in fmt.ints else named)


def nearest_even(levels: Levels, y: Array) -> Array:
    """The level nearest to each y; of two, that whose mantissa is even, which every other one is,
    counted from zero."""
    sizes = levels.values[levels.values >= 0]
    middles = sizes[1:] / 2 + sizes[:-1] / 2
    size = np.abs(y)
    below = np.searchsorted(middles, size, side="left")  # the lower one of a tie
    tie = np.isin(size, middles) & (below % 2 == 1)
    return np.asarray(np.copysign(sizes[below + tie], y))

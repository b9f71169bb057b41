"""A problem: what a user asks for, and how wrong an answer may be."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from kernelgen.config import Config
from kernelgen.errors import ConfigError
from kernelgen.ir.block import BlockFormat

Array = npt.NDArray[Any]

#: "auto" is not a precision but the choice of one
PRECISIONS = ("fp32", "int8", "auto")

#: largest M that counts as a matvec
MATVEC_ROWS = 8


def op_for(m: int) -> str:
    """The op that serves M rows of activations."""
    return "matvec" if m <= MATVEC_ROWS else "matmul"


def choose_precision(asked: str, fmt: BlockFormat) -> str:
    """The precision to compute in.

    "auto" takes int8 activations wherever the format's elements are integer codes: these have
    eight bits or less over a block of the same length, so rounding the activations to eight bits
    by the block's largest magnitude adds no more error than the format itself has.  Floats are
    multiplied as floats.
    """
    if asked not in PRECISIONS:
        raise ConfigError(f"precision {asked!r} was asked for; allowed are {', '.join(PRECISIONS)}")
    if asked == "auto":
        return "fp32" if fmt.float_codes else "int8"
    return asked


def relative_error(got: Array, reference: Array) -> float:
    """Largest difference, in units of the reference's root mean square.

    Where the reference is not finite the result must be the same kind of not finite, or the error
    is infinite; a finite result where none should be is as wrong as the reverse.
    """
    with np.errstate(invalid="ignore"):  # a signalling NaN makes a conversion warn
        reference = np.asarray(reference, np.float64)
        got = np.asarray(got, np.float64)
    finite = np.isfinite(reference)
    if got.shape != reference.shape or not np.array_equal(finite, np.isfinite(got)):
        return float("inf")
    if not finite.any():
        return 0.0
    rms = float(np.sqrt(np.mean(np.square(reference[finite]))))
    largest = float(np.abs(got[finite] - reference[finite]).max())
    return largest / rms if rms else largest


def tolerance(op: str, config: Config | None = None) -> float:
    """Largest `relative_error` that a kernel of this op, in this configuration, may have against
    the reference on the same inputs.

    Decoding is a few exact or singly rounded operations.  Activations are quantized with a
    division that GPUs may round by 2.5 units in the last place, times up to 127 steps.  A sum of
    K products in float32, in pieces of a block or more, is off by a few times 2^-24 * sqrt(K):
    1e-5 leaves room up to K of a hundred thousand.  What a configuration rounds besides, it says
    itself.
    """
    ops = {"dequantize": 1e-6, "get_rows": 1e-6, "quantize": 1e-4, "prepare": 0.0}
    return max(ops.get(op, 1e-5), 0.0 if config is None else config.rounding)

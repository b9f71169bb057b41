"""A problem: what a user asks for, and how wrong an answer may be."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from kernelgen.errors import ConfigError
from kernelgen.ir.block import BlockFormat

Array = npt.NDArray[Any]

#: "auto" is not a precision but the choice of one
PRECISIONS = ("fp32", "fp16", "bf16", "int8", "auto")

#: how far a result may be off, relative to its RMS, where weights are first rounded to 11 or to 8
#: bits, as activations were; such errors average out over a sum, and this is the largest of many
_ROUNDED = {"fp16": 2e-3, "bf16": 1.6e-2}

#: largest M that counts as a matvec
MATVEC_ROWS = 8

#: rows of activations above which kernels behave alike
_MOST_ROWS = 4096


def op_for(m: int) -> str:
    """The op that serves M rows of activations."""
    return "matvec" if m <= MATVEC_ROWS else "matmul"


def power_of_two(n: int) -> int:
    """The smallest power of two that is not below n; 1 for none."""
    return 1 << (max(1, n) - 1).bit_length()


def row_bucket(m: int) -> int:
    """Rows as problems are told apart: each of the first eight, then powers of two."""
    return m if m <= MATVEC_ROWS else min(power_of_two(m), _MOST_ROWS)


def choose_precision(asked: str, fmt: BlockFormat) -> str:
    """The precision to compute in.

    "auto" stands for int8 activations wherever the format's elements are integer codes: these have
    eight bits or less over a block of the same length, so rounding the activations to eight bits
    by the block's largest magnitude adds less error than formats of few bits have, and about as
    much as those of eight; several times as much where a few columns of activations are far larger
    than all others (docs/accuracy.md has figures).  A walk that is faster and rounds less may serve
    in their place (`Walk.instead_of`).  Floats are multiplied as floats.  "fp16" has no numbers
    above 65504: larger ones become infinite.
    """
    if asked not in PRECISIONS:
        raise ConfigError(f"precision {asked!r} was asked for; allowed are {', '.join(PRECISIONS)}")
    if asked == "auto":
        return "fp32" if fmt.float_codes else "int8"
    return asked


def acceptable(asked: str, fmt: Any) -> tuple[str, ...]:
    """Precisions that may serve what is asked for, the best guess first, for a format or another
    subject, of which "auto" stands for float32.

    float32 is never less accurate than any other, so it stands in where a target has no walk of
    that precision; only int8 that was asked for by name is not replaced, as it is exact in its
    own way.
    """
    floats = "fp32" if asked == "auto" else asked
    chosen = choose_precision(asked, fmt) if isinstance(fmt, BlockFormat) else floats
    return (chosen,) if asked == "int8" else tuple(dict.fromkeys((chosen, "fp32")))


def rounded(x: Array, precision: str) -> Array:
    """Activations, float32, as a precision sees them; "int8" has a reference of its own."""
    if precision == "fp16":
        with np.errstate(over="ignore"):
            return x.astype(np.float16).astype(np.float32)
    if precision == "bf16":
        bits = np.ascontiguousarray(x).view(np.uint32)
        # to nearest, to even where two are as near; what is not finite stays what it is
        nearest = (bits + (((bits >> 16) & 1) + 0x7FFF)) & np.uint32(0xFFFF0000)
        return np.where(np.isfinite(x), nearest.view(np.float32), x)
    return x


def size_of_sums(x: Array, values: Array) -> float:
    """Root mean square of x (M, K) @ values (N, K).T if all signs were random: what errors of the
    factors are measured against.  A few results alone may be much smaller by chance.  What is not
    finite does not count."""
    with np.errstate(invalid="ignore"):
        squares = np.square(x.astype(np.float64)) @ np.square(values.astype(np.float64)).T
    finite = squares[np.isfinite(squares)]
    return float(np.sqrt(np.mean(finite))) if finite.size else 0.0


def relative_error(got: Array, reference: Array, size: float | None = None) -> float:
    """Largest difference, in units of the reference's root mean square, or of `size`.

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
    rms = size or float(np.sqrt(np.mean(np.square(reference[finite]))))
    largest = float(np.abs(got[finite] - reference[finite]).max())
    return largest / rms if rms else largest


def tolerance(op: str, precision: str = "") -> float:
    """Largest `relative_error` that a kernel of this op and precision may have against the
    reference on the same inputs.

    Decoding is a few exact or singly rounded operations.  Activations are quantized with a
    division that GPUs may round by 2.5 units in the last place, times up to 127 steps.  A sum of
    K products in float32, in pieces of a block or more, is off by a few times 2^-24 * sqrt(K):
    1e-5 leaves room up to K of a hundred thousand.  "fp16" and "bf16" round weights as well, and
    take activations that are `rounded`.
    """
    if op == "attention" and precision in ("fp16", "bf16"):
        # weights of the softmax are rounded, too, and few of them may count; bf16 has 3 bits less
        return {"fp16": 3e-3, "bf16": 2.4e-2}[precision]
    ops = {"dequantize": 1e-6, "get_rows": 1e-6, "quantize": 1e-4, "prepare": 0.0}
    return ops.get(op, _ROUNDED.get(precision, 1e-5))

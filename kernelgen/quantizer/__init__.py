"""Float arrays into the blocks of any format, with small error.

A format says x = scale(g) * (code - bias) + offset(g).  `plan_of` finds out how it stores scale
and offset, by evaluating the two expressions; one method then serves all formats:

1. each group for itself: from several first scales (and offsets), round to codes and solve for the
   scale and offset of least squared error, which is linear once codes are known;
2. where groups share a float, round their scales to integer multiples of it by the same search;
3. in rounds: solve for the floats of least error with codes and integers fixed, round them to
   their stored type, then pick for what is stored the best of the neighbouring integers, and codes.

Steps 1 and 2 are the idea of ggml's make_qx_quants and make_qkx2_quants (ggml-quants.c), step 3
goes beyond them.  Elements lie as (group, groups), so that numpy sums whole rows at once.

Formats that have a zero point beside their scale have a search of their own (`zero_points`), and
those of OCP MX can have the specification's rule in place of a search (`shared_exponent`).
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt

from kernelgen.errors import FormatError, ShapeError
from kernelgen.ir.block import BlockFormat
from kernelgen.ir.encode import code_table
from kernelgen.quantizer import shared_exponent
from kernelgen.quantizer.fit import fitted
from kernelgen.quantizer.floats import Convert, converter
from kernelgen.quantizer.plan import plan_of
from kernelgen.quantizer.zero_points import fitted as fitted_zero
from kernelgen.quantizer.zero_points import zero_point_of

Array = npt.NDArray[Any]

#: elements a thread works on at once: temporaries of this size stay in a cache
CHUNK = 1 << 17

#: how scales are chosen
SCALES = ("best", "ocp")


def quantize(
    x: npt.ArrayLike,
    fmt: BlockFormat,
    *,
    importance: npt.ArrayLike | None = None,
    progress: Callable[[int, int], object] | None = None,
    threads: int | None = None,
    scale: str = "best",
) -> npt.NDArray[np.uint8]:
    """Blocks, uint8 (..., K // block * nbytes), whose values are close to x.

    x           float16, float32 or float64 (..., K); K is a multiple of the format's block
    importance  weight of each column's squared error, (K,), not negative; default all alike
    progress    called with (rows done, all rows) now and then, from the calling thread
    threads     default: one per CPU
    scale       "best": of least error; "ocp": by the rule of OCP Microscaling Formats v1.0, for
                formats whose groups share a power of two, where the bits have to be those of others

    The mean squared error, weighted by importance, is made small.  A scale beyond the range of
    its stored type becomes the largest it can hold, so values there saturate.  A format that
    stores floats gets the nearest, ties to even; there, NaN and infinity may occur in x too.

    ShapeError   x is empty, no float array, does not divide into blocks or holds values that are
                 not finite in float32; importance has another shape, is negative or not finite
    FormatError  scale, offset or codes of the format are stored in a way not known here; the rule
                 for scales is not known, or not for this format
    """
    rows = _rows(x, fmt)
    weights = _weights(importance, rows.shape[1])
    convert: Convert
    if scale not in SCALES:
        raise FormatError(f"scale is {scale!r}; it can be {' or '.join(SCALES)}")
    if scale == "ocp":
        convert = _shared(fmt, rows, weights)
    elif fmt.float_codes and code_table(fmt) is None:
        convert = converter(fmt)
    else:
        _check_finite(rows)
        zero = zero_point_of(fmt)
        convert = (
            functools.partial(fitted, fmt, plan_of(fmt), weights)
            if zero is None
            else functools.partial(fitted_zero, fmt, zero, weights)
        )
    out = np.empty((len(rows), fmt.row_bytes(rows.shape[1])), np.uint8)
    step = max(1, CHUNK // rows.shape[1])

    def run(start: int) -> int:
        part = slice(start, min(start + step, len(rows)))
        with np.errstate(all="ignore"):
            out[part] = convert(rows[part]).reshape(out[part].shape)
        return int(part.stop)

    starts = range(0, len(rows), step)
    if len(starts) == 1:  # starting threads takes longer than a few rows do
        done = run(0)
        if progress is not None:
            progress(done, len(rows))
        return out.reshape(*np.shape(x)[:-1], -1)
    pool = ThreadPoolExecutor(max(1, threads or os.cpu_count() or 1))
    try:
        for done in pool.map(run, starts):
            if progress is not None:
                progress(done, len(rows))
    finally:
        pool.shutdown(cancel_futures=True)  # what is left when one fails or the user interrupts
    return out.reshape(*np.shape(x)[:-1], -1)


def _shared(fmt: BlockFormat, rows: Array, weights: Array | None) -> Convert:
    """By the OCP rule, which knows no weights."""
    if weights is not None:
        raise FormatError(
            "importance was given with scale='ocp', whose rule chooses nothing; leave out one"
        )
    plain = (fmt.float_codes and code_table(fmt) is None) or zero_point_of(fmt) is not None
    plan = None if plain else plan_of(fmt)
    if plan is None:
        raise FormatError(f"the OCP rule for scales was asked for in {fmt.name}, which has none")
    shared_exponent.check(fmt, plan)
    _check_finite(rows)
    return functools.partial(shared_exponent.shared, fmt, plan)


def _rows(x: npt.ArrayLike, fmt: BlockFormat) -> Array:
    """x as (rows, K), in its own dtype."""
    array = np.asarray(x)
    if array.dtype.kind != "f" or array.dtype.itemsize > 8:
        raise ShapeError(
            f"{fmt.name} is made from float16, float32 or float64 arrays, not {array.dtype};"
            " convert with astype(numpy.float32)"
        )
    if array.ndim == 0 or array.size == 0:
        raise ShapeError(f"an array of shape {array.shape} has no rows to make {fmt.name} of")
    k = array.shape[-1]
    if k % fmt.block:
        raise ShapeError(
            f"rows of {k} elements do not divide into blocks of {fmt.name}, which hold"
            f" {fmt.block}; pad the last axis to a multiple of {fmt.block}"
        )
    return array.reshape(-1, k)


def _check_finite(rows: Array) -> None:
    limit = np.finfo(np.float32).max
    step = max(1, CHUNK // rows.shape[1])
    count, first = 0, ""
    for start in range(0, len(rows), step):
        bad = np.argwhere(~(np.abs(rows[start : start + step]) <= limit))
        if len(bad) and not count:
            row, column = start + bad[0][0], bad[0][1]
            first = f"{rows[row, column]} in row {row}, column {column}"
        count += len(bad)
    if count:
        raise ShapeError(
            f"{count} of {rows.size} values are not finite in float32, the first is {first};"
            " replace them before quantizing"
        )


def _weights(importance: npt.ArrayLike | None, k: int) -> Array | None:
    """Weights of mean 1, float32 (k,), none quite zero so that every group has a best scale."""
    if importance is None:
        return None
    weights = np.asarray(importance, np.float64)
    if weights.shape != (k,) or not np.isfinite(weights).all() or (weights < 0).any():
        raise ShapeError(
            f"importance is one finite weight, not negative, for each of the {k} columns; this"
            f" array has shape {weights.shape} and minimum {weights.min(initial=np.inf)}"
        )
    return (weights / (weights.mean() or 1.0) + 1e-6).astype(np.float32)

"""Groups that have a scale and a zero point: x = scale * (code - zero).

An integer zero point is found by rounding to nearest, as GPTQ's quantizer does: the ends of the
group, zero included, become the lowest and the highest code, and of several ranges that are cut at
both ends the one of least squared error is taken.

A float zero point is found by HQQ's half-quadratic solver (https://mobiusml.github.io/hqq_blog/):
with the scale fixed, zero is solved for again and again after the few largest errors were set
aside, which makes the sum of |error|**0.7 small.  Of several scales, too, the one of least squared
error is taken; from there both are solved for with codes fixed, as long as the error falls.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kernelgen.ir.block import BlockFormat
from kernelgen.ir.encode import CODE, bit_positions, code_table, encode, is_shuffled
from kernelgen.ir.evaluate import NUMPY_STORAGE
from kernelgen.ir.expr import F32, Field, cast, loads, var
from kernelgen.quantizer.levels import ratio

Array = npt.NDArray[Any]

#: parts of the range that codes are spread over
SHRINKS = np.linspace(1, 0.55, 10, dtype=np.float32)

#: HQQ: iterations, norm, first weight of the quadratic term and its growth
ITERATIONS, NORM, BETA, KAPPA = 20, 0.7, 10.0, 1.01

#: how often scale and float zero point are solved for with codes fixed
REFINEMENTS = 3


@dataclass(frozen=True)
class ZeroPoint:
    """The two numbers of a block, and the largest code."""

    scale: Field
    zero: Field
    largest: int


@functools.lru_cache(maxsize=256)
def zero_point_of(fmt: BlockFormat) -> ZeroPoint | None:
    """The `ZeroPoint` of a format that has one for each block of unsigned codes; else None."""
    if fmt.scale is None or fmt.offset is None or fmt.groups > 1 or fmt.bias or fmt.float_codes:
        return None
    g = var("g", 1)
    scale, offset = fmt.scale_expr(g), fmt.offset_expr(g)
    if scale.op != "load" or code_table(fmt) is not None or not is_shuffled(fmt):
        return None
    field = scale.attr
    for other in loads(offset):
        zero = getattr(fmt.view, other.name) if other.count == 1 else scale
        if zero is not scale and offset is -(scale * cast(F32, zero)):
            return ZeroPoint(field, other, (1 << bit_positions(fmt)[CODE].width) - 1)
    return None


def fitted(fmt: BlockFormat, found: ZeroPoint, weights: Array | None, rows: Array) -> Array:
    """Blocks, uint8 (n, nbytes), of finite rows (rows, K)."""
    x = rows.astype(np.float32).reshape(-1, fmt.block)
    w = None
    if weights is not None:
        w = np.broadcast_to(weights, rows.shape).reshape(x.shape)
    solve = _half_quadratic if found.zero.storage.dtype is F32 else _to_nearest
    scale, zero = solve(found, x, w)
    codes = _codes(found, x, scale, zero)
    fields = {found.scale.name: scale, found.zero.name: zero}
    return encode(fmt, codes.astype(np.int64), {}, fields)


def _stored(field: Field, values: Array) -> Array:
    """Values as the field can hold them; scales never vanish by rounding."""
    dtype = np.dtype(NUMPY_STORAGE[field.storage.name])
    info = np.finfo(dtype)
    kept = np.clip(values, info.min, info.max).astype(dtype)
    tiny = (kept == 0) & (values > 0)
    return np.asarray(np.where(tiny, info.smallest_subnormal, kept))


def _codes(found: ZeroPoint, x: Array, scale: Array, zero: Array) -> Array:
    """The nearest codes for what is stored, float32."""
    inverse = ratio(np.float32(1), scale.astype(np.float32))
    shifted = x * inverse + zero.astype(np.float32)
    return np.asarray(np.clip(np.rint(shifted), 0, found.largest))


def _error(x: Array, w: Array | None, codes: Array, scale: Array, zero: Array) -> Array:
    squares = np.square(scale.astype(np.float32) * (codes - zero.astype(np.float32)) - x)
    return np.asarray((squares if w is None else squares * w).sum(axis=1, keepdims=True))


def _to_nearest(found: ZeroPoint, x: Array, w: Array | None) -> tuple[Array, Array]:
    """Scale and integer zero point, (groups, 1)."""
    low = np.minimum(x.min(axis=1, keepdims=True), 0)
    high = np.maximum(x.max(axis=1, keepdims=True), 0)
    best = np.full(low.shape, np.inf, np.float32)
    scale: Array = np.zeros(low.shape, NUMPY_STORAGE[found.scale.storage.name])
    zero: Array = np.zeros(low.shape, np.int64)
    for shrink in SHRINKS:
        s = _stored(found.scale, (high / found.largest - low / found.largest) * shrink)
        at = np.rint(ratio(-low * shrink, s.astype(np.float32)))
        z = np.clip(at, 0, found.largest).astype(np.int64)
        _keep_better(found, x, w, (best, scale, zero), (s, z))
    return scale, zero


def _keep_better(
    found: ZeroPoint, x: Array, w: Array | None, kept: tuple[Array, Array, Array],
    new: tuple[Array, Array],
) -> None:  # fmt: skip
    """Where another scale and zero point err less, take them and their error into `kept`."""
    error = _error(x, w, _codes(found, x, *new), *new)
    better = error < kept[0]
    for old, one in zip(kept, (error, *new), strict=True):
        np.copyto(old, one, where=better)


def _half_quadratic(found: ZeroPoint, x: Array, w: Array | None) -> tuple[Array, Array]:
    """Scale and float zero point, (groups, 1)."""
    low, high = x.min(axis=1, keepdims=True), x.max(axis=1, keepdims=True)
    span = high / found.largest - low / found.largest
    flat = span == 0  # where all are equal, one code stands for them
    best = np.full(low.shape, np.inf, np.float32)
    scale: Array = np.zeros(low.shape, NUMPY_STORAGE[found.scale.storage.name])
    zero: Array = np.zeros(low.shape, NUMPY_STORAGE[found.zero.storage.name])
    for shrink in SHRINKS[::3]:
        s = _stored(found.scale, np.where(flat, np.abs(low), span * shrink))
        middle = ratio(low / 2 + high / 2, s.astype(np.float32))
        z = np.where(flat, 1 - np.sign(low), found.largest / 2 - middle)
        z = _solve_zero(found, x, w, s, z)
        _keep_better(found, x, w, (best, scale, zero), (s, z))
    for _ in range(REFINEMENTS):
        s, z = _solve_both(found, x, w, scale, zero)
        _keep_better(found, x, w, (best, scale, zero), (s, z))
    return scale, zero


def _solve_both(
    found: ZeroPoint, x: Array, w: Array | None, scale: Array, zero: Array
) -> tuple[Array, Array]:
    """Scale and zero point of least squared error for the codes that these two give, as stored."""
    codes = _codes(found, x, scale, zero).astype(np.float64)
    counted = np.ones_like(codes) if w is None else w.astype(np.float64)

    def total(a: Array) -> Array:
        return np.asarray(a.sum(axis=1, keepdims=True))

    n, c, cc = total(counted), total(counted * codes), total(counted * codes * codes)
    sx, sxc = total(counted * x), total(counted * codes * x)
    det = n * cc - c * c
    steps = ratio(n * sxc - sx * c, det)
    able = (det > 1e-9 * n * cc) & (steps > 0)  # else codes are all alike
    stored = np.where(able, _stored(found.scale, steps), scale)
    wide = stored.astype(np.float64)
    middle = np.where(able, ratio(wide * c - sx, wide * n), zero.astype(np.float64))
    return stored, _stored(found.zero, middle)


def _solve_zero(found: ZeroPoint, x: Array, w: Array | None, scale: Array, zero: Array) -> Array:
    """The zero point of least mean |error| that the iterations come across, as it is stored."""

    def mean(a: Array) -> Array:
        if w is None:
            return np.asarray(a.mean(axis=1, keepdims=True))
        return np.asarray((a * w).sum(axis=1, keepdims=True) / w.sum(axis=1, keepdims=True))

    steps = scale.astype(np.float32)
    inverse = ratio(np.float32(1), steps)
    kept = _stored(found.zero, zero)
    best, beta = np.full(scale.shape, np.inf, np.float32), BETA
    for _ in range(ITERATIONS):
        stored = _stored(found.zero, zero)
        codes = _codes(found, x, scale, stored)
        error = x - (codes - stored.astype(np.float32)) * steps
        size = np.abs(error)
        total = mean(size)
        kept = np.where(total < best, stored, kept)
        best = np.minimum(total, best)
        with np.errstate(divide="ignore", invalid="ignore"):
            shrunk = np.where(size > 0, size - size ** np.float32(NORM - 1) / beta, 0)
        aside = np.sign(error) * np.maximum(shrunk, 0)
        zero = mean(codes - (x - aside) * inverse)
        beta *= KAPPA
    return np.asarray(kept)

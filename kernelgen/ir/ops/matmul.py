"""y = x @ w.T, with activations in float32 or quantized to int8."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

#: below it, 127 / largest would overflow; a block that small counts as zero
SMALLEST = np.float32(2.0**-119)


@dataclass(frozen=True)
class Activations:
    """Rows of activations as int8: x[m, k] is about scale[m, k // block] * q[m, k].

    q      int8 (M, K), in -127..127
    scale  float32 (M, K / block)
    sums   float32 (M, K / group): sums of q over groups, which the offsets of weights multiply
    """

    q: Array
    scale: Array
    sums: Array

    def values(self) -> Array:
        """The activations that the integers stand for, float64 (M, K)."""
        m, k = self.q.shape
        blocks = self.q.reshape(m, self.scale.shape[1], -1).astype(np.float64)
        with np.errstate(invalid="ignore"):
            return (blocks * self.scale[..., None].astype(np.float64)).reshape(m, k)


def quantize_activations(x: Array, block: int, group: int) -> Activations:
    """Activations (M, K), float32, to int8 by the absolute maximum of each block.

    scale = largest magnitude / 127; q = x * (127 / largest magnitude), rounded to the nearest,
    ties to even.  A block with a NaN or an infinity gets that as its scale and ones as integers,
    so that what it touches is not finite either.  All steps are single precision operations, so
    that every target computes the same integers.
    """
    m, k = x.shape
    blocks = np.ascontiguousarray(x, np.float32).reshape(m, k // block, block)
    with np.errstate(all="ignore"):
        largest = np.abs(blocks).max(axis=-1)  # NaN where there is one
        finite = np.isfinite(largest)
        factor = np.where(finite & (largest > SMALLEST), np.float32(127) / largest, np.float32(0))
        rounded = np.where(finite[..., None], np.rint(blocks * factor[..., None]), 1)
        scale = np.where(finite, largest / np.float32(127), largest).astype(np.float32)
    q = rounded.astype(np.int8).reshape(m, k)
    sums = q.reshape(m, k // group, group).sum(axis=-1, dtype=np.int32).astype(np.float32)
    return Activations(q, scale, sums)


def matmul(x: Array, values: Array) -> Array:
    """x (M, K) @ values (N, K).T in double precision."""
    with np.errstate(all="ignore"):
        return np.asarray(x, np.float64) @ np.asarray(values, np.float64).T

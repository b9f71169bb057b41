"""Whether a candidate computes what it should: its result against the numpy reference."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kernelgen import quantizer
from kernelgen.errors import FormatError
from kernelgen.generate import generate
from kernelgen.ir.block import BlockFormat
from kernelgen.ir.ops import matmul
from kernelgen.problem import MATVEC_ROWS, relative_error, rounded, tolerance
from kernelgen.targets.base import Kernel, Runtime, Target
from kernelgen.tensor import QuantTensor

Array = npt.NDArray[Any]
Run = Callable[[Array, QuantTensor, Array], None]

#: rows of weights that differ; a prime, so that no tile meets the same row in the same place
_DISTINCT = 61


@functools.lru_cache(maxsize=64)
def sample_rows(fmt: BlockFormat, n: int, k: int) -> Array:
    """Blocks, uint8 (N, row_bytes), of normal weights; random ones where a format has no
    quantizer."""
    rng = np.random.default_rng(n + k)
    try:
        return quantizer.quantize(rng.standard_normal((n, k), np.float32), fmt)
    except FormatError:
        blocks = rng.integers(0, 256, (n * (k // fmt.block), fmt.nbytes), np.uint8)
        fields = fmt.split(blocks)
        for one in fmt.layout_fields:
            if one.storage.name in ("f16", "f32"):
                fields[one.name] = rng.uniform(-1, 1, fields[one.name].shape)
        return fmt.join(fields).reshape(n, -1)


@dataclass(frozen=True)
class Sample:
    """Inputs of a shape, and what they should give.

    w          the weights, rows of them over and over
    x          activations (M, K)
    exact      x times the distinct rows, float64
    """

    w: QuantTensor
    x: Array
    values: Array
    exact: Array

    @classmethod
    def make(cls, fmt: BlockFormat, m: int, n: int, k: int) -> Sample:
        """Normal weights and activations of that shape."""
        rows = sample_rows(fmt, min(n, _DISTINCT), k)
        w = QuantTensor(fmt, (n, k), np.resize(rows, (n, fmt.row_bytes(k))))
        x = np.random.default_rng(m).standard_normal((m, k), np.float32)
        values = w[: len(rows)].dequantize()
        return cls(w, x, values, matmul(x, values))

    def seen(self, kernel: Kernel, runtime: Runtime, target: Target) -> Array:
        """What a kernel should give, float64 (M, distinct rows): with the activations rounded as
        its precision says, and the integers that this target makes of them, where it makes any."""
        if kernel.precision in ("fp16", "bf16"):
            return matmul(rounded(self.x, kernel.precision), self.values)
        if kernel.precision != "int8":
            return self.exact
        quantize = generate("quantize", kernel.format, target)
        return matmul(runtime.quantize(quantize, self.x).values(), self.values)


@dataclass(frozen=True)
class Verdict:
    """Errors of a candidate.

    error      the largest relative to the reference's RMS, on the inputs that it saw
    bound      what is allowed
    rms_error  RMS of the difference to exact activations, relative to the RMS of the result
    kind       "nan" or "wrong" where it fails, with its reason; both None where it passes
    """

    error: float
    bound: float
    rms_error: float
    kind: str | None = None
    reason: str | None = None


def judge(
    kernel: Kernel,
    run: Run,
    runtime: Runtime,
    target: Target,
    sample: Sample,
    max_error: float | None = None,
) -> Verdict:
    """Run a kernel on the sample, and on small shapes that no tile divides.

    The bound is what the op may lose by rounding sums in float32 (kernelgen.problem.tolerance);
    `max_error` bounds the RMS error besides, and counts what quantized activations add.
    """
    bound = tolerance(kernel.op, kernel.precision)
    worst = rms = 0.0
    for one in (*ragged(kernel), sample):
        m, n = len(one.x), one.w.shape[0]
        y = np.full((m, n), np.nan, np.float32)  # what is not written stays visible
        run(one.x, one.w, y)
        where = f"at {m}x{n}x{one.w.shape[1]}"
        want = np.resize(one.seen(kernel, runtime, target).T, (n, m)).T
        error = relative_error(y, want)
        if not np.isfinite(y).all():
            return Verdict(
                error, bound, np.inf, "nan",
                f"{np.count_nonzero(~np.isfinite(y))} of {y.size} results are NaN or infinite"
                f" {where}, where the reference is finite",
            )  # fmt: skip
        if error > bound:
            reason = f"its error of {error:.2g} {where} exceeds {bound:.2g}"
            return Verdict(error, bound, np.inf, "wrong", reason)
        worst = max(worst, error)
        exact = np.resize(one.exact.T, (n, m)).T
        rms = float(np.sqrt(np.mean((y - exact) ** 2) / np.mean(exact**2)))
    if max_error is not None and rms > max_error:
        reason = f"its RMS error of {rms:.2g} exceeds the {max_error:.2g} asked for"
        return Verdict(worst, bound, rms, "wrong", reason)
    return Verdict(worst, bound, rms)


def ragged(kernel: Kernel) -> tuple[Sample, ...]:
    """Small inputs that no tile divides."""
    fmt = kernel.format
    rows = (1, 3, MATVEC_ROWS) if kernel.op == "matvec" else (MATVEC_ROWS + 1, 21)
    return tuple(_small(fmt, m, n, 3 * fmt.block) for m, n in zip(rows, (37, 5, 64), strict=False))


@functools.lru_cache(maxsize=64)
def _small(fmt: BlockFormat, m: int, n: int, k: int) -> Sample:
    return Sample.make(fmt, m, n, k)

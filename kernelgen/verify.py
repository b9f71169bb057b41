"""Runs kernels against the numpy reference: what `kernelgen verify` does."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kernelgen import targets
from kernelgen.config import Config
from kernelgen.errors import FormatError, KernelgenError, TargetError
from kernelgen.generate import generate, generate_walk
from kernelgen.ir.block import BlockFormat
from kernelgen.ir.coverage import blocks_to_cover, with_every_row
from kernelgen.ir.encode import put_half
from kernelgen.ir.ops import Activations, matmul, quantize_activations
from kernelgen.ir.ops.matmul import SMALLEST
from kernelgen.problem import MATVEC_ROWS, relative_error, rounded, size_of_sums, tolerance
from kernelgen.targets.base import Kernel, Runtime, Target, Walk
from kernelgen.tensor import QuantTensor

Array = npt.NDArray[Any]

#: ops that have a result of their own; `prepare` is seen through the matmuls
OPS = ("dequantize", "get_rows", "quantize", "matvec", "matmul")

#: (M, N) for each op: one row, and sizes that no tile divides
_SHAPES = {
    "dequantize": ((1, 5),),
    "get_rows": ((1, 1), (7, 5)),
    "quantize": ((1, 1), (3, 1)),
    "matvec": ((1, 1), (1, 37), (3, 64), (MATVEC_ROWS, 5)),
    "matmul": ((MATVEC_ROWS + 1, 37), (21, 3)),
}

#: how much more error int8 activations may add than the format itself has
_INT8_SLACK = 1.25


@dataclass(frozen=True)
class Result:
    """What became of one kernel.

    error, bound    largest error of all cases relative to the reference's RMS, and what is allowed
    added, own      RMS error that int8 activations add, and that of the format, against float64
    problem         why it failed or could not run; None where it passed
    """

    target: str
    op: str
    format: str
    precision: str
    how: str
    config: dict[str, Any]
    cases: int
    error: float
    bound: float
    added: float | None
    own: float | None
    problem: str | None

    @property
    def ok(self) -> bool:
        """Whether the kernel passed."""
        return self.problem is None

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for --json."""
        return asdict(self) | {"ok": self.ok}


def verify(
    target: Target,
    formats: Iterable[BlockFormat],
    ops: Iterable[str] = OPS,
    *,
    runtime: Runtime | None = None,
    all_configs: bool = False,
) -> Iterator[Result]:
    """Run every kernel of a target in its default configuration, or in every legal one.

    Raises TargetError where the target cannot run here at all.
    """
    reach = runtime or target.runtime()
    reason = reach.available()
    if reason is not None:
        raise TargetError(f"target {target.name} cannot run here: {reason}")
    wanted = tuple(ops)
    for fmt in formats:
        for one in target.walks:
            if one.op in wanted and one.op in OPS and one.accepts(fmt) is None:
                for config in _configs(one, fmt, reach, all_configs):
                    yield verify_one(target, reach, fmt, one, config)


def _configs(one: Walk, fmt: BlockFormat, runtime: Runtime, every: bool) -> Iterator[Config]:
    """Configurations to run; none where the device lacks what the walk needs."""
    caps = runtime.capabilities()
    tried = one.config.space() if every else (one.default(fmt, caps),)
    yield from (c for c in tried if one.refuses(c, fmt, caps) is None)


def verify_one(
    target: Target, runtime: Runtime, fmt: BlockFormat, one: Walk, config: Config
) -> Result:
    """Run the kernel of one walk for one format in one configuration, in all shapes (`cases`)."""
    errors: list[float] = []
    added = own = None
    problem = None
    bound = tolerance(one.op, one.precision)
    try:
        kernel = generate_walk(one, fmt, target, config)
        errors = [check(kernel, runtime, m, n, k) for m, n, k in cases(one.op, fmt)]
        if not all(error <= bound for error in errors):
            problem = f"error {max(errors):.3g} exceeds {bound:.3g}"
        if one.precision == "int8" and one.op in ("matvec", "matmul"):
            added, own = int8_errors(kernel, runtime)
            if problem is None and added > _INT8_SLACK * own:
                problem = f"int8 activations add {added:.3g}, the format itself has {own:.3g}"
    except KernelgenError as error:
        problem = str(error)
    return Result(
        target.name, one.op, fmt.name, one.precision, runtime.how(), config.as_dict(), len(errors),
        max(errors, default=float("inf")), bound, added, own, problem,
    )  # fmt: skip


def cases(op: str, fmt: BlockFormat) -> Iterator[tuple[int, int, int]]:
    """Shapes (M, N, K): K of one block, of an odd number of blocks, and of many elements; and one
    in which all rows of a grid come up, where codes are from one."""
    many = max(3, -(-1536 // fmt.block)) * fmt.block
    for m, n in _SHAPES[op]:
        for k in dict.fromkeys((fmt.block, 3 * fmt.block, many)):
            yield m, n, k
    rows = -(-blocks_to_cover(fmt) * fmt.block // many)
    if op != "quantize" and rows > max(n for _, n in _SHAPES[op]):
        yield (rows if op == "get_rows" else _SHAPES[op][-1][0]), rows, many


def check(kernel: Kernel, runtime: Runtime, m: int, n: int, k: int) -> float:
    """`relative_error` of one run of a kernel on sample data of that shape."""
    fmt = kernel.format
    if kernel.op == "dequantize":
        w = QuantTensor(fmt, (n, k), random_blocks(fmt, n, k))
        return relative_error(runtime.dequantize(kernel, w), w.dequantize())
    if kernel.op == "get_rows":
        w = QuantTensor(fmt, (n, k), random_blocks(fmt, n, k))
        ids = np.random.default_rng(m).permutation(m) % n
        return relative_error(runtime.get_rows(kernel, w, ids), w.dequantize()[ids])
    # rows of very different size say little where only a few bits are kept
    x = activations(m, k, extremes=kernel.precision not in ("fp16", "bf16"))
    if kernel.op == "quantize":
        return quantization_error(runtime.quantize(kernel, x), x, fmt)
    w = QuantTensor(fmt, (n, k), sample_weights(fmt, n, k))
    seen = rounded(x, kernel.precision)
    if kernel.precision == "int8":
        # the integers that this target makes of x: a device's division may round another way
        quantize = kernel.needs.get("quantize")
        quantize = quantize or generate("quantize", fmt, targets.get(kernel.target))
        seen = runtime.quantize(quantize, x).values()
    y = np.full((m, n), np.nan, np.float32)  # what is not written stays visible
    runtime.matmul(kernel)(x, w, y)
    values = w.dequantize()
    alone = y.size == 1  # one result may be small by chance, and its error is not
    rough = kernel.precision in ("fp16", "bf16")
    size = size_of_sums(seen, values) if rough or alone else None
    return relative_error(y, matmul(seen, values), size)


def quantization_error(got: Activations, x: Array, fmt: BlockFormat) -> float:
    """How far quantized activations are from what they should be.

    The largest of: scales, relative to the reference's; how much further than half a step an
    integer lies from what it stands for; infinity where sums are not the sums of the integers.
    """
    want = quantize_activations(x, fmt.block, fmt.group)
    m, k = x.shape
    sums = got.q.reshape(m, k // fmt.group, fmt.group).sum(axis=-1, dtype=np.int32)
    if not np.array_equal(sums.astype(np.float32), got.sums):
        return float("inf")
    used = want.scale > SMALLEST
    off = np.abs(got.scale[used].astype(np.float64) / want.scale[used] - 1)
    repeated = np.repeat(np.where(used, want.scale, np.inf), fmt.block, axis=-1)
    steps = np.abs(x / repeated.astype(np.float64) - got.q) - 0.5
    return max(float(off.max(initial=0)), float(steps.max(initial=0)))


def int8_errors(kernel: Kernel, runtime: Runtime) -> tuple[float, float]:
    """RMS errors relative to the exact product: what int8 activations add, what the format has.

    On standard-normal weights and activations.
    """
    fmt = kernel.format
    m = 4 if kernel.op == "matvec" else 16
    n, k = 64, -(-1024 // fmt.block) * fmt.block
    exact, blocks = _measured(fmt, n, k)
    w = QuantTensor(fmt, (n, k), blocks)
    x = _normal(m, k, 8)
    y = np.full((m, n), np.nan, np.float32)
    runtime.matmul(kernel)(x, w, y)
    same_weights = matmul(x, w.dequantize())
    rms = float(np.sqrt(np.mean(np.square(same_weights))))
    added = float(np.sqrt(np.mean(np.square(y - same_weights)))) / rms
    own = float(np.sqrt(np.mean(np.square(same_weights - matmul(x, exact))))) / rms
    return added, own


def _normal(rows: int, k: int, seed: int) -> Array:
    return np.random.default_rng(seed).standard_normal((rows, k), np.float32)


def activations(m: int, k: int, extremes: bool = True) -> Array:
    """Rows of activations, float32 (M, K): normal, and from the second on one of zeros and, as
    `extremes`, one of large and one of small numbers."""
    x = _normal(m, k, m + k)
    factors = ((1, 0.0), (2, 1e4), (3, 1e-6)) if extremes else ((1, 0.0),)
    for row, factor in factors:
        if row < m:
            x[row] *= np.float32(factor)
    return x


@functools.lru_cache(maxsize=256)
def random_blocks(fmt: BlockFormat, n: int, k: int) -> Array:
    """Random bytes as blocks, uint8 (N, row_bytes), with finite floats in their float fields."""
    rng = np.random.default_rng(n + k)
    blocks = rng.integers(0, 256, (n * (k // fmt.block), fmt.nbytes), np.uint8)
    fields = fmt.split(blocks)
    for one in fmt.layout_fields:
        if one.storage.name in ("f16", "f32"):
            fields[one.name] = rng.uniform(-1, 1, fields[one.name].shape)
    made = with_every_row(fmt, fmt.join(fields))
    for name in fmt.halves:
        put_half(fmt, made, name, rng.uniform(-1, 1, len(made)))
    return made.reshape(n, -1)


@functools.lru_cache(maxsize=256)
def _sample(fmt: BlockFormat, n: int, k: int) -> Array:
    """Blocks drawn from a pool of a few thousand elements, as some quantizers take their time; of
    a grid all rows come up."""
    pool = _pool(fmt)
    chosen = np.random.default_rng(n * k).integers(0, len(pool), n * (k // fmt.block))
    return with_every_row(fmt, pool[chosen]).reshape(n, -1)


@functools.lru_cache(maxsize=256)
def _pool(fmt: BlockFormat) -> Array:
    count = max(64, 4096 // fmt.block)
    return sample_weights(fmt, count, fmt.block, _normal(count, fmt.block, 9))


@functools.lru_cache(maxsize=256)
def _measured(fmt: BlockFormat, n: int, k: int) -> tuple[Array, Array]:
    """Normal weights, float32 (n, k), and their blocks."""
    exact = _normal(n, k, 7)
    return exact, sample_weights(fmt, n, k, exact)


def sample_weights(fmt: BlockFormat, n: int, k: int, exact: Array | None = None) -> Array:
    """Blocks, uint8 (N, row_bytes), of normal weights; of random bytes where the format has no
    quantizer."""
    from kernelgen import quantizer

    if exact is None:
        return _sample(fmt, n, k)
    try:
        return quantizer.quantize(exact, fmt)
    except FormatError:
        return random_blocks(fmt, n, k)

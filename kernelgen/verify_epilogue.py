"""Runs products with epilogues, gated ones and normalized ones against the numpy reference: what
`kernelgen verify --epilogue` does."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from kernelgen.config import Config
from kernelgen.errors import KernelgenError
from kernelgen.generate import generate, generate_walk
from kernelgen.ir.block import BlockFormat
from kernelgen.ir.expr import Expr, where
from kernelgen.ir.ops import epilogue as ops
from kernelgen.ir.ops import matmul
from kernelgen.ir.ops.epilogue import NORM_WEIGHT, Epilogue, Fusion, Operand, RmsNorm
from kernelgen.problem import MATVEC_ROWS, relative_error, rounded, tolerance
from kernelgen.targets.base import Kernel, Runtime, Target, Walk, Weights
from kernelgen.tensor import Interleaved, QuantTensor
from kernelgen.verify import Result, activations, quantization_error, sample_weights

Array = npt.NDArray[Any]

#: (M, N): one row, and sizes that no tile divides
SHAPES = {"matvec": ((1, 37), (3, 5)), "matmul": ((MATVEC_ROWS + 9, 37),)}

#: how much more than a product a result may be off: products of two sums, slopes above 1
SLACK = 8

_BIAS, _RESIDUAL = Operand("bias", "n"), Operand("residual", "mn")
_FACTOR, _ROW = Operand("multiplier", ""), Operand("operand0", "m")


def _own(s: Expr) -> Expr:
    """Without a step, at which a rounded sum might fall to the other side."""
    beyond = s - _BIAS.value
    bent = _BIAS.value * _ROW.value + beyond / (1.0 + beyond * beyond)
    return where(beyond < 0.0, s * _ROW.value, bent) * _FACTOR.value - _RESIDUAL.value


def _plain(label: str, function: Any, *operands: Operand) -> Fusion:
    return Fusion(Epilogue(ops.trace(function, ops.SUM), operands, label=label))


def _biased(name: str) -> Fusion:
    """An activation of a sum and a bias, to which a residual is added."""
    value, label = ops.chain(
        ("bias", lambda s: s + _BIAS.value),
        (name, ops.activation(name)),
        ("residual", lambda s: s + _RESIDUAL.value),
    )
    return Fusion(Epilogue(value, (_BIAS, _RESIDUAL), label=label))


#: kinds by name: each way to read an operand, each activation, what is gated and normalized
KINDS: Mapping[str, Fusion] = {
    "scale": _plain("scale", lambda s: s * _FACTOR.value, _FACTOR),
    "bias": _plain("bias", lambda s: s + _BIAS.value, _BIAS),
    "residual": _plain("residual", lambda s: s + _RESIDUAL.value, _RESIDUAL),
    **{name: _biased(name) for name in ops.ACTIVATIONS},
    "own": _plain("own", _own, _BIAS, _RESIDUAL, _FACTOR, _ROW),
    "swiglu": Fusion(ops.gated("silu")),
    "geglu": Fusion(ops.gated("gelu")),
    "gated_own": Fusion(
        Epilogue(
            ops.silu(ops.GATE + _BIAS.value) * ops.UP * _ROW.value + _RESIDUAL.value,
            (_BIAS, _ROW, _RESIDUAL), gated=True, label="gated_own",
        )
    ),
    "rms": Fusion(norm=RmsNorm()),
    "rms_swiglu": Fusion(ops.gated("silu"), RmsNorm(1e-5)),
}  # fmt: skip


#: kinds that between them read every kind of operand, and do all that there is
SAMPLE = ("own", "gated_own", "rms_swiglu")


def verify(
    target: Target,
    formats: Iterable[BlockFormat],
    wanted: Iterable[str] = ("matvec", "matmul"),
    kinds: Iterable[str] = tuple(KINDS),
    *,
    runtime: Runtime | None = None,
) -> Iterator[Result]:
    """Run every product of a target, in its default configuration, with these epilogues."""
    reach = runtime or target.runtime()
    caps, chosen = reach.capabilities(), tuple(kinds)
    for fmt in formats:
        for one in target.walks:
            if one.op not in wanted or one.op not in SHAPES or one.accepts(fmt) is not None:
                continue
            config = one.default(fmt, caps, SHAPES[one.op][-1][0])
            if one.refuses(config, fmt, caps) is None:
                yield from (_one(target, reach, fmt, one, config, kind) for kind in chosen)


def _one(
    target: Target, runtime: Runtime, fmt: BlockFormat, one: Walk, config: Config, kind: str
) -> Result:
    errors: list[float] = []
    problem, bound = None, SLACK * tolerance(one.op, one.precision)
    try:
        kernel = generate_walk(one, fmt, target, config, KINDS[kind])
        for m, n in SHAPES[one.op]:
            for blocks in (1, 3):
                errors.append(
                    check(kernel, KINDS[kind], target, runtime, (m, n, blocks * fmt.block))
                )
        if max(errors) > bound:
            problem = f"error {max(errors):.3g} exceeds {bound:.3g}"
    except KernelgenError as error:
        problem = str(error)
    return Result(
        target.name, f"{one.op} {kind}", fmt.name, one.precision, runtime.how(), config.as_dict(),
        len(errors), max(errors, default=float("inf")), bound, None, None, problem,
    )  # fmt: skip


def check(
    kernel: Kernel, fused: Fusion, target: Target, runtime: Runtime, shape: tuple[int, int, int],
    alias: bool = False,
) -> float:  # fmt: skip
    """`relative_error` of one run of a kernel, which was made for this fusion, on sample data of a
    shape (M, N, K).  With `alias` the residual is y itself."""
    m, n, k = shape
    fmt, epilogue = kernel.format, fused.epilogue
    gated = epilogue is not None and epilogue.gated
    tensors = [
        QuantTensor(fmt, (n, k), sample_weights(fmt, n, k, _normal(n, k, seed)))
        for seed in range(2 if gated else 1)
    ]
    w: Weights = tensors[0]
    if gated:
        w = Interleaved(tensors[0], tensors[1], kernel.walk.apart)
    given = arrays(fused, m, n, k)
    x = activations(m, k, extremes=False)
    normalized = x
    if fused.norm is not None:
        normalized = ops.rms_norm(fused.norm, x, given[NORM_WEIGHT]).astype(np.float32)
        x = x if kernel.normalizes else normalized
    seen = rounded(normalized, kernel.precision)
    if kernel.precision == "int8":
        # the integers that this target makes of x: a device's division may round another way
        before = Fusion(norm=fused.norm if kernel.normalizes else None)
        quantize = kernel.needs.get("quantize")
        quantize = quantize or generate("quantize", fmt, target, fused=before)
        weight = {NORM_WEIGHT: given[NORM_WEIGHT]} if before.norm else {}
        made = runtime.quantize(quantize, x, weight)
        if quantization_error(made, normalized, fmt) > tolerance("quantize"):
            return float("inf")
        seen = made.values()
    sums = [matmul(seen, one.dequantize()).astype(np.float32) for one in tensors]
    want = sums[0] if epilogue is None else ops.apply(epilogue, sums, given)
    y = given["residual"] if alias else np.full((m, n), np.nan, np.float32)
    runtime.matmul(kernel)(x, w, y, given)
    return relative_error(y, want)


def arrays(fused: Fusion, m: int, n: int, k: int) -> dict[str, Array]:
    """What a fusion reads, of random numbers."""
    rng = np.random.default_rng(m * n + k)
    size = {"M": m, "N": n, "1": 1}
    found = {NORM_WEIGHT: _uniform(rng, (k,))} if fused.norm else {}
    for one in fused.epilogue.operands if fused.epilogue else ():
        found[one.name] = _uniform(rng, tuple(size[s] for s in one.shape))
    return found


def _uniform(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    return rng.uniform(0.5, 1.5, shape).astype(np.float32)


@functools.lru_cache(maxsize=64)
def _normal(n: int, k: int, seed: int) -> Array:
    return np.random.default_rng(seed + n * k).standard_normal((n, k), np.float32)

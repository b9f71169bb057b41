"""How far results are from exact ones, and why: what `kernelgen accuracy` measures.

The exact result is computed in double precision from the weights before they are quantized.  What
lies between it and a kernel's is split: what the format costs (double precision with the weights
that the blocks stand for), and what the kernel adds to that, with its precision.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from kernelgen import api, api_attention, api_fused, quantizer
from kernelgen.errors import FormatError, TargetError
from kernelgen.ir.block import BlockFormat
from kernelgen.ir.ops import attention as attention_ops
from kernelgen.ir.ops import epilogue as epilogue_ops
from kernelgen.ir.ops.attention import Attention
from kernelgen.ir.ops.epilogue import RmsNorm
from kernelgen.tensor import QuantTensor

if TYPE_CHECKING:
    pass

Array = npt.NDArray[Any]

#: columns of weights that are tried
COLUMNS = (256, 1024, 4096, 14336)

#: rows of activations and of weights of each product
_M, _N = 16, 128

#: kinds of data: standard normal; and as large language models have it, whose activations are
#: about 20 times larger in one column of a hundred and more (Dettmers et al., LLM.int8(), 2022)
DATA = ("normal", "outliers")
_SHARE, _FACTOR = 0.01, 20.0

#: rows of a file's matrix that are taken
_MODEL_ROWS = 64


@dataclass(frozen=True)
class Measured:
    """Errors of one product, or of one layer; each is an RMS relative to that of the exact result.

    what      "matmul", "layer", or the name of a tensor
    data      one of `DATA`
    k         columns of the weights; 0 for a layer
    own       what the format costs; None where nobody knows the weights before it
    added     what the kernel adds
    total     what a user sees; None where `own` is
    distance  1 - the cosine between exact result and kernel's; None where `own` is
    """

    what: str
    format: str
    bits: float
    precision: str
    data: str
    k: int
    own: float | None
    added: float
    total: float | None
    distance: float | None

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for --json."""
        return asdict(self)


def _rms(x: Array) -> float:
    return float(np.sqrt(np.mean(np.square(x, dtype=np.float64))))


def _measured(
    what: str, fmt: BlockFormat, precision: str, data: str, k: int,
    exact: Array | None, same: Array, got: Array,
) -> Measured:  # fmt: skip
    """The errors of `got`: `same` is exact with quantized weights, `exact` with those before."""
    size = _rms(same if exact is None else exact)
    own = total = distance = None
    if exact is not None:
        own, total = _rms(same - exact) / size, _rms(got - exact) / size
        norms = math.sqrt(
            float(np.sum(np.square(exact)) * np.sum(np.square(got, dtype=np.float64)))
        )
        distance = 1 - float(np.sum(exact * got)) / norms
    added = _rms(got - same) / size
    return Measured(what, fmt.name, fmt.bits, precision, data, k, own, added, total, distance)


# ---- data ---------------------------------------------------------------------------------------


def _outlying(rng: np.random.Generator, k: int) -> Array:
    """A factor for each column: large for some of them, at least one."""
    factors = np.ones(k, np.float32)
    factors[rng.choice(k, max(1, round(_SHARE * k)), replace=False)] = _FACTOR
    return factors


def _activations(data: str, m: int, k: int) -> Array:
    rng = np.random.default_rng(k)
    x = rng.standard_normal((m, k), np.float32)
    return x * _outlying(rng, k) if data == "outliers" else x


def _weights(data: str, n: int, k: int, seed: int = 0) -> Array:
    """Normal; or of Student's t distribution with five degrees of freedom, with heavy tails."""
    rng = np.random.default_rng((seed, n, k))
    drawn = rng.standard_t(5, (n, k)) if data == "outliers" else rng.standard_normal((n, k))
    return drawn.astype(np.float32)


@functools.lru_cache(maxsize=512)
def _quantized(fmt: BlockFormat, data: str, n: int, k: int, seed: int = 0) -> QuantTensor:
    blocks = quantizer.quantize(_weights(data, n, k, seed), fmt)
    return QuantTensor(fmt, (n, k), blocks)


# ---- products -----------------------------------------------------------------------------------


def precisions(target: str, fmt: BlockFormat, asked: Iterable[str] = ()) -> tuple[str, ...]:
    """Precisions that matmul of a format has on a target here; those asked for, or all.

    Raises TargetError where one that is asked for is not there for any format.
    """
    from kernelgen import targets

    manifest, caps = targets.get(target), api.require(target).capabilities()
    products = [w for w in manifest.walks if w.op == "matmul" and not caps.lacks(w.features)]
    known = dict.fromkeys(w.precision for w in products)
    wanted = tuple(asked) or tuple(sorted(known, key=("fp32", "fp16", "bf16", "int8").index))
    missing = [one for one in wanted if one not in known]
    if missing:
        raise TargetError(
            f"precision {missing[0]} was asked for; target {target} multiplies in"
            f" {', '.join(known)} here"
        )
    able = {w.precision for w in products if w.accepts(fmt) is None}
    return tuple(one for one in wanted if one in able)


def products(
    target: str, formats: Iterable[BlockFormat], asked: Iterable[str] = (),
    columns: Iterable[int] = COLUMNS, rows: int = _N,
) -> Iterator[Measured]:  # fmt: skip
    """Errors of x (16, K) @ w (128, K).T for each format, precision, kind of data, and K that the
    format can have.  Formats that nobody can quantize to are left out."""
    chosen, wanted = tuple(columns), tuple(asked)
    for fmt in formats:
        if not _has_quantizer(fmt):
            continue
        for data in DATA:
            for k in (one for one in chosen if one % fmt.block == 0):
                x = _activations(data, _M, k)
                exact = _product(x, _weights(data, rows, k))
                w = _quantized(fmt, data, rows, k)
                same = _product(x, w.dequantize())
                for precision in precisions(target, fmt, wanted):
                    got = api.matmul(x, w, target=target, precision=precision)
                    yield _measured("matmul", fmt, precision, data, k, exact, same, got)


def _product(x: Array, w: Array) -> Array:
    result: Array = x.astype(np.float64) @ w.astype(np.float64).T
    return result


def _has_quantizer(fmt: BlockFormat) -> bool:
    try:
        quantizer.quantize(np.ones((1, fmt.block), np.float32), fmt)
    except FormatError:
        return False
    return True


def of_model(
    target: str,
    model: Mapping[str, QuantTensor],
    formats: Iterable[BlockFormat],
    asked: Iterable[str] = (),
) -> Iterator[Measured]:
    """Errors of products with the first rows of each matrix of a file.

    A matrix of floats is quantized to each format, as far as its columns allow it.  Of one that is
    quantized nobody knows what it was before, so that only what the kernel adds is measured.
    """
    chosen, wanted = tuple(formats), tuple(asked)
    for name, tensor in model.items():
        if len(tensor.shape) != 2:
            continue
        first, k = tensor[:_MODEL_ROWS], tensor.shape[1]
        values = first.dequantize()
        cases: list[tuple[QuantTensor, Array | None]] = [(first, None)]
        if tensor.format.float_codes and tensor.format.block == 1:
            cases = [
                (QuantTensor(fmt, values.shape, quantizer.quantize(values, fmt)), values)
                for fmt in chosen
                if k % fmt.block == 0 and _has_quantizer(fmt)
            ]
        for data in DATA:
            x = _activations(data, _M, k)
            for w, before in cases:
                exact = None if before is None else _product(x, before)
                same = _product(x, w.dequantize())
                for precision in precisions(target, w.format, wanted):
                    got = api.matmul(x, w, target=target, precision=precision)
                    yield _measured(name, w.format, precision, data, k, exact, same, got)


# ---- a layer ------------------------------------------------------------------------------------

#: sizes of the layer: of its stream, heads, heads of keys and values, of its inner products, tokens
_D, _HEADS, _KV_HEADS, _HEAD, _INNER, _TOKENS = 512, 8, 2, 64, 1536, 64

#: matrices of a layer: rows and columns
_MATRICES = {
    "q": (_HEADS * _HEAD, _D), "k": (_KV_HEADS * _HEAD, _D), "v": (_KV_HEADS * _HEAD, _D),
    "o": (_D, _HEADS * _HEAD), "gate": (_INNER, _D), "up": (_INNER, _D), "down": (_D, _INNER),
}  # fmt: skip

_NORM = RmsNorm(1e-5)


@dataclass(frozen=True)
class Arithmetic:
    """How a layer computes: a linear map, a gated one (both normalize first where they have a
    norm's weight), and attention of q (1, H, T, D) to k and v."""

    linear: Callable[[str, Array, Array | None, Array | None], Array]
    gated: Callable[[Array, Array], Array]
    attention: Callable[[Array, Array, Array], Array]


def forward(x: Array, norms: Mapping[str, Array], by: Arithmetic) -> Array:
    """A transformer layer as Llama has it (Touvron et al., 2023): x (T, 512) to the same shape.

    Attention of 8 heads that share 2 of keys and values, with rotary positions, then SwiGLU; both
    add to the stream.
    """
    q, k, v = (_heads(by.linear(name, x, norms["attention"], None)) for name in "qkv")
    mixed = by.attention(_rotate(q), _rotate(k), v)
    flat = np.ascontiguousarray(mixed[0].swapaxes(0, 1)).reshape(len(x), -1)
    x = by.linear("o", flat, None, x)
    return by.linear("down", by.gated(x, norms["inner"]), None, x)


def _heads(x: Array) -> Array:
    """(T, heads * 64) to (1, heads, T, 64)."""
    return np.ascontiguousarray(x.reshape(len(x), -1, _HEAD).swapaxes(0, 1))[None]


def _rotate(x: Array) -> Array:
    """Rotary positions (Su et al., 2021): halves of a head are turned by angles of the position."""
    half = _HEAD // 2
    angles = np.arange(x.shape[2])[:, None] * 10000.0 ** (-np.arange(half) / half)
    cos, sin = np.cos(angles).astype(x.dtype), np.sin(angles).astype(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)


def exactly(values: Mapping[str, Array]) -> Arithmetic:
    """Double precision, with matrices by name."""
    _, mask = attention_ops.trace(None, attention_ops.causal)
    plain = api_attention.as_tensor(np.zeros((1, 1, 1, _HEAD), np.float32), "k").format
    kind = Attention(_HEAD, plain, plain, mask=mask)

    def linear(name: str, x: Array, norm: Array | None, residual: Array | None) -> Array:
        x = x if norm is None else epilogue_ops.rms_norm(_NORM, x, norm)
        y: Array = x @ values[name].astype(np.float64).T
        return y if residual is None else y + residual

    def gated(x: Array, norm: Array) -> Array:
        gate, up = linear("gate", x, norm, None), linear("up", x, norm, None)
        result: Array = gate / (1 + np.exp(-gate)) * up
        return result

    return Arithmetic(linear, gated, lambda q, k, v: attention_ops.attention(kind, q, k, v))


def by_kernels(tensors: Mapping[str, QuantTensor], target: str, precision: str) -> Arithmetic:
    """kernelgen's kernels: norms, residuals and the gate are fused with the products."""
    how: dict[str, Any] = {"target": target, "precision": precision, "norm_eps": _NORM.eps}

    def linear(name: str, x: Array, norm: Array | None, residual: Array | None) -> Array:
        y: Array = api.matmul(x, tensors[name], norm=norm, residual=residual, **how)
        return y

    def gated(x: Array, norm: Array) -> Array:
        y: Array = api_fused.gated_matmul(x, tensors["gate"], tensors["up"], norm=norm, **how)
        return y

    def attend(q: Array, k: Array, v: Array) -> Array:
        y: Array = api_attention.attention(q, k, v, causal=True, target=target)
        return y

    return Arithmetic(linear, gated, attend)


def layers(
    target: str, formats: Iterable[BlockFormat], asked: Iterable[str] = ()
) -> Iterator[Measured]:
    """Errors of what one layer, all of whose matrices are in a format, adds to its input.

    Weights are drawn as for products, and scaled so that sums keep their size.
    """
    wanted = tuple(asked)
    for fmt in formats:
        if not _has_quantizer(fmt) or any(k % fmt.block for _, k in _MATRICES.values()):
            continue
        for data in DATA:
            values, tensors = _layer_weights(fmt, data)
            x = _activations(data, _TOKENS, _D)
            rng = np.random.default_rng(_D)
            norms = {
                name: rng.uniform(0.5, 1.5, _D).astype(np.float32)
                for name in ("attention", "inner")
            }
            wide = x.astype(np.float64)
            exact = forward(wide, norms, exactly(values)) - wide
            decoded = {name: w.dequantize() for name, w in tensors.items()}
            same = forward(wide, norms, exactly(decoded)) - wide
            for precision in precisions(target, fmt, wanted):
                got = forward(x, norms, by_kernels(tensors, target, precision)) - wide
                yield _measured("layer", fmt, precision, data, 0, exact, same, got)


@functools.lru_cache(maxsize=64)
def _layer_weights(fmt: BlockFormat, data: str) -> tuple[dict[str, Array], dict[str, QuantTensor]]:
    values = {
        name: _weights(data, n, k, seed) / np.float32(math.sqrt(k))
        for seed, (name, (n, k)) in enumerate(_MATRICES.items())
    }
    tensors = {
        name: QuantTensor(fmt, one.shape, quantizer.quantize(one, fmt))
        for name, one in values.items()
    }
    return values, tensors

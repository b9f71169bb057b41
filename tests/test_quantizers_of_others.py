"""Errors of our quantizers beside those of the projects that formats come from, on the same data.

The library of ggml is found by LLAMA_CPP_BUILD, the build folder of llama.cpp; packages where they
are installed.  Figures are printed (pytest -s).
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from gguf import GGMLQuantizationType, quants

from kernelgen.ir import formats
from kernelgen.ir.block import BlockFormat
from kernelgen.quantizer import quantize
from kernelgen.vectors import vectors

Array = npt.NDArray[Any]
get = formats.get

BUILD = os.environ.get("LLAMA_CPP_BUILD", "")

#: columns of all matrices here, a multiple of every block
K = 1024

#: kinds of data: as weights are, with heavy tails, and with columns far larger than the others
DATA: dict[str, Callable[[np.random.Generator, int], Array]] = {
    "normal": lambda rng, n: rng.standard_normal((n, K)),
    "heavy tails": lambda rng, n: rng.standard_t(5, (n, K)),
    "large columns": lambda rng, n: rng.standard_normal((n, K)) * (1 + 19 * (np.arange(K) < 10)),
}


def data(kind: str, rows: int) -> Array:
    return DATA[kind](np.random.default_rng(0), rows).astype(np.float32)


def error(x: Array, y: Array, weights: Array | float = 1.0) -> float:
    """RMS relative to x, in which columns count as weights say."""
    wide = x.astype(np.float64)
    return float(np.sqrt((weights * (wide - y) ** 2).sum() / (weights * wide**2).sum()))


def decoded(fmt: BlockFormat, blocks: Array) -> Array:
    return fmt.decode(blocks.reshape(len(blocks), -1, fmt.nbytes)).reshape(len(blocks), -1)


def ours(x: Array, name: str, **options: Any) -> Array:
    return decoded(get(name), quantize(x, get(name), **options))


def compare(
    name: str, whose: str, x: Array, theirs: Array, kind: str, weights: Array | None = None,
    slack: float = 1.0,
) -> None:  # fmt: skip
    """Ours is at most theirs; `slack` where there is a reason why it cannot quite be."""
    mine = ours(x, name) if weights is None else ours(x, name, importance=weights)
    counted = 1.0 if weights is None else weights
    a, b = error(x, mine, counted), error(x, theirs, counted)
    print(f"{name}, {kind}: {a:.5f}, {whose} {b:.5f}, {a / b:.3f} times")
    assert a <= slack * b


# ---- ggml, as the gguf package has it -----------------------------------------------------------


@pytest.mark.parametrize("kind", DATA)
@pytest.mark.parametrize(
    "name", ["q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "tq1_0", "tq2_0", "mxfp4"]
)
def test_gguf(name: str, kind: str) -> None:
    x, wanted = data(kind, 16), GGMLQuantizationType[name.upper()]
    theirs = quants.dequantize(quants.quantize(x, wanted), wanted)
    compare(name, "gguf", x, theirs, kind)


# ---- ggml's own library -------------------------------------------------------------------------

needs_ggml = pytest.mark.skipif(not BUILD, reason="LLAMA_CPP_BUILD names no build of llama.cpp")

#: ggml.h, enum ggml_type, where the gguf package does not have it
TYPES = {"q1_0": 41, "q2_0": 42}
#: what others use for activations only has no quantizer of weights there
IN_GGML = tuple(
    fmt.name for fmt in formats.FORMATS if fmt.block > 1 and fmt.name not in ("q8_1", "q8_K")
)
#: formats for which ggml takes no matrix without importance
NEED_WEIGHTS = ("iq2_xxs", "iq2_xs", "iq1_s", "iq1_m")


@functools.cache
def ggml() -> Any:
    (path,) = (p for p in Path(BUILD).rglob("libggml-base.so"))
    library = ctypes.CDLL(str(path))
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = (
        ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *(3 * [ctypes.c_int64]), ctypes.c_void_p,
    )  # fmt: skip
    return library


def by_ggml(x: Array, fmt: BlockFormat, weights: Array | None) -> Array:
    """Values after ggml's quantizer."""
    known = GGMLQuantizationType.__members__
    number = TYPES.get(fmt.name) or int(known[fmt.name.upper()])
    blocks = np.zeros((len(x), fmt.row_bytes(K)), np.uint8)
    given = None if weights is None else weights.astype(np.float32)
    written = ggml().ggml_quantize_chunk(
        number, x.ctypes.data, blocks.ctypes.data, 0, len(x), K,
        None if given is None else given.ctypes.data,
    )  # fmt: skip
    assert written == blocks.nbytes
    return decoded(fmt, blocks)


@needs_ggml
@pytest.mark.slow
@pytest.mark.parametrize("name", IN_GGML)
def test_ggml_decodes_the_same(name: str) -> None:
    """Its library may fuse a product and a sum, which rounds once instead of twice."""
    fmt, found = get(name), vectors(get(name))
    blocks = np.ascontiguousarray(found["blocks"])
    seen = np.full(found["values"].shape, np.nan, np.float32)
    decode = getattr(ggml(), f"dequantize_row_{name}")
    decode.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)
    decode.restype = None
    decode(blocks.ctypes.data, seen.ctypes.data, seen.size)
    if fmt.offset is None:
        assert np.array_equal(seen.view(np.uint32), found["values"].view(np.uint32))
    else:
        scale = np.repeat(np.abs(found["scales"]), fmt.group, axis=1)
        largest = scale * 256 + np.repeat(np.abs(found["offsets"]), fmt.group, axis=1)
        assert (np.abs(seen - found["values"]) <= 2.0**-23 * largest).all()


@needs_ggml
@pytest.mark.slow
@pytest.mark.parametrize("kind", DATA)
@pytest.mark.parametrize("name", IN_GGML)
def test_ggml(name: str, kind: str) -> None:
    x = data(kind, 16)
    theirs = by_ggml(x, get(name), np.ones(K) if name in NEED_WEIGHTS else None)
    compare(name, "ggml", x, theirs, kind)


@needs_ggml
@pytest.mark.slow
@pytest.mark.parametrize("name", [one for one in IN_GGML if one not in ("q8_0", "mxfp4", "nvfp4")])
def test_ggml_with_importance(name: str) -> None:
    x, weights = data("normal", 16), np.random.default_rng(1).exponential(size=K) ** 2
    compare(name, "ggml", x, by_ggml(x, get(name), weights), "importance", weights)


# ---- formats in planes: derived again -----------------------------------------------------------


def grouped(x: Array, group: int) -> Array:
    return x.reshape(-1, group).astype(np.float32)


def rounded_to_nearest(x: Array, bits: int, group: int) -> Array:
    """GPTQ's Quantizer, asymmetric: the range of a group, zero included, in 2**bits - 1 steps."""
    each, top = grouped(x, group), 2**bits - 1
    low, high = np.minimum(each.min(1), 0), np.maximum(each.max(1), 0)
    scale = ((high - low) / top).astype(np.float16).astype(np.float32)[:, None]
    zero = np.rint(-low[:, None] / scale)
    return (scale * (np.clip(np.rint(each / scale) + zero, 0, top) - zero)).reshape(x.shape)


def symmetric(x: Array, bits: int, group: int) -> Array:
    """Codes from -(2**(bits - 1) - 1) on, by the largest magnitude of a group."""
    each, top = grouped(x, group), 2 ** (bits - 1) - 1
    scale = (np.abs(each).max(1) / top).astype(np.float16).astype(np.float32)[:, None]
    return (scale * np.clip(np.rint(each / scale), -top - 1, top)).reshape(x.shape)


def by_largest(x: Array, dtype: Any, group: int) -> Array:
    """Floats of eight bits, whose largest stands for the largest magnitude of a group."""
    each, largest = grouped(x, group), float(ml_dtypes.finfo(dtype).max)
    scale = np.abs(each).max(1, keepdims=True) / np.float32(largest)
    return ((each / scale).astype(dtype).astype(np.float32) * scale).reshape(x.shape)


def microscaled(x: Array, dtype: Any) -> Array:
    """OCP Microscaling Formats v1.0, 6.3: the power of two of the largest less that of the type."""
    each, info = grouped(x, 32), ml_dtypes.finfo(dtype)
    power = np.floor(np.log2(np.abs(each).max(1, keepdims=True)))
    scale = np.exp2(power - np.floor(np.log2(float(info.max)))).astype(np.float32)
    bounded = np.clip(each / scale, float(info.min), float(info.max))
    return (bounded.astype(dtype).astype(np.float32) * scale).reshape(x.shape)


def nested(x: Array, values: Array, group: int) -> Array:
    """The nearest of 16 values, the largest magnitude of a group being 1."""
    each = grouped(x, group)
    scale = np.abs(each).max(1, keepdims=True)
    nearest = np.abs(each[..., None] / scale[..., None] - values).argmin(-1)
    return (values[nearest] * scale).reshape(x.shape)


def table_of(name: str) -> Array:
    from kernelgen.ir.formats.small_floats import FP4_VALUES, NF4_VALUES

    return np.array({"nf4": NF4_VALUES, "fp4": FP4_VALUES}[name], np.float32)


DERIVED: dict[str, Callable[[Array], Array]] = {
    **{f"uint{bits}_g{group}": functools.partial(rounded_to_nearest, bits=bits, group=group)
       for bits, group in ((2, 64), (3, 128), (4, 128), (8, 32))},
    **{f"int{bits}_g{group}": functools.partial(symmetric, bits=bits, group=group)
       for bits, group in ((2, 64), (3, 32), (4, 128), (8, 128))},
    "nf4_g64": lambda x: nested(x, table_of("nf4"), 64),
    "fp4_g64": lambda x: nested(x, table_of("fp4"), 64),
    "fp8_e4m3_g128": lambda x: by_largest(x, ml_dtypes.float8_e4m3fn, 128),
    "fp8_e5m2_g128": lambda x: by_largest(x, ml_dtypes.float8_e5m2, 128),
    "mxfp4": lambda x: microscaled(x, ml_dtypes.float4_e2m1fn),
    "mxfp6_e2m3": lambda x: microscaled(x, ml_dtypes.float6_e2m3fn),
    "mxfp6_e3m2": lambda x: microscaled(x, ml_dtypes.float6_e3m2fn),
    "mxfp8_e4m3": lambda x: microscaled(x, ml_dtypes.float8_e4m3fn),
    "mxfp8_e5m2": lambda x: microscaled(x, ml_dtypes.float8_e5m2),
}  # fmt: skip


@pytest.mark.parametrize("kind", DATA)
@pytest.mark.parametrize("name", DERIVED)
def test_derived_again(name: str, kind: str) -> None:
    x = data(kind, 16)
    compare(name, "by its rule", x, DERIVED[name](x), kind)


# ---- formats in planes: packages ----------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", DATA)
@pytest.mark.parametrize("name", ["nf4_g64", "fp4_g64"])
def test_bitsandbytes(name: str, kind: str) -> None:
    torch = pytest.importorskip("torch")
    functional = pytest.importorskip(
        "bitsandbytes.functional", reason="bitsandbytes is not installed"
    )
    x = data(kind, 64)
    for twice in (False, True):
        packed, state = functional.quantize_4bit(
            torch.from_numpy(x), quant_type=name[:3], blocksize=64, compress_statistics=twice
        )
        theirs = functional.dequantize_4bit(packed, state).numpy()
        compare(name, "bitsandbytes" + ", nested" * twice, x, theirs, kind)


@pytest.mark.slow
@pytest.mark.parametrize("kind", DATA)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group", [32, 64])
def test_hqq(bits: int, group: int, kind: str) -> None:
    torch = pytest.importorskip("torch")
    package = pytest.importorskip("hqq.core.quantize", reason="hqq is not installed")
    x = data(kind, 64)
    codes, meta = package.Quantizer.quantize(
        torch.from_numpy(x), nbits=bits, group_size=group, axis=1, device="cpu",
        compute_dtype=torch.float32,
    )  # fmt: skip
    theirs = package.Quantizer.dequantize(codes, meta).numpy()
    compare(f"hqq{bits}_g{group}_f32", "hqq", x, theirs, kind)


@pytest.mark.slow
@pytest.mark.parametrize("kind", DATA)
@pytest.mark.parametrize("name", ["int4_g32_f32", "uint4_g32_f32", "int8_g128_f32"])
def test_torchao(name: str, kind: str) -> None:
    torch = pytest.importorskip("torch")
    ao = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    x = data(kind, 64)
    layer = torch.nn.Sequential(torch.nn.Linear(K, len(x), bias=False))
    layer[0].weight.data = torch.from_numpy(x)
    config = (
        ao.Int8WeightOnlyConfig(version=2)
        if "int8" in name
        else ao.IntxWeightOnlyConfig(
            weight_dtype=torch.int4, granularity=ao.PerGroup(32),
            mapping_type=ao.MappingType["ASYMMETRIC" if name.startswith("u") else "SYMMETRIC"],
        )
    )  # fmt: skip
    ao.quantize_(layer, config)
    compare(name, "torchao", x, layer[0].weight.data.dequantize().numpy(), kind)

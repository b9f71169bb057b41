"""Writes tests/checkpoints/recorded: small checkpoints by the ecosystems' own code, and the values
that the same code makes of them in float32.

    python tests/checkpoints/record.py [CASE ...]

The packages are only needed here: auto_gptq 0.8.0.dev0 (qlinear_cuda.py), autoawq 0.2.9,
hqq 0.2.8, bitsandbytes 0.50.2, compressed-tensors 0.20.0, torchao 0.18.0, with torch 2.13 on a CPU.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

HERE = Path(__file__).resolve().parent / "recorded"
LAYER = "model.layers.0.proj"

#: planes, metadata, quantization config, values in float32
Case = tuple[dict[str, torch.Tensor], dict[str, str], dict[str, Any] | None, torch.Tensor]


def weights(n: int, k: int) -> torch.Tensor:
    """Normal, with an outlier in some groups and one group that is far from zero."""
    torch.manual_seed(n + k)
    w = torch.randn(n, k) * 0.05
    w[::3, ::29] *= 8
    w[1, : k // 2] += 0.5
    return w


def gptq(bits: int, sym: bool, act_order: bool, group: int = 32, n: int = 32) -> Case:
    """AutoGPTQ's packing of weights rounded to nearest; groups of shuffled columns if act-order."""
    from auto_gptq.nn_modules.qlinear.qlinear_cuda import QuantLinear

    k, size = 128, group if group > 0 else 128
    w, top = weights(n, k), 2**bits - 1
    index = torch.arange(k) // size
    if act_order:
        index = index[torch.randperm(k)]
    scales, zeros = torch.empty(n, k // size), torch.empty(n, k // size)
    for g in range(k // size):
        part = w[:, index == g]
        low, high = part.amin(1).clamp(max=0), part.amax(1).clamp(min=0)
        if sym:
            high = torch.maximum(high, -low)
            low = -high
        scales[:, g] = ((high - low) / top).half().float()
        zeros[:, g] = (top + 1) // 2 if sym else torch.round(-low / scales[:, g]).clamp(1, top)
    exact = scales[:, index] * (
        torch.clamp(torch.round(w / scales[:, index]) + zeros[:, index], 0, top) - zeros[:, index]
    )
    linear = torch.nn.Linear(k, n, bias=False)
    linear.weight.data = exact
    made = QuantLinear(bits, group, k, n, bias=False)
    made.pack(linear, scales, zeros.clone(), index.to(torch.int32))
    made.scales = made.scales.float()
    values = made(torch.eye(k)).T
    made.scales = made.scales.half()
    planes = {f"{LAYER}.{key}": value.contiguous() for key, value in made.state_dict().items()}
    config = {
        "quant_method": "gptq", "bits": bits, "group_size": group, "sym": sym,
        "desc_act": act_order,
    }  # fmt: skip
    return planes, {}, config, values


def awq() -> Case:
    """AutoAWQ's GEMM layout."""
    from awq.modules.linear.gemm import WQLinear_GEMM
    from awq.utils.packing_utils import dequantize_gemm

    n, k, group = 32, 128, 64
    w = weights(n, k)
    grouped = w.reshape(n, k // group, group)
    low, high = grouped.amin(2).clamp(max=0), grouped.amax(2).clamp(min=0)
    scales = ((high - low) / 15).half().float()
    zeros = torch.round(-low / scales).clamp(0, 15)
    wide = scales.repeat_interleave(group, 1), zeros.repeat_interleave(group, 1)
    linear = torch.nn.Linear(k, n, bias=False)
    codes = torch.clamp(torch.round(w / wide[0]) + wide[1], 0, 15)
    linear.weight.data = (codes - wide[1]) * wide[0]
    made = WQLinear_GEMM.from_linear(
        linear, 4, group, scales=scales.T.contiguous(), zeros=zeros.T.contiguous()
    )
    values = dequantize_gemm(made.qweight, made.qzeros, made.scales.float(), 4, group).T
    planes = {f"{LAYER}.{key}": value.contiguous() for key, value in made.state_dict().items()}
    config = {
        "quant_method": "awq", "bits": 4, "group_size": group, "version": "gemm",
        "zero_point": True,
    }  # fmt: skip
    return planes, {}, config, values


def hqq(bits: int, group: int, dtype: torch.dtype = torch.float16, k: int = 128) -> Case:
    """HQQLinear, saved as safetensors."""
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear, Quantizer

    n = 16
    linear = torch.nn.Linear(k, n, bias=False)
    linear.weight.data = weights(n, k)
    quant = BaseQuantizeConfig(nbits=bits, group_size=group, axis=1)
    made = HQQLinear(linear, quant, compute_dtype=dtype, device="cpu")
    planes = {f"{LAYER}.{name}": value.contiguous() for name, value in made.state_dict().items()
              if isinstance(value, torch.Tensor)}  # fmt: skip
    meta = dict(made.meta)
    meta |= {"compute_dtype": torch.float32}
    meta |= {name: meta[name].float() for name in ("scale", "zero")}
    values = Quantizer.dequantize(made.W_q, meta)
    config = {"quant_method": "hqq", "quant_config": {"nbits": bits, "group_size": group}}
    return planes, {}, config, values


def bitsandbytes(kind: str, nested: bool, block: int, n: int = 16, k: int = 128) -> Case:
    """Params4bit as transformers saves it.

    On CPUs, bitsandbytes 0.50.2 dequantizes wrongly where a block is longer than a row.
    """
    import bitsandbytes.functional as functional

    w = weights(n, k)
    packed, state = functional.quantize_4bit(
        w, quant_type=kind, blocksize=block, compress_statistics=nested
    )
    values = functional.dequantize_4bit(packed, state)
    parts = {f"{LAYER}.weight.{name}": value for name, value in state.as_dict(packed=True).items()}
    config = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": kind}
    return {f"{LAYER}.weight": packed, **parts}, {}, config, values


def compressed(name: str, rows: int = 16, k: int = 128, **options: Any) -> Case:
    """A compressor of compressed-tensors, and its decompression with scales in float32."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams, calculate_range

    args = QuantizationArgs(**options)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    w = weights(rows, k)
    size = args.group_size or k
    if args.strategy == "block":
        tall, wide = args.block_structure
        padded = torch.nn.functional.pad(w, (0, -k % wide, 0, -rows % tall))
        parts = padded.reshape(padded.shape[0] // tall, tall, -1, wide).transpose(1, 2)
        grouped = parts.reshape(*parts.shape[:2], -1)
    else:
        grouped = w.reshape(1, 1, -1) if args.strategy == "tensor" else w.reshape(rows, -1, size)
    scale, zero = calculate_qparams(grouped.amin(-1), grouped.amax(-1), args)
    high = calculate_range(args, "cpu")[1]
    if name.startswith("mx"):
        scale = torch.exp2(torch.ceil(torch.log2(grouped.abs().amax(-1) / high)))
    if args.strategy == "tensor":
        scale, zero = scale.reshape(1), zero.reshape(1)
    scale = scale.to(torch.bfloat16)
    state = {"weight": w, "weight_scale": scale}
    if not args.symmetric:
        state["weight_zero_point"] = zero
    compressor = BaseCompressor.get_value_from_registry(name)
    made = compressor.compress(dict(state), scheme)
    again = dict(made)
    if again["weight_scale"].is_floating_point():
        again["weight_scale"] = again["weight_scale"].float()
    values = compressor.decompress(again, scheme)["weight"].float()
    config = {
        "quant_method": "compressed-tensors", "format": name,
        "config_groups": {"group_0": json.loads(scheme.model_dump_json())},
    }  # fmt: skip
    return {f"{LAYER}.{key}": value.contiguous() for key, value in made.items()}, {}, config, values


def torchao(make: Callable[[Any], Any]) -> Case:
    """A quantized linear layer, flattened."""
    import torchao.quantization as ao
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict

    model = torch.nn.Sequential(torch.nn.Linear(128, 16, bias=False))
    model[0].weight.data = weights(16, 128)
    ao.quantize_(model, make(ao))
    weight = model[0].weight.data
    planes, metadata = flatten_tensor_state_dict({f"{LAYER}.weight": weight})
    return planes, metadata, {"quant_method": "torchao"}, weight.dequantize()


def _int4(ao: Any, mapping: str) -> Any:
    return ao.IntxWeightOnlyConfig(
        weight_dtype=torch.int4, granularity=ao.PerGroup(32), mapping_type=ao.MappingType[mapping]
    )


CASES: dict[str, Callable[[], Case]] = {
    "gptq_2": lambda: gptq(2, False, False),
    "gptq_3": lambda: gptq(3, False, True),
    "gptq_4": lambda: gptq(4, False, True),
    "gptq_4_symmetric": lambda: gptq(4, True, False, 64),
    "gptq_8": lambda: gptq(8, False, False, -1),
    "awq": awq,
    "hqq_1": lambda: hqq(1, 32),
    "hqq_2": lambda: hqq(2, 16),
    "hqq_3": lambda: hqq(3, 64, torch.bfloat16),
    "hqq_4": lambda: hqq(4, 64, k=96),
    "hqq_8": lambda: hqq(8, 128),
    "nf4_nested": lambda: bitsandbytes("nf4", True, 64, 136),
    "nf4": lambda: bitsandbytes("nf4", False, 256, k=256),
    "fp4": lambda: bitsandbytes("fp4", False, 64),
    "fp4_nested": lambda: bitsandbytes("fp4", True, 64, 136),
    "packed_4": lambda: compressed(
        "pack-quantized", num_bits=4, type="int", symmetric=True, strategy="group", group_size=32
    ),
    "packed_4_zero": lambda: compressed(
        "pack-quantized", num_bits=4, type="int", symmetric=False, strategy="group", group_size=64
    ),
    "packed_3": lambda: compressed(
        "pack-quantized", num_bits=3, type="int", symmetric=False, strategy="group", group_size=32
    ),
    "packed_8": lambda: compressed(
        "pack-quantized", num_bits=8, type="int", symmetric=True, strategy="channel"
    ),
    "packed_6": lambda: compressed(
        "pack-quantized", num_bits=6, type="int", symmetric=True, strategy="channel"
    ),
    "int_8": lambda: compressed(
        "int-quantized", num_bits=8, type="int", symmetric=False, strategy="channel"
    ),
    "float_8": lambda: compressed(
        "float-quantized", num_bits=8, type="float", symmetric=True, strategy="channel"
    ),
    "float_8_tensor": lambda: compressed(
        "float-quantized", num_bits=8, type="float", symmetric=True, strategy="tensor"
    ),
    "float_8_block": lambda: compressed(
        "float-quantized", rows=12, k=96, num_bits=8, type="float", symmetric=True,
        strategy="block", block_structure=[8, 64],
    ),
    "mxfp8": lambda: compressed(
        "mxfp8-quantized", num_bits=8, type="float", symmetric=True, strategy="group",
        group_size=32, scale_dtype="torch.uint8",
    ),
    "mxfp6": lambda: compressed(
        "mxfp6-pack-quantized", num_bits=6, type="float", symmetric=True, strategy="group",
        group_size=32, scale_dtype="torch.uint8",
    ),
    "mxfp4": lambda: compressed(
        "mxfp4-pack-quantized", num_bits=4, type="float", symmetric=True, strategy="group",
        group_size=32, scale_dtype="torch.uint8",
    ),
    "torchao_int4": lambda: torchao(lambda ao: _int4(ao, "SYMMETRIC")),
    "torchao_int4_zero": lambda: torchao(lambda ao: _int4(ao, "ASYMMETRIC")),
    "torchao_int8": lambda: torchao(lambda ao: ao.Int8WeightOnlyConfig(version=2)),
    "torchao_float8": lambda: torchao(lambda ao: ao.Float8WeightOnlyConfig(version=2)),
}  # fmt: skip

#: of larger matrices, the values of so many rows are kept
ROWS = 32


def write(name: str) -> None:
    """One folder: config.json, model.safetensors, values.npz."""
    planes, metadata, config, values = CASES[name]()
    folder = HERE / name
    folder.mkdir(parents=True, exist_ok=True)
    save_file(planes, folder / "model.safetensors", metadata or None)
    (folder / "config.json").write_text(
        json.dumps({"model_type": "recorded", "quantization_config": config}, indent=1) + "\n"
    )
    rows = np.unique(np.linspace(0, len(values) - 1, ROWS, dtype=np.int64))
    kept = values.detach().float().numpy()
    np.savez_compressed(folder / "values.npz", shape=kept.shape, rows=rows, values=kept[rows])


if __name__ == "__main__":
    for case in sys.argv[1:] or CASES:
        write(case)

"""Small random models as GGUF files, written by the gguf package alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

TYPES = {
    "f32": gguf.GGMLQuantizationType.F32,
    "f16": gguf.GGMLQuantizationType.F16,
    "q8_0": gguf.GGMLQuantizationType.Q8_0,
    "q4_0": gguf.GGMLQuantizationType.Q4_0,
}

WIDTH, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, LAYERS, VOCABULARY = 64, 96, 4, 2, 32, 2, 64


def write(
    path: Path,
    architecture: str = "llama",
    fmt: str = "f16",
    *,
    value_fmt: str = "",
    tied: bool = False,
    vocabulary: int = VOCABULARY,
    context: int = 256,
    metadata: Mapping[str, Any] | None = None,
    without: str = "",
    extra: Mapping[str, Array] | None = None,
    seed: int = 0,
) -> Path:
    """A decoder with random weights in a format (`value_fmt`: of the gate matrices another).

    metadata  by name without the architecture in front, or whole names of the tokenizer; replaces
              what is there by default, and None leaves it out
    without   a tensor that is left out
    extra     tensors that are put in
    """
    rng = np.random.default_rng(seed)
    qwen2, qwen3 = architecture == "qwen2", architecture == "qwen3"
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in _metadata(context, metadata or {}).items():
        name = key if key.startswith(("tokenizer.", "general.")) else f"{architecture}.{key}"
        _add(writer, name, value)

    def matrix(name: str, n: int, k: int, how: str = fmt) -> None:
        if name == without:
            return
        values = (rng.standard_normal((n, k)) / np.sqrt(k)).astype(np.float32)
        kind = TYPES[how]
        data = gguf.quants.quantize(values, kind)
        writer.add_tensor(name, data, raw_dtype=kind)

    def vector(name: str, size: int, around: float) -> None:
        if name != without:
            values = around + 0.2 * rng.standard_normal(size)
            writer.add_tensor(name, values.astype(np.float32))

    matrix("token_embd.weight", vocabulary, WIDTH)
    for layer in range(LAYERS):
        at = f"blk.{layer}."
        vector(f"{at}attn_norm.weight", WIDTH, 1)
        for name, heads in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
            matrix(f"{at}attn_{name}.weight", heads * HEAD_DIM, WIDTH)
            if qwen2:
                vector(f"{at}attn_{name}.bias", heads * HEAD_DIM, 0)
        if qwen3:
            vector(f"{at}attn_q_norm.weight", HEAD_DIM, 1)
            vector(f"{at}attn_k_norm.weight", HEAD_DIM, 1)
        matrix(f"{at}attn_output.weight", WIDTH, HEADS * HEAD_DIM)
        vector(f"{at}ffn_norm.weight", WIDTH, 1)
        matrix(f"{at}ffn_gate.weight", HIDDEN, WIDTH, value_fmt or fmt)
        matrix(f"{at}ffn_up.weight", HIDDEN, WIDTH)
        matrix(f"{at}ffn_down.weight", WIDTH, HIDDEN)
    vector("output_norm.weight", WIDTH, 1)
    if not tied:
        matrix("output.weight", vocabulary, WIDTH)
    for name, values in (extra or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _metadata(context: int, changes: Mapping[str, Any]) -> dict[str, Any]:
    plain: dict[str, Any] = {
        "block_count": LAYERS, "embedding_length": WIDTH, "feed_forward_length": HIDDEN,
        "attention.head_count": HEADS, "attention.head_count_kv": KV_HEADS,
        "attention.key_length": HEAD_DIM, "attention.value_length": HEAD_DIM,
        "attention.layer_norm_rms_epsilon": 1e-5, "rope.freq_base": 10000.0,
        "context_length": context,
    }  # fmt: skip
    return {key: value for key, value in (plain | dict(changes)).items() if value is not None}


def _add(writer: gguf.GGUFWriter, name: str, value: Any) -> None:
    if isinstance(value, list):
        writer.add_array(name, value)
    elif isinstance(value, str):
        writer.add_string(name, value)
    elif isinstance(value, bool):
        writer.add_bool(name, value)
    elif isinstance(value, int):
        writer.add_uint32(name, value)
    else:
        writer.add_float32(name, value)

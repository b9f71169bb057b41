"""Decoders of the Llama kind in plain numpy: float64, the whole sequence at once, no cache."""

from __future__ import annotations

import math
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


def logits(path: Any, tokens: list[int]) -> Array:
    """(tokens, vocabulary) of the model in a file, read and decoded by the gguf package."""
    reader = gguf.GGUFReader(path)
    data = {
        t.name: gguf.quants.dequantize(t.data, t.tensor_type).astype(np.float64)
        for t in reader.tensors
    }

    def of(key: str, default: Any = None) -> Any:
        field = reader.fields.get(f"{architecture}.{key}")
        return default if field is None else field.contents()

    architecture = reader.fields["general.architecture"].contents()
    heads, kv_heads = of("attention.head_count"), of("attention.head_count_kv")
    eps, dim = of("attention.layer_norm_rms_epsilon"), of("attention.key_length")
    turning, base = of("rope.dimension_count", dim), of("rope.freq_base")
    frequencies = base ** (-np.arange(0, turning, 2) / turning)
    frequencies = frequencies / data.get("rope_freqs.weight", 1.0)
    kind, factor = of("rope.scaling.type"), of("rope.scaling.factor", 1.0)
    size = 1.0
    if kind == "linear":
        frequencies = frequencies / factor
    if kind == "yarn":
        # pairs between 32 turns and one over the old context go from as they were to slowed down
        period = of("rope.scaling.original_context_length") / (2 * math.pi)
        first, last = (turning * math.log(period / n) / (2 * math.log(base)) for n in (32, 1))
        first, last = max(0, math.floor(first)), min(turning - 1, math.ceil(last))
        slow = np.clip((np.arange(turning // 2) - first) / max(0.001, last - first), 0, 1)
        frequencies = frequencies * (1 - slow) + frequencies / factor * slow
        size = 1 + 0.1 * math.log(factor)
    turn = size * np.exp(1j * np.outer(np.arange(len(tokens)), frequencies))
    there = np.arange(len(tokens))
    seen = there[None, :] <= there[:, None]
    window = of("attention.sliding_window")
    if window:
        seen &= there[:, None] - there[None, :] < window

    def norm(x: Array, weight: Array) -> Array:
        return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps) * weight

    def project(x: Array, name: str) -> Array:
        return x @ data[f"{name}.weight"].T + data.get(f"{name}.bias", 0.0)

    def rotated(x: Array) -> Array:
        """x (heads, tokens, dim), of which the first elements turn."""
        x, rest = x[..., :turning], x[..., turning:]
        if architecture == "llama":
            z = (x[..., ::2] + 1j * x[..., 1::2]) * turn
            turned = np.stack([z.real, z.imag], axis=-1).reshape(x.shape)
            return np.concatenate([turned, rest], axis=-1)
        half = turning // 2
        z = (x[..., :half] + 1j * x[..., half:]) * turn
        return np.concatenate([z.real, z.imag, rest], axis=-1)

    x = data["token_embd.weight"][tokens]
    for layer in range(of("block_count")):
        at = f"blk.{layer}."
        h = norm(x, data[f"{at}attn_norm.weight"])
        q, k, v = (
            project(h, f"{at}attn_{one}").reshape(len(x), n, dim).swapaxes(0, 1)
            for one, n in (("q", heads), ("k", kv_heads), ("v", kv_heads))
        )
        if f"{at}attn_q_norm.weight" in data:
            q = norm(q, data[f"{at}attn_q_norm.weight"])
            k = norm(k, data[f"{at}attn_k_norm.weight"])
        q, k = rotated(q), rotated(k)
        k, v = (np.repeat(one, heads // kv_heads, axis=0) for one in (k, v))
        scores = np.where(seen, q @ k.swapaxes(1, 2) / math.sqrt(dim), -np.inf)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        x = x + project((weights @ v).swapaxes(0, 1).reshape(len(x), -1), f"{at}attn_output")
        h = norm(x, data[f"{at}ffn_norm.weight"])
        gate = project(h, f"{at}ffn_gate")
        x = x + project(gate / (1 + np.exp(-gate)) * project(h, f"{at}ffn_up"), f"{at}ffn_down")
    h = norm(x, data["output_norm.weight"])
    return h @ data.get("output.weight", data["token_embd.weight"]).T

"""A model of the Llama kind with random weights, as a GGUF file that other programs load, too.

    python bench/made_model.py made.gguf [--layout q4_K] [--layers 4] [--width 4096]
        [--hidden 14336] [--heads 32] [--kv-heads 8] [--vocabulary 32000] [--rows 64]

By default 4 layers of the shape of a model of 7 billion weights.  Its vocabulary is one of
SentencePiece's kind: control tokens, bytes, and made-up pieces.  What such a model says means
nothing; how fast it is, and whether two programs compute the same, can be told from it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import kernelgen
from kernelgen import QuantTensor

Array = npt.NDArray[Any]

#: as llama.cpp numbers the types of tokens
NORMAL, UNKNOWN, CONTROL, BYTE = 1, 2, 3, 6


def _mixed(name: str, layer: int, layers: int) -> str:
    """Formats as llama.cpp's Q4_K_M lays them: values and what leaves an FFN finer in half of the
    layers, and the output."""
    finer = layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2
    if name == "output" or (finer and name in ("attn_v", "ffn_down")):
        return "q6_K"
    return "q4_K"


#: formats that are a mixture, by name: of a matrix, its layer, of so many
LAYOUTS: dict[str, Callable[[str, int, int], str]] = {"q4_K_M": _mixed}


def vocabulary(size: int) -> dict[str, Any]:
    """Metadata of a vocabulary of `size` tokens, at least 259."""
    special, raw = ["<unk>", "<s>", "</s>"], [f"<0x{n:02X}>" for n in range(256)]
    pieces = [f"\u2581w{n}" for n in range(size - len(special) - len(raw))]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": special + raw + pieces,
        "tokenizer.ggml.scores": [0.0] * 259 + [-float(n) for n in range(len(pieces))],
        "tokenizer.ggml.token_type": [UNKNOWN, CONTROL, CONTROL]
        + [BYTE] * 256 + [NORMAL] * len(pieces),
        "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }  # fmt: skip


def write(
    path: str | Path,
    layout: str = "q4_K",
    *,
    layers: int = 4,
    width: int = 4096,
    hidden: int = 14336,
    heads: int = 32,
    kv_heads: int = 8,
    tokens: dict[str, Any] | None = None,
    context: int = 4096,
    rows: int = 0,
    sharpness: float = 1.0,
    following: float = 0.0,
    values: Mapping[str, Array] | None = None,
    seed: int = 0,
) -> Path:
    """Write the model.

    layout     a format for all matrices, or one of `LAYOUTS`
    tokens     the vocabulary's metadata; by default `vocabulary` of 32000
    rows       so many rows of each matrix are different, the others repeat them, so that a large
               file is quickly made; 0: all
    sharpness  of the output's weights: how far apart logits lie
    following  how much each token asks for one other to follow it, as text does: without it, the
               largest logits of random weights lie close together, and mean nothing
    values     weights that are not random, by the names of tensors
    """
    rng = np.random.default_rng(seed)
    choose = LAYOUTS.get(layout, lambda name, layer, count: layout)
    words = vocabulary(32000) if tokens is None else tokens
    count, dim = len(words["tokenizer.ggml.tokens"]), width // heads
    tensors: dict[str, Any] = {}

    def matrix(
        name: str, n: int, k: int, layer: int = 0, scale: float = 1.0, like: Array | None = None
    ) -> None:
        some = min(n, rows) if rows else n
        weights = scale / np.sqrt(k) * rng.standard_normal((some, k), np.float32)
        if like is not None:
            weights += scale * following / np.sqrt(k) * like[rng.permutation(some)]
        if values is not None:
            weights = values[f"{name}.weight"]
        made = kernelgen.quantize(weights, choose(name.split(".")[-1], layer, layers))
        if some < n:
            picked = made.data[rng.integers(0, some, n)]
            made = QuantTensor(made.format, (n, k), picked)
        tensors[f"{name}.weight"] = made

    def vector(name: str) -> None:
        weights = (1 + 0.2 * rng.standard_normal(width)).astype(np.float32)
        tensors[f"{name}.weight"] = weights if values is None else values[f"{name}.weight"]

    matrix("token_embd", count, width, scale=np.sqrt(width))
    for layer in range(layers):
        at = f"blk.{layer}."
        vector(f"{at}attn_norm")
        matrix(f"{at}attn_q", width, width, layer)
        matrix(f"{at}attn_k", kv_heads * dim, width, layer)
        matrix(f"{at}attn_v", kv_heads * dim, width, layer)
        matrix(f"{at}attn_output", width, width, layer)
        vector(f"{at}ffn_norm")
        matrix(f"{at}ffn_gate", hidden, width, layer)
        matrix(f"{at}ffn_up", hidden, width, layer)
        matrix(f"{at}ffn_down", width, hidden, layer)
    vector("output_norm")
    first = tensors["token_embd.weight"].dequantize(slice(rows or None))
    matrix("output", count, width, scale=sharpness, like=first if following else None)
    kinds = np.array(words["tokenizer.ggml.token_type"], np.int32)  # llama.cpp takes no others
    metadata = {
        "general.architecture": "llama", "general.name": f"made {layout}",
        "llama.block_count": layers, "llama.embedding_length": width,
        "llama.feed_forward_length": hidden, "llama.attention.head_count": heads,
        "llama.attention.head_count_kv": kv_heads, "llama.rope.dimension_count": dim,
        "llama.attention.layer_norm_rms_epsilon": 1e-5, "llama.rope.freq_base": 10000.0,
        "llama.context_length": context, "llama.vocab_size": count, **words,
        "tokenizer.ggml.token_type": kinds,
    }  # fmt: skip
    kernelgen.save(path, tensors, metadata)
    return Path(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path", type=Path)
    parser.add_argument("--layout", default="q4_K")
    sizes = {"layers": 4, "width": 4096, "hidden": 14336, "heads": 32, "kv-heads": 8}
    for name, size in (*sizes.items(), ("vocabulary", 32000), ("rows", 64), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=size)
    given = vars(parser.parse_args())
    words = vocabulary(given.pop("vocabulary"))
    print(write(given.pop("path"), given.pop("layout"), tokens=words, **given))


if __name__ == "__main__":
    main()

"""Checkpoints made up for tests: what other packages would write, by second derivations."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file

Array = npt.NDArray[Any]


def checkpoint(
    folder: Path,
    planes: Mapping[str, Array],
    quantization: Mapping[str, Any] | None = None,
    file: str = "model.safetensors",
) -> Path:
    """A folder with one file of tensors, and a config if there is something to say."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: np.ascontiguousarray(a) for name, a in planes.items()}, folder / file)
    if quantization is not None:
        text = json.dumps({"model_type": "made_up", "quantization_config": dict(quantization)})
        (folder / "config.json").write_text(text)
    return folder


def retyped(path: Path, dtypes: Mapping[str, str]) -> None:
    """Gives tensors of a file types that numpy lacks; their bytes stay."""
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    for name, dtype in dtypes.items():
        one = header[name]
        wide = {"BF16": 2}.get(dtype, 1)
        width = (one["data_offsets"][1] - one["data_offsets"][0]) // wide
        one["dtype"] = dtype
        one["shape"] = [*one["shape"][:-1], width // max(1, int(np.prod(one["shape"][:-1])))]
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + size :])


def bits_along(codes: Array, bits: int, axis: int) -> Array:
    """Codes as one stream of bits along an axis, in int32 words: bit by bit, by Python."""
    moved = np.moveaxis(codes, axis, -1)
    words = np.zeros((*moved.shape[:-1], -(-moved.shape[-1] * bits // 32)), np.uint32)
    for at in np.ndindex(moved.shape):
        for bit in range(bits):
            word, position = divmod(at[-1] * bits + bit, 32)
            words[(*at[:-1], word)] |= np.uint32(int(moved[at]) >> bit & 1) << np.uint32(position)
    return np.ascontiguousarray(np.moveaxis(words, -1, axis)).view(np.int32)


def gptq_layer(
    rng: np.random.Generator, n: int, k: int, group: int, bits: int = 4, plus: int = 1
) -> tuple[dict[str, Array], Array]:
    """The planes of a GPTQ layer without g_idx, and its values, float32 (n, k)."""
    codes = rng.integers(0, 1 << bits, (n, k))
    zeros = rng.integers(plus, (1 << bits) + plus, (n, k // group))
    scales = rng.uniform(0.01, 0.1, (n, k // group)).astype(np.float16)
    planes = {
        "qweight": bits_along(codes.T, bits, 0),
        "qzeros": bits_along((zeros - plus).T, bits, 1),
        "scales": scales.T,
    }
    wide = np.repeat(zeros, group, axis=1), np.repeat(scales.astype(np.float32), group, axis=1)
    return planes, wide[1] * (codes - wide[0]).astype(np.float32)


def named(prefix: str, planes: Mapping[str, Array]) -> dict[str, Array]:
    """Planes under the name of their layer."""
    return {f"{prefix}.{name}": a for name, a in planes.items()}

"""The tensors of a model that is not there, from a description of its shape: enough for a plan."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kernelgen.errors import FileError
from kernelgen.ir import formats
from kernelgen.ir.block import BlockFormat
from kernelgen.models.hyperparameters import Hyperparameters


@dataclass(frozen=True)
class Outlined:
    """A tensor without data."""

    format: BlockFormat
    shape: tuple[int, ...]


def read(path: str | os.PathLike[str]) -> tuple[Hyperparameters, dict[str, Outlined]]:
    """A model's hyperparameters and tensors from a file of JSON, an object with

    the metadata of a GGUF file by their names there, such as "llama.block_count"
    "vocabulary"   tokens
    "format"       of all matrices but those that
    "formats"      names by kind: {"ffn_down": "q6_K", "output": "q6_K"}
    "tied"         true where the embedding is the output matrix, too

    Raises FileError, or FormatError, in a sentence for one that says too little.
    """
    try:
        with open(path, encoding="utf-8") as file:
            given = json.load(file)
    except (ValueError, RecursionError) as error:
        raise FileError(f"{path} describes no model: it is not JSON ({error})") from None
    if not isinstance(given, dict):
        raise FileError(f"{path} describes no model: it is not an object of JSON")
    shape = Hyperparameters.of(given, str(path))
    vocabulary, default = given.get("vocabulary"), given.get("format")
    special = given.get("formats", {})
    texts = isinstance(default, str) and isinstance(special, dict)
    if not isinstance(vocabulary, int) or vocabulary < 1 or not texts:
        raise FileError(
            f'{path} describes no model: "vocabulary" is a number of tokens, "format" the name of a'
            ' format, and "formats", which may be left out, names by kind of matrix'
        )
    sizes = _sizes(shape, vocabulary, bool(given.get("tied")))
    unknown = [kind for kind in special if kind not in {_kind(name) for name in sizes}]
    if unknown:
        raise FileError(
            f"{path} gives {str(unknown[0])[:60]!r} a format; matrices are"
            f" {', '.join(dict.fromkeys(_kind(n) for n, s in sizes.items() if len(s) == 2))}"
        )
    made = {name: _outlined(name, size, str(default), special) for name, size in sizes.items()}
    return shape, made


def _outlined(
    name: str, size: tuple[int, ...], default: str, special: Mapping[str, Any]
) -> Outlined:
    wanted = "f32" if len(size) == 1 else special.get(_kind(name), default)
    fmt = formats.get(str(wanted))
    fmt.row_bytes(size[-1])
    return Outlined(fmt, size)


def _kind(name: str) -> str:
    return name.removesuffix(".weight").rpartition(".")[2]


def _sizes(shape: Hyperparameters, vocabulary: int, tied: bool) -> dict[str, tuple[int, ...]]:
    """Shapes of all weights, by their names in GGUF."""
    width, hidden = shape.width, shape.hidden
    kinds: dict[str, tuple[int, ...]] = {
        "attn_norm": (width,),
        "attn_q": (shape.heads * shape.head_dim, width),
        "attn_k": (shape.kv_heads * shape.head_dim, width),
        "attn_v": (shape.kv_heads * shape.value_dim, width),
        "attn_output": (width, shape.heads * shape.value_dim),
        "ffn_norm": (width,),
        "ffn_gate": (hidden, width),
        "ffn_up": (hidden, width),
        "ffn_down": (width, hidden),
    }
    found: dict[str, tuple[int, ...]] = {"token_embd.weight": (vocabulary, width)}
    for n in range(shape.layers):
        found |= {f"blk.{n}.{kind}.weight": size for kind, size in kinds.items()}
    found["output_norm.weight"] = (width,)
    return found if tied else found | {"output.weight": (vocabulary, width)}

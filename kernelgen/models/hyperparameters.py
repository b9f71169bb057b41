"""The sizes and constants of a decoder, from the metadata of a GGUF file.

Keys and defaults are those of the GGUF specification (ggml, docs/gguf.md) and of llama.cpp.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kernelgen.errors import FileError
from kernelgen.ir.ops.rope import Linear, Scaling, Yarn

#: how elements pair in rotary positions, by architecture: GGUF files of llama have the rows of q
#: and k in an order in which neighbours belong together
PAIRINGS = {"llama": "neighbours", "qwen2": "half", "qwen3": "half"}


@dataclass(frozen=True)
class Hyperparameters:
    """What the metadata says of a decoder.

    layers     transformer blocks; `width` elements of a token between them
    heads      of queries; `kv_heads` of keys and values, each shared by heads / kv_heads
    head_dim   elements of a query and a key, `value_dim` of a value
    hidden     elements inside the feed-forward network
    eps        what is added to the mean of squares in norms
    rope_dims, rope_base, scaling, pairing   of `kernelgen.rope`
    context    tokens that the model was made for
    window     keys that a query sees, or None
    """

    architecture: str
    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    hidden: int
    eps: float
    rope_dims: int
    rope_base: float
    scaling: Scaling | None
    pairing: str
    context: int
    window: int | None

    @classmethod
    def of(cls, metadata: Mapping[str, Any], where: str = "the file") -> Hyperparameters:
        """Those of a file's metadata; raises FileError where it says too little, or is no decoder
        that is known here."""
        architecture = metadata.get("general.architecture", "")
        if not isinstance(architecture, str) or architecture not in PAIRINGS:
            raise FileError(
                f"{where} holds a model of architecture {architecture!r}; {', '.join(PAIRINGS)} are"
                " known"
            )
        read = _Reader(metadata, architecture, where)
        if read.number("expert_count", 0):
            raise FileError(f"{where} holds a mixture of experts, which is not known here")
        width, heads = read.number("embedding_length"), read.number("attention.head_count")
        head_dim = read.number("attention.key_length", width // heads)
        found = cls(
            architecture=architecture,
            layers=read.number("block_count"),
            width=width,
            heads=heads,
            kv_heads=read.number("attention.head_count_kv", heads),
            head_dim=head_dim,
            value_dim=read.number("attention.value_length", head_dim),
            hidden=read.number("feed_forward_length"),
            eps=read.real("attention.layer_norm_rms_epsilon"),
            rope_dims=read.number("rope.dimension_count", head_dim),
            rope_base=read.real("rope.freq_base", 10000.0),
            scaling=_scaling(read),
            pairing=PAIRINGS[architecture],
            context=read.number("context_length"),
            window=read.number("attention.sliding_window", 0) or None,
        )
        pairs = found.rope_dims % 2 == 0 and found.rope_dims <= head_dim and found.rope_base > 1
        if found.heads % found.kv_heads or not pairs:
            raise FileError(
                f"{where} says {found.heads} heads over {found.kv_heads} of keys, and"
                f" {found.rope_dims} of {head_dim} elements that turn by powers of"
                f" {found.rope_base:g}: heads are a multiple of those of keys, elements turn in"
                " pairs, and the base is above 1"
            )
        return found


class _Reader:
    """Numbers of an architecture's metadata."""

    def __init__(self, metadata: Mapping[str, Any], architecture: str, where: str) -> None:
        self._metadata, self._prefix, self.where = metadata, architecture, where

    def get(self, key: str, default: Any) -> Any:
        name = f"{self._prefix}.{key}"
        found = self._metadata.get(name, default)
        if found is None:
            raise FileError(f"{self.where} has no {name}, which says how the model is made")
        if isinstance(found, list) and found and found == found[:1] * len(found):
            found = found[0]  # one for each layer, all the same
        return found

    def number(self, key: str, default: int | None = None) -> int:
        found = self.get(key, default)
        least = 0 if default == 0 else 1
        if not isinstance(found, int) or not least <= found < 1 << 31:
            raise FileError(
                f"{self.where} says {self._prefix}.{key} = {str(found)[:60]}; it is one whole"
                f" number from {least} on, the same in all layers"
            )
        return int(found)

    def real(self, key: str, default: float | None = None) -> float:
        found = self.get(key, default)
        if not isinstance(found, int | float) or not (math.isfinite(found) and found > 0):
            raise FileError(
                f"{self.where} says {self._prefix}.{key} = {str(found)[:60]}; it is a number above"
                " 0"
            )
        return float(found)


def _scaling(read: _Reader) -> Scaling | None:
    """How the file stretches rotary positions; factors of single pairs are a tensor of it."""
    kind = read.get("rope.scaling.type", "none")
    if kind == "none":
        return Linear(read.real("rope.scale_linear")) if _has(read, "rope.scale_linear") else None
    if kind == "linear":
        return Linear(read.real("rope.scaling.factor"))
    if kind == "yarn":
        factor = read.real("rope.scaling.factor")
        return Yarn(
            factor,
            read.number("rope.scaling.original_context_length"),
            read.real("rope.scaling.yarn_beta_fast", 32.0),
            read.real("rope.scaling.yarn_beta_slow", 1.0),
            read.real("rope.scaling.attn_factor", 1.0) * (0.1 * math.log(max(factor, 1)) + 1),
        )
    raise FileError(
        f"{read.where} stretches its context by {str(kind)[:60]!r}; none, linear and yarn are known"
    )


def _has(read: _Reader, key: str) -> bool:
    return read.get(key, False) is not False

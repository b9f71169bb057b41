"""flash_attn_ext of ggml's CPU backend, as a rival of attention kernels."""

from __future__ import annotations

import math
from ctypes import c_float, c_void_p

import numpy as np

from bench.ggml import Ggml, Graph, Tensor
from kernelgen.tensor import QuantTensor

_P = c_void_p


def flash_attention(
    library: Ggml, q: np.ndarray, k: QuantTensor, v: QuantTensor, causal: bool
) -> Graph:
    """A graph of softmax(q @ k.T / sqrt(D)) @ v, for q (B, H, T, D), k and v (B, HK, S, D).

    Its result is in the order (B, T, H, D).  A causal mask is an array there, float16 (T, S).
    """
    arguments = [_P] * 5 + [c_float] * 3
    library.declare("ggml_flash_attn_ext", _P, arguments)
    tensors = [_tensor(library, "f32", q.shape, q)]
    tensors += [_tensor(library, x.format.name, x.shape, x.data) for x in (k, v)]
    queries, keys = q.shape[2], k.shape[2]
    if causal:
        mask = np.triu(np.full((queries, keys), -np.inf, np.float16), keys - queries + 1)
        tensors.append(_tensor(library, "f16", mask.shape, mask))
    scale = 1 / math.sqrt(q.shape[3])

    def build(context: int) -> int:
        handles = [one.handle for one in tensors]
        handles += [None] * (4 - len(handles))
        return int(library.call("ggml_flash_attn_ext", context, *handles, scale, 0.0, 0.0))

    return library.graph(build)


def _tensor(library: Ggml, type_name: str, shape: tuple[int, ...], data: np.ndarray) -> Tensor:
    return library.tensor(type_name, shape[::-1], data)

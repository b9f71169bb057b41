"""kernelgen: quantized matmul kernels for every format and GPU API, from one description each."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

#: public name -> module that defines it; loaded on first use, so that importing costs little
_HOME = {
    "QuantTensor": "kernelgen.tensor",
    "BlockFormat": "kernelgen.ir.block",
    "KernelgenError": "kernelgen.errors",
    "ir": "kernelgen.ir",
    "targets": "kernelgen.targets",
    **dict.fromkeys(
        ("dequantize", "formats", "get_rows", "kernel", "matmul", "open", "prepare", "quantize",
         "register_format", "save", "source", "unregister_format"),
        "kernelgen.api",
    ),
    **dict.fromkeys(("alibi_slopes", "attention", "captured"), "kernelgen.api_attention"),
    "KVCache": "kernelgen.kv_cache",
    "gated_matmul": "kernelgen.api_fused",
    "map": "kernelgen.api_maps",
    "round_to_nearest": "kernelgen.api_blocks",
    **dict.fromkeys(
        ("Linear", "Llama3", "Yarn", "add", "argmax", "cast", "geglu", "gelu", "layer_norm", "mul",
         "relu", "rms_norm", "rope", "row_max", "row_min", "row_sum", "sigmoid", "silu", "softmax",
         "swiglu", "tanh", "topk"),
        "kernelgen.api_rows",
    ),
}  # fmt: skip

__all__ = [*sorted(_HOME), "__version__"]

if TYPE_CHECKING:
    from kernelgen import ir as ir
    from kernelgen import targets as targets
    from kernelgen.api import dequantize as dequantize
    from kernelgen.api import formats as formats
    from kernelgen.api import get_rows as get_rows
    from kernelgen.api import kernel as kernel
    from kernelgen.api import matmul as matmul
    from kernelgen.api import open as open
    from kernelgen.api import prepare as prepare
    from kernelgen.api import quantize as quantize
    from kernelgen.api import register_format as register_format
    from kernelgen.api import save as save
    from kernelgen.api import source as source
    from kernelgen.api import unregister_format as unregister_format
    from kernelgen.api_attention import alibi_slopes as alibi_slopes
    from kernelgen.api_attention import attention as attention
    from kernelgen.api_attention import captured as captured
    from kernelgen.api_blocks import round_to_nearest as round_to_nearest
    from kernelgen.api_fused import gated_matmul as gated_matmul
    from kernelgen.api_maps import map as map
    from kernelgen.api_rows import Linear as Linear
    from kernelgen.api_rows import Llama3 as Llama3
    from kernelgen.api_rows import Yarn as Yarn
    from kernelgen.api_rows import add as add
    from kernelgen.api_rows import argmax as argmax
    from kernelgen.api_rows import cast as cast
    from kernelgen.api_rows import geglu as geglu
    from kernelgen.api_rows import gelu as gelu
    from kernelgen.api_rows import layer_norm as layer_norm
    from kernelgen.api_rows import mul as mul
    from kernelgen.api_rows import relu as relu
    from kernelgen.api_rows import rms_norm as rms_norm
    from kernelgen.api_rows import rope as rope
    from kernelgen.api_rows import row_max as row_max
    from kernelgen.api_rows import row_min as row_min
    from kernelgen.api_rows import row_sum as row_sum
    from kernelgen.api_rows import sigmoid as sigmoid
    from kernelgen.api_rows import silu as silu
    from kernelgen.api_rows import softmax as softmax
    from kernelgen.api_rows import swiglu as swiglu
    from kernelgen.api_rows import tanh as tanh
    from kernelgen.api_rows import topk as topk
    from kernelgen.errors import KernelgenError as KernelgenError
    from kernelgen.ir.block import BlockFormat as BlockFormat
    from kernelgen.kv_cache import KVCache as KVCache
    from kernelgen.tensor import QuantTensor as QuantTensor


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'kernelgen' has no attribute {name!r}")
    home = importlib.import_module(_HOME[name])
    value = home if home.__name__ == f"{__name__}.{name}" else getattr(home, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__

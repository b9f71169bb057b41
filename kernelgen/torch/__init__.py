"""kernelgen's kernels in PyTorch: quantized layers, custom operators, attention.

    import kernelgen.torch

    kernelgen.torch.replace_linears(model, "q4_K", skip=("lm_head",))

Operators are torch.library's, so that torch.compile and torch.export take them.  This package is
imported by its users only; `import kernelgen` never loads torch.
"""

from __future__ import annotations

try:
    import torch
except ImportError as error:
    raise ImportError(
        f"kernelgen.torch needs torch, which cannot be imported ({error});"
        " pip install kernelgen[torch]"
    ) from error

from kernelgen.targets import settle_torch
from kernelgen.torch.attention import scaled_dot_product_attention
from kernelgen.torch.linear import QuantLinear
from kernelgen.torch.ops import dequantize, matmul
from kernelgen.torch.replace import Replaced, replace_linears

settle_torch()
del torch  # its name here would promise something

__all__ = [
    "QuantLinear", "Replaced", "dequantize", "matmul", "replace_linears",
    "scaled_dot_product_attention",
]  # fmt: skip

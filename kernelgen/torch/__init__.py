"""kernelgen's kernels in PyTorch: quantized layers, custom operators, attention.

    import kernelgen.torch

    kernelgen.torch.replace_linears(model, "q4_K", skip=("lm_head",))

Operators are torch.library's, so that torch.compile and torch.export take them.  This package is
imported by its users only; `import kernelgen` never loads torch.
"""

from __future__ import annotations

from kernelgen.torch.attention import scaled_dot_product_attention
from kernelgen.torch.linear import QuantLinear
from kernelgen.torch.ops import dequantize, matmul
from kernelgen.torch.replace import Replaced, replace_linears

__all__ = [
    "QuantLinear", "Replaced", "dequantize", "matmul", "replace_linears",
    "scaled_dot_product_attention",
]  # fmt: skip

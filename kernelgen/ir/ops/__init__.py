"""What the ops compute, in numpy: the meaning that every generated kernel is held to."""

from __future__ import annotations

from kernelgen.ir.ops.matmul import Activations, matmul, quantize_activations

__all__ = ["Activations", "matmul", "quantize_activations"]

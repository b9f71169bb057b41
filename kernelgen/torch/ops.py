"""Custom operators of torch.library, with fake kernels for torch.compile and torch.export.

    kernelgen::matmul(Tensor x, Tensor blocks, str format, int columns, str precision) -> Tensor
    kernelgen::dequantize(Tensor blocks, str format, int columns) -> Tensor
    kernelgen::attention(Tensor q, Tensor k, Tensor v, Tensor? mask, bool causal, float? scale)
        -> Tensor

`blocks` are the bytes of a matrix (N, K) in a block format, uint8 (N, row_bytes), K is `columns`.
"""

from __future__ import annotations

from typing import Any

import torch

from kernelgen import api, api_attention
from kernelgen.dispatch import share_cores, target_for
from kernelgen.errors import KernelgenError, ShapeError
from kernelgen.ir import formats
from kernelgen.ir.block import BlockFormat
from kernelgen.tensor import QuantTensor
from kernelgen.torch.held import weights_of

_TAG = torch.Tag.pt2_compliant_tag
_library = torch.library.Library("kernelgen", "DEF")
_library.define(
    "matmul(Tensor x, Tensor blocks, str format, SymInt columns, str precision) -> Tensor",
    tags=_TAG,
)
_library.define("dequantize(Tensor blocks, str format, SymInt columns) -> Tensor", tags=_TAG)
_library.define(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? mask, bool causal, float? scale) -> Tensor",
    tags=_TAG,
)

#: kernelgen.matmul of numpy arrays alone
_plain_matmul: Any = api.matmul.__wrapped__  # type: ignore[attr-defined]

#: DLPack's number of the CPU
_CPU = 1

#: element types of x
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


# ---- matmul ---------------------------------------------------------------------------------


def _matmul(x: Any, blocks: Any, format: str, columns: int, precision: str) -> Any:
    _check(x, blocks)
    w = weights_of(blocks, format, columns)
    if x.device.type != "cpu":
        with torch.no_grad():
            return api.matmul(x, w, precision=precision)
    # numpy's way in, as the general one for arrays of any library costs as much as a small matmul
    rows = x.detach() if x.dtype == torch.float32 else x.detach().float()
    target = target_for(_CPU, None)
    share_cores(target)
    y = _plain_matmul(rows.numpy(), w, target=target, precision=precision)
    result = torch.from_numpy(y)
    return result if x.dtype == torch.float32 else result.to(x.dtype)


def apply(x: Any, blocks: Any, format: str, columns: int, precision: str) -> Any:
    """The operator; called past torch's dispatcher where nothing there would take notice, because
    its way through Python costs more than a small matmul."""
    if not torch.compiler.is_compiling() and _unwatched(x):
        return _matmul(x, blocks, format, columns, precision)
    return torch.ops.kernelgen.matmul(x, blocks, format, columns, precision)


def _unwatched(x: Any) -> bool:
    """Whether a call is plain arithmetic on the CPU: no gradient, no tracing, no mode, no
    transform."""
    return (
        type(x) is torch.Tensor
        and x.device.type == "cpu"
        and not (x.requires_grad and torch.is_grad_enabled())
        and not torch.jit.is_tracing()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._len_torch_function_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
    )


def _fake_matmul(x: Any, blocks: Any, format: str, columns: int, precision: str) -> Any:
    _check(x, blocks)
    torch._check(
        x.shape[-1] == columns,
        lambda: f"x of shape {tuple(x.shape)} was given for weights of {columns} columns",
    )
    return x.new_empty((*x.shape[:-1], blocks.shape[0]))


def _check(x: Any, blocks: Any) -> None:
    if x.dtype not in DTYPES:
        raise ShapeError(f"x must be float32, float16 or bfloat16, not {x.dtype}; use x.to")
    if x.device != blocks.device:
        raise ShapeError(
            f"x is on {x.device} and the weights are on {blocks.device}; bring them together with"
            " .to(device)"
        )


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, blocks, ctx.format, ctx.columns, _ = inputs
    ctx.dtype = x.dtype
    ctx.save_for_backward(blocks)


def _backward(ctx: Any, grad: Any) -> tuple[Any, ...]:
    """The gradient of x: grad @ w.  The weights are decoded anew, in float32; they have none."""
    (blocks,) = ctx.saved_tensors
    values = torch.ops.kernelgen.dequantize(blocks, ctx.format, ctx.columns)
    return (grad.float() @ values).to(ctx.dtype), None, None, None, None


# ---- dequantize -----------------------------------------------------------------------------


def _dequantize(blocks: Any, format: str, columns: int) -> Any:
    values = api.dequantize(weights_of(blocks, format, columns), target=target_for(_CPU, None))
    return torch.from_numpy(values).to(blocks.device)


def _fake_dequantize(blocks: Any, format: str, columns: int) -> Any:
    return blocks.new_empty((blocks.shape[0], columns), dtype=torch.float32)


# ---- attention ------------------------------------------------------------------------------


def _attention(q: Any, k: Any, v: Any, mask: Any, causal: bool, scale: float | None) -> Any:
    with torch.no_grad():
        return api_attention.attention(q, k, v, mask=mask, causal=causal, scale=scale)


def _fake_attention(q: Any, k: Any, v: Any, mask: Any, causal: bool, scale: float | None) -> Any:
    return q.new_empty((*q.shape[:3], v.shape[3]))


def _no_gradient(ctx: Any, grad: Any) -> Any:
    raise KernelgenError(
        "the gradient of attention was asked for, which kernelgen does not have; train with"
        " torch.nn.functional.scaled_dot_product_attention, or run this under torch.no_grad()"
    )


for _name, _kernel, _fake in (
    ("matmul", _matmul, _fake_matmul),
    ("dequantize", _dequantize, _fake_dequantize),
    ("attention", _attention, _fake_attention),
):
    _library.impl(_name, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"kernelgen::{_name}", _fake, lib=_library)
torch.library.register_autograd(
    "kernelgen::matmul", _backward, setup_context=_remember, lib=_library
)
torch.library.register_autograd("kernelgen::attention", _no_gradient, lib=_library)


# ---- what users call ------------------------------------------------------------------------


def matmul(
    x: Any, w: QuantTensor | Any, format: str | BlockFormat = "", precision: str = "auto"
) -> Any:
    """y = x @ w.T as a differentiable, compilable operator; the gradient is that of x.

    x          float32, float16 or bfloat16 (..., K)
    w          a `QuantTensor` (N, K), for x on the CPU; or the blocks of one, uint8 (N, row_bytes)
               on x's device, in `format`
    precision  as in `kernelgen.matmul`

    Returns (..., N) of x's dtype.  Raises ShapeError, FormatError, TargetError.
    """
    if isinstance(w, QuantTensor):
        return apply(x, as_blocks(w), w.format.name, w.shape[1], precision)
    name = formats.get(format).name if isinstance(format, str) else format.name
    return apply(x, w, name, x.shape[-1], precision)


def dequantize(blocks: Any, format: str | BlockFormat, columns: int) -> Any:
    """Values, float32 (N, K), of blocks, uint8 (N, row_bytes), K being `columns`."""
    name = formats.get(format).name if isinstance(format, str) else format.name
    return torch.ops.kernelgen.dequantize(blocks, name, columns)


def as_blocks(w: QuantTensor) -> Any:
    """The blocks of a tensor as torch's, uint8 (N, row_bytes), on the same memory, which must not
    be written to; the same object each time."""
    found = w.prepared.get("torch")
    if found is None:
        if len(w.shape) != 2:
            raise ShapeError(
                f"weights are matrices (N, K), not of shape {w.shape}; w[e] takes one of a stack"
            )
        found = w.prepared["torch"] = _shared(w)
    return found


def _shared(w: QuantTensor) -> Any:
    if w.data.flags.writeable or not w.data.size:
        return torch.from_numpy(w.data.copy())
    import warnings

    with warnings.catch_warnings():
        # what torch warns of, writing to memory that is read-only, is what the docstring forbids
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(w.data)

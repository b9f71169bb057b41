"""A linear layer with quantized weights."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import torch

from kernelgen.errors import FormatError, ShapeError
from kernelgen.ir import formats
from kernelgen.ir.block import BlockFormat
from kernelgen.problem import choose_precision
from kernelgen.tensor import QuantTensor, quantize
from kernelgen.torch.ops import apply


class QuantLinear(torch.nn.Module):  # type: ignore[misc]
    """y = x @ w.T + bias with w in a block format, decoded inside the kernel.

    in_features   K, a multiple of the format's block; out_features N
    format        name of a format in any case, or a `BlockFormat`
    bias          whether there is one, a parameter (N,) of `dtype`
    precision     as in `kernelgen.matmul`

    x is float32, float16 or bfloat16 (..., K), y of its dtype (..., N).  The blocks are a buffer
    `blocks`, uint8 (N, row_bytes), which `.to(dtype)` leaves alone; the state has the format's name
    and the shape beside it, and a state of another format or shape is refused.  There is a gradient
    of x and of the bias, none of the weights.

    Raises FormatError for an unknown format or a K that it cannot hold.
    """

    columns: Any

    def __init__(
        self,
        in_features: int,
        out_features: int,
        format: str | BlockFormat,
        bias: bool = True,
        precision: str = "auto",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.quant_format = fmt = formats.get(format) if isinstance(format, str) else format
        self.in_features, self.out_features = in_features, out_features
        choose_precision(precision, fmt)  # refuses names that are none
        self.precision = precision
        shape = (out_features, fmt.row_bytes(in_features))
        self.register_buffer("blocks", torch.zeros(shape, dtype=torch.uint8, device=device))
        # of weights whose columns are stored in another order (`QuantTensor.columns`)
        self.register_buffer("columns", None)
        self.bias = (
            torch.nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype))
            if bias
            else None
        )

    @classmethod
    def from_tensor(
        cls, w: QuantTensor, bias: Any = None, precision: str = "auto", device: Any = None
    ) -> QuantLinear:
        """The layer with these weights (N, K), copied to a device, and a bias, a tensor (N,)."""
        if len(w.shape) != 2:
            raise ShapeError(f"a layer's weights are a matrix (N, K), not of shape {w.shape}")
        n, k = w.shape
        made = cls(k, n, w.format, False, precision, device="meta")
        made.blocks = torch.from_numpy(np.array(w.data)).to(device)
        if w.columns is not None:
            made.columns = torch.from_numpy(w.columns.astype(np.int64)).to(device)
        if bias is not None:
            if tuple(bias.shape) != (n,):
                raise ShapeError(f"a bias of shape {tuple(bias.shape)} was given for {n} rows")
            made.bias = torch.nn.Parameter(bias.detach().to(device))
        return made

    @classmethod
    def from_linear(
        cls,
        linear: Any,
        format: str | BlockFormat,
        importance: Any = None,
        precision: str = "auto",
    ) -> QuantLinear:
        """A torch.nn.Linear's weights in a format, on its device; `importance` as in
        `kernelgen.quantize`.  The bias is the layer's own parameter.

        On the meta device, where there is nothing to quantize, the result is empty, too.
        """
        weight = linear.weight
        if weight.device.type == "meta":
            n, k = weight.shape
            has_bias = linear.bias is not None
            return cls(k, n, format, has_bias, precision, "meta", weight.dtype)
        values = weight.detach().to("cpu", torch.float32).numpy()
        w = quantize(values, format, importance)
        made = cls.from_tensor(w, None, precision, weight.device)
        made.bias = linear.bias
        return made.train(linear.training)  # type: ignore[no-any-return]

    def forward(self, x: Any) -> Any:
        """(..., K) to (..., N)."""
        x = x if self.columns is None else x.index_select(-1, self.columns)
        y = apply(x, self.blocks, self.quant_format.name, self.in_features, self.precision)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    @property
    def tensor(self) -> QuantTensor:
        """The weights as a `QuantTensor`, on the host; on the CPU it shares the memory."""
        shape = (self.out_features, self.in_features)
        order = None if self.columns is None else self.columns.cpu().numpy()
        return QuantTensor(self.quant_format, shape, self.blocks.cpu().numpy(), columns=order)

    @property
    def weight(self) -> Any:
        """The weights as floats (N, K), of the bias's dtype, else torch's default: decoded at each
        access, for code that looks at the weights of a linear layer."""
        name = self.quant_format.name
        values = torch.ops.kernelgen.dequantize(self.blocks, name, self.in_features)
        if self.columns is not None:
            values = torch.empty_like(values).index_copy_(1, self.columns, values)
        return values.to(torch.get_default_dtype() if self.bias is None else self.bias.dtype)

    def get_extra_state(self) -> Any:
        """Format and shape as JSON in a tensor of bytes, which files of tensors alone can hold."""
        said = {"format": self.quant_format.name, "shape": [self.out_features, self.in_features]}
        return torch.tensor(list(json.dumps(said).encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Any) -> None:
        """Nothing is taken over: `_load_from_state_dict` has compared it."""

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        state = state_dict.get(f"{prefix}_extra_state")
        if state is not None:
            self._compare(prefix, state)
        order = state_dict.get(f"{prefix}columns")
        if order is not None and self.columns is None:
            self.columns = torch.empty_like(order, device=self.blocks.device)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _compare(self, prefix: str, state: Any) -> None:
        """Raises where a state is of another format or shape: bytes that fit by chance would be
        read as other numbers."""
        try:
            said = json.loads(bytes(state.tolist()))
            name, shape = said["format"], tuple(said["shape"])
        except (AttributeError, TypeError, ValueError, KeyError):
            raise FormatError(
                f"{prefix}_extra_state does not name a format and a shape; the state is not that of"
                " a QuantLinear"
            ) from None
        mine = (self.out_features, self.in_features)
        if (name, shape) != (self.quant_format.name, mine):
            raise FormatError(
                f"the state of {prefix.rstrip('.') or 'the layer'} is {name} {shape}, and the layer"
                f" is {self.quant_format.name} {mine}; make the layer like the state before loading"
            )

    def extra_repr(self) -> str:
        """What print shows."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features},"
            f" format={self.quant_format.name}, bias={self.bias is not None},"
            f" precision={self.precision}"
        )

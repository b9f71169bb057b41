"""Tensors of blocks as `QuantTensor`s, each made once: what targets repack stays with it.

A tensor of bytes has no place for repacked copies, so they are found here by the tensor itself.
They go when it goes, and are made anew when its bytes were written to.
"""

from __future__ import annotations

import threading
import weakref
from dataclasses import dataclass
from typing import Any

import torch

from kernelgen.errors import ShapeError
from kernelgen.ir import formats
from kernelgen.tensor import QuantTensor


@dataclass(frozen=True)
class _Held:
    """Blocks as a tensor, and what they were made from."""

    weights: QuantTensor
    address: int
    version: int
    device: Any


#: by the id of the tensor of bytes; gone when that is
_held: dict[int, _Held] = {}
_lock = threading.Lock()


def version_of(blocks: Any) -> int:
    """How often a tensor was written to; tensors of inference mode do not count that."""
    return 0 if blocks.is_inference() else int(blocks._version)


def weights_of(blocks: Any, format: str, columns: int) -> QuantTensor:
    """The matrix (N, K) whose blocks are `blocks`, uint8 (N, row_bytes), K being `columns`.

    On the CPU it shares the tensor's memory; elsewhere it is a copy on the host, from which targets
    make theirs on the device.
    """
    found = _held.get(id(blocks))
    if (
        found is not None
        and found.address == blocks.data_ptr()
        and found.version == version_of(blocks)
        and found.weights.shape[1] == columns
        and found.weights.format.name == format
    ):
        return found.weights
    return _hold(blocks, format, columns)


def _hold(blocks: Any, format: str, columns: int) -> QuantTensor:
    with _lock:
        address, version = blocks.data_ptr(), version_of(blocks)
        for one in _held.values():  # another tensor on the same memory, such as blocks.detach()
            same = (one.address, one.version, one.device) == (address, version, blocks.device)
            if same and one.weights.format.name == format and _fits(one, blocks, columns):
                weights = one.weights
                break
        else:
            weights = _made(blocks, format, columns)
        key = id(blocks)
        if key not in _held:
            weakref.finalize(blocks, _held.pop, key, None).atexit = False
        _held[key] = _Held(weights, address, version, blocks.device)
        return weights


def _fits(one: _Held, blocks: Any, columns: int) -> bool:
    return one.weights.shape == (blocks.shape[0], columns)


def _made(blocks: Any, format: str, columns: int) -> QuantTensor:
    fmt = formats.get(format)
    wanted = fmt.row_bytes(columns)
    if blocks.dtype != torch.uint8 or blocks.dim() != 2 or blocks.shape[1] != wanted:
        raise ShapeError(
            f"blocks of {fmt.name} with {columns} columns are uint8 (N, {wanted}), not"
            f" {blocks.dtype} {tuple(blocks.shape)}"
        )
    data = blocks.detach().cpu().contiguous().numpy()
    return QuantTensor(fmt, (blocks.shape[0], columns), data)

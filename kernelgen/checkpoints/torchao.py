"""torchao's tensor subclasses, as its safetensors support flattens them
(torchao: prototype/safetensors/safetensors_support.py).

The file's metadata has the names of all tensors, and for each JSON with its class; the parts of
`layer.weight` are tensors `layer._weight_qdata`, `layer._weight_scale`, `layer._weight_zero_point`.

    IntxUnpackedToInt8Tensor   qdata int8 (N, K) in the range of target_dtype, groups along K
    Int8Tensor                 qdata int8 (N, K)
    Float8Tensor               qdata F8 (N, K)

A value is (qdata - zero_point) * scale in float32, which torchao then rounds to the tensor's type.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np

from kernelgen.checkpoints.compressed_tensors import integers
from kernelgen.checkpoints.config import Quantization
from kernelgen.checkpoints.fp8 import KINDS, by_rows
from kernelgen.checkpoints.groups import Groups, Stored, float_groups
from kernelgen.checkpoints.planes import Array, Plane, Planes
from kernelgen.errors import FileError


def torchao(planes: Planes, config: Quantization) -> Iterator[Stored]:
    """The tensors that are no plain torch tensors."""
    names = _json(planes, "tensor_names", list)
    for name in map(str, names):
        about = _json(planes, name, dict)
        kind = str(about.get("_type"))
        if kind != "Tensor":
            yield _stored(planes, name, kind, about.get("_data"))


def _json(planes: Planes, key: str, kind: type) -> Any:
    try:
        found = json.loads(planes.metadata[key])
    except (KeyError, ValueError, RecursionError):
        found = None
    if not isinstance(found, kind):
        raise FileError(
            f"the metadata of {planes.path} says nothing of {key!r} that torchao's safetensors"
            " support would write; save the model again with flatten_tensor_state_dict"
        )
    return found


def _stored(planes: Planes, name: str, kind: str, data: Any) -> Stored:
    layer, _, last = name.rpartition(".")
    prefix = f"{layer}._{last}_"
    uses = tuple(one for one in planes if one.startswith(prefix))
    if kind not in ("IntxUnpackedToInt8Tensor", "Int8Tensor", "Float8Tensor"):
        shape = planes[uses[0]].shape if uses else ()
        return Stored(name, shape, uses or (next(iter(planes)),), skipped=f"torchao's {kind}")
    weight, scale = (planes.need(prefix + part, name) for part in ("qdata", "scale"))
    if len(weight.shape) != 2 or 0 in weight.shape:
        raise weight.error(f"has shape {weight.shape}, and a matrix was expected")
    shape = (weight.shape[0], weight.shape[1])
    if kind == "Float8Tensor":
        block = data.get("block_size") if isinstance(data, dict) else None

        def floats() -> Groups:
            scales, run = by_rows(scale, shape, block)
            codes = weight.must_be(" ".join(KINDS)).raw.reshape(shape)
            return float_groups(KINDS[weight.dtype], lambda rows: codes[rows], scales, run, scale)

        return Stored(name, shape, uses, floats)
    bits = _bits(weight, kind, data)
    zero = planes.get(prefix + "zero_point")

    def groups() -> Groups:
        found = weight.must_be("I8").array()

        def codes(rows: slice) -> Array:
            return (found[rows] + np.int16(1 << (bits - 1))).astype(np.uint8)

        return integers(shape, bits, codes, scale, zero, None)

    return Stored(name, shape, uses, groups)


def _bits(plane: Plane, kind: str, data: Any) -> int:
    """Bits of target_dtype, "int4"."""
    if kind == "Int8Tensor":
        return 8
    dtype = data.get("target_dtype") if isinstance(data, dict) else None
    name = str(dtype.get("_data") if isinstance(dtype, dict) else dtype)
    bits = name.removeprefix("int")
    if not name.startswith("int") or not bits.isdigit() or not 1 <= int(bits) <= 8:
        raise plane.error(f"has target_dtype {name}, and int1 to int8 are read")
    return int(bits)

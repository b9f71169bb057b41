"""Checkpoints of other ecosystems: codes, scales and zero points in tensors of their own.

`open` reads .safetensors files and folders of them.  One module for each ecosystem says how its
planes become `Groups`, of which `groups` makes the blocks of a format; docs/formats-in-planes.md
has what is read.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

from kernelgen.checkpoints.bitsandbytes import bitsandbytes
from kernelgen.checkpoints.compressed_tensors import compressed_tensors
from kernelgen.checkpoints.config import Quantization, read_config
from kernelgen.checkpoints.fp8 import fp8
from kernelgen.checkpoints.gptq import auto_round, awq, gptq
from kernelgen.checkpoints.groups import Stored
from kernelgen.checkpoints.hqq import hqq
from kernelgen.checkpoints.model import Checkpoint
from kernelgen.checkpoints.planes import Plane, Planes, read_planes
from kernelgen.checkpoints.torchao import torchao
from kernelgen.errors import FileError

Reader = Callable[[Planes, Quantization], Iterator[Stored]]

#: by the quant_method of a config
READERS: dict[str, Reader] = {
    "gptq": gptq,
    "awq": awq,
    "auto-round": auto_round,
    "hqq": hqq,
    "bitsandbytes": bitsandbytes,
    "compressed-tensors": compressed_tensors,
    "fp8": fp8,
    "fbgemm_fp8": fp8,
    "torchao": torchao,
}

#: what names end in where nothing else says how they are quantized
_SIGNS = {".W_q": "hqq", "bitsandbytes__nf4": "bitsandbytes", "bitsandbytes__fp4": "bitsandbytes"}

_FLOATS = {"F32": "f32", "F16": "f16", "BF16": "bf16"}


def open(path: str | os.PathLike[str]) -> Checkpoint:
    """The tensors of a .safetensors file, or of a folder of them with their config.json.

    Raises FileError, in one sentence, for what is missing, damaged, or contradicts itself, and for
    a way of quantizing that is not read.
    """
    where = Path(path)
    try:
        planes = read_planes(where)
        config, quantization = read_config(where if where.is_dir() else where.parent)
    except OSError as error:
        raise FileError(f"{where} cannot be read: {error.strerror or error}") from None
    stored = list(_quantized(planes, quantization))
    used = {name for one in stored for name in one.uses}
    plain = (_plain(one) for name, one in planes.items() if name not in used)
    every = {one.name: one for one in (*stored, *plain)}
    order = {name: at for at, name in enumerate(planes)}
    inside = sorted(every.values(), key=lambda one: order[one.uses[0]])
    return Checkpoint(where, inside, {**config, **planes.metadata})


def _quantized(planes: Planes, config: Quantization) -> Iterator[Stored]:
    method = config.method
    if not method:
        names = " ".join(planes)
        method = next((one for sign, one in _SIGNS.items() if sign in names), "")
        if not method and planes.prefixes(".qweight"):
            raise FileError(
                f"{planes.path} has {planes.prefixes('.qweight')[0] + '.qweight'!r} but no config"
                f" beside it that says how it is quantized; add its config.json (with a"
                " quantization_config) or quantize_config.json"
            )
        if not method and "tensor_names" in planes.metadata:
            method = "torchao"
        if not method:
            return fp8(planes, config)
    reader = READERS.get(method)
    if reader is None:
        raise FileError(
            f"{config.path} says that {planes.path} is quantized by {method!r}, and kernelgen reads"
            f" {', '.join(READERS)}; convert the model, or take its unquantized weights"
        )
    return reader(planes, config)


def _plain(plane: Plane) -> Stored:
    """A tensor that is what it is: floats, or nothing that is read."""
    name, shape = plane.name, plane.shape or (1,)
    if plane.dtype in _FLOATS and 0 not in shape:
        data = (_FLOATS[plane.dtype], plane.raw)
        return Stored(name, shape, (name,), plain=data)
    kind = plane.dtype if 0 not in shape else f"an empty {plane.dtype}"
    return Stored(name, shape, (name,), skipped=kind)


__all__ = ["READERS", "Checkpoint", "open"]

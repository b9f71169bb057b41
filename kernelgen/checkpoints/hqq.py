"""HQQ as its HQQLinear saves it with safetensors (hqq: core/quantize.py, core/bitpack.py).

    W_q          the codes of W, reshaped to (groups, group_size), packed along the groups: of the
                 n codes in a number the highest is from the first n-th of the groups, and so on
    scale, zero  of each group: a value is (code - zero) * scale
    shape, group_size, nbits, axis, packing, ...   numbers and text, as tensors

hqq computes in fp16 or bf16.  Here scale * code - scale * zero is rounded once, to float32, which
is within one unit in the last place of hqq in float32.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from kernelgen.checkpoints.config import Quantization
from kernelgen.checkpoints.groups import Groups, Stored, along_rows, integer_groups
from kernelgen.checkpoints.planes import Array, Plane, Planes

#: bits of a code and bytes of what they are packed in
_PACKINGS = {"8bit_u8": (8, 1), "4bit_u8": (4, 1), "3bit_32": (3, 4), "2bit_u8": (2, 1),
             "1bit_u8": (1, 1)}  # fmt: skip

_META = (
    "scale", "zero", "nbits", "group_size", "shape", "axis", "packing", "unpack_view_dtype",
    "view_as_float", "quant_scale", "quant_zero", "compute_dtype", "offload_meta",
    "encoded_state_dict", "stores_quant_config", "channel_wise", "optimize", "round_zero",
)  # fmt: skip


def hqq(planes: Planes, config: Quantization) -> Iterator[Stored]:
    """The quantized matrices of an HQQ checkpoint."""
    for prefix in planes.prefixes(".W_q"):
        yield _stored(planes, config, prefix)


def _stored(planes: Planes, config: Quantization, prefix: str) -> Stored:
    of = f"{prefix}.W_q"
    weight = planes[of]
    scale, zero, shape_, packing = (
        planes.need(f"{prefix}.{name}", of) for name in ("scale", "zero", "shape", "packing")
    )
    shape = tuple(int(size) for size in shape_.array().ravel())
    name = "".join(map(chr, packing.array().ravel().tolist()))
    if len(shape) != 2 or min(shape) < 1:
        raise shape_.error(f"says {shape}, and a matrix was expected")
    if name not in _PACKINGS:
        raise packing.error(f"says {name!r}, and kernelgen reads {', '.join(_PACKINGS)}")
    uses = (of, *(f"{prefix}.{key}" for key in _META if f"{prefix}.{key}" in planes))
    said = {key: planes.get(f"{prefix}.{key}") for key in ("axis", "quant_scale", "quant_zero")}
    on = {key for key, one in said.items() if one is not None and one.array().any()}
    if said["axis"] is not None and "axis" not in on:
        skipped = "groups of HQQ that run down the columns (axis 0), quantize with axis=1"
        return Stored(f"{prefix}.weight", shape, uses, skipped=skipped)
    if on - {"axis"}:
        skipped = "groups of HQQ whose scales or zero points are quantized, too"
        return Stored(f"{prefix}.weight", shape, uses, skipped=skipped)
    layer = _Layer(weight, scale, zero, shape, *_PACKINGS[name])
    return Stored(f"{prefix}.weight", shape, uses, layer.groups)


class _Layer:
    """The planes of one matrix."""

    def __init__(
        self, weight: Plane, scale: Plane, zero: Plane, shape: tuple[int, ...], bits: int, size: int
    ) -> None:
        self.weight, self.scale, self.zero, self.bits = weight, scale, zero, bits
        self.shape = (shape[0], shape[1])
        count = math.prod(scale.shape)
        self.size = math.prod(shape) // max(count, 1)  # of a group
        if not self.size or self.size * count != math.prod(shape):
            raise scale.error(f"has {count} elements, which do not divide {shape}")
        each = 8 * size // bits
        packed = -(-count // each) * self.size * size
        if zero.shape != scale.shape and math.prod(zero.shape) != 1:
            raise zero.error(f"has shape {zero.shape}, and its scales have {scale.shape}")
        if len(weight.raw) != packed or (each * size < 8 and count % each):
            raise weight.error(
                f"has {len(weight.raw)} bytes, and {count} groups of {self.size} in {bits} bits"
                f" take {packed}"
            )
        self.count, self.word = count, f"<u{size}"

    def groups(self) -> Groups:
        """Its scales and zero points by blocks, and its codes."""
        scale = self.scale.scales()
        zero = np.broadcast_to(self.zero.scales(), scale.shape)
        if zero.dtype != scale.dtype:
            scale, zero = scale.astype(np.float32), zero.astype(np.float32)
        rows, run = along_rows(scale, self.shape, self.size)
        zeros, _ = along_rows(zero, self.shape, self.size)
        kept = max(self.bits, 2)
        codes: list[Array] = []  # unpacked when first asked for: parts of rows lie far apart

        def of_rows(part: slice) -> Array:
            if not codes:
                codes.append(self._codes())
            return codes[0][part]

        return integer_groups(kept, of_rows, rows, zeros, run, self.scale)

    def _codes(self) -> Array:
        words = self.weight.raw.view(self.word).reshape(-1, self.size)
        each = 8 * words.itemsize // self.bits
        shifts = [self.bits * (each - 1 - n) for n in range(each)]
        mask = (1 << self.bits) - 1
        parts = [((words >> shift) & mask).astype(np.uint8) for shift in shifts]
        return np.concatenate(parts)[: self.count].reshape(self.shape)

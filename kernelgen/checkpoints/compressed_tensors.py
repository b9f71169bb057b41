"""compressed-tensors: what llm-compressor writes (compressed_tensors: compressors/).

    pack-quantized        weight_packed int32 (N, K * bits / 32), weight_scale (N, G), weight_shape,
                          weight_zero_point int32 (N * bits / 32, G) or int8 (N, G), weight_g_idx
    int-quantized         weight int8 (N, K), weight_scale, weight_zero_point int8
    float-quantized       weight F8_E4M3 (N, K), weight_scale
    mxfp8-quantized       the same, weight_scale uint8 (N, K / 32)
    mxfp4-, mxfp6-pack-quantized   weight_packed uint8 (N, K * bits / 8), weight_scale likewise

Integers are stored plus 2**(bits - 1), as a stream of bits; older versions left the highest bits
of a word empty where bits do not divide 32.  A value is (code - zero) * scale, which the library
computes in the type of the scale; here the product is exact in float32.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from kernelgen.checkpoints.config import Quantization
from kernelgen.checkpoints.fp8 import KINDS, scaled
from kernelgen.checkpoints.groups import (
    Codes,
    Groups,
    Stored,
    by_index,
    integer_groups,
    unpack,
)
from kernelgen.checkpoints.planes import Array, Plane, Planes
from kernelgen.ir import formats

#: eight times the sizes of six-bit floats E2M3
_E2M3 = np.array([*range(16), *range(16, 32, 2), *range(32, 64, 4)], np.int8)


def compressed_tensors(planes: Planes, config: Quantization) -> Iterator[Stored]:
    """The quantized matrices of a checkpoint."""
    for prefix in planes.prefixes(".weight_packed"):
        yield _packed(planes, config, prefix)
    for prefix in planes.prefixes(".weight_scale"):
        if f"{prefix}.weight" in planes:
            yield _unpacked(planes, config, prefix)


def _packed(planes: Planes, config: Quantization, prefix: str) -> Stored:
    name = f"{prefix}.weight"
    packed = planes[f"{name}_packed"]
    scale = planes.need(f"{name}_scale", packed.name)
    args = _weights(config, prefix)
    bits = _bits(config, args)
    if args.get("type") == "float":
        if f"{name}_global_scale" in planes or (bits, scale.dtype) not in ((4, "U8"), (6, "U8")):
            uses = tuple(one for one in planes if one.startswith(name + "_"))
            kind = f"four-bit floats with scales of {scale.dtype}"
            return Stored(name, packed.shape, uses, skipped=kind)
        return _microscaled(name, bits, packed, scale)
    given = planes.need(f"{name}_shape", packed.name)
    shape = tuple(int(size) for size in given.array().ravel())
    if len(shape) != 2 or min(shape) < 1:
        raise given.error(f"says {shape}, and a matrix was expected")
    words = packed.must_be("I32").array()
    if words.shape not in {(shape[0], width) for width in _widths(shape[1], bits)}:
        raise packed.error(f"has shape {words.shape}, and {shape} in {bits} bits was expected")
    index = planes.get(f"{name}_g_idx")
    if index is not None and index.must_be("I32", shape[1:]).array().min() < 0:
        index = None  # what it holds where columns are in order
    zero = None if args.get("symmetric", True) else planes.need(f"{name}_zero_point", packed.name)
    parts = (packed.name, scale.name, given.name, f"{name}_g_idx", f"{name}_zero_point")

    def codes(rows: slice) -> Array:
        return _unpack(words[rows], bits, shape[1])

    def groups() -> Groups:
        return integers((shape[0], shape[1]), bits, codes, scale, zero, index)

    return Stored(name, shape, tuple(one for one in parts if one in planes), groups)


def _unpacked(planes: Planes, config: Quantization, prefix: str) -> Stored:
    name = f"{prefix}.weight"
    plane, scale = planes[name], planes[f"{name}_scale"]
    args = _weights(config, prefix)
    if len(plane.shape) != 2 or 0 in plane.shape:
        raise plane.error(f"has shape {plane.shape}, and a matrix was expected")
    if plane.dtype in KINDS:
        if scale.dtype == "U8":
            return _microscaled(name, 8, plane, scale)
        return scaled(planes, plane, name, args.get("block_structure"))
    bits = _bits(config, args)
    signed = plane.must_be("I8").array()
    zero = None if args.get("symmetric", True) else planes.need(f"{name}_zero_point", name)
    uses = [name, scale.name, *([f"{name}_zero_point"] if f"{name}_zero_point" in planes else [])]

    def codes(rows: slice) -> Array:
        return (signed[rows] + np.int16(1 << (bits - 1))).astype(np.uint8)

    def groups() -> Groups:
        shape = (plane.shape[0], plane.shape[1])
        return integers(shape, bits, codes, scale, zero, None)

    return Stored(name, plane.shape, tuple(uses), groups)


def integers(
    shape: tuple[int, int], bits: int, codes: Codes, scale: Plane, zero: Plane | None,
    index: Plane | None,
) -> Groups:  # fmt: skip
    """Groups of codes that are integers plus 2**(bits - 1), for a matrix (N, K).

    scale  (N, groups), (N,), or one
    zero   int8 like the scales, or packed as int32 along N; None where the groups are symmetric
    index  the group of each column, or None where columns are in order
    """
    n, k = shape
    scales = scale.scales()
    scales = scales.reshape(-1, 1) if scales.ndim < 2 else scales
    count = scales.shape[-1]
    if scales.shape[0] not in (1, n) or scales.ndim != 2 or k % count:
        raise scale.error(f"has shape {scale.shape}, which are no scales of {n} x {k}")
    scales = np.broadcast_to(scales, (n, count))
    zeros = None if zero is None else _zero_points(zero, bits, n, count)
    if index is None:
        return integer_groups(bits, codes, scales, zeros, k // count, scale)
    which, run, columns = by_index(index.array())
    if which.max() >= count:
        raise index.error(f"names group {which.max()}, and there are {count}")

    def moved(rows: slice) -> Array:
        return codes(rows) if columns is None else codes(rows)[:, columns]

    zeros = None if zeros is None else zeros[:, which]
    made = integer_groups(bits, moved, scales[:, which], zeros, run, scale)
    return Groups(made.format, made.codes, made.fields, columns)


def _zero_points(plane: Plane, bits: int, n: int, count: int) -> Array:
    """Zero points, uint8 (N, groups), of unsigned codes."""
    found = plane.array()
    if plane.dtype == "I32":
        if found.shape not in {(width, count) for width in _widths(n, bits)}:
            raise plane.error(f"has shape {found.shape}, for {n} x {count} of {bits} bits")
        return _unpack(np.ascontiguousarray(found.T), bits, n).T
    found = plane.must_be("I8").array()
    found = found.reshape(-1, 1) if found.ndim < 2 else found
    if found.shape not in ((n, count), (1, count)):
        raise plane.error(f"has shape {plane.shape}, and ({n}, {count}) was expected")
    shifted = (found + np.int16(1 << (bits - 1))).astype(np.uint8)
    return np.broadcast_to(shifted, (n, count))


def _widths(count: int, bits: int) -> tuple[int, int]:
    """Words that `count` integers take, as a stream of bits and with empty bits."""
    return -(-count * bits // 32), -(-count // (32 // bits))


def _unpack(words: Array, bits: int, count: int) -> Array:
    if words.shape[-1] == -(-count * bits // 32):
        return unpack(words, bits, count)
    each = 32 // bits
    shifts = np.arange(0, each * bits, bits, dtype=np.uint32)
    parts = (words.view(np.uint32)[..., None] >> shifts) & ((1 << bits) - 1)
    return parts.astype(np.uint8).reshape(*words.shape[:-1], -1)[..., :count]


def _microscaled(name: str, bits: int, packed: Plane, scale: Plane) -> Stored:
    """Floats in groups of 32 whose scale is a power of two."""
    n, k = packed.shape[0], packed.shape[-1] * 8 // bits
    scale.must_be("U8", (n, k // 32))
    if len(packed.shape) != 2 or k % 32 or not k:
        raise packed.error(f"has shape {packed.shape}, which is no matrix of groups of 32")
    raw = packed.raw.reshape(packed.shape)
    kind = {8: f"mx{KINDS.get(packed.dtype, '')}", 6: "mxfp6_e2m3", 4: "mxfp4"}[bits]

    def codes(rows: slice) -> Array:
        if bits == 8:
            return raw[rows]
        found = unpack(raw[rows], bits, k)
        if bits == 4:
            return found
        size = _E2M3[found & 31]
        return np.asarray(np.where(found & 32, -size, size))

    def groups() -> Groups:
        return Groups(formats.get(kind), codes, {"e": scale.array()})

    return Stored(name, (n, k), (packed.name, scale.name), groups)


def _bits(config: Quantization, args: Mapping[str, Any]) -> int:
    bits = args.get("num_bits")
    if not isinstance(bits, int) or not 1 <= bits <= 8:
        raise config.error(f"num_bits {bits!r}", "1 to 8")
    return bits


def _weights(config: Quantization, prefix: str) -> Mapping[str, Any]:
    """How the weights of a layer are quantized: by its name, a pattern (re:...), or its class,
    which tensors do not tell."""
    groups = config.values.get("config_groups")
    by_class: Mapping[str, Any] | None = None
    for group in groups.values() if isinstance(groups, dict) else ():
        args = group.get("weights") if isinstance(group, dict) else None
        if not isinstance(args, dict):
            continue
        for target in group.get("targets") or ["Linear"]:
            if target == prefix or _fits(str(target), prefix):
                return args
            if not str(target).startswith("re:"):
                by_class = by_class or args
    if by_class is None:
        raise config.error(f"no config_groups for the weights of {prefix}", "one for each layer")
    return by_class


def _fits(target: str, prefix: str) -> bool:
    try:
        return target.startswith("re:") and re.match(target[3:], prefix) is not None
    except re.error:
        return False

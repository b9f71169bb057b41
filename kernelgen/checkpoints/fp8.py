"""Weights of eight-bit floats with a scale for the matrix, each row, or blocks of 128 x 128.

    weight                         F8_E4M3 or F8_E5M2 (N, K)
    weight_scale                   one, (N, 1), or (N / b, K / b); a value is weight * weight_scale
    weight_scale_inv               the same, as DeepSeek and transformers' fine-grained FP8 call it

Blocks at the edges may be smaller.  The product is exact in float32 but for one rounding.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from kernelgen.checkpoints.config import Quantization
from kernelgen.checkpoints.groups import Groups, Stored, float_groups
from kernelgen.checkpoints.planes import Array, Plane, Planes

KINDS = {"F8_E4M3": "fp8_e4m3", "F8_E5M2": "fp8_e5m2"}
_SCALES = ("_scale_inv", "_scale")


def fp8(planes: Planes, config: Quantization) -> Iterator[Stored]:
    """The matrices of eight-bit floats, scaled or not."""
    sizes = config.values.get("weight_block_size")
    for name, plane in planes.items():
        if plane.dtype in KINDS and len(plane.shape) == 2 and 0 not in plane.shape:
            # without a config they may be plain floats
            must_scale = bool(config.method) and name.endswith(".weight")
            yield scaled(planes, plane, name, sizes, must_scale)


def scaled(
    planes: Planes, plane: Plane, name: str, block: object, must_scale: bool = True
) -> Stored:
    """A matrix of eight-bit floats and its scales; `block` is [rows, columns] of a scale."""
    scale = next((planes[name + end] for end in _SCALES if name + end in planes), None)
    if scale is None and must_scale:
        planes.need(name + _SCALES[-1], name)
    shape = (plane.shape[0], plane.shape[1])

    def groups() -> Groups:
        per_run, run = by_rows(scale, shape, block)
        codes = plane.raw.reshape(shape)
        return float_groups(KINDS[plane.dtype], lambda rows: codes[rows], per_run, run, plane)

    uses = (name,) if scale is None else (name, scale.name)
    return Stored(name, shape, uses, groups)


def by_rows(plane: Plane | None, shape: tuple[int, int], block: object) -> tuple[Array, int]:
    """Scales as (N, K / run), and the run."""
    n, k = shape
    if plane is None:
        return np.ones((n, 1), np.float32), k
    scale = plane.scales()
    if scale.size == 1:
        return np.broadcast_to(scale.reshape(1, 1), (n, 1)), k
    if scale.shape in ((n,), (n, 1)):
        return scale.reshape(n, 1), k
    if scale.ndim == 2:
        rows, columns = _block_of(plane, shape, block)
        if scale.shape == (-(-n // rows), -(-k // columns)):
            run = math.gcd(columns, k)
            wide = np.repeat(scale, rows, axis=0)[:n]
            return wide[:, np.arange(k // run) * run // columns], run
    raise plane.error(f"has shape {plane.shape}, which are no scales of {n} x {k}")


def _block_of(plane: Plane, shape: tuple[int, int], block: object) -> tuple[int, int]:
    if block is None:
        return (1, shape[1] // plane.shape[1]) if plane.shape[0] == shape[0] else (128, 128)
    sizes = block if isinstance(block, list) else []
    if len(sizes) == 2 and all(isinstance(size, int) and size > 0 for size in sizes):
        return sizes[0], sizes[1]
    raise plane.error(f"belongs to blocks of {block!r}, and [128, 128] or the like was expected")

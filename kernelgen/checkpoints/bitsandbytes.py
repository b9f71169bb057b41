"""bitsandbytes' four-bit weights (bitsandbytes: functional.py, QuantState.as_dict).

    weight         uint8 (N * K / 2, 1): two codes in a byte, the first in its high half
    absmax         f32, one for each `blocksize` elements of the flat matrix
    quant_map      f32 (16,), the codebook
    quant_state.bitsandbytes__nf4 (or __fp4)   JSON: blocksize, shape, dtype, nested_offset, ...

A value is quant_map[code] * absmax in float32, which bitsandbytes then rounds to `dtype`.  Nested:
absmax is uint8, and stands for nested_quant_map[absmax] * nested_absmax[block] + nested_offset.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from kernelgen.checkpoints.config import Quantization
from kernelgen.checkpoints.groups import Groups, Stored, along_rows, float_groups, unpack
from kernelgen.checkpoints.planes import Array, Plane, Planes
from kernelgen.errors import FileError
from kernelgen.ir import formats
from kernelgen.ir.encode import code_table

_STATE = ".quant_state.bitsandbytes__"


def bitsandbytes(planes: Planes, config: Quantization) -> Iterator[Stored]:
    """The quantized matrices of a bitsandbytes checkpoint."""
    for name in [one for one in planes if _STATE in one]:
        yield _stored(planes, name)
    eight = planes.prefixes(".SCB")
    if eight:
        raise FileError(
            f"{planes.path} has {eight[0]!r} in the eight-bit format of bitsandbytes (LLM.int8),"
            " whose outliers stay in activations; kernelgen reads nf4 and fp4"
        )


def _stored(planes: Planes, state_name: str) -> Stored:
    name, _, kind = state_name.partition(_STATE)
    weight, state_plane = planes.need(name, state_name), planes[state_name]
    state = _state(state_plane)
    if kind not in ("nf4", "fp4"):
        raise state_plane.error(f"is of type {kind!r}, and kernelgen reads nf4 and fp4")
    n, k = state["shape"]
    if len(weight.must_be("U8 I8 BF16 F16 F32").raw) != n * k // 2:
        raise weight.error(f"has {len(weight.raw)} bytes, and {n} x {k} codes take {n * k // 2}")
    nested = "nested_absmax" in {one.removeprefix(name + ".") for one in planes}
    parts = ["absmax", "quant_map", *(["nested_absmax", "nested_quant_map"] if nested else [])]
    used = {one: planes.need(f"{name}.{one}", name) for one in parts}

    def groups() -> Groups:
        book = used["quant_map"].must_be("F32", (16,)).array()
        known = np.array(code_table(formats.get(f"{kind}_g64")), np.float32)
        if not np.array_equal(book, known):
            raise used["quant_map"].error(f"has a codebook that is not that of {kind}")
        size = state["blocksize"]
        count = -(-n * k // size)
        absmax = _absmax(used, state, count)
        scale, run = along_rows(absmax, (n, k), size)
        raw = weight.raw.reshape(n, k // 2)

        def codes(rows: slice) -> Array:
            return unpack(raw[rows], 4, k).reshape(-1, k // 2, 2)[..., ::-1].reshape(-1, k)

        return float_groups(kind, codes, scale, run, used["absmax"])

    uses = (name, state_name, *(one.name for one in used.values()))
    return Stored(name, (n, k), uses, groups)


def _state(plane: Plane) -> dict[str, Any]:
    try:
        state = json.loads(plane.raw.tobytes())
        n, k = (int(size) for size in state["shape"])
        size = int(state["blocksize"])
        if n < 1 or k < 2 or k % 2 or size < 1 or size & (size - 1):
            raise ValueError(f"shape {n} x {k} in blocks of {size}")
        if int(state.get("nested_blocksize", 1)) < 1:
            raise ValueError("an empty nested block")
        float(state.get("nested_offset", 0.0))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise plane.error(f"is no state of a quantized matrix ({error})") from None
    return {**state, "shape": (n, k), "blocksize": size}


def _absmax(used: dict[str, Plane], state: dict[str, Any], count: int) -> Array:
    """The scale of each block, float32 (count,)."""
    plane = used["absmax"]
    if "nested_absmax" not in used:
        return plane.must_be("F32 F16 BF16", (count,)).array().astype(np.float32)
    codes = plane.must_be("U8", (count,)).array()
    size = int(state.get("nested_blocksize", 256))
    outer = used["nested_absmax"].must_be("F32", (math.ceil(count / size),)).array()
    book = used["nested_quant_map"].must_be("F32", (256,)).array()
    offset = np.float32(state.get("nested_offset", 0.0))
    return np.asarray(book[codes] * np.repeat(outer, size)[:count] + offset)

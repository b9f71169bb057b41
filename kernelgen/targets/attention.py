"""What attention takes on every target: arguments of its entry points, and their sizes."""

from __future__ import annotations

import functools

import numpy as np

from kernelgen.ir.block import BlockFormat
from kernelgen.ir.ops.attention import Attention
from kernelgen.ir.ops.attention import strides as strides
from kernelgen.targets.base import Argument

#: the result
RESULT = Argument("y", "out", "f32", ("B", "H", "T", "DV"))
#: what always is there
TENSORS = (
    Argument("q", "in", "f32", ("B", "H", "T", "D")),
    Argument("k", "in", "u8", ("B", "HK", "S", "K_BYTES")),
    Argument("v", "in", "u8", ("B", "HK", "S", "V_BYTES")),
    RESULT,
)


def dims(kind: Attention) -> dict[str, str]:
    """What the shapes' names mean that depend on the kind."""
    return {
        "D": str(kind.head_dim),
        "DV": str(kind.value_dim),
        "K_BYTES": str(kind.k.row_bytes(kind.head_dim)),
        "V_BYTES": str(kind.v.row_bytes(kind.value_dim)),
    }


def arrays(kind: Attention) -> tuple[Argument, ...]:
    """Arrays that score and mask read, of any shape; sinks; what K and V hold."""
    found = [Argument(one.name, "in", one.dtype, ("...",)) for one in kind.operands]
    if kind.sinks:
        found.append(Argument("sinks", "in", "f32", ("H",)))
    return (*found, *held(kind))


def held(kind: Attention) -> tuple[Argument, ...]:
    """What K and V hold, where that is not all there is room for."""
    found = []
    if kind.lengths:
        found.append(Argument("lengths", "in", "i32", ("B",)))
    if kind.page:
        found.append(Argument("pages", "in", "i32", ("B", "PAGES")))
    return tuple(found)


def paged(kind: Attention) -> tuple[Argument, ...]:
    """K and V, where they are not what `TENSORS` says they are."""
    if not kind.page:
        return ()
    shape = ("POOL", "HK", str(kind.page))
    return (
        Argument("k", "in", "u8", (*shape, "K_BYTES")),
        Argument("v", "in", "u8", (*shape, "V_BYTES")),
    )


@functools.lru_cache(maxsize=64)
def is_half(fmt: BlockFormat, precision: str) -> bool:
    """Whether an element is stored as a number of this precision; found by trying all numbers."""
    if not fmt.float_codes or (fmt.block, fmt.nbytes) != (1, 2):
        return False
    patterns = np.arange(1 << 16, dtype=np.uint16)
    values = fmt.decode(patterns.view(np.uint8).reshape(-1, 2)).reshape(-1)
    if precision == "fp16":
        wanted = patterns.view(np.float16).astype(np.float32)
    else:
        wanted = (patterns.astype(np.uint32) << 16).view(np.float32)
    return bool(np.array_equal(values, wanted, equal_nan=True))

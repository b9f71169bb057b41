"""Formats that are known by a pattern of names, and made when they are first asked for.

Other ecosystems keep codes, scales and zero points in tensors of their own, for groups of any
size; for each there is one description, with the size as parameter.  The usual sizes are listed.
"""

from __future__ import annotations

import functools
import re

from kernelgen.ir.block import BlockFormat
from kernelgen.ir.formats.groups import SOURCES, grouped
from kernelgen.ir.formats.small_floats import small_floats

#: elements with one scale; 8 and 16 occur as well, and what is longer is cut into these
USUAL_GROUPS = (32, 64, 128)
GROUPS = (8, 16, *USUAL_GROUPS)

_BITS = (2, 3, 4, 8)
_GROUPED = re.compile(rf"({'|'.join(SOURCES)})([2348])_g(\d+)(_f32)?", re.IGNORECASE)
_FLOATS = re.compile(r"(nf4|fp4|fp8_e4m3|fp8_e5m2)_g(\d+)", re.IGNORECASE)
_MX = re.compile(r"mxfp8_e4m3|mxfp8_e5m2|mxfp6_e2m3|mxfp6_e3m2", re.IGNORECASE)

#: the names that have a usual size of groups
FAMILIES: tuple[str, ...] = (
    *(
        f"{kind}{bits}_g{group}{suffix}"
        for kind in SOURCES for bits in _BITS for group in USUAL_GROUPS for suffix in ("", "_f32")
    ),
    *(
        f"{name}_g{group}"
        for name in ("nf4", "fp4", "fp8_e4m3", "fp8_e5m2") for group in USUAL_GROUPS
    ),
    "mxfp8_e4m3", "mxfp8_e5m2", "mxfp6_e2m3", "mxfp6_e3m2",
)  # fmt: skip


def find(name: str) -> BlockFormat | None:
    """The format of that name, in any case, the same object each time; None if no pattern fits."""
    return _made(name.lower())


@functools.cache
def _made(name: str) -> BlockFormat | None:
    if match := _GROUPED.fullmatch(name):
        kind, bits, group, suffix = match.groups()
        known = int(group) in GROUPS
        return grouped(kind, int(bits), int(group), "f32" if suffix else "f16") if known else None
    if match := _FLOATS.fullmatch(name):
        return small_floats(match[1], int(match[2])) if int(match[2]) in GROUPS else None
    return small_floats(name, 32) if _MX.fullmatch(name) else None


def group_of(run: int) -> int:
    """The longest group that we have blocks of in a run of `run` elements that share a scale; 0 if
    there is none."""
    return next((size for size in reversed(GROUPS) if run % size == 0), 0)

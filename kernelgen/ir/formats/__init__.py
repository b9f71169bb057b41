"""The formats: one description each, and the list of them.

`FORMATS` are ggml's, and what `formats` lists by default; `families` has those of other ecosystems,
which are known by name and made on first use.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable
from typing import Any

from kernelgen.errors import FormatError
from kernelgen.ir.block import BlockFormat
from kernelgen.ir.check import twins
from kernelgen.ir.expr import show, var
from kernelgen.ir.formats import families
from kernelgen.ir.formats.codebooks import IQ4_NL, IQ4_XS, MXFP4, NVFP4
from kernelgen.ir.formats.floats import BF16, F16, F32
from kernelgen.ir.formats.grids import (
    IQ1_M,
    IQ1_S,
    IQ2_S,
    IQ2_XS,
    IQ2_XXS,
    IQ3_S,
    IQ3_XXS,
)
from kernelgen.ir.formats.k_quants import Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, Q8_K
from kernelgen.ir.formats.simple import Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q8_1
from kernelgen.ir.formats.ternary import Q1_0, Q2_0, TQ1_0, TQ2_0
from kernelgen.ir.overlaps import overlap

FORMATS: tuple[BlockFormat, ...] = (
    F32, F16, BF16,
    Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q8_1,
    Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, Q8_K,
    IQ4_NL, IQ4_XS, MXFP4, NVFP4,
    IQ1_S, IQ1_M, IQ2_XXS, IQ2_XS, IQ2_S, IQ3_XXS, IQ3_S,
    TQ1_0, TQ2_0, Q1_0, Q2_0,
)  # fmt: skip

_by_name = {f.name.lower(): f for f in FORMATS}


#: entry points of installed packages that name a format, or several
ENTRY_POINTS = "kernelgen.formats"

_looking = threading.RLock()
_looked = False


def get(name: str) -> BlockFormat:
    """The format of that name, in any case."""
    found = _by_name.get(name.lower()) or families.find(name)
    if found is None:
        _installed()
        found = _by_name.get(name.lower())
    if found is None:
        raise FormatError(
            f"format {name!r} is not known; known are {', '.join(f.name for f in formats())}, and"
            " families such as int4_g128 and nf4_g64 (docs/formats-in-planes.md);"
            " describe others with kernelgen.register_format (docs/add-a-format.md)"
        )
    return found


def formats() -> tuple[BlockFormat, ...]:
    """ggml's formats, then the registered ones, those of installed packages (see `ENTRY_POINTS`)
    included; `families.FAMILIES` has the names of others."""
    _installed()
    return tuple(_by_name.values())


def _installed() -> None:
    """Register the formats of installed packages, once; what fails is logged, and left out."""
    global _looked
    with _looking:
        if _looked:
            return
        _looked = True
        from importlib.metadata import entry_points

        for point in entry_points(group=ENTRY_POINTS):
            try:
                loaded = point.load()
                for one in loaded if isinstance(loaded, Iterable) else (loaded,):
                    if not isinstance(one, BlockFormat):
                        raise FormatError(f"it is {one!r}, no BlockFormat nor a list of these")
                    register(one)
            except Exception as error:  # of any kind: the package is not ours
                logging.getLogger(__name__).warning(
                    "format %s of an installed package is left out, because %s (%s) cannot be"
                    " loaded: %s",
                    point.name,
                    point.value,
                    ENTRY_POINTS,
                    error,
                )


def register(fmt: BlockFormat) -> BlockFormat:
    """Make a user's format known by its name to every command and target."""
    known = _by_name.get(fmt.name.lower()) or families.find(fmt.name)
    if known is not None and known is not fmt:
        raise FormatError(f"format {fmt.name} is already registered; choose another name")
    alike = twins(fmt) if fmt.block > 1 else None
    if alike is not None:
        raise FormatError(
            f"format {fmt.name}: elements {alike[0]} and {alike[1]} of a block have the same code"
            f" whatever the bytes are: code(i) = {show(fmt.code_expr(var('i', fmt.block)))}; see"
            " whether an index or a shift leaves out a part of i"
        )
    wrong = overlap(fmt)
    if wrong is not None:
        raise FormatError(f"format {fmt.name}: {wrong}")
    _by_name[fmt.name.lower()] = fmt
    return fmt


def restore(written: dict[str, Any]) -> BlockFormat:
    """The format of a description that came from another process: the one known here where that
    is the same."""
    known = _by_name.get(written["name"].lower()) or families.find(written["name"])
    if known is not None and known not in FORMATS and known.written() == written:
        return known
    return BlockFormat(**written)


def unregister(name: str) -> None:
    """Forget a registered format; those that come with kernelgen stay."""
    if get(name) in FORMATS or name.lower() not in _by_name:
        raise FormatError(f"format {name} comes with kernelgen and cannot be unregistered")
    del _by_name[name.lower()]

"""Loads of 16 bytes in place of four loads of a word, where a format's words lie that aligned."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from kernelgen.ir.block import BlockFormat
from kernelgen.ir.evaluate import evaluate
from kernelgen.ir.expr import U32, Expr, const, depends_on, substitute, transform, var, walk
from kernelgen.ir.layout import named_layout
from kernelgen.ir.ranges import divisor
from kernelgen.ir.steps import memory_steps, word_var

#: words of a load
_WORDS = 4


@dataclass(frozen=True)
class WideCodes:
    """The codes of four words next to each other in a group.

    addresses  of 16 bytes each, where `j` is a multiple of four
    shared     for how many groups, from a multiple of that on, an address is the same
    codes      u32, in `g`, `j` and wide0[r][j], wide1[r][j]...: word j of what was loaded of row r
    """

    addresses: tuple[Expr, ...]
    shared: tuple[int, ...]
    codes: Expr


@functools.lru_cache(maxsize=256)
def wide_codes(fmt: BlockFormat, layout: str) -> WideCodes | None:
    """How to decode four words at a time, or None where some do not lie side by side, aligned."""
    steps = memory_steps(fmt, named_layout(layout))
    if steps.codes is None or fmt.group % (4 * _WORDS):
        return None
    j = word_var(fmt)
    found: dict[Expr, Expr] = {}
    shared: list[int] = []
    for node in walk(steps.codes):
        if node.op != "fetch" or not depends_on(node, j):
            continue
        storage, _ = node.attr
        places = [p for p in steps.places if depends_on(node, p.at)]
        if storage.nbytes != 4 or len(places) != 1 or divisor(places[0].start) % 16:
            return None
        groups = _shared(fmt, substitute(node.args[0], {places[0].at: const(0, U32)}))
        if groups is None:
            return None
        shared.append(groups)
        found[node] = var(f"wide{len(found)}[r][j]", 1 << 32, U32)
    if not found:
        return None
    codes = transform(steps.codes, found.get)
    return WideCodes(tuple(node.args[0] for node in found), tuple(shared), codes)


def _shared(fmt: BlockFormat, address: Expr) -> int | None:
    """`WideCodes.shared` of an address, or None where words do not follow each other from each
    multiple of 16 on; found by trying all."""
    g, j = (a.ravel() for a in np.mgrid[: fmt.groups, : fmt.group // 4])
    at = evaluate(address, {"g": g, "j": j}).reshape(fmt.groups, -1, _WORDS).astype(np.int64)
    if (at[..., 0] % 16).any() or (np.diff(at) != 4).any():
        return None
    for count in (8, 4, 2):
        if fmt.groups % count == 0:
            runs = at.reshape(fmt.groups // count, count, -1)
            if (runs == runs[:, :1]).all():
                return count
    return 1

"""Conformance vectors: blocks of a format with all that a decoder of them may compute on the way.

Blocks are random bytes and edges: every byte alike, every float field at its ends (zero, one, the
largest, subnormal numbers, both signs), every bit set alone.  Floats that are not finite are left
out, as formats do not say what then.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kernelgen.errors import FileError
from kernelgen.ir.block import BlockFormat
from kernelgen.ir.encode import CODE, bit_positions, code_table, is_shuffled, overwrite, put_half
from kernelgen.ir.evaluate import evaluate
from kernelgen.ir.expr import Field, var

Array = npt.NDArray[Any]

#: random blocks; of them the first this many are in the JSON file too
RANDOM, _SPELT = 64, 4
#: zero, one, largest, smallest normal, largest and smallest subnormal
_F16 = np.array([0x0000, 0x3C00, 0x7BFF, 0x0400, 0x03FF, 0x0001], np.uint16)
_F32 = np.array([0, 0x3F800000, 0x7F7FFFFF, 0x00800000, 0x007FFFFF, 1], np.uint32)
_ENDS: dict[str, Array] = {
    "f16": np.concatenate([_F16, _F16 | 0x8000]).view("<f2"),
    "f32": np.concatenate([_F32, _F32 | 0x80000000]).view("<f4"),
}


def vectors(fmt: BlockFormat) -> dict[str, Array]:
    """Arrays by name, for n blocks:

    blocks   uint8 (n, nbytes): the bytes
    case     text (n,): "random", "byte 0x..", "bit ...", or a field and the number it holds
    codes    int32 (n, block), before the bias is subtracted; not of formats that store floats
    scales   float32 (n, groups); likewise offsets, where the format has these
    values   float32 (n, block): scale * (code - bias) + offset, exact to the bit
    """
    cases = list(_cases(fmt))
    blocks = np.concatenate([made for _, made in cases])
    names = np.array([name for name, made in cases for _ in made])
    values = fmt.decode(blocks)
    finite = np.isfinite(values).all(axis=1)
    blocks, names, values = blocks[finite], names[finite], values[finite]
    found = {"blocks": blocks, "case": names}
    if not fmt.float_codes:
        code = fmt.code_expr(var("i", fmt.block))
        found["codes"] = _of_all(fmt, code, "i", fmt.block, blocks).astype(np.int32)
        g = var("g", fmt.groups)
        if fmt.scale is not None:
            found["scales"] = _of_all(fmt, fmt.scale_expr(g), "g", fmt.groups, blocks)
        if fmt.offset is not None:
            found["offsets"] = _of_all(fmt, fmt.offset_expr(g), "g", fmt.groups, blocks)
    return found | {"values": values}


def _of_all(fmt: BlockFormat, expr: Any, index: str, count: int, blocks: Array) -> Array:
    found = evaluate(expr, {index: np.arange(count)}, fmt.split(blocks))
    return np.ascontiguousarray(np.broadcast_to(found, (len(blocks), count)))


def _cases(fmt: BlockFormat) -> list[tuple[str, Array]]:
    rng = np.random.default_rng(0)
    random = _tame(fmt, rng.integers(0, 256, (RANDOM, fmt.nbytes), np.uint8), rng)
    _give_numbers(fmt, random, rng)
    found = [("random", random)]
    for byte in (0x00, 0xFF, 0x80, 0x7F, 0x55, 0xAA):
        alike = np.full((1, fmt.nbytes), byte, np.uint8)
        found.append((f"byte 0x{byte:02X}", _tame(fmt, alike, rng)))
    single = np.zeros((8 * fmt.nbytes, fmt.nbytes), np.uint8)
    bits = np.arange(len(single))
    single[bits, bits // 8] = 1 << (bits % 8)
    single = _tame(fmt, single, rng, only=1.0)
    found += [(f"bit {n}", single[n : n + 1]) for n in bits if single[n].any()]
    for one in _floats(fmt):
        for end in _ENDS[one.storage.name]:
            blocks = random[:1].copy()
            fields = fmt.split(blocks)
            fields[one.name] = np.full((1, one.count), end)
            found.append((f"{one.name} = {end:g}", fmt.join(fields)))
    for name in fmt.halves:
        for end in _ENDS["f16"]:
            blocks = random[:1].copy()
            put_half(fmt, blocks, name, np.array([end]))
            found.append((f"{name} = {end:g}", blocks))
    return found


def _floats(fmt: BlockFormat) -> list[Field]:
    return [f for f in fmt.layout_fields if f.storage.name in _ENDS]


def _tame(
    fmt: BlockFormat, blocks: Array, rng: np.random.Generator, only: float | None = None
) -> Array:
    """Blocks whose floats are between -1 and 1, or `only` one number."""
    fields, count = fmt.split(blocks), len(blocks)
    for one in _floats(fmt):
        chosen = rng.uniform(-1, 1, (count, one.count))
        fields[one.name] = chosen if only is None else np.full_like(chosen, only)
    made = fmt.join(fields)
    for name in fmt.halves:
        put_half(fmt, made, name, rng.uniform(-1, 1, count) if only is None else np.ones(count))
    return made


def _give_numbers(fmt: BlockFormat, blocks: Array, rng: np.random.Generator) -> None:
    """Where codes are floats some of which are infinite or no number, write random other ones into
    the blocks: of long blocks hardly one would be without."""
    values = code_table(fmt) if fmt.float_codes else None
    if values is None or np.isfinite(values).all() or not is_shuffled(fmt):
        return
    usable = np.flatnonzero(np.isfinite(values))
    chosen = rng.choice(usable, (len(blocks), fmt.block))
    overwrite(blocks, chosen, bit_positions(fmt)[CODE])


def write(fmt: BlockFormat, out: Path) -> list[Path]:
    """Write `<format>.npz` with all vectors, and `<format>.json` with a few of each kind, into a
    folder; returns the files.

    In JSON, bytes are hexadecimal digits, and floats are the digits of their 32 bits.
    """
    found = vectors(fmt)
    some = [
        *range(_SPELT),
        *(n for n in range(RANDOM, len(found["case"])) if not found["case"][n].startswith("bit ")),
    ]
    about = {
        "format": fmt.name, "block": fmt.block, "group": fmt.group, "nbytes": fmt.nbytes,
        "bias": fmt.bias, "fields": dict(fmt.fields), "source": " ".join(fmt.source.split()),
        "vectors": [_spelt(found, n) for n in some],
    }  # fmt: skip
    paths = [out / f"{fmt.name}.npz", out / f"{fmt.name}.json"]
    try:
        out.mkdir(parents=True, exist_ok=True)
        for path in paths:
            partial = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
            if path.suffix == ".npz":
                np.savez_compressed(partial, **found)  # type: ignore[arg-type]
            else:
                partial.write_text(json.dumps(about, indent=1) + "\n", "utf-8", newline="\n")
            partial.replace(path)
    except OSError as error:
        raise FileError(
            f"vectors could not be written to {out}: {error.strerror}; choose another folder with"
            " --out"
        ) from error
    return paths


def _spelt(found: dict[str, Array], n: int) -> dict[str, Any]:
    """One vector as JSON has it."""
    spelt: dict[str, Any] = {}
    for name, array in found.items():
        row = array[n]
        if name == "case":
            spelt[name] = str(row)
        elif row.dtype == np.uint8:
            spelt[name] = row.tobytes().hex()
        elif row.dtype == np.float32:
            spelt[name] = [f"{bits:08x}" for bits in row.view(np.uint32)]
        else:
            spelt[name] = row.tolist()
    return spelt

"""Kernels as files: what `kernelgen build` writes, and checks."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from kernelgen.errors import FileError
from kernelgen.generate import generate_walk, render_index
from kernelgen.ir.block import BlockFormat
from kernelgen.ir.expr import show
from kernelgen.ir.layout import PLANES, ROWS8, unit_bytes
from kernelgen.ir.ops import library
from kernelgen.ir.ops.attention import Attention, causal, trace
from kernelgen.ir.ops.maps import Map
from kernelgen.ir.ops.rows import Rows
from kernelgen.ir.ops.tensors import brief
from kernelgen.problem import tolerance
from kernelgen.targets.base import OPS, Kernel, Target
from kernelgen.targets.codebook import codebook_of
from kernelgen.targets.maps import written


def kernels(
    target: Target, formats: Iterable[BlockFormat], ops: Iterable[str] = OPS
) -> Iterator[Kernel]:
    """The kernels of a target in their default configurations, for these formats and ops, and
    those that must run before them."""
    wanted = tuple(ops)
    for fmt in formats:
        made: dict[str, Kernel] = {}
        for walk in target.walks:
            if walk.op not in wanted or walk.accepts(fmt) is not None:
                continue  # not every format has every walk; `kernelgen list` says why
            one = generate_walk(walk, fmt, target)
            made |= {each.entry: each for each in (one, *one.needs.values())}
        yield from sorted(made.values(), key=lambda kernel: OPS.index(kernel.op))
        if "attention" in wanted:
            for kind in attention_kinds(fmt):
                for walk in target.walks:
                    if walk.op == "attention" and walk.accepts(kind) is None:
                        one = generate_walk(walk, kind, target)
                        yield from (one, *one.needs.values(), *one.then.values())


def all_kernels(
    target: Target, formats: Iterable[BlockFormat], ops: Iterable[str] = OPS
) -> Iterator[Kernel]:
    """`kernels`, and those of the maps and row reductions of the library, which know no format."""
    wanted = tuple(ops)
    yield from kernels(target, formats, wanted)
    for walk in target.walks:
        for kind in library.kinds(walk.op) if walk.op in wanted else ():
            if walk.accepts(kind) is None:
                yield generate_walk(walk, kind, target)


#: formats of keys and values for which attention is built, and elements of heads
_CACHES, _HEAD_DIMS = ("f16", "q8_0"), (64, 128)


def attention_kinds(fmt: BlockFormat) -> tuple[Attention, ...]:
    """Kinds of attention that are built without being asked for: causal, in formats of caches."""
    if fmt.name not in _CACHES:
        return ()
    _, mask = trace(None, causal)
    return tuple(Attention(d, fmt, fmt, mask=mask, label="causal") for d in _HEAD_DIMS)


def file_name(kernel: Kernel, target: Target) -> str:
    """Name of a kernel's source file."""
    return kernel.name + target.suffix


def contents(target: Target, made: list[Kernel]) -> dict[str, str]:
    """Every file of a build by name, text as it is written."""
    folder = files(f"kernelgen.targets.{target.name}")
    result = {name: (folder / name).read_text("utf-8") for name in target.support_files}
    result |= {file_name(k, target): k.source for k in made}
    result |= {name: render_index(template, target, made) for template, name in target.indexes}
    result["manifest.json"] = _manifest(target, made)
    return result


def _manifest(target: Target, made: list[Kernel]) -> str:
    return manifest_of(target, [entry_of(k, target) for k in made])


def manifest_of(target: Target, entries: Iterable[Mapping[str, Any]]) -> str:
    """The text of a manifest."""
    data = {"target": target.name, "kernels": list(entries)}
    return json.dumps(data, indent=1, sort_keys=True) + "\n"


def entry_of(kernel: Kernel, target: Target, file: str = "") -> dict[str, Any]:
    """What a host needs to launch a kernel, as plain data; `file`: where it is, if not where
    `build` puts it."""
    return {
        "op": kernel.op, **_subject(kernel), "precision": kernel.precision,
        "walk": kernel.walk.name, "config": kernel.config.as_dict(), "hash": kernel.hash,
        "file": file or file_name(kernel, target), "entry": kernel.entry,
        "arguments": [dataclasses.asdict(a) for a in kernel.arguments],
        **_tables(kernel), "symbols": dict(kernel.walk.symbols), "launch": _launch(kernel),
        "features": _features(kernel, target),
        "planes": _planes(kernel), "rows8": _rows8(kernel),
        "needs": {op: k.entry for op, k in kernel.needs.items()},
        "then": {op: k.entry for op, k in kernel.then.items()},
        "tolerance": tolerance(kernel.op, kernel.precision), "notes": list(kernel.notes),
    }  # fmt: skip


def _subject(kernel: Kernel) -> dict[str, Any]:
    """What the kernel is specialized for."""
    kind = kernel.subject
    if isinstance(kind, Attention):
        return {
            "attention": kind.name, "head_dim": kind.head_dim, "value_dim": kind.value_dim,
            "k": kind.k.name, "v": kind.v.name, "scale": kind.scale,
            "score": None if kind.score is None else show(kind.score),
            "mask": None if kind.mask is None else show(kind.mask),
        }  # fmt: skip
    if isinstance(kind, Map | Rows):
        return {
            kernel.op: kind.name, "label": kind.label,
            "inputs": {i.name: {"type": i.dtype, "strides": i.strides} for i in kind.inputs},
            "outputs": {o.name: {"type": o.dtype, "value": brief(o.value)} for o in written(kind)},
        }  # fmt: skip
    fmt = kernel.format
    return {
        "format": fmt.name, "block": fmt.block, "group": fmt.group, "block_bytes": fmt.nbytes,
    }  # fmt: skip


def _tables(kernel: Kernel) -> dict[str, Any]:
    """The numbers of arguments that are tables, by name."""
    names = [a.name for a in kernel.arguments if a.role == "table"]
    words = list(codebook_of(kernel.subject) or ())
    return {"tables": dict.fromkeys(names, words)} if names else {}


def _features(kernel: Kernel, target: Target) -> list[str]:
    """What a host must look for on the device, in the words of the target's API."""
    names = (target.feature_names.get(one, one) for one in kernel.features)
    return [name for name in names if name]


def _planes(kernel: Kernel) -> list[dict[str, Any]] | None:
    """How to repack weights of N rows for a kernel that wants each field of all blocks together.

    For `count` = N * K / block: bytes offset..offset+bytes of block i become those at
    start * count + i * bytes.
    """
    if kernel.config.as_dict().get("layout") != PLANES.name:
        return None
    return [
        {"field": f.name, "offset": f.offset, "bytes": f.nbytes,
         "start": PLANES.field_start(kernel.format, f)}
        for f in kernel.format.layout_fields
    ]  # fmt: skip


def _rows8(kernel: Kernel) -> list[dict[str, Any]] | None:
    """How to repack weights for a kernel that wants eight rows side by side.

    Rows are filled up with zero bytes to a multiple of eight.  A field is `units` pieces of `unit`
    bytes; piece u of block b of row r, in rows of B blocks of `block_bytes`, goes to
    (r // 8 * B + b) * 8 * block_bytes + 8 * offset + (8 * u + r % 8) * unit.
    """
    if kernel.config.as_dict().get("layout") != ROWS8.name:
        return None
    return [
        {"field": f.name, "offset": f.offset, "unit": unit_bytes(f),
         "units": f.nbytes // unit_bytes(f)}
        for f in kernel.format.layout_fields
    ]  # fmt: skip


def _launch(kernel: Kernel) -> dict[str, Any] | None:
    launch = kernel.walk.launch(kernel.config, kernel.subject)
    return None if launch is None else dataclasses.asdict(launch)


def build(
    target: Target,
    out: Path,
    formats: Iterable[BlockFormat],
    ops: Iterable[str] = OPS,
    *,
    check: bool = False,
) -> list[Path]:
    """Write the kernels of a target into `out`/<target name>, and return the files that changed.

    With `check` nothing is written: what is returned is missing, stale, or should not be there.
    """
    folder = out / target.name
    wanted = contents(target, list(all_kernels(target, formats, ops)))
    changed = [folder / name for name, text in wanted.items() if _read(folder / name) != text]
    if check:
        present = {p.name for p in folder.iterdir()} if folder.is_dir() else set()
        return sorted(changed + [folder / name for name in present - set(wanted)])
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path in changed:
            partial = path.with_name(f".{path.name}.{os.getpid()}")
            partial.write_text(wanted[path.name], "utf-8", newline="\n")
            partial.replace(path)
    except OSError as error:
        raise FileError(
            f"kernels could not be written to {folder}: {error.strerror};"
            " choose another folder with --out"
        ) from error
    return sorted(changed)


def _read(path: Path) -> str | None:
    try:
        return path.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError):
        return None

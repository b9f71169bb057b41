"""From codes, scales and zero points in arrays of their own to the blocks of a format."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from kernelgen.checkpoints.planes import Array, Plane
from kernelgen.ir import formats
from kernelgen.ir.block import BlockFormat
from kernelgen.ir.encode import encode
from kernelgen.ir.formats.families import group_of
from kernelgen.tensor import QuantTensor

#: elements that are unpacked at once
_CHUNK = 1 << 18

Codes = Callable[[slice], Array]


@dataclass(frozen=True)
class Groups:
    """What the blocks of a matrix (N, K) are made of.

    codes    rows a:b -> what is stored for each element, integers (b - a, K)
    fields   the other fields of a block by name, (N, K // block)
    columns  see QuantTensor
    """

    format: BlockFormat
    codes: Codes
    fields: Mapping[str, Array]
    columns: Array | None = None

    def tensor(self, name: str, shape: tuple[int, ...]) -> QuantTensor:
        """The blocks."""
        fmt, k = self.format, shape[-1]
        rows = math.prod(shape[:-1])
        data = np.empty((rows, fmt.row_bytes(k)), np.uint8)
        step = max(32, _CHUNK // k // 32 * 32)  # a word has at most 32 rows

        def make(start: int) -> None:
            part = slice(start, min(start + step, rows))
            codes = self.codes(part).reshape(-1, fmt.block)
            fields = {one: a[part].reshape(len(codes), -1) for one, a in self.fields.items()}
            data[part] = encode(fmt, codes, {}, fields).reshape(data[part].shape)

        make(0)  # what is found out about the format is found out once
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            list(pool.map(make, range(step, rows, step)))
        return QuantTensor(fmt, shape, data, name, self.columns)


@dataclass(frozen=True)
class Stored:
    """A tensor of a checkpoint.

    uses    names of the planes that it is made of
    groups  reads scales and zero points, not codes; None where the plane itself is the data
    plain   the bytes of a float tensor, and the name of its format
    skipped  in what it is stored, as the end of "it is in ...", where that is not read
    """

    name: str
    shape: tuple[int, ...]
    uses: tuple[str, ...]
    groups: Callable[[], Groups] | None = None
    plain: tuple[str, Array] | None = field(default=None, repr=False)
    skipped: str | None = None

    def format(self) -> BlockFormat:
        """The format that it has as a QuantTensor."""
        if self.plain is not None:
            return formats.get(self.plain[0])
        assert self.groups is not None
        return self.groups().format

    def tensor(self) -> QuantTensor:
        """The tensor."""
        if self.plain is not None:
            return QuantTensor(self.plain[0], self.shape, self.plain[1], self.name)
        assert self.groups is not None
        return self.groups().tensor(self.name, self.shape)


def unpack(words: Array, bits: int, count: int) -> Array:
    """`count` integers of `bits` bits along the last axis of integers of any width, which are a
    stream of bits from the lowest bit of the first on: uint8 (..., count)."""
    raw = np.ascontiguousarray(words).view(np.uint8)
    if 8 % bits:
        ones = np.unpackbits(raw, axis=-1, bitorder="little", count=count * bits)
        ones = ones.reshape(*raw.shape[:-1], count, bits)
        return np.packbits(ones, axis=-1, bitorder="little")[..., 0]
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    parts = (raw[..., None] >> shifts) & ((1 << bits) - 1)
    return np.asarray(parts.reshape(*raw.shape[:-1], -1)[..., :count])


def integer_groups(
    bits: int, codes: Codes, scale: Array, zero: Array | None, run: int, plane: Plane
) -> Groups:
    """Groups of unsigned codes that stand for scale * (code - zero).

    scale, zero  (N, K // run), for `run` elements each; zero None or all 2**(bits - 1): symmetric;
                 a float zero makes HQQ's format
    plane        the tensor of the scales, for messages
    """
    kept = 8 if bits > 4 else 2 if bits < 2 else bits
    middle = 1 << (bits - 1)
    kind = "int"
    fields = {"d": scale}
    if zero is not None and zero.dtype.kind != "f" and int(zero.max()) > 255:
        zero = zero.astype(scale.dtype)  # 256, which a byte does not hold
    if zero is not None and zero.dtype.kind == "f":
        kind, fields["zero"] = "hqq", zero
    elif kept != bits or (zero is not None and bool((zero != middle).any())):
        given = zero if zero is not None else np.full(scale.shape, middle)
        kind, fields["zero"] = "uint", given.astype(np.uint8)
    halves = all(a.dtype == np.float16 for a in fields.values() if a.dtype.kind == "f")
    block = _block(run, plane)
    fmt = formats.get(f"{kind}{kept}_g{block}{'' if halves else '_f32'}")
    if kind == "int" and kept == 8:
        # with a sign: the middle is zero
        unsigned = codes
        return Groups(fmt, lambda rows: unsigned(rows) ^ 0x80, _repeat(fields, run // block))
    return Groups(fmt, codes, _repeat(fields, run // block))


def float_groups(kind: str, codes: Codes, scale: Array, run: int, plane: Plane) -> Groups:
    """Groups of floats, "nf4" or "fp8_e4m3", of which `codes` are the bits, times an f32 scale,
    (N, K // run)."""
    block = _block(run, plane)
    fmt = formats.get(f"{kind}_g{block}")
    return Groups(fmt, codes, _repeat({"d": scale.astype(np.float32)}, run // block))


def _block(run: int, plane: Plane) -> int:
    block = group_of(run)
    if not block:
        raise plane.error(
            f"{plane.shape} belongs to rows in which {run} elements share a scale, and kernelgen"
            " reads multiples of 8"
        )
    return block


def _repeat(fields: Mapping[str, Array], times: int) -> dict[str, Array]:
    return {name: np.repeat(a, times, axis=1) for name, a in fields.items()}


def along_rows(flat: Array, shape: tuple[int, int], run: int) -> tuple[Array, int]:
    """Numbers of which each belongs to `run` elements of a flat matrix (N, K), as (N, K // r) and
    r: how many elements of a row have one."""
    n, k = shape
    each = math.gcd(k, run)
    return flat.reshape(-1)[np.arange(n * k // each) * each // run].reshape(n, k // each), each


def by_index(index: Array) -> tuple[Array, int, Array | None]:
    """How columns lie when those of a group are brought together.

    index  (K,), the group of each column
    Returns the group of each run of columns, the length of runs, and the columns in their new
    order, or None where they are in it already.
    """
    order = np.argsort(index, kind="stable")
    counts = np.bincount(index)
    run = math.gcd(*counts[counts > 0].tolist())
    columns = None if np.array_equal(order, np.arange(len(index))) else order
    return index[order][::run], run, columns

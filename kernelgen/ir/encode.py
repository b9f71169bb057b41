"""The encoder of a format, derived from its decoder.

A code or group integer is a shuffle of bits: every bit of it is one bit of the block.  Setting
one bit of a block at a time and decoding tells which; writing codes is then the inverse shuffle.
Where codes share bits (ternary digits, grids), `kernelgen.ir.cells` finds out which codes belong
together, and tries all that their bits can say.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from kernelgen.errors import FormatError
from kernelgen.ir import cells
from kernelgen.ir.block import BlockFormat
from kernelgen.ir.cells import Bits
from kernelgen.ir.evaluate import NUMPY_STORAGE, evaluate
from kernelgen.ir.expr import F32, I32, Expr, const, substitute, var, walk
from kernelgen.ir.ranges import fits, interval

Array = npt.NDArray[Any]

CODE = "code"


def code_index(fmt: BlockFormat, i: Expr) -> Expr:
    """What is stored for element i: the code, its index in the format's table, or the byte or less
    that a float is made of."""
    code = fmt.code_expr(i)
    if code.op == "table":
        return code.args[0]
    byte = _byte_of(code) if code.dtype is F32 else None
    return code if byte is None else byte


def code_table(fmt: BlockFormat) -> tuple[Any, ...] | None:
    """The codes by stored index, where they are in a table, or are floats of a byte or less."""
    code = fmt.code_expr(var("i", fmt.block))
    if code.op == "table":
        return tuple(code.attr)
    byte = _byte_of(code) if code.dtype is F32 else None
    if byte is None:
        return None
    count = interval(byte)[1] + 1
    values = evaluate(substitute(code, {byte: var("byte", count)}), {"byte": np.arange(count)})
    return tuple(values.tolist())


def _byte_of(code: Expr) -> Expr | None:
    """The integer, 0..255 at most, through which alone a float depends on its block."""
    for node in reversed(list(walk(code))):
        if node.dtype is I32 and node.op != "const" and fits(node, 0, 255):
            rest = substitute(code, {node: const(0, I32)})
            if not any(one.op in ("load", "var") for one in walk(rest)):
                return node
    return None


def bit_positions(fmt: BlockFormat) -> Mapping[str, Bits]:
    """`Bits` of the stored codes (key "code"), and all of `group_bits`."""
    return _bits_of(fmt, (CODE, *fmt.ints, *fmt.halves))


def group_bits(fmt: BlockFormat) -> Mapping[str, Bits]:
    """`Bits` of each of the format's group integers and `halves`."""
    return _bits_of(fmt, (*fmt.ints, *fmt.halves))


@functools.lru_cache(maxsize=256)
def is_shuffled(fmt: BlockFormat) -> bool:
    """Whether every bit of a code is one bit of the block; else codes come in cells."""
    _quantity(fmt, CODE)  # floats are neither
    try:
        bit_positions(fmt)
    except FormatError:
        return False
    return True


def _quantity(fmt: BlockFormat, name: str) -> tuple[Expr, str, int]:
    """What is stored under a name, its index, and how many there are."""
    if name == CODE:
        code = code_index(fmt, var("i", fmt.block))
        if code.dtype is F32:
            raise _not_invertible(fmt, "its elements are floats")
        return code, "i", fmt.block
    if name in fmt.halves:
        return fmt.halves[name](fmt.view), "g", 1
    return fmt.int_expr(name, var("g", fmt.groups)), "g", fmt.groups


@functools.lru_cache(maxsize=512)
def _bits_of(fmt: BlockFormat, names: tuple[str, ...]) -> Mapping[str, Bits]:
    quantities = {name: _quantity(fmt, name) for name in names}
    if not quantities:
        return {}
    owned = [f for f in fmt.layout_fields if f.storage.dtype.is_int and f.name not in fmt.derived]
    bits = np.concatenate([8 * f.offset + np.arange(8 * f.nbytes) for f in owned])
    # block 0 is all zero, block 1 + n has only the n-th bit set
    probes = np.zeros((1 + len(bits), fmt.nbytes), np.uint8)
    probes[1 + np.arange(len(bits)), bits // 8] = 1 << (bits % 8)
    fields = fmt.split(probes)

    result: dict[str, Bits] = {}
    taken: set[int] = set()
    for name, (expr, index, count) in quantities.items():
        found = evaluate(expr, {index: np.arange(count)}, fields).astype(np.int64)
        seen = np.broadcast_to(found, (len(probes), count))
        changed = (seen[1:] ^ seen[:1]) & 0xFFFFFFFF  # (bit, element)
        if seen[0].any():
            raise _not_invertible(fmt, f"{name} is not 0 in a block of zeros")
        positions = []
        for element in range(count):
            sources = np.flatnonzero(changed[:, element])
            masks = changed[sources, element]
            # the sign bit of a signed element fills all bits above it
            lowest = masks & -masks
            order = np.argsort(lowest)
            bits_in_turn = np.array_equal(lowest[order], 1 << np.arange(len(sources)))
            if len(sources) == 0 or not bits_in_turn:
                raise _not_invertible(fmt, f"bits of {name}[{element}] are not bits of the block")
            positions.append(bits[sources[order]])
        if len({len(p) for p in positions}) != 1:
            raise _not_invertible(fmt, f"elements of {name} differ in width")
        result[name] = Bits(np.array(positions))
        own = result[name].position.ravel().tolist()
        if len(set(own)) != len(own) or taken & set(own):
            raise _not_invertible(fmt, f"{name} shares bits with another value")
        taken |= set(own)
        if not _is_shuffle(fmt, result[name], expr, index):
            raise _not_invertible(fmt, f"bits of {name} are not bits of the block")
    return result


def _is_shuffle(fmt: BlockFormat, where: Bits, expr: Expr, index: str) -> bool:
    """Whether the bits found one at a time are the quantity in blocks with many bits set, too."""
    blocks = np.random.default_rng(0).integers(0, 256, (32, fmt.nbytes), np.uint8)
    stored = np.unpackbits(blocks, axis=-1, bitorder="little")[:, where.position]
    weights = 1 << np.arange(where.width, dtype=np.int64)
    seen = evaluate(expr, {index: np.arange(len(where.position))}, fmt.split(blocks))
    return np.array_equal(stored @ weights, seen & ((1 << where.width) - 1))


def _not_invertible(fmt: BlockFormat, why: str) -> FormatError:
    return FormatError(
        f"format {fmt.name} cannot be encoded from its description, because {why};"
        " it can be decoded and multiplied, but needs an encoder of its own"
    )


def encode(
    fmt: BlockFormat, codes: Array, ints: Mapping[str, Array], fields: Mapping[str, Array]
) -> Array:
    """Blocks, uint8 (..., nbytes), from what is stored in them.

    codes    integers (..., block): codes, or table indices for a codebook format; where codes come
             in cells, such that cells have
    ints     group integers by name, (..., groups)
    fields   every other field by name, (..., count), in values of its stored type
    """
    shape = codes.shape[:-1]
    flat = np.zeros((int(np.prod(shape)), fmt.nbytes), np.uint8)
    given = {f.name: f for f in fmt.layout_fields if f.name in fields}
    for name, one in given.items():
        values = np.asarray(fields[name]).reshape(len(flat), one.count)
        flat[:, one.offset : one.offset + one.nbytes] = np.ascontiguousarray(
            values.astype(NUMPY_STORAGE[one.storage.name])
        ).view(np.uint8)
    shuffled = is_shuffled(fmt)
    for name, where in (bit_positions(fmt) if shuffled else group_bits(fmt)).items():
        values = np.asarray(codes) if name == CODE else _given(name, ints, fields)
        scatter(flat, values.reshape(len(flat), len(where.position)), where)
    if not shuffled:
        for part in cells.parts_of(fmt):
            for numbers, where in part.stored(np.asarray(codes).reshape(len(flat), fmt.block)):
                if (numbers < 0).any():
                    raise FormatError(
                        f"codes that {fmt.name} cannot say were to be encoded: some of its codes"
                        " share bits, and what one can be depends on others"
                    )
                scatter(flat, numbers, where)
    for name, derived in fmt.derived.items():
        _fill_derived(fmt, flat, name, derived.chunk)
    return flat.reshape(*shape, fmt.nbytes)


def put_half(fmt: BlockFormat, blocks: Array, name: str, values: Array) -> None:
    """Write one of the format's `halves` into blocks, uint8 (n, nbytes): f16 values (n,)."""
    overwrite(blocks, values.astype("<f2").view("<u2")[:, None], group_bits(fmt)[name])


def overwrite(blocks: Array, values: Array, where: Bits) -> None:
    """Put values (n, elements) where others may be in blocks, uint8 (n, nbytes)."""
    for at in where.position.ravel():
        blocks[:, at // 8] &= np.uint8(255 - (1 << (at % 8)))
    scatter(blocks, values, where)


def _given(name: str, ints: Mapping[str, Array], fields: Mapping[str, Array]) -> Array:
    """Integers of groups, or the bits of a float."""
    if name in ints:
        return np.asarray(ints[name])
    return np.asarray(fields[name]).astype("<f2").view("<u2")


def scatter(flat: Array, values: Array, where: Bits) -> None:
    """Or the bits of `values` into the bytes of `flat`, many elements at a time.

    Bits of one element that move equally far go together, and so do elements whose bits do.
    """
    moves: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for element, positions in enumerate(where.position.tolist()):
        masks: dict[tuple[int, int], int] = {}
        for bit, position in enumerate(positions):
            at = (position % 8 - bit, position // 8)
            masks[at] = masks.get(at, 0) | 1 << bit
        for (shift, byte), mask in masks.items():
            moves.setdefault((shift, mask), []).append((element, byte))
    unsigned = values.astype(np.uint8 if where.width <= 8 else np.uint32)
    for (shift, mask), pairs in moves.items():
        # two elements cannot put the same bits into one byte: positions are unique
        elements, bytes_ = (_run(np.array(side)) for side in zip(*pairs, strict=True))
        bits = np.bitwise_and(unsigned[:, elements], mask)
        bits = bits << shift if shift >= 0 else bits >> -shift
        flat[:, bytes_] |= bits.astype(np.uint8, copy=False)


def _run(places: Array) -> slice | Array:
    """Places that follow one another as a slice, which numpy copies faster."""
    start, count = int(places[0]), len(places)
    return slice(start, start + count) if (np.diff(places) == 1).all() else places


def _fill_derived(fmt: BlockFormat, flat: Array, name: str, chunk: int) -> None:
    one = next(f for f in fmt.layout_fields if f.name == name)
    fields = fmt.split(flat)
    codes = evaluate(fmt.code_expr(var("i", fmt.block)), {"i": np.arange(fmt.block)}, fields)
    sums = codes.reshape(len(flat), fmt.block // chunk, chunk).sum(axis=-1)
    total = var("total", 1 << 31)
    value = fmt.derived[name].value(fmt.view, total - (1 << 30))
    columns = [
        evaluate(value, {"total": sums[:, j : j + 1] + (1 << 30)}, fields) for j in range(one.count)
    ]
    stored = np.concatenate([np.broadcast_to(c, (len(flat), 1)) for c in columns], axis=1)
    dtype = np.dtype(NUMPY_STORAGE[one.storage.name])
    with np.errstate(over="ignore"):  # a sum beyond what f16 holds is infinite, as ggml has it
        stored = stored.astype(dtype)
    flat[:, one.offset : one.offset + one.nbytes] = np.ascontiguousarray(stored).view(np.uint8)

"""Walks of CUDA alone: products on tensor cores (templates/cuda)."""

from __future__ import annotations

import dataclasses
import functools
import math
import struct
from dataclasses import dataclass

from kernelgen.config import (
    BulkTileConfig,
    Capabilities,
    Config,
    FragmentRowsConfig,
    FragmentTileConfig,
    ThreadsConfig,
    WarpMatvecConfig,
)
from kernelgen.ir.block import BlockFormat
from kernelgen.ir.layout import named_layout
from kernelgen.ir.steps import MemorySteps, code_word, memory_steps
from kernelgen.targets import simt
from kernelgen.targets.base import Argument, Launch, Walk, integer_codes

#: elements to a multiple of which rows of halves are filled up: the deepest stage
PAD = 128

#: rows to a multiple of which activations are filled up for the copy engine: the highest tile
PAD_M = 256

#: shared memory that a launch may ask for where the copy engine is
_HOPPER_BYTES = 232448

#: bytes of an element of activations
_X_BYTES = {"fp16": 2, "bf16": 2, "int8": 1}


@dataclass(frozen=True)
class FragmentShape:
    """Sizes that follow from a configuration and a format.

    steps         of DEPTH elements along K in a slab
    slab_blocks   blocks of a row in a slab
    slabs         in shared memory
    tile_bytes    of eight rows of a slab, copied in pieces of `piece` bytes
    x_bytes       of a row of activations in a stage
    x_blocks, x_groups   blocks and groups of activations in a stage, at least 1
    slab_groups   groups of a row in a slab
    staged        whether scales are decoded once a slab, into `scale_floats` floats a group
    chunk         elements that an integer product takes before it is scaled
    xd_start, shared_bytes   where the scales of activations begin in shared memory, and its size
    pad, pad_m    see PAD, PAD_M
    """

    steps: int
    slab_blocks: int
    slabs: int
    tile_bytes: int
    piece: int
    x_bytes: int
    x_blocks: int
    x_groups: int
    slab_groups: int
    staged: bool
    scale_floats: int
    chunk: int
    xd_start: int
    shared_bytes: int
    pad: int = PAD
    pad_m: int = PAD_M


@functools.lru_cache(maxsize=4096)
def shape(
    config: FragmentTileConfig | BulkTileConfig, fmt: BlockFormat, precision: str
) -> FragmentShape:
    """The sizes of a kernel."""
    depth, stages = config.depth, config.stages
    slab_blocks = max(1, depth // fmt.block)
    steps = max(1, fmt.block // depth)
    slabs = -(-(stages - 1) // steps) + 1
    tile_bytes = 8 * fmt.nbytes * slab_blocks
    groups = 0 if fmt.float_codes else fmt.block // fmt.group
    staged = groups > 1
    offset = _steps(fmt, config).offset is not None
    x_bytes = depth * _X_BYTES[precision]
    x_blocks = max(1, depth // fmt.block)
    x_groups = max(1, depth // fmt.group) if groups else 1
    slab_groups, scale_floats = groups * slab_blocks, 2 if offset else 1
    xd_start = stages * config.tile_m * x_bytes + slabs * config.tile_n // 8 * tile_bytes
    xd_start += staged * config.tile_n * slab_groups * scale_floats * 4
    xd_start = -(-xd_start // 16) * 16
    extra = 0
    if precision == "int8":
        extra = 4 * stages * config.tile_m * (x_blocks + offset * x_groups)
    return FragmentShape(
        steps, slab_blocks, slabs, tile_bytes, math.gcd(8 * fmt.nbytes, 16), x_bytes, x_blocks,
        x_groups, slab_groups, staged, scale_floats, min(fmt.group, 64), xd_start,
        xd_start + extra,
    )  # fmt: skip


def _steps(fmt: BlockFormat, config: Config) -> MemorySteps:
    return memory_steps(fmt, named_layout("rows8"))


def _applies(fmt: BlockFormat) -> str | None:
    """Fragments take 16 elements along K of one group, and stages whole blocks or parts of one."""
    if fmt.float_codes and fmt.block == 1:
        return None
    if fmt.block & (fmt.block - 1) or fmt.group % 16:
        return (
            f"blocks of {fmt.block} in groups of {fmt.group} do not divide into the 16 elements"
            " along K that matrix units take"
        )
    return None


def _applies_to_bytes(fmt: BlockFormat) -> str | None:
    return integer_codes(fmt) or _applies(fmt)


def _fits(precision: str, config: Config, fmt: BlockFormat, caps: Capabilities) -> str | None:
    assert isinstance(config, FragmentTileConfig)
    needed, most = shape(config, fmt, precision).shared_bytes, caps.launch_bytes
    if needed > most:
        return f"{needed} bytes of shared memory; a launch may ask for {most}"
    return None


def _launch(precision: str, config: Config, fmt: BlockFormat) -> Launch:
    assert isinstance(config, FragmentTileConfig)
    tiles = f"-(-N // {config.tile_n}) * -(-M // {config.tile_m})"
    workers = str(config.workers) if config.workers else f"{tiles} * {config.split}"
    shares = config.workers > 0 or config.split > 1
    sums = config.tile_n * config.tile_m
    symbols = {"TILES": tiles, "PARTIAL": f"2 * {workers} * {sums}" if shares else "1"}
    return Launch(
        (workers, "1"), config.threads, shape(config, fmt, precision).shared_bytes, symbols
    )


def _matmul(op: str, precision: str) -> Walk:
    x = simt.QUANTIZED if precision == "int8" else (Argument("xh", "in", "u32", ("M", "HALVES")),)
    first = "quantize" if precision == "int8" else "cast"
    return Walk(
        name=f"{op}_{precision}_mma",
        op=op,
        precision=precision,
        template="matmul_bytes.j2" if precision == "int8" else "matmul_half.j2",
        config=FragmentRowsConfig if op == "matvec" else FragmentTileConfig,
        arguments=(
            simt.WEIGHTS,
            *x,
            Argument("y", "out", "f32", ("M", "N")),
            Argument("partial", "scratch", "f32", ("PARTIAL",)),
            Argument("counters", "zero", "u32", ("TILES",)),
            *simt.sizes("M", "N", "K"),
        ),
        symbols={**simt.SYMBOLS, "HALVES": f"-(-K // {PAD}) * {PAD // 2}"},
        features=("mma",),
        applies=_applies_to_bytes if precision == "int8" else _applies,
        steps=_steps,
        launch=functools.partial(_launch, precision),
        needs=lambda config: (first,),
        style="mma",
        fits=functools.partial(_fits, precision),
        apart=8,
    )


def _cast_launch(config: Config, fmt: BlockFormat) -> Launch:
    assert isinstance(config, ThreadsConfig)
    words = f"M * (-(-K // {PAD}) * {PAD // 2})"
    return Launch(
        (f"min(-(-{words} // {config.threads}), {simt.MOST_GROUPS})", "1"), config.threads
    )


def _cast(precision: str) -> Walk:
    return Walk(
        name=f"cast_{precision}",
        op="cast",
        precision=precision,
        template="cast.j2",
        config=ThreadsConfig,
        arguments=(
            Argument("x", "in", "f32", ("M", "K")),
            Argument("xh", "out", "u32", ("M", "HALVES")),
            *simt.sizes("M", "K"),
        ),
        symbols={"HALVES": f"-(-K // {PAD}) * {PAD // 2}"},
        features=("mma",),
        contract=False,
        steps=_steps,
        launch=_cast_launch,
        style="mma",
        norms=True,
    )


# ---- few rows of activations --------------------------------------------------------------------


def _in_words(fmt: BlockFormat) -> str | None:
    """Lanes take four words of a group at once."""
    if fmt.float_codes:
        return integer_codes(fmt)
    if fmt.group % 16:
        return f"groups of {fmt.group} elements do not divide into the 16 that are loaded at once"
    if fmt.group > 128:
        return f"groups of {fmt.group} elements are more words than registers hold"
    return None


def _warps_launch(config: Config, fmt: BlockFormat) -> Launch:
    assert isinstance(config, WarpMatvecConfig)
    rows = config.rows * (config.threads // 32)
    groups = f"min(-(-N // {rows}), {simt.MOST_GROUPS})"
    return Launch((groups, f"-(-M // {config.columns})"), config.threads)


def _plain_steps(fmt: BlockFormat, config: Config) -> MemorySteps:
    assert isinstance(config, WarpMatvecConfig)
    return memory_steps(fmt, named_layout(config.layout))


def _warps(precision: str) -> Walk:
    int8 = precision == "int8"
    x = simt.QUANTIZED if int8 else (Argument("x", "in", "f32", ("M", "K")),)
    style = "warp" if int8 else "half2"
    return Walk(
        name=f"matvec_{precision}_{style}",
        op="matvec",
        precision=precision,
        template="matvec_bytes.j2" if int8 else "matvec_half.j2",
        config=WarpMatvecConfig,
        arguments=(
            simt.WEIGHTS, *x, Argument("y", "out", "f32", ("M", "N")), *simt.sizes("M", "N", "K")
        ),
        symbols=simt.SYMBOLS,
        features=("dot",) if int8 else ("half2",),
        applies=_in_words,
        steps=_plain_steps,
        launch=_warps_launch,
        needs=lambda config: ("quantize",) * int8,
        style=style,
    )  # fmt: skip


def half_word(value: float) -> str:
    """A number of half precision, which it is exactly, twice in a word."""
    bits = struct.pack("<e", value)
    assert struct.unpack("<e", bits)[0] == value
    return f"0x{int.from_bytes(2 * bits, 'little'):08X}u"


def code_center(fmt: BlockFormat) -> int:
    """What is subtracted from the codes of a format before they are multiplied in few bits: the
    middle of their range, so that products are small, where an offset can make up for it."""
    code = code_word(fmt)
    lowest = -code.code_max if code.signed else 0
    return code.bias if fmt.offset is None else (lowest + code.code_max + 1) // 2


def code_shift(fmt: BlockFormat) -> int:
    """The power of two below which codes are, with their center subtracted."""
    code, center = code_word(fmt), code_center(fmt)
    lowest = -code.code_max if code.signed else 0
    return max(abs(lowest - center), abs(code.code_max - center)).bit_length()


# ---- compute capability 9.0 --------------------------------------------------------------------

_PADDED = f"-(-K // 64) * (-(-M // {PAD_M}) * {32 * PAD_M})"


def _applies_to_bulk(fmt: BlockFormat) -> str | None:
    """The copy engine takes multiples of 16 bytes, which eight rows of blocks must be."""
    if 8 * fmt.nbytes % 16:
        return f"eight blocks of {fmt.nbytes} bytes are no multiple of the copy engine's 16"
    return _applies(fmt)


def _fits_hopper(
    precision: str, config: Config, fmt: BlockFormat, caps: Capabilities
) -> str | None:
    assert isinstance(config, BulkTileConfig)
    needed = shape(config, fmt, precision).shared_bytes
    if needed > _HOPPER_BYTES:
        return f"{needed} bytes of shared memory; a launch may ask for {_HOPPER_BYTES}"
    return None


def _launch_hopper(precision: str, config: Config, fmt: BlockFormat) -> Launch:
    assert isinstance(config, BulkTileConfig)
    tiles = f"-(-N // {config.tile_n}) * -(-M // {config.tile_m})"
    return Launch((tiles, "1"), config.threads, shape(config, fmt, precision).shared_bytes)


def _matmul_hopper(precision: str) -> Walk:
    return Walk(
        name=f"matmul_{precision}_wgmma",
        op="matmul",
        precision=precision,
        template="matmul_wgmma.j2",
        config=BulkTileConfig,
        arguments=(
            simt.WEIGHTS,
            Argument("xh", "in", "u32", ("HALVES",)),
            Argument("y", "out", "f32", ("M", "N")),
            *simt.sizes("M", "N", "K"),
        ),
        symbols={**simt.SYMBOLS, "HALVES": _PADDED},
        features=("wgmma",),
        applies=_applies_to_bulk,
        steps=_steps,
        launch=functools.partial(_launch_hopper, precision),
        needs=lambda config: ("cast",),
        style="wgmma",
        fits=functools.partial(_fits_hopper, precision),
        apart=8,
    )


def _cast_launch_hopper(config: Config, fmt: BlockFormat) -> Launch:
    assert isinstance(config, ThreadsConfig)
    blocks = f"-(-({_PADDED}) // {config.threads})"
    return Launch((f"min({blocks}, {simt.MOST_GROUPS})", "1"), config.threads)


def _cast_hopper(precision: str) -> Walk:
    plain = _cast(precision)
    return dataclasses.replace(
        plain,
        name=f"{plain.name}_wgmma",
        template="cast_wgmma.j2",
        arguments=(
            plain.arguments[0],
            Argument("xh", "out", "u32", ("HALVES",)),
            *plain.arguments[2:],
        ),
        symbols={"HALVES": _PADDED},
        features=("wgmma",),
        launch=_cast_launch_hopper,
        style="wgmma",
    )


#: PTX's names of the precisions that tensor cores multiply in half precision
HALF_TYPE = {"fp16": "f16", "bf16": "bf16"}


def walks(shared: tuple[Walk, ...]) -> tuple[Walk, ...]:
    """All products, the best guesses first, with those that other targets share, and what puts
    activations into the form that tensor cores take: these for many rows of activations, and for
    few a warp a row."""
    return (
        *(_matmul_hopper(p) for p in HALF_TYPE),
        *(_matmul("matmul", p) for p in ("int8", *HALF_TYPE)),
        *(_warps(p) for p in ("int8", "fp16")),
        *shared,
        *(_matmul("matvec", p) for p in ("int8", *HALF_TYPE)),
        *(_cast(p) for p in HALF_TYPE),
        *(_cast_hopper(p) for p in HALF_TYPE),
    )


def floats(count: int) -> str:
    """Operands that are read and written: sums[0], sums[1], ..."""
    parts = [f'"+f"(sums[{i}])' for i in range(count)]
    rows = [", ".join(parts[i : i + 4]) for i in range(0, count, 4)]
    return ",\n          ".join(rows)


def operands(count: int) -> list[str]:
    """Numbers of the first operands, in pieces for lines of text."""
    parts = [f"%{i}" for i in range(count)]
    return [", ".join(parts[i : i + 8]) for i in range(0, count, 8)]

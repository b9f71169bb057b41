"""Attention on tensor cores (templates/cuda/attention_mma.j2, attention_wgmma.j2)."""

from __future__ import annotations

import dataclasses
import functools
import math
from dataclasses import dataclass
from typing import Any

from kernelgen.config import Capabilities, Config
from kernelgen.config.attention import FragmentAttentionConfig, WarpgroupAttentionConfig
from kernelgen.ir.block import BlockFormat
from kernelgen.ir.expr import depends_on, walk
from kernelgen.ir.ops.attention import Attention
from kernelgen.ir.ops.attention import K as KEY
from kernelgen.targets.attention import TENSORS, dims, is_half
from kernelgen.targets.base import Argument, Launch, Walk
from kernelgen.targets.simt import sizes
from kernelgen.targets.simt_attention import PARTS, AttentionSteps, operands, part, steps_for

#: elements of a head that registers hold sums of, and tiles in shared memory
_MOST_ELEMENTS = 256

#: registers of a thread for sums, scores and what comes with these, and queries if there is room
_MOST_KEPT = 192

#: registers that a score takes, with what it is computed in: the second of the first of these whose
#: number of operations is not exceeded by those of score and mask
_OF_A_SCORE = ((12, 1.5), (24, 2.5), (1 << 30, 4.0))
#: a function, or a load for each key, counts as so many operations
_HARD = 8

#: elements to a multiple of which rows of a tile are filled up: the depth of a product
_DEPTH = 16

#: bytes of a piece of a row that is swizzled; bytes to a multiple of which tiles of such begin
_PIECE, _ALIGNED = 128, 1024

#: shared memory that a launch may ask for where four warps multiply together
_WARPGROUP_BYTES = 232448

#: queries of a head from which four warps have rows enough to multiply together
_WARPGROUP_ROWS = 64

#: registers of a multiprocessor, and of a thread at most
_ALL_REGISTERS, _MOST_REGISTERS = 65536, 255


@dataclass(frozen=True)
class Side:
    """How rows of K, or of V, come to shared memory.

    fmt       of the rows, of `elements` elements and `row_bytes` bytes
    plain     whether they are copied as they are; else packed, and decoded there
    piece     bytes that are copied at once
    width     elements of a row of a tile, with zeros that fill it up
    pitch     bytes from one such row to the next: rows are spread over all banks
    words     words of four codes that a thread decodes at once
    tile      bytes of a tile, `stage`: of what is copied for one
    stages, at   where what is copied, and what is multiplied, begin in shared memory
    swizzled  whether rows lie in pieces of 64 elements, those of all rows together, whose 16 bytes
              are swapped by the lowest bits of the row, as four warps together take them
    """

    fmt: BlockFormat
    elements: int
    row_bytes: int
    plain: bool
    piece: int
    width: int
    pitch: int
    words: int
    tile: int
    stage: int
    stages: int = 0
    at: int = 0
    swizzled: bool = False

    def place(self, row: str, at: str, rows: int) -> str:
        """Where byte `at` of row `row` of a tile of so many rows lies."""
        if not self.swizzled:
            return f"{row} * {self.pitch}u + {at}"
        inside = f"({at} % {_PIECE}u ^ {row} % 8u * 16u)"
        return f"{at} / {_PIECE}u * {rows * _PIECE}u + {row} * {_PIECE}u + {inside}"


def _side(
    fmt: BlockFormat, elements: int, keys: int, precision: str, swizzled: bool = False
) -> Side:
    row_bytes = fmt.row_bytes(elements)
    width = -(-elements // _DEPTH) * _DEPTH
    # an odd number of the 16 bytes that a row of a matrix has, or whole pieces
    pitch = -(-2 * width // _PIECE) * _PIECE if swizzled else 2 * width + 16
    plain = is_half(fmt, precision)
    stage = keys * (pitch if plain else row_bytes)
    aligned = _ALIGNED if swizzled else 16
    words = 2 if not fmt.float_codes and fmt.group % 8 == 0 else 1
    return Side(
        fmt, elements, row_bytes, plain, math.gcd(row_bytes, 16), width, pitch, words,
        keys * pitch, -(-stage // aligned) * aligned, swizzled=swizzled,
    )  # fmt: skip


@dataclass(frozen=True)
class FragmentAttentionShape:
    """Sizes that follow from a configuration and a kind of attention.

    k, v          how these come to shared memory
    sums, scores  numbers of these in each thread
    queries_stay  whether queries stay in registers
    queries       bytes of the tile of queries, which begins at `queries_at`
    merged_pitch  numbers from one row to the next where warps add up, and `merged_at`: where the
                  largest scores and the sums of weights begin, behind these and tiles
    shared_bytes  of shared memory
    """

    k: Side
    v: Side
    sums: int
    scores: int
    queries_stay: bool
    queries_at: int
    merged_pitch: int
    merged_at: int
    shared_bytes: int


def _sides(
    config: FragmentAttentionConfig | WarpgroupAttentionConfig, kind: Attention, precision: str,
    swizzled: bool,
) -> tuple[Side, Side, int]:  # fmt: skip
    """K and V one behind the other in shared memory, and the bytes that they take."""
    sides, used = [], 0
    for fmt, elements in ((kind.k, kind.head_dim), (kind.v, kind.value_dim)):
        one = _side(fmt, elements, config.keys, precision, swizzled)
        stages, used = used, used + config.stages * one.stage
        at = stages
        if not one.plain:
            at, used = used, used + one.tile
        sides.append(dataclasses.replace(one, stages=stages, at=at))
    return sides[0], sides[1], used


@functools.lru_cache(maxsize=4096)
def attention_shape(
    config: FragmentAttentionConfig, kind: Attention, precision: str
) -> FragmentAttentionShape:
    """The sizes of a kernel."""
    k, v, used = _sides(config, kind, precision, False)
    matrices = config.warp_rows // 16
    sums, scores = matrices * v.width // 2, matrices * config.warp_keys // 2
    stay = sums + _of_scores(kind, scores) + matrices * k.width // 4 <= _MOST_KEPT
    queries = config.rows * k.pitch
    # queries that stay in registers leave their memory to keys
    queries_at = 0 if stay else used
    used = max(used, queries) if stay else used + queries
    merged_pitch, merged_at = v.width + 8, used
    if config.key_warps > 1:
        merged = 4 * config.key_warps * config.rows
        merged_at = max(used, merged * merged_pitch)
        used = merged_at + 2 * merged
    return FragmentAttentionShape(
        k, v, sums, scores, stay, queries_at, merged_pitch, merged_at, used
    )


@dataclass(frozen=True)
class WarpgroupAttentionShape:
    """The same where four warps multiply together: see `FragmentAttentionShape`."""

    k: Side
    v: Side
    sums: int
    scores: int
    queries_at: int
    shared_bytes: int


@functools.lru_cache(maxsize=4096)
def warpgroup_attention(
    config: WarpgroupAttentionConfig, kind: Attention, precision: str
) -> WarpgroupAttentionShape:
    """The sizes of a kernel."""
    k, v, used = _sides(config, kind, precision, True)
    queries = config.rows * k.pitch
    return WarpgroupAttentionShape(k, v, v.width // 2, config.keys // 2, used, used + queries)


def _steps(kind: Attention, config: Config) -> AttentionSteps:
    assert isinstance(config, FragmentAttentionConfig | WarpgroupAttentionConfig)
    return steps_for(kind, config.keys)


def _applies(kind: Attention) -> str | None:
    longest = max(kind.head_dim, kind.value_dim)
    if longest > _MOST_ELEMENTS:
        return f"heads of {longest} elements are more than the {_MOST_ELEMENTS} registers hold"
    return None


def _fits(precision: str, config: Config, kind: Attention, caps: Capabilities) -> str | None:
    assert isinstance(config, FragmentAttentionConfig)
    found = attention_shape(config, kind, precision)
    if found.shared_bytes > caps.launch_bytes:
        return (
            f"{found.shared_bytes} bytes of shared memory; a launch may ask for {caps.launch_bytes}"
        )
    needed = found.sums + _of_scores(kind, found.scores)
    if needed > _MOST_KEPT:
        return f"{needed} registers of each thread for sums and scores; {_MOST_KEPT} are allowed"
    return None


def _of_scores(kind: Attention, count: int) -> int:
    """Registers for so many scores."""
    operations = 0
    for expr in (kind.score, kind.mask):
        for node in walk(expr) if expr is not None else ():
            hard = node.op == "call" or (node.op == "element" and depends_on(node, KEY))
            operations += _HARD if hard else 1
    return int(count * next(each for most, each in _OF_A_SCORE if operations <= most))


def _fits_warpgroups(
    precision: str, config: Config, kind: Attention, caps: Capabilities
) -> str | None:
    assert isinstance(config, WarpgroupAttentionConfig)
    found = warpgroup_attention(config, kind, precision)
    if found.shared_bytes > _WARPGROUP_BYTES:
        return (
            f"{found.shared_bytes} bytes of shared memory; a launch may ask for {_WARPGROUP_BYTES}"
        )
    # what else there is takes more where there is more of these
    most = min(_MOST_REGISTERS, _ALL_REGISTERS // config.threads) * 25 // 32
    # two weights share a register
    needed = found.sums + _of_scores(kind, found.scores) + found.scores // 2
    if needed > most:
        return f"{needed} registers of each thread for sums, scores and weights; {most} are allowed"
    return None


def _applies_warpgroups(precision: str, kind: Attention) -> str | None:
    smallest = WarpgroupAttentionConfig(warps=4, keys=32)
    return _applies(kind) or _fits_warpgroups(precision, smallest, kind, Capabilities())


def _launch(precision: str, config: Config, kind: Attention) -> Launch:
    assert isinstance(config, FragmentAttentionConfig | WarpgroupAttentionConfig)
    heads, rows = ("H", "T") if config.share == "query" else ("HK", "T * (H // HK)")
    blocks = f"B * {heads} * -(-({rows}) // {config.rows}) * {config.splits}"
    # with one block for each tile there are no parts
    symbols = {"PARTS": str(config.splits if config.splits > 1 else 0), "PART": part(kind)}
    shape = (
        attention_shape(config, kind, precision)
        if isinstance(config, FragmentAttentionConfig)
        else warpgroup_attention(config, kind, precision)
    )
    shared_bytes = shape.shared_bytes
    return Launch((blocks, "1"), config.threads, shared_bytes, symbols | dims(kind))


def _flash(precision: str) -> Walk:
    return Walk(
        name=f"flash_{precision}_mma",
        op="attention",
        kind=Attention,
        precision=precision,
        template="attention_mma.j2",
        config=FragmentAttentionConfig,
        arguments=(
            *TENSORS,
            Argument("parts", "scratch", "f32", PARTS),
            *sizes("B", "H", "HK", "T", "S", "B0", "H0"),
        ),
        features=("mma",),
        applies=_applies,
        steps=_steps,
        launch=functools.partial(_launch, precision),
        then=lambda config: ("attention_combine",) * (config.as_dict()["splits"] > 1),
        operands=operands,
        style="mma",
        fits=functools.partial(_fits, precision),
        buffers=("k", "v"),
    )


def _flash_warpgroups(precision: str) -> Walk:
    return dataclasses.replace(
        _flash(precision),
        name=f"flash_{precision}_wgmma",
        template="attention_wgmma.j2",
        config=WarpgroupAttentionConfig,
        features=("wgmma",),
        applies=functools.partial(_applies_warpgroups, precision),
        style="wgmma",
        fits=functools.partial(_fits_warpgroups, precision),
        least_rows=_WARPGROUP_ROWS,
    )


def walks() -> tuple[Walk, ...]:
    """Attention in half precision; where four warps multiply together is for many queries alone."""
    halves = ("fp16", "bf16")
    return (*(_flash_warpgroups(p) for p in halves), *(_flash(p) for p in halves))


#: what the templates may call
GLOBALS: dict[str, Any] = {
    "fragment_attention": attention_shape,
    "warpgroup_attention": warpgroup_attention,
    "log2_e": math.log2(math.e),
}

#: names that the template uses
RESERVED = frozenset(
    "HEAD_DIM KEYS KEY_WARPS NEVER ROWS SCALE SPLITS STAGES THREADS UNIT VALUE_DIM WARP_KEYS"
    " WARP_ROWS ahead at b base base_of batch block blocks codes column copies_end copies_wait0"
    " copies_wait1 d element factor first_key first_row float4 fmaxf following from g h h_hi"
    " h_lo halves head heads high higher i inside item j k k0 k_hi k_lo key key_row key_warp"
    " keys_at kv_row l lane largest_of_row load load_matrices load_turned low m make_uint2"
    " make_uint4 merged merged_tops merged_totals multiply n offset pair part parts power2 q"
    " q_hi q_lo quad query query_at query_row r raised result row row0 row_head row_q rows s"
    " scale score scores shared shrink source split stage sum sum_of_row sums thread tile tiles"
    " tiles_k to together top tops total totals uint2 uint4 v value value0 value1 value2 value3"
    " values_at warp warp_row weight weights whole word y".split()
)

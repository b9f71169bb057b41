"""Attention on the targets with grids of threads: one walk, in the words of each language.

A group of threads takes a tile of queries and goes through the keys, tile by tile, as
`kernelgen.ir.ops.attention.flash_attention` does.  Where several groups share the keys of one tile
of queries, each leaves a maximum, a sum and a row that is not yet divided, and `attention_combine`
adds these up.  No number is infinite on the way, as some languages may assume.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

from kernelgen.config import Capabilities, Config
from kernelgen.config.attention import AttentionConfig, CombineConfig
from kernelgen.ir.block import BlockFormat
from kernelgen.ir.expr import (
    BOOL,
    F32,
    I32,
    U32,
    Expr,
    call,
    cast,
    const,
    equal,
    logical_not,
    number,
    transform,
    var,
)
from kernelgen.ir.layout import NATIVE
from kernelgen.ir.ops.attention import Attention, H, K, Q
from kernelgen.ir.rules import simplify
from kernelgen.ir.steps import MemorySteps, memory_steps
from kernelgen.targets.attention import RESULT, TENSORS, arrays, dims, paged
from kernelgen.targets.base import Argument, Launch, Walk
from kernelgen.targets.simt import MOST_GROUPS, chunk, sizes

#: what no score is below: of keys that are not admitted, and the first maximum
LOWEST = -3.0e38
#: scores below this are of keys that are not admitted
NEVER = -1.0e38

#: sums that a thread may keep in registers
_MOST_SUMS = 128

_SIZE = 1 << 31


@dataclass(frozen=True)
class AttentionSteps:
    """What the walk asks of a kind of attention.

    k, v    how rows of blocks are decoded
    scale   f32
    score   f32, in s, b, h, q, k; None: s
    refused bool, in b, h, q, k: a key is not admitted; None: all are
    whole   i32, not zero where all keys of a tile are admitted and there, in q_lo, q_hi, h_lo,
            h_hi, k_lo and k0 of the tile; None: never known
    never   bool: none is admitted; None: never known
    """

    k: MemorySteps
    v: MemorySteps
    scale: Expr
    score: Expr | None
    refused: Expr | None
    whole: Expr | None
    never: Expr | None

    @property
    def scalar_because(self) -> tuple[str, ...]:
        """Reasons for which something was decoded lane by lane."""
        return tuple(dict.fromkeys((*self.k.scalar_because, *self.v.scalar_because)))


def attention_steps(kind: Attention, config: Config) -> AttentionSteps:
    """The steps of a kind of attention."""
    assert isinstance(config, AttentionConfig)
    return steps_for(kind, config.keys)


@functools.lru_cache(maxsize=256)
def steps_for(kind: Attention, keys: int) -> AttentionSteps:
    """The steps of a kind of attention in tiles of so many keys."""
    strides = frozenset(name for one in kind.operands for name in one.strides)

    def spell(expr: Expr | None) -> Expr | None:
        return None if expr is None else transform(simplify(expr), lambda x: _typed(x, strides))

    found = kind.tiles(Q, K, H)  # heads may lie side by side in a tile
    always, never = found.always, found.never
    count = var(keys_of(kind), _SIZE, U32)
    inside = logical_not(count < var("k0", _SIZE, U32) + keys)
    whole = None
    if always.op != "const" or always.attr:
        whole = cast(I32, inside if always.op == "const" else always & inside)
    return AttentionSteps(
        k=memory_steps(kind.k, NATIVE),
        v=memory_steps(kind.v, NATIVE),
        scale=const(kind.scale, F32),
        score=spell(kind.score),
        refused=None if kind.mask is None else spell(_opposite(kind.mask)),
        whole=spell(whole),
        never=None if never.op == "const" and not never.attr else spell(never),
    )


def _opposite(x: Expr) -> Expr:
    """`logical_not`, which it takes away where it is there."""
    ends = [a.attr for a in x.args[1:] if a.op == "const"]
    return x.args[0] if x.op == "select" and ends == [False, True] else logical_not(x)


def _typed(x: Expr, strides: frozenset[str]) -> Expr | None:
    """Sizes are u32 in a kernel, and some languages have no xor of truths."""
    if x.op == "var" and x.attr[0] in strides:
        return cast(I32, Expr("var", U32, attr=x.attr))
    if x.op == "^" and x.dtype is BOOL:
        return logical_not(equal(*x.args))
    return None


@dataclass(frozen=True)
class Shape:
    """A configuration for one kind of attention.

    depth    elements of a key that are in shared memory at once; a divisor of all
    run      products that are added up by themselves; a divisor of depth
    v_keys   keys whose values are there at once
    pitch    numbers from one element of a tile of keys to the next
    tile     numbers of the tile that holds either
    columns  of the result that a thread has
    """

    depth: int
    run: int
    v_keys: int
    pitch: int
    tile: int
    columns: int
    config: AttentionConfig
    head_dim: int

    @property
    def shared(self) -> dict[str, tuple[str, int]]:
        """Arrays in shared memory."""
        rows, keys = self.config.rows, self.config.keys
        return {
            "qt": ("f32", rows * self.head_dim),
            "tile": ("f32", self.tile),
            "pt": ("f32", keys * (rows + 1)),
            "part": ("f32", rows * self.config.lanes),
        }

    @property
    def shared_bytes(self) -> int:
        """Bytes of these."""
        return sum(4 * count for _, count in self.shared.values())

    @property
    def sums(self) -> int:
        """Numbers that a thread keeps at once: of the result, and while it multiplies."""
        config = self.config
        passing = max(2 * config.thread_keys, min(self.columns, 8))
        return config.thread_rows * (self.columns + passing)


def shape(config: AttentionConfig, kind: Attention) -> Shape:
    """What a configuration is for a kind of attention."""
    unit = 1 if kind.k.float_codes else 4
    depth = max(n for n in range(unit, config.depth + 1, unit) if kind.head_dim % n == 0)
    run = max(n for n in range(1, 17) if depth % n == 0)
    pitch = config.keys + 1
    v_keys = config.keys
    while v_keys > 1 and v_keys * kind.value_dim > depth * pitch:
        v_keys //= 2
    tile = max(depth * pitch, v_keys * kind.value_dim)
    columns = -(-kind.value_dim // config.lanes)
    return Shape(depth, run, v_keys, pitch, tile, columns, config, kind.head_dim)


def word_span(fmt: BlockFormat, length: int, rows: int, threads: int) -> int:
    """Words of a row of `length` elements that a thread decodes at once, with one scale: as many
    as leave work for all threads, of `rows` rows."""
    whole = math.gcd(chunk(fmt), length) // 4
    most = max(1, rows * length // 4 // threads)
    return max(n for n in range(1, whole + 1) if whole % n == 0 and n <= most)


def _fits(config: Config, kind: Attention, caps: Capabilities) -> str | None:
    assert isinstance(config, AttentionConfig)
    found = shape(config, kind)
    if found.shared_bytes > caps.shared_bytes:
        return f"{found.shared_bytes} bytes of shared memory; the device has {caps.shared_bytes}"
    if found.sums > _MOST_SUMS:
        return f"{found.sums} sums in each thread; {_MOST_SUMS} fit the registers"
    return None


def _launch(config: Config, kind: Attention) -> Launch:
    assert isinstance(config, AttentionConfig)
    heads, rows = ("H", "T") if config.share == "query" else ("HK", "T * (H // HK)")
    tiles = f"-(-({rows}) // {config.rows})"
    groups = f"min(B * {heads} * {tiles} * {config.splits}, {MOST_GROUPS})"
    # with one group for each tile there are no parts
    symbols = {"PARTS": str(config.splits if config.splits > 1 else 0), "PART": part(kind)}
    return Launch((groups, "1"), config.threads, symbols=symbols | dims(kind))


def _combine_launch(config: Config, kind: Attention) -> Launch:
    assert isinstance(config, CombineConfig)
    groups = f"-(-(B * H * T * {kind.value_dim}) // {config.threads})"
    symbols = dims(kind) | {"PARTS": "SPLITS", "PART": part(kind)}
    return Launch((f"min({groups}, {MOST_GROUPS})", "1"), config.threads, symbols=symbols)


def part(kind: Attention) -> str:
    """Numbers that a group leaves of each query."""
    return str(kind.value_dim + 2)


def operands(kind: Attention) -> tuple[Argument, ...]:
    """Arrays, and their strides."""
    strides = (name for one in kind.operands for name in one.strides)
    return (*paged(kind), *arrays(kind), *sizes(*strides, *(["PAGES"] if kind.page else [])))


#: for each group that shares keys and each query: a row of the result, a maximum and a sum
PARTS = ("PARTS", "B", "H", "T", "PART")


def walks() -> tuple[Walk, ...]:
    """Attention, and what adds up its parts."""
    return (
        Walk(
            name="flash",
            op="attention",
            kind=Attention,
            precision="fp32",
            template="attention.j2",
            config=AttentionConfig,
            arguments=(
                *TENSORS,
                Argument("parts", "scratch", "f32", PARTS),
                # B0 and H0: what is the first batch and head here, where arrays come in pieces
                *sizes("B", "H", "HK", "T", "S", "B0", "H0"),
            ),
            steps=attention_steps,
            launch=_launch,
            then=lambda config: ("attention_combine",) * (config.as_dict()["splits"] > 1),
            operands=operands,
            fits=_fits,
            buffers=("k", "v"),
        ),
        Walk(
            name="combine",
            op="attention_combine",
            kind=Attention,
            precision="",
            template="attention_combine.j2",
            config=CombineConfig,
            arguments=(
                Argument("parts", "in", "f32", PARTS),
                RESULT,
                *sizes("B", "H", "T", "SPLITS"),
            ),
            steps=lambda kind, config: None,
            launch=_combine_launch,
        ),
    )


def _exp(text: str) -> Expr:
    """exp of an f32 that text gives."""
    return call("exp", number(text))


def keys_of(kind: Attention) -> str:
    """What the number of keys of a batch is called; S is what there is room for."""
    return "length" if kind.lengths else "S"


#: what the templates may call
GLOBALS: dict[str, Any] = {
    "keys_of": keys_of,
    "exp": _exp, "attention_shape": shape, "word_span": word_span,
    "lowest": const(LOWEST, F32), "not_admitted": const(NEVER, F32),
}  # fmt: skip

#: names that the templates use
RESERVED = frozenset(
    "B B0 DEPTH H H0 HEAD_DIM HK KEYS LANES PAGE PAGES P_PITCH PART PITCH ROWS RUN S SPLITS T"
    " THREADS THREAD_KEYS THREAD_ROWS VALUE_DIM V_KEYS at b batch block blocks code codes d d0"
    " dimension element factor first found g h h_hi h_lo head heads i item j k k0 k_hi k_lo key"
    " keys kv_head kv_row l lane length lengths m n p pages part parts place pt q q_hi q_lo qt"
    " result row row0 rows run s scale score shrink sinks split tile tiles together top total unit"
    " v v0 value whole word y".split()
) | {f"{one}{n}" for one in ("key", "l", "m", "p", "query", "v") for n in range(128)} | {
    f"{one}{i}x{n}" for one in "sty" for i in range(8) for n in range(128)
}  # fmt: skip

"""Attention by matrices of 8 x 8 (templates/metal/attention_matrix.j2)."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

from kernelgen.config import Capabilities, Config
from kernelgen.config.attention import MatrixAttentionConfig
from kernelgen.ir.block import BlockFormat
from kernelgen.ir.ops.attention import Attention
from kernelgen.targets.attention import TENSORS, dims, is_half
from kernelgen.targets.base import Argument, Launch, Walk
from kernelgen.targets.simt import sizes
from kernelgen.targets.simt_attention import PARTS, AttentionSteps, operands, part, steps_for

#: registers of each thread that queries and sums may take: a matrix of floats takes two, and one of
#: halves one
_REGISTERS = 160


@dataclass(frozen=True)
class Rows:
    """How rows of Q and K, or of V, lie in threadgroup memory.

    width   elements of a row, with zeros that fill it up
    pitch   numbers from one row to the next: rows of a matrix lie in different banks
    run     elements that a thread decodes with one scale
    plain   whether four elements are copied at once as they are
    """

    width: int
    pitch: int
    run: int
    plain: bool


@dataclass(frozen=True)
class MatrixAttentionShape:
    """Sizes that follow from a configuration and a kind of attention.

    k, v           how rows lie in the tile
    tile           numbers of the tile, which holds queries, keys or values
    scores_pitch, weights_pitch   numbers from one row of scores or weights to the next
    shared_bytes   of threadgroup memory
    registers      of each thread for queries, sums and scores
    """

    k: Rows
    v: Rows
    tile: int
    scores_pitch: int
    weights_pitch: int
    shared_bytes: int
    registers: int


def _rows(fmt: BlockFormat, elements: int, precision: str) -> Rows:
    width = -(-elements // 8) * 8
    run = math.gcd(fmt.group, 8)
    return Rows(width, width + 8, run, is_half(fmt, precision) and elements % 4 == 0)


@functools.lru_cache(maxsize=4096)
def matrix_attention(
    config: MatrixAttentionConfig, kind: Attention, precision: str
) -> MatrixAttentionShape:
    """The sizes of a kernel."""
    k = _rows(kind.k, kind.head_dim, precision)
    v = _rows(kind.v, kind.value_dim, precision)
    tile = max(config.rows * k.pitch, config.keys * max(k.pitch, v.pitch))
    scores, weights = config.keys + 4, config.keys + 8
    shared_bytes = 2 * tile + config.rows * (4 * scores + 2 * weights)
    matrices = config.simd_rows // 8
    registers = matrices * (k.width // 8 + v.width // 4 + config.keys // 4)
    return MatrixAttentionShape(k, v, tile, scores, weights, shared_bytes, registers)


def _steps(kind: Attention, config: Config) -> AttentionSteps:
    assert isinstance(config, MatrixAttentionConfig)
    return steps_for(kind, config.keys)


def _applies(kind: Attention) -> str | None:
    needed = matrix_attention(MatrixAttentionConfig(keys=16), kind, "fp16").registers
    if needed > _REGISTERS:
        return f"heads of {kind.head_dim} and {kind.value_dim} elements do not fit the registers"
    return None


def _fits(precision: str, config: Config, kind: Attention, caps: Capabilities) -> str | None:
    assert isinstance(config, MatrixAttentionConfig)
    found = matrix_attention(config, kind, precision)
    if found.shared_bytes > caps.shared_bytes:
        return f"{found.shared_bytes} bytes of shared memory; the device has {caps.shared_bytes}"
    if found.registers > _REGISTERS:
        return f"{found.registers} registers of each thread; {_REGISTERS} are allowed"
    return None


def _launch(config: Config, kind: Attention) -> Launch:
    assert isinstance(config, MatrixAttentionConfig)
    heads, rows = ("H", "T") if config.share == "query" else ("HK", "T * (H // HK)")
    groups = f"B * {heads} * -(-({rows}) // {config.rows}) * {config.splits}"
    # with one threadgroup for each tile there are no parts
    symbols = {"PARTS": str(config.splits if config.splits > 1 else 0), "PART": part(kind)}
    return Launch((groups, "1"), config.threads, symbols=symbols | dims(kind))


def _flash(precision: str) -> Walk:
    return Walk(
        name=f"flash_matrix_{precision}",
        op="attention",
        kind=Attention,
        precision=precision,
        template="attention_matrix.j2",
        config=MatrixAttentionConfig,
        arguments=(
            *TENSORS,
            Argument("parts", "scratch", "f32", PARTS),
            *sizes("B", "H", "HK", "T", "S", "B0", "H0"),
        ),
        features=("matrix", "bf16") if precision == "bf16" else ("matrix",),
        applies=_applies,
        steps=_steps,
        launch=_launch,
        then=lambda config: ("attention_combine",) * (config.as_dict()["splits"] > 1),
        operands=operands,
        style="matrix",
        fits=functools.partial(_fits, precision),
        buffers=("k", "v"),
    )


def walks() -> tuple[Walk, ...]:
    """Attention in half precision."""
    return tuple(_flash(precision) for precision in ("fp16", "bf16"))


#: what the templates may call
GLOBALS: dict[str, Any] = {"matrix_attention": matrix_attention}

#: names that the template uses
RESERVED = frozenset(
    "B B0 H H0 HEAD_DIM HK KEYS LANES ROWS S SCORES_PITCH SIMD_ROWS SPLITS T THREADS VALUE_DIM"
    " WEIGHTS_PITCH at b batch bfloat4 block blocks char4 code codes column d element factor"
    " first float4 g groups h h_hi h_lo half4 head heads higher i inside item j k k0 k_hi k_lo"
    " key kv_row l lane m matrix mine n offset p parts q q_hi q_lo q_mine query raised result"
    " row row0 rows s scale score scores scores_memory shrink simd_any simd_shuffle_xor split"
    " subgroup sums tile tile_memory tiles to together top total uchar4 v v8 value weight"
    " weights weights_memory whole word y".split()
)

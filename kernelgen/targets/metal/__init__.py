"""The Metal target: Apple's GPUs, through torch or pyobjc."""

from __future__ import annotations

import math

from kernelgen.config import Capabilities, Config
from kernelgen.config.matrices import HalfMatrixTileConfig, MatrixTileConfig
from kernelgen.ir.block import BlockFormat
from kernelgen.ir.layout import named_layout
from kernelgen.ir.steps import MemorySteps, memory_steps
from kernelgen.targets import simt, simt_attention, simt_maps
from kernelgen.targets.base import Launch, Target, Walk
from kernelgen.targets.metal import attention
from kernelgen.targets.metal.dialect import MEMORY, MetalWords

#: what every GPU of Apple's since the M1 has, from macOS 14 on; none multiplies bytes by fours
CAPABILITIES = Capabilities(
    max_threads=1024,
    shared_bytes=32768,
    features=frozenset({"bf16", "fp16", "matrix", "subgroups"}),
)

_KEYWORDS = frozenset(
    "alignas alignof auto bool break case catch char class const constant constexpr continue"
    " default delete device do double else enum explicit export extern false float for fragment"
    " friend goto half bfloat if inline int kernel long metal mutable namespace new operator"
    " private protected public register restrict return short signed sizeof static struct switch"
    " template texture sampler this thread threadgroup throw true try typedef typename uchar uint"
    " ulong union unsigned using ushort vertex virtual void volatile while bytes dot4 lookup max"
    " min nearest rint negate_bytes"
    " spread1 i32 u32 f32 f32_bits bits_f32 as_type precise fast mem_flags"
    " u16_bytes u16_aligned u32_aligned u32_halves u32_bytes thread_number group_id"
    # names of the walk over matrices
    " PITCH RUN SIMD_M SIMD_N SUMS_M SUMS_N a activations b buffer edge my_m my_row to"
    " weights".split()
)


def run_of(fmt: BlockFormat, config: MatrixTileConfig) -> int:
    """Elements along k that a thread decodes with one scale."""
    return math.gcd(fmt.group, 4 * config.words)


def _steps(fmt: BlockFormat, config: Config) -> MemorySteps:
    assert isinstance(config, MatrixTileConfig)
    return memory_steps(fmt, named_layout(config.layout))


def _launch(config: Config, fmt: BlockFormat) -> Launch:
    assert isinstance(config, MatrixTileConfig)
    groups = (f"-(-N // {config.tile_n})", f"-(-M // {config.tile_m})")
    return Launch(groups, config.threads)


def _matrix(precision: str, config: type[MatrixTileConfig], walks: tuple[Walk, ...]) -> Walk:
    """The product by matrices, with the arguments of the product by threads."""
    plain = next(w for w in walks if w.op == "matmul" and w.precision == "fp32")
    return Walk(
        name=f"matrix_{precision}",
        op="matmul",
        precision=precision,
        template="matmul_matrix.j2",
        config=config,
        arguments=plain.arguments,
        symbols=plain.symbols,
        features=("matrix", "bf16") if precision == "bf16" else ("matrix",),
        steps=_steps,
        launch=_launch,
        style="matrix",
    )


def _walks() -> tuple[Walk, ...]:
    shared = simt.walks()
    matrices = (
        _matrix("fp32", MatrixTileConfig, shared),
        _matrix("fp16", HalfMatrixTileConfig, shared),
        _matrix("bf16", HalfMatrixTileConfig, shared),
    )
    return (
        *matrices,
        *shared,
        *simt_attention.walks(),
        *attention.walks(),
        *simt_maps.walks(),
    )


TARGET = Target(
    name="metal",
    description="Metal Shading Language, for Apple silicon",
    suffix=".metal",
    walks=_walks(),
    dialects={"memory": MEMORY},
    capabilities=CAPABILITIES,
    templates=(simt.TEMPLATES,),
    globals=simt_attention.GLOBALS
    | attention.GLOBALS
    | simt_maps.GLOBALS
    | simt.template_globals(MetalWords())
    | {"words": "words.metal", "run_of": run_of},
    variants=("emulated",),
    reserved=(
        simt.RESERVED
        | simt_attention.RESERVED
        | simt_maps.RESERVED
        | attention.RESERVED
        | _KEYWORDS
    ),
    feature_names={
        "bf16": "MTLLanguageVersion3_1",
        "fp16": "",
        "matrix": "MTLGPUFamilyApple7",
        "subgroups": "MTLGPUFamilyApple7",
    },
)

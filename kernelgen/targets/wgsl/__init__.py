"""The WGSL target: WebGPU, through wgpu here and in browsers."""

from __future__ import annotations

import dataclasses

from kernelgen.config import Capabilities
from kernelgen.ir.ops.attention import Attention
from kernelgen.ir.steps import MemorySteps
from kernelgen.targets import simt, simt_attention, simt_maps
from kernelgen.targets.base import Target, Walk
from kernelgen.targets.codebook import codebook_argument, in_codebook
from kernelgen.targets.simt_attention import AttentionSteps
from kernelgen.targets.wgsl.dialect import MEMORY, WgslWords

_KEYWORDS = frozenset(
    "alias array atomic bitcast bool break case const const_assert continue continuing default"
    " diagnostic discard else enable f16 f32 false fn for function groups i32 if let loop local_id"
    " group_id override private ptr read return sizes storage struct switch texture true u32"
    " uniform var vec2 vec3 vec4 while workgroup write max min round select dot4 nearest"
    " negate_bytes spread1 pack_bytes load_u8 load_i8 load_u16 load_u32 load_f16 f32_bits bits_f32"
    " new self this".split()
)


_CODEBOOK = codebook_argument("u32")


def _with_codebook(walk: Walk) -> Walk:
    """A walk of what reads weights takes a format's long table as an argument: a constant array
    becomes one of each thread with some drivers."""
    if walk.op == "attention":
        return dataclasses.replace(
            walk,
            operands=lambda kind: (*walk.operands(kind), *_CODEBOOK(kind)),
            steps=lambda kind, config: _looking_up(kind, walk.steps(kind, config)),
        )
    if not any(a.name == "w" for a in walk.arguments):
        return walk
    return dataclasses.replace(walk, operands=_CODEBOOK)


def _looking_up(kind: Attention, steps: AttentionSteps) -> AttentionSteps:
    """The same with codes that come from the argument."""

    def change(one: MemorySteps) -> MemorySteps:
        codes = None if one.codes is None else in_codebook(kind, one.codes)
        return dataclasses.replace(one, codes=codes)

    return dataclasses.replace(steps, k=change(steps.k), v=change(steps.v))


TARGET = Target(
    name="wgsl",
    description="WGSL for WebGPU",
    suffix=".wgsl",
    walks=(
        *map(_with_codebook, simt.walks() + simt_attention.walks()),
        *simt_maps.walks(),
    ),
    dialects={"memory": MEMORY},
    capabilities=Capabilities(max_threads=256, shared_bytes=16384),
    templates=(simt.TEMPLATES,),
    globals=simt_attention.GLOBALS
    | simt_maps.GLOBALS
    | simt.template_globals(WgslWords())
    | {"words": "words.wgsl"},
    reserved=simt.RESERVED | simt_attention.RESERVED | simt_maps.RESERVED | _KEYWORDS,
    feature_names={
        "fp16": "shader-f16",
        "dot": "packed_4x8_integer_dot_product",
    },
)

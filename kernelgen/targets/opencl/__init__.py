"""The OpenCL target: OpenCL C 1.2, through pyopencl."""

from __future__ import annotations

from kernelgen.config import Capabilities
from kernelgen.targets import simt, simt_attention, simt_maps
from kernelgen.targets.base import Target
from kernelgen.targets.opencl.dialect import MEMORY, OpenCLWords

_KEYWORDS = frozenset(
    "auto bool break case char const constant continue default do double else enum extern float"
    " for global goto half if inline int kernel local long private register restrict return short"
    " signed sizeof static struct switch typedef uchar uint ulong union unsigned ushort void"
    " volatile while min max rint bytes dot4 lookup nearest negate_bytes spread1".split()
)

TARGET = Target(
    name="opencl",
    description="OpenCL C 1.2",
    suffix=".cl",
    walks=simt.walks() + simt_attention.walks() + simt_maps.walks(),
    dialects={"memory": MEMORY},
    capabilities=Capabilities(max_threads=256, shared_bytes=32768),
    templates=(simt.TEMPLATES,),
    globals=simt_attention.GLOBALS
    | simt_maps.GLOBALS
    | simt.template_globals(OpenCLWords())
    | {"words": "words.cl"},
    variants=("emulated",),
    reserved=simt.RESERVED | simt_attention.RESERVED | simt_maps.RESERVED | _KEYWORDS,
    feature_names={
        "fp16": "",
        "subgroups": "cl_khr_subgroups",
        "dot": "cl_khr_integer_dot_product",
    },
)

"""The CUDA target: CUDA C++, through cupy and NVRTC."""

from __future__ import annotations

from kernelgen.config import Capabilities
from kernelgen.targets import simt
from kernelgen.targets.base import Target
from kernelgen.targets.cuda.dialect import MEMORY, CudaWords

_KEYWORDS = frozenset(
    "alignas auto bool break case catch char class const constexpr continue default delete do"
    " double else enum explicit export extern false float for friend goto if inline int long"
    " mutable namespace new operator private protected public register return short signed sizeof"
    " static struct switch template this throw true try typedef typename union unsigned using"
    " virtual void volatile while bytes dot4 lookup max min nearest rintf spread1 i32 u32 f32"
    " blockDim blockIdx gridDim threadIdx warpSize u16_bytes u16_aligned u32_aligned u32_halves"
    " u32_bytes f16_to_f32".split()
)

TARGET = Target(
    name="cuda",
    description="CUDA C++",
    suffix=".cu",
    walks=simt.walks(),
    dialects={"memory": MEMORY},
    capabilities=Capabilities(max_threads=1024, shared_bytes=49152, features=frozenset({"dot"})),
    templates=(simt.TEMPLATES,),
    globals=simt.template_globals(CudaWords()) | {"words": "words.cu"},
    variants=("emulated",),
    reserved=simt.RESERVED | _KEYWORDS,
)

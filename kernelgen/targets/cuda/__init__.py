"""The CUDA target: CUDA C++, through cupy and NVRTC."""

from __future__ import annotations

from kernelgen.config import Capabilities
from kernelgen.targets import simt, simt_attention, simt_maps
from kernelgen.targets.base import Target
from kernelgen.targets.cuda import attention, walks, wide
from kernelgen.targets.cuda.dialect import MEMORY, CudaWords, parameters

_KEYWORDS = frozenset(
    "alignas auto bool break case catch char class const constexpr continue default delete do"
    " double else enum explicit export extern false float for friend goto if inline int long"
    " mutable namespace new operator private protected public register return short signed sizeof"
    " static struct switch template this throw true try typedef typename union unsigned using"
    " virtual void volatile while bytes dot4 lookup max min nearest rintf negate_bytes"
    " spread1 i32 u32 f32"
    " blockDim blockIdx gridDim threadIdx warpSize u16_bytes u16_aligned u32_aligned u32_halves"
    " CHUNK DEPTH PAD SLABS SLAB_BLOCKS SLAB_GROUPS STAGES STEPS SUMS TILE_BYTES WARP_N X_BLOCKS"
    " X_BYTES X_GROUPS X_PIECES a acc arrived b both code_value column copies_end copy16 copy4"
    " copy8 count counters dot eight end f16_to_f32 first_row first_slab from halves inside"
    " is_last k16 k32 k64 k_bytes lane last load load_matrices multiply multiply16 multiply32"
    " piece place_x quad row_blocks row_offset row_scale rows scales shared shared_address"
    " shared_w shared_xd shared_xs slab slabs_k stage stage_xd stage_xs step steps sum tile"
    " tile_x tiles_m tiles_n to u32_bytes unit units value warp words xd2 xh xs2"
    " GROUPS by code_halves fma2 four item loaded multiply2 other part products sum2 total wide0"
    " wide1 wide2 wide3".split()
)

#: what compute capability 8.6 and all later ones have
CAPABILITIES = Capabilities(
    max_threads=1024,
    shared_bytes=49152,
    launch_bytes=101376,
    features=frozenset({"half2", "dot", "mma"}),
)

# half precision is for tensor cores
_SHARED = tuple(one for one in simt.walks() if one.precision != "fp16")

TARGET = Target(
    name="cuda",
    description="CUDA C++",
    suffix=".cu",
    walks=(
        *walks.walks(_SHARED),
        *simt_attention.walks(),
        *attention.walks(),
        *simt_maps.walks(),
    ),
    dialects={"memory": MEMORY},
    capabilities=CAPABILITIES,
    templates=(simt.TEMPLATES,),
    globals=simt_attention.GLOBALS
    | attention.GLOBALS
    | simt_maps.GLOBALS
    | simt.template_globals(CudaWords())
    | {
        "words": "words.cu",
        "parameters": parameters,
        "shape": walks.shape,
        "half_type": walks.HALF_TYPE,
        "pad": walks.PAD,
        "pad_m": walks.PAD_M,
        "floats": walks.floats,
        "operands": walks.operands,
        "half_word": walks.half_word,
        "code_center": walks.code_center,
        "wide_codes": wide.wide_codes,
        "code_shift": walks.code_shift,
    },
    variants=("emulated",),
    reserved=(
        simt.RESERVED
        | simt_attention.RESERVED
        | simt_maps.RESERVED
        | attention.RESERVED
        | _KEYWORDS
    ),
)

"""The C target: C11 with vector words, threads by OpenMP; runs on any CPU gcc or clang know."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable

from kernelgen.config import (
    Capabilities,
    Config,
    FloatTileMatmulConfig,
    NoConfig,
    RowTileConfig,
    TileMatmulConfig,
)
from kernelgen.ir.block import BlockFormat
from kernelgen.ir.expr import F32, Field, WordTable, const
from kernelgen.ir.ranges import fits
from kernelgen.ir.steps import Steps, steps
from kernelgen.targets.base import Argument, Kernel, Target, Walk, integer_codes
from kernelgen.targets.c import maps
from kernelgen.targets.c.attention import WALKS as ATTENTION
from kernelgen.targets.c.attention import mentions
from kernelgen.targets.c.dialect import COLUMN, COLUMNS, LANES, RESULTS, ROWS, SCALAR
from kernelgen.targets.maps import GLOBALS as MAP_GLOBALS
from kernelgen.targets.printer import Printer

_SIZES = tuple(Argument(name, "size", "i64") for name in ("M", "N", "K"))
_WEIGHTS = Argument("w", "in", "u8", ("TILED_ROWS", "ROW_BYTES"))
_SYMBOLS = {
    "ROW_BYTES": "K / block * block_bytes",
    "TILED_ROWS": "N rounded up to whole tiles of LANES rows; <prepare>_bytes(N, K) / ROW_BYTES",
    "SCRATCH_BYTES": "<entry>_scratch(M, K)",
    "BLOCKS": "K / block",
    "GROUPS": "K / group",
}


#: what C and the templates call something; a format's field of that name gets an underscore
_RESERVED = frozenset(
    "ACT AHEAD B BITS_OF BLOCK BLOCKS BLOCK_BYTES BYTES BYTE_OF CENTER CHUNK CHUNKS CODE_ZERO "
    "COLUMNS COUNT D DEEP DEPTH DV FEW FOR FOR_FREE GROUP GROUPS H HK INFINITY INLINE K KEYS "
    "KEY_BYTES K_ROW_BYTES LANES LANE_IDS LINE M N NEVER NULL PACKED PADDED PAGE PAGES PAIR PAIRS "
    "PARALLEL PARALLEL_FOR PARTS PART_FLOATS QUERIES REST ROOM ROWS ROW_BYTES RUN S SCALE SEEDS "
    "SIGNED_BIAS SIGNED_CODES SPAN SPLIT_KEYS STEP STEPS STEPS_DEEP STORE_SUMS STREAMS SUM SUMS "
    "SUMS_OF T THREADS TILE TILE_BYTES TILE_DEPTH TILE_FLOATS TILE_STRIDE TOGETHER UNIT UNITS "
    "UNROLL UNROLLED_GROUPS UNROLL_GROUPS VALUE_BYTES VECTORS V_ROW_BYTES WEIGHED WEIGHED_STEPS "
    "WEIGHS WEIGHT_BYTES WHOLE WIDE WIDTH WORDS X_BYTES __builtin_prefetch a a_next abort "
    "above_seven abs abs_f32 activations add add_blocks add_packed add_values add_weighed admitted "
    "all all_admitted apart arguments at at_each auto b base batch before begin begun behind below "
    "beside bits_of bits_of_two bits_to_f32 blend_f32 blend_i32 blend_u32 block blocks break "
    "byte_of c calloc case char chunk clear_sums code codes column columns combine const continue "
    "cos count decode decode_keys decode_values default define describe do done dot dot_keys "
    "dot_pairs dot_signed dot_unsigned double each each_row else end ends entry enum erf even exp "
    "exp2_falling exp_f32 exp_falling extern f16_at f32_at f32_to_bits f32v fabsf factor factor_of "
    "fetch few few_rows finish finish_row finite first float floats for four free from g gather "
    "goto group groups h half head head_bytes heads held held_of hi hk i i16_at i16v i32v ids if "
    "in_order in_parts in_parts_beside inline int int16_t int32_t int64_t int8_t integer "
    "interleave j j0 k k0 k_from k_hi k_lo k_to key key_elements key_row keys kt l larger largest "
    "largest_lane largest_of last later least left line lines lines_of lo load_lanes load_u16 "
    "load_u32 log long lookup lookup_of lowest_seven m m0 magnitude malloc many many_rows memcpy "
    "memset mine more most multiply multiply_codes multiply_keys multiply_values n n0 n_to nearest "
    "nearest_half negate_bytes next none_admitted number odd odd_bytes of of_batch of_groups "
    "offset out own p pack pack_keys pack_row pack_span pack_values packed packed_here pairs "
    "pairs_of_rows part part0 part1 partial partial_seed parts place prefetch prefetch_far "
    "prefetch_written prepare products ptrdiff_t put put_words q q_hi q_lo quantize_block "
    "query_elements quiet r r0 register repacked rest restrict return rintf rounded row row_bytes "
    "row_of rows rows_and_span rows_f16 rows_f32 rows_i16 rows_i8 rows_together rows_u16 rows_u32 "
    "rows_u8 s scale scale_codes score scratch seed seeds short shrink signed signed_codes "
    "signed_lookup signed_lookup_of sin size_t sizeof some spans splat_f32 splat_i32 splat_u32 "
    "split splits spread spread1 spread1_of sqrt states static steps store store_bytes store_lanes "
    "store_sums streams stride struct sum sum_of_bytes sum_of_lanes sums sums_of sums_of_groups "
    "sums_of_pairs switch t tanh tanh_f32 tile tile_bytes tile_dot_bf16 tile_dot_int8 tile_load "
    "tile_load_once tile_of tile_store tile_zero tiles tiles_allowed tiles_begin tiles_end to "
    "to_f32 to_i32 to_nearest together top tops tops_of total totals turn turns typedef u u16_at "
    "u32_at u32v uint16_t uint32_t uint8_t uintptr_t union unit unit_of units unseen unsigned "
    "unsigned_to_f32 upper v value value_elements value_row values void volatile w weigh weigh_row "
    "weigh_rows weight weights while whole whole_bytes wide widen width with words x "
    "x2 xd xq xs y".split()
)


#: 255 * 127 * 65536 is below 2^31
_LARGEST_GROUP = 65536


def _integer_codes(fmt: BlockFormat) -> str | None:
    reason = integer_codes(fmt)
    if reason is None and fmt.group > _LARGEST_GROUP:
        return f"sums over groups of {fmt.group} may need more than 32 bits"
    return reason


#: products of so many bits are two bytes, of which one holds the lowest seven
_TWO_BYTES = 1 << 14


def _fills_tiles(fmt: BlockFormat) -> str | None:
    """Sums must be of many elements: to take one out of a tile costs as much as 64 of them."""
    reason = _integer_codes(fmt)
    if reason:
        return reason
    split = steps(fmt).split
    if split is None:
        few = f"sums over groups of {fmt.group} fill too little of a tile"
        return few if fmt.group < 32 else None
    largest = max(-split.lo, split.hi + 1)
    if largest > _TWO_BYTES:
        return f"products of codes and group integers reach {largest}, which two bytes do not hold"
    if largest * 127 * fmt.block >= 1 << 31:
        return f"sums over blocks of {fmt.block} may need more than 32 bits"
    return None


def weighs_blocks(found: Steps) -> bool:
    """Whether sums over a block of codes times group integers fit 32 bits, and integers 16."""
    split = found.split
    if split is None or not fits(split.integer, -(1 << 15), (1 << 15) - 1):
        return False
    return max(-split.lo, split.hi + 1) * 127 * found.fmt.block < 1 << 31


def _matmul(op: str, precision: str, style: str = "") -> Walk:
    """Rows of weights in the lanes of vectors, or, in style "tiles", on matrix units."""
    tiles = style == "tiles"
    config: type[Config] = RowTileConfig
    if tiles:
        config = TileMatmulConfig if precision == "int8" else FloatTileMatmulConfig
    integers = _fills_tiles if tiles else _integer_codes
    scratch = (Argument("scratch", "scratch", "u8", ("SCRATCH_BYTES",)),)
    return Walk(
        name=f"{style or 'row_tiles'}_{precision}",
        op=op,
        precision=precision,
        template=f"matmul_{'tiles_' * tiles}{precision}.c.j2",
        config=config,
        arguments=(
            Argument("x", "in", "f32", ("M", "K")),
            _WEIGHTS,
            Argument("y", "out", "f32", ("M", "N")),
            *(scratch if tiles or precision == "int8" else ()),
            *_SIZES,
        ),
        symbols=_SYMBOLS,
        features=("matrix",) * tiles,
        # up to 16 they gain nothing, and in bfloat16 up to 32 (docs/performance.md)
        least_rows=(32 if precision == "int8" else 64) if tiles else 0,
        # sums stay in tiles over whole rows, and what is rounded to 8 bits keeps its exponent
        instead_of=("int8",) if tiles and precision == "bf16" else (),
        applies=integers if precision == "int8" else lambda fmt: None,
        steps=_word_steps,
        needs=lambda config: ("prepare",) * (config.as_dict()["layout"] == "interleaved"),
        norms=tiles or precision == "int8",
        style=style,
    )


def _word_steps(fmt: BlockFormat, config: Config) -> Steps:
    return steps(fmt)


def _element_type(one: Field) -> str:
    """What a pointer to a field points at, in code that reads native blocks."""
    return {"i8": "int8_t", "u8": "uint8_t"}.get(one.storage.name, "uint8_t")


def _table_type(values: tuple[int, ...] | tuple[float, ...]) -> str:
    """The smallest type that holds a table; a lookup takes bytes of either sign."""
    if isinstance(values, WordTable):
        return "uint32_t"
    if any(isinstance(v, float) for v in values):
        return "float"
    lo, hi = min(values), max(values)
    if -128 <= lo and hi <= 127:
        return "int8_t"
    return "uint8_t" if 0 <= lo and hi <= 255 else "int32_t"


def _table(name: str, values: tuple[int, ...] | tuple[float, ...]) -> str:
    """The definition of a table; one of bytes has the 16 that a lookup reads."""
    count, numbers = max(len(values), 16), ", ".join(map(str, values))
    if len(values) > _ONE_LINE:
        lines = textwrap.wrap(numbers, 96)
        numbers = "".join(f"\n    {line}" for line in lines) + ",\n"
    return f"static const {_table_type(values)} {name}[{count}] = {{{numbers}}};"


def _scalar_f32(value: float) -> str:
    """A constant of C."""
    return Printer(SCALAR, str)(const(value, F32))


#: of longer tables the source has several lines
_ONE_LINE = 64

_C_TYPES = {
    "f32": "float", "u8": "uint8_t", "i8": "int8_t", "u16": "uint16_t", "i16": "int16_t",
    "f16": "uint16_t", "u32": "uint32_t", "i32": "int32_t", "i64": "int64_t",
}  # fmt: skip


def _parameters(kernel: Kernel) -> str:
    """The parameter list of a kernel's prototype."""
    return _parameters_of(kernel.arguments)


def _parameters_of(arguments: Iterable[Argument]) -> str:
    parts = []
    for one in arguments:
        pointer = "" if one.role == "size" else "*"
        const = "const " if one.role == "in" else ""
        parts.append(f"{const}{_C_TYPES[one.dtype]} {pointer}{one.name}")
    return ", ".join(parts)


TARGET = Target(
    name="c",
    description="C11 with SIMD words (AVX2, AVX-512, AMX, NEON, plain) and OpenMP",
    suffix=".c",
    walks=(
        Walk(
            "blocks", "dequantize", "", "dequantize.c.j2", NoConfig,
            (
                Argument("w", "in", "u8", ("COUNT", "block_bytes")),
                Argument("y", "out", "f32", ("COUNT", "block")),
                Argument("COUNT", "size", "i64"),
            ),
            contract=False,
        ),
        Walk(
            "blocks", "get_rows", "", "dequantize.c.j2", NoConfig,
            (
                Argument("w", "in", "u8", ("N", "ROW_BYTES")),
                Argument("ids", "in", "i64", ("ROWS",)),
                Argument("y", "out", "f32", ("ROWS", "K")),
                Argument("ROWS", "size", "i64"),
                Argument("K", "size", "i64"),
            ),
            symbols=_SYMBOLS,
            contract=False,
        ),
        Walk(
            "absmax", "quantize", "int8", "quantize.c.j2", NoConfig,
            (
                Argument("x", "in", "f32", ("M", "K")),
                Argument("q", "out", "i8", ("M", "K")),
                Argument("d", "out", "f32", ("M", "BLOCKS")),
                Argument("s", "out", "f32", ("M", "GROUPS")),
                Argument("M", "size", "i64"),
                Argument("K", "size", "i64"),
            ),
            symbols=_SYMBOLS,
            applies=_integer_codes,
            contract=False,
            norms=True,
        ),
        _matmul("matvec", "int8"),
        _matmul("matvec", "fp32"),
        _matmul("matmul", "int8", "tiles"),
        _matmul("matmul", "bf16", "tiles"),
        _matmul("matmul", "int8"),
        _matmul("matmul", "fp32"),
        Walk(
            "interleave", "prepare", "", "prepare.c.j2", NoConfig,
            (
                Argument("w", "in", "u8", ("N", "ROW_BYTES")),
                Argument("tiles", "out", "u8", ("TILED_ROWS", "ROW_BYTES")),
                Argument("N", "size", "i64"),
                Argument("K", "size", "i64"),
            ),
            symbols=_SYMBOLS,
        ),
        *ATTENTION,
        *maps.WALKS,
    ),
    dialects={
        "scalar": SCALAR, "rows": ROWS, "lanes": LANES, "results": RESULTS, "columns": COLUMNS,
        "column": COLUMN,
    },
    capabilities=Capabilities(lanes=8, registers=16),
    indexes=(("kernelgen.h.j2", "kernelgen.h"),),
    support_files=(
        "words.h", "words_avx2.h", "words_avx512.h", "words_neon.h", "words_plain.h",
        "words_flash.h", "words_tiles.h", "words_amx.h", "words_maps.h",
    ),
    globals={
        "c_types": _C_TYPES, "element_type": _element_type, "mentions": mentions,
        "parameters": _parameters, "parameters_of": _parameters_of, "scalar_f32": _scalar_f32,
        "table": _table, "table_type": _table_type, "weighs_blocks": weighs_blocks,
        **MAP_GLOBALS, **maps.GLOBALS,
    },
    reserved=_RESERVED | maps.RESERVED,
    # a process has to ask the system for tiles, which a library does only where a program wants it
    unpackaged=frozenset({"matrix"}),
    feature_names={"matrix": "amx_bf16"},
    variants=(
        "amx", "avx512gfni", "avx512vnni", "avx512", "avxvnni", "avx2", "neondot", "neon", "scalar",
    ),
)  # fmt: skip

"""What the targets with grids of threads share: their walks, in the words of each language.

A language gives `Words`: how a declaration, a loop, a barrier, the head of a kernel are spelt.
The templates are in templates/simt.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from kernelgen.config import (
    Config,
    DotMatvecConfig,
    DotTileConfig,
    HalfTileConfig,
    MatvecConfig,
    ThreadsConfig,
    TileConfig,
)
from kernelgen.ir.block import BlockFormat
from kernelgen.ir.expr import Expr, WordTable, call, number
from kernelgen.ir.layout import named_layout
from kernelgen.ir.ops.epilogue import Epilogue, RmsNorm
from kernelgen.ir.steps import MemorySteps, memory_steps
from kernelgen.targets.base import NY, Argument, Launch, Walk, integer_codes

#: folder of the shared templates
TEMPLATES = "simt"

#: groups along a dimension of a grid; what more there is, they do in a loop
MOST_GROUPS = 65535


class Words(Protocol):
    """The statements of a language.  Every method gives text without indentation."""

    def constant(self, name: str, value: int) -> str:
        """A u32 known when the kernel is compiled."""

    def table(self, name: str, values: tuple[int, ...] | tuple[float, ...]) -> str:
        """A table of numbers of `table_type(values)`, known when the kernel is compiled."""

    def kernel(
        self, entry: str, arguments: tuple[Argument, ...], threads: int,
        shared: Mapping[str, tuple[str, int]], features: tuple[str, ...],
    ) -> str:  # fmt: skip
        """The head of a kernel, up to its opening brace, with arrays in shared memory (name ->
        type, count); `thread`, `group_x`, `group_y`, `groups_x`, `groups_y` are u32 values after
        it.  With the feature "subgroups" so are `subgroup`, a number below `subgroups`, and
        `lane`, which is 0 in one thread of each."""

    def function(self, name: str, parameters: tuple[str, ...]) -> str:
        """The head of a function of f32 that gives an f32, up to its opening brace."""

    def let(self, dtype: str, name: str, value: str) -> str:
        """A value that does not change."""

    def var(self, dtype: str, name: str, value: str) -> str:
        """A variable."""

    def array(self, dtype: str, name: str, count: int) -> str:
        """An array of one thread, all zero."""

    def repeat(self, name: str, start: str | int, stop: str | int, step: str | int = 1) -> str:
        """The head of a loop over a u32, up to its opening brace."""

    def barrier(self) -> str:
        """All threads of a group meet, and see each other's shared memory."""


def table_type(values: tuple[int, ...] | tuple[float, ...]) -> str:
    """The type of a table's values: "u32", "f32", "i8" where they fit, else "i32"."""
    if isinstance(values, WordTable):
        return "u32"
    if any(isinstance(v, float) for v in values):
        return "f32"
    return "i8" if -128 <= min(values) and max(values) <= 127 else "i32"


def hex_words(values: Iterable[int]) -> str:
    """Words of a table, in lines."""
    listed = [f"0x{v:08X}u" for v in values]
    lines = [", ".join(listed[n : n + 8]) for n in range(0, len(listed), 8)]
    return "".join(f"\n    {line}," for line in lines) + "\n"


def _spread(bits: int) -> str:
    """Four fields of so many bits, one to each byte; two bits by products that do not overlap."""
    if bits == 2:
        return "((((({x}) & 255u) * 0x1001u) & 0x000F000Fu) * 65u) & 0x03030303u"
    fields = [f"(({{x}}) & {((1 << bits) - 1) << (bits * n)}u)" for n in range(4)]
    moved = [f"({one} << {(8 - bits) * n}u)" if n else one for n, one in enumerate(fields)]
    return f"({' | '.join(moved)})"


#: words of operations that all these languages spell alike
SPREADS: Mapping[str, str] = {
    **{f"spread{bits}": f"({_spread(bits)})" for bits in range(2, 8)}, "spread8": "({x})",
}  # fmt: skip

_SIZES = ("M", "N", "K")
#: what the names in shapes mean
SYMBOLS = {
    "ROW_BYTES": "K // block * block_bytes",
    "BLOCKS": "K // block",
    "GROUPS": "K // group",
    "WORDS": "K // 4",
}
WEIGHTS = Argument("w", "in", "u8", ("N", "ROW_BYTES"))
#: quantized activations, as an op takes them
QUANTIZED = (
    Argument("xq", "in", "u32", ("M", "WORDS")),
    Argument("xd", "in", "f32", ("M", "BLOCKS")),
    Argument("xs", "in", "f32", ("M", "GROUPS")),
)


def sizes(*names: str) -> tuple[Argument, ...]:
    """Arguments that are sizes."""
    return tuple(Argument(name, "size", "u32") for name in names)


def _steps(fmt: BlockFormat, config: Config) -> MemorySteps:
    return memory_steps(fmt, named_layout(str(getattr(config, "layout", "native"))))


def chunk(fmt: BlockFormat) -> int:
    """Elements along k that an integer tile takes at once: all in one group, at most 32."""
    return math.gcd(fmt.group, 32)


def span(config: TileConfig, fmt: BlockFormat, words: int) -> int:
    """Words of a row that a thread decodes for a tile of `words` words a row: as many as leave work
    for all threads, as what they share, such as a scale, is then decoded once."""
    return max(1, min(chunk(fmt) // 4, config.tile_n * words // config.threads))


def _tile_launch(config: Config, fmt: BlockFormat) -> Launch:
    assert isinstance(config, TileConfig)
    groups = (f"-(-N // {config.tile_n})", f"-(-M // {config.tile_m})")
    return Launch(groups, config.threads)


def _matvec_launch(config: Config, fmt: BlockFormat) -> Launch:
    assert isinstance(config, MatvecConfig)
    groups = f"min(-(-N // {config.rows}), {MOST_GROUPS})"
    return Launch((groups, f"-(-M // {config.columns})"), config.threads)


def _rows_launch(config: Config, fmt: BlockFormat) -> Launch:
    assert isinstance(config, ThreadsConfig)
    items = 1 if fmt.float_codes else 4
    groups = (f"-(-K // {items * config.threads})", f"min(ROWS, {MOST_GROUPS})")
    return Launch(groups, config.threads)


def _quantize_launch(config: Config, fmt: BlockFormat) -> Launch:
    assert isinstance(config, ThreadsConfig)
    groups = f"min(-(-M * (K // {fmt.block}) // {config.threads}), {MOST_GROUPS})"
    return Launch((groups, "1"), config.threads)


def _matmul(op: str, precision: str, template: str, config: type[Config], launch: Any) -> Walk:
    inputs = QUANTIZED if precision == "int8" else (Argument("x", "in", "f32", ("M", "K")),)
    return Walk(
        name=f"{op}_{precision}",
        op=op,
        precision=precision,
        template=template,
        config=config,
        arguments=(WEIGHTS, *inputs, Argument("y", "out", "f32", ("M", "N")), *sizes(*_SIZES)),
        symbols=SYMBOLS,
        features=("fp16",) if precision == "fp16" else (),
        applies=integer_codes if precision == "int8" else lambda fmt: None,
        steps=_steps,
        launch=launch,
        needs=lambda config: ("quantize",) * (precision == "int8"),
        pairs=even_rows if issubclass(config, TileConfig) else lambda config: None,
    )


def walks() -> tuple[Walk, ...]:
    """The walks that every language with grids of threads has."""
    result = [
        Walk(
            name="words",
            op=op,
            precision="",
            template="get_rows.j2",
            config=ThreadsConfig,
            arguments=(
                WEIGHTS,
                *((Argument("ids", "in", "u32", ("ROWS",)),) if op == "get_rows" else ()),
                Argument("y", "out", "f32", ("ROWS", "K")),
                # of all N rows, decode ROWS from START on, as a result may have to come in pieces
                *sizes(*(("START",) if op == "dequantize" else ()), "ROWS", "N", "K"),
            ),
            symbols=SYMBOLS,
            contract=False,
            steps=_steps,
            launch=_rows_launch,
        )
        for op in ("dequantize", "get_rows")
    ]
    result.append(
        Walk(
            name="absmax",
            op="quantize",
            precision="int8",
            template="quantize.j2",
            config=ThreadsConfig,
            arguments=(
                Argument("x", "in", "f32", ("M", "K")),
                Argument("xq", "out", "u32", ("M", "WORDS")),
                Argument("xd", "out", "f32", ("M", "BLOCKS")),
                Argument("xs", "out", "f32", ("M", "GROUPS")),
                *sizes("M", "K"),
            ),
            symbols=SYMBOLS,
            applies=integer_codes,
            contract=False,
            steps=_steps,
            launch=_quantize_launch,
            norms=True,
        )
    )
    for precision, config in (("int8", DotMatvecConfig), ("fp32", MatvecConfig)):
        result.append(_matmul("matvec", precision, "matvec.j2", config, _matvec_launch))
    result.append(_matmul("matmul", "int8", "matmul_int8.j2", DotTileConfig, _tile_launch))
    for precision, tile in (("fp32", TileConfig), ("fp16", HalfTileConfig)):
        result.append(_matmul("matmul", precision, "matmul_float.j2", tile, _tile_launch))
    return tuple(result)


#: names that the templates use; a format's field of that name gets an underscore
RESERVED = frozenset(
    "ACT BLOCK COLUMNS DEPTH GROUP ITEMS K M N ROWS START STEP THREADS THREAD_M THREAD_N TILE_M"
    " TILE_N WORDS acc at block blocks bits byte c code codebook codes column d dot element factor"
    " finite first first_m first_n from_half g group group_x group_y groups_x groups_y half i"
    " ids index item j k k0 l lane largest m m0 magnitude n offset part place q q0 q1 q2 q3 r"
    " rounded row row0 s scale second sum subgroup subgroup_sum subgroups swap t thread to_half"
    " top total u value value0 value1 value2 value3 values w wo word wq ws wt x xd xdt xq xqt xs"
    " xst xt y".split()
)


def byte(word: str, lane: int, signed: bool) -> str:
    """Byte `lane` of a u32 as an i32."""
    if signed:
        shifted = f"{word} << {24 - 8 * lane}u" if lane < 3 else word
        return f"(i32({shifted}) >> 24u)"
    shifted = f"({word} >> {8 * lane}u)" if lane else word
    return f"i32({shifted} & 255u)"


def narrow(value: str, dtype: str) -> str:
    """An f32 as a number of the type that an array in shared memory has."""
    return f"to_half({value})" if dtype == "f16" else value


def wide(value: str, dtype: str) -> str:
    """The inverse of `narrow`."""
    return f"from_half({value})" if dtype == "f16" else value


def each(indent: int, count: int | Iterable[int], text: str) -> str:
    """Statements: `text` for # = 0, 1, ... or other numbers, as many in a line as fit it."""
    lines = [""]
    for n in range(count) if isinstance(count, int) else count:
        one = text.replace("#", str(n))
        if lines[-1] and indent + len(lines[-1]) + 1 + len(one) > 100:
            lines.append("")
        lines[-1] += " " * bool(lines[-1]) + one
    return "\n".join(" " * indent + line for line in lines)


def finished(epilogue: Epilogue | None, sums: str, m: str, n: str) -> str:
    """What is stored of sums (several with commas) as result (m, n)."""
    if epilogue is None:
        return sums
    width = NY if epilogue.gated else "N"
    places = {"": "0", "n": n, "m": m, "mn": f"{m} * {width} + {n}"}
    read = [f"{one.name}[{places[one.axes]}]" for one in epilogue.operands]
    return f"finish({', '.join([sums, *read])})"


def one_over_rms(norm: RmsNorm) -> Expr:
    """What a row is multiplied by, whose sum of squares is in `part[0]`."""
    return call("rsqrt", number("part[0]") / number("f32(K)") + norm.eps)


def even_rows(config: Config) -> str | None:
    """Why no thread of a tile has two rows that lie side by side, or None."""
    assert isinstance(config, TileConfig)
    return "a thread has one row of weights; thread_n must be even" if config.thread_n % 2 else None


def template_globals(words: Words) -> dict[str, Any]:
    """What the templates may call, beside the printer."""
    names = ("constant", "table", "kernel", "function", "let", "var", "array", "repeat", "barrier")
    return {name: getattr(words, name) for name in names} | {
        "byte": byte, "chunk": chunk, "each": each, "finished": finished, "narrow": narrow,
        "one_over_rms": one_over_rms, "span": span, "wide": wide,
    }  # fmt: skip

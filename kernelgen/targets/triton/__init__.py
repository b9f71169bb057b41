"""The Triton target: modules with one `@triton.jit` kernel each."""

from __future__ import annotations

import textwrap

from kernelgen.config import (
    Capabilities,
    Config,
    ProgramBlocksConfig,
    ProgramConfig,
    ProgramDotMatvecConfig,
    ProgramDotTileConfig,
    ProgramHalfTileConfig,
    ProgramMatvecConfig,
    ProgramRowsConfig,
    ProgramTileConfig,
)
from kernelgen.ir.block import BlockFormat
from kernelgen.ir.expr import Expr, walk
from kernelgen.ir.layout import named_layout
from kernelgen.targets.base import Argument, Launch, Subject, Target, Walk, integer_codes
from kernelgen.targets.codebook import codebook_argument
from kernelgen.targets.printer import prose, statement
from kernelgen.targets.triton import attention, maps
from kernelgen.targets.triton.dialect import POSITIONS, TENSORS, TILES, UNROLLED
from kernelgen.targets.triton.steps import WARP, TensorSteps, padded, tensor_steps

#: groups of a block that a loop is unrolled over at most
MOST_UNROLLED = 32

_SYMBOLS = {
    "ROW_BYTES": "K // block * block_bytes",
    "BLOCKS": "K // block",
    "GROUPS": "K // group",
}
_W = Argument("w", "in", "u8", ("N", "ROW_BYTES"))
_X = Argument("x", "in", "f32", ("M", "K"))


def _quantized(role: str) -> tuple[Argument, ...]:
    return (
        Argument("xq", role, "i8", ("M", "K")),
        Argument("xd", role, "f32", ("M", "BLOCKS")),
        Argument("xs", role, "f32", ("M", "GROUPS")),
    )


def _sizes(*names: str) -> tuple[Argument, ...]:
    return tuple(Argument(name, "size", "i32") for name in names)


# ---- sizes of tensors, which are powers of two ------------------------------------------------


def groups_of(elements: int, fmt: BlockFormat, least: int = 1) -> int:
    """Groups, filled up to powers of two, of about so many elements, and not fewer than `least`;
    elements themselves where they are floats."""
    if fmt.float_codes:
        return elements
    return max(1, max(elements, least) // padded(fmt.group))


def items_of(config: ProgramBlocksConfig, fmt: BlockFormat) -> int:
    """Blocks of activations that a program quantizes."""
    return max(1, config.elements // (padded(fmt.group) * padded(fmt.groups)))


def depth_of(config: ProgramDotTileConfig, fmt: BlockFormat) -> int:
    """Elements of a group that are multiplied at once; matrix units take 16 or more."""
    return min(config.depth, max(16, padded(fmt.group)))


def unrolls(config: ProgramDotTileConfig, fmt: BlockFormat) -> bool:
    """Whether the groups of a block are unrolled; where there is one, there is no loop."""
    return fmt.groups == 1 or (config.unroll and fmt.groups <= MOST_UNROLLED)


# ---- text -------------------------------------------------------------------------------------

_DTYPES = {
    "u8": "uint8", "i8": "int8", "i16": "int16", "f16": "float16", "i32": "int32", "f32": "float32",
}  # fmt: skip


def _meaning(one: Argument, fmt: Subject) -> str:
    """What an argument's shape or content means, behind its declaration."""
    if one.role == "table":
        whose = f" of {fmt.name}" if isinstance(fmt, BlockFormat) else ""
        return f": four codes{whose} each (tables in the manifest)"
    if not isinstance(fmt, BlockFormat):
        return ""
    if one.name == "w":
        return f", ROW_BYTES = K / {fmt.block} * {fmt.nbytes}" if fmt.block > 1 else ""
    if one.name == "xd":
        return f", BLOCKS = K / {fmt.block}: x is about xd * xq"
    if one.name == "xs":
        return f", GROUPS = K / {fmt.group}: sums of xq"
    return ""


def _unbiased(bias: int) -> str:
    """The code without its bias."""
    if not bias:
        return "code"
    return f"(code.to(tl.int32) {'-' if bias > 0 else '+'} {abs(bias)})"


def _whole_offset(steps: TensorSteps) -> str:
    """What is added to scale * code for each element of a group, bias included, as a factor."""
    biased = f"{-steps.bias}.0"
    if steps.scale is not None:
        biased = f"scale * {biased}"
    if steps.offset is None:
        return biased
    return f"({biased} + offset)" if steps.bias else "offset"


def _bracketed(text: str) -> str:
    """A sum as an operand of another, or of a product."""
    return f"({text})" if " + " in text else text


def _factor(text: str) -> str:
    """A product as a factor: its numbers are multiplied first, by one thread."""
    return text if text.isidentifier() else f"({text})"


def _sum_of(*terms: str) -> str:
    """Terms that are not zero, added."""
    some = " + ".join(t for t in terms if t != "0")
    return f"({some})" if " + " in some else some or "0"


def _counts_rows(steps: TensorSteps) -> bool:
    """Whether a field's place depends on the number of rows."""
    return any(
        n.op == "var" and n.attr[0] == "count" for p in steps.pointers for n in walk(p.begin)
    )


def _bare(text: str) -> str:
    """Without the brackets around the whole."""
    return text[1:-1] if text.startswith("(") and text.endswith(")") else text


def _dense(steps: TensorSteps) -> bool:
    """Whether the codes have all axes: they differ, or could, from word to word of any group."""
    seen = {n.attr[0] for e in _used(steps) for n in walk(e) if n.op == "var"}
    return {"j"} | ({"g"} if steps.fmt.groups > 1 else set()) <= seen


def _used(steps: TensorSteps) -> tuple[Expr, ...]:
    codes = () if steps.codes is None else (steps.codes,)
    return (*codes, *(word for _, word in steps.words))


def _parameters(arguments: tuple[Argument, ...], indent: int) -> str:
    """Names of arguments, in lines that are not too long."""
    names, margin = ", ".join(a.name for a in arguments), " " * indent
    return textwrap.fill(names, 99, initial_indent=margin, subsequent_indent=margin)


def _head(entry: str, arguments: tuple[Argument, ...]) -> str:
    """The line, or lines, that begin a function."""
    line = f"def {entry}({', '.join(a.name for a in arguments)}):"
    return line if len(line) <= 100 else f"def {entry}(\n{_parameters(arguments, 4)},\n):"


# ---- walks ------------------------------------------------------------------------------------


def _steps(fmt: BlockFormat, config: Config) -> TensorSteps:
    assert isinstance(config, ProgramConfig)
    unrolled = isinstance(config, ProgramDotTileConfig) and unrolls(config, fmt)
    return tensor_steps(fmt, named_layout(config.layout), unrolled)


def _threads(config: Config) -> int:
    assert isinstance(config, ProgramConfig)
    return WARP * config.warps


def _quantize_launch(config: Config, fmt: BlockFormat) -> Launch:
    assert isinstance(config, ProgramBlocksConfig)
    groups = f"-(-(M * (K // {fmt.block})) // {items_of(config, fmt)})"
    return Launch((groups, "1"), _threads(config))


def _product_launch(config: Config, fmt: BlockFormat) -> Launch:
    if isinstance(config, ProgramMatvecConfig):
        n, m = config.rows, config.columns
    else:
        assert isinstance(config, ProgramHalfTileConfig | ProgramDotTileConfig)
        n, m = config.tile_n, config.tile_m
    return Launch((f"-(-N // {n})", f"-(-M // {m})"), _threads(config))


def _pairs(config: Config) -> str | None:
    """Why a program has not both rows of a pair, or None."""
    if isinstance(config, ProgramMatvecConfig) and config.rows % 2:
        return "a program has one row of weights; rows must be even"
    return None


def _rows(op: str, count: str) -> Walk:
    def launch(config: Config, fmt: BlockFormat) -> Launch:
        assert isinstance(config, ProgramRowsConfig)
        elements = groups_of(config.elements, fmt) * (1 if fmt.float_codes else fmt.group)
        groups = (f"-(-{count} // {config.rows})", f"-(-K // {elements})")
        return Launch(groups, _threads(config))

    ids = (Argument("ids", "in", "i32", ("ROWS",)),) if op == "get_rows" else ()
    sizes = _sizes("ROWS", "N", "K") if op == "get_rows" else _sizes("N", "K")
    return Walk(
        name="tensors", op=op, precision="", template="get_rows.py.j2", config=ProgramRowsConfig,
        arguments=(_W, *ids, Argument("y", "out", "f32", (count, "K")), *sizes),
        symbols=_SYMBOLS, contract=False, steps=_steps, launch=launch,
        operands=codebook_argument("i32"),
    )  # fmt: skip


def _product(op: str, precision: str, template: str, config: type[Config]) -> Walk:
    inputs = _quantized("in") if precision == "int8" else (_X,)
    result = Argument("y", "out", "f32", ("M", "N"))
    return Walk(
        name=f"{op}_{precision}", op=op, precision=precision, template=template, config=config,
        arguments=(_W, *inputs, result, *_sizes("M", "N", "K")), symbols=_SYMBOLS,
        applies=integer_codes if precision == "int8" else lambda fmt: None,
        steps=_steps, launch=_product_launch,
        needs=lambda config: ("quantize",) * (precision == "int8"), pairs=_pairs,
        operands=codebook_argument("i32"),
    )  # fmt: skip


TARGET = Target(
    name="triton",
    description="Triton modules, for GPUs through torch",
    suffix=".py",
    walks=(
        _rows("dequantize", "N"),
        _rows("get_rows", "ROWS"),
        Walk(
            name="absmax", op="quantize", precision="int8", template="quantize.py.j2",
            config=ProgramBlocksConfig, arguments=(_X, *_quantized("out"), *_sizes("M", "K")),
            symbols=_SYMBOLS, applies=integer_codes, contract=False, steps=_steps,
            launch=_quantize_launch, norms=True,
        ),
        _product("matvec", "int8", "matvec.py.j2", ProgramDotMatvecConfig),
        _product("matvec", "fp32", "matvec.py.j2", ProgramMatvecConfig),
        _product("matmul", "int8", "matmul_int8.py.j2", ProgramDotTileConfig),
        _product("matmul", "fp32", "matmul_float.py.j2", ProgramTileConfig),
        _product("matmul", "fp16", "matmul_float.py.j2", ProgramHalfTileConfig),
        *attention.WALKS,
        *maps.WALKS,
    ),
    dialects={"tensors": TENSORS, "numbers": UNROLLED, "positions": POSITIONS, "tiles": TILES},
    capabilities=Capabilities(shared_bytes=65536),
    globals={
        "bare": _bare, "bracketed": _bracketed, "counts_rows": _counts_rows, "dense": _dense,
        "depth_of": depth_of, "dtypes": _DTYPES, "factor": _factor, "groups_of": groups_of,
        "head": _head, "parameters": _parameters,
        "items_of": items_of, "meaning": _meaning, "padded": padded, "prose": prose,
        "statement": statement, "sum_of": _sum_of, "unbiased": _unbiased, "unrolls": unrolls,
        "whole_offset": _whole_offset, **attention.GLOBALS, **maps.GLOBALS,
    },
    reserved=attention.RESERVED | maps.RESERVED,
)  # fmt: skip

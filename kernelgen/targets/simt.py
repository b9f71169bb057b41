"""What the targets with grids of threads share: their walks, in the words of each language.

A language gives `Words`: how a declaration, a loop, a barrier, the head of a kernel are spelt.
The templates are in templates/simt.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Protocol

from kernelgen.config import Config, MatvecConfig, ThreadsConfig, TileConfig
from kernelgen.ir.block import BlockFormat
from kernelgen.ir.layout import named_layout
from kernelgen.ir.steps import MemorySteps, memory_steps
from kernelgen.targets.base import Argument, Launch, Walk

#: folder of the shared templates
TEMPLATES = "simt"

#: rows of a grid's second dimension; more are done in a loop
MOST_GROUPS = 65535


class Words(Protocol):
    """The statements of a language.  Every method gives text without indentation."""

    def constant(self, name: str, value: int) -> str:
        """A u32 known when the kernel is compiled."""

    def table(self, name: str, values: tuple[int, ...]) -> str:
        """A table of signed bytes, known when the kernel is compiled."""

    def kernel(
        self, entry: str, arguments: tuple[Argument, ...], threads: int,
        shared: Mapping[str, tuple[str, int]],
    ) -> str:  # fmt: skip
        """The head of a kernel, up to its opening brace, with arrays in shared memory (name ->
        type, count); `thread`, `group_x`, `group_y`, `groups_y` are u32 values after it."""

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


_SIZES = ("M", "N", "K")
_SYMBOLS = {
    "ROW_BYTES": "K // block * block_bytes",
    "BLOCKS": "K // block",
    "GROUPS": "K // group",
    "WORDS": "K // 4",
}
_W = Argument("w", "in", "u8", ("N", "ROW_BYTES"))


def _sizes(*names: str) -> tuple[Argument, ...]:
    return tuple(Argument(name, "size", "u32") for name in names)


def integer_codes(fmt: BlockFormat) -> str | None:
    """Why a format has no integer dot product, or None."""
    if fmt.float_codes:
        return f"elements of {fmt.name} are floats, which have no integer dot product"
    return None


def _steps(fmt: BlockFormat, config: Config) -> MemorySteps:
    return memory_steps(fmt, named_layout(str(getattr(config, "layout", "native"))))


def chunk(fmt: BlockFormat) -> int:
    """Elements along k that an integer tile takes at once: all in one group, at most 32."""
    return math.gcd(fmt.group, 32)


def _tile_launch(config: Config, fmt: BlockFormat) -> Launch:
    assert isinstance(config, TileConfig)
    groups = (f"-(-N // {config.tile_n})", f"-(-M // {config.tile_m})")
    return Launch(groups, config.threads)


def _matvec_launch(config: Config, fmt: BlockFormat) -> Launch:
    assert isinstance(config, MatvecConfig)
    return Launch((f"-(-N // {config.rows})", f"-(-M // {config.columns})"), config.threads)


def _rows_launch(rows: str) -> Any:
    def launch(config: Config, fmt: BlockFormat) -> Launch:
        assert isinstance(config, ThreadsConfig)
        items = 1 if fmt.float_codes else 4
        return Launch(
            (f"-(-K // {items * config.threads})", f"min({rows}, {MOST_GROUPS})"), config.threads
        )

    return launch


def _quantize_launch(config: Config, fmt: BlockFormat) -> Launch:
    assert isinstance(config, ThreadsConfig)
    return Launch((f"-(-M * (K // {fmt.block}) // {config.threads})", "1"), config.threads)


def _matmul(op: str, precision: str, template: str, config: type[Config], launch: Any) -> Walk:
    inputs = (
        (Argument("x", "in", "f32", ("M", "K")),)
        if precision == "fp32"
        else (
            Argument("xq", "in", "u32", ("M", "WORDS")),
            Argument("xd", "in", "f32", ("M", "BLOCKS")),
            Argument("xs", "in", "f32", ("M", "GROUPS")),
        )
    )
    return Walk(
        name=f"{op}_{precision}",
        op=op,
        precision=precision,
        template=template,
        config=config,
        arguments=(_W, *inputs, Argument("y", "out", "f32", ("M", "N")), *_sizes(*_SIZES)),
        symbols=_SYMBOLS,
        applies=integer_codes if precision == "int8" else lambda fmt: None,
        steps=_steps,
        launch=launch,
        needs=lambda config: ("quantize",) * (precision == "int8"),
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
                _W,
                *((Argument("ids", "in", "u32", ("ROWS",)),) if op == "get_rows" else ()),
                Argument("y", "out", "f32", (rows, "K")),
                *_sizes(*(("ROWS",) if op == "get_rows" else ()), "N", "K"),
            ),
            symbols=_SYMBOLS,
            contract=False,
            steps=_steps,
            launch=_rows_launch(rows),
        )
        for op, rows in (("dequantize", "N"), ("get_rows", "ROWS"))
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
                *_sizes("M", "K"),
            ),
            symbols=_SYMBOLS,
            applies=integer_codes,
            contract=False,
            steps=_steps,
            launch=_quantize_launch,
        )
    )
    for precision in ("int8", "fp32"):
        result.append(_matmul("matvec", precision, "matvec.j2", MatvecConfig, _matvec_launch))
        result.append(
            _matmul("matmul", precision, f"matmul_{precision}.j2", TileConfig, _tile_launch)
        )
    return tuple(result)


#: names that the templates use; a format's field of that name gets an underscore
RESERVED = frozenset(
    "ACT BLOCK COLUMNS DEPTH GROUP K M N ROWS STEP THREADS THREAD_M THREAD_N TILE_M TILE_N WORDS"
    " acc at block blocks bits byte c code codes column d dot element factor g group_x group_y"
    " groups_y i ids index item j k k0 l largest m magnitude n offset part place q r row row0 m0"
    " rounded s scale sum swap t thread top total u value values w word ws wo wt x xd xq xs xt y"
    " xdt xst xqt wq first second".split()
)


def template_globals(words: Words) -> dict[str, Any]:
    """What the templates may call, beside the printer."""
    names = ("constant", "table", "kernel", "let", "var", "array", "repeat", "barrier")
    return {name: getattr(words, name) for name in names} | {"chunk": chunk}

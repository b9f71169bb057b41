"""What the targets with grids of threads share: words, configurations, division."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import numpy as np
import pytest

from kernelgen.config import (
    Capabilities,
    Config,
    DotMatvecConfig,
    DotTileConfig,
    HalfTileConfig,
    MatvecConfig,
    ThreadsConfig,
    TileConfig,
)
from kernelgen.ir import const, formats, var
from kernelgen.ir.evaluate import evaluate
from kernelgen.ir.expr import I32, U32, Expr, spread, walk
from kernelgen.ir.ranges import interval
from kernelgen.problem import tolerance
from kernelgen.targets import simt
from kernelgen.targets.printer import Dialect, Printer

CONFIGS = (ThreadsConfig, MatvecConfig, DotMatvecConfig, TileConfig, HalfTileConfig, DotTileConfig)
#: what WebGPU promises everywhere
LEAST = Capabilities(max_threads=256, shared_bytes=16384)
MOST = Capabilities(
    max_threads=1024, shared_bytes=65536, features=frozenset({"dot", "fp16", "subgroups"})
)

#: a language like C, whose text Python can run: x // y rounds to zero
C_LIKE = Dialect(
    {
        "constant.f32": "{x}",
        "constant.u32": "{x}",
        "constant.special": "bits({x})",
        "select": "({a} if {condition} else {b})",
    },
    operators={"//": "/"},
)


class Number(int):
    """An integer of C: / rounds to zero, and % takes its sign from the left."""

    def __truediv__(self, by: int) -> Number:  # type: ignore[override]
        return Number(abs(self) // by * (1 if self >= 0 else -1))

    def __mod__(self, by: int) -> Number:
        return Number(self - (self / by) * by)


def bound(expr: Expr, value: int) -> int:
    """The value of text that was printed for a language like C."""
    text = Printer(C_LIKE, str)(expr)
    for method in ("add", "sub", "mul", "and", "rshift", "radd", "rsub", "rand"):
        name = f"__{method}__"
        if name not in vars(Number):
            original = getattr(int, name)
            setattr(Number, name, lambda a, b, f=original: Number(f(a, b)))
    return int(eval(text, {"x": Number(value)}))


@pytest.mark.parametrize("by", (1, 2, 3, 4, 5, 7, 8, 12, 32, 100, 2**30))
def test_division_rounds_down(by: int) -> None:
    x = var("x", 2001) - 1000
    for expr in (x // by, x % by):
        for value in (*range(60), *range(940, 1070), 2000):
            assert bound(expr, value) == evaluate(expr, {"x": value}), (expr, value)


def test_division_of_what_has_no_sign_is_plain() -> None:
    printer = Printer(C_LIKE, str)
    x = var("x", 100)
    assert printer(x // 3) == "x / 3" and printer(x % 8) == "x % 8"
    text = printer((x - 1) // 3)
    assert "if" in text
    floored = (x - 1) // 3
    assert interval(floored.args[0])[0] < 0
    # a language whose // rounds down says so by leaving the operator as it is
    plain = Printer(Dialect({"constant.u32": "{x}"}), str)
    assert plain((x - 1) // 3) == "(x - 1) // 3"
    assert all(node.op != "//" or node.args[1] is const(3, I32) for node in walk(floored))


def test_numbers_that_are_not_finite() -> None:
    printer = Printer(C_LIKE, str)
    f32 = formats.get("f32").value_expr(const(0, I32)).dtype
    assert printer(const(float("inf"), f32)) == "bits(0x7f800000)"
    assert printer(const(float("-inf"), f32)) == "bits(0xff800000)"
    assert printer(const(1.5, f32)) == "1.5"


def test_tables_have_the_smallest_type() -> None:
    assert simt.table_type((1, -128, 127)) == "i8"
    assert simt.table_type((1, 128)) == simt.table_type((-129,)) == "i32"
    assert simt.table_type((1.0, 2.0)) == "f32"


@pytest.mark.parametrize("signed", (False, True))
def test_bytes_of_a_word(signed: bool) -> None:
    word = np.array([1, -2, 127, -128], np.int8).view(np.uint32)[0]
    for lane in range(4):
        text = simt.byte("word", lane, signed).replace("u)", ")").replace("u &", " &")
        found = eval(text, {"word": word, "i32": lambda v: np.uint32(v).astype(np.int32)})
        want = np.array([word]).view(np.int8 if signed else np.uint8)[lane]
        assert found == want


@pytest.mark.parametrize("config", CONFIGS)
def test_defaults_are_legal(config: type[Config]) -> None:
    for caps in (LEAST, MOST):
        for m in (0, 1, 2, 3, 8, 9, 16, 64, 4096):
            chosen = config.default(caps, m)
            assert chosen.legal(caps) is None
    assert config.default(LEAST).features == ()


def test_defaults_use_what_is_there() -> None:
    assert DotMatvecConfig.default(MOST, 1).features == ("subgroups", "dot")
    assert DotTileConfig.default(MOST, 64).features == ("dot",)
    assert MatvecConfig.default(MOST, 3).columns == 4
    assert TileConfig.default(MOST, 16).tile_m == 16 < TileConfig.default(MOST, 17).tile_m


@pytest.mark.parametrize(
    ("config", "caps", "reason"),
    [
        (ThreadsConfig(threads=256), {"max_threads": 128}, "256 threads in a group; .* 128"),
        (MatvecConfig(threads=256, rows=8, columns=8), {}, "65536 bytes of shared memory"),
        (MatvecConfig(reduce="subgroup"), {}, "lacks subgroups"),
        (DotMatvecConfig(reduce="subgroup", dot="packed"), {}, "lacks subgroups, dot"),
        (DotTileConfig(dot="packed"), {}, "lacks dot"),
        (TileConfig(64, 128, 8, 8), {}, "24576 bytes of shared memory"),
        (TileConfig(tile_m=16, tile_n=16, thread_m=8, thread_n=8), {}, "4 threads"),
    ],
)  # fmt: skip
def test_reasons(config: Config, caps: dict[str, Any], reason: str) -> None:
    said = config.legal(dataclasses.replace(LEAST, **caps))
    assert said is not None and re.search(reason, said)


def test_half_precision_takes_half_the_memory() -> None:
    whole = TileConfig(tile_m=64, tile_n=128, thread_m=8, thread_n=8)
    half = HalfTileConfig(**whole.as_dict())
    with_half = dataclasses.replace(LEAST, features=frozenset({"fp16"}))
    assert whole.legal(with_half) and half.legal(with_half) is None
    assert tolerance("matmul", "fp16") == 2e-3 and tolerance("matmul", "fp32") == 1e-5


def test_more_rows_of_activations_take_higher_tiles() -> None:
    """And larger ones where shared memory is larger; each thread has enough to do either way."""
    heights = [TileConfig.default(LEAST, m).tile_m for m in (1, 16, 17, 32, 33, 4096, 0)]
    assert heights == [16, 16, 32, 32, 64, 64, 64]
    assert DotTileConfig.default(LEAST, 64).tile_m < DotTileConfig.default(MOST, 64).tile_m
    for m in (0, 16, 64):
        chosen = DotTileConfig.default(MOST, m)
        assert chosen.thread_m * chosen.thread_n >= 16 and chosen.threads >= 64


def test_statements_fill_lines() -> None:
    text = simt.each(8, 12, "sum += x#[#];")
    lines = text.splitlines()
    assert " ".join(line.strip() for line in lines) == " ".join(
        f"sum += x{n}[{n}];" for n in range(12)
    )
    assert len(lines) == 2 and all(70 < len(line) <= 100 for line in lines[:-1])
    assert all(line.startswith(" " * 8 + "sum") for line in lines)


@pytest.mark.parametrize("name", ("q4_K", "q6_K", "q4_0"))
def test_spans_leave_work_for_all_threads(name: str) -> None:
    """And divide what they are a part of: the words of a tile's row, and of a scale's chunk."""
    fmt = formats.get(name)
    for config in TileConfig.space():
        for words in (simt.chunk(fmt) // 4, 8):
            span = simt.span(config, fmt, words)
            assert words % span == 0 == (simt.chunk(fmt) // 4) % span
            assert span == 1 or config.tile_n * words // span >= config.threads


def test_weights_are_kept_once_by_default() -> None:
    """All ops read one layout, so that a device holds one copy."""
    layouts = {c.default(caps, m).as_dict()["layout"]
               for c in CONFIGS for caps in (LEAST, MOST) for m in (0, 1, 8, 64)}  # fmt: skip
    assert len(layouts) == 1


@pytest.mark.parametrize("bits", range(2, 9))
def test_words_of_fields_side_by_side(bits: int) -> None:
    """What has no function of its own: as Python computes it, by the meaning of the operation."""
    text = simt.SPREADS[f"spread{bits}"].format(x="x").replace("u", "")
    values = np.random.default_rng(0).integers(0, 1 << 4 * bits, 500, np.uint32)
    # what lies above the four fields is left out, but for fields that fill the word
    above = 0 if bits == 8 else 0xFFFFFFFF << 4 * bits & 0xFFFFFFFF
    for given in (values, values | np.uint32(above)):
        want = evaluate(spread(bits, var("x", 1 << 32, U32)), {"x": given})
        seen = [eval(text, {"x": int(x)}) & 0xFFFFFFFF for x in given]
        assert seen == want.tolist()

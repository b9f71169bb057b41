"""Attention with Triton: interpreted against the reference, compiled ahead of time for GPUs."""

from __future__ import annotations

import ast
import dataclasses
import functools
import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from kernelgen import targets
from kernelgen.config import Capabilities
from kernelgen.errors import TargetError
from kernelgen.generate import generate, generate_walk
from kernelgen.ir import BlockFormat, formats, table
from kernelgen.ir.evaluate import evaluate
from kernelgen.ir.expr import F32, Expr, call, cast, const, equal, number, where
from kernelgen.ir.ops import attention as ops
from kernelgen.ir.ops.attention import Attention, Mask, Operand, Score
from kernelgen.problem import relative_error, rounded, tolerance
from kernelgen.targets.base import Kernel
from kernelgen.targets.triton.attention import (
    ProgramAttentionConfig,
    ProgramHalfAttentionConfig,
    attention_steps,
    shared_bytes,
    tanh,
)
from kernelgen.targets.triton.runtime import GPUS, Binary, compile_all
from kernelgen.tensor import QuantTensor, quantize
from tests.made_up import THREE_BITS

Array = npt.NDArray[Any]

TARGET = targets.get("triton")
RUNTIME: Any = TARGET.runtime()
REASON = RUNTIME.available()

pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

SLOPES = ops.operand("slopes", "f32", 1)
DOCUMENTS = ops.operand("documents", "i32", 2)
BIAS = ops.operand("bias", "f32", 3)
#: arrays of names that the source has, or that Python has
TOP, LAMBDA = ops.operand("top", "f32", 1), ops.operand("lambda", "i32", 1)


def soft_cap(s: Expr, b: Expr, h: Expr, q: Expr, k: Expr) -> Expr:
    return 20.0 * call("tanh", s / 20.0)


def same_document(b: Expr, h: Expr, q: Expr, k: Expr) -> Expr:
    return equal(DOCUMENTS[b, q], DOCUMENTS[b, k]) & (k <= q)


def own_score(s: Expr, b: Expr, h: Expr, q: Expr, k: Expr) -> Expr:
    return where(q - k < 5, s * 1.5, s - cast(F32, h) * 0.25)


def own_mask(b: Expr, h: Expr, q: Expr, k: Expr) -> Expr:
    return ((q + k + b) % 3 < 2) & (k < q + 9)


def near_or_first(b: Expr, h: Expr, q: Expr, k: Expr) -> Expr:
    return (k <= q) & ((k < 3) | (q - k < 20))


def of_some_heads(b: Expr, h: Expr, q: Expr, k: Expr) -> Expr:
    return (k <= q) & where(h < 2, q - k < 17, k < 11)


def beyond_an_array(s: Expr, b: Expr, h: Expr, q: Expr, k: Expr) -> Expr:
    """Of an array of 8 columns; others stand for scores that count for nothing."""
    return where((k < 8) & (0 <= q), s + BIAS[b, h, where(k < 8, k, 0)], -float("inf"))


def of_awkward_names(s: Expr, b: Expr, h: Expr, q: Expr, k: Expr) -> Expr:
    return call("tanh", s + TOP[h]) + table((0.5, 1.5, -1.0), LAMBDA[h] % 3)


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of score and mask, and how many heads share one of K and V."""

    score: Score | None = None
    mask: Mask | None = None
    operands: tuple[Operand, ...] = ()
    sinks: bool = False
    sharing: int = 1


KINDS = {
    "full": Kind(),
    "causal": Kind(mask=ops.causal),
    "window": Kind(mask=ops.window(33), sharing=2),
    "soft-cap": Kind(score=soft_cap),
    "ALiBi": Kind(ops.alibi(SLOPES), ops.causal, (SLOPES,)),
    "documents": Kind(mask=same_document, operands=(DOCUMENTS,)),
    "sinks": Kind(mask=ops.causal, sinks=True),
    "shared": Kind(mask=ops.causal, sharing=4),
    "own": Kind(own_score, own_mask, sharing=2),
    "gaps": Kind(mask=near_or_first, sharing=4),
    "heads": Kind(mask=of_some_heads, sharing=4),
    "array": Kind(beyond_an_array, operands=(BIAS,)),
    "names": Kind(of_awkward_names, operands=(TOP, LAMBDA)),
    "nothing": Kind(mask=lambda b, h, q, k: k < 0),
    "constant": Kind(score=lambda s, b, h, q, k: const(2.0, F32)),
}

#: two batches and four heads
HEADS = 4


def kind_of(name: str, d: int, k: str = "f16", v: str = "", dv: int = 0) -> Attention:
    one = KINDS[name]
    score, mask = ops.trace(one.score, one.mask)
    return Attention(
        d, by_name(k), by_name(v or k), dv, score=score, mask=mask, operands=one.operands,
        sinks=one.sinks, label=name.lower().replace("-", "_"),
    )  # fmt: skip


def by_name(name: str) -> BlockFormat:
    return THREE_BITS if name == THREE_BITS.name else formats.get(name)


@functools.lru_cache(maxsize=64)
def case(
    name: str, kind: Attention, t: int, s: int, precision: str = "fp32"
) -> tuple[Array, QuantTensor, QuantTensor, Mapping[str, Array], Array]:
    """Inputs, and what they give: of what is multiplied as the precision sees it."""
    rng = np.random.default_rng(1000 * t + s)
    shape = (2, HEADS // KINDS[name].sharing, s)
    q = rng.standard_normal((2, HEADS, t, kind.head_dim), np.float32)
    k, v = (
        quantize(rng.standard_normal((*shape, d), np.float32), fmt)
        for d, fmt in ((kind.head_dim, kind.k), (kind.value_dim, kind.v))
    )
    given: dict[str, Array] = {
        "slopes": 2.0 ** -np.arange(1, HEADS + 1, dtype=np.float32),
        "documents": np.sort(rng.integers(0, 3, (2, s)).astype(np.int32), axis=1),
        # an axis of one element is not stepped along
        "bias": rng.standard_normal((2, 1, 8)).astype(np.float32),
        "top": rng.standard_normal(HEADS).astype(np.float32),
        "lambda": np.arange(HEADS, dtype=np.int32),
    }
    arrays = {one.name: given[one.name] for one in kind.operands}
    sinks = rng.standard_normal(HEADS).astype(np.float32) if kind.sinks else None
    seen_q, seen_k, seen_v = (rounded(x, precision) for x in (q, k.dequantize(), v.dequantize()))
    want = ops.attention(kind, seen_q, seen_k, seen_v, arrays, sinks)
    return q, k, v, arrays | ({"sinks": sinks} if sinks is not None else {}), want


def kernel_of(kind: Attention, precision: str = "fp32", **values: Any) -> Kernel:
    """In tiles so small that there are several."""
    chosen = {"rows": 16, "keys": 32, **values}
    walk = TARGET.walk("attention", kind, precision)
    return generate_walk(walk, kind, TARGET, walk.config(**chosen))


def error(kernel: Kernel, name: str, t: int, s: int) -> float:
    q, k, v, arrays, want = case(name, kernel.subject, t, s, kernel.precision)
    y = np.full(want.shape, np.nan, np.float32)
    RUNTIME.attention(kernel)(q, k, v, arrays, y)
    return relative_error(y, want)


# ---- against the reference ---------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
def test_kinds(name: str) -> None:
    """Prefill and decode: the keys in one piece and in two, of which one may be empty."""
    kind = kind_of(name, 64)
    for splits, t, s in ((1, 21, 21), (2, 1, 70), (2, 7, 40)):
        kernel = kernel_of(kind, splits=splits)
        assert bool(kernel.then) == (splits > 1)
        assert error(kernel, name, t, s) <= tolerance("attention"), kernel.source


@pytest.mark.parametrize(
    ("k", "v", "d", "dv"),
    [
        ("q8_0", "q4_0", 64, 96),  # three groups, filled up to four
        ("q4_0", "f16", 128, 80),
        ("bf16", "f32", 80, 64),
        ("iq4_nl", "q5_1", 32, 32),
        ("three_bits", "q8_0", 128, 32),
        ("q6_K", "q4_K", 256, 256),
    ],
)
def test_formats_and_sizes(k: str, v: str, d: int, dv: int) -> None:
    kind = kind_of("shared", d, k, v, dv)
    for splits, t, s in ((1, 17, 40), (2, 7, 7)):
        kernel = kernel_of(kind, splits=splits)
        assert error(kernel, "shared", t, s) <= tolerance("attention"), kernel.source


@pytest.mark.parametrize(("k", "name"), [("f16", "causal"), ("q8_0", "soft-cap"), ("q4_0", "own")])
def test_half_precision(k: str, name: str) -> None:
    kind = kind_of(name, 64, k)
    for splits, t, s in ((1, 64, 64), (2, 7, 50)):
        kernel = kernel_of(kind, "fp16", splits=splits, rows=32)
        found = error(kernel, name, t, s)
        assert 1e-5 < found <= tolerance("attention", "fp16"), kernel.source


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("d", [64, 80, 128, 256])
@pytest.mark.parametrize(("k", "v"), [("f16", "f16"), ("q8_0", "q8_0"), ("q4_0", "q8_0")])
@pytest.mark.parametrize("name", [n for n in KINDS if n != "constant"])
def test_every_kind(name: str, k: str, v: str, d: int, precision: str) -> None:
    if d % by_name(k).block:
        pytest.skip(f"rows of {d} elements are no blocks of {k}")
    kind, caps = kind_of(name, d, k, v), RUNTIME.capabilities()
    walk = TARGET.walk("attention", kind, precision)
    # weights are rounded too, which the reference does not do: of a query that sees two keys, the
    # error is as large as its values, which are four times the RMS of means of hundreds
    bound = tolerance("attention", precision) * (1.5 if precision == "fp16" else 1)
    for t, more in itertools.product((1, 7, 64, 257), (0, 100)):
        kernel = generate_walk(walk, kind, TARGET, walk.default(kind, caps, t))
        assert error(kernel, name, t, t + more) <= bound, (t, more)


@pytest.mark.parametrize(("rows", "keys"), [(64, 16), (16, 128)])
def test_configurations_compute_the_same(rows: int, keys: int) -> None:
    for splits in (1, 4):
        kernel = kernel_of(kind_of("window", 64, "q4_0"), rows=rows, keys=keys, splits=splits)
        assert error(kernel, "window", 33, 90) <= tolerance("attention")


def test_what_is_not_there() -> None:
    """No queries, no keys, and more queries than keys."""
    causal, sinks = (kernel_of(kind_of(name, 64)) for name in ("causal", "sinks"))
    for kernel, name in ((causal, "causal"), (sinks, "sinks")):
        q, k, v, arrays, _ = case(name, kernel.subject, 9, 9)
        y = np.full(q.shape, np.nan, np.float32)
        RUNTIME.attention(kernel)(q, *(some(x, 0) for x in (k, v)), arrays, y)
        assert (y == 0).all()
        RUNTIME.attention(kernel)(q[:, :, :0], k, v, arrays, y[:, :, :0])
    q, k, v, _, _ = case("causal", causal.subject, 9, 9)
    k, v = some(k, 5), some(v, 5)
    y = np.full(q.shape, np.nan, np.float32)
    RUNTIME.attention(causal)(q, k, v, {}, y)
    assert (y[:, :, :4] == 0).all()
    want = ops.attention(causal.subject, q, k.dequantize(), v.dequantize())
    assert relative_error(y, want) <= tolerance("attention")


def some(w: QuantTensor, keys: int) -> QuantTensor:
    data = np.ascontiguousarray(w.data[:, :, :keys])
    return QuantTensor(w.format, (*w.shape[:2], keys, w.shape[3]), data)


@pytest.mark.parametrize("splits", [1, 2])
def test_large_scores_are_safe(splits: int) -> None:
    kernel = kernel_of(kind_of("causal", 64, "f32"), splits=splits)
    q, k, v, _, _ = case("causal", kernel.subject, 17, 40)
    q = q * np.float32(1e4)
    y = np.full(q.shape, np.nan, np.float32)
    RUNTIME.attention(kernel)(q, k, v, {}, y)
    want = ops.attention(kernel.subject, q, k.dequantize(), v.dequantize())
    # scores of thousands have errors of thousandths; few rows have two that are so close
    close = np.abs(y - want).max(axis=-1) < 1e-3
    assert np.isfinite(y).all() and close.mean() > 0.95


def test_nothing_beyond_the_keys_is_read() -> None:
    """What lies behind the last key in memory is NaN."""
    kernel = kernel_of(kind_of("full", 64, "f32"))
    q, k, v, _, want = case("full", kernel.subject, 7, 40)
    padded = [np.full((*x.shape[:2], 48, x.data.shape[-1]), 0xFF, np.uint8) for x in (k, v)]
    for whole, x in zip(padded, (k, v), strict=True):
        whole[:, :, :40] = x.data
    # one batch and one head at a time: the next head's rows would follow otherwise
    y = np.full(q.shape, np.nan, np.float32)
    run = RUNTIME.attention(kernel)
    for b, h in itertools.product(range(2), range(HEADS)):
        one = [
            QuantTensor(x.format, (1, 1, 40, 64), whole[b : b + 1, h : h + 1, :40])
            for whole, x in zip(padded, (k, v), strict=True)
        ]
        part = y[b : b + 1, h : h + 1]
        run(np.ascontiguousarray(q[b : b + 1, h : h + 1]), *one, {}, part)
    assert relative_error(y, want) <= tolerance("attention")


# ---- the source --------------------------------------------------------------------------------


def sources() -> list[Kernel]:
    made = []
    for name, (k, v) in itertools.product(KINDS, (("f16", "q4_0"), ("three_bits", "q6_K"))):
        kind = kind_of(name, 256, k, v)
        for precision, splits in itertools.product(("fp32", "fp16"), (1, 8)):
            kernel = kernel_of(kind, precision, splits=splits)
            made += [kernel, *kernel.then.values()]
    return made


def test_the_source_is_readable_python() -> None:
    for kernel in sources():
        module = ast.parse(kernel.source)
        assert ast.get_docstring(module)
        lines = kernel.source.splitlines()
        assert max(map(len, lines)) <= 100
        assert all(line == line.rstrip() for line in lines)
        # the interpreter takes the last line that begins with this for the function's head
        assert sum(line.strip().startswith("def ") for line in lines) == 1


def test_masks_are_left_out_where_they_can_be() -> None:
    """Tiles are skipped, and the mask is not computed, by conditions on their ends."""
    full, causal, gaps, own, nothing = (
        kernel_of(kind_of(name, 64)).source for name in ("full", "causal", "gaps", "own", "nothing")
    )
    assert "never" not in full and "query" not in full.split('"""')[2]
    assert "never = query_hi < key_lo" in causal and "(key_hi <= query_lo) & " in causal
    assert "if never == 0:" not in causal and "if never == 0:" in gaps
    assert "whole" not in own  # of a remainder nothing is known
    assert "last = first\n" in nothing


def test_scores_are_left_as_they_are() -> None:
    """Without an expression, the scale and the base of the exponentials are one factor."""
    text = kernel_of(kind_of("causal", 64)).source
    assert text.count("1.44269") == 0 and f"* {0.125 * 1.4426950408889634}" in text
    assert "scores * 1.5" in kernel_of(kind_of("own", 64)).source


def test_tanh() -> None:
    """What stands for it: all digits where the argument is small, where a difference has few."""
    found = tanh(number("s"), number("s") * number("s"))
    x = np.concatenate([np.linspace(-3, 3, 2001), np.geomspace(1e-30, 100, 500), [-1e4, 1e4]])
    x = x.astype(np.float32)
    got = evaluate(found, {"s": x}).astype(np.float64)
    want = np.tanh(x.astype(np.float64))
    assert (np.abs(got - want) <= 4e-7 * np.abs(want)).all()


def test_elements_are_read_where_they_are() -> None:
    """In branches that are not taken an index may be outside of the array."""
    steps = attention_steps(kind_of("array", 64), ProgramAttentionConfig())
    assert [(name, len(value.args)) for name, value in steps.named] == [("of_bias", 2)]
    text = kernel_of(kind_of("array", 64)).source
    assert text.count("tl.load(") == 4 and "other=0" in text  # of q, k, v, and once of the array
    steps = attention_steps(kind_of("documents", 64), ProgramAttentionConfig())
    assert [name for name, _ in steps.named] == ["of_documents", "of_documents_2"]


def test_refusals() -> None:
    with pytest.raises(TargetError, match="attention f16"):
        generate("attention", formats.get("f16"), TARGET)
    walk = TARGET.walk("attention", kind_of("full", 256), "fp32")
    large = ProgramAttentionConfig(rows=128, keys=128)
    caps = Capabilities(shared_bytes=65536)
    reason = walk.refuses(large, kind_of("full", 256), caps)
    assert reason is not None and "65536" in reason
    smaller = walk.default(kind_of("full", 256), caps)
    assert shared_bytes(smaller, kind_of("full", 256)) <= 65536
    assert walk.refuses(ProgramAttentionConfig(dot="tf32x3"), kind_of("full", 64), caps)


def test_defaults_follow_the_number_of_queries() -> None:
    assert ProgramHalfAttentionConfig.default(TARGET.capabilities, 1).splits > 1
    assert ProgramHalfAttentionConfig.default(TARGET.capabilities, 64).splits == 1
    assert ProgramHalfAttentionConfig.default(TARGET.capabilities).splits == 1


# ---- ahead of time -----------------------------------------------------------------------------

#: instructions that a kernel in half precision must become, by GPU
UNITS = {"cuda:80": "mma.sync", "cuda:90": "wgmma", "cuda:100": "tcgen05.mma", "hip": "v_mfma"}


def defaults(kind: Attention, precision: str, queries: int) -> list[Kernel]:
    walk = TARGET.walk("attention", kind, precision)
    one = generate_walk(walk, kind, TARGET, walk.default(kind, TARGET.capabilities, queries))
    return [one, *one.then.values()]


def compiled(made: list[tuple[Kernel, str]]) -> list[tuple[Kernel, Binary]]:
    results = compile_all(made)
    bad = [
        (k.entry, gpu, r) for (k, gpu), r in zip(made, results, strict=True) if isinstance(r, str)
    ]
    assert bad == []
    return [
        (k, r) for (k, _), r in zip(made, results, strict=True) if isinstance(r, Binary)
    ]  # fmt: skip


def test_matrix_units_multiply() -> None:
    """Prefill is in flight while it multiplies, and nothing takes more memory than there is."""
    kernel, *_ = defaults(kind_of("causal", 128), "fp16", 0)
    for _, binary in compiled([(kernel, gpu) for gpu in GPUS]):
        unit = UNITS.get(binary.gpu) or UNITS[binary.gpu.partition(":")[0]]
        assert unit in binary.assembly
        assert binary.shared <= (160 if binary.kind == "cubin" else 64) * 1024
        assert "cp.async" in binary.assembly or binary.kind != "cubin"


def test_compiled_for_all_gpus() -> None:
    made = defaults(kind_of("own", 32, "q4_0", "q8_0"), "fp32", 1)
    compiled(list(itertools.product(made, GPUS)))


@pytest.mark.slow
@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("name", KINDS)
def test_everything_compiles(name: str, gpu: str) -> None:
    made = []
    for k, d in (("f16", 64), ("f16", 80), ("q8_0", 128), ("q4_0", 256)):
        for precision, queries in itertools.product(("fp32", "fp16"), (0, 1)):
            made += [(one, gpu) for one in defaults(kind_of(name, d, k), precision, queries)]
    for kernel, binary in compiled(made):
        assert binary.shared <= (160 if gpu.startswith("cuda") else 64) * 1024, kernel.entry

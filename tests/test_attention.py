"""Attention on the targets with grids of threads: two that run here, and two that are emulated."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from kernelgen import targets
from kernelgen.config import Capabilities
from kernelgen.config.attention import AttentionConfig, CombineConfig
from kernelgen.emulator import Emulator, Report
from kernelgen.errors import KernelgenError, TargetError
from kernelgen.generate import generate_walk
from kernelgen.ir import formats
from kernelgen.ir.expr import F32, Expr, call, cast, const, equal, where
from kernelgen.ir.ops import attention as ops
from kernelgen.ir.ops.attention import Attention, Mask, Operand, Score
from kernelgen.problem import relative_error, tolerance
from kernelgen.targets import simt_attention
from kernelgen.targets.base import EMULATED, Kernel, Target
from kernelgen.targets.device import DeviceRuntime
from kernelgen.tensor import QuantTensor, quantize
from tests.device_checks import GuardedDriver
from tests.test_opencl import CLANG
from tests.test_wgsl import rejected, tint  # noqa: F401

Array = npt.NDArray[Any]

SLOPES = ops.operand("slopes", "f32", 1)
DOCUMENTS = ops.operand("documents", "i32", 2)
#: names that walks and languages use themselves
BIAS = ops.operand("float", "f32", 4)
SHIFTS = ops.operand("tile", "i32", 1)

DEVICES = {"opencl": "", "wgsl": "", "cuda": EMULATED, "metal": EMULATED}
LEAST = Capabilities(max_threads=256, shared_bytes=16384)
MOST = Capabilities(max_threads=1024, shared_bytes=65536)


# ---- kinds and data


@dataclass(frozen=True)
class Variant:
    """A score and a mask, what they read, and how many heads share one of K and V."""

    score: Score | None = None
    mask: Mask | None = None
    operands: tuple[Operand, ...] = ()
    sinks: bool = False
    sharing: int = 1

    def kind(self, d: int, k: str, v: str = "", dv: int = 0) -> Attention:
        score, mask = ops.trace(self.score, self.mask)
        return Attention(
            d, formats.get(k), formats.get(v or k), dv, score=score, mask=mask,
            operands=self.operands, sinks=self.sinks,
        )  # fmt: skip


def soft_cap(s: Expr, b: Expr, h: Expr, q: Expr, k: Expr) -> Expr:
    return 5.0 * call("tanh", s / 5.0)


def same_document(b: Expr, h: Expr, q: Expr, k: Expr) -> Expr:
    return equal(DOCUMENTS[b, q], DOCUMENTS[b, k]) & (k <= q)


def biased(s: Expr, b: Expr, h: Expr, q: Expr, k: Expr) -> Expr:
    """With a key in seven that the score itself takes out."""
    out = equal((k + SHIFTS[h]) % 7, 0)
    return where(out, const(-np.inf, F32), s + BIAS[b, h, q, k] - 0.01 * cast(F32, h))


def odd_mask(b: Expr, h: Expr, q: Expr, k: Expr) -> Expr:
    """A window of each head, an exclusive or, division of what may be negative."""
    return (k <= q) & (q - k < 20 * h + 9) & (equal((q - k) // 3 % 2, 0) ^ equal(b, 0))


VARIANTS = {
    "full": Variant(),
    "causal": Variant(mask=ops.causal),
    "window": Variant(mask=ops.window(33)),
    "soft-cap": Variant(score=soft_cap),
    "ALiBi": Variant(score=ops.alibi(SLOPES), mask=ops.causal, operands=(SLOPES,)),
    "documents": Variant(mask=same_document, operands=(DOCUMENTS,)),
    "sinks": Variant(mask=ops.causal, sinks=True),
    "shared": Variant(mask=ops.causal, sharing=4),
    "own": Variant(biased, odd_mask, (BIAS, SHIFTS), sharing=2),
}


@dataclass(frozen=True)
class Case:
    """Inputs, and what they give."""

    q: Array
    k: QuantTensor
    v: QuantTensor
    operands: Mapping[str, Array]
    want: Array


@functools.lru_cache(maxsize=32)
def case(variant: str, kind: Attention, t: int, s: int, batches: int = 2, heads: int = 4) -> Case:
    rng = np.random.default_rng(1000 * t + s)
    shared = (batches, heads // VARIANTS[variant].sharing, s)
    q = rng.standard_normal((batches, heads, t, kind.head_dim), np.float32)
    k = quantize(rng.standard_normal((*shared, kind.head_dim), np.float32), kind.k)
    v = quantize(rng.standard_normal((*shared, kind.value_dim), np.float32), kind.v)
    every = {
        "slopes": (2.0 ** -np.arange(1, heads + 1)).astype(np.float32),
        "documents": np.sort(rng.integers(0, 4, (batches, s)), axis=1).astype(np.int32),
        # the same for all heads
        "float": rng.standard_normal((batches, 1, s, s), np.float32),
        "tile": rng.integers(0, 9, heads).astype(np.int32),
    }
    operands = {one.name: every[one.name] for one in kind.operands}
    sinks = rng.standard_normal(heads).astype(np.float32) if kind.sinks else None
    want = ops.attention(kind, q, k.dequantize(), v.dequantize(), operands, sinks)
    return Case(q, k, v, operands if sinks is None else {**operands, "sinks": sinks}, want)


@functools.cache
def device(name: str) -> DeviceRuntime:
    """The runtime of a target; skips the test where it cannot run.  What it gives back is poisoned
    before, and guarded."""
    found = targets.get(name).runtime(DEVICES[name])
    reason = found.available()
    if reason is not None:
        pytest.skip(reason)
    assert isinstance(found, DeviceRuntime)
    if DEVICES[name] == EMULATED:
        return found  # its buffers are poisoned, and end where memory ends
    fresh, guarded = type(found)(), GuardedDriver(found.driver())
    fresh.driver = lambda: guarded  # type: ignore[method-assign, return-value, assignment]
    return fresh


def kernel_of(name: str, kind: Attention, m: int = 0, **changes: Any) -> Kernel:
    """The kernel for m queries, in the default configuration but for the changes."""
    target = targets.get(name)
    walk = target.walk("attention", kind)
    found = walk.default(kind, device(name).capabilities(), m)
    config = AttentionConfig.from_dict(found.as_dict() | changes)
    assert walk.refuses(config, kind, device(name).capabilities()) is None
    return generate_walk(walk, kind, target, config)


def result(name: str, kernel: Kernel, one: Case) -> Array:
    y = np.full(one.want.shape, np.nan, np.float32)
    device(name).attention(kernel)(one.q, one.k, one.v, one.operands, y)
    return y


def error(name: str, kernel: Kernel, one: Case) -> float:
    return relative_error(result(name, kernel, one), one.want)


# ---- results


@dataclass(frozen=True)
class Sample:
    """A kernel, and the (T, S) that it runs with."""

    variant: str
    d: int
    k: str
    v: str
    dv: int
    m: int
    shapes: tuple[tuple[int, int], ...]
    changes: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __str__(self) -> str:
        return f"{self.variant}-{self.d}-{self.k}-{self.v}"


#: every variant, format, head size and number of queries, each with many of the others
SAMPLES = (
    Sample("full", 80, "f16", "q8_0", 96, 0, ((1, 1), (64, 64), (7, 107)), {"splits": 4}),
    Sample("window", 64, "q8_0", "q4_0", 0, 0, ((257, 257), (7, 64))),
    Sample("documents", 128, "q4_0", "f16", 64, 7, ((1, 300), (7, 7)), {"splits": 1}),
    Sample("shared", 256, "q8_0", "q8_0", 0, 1, ((1, 257), (7, 64), (1, 1))),
    Sample("own", 64, "f16", "f16", 100, 0, ((64, 65), (7, 40)), {"share": "group"}),
    Sample("soft-cap", 128, "f16", "q4_0", 0, 7, ((7, 99), (1, 7)), {"splits": 4}),
    Sample("ALiBi", 256, "q4_0", "q4_0", 32, 64, ((64, 64), (9, 257))),
    Sample("sinks", 64, "f16", "f16", 0, 7, ((7, 64), (4, 1)), {"splits": 4}),
)
#: of these, what each target runs where tests are to be short
SHORT = {"opencl": (0, 1, 2, 4), "wgsl": (3, 4, 5, 7), "cuda": (0, 1, 2, 3, 4, 6, 7),
         "metal": (0, 2, 3, 4, 5, 6)}  # fmt: skip


def sampled() -> list[Any]:
    return [
        pytest.param(
            name, one, id=f"{name}-{one}",
            marks=() if number in SHORT[name] else pytest.mark.slow,
        )
        for name in DEVICES
        for number, one in enumerate(SAMPLES)
    ]  # fmt: skip


@pytest.mark.parametrize(("name", "one"), sampled())
def test_against_the_reference(name: str, one: Sample) -> None:
    kind = VARIANTS[one.variant].kind(one.d, one.k, one.v, one.dv)
    kernel = kernel_of(name, kind, one.m, **one.changes)
    assert bool(kernel.then) == (kernel.config.as_dict()["splits"] > 1)
    for t, s in one.shapes:
        if one.variant in ("documents", "own") and t > s:
            continue  # positions before the first key have no document and no bias
        found = error(name, kernel, case(one.variant, kind, t, s))
        assert found <= tolerance(kernel.op, kernel.precision), (t, s)


FORMATS = (("f16", "f16"), ("q8_0", "q8_0"), ("q4_0", "q4_0"), ("q8_0", "q4_0"))


@pytest.mark.slow
@pytest.mark.parametrize("formats_", FORMATS, ids="-".join)
@pytest.mark.parametrize("d", (64, 80, 128, 256))
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", DEVICES)
def test_product_of_all(name: str, variant: str, d: int, formats_: tuple[str, str]) -> None:
    if d % max(formats.get(f).block for f in formats_):
        pytest.skip(f"{d} is no multiple of a block")
    kind = VARIANTS[variant].kind(d, *formats_)
    for t, splits in ((1, 4), (7, 1), (64, 4), (257, 1)):
        kernel = kernel_of(name, kind, t, splits=splits)
        for s in (t, t + 100):
            found = error(name, kernel, case(variant, kind, t, s))
            assert found <= tolerance(kernel.op, kernel.precision), (t, s)


@pytest.mark.slow
@pytest.mark.parametrize("name", DEVICES)
@pytest.mark.parametrize("fmt", formats.FORMATS, ids=lambda fmt: fmt.name)
def test_every_format(name: str, fmt: formats.BlockFormat) -> None:
    kind = VARIANTS["causal"].kind(256 if fmt.block > 32 else 96, fmt.name)
    assert error(name, kernel_of(name, kind), case("causal", kind, 9, 40)) <= 1e-5


def some_configs(count: int) -> list[AttentionConfig]:
    every = [c for c in AttentionConfig.space() if c.legal(LEAST) is None]
    return [every[i] for i in np.random.default_rng(0).choice(len(every), count, replace=False)]


@pytest.mark.parametrize(
    "config",
    [pytest.param(c, marks=() if i < 2 else (pytest.mark.slow,)) for i, c in
     enumerate(some_configs(40))],
    ids=lambda c: "-".join(map(str, c.as_dict().values())),
)  # fmt: skip
def test_configurations(config: AttentionConfig) -> None:
    """Any that is legal, with sizes that nothing divides."""
    kind = VARIANTS["shared"].kind(72, "f16", "f16", 52)
    name = "cuda"
    walk = targets.get(name).walk("attention", kind)
    if walk.refuses(config, kind, device(name).capabilities()):
        pytest.skip("too large for this kind")
    kernel = generate_walk(walk, kind, targets.get(name), config)
    assert error(name, kernel, case("shared", kind, 37, 131, 1)) <= 1e-5


# ---- edges


#: kernels that several tests share
PLAIN = VARIANTS["causal"].kind(64, "f16")


@pytest.mark.parametrize("name", DEVICES)
def test_edges(name: str) -> None:
    """Queries without keys, no keys at all, large scores, and what is not finite."""
    kernel = kernel_of(name, PLAIN)
    more_queries = case("causal", PLAIN, 9, 5)
    found = result(name, kernel, more_queries)
    assert (found[:, :, :4] == 0).all() and relative_error(found, more_queries.want) <= 1e-5
    one = case("causal", PLAIN, 40, 40)
    none = QuantTensor("f16", (2, 4, 0, 64), np.empty(0, np.uint8))
    empty = dataclasses.replace(one, k=none, v=none)
    assert (result(name, kernel, empty) == 0).all()
    large = one.q * np.float32(3e3)  # scores of 1e4
    want = ops.attention(PLAIN, large, one.k.dequantize(), one.v.dequantize())
    found = result(name, kernel, dataclasses.replace(one, q=large))
    # a score is off by its own last bits, which is much beside the weights it makes
    assert np.isfinite(found).all() and relative_error(found, want) < 0.05
    dirty = one.q.copy()
    dirty[0, 1, 7, 3] = np.nan
    found = result(name, kernel, dataclasses.replace(one, q=dirty))
    assert np.isnan(found[0, 1, 7]).all()
    found[0, 1, 7] = one.want[0, 1, 7]
    assert relative_error(found, one.want) <= 1e-5


def poisoned(kind: Attention, one: Case, keys: slice) -> Case:
    """With NaN for these keys and values."""
    tensors = []
    for w in (one.k, one.v):
        data = w.data.copy()
        data[:, :, keys] = np.array([np.nan], np.float16).view(np.uint8)[1]
        tensors.append(QuantTensor(w.format, w.shape, data))
    return dataclasses.replace(one, k=tensors[0], v=tensors[1])


WINDOW = VARIANTS["window"].kind(64, "f16")


def skips(name: str, kernel: Kernel) -> tuple[Array, Array]:
    """What queries give where keys that whole tiles are to skip are poisoned, and should give."""
    one = case("window", WINDOW, 32, 256)
    # the first query stands at 224 and sees 192..224; the tiles of 32 keys before are not touched
    before = result(name, kernel, poisoned(WINDOW, one, slice(0, 192)))
    np.testing.assert_array_equal(before, result(name, kernel, one))
    # of the queries 0..63 the first 32 see none of the tiles behind them
    ahead = case("window", WINDOW, 64, 64)
    found = result(name, kernel, poisoned(WINDOW, ahead, slice(32, 64)))
    assert np.isnan(found[:, :, 32:]).all()
    return found[:, :, :32], ahead.want[:, :, :32]


@pytest.mark.parametrize("name", DEVICES)
def test_tiles_are_skipped(name: str) -> None:
    kernel = kernel_of(name, WINDOW, 0, rows=32, keys=32)
    assert relative_error(*skips(name, kernel)) <= 1e-5
    source, count = re.subn(r"if \(.*\) \{ continue; \}", "", kernel.source)
    assert count == 1
    without = dataclasses.replace(kernel, source=source, hash="without")
    with pytest.raises(AssertionError):
        skips(name, without)


@pytest.mark.parametrize("name", ("opencl",))
def test_pieces(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a buffer does not hold all heads they come in parts, which know their numbers."""
    kind = VARIANTS["own"].kind(64, "f16", "f16", 100)
    kernel = kernel_of(name, kind, share="group")
    driver: Any = device(name).driver()
    for t, s in ((64, 65), (7, 40)):
        one = case("own", kind, t, s)
        for heads in (3, 1):
            nbytes = max(2 * t * 4 * 102, s * 200)
            monkeypatch.setattr(driver, "largest", heads * nbytes, raising=False)
            launches: list[Mapping[str, int]] = []
            launcher = device(name).launcher(kernel)
            monkeypatch.setitem(
                device(name)._launchers,
                kernel,
                _Watched(launcher, launches),  # type: ignore
            )
            assert error(name, kernel, one) <= 1e-5
            monkeypatch.undo()
            assert [(x["B0"], x["H0"]) for x in launches] == (
                [(0, 0), (1, 0)] if heads == 3 else [(0, 0), (0, 2), (1, 0), (1, 2)]
            )
    monkeypatch.setattr(driver, "largest", 100, raising=False)
    with pytest.raises(TargetError, match="does not fit a buffer of target opencl"):
        result(name, kernel, one)


class _Watched:
    """A launcher whose sizes are written down."""

    def __init__(self, launcher: Any, launches: list[Mapping[str, int]]) -> None:
        self._launcher, self._launches = launcher, launches

    def __getattr__(self, name: str) -> Any:
        return getattr(self._launcher, name)

    def __call__(self, buffers: Any, sizes: Mapping[str, int]) -> None:
        self._launches.append(sizes)
        self._launcher(buffers, sizes)


# ---- races


def emulated(kernel: Kernel, one: Case, groups: int, source: str) -> tuple[Array, Report]:
    """A launch of few groups, each with many tiles, under the emulator's checks for races: the sum
    of the parts, and what was found."""
    splits = kernel.config.as_dict()["splits"]
    (b, h, t, _), s = one.q.shape, one.k.shape[2]
    y = np.full(one.want.shape, np.nan, np.float32)
    parts = np.full((splits, *y.shape[:3], y.shape[3] + 2), np.nan, np.float32)
    arrays = (one.q, one.k.data, one.v.data, y, parts)
    arguments = [*map(np.ascontiguousarray, arrays), b, h, one.k.shape[1], t, s, 0, 0]
    run = Emulator(source, "cuda", name=kernel.entry)
    report = run.run(kernel.entry, groups, kernel.config.threads, arguments, sanitize=True)
    found, top, total = np.split(arguments[4], [y.shape[3], y.shape[3] + 1], axis=-1)
    with np.errstate(invalid="ignore"):  # without a barrier anything may come out
        factor = np.exp(top - top.max(axis=0))
        return (factor * found).sum(axis=0) / (factor * total).sum(axis=0), report


def test_every_barrier_is_needed() -> None:
    kind = VARIANTS["shared"].kind(64, "f16", "f16", 80)
    device("cuda")
    changes = {"rows": 8, "thread_rows": 1, "keys": 32, "thread_keys": 4, "splits": 4}
    kernel = kernel_of("cuda", kind, **changes)
    shape = simt_attention.shape(kernel.config, kind)
    assert shape.depth < 64 and shape.v_keys < 32  # both in several parts
    one = case("shared", kind, 19, 70, 1)  # three tiles of keys: one part in four has none
    y, report = emulated(kernel, one, 2, kernel.source)
    assert report.ok, report
    assert relative_error(y, one.want) <= 1e-5
    places = [m.span() for m in re.finditer(r"__syncthreads\(\);", kernel.source)]
    assert len(places) == 7
    for start, stop in places:
        text = kernel.source[:start] + kernel.source[stop:]
        _, report = emulated(kernel, one, 2, text)
        assert "race" in {f.kind for f in report.findings}, text[start - 200 : start]


# ---- configurations


@pytest.mark.parametrize("caps", (LEAST, MOST), ids=("least", "most"))
def test_defaults_fit(caps: Capabilities) -> None:
    walk, combine = simt_attention.walks()
    for d, m in itertools.product((32, 33, 64, 80, 96, 128, 160, 192, 256), (0, 1, 2, 7, 64)):
        kind = VARIANTS["causal"].kind(d, "f32")
        config = walk.default(kind, caps, m)
        assert walk.refuses(config, kind, caps) is None, (d, m)
        assert isinstance(config, AttentionConfig) and config.threads >= 64
        assert combine.refuses(combine.default(kind, caps), kind, caps) is None


@pytest.mark.parametrize(
    ("config", "kind", "reason"),
    [
        (AttentionConfig(rows=2), PLAIN, "4 rows in each thread; a group has 2"),
        (AttentionConfig(rows=64, thread_rows=1), PLAIN, "512 threads in a group; 32..256"),
        (AttentionConfig(), VARIANTS["full"].kind(256, "f16"), "bytes of shared memory"),
        (AttentionConfig(rows=8, thread_rows=8, keys=128, thread_keys=4, depth=16),
         VARIANTS["full"].kind(32, "f16", "f16", 256), None),
        (AttentionConfig(rows=16, thread_rows=8, keys=64, thread_keys=4, depth=16),
         VARIANTS["full"].kind(32, "f16", "f16", 256), "192 sums in each thread"),
        (AttentionConfig(), formats.get("f16"), "another kind of thing than f16"),
    ],
)  # fmt: skip
def test_reasons(config: AttentionConfig, kind: Any, reason: str | None) -> None:
    walk = simt_attention.walks()[0]
    said = walk.accepts(kind) or walk.refuses(config, kind, LEAST)
    assert said is None if reason is None else said is not None and reason in said
    assert CombineConfig(threads=256).legal(Capabilities(max_threads=128)) is not None


def test_words_of_a_scale() -> None:
    """A thread decodes as many with one scale as leave work for all."""
    q8_0, q6_k = formats.get("q8_0"), formats.get("q6_K")
    assert simt_attention.word_span(q8_0, 64, 32, 64) == 8
    assert simt_attention.word_span(q8_0, 64, 8, 64) == 2
    assert simt_attention.word_span(q6_k, 256, 64, 64) == 4  # groups of 16
    assert simt_attention.word_span(q8_0, 96, 4, 64) == 1


# ---- text


def texts(name: str) -> Iterator[Kernel]:
    """Kernels of every variant, in few and many rows."""
    target = targets.get(name)
    kinds = itertools.cycle(("q8_0", "f16", "q6_K", "iq4_nl"))
    for made, fmt in zip(VARIANTS.values(), kinds, strict=False):
        kind = made.kind(256, fmt, "q4_0", 128)
        walk = target.walk("attention", kind)
        for m in (1, 64):
            one = generate_walk(walk, kind, target, walk.default(kind, target.capabilities, m))
            yield from (one, *one.then.values())


def test_tint_takes_every_variant(tint: Path) -> None:  # noqa: F811
    """Tint, of browsers, refuses a barrier that it does not see all threads reach."""
    kernels = list(texts("wgsl"))
    assert rejected(tint, kernels) == {}
    broken = dataclasses.replace(
        kernels[0],
        source=kernels[0].source.replace("item: u32 = group_x", "item: u32 = group_x + thread"),
    )
    assert rejected(tint, [broken])


def test_clang_compiles_every_variant() -> None:
    clang = next(filter(None, map(shutil.which, ("clang-19", "clang-18", "clang-17"))), None)
    if clang is None:
        pytest.skip("there is no recent clang on the path; on Debian: apt-get install clang-19")
    for kernel in texts("opencl"):
        command = [clang, *CLANG, "-cl-std=CL1.2", "-"]
        run = subprocess.run(
            command, input=kernel.source, capture_output=True, text=True, check=False
        )
        assert run.returncode == 0, f"{kernel.entry} {kernel.config}: {run.stderr}"


def test_what_no_language_has_is_named() -> None:
    """There is no error function in some; the user is told its name, not a compiler's message."""
    score, _ = ops.trace(lambda s, b, h, q, k: call("erf", s), None)
    kind = Attention(64, formats.get("f16"), formats.get("f16"), score=score)
    with pytest.raises(KernelgenError, match=r"no word for call\.erf"):
        generate_walk(targets.get("wgsl").walk("attention", kind), kind, targets.get("wgsl"))


def test_names_of_authors_are_kept_apart() -> None:
    """An operand may be called what the walk or the language calls something."""
    target: Target = targets.get("opencl")
    kind = VARIANTS["own"].kind(64, "f16")
    kernel = generate_walk(target.walk("attention", kind), kind, target)
    assert "*restrict float_," in kernel.source and "*restrict tile_," in kernel.source
    assert [a.name for a in kernel.arguments if a.role == "in"][-2:] == ["float", "tile"]

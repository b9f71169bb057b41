"""What every target with a grid of threads must do; their tests call this for each of them."""

from __future__ import annotations

import dataclasses
import random
import re
from collections.abc import Hashable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import kernelgen
from kernelgen.config import Config
from kernelgen.errors import CompileError, TargetError
from kernelgen.generate import generate, generate_walk
from kernelgen.ir import BlockFormat, formats, table
from kernelgen.ir.ops import matmul
from kernelgen.problem import op_for, relative_error, tolerance
from kernelgen.targets import simt
from kernelgen.targets.base import Kernel, Target, Walk
from kernelgen.targets.device import DeviceRuntime
from kernelgen.tensor import QuantTensor
from kernelgen.verify import OPS, cases, check, sample_weights, verify
from tests.made_up import THREE_BITS

Array = npt.NDArray[Any]

#: one of each kind: K-quants with and without minima, blocks of odd size, tables, plain floats
SAMPLE = tuple(
    map(
        formats.get,
        ("q4_K", "q6_K", "q4_0", "q5_0", "mxfp4", "iq4_nl", "f16", "iq2_xs", "tq1_0"),
    )
)

#: formats that take long, of whose kind SAMPLE has one
LONG = (
    "iq1_s",
    "iq1_m",
    "iq2_xxs",
    "iq2_s",
    "iq3_xxs",
    "iq3_s",
    "iq4_xs",
    "nvfp4",
    "tq2_0",
    "q1_0",
)


def most_slow(fmts: Iterable[BlockFormat]) -> list[Any]:
    """Formats as parameters of a test, the long ones marked slow."""
    return [pytest.param(one, marks=pytest.mark.slow) if one.name in LONG else one for one in fmts]


#: names that languages, templates and helpers use themselves; two fields at odd addresses
AWKWARD = BlockFormat(
    name="awkward", block=32, group=8, nbytes=67,
    fields={
        "values": "u8", "w": "f16", "let": "i16[4]", "thread": "u32", "f32": "f32",
        "x": "u8[16]", "i": "u8[4]", "M": "u8[4]", "var": "u8[4]", "array": "u8[4]", "y": "u8[4]",
        "u32": "u8[4]", "kernel": "u8[4]", "float": "i8[4]",
    },
    ints={"sum": lambda b, g: b.i[g] & 7, "scale": lambda b, g: b.let[g] + b.values},
    code=lambda b, i: (b.x[i % 16] >> (4 * (i // 16))) & 15,
    scale=lambda b, g: b.w * (b.sum[g] + 1) + b.f32 * b.float[g],
    offset=lambda b, g: b.f32 * (
        b.scale[g] + b.M[g] + b.var[g] - b.array[g] + b.y[g] - b.u32[g] + b.kernel[g]
    ),
    bias=8,
    source="many\nlines \\",
)  # fmt: skip

#: a table of floats for codes, as QLoRA's NF4 has it, one scale for two groups
FLOAT_CODES = BlockFormat(
    name="float_codes", block=64, group=32, nbytes=36,
    fields={"d": "f16[2]", "qs": "u8[32]"},
    code=lambda b, i: table(
        tuple(float(np.float32(np.tanh(v / 4 - 2))) for v in range(16)),
        (b.qs[i % 32] >> (4 * (i // 32))) & 15,
    ),
    scale=lambda b, g: b.d[g],
)  # fmt: skip


def runtime(target: Target) -> DeviceRuntime:
    """The target's runtime; skips the test where it cannot run."""
    found = target.runtime()
    reason = found.available()
    if reason is not None:
        pytest.skip(reason)
    assert isinstance(found, DeviceRuntime)
    return found


def walks(target: Target, fmt: BlockFormat) -> Iterator[Walk]:
    """The walks that a format can take, and the device has the features for."""
    features = runtime(target).capabilities().features
    return (w for w in target.walks if w.accepts(fmt) is None and features.issuperset(w.features))


def changed(one: Walk, found: DeviceRuntime, **changes: Any) -> Config | None:
    """The walk's default with other values, or None where it has no such fields."""
    config = one.config.default(found.capabilities())
    if not changes.keys() <= config.as_dict().keys():
        return None
    return one.config.from_dict(config.as_dict() | changes)


def error_of(kernel: Kernel, found: DeviceRuntime, shapes: Sequence[tuple[int, int, int]]) -> None:
    """Run a kernel on these shapes and hold the results to the tolerance."""
    for shape in shapes:
        error = check(kernel, found, *shape)
        bound = tolerance(kernel.op, kernel.precision)
        assert error <= bound, f"{kernel.entry} {kernel.config} {shape}: {error} > {bound}"


def passes_verify(target: Target, fmt: BlockFormat) -> None:
    """Every op and precision, in the default configuration."""
    results = list(verify(target, [fmt], runtime=runtime(target)))
    assert {r.op for r in results} == set(OPS) - ({"quantize"} if fmt.float_codes else set())
    assert [r.problem for r in results if not r.ok] == []


def passes_with(target: Target, fmt: BlockFormat, every_case: bool = False, **changes: Any) -> int:
    """Every walk that has such fields, with these values; returns how many there were."""
    found, count = runtime(target), 0
    for one in walks(target, fmt):
        config = changed(one, found, **changes)
        if config is None:
            continue
        assert config.legal(found.capabilities()) is None
        kernel = generate_walk(one, fmt, target, config)
        shapes = list(cases(one.op, fmt))
        error_of(kernel, found, shapes if every_case else shapes[-2:])
        count += 1
    return count


def edge_shapes(target: Target, fmt: BlockFormat) -> None:
    """K of one block, odd N, and every small M, with configurations that do not divide them."""
    found = runtime(target)
    for precision in ("fp32",) if fmt.float_codes else ("fp32", "int8"):
        for m in range(1, 10):
            one = target.walk(op_for(m), fmt, precision)
            config = one.default(fmt, found.capabilities(), m)
            kernel = generate(one.op, fmt, target, config, precision)
            error_of(kernel, found, [(m, n, fmt.block) for n in (1, 7)])


class GuardedDriver:
    """A driver whose buffers for results are poisoned, and longer than what was asked for."""

    EXTRA = 4096

    def __init__(self, driver: Any) -> None:
        self._driver = driver
        self._guarded: dict[int, tuple[Any, int]] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._driver, name)

    def key(self) -> Hashable:
        return ("guarded", self._driver.key())

    def empty(self, nbytes: int) -> Any:
        whole = -(-nbytes // 4) * 4 + self.EXTRA
        buffer = self._driver.upload(np.full(whole, 0xFF, np.uint8))
        self._guarded[id(buffer)] = (buffer, nbytes)
        return buffer

    def download(self, buffer: Any, out: Array) -> None:
        nbytes = self._guarded[id(buffer)][1]
        found = np.empty(-(-nbytes // 4) * 4 + self.EXTRA, np.uint8)
        self._driver.download(buffer, found)
        assert (found[nbytes:] == 0xFF).all(), "a kernel wrote behind its result"
        out.reshape(-1).view(np.uint8)[:] = found[:nbytes]


def outputs_written_and_kept(
    target: Target, fmt: BlockFormat, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of a result is written (what is not stays NaN), and nothing behind it."""
    found = runtime(target)
    guarded = GuardedDriver(found.driver())
    fresh = type(found)()
    monkeypatch.setattr(fresh, "driver", lambda: guarded)
    for one in walks(target, fmt):
        config = one.default(fmt, found.capabilities())
        kernel = generate_walk(one, fmt, target, config)
        m = 3 if one.op == "matvec" else 19
        error_of(kernel, fresh, [(m, 7, fmt.block), (m, 33, 3 * fmt.block)])


def not_finite_stays_in_its_row(target: Target, fmt: BlockFormat) -> None:
    """NaN and infinities in a row of activations do not reach other rows."""
    found = runtime(target)
    n, k = 9, 2 * fmt.block * (1 if fmt.block > 1 else 40)
    w = QuantTensor(fmt, (n, k), sample_weights(fmt, n, k))
    for m in (4, 12):
        for precision in ("fp32",) if fmt.float_codes else ("fp32", "int8"):
            one = target.walk(op_for(m), fmt, precision)
            config = one.default(fmt, found.capabilities(), m)
            run = found.matmul(generate(one.op, fmt, target, config, precision))
            x = np.random.default_rng(m).standard_normal((m, k), np.float32)
            clean, dirty = np.empty((2, m, n), np.float32)
            run(x, w, clean)
            bad = x.copy()
            bad[1, 0], bad[2, k // 2], bad[3, k - 1] = np.nan, np.inf, -np.inf
            run(bad, w, dirty)
            assert not np.isfinite(dirty[1:4]).any()
            rest = [0, *range(4, m)]
            np.testing.assert_array_equal(dirty[rest], clean[rest])


def pieces_change_nothing(
    target: Target, fmt: BlockFormat, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights, activations and results over what one buffer holds go through in pieces."""
    found = runtime(target)
    n, k = 23, 4 * fmt.block
    blocks = sample_weights(fmt, n, k)
    x = np.random.default_rng(0).standard_normal((13, k), np.float32)
    ids = np.array([22, 0, 5, 5, 11, 1])

    def everything() -> list[Array]:
        w = QuantTensor(fmt, (n, k), blocks)  # a new one: nothing of it is on the device yet
        results = []
        for one in walks(target, fmt):
            config = one.default(fmt, found.capabilities())
            kernel = generate_walk(one, fmt, target, config)
            if one.op in ("matvec", "matmul"):
                rows = x[:5] if one.op == "matvec" else x
                results.append(np.full((len(rows), n), np.nan, np.float32))
                found.matmul(kernel)(rows, w, results[-1])
            elif one.op == "quantize":
                quantized = found.quantize(kernel, x)
                results += [quantized.q, quantized.scale, quantized.sums]
            elif one.op == "get_rows":
                results.append(found.get_rows(kernel, w, ids))
            else:
                results.append(found.dequantize(kernel, w))
        return results

    whole = everything()
    for rows_of_x in (1, 3):
        # a buffer holds this many rows of activations, and fewer rows of weights than there are
        monkeypatch.setattr(found.driver(), "largest", rows_of_x * 4 * max(k, n) + 8)
        split = everything()
        for a, b in zip(whole, split, strict=True):
            np.testing.assert_array_equal(a, b)
    w = QuantTensor(fmt, (n, k), blocks)
    kernelgen.prepare(w, target.name)
    (pieces,) = w.prepared.values()
    assert len(pieces) > 1 or rows_of_x * 4 * k >= w.nbytes
    monkeypatch.setattr(found.driver(), "largest", fmt.row_bytes(k) - 1)
    with pytest.raises(TargetError, match="does not fit a buffer"):
        everything()


def more_groups_than_a_grid_has(
    target: Target, fmt: BlockFormat, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a grid would be too large, its groups do several turns."""
    found = runtime(target)
    monkeypatch.setattr(simt, "MOST_GROUPS", 2)
    fresh = type(found)()
    for one in walks(target, fmt):
        config = one.default(fmt, found.capabilities())
        kernel = generate_walk(one, fmt, target, config)
        shapes = {"matvec": (5, 77), "matmul": (11, 70), "quantize": (300, 1), "get_rows": (9, 4)}
        m, n = shapes.get(one.op, (1, 9))
        error_of(kernel, fresh, [(m, n, 3 * fmt.block)])


def rejections_show_the_line(target: Target, breaks: Sequence[tuple[str, str, str]]) -> None:
    """A driver that rejects a kernel: (what is replaced, by what, what it must complain about)."""
    found = runtime(target)
    fmt = formats.get("q4_0")
    kernel = generate("matvec", fmt, target, precision="fp32")
    for old, new, said in breaks:
        source = kernel.source.replace(old, new, 1)
        assert source != kernel.source
        line = next(i for i, s in enumerate(source.splitlines(), 1) if new in s)
        text = source.splitlines()[line - 1].strip()
        with pytest.raises(CompileError) as caught:
            found.launcher(dataclasses.replace(kernel, source=source))
        message = str(caught.value)
        assert message.startswith(caught.value.args[0]) and "\n" not in message
        assert "rejected matvec q4_0 (threads=" in message and said in message
        assert message.endswith(f" at line {line}: {text}")


def one_sentence(reason: str | None) -> None:
    """What `available` says must be of use to a person."""
    assert reason and "\n" not in reason and "pip install" in reason and len(reason) < 300


def prepared_once(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """`kernelgen.prepare` repacks and uploads weights once, for all ops."""
    found = runtime(target)
    uploads: list[int] = []
    original = type(found.driver()).upload

    def counted(self: Any, array: Array) -> Any:
        uploads.append(array.nbytes)
        return original(self, array)

    monkeypatch.setattr(type(found.driver()), "upload", counted)
    fmt = formats.get("q5_0")
    exact = np.random.default_rng(1).standard_normal((12, 64), np.float32)
    w = kernelgen.quantize(exact, fmt.name)
    assert kernelgen.prepare(w, target.name) is w
    assert uploads == [w.nbytes] and len(w.prepared) == 1
    uploads.clear()
    kernelgen.prepare(w, target.name)
    x = np.ones((3, 64), np.float32)
    y = kernelgen.matmul(x, w, target=target.name, precision="fp32")
    assert relative_error(y, matmul(x, w.dequantize())) < 1e-5
    kernelgen.matmul(np.ones((20, 64), np.float32), w, target=target.name)
    kernelgen.dequantize(w, target=target.name)
    kernelgen.get_rows(w, np.array([1, 2]), target=target.name)
    # activations and row numbers went up, the weights did not
    assert w.nbytes not in uploads and len(w.prepared) == 1


def many_threads(target: Target) -> None:
    """A kernel may be called from many threads at once."""
    found = runtime(target)
    fmt = formats.get("q4_0")
    w = QuantTensor(fmt, (40, 256), sample_weights(fmt, 40, 256))
    config = target.walk("matvec", fmt, "int8").default(fmt, found.capabilities(), 2)
    run = found.matmul(generate("matvec", fmt, target, config, "int8"))

    def once(seed: int) -> tuple[Array, Array]:
        x = np.random.default_rng(seed).standard_normal((2, 256), np.float32)
        y = np.empty((2, 40), np.float32)
        for _ in range(5):
            run(x, w, y)
        return x, y

    with ThreadPoolExecutor(8) as pool:
        for x, y in pool.map(once, range(24)):
            alone = np.empty_like(y)
            run(x, w, alone)
            np.testing.assert_array_equal(y, alone)


def some_configs(target: Target, fmt: BlockFormat, count: int, seed: int = 0) -> None:
    """Configurations drawn from all legal ones."""
    found = runtime(target)
    caps = found.capabilities()
    rng = random.Random(f"{fmt.name} {seed}")
    for one in walks(target, fmt):
        legal = [c for c in dict.fromkeys(one.config.space()) if c.legal(caps) is None]
        for config in rng.sample(legal, min(count, len(legal))):
            kernel = generate_walk(one, fmt, target, config)
            error_of(kernel, found, rng.sample(list(cases(one.op, fmt)), 2))


def texts(target: Target, fmt: BlockFormat) -> Iterator[Kernel]:
    """A kernel of every walk in every variant, whether or not a device here can run it."""
    for one in (w for w in target.walks if w.accepts(fmt) is None):
        default = one.config().as_dict()
        for field in dataclasses.fields(one.config):
            if field.type != "str":
                continue
            for value in dict.fromkeys(field.metadata["choices"]):
                config = one.config.from_dict(default | {field.name: value})
                yield generate_walk(one, fmt, target, config)


def features_are_named(target: Target, marks: dict[str, str]) -> None:
    """A kernel says which features it needs, has the words of just these, and is not legal
    without them: `marks` has the text that betrays each."""
    seen: set[str] = set()
    plain = dataclasses.replace(target.capabilities, features=frozenset())
    for kernel in texts(target, formats.get("q4_K")):
        for feature, mark in marks.items():
            assert (feature in kernel.features) == (mark in kernel.source)
        reason = kernel.walk.refuses(kernel.config, kernel.format, plain)
        assert bool(kernel.features) == bool(reason)
        if reason:
            assert re.search("|".join(kernel.features), reason)
        seen |= set(kernel.features)
    assert seen == {"dot", "fp16", "subgroups"}


#: formats that only these tests know
MADE_UP = (THREE_BITS, AWKWARD, FLOAT_CODES)

"""Attention on the tiles of matrix units against the reference: on AMX where the CPU has it, and
everywhere in plain C, which stands in for the instructions."""

from __future__ import annotations

import dataclasses
import functools
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest

from kernelgen import targets
from kernelgen.api_attention import attention as call_attention
from kernelgen.config.tiles import TileAttentionConfig
from kernelgen.generate import generate_walk
from kernelgen.ir import formats
from kernelgen.ir.ops.attention import Attention, attention, trace
from kernelgen.problem import relative_error, rounded, tolerance
from kernelgen.targets.base import Runtime, Walk
from kernelgen.targets.c.runtime import CRuntime, Isa, isa_named, threads
from kernelgen.tensor import QuantTensor
from kernelgen.verify_attention import row_error
from tests.c.attention_kinds import BOUND, CASES, Array, arrays_of, kind, reference, tensors
from tests.c.machines import find_clang, here
from tests.c.programs import ProgramRuntime
from tests.c.test_attention import SAMPLE
from tests.c.test_memory import SANITIZERS

#: queries, keys, heads that share a head of K and V: few rows and many, parts of pairs and tiles
SHAPES = ((3, 130, 4), (16, 16, 1), (7, 107, 4), (64, 64, 4), (257, 300, 1), (40, 11, 1))
#: vectors of 4, 8 and 16 lanes
STAND_INS = ("scalar", "avx2", "avx512vnni")
PRECISIONS = ("bf16", "fp16", "fp32")
#: largest errors relative to the reference on rounded inputs
BOUNDS = {name: tolerance("attention", name) for name in PRECISIONS}


def stand_in(name: str) -> Isa:
    """An instruction set without tiles as if it had them."""
    isa = isa_named(name)
    features = isa.capabilities.features | {"matrix"}
    return dataclasses.replace(
        isa, capabilities=dataclasses.replace(isa.capabilities, features=features)
    )


def machine(name: str) -> CRuntime:
    """A runtime with tiles, "amx" or a stand-in; skips where the CPU lacks what it needs."""
    return here(isa_named(name) if name == "amx" else stand_in(name))


@functools.cache
def walk_of(precision: str) -> Walk:
    """The walk on tiles in a precision."""
    caps = stand_in("scalar").capabilities
    found = targets.get("c").walk("attention", kind("full", "f32", "f32", 32), precision, caps)
    assert found.style == "tiles"
    return found


def run(
    runtime: Runtime, one: Attention, precision: str, q: Array, k: QuantTensor, v: QuantTensor,
    arrays: dict[str, Array], **config: int,
) -> Array:  # fmt: skip
    """What a kernel gives, in the default configuration but for what is named; its output is
    poisoned before."""
    walk = walk_of(precision)
    chosen = TileAttentionConfig.from_dict(config)
    assert walk.refuses(chosen, one, runtime.capabilities()) is None
    y = np.full((*q.shape[:3], one.value_dim), np.nan, np.float32)
    runtime.attention(generate_walk(walk, one, targets.get("c"), chosen))(q, k, v, arrays, y)
    return y


def error(
    runtime: Runtime, one: Attention, precision: str, t: int, s: int, group: int,
    measure: Callable[[Array, Array], float] = relative_error, **config: int,
) -> float:  # fmt: skip
    """How far a kernel is from the reference on inputs that are rounded as it has them."""
    q, k, v = tensors(one, t, s, group)
    arrays = arrays_of(one, q.shape[1], s)
    seen = (rounded(x, precision) for x in (q, k.dequantize(), v.dequantize()))
    want = reference(one, *seen, arrays)
    return measure(run(runtime, one, precision, q, k, v, arrays, **config), want)


def errors(name: str, precision: str, case: tuple[str, str, str, int, int]) -> dict[str, float]:
    """Errors that are too large, by shape."""
    one, runtime = kind(*case), machine(name)
    # a query before the first key has no document
    shapes = [x for x in SHAPES if case[0] != "documents" or x[0] <= x[1]]
    found = {str(x): error(runtime, one, precision, *x) for x in shapes}
    return {shape: e for shape, e in found.items() if not e <= BOUNDS[precision]}


# ---- quick ------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", SAMPLE, ids=lambda case: case[0])
def test_sample(case: tuple[str, str, str, int, int]) -> None:
    precision = PRECISIONS[SAMPLE.index(case) % len(PRECISIONS)]
    assert errors("amx", precision, case) == {}


@pytest.mark.parametrize(
    ("isa", "precision", "case"), list(zip(STAND_INS, PRECISIONS, SAMPLE[-3:], strict=True))
)
def test_stand_ins(isa: str, precision: str, case: tuple[str, str, str, int, int]) -> None:
    assert errors(isa, precision, case) == {}


def test_a_cpu_with_tiles_takes_them() -> None:
    """And one without takes float32 in vectors, whatever is asked for."""
    one, target = kind("causal", "f16", "f16", 64), targets.get("c")
    for precision in PRECISIONS:
        taken = target.serve("attention", one, precision, isa_named("amx").capabilities)
        assert (taken.style, taken.precision) == ("tiles", precision)
        other = target.serve("attention", one, precision, isa_named("avx512vnni").capabilities)
        assert (other.style, other.precision) == ("", "fp32")
    assert target.walk("attention", one, "fp32").style == ""


def test_skipped_tiles_are_not_read() -> None:
    one, runtime = kind("window", "f32", "f32", 64), machine("amx")
    q, k, v = tensors(one, 64, 1500, 4)
    want = reference(one, q, k.dequantize(), v.dequantize(), {})
    span = TileAttentionConfig().keys
    unseen = (1500 - 64 - 32) // span * span  # whole spans that no query sees
    poisoned = []
    for x in (k, v):
        data = x.dequantize()
        data[:, :, :unseen] = np.nan
        poisoned.append(QuantTensor("f32", x.shape, data.reshape(-1).view(np.uint8)))
    assert relative_error(run(runtime, one, "fp32", q, *poisoned, {}), want) <= BOUND


def test_scores_of_all_sizes() -> None:
    one, runtime = kind("causal", "f32", "f32", 64), machine("amx")
    q, k, v = tensors(one, 64, 70, 1)
    for precision in ("bf16", "fp32"):
        for factor in (1e2, 1e4, 1e-30):
            scaled = (q * factor).astype(np.float32)
            got = run(runtime, one, precision, scaled, k, v, {})
            assert np.isfinite(got).all()
            if factor < 1e2:  # there the rounding of scores changes who wins
                seen = (rounded(x, precision) for x in (scaled, k.dequantize(), v.dequantize()))
                assert relative_error(got, reference(one, *seen, {})) <= BOUNDS[precision]


def test_rows_that_see_nothing_are_zero() -> None:
    score, mask = trace(None, lambda b, h, q, k: k < 0)
    f32 = formats.get("f32")
    nothing = Attention(64, f32, f32, score=score, mask=mask)
    some, runtime = kind("infinite", "f16", "q4_0", 64), machine("amx")
    assert (run(runtime, nothing, "bf16", *tensors(nothing, 40, 40, 1), {}) == 0).all()
    rows = np.arange(40) % 3 == 0
    got = run(runtime, some, "bf16", *tensors(some, 40, 40, 1), {})
    assert (got[:, :, rows] == 0).all() and got[:, :, ~rows].any(axis=-1).all()


@pytest.mark.parametrize("lengths", (False, True))
def test_heads_are_shared_out(lengths: bool) -> None:
    """Many, so that each thread has some of its own, and few, which threads have together."""
    one = dataclasses.replace(kind("sinks", "q8_0", "f16", 64), lengths=lengths)
    runtime = machine("amx")
    for heads in (1, 4 * threads()):
        q, k, v = tensors(one, 40, 1100, 2, heads)
        arrays = arrays_of(one, q.shape[1], 1100)
        if lengths:
            arrays["lengths"] = np.array([1100, 30], np.int32)
        want = reference(one, q, k.dequantize(), v.dequantize(), arrays)
        assert relative_error(run(runtime, one, "fp32", q, k, v, arrays), want) <= BOUND


def test_a_negative_scale() -> None:
    _, mask = trace(None, lambda b, h, q, k: (k <= q) & (k % 5 < 4))
    f32, runtime = formats.get("f32"), machine("amx")
    one = Attention(64, f32, f32, mask=mask, scale=-0.25)
    assert error(runtime, one, "bf16", 70, 70, 1) <= BOUNDS["bf16"]


def test_nan_stays_in_its_row() -> None:
    one, runtime = kind("full", "f16", "f16", 64), machine("amx")
    q, k, v = tensors(one, 40, 70, 1)
    clean = run(runtime, one, "bf16", q, k, v, {})
    q[0, 1, 2, 5] = np.nan
    got = run(runtime, one, "bf16", q, k, v, {})
    assert np.isnan(got[0, 1, 2]).all()
    got[0, 1, 2] = clean[0, 1, 2]
    assert np.array_equal(got, clean)


def test_nothing_to_do() -> None:
    one, runtime = kind("full", "f16", "f16", 64), machine("amx")
    assert run(runtime, one, "bf16", *tensors(one, 0, 5, 1), {}).shape == (2, 2, 0, 64)
    assert (run(runtime, one, "bf16", *tensors(one, 40, 0, 1), {}) == 0).all()


@pytest.mark.parametrize(
    "precision", ["bf16", *(pytest.param(p, marks=pytest.mark.slow) for p in PRECISIONS[1:])]
)
def test_memory_around_arrays_is_not_touched(precision: str) -> None:
    machine("amx")
    command = [sys.executable, "-m", "tests.c.guarded_attention", "amx", "tiles", precision]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.returncode}: {done.stdout[-500:]} {done.stderr[-2000:]}"
    assert int(done.stdout) == 28


def test_precisions_of_the_python_interface() -> None:
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((3, 1, 2, 20, 32), np.float32)
    want = call_attention(q, k, v, causal=True, target="numpy")
    for precision in ("bf16", "fp16"):
        got = call_attention(q, k, v, causal=True, target="c", precision=precision)
        # inputs are rounded, too: a score is off by as many units as it has terms of either sign
        assert relative_error(got, want) <= 2 * BOUNDS[precision]


# ---- everything -------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("d", [64, 80, 128, 256])
@pytest.mark.parametrize("pair", ["f16/f16", "q8_0/q8_0", "q4_0/q4_0", "f32/bf16"])
@pytest.mark.parametrize("name", CASES)
def test_all(name: str, pair: str, d: int) -> None:
    k, v = pair.split("/")
    if any(d % formats.get(x).block for x in (k, v)):
        pytest.skip("whole blocks")
    one, runtime = kind(name, k, v, d), machine("amx")
    for precision in PRECISIONS:
        for t in (7, 64, 257, 700):
            for s in (t, t + 300):
                for group in (1, 4):
                    found = error(runtime, one, precision, t, s, group, row_error)
                    assert found <= BOUNDS[precision], (precision, t, s, group)


@pytest.mark.slow
@pytest.mark.parametrize("fmt", [f.name for f in formats.formats()])
@pytest.mark.parametrize("isa", ["amx", *STAND_INS])
def test_every_format(isa: str, fmt: str) -> None:
    assert errors(isa, "fp32", ("causal", fmt, fmt, 256, 256)) == {}


@pytest.mark.slow
@pytest.mark.parametrize("case", SAMPLE, ids=lambda case: case[0])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("isa", ["amx", *STAND_INS])
def test_sample_everywhere(isa: str, precision: str, case: tuple[str, str, str, int, int]) -> None:
    assert errors(isa, precision, case) == {}


@pytest.mark.slow
def test_gcc(compiled_by: Callable[[str], None]) -> None:
    compiled_by("gcc")
    for case in (SAMPLE[1], SAMPLE[-1]):
        for precision in PRECISIONS:
            assert errors("amx", precision, case) == {}


@pytest.mark.slow
@pytest.mark.parametrize("isa", ["amx", "scalar"])
def test_every_configuration(isa: str) -> None:
    """Each choice of each field, with the others as they are."""
    one, runtime = kind("causal", "q8_0", "f16", 64, 80), machine(isa)
    default, seen = TileAttentionConfig().as_dict(), 0
    for config in TileAttentionConfig.space():
        changed = {n: value for n, value in config.as_dict().items() if value != default[n]}
        if len(changed) == 1 and config.legal(runtime.capabilities()) is None:
            seen += 1
            for shape in ((1, 300, 4), (70, 130, 4)):
                assert error(runtime, one, "bf16", *shape, **changed) <= BOUNDS["bf16"], changed
    assert seen > 10


@pytest.mark.slow
@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_sanitizers(sanitizer: str) -> None:
    """Of the stand-in: sanitizers do not see what tiles read and write."""
    clang = find_clang()
    if clang is None:
        pytest.skip("clang is not installed")
    isa = stand_in("avx2")
    here(isa)
    runtime = ProgramRuntime([clang], (*isa.flags, *SANITIZERS[sanitizer], "-g"), isa.capabilities)
    one = kind("own", "q8_0", "f16", 64, 50)
    for shape in ((1, 70, 4), (33, 70, 1), (40, 11, 1)):
        assert error(runtime, one, "bf16", *shape) <= BOUNDS["bf16"]


@pytest.mark.slow
@pytest.mark.parametrize("precision", PRECISIONS)
def test_long(precision: str) -> None:
    """32768 queries of as many keys: the last ones against the reference."""
    one, runtime = kind("causal", "f16", "q8_0", 64), machine("amx")
    q, k, v = (x[:1] for x in tensors(one, 32768, 32768, 1, 1))
    got = run(runtime, one, precision, np.ascontiguousarray(q), k, v, {})
    seen = [rounded(x, precision) for x in (q[:, :, -8:], k.dequantize(), v.dequantize())]
    # the root mean square of so many values' mean is small beside that of a value
    assert relative_error(got[:, :, -8:], attention(one, *seen)) <= 2 * BOUNDS[precision]
    assert np.isfinite(got).all()


MEMORY = """
import resource
import numpy as np
from kernelgen.targets.c.runtime import runtime
from tests.c.attention_kinds import kind, tensors
from tests.c.test_attention_tiles import run
one = kind("causal", "f16", "f16", 64)
run(runtime("amx"), one, "{precision}", *tensors(one, 64, 64, 4, 1), {})
q, k, v = tensors(one, {t}, {t}, 4, 1)
q.sum()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
y = run(runtime("amx"), one, "{precision}", q, k, v, {})
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before * 1024 - y.nbytes)
"""


@pytest.mark.slow
@pytest.mark.parametrize("precision", PRECISIONS)
def test_memory_does_not_grow_with_scores(precision: str) -> None:
    """Of 8 heads of 8192 x 8192 scores, 2 GiB, nothing is kept: scratch is per thread, and some
    heads' K and V, 2 MiB for each part of a number of a head."""
    machine("amx")
    text = MEMORY.replace("{t}", "8192").replace("{precision}", precision)
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 16 << 20

"""Attention on the C target against the reference."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from kernelgen import targets
from kernelgen.errors import TargetError
from kernelgen.generate import generate
from kernelgen.ir import formats
from kernelgen.ir.ops.attention import Attention, attention, operand, trace
from kernelgen.problem import relative_error
from kernelgen.targets.c.attention import CAttentionConfig
from kernelgen.targets.c.runtime import isa_named, native_isa
from kernelgen.tensor import QuantTensor
from kernelgen.verify_attention import row_error
from tests.c.attention_kinds import BOUND, CASES, arrays_of, error, kind, reference, run, tensors
from tests.c.machines import ISA_NAMES, arm, find_clang, here
from tests.c.programs import ProgramRuntime
from tests.c.test_memory import SANITIZERS, python

#: queries, keys, heads that share a head of K and V: few rows and many, whole tiles and parts
SHAPES = (
    (1, 1, 1), (1, 700, 4), (3, 130, 1), (3, 130, 4), (7, 7, 1), (7, 107, 4), (64, 64, 4),
    (257, 300, 1), (40, 11, 1),
)  # fmt: skip
#: case, formats of K and V, head and value dimensions: each once, in some combination
SAMPLE = (
    ("full", "f16", "f16", 64, 64),
    ("causal", "q8_0", "q8_0", 128, 128),
    ("window", "q4_0", "q8_0", 64, 32),
    ("ALiBi", "q8_0", "f16", 64, 80),
    ("documents", "f32", "bf16", 80, 80),
    ("own", "f16", "q4_0", 80, 64),
    ("bias", "q5_1", "iq4_nl", 32, 32),
    ("infinite", "f16", "q4_0", 64, 64),
    ("sinks", "bf16", "f16", 36, 50),
)
OTHERS = tuple(name for name in ISA_NAMES if name != native_isa().name)


def _errors(isa: str, name: str, k: str, v: str, d: int, dv: int = 0) -> dict[str, float]:
    """Errors that are too large, by shape."""
    one = kind(name, k, v, d, dv)
    # a query before the first key has no document
    shapes = [x for x in SHAPES if name != "documents" or x[0] <= x[1]]
    found = {str(x): error(here(isa_named(isa)), one, *x) for x in shapes}
    return {shape: e for shape, e in found.items() if not e <= BOUND}


@pytest.mark.parametrize("case", SAMPLE, ids=lambda case: case[0])
def test_sample(case: tuple[str, str, str, int, int]) -> None:
    assert _errors(native_isa().name, *case) == {}


@pytest.mark.parametrize("isa", ["avx2", "scalar"])
def test_other_instruction_sets(isa: str) -> None:
    assert _errors(isa, "own", "q8_0", "f16", 64, 36) == {}


def test_arm() -> None:
    one = kind("sinks", "q8_0", "q4_0", 32)
    assert max(error(arm("neondot", "max"), one, *x) for x in ((1, 70, 4), (17, 70, 1))) <= BOUND


def test_gcc(compiled_by: Callable[[str], None]) -> None:
    compiled_by("gcc")
    assert _errors(native_isa().name, "ALiBi", "q4_0", "q8_0", 64) == {}


# ---- what is special ------------------------------------------------------------------------


def test_skipped_tiles_are_not_read() -> None:
    one = kind("window", "f32", "f32", 64)
    runtime = here(native_isa())
    for t in (1, 64):
        q, k, v = tensors(one, t, 500, 4)
        want = reference(one, q, k.dequantize(), v.dequantize(), {})
        # the first query sees 33 keys, and what is skipped are whole tiles
        unseen = 500 - t - 32 - 64
        poisoned = []
        for x in (k, v):
            data = x.dequantize()
            data[:, :, :unseen] = np.nan
            poisoned.append(QuantTensor("f32", x.shape, data.reshape(-1).view(np.uint8)))
        assert relative_error(run(runtime, one, q, *poisoned, {}), want) <= BOUND


def test_scores_of_all_sizes() -> None:
    one = kind("causal", "f32", "f32", 64)
    runtime = here(native_isa())
    for t in (1, 64):
        q, k, v = tensors(one, t, 70, 1)
        for factor in (1e2, 1e4, 1e-30):
            scaled = (q * factor).astype(np.float32)
            got = run(runtime, one, scaled, k, v, {})
            assert np.isfinite(got).all()
            if factor < 1e4:  # there the rounding of scores changes who wins
                want = reference(one, scaled, k.dequantize(), v.dequantize(), {})
                assert relative_error(got, want) <= BOUND * max(1, factor)


def test_rows_that_see_nothing_are_zero() -> None:
    score, mask = trace(None, lambda b, h, q, k: k < 0)
    nothing = Attention(64, formats.get("f32"), formats.get("f32"), score=score, mask=mask)
    one = kind("infinite", "f16", "q4_0", 64)
    runtime = here(native_isa())
    for t in (1, 40):
        q, k, v = tensors(nothing, t, 40, 1)
        assert (run(runtime, nothing, q, k, v, {}) == 0).all()
        q, k, v = tensors(one, t, 40, 1)
        rows = (np.arange(t) + 40 - t) % 3 == 0
        got = run(runtime, one, q, k, v, {})
        assert (got[:, :, rows] == 0).all() and got[:, :, ~rows].any(axis=-1).all()


def test_nan_stays_in_its_row() -> None:
    one = kind("full", "f16", "f16", 64)
    runtime = here(native_isa())
    for t in (3, 40):
        q, k, v = tensors(one, t, 70, 1)
        clean = run(runtime, one, q, k, v, {})
        q[0, 1, 2, 5] = np.nan
        got = run(runtime, one, q, k, v, {})
        assert np.isnan(got[0, 1, 2]).all()
        got[0, 1, 2] = clean[0, 1, 2]
        assert np.array_equal(got, clean)


def test_nothing_to_do() -> None:
    one = kind("full", "f16", "f16", 64)
    runtime = here(native_isa())
    assert run(runtime, one, *tensors(one, 0, 5, 1), {}).shape == (2, 2, 0, 64)
    for t in (1, 40):
        assert (run(runtime, one, *tensors(one, t, 0, 1), {}) == 0).all()


def test_arguments_by_the_kernels_names_are_refused() -> None:
    there = operand("q", "f32", 1)
    score, mask = trace(lambda s, b, h, q, k: s + there[h], None)
    f32 = formats.get("f32")
    one = Attention(64, f32, f32, score=score, mask=mask, operands=(there,))
    with pytest.raises(TargetError, match="an operand is called q"):
        generate("attention", one, targets.get("c"))


def test_memory_around_arrays_is_not_touched() -> None:
    here(native_isa())
    done = python("-m", "tests.c.guarded_attention", native_isa().name)
    assert done.returncode == 0, f"{done.returncode}: {done.stdout[-500:]} {done.stderr[-2000:]}"
    assert int(done.stdout) == 28


FUNCTIONS = """
#include "words_flash.h"
#define ALL(name, function)                               \\
    void name(const float *x, float *y, int64_t count) {  \\
        for (int64_t i = 0; i < count; i += LANES)        \\
            store_lanes(y + i, function(load_lanes(x + i))); \\
    }
ALL(exp_all, exp_f32)
ALL(exp_falling_all, exp_falling)
ALL(tanh_all, tanh_f32)
"""


@pytest.mark.parametrize("isa", dict.fromkeys([native_isa().name, "avx2", "scalar"]))
def test_functions(isa: str, tmp_path: Path) -> None:
    """exp and tanh to within 2 units in the last place, and where there are no such."""
    import ctypes

    from kernelgen.targets.c.compiler import HEADERS, find_compiler, flags

    here(isa_named(isa))
    found = find_compiler()
    assert not isinstance(found, str)
    source, made = tmp_path / "functions.c", tmp_path / "functions.so"
    source.write_text(FUNCTIONS)
    options = [*flags(isa_named(isa).flags, True, False), "-Werror", "-shared", f"-I{HEADERS}"]
    subprocess.run([*found.command, *options, str(source), "-o", str(made), "-lm"], check=True)
    library = ctypes.CDLL(str(made))

    def apply(name: str, x: np.ndarray) -> np.ndarray:
        y = np.empty_like(x)
        pointer = ctypes.c_void_p
        getattr(library, name)(
            pointer(x.ctypes.data), pointer(y.ctypes.data), ctypes.c_int64(x.size)
        )
        return y

    rng = np.random.default_rng(0)
    ranges = {
        "exp_all": (np.exp, -86.5, 88.7), "exp_falling_all": (np.exp, -86.9, 0),
        "tanh_all": (np.tanh, -10, 10),
    }  # fmt: skip
    for name, (function, lo, hi) in ranges.items():
        x = np.concatenate([rng.uniform(lo, hi, 1 << 16), -rng.random(1 << 12)]).astype(np.float32)
        want = function(x.astype(np.float64))
        units = np.abs(apply(name, x) - want) / np.spacing(np.abs(want).astype(np.float32))
        assert units.max() <= 2, name
    special = np.array([-np.inf, -1e30, -100, -0.0, 0, np.nan, 1e30, np.inf] * 2, np.float32)
    wanted = np.array([0, 0, 0, 1, 1, np.nan, np.inf, np.inf] * 2)
    assert np.array_equal(apply("exp_all", special), wanted, equal_nan=True)
    falling = apply("exp_falling_all", special)
    assert np.array_equal(falling[:6], wanted[:6], equal_nan=True)
    assert np.array_equal(apply("tanh_all", special), np.tanh(special), equal_nan=True)


# ---- everything -----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("d", [64, 80, 128, 256])
@pytest.mark.parametrize("pair", ["f16/f16", "q8_0/q8_0", "q4_0/q4_0", "q8_0/q4_0", "f16/q8_0"])
@pytest.mark.parametrize("name", CASES)
def test_all(name: str, pair: str, d: int) -> None:
    k, v = pair.split("/")
    if any(d % formats.get(x).block for x in (k, v)):
        pytest.skip("whole blocks")
    one, runtime = kind(name, k, v, d), here(native_isa())
    for t in (1, 7, 64, 257, 1024):
        for s in (t, t + 100):
            for group in (1, 4):
                heads = 1 if t == 1024 else 2
                q, keys, values = tensors(one, t, s, group, heads)
                arrays = arrays_of(one, q.shape[1], s)
                want = reference(one, q, keys.dequantize(), values.dequantize(), arrays)
                got = run(runtime, one, q, keys, values, arrays)
                assert row_error(got, want) <= BOUND, (t, s, group)


@pytest.mark.slow
@pytest.mark.parametrize("fmt", [f.name for f in formats.formats()])
@pytest.mark.parametrize("isa", ISA_NAMES)
def test_every_format(isa: str, fmt: str) -> None:
    assert _errors(isa, "causal", fmt, fmt, 256) == {}


@pytest.mark.slow
@pytest.mark.parametrize("case", SAMPLE, ids=lambda case: case[0])
@pytest.mark.parametrize("isa", OTHERS)
def test_sample_on_other_instruction_sets(isa: str, case: tuple[str, str, str, int, int]) -> None:
    assert _errors(isa, *case) == {}


@pytest.mark.slow
@pytest.mark.parametrize("isa", [native_isa().name, "scalar"])
def test_every_configuration(isa: str) -> None:
    """Each choice of each field, with the others as they are."""
    one, runtime = kind("causal", "q8_0", "f16", 64, 80), here(isa_named(isa))
    seen = 0
    default = CAttentionConfig.default(runtime.capabilities())
    for config in CAttentionConfig.space():
        changed = {
            name: value for name, value in config.as_dict().items()
            if value != default.as_dict()[name]
        }  # fmt: skip
        if len(changed) == 1 and config.legal(runtime.capabilities()) is None:
            seen += 1
            for shape in ((1, 300, 4), (70, 130, 4)):
                assert error(runtime, one, *shape, **changed) <= BOUND, changed
    assert seen > 10


@pytest.mark.slow
@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_sanitizers(sanitizer: str) -> None:
    clang = find_clang()
    if clang is None:
        pytest.skip("clang is not installed")
    isa = native_isa()
    runtime = ProgramRuntime([clang], (*isa.flags, *SANITIZERS[sanitizer], "-g"), isa.capabilities)
    one = kind("own", "q8_0", "f16", 64, 50)
    assert max(error(runtime, one, *x) for x in ((1, 70, 4), (33, 70, 1), (9, 5, 1))) <= BOUND


@pytest.mark.slow
def test_long() -> None:
    """32768 queries of as many keys: the last ones against the reference."""
    one, runtime = kind("causal", "f16", "q8_0", 64), here(native_isa())
    q, k, v = (x[:1] for x in tensors(one, 32768, 32768, 1, 1))
    got = run(runtime, one, np.ascontiguousarray(q), k, v, {})
    want = attention(one, q[:, :, -8:], k.dequantize(), v.dequantize())
    # the root mean square of so many values' mean is small beside that of a value
    assert relative_error(got[:, :, -8:], want) <= 2 * BOUND
    assert np.isfinite(got).all()


MEMORY = """
import resource
import numpy as np
from kernelgen.targets.c.runtime import runtime
from tests.c.attention_kinds import kind, run, tensors
one = kind("causal", "f16", "f16", 64)
run(runtime(), one, *tensors(one, 64, 64, 4, 1), {})
q, k, v = tensors(one, {t}, {t}, 4, 1)
q.sum()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
y = run(runtime(), one, q, k, v, {})
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before * 1024 - y.nbytes)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_scores() -> None:
    """Of 8 heads of 8192 x 8192 scores, 2 GiB, nothing is kept: scratch is per thread."""
    here(native_isa())
    done = subprocess.run(
        [sys.executable, "-c", MEMORY.replace("{t}", "8192")], capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    assert int(done.stdout) < 16 << 20

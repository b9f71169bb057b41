"""Calls that are made once and replayed, and what cannot be."""

from __future__ import annotations

import numpy as np

import kernelgen
from kernelgen import recording

RNG = np.random.default_rng(0)
W = kernelgen.quantize(RNG.standard_normal((24, 64), np.float32), "q8_0")
NORM = np.ones(64, np.float32)
NORM.flags.writeable = False


def normal(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape, np.float32)


def test_a_replay_reads_what_arrays_hold_by_then() -> None:
    x, ids = normal(2, 64), np.array([3, 5])
    for target in ("numpy", "c"):
        with recording.record((x, ids)) as made:
            y = kernelgen.matmul(x, W, norm=NORM, target=target, precision="fp32")
            z = kernelgen.silu(y, target=target)
            rows = kernelgen.get_rows(W, ids, target=target)
        assert made.refused is None
        for _ in range(2):
            x[:], ids[:] = normal(2, 64), RNG.integers(0, 24, 2)
            made.replay()
            again = kernelgen.matmul(x, W, norm=NORM, target=target, precision="fp32")
            assert np.array_equal(y, again)
            assert np.array_equal(z, kernelgen.silu(again, target=target))
            assert np.array_equal(rows, W.dequantize(ids))


def test_what_numpy_makes_in_between_is_refused_unless_it_is_told() -> None:
    x = normal(2, 64)
    with recording.record((x,)) as made:
        kernelgen.matmul(x * 2, W, target="numpy")
    assert made.refused is not None and "float32 (2, 64) is read" in made.refused
    with recording.record((x,)) as made:
        kernelgen.rms_norm(x, np.ones(64, np.float32), target="numpy")
    assert made.refused is not None and "float32 (64,) is read" in made.refused
    twice = np.empty_like(x)
    with recording.record((x,)) as made:
        recording.on_host(lambda: np.multiply(x, 2, out=twice), (x,), (twice,))
        turned = recording.contiguous(twice.T)
        y = kernelgen.silu(turned, target="numpy")
    assert made.refused is None
    x[:] = normal(2, 64)
    made.replay()
    assert np.array_equal(y, kernelgen.silu(np.ascontiguousarray(2 * x.T), target="numpy"))


def test_only_what_a_thread_records_is_noted() -> None:
    x = normal(2, 64)
    with recording.record((x,)) as outer:
        kernelgen.silu(x, target="numpy")
        with recording.record((x,)) as inner:
            kernelgen.silu(x, target="numpy")
        recording.on_host(lambda: kernelgen.silu(x * 2, target="numpy"), (x,))
    kernelgen.silu(x * 2, target="numpy")
    assert outer.refused is inner.refused is None
    assert (len(outer._calls), len(inner._calls)) == (2, 1)

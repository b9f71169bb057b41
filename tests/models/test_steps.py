"""Steps that are recorded once and replayed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kernelgen import models
from kernelgen.api import runtime_of
from kernelgen.errors import ShapeError
from tests.models import tiny
from tests.models.test_llama import VARIANTS

#: what each of four sequences begins with, and the sequences that get a token, step by step
PROMPTS = [[3, 1, 4], [1], [5, 9, 2, 6, 5], [3, 58]]
STEPS = ([0, 1, 2], [2, 0, 3], [1, 0, 2], [3, 1, 0], [3])


def begun(model: models.Decoder, **options: Any) -> models.Sequences:
    cache = model.sequences(4, capacity=48, **options)
    for sequence, prompt in enumerate(PROMPTS):
        model.forward([(sequence, prompt)], cache)
    cache.steps.clear()
    return cache


def check(model: models.Decoder, rounds: int = 8, **options: Any) -> None:
    """Replays give what calls give that nothing was recorded for, to the last bit; in 8 rounds
    sequences come to have a second page."""
    replayed, anew = begun(model, **options), begun(model, **options)
    for number, some in enumerate(STEPS * rounds):
        turns = [(sequence, [(7 * number + sequence) % tiny.VOCABULARY]) for sequence in some]
        wanted = model.forward(turns, anew)
        anew.steps.clear()
        assert np.array_equal(model.forward(turns, replayed), wanted)
    assert [one.recording.refused for one in replayed.steps.values()] == [None, None]
    for a, b in zip(replayed.layers, anew.layers, strict=True):
        assert np.array_equal(a.lengths, b.lengths) and a.pages is not None
        assert np.array_equal(a.pages, b.pages)
        assert np.array_equal(a.keys.data, b.keys.data)
        assert np.array_equal(a.values.data, b.values.data)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_replay_computes_what_a_call_does(variant: str, tmp_path: Path) -> None:
    path = tiny.write(tmp_path / "model.gguf", **VARIANTS[variant])
    check(models.open(path, "numpy"))


@pytest.mark.parametrize("formats", [("q8_0", None), ("f32", "q4_0")])
def test_so_with_other_caches(formats: tuple[str, str | None], tmp_path: Path) -> None:
    model = models.open(tiny.write(tmp_path / "model.gguf"), "numpy")
    check(model, format=formats[0], value_format=formats[1])


@pytest.mark.parametrize(
    "target",
    ["c", *(pytest.param(one, marks=pytest.mark.slow) for one in ("opencl", "wgsl"))],
)
def test_so_on_other_targets(target: str, tmp_path: Path) -> None:
    if (reason := runtime_of(target).available()) is not None:
        pytest.skip(reason)
    check(models.open(tiny.write(tmp_path / "model.gguf", fmt="q8_0"), target), rounds=2)


def test_results_are_the_callers_own(tmp_path: Path) -> None:
    model = models.open(tiny.write(tmp_path / "model.gguf"), "numpy")
    cache = begun(model)
    first = model.forward([(0, [1])], cache)
    kept = first.copy()
    second = model.forward([(0, [2])], cache)
    assert np.array_equal(first, kept) and not np.array_equal(first, second)
    second[:] = 0
    assert model.forward([(0, [3])], cache).any()


def test_few_are_kept(tmp_path: Path) -> None:
    model = models.open(tiny.write(tmp_path / "model.gguf"), "numpy")
    cache = begun(model)
    for some in ([0], [0, 1], [0], [0, 1, 2], [1]):
        model.forward([(sequence, [1]) for sequence in some], cache)
    assert [size for _, size in cache.steps] == [3, 1]


@pytest.mark.parametrize("every", [False, True])
def test_nothing_depends_on_what_is_called_together(every: bool, tmp_path: Path) -> None:
    """Prompts of several lengths and single tokens in one call, and each in a call of its own."""
    model = models.open(tiny.write(tmp_path / "model.gguf", fmt="q8_0"), "numpy", together=2)
    together, alone = begun(model), begun(model)
    turns = [(2, [7]), (0, [1, 2, 3]), (3, [9]), (1, [4])]
    wanted = [model.forward([one], alone, every=every) for one in turns]
    assert np.array_equal(model.forward(turns, together, every=every), np.concatenate(wanted))
    assert list(together.lengths) == list(alone.lengths) == [6, 2, 6, 3]


def test_precisions_of_prompts_and_of_single_tokens(tmp_path: Path) -> None:
    path = tiny.write(tmp_path / "model.gguf", fmt="q8_0")

    def steps(precision: str, decode_precision: str | None) -> list[Any]:
        model = models.open(path, "numpy", precision, decode_precision=decode_precision)
        cache = model.sequences(capacity=8)
        return [model.forward([(0, tokens)], cache) for tokens in ([3, 1, 4], [1])]

    floats, bytes_ = steps("fp32", None), steps("int8", None)
    mixed = steps("int8", "fp32")
    assert np.array_equal(mixed[0], bytes_[0]) and not np.array_equal(mixed[0], floats[0])
    assert not np.array_equal(mixed[1], bytes_[1])
    again = steps("fp32", "int8")
    assert np.array_equal(again[0], floats[0]) and not np.array_equal(again[1], floats[1])
    with pytest.raises(ShapeError, match="at least one"):
        models.open(path, "numpy", together=0)

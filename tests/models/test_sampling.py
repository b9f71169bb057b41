"""Sampling: probabilities by hand, and frequencies by chance."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from kernelgen.errors import ConfigError, KernelgenError
from kernelgen.models import Sampler

LOGITS = np.log(np.array([0.1, 0.4, 0.2, 0.3], np.float32))

PROBABILITIES: list[tuple[dict[str, Any], list[float]]] = [
    ({}, [0, 1, 0, 0]),
    ({"temperature": 1.0}, [0.1, 0.4, 0.2, 0.3]),
    ({"temperature": 0.5}, [1 / 30, 16 / 30, 4 / 30, 9 / 30]),
    ({"temperature": 1.0, "top_k": 2}, [0, 4 / 7, 0, 3 / 7]),
    ({"temperature": 1.0, "top_p": 0.65}, [0, 4 / 7, 0, 3 / 7]),
    ({"temperature": 1.0, "top_p": 0.75}, [0, 4 / 9, 2 / 9, 3 / 9]),
    ({"temperature": 1.0, "top_p": 0.01}, [0, 1, 0, 0]),
    ({"temperature": 1.0, "top_k": 3, "top_p": 0.7}, [0, 4 / 7, 0, 3 / 7]),
    ({"temperature": 1.0, "top_k": 99}, [0.1, 0.4, 0.2, 0.3]),
]


@pytest.mark.parametrize(("options", "wanted"), PROBABILITIES)
def test_probabilities(options: dict[str, Any], wanted: list[float]) -> None:
    sampler = Sampler(**options)
    found = sampler.probabilities(LOGITS)
    assert np.allclose(found, wanted, atol=1e-6)
    counts = np.bincount([sampler(LOGITS) for _ in range(4000)], minlength=4) / 4000
    assert np.abs(counts - wanted).max() < 0.03
    assert np.all(counts[np.array(wanted) == 0] == 0)


def test_a_seed_gives_the_same_tokens_again() -> None:
    def some(seed: int) -> list[int]:
        sampler = Sampler(1.0, seed=seed)
        return [sampler(LOGITS) for _ in range(50)]

    assert some(1) == some(1) != some(2)


def test_of_equal_logits_the_first_counts() -> None:
    assert Sampler()(np.zeros(5, np.float32)) == 0


@pytest.mark.parametrize(
    "options", [{"temperature": -1}, {"top_k": -1}, {"top_p": 0}, {"top_p": 1.1}, {"seed": -1}]
)
def test_impossible_settings_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="top-p"):
        Sampler(**options)


def test_logits_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(KernelgenError, match="damaged"):
        Sampler()(np.array([0, np.nan], np.float32))


@pytest.mark.parametrize("count", [1, 3, 5, 6, 50])
def test_of_equal_logits_the_first_take_part(count: int) -> None:
    logits = np.array([1.0, 3.0, 2.0, 3.0, 2.0, 2.0], np.float32)
    found = Sampler(1.0, top_k=count).probabilities(logits)
    wanted = np.argsort(-logits, kind="stable")[:count]
    assert set(np.flatnonzero(found)) == set(wanted.tolist())

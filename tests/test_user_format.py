"""A user's format works everywhere with no line changed."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

import kernelgen
from kernelgen import targets
from kernelgen.errors import FormatError
from kernelgen.files import build, kernels
from kernelgen.verify import verify
from tests.made_up import THREE_BITS


@pytest.fixture
def registered() -> Iterator[None]:
    kernelgen.register_format(THREE_BITS)
    yield
    kernelgen.unregister_format("three_bits")


def runnable() -> list[str]:
    return [t.name for t in targets.targets() if t.runtime().available() is None]


def test_something_can_run() -> None:
    assert "c" in runnable()


@pytest.mark.parametrize("name", runnable())
def test_verified_on_every_target(registered: None, name: str) -> None:
    results = list(verify(targets.get(name), [THREE_BITS]))
    assert {r.op for r in results} >= {"dequantize", "quantize", "matvec", "matmul"}
    assert [r.problem for r in results if not r.ok] == []


@pytest.mark.parametrize("name", runnable())
def test_multiplied(registered: None, name: str) -> None:
    rng = np.random.default_rng(3)
    exact = rng.standard_normal((33, 192), np.float32)
    w = kernelgen.quantize(exact, "Three_Bits")
    for m in (1, 12):
        x = rng.standard_normal((m, 192), np.float32)
        y = kernelgen.matmul(x, w, target=name)
        true = x @ exact.T
        error = np.sqrt(np.mean((y - true) ** 2) / np.mean(true**2))
        assert 0.05 < error < 0.25  # three bits lose about 15%: less would be too good to be true


def test_built_for_every_target(registered: None, tmp_path: object) -> None:
    for target in targets.targets():
        made = [k.op for k in kernels(target, [THREE_BITS])]
        assert "matmul" in made
        changed = build(target, tmp_path, [THREE_BITS])  # type: ignore[arg-type]
        assert any("three_bits" in path.name for path in changed)


def test_unknown_before_and_after() -> None:
    with pytest.raises(FormatError, match=r"three_bits.*known are"):
        kernelgen.quantize(np.ones((1, 64), np.float32), "three_bits")

"""Checkpoints that the ecosystems' own packages write and read here, where they are installed.

`record.py` names the packages; what they once wrote is in `recorded`, for machines without them.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import kernelgen
from tests.checkpoints.test_recorded import FORMATS, NAME, ROUNDED

pytestmark = pytest.mark.slow
record = pytest.importorskip("tests.checkpoints.record", reason="torch is not installed")


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", FORMATS)
def test_values_are_those_of_the_package(
    name: str, seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    def weights(n: int, k: int) -> torch.Tensor:
        """Of every size: the smallest scales are subnormal in half precision."""
        torch.manual_seed(seed)
        return torch.randn(n, k) * 10.0 ** torch.linspace(-4, 2, n)[:, None]

    monkeypatch.setattr(record, "weights", weights)
    monkeypatch.setattr(record, "HERE", tmp_path)
    try:
        record.write(name)
    except ImportError as error:
        pytest.skip(f"{error}; tests/checkpoints/record.py names the packages")
    saved = np.load(tmp_path / name / "values.npz")
    got, want = kernelgen.open(tmp_path / name)[NAME].dequantize()[saved["rows"]], saved["values"]
    if name in ROUNDED:
        assert (abs(got - want) <= 1.5 * 2**-23 * abs(want).max(axis=1, keepdims=True)).all()
    else:
        np.testing.assert_array_equal(got, want)

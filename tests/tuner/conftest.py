"""What tests of the tuner share: a cache of their own, and a target that is made up."""

from __future__ import annotations

from pathlib import Path

import pytest

from kernelgen.targets.base import Runtime, Target
from kernelgen.tuner import lookup
from tests.tuner import made_up_target


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that was tuned before counts, and nothing stays."""
    monkeypatch.setenv("KERNELGEN_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv(lookup.REQUIRE, raising=False)


@pytest.fixture
def made_up() -> tuple[Target, Runtime]:
    return made_up_target.factory()

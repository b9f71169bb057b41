"""What tests of the C target share: choosing the compiler, and where kernels are kept."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kernelgen.targets.c import compiler
from tests.c.machines import find_clang


@pytest.fixture
def compiled_by(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """A function that makes "clang", "gcc" or another command the compiler of this test."""

    def choose(command: str) -> None:
        found = find_clang() if command == "clang" else command
        if found is None or shutil.which(found.split()[0]) is None:
            pytest.skip(f"{command} is not installed")
        monkeypatch.setenv("CC", found)
        compiler.find_compiler.cache_clear()

    yield choose
    monkeypatch.undo()
    compiler.find_compiler.cache_clear()


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of compiled kernels, new and empty for this test."""
    monkeypatch.setenv("KERNELGEN_CACHE", str(tmp_path / "cache"))
    compiler.find_compiler.cache_clear()
    yield compiler.cache_folder()
    monkeypatch.undo()
    compiler.find_compiler.cache_clear()

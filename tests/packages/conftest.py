"""A folder in which the commands of documents run."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

from tests.packages.making import EXAMPLES, ROOT


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder with the examples, in which `kernelgen` and `python` are these."""
    shutil.copytree(EXAMPLES, tmp_path / "examples")
    tools = tmp_path / "tools"
    tools.mkdir()
    for name, words in (("kernelgen", "-m kernelgen"), ("python", ""), ("pip", "-m pip")):
        (tools / name).write_text(
            f'#!/bin/sh\nPYTHONPATH="{ROOT}:$PYTHONPATH" exec "{sys.executable}" {words} "$@"\n'
        )
        (tools / name).chmod(0o755)
    return tmp_path

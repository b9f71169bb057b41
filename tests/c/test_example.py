"""The C example, which links generated kernels with no Python."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from kernelgen import targets
from kernelgen.files import build
from kernelgen.ir import formats
from tests.c.machines import find_clang

EXAMPLE = Path(__file__).resolve().parent.parent.parent / "examples" / "c"


@pytest.mark.parametrize("compiler", ["clang", "gcc"])
@pytest.mark.parametrize("options", [[], ["OPENMP=", "INSTRUCTIONS=-DKERNELGEN_SCALAR"]])
def test_example(compiler: str, options: list[str], tmp_path: Path) -> None:
    command = find_clang() if compiler == "clang" else compiler
    for program in (command, "make"):
        if program is None or shutil.which(program) is None:
            pytest.skip(f"{program or compiler} is not installed")
    build(targets.get("c"), tmp_path, [formats.get("q8_0")])
    for name in ("main.c", "Makefile"):
        shutil.copy(EXAMPLE / name, tmp_path / name)
    # clang 19 finds fault with its own -march=native on CPUs with AVX10
    done = subprocess.run(
        ["make", f"CC={command}", f"GENERATED={tmp_path / 'c'}", *options,
         "CFLAGS=-O3 -Wall -Wextra -Werror -Wno-invalid-feature-combination"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("against the same weights") == 2


def test_it_is_as_short_as_promised() -> None:
    assert len((EXAMPLE / "main.c").read_text().splitlines()) <= 75

"""CUDA without a GPU: kernels run in the emulator, and nvcc compiles them where it is."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from kernelgen import targets
from kernelgen.files import kernels
from kernelgen.ir import formats
from kernelgen.ir.block import BlockFormat
from kernelgen.targets.base import EMULATED
from kernelgen.verify import verify
from tests.made_up import THREE_BITS

CUDA = targets.get("cuda")
SAMPLE = ("q4_K", "q6_K", "q5_0", "iq4_nl", "f16")
SAMPLED = [*(formats.get(name) for name in SAMPLE), THREE_BITS]
OTHERS = [fmt for fmt in formats.FORMATS if fmt.name not in SAMPLE]
EACH = [*SAMPLED, *(pytest.param(fmt, marks=pytest.mark.slow) for fmt in OTHERS)]


@pytest.mark.parametrize("fmt", EACH, ids=lambda fmt: fmt.name)
def test_emulated(fmt: BlockFormat) -> None:
    results = list(verify(CUDA, [fmt], runtime=CUDA.runtime(EMULATED)))
    assert results and {r.how for r in results} == {"emulated"}
    assert [(r.op, r.precision, r.problem) for r in results if not r.ok] == []


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on the path")
@pytest.mark.parametrize("fmt", EACH, ids=lambda fmt: fmt.name)
def test_compiled_without_spills(fmt: BlockFormat, tmp_path: Path) -> None:
    source = tmp_path / "kernels.cu"
    for kernel in kernels(CUDA, [fmt], ("matvec", "matmul")):
        source.write_text(kernel.source)
        done = subprocess.run(
            ["nvcc", "-arch=sm_80", "-cubin", "-Xptxas", "-v", "-o", "/dev/null", str(source)],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert "0 bytes spill stores, 0 bytes spill loads" in done.stderr

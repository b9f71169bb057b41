"""The same tokens on every target, over many steps; on emulated GPUs, over a few."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from kernelgen import models, targets
from kernelgen.api import runtime_of
from kernelgen.targets.base import EMULATED
from tests.models import tiny

pytestmark = pytest.mark.slow

PROMPT = [3, 1, 4, 1, 5]
STEPS = 64


def greedy(path: Path, target: str, precision: str, cache: str, count: int) -> list[int]:
    model = models.open(path, target, precision)
    kept = model.sequences(capacity=len(PROMPT) + count, format=cache)
    return list(models.Generation(model, PROMPT, count, cache=kept))


#: formats of weights and of the cache, and the precision of products.  Activations of 8 bits are
#: rounded alike only where a language divides exactly, which WGSL does not promise.
KINDS = [
    ("f16", "f16", "fp32", ("c", "opencl", "wgsl")),
    ("q8_0", "q8_0", "fp32", ("c", "opencl", "wgsl")),
    ("q4_0", "f16", "int8", ("c", "opencl")),
]


@pytest.mark.parametrize("kind", KINDS)
def test_targets_give_the_same_tokens_over_many_steps(
    kind: tuple[str, str, str, tuple[str, ...]], tmp_path: Path
) -> None:
    weights, cache, precision, names = kind
    path = tiny.write(tmp_path / "model.gguf", fmt=weights)
    wanted = greedy(path, "numpy", precision, cache, STEPS)
    assert len(set(wanted)) > 8  # not one token for ever
    ran = 0
    for target in names:
        if runtime_of(target).available() is None:
            assert greedy(path, target, precision, cache, STEPS) == wanted, target
            ran += 1
    assert ran


#: in a process of its own, whose targets are all emulated
SCRIPT = """
import sys
from kernelgen.targets.base import EMULATED, Target
def emulated(self, variant="", plain=Target.runtime):
    return plain(self, EMULATED if EMULATED in self.variants else variant)
Target.runtime = emulated
from pathlib import Path
from tests.models.test_targets import greedy
path, target, precision, cache, count = sys.argv[1:]
print(*greedy(Path(path), target, precision, cache, int(count)))
"""


@pytest.mark.parametrize("target", ["cuda", "metal"])
def test_emulated_devices_give_the_same_tokens(target: str, tmp_path: Path) -> None:
    if (reason := targets.get(target).runtime(EMULATED).available()) is not None:
        pytest.skip(reason)
    path = tiny.write(tmp_path / "model.gguf", fmt="q8_0")
    wanted = greedy(path, "numpy", "fp32", "q8_0", 4)
    given = (sys.executable, "-c", SCRIPT, path, target, "fp32", "q8_0", "4")
    made = subprocess.run(
        [str(one) for one in given], capture_output=True, text=True, check=False, timeout=1200
    )
    assert made.returncode == 0, made.stderr
    assert [int(one) for one in made.stdout.split()] == wanted

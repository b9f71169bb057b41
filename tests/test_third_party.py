"""A format in somebody else's package of one file, which pip installs from its folder: commands
find it, and it builds, verifies, tunes and multiplies on every target.

Its codes lie side by side, which is what most people write first.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from kernelgen import targets

ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.slow

MODULE = '''"""Two elements in a byte, with a scale and a least value."""

from kernelgen import BlockFormat

SIDE_BY_SIDE = BlockFormat(
    name="side_by_side", block=64, group=32, nbytes=40, source="this file",
    fields={"d": "f16[2]", "least": "f16[2]", "qs": "u8[32]"},
    code=lambda b, i: (b.qs[i // 2] >> (4 * (i % 2))) & 15,
    scale=lambda b, g: b.d[g],
    offset=lambda b, g: b.least[g],
)
'''

PROJECT = """[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"

[project]
name = "side-by-side"
version = "1.0"

[project.entry-points."kernelgen.formats"]
side_by_side = "side_by_side:SIDE_BY_SIDE"

[tool.setuptools]
py-modules = ["side_by_side"]
"""

MULTIPLY = """
import sys
import numpy as np
import kernelgen
rng = np.random.default_rng(0)
exact = rng.standard_normal((24, 192), np.float32)
w = kernelgen.quantize(exact, "Side_By_Side")
for m in (1, 12):
    x = rng.standard_normal((m, 192), np.float32)
    y = kernelgen.matmul(x, w, target=sys.argv[1], precision="fp32")
    want = x.astype(np.float64) @ w.dequantize().T
    assert abs(y - want).max() < 1e-5 * want.std(), abs(y - want).max()
    assert 0.02 < (y - x @ exact.T).std() / want.std() < 0.12  # what four bits lose
print("multiplied")
"""


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment that has what this one has, and the package."""
    folder = tmp_path_factory.mktemp("third_party")
    project = folder / "project"
    project.mkdir()
    (project / "side_by_side.py").write_text(MODULE, "utf-8")
    (project / "pyproject.toml").write_text(PROJECT, "utf-8")
    venv.create(folder / "env")
    found = folder / "env" / ("Scripts" if os.name == "nt" else "bin") / "python"
    site = run(found, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    paths = (str(ROOT), sysconfig.get_path("purelib"))
    (Path(site) / "others.pth").write_text("\n".join(paths) + "\n", "utf-8")
    for needed in ("pip", "setuptools"):
        if importlib.util.find_spec(needed) is None:
            pytest.skip(f"{needed} is not installed")
    run(sys.executable, "-m", "pip", "--python", found, "install", "--quiet", "--no-index",
        "--no-build-isolation", "--no-deps", project)  # fmt: skip
    return found


def run(*command: str | Path, cwd: Path | None = None) -> str:
    """What a command prints; it must not fail."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [str(part) for part in command],
        capture_output=True, text=True, timeout=1200, cwd=cwd, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def kernelgen(python: Path, *command: str | Path) -> str:
    return run(python, "-m", "kernelgen", *command, cwd=python.parent)


def test_it_is_installed_and_not_ours(python: Path) -> None:
    where = run(python, "-c", "import side_by_side as s; print(s.__file__)", cwd=python.parent)
    assert Path(where.strip()).is_relative_to(python.parent.parent)
    cells = json.loads(kernelgen(python, "list", "--format", "side_by_side", "--json"))
    assert {cell["target"] for cell in cells} == set(targets.NAMES)
    assert {cell["decode"] for cell in cells} == {"packed"}
    assert not any(cell["notes"] for cell in cells)


@pytest.mark.parametrize("target", targets.NAMES)
def test_it_builds(python: Path, target: str, tmp_path: Path) -> None:
    kernelgen(
        python, "build", "--target", target, "--format", "side_by_side", "--out", tmp_path / "made"
    )
    made = [p.name for p in (tmp_path / "made").rglob("*side_by_side*")]
    assert any("matmul" in name for name in made) and any("attention" not in n for n in made)


def reached(target: str) -> list[str]:
    """The option with which a target runs here."""
    manifest = targets.get(target)
    if reason := manifest.reach().available():
        pytest.skip(reason)
    return ["--emulate"] if manifest.runtime().available() else []


@pytest.mark.parametrize("target", targets.NAMES)
def test_it_is_verified(python: Path, target: str) -> None:
    told = kernelgen(
        python, "verify", "--target", target, "--format", "side_by_side", *reached(target), "--json"
    )
    results = json.loads(told)
    assert {one["op"] for one in results} >= {"dequantize", "get_rows", "matvec", "matmul"}
    assert [one["problem"] for one in results if not one["ok"]] == []


@pytest.mark.parametrize("target", targets.NAMES)
def test_it_is_multiplied(python: Path, target: str) -> None:
    if targets.get(target).runtime().available():
        pytest.skip(f"{target} has no device here; verification runs in the emulator")
    assert run(python, "-c", MULTIPLY, target, cwd=python.parent) == "multiplied\n"


@pytest.mark.parametrize("target", targets.NAMES)
def test_it_is_tuned(python: Path, target: str) -> None:
    if reason := targets.get(target).runtime().available():
        pytest.skip(f"what an emulator takes says nothing: {reason}")
    told = kernelgen(
        python, "tune", "--target", target, "--format", "side_by_side", "--shape", "1x64x256",
        "--budget", "60", "--json",  # the interpreter of Triton takes its time
    )  # fmt: skip
    assert "side_by_side" in told

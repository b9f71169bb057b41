"""Importing kernelgen is quick, loads no more than numpy, and does nothing else."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent

#: packages that only some uses need, and that are imported when these begin
LATE = {
    "cupy", "filelock", "gguf", "jinja2", "ml_dtypes", "mlx", "optuna", "pyopencl", "rich", "torch",
    "triton", "typer", "wgpu",
}  # fmt: skip

LIMIT_S = 0.150

#: run in a fresh interpreter; prints what the statement did beside what importing numpy does
PROBE = """
import json, sys, time
import numpy, numpy.typing
before, events, watching = set(sys.modules), [], False

def watch(event, args):
    if watching and event in ("ctypes.dlopen", "open", "socket.connect", "subprocess.Popen"):
        path = str(args[0])
        if event != "open" or not path.endswith((".py", ".pyc", ".so")):
            events.append(f"{event} {path}")

sys.addaudithook(watch)
watching = True
start = time.perf_counter()
exec(sys.argv[1])
seconds = time.perf_counter() - start
watching = False
print(json.dumps({
    "seconds": seconds, "modules": sorted(set(sys.modules) - before), "events": events,
}))
"""


def probe(statement: str) -> dict[str, Any]:
    """Seconds, new modules, and files and devices touched by a statement after numpy."""
    run = subprocess.run(
        [sys.executable, "-c", PROBE, statement],
        capture_output=True, text=True, check=True, cwd=ROOT, timeout=120,
    )  # fmt: skip
    result: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return result


def late_packages(statement: str) -> set[str]:
    """Packages of `LATE` that a statement loads."""
    return {name.partition(".")[0] for name in probe(statement)["modules"]} & LATE


def best_seconds(statement: str, runs: int = 5) -> float:
    """The quickest of several runs, so that a busy machine is no failure."""
    return min(float(probe(statement)["seconds"]) for _ in range(runs))


def test_import_loads_nothing_that_only_some_uses_need() -> None:
    assert late_packages("import kernelgen") == set()


def test_import_loads_no_target() -> None:
    modules = probe("import kernelgen")["modules"]
    assert [m for m in modules if m.startswith("kernelgen.targets.") and m.count(".") > 2] == []


def test_import_reads_no_file_and_touches_no_device() -> None:
    assert probe("import kernelgen")["events"] == []


def test_import_is_quick() -> None:
    assert best_seconds("import kernelgen") < LIMIT_S


@pytest.mark.parametrize("package", ["gguf", "jinja2", "rich", "typer"])
def test_a_loaded_package_is_noticed(package: str) -> None:
    assert package in late_packages(f"import {package}")


def test_a_read_file_is_noticed() -> None:
    assert probe("open('pyproject.toml').close()")["events"] == ["open pyproject.toml"]


def test_a_started_program_is_noticed() -> None:
    events = probe("import subprocess; subprocess.run([sys.executable, '--version'])")["events"]
    assert any(event.startswith("subprocess.Popen") for event in events)


def test_a_slow_import_is_noticed() -> None:
    assert best_seconds(f"time.sleep({LIMIT_S})", runs=2) >= LIMIT_S

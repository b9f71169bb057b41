"""bench/gpu.py without a GPU: over a stand-in for cupy, and one for torch's graphs."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from kernelgen import targets
from kernelgen.targets.base import EMULATED

BENCH = Path(__file__).parent.parent / "bench"
REASON = targets.get("cuda").runtime(EMULATED).available()


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The parts of bench/gpu.py."""
    monkeypatch.syspath_prepend(str(BENCH))
    names = ("gpu_timing", "gpu_attention", "gpu_phases", "gpu_tuning", "gpu")
    yield SimpleNamespace(**{name: importlib.import_module(name) for name in names})
    for name in names:
        sys.modules.pop(name, None)


def command(tmp_path: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(BENCH / "gpu.py"), "--out", str(tmp_path / "out"), *options],
        capture_output=True, text=True, check=False, env=os.environ | {"COLUMNS": "200"},
    )  # fmt: skip


def test_the_plan_ends_in_time(modules: Any, tmp_path: Path) -> None:
    phases = modules.gpu.plan(["cuda", "triton"])
    assert sum(p.seconds for p in phases) <= modules.gpu.TOTAL <= 540
    assert {p.does for p in phases} == modules.gpu_phases.PHASES.keys()
    shown = command(tmp_path, "--plan")
    assert shown.returncode == 0 and all(p.name in shown.stdout for p in phases)


@pytest.mark.skipif(REASON is not None, reason=str(REASON))
def test_ceilings_and_rivals(tmp_path: Path) -> None:
    done = command(tmp_path, "--emulate", "--scale", "9", "--only", "ceilings", "--only", "rivals")
    rows = [json.loads(s) for s in (tmp_path / "out/gpu.jsonl").read_text().splitlines()]
    assert not [r for r in rows if r.get("problem") or r.get("why_not")], rows
    assert {r.get("what", r.get("walk")) for r in rows if "ended" not in r} == {
        "copy by a kernel", "copy by cupy", "cupy float16 32^3", "cuBLAS"
    }  # fmt: skip
    # nothing was verified, so that nothing is said to be good
    assert done.returncode == 1 and "cuBLAS" in done.stdout, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.skipif(REASON is not None, reason=str(REASON))
def test_times_of_one_format(tmp_path: Path) -> None:
    done = command(tmp_path, "--emulate", "--format", "q4_0", "--scale", "9", "--only", "times")
    rows = [json.loads(s) for s in (tmp_path / "out/gpu.jsonl").read_text().splitlines()]
    assert not [r for r in rows if r.get("problem")], rows
    timed = [r for r in rows if r["phase"] == "times cuda" and "seconds" in r and "walk" in r]
    assert {"matvec_int8", "matmul_fp16_mma", "matmul_fp16_wgmma"} <= {r["walk"] for r in timed}
    assert all(r["seconds"] > 0 and r["bytes_per_s"] > 0 for r in timed)
    assert "matmul_fp16_wgmma" in done.stdout, done.stdout + done.stderr
    assert json.loads((tmp_path / "out/gpu.json").read_text()) == rows


@pytest.mark.slow
@pytest.mark.skipif(REASON is not None, reason=str(REASON))
def test_all_phases(tmp_path: Path) -> None:
    done = command(tmp_path, "--emulate", "--quick", "--format", "q4_K", "--scale", "9")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "out/gpu.json").read_text())
    assert {r["phase"].split()[0] for r in rows} >= {"about", "check", "ceilings", "times", "tune"}
    # a study may be stopped by the phase's limit, where the emulator is slow
    bad = [r for r in rows if r.get("problem") and "ok" not in r and "ratio" not in r]
    assert not [r for r in bad if r["phase"] != "tune"]
    assert (tmp_path / "out/presets/cuda.jsonl").read_text().count("\n") >= 1


def test_a_timeout_loses_nothing(
    modules: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "hangs.py"
    script.write_text("import time\nprint('{\"ok\": true}', flush=True)\ntime.sleep(60)\n")
    monkeypatch.setattr(modules.gpu, "__file__", str(script))
    monkeypatch.setattr(modules.gpu, "_GRACE", 0.5)
    options = modules.gpu.arguments().parse_args(["--out", str(tmp_path)])
    results = modules.gpu.Results(tmp_path / "gpu.jsonl")
    begin = time.perf_counter()
    modules.gpu.run(modules.gpu.Phase("check cuda", "check", 1.0, "cuda"), options, results)
    assert time.perf_counter() - begin < 30
    first, second, _ = map(json.loads, (tmp_path / "gpu.jsonl").read_text().splitlines())
    assert first["ok"] and "time was over" in second["problem"]


def test_a_tool_that_is_not_there_is_said(modules: Any, tmp_path: Path) -> None:
    results = modules.gpu.Results(tmp_path / "gpu.jsonl")
    phase = modules.gpu.Phase("memcheck", "sample", 1.0, "cuda", tool=("no-such-tool",))
    modules.gpu.run(phase, modules.gpu.arguments().parse_args([]), results)
    assert "not on the path" in results.rows[0]["why_not"]


@pytest.mark.parametrize(
    ("said", "clean"),
    [("ERROR SUMMARY: 0 errors", True), ("ERROR SUMMARY: 10 errors", False),
     ("RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)", True),
     ("RACECHECK SUMMARY: 3 hazards displayed (1 error, 2 warnings)", False),
     ("no summary", False)],
)  # fmt: skip
def test_findings_of_tools_fail(modules: Any, tmp_path: Path, said: str, clean: bool) -> None:
    results = modules.gpu.Results(tmp_path / "gpu.jsonl")
    results.add("check cuda", {"ok": True, "target": "cuda"})
    results.add("memcheck", {"tool": "memcheck", "said": said, "code": 0})
    assert modules.gpu.good(results) is clean


class FakeTorch:
    """As much of torch as its timer and its library need; every launch takes a millisecond."""

    def __init__(self) -> None:
        self.clock, self.recording = 0.0, None
        self.launched: list[str] = []
        self.float16 = self.bfloat16 = self.int8 = self.uint8 = "dtype"
        self.cuda = self

    def is_available(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass

    def launch(self, name: str) -> None:
        if self.recording is not None:
            self.recording.append(name)
        else:
            self.clock += 1.0
            self.launched.append(name)

    def CUDAGraph(self) -> Any:
        graph = SimpleNamespace(work=[])
        graph.replay = lambda: [self.launch(one) for one in graph.work]
        return graph

    def graph(self, graph: Any) -> Any:
        torch = self

        class Capture:
            def __enter__(self) -> None:
                torch.recording = graph.work

            def __exit__(self, *_: object) -> None:
                torch.recording = None

        return Capture()

    def Event(self, enable_timing: bool) -> Any:
        event = SimpleNamespace(at=0.0, synchronize=lambda: None)
        event.record = lambda: setattr(event, "at", self.clock)
        event.elapsed_time = lambda other: other.at - event.at
        return event

    def _tensor(self, *_: Any, **__: Any) -> Any:
        tensor = SimpleNamespace(copy_=lambda _: self.launch("copy"))
        tensor.t = lambda: tensor
        return tensor

    zeros = ones = randn = empty = empty_like = _tensor

    def matmul(self, x: Any, w: Any, out: Any) -> None:
        self.launch("matmul")

    def _int_mm(self, x: Any, w: Any) -> None:
        self.launch("int_mm")


def test_torch_is_timed(modules: Any) -> None:
    torch = FakeTorch()
    found = modules.gpu_phases.torch_library(torch)
    for calls in (
        [found.copy(100)], found.products(2, 3, 4, "float16", 3), found.products(2, 3, 4, "int8", 1)
    ):  # fmt: skip
        assert found.timer.seconds(calls, 0.05) == pytest.approx(1e-3)
    assert set(torch.launched) == {"copy", "matmul", "int_mm"}


def test_what_cannot_be_recorded_is_timed_one_by_one(modules: Any) -> None:
    torch = FakeTorch()
    torch.CUDAGraph = None  # type: ignore[method-assign, assignment]
    timer = modules.gpu_timing.TorchTimer(torch)
    assert timer.seconds([lambda: torch.launch("a")], 0.05) == pytest.approx(1e-3)
    assert "one by one" in timer.clock


def test_batches_rotate_through_all(modules: Any) -> None:
    seen: list[int] = []
    calls = [lambda n=n: seen.append(n) for n in range(3)]
    waited: list[int] = []
    taken = modules.gpu_timing.HostTimer(lambda: waited.append(1)).seconds(calls, 0.01)
    assert 0 < taken < 0.01 and set(seen) == {0, 1, 2} and waited
    assert np.ptp(np.bincount(seen)) <= 1


FAKE_GGML = """#!/bin/sh
echo 'Testing 1 devices'
echo '  MUL_MAT(type_a=q4_K,type_b=f32,m=64,n=1,k=512,bs=[1,1],nr=[1,1],per=[0,1,2,3],v=0):' \\
     ' 852 runs -   20.00 us/run - 117.44 MFLOP/run -   5.87 TFLOPS'
echo '  MUL_MAT(type_a=iq2_s,type_b=f32,m=64,n=8,k=512,bs=[1,1],nr=[1,1],per=[0,1,2,3],v=0):' \\
     ' 852 runs -   40.00 us/run - 117.44 MFLOP/run -   5.87 TFLOPS'
echo '  MUL_MAT(type_a=q4_K,type_b=f32,m=16,n=1,k=512,bs=[1,1],nr=[1,1],per=[0,1,2,3],v=0):' \\
     ' 852 runs -   10.00 us/run - 117.44 MFLOP/run -   5.87 TFLOPS'
"""


def test_llama_is_read_where_it_is(
    modules: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import gpu_phases

    context = gpu_phases.Context(
        targets.get("cuda"), (), (1,), 64, 512, 0.01, 1, 1, 1, time.perf_counter() + 60, tmp_path
    )
    monkeypatch.setenv("PATH", str(tmp_path))
    (missing,) = gpu_phases.llama(context)
    assert "not on the path" in missing["why_not"]
    tool = tmp_path / "test-backend-ops"
    tool.write_text(FAKE_GGML)
    tool.chmod(0o755)
    first, second = gpu_phases.llama(context)
    assert (first["format"], first["m"]) == ("q4_K", 1)
    assert first["seconds"] == pytest.approx(20e-6)
    assert first["bytes_per_s"] == pytest.approx(64 * 288 / 20e-6)
    assert (second["format"], second["m"]) == ("iq2_s", 8)

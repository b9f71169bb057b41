"""The tuner's commands: tune, explain, cache."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import kernelgen
from kernelgen import targets
from kernelgen.cli import app
from kernelgen.targets.base import Runtime, Target
from kernelgen.tuner import cache, page
from kernelgen.tuner.measure import FAILED, Outcome
from kernelgen.tuner.replay import Replay
from kernelgen.tuner.report import Options
from kernelgen.tuner.study import Study
from tests.tuner.made_up_target import SMALL, needs_c, recorded

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments: str, code: int = 0) -> Any:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == code, f"{result.output}\n{result.exception!r}"
    return result


@needs_c
def test_tune_then_a_second_process_uses_it(tmp_path: Path) -> None:
    what = ("--target", "c", "--shape", "1x64x256")
    shown = json.loads(
        run("tune", *what, "--format", "q8_0", "--budget", "20", "--json").stdout
    )["studies"][0]  # fmt: skip
    assert shown["config"] and shown["path"] and shown["new"] <= shown["old"]
    second = subprocess.run(
        [sys.executable, "-m", "kernelgen", "explain", "matmul", "q8_0", *what, "--json"],
        capture_output=True, text=True, check=True, cwd=ROOT, env=os.environ,
    )  # fmt: skip
    explained = json.loads(second.stdout)
    assert explained["rule"] == "exact" and explained["choice"] == shown["config"]
    assert explained["expected_seconds"] == shown["new"]
    near = ("explain", "matmul", "q8_0", "--target", "c", "--shape", "1x128x256")
    explained = json.loads(run(*near, "--json").stdout)
    assert explained["rule"] == "nearest shape" and explained["expected_seconds"] is None
    assert "  took      " in run(*near).stdout and "expects" not in run(*near).stdout
    listed = json.loads(run("cache", "list", "--json").stdout)
    assert len(listed) == 1 and listed[0]["stale"] is None
    for command in (("cache", "list"), ("cache", "show", "q8_0"), ("cache", "prune", "--stale"),
                    ("explain", "matvec", "Q8_0", *what)):  # fmt: skip
        assert run(*command).stdout
    file = tmp_path / "winners.jsonl"
    assert "1 entries" in run("cache", "export", str(file)).stdout
    assert "1 were here already" in run("cache", "import", str(file)).stdout.replace("\n", " ")
    assert "1 entries are the same" in run("cache", "diff", str(file)).stdout


def test_a_dry_run_shows_the_space() -> None:
    given = ("--target", "opencl", "--format", "q4_K", "--shape", "1x64x256", "--dry-run")
    if targets.get("opencl").runtime().available() is not None:
        pytest.skip("needs OpenCL")
    shown = run("tune", *given).stdout
    assert "legal" in shown and "columns" in shown
    (counted,) = json.loads(run("tune", *given, "--json").stdout)
    assert counted["size"] == counted["legal"] + sum(counted["forbidden"].values())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["tune"], "--format"), (["tune", "--format", "q8_0", "--shape", "3"], "MxNxK"),
     (["tune", "--format", "q8_0", "--shape", "1x1x100"], "100"),
     (["explain", "dequantize", "q8_0"], "matmul"), (["cache", "show", "q8_0"], "nothing"),
     (["cache", "import", "nowhere.jsonl"], "nowhere"),
     (["tune", "--format", "q8_0", "--shape", "1x8x32", "--sampler", "dice"], "greedy"),
     (["explain", "softmax", "f32", "--shape", "4x4", "--epilogue", "bias"], "only matmul")],
)  # fmt: skip
def test_mistakes_get_one_sentence(arguments: list[str], said: str) -> None:
    shown = run(*arguments, code=1).stderr.splitlines()
    assert len(shown) == 1 and said in shown[0]


@pytest.mark.parametrize("rows", ["many", "0", "1,²"])
def test_rows_that_are_none(tmp_path: Path, rows: str) -> None:
    model = tmp_path / "model.gguf"
    kernelgen.save(model, {"a.weight": np.ones((4, 32), np.float32)})
    (sentence,) = run("tune", str(model), "--rows", rows, code=1).stderr.splitlines()
    assert f"--rows {rows} was given" in sentence


@pytest.mark.parametrize("text", [b"\xff\x00garbage\n", b'{"hello": 1}\n[1, 2]\nnull\n'])
@pytest.mark.parametrize("command", ["import", "merge", "diff"])
def test_a_file_without_an_entry_is_an_error(tmp_path: Path, command: str, text: bytes) -> None:
    file = tmp_path / "foreign.jsonl"
    file.write_bytes(text)
    (sentence,) = run("cache", command, str(file), code=1).stderr.splitlines()
    assert "foreign.jsonl has no entry of kernelgen's" in sentence and "cache export" in sentence


def test_a_cache_folder_that_cannot_be_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file in its place stops root as well."""
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("KERNELGEN_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr("kernelgen.cli.tuning.busy", lambda: None)
    what = ("tune", "--target", "numpy", "--format", "q8_0", "--shape", "1x8x32", "--budget", "1")
    (sentence,) = run(*what, code=1).stderr.splitlines()
    assert sentence.startswith("error: ") and "file/studies" in sentence
    assert "KERNELGEN_CACHE" in sentence
    assert "nothing was tuned yet" in run("cache", "list").stdout


def test_explain_without_entries_says_what_to_do() -> None:
    shown = run("explain", "matmul", "q8_0", "--target", "numpy").stdout
    assert "default" in shown and "kernelgen tune" in shown


def test_a_page_tells_the_story_of_a_study(made_up: tuple[Target, Runtime], tmp_path: Path) -> None:
    outcomes = recorded(*made_up, SMALL, nan=Outcome(FAILED, "nan", "1 result is <NaN>"))
    options = Options(10, storage="", record=False, write=False)
    report = Study(*made_up, SMALL, Replay(outcomes), options).run()
    path = tmp_path / "report.html"
    page.write(path, [("made up", report)])
    text = path.read_text()
    assert "&lt;NaN&gt;" in text and "<NaN>" not in text
    assert text.count('class="failed"') == len(report.failures) and 'class="best"' in text
    assert "http" not in text.replace("http-equiv", "")
    assert page.importance(report)["kind"] > 0.2


def test_presets_that_are_shipped_can_be_read() -> None:
    for path in cache.presets().glob("*.jsonl"):
        assert [text for _, text, one in cache.lines(path) if isinstance(one, str)] == []


@needs_c
def test_tune_a_model_within_a_budget(tmp_path: Path) -> None:
    """Its shapes and no others, in the time that was given, with a page and under a bound."""
    rng = np.random.default_rng(0)
    model, html = tmp_path / "model.gguf", tmp_path / "report.html"
    tensors = {
        "a.weight": kernelgen.quantize(rng.standard_normal((24, 256), np.float32), "q8_0"),
        "same.weight": kernelgen.quantize(rng.standard_normal((24, 256), np.float32), "q8_0"),
        "norm.weight": np.ones(256, np.float32),
    }
    kernelgen.save(model, tensors)
    budget = 24
    begin = time.perf_counter()
    shown = run(
        "tune", str(model), "--target", "c", "--rows", "1,2", "--budget", str(budget), "--json",
        "--report", str(html), "--max-error", "0.01",
    )  # fmt: skip
    assert time.perf_counter() - begin < budget + 4
    studies = json.loads(shown.stdout)["studies"]
    assert [one["problem"] for one in studies] == [
        f"matvec q8_0 {m}x24x256 (auto, error <= 0.01)" for m in (1, 2)
    ]
    assert html.read_text().count("<h2>") == 2
    done = [one for one in studies if one["path"]]
    assert done, studies
    said = ("explain", "matmul", "q8_0", "--shape", "2x24x256", "--target", "c", "--json")
    if studies[1]["path"]:
        assert json.loads(run(*said, "--max-error", "0.01").stdout)["rule"] == "exact"
    assert json.loads(run(*said).stdout)["rule"] == "default"
    preset = tmp_path / "preset.jsonl"
    run("cache", "export", str(preset), "--preset")
    text = preset.read_text()
    assert len(text.splitlines()) == len(done)
    assert all(json.loads(line)["host"] == "" for line in text.splitlines())

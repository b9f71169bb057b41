"""The search: what candidates do to it, what it finds, what is used afterwards."""

from __future__ import annotations

import dataclasses
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
from kernelgen import api, targets
from kernelgen.cli import app
from kernelgen.config import RowTileConfig
from kernelgen.errors import ShapeError, TuningError
from kernelgen.ir import formats
from kernelgen.targets.base import Runtime, Target
from kernelgen.tuner import cache, lookup, page, samplers, space
from kernelgen.tuner.cache import Entry, Key
from kernelgen.tuner.device import Device, of
from kernelgen.tuner.measure import FAILED, OK, PRUNED, Child, Outcome, WorkerDied, WorkerMeasurer
from kernelgen.tuner.replay import Recorder, Replay, read
from kernelgen.tuner.space import Candidate, Problem
from kernelgen.tuner.study import Options, Report, Status, Study
from tests.tuner import made_up_target
from tests.tuner.made_up_target import BadConfig

ROOT = Path(__file__).resolve().parents[2]
Q8 = formats.get("q8_0")
SMALL = Problem(Q8, 1, 64, 256)

needs_c = pytest.mark.skipif(
    targets.get("c").runtime().available() is not None, reason="needs a C compiler"
)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # compiled kernels are shared between runs: they do not depend on what is tuned
    monkeypatch.setenv("KERNELGEN_CACHE", str(tmp_path))
    monkeypatch.delenv(lookup.REQUIRE, raising=False)


@pytest.fixture
def made_up() -> tuple[Target, Runtime]:
    return made_up_target.factory()


def recorded(
    target: Target, runtime: Runtime, problem: Problem, **special: Outcome
) -> dict[str, Outcome]:
    """Outcomes of a whole space: the more alike to one candidate, the faster."""
    explored = space.explore(target, runtime.capabilities(), problem)
    best = explored.legal[len(explored.legal) // 3]
    mine = space.values_of(explored, best)
    result = {}
    for one in explored.legal:
        far = space.distance(mine, space.values_of(explored, one))
        kind = one.config.as_dict().get("kind", "")
        result[one.id] = special.get(
            kind,
            Outcome(OK, samples=(1e-3 * (1 + far),) * 3, error=1e-7, rms_error=1e-3 / (1 + far)),
        )
    return result


# ---- space ------------------------------------------------------------------------------------


def test_the_space_counts_what_each_rule_forbids() -> None:
    target = targets.get("c")
    explored = space.explore(target, target.capabilities, SMALL)
    assert explored.size == len(explored.legal) + sum(explored.forbidden.values())
    assert {one.precision for one in explored.legal} == {"int8", "fp32"}
    assert any("registers" in rule and "#" in rule for rule in explored.forbidden)
    assert all(one.config.legal(target.capabilities) is None for one in explored.legal)
    assert len({one.id for one in explored.legal}) == len(explored.legal)


def test_precision_limits_the_walks() -> None:
    target = targets.get("c")
    for asked, fmt, allowed in (
        ("fp32", Q8, {"fp32"}), ("int8", Q8, {"int8"}), ("auto", formats.get("f16"), {"fp32"}),
    ):  # fmt: skip
        found = space.walks(target, dataclasses.replace(SMALL, fmt=fmt, precision=asked))
        assert {one.precision for one in found} == allowed


def test_rows_fall_into_buckets() -> None:
    assert [space.row_bucket(m) for m in (1, 8, 9, 16, 17, 100, 5000, 10**6)] == [
        1, 8, 16, 16, 32, 128, 4096, 4096
    ]  # fmt: skip
    with pytest.raises(ShapeError, match="above 0"):
        Problem(Q8, 0, 1, 256)


@pytest.mark.parametrize("name", samplers.NAMES)
def test_samplers_ask_only_for_what_is_legal(name: str, made_up: tuple[Target, Runtime]) -> None:
    needs = {"gp": "scipy", "qmc": "scipy", "cmaes": "cmaes"}
    if name in needs:
        pytest.importorskip(needs[name])
    target, runtime = made_up
    outcomes = recorded(target, runtime, SMALL)
    replay = Replay(outcomes)
    options = Options(20, name, storage="", trials=14, write=False, record=False)
    report = Study(target, runtime, SMALL, replay, options).run()
    assert len(report.trials) == 14 == len({one.id for one, _ in report.trials})
    assert all(one.id in report.space.by_id for one, _ in report.trials)


# ---- the worker -------------------------------------------------------------------------------


def test_bad_candidates_are_recorded_and_the_study_ends_in_time(
    made_up: tuple[Target, Runtime],
) -> None:
    target, runtime = made_up
    measurer = WorkerMeasurer(target.name, factory=made_up_target.FACTORY, compilers=1)
    seen: list[Status] = []
    begin = time.perf_counter()
    problem = dataclasses.replace(SMALL, precision="int8")
    options = Options(budget=60, sampler="random")
    report = Study(target, runtime, problem, measurer, options, seen.append).run()
    measurer.close()
    assert time.perf_counter() - begin < options.budget
    assert report.stopped == "everything was tried"
    by_kind = {one.config.as_dict()["kind"]: (one, o) for one, o in report.trials}
    expected = {
        "loops": ("hang", "no answer within"), "crashes": ("crash", "SIGSEGV"),
        "nan": ("nan", "NaN or infinite"), "wrong": ("wrong", "exceeds 1e-05"),
        "greedy": ("error", "Unable to allocate|memory"), "compiles not": ("compile", "rejected"),
    }  # fmt: skip
    for name, (kind, reason) in expected.items():
        outcome = by_kind[name][1]
        assert outcome.status == FAILED and outcome.kind in (kind, "memory"), (name, outcome)
        assert any(part in (outcome.reason or "") for part in reason.split("|")), outcome
    assert by_kind["slow"][1].status == PRUNED
    assert report.best is not None and report.best.config.as_dict()["kind"] == "fast"
    assert report.ratio is not None and report.ratio > 1.5
    assert report.entry is not None and report.entry.failures == len(expected)
    assert seen[-1].failed == len(expected) and seen[-1].best is not None
    # what was recorded can be replayed, without any target
    (path,) = (cache.root() / "trials").glob("*.jsonl")
    about, outcomes = read(path)
    assert about["format"] == "q8_0" and len(outcomes) == len(report.trials)
    replayed = Study(
        target, runtime, problem, Replay(outcomes), Options(9, "greedy", storage="", record=False)
    ).run()
    assert replayed.best == report.best
    failures = sorted((one.id, o.reason) for one, o in replayed.failures)
    assert failures == sorted((one.id, o.reason) for one, o in report.failures)


def test_a_budget_is_kept_whatever_candidates_do(made_up: tuple[Target, Runtime]) -> None:
    target, runtime = made_up
    names = {
        one.id for one in space.explore(target, runtime.capabilities(), SMALL).legal
        if one.config.as_dict()["kind"] in ("loops", "slow") or one.config == BadConfig()
    }  # fmt: skip
    measurer = WorkerMeasurer(target.name, factory=made_up_target.FACTORY, compilers=1)
    begin = time.perf_counter()
    options = Options(budget=4, record=False)
    report = Study(target, runtime, SMALL, measurer, options, only=names).run()
    measurer.close()
    # the default is always waited for, and processes take their time to start on a busy machine
    assert time.perf_counter() - begin < 20
    assert report.stopped and report.entry is not None


def test_a_worker_starts_again_after_it_died(made_up: tuple[Target, Runtime]) -> None:
    child = Child(made_up_target.FACTORY, "made up")
    try:
        child.problem = {"format": "q8_0", "m": 1, "n": 4, "k": 32, "precision": "auto"}
        target, _ = made_up
        config = BadConfig("loops")
        bad = Candidate(space.walks(target, SMALL)[0], config).as_dict()
        with pytest.raises(WorkerDied, match="no answer"):
            child.request(0.3, "measure", candidate=bad)
        reply = child.request(30, "nonsense")
        assert not reply["ok"] and "nonsense" in reply["reason"]
    finally:
        child.kill()


# ---- the search -------------------------------------------------------------------------------


def study(pair: tuple[Target, Runtime], outcomes: dict[str, Outcome], **options: Any) -> Report:
    values: dict[str, Any] = {"budget": 10, "storage": "", "record": False} | options
    return Study(*pair, SMALL, Replay(outcomes), Options(**values)).run()


def test_the_best_of_recorded_trials_is_found_and_remembered(
    made_up: tuple[Target, Runtime],
) -> None:
    outcomes = recorded(*made_up, SMALL)
    report = study(made_up, outcomes)
    assert report.stopped == "everything was tried" and report.best is not None
    assert report.seconds == min(o.seconds for o in outcomes.values())
    front = report.front()
    assert front[0][0] == report.best
    assert [o.rms_error for _, o in front] == sorted(
        (o.rms_error or 0 for _, o in front), reverse=True
    )
    choice = lookup.choose_for(*made_up, SMALL)
    assert (choice.rule, choice.candidate) == (lookup.EXACT, report.best)


def test_studies_are_repeatable(made_up: tuple[Target, Runtime]) -> None:
    outcomes = recorded(*made_up, SMALL)
    asked = []
    for _ in range(2):
        replay = Replay(outcomes)
        options = Options(10, storage="", record=False, write=False, trials=10, seed=3)
        Study(*made_up, SMALL, replay, options).run()
        asked.append(replay.asked)
    assert asked[0] == asked[1]


def test_a_study_goes_on_where_it_was_interrupted(made_up: tuple[Target, Runtime]) -> None:
    class Interrupted(Replay):
        def measure(self, *given: Any, **named: Any) -> Outcome:
            if len(self.asked) == 5:
                raise KeyboardInterrupt
            return super().measure(*given, **named)

    outcomes = recorded(*made_up, SMALL)
    first = Interrupted(outcomes)
    options = Options(10, resume=True, record=False)
    report = Study(*made_up, SMALL, first, options).run()
    assert report.stopped == "interrupted" and report.entry is not None and len(first.asked) == 5
    second = Replay(outcomes)
    report = Study(*made_up, SMALL, second, options).run()
    assert report.stopped == "everything was tried"
    again = set(first.asked) & set(second.asked[: len(outcomes) - 5])
    assert not again and len(report.trials) == len(outcomes)


def test_a_shared_study_measures_nothing_twice(
    made_up: tuple[Target, Runtime], tmp_path: Path
) -> None:
    outcomes = recorded(*made_up, SMALL)
    url = str(tmp_path / "shared.log")
    asked: list[str] = []
    for trials in (6, None):
        replay = Replay(outcomes)
        options = Options(10, storage=url, trials=trials, record=False, write=False)
        report = Study(*made_up, SMALL, replay, options).run()
        asked += [name for name in replay.asked if name not in asked or trials is None]
    assert len(report.trials) == len(outcomes)


def test_neighbours_in_the_cache_are_tried_first(made_up: tuple[Target, Runtime]) -> None:
    outcomes = recorded(*made_up, SMALL)
    best = study(made_up, outcomes).best
    other = dataclasses.replace(SMALL, n=128)
    replay = Replay(recorded(*made_up, other))
    Study(*made_up, other, replay, Options(9, storage="", trials=2, record=False)).run()
    assert best is not None and replay.asked[1] == best.id


def test_the_roofline_ends_a_study(made_up: tuple[Target, Runtime]) -> None:
    problem = Problem(Q8, 1, 4096, 1024)
    outcomes = recorded(*made_up, problem)
    quickest = min(o.seconds for o in outcomes.values())
    wide = problem.n * Q8.row_bytes(problem.k) / quickest
    options = Options(9, "greedy", storage="", record=False)
    report = Study(*made_up, problem, Replay(outcomes, wide), options).run()
    assert report.stopped == "the roofline is reached" and report.roofline == quickest


def test_where_nothing_passes_nothing_is_written(made_up: tuple[Target, Runtime]) -> None:
    bad = Outcome(FAILED, "wrong", "it is wrong")
    outcomes = dict.fromkeys(recorded(*made_up, SMALL), bad)
    report = study(made_up, outcomes)
    assert report.best is None and report.entry is None and cache.entries() == []
    assert len(report.failures) == len(outcomes)


# ---- look-up ----------------------------------------------------------------------------------


def entry(
    pair: tuple[Target, Runtime], size: int = 1, where: Path | None = None, **changed: Any
) -> Entry:
    """An entry for SMALL, written."""
    target, runtime = pair
    one = space.walks(target, SMALL)[0]
    names = {"config", "walk", "used", "seconds", "time"}
    key: dict[str, Any] = {
        "op": "matvec", "format": "q8_0", "precision": "auto", "target": target.name, "m": 1,
        "n": 64, "k": 256, "device": of(target, runtime),
        "hash": space.walk_hash(one, Q8, target),
    }  # fmt: skip
    key |= {name: value for name, value in changed.items() if name not in names}
    values = {name: value for name, value in changed.items() if name in names}
    given: dict[str, Any] = {
        "walk": one.name, "used": one.precision, "config": {"kind": "good", "size": size},
        "seconds": 1e-3, "time": "2026",
    }  # fmt: skip
    made = Entry(Key(**key), **(given | values))
    cache.append(made, where / "made-up.jsonl" if where else None)
    return made


def chosen(pair: tuple[Target, Runtime], **changed: Any) -> tuple[str, int]:
    choice = lookup.choose_for(*pair, dataclasses.replace(SMALL, **changed))
    return choice.rule, choice.config.as_dict()["size"]


def test_entries_are_looked_up_in_order(
    made_up: tuple[Target, Runtime], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "presets", lambda: tmp_path / "presets")
    sibling = Device("Made Up 2000", "1.0", 2)
    assert chosen(made_up) == (lookup.DEFAULT, 1)
    entry(made_up, 2, tmp_path / "presets")
    assert chosen(made_up) == (lookup.PRESET, 2)
    entry(made_up, 4, device=sibling)
    assert chosen(made_up) == (lookup.FAMILY, 4)
    entry(made_up, 8, n=128)
    assert chosen(made_up) == (lookup.NEAREST, 8)
    entry(made_up, 2)
    assert chosen(made_up) == (lookup.EXACT, 2)
    assert chosen(made_up, n=120) == (lookup.NEAREST, 8)
    assert chosen(made_up, n=64 * 1024) == (lookup.DEFAULT, 1)
    rules = [found.rule for found in lookup.search(*made_up, SMALL)]
    assert rules == [lookup.EXACT, lookup.NEAREST, lookup.FAMILY, lookup.PRESET]


@pytest.mark.parametrize(
    "changed",
    [{"hash": "1" * 16}, {"walk": "gone"}, {"config": {"kind": "good", "colour": 3}},
     {"config": {"kind": "strange", "size": 1}}, {"config": {"kind": "nan", "size": 2}},
     {"config": {"kind": ["good"]}}, {"device": Device("Other", "1.0", 4)}, {"format": "q4_0"},
     {"target": "other"}, {"precision": "fp32"}, {"op": "matmul"}, {"objective": "energy"},
     {"m": 4}],
)  # fmt: skip
def test_what_does_not_fit_is_not_used(
    made_up: tuple[Target, Runtime], changed: dict[str, Any]
) -> None:
    entry(made_up, **changed)
    assert chosen(made_up)[0] == lookup.DEFAULT


def test_an_auto_winner_serves_the_precision_it_computes_in(
    made_up: tuple[Target, Runtime],
) -> None:
    used = space.walks(made_up[0], SMALL)[0].precision
    entry(made_up, 4)
    assert chosen(made_up, precision=used) == (lookup.EXACT, 4)
    other = {"int8": "fp32", "fp32": "int8"}[used]
    assert chosen(made_up, precision=other)[0] == lookup.DEFAULT


def test_rows_of_a_bucket_share_an_entry(made_up: tuple[Target, Runtime]) -> None:
    one = next(w for w in made_up[0].walks if w.op == "matmul" and w.precision == "int8")
    digest = space.walk_hash(one, Q8, made_up[0])
    entry(made_up, 4, op="matmul", m=100, walk=one.name, used="int8", hash=digest)
    assert chosen(made_up, m=128) == chosen(made_up, m=65) == (lookup.EXACT, 4)
    assert chosen(made_up, m=129) == (lookup.NEAREST, 4)
    assert chosen(made_up, m=600)[0] == lookup.DEFAULT


def test_a_miss_can_be_an_error(
    made_up: tuple[Target, Runtime], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(lookup.REQUIRE, "1")
    with pytest.raises(TuningError, match=r"--shape 1x64x256"):
        chosen(made_up)
    entry(made_up, 2)
    assert chosen(made_up) == (lookup.EXACT, 2)
    numpy = targets.get("numpy")  # it has nothing to choose
    assert lookup.choose_for(numpy, numpy.runtime(), SMALL).rule == lookup.DEFAULT


def test_the_hash_sees_the_format_and_the_walk() -> None:
    c, opencl = targets.get("c"), targets.get("opencl")
    walk = space.walks(c, SMALL)[0]
    one = space.walk_hash(walk, Q8, c)
    assert one == space.walk_hash(walk, Q8, c)
    assert one != space.walk_hash(walk, formats.get("q4_0"), c)
    other = space.walks(opencl, SMALL)[0]
    assert one != space.walk_hash(other, Q8, opencl)


@needs_c
def test_matmul_computes_with_what_the_cache_says(monkeypatch: pytest.MonkeyPatch) -> None:
    target = targets.get("c")
    runtime = target.runtime()
    walk = space.walks(target, SMALL)[0]
    config = RowTileConfig(columns=3, layout="native")
    key = Key("matvec", "q8_0", "auto", "c", 1, 64, 256, of(target, runtime),
              space.walk_hash(walk, Q8, target))  # fmt: skip
    cache.append(Entry(key, walk.name, walk.precision, config.as_dict(), 1e-3))
    api._matmul_runner.cache_clear()
    used: list[Any] = []
    inner = type(runtime).matmul
    monkeypatch.setattr(
        type(runtime), "matmul", lambda self, kernel: used.append(kernel) or inner(self, kernel)
    )
    rng = np.random.default_rng(0)
    w = kernelgen.quantize(rng.standard_normal((64, 256), np.float32), "q8_0")
    x = rng.standard_normal((1, 256), np.float32)
    got = kernelgen.matmul(x, w, target="c")
    api._matmul_runner.cache_clear()
    assert used[0].config == config
    assert np.abs(got - x @ w.dequantize().T).max() < 0.05 * np.abs(got).max()


# ---- the command line -------------------------------------------------------------------------


def run(*arguments: str, code: int = 0) -> Any:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == code, f"{result.output}\n{result.exception!r}"
    return result


@needs_c
def test_tune_then_a_second_process_uses_it(tmp_path: Path) -> None:
    what = ("--target", "c", "--shape", "1x64x256")
    shown = json.loads(
        run("tune", *what, "--format", "q8_0", "--budget", "5", "--json").stdout
    )["studies"][0]  # fmt: skip
    assert shown["config"] and shown["path"] and shown["new"] <= shown["old"]
    second = subprocess.run(
        [sys.executable, "-m", "kernelgen", "explain", "matmul", "q8_0", *what, "--json"],
        capture_output=True, text=True, check=True, cwd=ROOT, env=os.environ,
    )  # fmt: skip
    explained = json.loads(second.stdout)
    assert explained["rule"] == "exact" and explained["choice"] == shown["config"]
    assert explained["expected_seconds"] == shown["new"]
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
     (["cache", "import", "nowhere.jsonl"], "nowhere")],
)  # fmt: skip
def test_mistakes_get_one_sentence(arguments: list[str], said: str) -> None:
    shown = run(*arguments, code=1).stderr.splitlines()
    assert len(shown) == 1 and said in shown[0]


def test_explain_without_entries_says_what_to_do() -> None:
    shown = run("explain", "matmul", "q8_0", "--target", "numpy").stdout
    assert "default" in shown and "kernelgen tune" in shown


def test_configs_of_a_class_keep_their_names() -> None:
    target = targets.get("opencl")
    explored = space.explore(target, target.capabilities, SMALL)
    names = {name.rpartition(".")[2] for name in space.parameters(explored)}
    assert {"walk", "rows", "columns", "threads", "layout"} <= names
    one = explored.legal[0]
    assert isinstance(one, Candidate) and explored.by_id[one.id] is one
    assert Recorder and json.loads(one.id)["config"] == one.config.as_dict()


def test_a_page_tells_the_story_of_a_study(made_up: tuple[Target, Runtime], tmp_path: Path) -> None:
    outcomes = recorded(*made_up, SMALL, nan=Outcome(FAILED, "nan", "1 result is <NaN>"))
    report = study(made_up, outcomes, write=False)
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

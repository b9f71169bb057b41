"""The search: what candidates do to it, what it finds, what is used afterwards."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kernelgen import targets
from kernelgen.errors import ConfigError, ShapeError
from kernelgen.generate import generate_walk
from kernelgen.ir import formats
from kernelgen.ir.block import BlockFormat
from kernelgen.targets.base import Runtime, Target
from kernelgen.tensor import QuantTensor
from kernelgen.tuner import cache, gate, lookup, samplers, space
from kernelgen.tuner.measure import (
    FAILED,
    OK,
    PRUNED,
    Child,
    Outcome,
    WorkerDied,
    WorkerMeasurer,
    request_for,
)
from kernelgen.tuner.problems import MatmulProblem, row_bucket
from kernelgen.tuner.replay import Replay, read
from kernelgen.tuner.report import Options, Report, Status
from kernelgen.tuner.space import Candidate
from kernelgen.tuner.study import Study
from kernelgen.tuner.worker import Worker
from tests.tuner import made_up_target
from tests.tuner.made_up_target import SMALL, BadConfig, needs_c, recorded

ROOT = Path(__file__).resolve().parents[2]
Q8 = formats.get("q8_0")


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
    assert [row_bucket(m) for m in (1, 8, 9, 16, 17, 100, 5000, 10**6)] == [
        1, 8, 16, 16, 32, 128, 4096, 4096
    ]  # fmt: skip
    with pytest.raises(ShapeError, match="above 0"):
        MatmulProblem(Q8, 0, 1, 256)


@pytest.mark.parametrize("name", samplers.NAMES)
def test_samplers_ask_only_for_what_is_legal(name: str, made_up: tuple[Target, Runtime]) -> None:
    needs = {"gp": "scipy", "qmc": "scipy", "cmaes": "cmaes"}
    if name in needs:
        pytest.importorskip(needs[name])
    target, runtime = made_up
    outcomes = recorded(target, runtime, SMALL)
    replay = Replay(outcomes)
    options = Options(60, name, storage="", trials=14, write=False, record=False)
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
    assert time.perf_counter() - begin < options.budget + 2
    assert report.stopped and (report.entry is not None or "before the default" in report.stopped)


def test_a_worker_starts_again_after_it_died(made_up: tuple[Target, Runtime]) -> None:
    child = Child(made_up_target.FACTORY, "made up")
    try:
        child.tell(request_for(MatmulProblem(Q8, 1, 4, 32)))
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
    assert report.cost == min(o.seconds for o in outcomes.values())
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
    problem = MatmulProblem(Q8, 1, 4096, 1024)
    outcomes = recorded(*made_up, problem)
    quickest = min(o.seconds for o in outcomes.values())
    wide = problem.nbytes / quickest
    options = Options(9, "greedy", storage="", record=False)
    report = Study(*made_up, problem, Replay(outcomes, wide), options).run()
    assert report.stopped == "the roofline is reached" and report.roofline == quickest


def test_where_nothing_passes_nothing_is_written(made_up: tuple[Target, Runtime]) -> None:
    bad = Outcome(FAILED, "wrong", "it is wrong")
    outcomes = dict.fromkeys(recorded(*made_up, SMALL), bad)
    report = study(made_up, outcomes)
    assert report.best is None and report.entry is None and cache.entries() == []
    assert len(report.failures) == len(outcomes)


# ---- formats, precisions, budgets -------------------------------------------------------------

MADE_UP_FORMAT = {
    "name": "made_up_5", "block": 32, "group": 16, "nbytes": 20,
    "fields": {"d": "f16[2]", "qs": "u8[16]"},
    "code": lambda b, i: (b.qs[i % 16] >> (4 * (i // 16))) & 15,
    "scale": lambda b, g: b.d[g],
    "bias": 8,
}  # fmt: skip


@needs_c
@pytest.mark.parametrize("registered", [False, True])
def test_a_format_of_the_user_is_tuned(registered: bool) -> None:
    """The worker knows nothing but what it is sent."""
    fmt = BlockFormat(**MADE_UP_FORMAT)
    if registered:
        formats.register(fmt)
    try:
        target = targets.get("c")
        measurer = WorkerMeasurer("c")
        options = Options(60, trials=2, storage="", record=False)
        problem = MatmulProblem(fmt, 1, 40, 96)
        report = Study(target, target.runtime(), problem, measurer, options).run()
        measurer.close()
        assert report.best is not None and not report.failures, report.failures
        choice = lookup.choose_for(target, target.runtime(), problem)
        assert (choice.rule, choice.candidate) == (lookup.EXACT, report.best)
    finally:
        if registered:
            formats.unregister(fmt.name)


def test_auto_opens_precisions_that_err_no_more_than_what_it_stands_for() -> None:
    def of(fmt: str, asked: str = "auto", max_error: float | None = None) -> set[str]:
        return set(
            space.precisions(
                MatmulProblem(formats.get(fmt), 1, 8, 256, precision=asked, max_error=max_error)
            )
        )

    assert {"int8", "bf16", "fp32"} == of("q4_K")  # fp16 overflows where others do not
    assert {"fp32"} == of("f32") and of("f32", max_error=0.01) == of("q4_K")
    assert "int8" not in of("q4_K", "fp16") and of("q4_K", "fp32") == {"fp32"}
    target = targets.get("opencl")
    problem = MatmulProblem(formats.get("q4_K"), 32, 64, 256)
    legal = space.explore(target, target.capabilities, problem).legal
    assert {one.precision for one in legal} == {"int8", "fp32"}


@needs_c
def test_the_gate_holds_candidates_to_the_error_that_was_asked_for() -> None:
    """Rounded activations err by some thousandths: too much where less is asked for."""
    target = targets.get("c")
    measurer = WorkerMeasurer("c")
    found = {}
    for max_error in (None, 1e-4):
        problem = MatmulProblem(Q8, 1, 40, 96, max_error=max_error)
        measurer.prepare(problem)
        for walk in space.walks(target, problem):
            one = Candidate(walk, walk.config.default(target.capabilities, 1))
            found[max_error, walk.precision] = measurer.measure(one, None, seconds=0, limit=60)
    measurer.close()
    assert {key for key, one in found.items() if one.status == FAILED} == {(1e-4, "int8")}
    wrong = found[1e-4, "int8"]
    assert wrong.kind == "wrong" and "the 0.0001 asked for" in (wrong.reason or "")
    with pytest.raises(ConfigError, match="above 0"):
        MatmulProblem(Q8, 1, 40, 96, max_error=0.0)


@pytest.mark.parametrize("kind", ["loops", "greedy"])
def test_a_budget_ends_though_the_default_does_not(
    made_up: tuple[Target, Runtime], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, runtime = made_up
    bad = next(
        one for one in space.explore(target, runtime.capabilities(), SMALL).legal
        if one.config.as_dict()["kind"] == kind
    )  # fmt: skip
    monkeypatch.setattr(space, "default", lambda *_: bad)
    measurer = WorkerMeasurer(target.name, factory=made_up_target.FACTORY, compilers=1)
    begin = time.perf_counter()
    options = Options(budget=3, record=False, write=False)
    report = Study(target, runtime, SMALL, measurer, options).run()
    spent = time.perf_counter() - begin
    measurer.close()
    assert spent < 3 + 2
    if kind == "loops":
        assert "before the default was measured" in report.stopped and report.best is None


class Absent:
    """The runtime of a device that is not here."""

    def __init__(self, target: Target) -> None:
        self._target = target

    def capabilities(self) -> Any:
        return self._target.capabilities

    def describe(self) -> list[dict[str, Any]]:
        return [{"device": "Absent 1"}]


def test_the_model_finds_the_best_of_a_smooth_space() -> None:
    """Where near candidates are alike, within 3% of the best after 5% of the space."""
    target = targets.get("opencl")
    runtime: Any = Absent(target)
    problem = MatmulProblem(formats.get("q4_0"), 1, 64, 256)
    legal = space.explore(target, target.capabilities, problem).legal
    goal = {"walk": "matvec_fp32", "threads": 128, "rows": 2, "columns": 1, "layout": "native"}
    outcomes = {}
    for one in legal:
        values = space.values_of(one)
        far = space.distance(goal, {key: values[key] for key in goal})
        outcomes[one.id] = Outcome(OK, samples=(1e-3 * 1.2**far,))
    replay = Replay(outcomes)
    options = Options(60, "model", storage="", record=False, write=False, warm_start=False, batch=1,
                      trials=len(legal) // 20)  # fmt: skip
    report = Study(target, runtime, problem, replay, options).run()
    assert len(legal) >= 200
    best = min(o.seconds for o in outcomes.values())
    assert min(outcomes[one].seconds for one in replay.asked) <= 1.03 * best, report.best


def test_a_batch_holds_no_candidate_twice(made_up: tuple[Target, Runtime]) -> None:
    asked: list[list[str]] = []

    class Batches(Replay):
        def compile(self, candidates: Any, limit: float) -> dict[str, Outcome]:
            asked.append([one.id for one in candidates])
            return {}

    replay = Batches(recorded(*made_up, SMALL))
    options = Options(30, batch=4, storage="", record=False, write=False)
    Study(*made_up, SMALL, replay, options).run()
    every = [name for batch in asked for name in batch]
    assert len(set(every)) == len(every) and max(map(len, asked)) == 4


def test_parameters_are_the_walk_and_the_fields() -> None:
    target = targets.get("opencl")
    explored = space.explore(target, target.capabilities, SMALL)
    names = set(space.parameters(explored))
    assert {"walk", "rows", "columns", "threads", "layout"} <= names
    one = explored.legal[0]
    assert isinstance(one, Candidate) and explored.by_id[one.id] is one
    assert json.loads(one.id)["config"] == one.config.as_dict()


# ---- clocks -----------------------------------------------------------------------------------


def test_the_clock_of_the_device_goes_before_the_wall(made_up: tuple[Target, Runtime]) -> None:
    target, runtime = made_up
    calls = 0

    def timed(call: Any) -> float:
        nonlocal calls
        calls += 1
        call()
        return 7e-3

    for clock in ("wall", "device"):
        worker = Worker(target, runtime)
        worker.problem(**request_for(SMALL))
        config = {"kind": "fast", "size": 1}
        one = Candidate(space.walks(target, SMALL)[0], BadConfig.from_dict(config))
        found = worker.measure(one.as_dict(), None, seconds=0.0)
        assert found["clock"] == clock
        assert (set(found["samples"]) == {7e-3}) == (clock == "device") == (calls > 0)
        runtime.timed = timed  # type: ignore[attr-defined]


def test_opencl_says_how_long_launches_take() -> None:
    runtime: Any = targets.get("opencl").runtime()
    if runtime.available() is not None:
        pytest.skip("needs OpenCL")
    target = targets.get("opencl")
    one = space.default(target, runtime.capabilities(), SMALL)
    run = runtime.matmul(generate_walk(one.walk, Q8, target, one.config))
    w = QuantTensor(Q8, (64, 256), gate.sample_rows(Q8, 64, 256))
    x, (y, z) = np.ones((1, 256), np.float32), np.zeros((2, 1, 64), np.float32)
    run(x, w, y)
    begin = time.perf_counter()
    seconds = runtime.timed(lambda: run(x, w, z))
    assert 0 < seconds < time.perf_counter() - begin
    assert np.array_equal(y, z)
    assert runtime.driver().timed(lambda: None) == 0.0

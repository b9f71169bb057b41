"""Recording landscapes and comparing samplers on them, without a device."""

from __future__ import annotations

import importlib.util
import json
import random
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from kernelgen import targets
from kernelgen.tuner import space
from kernelgen.tuner.measure import FAILED, OK, Outcome
from kernelgen.tuner.replay import Replay, read

BENCH = Path(__file__).resolve().parents[2] / "bench"


def load(name: str) -> ModuleType:
    """A script of bench/ as a module."""
    spec = importlib.util.spec_from_file_location(f"bench_{name}", BENCH / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def landscapes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("KERNELGEN_CACHE", str(tmp_path / "cache"))
    module = load("landscapes")
    monkeypatch.setattr(module, "FOLDER", tmp_path)
    return module


class Noisy(Replay):
    """A machine on which every other burst takes up to three times as long; one candidate fails."""

    truth: dict[str, float]
    stop_after = 10**9

    def __init__(self, target: str) -> None:
        super().__init__({})
        self._rng = random.Random(0)

    def measure(self, candidate: Any, *given: Any, **named: Any) -> Outcome:
        if len(self.asked) >= self.stop_after:
            raise KeyboardInterrupt
        self.asked.append(candidate.id)
        seconds = self.truth[candidate.id]
        if seconds < 0:
            return Outcome(FAILED, "nan", "it is made up")
        noise = self._rng.choice((1.0, self._rng.uniform(1, 3)))
        return Outcome(OK, samples=(seconds * noise,), error=1e-7)


def test_a_landscape_is_recorded_in_spite_of_noise_and_interruptions(
    landscapes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = landscapes.Landscape.named("c", "q8_0", "1x64x256", "auto")
    every = one.candidates()
    truth = {c.id: 1e-3 * (1 + n / 10) for n, c in enumerate(every)}
    truth[every[5].id] = -1.0
    Noisy.truth = truth
    monkeypatch.setattr(landscapes, "WorkerMeasurer", Noisy)
    end, rng = time.perf_counter() + 60, random.Random(1)
    monkeypatch.setattr(Noisy, "stop_after", len(every) // 2)
    with pytest.raises(KeyboardInterrupt):
        list(landscapes.record(one, end, rng))
    assert one.part.exists() and not one.path.exists()
    with one.part.open("a") as file:
        file.write('{"candidate": {"op"')  # torn by a crash
    monkeypatch.setattr(Noisy, "stop_after", 10**9)
    begun = sum(map(len, landscapes.read_part(one.part).values()))
    assert begun == len(every) // 2
    said = list(landscapes.record(one, end, rng))
    assert "complete" in said[-1] and "1 failed" in said[-1] and not one.part.exists()
    about, outcomes = read(one.path)
    assert about["space"] == len(outcomes) == len(every)
    assert "node" not in json.dumps(about) and set(about["device"]) == {
        "name", "driver", "units", "isa"
    }  # fmt: skip
    assert outcomes[every[5].id].status == FAILED
    for name, outcome in outcomes.items():
        near = 0 < truth[name] <= 1.3e-3
        if near:  # measured in every pass, of which some were quiet
            assert outcome.seconds == pytest.approx(truth[name], rel=0.2)
    assert min((o.seconds, n) for n, o in outcomes.items() if o.status == OK)[1] == every[0].id


@pytest.mark.slow
def test_samplers_are_compared_on_what_was_recorded(
    landscapes: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = targets.get("c")
    one = landscapes.Landscape.named("c", "q8_0", "1x64x256", "auto")
    default = space.default(target, one.runtime.capabilities(), one.problem)
    mine = space.values_of(default)
    recorder = landscapes.Recorder(one.path, one.about())
    for candidate in one.candidates():
        far = space.distance(mine, space.values_of(candidate))
        recorder.add(candidate, Outcome(OK, samples=(1e-3 * abs(far - 1.1),)))
    compare = load("samplers")
    folder = str(tmp_path)
    compare.main(["--folder", folder, "--seeds", "2", "--samplers", "model,random", "--share", "1"])
    said = capsys.readouterr().out
    assert "c-q8_0-1x64x256" in said and "model, the default:" in said
    size = len(one.candidates())
    for name in ("model", "random"):
        curve = compare.curve(one.path, name, 0, 1.0)
        assert len(curve) == size and curve == sorted(curve, reverse=True) and curve[-1] == 1.0
        assert curve[0] == pytest.approx(11.0)  # the default goes first
    assert [compare.trials_of(0.05, n) for n in (10, 39, 40, 256)] == [1, 1, 2, 12]


def test_a_figure_is_drawn(landscapes: Any, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    one = landscapes.Landscape.named("c", "q8_0", "1x64x256", "auto")
    recorder = landscapes.Recorder(one.path, one.about())
    for n, candidate in enumerate(one.candidates()):
        recorder.add(candidate, Outcome(OK, samples=(1e-3 * (n + 1),)))
    compare = load("samplers")
    curves = {"model": {one.path: [[2.0, 1.5, 1.0]]}}
    for name in ("a.svg", "b.svg"):
        compare.draw(curves, tmp_path / name, 0.08, 1)
    text = (tmp_path / "a.svg").read_text()
    assert text.startswith("<?xml") and text == (tmp_path / "b.svg").read_text()

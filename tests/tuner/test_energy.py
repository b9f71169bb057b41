"""Meters, and studies that seek the least energy."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kernelgen.errors import TuningError
from kernelgen.tuner import cache, energy, lookup
from kernelgen.tuner.measure import WorkerMeasurer, request_for
from kernelgen.tuner.replay import Replay
from kernelgen.tuner.report import Options
from kernelgen.tuner.study import Study
from kernelgen.tuner.worker import Worker
from tests.tuner import made_up_target
from tests.tuner.made_up_target import SMALL, recorded

CPU = {"device": "Made Up CPU", "threads": 2}
LEAST = dataclasses.replace(SMALL, objective="energy")


@pytest.fixture
def powercap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The files of a machine with a package, its cores, which are part of it, and memory."""
    root = tmp_path / "powercap"
    for zone, name, used in (
        ("intel-rapl:0", "package-0", 5_000_000), ("intel-rapl:0:0", "core", 4_000_000),
        ("intel-rapl:0:1", "dram", 1_000_000),
    ):  # fmt: skip
        (root / zone).mkdir(parents=True)
        for file, text in (("name", name), ("energy_uj", used), ("max_energy_range_uj", 9_000_000)):
            (root / zone / file).write_text(f"{text}\n")
    monkeypatch.setattr(energy, "POWERCAP", root)
    return root


def test_packages_and_memory_are_added_and_wrap(powercap: Path) -> None:
    meter = energy.find(CPU)
    assert not isinstance(meter, str) and meter.name == "RAPL (package-0, dram)"
    begin = meter.joules()
    (powercap / "intel-rapl:0" / "energy_uj").write_text("7000000")
    (powercap / "intel-rapl:0:0" / "energy_uj").write_text("9000000")  # a part of the package
    (powercap / "intel-rapl:0:1" / "energy_uj").write_text("1500000")
    assert meter.joules() - begin == pytest.approx(2.5)
    (powercap / "intel-rapl:0" / "energy_uj").write_text("1000000")  # 9 J are 0 again
    assert meter.joules() - begin == pytest.approx(2.5 + 3)


def test_without_a_meter_there_is_a_reason(
    powercap: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (powercap / "intel-rapl:0" / "energy_uj").write_text("nonsense")
    assert "not counted" in str(energy.find(CPU))
    monkeypatch.setattr(energy, "POWERCAP", tmp_path / "nowhere")
    assert "has no RAPL zones" in str(energy.find(CPU))
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert "pip install kernelgen[energy]" in str(energy.find({"device": "GeForce 1"}))


def test_a_gpu_is_counted_by_nvml(monkeypatch: pytest.MonkeyPatch) -> None:
    used = {"GPU A": 1000, "GPU B": 5000}
    monkeypatch.setitem(
        sys.modules,
        "pynvml",
        SimpleNamespace(
            nvmlInit=lambda: None,
            nvmlDeviceGetCount=lambda: 2,
            nvmlDeviceGetHandleByIndex=lambda n: list(used)[n],
            nvmlDeviceGetName=lambda handle: handle.encode(),
            nvmlDeviceGetTotalEnergyConsumption=used.__getitem__,
        ),
    )
    meter: Any = energy.find({"device": "GPU B"})
    assert meter.joules() == 5.0
    used["GPU B"] = 5500
    assert meter.joules() == 5.5
    assert "GPU C" in str(energy.find({"device": "GPU C"}))


def test_joules_of_calls_are_measured_beside_their_seconds(powercap: Path) -> None:
    """A counter that adds a joule for each call."""
    target, runtime = made_up_target.factory()
    runtime.describe = lambda: [CPU]  # type: ignore[method-assign]
    worker = Worker(target, runtime)
    worker.problem(**request_for(LEAST))
    file, calls = powercap / "intel-rapl:0" / "energy_uj", 0
    file.write_text("0")

    def run(*_: Any) -> None:
        nonlocal calls
        calls += 1
        file.write_text(str(calls * 1_000_000 % 9_000_000))

    worker._least = 0.0  # one call a burst
    found = worker._time(run, run, 0.0, 5, prune=False)
    assert found["joules"] == pytest.approx([1.0] * len(found["samples"]))
    assert len(found["joules_against"]) == len(found["against"]) >= 3


def test_the_least_energy_wins_and_is_kept_apart() -> None:
    """The quickest draws the most power."""
    pair = made_up_target.factory()
    outcomes = {
        name: dataclasses.replace(one, joules=(1e-6 / one.seconds,) * 3)
        for name, one in recorded(*pair, SMALL).items()
    }
    options = Options(20, storage="", record=False)
    least = Study(*pair, LEAST, Replay(outcomes), options).run()
    quick = Study(*pair, SMALL, Replay(outcomes), options).run()
    assert least.best is not None and quick.best is not None and least.best != quick.best
    assert outcomes[least.best.id].joules[0] == min(o.joules[0] for o in outcomes.values())
    assert lookup.choose_for(*pair, SMALL).candidate == quick.best
    assert lookup.choose_for(*pair, LEAST).candidate == least.best
    entries = {one.key.objective: one for one in cache.winners(cache.entries())}
    saved = entries["energy"]
    assert saved.joules == least.cost and saved.seconds == outcomes[least.best.id].seconds
    assert saved.ratio == pytest.approx(least.ratio)
    # energy is written down where there is a meter, whatever is sought
    assert entries["time"].joules == outcomes[quick.best.id].joules[0]


def test_the_least_energy_is_refused_where_nothing_counts() -> None:
    target, runtime = made_up_target.factory()
    measurer = WorkerMeasurer(target.name, factory=made_up_target.FACTORY, compilers=1)
    options = Options(20, storage="", record=False)
    try:
        with pytest.raises(TuningError, match=r"least energy was asked for, but .* tune for time"):
            Study(target, runtime, LEAST, measurer, options).run()
    finally:
        measurer.close()

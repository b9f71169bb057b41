"""Compares search strategies on recorded landscapes, without any device.

    python bench/samplers.py                       # replays bench/landscapes/*.jsonl
    python bench/samplers.py --seeds 20 --svg docs/samplers.svg
    python bench/samplers.py --record --target c --format q4_K --shape 1x4096x4096

A landscape is a file of trials (kernelgen.tuner.replay) that has every legal candidate.  For each
sampler, seed and landscape the study runs as it does for users, with the recorded times in place
of a device; what is compared is the best time found after so many trials, over the best there is.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import statistics
import sys
import time
from pathlib import Path

from kernelgen import targets
from kernelgen.ir import formats
from kernelgen.tuner import samplers
from kernelgen.tuner.measure import FAILED, OK, Outcome, WorkerMeasurer
from kernelgen.tuner.replay import Recorder, Replay, read
from kernelgen.tuner.space import Problem
from kernelgen.tuner.study import Options, Study

LANDSCAPES = Path(__file__).parent / "landscapes"


def record(target: str, fmt: str, shape: tuple[int, int, int], seconds: float) -> Path:
    """Measure every legal candidate of a problem; within so many seconds at most."""
    manifest = targets.get(target)
    runtime, problem = manifest.runtime(), Problem(formats.get(fmt), *shape)
    options = Options(seconds, "greedy", storage="", write=False, record=False, prune=False)
    begin = time.perf_counter()
    measurer = WorkerMeasurer(target)
    try:
        report = Study(manifest, runtime, problem, measurer, options).run()
    finally:
        measurer.close()
    name = "-".join([target, fmt, "x".join(map(str, shape))])
    path = LANDSCAPES / f"{name}.jsonl"
    path.unlink(missing_ok=True)
    about = {
        "target": target, "op": problem.op, "format": fmt, "precision": problem.precision,
        "shape": shape, "device": vars(report.device), "space": len(report.space.legal),
    }  # fmt: skip
    recorder = Recorder(path, about)
    for candidate, outcome in report.trials:
        value = report.value(candidate)
        if value is not None:
            outcome = dataclasses.replace(outcome, status=OK, samples=(value,), against=())
        recorder.add(candidate, outcome)
    missing = len(report.space.legal) - len(report.trials)
    print(
        f"{path}: {len(report.trials)} candidates, {len(report.failures)} failed,"
        f" {missing or 'none'} missing, {time.perf_counter() - begin:.0f} s"
    )
    return path


def curve(path: Path, sampler: str, seed: int, share: float) -> list[float]:
    """The best found after each trial, as a multiple of the best there is."""
    about, outcomes = read(path)
    target = targets.get(about["target"])
    problem = Problem(formats.get(about["format"]), *about["shape"], about["precision"])
    trials = max(2, math.ceil(share * len(outcomes)))
    options = Options(
        3600, sampler, seed, storage="", write=False, record=False, warm_start=False, batch=1,
        trials=trials,
    )  # fmt: skip
    replay = Replay(outcomes)
    Study(target, target.runtime(), problem, replay, options, only=set(outcomes)).run()
    times = [seconds(outcomes.get(name)) for name in replay.asked[:trials]]
    best = min(map(seconds, outcomes.values()))
    return [min(times[: n + 1]) / best for n in range(len(times))]


def seconds(outcome: Outcome | None) -> float:
    """The time of an outcome; infinite where it failed."""
    return math.inf if outcome is None or outcome.status == FAILED else outcome.seconds


def available(name: str) -> str | None:
    """Why a sampler cannot be used here, or None."""
    try:
        samplers.make(name, 0)
        if name in ("gp", "qmc"):
            import scipy  # noqa: F401
        if name == "cmaes":
            import cmaes  # noqa: F401
    except ImportError as error:
        return str(error)
    return None


def compare(
    paths: list[Path], seeds: int, share: float, names: list[str]
) -> dict[str, list[float]]:
    """Median curves by sampler: over all landscapes and seeds, by share of the space."""
    result: dict[str, list[float]] = {}
    for name in names:
        reason = available(name)
        if reason is not None:
            print(f"{name:8} is left out: {reason}", file=sys.stderr)
            continue
        found = [curve(path, name, seed, share) for path in paths for seed in range(seeds)]
        points = 20
        result[name] = [
            statistics.median(
                one[max(0, math.ceil(len(one) * (p + 1) / points) - 1)] for one in found
            )
            for p in range(points)
        ]
    return result


def print_table(curves: dict[str, list[float]], share: float) -> None:
    """Best found over best there is, after a tenth, a half and all of the trials."""
    marks = (1, 4, 9, 19)
    head = "".join(f"{f'{share * (m + 1) / 20:.1%}':>10}" for m in marks)
    print(f"{'sampler':10}{head}   of the space measured")
    for name, one in sorted(curves.items(), key=lambda pair: sum(pair[1])):
        print(f"{name:10}" + "".join(f"{one[m]:10.3f}" for m in marks))


def svg(curves: dict[str, list[float]], share: float) -> str:
    """The curves as a picture."""
    width, height, left, bottom = 640, 320, 50, 40
    most = min(3.0, max(max(one) for one in curves.values()) * 1.05)
    colours = ("#1a5490", "#c0392b", "#27824a", "#8e44ad", "#b9770e", "#555", "#16a2b8")

    def at(n: int, value: float, points: int) -> str:
        x = left + (width - left - 110) * (n + 1) / points
        y = 10 + (height - bottom - 10) * (most - min(value, most)) / (most - 1)
        return f"{x:.1f},{y:.1f}"

    parts = []
    for colour, (name, one) in zip(colours, curves.items(), strict=False):
        points = " ".join(at(n, value, len(one)) for n, value in enumerate(one))
        y = 24 + 18 * len(parts)
        parts.append(
            f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>'
            f'<text x="{width - 100}" y="{y}" fill="{colour}">{name}</text>'
        )
    base = height - bottom
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}"'
        ' font-family="sans-serif" font-size="12">'
        f'<rect width="{width}" height="{height}" fill="white"/>'
        f'<path d="M{left},10V{base}H{width - 110}" fill="none" stroke="#999"/>'
        f'<text x="{left - 6}" y="{base}" text-anchor="end">1</text>'
        f'<text x="{left - 6}" y="18" text-anchor="end">{most:.1f}</text>'
        f'<text x="{left}" y="{height - 10}">best found over best there is, by share of the space'
        f" measured (right end: {share:.0%})</text>{''.join(parts)}</svg>\n"
    )


def main() -> None:
    """Record, or replay."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--target", default="c")
    parser.add_argument("--format", default="q4_K")
    parser.add_argument("--shape", default="1x4096x4096")
    parser.add_argument("--seconds", type=float, default=600, help="budget of a recording")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--share", type=float, default=0.5, help="of the space to measure")
    parser.add_argument("--samplers", default=",".join(samplers.NAMES))
    parser.add_argument("--svg", type=Path)
    given = parser.parse_args()
    if given.record:
        m, n, k = map(int, given.shape.split("x"))
        record(given.target, given.format, (m, n, k), given.seconds)
        return
    paths = sorted(LANDSCAPES.glob("*.jsonl"))
    if not paths:
        sys.exit(f"{LANDSCAPES} has no landscapes; record one with --record")
    curves = compare(paths, given.seeds, given.share, given.samplers.split(","))
    print_table(curves, given.share)
    if given.svg:
        given.svg.write_text(svg(curves, given.share))


if __name__ == "__main__":
    main()

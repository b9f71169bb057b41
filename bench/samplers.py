"""Compares search strategies on recorded landscapes, without any device.

    python bench/samplers.py                                    # the table
    python bench/samplers.py --svg docs/figures/samplers.svg    # and the figure

A landscape is a file of bench/landscapes.py: the time of every legal candidate of a kernel.  For
each sampler, seed and landscape the study runs as it does for users who have tuned nothing before,
with the recorded times in place of a device.  What is compared is the best time found after so
many trials, the default's first, over the best there is.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import statistics
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

from kernelgen import targets
from kernelgen.ir import formats
from kernelgen.targets.base import Target
from kernelgen.tuner import samplers
from kernelgen.tuner.measure import FAILED, Outcome
from kernelgen.tuner.problems import MatmulProblem, Problem
from kernelgen.tuner.replay import Replay, read
from kernelgen.tuner.study import Options, Study

LANDSCAPES = Path(__file__).parent / "landscapes"

#: what the table shows: shares of the space that were measured
SHARES = (0.02, 0.05, 0.08)
#: of which this is what a default must be good after, and how good
ENOUGH, GOOD = 0.05, 1.03

#: samplers that take so long to think that they are replayed with so many seeds at most
FEW_SEEDS = {"gp": 5}

Curve = list[float]


@cache
def landscape(path: Path) -> tuple[Target, Problem, dict[str, Outcome], str]:
    """What a file holds, and its name."""
    about, outcomes = read(path)
    problem = MatmulProblem(
        formats.get(about["format"]), *about["shape"], precision=about["precision"]
    )
    return targets.get(about["target"]), problem, outcomes, path.stem


def seconds(outcome: Outcome | None) -> float:
    """The time of an outcome; infinite where it failed."""
    return math.inf if outcome is None or outcome.status == FAILED else outcome.seconds


def trials_of(share: float, size: int) -> int:
    """How many trials a share of a space is: never more, but for the first."""
    return max(1, math.floor(share * size + 1e-9))


def curve(path: Path, sampler: str, seed: int, share: float) -> Curve:
    """The best found after each trial, as a multiple of the best there is."""
    target, problem, outcomes, _ = landscape(path)
    trials = trials_of(share, len(outcomes))
    options = Options(
        3600, sampler, seed, storage="", write=False, record=False, warm_start=False, batch=1,
        trials=trials,
    )  # fmt: skip
    replay = Replay(outcomes)
    Study(target, target.runtime(), problem, replay, options, only=set(outcomes)).run()
    times = [seconds(outcomes.get(name)) for name in replay.asked[:trials]]
    best = min(map(seconds, outcomes.values()))
    return [min(times[: n + 1]) / best for n in range(len(times))]


def curves(path: Path, sampler: str, seeds: int, share: float) -> list[Curve]:
    """Those of all seeds."""
    return [curve(path, sampler, seed, share) for seed in range(seeds)]


def available(name: str) -> str | None:
    """Why a sampler cannot be used here, or None."""
    try:
        samplers.make(name, 0)
        if name in ("gp", "qmc"):
            import scipy  # noqa: F401
        if name == "gp":
            import torch  # noqa: F401
        if name == "cmaes":
            import cmaes  # noqa: F401
    except ImportError as error:
        return str(error)
    return None


def found_at(one: Curve, share: float, size: int) -> float:
    """The value of a curve when a share of the space was measured."""
    return one[min(len(one), trials_of(share, size)) - 1]


def _alone() -> None:
    """Of many processes, each is to use one core."""
    with contextlib.suppress(ImportError):
        import torch

        torch.set_num_threads(1)


Results = dict[str, dict[Path, list[Curve]]]


def compare(paths: list[Path], seeds: int, share: float, names: list[str]) -> Results:
    """Curves by sampler and landscape."""
    result: Results = {}
    with ProcessPoolExecutor(initializer=_alone) as pool:
        jobs: dict[str, dict[Path, Any]] = {}
        for name in names:
            reason = available(name)
            if reason is not None:
                print(f"{name} is left out: {reason}", file=sys.stderr)
                continue
            jobs[name] = {
                p: pool.submit(curves, p, name, min(seeds, FEW_SEEDS.get(name, seeds)), share)
                for p in paths
            }
        for name, ones in jobs.items():
            begin = time.perf_counter()
            result[name] = {path: job.result() for path, job in ones.items()}
            print(f"{name}: waited {time.perf_counter() - begin:.0f} s", file=sys.stderr)
    return result


def medians(found: dict[Path, list[Curve]], share: float) -> list[float]:
    """Over seeds, for each landscape."""
    return [
        statistics.median(found_at(one, share, len(landscape(path)[2])) for one in ones)
        for path, ones in found.items()
    ]


def overall(found: dict[Path, list[Curve]], share: float) -> float:
    """The median over all landscapes and seeds."""
    sizes = {path: len(landscape(path)[2]) for path in found}
    return statistics.median(
        found_at(one, share, sizes[path]) for path, ones in found.items() for one in ones
    )


def print_tables(results: Results, paths: list[Path]) -> None:
    """All landscapes together, then each alone."""
    print("best found over best there is, median over landscapes and seeds, after measuring")
    print(" " * 10 + "".join(f"{share:>8.0%}" for share in SHARES) + "   of the space")
    ranked = sorted(results.items(), key=lambda pair: [overall(pair[1], s) for s in SHARES[1:]])
    for name, found in ranked:
        print(f"{name:10}" + "".join(f"{overall(found, share):8.3f}" for share in SHARES))
    print(f"\nby landscape, after {ENOUGH:.0%}, median over seeds")
    print(f"{'':30}{'size':>6}{'trials':>8}" + "".join(f"{name:>8}" for name, _ in ranked))
    for n, path in enumerate(paths):
        size = len(landscape(path)[2])
        row = "".join(f"{medians(found, ENOUGH)[n]:8.3f}" for _, found in ranked)
        print(f"{path.stem:30}{size:6}{trials_of(ENOUGH, size):8}{row}")
    if samplers.DEFAULT in results:
        value = overall(results[samplers.DEFAULT], ENOUGH)
        said = "holds" if value <= GOOD else "does not hold"
        print(
            f"\n{samplers.DEFAULT}, the default: {value:.3f} after {ENOUGH:.0%} of the space; that"
            f" it be at most {GOOD} {said}"
        )


def draw(results: Results, path: Path, share: float, seeds: int) -> None:
    """The medians over all landscapes and seeds, by share of the space."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "kernelgen"  # the same picture from the same numbers
    from matplotlib import pyplot

    grid = [share * (n + 1) / 60 for n in range(60)]
    figure, axes = pyplot.subplots(figsize=(7.5, 4))
    for name, found in results.items():
        main = name == samplers.DEFAULT
        values = [overall(found, one) for one in grid]
        axes.plot([100 * g for g in grid], values, label=name, linewidth=2.4 if main else 1.2)
    axes.axhline(GOOD, color="#999", linewidth=0.8, linestyle="--")
    axes.axvline(100 * ENOUGH, color="#999", linewidth=0.8, linestyle="--")
    axes.set_xlabel("share of the space that was measured, in percent")
    axes.set_ylabel("best found over best there is")
    count = len(next(iter(results.values())))
    axes.set_title(f"median over {count} landscapes and {seeds} seeds", fontsize=10)
    axes.legend(frameon=False, ncols=2)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})


def main(arguments: Sequence[str] | None = None) -> None:
    """Replay, print, and draw."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--share", type=float, default=SHARES[-1], help="of the space to measure")
    parser.add_argument("--samplers", default=",".join(samplers.NAMES))
    parser.add_argument("--folder", type=Path, default=LANDSCAPES)
    parser.add_argument("--svg", type=Path)
    given = parser.parse_args(arguments)
    paths = sorted(given.folder.glob("*.jsonl"))
    if not paths:
        sys.exit(f"{given.folder} has no landscapes; bench/landscapes.py records them")
    results = compare(paths, given.seeds, given.share, given.samplers.split(","))
    print_tables(results, paths)
    if given.svg:
        draw(results, given.svg, given.share, given.seeds)
        print(f"wrote {given.svg}", file=sys.stderr)


if __name__ == "__main__":
    main()

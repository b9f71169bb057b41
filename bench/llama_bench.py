"""A model's speed beside llama-bench of llama.cpp and of ik_llama.cpp, on one file.

    python -m bench.llama_bench made.gguf --llama PATH --ik PATH [-t 2] [-p 512] [-n 128] [-r 3]

PATHs are of the programs llama-bench; ik_llama.cpp's runs with -rtr 1 -fa 1, its fastest.  If the
file is missing it is made: 4 layers of the shape of a model of 7 billion weights, random, q4_K
(bench/made_model.py).  Programs run in turns, each for every turn anew; the first pass of each is
not timed.  Medians of tokens in a second: pp of a prompt, tg of tokens that follow.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.table import Table

from kernelgen.bench import busy

#: tokens in a second, by test ("pp512")
Speeds = dict[str, float]


class BenchError(Exception):
    """A program failed."""


def _output(command: list[str], threads: int) -> str:
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    except OSError as error:
        raise BenchError(f"{command[0]} cannot be run: {error}") from error
    if done.returncode != 0:
        said = done.stderr.strip().splitlines()[-1:] or [f"status {done.returncode}"]
        raise BenchError(f"{' '.join(command[:4])} failed with {done.returncode}: {said[0]}")
    return done.stdout


def ours(model: Path, threads: int, prompt: int, tokens: int) -> Speeds:
    """`kernelgen bench-model`, once.

    Raises BenchError where it fails.
    """
    command = [sys.executable, "-m", "kernelgen", "bench-model", str(model), "--target", "c",
               "-p", str(prompt), "-n", str(tokens), "-r", "1", "--json"]  # fmt: skip
    return {one["test"]: one["mean"] for one in json.loads(_output(command, threads))["tests"]}


def theirs(
    program: Path, options: list[str], model: Path, threads: int, prompt: int, tokens: int
) -> Speeds:
    """llama-bench, once.

    Raises BenchError where it fails.
    """
    command = [str(program), "-m", str(model), "-t", str(threads), "-p", str(prompt),
               "-n", str(tokens), "-r", "1", "-o", "json", *options]  # fmt: skip
    return {_test(one): one["avg_ts"] for one in json.loads(_output(command, threads))}


def _test(one: dict[str, int]) -> str:
    return f"pp{one['n_prompt']}" if one["n_prompt"] else f"tg{one['n_gen']}"


def in_turns(runs: dict[str, Callable[[], Speeds]], turns: int) -> dict[str, Speeds]:
    """Medians of each program's tests; every other turn goes backwards.  One that fails is left
    out, and why is said."""
    samples: dict[str, dict[str, list[float]]] = {name: {} for name in runs}
    for turn in range(turns):
        order = list(samples)
        for name in order if turn % 2 == 0 else order[::-1]:
            try:
                for test, speed in runs[name]().items():
                    samples[name].setdefault(test, []).append(speed)
            except BenchError as error:
                print(f"{name} is left out: {error}", file=sys.stderr)
                del samples[name]
    return {
        name: {test: statistics.median(speeds) for test, speeds in tests.items()}
        for name, tests in samples.items()
    }


def shown(found: dict[str, Speeds], title: str) -> Table:
    """A row for each test: tokens in a second, and how many times as fast kernelgen is."""
    table = Table("test", *found, title=title)
    mine = found.get("kernelgen", {})
    for test in dict.fromkeys(test for speeds in found.values() for test in speeds):
        cells = []
        for name, speeds in found.items():
            if test not in speeds:
                cells.append("")
                continue
            ratio = f" ({mine[test] / speeds[test]:.2f}x)" if test in mine else ""
            cells.append(f"{speeds[test]:.1f}" + (ratio if name != "kernelgen" else ""))
        table.add_row(test, *cells)
    return table


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--llama", type=Path, metavar="PATH")
    parser.add_argument("--ik", type=Path, metavar="PATH")
    parser.add_argument("-t", "--threads", type=int, default=2)
    parser.add_argument("-p", "--prompt", type=int, default=512)
    parser.add_argument("-n", "--tokens", type=int, default=128)
    parser.add_argument("-r", "--turns", type=int, default=3)
    given = parser.parse_args()
    if not given.model.exists():
        from bench.made_model import write

        write(given.model, rows=64)
    if (why := busy()) is not None:
        print(why, file=sys.stderr)
    sizes = (given.model, given.threads, given.prompt, given.tokens)
    runs: dict[str, Callable[[], Speeds]] = {"kernelgen": lambda: ours(*sizes)}
    if given.llama:
        runs["llama.cpp"] = lambda: theirs(given.llama, [], *sizes)
    if given.ik:
        runs["ik_llama.cpp"] = lambda: theirs(given.ik, ["-rtr", "1", "-fa", "1"], *sizes)
    found = in_turns(runs, given.turns)
    title = f"{given.model.name}, {given.threads} threads, tokens/s"
    Console(width=None if sys.stdout.isatty() else 100).print(shown(found, title))


if __name__ == "__main__":
    main()

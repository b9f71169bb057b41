"""The c target's matmul on this machine beside what else a CPU's user would take, in one run.

    python -m bench.cpu --llama DIR --ik DIR --out cpu.jsonl
    python -m bench.cpu --report cpu.jsonl [--figure cpu.svg]

DIR is the folder of a build of llama.cpp or ik_llama.cpp (shared libraries, GGML_NATIVE=ON; both
options may be given several times, and the fastest build counts); onnxruntime and OpenVINO come
with `pip install kernelgen[bench]`.  Whoever is absent is named, with the reason.

Each rival is at its best: every way that it has is tried, the fastest for each M is timed, in turns
with kernelgen.matmul and with reading the same bytes; who takes more than three times as long
as the fastest in the trial is not timed further, except llama.cpp, ik_llama.cpp and numpy.  What
rivals compute is checked against float64.  Each has a process of its own (bench/cpu_worker.py).
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

import kernelgen
from bench import cpu_report
from bench.cpu_limits import Limits
from bench.cpu_rivals import PLAIN, AbsentError, Problem, Rival, rivals
from bench.cpu_worker import BURST, PAUSE, WARM, Best, Worker, tried
from kernelgen import targets
from kernelgen.bench import busy, calls, in_turns
from kernelgen.ir import formats
from kernelgen.ir.block import BlockFormat
from kernelgen.tensor import QuantTensor
from kernelgen.verify import sample_weights

FORMATS = (
    "q2_K", "q3_K", "q4_0", "q4_1", "q4_K", "q5_0", "q5_1", "q5_K", "q6_K", "q8_0", "iq4_nl",
    "mxfp4",
)  # fmt: skip
SHAPES = ("4096x14336", "14336x4096")
ROWS = (1, 2, 4, 8, 128, 512)

#: rows of weights that differ; more would only take time to make
DISTINCT = 64

#: who takes longer than so many times the fastest is known from the trial alone
FAR_OFF = 3.0
#: who is timed all the same: the rivals that ratios are quoted to
ALWAYS = ("kernelgen", "read", "numpy float32", "llama.cpp", "llama.cpp unpacked", "ik_llama.cpp")

Record = dict[str, Any]


@dataclass(frozen=True)
class Candidate:
    """One who multiplies (or reads), in its best way.

    way     what that is called
    burst   its turn: seconds of calls
    same    whether it multiplies the blocks of the format itself
    trial   seconds of a call in the trial
    error   see Problem.error; None where nothing is multiplied
    """

    name: str
    way: str
    burst: Callable[[], list[float]]
    same: bool
    trial: float
    error: float | None


class Bench:
    """What is measured at one shape; rivals that have their own weights make them once."""

    def __init__(
        self, n: int, k: int, ms: list[int], who: list[Rival], repeats: int, memory: int = 0
    ) -> None:
        self.n, self.k, self.ms, self.repeats = n, k, tuple(ms), repeats
        rows = np.random.default_rng(n).standard_normal((DISTINCT, k), np.float32)
        self.of_floats = Problem(n, rows, self.ms, memory=memory)
        self.limits = Limits()
        self.absent: dict[str, str] = {}
        self.workers = [Worker(rival) for rival in who]
        self.same = [one for one in self.workers if one.rival.same]
        self.others = [
            one for one in self.workers
            if not one.rival.same and self._make(one, self.of_floats)
        ]  # fmt: skip
        self._known: dict[tuple[str, int], Best] = {}

    def close(self) -> None:
        """End the processes."""
        for worker in self.workers:
            worker.close()

    def _make(self, worker: Worker, problem: Problem) -> list[str]:
        try:
            return worker.make(problem)
        except AbsentError as error:
            of_format = f", {problem.format}" if problem.format else ""
            self.absent[worker.rival.name + of_format] = str(error)
            return []

    def prepare(self, fmt: BlockFormat) -> Callable[[], Iterator[Record]]:
        """Quantizes, repacks, compiles; what it returns measures."""
        few = QuantTensor(fmt, (DISTINCT, self.k), sample_weights(fmt, DISTINCT, self.k))
        memory = self.of_floats.memory
        problem = Problem(self.n, few.dequantize(), self.ms, fmt.name, few.data, memory)
        same = [worker for worker in self.same if self._make(worker, problem)]
        nbytes = self.n * fmt.row_bytes(self.k)
        reads = self.limits.reads(nbytes, memory)

        def measure() -> Iterator[Record]:
            timed: dict[str, tuple[int, Candidate]] = {"read": (0, self._reading(reads))}
            for m in self.ms:
                found = list(self._found(fmt, same, m))
                fastest = min(one.trial for one in found)
                for one in found:
                    if one.name in ALWAYS or one.trial <= FAR_OFF * fastest:
                        timed[f"{one.name}|{m}"] = m, one
                    else:
                        yield self._record(fmt, nbytes, m, one, [one.trial], trial=True)
            bursts = {key: one.burst for key, (_, one) in timed.items()}
            times = in_turns(bursts, self.repeats, PAUSE)
            for key, (m, one) in timed.items():
                yield self._record(fmt, nbytes, m, one, times[key].samples)

        return measure

    def _reading(self, reads: dict[str, Callable[[], int]]) -> Candidate:
        way = min(reads, key=lambda one: tried(reads[one]))
        return Candidate("read", way, lambda: calls(reads[way], BURST, WARM), True, 0.0, None)

    def _found(self, fmt: BlockFormat, same: list[Worker], m: int) -> Iterator[Candidate]:
        """Everybody who multiplies this format or what stands for it."""
        for worker in same:
            yield from self._candidate(worker, m, "", self._best(worker, m, ""))
            if worker.rival.name != "kernelgen":
                unpacked = self._best(worker, m, PLAIN)
                yield from self._candidate(worker, m, " unpacked", unpacked)
        for worker in self.others:
            key = (worker.rival.name, m)
            if key not in self._known and (one := self._best(worker, m, "")) is not None:
                self._known[key] = one  # its weights, and so its times, are those of any format
            if worker.rival.serves(fmt.bits):
                yield from self._candidate(worker, m, "", self._known.get(key))

    def _best(self, worker: Worker, m: int, beginning: str) -> Best | None:
        try:
            return worker.best(m, beginning)
        except AbsentError as error:
            self.absent[f"{worker.rival.name}, M={m}"] = str(error)
            return None

    def _candidate(
        self, worker: Worker, m: int, kind: str, one: Best | None
    ) -> Iterator[Candidate]:
        if one is not None:
            way = one.way
            name = worker.rival.name + kind
            burst = functools.partial(worker.burst, m, way)
            yield Candidate(name, way, burst, worker.rival.same, one.trial, one.error)

    def _record(
        self, fmt: BlockFormat, nbytes: int, m: int, one: Candidate, samples: Any,
        trial: bool = False,
    ) -> Record:  # fmt: skip
        return {
            "what": "time", "format": fmt.name, "bits": fmt.bits, "n": self.n, "k": self.k, "m": m,
            "nbytes": nbytes, "name": one.name, "way": one.way, "same": one.same,
            "seconds": float(np.median(samples)), "least": min(samples), "calls": len(samples),
            "trial": trial, "error": one.error,
        }  # fmt: skip


def machine() -> Record:
    """What was measured on, and with what."""
    from kernelgen.targets.c.compiler import find_compiler

    runtime: Any = targets.get("c").runtime()
    compiler = find_compiler()
    return {
        "what": "machine", **runtime.describe()[0], "time": time.strftime("%Y-%m-%d %H:%M"),
        "system": platform.platform(), "kernelgen": kernelgen.__version__, "busy": busy(),
        "compiler": compiler if isinstance(compiler, str) else compiler.version,
        "versions": dict(_versions("numpy", "torch", "onnxruntime", "openvino")),
    }  # fmt: skip


def _versions(*names: str) -> Iterator[tuple[str, str]]:
    for name in names:
        with contextlib.suppress(metadata.PackageNotFoundError):
            yield name, metadata.version(name)


def shape(text: str) -> tuple[int, int]:
    """(N, K) of "4096x14336"."""
    n, _, k = text.partition("x")
    if not (n.isdigit() and k.isdigit() and int(n) and int(k)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a shape; write NxK, such as 4096x14336")
    return int(n), int(k)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--llama", type=Path, action="append", default=[], metavar="DIR")
    parser.add_argument("--ik", type=Path, action="append", default=[], metavar="DIR")
    known = [fmt.name for fmt in formats.formats()]
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), choices=known, metavar="F")
    parser.add_argument("--shapes", nargs="+", type=shape, default=[shape(s) for s in SHAPES])
    parser.add_argument("--rows", nargs="+", type=int, default=list(ROWS), metavar="M")
    parser.add_argument("--repeats", type=int, default=5, help="turns")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--memory", type=int, default=0, metavar="MB",
        help="copies of the weights come to so much, and each call takes the next: more than the"
        " last cache holds, as a model's layers do",
    )  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="q4_K at 4096x14336")
    parser.add_argument("--out", type=Path, help="JSON lines, which are added to a file")
    parser.add_argument("--report", type=Path, nargs="+", help="show such files; measure nothing")
    parser.add_argument("--figure", type=Path, help="draw the report (SVG)")
    given = parser.parse_args()
    if given.quick:
        given.formats, given.shapes = ["q4_K"], [shape(SHAPES[0])]
    if given.report:
        records = [json.loads(s) for path in given.report for s in path.read_text().splitlines()]
    else:
        records = []
        for record in run(given):
            records.append(record)
            if given.out:
                with given.out.open("a") as file:
                    file.write(json.dumps(record) + "\n")
    print(cpu_report.text(records))
    if given.figure:
        cpu_report.draw(records, given.figure)


def run(given: argparse.Namespace) -> Iterator[Record]:
    """Everything that was asked for."""
    # for this process, which has not loaded OpenMP yet, and those of rivals; LLVM's threads spin
    # for 0.2 s if nobody says otherwise, a longer pause than there is
    os.environ["OMP_NUM_THREADS"] = str(given.threads)
    os.environ.setdefault("KMP_BLOCKTIME", "20")
    if (why := busy()) is not None:
        print(why, file=sys.stderr)
    who = rivals(given.llama, given.ik)
    for n, k in given.shapes:
        bench = Bench(n, k, given.rows, who, given.repeats, given.memory * 10**6)
        for name in given.formats:
            measure = bench.prepare(formats.get(name))
            if name == given.formats[0]:
                yield machine() | {"memory": given.memory}
                limits = bench.limits.operations()
                yield from ({"what": "limit", "name": a, "gop_per_s": b} for a, b in limits.items())
            yield from measure()
        bench.close()
        for rival, why in bench.absent.items():
            yield {"what": "absent", "name": rival, "why": why, "n": n, "k": k}


if __name__ == "__main__":
    main()

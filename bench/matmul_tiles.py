"""Matmul on the tiles of a CPU's matrix units beside the same in vectors.

    OMP_NUM_THREADS=2 python -m bench.matmul_tiles [--formats q4_K q8_0 q6_K] [--rows 16 128 512]

4096 x 14336 weights of random bytes, default configurations, both in turns.  Medians in
milliseconds, of the time that passed and of CPU time of all threads together; with one thread, CPU
time hardly depends on what else the machine does.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np

from kernelgen import targets
from kernelgen.bench import busy, compare
from kernelgen.generate import generate_walk
from kernelgen.ir import formats
from kernelgen.targets.c.runtime import runtime, threads
from kernelgen.tensor import QuantTensor
from kernelgen.verify import random_blocks

N, K = 4096, 14336
#: rows of weights that differ; more would only take time to make
DISTINCT = 64


def calls_for(name: str, m: int) -> dict[str, Callable[[], None]]:
    """A call of each walk of matmul for a format that takes more than vectors of floats."""
    fmt, target, reach = formats.get(name), targets.get("c"), runtime()
    data = np.tile(random_blocks(fmt, DISTINCT, K), (N // DISTINCT, 1))
    w = QuantTensor(fmt, (N, K), data)
    x = np.random.default_rng(m).standard_normal((m, K), np.float32)
    calls: dict[str, Callable[[], None]] = {}
    for walk in target.walks:
        config = walk.config.default(reach.capabilities(), m)
        served = walk.op == "matmul" and walk.precision != "fp32" and walk.accepts(fmt) is None
        if served and walk.refuses(config, fmt, reach.capabilities()) is None:
            run = reach.matmul(generate_walk(walk, fmt, target, config))
            y = np.empty((m, N), np.float32)
            calls[walk.name] = lambda run=run, y=y: run(x, w, y)  # type: ignore[misc]
    return calls


def main() -> None:
    """All formats and numbers of rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--formats", nargs="+", default=["q4_K", "q8_0", "q6_K"])
    parser.add_argument("--rows", nargs="+", type=int, default=[16, 128, 512])
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    print(f"{threads()} threads, instruction set {runtime().isa.name}")
    if (why := busy()) is not None:
        print(why)
    for name in args.formats:
        for m in args.rows:
            calls = calls_for(name, m)
            cpu: dict[str, list[float]] = {one: [] for one in calls}

            def clocked(one: str, calls=calls, cpu=cpu) -> Callable[[], None]:  # type: ignore[no-untyped-def]
                def call() -> None:
                    before = time.process_time()
                    calls[one]()
                    cpu[one].append(time.process_time() - before)

                return call

            for one, timing in compare({c: clocked(c) for c in calls}, args.repeats).items():
                spent = statistics.median(cpu[one])
                print(
                    f"{name:6} M={m:<4} {one:16} {1e3 * timing.median:9.2f} ms"
                    f"  cpu {1e3 * spent:9.2f} ms, {2 * m * N * K / spent / 1e9:6.0f} GOP/s"
                )


if __name__ == "__main__":
    main()

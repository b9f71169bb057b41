"""A gated product in one kernel against its parts, on this machine's CPU.

    python -m bench.gated [--shape 14336x4096] [--rows 1,32] [--repeats 15] [--cpu]

gate and up in q4_K, int8 activations, silu.  The parts are two products and numpy's gate, into
arrays that are there.  Each has a gate and an up of its own, of the same numbers, so that none
finds in the caches what another has read.  Medians of interleaved repeats, in milliseconds; with
--cpu those of the time that processors spent, which load on the machine changes less: set
OMP_NUM_THREADS=1 with it.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence

import numpy as np

import kernelgen
from kernelgen.bench import busy
from kernelgen.ir import formats
from kernelgen.targets.c.runtime import runtime, threads
from kernelgen.tensor import QuantTensor
from kernelgen.verify import sample_weights

#: rows of weights that differ from one another
_DISTINCT = 128


def weights(n: int, k: int, seed: int) -> QuantTensor:
    """A matrix in q4_K, of repeated rows."""
    fmt = formats.get("q4_K")
    exact = np.random.default_rng(seed).standard_normal((min(n, _DISTINCT), k), np.float32)
    rows = sample_weights(fmt, *exact.shape, exact)
    return QuantTensor(fmt, (n, k), np.resize(rows, (n, rows.shape[1])))


def calls(m: int, pairs: Sequence[tuple[QuantTensor, QuantTensor]]) -> dict[
    str, Callable[[], object]
]:  # fmt: skip
    """What is compared, for m rows of activations."""
    n, k = pairs[0][0].shape
    x = np.random.default_rng(m).standard_normal((m, k), np.float32)
    g, u, t, y = (np.empty((m, n), np.float32) for _ in range(4))

    def products(gate: QuantTensor, up: QuantTensor) -> None:
        kernelgen.matmul(x, gate, out=g, target="c")
        kernelgen.matmul(x, up, out=u, target="c")

    def parts() -> None:
        products(*pairs[0])
        with np.errstate(over="ignore"):
            np.exp(np.negative(g, out=t), out=t)
        np.divide(g, np.add(t, np.float32(1), out=t), out=t)
        np.multiply(t, u, out=t)

    def fused() -> None:
        kernelgen.gated_matmul(x, *pairs[2], out=y, target="c")

    parts()
    fused()
    off = float(np.abs(t - y).max() / np.sqrt(np.mean(np.square(t))))
    assert off < 1e-5, f"results differ by {off}"
    return {"parts": parts, "products alone": lambda: products(*pairs[1]), "fused": fused}


def main() -> None:
    """All comparisons."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="14336x4096")
    parser.add_argument("--rows", default="1,32")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--cpu", action="store_true")
    given = parser.parse_args()
    n, k = map(int, given.shape.split("x"))
    clock = time.process_time if given.cpu else time.perf_counter
    print(f"{threads()} threads, instruction set {runtime().isa.name}, N x K = {n} x {k}")
    if (why := busy()) is not None:
        print(why)
    pairs = [(weights(n, k, 0), weights(n, k, 1)) for _ in range(3)]
    for m in map(int, given.rows.split(",")):
        compared = calls(m, pairs)
        samples: dict[str, list[float]] = {name: [] for name in compared}
        for _ in range(given.repeats):
            for name, call in compared.items():
                start = clock()
                call()
                samples[name].append(clock() - start)
        medians = {name: 1e3 * statistics.median(found) for name, found in samples.items()}
        for name, ms in medians.items():
            least = 1e3 * min(samples[name])
            print(f"M = {m:4} {name:15} {ms:9.2f}  (least {least:.2f})")
        ratio = medians["parts"] / medians["fused"]
        print(f"         the parts take {ratio:.2f} times as long as the one kernel")


if __name__ == "__main__":
    main()

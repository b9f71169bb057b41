"""Maps and row reductions on this machine's CPU against memcpy on as many threads.

    OMP_NUM_THREADS=2 python -m bench.maps [--repeats 15] [--rows 4096] [--columns 4096]

Medians of interleaved repeats: bytes that are read and written in a second, relative to those that
memcpy moves.  Results go into arrays that are there already.
"""

from __future__ import annotations

import argparse
import ctypes
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt

import kernelgen
from kernelgen.bench import busy, compare
from kernelgen.targets.c.runtime import runtime, threads

Array = npt.NDArray[Any]


def memcpy(to: Array, source: Array, pool: ThreadPoolExecutor) -> Callable[[], None]:
    """A copy in as many parts as there are threads."""
    copy = ctypes.CDLL(None).memcpy
    copy.argtypes, copy.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t], None
    parts = list(
        zip(*(np.array_split(a.reshape(-1), threads()) for a in (to, source)), strict=True)
    )

    def run() -> None:
        for one in [pool.submit(copy, a.ctypes.data, b.ctypes.data, a.nbytes) for a, b in parts]:
            one.result()

    return run


def main() -> None:
    """All of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--columns", type=int, default=4096)
    given = parser.parse_args()
    rng = np.random.default_rng(0)
    x, other = rng.standard_normal((2, given.rows, given.columns), np.float32)
    weight, out = rng.standard_normal(given.columns, np.float32), np.zeros_like(x)
    half = x.astype(np.float16)
    half_out = np.zeros_like(half)
    calls: dict[str, tuple[int, Callable[[], object]]] = {
        "rms_norm": (2 * x.nbytes, lambda: kernelgen.rms_norm(x, weight, target="c", out=out)),
        "softmax": (2 * x.nbytes, lambda: kernelgen.softmax(x, target="c", out=out)),
        "silu * mul": (3 * x.nbytes, lambda: kernelgen.swiglu(x, other, target="c", out=out)),
        "layer_norm": (2 * x.nbytes, lambda: kernelgen.layer_norm(x, weight, target="c", out=out)),
        "gelu": (2 * x.nbytes, lambda: kernelgen.gelu(x, target="c", out=out)),
        "rope": (2 * x.nbytes, lambda: kernelgen.rope(x, target="c", out=out)),
        "f32 to f16": (6 * x.size, lambda: kernelgen.cast(x, "f16", target="c", out=half_out)),
        "argmax": (x.nbytes, lambda: kernelgen.argmax(x, target="c")),
    }
    print(f"{threads()} threads, instruction set {runtime().isa.name}, {x.shape} float32")
    if (why := busy()) is not None:
        print(why)
    with ThreadPoolExecutor(threads()) as pool:
        copied = memcpy(out, x, pool)
        found = compare({"memcpy": copied, **{k: c for k, (_, c) in calls.items()}}, given.repeats)
    base = 2 * x.nbytes / found["memcpy"].median
    print(f"  {'memcpy':12} {1e3 * found['memcpy'].median:8.2f} ms {base / 1e9:7.2f} GB/s")
    for name, (nbytes, _) in calls.items():
        speed = nbytes / found[name].median
        ms, best = 1e3 * found[name].median, 1e3 * found[name].minimum
        print(
            f"  {name:12} {ms:8.2f} ms {speed / 1e9:7.2f} GB/s  {speed / base:5.2f} of memcpy"
            f"  (least {best:.2f} ms)"
        )


if __name__ == "__main__":
    main()

"""One GGUF file of square matrices in every format, multiplied on several targets.

    python bench/devices.py --targets c opencl wgsl --size 4096 --m 1 64

Prints, for each format and M, the milliseconds of the fastest call of kernelgen.matmul on each
target (arrays on the host, weights already on the device) and the largest error against the first
target's result, relative to its RMS.  The targets take turns.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

import kernelgen
from kernelgen.bench import busy, compare, sample_matrix
from kernelgen.ir import formats
from kernelgen.problem import relative_error


def main() -> int:
    """Entry point; 1 where a target's result is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--targets", nargs="+", default=["c", "opencl", "wgsl"])
    parser.add_argument("--formats", nargs="+", default=kernelgen.formats())
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--m", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--repeats", type=int, default=3, help="turns of each target")
    options = parser.parse_args()
    first, *others = options.targets
    table = Table("format", "M", *(f"{t} ms" for t in options.targets), "largest error")
    wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "square.gguf"
        made = {f: sample_matrix(formats.get(f), options.size, options.size)
                for f in options.formats}  # fmt: skip
        kernelgen.save(path, made)
        model = kernelgen.open(path)
        for name, w in model.items():
            for m in options.m:
                x = np.random.default_rng(m).standard_normal((m, options.size), np.float32)
                results = {t: kernelgen.matmul(x, w, target=t) for t in options.targets}
                errors = [relative_error(results[t], results[first]) for t in others]
                # two ways to quantize activations may differ by a step where a division is not
                # rounded alike; a wrong kernel is off by far more
                wrong += max(errors, default=0.0) > 1e-2
                times = compare(
                    {t: lambda t=t, x=x, w=w: kernelgen.matmul(x, w, target=t)
                     for t in options.targets},
                    repeats=options.repeats, burst=0.05, pause=0.05,
                )  # fmt: skip
                if (why := busy()) is not None:
                    print(f"{name}, M={m}: {why}", file=sys.stderr)
                table.add_row(
                    name, str(m), *(f"{times[t].minimum * 1e3:.2f}" for t in options.targets),
                    f"{max(errors, default=0.0):.1e}",
                )  # fmt: skip
            w.prepared.clear()
    Console(width=None if sys.stdout.isatty() else 100).print(table)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

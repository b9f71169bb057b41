"""What a warm call costs besides the kernel: kernelgen.matmul on each target, and torch's way in.

    OMP_NUM_THREADS=1 python bench/overhead.py [--targets c numpy opencl wgsl] [--turns 15]

A matrix so small that the kernel takes next to no time.  For each target: microseconds of the
target's own runtime (arrays to the device and back, launch), and of kernelgen.matmul, of which the
difference is what choosing the kernel and checking shapes costs.  Then the ways in that others
have, on the CPU's target.  Of the fastest calls: it is always the same work, to which other load
of the machine only adds.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

import kernelgen
from kernelgen import api
from kernelgen import targets as target_list
from kernelgen.bench import busy, compare

N, K = 8, 256


def bare(w: kernelgen.QuantTensor, x: np.ndarray, y: np.ndarray) -> Callable[[], object]:
    """The C function alone, with addresses that are known."""
    runtime: Any = api.runtime_of("c")
    kernel = api._runner_for("c", w, 1, "auto", None, None).kernel
    program, packed = runtime.program(kernel), runtime.prepare(kernel, w)
    given = [one.ctypes.data for one in (x, packed, y)]
    if any(a.role == "scratch" for a in kernel.arguments):
        kept = np.empty(program.sizes("scratch")(1, K), np.uint8)
        given.append(kept.ctypes.data)
        return lambda: program.function(*given, 1, N, K) or kept
    return lambda: program.function(*given, 1, N, K)


def of_targets(names: list[str], w: kernelgen.QuantTensor, x: np.ndarray, turns: int) -> Table:
    """Each target's runtime, and kernelgen.matmul over it."""
    table = Table("target", "runtime, us", "kernelgen.matmul, us", "difference, us")
    y = np.empty((1, N), np.float32)
    for name in names:
        reason = target_list.get(name).runtime().available()
        if reason is not None:
            table.add_row(name, reason, "", "")
            continue
        run = api._runner_for(name, w, 1, "auto", None, None).run
        calls: dict[str, Callable[[], object]] = {
            "runtime": lambda run=run: run(x, w, y),
            "matmul": lambda name=name: kernelgen.matmul(x, w, target=name),
        }
        if name == "c":
            calls["bare"] = bare(w, x, y)
            calls["default"] = lambda: kernelgen.matmul(x, w)
        times = {n: 1e6 * t.minimum for n, t in compare(calls, turns, pause=0.01).items()}
        for what in ("bare", "default"):
            if what in times:
                table.add_row(f"{name}, {what}", f"{times[what]:.1f}", "", "")
        added = times["matmul"] - times["runtime"]
        table.add_row(name, f"{times['runtime']:.1f}", f"{times['matmul']:.1f}", f"{added:.1f}")
    return table


def of_torch(w: kernelgen.QuantTensor, x: np.ndarray, turns: int) -> Table:
    """torch's ways in, beside its own layer of the same shape."""
    import torch

    import kernelgen.torch

    table = Table("on the CPU, from torch", "us")
    layer = kernelgen.torch.QuantLinear.from_tensor(w)
    plain = torch.nn.Linear(K, N, bias=False)
    tensor, half = torch.from_numpy(x), torch.from_numpy(x).bfloat16()
    wanting = tensor.clone().requires_grad_()
    compiled = torch.compile(layer)
    calls: dict[str, Callable[[], object]] = {
        "torch.nn.Linear": lambda: plain(tensor),
        "kernelgen.matmul, numpy": lambda: kernelgen.matmul(x, w, target="c"),
        "kernelgen.matmul, tensor": lambda: kernelgen.matmul(tensor, w),
        "QuantLinear": lambda: layer(tensor),
        "QuantLinear, bfloat16": lambda: layer(half),
        "QuantLinear, torch.compile": lambda: compiled(tensor),
    }
    with torch.no_grad():
        times = compare(calls, turns, pause=0.01)
    times |= compare({"QuantLinear, with a gradient": lambda: layer(wanting)}, turns, pause=0.01)
    for name, timing in times.items():
        table.add_row(name, f"{1e6 * timing.minimum:.1f}")
    return table


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--targets", nargs="+", default=["c", "numpy", "opencl", "wgsl"])
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--no-torch", action="store_true")
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    w = kernelgen.quantize(rng.standard_normal((N, K), np.float32), "q4_K")
    x = rng.standard_normal((1, K), np.float32)
    if (why := busy()) is not None:
        print(why, file=sys.stderr)
    console = Console(width=None if sys.stdout.isatty() else 100)
    if not options.no_torch:  # before a software Vulkan driver, which brings an LLVM of its own
        console.print(of_torch(w, x, options.turns))
    console.print(of_targets(options.targets, w, x, options.turns))


if __name__ == "__main__":
    main()

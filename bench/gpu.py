"""Checks and times every kernel of every device target that this machine has.

    python bench/gpu.py --out build/gpu          # JSON and a table; about 8 minutes on a large GPU
    python bench/gpu.py --quick                  # a few formats and shapes

For each target: verifies all kernels against numpy, measures two ceilings (bytes copied in a
second, and float32 multiply-adds of the driver's own matmul where it has one), then times every
format at several M with the weights in device memory, over enough copies of the weights that no
cache holds them from one launch to the next.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from kernelgen import targets as target_list
from kernelgen.generate import generate
from kernelgen.ir import formats as format_list
from kernelgen.ir.block import BlockFormat
from kernelgen.problem import choose_precision, op_for
from kernelgen.targets.base import Target
from kernelgen.targets.device import DeviceRuntime
from kernelgen.tensor import QuantTensor
from kernelgen.verify import sample_weights, verify

#: bytes of weights to rotate through: more than the last cache of any GPU sold so far
PAST_THE_CACHE = 512 * 2**20


def device_targets(only: list[str]) -> list[Target]:
    """Targets with a device of their own that can run here."""
    found = []
    for target in target_list.targets():
        runtime = target.runtime()
        if isinstance(runtime, DeviceRuntime) and (not only or target.name in only):
            reason = runtime.available()
            if reason is None:
                found.append(target)
            else:
                print(f"{target.name} is left out: {reason}")
    return found


def seconds(call: Callable[[], None], wait: Callable[[], None], budget: float) -> float:
    """Median seconds of a call on the device, launched in batches of growing size."""
    call()
    wait()
    begin = time.perf_counter()
    call()
    wait()
    once = max(time.perf_counter() - begin, 1e-6)
    batch = max(1, min(100, int(0.02 / once)))
    times = []
    end = time.perf_counter() + budget
    while len(times) < 3 or (time.perf_counter() < end and len(times) < 50):
        begin = time.perf_counter()
        for _ in range(batch):
            call()
        wait()
        times.append((time.perf_counter() - begin) / batch)
    return statistics.median(times)


def waiter(runtime: DeviceRuntime) -> Callable[[], None]:
    """A function that returns when all that was launched is done."""
    driver = runtime.driver()
    tiny, out = driver.upload(np.zeros(1, np.float32)), np.empty(1, np.float32)
    return lambda: driver.download(tiny, out)


def copy_bandwidth(runtime: DeviceRuntime, megabytes: int, budget: float) -> float:
    """Bytes read and written in a second by this target's own decoding of float32 rows."""
    target = target_list.get(runtime.name)
    fmt = format_list.get("f32")
    n, k = megabytes * 2**18 // 4096, 4096
    w = QuantTensor(fmt, (n, k), np.zeros((n, 4 * k), np.uint8))
    kernel = generate("dequantize", fmt, target)
    launcher, driver = runtime.launcher(kernel), runtime.driver()
    pieces = [(p, driver.empty(4 * k * (p.stop - p.start))) for p in runtime.prepare(kernel, w)]

    def call() -> None:
        for piece, y in pieces:
            launcher({"w": piece.buffer, "y": y}, {"N": piece.stop - piece.start, "K": k})

    return 2 * w.nbytes / seconds(call, waiter(runtime), budget)


def time_matmul(
    target: Target, fmt: BlockFormat, m: int, n: int, k: int, past: int, budget: float
) -> dict[str, Any]:
    """One format at one shape: seconds, bytes/s of weights, operations/s."""
    runtime = target.runtime()
    assert isinstance(runtime, DeviceRuntime)
    precision, op, driver = choose_precision("auto", fmt), op_for(m), runtime.driver()
    config = target.walk(op, fmt, precision).config.default(runtime.capabilities(), m)
    kernel = generate(op, fmt, target, config, precision)
    rows = sample_weights(fmt, 64, k)
    data = np.resize(rows, (n, fmt.row_bytes(k)))
    copies = max(1, min(64, -(-past // data.nbytes)))
    weights = [runtime.prepare(kernel, QuantTensor(fmt, (n, k), data)) for _ in range(copies)]
    launcher = runtime.launcher(kernel)
    buffers = {"x": driver.upload(np.random.default_rng(0).standard_normal((m, k), np.float32))}
    sizes = {"M": m, "N": n, "K": k}
    quantize = kernel.needs.get("quantize")
    if quantize is not None:
        buffers |= {
            "xq": driver.empty(m * k), "xd": driver.empty(4 * m * k // fmt.block),
            "xs": driver.empty(4 * m * k // fmt.group),
        }  # fmt: skip
    out = driver.empty(4 * m * n)
    turn = itertools.cycle(weights)

    def call() -> None:
        if quantize is not None:
            runtime.launcher(quantize)(buffers, sizes)
        for piece in next(turn):
            rows_here = {"N": piece.stop - piece.start}
            launcher(buffers | {"w": piece.buffer, "y": out}, sizes | rows_here)

    taken = seconds(call, waiter(runtime), budget)
    return {
        "target": target.name, "format": fmt.name, "precision": precision, "m": m, "n": n, "k": k,
        "copies": copies, "seconds": taken, "bytes_per_s": data.nbytes / taken,
        "ops_per_s": 2 * m * n * k / taken, "config": config.as_dict(),
    }  # fmt: skip


def rivals(m: int, n: int, k: int, budget: float) -> list[dict[str, Any]]:
    """torch's float16 and bfloat16 matmul (cuBLAS) at the same shape, where torch has a GPU."""
    try:
        import torch
    except ImportError:
        return []
    if not torch.cuda.is_available():
        return []
    result = []
    for dtype in (torch.float16, torch.bfloat16):
        copies = max(1, min(64, -(-PAST_THE_CACHE // (2 * n * k))))
        weights = itertools.cycle(
            [torch.randn(n, k, device="cuda", dtype=dtype) for _ in range(copies)]
        )
        x = torch.randn(m, k, device="cuda", dtype=dtype)
        taken = seconds(lambda x=x, w=weights: x @ next(w).T, torch.cuda.synchronize, budget)
        result.append(
            {
                "target": "torch", "format": str(dtype), "m": m, "n": n, "k": k,
                "seconds": taken, "bytes_per_s": 2 * n * k / taken,
                "ops_per_s": 2 * m * n * k / taken,
            }
        )  # fmt: skip
    return result


def run(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Everything, as plain data."""
    formats = [format_list.get(f) for f in options.format] or list(format_list.formats())
    report: dict[str, Any] = {
        "machine": platform.platform(), "targets": [], "verified": [], "times": []
    }  # fmt: skip
    n, k = options.shape
    for target in device_targets(options.target):
        runtime = target.runtime()
        assert isinstance(runtime, DeviceRuntime)
        results = [r.as_dict() for r in verify(target, formats)]
        bad = [r for r in results if not r["ok"]]
        console.print(f"{target.name}: {len(results) - len(bad)} of {len(results)} kernels right")
        for one in bad:
            console.print(f"  {one['op']} {one['format']} {one['precision']}: {one['problem']}")
        copy = copy_bandwidth(runtime, options.megabytes, options.budget)
        console.print(f"{target.name}: copies {copy / 1e9:.1f} GB/s (read and written)")
        report["verified"] += results
        report["targets"].append(
            {"name": target.name, "devices": runtime.describe(), "copy_bytes_per_s": copy}
        )
        for fmt, m in itertools.product(formats, options.m):
            report["times"].append(time_matmul(target, fmt, m, n, k, options.past, options.budget))
    for m in options.m:
        report["times"] += rivals(m, n, k, options.budget)
    return report


def table(report: dict[str, Any]) -> Table:
    """The times, for people."""
    result = Table(title="matmul, weights in device memory")
    for heading in ("target", "format", "M x N x K", "us", "GB/s", "TFLOP/s"):
        result.add_column(heading, justify="right" if heading[0] in "MuGT" else "left")
    for one in report["times"]:
        result.add_row(
            one["target"], one["format"], f"{one['m']} x {one['n']} x {one['k']}",
            f"{one['seconds'] * 1e6:.1f}", f"{one['bytes_per_s'] / 1e9:.1f}",
            f"{one['ops_per_s'] / 1e12:.3f}",
        )  # fmt: skip
    return result


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", action="append", default=[], help="default: all that run")
    parser.add_argument("--format", action="append", default=[], help="default: all")
    parser.add_argument("--m", type=int, nargs="+", default=[1, 8, 64, 512, 4096])
    parser.add_argument("--shape", type=int, nargs=2, default=[4096, 14336], metavar=("N", "K"))
    parser.add_argument("--budget", type=float, default=0.2, help="seconds for each figure")
    parser.add_argument("--megabytes", type=int, default=256, help="size of the copy")
    parser.add_argument("--past", type=int, default=PAST_THE_CACHE, help="bytes to rotate through")
    parser.add_argument("--quick", action="store_true", help="small shapes, two formats")
    parser.add_argument("--out", type=Path, default=Path("build/gpu"))
    options = parser.parse_args()
    if options.quick:
        options.format = options.format or ["q4_K", "q8_0"]
        options.m, options.shape = [1, 16], [512, 1024]
        options.budget, options.megabytes, options.past = 0.02, 8, 2**20
    console = Console(width=None if sys.stdout.isatty() else 110)
    report = run(options, console)
    console.print(table(report))
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "gpu.json"
    path.write_text(json.dumps(report, indent=1))
    console.print(f"wrote {path}")
    return 0 if report["targets"] and all(r["ok"] for r in report["verified"]) else 1


if __name__ == "__main__":
    sys.exit(main())

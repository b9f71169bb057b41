"""The main job on a real file: what `make demo` runs.

Writes a GGUF model of several formats and shapes, builds the kernels that it needs, verifies
them against the numpy reference, multiplies with every tensor, and prints how wrong and how fast.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from kernelgen import api, files, gguf_files
from kernelgen import targets as target_list
from kernelgen.bench import compare
from kernelgen.errors import KernelgenError
from kernelgen.tensor import QuantTensor
from kernelgen.verify import verify

#: name, format, (N, K): the layers of a small decoder, each in a format of its own
TENSORS = (
    ("token_embd.weight", "q6_K", (2048, 2048)),
    ("blk.0.attn_q.weight", "q4_K", (2048, 2048)),
    ("blk.0.attn_k.weight", "q5_0", (512, 2048)),
    ("blk.0.attn_v.weight", "q8_0", (512, 2048)),
    ("blk.0.attn_output.weight", "iq4_nl", (2048, 2048)),
    ("blk.0.ffn_gate.weight", "q4_0", (5632, 2048)),
    ("blk.0.ffn_up.weight", "mxfp4", (5632, 2048)),
    ("blk.0.ffn_down.weight", "q3_K", (2048, 5632)),
    ("blk.1.ffn_down.weight", "q2_K", (2048, 5632)),
    ("output.weight", "f16", (2048, 2048)),
)


def write_model(path: Path, console: Console) -> dict[str, np.ndarray]:
    """Quantize random weights into a GGUF file; returns the exact weights by name."""
    rng = np.random.default_rng(0)
    exact = {name: rng.standard_normal(shape, np.float32) for name, _, shape in TENSORS}
    tensors = {
        name: api.quantize(exact[name], fmt)
        for name, fmt, _ in track(TENSORS, "quantizing", console=console, transient=True)
    }
    gguf_files.save(path, tensors, {"general.name": "kernelgen demo"})
    return exact


def multiply(name: str, w: QuantTensor, exact: np.ndarray, m: int) -> tuple[str, ...]:
    """One line of the table: times and errors of x @ w.T for M rows of activations."""
    x = np.random.default_rng(m).standard_normal((m, w.shape[1]), np.float32)
    y = api.matmul(x, w)
    true = x.astype(np.float64) @ exact.astype(np.float64).T
    error = float(np.sqrt(np.mean((y - true) ** 2) / np.mean(true**2)))
    times = compare(
        {
            "fused": lambda: api.matmul(x, w),
            "plain": lambda: x @ api.dequantize(w).T,
        },
        repeats=3,
        pause=0.05,
    )
    fused, plain = times["fused"].median, times["plain"].median
    shape = f"{m} x {w.shape[0]} x {w.shape[1]}"
    return (
        name, w.format.name, shape, f"{error:.4f}", f"{fused * 1e3:.2f}", f"{plain * 1e3:.1f}",
        f"{plain / fused:.0f}x",
    )  # fmt: skip


def run(folder: Path, console: Console) -> int:
    """The whole demo; the number of kernels that failed."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "demo.gguf"
    started = time.perf_counter()
    exact = write_model(path, console)
    model = api.open(path)
    console.print(
        f"1. wrote {path}: {len(model)} tensors, {path.stat().st_size / 1e6:.1f} MB,"
        f" quantized in {time.perf_counter() - started:.1f} s"
    )

    used = {w.format.name: w.format for w in model.values()}
    target = target_list.get(api.default_target())
    started = time.perf_counter()
    made = files.build(target, folder / "kernels", used.values())
    console.print(
        f"2. built {len(made)} changed files of the {len(used)} formats that the model uses into"
        f" {folder / 'kernels' / target.name} in {time.perf_counter() - started:.2f} s"
    )

    started = time.perf_counter()
    results = list(track(
        verify(target, used.values()), "compiling and verifying", console=console, transient=True,
    ))  # fmt: skip
    failed = [r for r in results if not r.ok]
    device = "; ".join(str(d.get("device", "")) for d in target.runtime().describe())
    console.print(
        f"3. verified {len(results)} kernels on target {target.name} ({device}) against numpy in"
        f" {time.perf_counter() - started:.1f} s: {len(results) - len(failed)} passed,"
        f" {len(failed)} failed"
    )
    for result in failed:
        console.print(f"   {result.op} {result.format} {result.precision}: {result.problem}")

    table = Table(
        title="4. y = x @ w.T, fused dequantize + matmul beside dequantize by kernel, then numpy"
    )
    for heading in ("tensor", "format", "M x N x K", "error *", "fused ms", "numpy ms", "ratio"):
        table.add_column(heading, justify="left" if heading in ("tensor", "format") else "right")
    for m in (1, 32):
        for name, w in model.items():
            table.add_row(*multiply(name, w, exact[name], m))
    console.print(table)
    console.print("* RMS error against float64 with the weights before they were quantized")
    return len(failed)


def main() -> int:
    """Entry point of `python -m kernelgen.demo`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path("build/demo"), help="where files go")
    console = Console(width=None if sys.stdout.isatty() else 110)
    try:
        return 1 if run(parser.parse_args().folder, console) else 0
    except KernelgenError as error:
        console.print(f"error: {error}", style="red")
        return 1


if __name__ == "__main__":
    sys.exit(main())

"""A transformer block in PyTorch with quantized layers, against float32 and bfloat16.

    OMP_NUM_THREADS=2 python bench/torch_layers.py [--dims 2048 4096] [--rows 1 16 128]

The linear layers of one block of a language model (q, k, v, out, gate, up, down; hidden size
8/3 of the width, in 256s), called one after the other as a decode step does (M=1) or a prompt, and
the whole block with norms and attention over a cache of 512 positions.  torch with as many threads
as kernelgen; medians of interleaved turns, in milliseconds: of the time that passes, or, with
--cpu, of the processor's, which other work on the machine disturbs less, and which means the work
of one thread only where OMP_NUM_THREADS=1.
"""

from __future__ import annotations

import argparse
import copy
import functools
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import kernelgen.torch
from kernelgen.bench import busy, compare, sample_matrix
from kernelgen.ir import formats
from kernelgen.targets.c.runtime import threads

F = torch.nn.functional
HEAD_DIM, CACHED, MOST = 128, 512, 512


class Block(torch.nn.Module):
    """A block as in Llama; its cache is random."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        hidden = -(-(dim * 8 // 3) // 256) * 256
        self.heads = dim // HEAD_DIM
        self.norm1, self.norm2 = torch.nn.RMSNorm(dim), torch.nn.RMSNorm(dim)
        for name in ("q", "k", "v", "out"):
            setattr(self, name, torch.nn.Linear(dim, dim, bias=False))
        self.gate, self.up = (torch.nn.Linear(dim, hidden, bias=False) for _ in range(2))
        self.down = torch.nn.Linear(hidden, dim, bias=False)
        self.register_buffer("cache", torch.randn(2, 1, self.heads, CACHED + MOST, HEAD_DIM))

    def linears(self, x: Any) -> Any:
        """The layers alone, one after the other."""
        y = self.out(self.q(x) + self.k(x) + self.v(x))
        return self.down(self.gate(y) * self.up(y))

    def forward(self, x: Any) -> Any:
        """x (1, M, dim), M up to `MOST`, at the end of the cache."""
        y = self.norm1(x)
        q, k, v = (f(y).view(1, -1, self.heads, HEAD_DIM).transpose(1, 2)
                   for f in (self.q, self.k, self.v))  # fmt: skip
        stop = CACHED + x.shape[1]
        self.cache[0, :, :, CACHED:stop], self.cache[1, :, :, CACHED:stop] = k, v
        k, v = self.cache[0, :, :, :stop], self.cache[1, :, :, :stop]
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
        x = x + self.out(y)
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


def medians(calls: dict[str, Callable[[], Any]], turns: int, cpu: bool) -> dict[str, float]:
    """Milliseconds of each."""
    if not cpu:
        return {n: 1e3 * t.median for n, t in compare(calls, turns, burst=0.1).items()}
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(turns + 1):
        for name, call in calls.items() if turn % 2 else reversed(calls.items()):
            call()
            for _ in range(3):
                begin = time.process_time()
                call()
                samples[name].append(time.process_time() - begin)
    return {name: 1e3 * statistics.median(found[3:]) for name, found in samples.items()}


def rows_of(
    dim: int, rows: list[int], fmt: str, turns: int, table: Table, cpu: bool = False
) -> None:
    """Times of one width."""
    torch.manual_seed(0)
    plain = Block(dim).eval().requires_grad_(False)
    half = copy.deepcopy(plain).bfloat16()
    quantized = copy.deepcopy(plain)
    for name, layer in list(quantized.named_children()):
        if isinstance(layer, torch.nn.Linear):  # what the weights are changes no time
            w = sample_matrix(formats.get(fmt), layer.out_features, layer.in_features)
            setattr(quantized, name, kernelgen.torch.QuantLinear.from_tensor(w))
    blocks = {"float32": plain, "bfloat16": half, fmt: quantized}
    for m in rows:
        x = torch.randn(1, m, dim)
        for what in ("linears", "forward"):
            calls = {
                name: functools.partial(getattr(block, what), x.to(block.norm1.weight.dtype))
                for name, block in blocks.items()
            }
            with torch.no_grad():
                times = medians(calls, turns, cpu)
            ours = times.pop(fmt)
            table.add_row(
                str(dim), str(m), "linear layers" if what == "linears" else "whole block",
                f"{ours:.2f}", *(f"{t:.2f} ({t / ours:.1f}x)" for t in times.values()),
            )  # fmt: skip


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dims", type=int, nargs="+", default=[2048, 4096])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 128])
    parser.add_argument("--format", default="q4_K")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--cpu", action="store_true", help="the processor's time")
    options = parser.parse_args()
    torch.set_num_threads(threads())
    if (why := busy()) is not None:
        print(why, file=sys.stderr)
    table = Table("dim", "M", "what", f"{options.format} ms", "float32 ms", "bfloat16 ms")
    for dim in options.dims:
        rows_of(dim, options.rows, options.format, options.turns, table, options.cpu)
    Console(width=None if sys.stdout.isatty() else 120).print(table)


if __name__ == "__main__":
    main()

"""Attention on this machine's CPU against torch's scaled_dot_product_attention, and llama.cpp's.

    OMP_NUM_THREADS=2 python -m bench.attention [--repeats 15] [--llama DIR] [--only prefill,...]

One batch, 32 heads that share 8 of K and V, 128 elements.  Medians of interleaved repeats, in
milliseconds, of the time that passed and of CPU time of all threads together; torch in each dtype
and in each way that its call can be written, of which its best counts; with --llama also
flash_attn_ext of ggml's CPU backend, from a build of llama.cpp, on the same K and V as they are.
With one thread, CPU time hardly depends on what else the machine does.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.ggml import Ggml
from bench.ggml_attention import flash_attention
from kernelgen import targets
from kernelgen.bench import busy, compare
from kernelgen.generate import generate_walk
from kernelgen.ir import formats
from kernelgen.ir.ops.attention import Attention, Mask, attention, causal, trace, window
from kernelgen.problem import relative_error
from kernelgen.targets.c.runtime import runtime, threads
from kernelgen.tensor import QuantTensor, quantize

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
Calls = dict[str, Callable[[], Any]]


def ours(t: int, k: QuantTensor, v: QuantTensor, q: np.ndarray, mask: Mask | None = None) -> Calls:
    """A call of each walk of the C target for these."""
    _, admitted = trace(None, mask)
    kind = Attention(HEAD_DIM, k.format, v.format, mask=admitted)
    target, reach = targets.get("c"), runtime()
    calls: Calls = {}
    for walk in target.walks:
        if walk.op != "attention" or reach.capabilities().lacks(walk.features):
            continue
        config = walk.default(kind, reach.capabilities(), t)
        run = reach.attention(generate_walk(walk, kind, target, config))
        y = np.empty(q.shape, np.float32)
        name = " ".join(filter(None, ("kernelgen", k.format.name, walk.precision, walk.style)))
        calls[name] = lambda run=run, y=y: run(q, k, v, {}, y)
    return calls


def theirs(q: np.ndarray, k: np.ndarray, v: np.ndarray, is_causal: bool) -> Calls:
    """torch's call: with shared heads, with heads repeated before, and, for one query, with the
    heads of a group as queries."""
    attend = torch.nn.functional.scaled_dot_product_attention
    group = HEADS // KV_HEADS
    calls: Calls = {}
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        tq, tk, tv = (torch.from_numpy(x).to(dtype) for x in (q, k, v))
        calls[f"torch {name} shared"] = lambda a=(tq, tk, tv): attend(
            *a, is_causal=is_causal, enable_gqa=True
        )
        repeated = (tq, *(x.repeat_interleave(group, 1) for x in (tk, tv)))
        calls[f"torch {name} repeated"] = lambda a=repeated: attend(*a, is_causal=is_causal)
        if q.shape[2] == 1:
            grouped = (tq.reshape(1, KV_HEADS, group, HEAD_DIM), tk, tv)
            calls[f"torch {name} grouped"] = lambda a=grouped: attend(*a)
    return calls


def llama(
    folder: Path | None, q: np.ndarray, k: QuantTensor, v: QuantTensor, is_causal: bool
) -> Calls:
    """A call of llama.cpp's, which must compute the same; none where it is not given."""
    if folder is None:
        return {}
    library = Ggml(folder, threads())
    graph = flash_attention(library, q, k, v, is_causal)
    graph.run()
    b, h, t, d = q.shape
    y = graph.result().reshape(b, t, h, d).swapaxes(1, 2)
    _, admitted = trace(None, causal if is_causal else None)
    kind = Attention(HEAD_DIM, k.format, v.format, mask=admitted)
    ends = [0, -1]  # heads that are compared
    want = attention(kind, q[:, ends], *(x.dequantize()[:, ends] for x in (k, v)))
    error = relative_error(y[:, ends], want)
    # its queries are rounded as K is, to float16 or to integers of eight bits
    assert error < 0.1, f"llama.cpp computes something else: error {error:.2g}"
    print(f"  llama.cpp is off by {error:.1e} of the RMS")
    # by the graph itself, which so is kept
    return {f"{library.name} {k.format.name}": lambda: graph.run()}


def data(t: int, s: int, fmt: str) -> tuple[np.ndarray, QuantTensor, QuantTensor]:
    """q, k, v."""
    rng = np.random.default_rng(0)
    q = rng.standard_normal((1, HEADS, t, HEAD_DIM), np.float32)
    k, v = (
        quantize(rng.standard_normal((1, KV_HEADS, s, HEAD_DIM), np.float32), formats.get(fmt))
        for _ in "kv"
    )
    return q, k, v


@dataclass(frozen=True)
class Median:
    """Milliseconds that passed, and of CPU time."""

    passed: float
    cpu: float


def measure(calls: Calls, repeats: int) -> dict[str, Median]:
    """Medians, which are printed."""
    cpu: dict[str, list[float]] = {name: [] for name in calls}

    def clocked(name: str) -> Callable[[], Any]:
        def call() -> None:
            before = time.process_time()
            calls[name]()
            cpu[name].append(time.process_time() - before)

        return call

    found = {}
    for name, timing in compare({name: clocked(name) for name in calls}, repeats).items():
        one = Median(1e3 * timing.median, 1e3 * statistics.median(cpu[name]))
        print(
            f"  {name:34} {one.passed:9.2f}  (least {1e3 * timing.minimum:.2f}) cpu {one.cpu:9.2f}"
        )
        found[name] = one
    return found


def ratio(a: Median, b: Median) -> str:
    """How many times as long the first takes."""
    return f"{a.passed / b.passed:.2f} (cpu {a.cpu / b.cpu:.2f})"


def against(mine: Calls, rival: Calls, repeats: int) -> None:
    """Both, and how many times as long torch's dtypes, each at its best, and llama.cpp take."""
    found = measure(mine | rival, repeats)
    rivals = {f"torch's {dtype}": f"torch {dtype}" for dtype in ("float32", "bfloat16")}
    rivals |= {name: name for name in rival if not name.startswith("torch")}
    for name, (rival_name, prefix) in itertools.product(mine, rivals.items()):
        times = [one for key, one in found.items() if key.startswith(prefix)]
        best = Median(min(x.passed for x in times), min(x.cpu for x in times))
        print(f"  {name}: {rival_name} takes {ratio(best, found[name])} times as long")


def prefill(repeats: int, folder: Path | None) -> None:
    """1024 queries and as many keys."""
    print("prefill, 1024 queries, causal, f16")
    q, k, v = data(1024, 1024, "f16")
    rival = theirs(q, k.dequantize(), v.dequantize(), True) | llama(folder, q, k, v, True)
    against(ours(1024, k, v, q, causal), rival, repeats)


def skipping(repeats: int, folder: Path | None) -> None:
    """What a causal mask saves."""
    print("1024 queries, causal and full")
    q, k, v = data(1024, 1024, "f16")
    mine = ours(1024, k, v, q, causal)
    whole = {f"{name} full": call for name, call in ours(1024, k, v, q).items()}
    found = measure(mine | whole, repeats)
    for name in mine:
        print(f"  {name}: causal takes {ratio(found[name], found[name + ' full'])} of full")


def decode(repeats: int, folder: Path | None) -> None:
    """One query and 8192 keys."""
    for fmt in ("q8_0", "q4_0", "f16"):
        print(f"decode, 8192 keys, {fmt}")
        q, k, v = data(1, 8192, fmt)
        rival = theirs(q, k.dequantize(), v.dequantize(), False) | llama(folder, q, k, v, False)
        against(ours(1, k, v, q), rival, repeats)


def windows(repeats: int, folder: Path | None) -> None:
    """What a window saves where there are many keys."""
    print("8192 queries, window of 256 and full")
    q, k, v = data(8192, 8192, "f16")
    near = {f"{name} window": call for name, call in ours(8192, k, v, q, window(256)).items()}
    found = measure(near | ours(8192, k, v, q), max(1, repeats // 5))
    for name in near:
        whole_of = found[name.removesuffix(" window")]
        print(f"  {name}: {ratio(found[name], whole_of)} of full")


COMPARISONS = {"prefill": prefill, "skipping": skipping, "decode": decode, "windows": windows}


def main() -> None:
    """All comparisons, or some."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--llama", type=Path, metavar="DIR", help="a build of llama.cpp")
    parser.add_argument("--only", default=",".join(COMPARISONS), help="comparisons, by commas")
    given = parser.parse_args()
    wanted = given.only.split(",")
    if unknown := set(wanted) - set(COMPARISONS):
        parser.error(f"--only {', '.join(unknown)}: there are {', '.join(COMPARISONS)}")
    torch.set_num_threads(threads())
    print(f"{threads()} threads, instruction set {runtime().isa.name}")
    if (why := busy()) is not None:
        print(why)
    if given.llama is None:
        print("llama.cpp is left out: --llama DIR names a build of it")
    with torch.no_grad():
        for name in wanted:
            COMPARISONS[name](given.repeats, given.llama)


if __name__ == "__main__":
    main()

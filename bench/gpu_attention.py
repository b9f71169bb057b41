"""Attention in bench/gpu.py: against numpy, and against torch's scaled_dot_product_attention.

A case is prefill (as many queries as keys) or decoding (one query, many keys), of heads as models
of eight billion parameters have them.  Prefill is measured in operations in a second, of which a
causal mask leaves about half; decoding in bytes of K and V, which are rotated past the caches.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from gpu_timing import Timer, timer_of

from kernelgen import verify_attention
from kernelgen.errors import KernelgenError
from kernelgen.generate import generate_walk
from kernelgen.ir import formats as format_list
from kernelgen.ir.block import BlockFormat
from kernelgen.ir.ops import attention as ops
from kernelgen.ir.ops.attention import Attention
from kernelgen.problem import relative_error, rounded, tolerance
from kernelgen.targets.base import Kernel
from kernelgen.targets.device import DeviceRuntime
from kernelgen.tensor import QuantTensor, quantize

if TYPE_CHECKING:
    from gpu_phases import Context

Row = dict[str, Any]
Call = Callable[[], None]

#: formats of K and V
CACHES = ("f16", "q8_0", "q4_0")

#: most copies of K and V that are rotated through
_MOST_COPIES = 32

#: rows of K and V that are different from one another; more would only cost time to make
_DISTINCT = 512

#: turns that all who are compared take
_ROUNDS = 3


@dataclass(frozen=True)
class Case:
    """What is measured: `queries` of each of `heads`, which share `kv_heads`, and `keys`."""

    name: str
    queries: int
    keys: int
    causal: bool
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128

    @property
    def operations(self) -> int:
        """Multiplications and additions."""
        pairs = self.queries * self.keys
        if self.causal:
            pairs -= self.queries * (self.queries - 1) // 2
        return 4 * self.heads * pairs * self.head_dim

    def nbytes(self, row_bytes: int) -> int:
        """Bytes of K and V."""
        return 2 * self.kv_heads * self.keys * row_bytes


def cases(context: Context) -> tuple[Case, ...]:
    """The cases, with as many keys as the square products of this run have rows."""
    side = context.side
    return (
        Case("prefill, causal", side, side, True),
        Case("decoding", 1, 4 * side, False),
        Case("prefill", side, side, False),
        Case("prefill, causal, 64", side, side, True, head_dim=64),
        Case("8 queries", 8, 4 * side, True),
    )


# ---- right ------------------------------------------------------------------------------------


def check_attention(context: Context) -> Iterator[Row]:
    """Every walk in every kind of score and mask, in its default configurations."""
    small = context.side < 1024
    for fmt in (f for f in context.formats if f.name in CACHES):
        for head_dim in (64,) if small else (128, 64, 256, 80):
            found = verify_attention.verify(
                context.target, [fmt], runtime=context.runtime(), head_dims=[head_dim],
                queries=(1, 40) if small else (),
            )  # fmt: skip
            for result in found:
                yield result.as_dict()
                if context.over:
                    return


# ---- fast -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Contestant:
    """Someone who is timed: launches that do the same, and what the row about it says."""

    about: Row
    timer: Timer
    calls: Sequence[Call]
    problem: str | None = None


@functools.lru_cache(maxsize=2)
def queries_of(case: Case) -> np.ndarray:
    """Q (1, H, T, D)."""
    shape = (1, case.heads, case.queries, case.head_dim)
    return np.random.default_rng(0).standard_normal(shape, np.float32)


@functools.lru_cache(maxsize=4)
def cache_of(case: Case, fmt: BlockFormat, seed: int) -> QuantTensor:
    """K or V (1, HK, S, D): rows that repeat, in an order that is different for each head."""
    rng = np.random.default_rng(seed)
    rows = quantize(rng.standard_normal((_DISTINCT, case.head_dim), np.float32), fmt)
    order = rng.integers(0, _DISTINCT, (1, case.kv_heads, case.keys))
    return QuantTensor(fmt, (*order.shape, case.head_dim), np.asarray(rows.data)[order])


def kernels_of(context: Context, runtime: DeviceRuntime, case: Case, fmt: BlockFormat) -> Any:
    """Kernels that serve a case; in float32 only for few queries, as it takes long for many."""
    _, mask = ops.trace(None, ops.causal if case.causal else None)
    kind = Attention(case.head_dim, fmt, fmt, mask=mask)
    caps = runtime.capabilities()
    for walk in context.target.walks:
        if walk.op != "attention" or walk.accepts(kind) is not None:
            continue
        config = walk.default(kind, caps, case.queries)
        slow = walk.precision == "fp32" and case.queries > 8
        if not slow and walk.refuses(config, kind, caps) is None:
            yield generate_walk(walk, kind, context.target, config)


def mine(context: Context, runtime: DeviceRuntime, case: Case, kernel: Kernel) -> Contestant:
    """A kernel, with what adds up its parts, over copies of K and V, and whether it is right."""
    driver, launcher, fmt = runtime.driver(), runtime.launcher(kernel), kernel.subject.k
    k, v = (cache_of(case, fmt, seed) for seed in (1, 2))
    config = kernel.config.as_dict()
    sizes = {
        "B": 1, "H": case.heads, "HK": case.kv_heads, "T": case.queries, "S": case.keys,
        "B0": 0, "H0": 0, "SPLITS": config["splits"],
    }  # fmt: skip
    buffers = {"q": driver.upload(queries_of(case)), **launcher.results(sizes)}
    buffers |= launcher.results(sizes, ("scratch",)) if kernel.then else {}
    combine = kernel.then.get("attention_combine")
    add_up = runtime.launcher(combine).bound(buffers, sizes) if combine else None
    nbytes = case.nbytes(fmt.row_bytes(case.head_dim))
    copies = 1 if case.queries > 8 else max(1, min(_MOST_COPIES, -(-context.past // nbytes)))

    def launch(attend: Call) -> Call:
        def both() -> None:
            attend()
            if add_up:
                add_up()

        return both

    calls = []
    for _ in range(copies):
        held = {"k": driver.upload(k.data), "v": driver.upload(v.data)}
        calls.append(launch(launcher.bound({**buffers, **held}, sizes)))
    calls[0]()
    y = np.empty((1, case.heads, case.queries, case.head_dim), np.float32)
    driver.download(buffers["y"], y)
    about = {
        "target": context.target.name, "format": fmt.name, "walk": kernel.walk.name,
        "precision": kernel.precision, "config": config, "error": wrong(case, k, v, y, kernel),
    }  # fmt: skip
    return Contestant(about, timer_of(runtime), calls, _problem(about))


def wrong(case: Case, k: QuantTensor, v: QuantTensor, y: np.ndarray, kernel: Kernel) -> float:
    """The error of some queries of some heads, against numpy."""
    worst, group = 0.0, case.heads // case.kv_heads
    plain = dataclasses.replace(kernel.subject, mask=None)
    for head in (0, case.heads - 1):
        keys, values = (
            rounded(QuantTensor(w.format, (case.keys, case.head_dim), w.data[0, head // group])
                    .dequantize(), kernel.precision)[None, None]
            for w in (k, v)
        )  # fmt: skip
        for t in {0, case.queries // 2, case.queries - 1}:
            seen = case.keys - case.queries + t + 1 if case.causal else case.keys
            q = rounded(queries_of(case)[:, head, t][:, None, None], kernel.precision)
            want = ops.attention(plain, q, keys[:, :, :seen], values[:, :, :seen])
            worst = max(worst, relative_error(y[0, head, t], want[0, 0, 0]))
    return worst


def _problem(about: Row) -> str | None:
    bound = tolerance("attention", about["precision"])
    return None if about["error"] <= bound else f"error {about['error']:.3g} exceeds {bound:.3g}"


# ---- rivals -----------------------------------------------------------------------------------


def torch_here() -> Any:
    """torch, if it has CUDA, or None."""
    with contextlib.suppress(ImportError):
        import torch

        if torch.cuda.is_available():
            return torch
    return None


#: torch's ways to compute it, and their names in `SDPBackend`
BACKENDS = {
    "flash": "FLASH_ATTENTION", "efficient": "EFFICIENT_ATTENTION", "cudnn": "CUDNN_ATTENTION",
    "math": "MATH",
}  # fmt: skip


def theirs(torch: Any, case: Case, past: int) -> Iterator[Contestant | Row]:
    """Each of torch's backends, in half precision, with heads shared as it can share them; for one
    query also with the heads of a group as queries."""
    from gpu_timing import TorchTimer

    attend, group = (
        torch.nn.functional.scaled_dot_product_attention, case.heads // case.kv_heads,
    )  # fmt: skip
    nbytes = case.nbytes(2 * case.head_dim)
    copies = 1 if case.queries > 8 else max(1, min(_MOST_COPIES, -(-past // nbytes)))

    def random(heads: int, length: int) -> Any:
        return torch.randn(1, heads, length, case.head_dim, dtype=torch.float16, device="cuda")

    q = random(case.heads, case.queries)
    caches = [tuple(random(case.kv_heads, case.keys) for _ in "kv") for _ in range(copies)]
    # a mask of torch's has its first query at the first key
    is_causal = case.causal and case.queries == case.keys
    ways: dict[str, Callable[[Any, Any], Any]] = {
        "shared": lambda k, v: attend(q, k, v, is_causal=is_causal, enable_gqa=True)
    }
    if case.queries == 1:
        grouped = q.reshape(1, case.kv_heads, group, case.head_dim)
        ways["grouped"] = lambda k, v: attend(grouped, k, v)
    else:
        ways["repeated"] = lambda k, v: attend(
            q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1), is_causal=is_causal
        )
    for (name, backend), (way, call) in (
        (one, other) for one in BACKENDS.items() for other in ways.items()
    ):
        about = {"target": "torch", "format": "float16", "walk": f"{name} {way}",
                 "precision": "fp16"}  # fmt: skip
        try:
            yield Contestant(about, TorchTimer(torch), [
                _within(torch, backend, functools.partial(call, k, v)) for k, v in caches
            ])  # fmt: skip
        except Exception as error:  # whatever it raises where it lacks something
            yield about | {"why_not": " ".join(str(error).split())[:200]}


def _within(torch: Any, backend: str, call: Callable[[], Any]) -> Call:
    """A call that one backend alone may serve, tried once."""
    module = torch.nn.attention

    def run() -> None:
        with module.sdpa_kernel(getattr(module.SDPBackend, backend)):
            call()

    run()
    return run


# ---- times ------------------------------------------------------------------------------------


def interleaved(
    contestants: Sequence[Contestant], budget: float
) -> Iterator[tuple[Contestant, float]]:
    """Median seconds of each, who take turns."""
    samples: list[list[float]] = [[] for _ in contestants]
    for _ in range(_ROUNDS):
        for one, mine in zip(contestants, samples, strict=True):
            mine.append(one.timer.seconds(one.calls, budget / _ROUNDS))
    for one, mine in zip(contestants, samples, strict=True):
        yield one, statistics.median(mine)


def times_attention(context: Context) -> Iterator[Row]:
    """Every walk that serves a case, and torch's backends, in turns."""
    runtime, torch = context.runtime(), torch_here()
    if torch is None:
        yield {"what": "torch's attention", "why_not": "torch with CUDA cannot be imported"}
    for case in cases(context):
        if context.over:
            return
        found: list[Contestant] = []
        for name in CACHES:
            fmt = format_list.get(name)
            for kernel in kernels_of(context, runtime, case, fmt):
                if context.over:
                    return
                about = {"case": case.name, "format": name, "walk": kernel.walk.name}
                try:
                    found.append(mine(context, runtime, case, kernel))
                except KernelgenError as error:
                    yield about | {"problem": str(error)}
        for one in theirs(torch, case, context.past) if torch else ():
            if isinstance(one, Contestant):
                found.append(one)
            else:
                yield {"case": case.name, **one}
        for one, taken in interleaved(found, context.budget):
            name = one.about["format"]
            fmt = format_list.get("f16" if one.about["target"] == "torch" else name)
            row = {
                "case": case.name, **one.about, "queries": case.queries, "keys": case.keys,
                "seconds": taken, "ops_per_s": case.operations / taken,
                "bytes_per_s": case.nbytes(fmt.row_bytes(case.head_dim)) / taken,
            }  # fmt: skip
            yield row if one.problem is None else row | {"problem": one.problem}

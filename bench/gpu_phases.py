"""What bench/gpu.py does, phase by phase: each yields rows of plain data as it goes."""

from __future__ import annotations

import contextlib
import functools
import itertools
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gpu_attention import check_attention, times_attention
from gpu_timing import Timer, launches, timer_of

from kernelgen import targets as target_list
from kernelgen.errors import KernelgenError
from kernelgen.generate import generate_walk
from kernelgen.ir import formats as format_list
from kernelgen.ir.block import BlockFormat
from kernelgen.ir.layout import named_layout
from kernelgen.problem import op_for
from kernelgen.targets.base import Kernel, Target
from kernelgen.targets.device import DeviceRuntime
from kernelgen.targets.driver import Launcher
from kernelgen.verify import OPS, random_blocks, verify

Row = dict[str, Any]

#: most copies of the weights that are rotated through
_MOST_COPIES = 64

#: rows of weights that are different from one another; more would only cost time to make
_DISTINCT = 64


@dataclass(frozen=True)
class Context:
    """What a phase is told.

    formats    to work on, the most important first
    rows       numbers of rows of activations (M), likewise; `n`, `k`: of the weights
    budget     seconds for each figure
    past       bytes of weights to rotate through, more than any cache holds
    megabytes  of the copy that measures bandwidth
    side       of the square product that measures the rate of multiplications
    end        when to begin nothing more, a time of time.perf_counter()
    out        folder for files
    """

    target: Target
    formats: tuple[BlockFormat, ...]
    rows: tuple[int, ...]
    n: int
    k: int
    budget: float
    past: int
    megabytes: int
    side: int
    end: float
    out: Path

    @property
    def over(self) -> bool:
        """Whether time is up."""
        return time.perf_counter() > self.end

    def runtime(self) -> DeviceRuntime:
        """The target's runtime, which must be able to run."""
        found = self.target.runtime()
        reason = found.available()
        if reason is not None:
            raise KernelgenError(f"{self.target.name} cannot run here: {reason}")
        assert isinstance(found, DeviceRuntime)
        return found


# ---- right ------------------------------------------------------------------------------------


def about(context: Context) -> Iterator[Row]:
    """The devices of each target, or why there are none; versions."""
    for target in target_list.targets():
        runtime = target.runtime()
        if isinstance(runtime, DeviceRuntime):
            reason = runtime.available()
            # an interpreter's times say nothing
            how = runtime.how() if reason is None else None
            devices = [] if reason else runtime.describe()
            yield {"target": target.name, "why_not": reason, "how": how, "devices": devices}
    for name in ("cupy", "torch", "triton", "numpy"):
        with contextlib.suppress(ImportError):
            yield {"module": name, "version": __import__(name).__version__}


def check(context: Context) -> Iterator[Row]:
    """Every kernel, each in its default configuration, against numpy."""
    for fmt in context.formats:
        # one walk after the other, so that each result is kept
        for op in OPS:
            if context.over:
                return
            for result in verify(context.target, [fmt], [op], runtime=context.runtime()):
                yield result.as_dict()


def sample(context: Context) -> Iterator[Row]:
    """Few kernels on small shapes: what runs under a memory checker."""
    runtime = context.runtime()
    from kernelgen.verify import check as error_of

    for fmt, one in itertools.product(context.formats, context.target.walks):
        if context.over:
            return
        if one.op not in ("matvec", "matmul") or one.accepts(fmt):
            continue
        m = 3 if one.op == "matvec" else 9
        config = one.default(fmt, runtime.capabilities(), m)
        if one.refuses(config, fmt, runtime.capabilities()) is None:
            kernel = generate_walk(one, fmt, context.target, config)
            error = error_of(kernel, runtime, m, 37, 3 * fmt.block)
            yield {"kernel": kernel.name, "error": error}


# ---- fast -------------------------------------------------------------------------------------


def copy_calls(context: Context) -> list[Callable[[], None]]:
    """Copies of device memory by the target's own decoding of float32 rows, a plain kernel."""
    runtime, fmt = context.runtime(), format_list.get("f32")
    driver, k = runtime.driver(), 4096
    n = max(1, context.megabytes * 2**20 // (4 * k))
    caps = runtime.capabilities()
    one = next(w for w in context.target.walks if w.op == "dequantize" and w.accepts(fmt) is None)
    launcher = runtime.launcher(generate_walk(one, fmt, context.target, one.default(fmt, caps)))
    source, to = driver.upload(np.zeros(n * k, np.float32)), driver.empty(4 * n * k)
    sizes = {"START": 0, "ROWS": n, "N": n, "K": k}
    return [launcher.bound({"w": source, "y": to}, sizes)]


def ceilings(context: Context) -> Iterator[Row]:
    """What the device can do: bytes copied in a second, and multiplications by cuBLAS."""
    timer = timer_of(context.runtime())
    taken = timer.seconds(copy_calls(context), context.budget)
    nbytes = max(1, context.megabytes * 2**20 // 16384) * 16384
    yield {"what": "copy by a kernel", "seconds": taken, "bytes_per_s": 2 * nbytes / taken}
    api = library()
    if api is None:
        yield {"what": "cuBLAS", "why_not": "neither torch with CUDA nor cupy can be imported"}
        return
    taken = api.timer.seconds([api.copy(context.megabytes * 2**20)], context.budget)
    yield {
        "what": f"copy by {api.name}", "seconds": taken,
        "bytes_per_s": 2 * context.megabytes * 2**20 / taken,
    }  # fmt: skip
    side = context.side
    for dtype in api.dtypes:
        try:
            taken = api.timer.seconds(api.products(side, side, side, dtype, 1), context.budget)
        except Exception as error:  # whatever a library raises where it lacks something
            yield {"what": f"{api.name} {dtype}", "why_not": str(error)}
            continue
        yield {
            "what": f"{api.name} {dtype} {side}^3", "seconds": taken,
            "ops_per_s": 2 * side**3 / taken,
        }  # fmt: skip


def rivals(context: Context) -> Iterator[Row]:
    """cuBLAS in half precision at the shapes that kernels are timed at."""
    api = library()
    if api is None:
        return
    for m in context.rows:
        copies = max(1, min(_MOST_COPIES, -(-context.past // (2 * context.n * context.k))))
        try:
            calls = api.products(m, context.n, context.k, "float16", copies)
            taken = api.timer.seconds(calls, context.budget)
        except Exception as error:  # as above
            yield {"what": f"{api.name}, M = {m}", "why_not": str(error)}
            continue
        yield {
            "target": api.name, "format": "float16", "walk": "cuBLAS", "precision": "fp16", "m": m,
            **rates(context, m, taken, 2 * context.n * context.k),
        }  # fmt: skip


#: a line of llama.cpp's test-backend-ops: the product of (m, k) by (k, n), and microseconds
_GGML = re.compile(
    r"MUL_MAT\(type_a=(\w+),type_b=\w+,m=(\d+),n=(\d+),k=(\d+),bs=\[1,1\],nr=\[1,1\].*?"
    r"([\d.]+) us/run"
)


def llama(context: Context) -> Iterator[Row]:
    """llama.cpp's kernels at the shape of the weights, where its test-backend-ops is on the path:
    it has cases of 4096 x 14336, with 1 to 8 and 512 rows of activations."""
    tool = shutil.which("test-backend-ops")
    if tool is None:
        yield {
            "what": "llama.cpp",
            "why_not": "test-backend-ops is not on the path; llama.cpp builds it with its tests",
        }
        return
    command = [tool, "perf", "-o", "MUL_MAT"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        stopper = threading.Timer(max(0.1, context.end - time.perf_counter()), process.kill)
        stopper.start()
        assert process.stdout
        for line in process.stdout:
            found = _GGML.search(line)
            if found and (int(found[2]), int(found[4])) == (context.n, context.k):
                m, taken = int(found[3]), float(found[5]) * 1e-6
                known = {f.name.lower(): f for f in format_list.formats()}
                fmt = known.get(found[1].lower())
                nbytes = context.n * fmt.row_bytes(context.k) if fmt else 0
                yield {
                    "target": "llama.cpp", "format": fmt.name if fmt else found[1], "walk": "ggml",
                    "precision": "", "m": m, **rates(context, m, taken, nbytes),
                }  # fmt: skip
        stopper.cancel()


@dataclass(frozen=True)
class Library:
    """A library that calls cuBLAS, and copies."""

    name: str
    timer: Timer
    dtypes: tuple[str, ...]
    copy: Callable[[int], Callable[[], None]]
    products: Callable[[int, int, int, str, int], list[Callable[[], None]]]


def library() -> Library | None:
    """torch if it has CUDA, else cupy, else None."""
    with contextlib.suppress(ImportError):
        import torch

        if torch.cuda.is_available():
            return torch_library(torch)
    with contextlib.suppress(ImportError):
        import cupy

        return cupy_library(cupy)
    return None


def torch_library(torch: Any) -> Library:
    """torch's calls."""
    from gpu_timing import TorchTimer

    def copy(nbytes: int) -> Callable[[], None]:
        source = torch.zeros(nbytes, dtype=torch.uint8, device="cuda")
        to = torch.empty_like(source)
        return lambda: to.copy_(source)

    def products(m: int, n: int, k: int, dtype: str, copies: int) -> list[Callable[[], None]]:
        if dtype == "int8":
            x = torch.ones((m, k), dtype=torch.int8, device="cuda")
            w = torch.ones((n, k), dtype=torch.int8, device="cuda").t()
            return [lambda: torch._int_mm(x, w)]
        kind = getattr(torch, dtype)
        x = torch.randn(m, k, dtype=kind, device="cuda")
        y = torch.empty(m, n, dtype=kind, device="cuda")
        weights = [torch.randn(n, k, dtype=kind, device="cuda").t() for _ in range(copies)]
        return [lambda w=w: torch.matmul(x, w, out=y) for w in weights]  # type: ignore[misc]

    return Library("torch", TorchTimer(torch), ("float16", "bfloat16", "int8"), copy, products)


def cupy_library(cupy: Any) -> Library:
    """cupy's calls; its product of integers is no cuBLAS."""
    from gpu_timing import CupyTimer

    def copy(nbytes: int) -> Callable[[], None]:
        source, to = (cupy.empty(nbytes, cupy.uint8) for _ in range(2))
        return lambda: cupy.copyto(to, source)

    def random(rows: int, columns: int) -> Any:
        return cupy.asarray(cupy.random.standard_normal((rows, columns)), dtype=cupy.float16)

    def products(m: int, n: int, k: int, dtype: str, copies: int) -> list[Callable[[], None]]:
        x, y = random(m, k), cupy.empty((m, n), cupy.float16)
        weights = [random(n, k).T for _ in range(copies)]
        return [lambda w=w: cupy.matmul(x, w, out=y) for w in weights]  # type: ignore[misc]

    return Library("cupy", CupyTimer(), ("float16",), copy, products)


def rates(context: Context, m: int, taken: float, nbytes: int) -> Row:
    """Seconds as bytes of weights and operations in a second."""
    return {
        "n": context.n, "k": context.k, "seconds": taken, "bytes_per_s": nbytes / taken,
        "ops_per_s": 2 * m * context.n * context.k / taken,
    }  # fmt: skip


def times(context: Context) -> Iterator[Row]:
    """Every walk that serves a format and a number of rows, with its default configuration."""
    runtime = context.runtime()
    timer = timer_of(runtime)
    yield {"clock": timer.clock}
    # all formats at the first number of rows, and so on: what there is no time for is the least
    for m, fmt in itertools.product(context.rows, context.formats):
        if context.over:
            return
        made, failures = compiled(runtime, list(serving(context, runtime, fmt, m)))
        yield from ({"format": fmt.name, "m": m, **one} for one in failures)
        weights: dict[str, list[Any]] = {}
        for kernel, launcher in made:
            if context.over:
                return
            about = {
                "target": context.target.name, "format": fmt.name, "walk": kernel.walk.name,
                "precision": kernel.precision, "m": m, "config": kernel.config.as_dict(),
            }  # fmt: skip
            try:
                layout = str(kernel.config.as_dict()["layout"])
                if layout not in weights:
                    weights.clear()  # of one layout at a time, as they fill memory
                    weights[layout] = copies_of(context, runtime, fmt, layout)
                calls = launches(
                    runtime, kernel, launcher, weights[layout], activations(m, context.k), context.n
                )
                taken = timer.seconds(calls, context.budget)
                nbytes = context.n * fmt.row_bytes(context.k)
                yield about | rates(context, m, taken, nbytes)
            except KernelgenError as error:
                yield about | {"problem": str(error)}


@functools.lru_cache(maxsize=1)
def activations(m: int, k: int) -> np.ndarray:
    """Activations (M, K)."""
    return np.random.default_rng(0).standard_normal((m, k), np.float32)


def serving(context: Context, runtime: DeviceRuntime, fmt: BlockFormat, m: int) -> Iterator[Kernel]:
    """Kernels for so many rows, those that share a layout one after the other."""
    caps = runtime.capabilities()
    found = []
    for one in context.target.walks:
        if one.op == op_for(m) and one.accepts(fmt) is None:
            config = one.default(fmt, caps, m)
            if one.refuses(config, fmt, caps) is None and context.k % fmt.block == 0:
                found.append(generate_walk(one, fmt, context.target, config))
    yield from sorted(found, key=lambda kernel: str(kernel.config.as_dict()["layout"]))


def compiled(
    runtime: DeviceRuntime, made: list[Kernel]
) -> tuple[list[tuple[Kernel, Launcher]], list[Row]]:
    """Kernels with what launches them, compiled all at once, and reasons where that failed."""

    def load(kernel: Kernel) -> Launcher | str:
        try:
            return Launcher(runtime.driver(), kernel)
        except Exception as error:  # one that does not compile is no reason to time no others
            return f"{type(error).__name__}: {error}"

    with ThreadPoolExecutor(8) as pool:
        found = list(zip(made, pool.map(load, made), strict=True))
    bad = [{"walk": k.walk.name, "problem": why} for k, why in found if isinstance(why, str)]
    return [(k, one) for k, one in found if isinstance(one, Launcher)], bad


@functools.lru_cache(maxsize=64)
def packed_weights(fmt: BlockFormat, layout: str, n: int, k: int) -> np.ndarray:
    """Random weights in a layout."""
    rows = random_blocks(fmt, _DISTINCT, k)
    data, named = np.resize(rows, (n, rows.shape[1])), named_layout(layout)
    return data if named.name == "native" else named.pack(data, fmt, k)


def copies_of(context: Context, runtime: DeviceRuntime, fmt: BlockFormat, layout: str) -> list[Any]:
    """Weights in device memory, over and over, until no cache holds them all."""
    packed = packed_weights(fmt, layout, context.n, context.k)
    count = max(1, min(_MOST_COPIES, -(-context.past // packed.nbytes)))
    return [runtime.driver().upload(packed) for _ in range(count)]


# ---- tuned ------------------------------------------------------------------------------------


def tune(context: Context) -> Iterator[Row]:
    """Studies of some kernels, timed on the device's clock; winners become presets."""
    from gpu_tuning import DeviceMeasurer

    from kernelgen.tuner import cache, ledger
    from kernelgen.tuner.problems import MatmulProblem
    from kernelgen.tuner.report import Options
    from kernelgen.tuner.study import Study

    runtime = context.runtime()
    problems = [
        MatmulProblem(fmt, m, context.n, context.k, precision=precision)
        for m, fmt in itertools.product(context.rows, context.formats)
        for precision in ("int8", "fp16")
    ]
    found: list[cache.Entry] = []
    path = context.out / "presets" / f"{context.target.name}.jsonl"
    for number, problem in enumerate(problems):
        left = context.end - time.perf_counter()
        if left < 3:
            return
        # a study ends with what it began, so that some seconds are kept for that
        share = 0.8 * left / (len(problems) - number)
        measurer = DeviceMeasurer(context.target, runtime, timer_of(runtime), context.past)
        options = Options(budget=share, storage="", write=False, record=False, batch=8)
        try:
            report = Study(context.target, runtime, problem, measurer, options).run()
        except KernelgenError as error:
            yield {"problem": str(problem), "why_not": str(error)}
            continue
        yield {
            "problem": str(problem), "tried": len(report.trials), "stopped": report.stopped,
            "default_seconds": report.default_cost, "seconds": report.cost,
            "ratio": report.ratio, "best": str(report.best) if report.best else None,
            "failures": [f"{c}: {o.reason}" for c, o in report.failures][:5],
        }  # fmt: skip
        if report.entry is not None:
            found.append(report.entry)
            ledger.export(path, found, preset=True)


PHASES: dict[str, Callable[[Context], Iterator[Row]]] = {
    "about": about, "check": check, "sample": sample, "ceilings": ceilings, "rivals": rivals,
    "times": times, "tune": tune, "llama": llama, "check_attention": check_attention,
    "attention": times_attention,
}  # fmt: skip

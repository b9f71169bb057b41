"""Everything that a machine with a GPU can tell about the kernels, in one command of 9 minutes.

    python bench/gpu.py --out build/gpu     # results as they come, then a table and gpu.json
    python bench/gpu.py --plan              # what would be done, and for how long; needs no GPU
    python bench/gpu.py --quick             # the same in a minute: few formats, small shapes
    python bench/gpu.py --quick --emulate   # without a GPU: a stand-in for cupy over the emulator

It runs every CUDA and Triton kernel against numpy; measures what the device can do (bytes copied,
multiplications by cuBLAS), and llama.cpp's kernels where its test-backend-ops is on the path; times
every format and walk at several numbers of rows of activations, over so many copies of the weights
that no cache holds them, on the device's own clock; attention beside that of torch, where it is;
has compute-sanitizer look at a sample, where it is on the path; tunes some kernels and writes
presets.

Each phase is a process of its own with a limit in seconds, and writes every result to
OUT/gpu.jsonl at once: a crash or a timeout costs what was not measured yet, and nothing else.

A machine without network: `pip download -d wheels --only-binary=:all: --no-deps` the packages that
`pip show` does not find there (kernelgen needs numpy, jinja2, typer and rich, cuda needs
cupy-cuda12x or cupy-cuda13x, the tuner optuna, Triton torch) for its Python and platform, carry the
folder along with this repository, and there
`pip install --no-index --no-deps --target site wheels/*.whl; export PYTHONPATH=site:.`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from kernelgen import targets as target_list  # noqa: E402
from kernelgen.ir import formats as format_list  # noqa: E402

#: bytes of weights to rotate through: several times the last cache of any GPU sold so far
PAST_THE_CACHE = 512 * 2**20

#: what people use most comes first, in case the rest finds no time
FIRST = ("q4_K", "q8_0", "q6_K", "q4_0", "mxfp4", "iq4_nl", "q5_K", "q2_K", "q3_K")

#: seconds for everything
TOTAL = 540.0

#: seconds after its limit that a phase has to end by itself
_GRACE = 8.0


@dataclass(frozen=True)
class Phase:
    """A step of the plan.

    name      what is shown; `does`: the function in gpu_phases that a process runs
    seconds   limit
    target    whose kernels it is about
    shares    processes at once, among which formats are dealt out
    tool      what the process runs under
    quick     smaller shapes and fewer formats, whatever the options say
    """

    name: str
    does: str
    seconds: float
    target: str
    shares: int = 1
    tool: tuple[str, ...] = ()
    quick: bool = False


def plan(names: Sequence[str], scale: float = 1.0) -> list[Phase]:
    """The phases, in order; `scale` stretches their limits."""
    jobs = max(1, min(8, (os.cpu_count() or 2) // 2))
    phases = [Phase("about", "about", 20, names[0])]
    phases += [
        Phase(f"check {n}", "check", 70 if n == "cuda" else 45, n, shares=jobs) for n in names
    ]
    phases += [
        Phase("ceilings", "ceilings", 25, names[0]),
        Phase("rivals", "rivals", 15, names[0]),
        Phase("llama", "llama", 30, names[0]),
    ]
    if "cuda" in names:
        phases += [
            Phase("check attention", "check_attention", 30, "cuda", shares=jobs),
            Phase("times cuda", "times", 110, "cuda"),
            Phase("attention", "attention", 35, "cuda"),
            Phase("tune", "tune", 40, "cuda"),
        ]
        for tool in ("memcheck", "racecheck"):
            command = ("compute-sanitizer", "--tool", tool, "--error-exitcode", "9")
            phases.append(Phase(tool, "sample", 40, "cuda", tool=command, quick=True))
    phases += [Phase(f"times {n}", "times", 40, n) for n in names if n != "cuda"]
    return [dataclasses.replace(p, seconds=p.seconds * scale) for p in phases]


class Results:
    """Rows, in memory and in a file, from many threads."""

    def __init__(self, path: Path) -> None:
        self.rows: list[dict[str, Any]] = []
        self._lock = threading.Lock()
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("w", encoding="utf-8")

    def add(self, phase: str, row: dict[str, Any]) -> None:
        """Keep a row."""
        with self._lock:
            self.rows.append({"phase": phase, **row})
            self._file.write(json.dumps(self.rows[-1]) + "\n")
            self._file.flush()

    def of(self, *phases: str) -> list[dict[str, Any]]:
        """Rows of phases by the first word of their names."""
        return [row for row in self.rows if row["phase"].split()[0] in phases]


def run(phase: Phase, options: argparse.Namespace, results: Results) -> None:
    """One phase: as many processes as it has shares."""
    if phase.tool and shutil.which(phase.tool[0]) is None:
        results.add(phase.name, {"why_not": f"{phase.tool[0]} is not on the path"})
        return
    begin = time.perf_counter()
    with ThreadPoolExecutor(phase.shares) as pool:
        list(pool.map(lambda n: _process(phase, n, options, results), range(phase.shares)))
    results.add(phase.name, {"ended": True, "seconds": time.perf_counter() - begin})


def _process(phase: Phase, share: int, options: argparse.Namespace, results: Results) -> None:
    command = [
        *phase.tool, sys.executable, __file__, "--phase", phase.does, "--target", phase.target,
        "--share", f"{share}/{phase.shares}", "--until", str(time.time() + phase.seconds),
        "--out", str(options.out), "--past", str(options.past), "--budget", str(options.budget),
        "--megabytes", str(options.megabytes), "--side", str(options.side),
        "--shape", *map(str, options.shape), "--m", *map(str, options.m),
    ]  # fmt: skip
    command += [part for name in options.format for part in ("--format", name)]
    command += ["--emulate"] * options.emulate + ["--small"] * (phase.quick or options.small)
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    ) as process:  # fmt: skip
        stopper = threading.Timer(phase.seconds + _GRACE, process.kill)
        stopper.start()
        other: list[str] = []
        assert process.stdout
        for line in process.stdout:
            if line.startswith("{"):
                results.add(phase.name, json.loads(line))
            else:
                other.append(line)
        code = process.wait()
        stopper.cancel()
    summary = [s for s in other if "ERROR SUMMARY" in s or "RACECHECK SUMMARY" in s]
    if phase.tool:
        said = summary[-1].strip("= \n") if summary else "no summary"
        results.add(phase.name, {"tool": phase.tool[2], "said": said, "code": code})
    if code:
        ended = "it was stopped, as its time was over" if code < 0 else f"it ended with {code}"
        results.add(phase.name, {"problem": f"{ended}: {''.join(other)[-2000:]}", "code": code})


def perform(options: argparse.Namespace) -> int:
    """What a process of a phase does: a row a line, to standard output."""
    if options.emulate:
        from tests import fake_cupy

        fake_cupy.install()
    import gpu_phases

    names = options.format or [fmt.name for fmt in format_list.formats()]
    formats = [format_list.get(n) for n in sorted(names, key=_rank)]
    share, shares = map(int, options.share.split("/"))
    rows, shape = tuple(options.m), tuple(options.shape)
    if options.small:
        formats = formats[:2]
    if options.phase == "tune":
        formats, rows = formats[:2], tuple(m for m in rows if m in (min(rows), max(rows)))
    context = gpu_phases.Context(
        target=target_list.get(options.target[0]), formats=tuple(formats[share::shares]),
        rows=rows, n=shape[0], k=shape[1], budget=options.budget, past=options.past,
        megabytes=options.megabytes, side=options.side, out=options.out,
        end=time.perf_counter() + options.until - time.time(),
    )  # fmt: skip
    for row in gpu_phases.PHASES[options.phase](context):
        print(json.dumps(row), flush=True)
    return 0


def _rank(name: str) -> int:
    return FIRST.index(name) if name in FIRST else len(FIRST)


# ---- what people see ----------------------------------------------------------------------------


def times_table(results: Results) -> Table:
    """Times beside the ceilings and cuBLAS."""
    table = Table(title="matmul, weights in device memory, rotated past the caches")
    for heading in ("target", "format", "walk", "M", "us", "GB/s", "TOP/s", "of copy", "of cuBLAS"):
        table.add_column(heading, justify="left" if heading in ("format", "walk") else "right")
    copies = [r["bytes_per_s"] for r in results.of("ceilings") if "bytes_per_s" in r]
    rivals = {r["m"]: r["seconds"] for r in results.of("rivals") if "m" in r}
    for row in results.of("times", "rivals", "llama"):
        if "ops_per_s" not in row:
            continue
        rival = rivals.get(row["m"])
        table.add_row(
            row["target"], row["format"], row["walk"], str(row["m"]), f"{row['seconds'] * 1e6:.1f}",
            f"{row['bytes_per_s'] / 1e9:.0f}", f"{row['ops_per_s'] / 1e12:.1f}",
            f"{row['bytes_per_s'] / max(copies):.0%}" if copies else "",
            f"{rival / row['seconds']:.2f}x" if rival else "",
        )  # fmt: skip
    return table


def attention_table(results: Results) -> Table:
    """Times of attention beside torch's best of the same case."""
    table = Table(title="attention, 32 heads that share 8")
    for heading in ("case", "target", "format", "walk", "us", "GB/s", "TFLOP/s", "of torch"):
        table.add_column(heading, justify="right" if heading in ("us", "GB/s") else "left")
    rows = [r for r in results.of("attention") if "seconds" in r and "case" in r]
    best: dict[str, float] = {}
    for row in rows:
        if row["target"] == "torch":
            best[row["case"]] = min(best.get(row["case"], row["seconds"]), row["seconds"])
    for row in sorted(rows, key=lambda r: (r["case"], r["seconds"])):
        rival = best.get(row["case"])
        table.add_row(
            row["case"], row["target"], row["format"], row["walk"], f"{row['seconds'] * 1e6:.1f}",
            f"{row['bytes_per_s'] / 1e9:.0f}", f"{row['ops_per_s'] / 1e12:.1f}",
            f"{rival / row['seconds']:.2f}x" if rival else "",
        )  # fmt: skip
    return table


def summary(results: Results) -> Iterator[str]:
    """Sentences about everything else."""
    for row in results.of("about"):
        if "target" in row:
            yield f"{row['target']}: {row['why_not'] or ', '.join(map(str, row['devices']))}"
    checks = [r for r in results.of("check") if "ok" in r]
    for target in dict.fromkeys(r["target"] for r in checks):
        mine = [r for r in checks if r["target"] == target]
        yield f"{target}: {sum(r['ok'] for r in mine)} of {len(mine)} kernels right"
        for r in mine:
            if not r["ok"]:
                yield f"  {r['op']} {r['format']} {r['precision']}: {r['problem']}"
    for row in results.of("ceilings"):
        if "bytes_per_s" in row:
            yield f"{row['what']}: {row['bytes_per_s'] / 1e9:.0f} GB/s, read and written"
        elif "ops_per_s" in row:
            yield f"{row['what']}: {row['ops_per_s'] / 1e12:.1f} TOP/s"
    for row in results.of("memcheck", "racecheck"):
        if "said" in row:
            yield f"{row['tool']}: {row['said']}"
    for row in results.of("tune"):
        if row.get("ratio"):
            yield f"{row['problem']}: {row['ratio']:.2f} times the default's speed by {row['best']}"
    for row in results.rows:
        if reason := row.get("problem" if "ok" not in row and "ratio" not in row else ""):
            yield f"{row['phase']}: {reason}"
        if row["phase"] != "about" and row.get("why_not"):
            yield f"{row['phase']}: {row['why_not']}"


def good(results: Results) -> bool:
    """Whether kernels ran, all were right, and no tool found anything."""
    checks = [r for r in results.of("check") if "ok" in r]
    tools = [r for r in results.of("memcheck", "racecheck") if "code" in r]
    clean = all(re.search(r"\b0 (errors|hazards)", r.get("said", "0 errors")) for r in tools)
    return bool(checks) and all(r["ok"] for r in checks) and clean


def arguments() -> argparse.ArgumentParser:
    """The command line; what comes last is for the processes of phases."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", action="append", default=[], help="default: cuda and triton")
    parser.add_argument("--format", action="append", default=[], help="default: all")
    parser.add_argument("--m", type=int, nargs="+", default=[1, 4096, 8, 512, 64])
    parser.add_argument("--shape", type=int, nargs=2, default=[4096, 14336], metavar=("N", "K"))
    parser.add_argument("--budget", type=float, default=0.06, help="seconds for each figure")
    parser.add_argument("--megabytes", type=int, default=2048, help="size of the copy")
    parser.add_argument("--side", type=int, default=8192, help="of the product of squares")
    parser.add_argument("--past", type=int, default=PAST_THE_CACHE, help="bytes to rotate through")
    parser.add_argument("--quick", action="store_true", help="small shapes, few formats")
    parser.add_argument("--emulate", action="store_true", help="no GPU: proves the script alone")
    parser.add_argument("--plan", action="store_true", help="only show the phases")
    parser.add_argument("--only", action="append", default=[], help="a phase, by its first word")
    parser.add_argument("--scale", type=float, default=1.0, help="stretches all limits")
    parser.add_argument("--out", type=Path, default=Path("build/gpu"))
    for name in ("--phase", "--share", "--until"):
        parser.add_argument(name, type=float if name == "--until" else str, default=None,
                            help=argparse.SUPPRESS)  # fmt: skip
    parser.add_argument("--small", action="store_true", help=argparse.SUPPRESS)
    return parser


def main() -> int:
    """Entry point."""
    options = arguments().parse_args()
    options.out = options.out.resolve()
    if options.phase:
        return perform(options)
    if options.quick:
        options.format = options.format or ["q4_K", "q8_0"]
        options.m, options.shape, options.side = [1, 16], [512, 1024], 1024
        options.budget, options.megabytes, options.past = 0.02, 8, 2**20
    if options.emulate:
        options.target, options.m, options.shape = ["cuda"], [1, 9], [64, 512]
        options.budget, options.megabytes, options.past, options.side = 0.001, 1, 2**16, 32
    console = Console(width=None if sys.stdout.isatty() else 120)
    phases = plan(
        options.target or ["cuda", "triton"], options.scale * (0.3 if options.quick else 1)
    )
    phases = [p for p in phases if not options.only or p.name.split()[0] in options.only]
    if options.plan:
        for phase in phases:
            shares = f" in {phase.shares} processes" if phase.shares > 1 else ""
            console.print(f"{phase.seconds:6.0f} s  {phase.name}{shares}", highlight=False)
        console.print(f"{sum(p.seconds for p in phases):6.0f} s  at most", highlight=False)
        return 0
    results = Results(options.out / "gpu.jsonl")
    absent: set[str] = set()
    end = time.perf_counter() + TOTAL * options.scale
    for phase in phases:
        if phase.target in absent:
            continue
        left = end - time.perf_counter() - _GRACE
        phase = dataclasses.replace(phase, seconds=max(1.0, min(phase.seconds, left)))
        console.print(f"{phase.name}...", highlight=False)
        run(phase, options, results)
        here = {r["target"]: r["why_not"] or r["how"] != "run" for r in results.of("about")
                if "target" in r}  # fmt: skip
        absent = {name for name, reason in here.items() if reason}
    console.print(times_table(results))
    if results.of("attention"):
        console.print(attention_table(results))
    for sentence in summary(results):
        console.print(sentence, highlight=False, markup=False)
    path = options.out / "gpu.json"
    path.write_text(json.dumps(results.rows, indent=1))
    console.print(f"wrote {path}", highlight=False)
    return 0 if good(results) else 1


if __name__ == "__main__":
    sys.exit(main())

"""What bench/cpu.py measured, for people: tables, what was asked of the c target, a figure."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Record = dict[str, Any]

#: (format, N, K)
Case = tuple[str, int, int]

#: formats of at least so many bits are asked to be bound by reading
READING_BITS = 4.5


def geomean(values: Iterable[float]) -> float:
    """The geometric mean; NaN of nothing."""
    logs = [math.log(value) for value in values]
    return math.exp(math.fsum(logs) / len(logs)) if logs else math.nan


class Times:
    """Seconds by case, M and name."""

    def __init__(self, records: Iterable[Record]) -> None:
        self.records = [r for r in records if r["what"] == "time"]
        self.seconds: dict[Case, dict[int, dict[str, float]]] = {}
        self.bits: dict[str, float] = {}
        self.same = {r["name"] for r in self.records if r["same"]} - {"kernelgen", "read"}
        for r in self.records:
            case = (r["format"], r["n"], r["k"])
            self.bits[r["format"]] = r["bits"]
            # a later run of the same replaces an earlier one
            self.seconds.setdefault(case, {}).setdefault(r["m"], {})[r["name"]] = r["seconds"]

    @property
    def ms(self) -> list[int]:
        """Each M that was measured."""
        return sorted({m for by_m in self.seconds.values() for m in by_m if m})

    def mine(self, case: Case, m: int) -> float:
        """Seconds of kernelgen; NaN where it was not measured."""
        return self.seconds[case].get(m, {}).get("kernelgen", math.nan)

    def fastest(self, case: Case, m: int, same: bool = False) -> tuple[str, float]:
        """Which of the others is the fastest, perhaps of those that multiply the same blocks, and
        its seconds."""
        found = {
            name: seconds for name, seconds in self.seconds[case].get(m, {}).items()
            if name != "kernelgen" and (name in self.same or not same)
        }  # fmt: skip
        return min(found.items(), key=lambda one: one[1]) if found else ("", math.nan)

    def ratios(self, m: int, rival: str) -> dict[Case, float]:
        """How many times as long a rival takes: one by name, the fastest of "all", or of "same",
        those that multiply the same blocks."""
        found = {}
        for case in self.seconds:
            if rival in ("all", "same"):
                other = self.fastest(case, m, rival == "same")[1]
            else:
                other = self.seconds[case].get(m, {}).get(rival, math.nan)
            if not math.isnan(ratio := other / self.mine(case, m)):
                found[case] = ratio
        return found

    def reading(self, case: Case) -> float:
        """The share of the bytes a second that can be read which M=1 reads."""
        limit = self.seconds[case].get(0, {}).get("read", math.nan)
        return limit / self.mine(case, 1)


def text(records: list[Record]) -> str:
    """Tables in Markdown, and what was asked."""
    times = Times(records)
    lines: list[str] = []
    for r in records:
        if r["what"] == "machine":
            versions = ", ".join(" ".join(one) for one in r["versions"].items())
            lines += [f"{r['time']}: {r['device']}, {r['isa']}, {r['threads']} threads,"
                      f" {r['compiler']}; {versions}", ""]  # fmt: skip
            if r.get("memory"):
                lines += [f"copies of the weights of {r['memory']} MB, in turn", ""]
        elif r["what"] == "limit":
            lines += [f"int8 products in registers, {r['name']}: {r['gop_per_s']:.0f} GOP/s", ""]
        elif r["what"] == "absent":
            lines += [f"{r['name']}, {r['n']} x {r['k']}: not measured, {r['why']}", ""]
    for n, k in sorted({(n, k) for _, n, k in times.seconds}):
        lines += [f"{n} x {k}", "", *_own(times, n, k), ""]
        lines += [
            "How many times as long the best that multiplies the same blocks takes, and the best of"
            " all where that is another", "", *_beside(times, n, k), "",
        ]  # fmt: skip
    lines += ["Geometric means of how many times as long others take", "", *_means(times), ""]
    lines += ["What was asked", ""]
    lines += [f"- {one.said}: {one.seen}. {one.verdict}" for one in asked(times)]
    return "\n".join(lines)


def _own(times: Times, n: int, k: int) -> Iterator[str]:
    """A line for each format: kernelgen's milliseconds, and what it reads at M=1."""
    yield f"| format | M=1, GB/s | of reading | {' | '.join(f'M={m}, ms' for m in times.ms)} |"
    yield "|---" * (3 + len(times.ms)) + "|"
    nbytes = {(r["format"], r["n"], r["k"]): r["nbytes"] for r in times.records}
    for case in times.seconds:
        if case[1:] == (n, k):
            speed = nbytes[case] / times.mine(case, 1) / 1e9
            cells = [case[0], _number(speed), f"{times.reading(case):.2f}"]
            cells += [_number(1e3 * times.mine(case, m)) for m in times.ms]
            yield f"| {' | '.join(cells)} |"


def _beside(times: Times, n: int, k: int) -> Iterator[str]:
    """A line for each format: how many times as long the best rivals take."""
    yield f"| format | {' | '.join(f'M={m}' for m in times.ms)} |"
    yield "|---" * (1 + len(times.ms)) + "|"
    for case in times.seconds:
        if case[1:] == (n, k):
            cells = [case[0]]
            for m in times.ms:
                both = dict.fromkeys(times.fastest(case, m, same) for same in (True, False))
                mine = times.mine(case, m)
                cells.append(", ".join(f"{one[1] / mine:.2f} {one[0]}" for one in both if one[0]))
            yield f"| {' | '.join(cells)} |"


def _means(times: Times) -> Iterator[str]:
    """A line for each rival, over the cases that it has."""
    names = sorted({r["name"] for r in times.records} - {"kernelgen", "read"})
    yield f"| | {' | '.join(f'M={m}' for m in times.ms)} |"
    yield "|---" * (1 + len(times.ms)) + "|"
    for which, said in (("same", "the best that multiplies the same blocks"), ("all", "the best")):
        cells = [f"{geomean(times.ratios(m, which).values()):.2f}" for m in times.ms]
        yield f"| {said} | {' | '.join(cells)} |"
    for name in names:
        cells = []
        for m in times.ms:
            found = times.ratios(m, name)
            few = f" ({len(found)})" if 0 < len(found) < len(times.seconds) else ""
            cells.append(f"{geomean(found.values()):.2f}{few}" if found else "")
        yield f"| {name} | {' | '.join(cells)} |"


def _number(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


@dataclass(frozen=True)
class Asked:
    """One thing that was asked, what was seen, and whether that is it (None: not measured)."""

    said: str
    seen: str
    met: bool | None

    @property
    def verdict(self) -> str:
        """A word."""
        return {True: "Met.", False: "MISSED.", None: "Not measured."}[self.met]


def asked(times: Times) -> Iterator[Asked]:
    """What issue 9 asks of the c target, in its order."""
    yield from _best(times, 1, "1.25", "")
    shares = {
        case: times.reading(case) for case in times.seconds if times.bits[case[0]] >= READING_BITS
    }
    yield _each(
        f"M=1: at least 0.8 of reading for each format of {READING_BITS} bits or more", shares,
        lambda share: share >= 0.8,
    )  # fmt: skip
    for m in (2, 4):
        slower = {case: times.mine(case, m) / times.mine(case, 1) for case in times.seconds}
        yield _mean(f"M={m}: at most 1.3 times the time of M=1", slower, 1.3, most=True)
    yield _mean("M=8: at least 4 times ggml's own operation, weights as they are",
                times.ratios(8, "llama.cpp unpacked"), 4)  # fmt: skip
    for m in (128, 512):
        yield from _best(times, m, "1.5", " (aim 1.9)")
        yield _mean(f"M={m}: at least 2.5 times numpy's float32 (aim 3.3)",
                    times.ratios(m, "numpy float32"), 2.5)  # fmt: skip


def _best(times: Times, m: int, bound: str, aim: str) -> Iterator[Asked]:
    """Beside those that multiply the same blocks, and beside all."""
    for which, said in (("same", " of the same blocks"), ("all", "")):
        said = f"M={m}: at least {bound} times the best rival{said}{aim}"
        yield _mean(said, times.ratios(m, which), float(bound))


def _mean(said: str, found: dict[Case, float], bound: float, most: bool = False) -> Asked:
    """Whether the geometric mean keeps the bound."""
    known = {case: value for case, value in found.items() if not math.isnan(value)}
    if not known:
        return Asked(said, "no figures", None)
    mean = geomean(known.values())
    worst = (max if most else min)(known.items(), key=lambda one: one[1])
    seen = f"{mean:.2f} on average, {worst[1]:.2f} at worst ({_name(worst[0])})"
    return Asked(said, seen, mean <= bound if most else mean >= bound)


def _each(said: str, found: dict[Case, float], holds: Callable[[float], bool]) -> Asked:
    """Whether every case keeps the bound."""
    known = {case: value for case, value in found.items() if not math.isnan(value)}
    if not known:
        return Asked(said, "no figures", None)
    bad = {case: value for case, value in known.items() if not holds(value)}
    worst = min(known.items(), key=lambda one: one[1])
    seen = f"{len(known) - len(bad)} of {len(known)}, {worst[1]:.2f} at worst ({_name(worst[0])})"
    return Asked(said, seen, not bad)


def _name(case: Case) -> str:
    return f"{case[0]}, {case[1]} x {case[2]}"


def draw(records: list[Record], path: Path) -> None:
    """A panel for each M: how many times as long each rival takes, by format, the mean of shapes.

    Raises ImportError without matplotlib.
    """
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "kernelgen"  # the same picture from the same numbers
    from matplotlib import pyplot

    times = Times(records)
    names = sorted({r["name"] for r in times.records} - {"kernelgen", "read"})
    formats = list(times.bits)
    columns = 2
    figure, axes = pyplot.subplots(
        -(-len(times.ms) // columns), columns, figsize=(11, 3 * -(-len(times.ms) // columns)),
        squeeze=False, sharex=True,
    )  # fmt: skip
    for axis, m in zip(axes.flat, times.ms, strict=False):
        for index, name in enumerate(names):
            ratios = times.ratios(m, name)
            points = {
                fmt: geomean(r for case, r in ratios.items() if case[0] == fmt) for fmt in formats
            }
            axis.plot(
                range(len(formats)), list(points.values()), label=name, linestyle="",
                marker="osD^v<>pXP*h"[index % 12], markersize=5,
            )  # fmt: skip
        axis.axhline(1, color="black", linewidth=1)
        axis.set_yscale("log", base=2)
        axis.yaxis.set_major_formatter("{x:g}")
        axis.set_title(f"M={m}", fontsize=10)
        axis.set_xticks(range(len(formats)), formats, rotation=60)
        axis.grid(axis="y", linewidth=0.3)
    axes[0][0].set_ylabel("times as long as kernelgen")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=4, fontsize=8)
    figure.tight_layout(rect=(0, 0.08, 1, 1))
    figure.savefig(path, metadata={"Date": None})

"""A page about studies: one HTML file that needs no other, with pictures drawn as SVG."""

from __future__ import annotations

import html
import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

from kernelgen.tuner import space
from kernelgen.tuner.measure import FAILED, OK
from kernelgen.tuner.report import Report, amount

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem;
       color: #222; background: #fff }
table { border-collapse: collapse; margin: .7rem 0 } th, td { padding: .2rem .8rem .2rem 0;
       text-align: left; vertical-align: top } td.number { text-align: right }
th { border-bottom: 1px solid #999; font-weight: 600 } svg { max-width: 100% }
svg text { font: 12px system-ui, sans-serif; fill: #444 } .axis { stroke: #999 }
.trial { fill: #7aa6d6 } .failed { fill: #c0392b } .best { stroke: #1a5490; fill: none;
       stroke-width: 2 } .roof { stroke: #27824a; stroke-dasharray: 5 4 } .bar { fill: #7aa6d6 }
.scroll { overflow-x: auto }
"""

_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 720, 260, 70, 30


def write(path: Path, reports: Iterable[tuple[str, Report]]) -> None:
    """Write the page about studies of targets, by name."""
    parts = [_section(target, one) for target, one in reports]
    text = (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>kernelgen tune</title><style>{_STYLE}</style><h1>kernelgen tune</h1>"
        + "".join(parts)
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def _section(target: str, one: Report) -> str:
    goal = one.problem.objective
    facts = [
        ("device", str(one.device)),
        ("default", f"{one.default}, {amount(one.default_cost, goal, 'unknown')}"),
        ("best", f"{one.best or 'nothing passed'}, {amount(one.cost, goal, 'unknown')}"),
        ("ratio", f"{one.ratio:.2f}" if one.ratio else "unknown"),
        ("tried", f"{len(one.trials)} of {len(one.space.legal)}, {len(one.failures)} failed"),
        ("ended", f"{one.stopped}, after {one.spent:.1f} s"),
    ]
    rows = "".join(f"<tr><th>{name}<td>{_text(said)}" for name, said in facts)
    return (
        f"<h2>{_text(f'{target}: {one.problem}')}</h2><table>{rows}</table>"
        f"<h3>History</h3>{_history(one)}<h3>What matters</h3>{_importance(one)}"
        f"<h3>Speed and accuracy</h3>{_front(one)}<h3>Failures</h3>{_failures(one)}"
    )


def _history(one: Report) -> str:
    """Times of trials in their order, the best so far, and the roofline."""
    goal = one.problem.objective
    times = [o.cost(goal) if o.status != FAILED else None for _, o in one.trials]
    known = [t for t in times if t is not None] + ([one.roofline] if one.roofline else [])
    if not known:
        return "<p>No trial passed.</p>"
    lo, hi = math.log(min(known)), math.log(max(known) * 1.001)

    def x(n: int) -> float:
        return _LEFT + (_WIDTH - _LEFT - 10) * (n + 0.5) / len(times)

    def y(seconds: float) -> float:
        return 10 + (_HEIGHT - _BOTTOM - 20) * (hi - math.log(seconds)) / (hi - lo)

    marks: list[str] = []
    path: list[str] = []
    best = math.inf
    for n, ((candidate, outcome), t) in enumerate(zip(one.trials, times, strict=True)):
        said = f"{candidate}: {amount(t, goal) if t is not None else outcome.reason}"
        place = y(t) if t is not None else _HEIGHT - _BOTTOM
        kind = "trial" if t is not None else "failed"
        marks.append(
            f'<circle class="{kind}" cx="{x(n):.1f}" cy="{place:.1f}" r="4">'
            f"<title>{_text(said)}</title></circle>"
        )
        if t is not None and outcome.status == OK and t < best:
            path.append(f"V{y(t):.1f}" if path else f"M{x(n):.1f},{y(t):.1f}")
            best = t
        if path:
            path.append(f"H{x(n):.1f}")
    roof = ""
    if one.roofline:
        at = y(one.roofline)
        roof = (
            f'<line class="roof" x1="{_LEFT}" x2="{_WIDTH}" y1="{at:.1f}" y2="{at:.1f}"/>'
            f'<text x="{_LEFT + 4}" y="{at - 4:.1f}">roofline {amount(one.roofline)}</text>'
        )
    labels = "".join(
        f'<text x="{_LEFT - 6}" y="{y(t) + 4:.1f}" text-anchor="end">{amount(t, goal)}</text>'
        for t in (min(known), max(known))
    )
    base = _HEIGHT - _BOTTOM
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="time of each trial">'
        f'<line class="axis" x1="{_LEFT}" x2="{_WIDTH}" y1="{base}" y2="{base}"/>'
        f'<text x="{_WIDTH}" y="{_HEIGHT - 8}" text-anchor="end">trials, in their order</text>'
        f'{labels}{roof}<path class="best" d="{"".join(path)}"/>{"".join(marks)}</svg>'
    )


def importance(one: Report) -> dict[str, float]:
    """How much of the variance of the logarithm of cost each parameter explains alone, 0 to 1."""
    done = [
        (space.values_of(c), math.log(o.cost(one.problem.objective)))
        for c, o in one.trials
        if o.status != FAILED
    ]
    total = statistics.pvariance([t for _, t in done]) if len(done) > 1 else 0.0
    result = {}
    for name in space.parameters(one.space):
        groups: dict[object, list[float]] = {}
        for values, t in done:
            if name in values:
                groups.setdefault(values[name], []).append(t)
        count = sum(map(len, groups.values()))
        if len(groups) < 2 or not total:
            continue
        within = sum(statistics.pvariance(ts) * len(ts) for ts in groups.values()) / count
        result[name] = max(0.0, 1 - within / total)
    return dict(sorted(result.items(), key=lambda pair: -pair[1]))


def _importance(one: Report) -> str:
    rows = [
        f'<tr><td>{_text(name)}<td><svg width="220" height="14"><rect class="bar" width="'
        f'{220 * value:.0f}" height="14"/></svg><td class="number">{value:.0%}'
        for name, value in importance(one).items()
    ]
    if not rows:
        return "<p>Too few trials to say.</p>"
    head = "<tr><th>parameter<th>share of the variance that it explains alone<th>"
    return f"<table>{head}{''.join(rows)}</table>"


def _front(one: Report) -> str:
    goal = one.problem.objective
    rows = [
        (amount(outcome.cost(goal), goal), f"{outcome.rms_error:.2g}", str(candidate))
        for candidate, outcome in one.front()
    ]
    return _table((goal, "RMS error", "configuration"), rows) if rows else "<p>None passed.</p>"


def _failures(one: Report) -> str:
    rows = [(o.kind or "", str(c), o.reason or "") for c, o in one.failures]
    return _table(("kind", "configuration", "reason"), rows) if rows else "<p>None.</p>"


def _table(names: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th>{name}" for name in names)
    body = "".join("<tr>" + "".join(f"<td>{_text(cell)}" for cell in row) for row in rows)
    return f'<div class="scroll"><table><tr>{head}{body}</table></div>'


def _text(value: str) -> str:
    return html.escape(value)

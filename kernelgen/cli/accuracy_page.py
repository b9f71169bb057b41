"""Errors as pages and pictures, and in the order in which both and tables show them."""

from __future__ import annotations

import html
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kernelgen.accuracy import DATA, Measured
from kernelgen.errors import FileError, TargetError

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; margin: .7rem 0 } th { border-bottom: 1px solid #999 }
th, td { padding: .2rem .8rem .2rem 0; text-align: right } td.name, th.name { text-align: left }
svg { max-width: 100%; height: auto } .scroll { overflow-x: auto }
"""

#: one part in a thousand, drawn as a line
_LINE = 1e-3


def percent(value: float | None) -> str:
    """A part of one, in two digits; nothing where it is not known."""
    return "" if value is None else f"{100 * value:.2g}%"


def by_subject(results: list[Measured]) -> Iterator[tuple[str, list[Measured]]]:
    """Results of each subject: matmul, layer, or tensors."""
    for what in dict.fromkeys(one.what for one in results):
        yield what, [one for one in results if one.what == what]


def by_case(rows: list[Measured]) -> Iterator[tuple[tuple[str, str, str], dict[int, Measured]]]:
    """Results of one subject by K, for each format, precision and kind of data."""
    for case in dict.fromkeys((one.format, one.precision, one.data) for one in rows):
        same = [one for one in rows if (one.format, one.precision, one.data) == case]
        yield case, {one.k: one for one in same}


def require() -> None:
    """Raises TargetError where figures cannot be drawn."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise TargetError(
            f"a figure was asked for, and {error.name} cannot be imported; pip install"
            " kernelgen[plot], or leave out --svg and --html"
        ) from error


def draw(path: Path, results: list[Measured]) -> None:
    """The errors as an SVG file."""
    _save(path, _figure(results))


def write(path: Path, title: str, results: list[Measured]) -> None:
    """A page with the tables and the figure, which needs no other file."""
    figure = _figure(results)
    tables = "".join(_table(what, rows) for what, rows in by_subject(results))
    _save(
        path,
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        f"<title>kernelgen accuracy</title><style>{_STYLE}</style><h1>kernelgen accuracy</h1>"
        f"<p>{html.escape(title)}</p><p>Errors are RMS, relative to the exact result.</p>"
        f"{figure[figure.index('<svg') :]}{tables}",
    )


def _save(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise FileError(
            f"{path} could not be written: {error.strerror}; choose another file"
        ) from error


def _table(what: str, rows: list[Measured]) -> str:
    head = "".join(
        f"<th class={kind}>{name}"
        for kind, name in (
            ("name", "format"), ("name", "precision"), ("name", "data"), ("n", "K"), ("n", "bits"),
            ("n", "format costs"), ("n", "kernel adds"), ("n", "total"), ("n", "1 - cosine"),
        )
    )  # fmt: skip
    lines = []
    for one in rows:
        names = "".join(
            f"<td class=name>{html.escape(text)}" for text in (one.format, one.precision, one.data)
        )
        numbers = (str(one.k or ""), f"{one.bits:g}", *map(percent, (one.own, one.added, one.total,
                                                                       one.distance)))  # fmt: skip
        lines.append(f"<tr>{names}{''.join(f'<td>{text}' for text in numbers)}")
    body = "".join(lines)
    return f"<h2>{html.escape(what)}</h2><div class=scroll><table><tr>{head}{body}</table></div>"


def _figure(results: list[Measured]) -> str:
    """The largest K of each subject: what formats cost as bars, what kernels add as points."""
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": "kernelgen", "svg.fonttype": "none"}):
        return _drawn(results)


def _drawn(results: list[Measured]) -> str:
    from matplotlib.figure import Figure

    subjects = list(by_subject(results))
    size = (11, 3.2 * len(subjects))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(len(subjects), len(DATA), squeeze=False, sharey="row")
    for row, (what, rows) in zip(axes, subjects, strict=True):
        for place, data in zip(row, DATA, strict=True):
            _panel(place, f"{what}, {data} data", [one for one in rows if one.data == data])
    axes[0][0].legend(fontsize=8)
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()


def _panel(place: Any, title: str, rows: list[Measured]) -> None:
    """One kind of data of one subject, formats with few bits first."""
    last = [group[max(group)] for _, group in by_case(rows)]
    formats = sorted({(one.bits, one.format) for one in last})
    position = {name: n for n, (_, name) in enumerate(formats)}
    costs = {one.format: one.own for one in last if one.own is not None}
    place.bar(
        [position[name] for name in costs], list(costs.values()), color="#c8d6e5",
        label="format costs",
    )  # fmt: skip
    for precision in dict.fromkeys(one.precision for one in last):
        mine = [one for one in last if one.precision == precision]
        place.plot(
            [position[one.format] for one in mine], [one.added for one in mine], "o",
            markersize=4, label=f"{precision} adds",
        )  # fmt: skip
    place.axhline(_LINE, color="#27824a", linestyle="--", linewidth=1, label="0.1%")
    place.set_yscale("log")
    place.set_title(title, fontsize=10)
    place.set_ylabel("RMS error / RMS", fontsize=9)
    place.set_xticks(range(len(formats)), [name for _, name in formats], rotation=60, fontsize=8)

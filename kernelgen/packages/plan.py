"""The kernels of a package, and the rules by which one of them is chosen.

The rules are those of `kernelgen.matmul`: what the tuner found for the nearest shape, else the
default for as many rows of activations.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

from kernelgen import __version__
from kernelgen.config import Capabilities, Config
from kernelgen.errors import KernelgenError
from kernelgen.files import entry_of, kernels, manifest_of
from kernelgen.generate import environment, generate_walk
from kernelgen.ir.block import BlockFormat
from kernelgen.problem import MATVEC_ROWS, PRECISIONS, acceptable
from kernelgen.targets.base import Kernel, Target, Walk
from kernelgen.targets.package import MOST_ROWS, Choice, Plan, Point, Rule
from kernelgen.tuner import cache, lookup
from kernelgen.tuner.problems import MatmulProblem

#: rows of activations as kernels tell them apart, with the rows that each stands for
_FEW = tuple((m, m) for m in range(1, MATVEC_ROWS + 1))
_MANY = tuple((m, m // 2 + 1) for m in (2**n for n in range(4, 13)))


class _Made:
    """Kernels by entry point; a configuration that is not the default has it in the name."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self.kernels: dict[str, Kernel] = {}

    def add(self, walk: Walk, fmt: BlockFormat, config: Config | None = None) -> str:
        """Add a kernel and what it needs; returns its entry point."""
        kernel = generate_walk(walk, fmt, self.target, config)
        plain = generate_walk(walk, fmt, self.target)
        kernel = kernel if kernel.config == plain.config else renamed(kernel, plain.config)
        for one in (*kernel.needs.values(), kernel, *kernel.then.values()):
            self.kernels.setdefault(one.entry, one)
        return kernel.entry


def renamed(kernel: Kernel, plain: Config) -> Kernel:
    """A kernel under a name that tells its configuration from the default one."""
    before = plain.as_dict()
    parts = [f"{k}_{v}" for k, v in kernel.config.as_dict().items() if before.get(k) != v]
    entry = "_".join((kernel.entry, *parts))
    # with the functions beside it that say how much memory it wants
    whole = rf"\b{re.escape(kernel.entry)}(?=\b|_scratch\b|_bytes\b)"
    return dataclasses.replace(kernel, entry=entry, source=re.sub(whole, entry, kernel.source))


def plan(
    target: Target,
    formats: Iterable[BlockFormat],
    ops: Iterable[str],
    *,
    tuned: bool = True,
    binaries: tuple[str, ...] | None = None,
) -> Plan:
    """The plan of a target's package for these formats and ops; `tuned`: with what the tuner's
    cache has for this machine's device."""
    formats, ops, whole, target = tuple(formats), tuple(ops), target, _without(target)
    made = _Made(target)
    for one in kernels(target, formats, ops):
        made.kernels.setdefault(one.entry, one)
    found = [
        rule
        for fmt in formats
        for asked in ("auto", *(p for p in PRECISIONS if p != "auto"))
        for op in ("matvec", "matmul")
        if op in ops and (rule := _rule(made, fmt, asked, op)) is not None
    ]
    if tuned:
        points = _points(made, formats)
        found = [
            dataclasses.replace(r, points=tuple(points.get((r.format, r.precision, r.op), ())))
            for r in found
        ]
    rules = tuple(found)
    order = {fmt.name: n for n, fmt in enumerate(formats)}
    every = sorted(made.kernels.values(), key=lambda k: order.get(k.subject.name, len(order)))
    entries = tuple(_entry(one, target) for one in every)
    return Plan(
        target, __version__, tuple(every), entries, rules, manifest_of(target, entries),
        _dispatch(target, rules), functools.partial(_defaults, target, formats, ops),
        functools.partial(_render, target), functools.partial(_entry, target=whole), binaries,
        functools.partial(_unpackaged, whole, formats if "matmul" in ops else ()),
    )  # fmt: skip


@functools.cache
def _without(target: Target) -> Target:
    """The target without walks that its packages do not have."""
    walks = tuple(w for w in target.walks if not target.unpackaged.intersection(w.features))
    return dataclasses.replace(target, walks=walks)


def _entry(kernel: Kernel, target: Target) -> dict[str, Any]:
    """What the manifest says of a kernel; `contract`: whether the compiler may round a*b + c once,
    which its flags have to say."""
    file = kernel.entry.removeprefix(target.prefix) + target.suffix
    return {**entry_of(kernel, target, file), "contract": kernel.contract}


def _defaults(
    target: Target, formats: Sequence[BlockFormat], ops: Sequence[str], caps: Capabilities
) -> list[Kernel]:
    found = kernels(dataclasses.replace(target, capabilities=caps), formats, ops)
    return list({one.entry: one for one in found}.values())


def _unpackaged(
    target: Target, formats: Sequence[BlockFormat], caps: Capabilities
) -> tuple[list[Kernel], list[Rule]]:
    """Kernels of matmul with features that packages do not use unasked, and the rules by which they
    serve a device with these capabilities."""
    made, found = _Made(dataclasses.replace(target, capabilities=caps)), []
    asked_for = dict.fromkeys(("auto", *PRECISIONS))
    for fmt, asked in itertools.product(formats, asked_for):
        choices: list[Choice] = []
        if asked == "int8" and fmt.float_codes:
            continue
        for m, first in _MANY:
            walk = target.serve("matmul", fmt, asked, caps, m)
            if target.unpackaged.intersection(walk.features):
                entry = made.add(walk, fmt, walk.default(fmt, caps, m))
                _extend(choices, first, m, entry)
        if choices:
            found.append(Rule(fmt.name, asked, "matmul", tuple(choices)))
    return list(made.kernels.values()), found


def _extend(choices: list[Choice], first: int, m: int, entry: str) -> None:
    """A kernel serves rows from `first` to m, too."""
    last = MOST_ROWS if m == _MANY[-1][0] else m
    if choices and choices[-1].kernel == entry:
        choices[-1] = dataclasses.replace(choices[-1], m_to=last)
    else:
        choices.append(Choice(first, last, entry))


def _rule(made: _Made, fmt: BlockFormat, asked: str, op: str) -> Rule | None:
    """Every walk that may serve, in the order in which the target prefers them."""
    target, chosen = made.target, []
    for precision in acceptable(asked, fmt):
        for walk in target.walks:
            if walk.op != op or walk.accepts(fmt) is not None:
                continue
            if walk.precision in ("", precision):
                chosen += _choices(made, walk, fmt, op)
    return Rule(fmt.name, asked, op, tuple(chosen)) if chosen else None


def _choices(made: _Made, walk: Walk, fmt: BlockFormat, op: str) -> list[Choice]:
    """The defaults of a walk, by rows of activations."""
    found: list[Choice] = []
    for m, first in _FEW if op == "matvec" else _MANY:
        entry = made.add(walk, fmt, walk.default(fmt, made.target.capabilities, m))
        _extend(found, first, m, entry)
    return found


def _points(made: _Made, formats: Sequence[BlockFormat]) -> dict[tuple[str, str, str], list[Point]]:
    """What the tuner's cache has that can be used on this machine, those first that go before
    others at the same distance (see `tuner.lookup`): of the precision that was asked for, then
    those that were measured last."""
    target = made.target
    runtime = target.runtime()
    if runtime.available() is not None:
        return {}
    known = {fmt.name: fmt for fmt in formats}
    found: dict[tuple[str, str, str], list[tuple[Any, Point]]] = {}
    for place in (None, cache.presets()):
        for entry in cache.winners(cache.entries(place)):
            key = entry.key
            if key.target != target.name or key.format not in known:
                continue
            if key.objective != "time" or key.max_error is not None:
                continue
            try:
                problem = MatmulProblem(known[key.format], *key.shape, precision=key.precision)
                choice = lookup.choose_for(target, runtime, problem)
            except KernelgenError:
                continue  # an entry of a shape or precision that is none any more
            if choice.entry is None or choice.entry.key.shape != key.shape:
                continue
            name = made.add(choice.walk, known[key.format], choice.config)
            point, later = _point(name, choice.entry), [-ord(c) for c in choice.entry.time]
            # the best of all is also the best of those that compute as it does
            for asked in dict.fromkeys((key.precision, entry.used)):
                rank = (asked != key.precision, later, point.m, point.n, point.k, name)
                found.setdefault((key.format, asked, key.op), []).append((rank, point))
    ranked = {what: sorted(some, key=lambda one: one[0]) for what, some in found.items()}
    return {what: [*dict.fromkeys(p for _, p in some)] for what, some in ranked.items()}


def _point(name: str, entry: Any) -> Point:
    key, before = entry.key, entry.baseline.get("seconds")
    m, n, k = key.shape
    return Point(
        m, n, k, name, str(key.device), key.device.family, entry.seconds,
        float(before) if before else None,
    )  # fmt: skip


def _render(target: Target, template: str, **values: Any) -> str:
    """A template of the target's or of all; what does not end in .j2 is taken as it is."""
    from importlib.resources import files

    if not template.endswith(".j2"):
        for folder in (f"templates/{target.name}", "templates/packages"):
            found = files("kernelgen") / folder / template
            if found.is_file():
                return found.read_text("utf-8")
    made = environment(target).get_template(template)
    return made.render(version=__version__, **target.globals, **values).lstrip("\n")


def _dispatch(target: Target, rules: Iterable[Rule]) -> str:
    """The rules as JSON; docs/embedding.md says how they are meant."""
    data = {
        "version": 1, "kernelgen": __version__, "target": target.name,
        "matvec_rows": MATVEC_ROWS, "rules": [_rule_data(one) for one in rules],
    }  # fmt: skip
    return json.dumps(data, indent=1) + "\n"


def _rule_data(rule: Rule) -> dict[str, Any]:
    found = dataclasses.asdict(rule)
    found["choices"] = [{"m": [one.m_from, one.m_to], "kernel": one.kernel} for one in rule.choices]
    return found

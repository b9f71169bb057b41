"""What a package of a target's kernels is made of.

A package is what a host takes as it is, without kernelgen.  `kernelgen.packages` makes a `Plan`; a
target's `package.py` turns it into files.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kernelgen.config import Capabilities
from kernelgen.problem import MATVEC_ROWS
from kernelgen.targets.base import Kernel, Target

#: a file's text, or its bytes
Content = str | bytes

#: M of the last of the ranges
MOST_ROWS = 2**32 - 1


@dataclass(frozen=True)
class Choice:
    """A kernel, by its entry point, for m_from to m_to rows of activations."""

    m_from: int
    m_to: int
    kernel: str


@dataclass(frozen=True)
class Point:
    """A kernel that the tuner found best for a shape.

    device   what it was measured on, as the tuner calls it; `family`: what similar ones share
    seconds  of a call, and `default_seconds` of the kernel that would serve without tuning
    """

    m: int
    n: int
    k: int
    kernel: str
    device: str
    family: str
    seconds: float
    default_seconds: float | None

    @property
    def rows(self) -> tuple[int, int]:
        """From how many to how many rows it may serve: few say nothing of other numbers of them."""
        return (self.m, self.m) if self.m <= MATVEC_ROWS else (MATVEC_ROWS + 1, MOST_ROWS)


@dataclass(frozen=True)
class Rule:
    """Which kernels serve an op, a format and a precision that is asked for, the first that can
    before the others; a point that is near goes before them all."""

    format: str
    precision: str
    op: str
    choices: tuple[Choice, ...]
    points: tuple[Point, ...] = ()


@dataclass(frozen=True)
class Plan:
    """What goes into a package.

    kernels   each by its own entry point
    entries   of the manifest, as plain data, in the order of `kernels`
    rules     see `Rule`
    manifest, dispatch   entries and rules, as JSON
    defaults  makes the kernels in their default configurations for other capabilities
    render    text of a template, from names and values; what is no template is taken as it is
    describe  makes the entry of the manifest for any kernel
    binaries  architectures to compile for, by name; None: those that the target thinks of, where
              their compiler is here; empty: none
    unpackaged  kernels that a package has only for programs that ask for them, and their rules,
              for a device with such capabilities
    """

    target: Target
    version: str
    kernels: tuple[Kernel, ...]
    entries: tuple[Mapping[str, Any], ...]
    rules: tuple[Rule, ...]
    manifest: str
    dispatch: str
    defaults: Callable[[Capabilities], Sequence[Kernel]]
    render: Callable[..., str]
    describe: Callable[[Kernel], Mapping[str, Any]]
    binaries: tuple[str, ...] | None = None
    unpackaged: Callable[[Capabilities], tuple[list[Kernel], list[Rule]]] = lambda caps: ([], [])

    def entry(self, kernel: Kernel) -> Mapping[str, Any]:
        """What the manifest says of a kernel."""
        return next(e for e in self.entries if e["entry"] == kernel.entry)

    def relocated(self, files: Mapping[str, str]) -> str:
        """The manifest of those kernels that are in `files`, by entry, with where each is."""
        entries = [{**e, "file": files[e["entry"]]} for e in self.entries if e["entry"] in files]
        data = {"target": self.target.name, "kernels": entries}
        return json.dumps(data, indent=1, sort_keys=True) + "\n"


class PackageError(Exception):
    """Raised by a target's package, with a sentence for the user."""


def refuse_binaries(plan: Plan) -> None:
    """For targets that compile nothing ahead of time.  Raises PackageError."""
    if plan.binaries:
        raise PackageError(
            f"binaries for {', '.join(plan.binaries)} were asked for; packages of target"
            f" {plan.target.name} are compiled where they are used: leave out --arch"
        )


# ---- expressions of sizes in other languages ----------------------------------------------------


@dataclass(frozen=True)
class Arithmetic:
    """How a language spells what grids and sizes are made of; all numbers are whole and not
    negative.  `{a}`, `{b}`: operands."""

    divide: str
    ceil: str
    minimum: str


def spelt(text: str, words: Arithmetic) -> str:
    """A Python expression of sizes, as manifests have them, in another language.

    -(-a // b) is a division rounded up: other languages round it the other way.
    """
    return _spelt(ast.parse(text, mode="eval").body, words)


def _spelt(node: ast.expr, words: Arithmetic) -> str:
    match node:
        case ast.Constant(value=int(value)):
            return str(value)
        case ast.Name(id=name):
            return name
        case ast.UnaryOp(
            op=ast.USub(), operand=ast.BinOp(left=above, op=ast.FloorDiv(), right=by)
        ) if (positive := _negated(above)) is not None:
            return words.ceil.format(a=_spelt(positive, words), b=_spelt(by, words))
        case ast.BinOp(left=a, op=ast.FloorDiv(), right=b):
            return words.divide.format(a=_spelt(a, words), b=_spelt(b, words))
        case ast.BinOp(left=a, op=ast.Mult() | ast.Add() as op, right=b):
            sign = "*" if isinstance(op, ast.Mult) else "+"
            return f"({_spelt(a, words)} {sign} {_spelt(b, words)})"
        case ast.Call(func=ast.Name(id="min"), args=[a, b]):
            return words.minimum.format(a=_spelt(a, words), b=_spelt(b, words))
    raise ValueError(f"{ast.unparse(node)} is no expression of sizes")


def _negated(node: ast.expr) -> ast.expr | None:
    """-node without a sign, where node has one in front."""
    match node:
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return operand
        case ast.BinOp(left=left, op=ast.Mult() as op, right=right):
            inner = _negated(left)
            return None if inner is None else ast.BinOp(inner, op, right)
    return None

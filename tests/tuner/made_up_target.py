"""A target whose candidates behave as badly as candidates can, for the worker to run."""

from __future__ import annotations

import ctypes
import dataclasses
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from kernelgen import targets
from kernelgen.config import Capabilities, Config, choice
from kernelgen.errors import CompileError
from kernelgen.ir import formats
from kernelgen.targets.base import Kernel, Runtime, Target
from kernelgen.tuner import space
from kernelgen.tuner.measure import OK, Outcome
from kernelgen.tuner.problems import MatmulProblem, Problem

KINDS = ("good", "slow", "fast", "loops", "crashes", "nan", "wrong", "greedy", "compiles not")

#: a problem that takes no time
SMALL = MatmulProblem(formats.get("q8_0"), 1, 64, 256)

needs_c = pytest.mark.skipif(
    targets.get("c").runtime().available() is not None, reason="needs a C compiler"
)

FACTORY = "tests.tuner.made_up_target:factory"


@dataclass(frozen=True)
class BadConfig(Config):
    """How to behave."""

    kind: str = choice("good", *KINDS)
    size: int = choice(1, 1, 2, 4, 8)

    def legal(self, caps: Capabilities) -> str | None:
        """Only the good one comes in sizes."""
        if self.size > 1 and self.kind != "good":
            return f"size {self.size} is for good ones only"
        return None


class BadRuntime:
    """numpy's runtime, with manners by configuration."""

    def __init__(self) -> None:
        self._inner: Any = targets.get("numpy").runtime()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def describe(self) -> list[dict[str, Any]]:
        """A device that is made up."""
        return [{"device": "Made Up 3000", "driver": "1.0", "compute_units": 4}]

    def matmul(self, kernel: Kernel) -> Callable[..., None]:
        """numpy's result, after or before something bad."""
        run = self._inner.matmul(kernel)
        kind = kernel.config.as_dict().get("kind", "good")
        if kind == "compiles not":
            raise CompileError("the made up compiler rejected it")

        def bad(x: Any, w: Any, y: Any) -> None:
            if kind == "loops":
                while True:
                    time.sleep(0.01)
            if kind == "crashes":
                print("about to crash", file=sys.stderr, flush=True)
                ctypes.string_at(0)
            if kind == "greedy":
                np.empty(1 << 62, np.uint8)
            run(x, w, y)
            time.sleep({"slow": 0.02, "fast": 0.0005}.get(kind, 0.002))
            if kind == "nan":
                y[0, 0] = np.nan
            if kind == "wrong":
                y *= 1.03

        return bad


def factory(name: str = "made up", variant: str = "") -> tuple[Target, Runtime]:
    """numpy's target, its matmuls with bad configurations."""
    numpy = targets.get("numpy")
    walks = tuple(
        dataclasses.replace(w, config=BadConfig) if w.op in ("matvec", "matmul") else w
        for w in numpy.walks
    )
    made = dataclasses.replace(numpy, name="made up", walks=walks, templates=("numpy",))
    return made, BadRuntime()


def recorded(
    target: Target, runtime: Runtime, problem: Problem, **special: Outcome
) -> dict[str, Outcome]:
    """Outcomes of a whole space: the more alike to one candidate, the faster."""
    explored = space.explore(target, runtime.capabilities(), problem)
    best = explored.legal[len(explored.legal) // 3]
    mine = space.values_of(best)
    result = {}
    for one in explored.legal:
        far = space.distance(mine, space.values_of(one))
        kind = one.config.as_dict().get("kind", "")
        result[one.id] = special.get(
            kind,
            Outcome(OK, samples=(1e-3 * (1 + far),) * 3, error=1e-7, rms_error=1e-3 / (1 + far)),
        )
    return result

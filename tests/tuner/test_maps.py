"""Maps and row reductions in the tuner: problems, entries, and what functions make of these."""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import kernelgen
from kernelgen import api_maps, targets
from kernelgen.cli import app
from kernelgen.errors import KernelgenError
from kernelgen.generate import generate_walk
from kernelgen.ir.ops import functions as f
from kernelgen.ir.ops import library, maps
from kernelgen.tuner import cache, gate, lookup, space
from kernelgen.tuner.problems import Asked, MapProblem, subject_named

SOFTMAX = MapProblem.of("softmax", "f32", 24, 333, Asked())
SWIGLU = MapProblem.of("swiglu", "bf16", 24, 333, Asked())


@pytest.fixture(autouse=True)
def _nothing_is_chosen_yet() -> None:
    api_maps._runner.cache_clear()


def test_a_problem_says_what_it_is() -> None:
    assert (SOFTMAX.op, SOFTMAX.shape, SOFTMAX.rows) == ("rows", (24, 333), 24)
    assert SOFTMAX.nbytes == 2 * 4 * 24 * 333
    # contiguous arrays are one row to a function of single elements
    assert (SWIGLU.op, SWIGLU.shape) == ("map", (1, 24 * 333))
    assert SWIGLU.nbytes == 3 * 2 * 24 * 333
    assert SOFTMAX.flags == "--op softmax --format f32 --shape 24x333"
    for one in (SOFTMAX, SWIGLU):
        assert pickle.loads(pickle.dumps(one)) == one
        assert subject_named(one.op, one.name) == one.kind
        assert one.smallest.shape == (1, 1)


def test_shapes_are_near_or_not() -> None:
    assert SOFTMAX.apart((32, 333)) == 0  # as many rows, in powers of two
    assert SOFTMAX.apart((24, 666)) == 1
    assert SOFTMAX.apart((24, 3330)) is None


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(KernelgenError, match="compute in fp32"):
        MapProblem.of("silu", "f32", 1, 1, Asked(precision="int8"))
    with pytest.raises(KernelgenError, match="elements of f32, f16, bf16"):
        MapProblem.of("silu", "f8_e4m3", 1, 1, Asked())
    with pytest.raises(KernelgenError, match="above 0"):
        dataclasses.replace(SOFTMAX, m=0)
    with pytest.raises(KernelgenError, match="not one of the library"):
        subject_named("rows", "softmax_f32_00000000")


@pytest.mark.parametrize("name", library.NAMES)
def test_the_gate_knows_right_from_wrong(name: str) -> None:
    """Of everything in the library, and in the last of the rows that are there over and over."""
    target = targets.get("numpy")
    runtime = target.runtime()
    problem = MapProblem.of(name, "f16", 70, 40, Asked())
    case = gate.case(problem)
    kernel = generate_walk(space.walks(target, problem)[0], problem.subject, target)
    run = case.runner(runtime, kernel)
    right = gate.judge(kernel, run, runtime, target, case)
    assert right.kind is None and right.error <= right.bound

    def wrong(arrays: Any, m: int, n: int, outputs: dict[str, Any]) -> None:
        run(arrays, m, n, outputs)
        last = outputs[next(reversed(outputs))].reshape(-1)
        last[-1] = last[-1] + 77 if last.dtype == np.int32 else 0x12 << 8 * (last.itemsize - 1)

    assert gate.judge(kernel, wrong, runtime, target, case).kind == "wrong"

    def silent(*given: object) -> None:
        """Writes nothing."""

    assert gate.judge(kernel, silent, runtime, target, case).kind in ("nan", "wrong")


def test_tunes_and_is_used() -> None:
    if targets.get("c").runtime().available() is not None:
        pytest.skip("needs a C compiler")
    flags = ["--target", "c", "--op", "silu", "--shape", "24x333", "--budget", "20"]
    done = CliRunner().invoke(app, ["tune", *flags])
    assert done.exit_code == 0, done.output
    (entry,) = cache.entries()
    problem = MapProblem.of("silu", "f32", 24, 333, Asked())
    assert entry.key.format == problem.name and entry.key.shape == (1, 24 * 333)
    said = CliRunner().invoke(app, ["explain", "silu", "f32", "--shape", "24x333",
                                    "--target", "c"])  # fmt: skip
    assert said.exit_code == 0 and "exact" in said.output and "fallback" not in said.output
    target = targets.get("c")
    chosen = lookup.choose_for(target, target.runtime(), dataclasses.replace(problem, n=10_000))
    assert chosen.rule == lookup.NEAREST and chosen.config.as_dict() == entry.config
    found = CliRunner().invoke(app, ["cache", "list"])
    assert "stale" not in found.output and "silu" in found.output
    assert not kernelgen.silu(np.zeros((24, 333), np.float32), target="c").any()


def test_functions_take_what_was_tuned(monkeypatch: pytest.MonkeyPatch) -> None:
    """They ask once for all arrays of about the same size."""
    target, seen = targets.get("numpy"), []
    choose = lookup.choose_for

    def spy(manifest: Any, runtime: Any, problem: Any) -> Any:
        seen.append(problem)
        return choose(manifest, runtime, problem)

    monkeypatch.setattr(lookup, "choose_for", spy)
    kernelgen.softmax(np.zeros((24, 333), np.float32), target=target.name)
    kernelgen.softmax(np.zeros((20, 300), np.float32), target=target.name)  # of the same bucket
    assert [(one.kind, one.shape) for one in seen] == [(SOFTMAX.kind, (32, 512))]


X = np.ones((6, 128), np.float32)
CALLS: dict[str, Callable[..., Any]] = {
    "add": lambda **o: kernelgen.add(X, X, **o), "mul": lambda **o: kernelgen.mul(X, X, **o),
    **{name: lambda name=name, **o: getattr(kernelgen, name)(X, **o)
       for name in ("relu", "sigmoid", "tanh", "silu", "gelu", "softmax", "argmax", "rope")},
    "gelu_tanh": lambda **o: kernelgen.gelu(X, "tanh", **o),
    "swiglu": lambda **o: kernelgen.swiglu(X, X, **o),
    "geglu": lambda **o: kernelgen.geglu(X, X, **o),
    **{f"cast_{to}": lambda to=to, **o: kernelgen.cast(X, to, **o)
       for to in ("f32", "f16", "bf16", "f8_e4m3", "f8_e5m2")},
    "rope_neighbours": lambda **o: kernelgen.rope(X, pairing="neighbours", **o),
    "softmax_mask": lambda **o: kernelgen.softmax(X, mask=X > 0, sinks=X[:, 0], **o),
    "rms_norm": lambda **o: kernelgen.rms_norm(X, X[0], **o),
    "rms_norm_residual": lambda **o: kernelgen.rms_norm(X, X[0], residual=X, **o),
    "layer_norm": lambda **o: kernelgen.layer_norm(X, X[0], X[0], **o),
    "sum": lambda **o: kernelgen.row_sum(X, **o), "max": lambda **o: kernelgen.row_max(X, **o),
    "min": lambda **o: kernelgen.row_min(X, **o), "top8": lambda **o: kernelgen.topk(X, 8, **o),
}  # fmt: skip


@pytest.mark.parametrize("name", library.NAMES)
def test_functions_run_what_is_tuned_by_their_name(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that what `tune --op` found is what they look up."""
    seen = []
    runner = api_maps._runner

    def spy(target: str, kind: Any, *sizes: int) -> Any:
        seen.append(kind)
        return runner(target, kind, *sizes)

    monkeypatch.setattr(api_maps, "_runner", spy)
    CALLS[name](target="numpy")
    assert seen == [MapProblem.of(name, "f32", 6, 128, Asked()).kind]


def test_a_map_of_the_users_own_can_be_tuned() -> None:
    kind = maps.trace(lambda x, y: f.silu(x) * y + 1.0, (
        library.one_row("x"), library.one_row("y", "f16")), ("f32",), "own")  # fmt: skip
    problem = MapProblem(kind, 1, 70_001)
    target = targets.get("numpy")
    case, kernel = gate.case(problem), generate_walk(target.walk("map", kind), kind, target)
    verdict = gate.judge(
        kernel, case.runner(target.runtime(), kernel), target.runtime(), target, case
    )
    assert verdict.kind is None and problem.nbytes == 70_001 * 10

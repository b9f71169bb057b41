"""Attention in the tuner: problems, entries, and what kernelgen.attention makes of these."""

from __future__ import annotations

import dataclasses
import pickle

import numpy as np
import pytest
from typer.testing import CliRunner

import kernelgen
from kernelgen import api_attention, targets
from kernelgen.cli import app
from kernelgen.errors import KernelgenError
from kernelgen.generate import generate_walk
from kernelgen.ir import formats
from kernelgen.ir.ops.attention import Attention, causal, operand, trace
from kernelgen.tuner import cache, gate, lookup, space
from kernelgen.tuner.problems import AttentionProblem, MatmulProblem, subject_named

F16 = formats.get("f16")
KIND = Attention(64, F16, F16, mask=trace(None, causal)[1], label="causal")
ONE = AttentionProblem(KIND, 1, 4, 2, 1, 300, precision="fp32")


@pytest.fixture(autouse=True)
def _nothing_is_chosen_yet() -> None:
    api_attention._runner.cache_clear()


def test_a_problem_says_what_it_is() -> None:
    assert ONE.op == "attention" and ONE.rows == 1 and ONE.shape == (1, 4, 2, 1, 300)
    assert ONE.name == "d64_f16"  # entries apply to every mask
    assert ONE.nbytes == 2 * 300 * 2 * 64 * 2
    assert "--op attention" in ONE.flags and "1x4x2x1x300x64" in ONE.flags
    assert pickle.loads(pickle.dumps(ONE)) == ONE


def test_shapes_are_near_or_not() -> None:
    assert ONE.apart(ONE.shape) == 0
    assert ONE.apart((1, 4, 2, 1, 600)) == 1
    assert ONE.apart((1, 4, 2, 1, 6000)) is None  # far more keys
    assert ONE.apart((1, 4, 2, 7, 300)) is None  # decoding tells nothing of prefill
    assert ONE.apart((1, 4096, 4096)) is None
    many = dataclasses.replace(ONE, queries=100)
    assert many.apart((1, 4, 2, 128, 300)) == 0


def test_names_of_entries_are_read_back() -> None:
    mixed = Attention(128, formats.get("q8_0"), formats.get("q4_K"), 256)
    for kind in (KIND, mixed):
        like = dataclasses.replace(ONE, kind=kind).like
        assert subject_named("attention", like.name) == like
    assert subject_named("matmul", "q4_K") is formats.get("q4_K")
    with pytest.raises(KernelgenError, match="formats that are not known"):
        subject_named("attention", "d64_q9_9")


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(KernelgenError, match="cannot share"):
        dataclasses.replace(ONE, heads=5)
    with pytest.raises(KernelgenError, match="above 0"):
        dataclasses.replace(ONE, keys=0)
    bias = operand("bias", "f32", 1)
    reads = dataclasses.replace(KIND, operands=(bias,))
    with pytest.raises(KernelgenError, match="reads bias"):
        dataclasses.replace(ONE, kind=reads)


@pytest.mark.parametrize("options", [{}, {"sinks": True}, {"page": 16}, {"lengths": True}])
def test_the_gate_knows_right_from_wrong(options: dict[str, int]) -> None:
    target = targets.get("numpy")
    runtime = target.runtime()
    problem = dataclasses.replace(ONE, kind=dataclasses.replace(KIND, **options), keys=77)
    case = gate.case(problem)
    kernel = generate_walk(space.walks(target, problem)[0], problem.subject, target)
    run = case.runner(runtime, kernel)
    right = gate.judge(kernel, run, runtime, target, case)
    assert right.kind is None and right.error < 1e-6 and 0 < right.rms_error < 1e-6

    def wrong(*given: object) -> None:
        run(*given)
        given[-1][0, 0, -1, 5] *= 1.03  # type: ignore[index]

    assert gate.judge(kernel, wrong, runtime, target, case).kind == "wrong"

    def silent(*given: object) -> None:
        """Writes nothing."""

    assert gate.judge(kernel, silent, runtime, target, case).kind == "nan"


def test_tunes_and_is_used() -> None:
    if targets.get("c").runtime().available() is not None:
        pytest.skip("needs a C compiler")
    flags = ["--target", "c", "--op", "attention", "--format", "f16", "--shape", "1x4x2x1x300x64"]
    done = CliRunner().invoke(app, ["tune", *flags, "--precision", "fp32", "--budget", "20"])
    assert done.exit_code == 0, done.output
    (entry,) = cache.entries()
    assert entry.key.format == "d64_f16" and dict(entry.key.sizes)["S"] == 300
    assert cache.parse(cache.dumps(entry)) == entry
    said = CliRunner().invoke(app, ["explain", "attention", "f16", "--shape", "1x4x2x1x300x64",
                                    "--target", "c", "--precision", "fp32"])  # fmt: skip
    assert said.exit_code == 0 and "exact" in said.output, said.output
    # another mask, a little more keys: the nearest shape serves
    target = targets.get("c")
    near = dataclasses.replace(ONE, kind=Attention(64, F16, F16), keys=512)
    assert lookup.choose_for(target, target.runtime(), near).rule == lookup.NEAREST
    q = np.ones((1, 4, 1, 64), np.float32)
    k = np.ones((1, 2, 400, 64), np.float16)
    assert np.allclose(kernelgen.attention(q, k, k, window=7, target="c"), 1)


def test_matmul_problems_are_told_apart_from_attention() -> None:
    flags = ["explain", "matmul", "q4_K", "--shape", "1x2x3x4x5x6"]
    assert CliRunner().invoke(app, flags).exit_code != 0
    assert MatmulProblem(formats.get("q4_K"), 1, 8, 256).flags == "--format q4_K --shape 1x8x256"

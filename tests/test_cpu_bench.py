"""bench/cpu.py: its limits, rivals and report; ggml's part where a build of it is at hand."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from bench import cpu_report, llama_bench
from bench.cpu_limits import Limits
from bench.cpu_rivals import AbsentError, Problem, Product, Rival, Ways, rivals
from bench.cpu_worker import Worker
from bench.ggml import Ggml, GgmlError, products
from kernelgen.bench import in_turns
from kernelgen.ir import formats
from kernelgen.targets.c.compiler import find_compiler
from kernelgen.verify import sample_weights

K = 512

needs_compiler = pytest.mark.skipif(isinstance(find_compiler(), str), reason="no C compiler")
#: folders of builds, of llama.cpp and of ik_llama.cpp, for the slow tests
BUILDS = {name: os.environ.get(name, "") for name in ("LLAMA_CPP_BUILD", "IK_LLAMA_CPP_BUILD")}


def problem(name: str = "q4_K", ms: tuple[int, ...] = (1, 5)) -> Problem:
    fmt = formats.get(name)
    blocks = sample_weights(fmt, 8, K).reshape(8, -1)
    return Problem(
        64, fmt.decode(blocks.reshape(8, -1, fmt.nbytes)).reshape(8, K), ms, name, blocks
    )


@needs_compiler
def test_limits_do_what_is_timed() -> None:
    limits = Limits()
    nbytes = 64 * 24 * limits.threads()
    data = np.random.default_rng(0).integers(0, 2**63, nbytes // 8, np.uint64)
    expected = int(np.bitwise_xor.reduce(data))
    for streams in (1, 2, 4):  # of threads' shares that they divide, all bytes are read
        for ahead in (0, 24):
            assert limits._library.read_all(_aligned(data), nbytes, streams, ahead) == expected
    for read in limits.reads(1 << 16).values():
        assert isinstance(read(), int)
    found = limits.operations(turns=1)
    assert all(value > 0.1 for value in found.values())


def _aligned(data: np.ndarray) -> int:
    global _kept
    _kept = np.empty(data.nbytes + 64, np.uint8)
    start = -_kept.ctypes.data % 64
    _kept[start : start + data.nbytes] = data.view(np.uint8)
    return int(_kept.ctypes.data + start)


def test_the_error_of_a_result_is_seen() -> None:
    one = problem()
    right = one.x[5] @ one.spread(one.rows).T
    assert one.error(5, right) < 1e-6
    assert one.error(5, np.roll(right, 1, axis=1)) > 0.5


@pytest.mark.parametrize("name", ["kernelgen", "numpy float32", "torch bfloat16", "torch int8",
                                  "torch int4"])  # fmt: skip
def test_rivals_multiply(name: str) -> None:
    """Here, in this process, as ways; what is not installed is said."""
    rival = next(one for one in rivals([], []) if one.name == name)
    one = problem()
    if name.startswith("torch"):
        pytest.importorskip("torch")
    for way, by_m in rival.make(one).items():
        for m, product in by_m.items():
            product.run()
            assert one.error(m, product.result()) <= rival.error, (way, m)


@pytest.mark.parametrize("name", ["onnxruntime int8", "onnxruntime int4", "OpenVINO int8",
                                  "OpenVINO int4"])  # fmt: skip
def test_engines_multiply_or_say_why_not(name: str) -> None:
    rival = next(one for one in rivals([], []) if one.name == name)
    one = problem()
    try:
        ways = rival.make(one)
    except AbsentError as error:
        assert "is not installed" in str(error)
        pytest.skip(str(error))
    for way, by_m in ways.items():
        for m, product in by_m.items():
            product.run()
            assert one.error(m, product.result()) <= rival.error, (way, m)


def test_each_call_multiplies_the_next_copy_of_the_weights() -> None:
    called: list[int] = []

    def make(problem: Problem) -> Ways:
        number = made.append(problem) or len(made)
        x = problem.x[5]
        return {
            "way": {5: Product(lambda: called.append(number), lambda: np.full((1, 1), number))},
            "other": {5: Product(lambda: called.append(-number), lambda: x)},
        }

    made: list[Problem] = []
    one = dataclasses.replace(
        problem(ms=(5,)), memory=2 * 64 * K * 9 // 16 + 1
    )  # of q4_K: 4.5 bits
    ways = Rival("many", True, 0, 0.0, make).made(one)
    assert len(made) == 3 and all(copy.w is not one.w for copy in made)
    assert sorted(called) == [-3, -2, -1, 1, 2, 3]  # each was called once, to pack
    called.clear()
    product = ways["way"][5]
    for turn in range(5):
        product.run()
        assert product.result() == called[-1] == turn % 3 + 1
    assert called == [1, 2, 3, 1, 2]


@needs_compiler
def test_parts_of_memory_are_read_in_turn() -> None:
    limits, nbytes = Limits(), 64 * 24
    seen: list[int] = []
    limits._library = SimpleNamespace(read_all=lambda address, *rest: seen.append(address) or 0)
    read = next(iter(limits.reads(nbytes, 2 * nbytes + 1).values()))
    for _ in range(4):
        read()
    assert [at - seen[0] for at in seen] == [0, nbytes, 2 * nbytes, 0] and seen[0] % 64 == 0


def test_builds_that_are_not_there_are_named(tmp_path: Path) -> None:
    with pytest.raises(GgmlError, match="has no library of ggml; give the folder of a build"):
        Ggml(tmp_path, 1)
    llama = next(one for one in rivals([tmp_path], []) if one.name == "llama.cpp")
    with pytest.raises(AbsentError, match="has no library"):
        llama.make(problem())
    none = next(one for one in rivals([], []) if one.name == "ik_llama.cpp")
    with pytest.raises(AbsentError, match=r"no build of ik_llama\.cpp was given"):
        none.make(problem())


def _crashes(problem: Problem) -> Any:
    os._exit(7)


def test_a_worker_multiplies_and_its_end_is_said() -> None:
    numpy = next(one for one in rivals([], []) if one.name == "numpy float32")
    worker, other = Worker(numpy), Worker(Rival("other", True, 0, 0.0, _crashes))
    try:
        assert worker.make(problem()) == ["matmul"]
        assert worker.best(5).way == "matmul"
        assert worker.burst(5, "matmul")
        with pytest.raises(AbsentError, match="no way called plain"):
            worker.best(5, "plain")
        with pytest.raises(AbsentError, match="ended with status 7"):
            other.make(problem())
    finally:
        worker.close()
        other.close()


def test_turns_alternate() -> None:
    order: list[str] = []

    def burst(name: str) -> Any:
        return lambda: order.append(name) or [1.0, 2.0]

    times = in_turns({"a": burst("a"), "b": burst("b")}, 2, 0.0)
    assert order == ["a", "b", "b", "a"]
    assert times["a"].samples == (1.0, 2.0, 1.0, 2.0)


# ---- report ---------------------------------------------------------------------------------


def record(name: str, m: int, seconds: float, fmt: str = "q4_K", **more: Any) -> dict[str, Any]:
    return {
        "what": "time", "format": fmt, "bits": 4.5, "n": 64, "k": K, "m": m, "nbytes": 9000,
        "name": name, "way": "", "seconds": seconds, "least": seconds, "calls": 1, "trial": False,
        "same": name in ("kernelgen", "llama.cpp", "llama.cpp unpacked", "read"), "error": 0.0,
        **more,
    }  # fmt: skip


RECORDS = [
    record("read", 0, 0.9),
    *(record("kernelgen", m, s) for m, s in ((1, 1.0), (2, 1.2), (8, 2.0), (128, 10.0))),
    record("llama.cpp", 1, 2.0), record("other", 1, 1.1),
    record("llama.cpp unpacked", 8, 9.0),
    record("llama.cpp", 128, 20.0), record("other", 128, 5.0), record("numpy float32", 128, 24.0),
]  # fmt: skip


def test_what_was_asked_is_judged() -> None:
    found = {one.said: one for one in cpu_report.asked(cpu_report.Times(RECORDS))}
    met = {said: one.met for said, one in found.items()}
    assert met["M=1: at least 1.25 times the best rival of the same blocks"] is True
    assert met["M=1: at least 1.25 times the best rival"] is False
    assert met["M=1: at least 0.8 of reading for each format of 4.5 bits or more"] is True
    assert met["M=2: at most 1.3 times the time of M=1"] is True
    assert met["M=4: at most 1.3 times the time of M=1"] is None
    assert met["M=8: at least 4 times ggml's own operation, weights as they are"] is True
    assert met["M=128: at least 1.5 times the best rival of the same blocks (aim 1.9)"] is True
    assert met["M=128: at least 1.5 times the best rival (aim 1.9)"] is False
    assert met["M=128: at least 2.5 times numpy's float32 (aim 3.3)"] is False
    assert found["M=1: at least 1.25 times the best rival"].seen.startswith("1.10 on average")
    worse = [*RECORDS, record("read", 0, 0.7), record("kernelgen", 2, 1.4)]
    met = {one.said: one.met for one in cpu_report.asked(cpu_report.Times(worse))}
    assert met["M=1: at least 0.8 of reading for each format of 4.5 bits or more"] is False
    assert met["M=2: at most 1.3 times the time of M=1"] is False


def test_the_table_and_the_figure(tmp_path: Path) -> None:
    shown = cpu_report.text(
        [*RECORDS, {"what": "absent", "name": "ik", "why": "no", "n": 1, "k": 2}]
    )
    assert "| q4_K | 9e-06 | 0.90 | 1000 | 1200 | 2000 | 10000 |" in shown
    assert "| q4_K | 2.00 llama.cpp, 1.10 other |  | 4.50 llama.cpp unpacked |" in shown
    assert "ik, 1 x 2: not measured, no" in shown
    assert "| numpy float32 |  |  |  | 2.40 |" in shown
    pytest.importorskip("matplotlib")
    cpu_report.draw(RECORDS, tmp_path / "one.svg")
    assert "<svg" in (tmp_path / "one.svg").read_text()
    assert math.isnan(cpu_report.geomean([])) and cpu_report.geomean([1, 4]) == pytest.approx(2)


@pytest.mark.slow
def test_the_command(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    done = subprocess.run(
        [sys.executable, "-m", "bench.cpu", "--formats", "q8_0", "--shapes", "64x512", "--rows",
         "1", "8", "--repeats", "1", "--out", str(out), "--figure", str(tmp_path / "a.svg")],
        capture_output=True, text=True, check=False, cwd=Path(__file__).parent.parent,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert {r["name"] for r in records if r["what"] == "time"} >= {"kernelgen", "numpy float32"}
    assert {r["name"] for r in records if r["what"] == "absent"} >= {"llama.cpp, q8_0"}
    assert "What was asked" in done.stdout


# ---- with builds ----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("variable", BUILDS)
def test_ggml_computes_the_same(variable: str) -> None:
    """Every format of the issue, in every way of the library; repacked ones among them."""
    if not BUILDS[variable]:
        pytest.skip(f"{variable} does not say where a build is")
    library = Ggml(Path(BUILDS[variable]), 2)
    assert library.is_ik == (variable == "IK_LLAMA_CPP_BUILD")
    ways: set[str] = set()
    for name in ("q2_K", "q3_K", "q4_K", "q5_K", "q6_K", "q4_0", "q4_1", "q5_0", "q5_1", "q8_0",
                 "iq4_nl", "mxfp4"):  # fmt: skip
        one = problem(name, (1, 2, 8, 40))
        for way, graphs in products(library, name, one.w.data, one.x).items():
            ways.add(way)
            for m, graph in graphs.items():
                graph.run()
                error = one.error(m, graph.result().reshape(m, one.n))
                assert error <= 0.02, (name, way, m, error)
    assert "plain" in ways and len(ways) > 1


# ---- llama-bench ----------------------------------------------------------------------------


def test_models_in_turns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    program = tmp_path / "llama-bench"
    program.write_text(
        "#!/bin/sh\necho '[{\"n_prompt\": 512, \"n_gen\": 0, \"avg_ts\": 50.0},"
        " {\"n_prompt\": 0, \"n_gen\": 16, \"avg_ts\": 5.0}]'\n"
    )  # fmt: skip
    program.chmod(0o755)
    model = tmp_path / "model.gguf"

    def run(of: Path) -> Any:
        return lambda: llama_bench.theirs(of, [], model, 2, 512, 16)

    mine = {"kernelgen": lambda: {"pp512": 100.0, "tg16": 4.0}}
    found = llama_bench.in_turns(
        {**mine, "llama.cpp": run(program), "missing": run(tmp_path / "none")}, 2
    )
    assert found == {"kernelgen": {"pp512": 100.0, "tg16": 4.0},
                     "llama.cpp": {"pp512": 50.0, "tg16": 5.0}}  # fmt: skip
    assert "missing is left out" in capsys.readouterr().err
    table = llama_bench.shown(found, "")
    assert list(table.columns[2].cells) == ["50.0 (2.00x)", "5.0 (0.80x)"]

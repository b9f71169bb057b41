"""What `kernelgen accuracy` measures, and that it measures that."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from typer.testing import CliRunner

import kernelgen
from kernelgen import accuracy
from kernelgen.cli import app
from kernelgen.errors import TargetError
from kernelgen.ir import formats

Array = npt.NDArray[Any]

Q8, Q4, F16 = (formats.get(name) for name in ("q8_0", "q4_0", "f16"))


def test_errors_are_split_and_relative() -> None:
    exact = np.random.default_rng(0).standard_normal((8, 64))
    away = np.random.default_rng(1).standard_normal((2, 8, 64))
    away /= np.sqrt(np.mean(away**2, axis=(1, 2), keepdims=True) / np.mean(exact**2))
    same = exact + 0.03 * away[0]
    got = (same + 0.004 * away[1]).astype(np.float32)
    found = accuracy._measured("matmul", Q8, "int8", "normal", 64, exact, same, got)
    assert found.own == pytest.approx(0.03, rel=1e-6)
    assert found.added == pytest.approx(0.004, rel=1e-4)
    assert found.total == pytest.approx(np.hypot(0.03, 0.004), rel=0.02)
    wide = got.astype(np.float64)
    cosine = np.sum(exact * wide) / np.linalg.norm(exact) / np.linalg.norm(wide)
    assert found.distance == pytest.approx(1 - cosine, rel=1e-6)
    unknown = accuracy._measured("w", Q8, "int8", "normal", 64, None, same, got)
    assert unknown.own is unknown.total is unknown.distance is None
    assert unknown.added == pytest.approx(0.004, rel=1e-2)


def test_outliers_are_a_few_large_columns() -> None:
    x = accuracy._activations("outliers", 64, 400)
    size = np.sqrt(np.mean(x**2, axis=0))
    assert np.count_nonzero(size > 8) == 4
    assert np.sqrt(np.mean(np.sort(size)[:-4] ** 2)) == pytest.approx(1, rel=0.05)


def test_products_are_compared_with_weights_before_and_after() -> None:
    results = list(accuracy.products("numpy", [Q4, F16], ["fp32", "int8"], (32, 64), rows=16))
    assert {(r.format, r.precision) for r in results} == {
        ("q4_0", "fp32"), ("q4_0", "int8"), ("f16", "fp32"),  # floats have no integer product
    }  # fmt: skip
    for one in results:
        w = accuracy._weights(one.data, 16, one.k)
        x = accuracy._activations(one.data, 16, one.k)
        tensor = kernelgen.quantize(w, one.format)
        exact, same = (x.astype(np.float64) @ v.astype(np.float64).T
                       for v in (w, tensor.dequantize()))  # fmt: skip
        own = np.linalg.norm(same - exact) / np.linalg.norm(exact)
        assert one.own == pytest.approx(own, rel=1e-6)
        assert one.total is not None and one.total <= own + one.added * 1.001
        assert one.added < 1e-6 if one.precision == "fp32" else 1e-4 < one.added < 0.1


def test_positions_turn_heads_by_differences_alone() -> None:
    head = np.random.default_rng(0).standard_normal((1, 1, 1, 64))
    there = accuracy._rotate(np.repeat(head, 12, axis=2))[0, 0]
    scores = there @ there.T
    for shift in (1, 5):
        np.testing.assert_allclose(np.diagonal(scores, shift), scores[0, shift], rtol=1e-9)
    assert abs(scores[0, 5] - scores[0, 0]) > 1


def test_a_layer_is_computed_by_kernels_as_by_formulas() -> None:
    results = list(accuracy.layers("numpy", [Q8], ["fp32"]))
    assert [r.data for r in results] == list(accuracy.DATA)
    for one in results:
        assert one.added < 5e-6
        assert one.own is not None and 1e-3 < one.own < 0.1


def test_a_layer_looks_back_only() -> None:
    values, _ = accuracy._layer_weights(Q8, "normal")
    by = accuracy.exactly(values)
    norms = {name: np.ones(512, np.float32) for name in ("attention", "inner")}
    x = accuracy._activations("normal", 6, 512).astype(np.float64)
    changed = x.copy()
    changed[4] += 1
    before, after = (accuracy.forward(one, norms, by) for one in (x, changed))
    np.testing.assert_array_equal(before[:4], after[:4])
    assert np.all(np.abs(before[4:] - after[4:]).max(axis=1) > 1e-6)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    rng = np.random.default_rng(3)
    plain = rng.standard_normal((5, 64), np.float32)
    path = tmp_path / "small.gguf"
    tensors = {"plain": plain, "blocks": kernelgen.quantize(plain, "q8_0"), "vector": plain[0]}
    kernelgen.save(path, tensors)
    return path


def test_matrices_of_a_file(model: Path) -> None:
    results = list(accuracy.of_model("numpy", kernelgen.open(model), [Q4, Q8], ["fp32"]))
    plain = [r for r in results if r.what == "plain"]
    assert {r.format for r in plain} == {"q4_0", "q8_0"}
    assert all(r.own is not None and r.own > 1e-3 for r in plain)
    blocks = [r for r in results if r.what == "blocks"]
    assert {(r.format, r.own) for r in blocks} == {("q8_0", None)}
    assert len(results) == len(plain) + len(blocks)


def _run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["accuracy", "--target", "numpy", *arguments])


def test_the_command_prints_tables_and_data_and_draws(tmp_path: Path) -> None:
    svg, page = tmp_path / "a.svg", tmp_path / "a.html"
    shown = _run("--format", "q4_0", "--columns", "32,64", "--no-layer", "--precision", "fp32",
                 "--svg", str(svg), "--html", str(page))  # fmt: skip
    assert shown.exit_code == 0, shown.output
    assert "q4_0" in shown.output and "K = 64" in shown.output
    assert "q4_0" in svg.read_text() and svg.read_text().rstrip().endswith("</svg>")
    assert page.read_text().count("<td class=name>q4_0") == 4
    told = _run("--format", "q4_0", "--columns", "32", "--no-layer", "--json")
    entries = json.loads(told.stdout)
    assert {e["precision"] for e in entries} == {"fp32", "int8"}
    assert {e["k"] for e in entries} == {32}


def test_the_command_reads_a_file(model: Path) -> None:
    told = _run("--model", str(model), "--format", "q8_0", "--precision", "int8", "--json")
    assert {e["what"] for e in json.loads(told.stdout)} == {"plain", "blocks"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--precision", "fp8"), "allowed are fp32, fp16, bf16, int8"),
        (("--precision", "fp16", "--format", "q4_0"), "multiplies in"),
        (("--columns", "many"), "write numbers"),
        (("--columns", "33", "--format", "q4_0"), "multiples of 256 suit all"),
        (("--model", "/nowhere.gguf"), "nowhere.gguf"),
    ],
)
def test_the_command_refuses_in_one_sentence(arguments: tuple[str, ...], said: str) -> None:
    result = _run(*arguments)
    assert result.exit_code == 1
    assert said in " ".join(result.output.split())


def test_a_figure_wants_matplotlib(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = _run("--svg", str(tmp_path / "a.svg"))
    assert result.exit_code == 1 and "kernelgen[plot]" in " ".join(result.output.split())
    with pytest.raises(TargetError, match="multiplies in"):
        accuracy.precisions("numpy", Q8, ["fp16"])

"""Maps and row reductions on the command line."""

from __future__ import annotations

import json
from pathlib import Path

from kernelgen.ir.ops import library
from tests.test_cli import error_of, json_of, run


def test_list_names_the_library() -> None:
    text = run("list", "--target", "numpy").stdout
    assert "map, run: add, mul" in text and "rows, run: softmax" in text
    cells = [c for c in json_of("list", "--target", "numpy") if c["op"] in ("map", "rows")]
    assert {c["format"] for c in cells} == set(library.NAMES)
    assert all(c["op"] not in ("map", "rows") for c in json_of("list", "--format", "q4_0"))


def test_show_prints_a_kernel() -> None:
    assert "def map_silu_f32" in run("show", "map", "silu", "--target", "numpy").stdout
    assert (
        "threads=64"
        in run("show", "rows", "Softmax", "--target", "wgsl", "--config", "threads=64").stdout
    )
    assert "softmax is one of rows" in error_of("show", "map", "softmax")
    assert "known maps and row reductions are" in error_of("show", "map", "q4_0")
    assert "decodes nothing" in error_of("show", "rows", "softmax", "--ir")


def test_build_writes_the_library(tmp_path: Path) -> None:
    for target in ("opencl", "triton"):
        run("build", "--target", target, "--op", "map,rows", "--out", tmp_path)
        folder = tmp_path / target
        entries = json.loads((folder / "manifest.json").read_text())["kernels"]
        assert len(entries) == len(library.NAMES)
        assert all(one["entry"] in (folder / one["file"]).read_text() for one in entries)
        top = next(one for one in entries if one.get("label") == "top8")
        shapes = {a["name"]: a["shape"] for a in top["arguments"]}
        assert shapes["places"] == ["ROWS", "8"] and top["outputs"]["places"]["type"] == "i32"


def test_verify_runs_the_library() -> None:
    found = json_of("verify", "--target", "numpy", "--format", "q4_0", "--op", "rows,map")
    assert {one["op"] for one in found} == {"map", "rows"} and all(one["ok"] for one in found)
    assert len(found) == 3 * len(library.NAMES)

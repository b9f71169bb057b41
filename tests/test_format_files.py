"""Commands take a file that describes a format where they take a format's name."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from kernelgen.cli import format_files
from kernelgen.ir import formats
from kernelgen.starter import starter
from tests.test_cli import error_of, json_of, run

TWO = """
from kernelgen.ir import BlockFormat
def made(name, bias):
    return BlockFormat(name=name, block=32, group=32, nbytes=34, fields={"d": "f16", "q": "u8[32]"},
                       code=lambda b, i: b.q[i], scale=lambda b, g: b.d, bias=bias)
FIRST, SECOND = made("first_of_two", 0), made("second_of_two", 128)
AGAIN = FIRST
"""


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    (tmp_path / "mine.py").write_text(starter("Mine_Four"), "utf-8")
    (tmp_path / "two.py").write_text(TWO, "utf-8")
    (tmp_path / "none.py").write_text("x = 1\n", "utf-8")
    (tmp_path / "fails.py").write_text("import nothing_of_this_name\n", "utf-8")
    (tmp_path / "wrong.py").write_text(
        starter("Mine_Wrong").replace("nbytes=18", "nbytes=19"), "utf-8"
    )
    yield tmp_path
    for name in ("mine_four", "first_of_two", "second_of_two"):
        if name in (fmt.name.lower() for fmt in formats.formats()):
            formats.unregister(name)
    format_files._loaded.clear()


def test_commands_take_the_file(folder: Path) -> None:
    path = folder / "mine.py"
    results = json_of("verify", "--format", path, "--target", "numpy", "--op", "matvec")
    assert {one["format"] for one in results} == {"Mine_Four"} and all(r["ok"] for r in results)
    cells = json_of("list", "--target", "c", "--format", f"{path},q4_0")
    assert {cell["format"] for cell in cells} == {"Mine_Four", "q4_0"}
    assert "Mine_Four" in run("show", "dequantize", path, "--target", "numpy").stdout
    run("vectors", "--format", path, "--out", folder / "made")
    assert json.loads((folder / "made" / "Mine_Four.json").read_text("utf-8"))["nbytes"] == 18


def test_a_file_of_several(folder: Path) -> None:
    path = folder / "two.py"
    cells = json_of("list", "--target", "numpy", "--format", path)
    assert {cell["format"] for cell in cells} == {"first_of_two", "second_of_two"}
    said = error_of("show", "matvec", path)
    assert "describes first_of_two, second_of_two; one is wanted here" in said


def test_files_that_do_not_serve(folder: Path) -> None:
    def said(name: str) -> str:
        return error_of("list", "--format", folder / name)

    assert "could not be read: No such file or directory" in said("missing.py")
    assert "describes no format" in said("none.py")
    assert "raised ModuleNotFoundError: No module named 'nothing_of_this_name'" in said("fails.py")
    assert "fields take 18 bytes, but nbytes says 19" in said("wrong.py")

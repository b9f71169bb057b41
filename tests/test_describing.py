"""For those who describe a format, and those who decode one: starting files, packages, vectors."""

from __future__ import annotations

import ast
import json
import os
import pickle
import re
import statistics
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from kernelgen import targets
from kernelgen.cli import app
from kernelgen.errors import FormatError
from kernelgen.files import contents, kernels
from kernelgen.ir import formats
from kernelgen.ir.block import BlockFormat
from kernelgen.ir.encode import code_index, code_table
from kernelgen.ir.evaluate import evaluate
from kernelgen.ir.expr import U32, Table, const, negate, table, var
from kernelgen.starter import starter
from kernelgen.vectors import RANDOM, vectors
from tests.test_formats_in_planes import ONE_OF_EACH

ROOT = Path(__file__).resolve().parent.parent


def run(*args: str) -> Any:
    return CliRunner().invoke(app, args)


# ---- vectors -----------------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", formats.FORMATS, ids=lambda fmt: fmt.name)
def test_vectors_fit_together(fmt: BlockFormat) -> None:
    found = vectors(fmt)
    n = len(found["blocks"])
    assert n > RANDOM and all(len(one) == n for one in found.values())
    assert np.isfinite(found["values"]).all()
    assert set(found) >= {"blocks", "case", "values"}
    if fmt.float_codes:
        return
    each = found["codes"] - fmt.bias
    scale = np.repeat(found.get("scales", np.ones((n, fmt.groups), np.float32)), fmt.group, axis=1)
    again = scale * each.astype(np.float32)
    if fmt.offset is not None:
        again = again + np.repeat(found["offsets"], fmt.group, axis=1)
    assert np.array_equal(again.view(np.uint32), found["values"].view(np.uint32))


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_vectors_of_planes(name: str) -> None:
    """Of floats, too, hardly a random block is left out, and all numbers come up."""
    fmt = formats.get(name)
    found = vectors(fmt)
    assert (found["case"] == "random").sum() > 0.9 * RANDOM
    assert np.isfinite(found["values"]).all()
    assert np.array_equal(fmt.decode(found["blocks"]).view(np.uint32),
                          found["values"].view(np.uint32))  # fmt: skip
    numbers = code_table(fmt) if fmt.float_codes else None
    if numbers is not None:
        stored = evaluate(code_index(fmt, var("i", fmt.block)), {"i": np.arange(fmt.block)},
                          fmt.split(found["blocks"]))  # fmt: skip
        assert set(np.unique(stored)) >= set(np.flatnonzero(np.isfinite(numbers)).tolist())


@pytest.mark.parametrize("name", ["q4_0", "iq2_xxs", "iq1_m", "mxfp4"])
def test_every_bit_of_a_block_changes_some_vector(name: str) -> None:
    """A decoder that takes a bit from another place gives other values."""
    fmt = formats.get(name)
    found = vectors(fmt)
    few = 6
    bits = np.repeat(np.arange(8 * fmt.nbytes), few)
    flipped = np.tile(found["blocks"][:few], (8 * fmt.nbytes, 1))
    flipped[np.arange(len(bits)), bits // 8] ^= (1 << (bits % 8)).astype(np.uint8)
    values = np.tile(found["values"][:few], (8 * fmt.nbytes, 1))
    changed = (fmt.decode(flipped).view(np.uint32) != values.view(np.uint32)).any(axis=1)
    assert changed.reshape(-1, few).any(axis=1).all()


def test_vectors_are_written(tmp_path: Path) -> None:
    result = run("vectors", "--format", "iq1_m,q4_K", "--out", str(tmp_path))
    assert result.exit_code == 0, result.output
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "iq1_m.json", "iq1_m.npz", "q4_K.json", "q4_K.npz",
    ]  # fmt: skip
    fmt = formats.get("iq1_m")
    with np.load(tmp_path / "iq1_m.npz") as found:
        assert np.array_equal(fmt.decode(found["blocks"]), found["values"])
        assert {"random", "byte 0x55", "bit 3", "d = 65504"} <= set(found["case"].tolist())
    spelt = json.loads((tmp_path / "iq1_m.json").read_text("utf-8"))
    assert (spelt["format"], spelt["block"], spelt["nbytes"]) == ("iq1_m", 256, 56)
    for one in spelt["vectors"]:
        block = np.frombuffer(bytes.fromhex(one["blocks"]), np.uint8)
        bits = np.array([int(digits, 16) for digits in one["values"]], np.uint32)
        assert np.array_equal(fmt.decode(block[None])[0].view(np.uint32), bits)
    listed = run("vectors", "--format", "q8_0", "--out", str(tmp_path), "--json")
    assert json.loads(listed.stdout)["q8_0"][0].endswith("q8_0.npz")


def test_vectors_that_cannot_be_written(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    result = run("vectors", "--format", "q8_0", "--out", str(blocked))
    assert result.exit_code == 1
    assert "choose another folder with --out" in result.output


# ---- tables that are arguments -----------------------------------------------------------------


@pytest.mark.parametrize("name", ["wgsl", "triton"])
def test_manifests_have_the_tables_that_a_host_must_give(name: str) -> None:
    target, fmt = targets.get(name), formats.get("iq3_xxs")
    manifest = json.loads(contents(target, list(kernels(target, [fmt])))["manifest.json"])
    seen = set()
    for one in manifest["kernels"]:
        wanted = {a["name"]: a["shape"] for a in one["arguments"] if a["role"] == "table"}
        given = one.get("tables", {})
        assert {n: [str(len(v))] for n, v in given.items()} == wanted
        seen.add((one["op"], bool(given)))
    assert ("matvec", True) in seen and ("quantize", False) in seen
    made = list(kernels(target, [formats.get("q4_0")]))
    plain = json.loads(contents(target, made)["manifest.json"])
    assert not any("tables" in one for one in plain["kernels"])


def test_words_of_a_table() -> None:
    values = Table([1, -1, 127, 0, 5])
    index = var("n", 2)
    words = table(values.words, index)
    assert evaluate(words, {"n": np.arange(2)}).tolist() == [0x007FFF01, 5]
    assert table(values.words, index) is words is pickle.loads(pickle.dumps(words))
    assert table(values, index) is not table(Table([1.0, -1.0, 127.0, 0.0, 5.0]), index)
    seen = evaluate(negate(const(0x01027F40, U32), const(0x00010001, U32)))
    assert int(seen) == 0x01FE7FC0


# ---- a file to start from ----------------------------------------------------------------------


def test_a_new_format_works_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "five.py"
    assert run("new-format", "Five", "--out", str(path)).exit_code == 0
    scope: dict[str, Any] = {}
    exec(compile(path.read_text("utf-8"), str(path), "exec"), scope)
    fmt = scope["FIVE"]
    blocks = np.random.default_rng(0).integers(0, 256, (20, 18), np.uint8)
    blocks[:, 1] &= 0x3F  # finite
    assert np.array_equal(fmt.decode(blocks), formats.get("q4_0").decode(blocks))
    again = run("new-format", "Five", "--out", str(path))
    assert again.exit_code == 1 and "is there already" in again.output


@pytest.mark.parametrize("name", ["", "4bit", "my format", "class", "a/b", "ö"])
def test_names_that_no_format_can_have(name: str) -> None:
    with pytest.raises(FormatError, match="a name is letters, digits and underscores"):
        starter(name)


# ---- formats of installed packages -------------------------------------------------------------


def wheel(folder: Path, name: str, text: str, points: str) -> Path:
    """A package of one module, as pip installs it."""
    path = folder / f"{name}-1.0-py3-none-any.whl"
    info = f"{name}-1.0.dist-info"
    files = {
        f"{name}.py": text,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\n"
        "Tag: py3-none-any\n",
        f"{info}/entry_points.txt": f"[kernelgen.formats]\n{points}\n",
    }
    with zipfile.ZipFile(path, "w") as archive:
        for inside, content in files.items():
            archive.writestr(inside, content)
        record = "".join(f"{inside},,\n" for inside in [*files, f"{info}/RECORD"])
        archive.writestr(f"{info}/RECORD", record)
    return path


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment in which a package with a format is installed, and one that is broken."""
    folder = tmp_path_factory.mktemp("packages")
    site = folder / "site"
    packages = [
        wheel(folder, "packed_five", starter("Packed_Five"), "five = packed_five:PACKED_FIVE"),
        wheel(folder, "broken_five", "FIVE = 5\n", "broken = broken_five:FIVE"),
    ]
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--quiet"]
    done = subprocess.run(
        [*command, "--target", str(site), *map(str, packages)],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    if done.returncode and "No module named pip" in done.stderr:
        pytest.skip("pip is not installed")
    assert done.returncode == 0, done.stderr
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(site), str(ROOT)])}


def test_every_command_finds_the_format_of_a_package(installed: dict[str, str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "kernelgen", "verify", "--target", "numpy", "--format",
         "packed_five", "--op", "matvec,dequantize", "--json"],
        capture_output=True, text=True, env=installed, timeout=300, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert {one["format"] for one in json.loads(done.stdout)} == {"Packed_Five"}
    assert "format broken of an installed package is left out" in done.stderr
    assert "5, no BlockFormat" in done.stderr


# ---- what a description takes ------------------------------------------------------------------


#: modules of formats that are made by name, of which docs/formats-in-planes.md speaks
FAMILIES = ("groups", "small_floats", "families")


def lines_of_descriptions() -> dict[str, int]:
    """Lines of the call that describes each format."""
    found = {}
    for path in (ROOT / "kernelgen" / "ir" / "formats").glob("*.py"):
        if path.stem in FAMILIES:
            continue
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "BlockFormat":
                name = next((k.value for k in node.keywords if k.arg == "name"), None)
                if not isinstance(name, ast.Constant) or node.end_lineno is None:
                    continue
                found[str(name.value)] = node.end_lineno - node.lineno + 1
    return found


def test_the_table_of_descriptions_is_right() -> None:
    page = (ROOT / "docs" / "add-a-format.md").read_text("utf-8")
    table = dict(re.findall(r"^\| (\w+) \| (\d+) \|", page, re.M))
    lines = lines_of_descriptions()
    assert {name: int(count) for name, count in table.items()} == lines
    assert f"median is {statistics.median(lines.values()):g} lines" in page

"""`kernelgen emulate`: what it prints, writes and answers to mistakes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from kernelgen.cli import app
from tests.emulator.tools import needs_clang, needs_compiler

pytestmark = needs_compiler

CUDA = r"""
extern "C" __global__ void scale(const float* x, float* y, int n, float by) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) y[i] = by * x[i];
}
extern "C" __global__ void rotate(const float* x, float* y) {
    extern __shared__ float tile[];
    tile[threadIdx.x] = x[threadIdx.x];
    SYNC;
    y[threadIdx.x] = tile[(threadIdx.x + 1) % blockDim.x];
}
"""


@pytest.fixture
def cuda(tmp_path: Path) -> Path:
    path = tmp_path / "kernels.cu"
    path.write_text(CUDA)
    return path


def run(*arguments: object, code: int = 0) -> Result:
    result = CliRunner().invoke(app, ["emulate", *map(str, arguments)])
    assert result.exit_code == code, f"{result.output}\n{result.exception!r}"
    return result


def error_of(*arguments: object) -> str:
    lines = run(*arguments, code=1).stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


SCALE = ("--entry", "scale", "--grid", "2,1", "--block", 32, "-D", "SYNC")


def test_a_run(cuda: Path, tmp_path: Path) -> None:
    """Arguments in order and by name, results as a file and as a line."""
    x = np.linspace(0, 1, 50, dtype=np.float32)
    np.save(tmp_path / "x.npy", x)
    out = tmp_path / "out.npy"
    given = [f"@{tmp_path / 'x.npy'}", "by=2.5f", "n=50u", "y=f32[5,10]"]
    printed = run(cuda, *SCALE, *given, "--save", f"y={out}", "--print", "y").stdout
    assert np.load(out).shape == (5, 10)
    np.testing.assert_array_equal(np.load(out).reshape(-1), x * np.float32(2.5))
    assert "nothing found; threads in both orders" in printed
    assert "y: f32 5 x 10: 0, 0.0510204, " in printed and "; 0 to 2.5, mean 1.25" in printed


def test_expected_values(cuda: Path, tmp_path: Path) -> None:
    want = tmp_path / "want.npy"
    np.save(want, np.arange(40) * 2.0)
    given = ["f32[40]:range", "f32[40]", 40, 2, "--expect", f"y={want}"]
    assert "y: as expected: error 0" in run(cuda, *SCALE, *given).stdout
    values = np.arange(40) * 2.0
    values[7] += 1
    np.save(want, values)
    printed = run(cuda, *SCALE, *given, code=1).stdout
    assert "NOT as expected" in printed and "y[7]: 14, expected 15" in printed
    assert "as expected" in run(cuda, *SCALE, *given, "--tolerance", 0.1).stdout


def test_arguments_as_an_option(cuda: Path) -> None:
    """All in one text, or the first behind the option and the rest where they land."""
    texts = ["f32[40]:range", "y=f32[40]", "40", "2"]
    want = run(cuda, *SCALE, *texts, "--print", "y").stdout.splitlines()[-1]
    for given in (["--args", " ".join(texts)], ["--args", *texts]):
        printed = run(cuda, *SCALE, "--print", "y", *given).stdout.splitlines()[-1]
        assert printed == want and "y: f32 40" in want


def test_a_bug(cuda: Path) -> None:
    """Told as compilers tell, with the line; exit code 1.  Without it, nothing is found."""
    rotate = (cuda, "--entry", "rotate", "--block", 64, "--shared", 256, "f32[64]:random")
    printed = run(*rotate, "f32[64]", "-D", "SYNC=", code=1).stdout.splitlines()
    assert any(line.startswith(f"{cuda}:10: race: ") for line in printed)
    assert "    10 |     y[threadIdx.x] = tile[(threadIdx.x + 1) % blockDim.x];" in printed
    assert "thread (63, 0, 0)" in "".join(printed) and "3 findings; " in printed[-1]
    assert "nothing found" in run(*rotate, "f32[64]", "-D", "SYNC=__syncthreads()").stdout
    fast = run(*rotate, "f32[64]", "-D", "SYNC=", "--fast", "--order", "forward").stdout
    assert "nothing found; forward" in fast  # whose result is wrong all the same


def test_json(cuda: Path) -> None:
    rotate = ("--entry", "rotate", "--block", 32, "--shared", 128, "f32[32]:random", "f32[32]")
    text = run(cuda, *rotate, "-D", "SYNC=", "--print", "all", "--json", code=1).stdout
    said: dict[str, Any] = json.loads(text)
    assert said["ok"] is False and {"race"} <= {f["kind"] for f in said["findings"]}
    assert {"line", "block", "thread", "message"} <= said["findings"][0].keys()
    assert said["outputs"]["x"]["shape"] == [32] and said["outputs"]["y"]["not_finite"] == 31


@needs_clang
def test_a_language_by_its_suffix(tmp_path: Path) -> None:
    """OpenCL: a single kernel needs no name; shared memory is an argument; bf16 are numbers."""
    path = tmp_path / "turn.cl"
    path.write_text(
        "__kernel void turn(__global const ushort* x, __global ushort* y, __local ushort* t) {\n"
        "    uint i = get_local_id(0);\n"
        "    t[i] = x[i];\n"
        "    barrier(CLK_LOCAL_MEM_FENCE);\n"
        "    y[i] = t[get_local_size(0) - 1 - i];\n"
        "}\n"
    )
    given = ["--block", "16", "x=bf16[16]:range", "y=bf16[16]", "local:32", "--print", "y"]
    assert "y: bf16 16: 15, 14, 13, " in run(path, *given, "--subgroup", 8).stdout
    unknown = path.rename(tmp_path / "turn.text")
    assert "suffix" in error_of(unknown, *given)
    assert "15, 14" in run(unknown, *given, "--language", "opencl").stdout


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["f32[40]", "f32[40]", 40], "scale takes 4 arguments (x, y, n, by), but got 3; by is mis"),
        (["f32[40]", "y=f32[40]", "n=4", "by=1", "z=2"], "scale has no parameter 'z'"),
        (["x=f32[40]", "x=f32[40]", "y=f32[40]", "n=4", "by=1"], "'x' is given twice"),
        (["f33[40]", "f32[40]", 40, 2], "'f33' is no type of elements; known are f16"),
        (["f32[40]:noise", "f32[40]", 40, 2], "'noise' is no content of an array"),
        (["f32[0]", "f32[40]", 40, 2], "sizes above zero"),
        (["f32[40]", "f32[40]", "forty", 2], "'forty' is not understood; write NAME=TYPE"),
        (["f32[40]", "f32[40]", 1.5, 2], "argument 2 (n) of scale is an integer of 4 bytes"),
        (["f32[40]", "f32[40]", 40, 2, "--save", "z=o.npy"], "--save 'z': no argument of that"),
        (["f32[40]", "f32[40]", 40, 2, "--save", "y"], "--save 'y': write --save y=out.npy"),
        (["f32[40]", "f32[40]", 40, 2, "--grid", "2,0"], "--grid '2,0': write one to three"),
        (["f32[40]", "f32[40]", 40, 2, "--order", "odd"], "order 'odd' is not one of forward"),
        (["@/nowhere.npy", "f32[40]", 40, 2], "/nowhere.npy: No such file or directory"),
        (["f32[40]", "f32[40]", 2**32, 2], "argument 2 (n) of scale is an integer of 4 bytes"),
        (["f32[40]", "f32[40]", "nan", 2], "argument 2 (n) of scale is an integer of 4 bytes"),
        (["i8[40]:300", "f32[40]", 40, 2], "300 does not fit i8"),
        (["f32[99999999999999]", "f32[40]", 40, 2], "the memory does not suffice"),
        (["f32[40]", "f32[40]", 40, 2, "--grid", 2**32], "numbers from 1 to 2147483647"),
        (["f32[40]", "f32[40]", 40, 2, "--shared", "-1"], "-1 bytes of shared memory"),
        (["f32[40]", "f32[40]", 40, 2, "-D", "4=2"], "-D '4=2': write a name"),
        (["--args", "f32[40] 'f32[40]"], "has a quotation that does not end"),
    ],
)
def test_mistakes(cuda: Path, given: list[object], said: str) -> None:
    assert said in error_of(cuda, *SCALE, *given)


def test_files_that_are_no_arrays(cuda: Path, tmp_path: Path) -> None:
    given = ["f32[40]", "f32[40]", 40, 2]
    assert "is no .npy file of numbers" in error_of(cuda, *SCALE, f"@{cuda}", *given[1:])
    assert "is no .npy file" in error_of(cuda, *SCALE, *given, "--expect", f"y={cuda}")
    np.save(tmp_path / "short.npy", np.zeros(3))
    short = ["--expect", f"y={tmp_path / 'short.npy'}"]
    assert "the file has 3 elements, the argument 40" in error_of(cuda, *SCALE, *given, *short)
    np.save(tmp_path / "words.npy", np.array(["a"] * 40))
    np.savez(tmp_path / "several.npz", a=np.zeros(40))
    for name in ("words.npy", "several.npz"):
        said = error_of(cuda, *SCALE, f"@{tmp_path / name}", *given[1:])
        assert "is no .npy file of numbers" in said
    (tmp_path / "odd").write_bytes(bytes(7))
    said = error_of(cuda, *SCALE, f"f32@{tmp_path / 'odd'}", *given[1:])
    assert "has 7 bytes, no multiple of the 4 of f32" in said


def test_which_kernel(cuda: Path, tmp_path: Path) -> None:
    assert "kernels.cu has the kernels scale, rotate; say which with --entry" in error_of(cuda)
    none = tmp_path / "none.cu"
    none.write_text("int f() { return 1; }")
    assert "none.cu has no kernel; of a template name an instance" in error_of(none)
    assert "no kernel 'turn' in kernels.cu" in error_of(cuda, "--entry", "turn", "-D", "SYNC")
    assert "No such file" in error_of(tmp_path / "missing.cu")

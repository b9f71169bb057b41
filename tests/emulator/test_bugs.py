"""Every kind of bug is caught, and named with its line, block and thread."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from kernelgen.emulator import Emulator, EmulatorError, Report, emulate
from kernelgen.emulator.compiler import cxx
from tests.emulator.tools import needs_compiler

pytestmark = needs_compiler

TEXT = (Path(__file__).parent / "bugs.cu").read_text()

#: kernel -> the kind of its bug, and which build is sure to see it
BUGS = {
    "missing_barrier": "race",
    "divergent_barrier": "barrier",
    "mismatched_mask": "mask",
    "shared_race": "race",
    "out_of_bounds": "bounds",
    "before_the_start": "bounds",
    "uninitialised": "uninitialised",
    "weak_wait": "async",
    "weak_order": "race",
}
CHECKED_ONLY = {
    "misaligned": "misaligned",
    "misaligned_vector": "misaligned",
    "shared_out_of_bounds": "bounds",
}


@pytest.fixture(scope="module")
def bugs() -> Emulator:
    return Emulator(TEXT, name="bugs.cu")


def marked_lines(kernel: str) -> set[int]:
    """Numbers of the lines of a kernel that are marked."""
    lines = TEXT.splitlines()
    first = next(i for i, s in enumerate(lines) if f" {kernel}(" in s)
    last = next(i for i in range(first, len(lines)) if lines[i] == "}")
    return {i + 1 for i in range(first, last) if "// BUG" in lines[i]}


def run(bugs: Emulator, kernel: str, **options: object) -> Report:
    x = np.arange(128, dtype=np.float32) if kernel == "weak_wait" else np.arange(64, dtype="f4")
    y = np.zeros(64, np.float32)
    settings: dict[str, object] = {"shared_bytes": 256, "seconds": 5.0, **options}
    return bugs.run(kernel, 1, 64, [x, y], **settings)  # type: ignore[arg-type]


def check(report: Report, kernel: str, kind: str) -> None:
    """Some finding has the kind, a marked line, and a block and thread that can be."""
    fitting = [f for f in report.findings if f.kind == kind and f.line in marked_lines(kernel)]
    assert fitting, f"{kernel}: {report}"
    for finding in fitting:
        assert finding.block == (0, 0, 0)
        assert 0 <= finding.thread[0] < 64 and finding.thread[1:] == (0, 0)


@pytest.mark.parametrize("kernel", BUGS)
def test_a_plain_run_finds(bugs: Emulator, kernel: str) -> None:
    check(run(bugs, kernel), kernel, BUGS[kernel])


@pytest.mark.parametrize("kernel", [*BUGS, *CHECKED_ONLY])
@pytest.mark.parametrize("order", ["forward", "reverse", "random"])
def test_a_checked_run_finds_in_any_order(bugs: Emulator, kernel: str, order: str) -> None:
    if kernel == "misaligned_vector" and cxx().family == "clang":
        pytest.skip("clang does not check the alignment of structs that are copied whole")
    report = run(bugs, kernel, sanitize=True, order=order)
    check(report, kernel, (BUGS | CHECKED_ONLY)[kernel])


def test_one_warp_s_barrier_orders_that_warp(bugs: Emulator) -> None:
    """Only the second warp has a race, and none on what each warp keeps to itself."""
    report = run(bugs, "weak_order", sanitize=True, order="forward")
    assert report.kinds() == {"race"}
    assert {f.thread[0] // 32 for f in report.findings} == {1}


def test_a_race_names_both_sides(bugs: Emulator) -> None:
    report = run(bugs, "missing_barrier", sanitize=True)
    race = next(f for f in report.findings if f.kind == "race")
    write = min(marked_lines("missing_barrier")) - 1
    assert f"line {write}" in race.message or race.line == write
    assert "thread (" in race.message


def test_the_thread_is_the_right_one(bugs: Emulator) -> None:
    """Where one thread alone is at fault, it is named, and so is the argument."""
    report = run(bugs, "out_of_bounds")
    assert {f.thread for f in report.findings} == {(63, 0, 0)}
    assert "byte 256 of argument 0 (x), which has 256 bytes" in report.findings[0].message
    report = run(bugs, "before_the_start")
    assert {f.thread for f in report.findings} == {(0, 0, 0)}
    assert "byte -4 of argument 0 (x)" in report.findings[0].message
    report = run(bugs, "uninitialised", sanitize=True)
    assert {f.thread for f in report.findings} == {(63, 0, 0)}


@pytest.mark.parametrize("sanitize", [False, True], ids=["plain", "checked"])
def test_the_block_is_the_right_one(bugs: Emulator, sanitize: bool) -> None:
    x, y = np.arange(64, dtype=np.float32), np.zeros(64, np.float32)
    report = bugs.run("one_of_many", (4, 3), 64, [x, y], sanitize=sanitize)
    assert {(f.kind, f.block, f.thread) for f in report.findings} == {
        ("bounds", (2, 1, 0), (37, 0, 0))
    }
    assert {f.line for f in report.findings} == marked_lines("one_of_many")


def test_a_canary_sees_what_a_plain_run_writes_behind_shared_memory(bugs: Emulator) -> None:
    report = run(bugs, "shared_out_of_bounds")
    assert report.kinds() == {"bounds"}
    assert "byte 256 of dynamic shared memory" in report.findings[0].message


@pytest.mark.parametrize(
    ("kernel", "kind", "words"),
    [
        ("hang", "hang", "0.4 seconds of CPU time"),
        ("unknown_instruction", "instruction", '"barrier.cluster.arrive.aligned"'),
        ("asserts", "trap", "x[threadIdx.x] < 63"),
    ],
)
def test_other_ends_of_a_kernel(bugs: Emulator, kernel: str, kind: str, words: str) -> None:
    report = run(bugs, kernel, seconds=0.4, order="forward")
    check(report, kernel, kind)
    assert words in report.findings[0].message


def test_a_stack_that_is_used_up(bugs: Emulator) -> None:
    """It happens before the function's first line."""
    assert run(bugs, "too_much_stack").kinds() == {"overflow"}


def test_a_race_between_blocks_is_seen_by_its_result(bugs: Emulator) -> None:
    x, y = np.arange(64, dtype=np.float32), np.zeros(63 * 3 + 64, np.float32)
    report = bugs.run("global_race", 4, 64, [x, y], workers=1)
    assert report.kinds() == {"order"}
    assert "y[63] is" in report.findings[0].message


@pytest.mark.parametrize("args", [[], [1, 2], [np.zeros(64, np.float32)] * 3])
def test_arguments_that_do_not_fit(bugs: Emulator, args: list[object]) -> None:
    with pytest.raises(EmulatorError, match=r"misaligned"):
        bugs.run("misaligned", 1, 64, args)


def test_text_that_does_not_compile() -> None:
    with pytest.raises(EmulatorError, match=r"kernel\.cu:2:.*nonsense"):
        emulate('extern "C" __global__ void f(float* x) {\n  nonsense(x);\n}\n', "f", 1, 1, [None])


def test_an_entry_that_is_not_there(bugs: Emulator) -> None:
    with pytest.raises(EmulatorError, match=r"no kernel 'missing' in bugs\.cu; it has missing_bar"):
        bugs.run("missing", 1, 1, [])


def test_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/nonexistent/c++")
    with pytest.raises(EmulatorError, match=r"no usable compiler.*g\+\+ 12 or later"):
        emulate('extern "C" __global__ void f() {}', "f", 1, 1, [])

"""Kernels on the threads of another library's OpenMP."""

from __future__ import annotations

import ctypes
import dataclasses
import itertools
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kernelgen
from kernelgen import targets
from kernelgen.generate import generate
from kernelgen.ir import formats
from kernelgen.targets.c import compiler, team
from kernelgen.targets.c.runtime import CRuntime, native_isa
from tests.c.machines import find_clang, problems

#: every way in which words.h has loops, of two types: how often each turn is taken, by how many
#: threads, and whether a barrier holds
LOOPS = """
#include <stdatomic.h>
#include <stdint.h>
#include <omp.h>
#define LOOP(name, type, step, schedule) \\
    void name(int32_t *taken, int64_t from, int64_t to, int64_t by) { \\
        (void)by; \\
        _Pragma("omp parallel") { \\
            _Pragma(schedule) for (type i = (type)from; i < (type)to; i += step) \\
                __atomic_fetch_add(taken + i, 1, __ATOMIC_RELAXED); \\
        } \\
    }
// a step that is known makes a loop of signed numbers, another one of unsigned
#define LOOPS(name, schedule) \\
    LOOP(name##_4, int32_t, 2, schedule) LOOP(name##_8, int64_t, 2, schedule) \\
    LOOP(name##_4u, int32_t, (int32_t)by, schedule) LOOP(name##_8u, int64_t, by, schedule)
LOOPS(whole, "omp for schedule(static)")
LOOPS(chunks, "omp for schedule(static, 3)")
LOOPS(free, "omp for schedule(dynamic, 2)")

// Ten rounds, each of which reads what another thread wrote in the one before.
int64_t rounds(int64_t *cells, int64_t n) {
    int64_t wrong = 0;
    #pragma omp parallel
    for (int round = 1; round <= 10; round++) {
        #pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < n; i++) cells[i + round % 2 * n] = round;
        #pragma omp for schedule(static)
        for (int64_t i = 0; i < n; i++)
            if (cells[(n - 1 - i) + round % 2 * n] != round) __atomic_fetch_add(&wrong, 1, 0);
    }
    return wrong;
}

int64_t small(int32_t *taken, int64_t n, int64_t most) {
    int64_t members = 0;
    #pragma omp parallel if (n > most)
    {
        __atomic_fetch_add(&members, 1, 0);
        #pragma omp for schedule(dynamic, 2)
        for (int64_t i = 0; i < n; i++) __atomic_fetch_add(taken + i, 1, 0);
        #pragma omp for schedule(static)
        for (int64_t i = 0; i < n; i++) __atomic_fetch_add(taken + i, 1, 0);
    }
    return members;
}

int64_t most(void) { return omp_get_max_threads(); }

// More names than a call has in registers.
int64_t names(const int64_t *v) {
    int64_t a = v[0], b = v[1], c = v[2], d = v[3], e = v[4], f = v[5], g = v[6], h = v[7];
    int64_t i = v[8], j = v[9], k = v[10], l = v[11], m = v[12], n = v[13], o = v[14], p = v[15];
    int64_t q = v[16], r = v[17], sum = 0;
    #pragma omp parallel
    {
        #pragma omp for schedule(static)
        for (int64_t t = 0; t < 1; t++)
            sum = a + 2*b + 3*c + 4*d + 5*e + 6*f + 7*g + 8*h + 9*i + 10*j + 11*k + 12*l + 13*m
                + 14*n + 15*o + 16*p + 17*q + 18*r;
    }
    return sum;
}
"""


@pytest.fixture(scope="module")
def between() -> team.Team:
    found = team.team()
    if found is None:
        pytest.skip("the compiler is not clang on Linux")
    return found


@pytest.fixture(scope="module")
def gcc(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """Another OpenMP: GCC's."""
    folder = tmp_path_factory.mktemp("gcc")
    (folder / "own.c").write_text(team._OWN)
    made = folder / "own.so"
    command = ["gcc", "-shared", "-fPIC", "-fopenmp", str(folder / "own.c"), "-o", str(made)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("there is no gcc with OpenMP")
    return ctypes.CDLL(str(made))


@pytest.fixture(params=["own", "gcc"])
def pool(request: pytest.FixtureRequest, between: team.Team, gcc: Any) -> Iterator[ctypes.CDLL]:
    """Kernels on these threads."""
    chosen = between.own if request.param == "own" else gcc
    shared = between.shared
    between.use(chosen)
    yield chosen
    if not shared:
        between.use(between.own)


@pytest.fixture(scope="module")
def loops(between: team.Team, tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    folder, found = tmp_path_factory.mktemp("loops"), compiler.find_compiler()
    assert isinstance(found, compiler.Compiler)
    link = between.linking(generate("prepare", formats.get("q8_0"), targets.get("c")))
    options = ["-O2", "-fPIC", "-Wall", *link.options, *map(str, link.libraries)]
    compiler._compile(found, LOOPS, options, made := folder / "loops.so", "loops")
    library = ctypes.CDLL(str(made))
    for name in ("small", "rounds", "most", "names"):
        getattr(library, name).restype = ctypes.c_int64
    return library


def address(array: Any) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_loops(threads: int, pool: ctypes.CDLL, loops: ctypes.CDLL) -> None:
    before = pool.omp_get_max_threads()
    pool.omp_set_num_threads(threads)
    try:
        assert loops.most() == threads
        kinds = itertools.product(("whole", "chunks", "free"), ("4", "8", "4u", "8u"))
        for (kind, type), turns in itertools.product(kinds, (0, 1, 2, 7, 100)):
            taken, wanted = np.zeros((2, 300), np.int32)
            wanted[3 : 3 + 2 * turns : 2] = 1
            numbers = map(ctypes.c_int64, (3, 3 + 2 * turns, 2))
            getattr(loops, f"{kind}_{type}")(address(taken), *numbers)
            np.testing.assert_array_equal(taken, wanted, f"{kind} {type} {turns}")
        cells = np.zeros(2 * 37, np.int64)
        assert loops.rounds(address(cells), ctypes.c_int64(37)) == 0
        for count, most, members in ((9, 8, threads), (8, 8, 1)):
            taken = np.zeros(count, np.int32)
            found = loops.small(address(taken), ctypes.c_int64(count), ctypes.c_int64(most))
            assert found == members and (taken == 2).all()
        values = np.arange(7, 25)
        assert loops.names(address(values)) == values @ np.arange(1, 19)
    finally:
        pool.omp_set_num_threads(before)


@pytest.mark.usefixtures("pool")
def test_kernels() -> None:
    runtime = CRuntime(native_isa())
    assert problems(runtime, ["q4_K"], ["dequantize", "quantize", "matvec", "matmul"]) == []
    program = next(iter(runtime._programs.values()))
    assert not hasattr(program.library, "kmp_get_blocktime")  # it has no OpenMP of its own


def test_threads_may_change_under_calls(between: team.Team, gcc: Any) -> None:
    """Each region ends on the threads that it began on."""
    w = kernelgen.quantize(np.random.default_rng(0).standard_normal((64, 256)), "q8_0")
    x = np.ones((3, 256), np.float32)
    wanted = kernelgen.matmul(x, w, target="c")
    shared, wrong, stop = between.shared, [], threading.Event()

    def work() -> None:
        while not stop.is_set():
            if not np.array_equal(kernelgen.matmul(x, w, target="c"), wanted):
                wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for one in threads:
        one.start()
    for turn in range(200):
        between.use((gcc, between.own)[turn % 2])
        stop.wait(0.001)
    stop.set()
    for one in threads:
        one.join(30)
    if shared:
        between.share()
    assert not any(one.is_alive() for one in threads) and not wrong


def test_one_that_calls_more_than_that_has_the_compilers_own(
    empty_cache: Path, compiled_by: Callable[[str], None], between: team.Team
) -> None:
    """A region of another kind, which team.c does not know."""
    compiled_by(find_clang() or "clang")
    one = generate("dequantize", formats.get("q8_0"), targets.get("c"))
    odd = one.source + (
        "void odd(int64_t *x) {\n"
        '    _Pragma("omp parallel")\n    { _Pragma("omp critical") *x += 1; }\n}\n'
    )
    library = CRuntime(native_isa())._library(dataclasses.replace(one, source=odd))
    count = ctypes.c_int64(0)
    library.odd(ctypes.byref(count))
    assert count.value == library.omp_get_max_threads()


SHARING = """
import os, sys, numpy as np, torch, kernelgen, kernelgen.torch

def threads():
    return len(os.listdir("/proc/self/task"))

torch.set_num_threads(3)
layer = kernelgen.torch.QuantLinear.from_linear(torch.nn.Linear(512, 4096), "q8_0")
x = torch.randn(1, 512)
with torch.no_grad():
    torch.exp(torch.randn(1 << 20)).sum()  # torch's threads are there
    before = threads()
    y = layer(x)
    after = threads()
    wanted = x @ layer.weight.T + layer.bias
    assert (y - wanted).abs().max() < 0.05
    child = os.fork()
    if child == 0:  # no thread but this one is left
        os._exit(0 if torch.equal(layer(x), y) else 1)
    assert os.waitpid(child, 0)[1] == 0
print(before, after)
"""


def test_kernels_run_on_torchs_threads(between: team.Team, tmp_path: Path) -> None:
    """None are added to those that torch has; and a forked process has new ones."""
    pytest.importorskip("torch")
    if team._another() is None:
        __import__("torch")
        if team._another() is None:
            pytest.skip("torch was built without OpenMP")
    script = tmp_path / "sharing.py"
    script.write_text(textwrap.dedent(SHARING))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(script)], capture_output=True, text=True, timeout=120,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    before, after = map(int, done.stdout.split())
    assert before > 1 and after == before

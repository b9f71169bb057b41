"""Packages for devices multiply right, with nothing of kernelgen; C, JavaScript, Python and Rust
choose alike."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from kernelgen import targets
from tests import fake_cupy, fake_metal
from tests.packages import making
from tests.packages.making import ROOT, written

#: M of a matvec and a matmul, odd N, K of one block and of several
SHAPES = ((1, 5, 256), (3, 37, 768), (20, 33, 512))


def package_of(
    monkeypatch: pytest.MonkeyPatch, folder: Path, target: str, *names: str, **more: Any
) -> Any:
    written(folder, target, *names, **more)
    return making.imported(monkeypatch, folder / target, f"kernelgen_{target}")


@pytest.mark.parametrize("target", ("opencl", "wgsl"))
def test_runs(target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reason = targets.get(target).runtime().available()
    if reason:
        pytest.skip(reason)
    monkeypatch.setenv("XDG_RUNTIME_DIR", os.devnull)  # no display is looked for
    package = package_of(monkeypatch, tmp_path, target, "q4_K", "f16")
    assert package.available() is None
    used = making.multiplies(package, "q4_K", SHAPES)
    used |= making.multiplies(package, "f16", SHAPES[1:3], ("auto", "int8"))
    assert len(used) >= 9
    making.decodes(package, "q4_K", 37, 512)
    making.decodes(package, "f16", 5, 100)
    making.refuses(package, "q4_K")
    # a device whose buffers are small: weights and results come in pieces
    package.driver().largest = 8 * 2 * 144 + 200
    making.multiplies(package, "q4_K", [(20, 37, 512)], ("fp32", "int8"))
    making.decodes(package, "q4_K", 37, 512)


def test_tuned_kernels_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reason = targets.get("opencl").runtime().available()
    if reason:
        pytest.skip(reason)
    package = package_of(monkeypatch, tmp_path, "opencl", "q4_K", tuned=True)
    near = [(4, 300, 1024), (120, 300, 512)]
    tuned = making.multiplies(package, "q4_K", near, ("fp32",))
    plain = {package.choose("q4_K", "fp32", *one, tuned=False) for one in near}
    assert len(tuned) == 2 and tuned.isdisjoint(plain)


INTERPRETED = """
import os, sys
os.environ["TRITON_INTERPRET"] = "1"
sys.path.insert(0, sys.argv[1])
import kernelgen_triton as package
from tests.packages import making
making.multiplies(package, "q4_K", [(3, 9, 256), (17, 9, 256)], sys.argv[2].split(","))
making.decodes(package, "q4_K", 5, 512)
making.refuses(package, "q4_K")
"""


@pytest.mark.parametrize(
    "precisions", ("auto,fp32", pytest.param("auto,fp32,fp16,bf16,int8", marks=pytest.mark.slow))
)
def test_triton_interpreted(precisions: str, tmp_path: Path) -> None:
    """In a process of its own, as Triton reads its environment once."""
    for name in ("torch", "triton"):  # not imported: a Vulkan driver may be loaded, see runtime.py
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed")
    folder = written(tmp_path, "triton", "q4_K")
    run = subprocess.run(
        [sys.executable, "-c", INTERPRETED, str(folder / "python"), precisions], cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=300,
        check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    for name in (folder / "python" / "kernelgen_triton" / "kernels").glob("*_q4_K*.py"):
        lines = [s for s in name.read_text().splitlines() if s.startswith(("import", "from"))]
        assert {s.split()[1].split(".")[0] for s in lines} == {"triton"}


@pytest.fixture
def on_cuda(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The package over a stand-in for cupy, whose kernels run in the emulator."""
    reason = targets.get("cuda").runtime("emulated").available()
    if reason:
        pytest.skip(reason)
    before = dict(sys.modules)
    fake_cupy.install()
    for name in [m for m in sys.modules if m.startswith("cupy")]:
        made = sys.modules.pop(name)
        if name in before:
            sys.modules[name] = before[name]
        monkeypatch.setitem(sys.modules, name, made)  # what was there comes back
    return package_of(monkeypatch, tmp_path, "cuda", "q4_K")


def test_cuda_through_a_stand_in(on_cuda: Any) -> None:
    """The driver calls cupy as it wants to be called, on tensor cores with activations quantized
    before."""
    assert {"mma", "wgmma", "dot"} <= on_cuda.driver().features()
    (used,) = making.multiplies(on_cuda, "q4_K", [(20, 18, 512)], ("int8",))
    assert "mma" in used
    making.decodes(on_cuda, "q4_K", 5, 256)


@pytest.mark.slow
def test_all_precisions_on_cuda(on_cuda: Any) -> None:
    used = making.multiplies(on_cuda, "q4_K", [(2, 18, 512), (20, 18, 512)])
    assert any("wgmma" in one for one in used) and any("half2" in one for one in used)


def test_metal_through_a_stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reason = targets.get("metal").runtime("emulated").available()
    if reason:
        pytest.skip(reason)
    import platform

    monkeypatch.setattr(platform, "mac_ver", lambda: ("15.1", (), "arm64"))
    monkeypatch.setitem(sys.modules, "torch", fake_metal.torch(fake_metal.Queue()))
    package = package_of(monkeypatch, tmp_path, "metal", "q4_K")
    used = making.multiplies(package, "q4_K", [(2, 18, 512)], ("auto",))
    used |= making.multiplies(package, "q4_K", [(20, 18, 512)], ("bf16",))
    assert any("matrix" in one for one in used)
    making.decodes(package, "q4_K", 5, 256)


def test_without_a_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package says in a sentence what is missing."""
    for target, modules in {
        "opencl": ("pyopencl",), "wgsl": ("wgpu",), "cuda": ("cupy",), "metal": ("torch",),
        "triton": ("torch", "triton"),
    }.items():  # fmt: skip
        with monkeypatch.context() as patch:
            for one in modules:
                patch.setitem(sys.modules, one, None)
            package = package_of(patch, tmp_path, target, "q8_0", ops=("get_rows", "matvec"))
            reason = package.available()
            assert "pip install" in reason and len(reason.splitlines()) == 1
            with pytest.raises(RuntimeError, match="pip install"):
                package.driver()


# ---- one choice in four languages ------------------------------------------------------------

Question = tuple[str, int, int, int, tuple[str, ...]]


def questions(features: Sequence[str]) -> list[Question]:
    some = random.Random(0)
    sizes = (1, 200, 512, 1000, 1024, 4096, 9000, 16385)
    found = [
        (p, m, n, k, f)
        for p in making.PRECISIONS
        for m in (1, 2, 3, 4, 7, 8, 9, 16, 17, 50, 100, 128, 129, 257, 5000)
        for n, k in itertools.product(sizes, (256, 1024, 2048, 4096, 16384))
        for f in ((), tuple(features))
    ]
    return some.sample(found, 600)


def answers(package: Any, asked: Sequence[Question]) -> list[Any]:
    """What Python says: kernel, grid."""
    from importlib import import_module

    decide, host = (import_module(f"{package.__name__}.{n}") for n in ("decide", "host"))
    found = []
    for p, m, n, k, f in asked:
        entry = decide.choose(frozenset(f), host.NEEDED, "q4_K", p, m, n, k)
        grid = host.KERNELS[entry].groups({"M": m, "N": n, "K": k}) if entry else (0, 0)
        found.append([entry, *grid])
    return found


def features_of(package: Any) -> list[str]:
    from importlib import import_module

    needed = import_module(f"{package.__name__}.host").NEEDED
    return sorted({one for names in needed.values() for one in names})


C_PROGRAM = """
#include "kernels.h"
#include <stdio.h>
int main(void) {
    char p[8]; unsigned long long m, n, k; unsigned f;
    while (scanf("%7s %llu %llu %llu %u", p, &m, &n, &k, &f) == 5) {
        const struct kernelgen_kernel *found = kernelgen_choose("q4_K", p, m, n, k, f);
        const struct kernelgen_sizes sizes = {.M = m, .N = n, .K = k};
        if (!found) { puts("null 0 0"); continue; }
        const struct kernelgen_grid grid = found->grid(sizes);
        printf("%s %llu ", found->entry, (unsigned long long)grid.x);
        printf("%llu\\n", (unsigned long long)grid.y);
    }
}
"""


@pytest.mark.parametrize("target", ("opencl", "cuda", "metal"))
def test_c_chooses_like_python(
    target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("there is no C compiler on the path")
    package = package_of(monkeypatch, tmp_path, target, "q4_K", tuned=True)
    asked = questions(features_of(package))
    (tmp_path / "main.c").write_text(C_PROGRAM)
    program = tmp_path / "main"
    subprocess.run(
        [compiler, "-Wall", "-Wextra", "-Werror", f"-I{tmp_path / target}",
         str(tmp_path / "main.c"), "-o", str(program)], check=True,
    )  # fmt: skip
    (tmp_path / "also.cpp").write_text('#include "kernels.h"\n')
    subprocess.run(
        [compiler, "-Wall", "-Wextra", "-Werror", "-fsyntax-only", "-std=c++11",
         f"-I{tmp_path / target}", str(tmp_path / "also.cpp")], check=True,
    )  # fmt: skip
    bits = 2 ** len(features_of(package)) - 1
    given = "".join(f"{p} {m} {n} {k} {bits if f else 0}\n" for p, m, n, k, f in asked)
    said = subprocess.run([program], input=given, capture_output=True, text=True, check=True).stdout
    want = answers(package, asked)
    got = [
        [None if e == "null" else e, int(x), int(y)]
        for e, x, y in map(str.split, said.splitlines())
    ]
    assert got == want
    assert len({e for e, *_ in want}) > 10


JS_PROGRAM = """
import { choose, kernels } from './wgsl/index.js';
const asked = JSON.parse(process.argv[2]);
console.log(JSON.stringify(asked.map(([p, M, N, K, f]) => {
  const name = choose('q4_K', p, M, N, K, new Set(f));
  return [name, ...(name ? kernels[name].groups({ M, N, K }) : [0, 0])];
})));
"""


def test_javascript_chooses_like_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if shutil.which("node") is None:
        pytest.skip("there is no node on the path; on Debian: apt-get install nodejs")
    package = package_of(monkeypatch, tmp_path, "wgsl", "q4_K", tuned=True)
    asked = questions(features_of(package))
    (tmp_path / "main.mjs").write_text(JS_PROGRAM)
    run = subprocess.run(
        ["node", "main.mjs", json.dumps(asked)], cwd=tmp_path, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    assert json.loads(run.stdout) == answers(package, asked)
    said = json.loads((tmp_path / "wgsl" / "package.json").read_text())
    assert all((tmp_path / "wgsl" / name).exists() for name in said["files"])


RUST_PROGRAM = """
use std::io::{read_to_string, stdin};
fn main() {
    for line in read_to_string(stdin()).unwrap().lines() {
        let words: Vec<&str> = line.split(' ').collect();
        let size = |n: usize| words[n].parse::<u64>().unwrap();
        let (m, n, k) = (size(1), size(2), size(3));
        let features: Vec<&str> = words[4..].to_vec();
        match kernelgen_wgsl::choose("q4_K", words[0], m, n, k, &features) {
            None => println!("null 0 0"),
            Some(one) => {
                let sizes = kernelgen_wgsl::Sizes { M: m, N: n, K: k, ..Default::default() };
                let (x, y) = (one.groups)(sizes);
                assert!(one.source.contains(one.entry) && one.threads > 0);
                println!("{} {x} {y}", one.entry);
            }
        }
    }
}
"""


def test_rust_chooses_like_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if shutil.which("rustc") is None:
        pytest.skip("there is no rustc on the path")
    package = package_of(monkeypatch, tmp_path, "wgsl", "q4_K", tuned=True)
    asked = questions(features_of(package))
    (tmp_path / "main.rs").write_text(RUST_PROGRAM)
    common = ["rustc", "--edition=2021", "-Dwarnings"]
    crate = tmp_path / "libkernelgen_wgsl.rlib"
    subprocess.run(
        [*common, "--crate-type=rlib", "--crate-name=kernelgen_wgsl", "-o", str(crate),
         str(tmp_path / "wgsl" / "rust" / "src" / "lib.rs")], check=True,
    )  # fmt: skip
    subprocess.run(
        [*common, f"--extern=kernelgen_wgsl={crate}", "-o", str(tmp_path / "main"),
         str(tmp_path / "main.rs")], check=True,
    )  # fmt: skip
    given = "".join(" ".join(map(str, (p, m, n, k, *f))) + "\n" for p, m, n, k, f in asked)
    said = subprocess.run(
        [tmp_path / "main"], input=given, capture_output=True, text=True, check=True
    ).stdout
    got = [
        [None if e == "null" else e, int(x), int(y)]
        for e, x, y in map(str.split, said.splitlines())
    ]
    assert got == answers(package, asked)


# ---- binaries --------------------------------------------------------------------------------


@pytest.mark.slow
def test_cuda_binaries(tmp_path: Path) -> None:
    """Machine code, PTX and a fat binary, the same every time, with the kernels in them."""
    from kernelgen.ir import formats
    from kernelgen.packages import plan as planning
    from kernelgen.packages import write
    from kernelgen.targets.cuda import binaries

    if binaries.why_no_compiler():
        pytest.skip(str(binaries.why_no_compiler()))

    def made(*ops: str) -> tuple[Any, dict[str, Any]]:
        plan = planning.plan(
            targets.get("cuda"), [formats.get("q8_0")], ops, tuned=False,
            binaries=("sm_75", "sm_90a"),
        )  # fmt: skip
        return plan, write.contents(plan)

    assert made("get_rows")[1] == made("get_rows")[1]
    plan, files = made("matvec", "get_rows")
    found = {name: data for name, data in files.items() if name.startswith("binaries/")}
    for unit in ("kernels", "kernels_exact"):
        for suffix in ("sm_75.cubin", "sm_90a.cubin", "compute_75.ptx", "compute_80.ptx", "fatbin"):
            assert found[f"binaries/{unit}.{suffix}"]
    for kernel in plan.kernels:
        unit = "kernels" if kernel.contract else "kernels_exact"
        entry = kernel.entry.encode()
        assert entry in found[f"binaries/{unit}.sm_90a.cubin"]
        assert ("mma" in kernel.features) == (entry not in found[f"binaries/{unit}.sm_75.cubin"])
    assert "sm_90a" in str(files["README.md"])


def test_metallib_is_made_by_xcode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for xcrun, which puts together what it was given."""
    from kernelgen.targets.metal import package

    tool = tmp_path / "xcrun"
    tool.write_text(
        "#!/bin/sh\nshift 2\nkind=$1\nfor last; do :; done\n"
        'case $kind in metal) cp "$4" "$last" ;; *) cat *.air >"$last" ;; esac\n'
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    kernels = making.planned("metal", "q8_0").kernels[:3]
    found = package.library(kernels)
    assert all(k.entry.encode() in found for k in kernels)

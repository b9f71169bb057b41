"""What the tests of packages share: packages that are made once, and what is asked of all."""

from __future__ import annotations

import functools
import importlib
import os
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from kernelgen import targets
from kernelgen.ir import formats
from kernelgen.ir.ops import matmul, quantize_activations
from kernelgen.packages import plan as planning
from kernelgen.packages import write
from kernelgen.problem import relative_error, rounded, size_of_sums
from kernelgen.targets.c.compiler import find_compiler
from kernelgen.targets.c.package import ISAS
from kernelgen.targets.c.runtime import cpu_features, native_isa
from kernelgen.targets.package import Content, Plan, Point
from kernelgen.tensor import QuantTensor
from kernelgen.verify import activations, random_blocks

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
#: the best that is here and in a package, and one more
BEST = next(
    isa for isa in ISAS if isa.needs <= cpu_features() and native_isa().machines == isa.machines
)
HERE = list(dict.fromkeys((BEST.name, "avx2" if "avx2" in BEST.needs else "scalar")))
OPS = ("dequantize", "get_rows", "quantize", "cast", "matvec", "matmul", "prepare")
PACKAGED = ("c", "opencl", "wgsl", "cuda", "metal", "triton")
PRECISIONS = ("auto", "fp32", "fp16", "bf16", "int8")

#: shapes that made-up tuned points are for: what walk, what it changes
TUNED: tuple[tuple[int, int, int, dict[str, Any]], ...] = (
    (1, 4096, 4096, {}), (4, 512, 2048, {}), (128, 1024, 1024, {}), (100, 4096, 4096, {}),
)  # fmt: skip


def points(made: Any, fmts: Iterable[Any]) -> dict[tuple[str, str, str], list[Point]]:
    """In place of what the tuner has: configurations that differ from the default, for shapes."""
    found: dict[tuple[str, str, str], list[Point]] = {}
    for fmt in fmts:
        for number, (m, n, k, _) in enumerate(TUNED):
            op = "matvec" if m <= 8 else "matmul"
            walk = made.target.walk(op, fmt, "fp32")
            caps = made.target.capabilities
            legal = [c for c in walk.config.space() if walk.refuses(c, fmt, caps) is None]
            prepared = [c for c in legal if c.as_dict().get("layout") != "native"]
            config = (prepared or legal)[-1 - number]
            entry = made.add(walk, fmt, config)
            point = Point(m, n, k, entry, "a device", "avx2", 1e-3, 2e-3)
            found.setdefault((fmt.name, "fp32", op), []).append(point)
    return found


@functools.cache
def planned(target: str, *names: str, tuned: bool = False, ops: tuple[str, ...] = OPS) -> Plan:
    """The plan of a package without binaries."""
    fmts = [formats.get(name) for name in names]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "_points", points if tuned else lambda *_: {})
        return planning.plan(targets.get(target), fmts, ops, binaries=())


@functools.cache
def contents(target: str, *names: str, tuned: bool = False, **more: Any) -> dict[str, Content]:
    """The files of a package."""
    return write.contents(planned(target, *names, tuned=tuned, **more))


def written(folder: Path, target: str, *names: str, **more: Any) -> Path:
    """A package in a folder of its own."""
    write.write(contents(target, *names, **more), folder / target)
    return folder / target


def imported(monkeypatch: pytest.MonkeyPatch, package: Path, name: str) -> ModuleType:
    """A Python package from where it was written, gone when the test is."""
    monkeypatch.syspath_prepend(str(package / "python"))
    for known in [m for m in sys.modules if m.split(".")[0] == name]:
        monkeypatch.delitem(sys.modules, known)
    module = importlib.import_module(name)
    for known in [m for m in sys.modules if m.split(".")[0] == name]:
        monkeypatch.setitem(sys.modules, known, sys.modules[known])  # removed at the end
    return module


def reference(name: str, x: Any, data: Any, precision: str) -> tuple[Any, Any]:
    """x times the values of blocks as a precision sees it, and the size of its sums."""
    fmt = formats.get(name)
    values = QuantTensor(fmt, (len(data), x.shape[1]), data).dequantize()
    seen = rounded(x, precision)
    if precision == "int8":
        seen = quantize_activations(x, fmt.block, fmt.group).values()
    return matmul(seen, values), size_of_sums(seen, values)


def multiplies(
    package: Any,
    name: str,
    shapes: Iterable[tuple[int, int, int]],
    precisions: Iterable[str] = PRECISIONS,
) -> set[str]:
    """A Python package multiplies right, in all precisions that it offers; returns the kernels that
    served."""
    fmt, used = formats.get(name), set()
    for m, n, k in shapes:
        data = random_blocks(fmt, n, k)
        w = package.Weights(name, (n, k), data)
        x = activations(m, k, extremes=False)
        for asked in precisions:
            entry = package.choose(name, asked, m, n, k)
            if entry is None:
                with pytest.raises(ValueError, match=r"precision|serves"):
                    package.matmul(x, w, asked)
                continue
            used.add(entry)
            computes = next(p for p in ("fp32", "fp16", "bf16", "int8") if f"_{p}" in entry)
            want, size = reference(name, x, data, computes)
            # rounding to 11 and to 8 bits; a device's division may round activations another way
            allowed = {"fp32": 1e-5, "fp16": 2e-3, "bf16": 1.6e-2, "int8": 2e-3}[computes]
            out = np.full((m, n), np.nan, np.float32)
            assert package.matmul(x, w, asked, out) is out
            assert relative_error(out, want, size) < allowed, (entry, m, n, k)
    return used


def decodes(package: Any, name: str, n: int, k: int) -> None:
    """A Python package decodes all rows, and some."""
    fmt = formats.get(name)
    data = random_blocks(fmt, n, k)
    want = QuantTensor(fmt, (n, k), data).dequantize()
    w = package.Weights(name, (n, k), data)
    assert relative_error(package.dequantize(w), want) < 1e-6
    ids = np.array([[n - 1, 0], [1, n - 1]])
    assert relative_error(package.get_rows(w, ids), want[ids]) < 1e-6


def refuses(package: Any, name: str) -> None:
    """Mistakes are answered with a sentence."""
    fmt = formats.get(name)
    data = random_blocks(fmt, 3, 2 * fmt.block)
    w = package.Weights(name, (3, 2 * fmt.block), data)
    x = np.zeros((1, 2 * fmt.block), np.float32)
    for call in (
        lambda: package.Weights("q9", (3, fmt.block), data),
        lambda: package.Weights(name, (3, 2 * fmt.block + 1), data),
        lambda: package.Weights(name, (4, 2 * fmt.block), data),
        lambda: package.matmul(x, w, "fp3"),
        lambda: package.matmul(x[:, 1:], w),
        lambda: package.matmul(x, w, "fp32", np.zeros((1, 4), np.float32)),
        lambda: package.get_rows(w, np.array([3])),
        lambda: package.get_rows(w, np.array([-1])),
    ):
        with pytest.raises(ValueError) as found:
            call()
        assert len(str(found.value).splitlines()) == 1
    assert package.matmul(x[:0], w).shape == (0, 3)


# ---- commands of documents ----------------------------------------------------------------------


def environment(**more: str) -> dict[str, str]:
    found = find_compiler()
    if isinstance(found, str):
        pytest.skip(found)
    return os.environ | {"CC": " ".join(found.command), "ISAS": " ".join(HERE)} | more


def run(command: str, cwd: Path, **more: str) -> str:
    """A line of a document, in a shell."""
    done = subprocess.run(
        ["bash", "-ec", command], cwd=cwd, env=environment(**more), capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def commands(page: Path) -> list[str]:
    """The indented lines of a page."""
    return re.findall(r"^    (\S.*)$", page.read_text("utf-8"), re.M)


def in_checkout(checkout: Path, command: str, **more: str) -> str:
    return run(command, checkout, PATH=f"{checkout / 'tools'}:{os.environ['PATH']}", **more)

"""Projects for Hugging Face's kernel-builder.

What kernel-builder itself adds (registration.h, _ops.py, metadata.json) is made here as its
documentation describes it, as it runs under Nix only.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import json
import platform
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from kernelgen import targets
from kernelgen.ir import formats
from kernelgen.packages import write
from tests.packages import making
from tests.packages.making import planned

OPS = ("dequantize", "get_rows", "matvec", "matmul")
PROJECTS = {"c": "cpu", "cuda": "cuda", "metal": "metal"}

REGISTRATION = """
#pragma once
#include <Python.h>
#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)
#define TEXT_(a) #a
#define TEXT(a) TEXT_(a)
#define TORCH_LIBRARY_EXPAND(name, module) TORCH_LIBRARY(name, module)
#define REGISTER_EXTENSION(name)                                                    \\
    PyMODINIT_FUNC JOIN(PyInit_, name)() {                                          \\
        static PyModuleDef module = {PyModuleDef_HEAD_INIT, TEXT(name), nullptr, 0, \\
                                     nullptr};                                      \\
        return PyModule_Create(&module);                                            \\
    }
"""

OPS_PY = """
import torch
from . import {0}
ops = torch.ops.{0}
def add_op_namespace_prefix(name): return "{0}::" + name
"""


def project(target: str, *names: str) -> dict[str, Any]:
    return write.contents(planned(target, *names, ops=OPS), "huggingface")


@pytest.mark.parametrize("target", PROJECTS)
def test_layout(target: str) -> None:
    """build.toml names the files that are there, and what kernel-builder wants is."""
    made = project(target, "q4_K", "f16")
    said = tomllib.loads(str(made["build.toml"]))
    general = said["general"]
    module = general["name"].replace("-", "_")
    assert general["edition"] == 5 and general["backends"] == [PROJECTS[target]]
    assert f"torch-ext/{module}/__init__.py" in made and "flake.nix" in made and "CARD.md" in made
    (framework,) = {"torch", "torch-noarch"} & said.keys()
    named = [*said[framework].get("src", ())]
    for one in said.get("kernel", {}).values():
        assert one["backend"] == PROJECTS[target] and one["depends"] == ["torch"]
        named += one["src"]
    assert [path for path in named if path not in made] == []
    code = [p for p in made if p.endswith((".cpp", ".cu", ".inc", ".h")) and "torch-ext" not in p]
    assert [path for path in code if path not in named] == []
    assert write.contents(planned(target, "q4_K", "f16", ops=OPS), "huggingface") == made
    for name in (n for n in made if n.endswith(".py")):
        compile(str(made[name]), name, "exec")


def test_other_targets_have_none() -> None:
    for target in ("opencl", "wgsl", "triton", "numpy"):
        assert write.packageable(targets.get(target), "huggingface") is not None


@pytest.mark.slow
def test_cpu_kernels_run(tmp_path: Path) -> None:
    """Compiled as kernel-builder compiles them, loaded as a build variant, called from torch."""
    if importlib.util.find_spec("torch") is None or shutil.which("g++") is None:
        pytest.skip("torch and g++ are needed to compile an extension")
    folder, name = tmp_path / "project", "_kernelgen_cpu_cpu_0123456"
    write.write(project("c", "q4_K", "f16"), folder)
    (folder / "torch-ext" / "registration.h").write_text(REGISTRATION)
    variant = built(folder, name)
    run = subprocess.run(
        [sys.executable, "-c", ON_CPU, str(variant), str(making.ROOT)], capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    if importlib.util.find_spec("kernels") is not None:
        run = subprocess.run(
            [sys.executable, "-c", BY_KERNELS, str(folder)], capture_output=True, text=True,
            check=False,
        )  # fmt: skip
        assert run.returncode == 0, run.stderr


def built(folder: Path, name: str) -> Path:
    """The build variant that kernel-builder would make of a project: build/<variant>."""
    import sysconfig

    import torch

    said = tomllib.loads((folder / "build.toml").read_text())
    (kernel,) = said["kernel"].values()
    root = Path(torch.__file__).parent
    includes = [root / "include", sysconfig.get_paths()["include"], folder / "torch-ext"]
    sources = [s for s in [*said["torch"]["src"], *kernel["src"]] if s.endswith(".cpp")]
    version = "".join(torch.__version__.split(".")[:2])
    variant = folder / "build" / f"torch{version}-cxx11-cpu-{platform.machine()}-linux"
    variant.mkdir(parents=True)
    objects = []
    for source in sources:
        objects.append(str(folder / f"{len(objects)}.o"))
        subprocess.run(
            ["g++", "-std=c++20", "-fPIC", "-w", *kernel["cxx-flags"], "-O1",
             f"-DTORCH_EXTENSION_NAME={name}", "-DCPU_KERNEL", *(f"-I{i}" for i in includes),
             "-c", str(folder / source), "-o", objects[-1]], check=True,
        )  # fmt: skip
    subprocess.run(
        ["g++", "-shared", *objects, "-o", str(variant / f"{name}.abi3.so"), f"-L{root / 'lib'}",
         "-ltorch", "-ltorch_cpu", "-lc10"], check=True,
    )  # fmt: skip
    for file in (folder / "torch-ext" / "kernelgen_cpu").iterdir():
        shutil.copy(file, variant)
    (variant / "_ops.py").write_text(OPS_PY.format(name))
    (variant / "metadata.json").write_text(json.dumps(metadata(variant, name, said["general"])))
    return variant


def metadata(variant: Path, name: str, general: dict[str, Any]) -> dict[str, Any]:
    digests = {
        p.name: base64.b64encode(hashlib.sha256(p.read_bytes()).digest()).decode()
        for p in variant.iterdir()
    }
    return {
        "name": general["name"], "id": name, "version": general["version"],
        "license": general["license"], "backend": {"type": "cpu"},
        "digest": {"algorithm": "sha256", "files": digests},
    }  # fmt: skip


ON_CPU = """
import importlib.util, sys
variant, root = sys.argv[1:]
spec = importlib.util.spec_from_file_location(
    "of_the_hub", variant + "/__init__.py", submodule_search_locations=[variant])
kernel = sys.modules["of_the_hub"] = importlib.util.module_from_spec(spec)
import torch
spec.loader.exec_module(kernel)
sys.path.insert(0, root)
import numpy as np, pytest
from kernelgen.targets.c.runtime import native_isa
from tests.packages import making
assert kernel.isa() == native_isa().name, kernel.isa()

class Package:  # as the tests of packages know one
    class Weights:
        def __init__(self, name, shape, data):
            self.name, self.shape = name, shape
            self.data = torch.from_numpy(data.copy())
            self.prepared = kernel.prepare(self.data, name, shape[1])
    @staticmethod
    def choose(name, precision, m, n, k):
        computes = {"auto": "int8" if name == "q4_K" else "fp32", "int8": "int8"}
        if name == "f16" and precision == "int8": return None
        return "_" + computes.get(precision, "fp32")
    @staticmethod
    def matmul(x, w, precision, out=None):
        try: y = kernel.matmul(torch.from_numpy(x), w.prepared, w.name, w.shape[0], precision)
        except RuntimeError as error: raise ValueError(str(error))
        if out is not None: out[...] = y.numpy()
        return y.numpy() if out is None else out
    dequantize = staticmethod(lambda w: kernel.dequantize(w.data, w.name, w.shape).numpy())

for name in ("q4_K", "f16"):
    making.multiplies(Package, name, [(1, 5, 256), (3, 37, 768), (40, 18, 512)])
    w = Package.Weights(name, (5, 512), making.random_blocks(making.formats.get(name), 5, 512))
    want = making.QuantTensor(making.formats.get(name), (5, 512), w.data.numpy()).dequantize()
    assert making.relative_error(Package.dequantize(w), want) < 1e-6
with pytest.raises(RuntimeError, match="multiple of 256"):
    kernel.prepare(w.data, "q4_K", 100)
with pytest.raises(RuntimeError, match="q9"):
    kernel.prepare(w.data, "q9", 512)
# a graph without breaks: shapes are known without running it
from torch._subclasses.fake_tensor import FakeTensorMode
with FakeTensorMode() as mode:
    y = kernel.matmul(torch.empty(3, 512), torch.empty(10, dtype=torch.uint8), "q4_K", 7)
    assert y.shape == (3, 7)
"""

BY_KERNELS = """
import sys
from pathlib import Path
import kernels, torch
kernel = kernels.get_local_kernel(Path(sys.argv[1]))
w = torch.zeros((3, 144), dtype=torch.uint8)
y = kernel.matmul(torch.ones(2, 256), kernel.prepare(w, "q4_K", 256), "q4_K", 3)
assert y.shape == (2, 3) and not y.any()
"""


def test_formats_of_the_project_are_known() -> None:
    made = project("c", "q4_K", "f16")
    text = str(made["torch-ext/kernelgen_cpu/__init__.py"])
    for name in ("q4_K", "f16"):
        fmt = formats.get(name)
        assert f'"{name}": ({fmt.block}, {fmt.nbytes})' in text

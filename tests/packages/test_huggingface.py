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
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from kernelgen import targets
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


def test_metal_variant_is_complete(tmp_path: Path) -> None:
    """Its digests are those of its files, all of them."""
    write.write(project("metal", "q8_0"), tmp_path)
    variant = tmp_path / "build" / "torch-metal"
    said = json.loads((variant / "metadata.json").read_text())
    there = {p.relative_to(variant).as_posix(): p for p in variant.rglob("*") if p.is_file()}
    del there["metadata.json"]
    assert said["digest"]["files"] == {
        name: base64.b64encode(hashlib.sha256(path.read_bytes()).digest()).decode()
        for name, path in there.items()
    }
    assert said["id"].isidentifier() and said["backend"] == {"type": "metal"}


def test_huggingface_reads_it(tmp_path: Path) -> None:
    """The parsers of its own package, where that is installed."""
    if importlib.util.find_spec("kernels") is None:
        pytest.skip("kernels is not installed; pip install kernels")
    from kernels import _rust as theirs  # type: ignore[import-not-found, unused-ignore]

    for target, backend in PROJECTS.items():
        write.write(project(target, "q8_0"), tmp_path / target)
        (found,) = theirs.Build.open(tmp_path / target).general.backends
        assert str(found).lower().endswith(backend)
    variant = tmp_path / "metal" / "build" / "torch-metal"
    said = theirs.Metadata.read_from_file(variant / "metadata.json")
    said.digest.validate(theirs.Digest.hash_variant(theirs.DigestAlgorithm.SHA256, variant))


def test_other_targets_have_none() -> None:
    for target in ("opencl", "wgsl", "triton", "numpy"):
        assert write.packageable(targets.get(target), "huggingface") is not None


def test_the_cpu_is_asked_in_names_that_compilers_know() -> None:
    """Those of __builtin_cpu_supports that GCC 11 has."""
    asked = re.findall(r'supports\("(\w+)"\)', project("c", "q8_0")["torch-ext/torch_binding.cpp"])
    assert set(asked) == {
        "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512vnni",
        "avx512vbmi", "gfni", "avxvnni",
    }  # fmt: skip


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
        "license": general["license"], "python-depends": [], "backend": {"type": "cpu"},
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
from tests.packages import making
assert kernel.isa() == making.BEST.name, kernel.isa()

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


# ---- devices, emulated -----------------------------------------------------------------------

EMULATED = """
import importlib.util, sys, types
folder, target, root, ops = sys.argv[1:]
sys.path.insert(0, root)
import numpy as np, torch
from kernelgen.emulator import Emulator
from tests.packages import making
ops = tuple(ops.split(","))
sources = {k.entry: k.source for k in making.planned(target, "q4_K", ops=ops).kernels}
emulators, started = {}, []

def run(entry, groups, threads, arguments, shared_bytes=0):
    if entry not in emulators:
        emulators[entry] = Emulator(sources[entry], target, name=entry)
    given = []
    for one in arguments:
        if isinstance(one, torch.Tensor):
            assert one.is_contiguous()
            one = one.numpy().reshape(-1).view(np.uint8)
        given.append(one)
    report = emulators[entry].run(entry, groups, threads, given, shared_bytes=shared_bytes)
    assert report.ok, report
    started.append(entry)

def load(name, path, **attributes):
    spec = importlib.util.spec_from_file_location(
        name, path + "/__init__.py", submodule_search_locations=[path])
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    for key, value in attributes.items():
        sys.modules[f"{name}.{key}"] = value
    spec.loader.exec_module(module)
    return module

if target == "cuda":
    ops = types.ModuleType("_ops")
    ops.ops = types.SimpleNamespace(launch=lambda entry, buffers, sizes, x, y, threads, shared:
        run(entry, (x, y), threads, [*buffers, *sizes], shared))
    torch.cuda.get_device_capability = lambda device=None: (9, 0)
    torch.cuda.current_device = lambda: 0
    kernel = load("of_the_hub", folder + "/torch-ext/kernelgen_cuda", _ops=ops)
else:
    import platform
    platform.mac_ver = lambda: ("15.1", (), "arm64")
    def compile_shader(source):
        entry = next(e for e, text in sources.items() if text == source)
        def call(*arguments, threads, group_size, arg_casts):
            assert arg_casts == "int32" and threads[0] % group_size[0] == 0
            run(entry, (threads[0] // group_size[0], threads[1]), group_size[0], arguments)
        return types.SimpleNamespace(**{entry: call})
    torch.mps.compile_shader = compile_shader
    kernel = load("of_the_hub", folder + "/build/torch-metal")

class Package:  # as the tests of packages know one
    choose = staticmethod(kernel.choose)
    @staticmethod
    def Weights(name, shape, data):
        return kernel.Weights(name, shape, torch.from_numpy(data.copy()))
    @staticmethod
    def matmul(x, w, precision, out):
        out[...] = kernel.matmul(torch.from_numpy(x), w, precision).numpy()
        return out

if target == "cuda":
    used = making.multiplies(Package, "q4_K", [(20, 18, 512)], ("int8", "fp16"))
    assert any("wgmma" in e for e in used) and any("quantize" in e for e in started)
else:
    used = making.multiplies(Package, "q4_K", [(2, 18, 512)], ("auto",))
    used |= making.multiplies(Package, "q4_K", [(20, 18, 512)], ("bf16",))
    assert any("matrix" in e for e in used)
w = Package.Weights("q4_K", (5, 512), making.random_blocks(making.formats.get("q4_K"), 5, 512))
want = making.QuantTensor(making.formats.get("q4_K"), (5, 512), w.data.numpy()).dequantize()
got = kernel.get_rows(w, torch.tensor([[4, 0], [1, 4]])).numpy()
assert making.relative_error(got, want[[[4, 0], [1, 4]]]) < 1e-6
assert kernel.matmul(torch.zeros(0, 512), w).shape == (0, 5)
"""


@pytest.mark.slow
@pytest.mark.parametrize("target", ("cuda", "metal"))
def test_on_torch_tensors(target: str, tmp_path: Path) -> None:
    """The project's Python part, with launches that end in the emulator."""
    if importlib.util.find_spec("torch") is None:
        pytest.skip("torch is not installed")
    reason = targets.get(target).runtime("emulated").available()
    if reason:
        pytest.skip(reason)
    write.write(project(target, "q4_K"), tmp_path / "project")
    run = subprocess.run(
        [sys.executable, "-c", EMULATED, str(tmp_path / "project"), target,
         str(making.ROOT), ",".join(OPS)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr


@pytest.mark.slow
def test_cuda_binding_compiles(tmp_path: Path) -> None:
    """With torch's headers; nothing of it can be run without a GPU."""
    import sysconfig

    if importlib.util.find_spec("torch") is None or shutil.which("nvcc") is None:
        pytest.skip("torch and nvcc are needed")
    import torch

    write.write(project("cuda", "q8_0"), tmp_path)
    (tmp_path / "torch-ext" / "registration.h").write_text(REGISTRATION)
    said = tomllib.loads((tmp_path / "build.toml").read_text())
    flags = ["-std=c++20", "-DTORCH_EXTENSION_NAME=_kernelgen_cuda", "-w"]
    root = Path(torch.__file__).parent
    includes = [root / "include", sysconfig.get_paths()["include"], tmp_path / "torch-ext"]
    macros = Path("c10/cuda/impl/cuda_cmake_macros.h")
    if not (root / "include" / macros).exists():  # a build of torch without CUDA lacks this one
        (tmp_path / "more" / macros).parent.mkdir(parents=True)
        (tmp_path / "more" / macros).write_text("#pragma once\n")
        includes.append(tmp_path / "more")
    subprocess.run(
        ["nvcc", *flags, *(f"-I{i}" for i in includes), "-c", "-x", "cu", "-o", tmp_path / "b.o",
         tmp_path / "torch-ext" / "torch_binding.cpp"], check=True,
    )  # fmt: skip
    for name, kernel in said["kernel"].items():
        oldest = kernel.get("cuda-capabilities", ["7.5"])[0].replace(".", "")
        (source,) = (s for s in kernel["src"] if s.endswith(".cu"))
        more = kernel.get("cuda-flags", [])
        subprocess.run(
            # -arch would have nvcc 13 make code for compute_90, too, which lacks wgmma
            ["nvcc", *flags, *more, f"-gencode=arch=compute_{oldest},code=sm_{oldest}", "-c", "-o",
             tmp_path / f"{name}.o", tmp_path / source], check=True,
        )  # fmt: skip

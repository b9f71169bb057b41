"""The OpenCL target on whatever device is here: PoCL, where there is no GPU."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kernelgen import targets
from kernelgen.files import contents, kernels
from kernelgen.generate import generate
from kernelgen.ir import BlockFormat, formats
from kernelgen.targets.base import EMULATED
from kernelgen.targets.opencl import runtime as opencl
from kernelgen.verify import verify
from tests import device_checks as checks

TARGET = targets.get("opencl")
LAYOUTS = ("native", "planes")


def name(fmt: BlockFormat) -> str:
    return fmt.name


@pytest.mark.parametrize("fmt", (*checks.SAMPLE, *checks.MADE_UP), ids=name)
def test_verified(fmt: BlockFormat) -> None:
    checks.passes_verify(TARGET, fmt)


@pytest.mark.parametrize("fmt", (*checks.SAMPLE[:4], checks.AWKWARD), ids=name)
def test_native_layout(fmt: BlockFormat) -> None:
    """Where they were verified above, kernels read planes."""
    walks = list(checks.walks(TARGET, fmt))
    assert {w.config().as_dict()["layout"] for w in walks} == {"planes"}
    assert checks.passes_with(TARGET, fmt, layout="native") == len(walks)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("fmt", formats.FORMATS, ids=name)
def test_all_formats_in_all_layouts(fmt: BlockFormat, layout: str) -> None:
    checks.passes_with(TARGET, fmt, every_case=True, layout=layout)


@pytest.mark.slow
@pytest.mark.parametrize("fmt", (*checks.SAMPLE, *checks.MADE_UP), ids=name)
def test_configs_at_random(fmt: BlockFormat) -> None:
    checks.some_configs(TARGET, fmt, 3)


@pytest.mark.parametrize("fmt", (formats.get("q5_0"), formats.get("f16")), ids=name)
def test_edge_shapes(fmt: BlockFormat) -> None:
    checks.edge_shapes(TARGET, fmt)


@pytest.mark.parametrize("fmt", (formats.get("q6_K"), checks.THREE_BITS), ids=name)
def test_outputs(fmt: BlockFormat, monkeypatch: pytest.MonkeyPatch) -> None:
    checks.outputs_written_and_kept(TARGET, fmt, monkeypatch)


@pytest.mark.parametrize("fmt", (formats.get("q4_0"), formats.get("f16")), ids=name)
def test_not_finite(fmt: BlockFormat) -> None:
    checks.not_finite_stays_in_its_row(TARGET, fmt)


@pytest.mark.parametrize("fmt", (formats.get("q4_0"), checks.THREE_BITS), ids=name)
def test_pieces(fmt: BlockFormat, monkeypatch: pytest.MonkeyPatch) -> None:
    checks.pieces_change_nothing(TARGET, fmt, monkeypatch)


@pytest.mark.parametrize("fmt", (formats.get("q4_0"), formats.get("f16")), ids=name)
def test_large_grids(fmt: BlockFormat, monkeypatch: pytest.MonkeyPatch) -> None:
    checks.more_groups_than_a_grid_has(TARGET, fmt, monkeypatch)


def test_prepared_once(monkeypatch: pytest.MonkeyPatch) -> None:
    checks.prepared_once(TARGET, monkeypatch)


def test_many_threads() -> None:
    checks.many_threads(TARGET)


def test_rejections() -> None:
    checks.rejections_show_the_line(
        TARGET,
        [
            ("part[i * THREADS + thread]", "part[i * THREDS + thread]", "THREDS"),
            ("const uint row0 = ", "const uint row0 + ", "expected ';'"),
        ],
    )


#: where kernels with sub-groups and integer dot products run: PoCL has neither
EMULATED_SAMPLE = ("q4_K", "f16")
EMULATED_FORMATS = [
    pytest.param(fmt, marks=[] if fmt.name in EMULATED_SAMPLE else pytest.mark.slow)
    for fmt in (*formats.FORMATS, *checks.MADE_UP)
]


def emulated(subgroup: int = 32) -> opencl.EmulatedRuntime:
    """The emulator; skips the test where it cannot run."""
    found = opencl.emulated(subgroup)
    reason = found.available()
    if reason is not None:
        pytest.skip(reason)
    return found


@pytest.mark.parametrize("fmt", EMULATED_FORMATS, ids=name)
def test_emulated_with_every_extension(fmt: BlockFormat) -> None:
    results = list(verify(TARGET, [fmt], runtime=emulated()))
    assert {r.how for r in results} == {"emulated"}
    assert [(r.op, r.precision, r.problem) for r in results if not r.ok] == []
    matvec = next(r.config for r in results if r.op == "matvec" and r.precision == "fp32")
    assert matvec["reduce"] == "subgroup"
    packed = {r.config["dot"] for r in results if r.precision == "int8" and "dot" in r.config}
    assert packed == (set() if fmt.float_codes else {"packed"})


@pytest.mark.parametrize("size", (8, 16, 64))
@pytest.mark.parametrize("fmt", (formats.get("q4_0"),), ids=name)
def test_emulated_subgroups_of_every_size(fmt: BlockFormat, size: int) -> None:
    """The text is the same for all; 32 is tested above."""
    found = emulated(size)
    for precision in ("fp32", "int8"):
        config = TARGET.walk("matvec", fmt, precision).config.default(found.capabilities())
        assert "subgroups" in config.features
        kernel = generate("matvec", fmt, TARGET, config, precision)
        checks.error_of(kernel, found, [(1, 37, 3 * fmt.block), (3, 5, fmt.block)])


def test_the_emulator_is_a_variant() -> None:
    assert TARGET.runtime(EMULATED).how() == "emulated"
    assert TARGET.runtime().how() == "run"


def test_features_are_named() -> None:
    """PoCL runs none of these variants but half precision; the emulator runs all."""
    marks = {"dot": "dot_4x8packed_ss_int", "subgroups": "sub_group_reduce_add(x)"}
    checks.features_are_named(TARGET, marks)
    (kernel,) = (
        k
        for k in checks.texts(TARGET, formats.get("q4_0"))
        if k.op == "matvec" and k.features == ("subgroups",) and k.precision == "fp32"
    )
    assert "#pragma OPENCL EXTENSION cl_khr_subgroups : enable" in kernel.source
    assert "get_sub_group_id()" in kernel.source


#: as of a device that has every extension
CLANG = (
    "-x", "cl", "--target=spir64", "-Xclang", "-finclude-default-header", "-Xclang", "-cl-ext=+all",
    "-D__opencl_c_integer_dot_product_input_4x8bit_packed", "-D__opencl_c_subgroups",
    "-Wall", "-Wextra", "-Wno-unused", "-Wno-unused-parameter", "-Werror", "-fsyntax-only",
)  # fmt: skip


@pytest.mark.parametrize("fmt", (*checks.SAMPLE[::3], checks.AWKWARD), ids=name)
def test_clang_compiles_every_variant(fmt: BlockFormat) -> None:
    """Also those that no device here runs."""
    clang = next(filter(None, map(shutil.which, ("clang-19", "clang-18", "clang-17"))), None)
    if clang is None:
        pytest.skip("there is no recent clang on the path; on Debian: apt-get install clang-19")
    for kernel in checks.texts(TARGET, fmt):
        standard = "CL3.0" if {"dot", "subgroups"} & set(kernel.features) else "CL1.2"
        command = [clang, *CLANG, f"-cl-std={standard}", "-"]
        run = subprocess.run(
            command, input=kernel.source, capture_output=True, text=True, check=False
        )
        assert run.returncode == 0, f"{kernel.entry} {kernel.config}: {run.stderr}"


def test_manifest_names_extensions() -> None:
    fmt = formats.get("q4_0")
    walk = TARGET.walk("matvec", fmt, "int8")
    config = walk.config.from_dict({"dot": "packed", "reduce": "subgroup"})
    kernel = generate("matvec", fmt, TARGET, config, "int8")
    text = contents(TARGET, [kernel])["manifest.json"]
    assert '"cl_khr_subgroups"' in text and '"cl_khr_integer_dot_product"' in text
    text = contents(TARGET, [generate("matmul", fmt, TARGET, None, "fp16")])["manifest.json"]
    assert '"features": []' in text and '"tolerance": 0.002' in text


def test_no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    import pyopencl

    find: Any = opencl.find_device.__wrapped__
    monkeypatch.setattr(pyopencl, "get_platforms", list)
    checks.one_sentence(find())
    monkeypatch.setitem(sys.modules, "pyopencl", None)
    checks.one_sentence(find())
    monkeypatch.setattr(opencl, "find_device", find)
    checks.one_sentence(opencl.OpenCLRuntime().available())


def test_devices_are_described() -> None:
    found = checks.runtime(TARGET).describe()
    assert found
    for one in found:
        assert one["max_threads"] > 0 and one["shared_bytes"] > 0 and one["largest_buffer"] > 0
        assert isinstance(one["subgroups"], bool) and one["threads_multiple"]
        assert one["memory"] >= one["largest_buffer"] and one["driver"]
        assert one["kind"] in ("CPU", "GPU", "accelerator")


ORACLE = """
import sys

import numpy as np

from kernelgen import targets
from kernelgen.ir import formats
from kernelgen.ir.ops import quantize_activations
from kernelgen.targets.device import DeviceRuntime
from tests import device_checks as checks

def quantized(self, kernel, buffers, sizes):
    found, driver = np.empty((sizes["M"], sizes["K"]), np.float32), self.driver()
    driver.download(buffers["x"], found)
    q = quantize_activations(found, kernel.format.block, kernel.format.group)
    return {"xq": driver.upload(q.q), "xd": driver.upload(q.scale), "xs": driver.upload(q.sums)}

# What one kernel wrote, Oclgrind sometimes calls uninitialized when the next one reads it, though
# it had nothing to say when it was written: so here the integers come from the host.
original, DeviceRuntime.made = DeviceRuntime.made, quantized

target = targets.get("opencl")
runtime = target.runtime()
driver = runtime.driver()
assert "Oclgrind" in str(runtime.describe()), runtime.describe()
for name in sys.argv[1:]:
    fmt = formats.get(name)
    for one in checks.walks(target, fmt):
        for layout in ("native", "planes"):
            config = checks.changed(one, runtime, layout=layout)
            kernel = checks.generate_walk(one, fmt, target, config)
            if one.op == "quantize":
                x = driver.upload(np.ones((2, fmt.block), np.float32))
                original(runtime, kernel, {"x": x}, {"M": 2, "K": fmt.block})
                driver.download(x, np.empty((2, fmt.block), np.float32))  # wait for the kernel
                continue
            m = 2 if one.op == "matvec" else 9
            checks.error_of(kernel, runtime, [(m, 5, fmt.block)])
print("all right")
"""


def under_oclgrind(folder: Path, script: str, *arguments: str) -> tuple[str, str]:
    """What a script prints, and what Oclgrind has to say about its kernels."""
    if shutil.which("oclgrind") is None:
        pytest.skip("there is no oclgrind on the path; on Debian: apt-get install oclgrind")
    log = folder / "log"
    command = ["oclgrind", "--data-races", "--uninitialized", "--log", str(log)]
    run = subprocess.run(
        [*command, sys.executable, "-c", script, *arguments],
        env=os.environ | {"PYTHONPATH": ".", "KERNELGEN_CACHE": str(folder)},
        cwd=Path(__file__).parent.parent, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    return run.stdout + run.stderr, log.read_text() if log.exists() else ""


@pytest.mark.slow
@pytest.mark.parametrize("fmt", ("q4_K,q5_0", "q6_K,f16"))
def test_under_oclgrind(fmt: str, tmp_path: Path) -> None:
    """Reads and writes outside of buffers, races, reads of what was never written."""
    output, log = under_oclgrind(tmp_path, ORACLE, *fmt.split(","))
    assert output.strip().endswith("all right"), output
    assert log == ""


RACE = """
import dataclasses

from kernelgen import targets
from kernelgen.ir import formats
from tests import device_checks as checks

target = targets.get("opencl")
kernel = checks.generate("matvec", formats.get("q4_0"), target, precision="fp32")
source = kernel.source.replace("barrier(CLK_LOCAL_MEM_FENCE);", "", 1)
assert source != kernel.source
checks.check(dataclasses.replace(kernel, source=source), target.runtime(), 1, 5, 256)
"""


def test_oclgrind_sees_a_race(tmp_path: Path) -> None:
    assert "data race" in under_oclgrind(tmp_path, RACE)[1]


def test_every_kernel_is_written() -> None:
    made = [k for f in formats.FORMATS for k in kernels(TARGET, [f])]
    assert len({k.entry for k in made}) == len(made) > 100
    assert all(k.entry in k.source and f"hash {k.hash}" in k.source for k in made)

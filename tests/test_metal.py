"""Metal without a Mac: kernels run in the emulator, and are launched through stand-ins for torch
and pyobjc."""

from __future__ import annotations

import dataclasses
import platform
import re
import sys
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import kernelgen
from kernelgen import api, arrays, dispatch, targets
from kernelgen.config import Capabilities
from kernelgen.config.matrices import HalfMatrixTileConfig, MatrixTileConfig
from kernelgen.emulator import Emulator, Report
from kernelgen.errors import CompileError, TargetError
from kernelgen.generate import generate, generate_walk
from kernelgen.ir import formats
from kernelgen.ir.block import BlockFormat
from kernelgen.ir.layout import named_layout
from kernelgen.ir.ops import matmul
from kernelgen.problem import relative_error
from kernelgen.targets.base import EMULATED, Kernel, Walk
from kernelgen.targets.metal import CAPABILITIES, runtime
from kernelgen.tensor import QuantTensor
from kernelgen.verify import sample_weights, verify
from tests import device_checks, fake_metal
from tests.emulator.tools import needs_clang
from tests.made_up import THREE_BITS

pytestmark = needs_clang

METAL = targets.get("metal")
METAL_EMULATED = METAL.runtime(EMULATED)
SAMPLE = ("q4_K", "iq4_nl", "f16", "iq3_xxs")
SAMPLED = [*(formats.get(name) for name in SAMPLE), THREE_BITS]
OTHERS = [fmt for fmt in formats.FORMATS if fmt.name not in SAMPLE]
EACH = [*SAMPLED, *(pytest.param(fmt, marks=pytest.mark.slow) for fmt in OTHERS)]
MATRICES = [walk for walk in METAL.walks if (walk.op, walk.style) == ("matmul", "matrix")]


@pytest.mark.parametrize("fmt", EACH, ids=lambda fmt: fmt.name)
def test_emulated(fmt: BlockFormat) -> None:
    results = list(verify(METAL, [fmt], runtime=METAL_EMULATED))
    assert results and {r.how for r in results} == {"emulated"}
    assert [(r.op, r.precision, r.problem) for r in results if not r.ok] == []


# ---- products by matrices

#: what the default is not: each choice once, and the largest and smallest tiles
TILES: tuple[dict[str, Any], ...] = (
    {"tile_m": 128, "tile_n": 32, "simd_m": 4, "simd_n": 1, "words": 1, "padding": 0},
    {"tile_m": 16, "tile_n": 128, "simd_m": 1, "simd_n": 4, "depth": 16, "buffers": 2},
    {"depth": 64, "words": 2, "layout": "native", "simd_m": 4, "simd_n": 4},
)


def product(
    kernel: Kernel, fmt: BlockFormat, shape: tuple[int, int, int], sanitize: bool = False
) -> tuple[float, Report]:
    """One launch in the emulator: how far its result is off, and what was found."""
    m, n, k = shape
    blocks = sample_weights(fmt, n, k)
    packed = named_layout(kernel.config.as_dict()["layout"]).pack(blocks, fmt, k)
    x = np.random.default_rng(k).standard_normal((m, k), np.float32)
    y = np.full((m, n), np.nan, np.float32)
    launch = kernel.walk.launch(kernel.config, fmt)
    assert launch is not None
    groups = [eval(text, {"M": m, "N": n, "K": k}) for text in launch.groups]
    report = Emulator(kernel.source, "metal", name=kernel.entry).run(
        kernel.entry, groups, launch.threads, [packed, x, y, m, n, k], sanitize=sanitize
    )
    want = matmul(x, QuantTensor(fmt, (n, k), blocks).dequantize())
    return relative_error(y, want), report


@pytest.mark.parametrize("changes", TILES, ids=lambda changes: f"{len(changes)} changes")
@pytest.mark.parametrize("walk", MATRICES, ids=lambda walk: walk.precision)
def test_tiles(walk: Walk, changes: dict[str, Any]) -> None:
    config = walk.config(**changes)
    assert config.legal(CAPABILITIES) is None
    bounds = {"fp32": 1e-5, "fp16": 2e-3, "bf16": 1.6e-2}
    # depth and tiles divide none of it; a row of y lies at any address
    for fmt, shape in ((THREE_BITS, (23, 37, 320)), (formats.get("f16"), (9, 131, 75))):
        error, report = product(generate_walk(walk, fmt, METAL, config), fmt, shape)
        assert report.ok, report
        assert error < bounds[walk.precision]


@pytest.mark.parametrize("walk", MATRICES[:2], ids=lambda walk: walk.precision)
@pytest.mark.parametrize("buffers", [1, 2])
def test_checked_run_finds_nothing(walk: Walk, buffers: int) -> None:
    kernel = generate_walk(walk, THREE_BITS, METAL, walk.config(buffers=buffers))
    _, report = product(kernel, THREE_BITS, (17, 37, 192), sanitize=True)
    assert report.ok, report


@pytest.mark.parametrize(
    ("buffers", "barrier"), [(1, "threadgroup_"), (2, "threadgroup_"), (1, "simdgroup_")]
)
def test_every_barrier_is_needed(buffers: int, barrier: str) -> None:
    walk = MATRICES[0]
    kernel = generate_walk(walk, THREE_BITS, METAL, walk.config(buffers=buffers))
    places = [m.span() for m in re.finditer(rf"{barrier}barrier\(.*\);", kernel.source)]
    assert places
    for start, stop in places:
        text = kernel.source[:start] + kernel.source[stop:]
        _, report = product(
            dataclasses.replace(kernel, source=text), THREE_BITS, (17, 37, 192), sanitize=True
        )
        assert "race" in {f.kind for f in report.findings}, report


def test_long_sums_stay_exact() -> None:
    """A sum taken one by one is off by more than that: float32 is what was asked for."""
    fmt = formats.get("q4_0")
    error, report = product(generate("matmul", fmt, METAL, None, "fp32"), fmt, (16, 32, 16384))
    assert report.ok
    assert error < 4e-6


@pytest.mark.parametrize(
    ("changes", "caps", "reason"),
    [
        ({"tile_m": 16, "simd_m": 4}, {}, "16 along m does not divide into 4 times 8"),
        ({"tile_n": 32, "simd_n": 2}, {"max_threads": 64}, "128 threads in a group; .* 64"),
        ({"tile_m": 128, "tile_n": 128}, {}, "256 registers of each thread for sums; 64"),
        ({"tile_n": 128, "simd_n": 4, "depth": 64, "buffers": 2}, {}, "89088 bytes of shared"),
    ],
)
def test_reasons(changes: dict[str, Any], caps: dict[str, int], reason: str) -> None:
    said = MatrixTileConfig(**changes).legal(dataclasses.replace(CAPABILITIES, **caps))
    assert said is not None and re.search(reason, said)


@pytest.mark.parametrize("config", [MatrixTileConfig, HalfMatrixTileConfig])
def test_defaults_are_legal(config: type[MatrixTileConfig]) -> None:
    for m in (0, 9, 16, 17, 4096):
        chosen = config.default(CAPABILITIES, m)
        assert chosen.legal(CAPABILITIES) is None
        assert chosen.tile_m == (16 if 0 < m <= 16 else 32)


def test_half_the_bytes_take_half_the_memory() -> None:
    changes: dict[str, Any] = {"tile_m": 64, "tile_n": 128, "depth": 32, "simd_n": 4}
    whole, half = MatrixTileConfig(**changes), HalfMatrixTileConfig(**changes)
    # 192 rows of 32 numbers and 16 bytes, and 64 floats for each of 8 SIMD-groups
    assert whole.shared_bytes == 192 * 144 + 8 * 256
    assert half.shared_bytes == 192 * 80 + 8 * 256


# ---- text


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    """What asks for the runtime gets the emulator."""
    monkeypatch.setattr(runtime, "runtime", lambda variant="": METAL_EMULATED)


def test_features_are_named(emulated: None) -> None:
    marks = {"subgroups": "simd_sum", "matrix": "simdgroup_load", "bf16": "bfloat"}
    seen: set[str] = set()
    for kernel in device_checks.texts(METAL, formats.get("q4_K")):
        for feature, mark in marks.items():
            assert (feature in kernel.features) == (mark in kernel.source), (kernel.entry, feature)
        seen |= set(kernel.features)
    assert seen >= set(marks)


def test_matrices_serve_first_and_threads_where_there_are_none() -> None:
    fmt = formats.get("q4_K")
    plain = dataclasses.replace(CAPABILITIES, features=CAPABILITIES.features - {"matrix"})
    for precision in ("fp32", "fp16"):
        assert METAL.walk("matmul", fmt, precision, CAPABILITIES).style == "matrix"
        assert METAL.walk("matmul", fmt, precision, plain).style == ""
    old = dataclasses.replace(CAPABILITIES, features=CAPABILITIES.features - {"bf16"})
    with pytest.raises(TargetError, match="the device lacks bf16"):
        METAL.walk("matmul", fmt, "bf16", old)


@pytest.mark.parametrize("fmt", [formats.get("q4_K"), *device_checks.MADE_UP], ids=lambda f: f.name)
def test_text(fmt: BlockFormat, emulated: None) -> None:
    for kernel in device_checks.texts(METAL, fmt):
        numbers = [int(n) for n in re.findall(r"\[\[buffer\((\d+)\)\]\]", kernel.source)]
        assert numbers == list(range(len(kernel.arguments)))
        assert ("fp contract(off)" in kernel.source) == (not kernel.contract)
        launch = kernel.walk.launch(kernel.config, fmt)
        assert launch is not None
        assert f"max_total_threads_per_threadgroup({launch.threads})" in kernel.source
        if "_barrier" in kernel.source:  # Metal forbids a return before one
            assert "return" not in kernel.source.partition("kernel void")[2]


@pytest.mark.parametrize("fmt", device_checks.MADE_UP[1:], ids=lambda fmt: fmt.name)
@pytest.mark.parametrize(
    "walk", [MATRICES[0], METAL.walk("matvec", THREE_BITS, "int8")], ids=lambda walk: walk.name
)
def test_awkward_names_and_tables(fmt: BlockFormat, walk: Walk) -> None:
    if walk.accepts(fmt) is None:
        kernel = generate_walk(walk, fmt, METAL)
        device_checks.error_of(kernel, METAL_EMULATED, [(7, 37, 3 * fmt.block)])


# ---- drivers


@dataclass
class Mac:
    """A Mac with one way to its GPU."""

    queue: fake_metal.Queue
    runtime: runtime.MetalRuntime
    modules: dict[str, Any]


@pytest.fixture(params=["torch", "pyobjc"])
def mac(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Mac:
    queue = fake_metal.Queue()
    modules: dict[str, Any] = {"torch": None, "Metal": None, "objc": None}
    if request.param == "torch":
        modules["torch"] = fake_metal.torch(queue)
    else:
        modules["Metal"], modules["objc"] = fake_metal.pyobjc(queue)
    on_a_mac(monkeypatch, modules)
    found = runtime.MetalRuntime()
    monkeypatch.setattr(runtime, "runtime", lambda variant="": found)
    return Mac(queue, found, modules)


def on_a_mac(
    monkeypatch: pytest.MonkeyPatch, modules: dict[str, Any], version: str = "15.1"
) -> None:
    """Apple silicon with these modules; None cannot be imported."""
    system = SimpleNamespace(
        system=lambda: "Darwin", machine=lambda: "arm64", mac_ver=lambda: (version, (), "arm64")
    )
    monkeypatch.setattr(runtime, "platform", system)
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)


def test_launches(mac: Mac) -> None:
    """Grids, threads, and arguments in the kernel's order."""
    fmt = formats.get("q5_0")
    n, k = 70, 96
    w = QuantTensor(fmt, (n, k), sample_weights(fmt, n, k))
    for m, precision in ((3, "int8"), (40, "fp32"), (9, "fp16")):
        mac.queue.launched.clear()
        one = METAL.walk("matvec" if m < 9 else "matmul", fmt, precision)
        kernel = generate_walk(one, fmt, METAL, one.default(fmt, CAPABILITIES, m))
        x = np.random.default_rng(m).standard_normal((m, k), np.float32)
        y = np.full((m, n), np.nan, np.float32)
        mac.runtime.matmul(kernel)(x, w, y)
        *before, last = mac.queue.launched
        assert [b.entry for b in before] == [one.entry for one in kernel.needs.values()]
        launch = one.launch(kernel.config, fmt)
        assert launch is not None
        wanted = [eval(text, {"min": min}, {"M": m, "N": n, "K": k}) for text in launch.groups]
        assert last.entry == kernel.entry
        assert last.groups == (*wanted, 1) and last.threads == (launch.threads, 1, 1)
        assert last.arguments[-3:] == [m, n, k]
        assert [type(a) for a in last.arguments[:-3]] == [np.ndarray] * (len(kernel.arguments) - 3)
        bounds = {"int8": 2e-2, "fp32": 1e-5, "fp16": 2e-3}
        assert relative_error(y, matmul(x, w.dequantize())) < bounds[precision]


def test_nothing_happens_before_somebody_waits(mac: Mac) -> None:
    fmt = formats.get("f16")
    kernel = generate("matmul", fmt, METAL, None, "fp32")
    driver = mac.runtime.driver()
    buffers = [driver.upload(np.zeros(4 * 32, np.uint8)), driver.upload(np.zeros(64, np.float32))]
    out = driver.empty(4 * 4 * 4)
    driver.launch(driver.program(kernel), (1, 1), 128, [*buffers, out], [4, 4, 16])
    assert len(mac.queue.waiting) == 1
    found = np.ones((4, 4), np.float32)
    driver.download(out, found)
    assert not mac.queue.waiting and not found.any()


@pytest.mark.parametrize("mac", ["torch"], indirect=True)
def test_tensors_on_the_gpu_stay_there(mac: Mac) -> None:
    """Kernels are launched on their memory, and nobody waits."""
    forget = [dispatch.runtime_of, dispatch.decide, dispatch._resident, api._matmul_runner]
    for cached in forget:
        cached.cache_clear()  # type: ignore[attr-defined]
    try:
        w = kernelgen.quantize(np.random.default_rng(0).standard_normal((20, 64)), "q8_0")
        x = np.random.default_rng(1).standard_normal((3, 64), np.float32)
        assert dispatch.decide(arrays.kind_of(fake_metal.Floats(x, mac.queue))).target == "metal"
        y = kernelgen.matmul(fake_metal.Floats(x, mac.queue), w, precision="fp32")
    finally:
        for cached in forget:
            cached.cache_clear()  # type: ignore[attr-defined]
    assert type(y) is fake_metal.Floats and mac.queue.waiting and np.isnan(y.memory).all()
    memory = [a.ctypes.data for a in mac.queue.launched[-1].arguments if isinstance(a, np.ndarray)]
    assert {x.ctypes.data, y.memory.ctypes.data} <= set(memory)
    mac.queue.finish()
    assert relative_error(y.memory, matmul(x, w.dequantize())) < 1e-5


@pytest.mark.parametrize("mac", ["pyobjc"], indirect=True)
def test_results_are_written_and_nothing_else(mac: Mac, monkeypatch: pytest.MonkeyPatch) -> None:
    device_checks.outputs_written_and_kept(METAL, THREE_BITS, monkeypatch)


@pytest.mark.parametrize("mac", ["torch"], indirect=True)
def test_pieces(mac: Mac, monkeypatch: pytest.MonkeyPatch) -> None:
    device_checks.pieces_change_nothing(METAL, THREE_BITS, monkeypatch)


@pytest.mark.parametrize("mac", ["torch"], indirect=True)
def test_rows_apart(mac: Mac) -> None:
    device_checks.not_finite_stays_in_its_row(METAL, formats.get("q5_0"))


def test_rejections_show_the_line(mac: Mac) -> None:
    breaks = (
        ("f32(codes", "f64(codes", "f64"),
        ("threadgroup_barrier(", "threadgroup_wall(", "threadgroup_wall"),
        ("const uint blocks = ", "const device uint *blocks = ", "blocks"),
    )
    fmt = formats.get("q4_0")
    assert all(
        old in generate("matvec", fmt, METAL, precision="fp32").source for old, *_ in breaks[1:]
    )
    device_checks.rejections_show_the_line(METAL, breaks[1:])


def test_a_name_that_is_not_there(mac: Mac) -> None:
    kernel = generate("dequantize", formats.get("q4_0"), METAL)
    with pytest.raises(CompileError, match="rejected dequantize q4_0"):
        mac.runtime.launcher(dataclasses.replace(kernel, entry="another"))


def test_read_only_weights(mac: Mac) -> None:
    array = np.arange(12, dtype=np.uint8)
    array.flags.writeable = False
    driver, found = mac.runtime.driver(), np.zeros(12, np.uint8)
    driver.download(driver.upload(array), found)
    np.testing.assert_array_equal(found, array)
    assert driver.upload(np.empty(0, np.uint8)) is not None


def test_devices_are_described(mac: Mac) -> None:
    assert mac.runtime.available() is None and mac.runtime.how() == "run"
    (device,) = mac.runtime.describe()
    assert device["device"] == "Apple M9"
    assert device["driver"] in ("torch", "pyobjc")
    assert mac.runtime.driver().key() == mac.runtime.driver().key()
    assert mac.runtime.capabilities() == CAPABILITIES


def test_failures_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    metal, objc = fake_metal.pyobjc(fake_metal.Queue())
    on_a_mac(monkeypatch, {"torch": None, "Metal": metal, "objc": objc})
    driver = runtime.MetalRuntime().driver()
    with pytest.raises(TargetError, match="Metal gave no buffer of 2147483648 bytes"):
        driver.empty(2**31)
    metal.device.fail = "Caused GPU Timeout Error"
    kernel = generate("dequantize", formats.get("f32"), METAL)
    out = driver.empty(4)
    driver.launch(driver.program(kernel), (1, 1), 64, [driver.empty(4), out], [0, 1, 1, 1])
    with pytest.raises(TargetError, match="a kernel failed: Caused GPU Timeout Error"):
        driver.download(out, np.empty(1, np.float32))


def test_why_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    found = runtime.MetalRuntime()
    if platform.system() != "Darwin":
        device_checks.one_sentence(found.available())
        assert found.describe() == []
        with pytest.raises(TargetError, match="need a Mac with Apple silicon, and this is"):
            found.driver()
    without = {"torch": None, "Metal": None, "objc": None}
    on_a_mac(monkeypatch, without)
    device_checks.one_sentence(found.available())
    assert re.search("torch cannot .*, and pyobjc's Metal cannot", str(found.available()))
    queue = fake_metal.Queue()
    torch, (metal, objc) = fake_metal.torch(queue), fake_metal.pyobjc(queue)
    torch.backends.mps.is_available = lambda: False
    metal.MTLCreateSystemDefaultDevice = lambda: None
    on_a_mac(monkeypatch, {"torch": torch, "Metal": metal, "objc": objc})
    assert "torch finds no MPS device, and Metal finds no device" in str(found.available())
    torch.mps, torch.__version__ = object(), "2.6.0"
    assert "torch 2.6.0 has no torch.mps.compile_shader" in str(found.available())
    monkeypatch.setattr(runtime.platform, "machine", lambda: "x86_64")
    assert "this is Darwin on x86_64" in str(found.available())


def test_bfloat_came_with_macos_14(monkeypatch: pytest.MonkeyPatch) -> None:
    for version, there in (("13.6", False), ("14.0", True), ("26.1", True)):
        on_a_mac(monkeypatch, {}, version)
        caps = runtime.MetalRuntime().capabilities()
        assert isinstance(caps, Capabilities)
        assert ("bf16" in caps.features) == there

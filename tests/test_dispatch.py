"""Which target serves, what is a fallback, and arrays of libraries that live on a device."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import kernelgen
from kernelgen import api, api_attention, cli, dispatch, targets
from kernelgen.errors import ConfigError, FallbackError, TargetError
from kernelgen.ir import BlockFormat, formats, where
from kernelgen.targets.base import EMULATED
from kernelgen.targets.c import compiler
from kernelgen.targets.c.runtime import CRuntime, native_isa
from kernelgen.targets.opencl import runtime as opencl_runtime
from kernelgen.tensor import QuantTensor
from tests import fake_cupy

RNG = np.random.default_rng(3)
CPU, CUDA, METAL, ROCM, ONEAPI = 1, 2, 8, 10, 14


# ---- which target ---------------------------------------------------------------------------


class Machine:
    """Targets of a machine that is not this one: by name, what `expected` and `available` say, and
    whether the device is the CPU."""

    def __init__(self, **found: tuple[str | None, str | None, bool]) -> None:
        self.found = {"c": ("a CPU", None, True), "numpy": ("a CPU", None, True)} | found

    def __call__(self, name: str) -> Any:
        expected, reason, on_cpu = self.found.get(name, (None, "it was asked for nothing", False))

        def available() -> str | None:
            assert expected is not None, f"{name}'s driver was loaded though nothing speaks for it"
            return reason

        return SimpleNamespace(
            expected=lambda: expected, available=available, on_cpu=lambda: on_cpu
        )


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Machine], None]]:
    """Makes this machine another one."""

    def become(other: Machine) -> None:
        monkeypatch.setattr(dispatch, "runtime_of", other)
        dispatch.decide.cache_clear()  # type: ignore[attr-defined]

    monkeypatch.setattr(dispatch, "_reported", {})
    monkeypatch.delenv(dispatch.VARIABLE, raising=False)
    yield become
    dispatch.decide.cache_clear()  # type: ignore[attr-defined]


GPU, NO_DRIVER, SOFTWARE = ("a GPU", None, False), ("a GPU", "its driver is missing", False), (
    "a GPU", None, True
)  # fmt: skip


@pytest.mark.parametrize(
    ("there", "kind", "serves", "falls_back_from"),
    [
        ({}, None, "c", []),
        ({"cuda": GPU, "opencl": GPU}, None, "cuda", []),
        ({"metal": GPU, "wgsl": GPU}, None, "metal", []),
        ({"opencl": GPU}, None, "opencl", []),
        ({"opencl": SOFTWARE, "wgsl": GPU}, None, "wgsl", []),
        ({"opencl": SOFTWARE, "wgsl": SOFTWARE}, None, "c", []),
        ({"cuda": NO_DRIVER}, None, "c", ["target cuda"]),
        ({"cuda": NO_DRIVER, "opencl": GPU}, None, "opencl", ["target cuda"]),
        ({"opencl": NO_DRIVER, "wgsl": NO_DRIVER}, None, "c", ["target opencl", "target wgsl"]),
        ({"c": ("a CPU", "no C compiler was found", True)}, None, "numpy", ["target c"]),
        ({"cuda": GPU}, CPU, "c", []),
        ({"cuda": GPU, "triton": GPU}, CUDA, "cuda", []),
        ({"cuda": NO_DRIVER, "triton": GPU}, CUDA, "triton", ["target cuda"]),
        ({"triton": GPU}, ROCM, "triton", []),
        ({"metal": GPU}, METAL, "metal", []),
        ({"cuda": NO_DRIVER}, CUDA, "c", ["kernels where the data lies"]),
        ({"cuda": GPU}, ONEAPI, "c", ["kernels where the data lies"]),
    ],
)
def test_where_the_data_lies_decides(
    machine: Callable[[Machine], None],
    there: dict[str, Any],
    kind: int | None,
    serves: str,
    falls_back_from: list[str],
) -> None:
    machine(Machine(**there))
    found = dispatch.decide(kind)
    assert found.target == serves and found.why
    assert [one.what.partition(" (")[0] for one in found.fallbacks] == falls_back_from
    asked = list(targets.serving(kind))
    assert [one.target for one in found.passed][: len(asked)] == asked[: len(found.passed)]
    assert all(one.reason for one in found.passed)


def test_a_driver_that_crashes_is_passed_over(machine: Callable[[Machine], None]) -> None:
    class Half(Machine):
        def __call__(self, name: str) -> Any:
            made = super().__call__(name)
            if name == "cuda":
                made.available = lambda: int("libnvrtc.so:\n cannot open")
            return made

    machine(Half(cuda=GPU))
    (found,) = dispatch.decide().fallbacks
    assert "its driver fails (invalid literal" in found.reason and "\n" not in found.reason


def test_nothing_can_run(machine: Callable[[Machine], None]) -> None:
    broken = ("a CPU", "it is broken", True)
    machine(Machine(c=broken, numpy=broken))
    with pytest.raises(TargetError, match="target c cannot run here: it is broken; target numpy"):
        dispatch.decide()


def test_a_fallback_is_logged_once_with_what_it_costs(
    machine: Callable[[Machine], None], caplog: pytest.LogCaptureFixture
) -> None:
    machine(Machine(cuda=NO_DRIVER))
    with caplog.at_level(logging.WARNING, "kernelgen"):
        assert [dispatch.target_for(None, None) for _ in range(3)] == ["c"] * 3
    (record,) = caplog.records
    said = record.getMessage()
    assert said == "target cuda: its driver is missing; target c serves instead, which is slower"
    assert [str(one) for one in dispatch.fallbacks()] == [said]


def test_a_fallback_can_be_forbidden(
    machine: Callable[[Machine], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(Machine(cuda=NO_DRIVER))
    x, w = np.ones((1, 32), np.float32), kernelgen.quantize(np.ones((2, 32)), "q8_0")
    calls: list[Callable[..., Any]] = [
        lambda **options: kernelgen.matmul(x, w, **options),
        lambda **options: kernelgen.attention(*[x.reshape(1, 1, 1, 32)] * 3, **options),
    ]
    for call in calls:
        with pytest.raises(FallbackError, match=r"its driver is missing.*forbids that"):
            call(on_fallback="error")
        with pytest.raises(ConfigError, match="allowed are log, error"):
            call(on_fallback="ignore")
    monkeypatch.setenv(dispatch.VARIABLE, "error")
    with pytest.raises(FallbackError):
        kernelgen.matmul(x, w)
    machine(Machine())  # no device is missing that anything speaks for
    assert dispatch.target_for(None, None, "error") == "c"


def test_a_named_target_is_no_fallback(machine: Callable[[Machine], None]) -> None:
    machine(Machine(cuda=NO_DRIVER))
    assert dispatch.target_for(None, "numpy", "error") == "numpy"


def test_a_precision_that_is_not_there_is_a_fallback(caplog: pytest.LogCaptureFixture) -> None:
    x, w = np.ones((3, 32), np.float32), kernelgen.quantize(np.ones((5, 32)), "q8_0")
    with pytest.raises(FallbackError, match="q8_0 in fp16: target numpy has no walk for it"):
        kernelgen.matmul(x, w, target="numpy", precision="fp16", on_fallback="error")
    with caplog.at_level(logging.WARNING, "kernelgen"):
        for _ in range(2):
            kernelgen.matmul(x, w, target="numpy", precision="fp16")
            kernelgen.matmul(x, w, target="numpy", precision="auto", on_fallback="error")
    assert sum("in fp16" in one.getMessage() for one in caplog.records) <= 1
    assert any("fp32 serves instead" in str(one) for one in dispatch.fallbacks())


def test_decode_lane_by_lane_is_a_fallback(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neighbouring codes of this format are not decoded alike."""
    monkeypatch.setattr(formats, "_by_name", dict(formats._by_name))
    fmt = BlockFormat(
        name="unlike", block=32, group=32, nbytes=34, fields={"d": "f16", "qs": "u8[32]"},
        code=lambda b, i: b.qs[i] & where(i % 2 < 1, 15, 7), scale=lambda b, g: b.d,
    )  # fmt: skip
    w = QuantTensor(kernelgen.register_format(fmt), (4, 64), np.ones((4, 68), np.uint8))
    x = np.ones((1, 64), np.float32)
    with pytest.raises(FallbackError, match=r"decoded lane by lane: .*slower than packed"):
        kernelgen.matmul(x, w, target="c", on_fallback="error")


def test_the_command_line_says_what_serves(machine: Callable[[Machine], None]) -> None:
    machine(Machine(cuda=NO_DRIVER))
    said = run("devices").splitlines()
    assert said[0].startswith("numpy arrays: target c, ")
    assert said[1] == "  fallback from cuda: its driver is missing"
    assert said[2].startswith("  not metal: nothing on this machine")
    by_name = {one["target"]: one for one in json.loads(run("devices", "--json"))}
    assert by_name["c"]["serves"]["default"] and not by_name["numpy"]["serves"]["default"]
    assert by_name["cuda"]["serves"] == {
        "default": False, "why": "its driver is missing", "fallback": True
    }  # fmt: skip


def test_explain_says_which_target_and_what_falls_back(machine: Callable[[Machine], None]) -> None:
    machine(Machine(cuda=NO_DRIVER))
    said = run("explain", "matmul", "q4_0", "--shape", "1x64x64", "--precision", "fp16")
    assert "target    c: " in said and "fallback from cuda: its driver is missing" in said
    assert "  fallback  matvec of q4_0 in fp16: target c has no walk for it" in said
    found = json.loads(run("explain", "matmul", "q4_0", "--shape", "1x64x64", "--json"))
    assert found["dispatch"]["target"] == "c" and found["fallbacks"] == []
    named = json.loads(run("explain", "matmul", "q4_0", "--target", "numpy", "--json"))
    assert named["dispatch"] is None


def run(*arguments: str) -> str:
    """What a command prints."""
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


# ---- threads --------------------------------------------------------------------------------


def test_eight_threads_compile_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """All begin at the same time, with nothing compiled, packed or looked up."""
    monkeypatch.setenv("KERNELGEN_CACHE", str(tmp_path))
    fresh, built, made = CRuntime(native_isa()), [], []
    monkeypatch.setattr(api, "runtime_of", lambda name: fresh)
    build, generate = compiler._build, api.generate_walk

    def counted(first: Any, options: Any, kernel: Any, path: Path) -> None:
        before = path.exists()
        build(first, options, kernel, path)
        built.extend([] if before else [kernel.entry])

    def generated(*args: Any) -> Any:
        made.append(args)
        return generate(*args)

    monkeypatch.setattr(compiler, "_build", counted)
    monkeypatch.setattr(api, "generate_walk", generated)
    api._matmul_runner.cache_clear()  # type: ignore[attr-defined]
    w = kernelgen.quantize(RNG.standard_normal((40, 256)), "q4_0")
    x = RNG.standard_normal((8, 3, 256), np.float32)
    start, results = threading.Barrier(8), [np.empty(0)] * 8

    def work(number: int) -> None:
        start.wait()
        results[number] = kernelgen.matmul(x[number], w, target="c", precision="fp32")

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    api._matmul_runner.cache_clear()  # type: ignore[attr-defined]
    np.testing.assert_allclose(np.array(results), x @ w.dequantize().T, rtol=1e-4, atol=1e-4)
    assert len(made) == 1 and built and len(built) == len(set(built))
    assert len({id(one) for one in w.prepared.values()}) == 1


def test_once_waits_for_its_own_arguments_only() -> None:
    inside, go = threading.Event(), threading.Event()
    calls = []

    @dispatch.once
    def slow(name: str) -> str:
        calls.append(name)
        if name == "slow":
            inside.set()
            assert go.wait(10)
        return name

    threads = [threading.Thread(target=slow, args=("slow",)) for _ in range(2)]
    for one in threads:
        one.start()
    assert inside.wait(10) and slow("quick") == "quick"
    go.set()
    for one in threads:
        one.join()
    assert calls == ["slow", "quick"] and slow("slow") == "slow" and len(calls) == 2


def test_once_keeps_no_error() -> None:
    answers = iter([ValueError("not yet"), 5])

    @dispatch.once
    def fails() -> int:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    with pytest.raises(ValueError, match="not yet"):
        fails()
    assert fails() == fails() == 5


# ---- drivers that are not plugged in --------------------------------------------------------


def test_a_missing_package_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyopencl", None)
    opencl_runtime.find_device.cache_clear()
    try:
        reason = targets.get("opencl").runtime().available()
    finally:
        opencl_runtime.find_device.cache_clear()
    assert reason is not None and "pip install kernelgen[opencl]" in reason


def elsewhere(code: str, **environment: str) -> str:
    """What a program prints in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False,
        env=os.environ | environment, cwd=Path(__file__).parent.parent,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


MULTIPLY = """
import numpy as np, kernelgen
w = kernelgen.quantize(np.eye(4, 32, dtype=np.float32), "q8_0")
x = np.ones((2, 32), np.float32)
for _ in range(2):
    print(kernelgen.matmul(x, w).sum().round(), kernelgen.dispatch.decide().target)
"""


def test_no_compiler() -> None:
    said = elsewhere(MULTIPLY, CC="/nowhere/cc")
    assert said.count("8.0 numpy") == 2
    assert said.count("target numpy serves instead, which is slower") == 1, said
    assert "CC is set to '/nowhere/cc'" in said


def test_no_compiler_is_an_error_where_that_is_wanted() -> None:
    code = f"try:\n{MULTIPLY}\nexcept Exception as e:\n    print(type(e).__name__, e)"
    code = code.replace("\nimport", "\n    import").replace("\nw =", "\n    w =")
    code = code.replace("\nx =", "\n    x =").replace("\nfor", "\n    for")
    code = code.replace("\n    print(kernelgen", "\n        print(kernelgen")
    said = elsewhere(code, CC="/nowhere/cc", KERNELGEN_ON_FALLBACK="error")
    assert "FallbackError" in said and "numpy" in said and "8.0" not in said


def test_no_vulkan_device() -> None:
    pytest.importorskip("wgpu")
    code = """
from kernelgen import targets
print("said:", targets.get("wgsl").runtime().available())
"""
    nowhere = dict.fromkeys(("VK_DRIVER_FILES", "VK_ICD_FILENAMES"), "/nowhere.json")
    said = elsewhere(code, WGPU_BACKEND_TYPE="Vulkan", **nowhere)
    assert "said: no WebGPU adapter was found" in said and "Vulkan driver" in said


def test_no_torch() -> None:
    code = """
import sys
sys.modules["torch"] = None
import kernelgen
from kernelgen import targets
print("said:", targets.get("triton").runtime().available())
try:
    import kernelgen.torch
except ImportError as error:
    print("said:", error)
"""
    said = elsewhere(code)
    assert "said: torch cannot be imported" in said and "pip install kernelgen[triton]" in said
    assert "said: kernelgen.torch needs torch" in said and "kernelgen[torch]" in said


def test_cupy_without_a_gpu(monkeypatch: pytest.MonkeyPatch, gpu: Any) -> None:
    def no_device() -> int:
        raise fake_cupy.CUDARuntimeError("cudaErrorNoDevice: no CUDA-capable device is detected")

    monkeypatch.setattr(gpu.cuda.runtime, "getDeviceCount", no_device)
    found = dispatch.decide()
    assert found.target != "cuda" and found.passed[0].target == "cuda"
    assert "no CUDA device can be used (cudaErrorNoDevice" in found.passed[0].reason
    assert found.fallbacks and "nvidia-smi" in str(found.fallbacks[0])


# ---- arrays on a device ---------------------------------------------------------------------


def forget() -> None:
    """All that was found out about targets."""
    from kernelgen.targets.cuda import runtime as cuda_runtime

    for cached in (
        dispatch.runtime_of, dispatch.decide, dispatch._resident, api._matmul_runner,
        api_attention._kernel, api_attention._runner, api_attention._runner_on_device,
        cuda_runtime.why_not, cuda_runtime.runtime,
    ):  # fmt: skip
        cached.cache_clear()  # type: ignore[attr-defined]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A machine with cupy and a GPU, which is the emulator."""
    reason = targets.get("cuda").runtime(EMULATED).available()
    if reason is not None:
        pytest.skip(reason)
    before = {n: m for n, m in sys.modules.items() if n.partition(".")[0].startswith("cupy")}
    cupy = fake_cupy.install()
    fake_cupy.Function.launched.clear()
    monkeypatch.setattr(dispatch, "_reported", {})
    forget()
    yield cupy
    for name in [n for n in sys.modules if n.partition(".")[0].startswith("cupy")]:
        del sys.modules[name]
    sys.modules.update(before)
    forget()


@pytest.fixture(scope="module")
def w() -> QuantTensor:
    return kernelgen.quantize(RNG.standard_normal((20, 64)), "q8_0")


def on_gpu(x: np.ndarray) -> fake_cupy.DeviceArray:
    return fake_cupy.DeviceArray(x)


def product(x: np.ndarray, w: QuantTensor) -> np.ndarray:
    return x.astype(np.float64) @ w.dequantize().astype(np.float64).T


def test_arrays_on_the_gpu_stay_there(gpu: Any, w: QuantTensor) -> None:
    x = RNG.standard_normal((3, 64), np.float32)
    given = on_gpu(x)
    y = kernelgen.matmul(given, w, precision="fp32")
    assert type(y) is fake_cupy.DeviceArray and y.dtype == np.float32
    np.testing.assert_allclose(y.get(), product(x, w), rtol=1e-5, atol=1e-5)
    addresses = [
        {a.ctypes.data for a in kept if isinstance(a, np.ndarray)}
        for _, kept in fake_cupy.Function.launched
    ]
    # the kernel that computes read x and wrote y where they are
    assert any({x.ctypes.data, y.memory.ctypes.data} <= found for found in addresses)
    assert dispatch.decide(CUDA).target == "cuda" and dispatch.fallbacks() == ()


def test_numpy_arrays_go_to_the_gpu_and_back(gpu: Any, w: QuantTensor) -> None:
    x = RNG.standard_normal((2, 64), np.float32)
    y = kernelgen.matmul(x, w, precision="fp32")
    assert type(y) is np.ndarray and fake_cupy.Function.launched
    np.testing.assert_allclose(y, product(x, w), rtol=1e-5, atol=1e-5)


def test_nobody_waits_for_the_gpu(gpu: Any, w: QuantTensor) -> None:
    """A warm call only launches: a graph can capture it, in which waiting is an error."""
    x = RNG.standard_normal((2, 64), np.float32)
    kernelgen.matmul(on_gpu(x), w, precision="fp32")
    kernelgen.matmul(on_gpu(x.astype(np.float16)), w, precision="fp32")
    stream = gpu.cuda.Stream()
    with stream:
        stream.begin_capture()
        y = kernelgen.matmul(on_gpu(x), w, precision="fp32")
        half = kernelgen.matmul(on_gpu(x.astype(np.float16)), w, precision="fp32")
        graph = stream.end_capture()
    assert not np.isclose(y.memory, product(x, w), atol=1e-3).all()
    graph.launch()
    np.testing.assert_allclose(y.get(), product(x, w), rtol=1e-5, atol=1e-5)
    assert half.dtype == np.float16
    np.testing.assert_allclose(half.get(), product(x.astype(np.float16), w), rtol=2e-3, atol=2e-2)
    assert {s for s, _ in fake_cupy.Function.launched[-2:]} == {stream}


def test_all_shapes_on_the_gpu(gpu: Any, w: QuantTensor) -> None:
    x = RNG.standard_normal((2, 1, 64), np.float32)
    y = kernelgen.matmul(on_gpu(x), w, precision="fp32")
    assert y.shape == (2, 1, 20)
    np.testing.assert_allclose(y.get(), product(x, w), rtol=1e-5, atol=1e-5)
    assert kernelgen.matmul(on_gpu(x[:0]), w).shape == (0, 1, 20)
    strided = RNG.standard_normal((4, 128), np.float32)[::2, ::2]
    y = kernelgen.matmul(on_gpu(strided), w, precision="fp32")
    np.testing.assert_allclose(y.get(), product(strided, w), rtol=1e-5, atol=1e-5)
    out = on_gpu(np.full((2, 20), np.nan, np.float32))
    assert kernelgen.matmul(on_gpu(strided), w, precision="fp32", out=out) is out
    np.testing.assert_allclose(out.get(), y.get())
    with pytest.raises(kernelgen.KernelgenError, match="x needs 64 columns"):
        kernelgen.matmul(on_gpu(x[..., :63]), w)


def test_weights_in_pieces_on_the_gpu(
    gpu: Any, w: QuantTensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh, x = w[:], RNG.standard_normal((2, 64), np.float32)
    driver: Any = dispatch.runtime_of("cuda").driver()  # type: ignore[attr-defined]
    monkeypatch.setattr(driver, "largest", 8 * 64)  # of 20 rows of 68 bytes each
    y = kernelgen.matmul(on_gpu(x), fresh, precision="fp32")
    (pieces,) = fresh.prepared.values()
    assert len(pieces) > 1
    np.testing.assert_allclose(y.get(), product(x, w), rtol=1e-5, atol=1e-5)


def test_attention_on_the_gpu(gpu: Any) -> None:
    q = RNG.standard_normal((1, 2, 3, 32), np.float32)
    k, v = RNG.standard_normal((2, 1, 1, 5, 32), np.float32)
    want = kernelgen.attention(q, k, v, target="numpy", causal=True)
    y = kernelgen.attention(on_gpu(q), on_gpu(k), on_gpu(v), causal=True)
    assert type(y) is fake_cupy.DeviceArray
    np.testing.assert_allclose(y.get(), want, rtol=1e-4, atol=1e-5)
    read = {
        a.ctypes.data for _, kept in fake_cupy.Function.launched for a in kept
        if isinstance(a, np.ndarray)
    }  # fmt: skip
    assert {x.ctypes.data for x in (q, k, v)} <= read
    quantized = kernelgen.quantize(k, "q8_0")
    mixed = kernelgen.attention(on_gpu(q), quantized, on_gpu(v), causal=True)
    want = kernelgen.attention(q, quantized, v, target="numpy", causal=True)
    np.testing.assert_allclose(mixed.get(), want, rtol=1e-4, atol=1e-5)


def test_masks_on_the_gpu_stay_there(gpu: Any) -> None:
    q = RNG.standard_normal((2, 2, 3, 32), np.float32)
    k, v = RNG.standard_normal((2, 2, 1, 5, 32), np.float32)
    seen = np.tril(np.ones((3, 5), bool), 1)
    bias = RNG.standard_normal((2, 1, 3, 5)).astype(np.float32)
    for options in (
        {"mask": seen}, {"mask": bias},
        {"alibi": np.array([0.5, 0.25], np.float32), "sinks": np.array([1, -1], np.float32)},
    ):  # fmt: skip
        want = kernelgen.attention(q, k, v, target="numpy", **options)
        there = {name: on_gpu(x) for name, x in options.items()}
        y = kernelgen.attention(on_gpu(q), on_gpu(k), on_gpu(v), **there)  # compiles
        stream = gpu.cuda.Stream()
        stream.begin_capture()
        y = kernelgen.attention(on_gpu(q), on_gpu(k), on_gpu(v), **there)
        graph = stream.end_capture()
        graph.launch()
        np.testing.assert_allclose(y.get(), want, rtol=1e-4, atol=1e-5)


def test_what_needs_the_host_says_so(gpu: Any, w: QuantTensor) -> None:
    ids = on_gpu(np.array([3, 0], np.int64))
    rows = kernelgen.get_rows(w, ids)
    assert isinstance(rows, np.ndarray | fake_cupy.DeviceArray)
    (found,) = dispatch.fallbacks()
    assert "get_rows" in found.what and "copied to the host and back" in found.cost


class CudaTensor:
    """As much of a torch tensor on a GPU as is used."""

    def __init__(self, memory: np.ndarray) -> None:
        self.memory, self.dtype = memory, f"torch.{memory.dtype}"
        self.device = SimpleNamespace(type="cuda", index=0)
        self.requires_grad = False

    shape = property(lambda self: self.memory.shape)

    def __array_namespace__(self) -> Any:
        return sys.modules["torch"]

    def __dlpack_device__(self) -> tuple[int, int]:
        return CUDA, 0

    def float(self) -> CudaTensor:
        return self

    def contiguous(self) -> CudaTensor:
        return self

    def reshape(self, *shape: Any) -> CudaTensor:
        return CudaTensor(self.memory.reshape(*shape))

    def __getitem__(self, key: Any) -> CudaTensor:
        return CudaTensor(self.memory[key])

    def new_empty(self, shape: Any, dtype: Any) -> CudaTensor:
        return CudaTensor(np.full(shape, np.nan, np.float32))


def test_torchs_stream_is_the_callers(
    gpu: Any, w: QuantTensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = SimpleNamespace(cuda_stream=0x5EED)
    fake = SimpleNamespace(
        Tensor=CudaTensor, float32=np.float32, cuda=SimpleNamespace(current_stream=lambda d: stream)
    )
    monkeypatch.setitem(sys.modules, "torch", fake)
    x = RNG.standard_normal((2, 64), np.float32)
    y = kernelgen.matmul(CudaTensor(x), w, precision="fp32")
    assert type(y) is CudaTensor
    np.testing.assert_allclose(y.memory, product(x, w), rtol=1e-5, atol=1e-5)
    assert {getattr(s, "ptr", None) for s, _ in fake_cupy.Function.launched} == {0x5EED}


def test_the_gpu_says_how_long_its_launches_take(gpu: Any, w: QuantTensor) -> None:
    runtime = targets.get("cuda").runtime()
    x = RNG.standard_normal((2, 64), np.float32)
    found = runtime.timed(lambda: kernelgen.matmul(x, w, precision="fp32", target="cuda"))  # type: ignore[attr-defined]
    assert found is not None and 0 < found < 60
    assert runtime.driver().timed(lambda: None) == 0.0  # type: ignore[attr-defined]

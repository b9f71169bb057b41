"""Arrays of other libraries on the CPU: torch's, and anything that speaks DLPack."""

from __future__ import annotations

import sys
import types
from typing import Any

import numpy as np
import pytest

import kernelgen
from kernelgen import arrays, dispatch, targets
from kernelgen.errors import KernelgenError, ShapeError

torch = pytest.importorskip("torch", reason="pip install torch==2.13.0")

RNG = np.random.default_rng(4)
HALVES = {torch.float16: 2**-10, torch.bfloat16: 2**-7}


@pytest.fixture(scope="module")
def w() -> kernelgen.QuantTensor:
    return kernelgen.quantize(RNG.standard_normal((12, 64)), "q8_0")


def product(x: Any, w: kernelgen.QuantTensor) -> Any:
    return x.double() @ torch.from_numpy(w.dequantize()).double().T


# ---- what is copied, and what is not --------------------------------------------------------


def test_memory_is_shared_both_ways() -> None:
    x = torch.randn(3, 4)
    seen = arrays.host(x)
    assert seen.ctypes.data == x.data_ptr() and seen.dtype == np.float32
    y = np.ones((2, 3), np.float32)
    given = arrays.give_back(y, x)
    assert isinstance(given, torch.Tensor) and given.data_ptr() == y.ctypes.data
    half = x.half()
    assert arrays.host(half).ctypes.data == half.data_ptr()
    narrow = x.bfloat16()
    assert arrays.bits_of(narrow).ctypes.data == narrow.data_ptr()
    assert arrays.host(x.T).ctypes.data == x.data_ptr()
    assert arrays.host(x[:, 1]).strides == (16,)


def test_every_bfloat16_comes_through() -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    np.testing.assert_array_equal(arrays.host(every), every.float().numpy())
    back = arrays.give_back(arrays.host(every), every)
    assert torch.equal(back.isnan(), every.isnan())
    there = ~every.isnan()
    assert torch.equal(back[there].view(torch.int16), every[there].view(torch.int16))


def test_rounding_to_bfloat16_is_torchs() -> None:
    bits = RNG.integers(0, 2**32, 2**16, np.uint32)
    ties = (RNG.integers(0, 2**16, 2**12, np.uint32) << 16) | 0x8000
    values = np.concatenate([bits, ties, [0x7F7FFFFF, 0x7F800000, 1]]).astype(np.uint32)
    floats = values.view(np.float32)
    want = torch.from_numpy(floats).bfloat16()
    got = torch.from_numpy(arrays.to_bfloat16(floats).view(np.int16)).view(torch.bfloat16)
    assert torch.equal(got.isnan(), want.isnan())
    there = ~want.isnan()
    assert torch.equal(got[there].view(torch.int16), want[there].view(torch.int16))


# ---- kernelgen's functions ------------------------------------------------------------------


def test_torch_in_torch_out(w: kernelgen.QuantTensor) -> None:
    x = torch.randn(2, 3, 64)
    y = kernelgen.matmul(x, w, precision="fp32")
    assert isinstance(y, torch.Tensor) and y.dtype == torch.float32
    torch.testing.assert_close(y.double(), product(x, w), rtol=1e-5, atol=1e-5)
    for dtype, bound in HALVES.items():
        y = kernelgen.matmul(x.to(dtype), w, precision="fp32")
        assert y.dtype == dtype
        torch.testing.assert_close(y.double(), product(x.to(dtype), w), rtol=bound, atol=bound)
    strided = torch.randn(8, 128)[::2, ::2]
    y = kernelgen.matmul(strided, w, precision="fp32")
    torch.testing.assert_close(y.double(), product(strided, w), rtol=1e-5, atol=1e-5)
    assert kernelgen.matmul(x[:0], w).shape == (0, 3, 12)


def test_torchs_out(w: kernelgen.QuantTensor) -> None:
    x = torch.randn(3, 64)
    for dtype in (torch.float32, *HALVES):
        out = torch.full((3, 12), torch.nan, dtype=dtype)
        assert kernelgen.matmul(x.to(dtype), w, out=out) is out
        assert torch.equal(out, kernelgen.matmul(x.to(dtype), w))


def test_the_kernel_reads_the_tensors_memory(
    w: kernelgen.QuantTensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, int]] = []
    run = kernelgen.api._runner_for

    def watched(*args: Any) -> Any:
        found = run(*args)

        def told(x: np.ndarray, w: Any, y: np.ndarray) -> None:
            seen.append((x.ctypes.data, y.ctypes.data))
            found.run(x, w, y)

        return types.SimpleNamespace(run=told)

    monkeypatch.setattr(kernelgen.api, "_runner_for", watched)
    x = torch.randn(3, 64)
    y = kernelgen.matmul(x, w)
    assert seen == [(x.data_ptr(), y.data_ptr())]


def test_tensors_on_the_cpu_stay_on_the_cpu(w: kernelgen.QuantTensor) -> None:
    kernelgen.matmul(torch.randn(1, 64), w, on_fallback="error")
    assert dispatch.decide(1).target in targets.PREFERENCE


def test_rows_and_attention() -> None:
    w = kernelgen.quantize(RNG.standard_normal((12, 64)), "q8_0")
    ids = torch.tensor([[3, 0], [7, 7]])
    rows = kernelgen.get_rows(w, ids)
    assert isinstance(rows, torch.Tensor)
    np.testing.assert_array_equal(rows.numpy(), w.dequantize()[ids.numpy()])
    q, k, v = torch.randn(1, 4, 3, 32), torch.randn(1, 2, 5, 32), torch.randn(1, 2, 5, 32)
    attend = torch.nn.functional.scaled_dot_product_attention
    for dtype, bound in {torch.float32: 1e-5, **HALVES}.items():
        given = [x.to(dtype) for x in (q, k, v)]
        y = kernelgen.attention(*given)
        assert isinstance(y, torch.Tensor) and y.dtype == dtype
        want = attend(*(x.float() for x in given), enable_gqa=True)
        torch.testing.assert_close(y.float(), want, rtol=2 * bound, atol=2 * bound)
    mask = torch.randn(1, 4, 3, 5)
    y = kernelgen.attention(q, k, v, mask=mask)
    torch.testing.assert_close(y, attend(q, k, v, attn_mask=mask, enable_gqa=True))
    sinks = kernelgen.attention(q, k, v, sinks=torch.full((4,), -1e30), alibi=torch.zeros(4))
    torch.testing.assert_close(sinks, attend(q, k, v, enable_gqa=True))
    packed = kernelgen.quantize(k.numpy(), "q8_0")
    mixed = kernelgen.attention(q, packed, v.bfloat16())
    want = attend(q, torch.from_numpy(packed.dequantize()), v.bfloat16().float(), enable_gqa=True)
    torch.testing.assert_close(mixed, want, rtol=1e-4, atol=1e-4)


def test_triton_takes_tensors_where_they_lie(w: kernelgen.QuantTensor) -> None:
    """Interpreted here, on the CPU: what a GPU does with tensors that are there."""
    reason = targets.get("triton").runtime().available()
    if reason is not None:
        pytest.skip(reason)
    x = torch.randn(2, 64)
    assert dispatch.takes("triton", x) and not dispatch.takes("c", x)
    for dtype, bound in {torch.float32: 1e-5, **HALVES}.items():
        y = kernelgen.matmul(x.to(dtype), w, target="triton", precision="fp32")
        assert y.dtype == dtype
        torch.testing.assert_close(y.double(), product(x.to(dtype), w), rtol=bound, atol=bound)
    y = kernelgen.matmul(x, w, target="triton", precision="int8")
    want = kernelgen.matmul(x, w, target="c", precision="int8")
    torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-4)
    q, k = torch.randn(1, 2, 3, 32), torch.randn(1, 1, 5, 32)
    y = kernelgen.attention(q, k, k, target="triton", causal=True)
    torch.testing.assert_close(y, kernelgen.attention(q, k, k, causal=True), rtol=1e-4, atol=1e-5)


# ---- libraries nobody named -----------------------------------------------------------------


class Foreign:
    """An array of a library that has DLPack and no more than the array API asks for."""

    def __init__(self, inner: np.ndarray) -> None:
        self.inner = inner

    shape = property(lambda self: self.inner.shape)
    ndim = property(lambda self: self.inner.ndim)
    dtype = property(lambda self: self.inner.dtype)
    device = "cpu"

    def __array_namespace__(self) -> Any:
        made = types.ModuleType("foreign")
        made.from_dlpack = lambda x: Foreign(np.from_dlpack(x))  # type: ignore[attr-defined]
        return made

    def __dlpack__(self, **options: Any) -> Any:
        return self.inner.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return 1, 0


def test_any_library(w: kernelgen.QuantTensor) -> None:
    x = RNG.standard_normal((2, 64), np.float32)
    assert arrays.host(Foreign(x)).ctypes.data == x.ctypes.data
    y = kernelgen.matmul(Foreign(x), w)
    assert type(y) is Foreign
    np.testing.assert_array_equal(y.inner, kernelgen.matmul(x, w, target=dispatch.decide(1).target))


def test_a_device_without_a_number_is_nowhere() -> None:
    class Elsewhere:
        def __dlpack_device__(self) -> tuple[int, int]:
            raise ValueError("Unknown device type hpu for Dlpack")

    assert arrays.kind_of(Elsewhere()) == arrays.NOWHERE
    found = dispatch.decide(arrays.NOWHERE)
    assert found.target in targets.PREFERENCE and "copied to the host" in str(found.fallbacks[0])


def test_a_library_that_reads_no_dlpack(w: kernelgen.QuantTensor) -> None:
    class Mute:
        dtype = np.dtype(np.float32)

        def __dlpack_device__(self) -> tuple[int, int]:
            return 1, 0

    assert sys.modules[Mute.__module__] is not None
    with pytest.raises(KernelgenError, match=r"type Mute .* numpy\.asarray"):
        arrays.library_of(Mute())


def test_refusals(w: kernelgen.QuantTensor) -> None:
    with pytest.raises(ShapeError, match="meta device has no values"):
        kernelgen.matmul(torch.empty(1, 64, device="meta"), w)
    with pytest.raises(ShapeError, match="not float64"):
        kernelgen.matmul(torch.ones(1, 64).double(), w)
    with pytest.raises(ShapeError, match="requires a gradient"):
        kernelgen.matmul(torch.ones(1, 64, requires_grad=True), w)
    with torch.no_grad():
        assert kernelgen.matmul(torch.ones(1, 64, requires_grad=True), w).shape == (1, 12)

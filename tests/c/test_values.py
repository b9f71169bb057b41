"""Values that are not ordinary numbers, and sizes that are hardly any."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

import kernelgen
from kernelgen import targets
from kernelgen.generate import generate
from kernelgen.ir import formats
from kernelgen.targets.c.runtime import isa_named, native_isa
from kernelgen.tensor import QuantTensor
from tests.c.machines import here

K = 512
ISAS = tuple(dict.fromkeys((native_isa().name, "avx2", "scalar")))


def _weights(name: str) -> QuantTensor:
    return kernelgen.quantize(np.random.default_rng(1).standard_normal((19, K), np.float32), name)


def _product(
    isa: str, precision: str, x: npt.NDArray[np.float32], w: QuantTensor
) -> npt.NDArray[np.float32]:
    runtime = here(isa_named(isa))
    kernel = generate("matvec", w.format, targets.get("c"), precision=precision)
    y = np.full((len(x), w.shape[0]), 12345, np.float32)
    runtime.matmul(kernel)(x, w, y)
    return y


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", ["q4_K", "q8_0"])
@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_in_its_row(
    bad: float, precision: str, name: str, isa: str
) -> None:
    w = _weights(name)
    x = np.random.default_rng(2).standard_normal((7, K), np.float32)
    clean = _product(isa, precision, x, w)
    x[3, 40] = bad
    seen = _product(isa, precision, x, w)
    assert not np.isfinite(seen[3]).any()
    if np.isnan(bad):
        assert np.isnan(seen[3]).all()
    others = [m for m in range(7) if m != 3]
    assert np.array_equal(seen[others], clean[others])


@pytest.mark.parametrize("isa", ISAS)
def test_activations_of_all_magnitudes(isa: str) -> None:
    """Where the factor of a block would overflow or a product underflow."""
    w = _weights("q4_K")
    ordinary = np.random.default_rng(3).standard_normal((1, K), np.float32)
    exact = _product(isa, "int8", ordinary, w)
    for magnitude in (1e30, 1e-30, 2.0**-100):
        x = ordinary * np.float32(magnitude)
        assert np.allclose(_product(isa, "int8", x, w), exact * magnitude, rtol=1e-5, atol=0)
    for tiny in (2.0**-120, 2.0**-149):  # counts as zero, and does not divide by it
        assert np.abs(_product(isa, "int8", ordinary * np.float32(tiny), w)).max() < 1e-30
    assert not _product(isa, "int8", np.zeros_like(ordinary), w).any()


@pytest.mark.parametrize("isa", ISAS)
def test_weights_that_are_not_finite(isa: str) -> None:
    w = _weights("q8_0")
    data = w.data.copy()
    data[5, :2] = (0x00, 0x7E)  # the scale of the first block, a NaN
    data[6, :2] = (0x00, 0x7C)  # infinity
    broken = QuantTensor("q8_0", w.shape, data)
    x = np.random.default_rng(2).standard_normal((3, K), np.float32)
    for precision in ("fp32", "int8"):
        clean, seen = _product(isa, precision, x, w), _product(isa, precision, x, broken)
        assert np.isnan(seen[:, 5]).all()
        assert not np.isfinite(seen[:, 6]).any()
        others = [n for n in range(19) if n not in (5, 6)]
        assert np.array_equal(seen[:, others], clean[:, others])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_no_rows(precision: str, isa: str) -> None:
    empty = np.empty((0, K), np.float32)
    assert _product(isa, precision, empty, _weights("q4_K")).shape == (0, 19)
    x = np.ones((2, K), np.float32)
    assert _product(isa, precision, x, _weights("q4_K")[:0]).shape == (2, 0)


@pytest.mark.parametrize("isa", ISAS)
def test_every_half(isa: str) -> None:
    """All 65536 halves are decoded exactly, subnormal and not finite ones too."""
    bits = np.arange(65536, dtype=np.uint16)
    w = QuantTensor("f16", (256, 256), bits.view(np.uint8).reshape(256, 512))
    runtime, target = here(isa_named(isa)), targets.get("c")
    got = runtime.dequantize(generate("dequantize", formats.get("f16"), target), w)
    wanted = bits.view(np.float16).astype(np.float32).reshape(256, 256)
    assert np.array_equal(got, wanted, equal_nan=True)
    assert np.array_equal(np.signbit(got), np.signbit(wanted))
    # a product with a row of the identity is the decode of a tile
    x = np.eye(256, dtype=np.float32)[:8]
    finite = np.isfinite(wanted).all(axis=1)
    y = np.empty((8, 256), np.float32)
    runtime.matmul(generate("matvec", w.format, target, precision="fp32"))(x, w, y)
    assert np.array_equal(y[:, finite], wanted[finite, :8].T)

"""Sums at the ends of their ranges: integers that are kept in 16 bits must fit them."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from kernelgen import targets
from kernelgen.generate import generate
from kernelgen.ir import formats
from kernelgen.ir.block import BlockFormat
from kernelgen.ir.steps import steps
from kernelgen.problem import relative_error, size_of_sums, tolerance
from kernelgen.targets.c.runtime import isa_named, native_isa
from kernelgen.tensor import QuantTensor
from kernelgen.verify import sample_weights
from tests.c.machines import ISA_NAMES, here

INTEGERS = tuple(f.name for f in formats.formats() if not f.float_codes)
#: bytes of all fields of integers: codes and integers of groups are smallest, largest, or negative
BYTES = (0x00, 0xFF, 0x7F, 0x80)
N, BLOCKS = 17, 2


def _weights(fmt: BlockFormat, byte: int) -> QuantTensor:
    """Floats of blocks as they are for normal weights; all else is made of that byte."""
    k = BLOCKS * fmt.block
    data = sample_weights(fmt, N, k).reshape(N, BLOCKS, fmt.nbytes).copy()
    for one in fmt.layout_fields:
        if one.storage.dtype.is_int:
            data[..., one.offset : one.offset + one.nbytes] = byte
    return QuantTensor(fmt, (N, k), data.reshape(N, -1))


def _activations(k: int) -> npt.NDArray[np.float32]:
    """Rows of the largest integers: of one sign, of both in turns, and in halves."""
    one = np.ones(k, np.float32)
    turns, halves = one.copy(), one.copy()
    turns[1::2] = -1
    halves[k // 2 :] = -1
    return np.stack([one, -one, turns, halves])


def errors(isa: str, name: str) -> list[float]:
    """Of one product for each byte; where values are not finite there is none."""
    fmt, runtime = formats.get(name), here(isa_named(isa))
    kernel = generate("matvec", fmt, targets.get("c"), precision="int8")
    found = []
    for byte in BYTES:
        w = _weights(fmt, byte)
        x, values = _activations(w.shape[1]), w.dequantize().astype(np.float64)
        if not np.isfinite(values).all():
            continue
        y = np.full((len(x), N), np.nan, np.float32)
        runtime.matmul(kernel)(x, w, y)
        size = size_of_sums(x, values) or 1.0
        found.append(relative_error(y, x @ values.T, size))
    return found


@pytest.mark.parametrize("isa", dict.fromkeys((native_isa().name, "avx2")))
@pytest.mark.parametrize("name", ["q4_K", "q6_K"])
def test_some(name: str, isa: str) -> None:
    found = errors(isa, name)
    assert len(found) == len(BYTES)
    assert max(found) <= tolerance("matvec", "int8")


@pytest.mark.parametrize("name", INTEGERS)
def test_codes_reach_no_further(name: str) -> None:
    """From their bias; that is what the ranges of sums are derived from."""
    fmt = formats.get(name)
    lo, hi = fmt.code_range
    assert steps(fmt).reach >= max(abs(lo - fmt.bias), abs(hi - fmt.bias))


@pytest.mark.slow
@pytest.mark.parametrize("isa", ISA_NAMES)
@pytest.mark.parametrize("name", INTEGERS)
def test_all(name: str, isa: str) -> None:
    assert max(errors(isa, name), default=0.0) <= tolerance("matvec", "int8")

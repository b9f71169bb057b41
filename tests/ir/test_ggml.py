"""Formats decode bit for bit as ggml's own library does.

GGML_LIBRARY=llama.cpp/build/bin/libggml-base.so python -m pytest -m slow tests/ir/test_ggml.py
"""

from __future__ import annotations

import ctypes
import os

import numpy as np
import pytest

from kernelgen.ir.block import BlockFormat
from kernelgen.ir.formats import FORMATS
from tests.ir.blocks import all_blocks

pytestmark = pytest.mark.slow

#: activations, which are only ever multiplied
WITHOUT_DECODER = ("q8_1",)


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    path = os.environ.get("GGML_LIBRARY")
    if path is None:
        pytest.skip("GGML_LIBRARY does not name ggml's library, libggml-base.so of llama.cpp")
    return ctypes.CDLL(path)


@pytest.mark.parametrize(
    "fmt", [f for f in FORMATS if f.block > 1 and f.name not in WITHOUT_DECODER], ids=repr
)
def test_decode_is_that_of_ggml(fmt: BlockFormat, library: ctypes.CDLL) -> None:
    decode = getattr(library, f"dequantize_row_{fmt.name}")
    blocks = np.ascontiguousarray(all_blocks(fmt))
    want = np.full((len(blocks), fmt.block), np.nan, np.float32)
    pointers = (ctypes.c_void_p(array.ctypes.data) for array in (blocks, want))
    decode(*pointers, ctypes.c_int64(want.size))
    with np.errstate(all="ignore"):
        seen = fmt.decode(blocks)
    known = ~np.isnan(want)  # of NaN the bits may differ
    assert known.mean() > 0.9
    np.testing.assert_array_equal(np.isnan(seen), ~known)
    np.testing.assert_array_equal(seen.view(np.uint32)[known], want.view(np.uint32)[known])

"""Small checkpoints that other packages wrote (record.py), against the values they make of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kernelgen
from kernelgen.checkpoints import Checkpoint

RECORDED = Path(__file__).resolve().parent / "recorded"
NAME = "model.layers.0.proj.weight"

#: name -> the format that its matrix has here
FORMATS = {
    "gptq_2": "uint2_g32", "gptq_3": "uint3_g32", "gptq_4": "uint4_g32",
    "gptq_4_symmetric": "int4_g64", "gptq_8": "uint8_g128", "awq": "uint4_g64",
    "hqq_1": "hqq2_g32", "hqq_2": "hqq2_g16", "hqq_3": "hqq3_g64_f32", "hqq_4": "hqq4_g32",
    "hqq_8": "hqq8_g128", "nf4_nested": "nf4_g64", "nf4": "nf4_g128", "fp4": "fp4_g64",
    "fp4_nested": "fp4_g64",
    "packed_4": "int4_g32_f32", "packed_4_zero": "uint4_g64_f32", "packed_3": "uint3_g32_f32",
    "packed_8": "int8_g128_f32", "packed_6": "uint8_g128_f32", "int_8": "uint8_g128_f32",
    "float_8": "fp8_e4m3_g128", "float_8_tensor": "fp8_e4m3_g128",
    "float_8_block": "fp8_e4m3_g32", "mxfp8": "mxfp8_e4m3", "mxfp6": "mxfp6_e2m3",
    "mxfp4": "mxfp4", "torchao_int4": "int4_g32_f32", "torchao_int4_zero": "uint4_g32_f32",
    "torchao_int8": "int8_g128_f32", "torchao_float8": "fp8_e4m3_g128",
}  # fmt: skip

#: files whose scales have 24 bits, so that scale * code and scale * zero are rounded
ROUNDED = {"torchao_int4_zero"}


def opened(name: str) -> Checkpoint:
    model = kernelgen.open(RECORDED / name)
    assert isinstance(model, Checkpoint)
    return model


def test_every_recorded_checkpoint_is_tested() -> None:
    assert {one.name for one in RECORDED.iterdir()} == set(FORMATS)


@pytest.mark.parametrize("name", FORMATS)
def test_values_are_those_of_the_ecosystem(name: str) -> None:
    model, recorded = opened(name), np.load(RECORDED / name / "values.npz")
    w = model[NAME]
    assert list(model) == [NAME] and model.skipped == {} and w.format.name == FORMATS[name]
    assert w.shape == tuple(recorded["shape"])
    got, want = w.dequantize()[recorded["rows"]], recorded["values"]
    if name in ROUNDED:
        # of |scale * 15|: two products and their sum, each half a unit in the last place
        assert np.abs(got - want).max() <= 1.5 * 2**-24 * 2 * np.abs(want).max()
    else:
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("name", FORMATS)
def test_the_listing_is_what_the_tensors_are(name: str) -> None:
    model = opened(name)
    (listed,) = model.listing()
    w = model[NAME]
    assert listed == (NAME, w.shape, w.format.name, w.nbytes)
    assert model.nbytes == w.nbytes and model.architecture == "recorded"
    assert model[NAME] is w


@pytest.mark.parametrize(
    ("name", "target"), [("gptq_3", "numpy"), ("gptq_4", "numpy"), ("gptq_4", "c")]
)
def test_act_order(name: str, target: str) -> None:
    """Columns are stored in another order, and no result shows it."""
    w, recorded = opened(name)[NAME], np.load(RECORDED / name / "values.npz")
    want = recorded["values"]
    assert w.columns is not None and sorted(w.columns) == list(range(128))
    x = np.random.default_rng(0).standard_normal((9, 128), np.float32)
    for rows in (x[:1], x[0], x.reshape(3, 3, 128), np.asfortranarray(x), x.astype(np.float16)):
        if target == "c" and rows.size > 128 and not rows.flags.f_contiguous:
            continue  # one matvec and one matmul
        y = kernelgen.matmul(rows, w, target=target, precision="fp32")
        exact = rows.astype(np.float64) @ want.astype(np.float64).T
        assert y.shape == exact.shape
        # a result in float16 is rounded by up to half of its last place
        rounding = 2**-11 * np.abs(exact).max() if rows.dtype == np.float16 else 0
        assert np.abs(y - exact).max() < 1e-5 * exact.std() + rounding
    np.testing.assert_array_equal(kernelgen.dequantize(w, target=target), want)
    ids = np.array([[3, 0], [3, 31]])
    np.testing.assert_array_equal(kernelgen.get_rows(w, ids, target=target), want[ids])
    np.testing.assert_array_equal(w.dequantize([5, 2]), want[[5, 2]])
    np.testing.assert_array_equal(w[4:7].dequantize(), want[4:7])
    np.testing.assert_array_equal(w.row(-1).dequantize(), want[-1])


def test_act_order_by_int8() -> None:
    w = opened("gptq_4")[NAME]
    x = np.random.default_rng(0).standard_normal((3, 128), np.float32)
    want = x @ w.dequantize().T
    y = kernelgen.matmul(x, w, target="numpy", precision="int8")
    assert np.abs(y - want).max() < 0.03 * want.std()


def test_stored_columns_are_part_of_a_tensor(tmp_path: Path) -> None:
    import pickle

    w: Any = opened("gptq_4")[NAME]
    plain = kernelgen.QuantTensor(w.format, w.shape, w.data)
    assert pickle.loads(pickle.dumps(w)) == w != plain
    with pytest.raises(kernelgen.KernelgenError, match="columns in another order"):
        w.save(tmp_path / "a.gguf")
    for wrong in (np.zeros(128, int), np.arange(127), np.arange(128.0)):
        with pytest.raises(kernelgen.KernelgenError, match=r"a permutation of 0 \.\.\. 127"):
            kernelgen.QuantTensor(w.format, w.shape, w.data, columns=wrong)

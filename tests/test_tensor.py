"""QuantTensor: shapes, views, values, pickling, and the sentences of its errors."""

from __future__ import annotations

import copy
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kernelgen import gguf_files
from kernelgen.errors import FormatError, ShapeError
from kernelgen.ir import formats
from kernelgen.ir.block import BlockFormat
from kernelgen.tensor import QuantTensor, human_bytes

Array = np.ndarray[Any, Any]
Q4_K = formats.get("q4_K")


def random_blocks(fmt: BlockFormat, count: int, seed: int = 0) -> Array:
    """Blocks of random bytes, uint8 (count, nbytes), whose floats are finite."""
    rng = np.random.default_rng(seed)
    fields = fmt.split(rng.integers(0, 256, (count, fmt.nbytes), np.uint8))
    for name, values in fields.items():
        if values.dtype.kind == "f":
            fields[name] = rng.standard_normal(values.shape).astype(values.dtype)
    if fmt.name == "bf16":
        fields["x"] &= 0xBFFF  # no exponent of ones: infinities and NaN
    return fmt.join(fields)


def random_tensor(name: str, shape: tuple[int, ...], seed: int = 0) -> QuantTensor:
    fmt = formats.get(name)
    return QuantTensor(fmt, shape, random_blocks(fmt, int(np.prod(shape)) // fmt.block, seed))


def is_sentence(text: str) -> bool:
    """Whether an error's text is one line, not quoted, without a full stop: it says what to do."""
    return "\n" not in text and not text.endswith(".") and text[0] not in "'\"" and len(text) < 500


def test_what_a_tensor_is() -> None:
    w = QuantTensor("Q4_k", [3, 512], np.zeros(3 * 288, np.uint8), "blk.0.w")
    assert w.format is Q4_K
    assert w.shape == (3, 512)
    assert (len(w), w.rows, w.nbytes, w.bits) == (3, 3, 864, 4.5)
    assert w.data.shape == (3, 288)
    assert w.data.dtype == np.uint8
    assert repr(w) == "QuantTensor('blk.0.w', q4_K, 3 x 512, 864 B)"
    assert (
        repr(QuantTensor(Q4_K, (256,), np.zeros(144, np.uint8))) == "QuantTensor(q4_K, 256, 144 B)"
    )
    assert w.name == "blk.0.w"
    assert w._prepared == {}


def test_human_bytes() -> None:
    assert [human_bytes(n) for n in (0, 999, 1000, 999_960, 33_030_144, 7e9, 2e12)] == [
        "0 B", "999 B", "1.0 kB", "1.0 MB", "33.0 MB", "7.0 GB", "2.0 TB",
    ]  # fmt: skip


@pytest.mark.parametrize("name", [f.name for f in formats.FORMATS])
@pytest.mark.parametrize("lead", [(), (3,), (2, 3)])
def test_dequantize_is_decode(name: str, lead: tuple[int, ...]) -> None:
    fmt = formats.get(name)
    blocks = random_blocks(fmt, int(np.prod(lead)) * 512 // fmt.block)
    w = QuantTensor(fmt, (*lead, 512), blocks)
    assert w.data.shape == (*lead, fmt.row_bytes(512))
    assert w.rows == int(np.prod(lead))
    values = w.dequantize()
    assert values.dtype == np.float32
    assert np.array_equal(values, fmt.decode(blocks).reshape(*lead, 512))


def test_dequantize_rows() -> None:
    w = random_tensor("q5_1", (2, 3, 64))
    values = w.dequantize().reshape(6, 64)
    assert np.array_equal(w.dequantize(4), values[4])
    assert np.array_equal(w.dequantize(-1), values[-1])
    assert np.array_equal(w.dequantize(slice(1, 6, 2)), values[1:6:2])
    assert np.array_equal(w.dequantize([5, 0, 0]), values[[5, 0, 0]])
    ids = np.array([[1, 2], [-6, 4]], np.int16)
    assert np.array_equal(w.dequantize(ids), values[ids])
    assert w.dequantize(np.array([3], np.uint8)).shape == (1, 64)
    assert w.dequantize([]).shape == (0, 64)
    for rows, text in (
        ([0, 6], "row 6 of QuantTensor(q5_1, 2 x 3 x 64, 288 B) was asked for; it has 6"),
        (-7, "row -7 of"),
        ([0.5], "by float64; name them by integers or a slice"),
        (np.array([True]), "by bool; name them"),
    ):
        with pytest.raises(ShapeError, match=re.escape(text)) as info:
            w.dequantize(rows)
        assert is_sentence(str(info.value))


def test_rows_share_the_data() -> None:
    w = random_tensor("q6_K", (5, 256))
    values = w.dequantize()
    for part, want in (
        (w[1:4], values[1:4]), (w[-2:], values[-2:]), (w[4:2], values[4:2]), (w[:99], values),
    ):  # fmt: skip
        assert part.shape == want.shape
        assert np.array_equal(part.dequantize(), want)
        assert not part.nbytes or np.shares_memory(part.data, w.data)
        assert part.data.flags.c_contiguous
    for n in (0, 4, -1, -5, np.int64(2)):
        assert w[n].shape == w.row(int(n)).shape == (256,)
        assert np.array_equal(w[n].dequantize(), values[n])
        assert np.array_equal(w.row(int(n)).dequantize(), values[n])
        assert np.shares_memory(w.row(int(n)).data, w.data)
    assert [np.array_equal(row.dequantize(), v) for row, v in zip(w, values, strict=True)] == [
        True
    ] * 5


def test_experts() -> None:
    w = random_tensor("q4_0", (4, 3, 64))
    assert w[2].shape == (3, 64)
    assert w[2][1].shape == (64,)
    assert w[1:3].shape == (2, 3, 64)
    values = w.dequantize()
    assert np.array_equal(w[2][1].dequantize(), values[2, 1])
    assert np.array_equal(w.row(7).dequantize(), values[2, 1])


def test_data_is_not_copied_and_is_read_only(tmp_path: Path) -> None:
    data = random_blocks(Q4_K, 6)
    w = QuantTensor(Q4_K, (3, 512), data)
    assert np.shares_memory(w.data, data)
    assert data.flags.writeable
    with pytest.raises(ValueError, match="read-only"):
        w.data[0] = 0
    data.tofile(tmp_path / "blocks")
    mapped = np.memmap(tmp_path / "blocks", np.uint8, "r")
    w = QuantTensor(Q4_K, (3, 512), mapped)
    assert np.shares_memory(w.data, mapped)
    assert type(w.data) is np.ndarray
    # what is not contiguous has to be copied: the data of a tensor always is
    w = QuantTensor(Q4_K, (3, 512), np.repeat(data, 2, axis=0)[::2])
    assert w.data.flags.c_contiguous
    assert np.array_equal(w.data.reshape(6, -1), data)


def test_equality_and_pickling() -> None:
    w = random_tensor("q3_K", (4, 256))
    w.name = "w"
    w._prepared["key"] = object()
    for other in (pickle.loads(pickle.dumps(w)), copy.copy(w), copy.deepcopy(w)):
        assert other == w
        assert other.name == "w"
        assert other.format is w.format
        assert other._prepared == {}
        assert not other.data.flags.writeable
    assert w != random_tensor("q3_K", (4, 256), seed=1)
    assert w != w[:2]
    same_bytes = np.zeros(18, np.uint8)
    assert QuantTensor("q4_0", (32,), same_bytes) != QuantTensor("iq4_nl", (32,), same_bytes)
    assert w != "w"
    with pytest.raises(TypeError):
        hash(w)


def test_a_slice_of_a_mapping_pickles_alone(tmp_path: Path) -> None:
    random_tensor("q8_0", (1000, 64)).save(tmp_path / "w.gguf")
    w = gguf_files.open(tmp_path / "w.gguf")["weight"]
    pickled = pickle.dumps(w[10:12])
    assert len(pickled) < 1000
    assert pickle.loads(pickled) == w[10:12]


def test_numpy_sees_values_but_does_not_multiply() -> None:
    w = random_tensor("q8_0", (2, 32))
    assert np.array_equal(np.asarray(w), w.dequantize())
    assert np.asarray(w, np.float64).dtype == np.float64
    with pytest.raises(ValueError, match="copy=False"):
        np.asarray(w, copy=False)
    with pytest.raises(TypeError):
        np.ones((1, 2), np.float32) @ w


def test_save(tmp_path: Path) -> None:
    w = random_tensor("q4_K", (3, 256))
    w.save(tmp_path / "a.gguf")
    assert gguf_files.open(tmp_path / "a.gguf")["weight"] == w
    w.save(tmp_path / "a.gguf", "other")
    assert list(gguf_files.open(tmp_path / "a.gguf")) == ["other"]
    w.name = "own"
    w.save(str(tmp_path / "a.gguf"))
    assert list(gguf_files.open(tmp_path / "a.gguf")) == ["own"]


BLOCK = np.zeros(18, np.uint8)


@pytest.mark.parametrize(
    ("format", "shape", "data", "error", "text"),
    [
        ("q9_9", (1, 32), BLOCK, FormatError, "format 'q9_9' is not known; known are f32, f16"),
        (7, (1, 32), BLOCK, FormatError, "by its name or as a BlockFormat, not as int"),
        ("q4_0", (1, 33), BLOCK, FormatError, "K must be a positive multiple of 32"),
        ("q4_0", (1, 0), BLOCK[:0], FormatError, "K must be a positive multiple of 32"),
        ("q4_0", (), BLOCK, ShapeError, "needs a dimension for its blocks to run along"),
        ("q4_0", 32, BLOCK, ShapeError, "a tuple of integers such as (4096, 256), not 32"),
        ("q4_0", (1.0, 32), BLOCK, ShapeError, "a tuple of integers such as"),
        ("q4_0", (-1, 32), BLOCK, ShapeError, "was given as (-1, 32); sizes are >= 0"),
        ("q4_0", (1, 32), BLOCK.view(np.int8), ShapeError, "of its blocks, not int8; floats are"),
        ("q4_0", (1, 32), b"blocks", ShapeError, "the bytes of its blocks, not bytes"),
        ("q4_0", (2, 32), BLOCK, ShapeError,
         "a q4_0 tensor of shape 2 x 32 takes 2 x 18 = 36 bytes, but its data has 18; check"),
    ],
)  # fmt: skip
def test_contradictions(
    format: Any, shape: Any, data: Any, error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=re.escape(text)) as info:
        QuantTensor(format, shape, data)
    assert is_sentence(str(info.value))


def test_indexing_errors() -> None:
    w = random_tensor("q8_0", (3, 32))
    for key, text in (
        (3, "index 3 of QuantTensor(q8_0, 3 x 32, 102 B) was asked for; it has 3"),
        ("a", "was indexed by str; use an integer or a slice"),
        ((0, 1), "was indexed by tuple"),
        (slice(None, None, 2), "in steps of 2; rows are shared only in steps of 1"),
    ):
        with pytest.raises(ShapeError, match=re.escape(text)) as info:
            w[key]  # type: ignore[index]
        assert is_sentence(str(info.value))
    with pytest.raises(ShapeError, match="blocks are not cut"):
        w[0][0]
    with pytest.raises(ShapeError, match="row 3 of"):
        w.row(3)


@pytest.mark.parametrize("fmt", ["f16", "q8_0", "q4_K", "iq2_xs", "mxfp4"])
def test_columns_of_whole_blocks(fmt: str) -> None:
    w = random_tensor(fmt, (3, 1024))
    for start, stop in ((0, 256), (256, 1024), (512, 768)):
        cut = w.cut_columns(start, stop)
        assert (cut.shape, cut.format) == ((3, stop - start), w.format)
        assert np.array_equal(cut.dequantize(), w.dequantize()[:, start:stop], equal_nan=True)
    assert w.cut_columns(0, 1024) is w
    stack = QuantTensor(fmt, (1, 3, 1024), w.data)
    assert stack.cut_columns(256, 512)[0] == w.cut_columns(256, 512)
    assert w.row(1).cut_columns(256, 512) == w.cut_columns(256, 512).row(1)


def test_columns_that_cannot_be_cut() -> None:
    w = random_tensor("q4_K", (3, 1024))
    for start, stop in ((0, 128), (128, 256), (256, 256), (512, 256), (0, 1280), (-256, 256)):
        with pytest.raises(ShapeError, match=f"columns {start} to {stop} of .* multiples of 256"):
            w.cut_columns(start, stop)
    mixed = QuantTensor("q4_K", (3, 1024), w.data, columns=np.arange(1024)[::-1])
    with pytest.raises(ShapeError, match="another order, so only rows") as info:
        mixed.cut_columns(0, 256)
    assert is_sentence(str(info.value))


def test_quantize() -> None:
    quantizer = pytest.importorskip("kernelgen.quantizer")
    if not hasattr(quantizer, "quantize"):
        pytest.skip("kernelgen.quantizer is not finished")
    from kernelgen.tensor import quantize

    x = np.random.default_rng(0).standard_normal((2, 3, 256)).astype(np.float32)
    w = quantize(x, "q8_0")
    assert (w.format.name, w.shape) == ("q8_0", x.shape)
    assert np.abs(w.dequantize() - x).max() < 0.02
    assert np.array_equal(quantize(x[0, 0], "Q8_0").dequantize(), w[0][0].dequantize())
    with pytest.raises(FormatError, match="multiple of 256"):
        quantize(x[..., :32], "q4_K")
    with pytest.raises(ShapeError, match="needs a dimension"):
        quantize(np.float32(1), "q8_0")

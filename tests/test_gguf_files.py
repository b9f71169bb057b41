"""GGUF files: round trips, memory maps, and every way in which a file can be wrong."""

from __future__ import annotations

import errno
import math
import os
import pickle
import re
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

import kernelgen
from kernelgen import gguf_files
from kernelgen.errors import FileError, FormatError, KernelgenError, ShapeError
from kernelgen.gguf_files import Metadata, Model
from kernelgen.ir import formats
from kernelgen.ir.block import BlockFormat
from kernelgen.ir.encode import put_half
from kernelgen.tensor import QuantTensor

pytestmark = pytest.mark.filterwarnings("error")

Array = np.ndarray[Any, Any]

#: no file, however damaged, may keep us longer (seconds, on a busy machine)
LIMIT = 3.0

#: the gguf package's own tool
GGUF_DUMP = Path(sys.executable).with_name("gguf-dump")


def random_tensor(fmt: BlockFormat, shape: tuple[int, ...], seed: int = 0) -> QuantTensor:
    """Blocks of random bytes whose floats are finite."""
    rng = np.random.default_rng(seed)
    count = math.prod(shape) // fmt.block
    fields = fmt.split(rng.integers(0, 256, (count, fmt.nbytes), np.uint8))
    for name, values in fields.items():
        if values.dtype.kind == "f":
            fields[name] = rng.standard_normal(values.shape).astype(values.dtype)
    if fmt.name == "bf16":
        fields["x"] &= 0xBFFF  # no exponent of ones: infinities and NaN
    blocks = fmt.join(fields)
    for name in fmt.halves:
        put_half(fmt, blocks, name, rng.standard_normal(count))
    return QuantTensor(fmt, shape, blocks)


@pytest.fixture(scope="module")
def every_format() -> dict[str, QuantTensor]:
    return {
        f"blk.{n}.{fmt.name}": random_tensor(fmt, (3, 512), n)
        for n, fmt in enumerate(formats.FORMATS)
    }


def refused(path: Path | str, *words: str) -> str:
    """The one sentence with which opening `path` is refused; it holds all of `words`."""
    start = time.perf_counter()
    with pytest.raises(FileError) as info:
        gguf_files.open(path)
    assert time.perf_counter() - start < LIMIT
    text = str(info.value)
    assert str(path) in text
    assert "\n" not in text
    assert not text.endswith(".")
    for word in words:
        assert word in text
    return text


def survives(path: Path) -> Model | None:
    """The file's Model with all its tensors touched, or None where it is refused; a damaged file
    may do nothing else."""
    start = time.perf_counter()
    try:
        model = gguf_files.open(path)
        repr(model)
        for w in model.values():
            w.data.max(initial=0)
    except FileError as error:
        assert "\n" not in str(error)
        model = None
    assert time.perf_counter() - start < LIMIT
    return model


# -- files made by hand, to be wrong in one place


def string(text: str | bytes) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw


def number(name: str | bytes, value: int) -> bytes:
    """A metadata entry of type uint32."""
    return string(name) + struct.pack("<II", 4, value)


def info(
    name: str | bytes = "w", dims: tuple[int, ...] = (32, 2), kind: int = 2, offset: int = 0
) -> bytes:
    """A tensor entry; dims has the innermost first, kind 2 is q4_0."""
    start = string(name) + struct.pack("<I", len(dims))
    return start + struct.pack(f"<{len(dims)}QIQ", *dims, kind, offset)


def raw_file(
    path: Path,
    infos: list[bytes],
    keys: list[bytes] | None = None,
    data: int = 256,
    counts: tuple[int, int] | None = None,
    version: int = 3,
) -> Path:
    """A GGUF file of these entries and `data` zero bytes; `counts` are what its header claims."""
    keys = keys or []
    tensors, entries = counts or (len(infos), len(keys))
    header = struct.pack("<4sIQQ", b"GGUF", version, tensors, entries)
    header += b"".join(keys) + b"".join(infos)
    path.write_bytes(header + b"\0" * (-len(header) % 32 + data))
    return path


# -- what goes in comes out


def test_every_format_round_trips(tmp_path: Path, every_format: dict[str, QuantTensor]) -> None:
    path = tmp_path / "all.gguf"
    gguf_files.save(path, every_format)
    model = gguf_files.open(path)
    assert list(model) == list(every_format)
    assert len(model) == len(formats.FORMATS)
    assert dict(model) == every_format
    assert model.skipped == {}
    for name, w in model.items():
        assert w.name == name
        assert w.shape == (3, 512)
        assert model[name] is w  # so that what targets prepare stays


def test_values_are_those_of_gguf(tmp_path: Path, every_format: dict[str, QuantTensor]) -> None:
    path = tmp_path / "all.gguf"
    # gguf 0.19 has a wrong size for q8_1, does not know q2_0, and cannot read a file that has one
    known = {k: w for k, w in every_format.items() if w.format.name not in ("q8_1", "q2_0")}
    gguf_files.save(path, known)
    model = gguf_files.open(path)
    compared = 0
    for theirs in gguf.GGUFReader(path).tensors:
        ours = model[theirs.name]
        assert ours.data.tobytes() == theirs.data.tobytes()
        assert list(ours.shape) == theirs.shape.tolist()[::-1]
        try:
            with np.errstate(over="ignore"):  # powers of two of mxfp4
                want = gguf.quants.dequantize(theirs.data, theirs.tensor_type)
        except NotImplementedError:
            continue
        assert np.array_equal(ours.dequantize(), want), theirs.name
        compared += 1
    assert compared == len(known) - 2  # gguf does not decode q8_K and q1_0


@pytest.mark.parametrize("name", ["iq2_xs", "iq1_m", "tq1_0", "nvfp4", "q1_0", "q2_0"])
def test_what_a_file_holds_is_multiplied(tmp_path: Path, name: str) -> None:
    fmt = formats.get(name)
    path = tmp_path / "one.gguf"
    gguf_files.save(path, {"w": random_tensor(fmt, (5, 512), 3)})
    w = gguf_files.open(path)["w"]
    x = np.random.default_rng(0).standard_normal((3, 512), np.float32)
    y = kernelgen.matmul(x, w, target="numpy", precision="fp32")
    want = x.astype(np.float64) @ w.dequantize().astype(np.float64).T
    assert np.abs(y - want).max() <= 1e-4 * np.abs(want).max()


def test_tensors_are_memory_maps(tmp_path: Path, every_format: dict[str, QuantTensor]) -> None:
    path = tmp_path / "all.gguf"
    gguf_files.save(path, every_format)
    model = gguf_files.open(path)
    maps = []
    for w in [*model.values(), *(w[1:] for w in model.values())]:
        base: Any = w.data
        while not isinstance(base, np.memmap):
            base = base.base
        assert base.mode == "r"
        assert np.shares_memory(base, w.data)
        assert not w.data.flags.writeable
        maps.append(base)
    assert all(np.shares_memory(maps[0], other) for other in maps)


def test_opening_reads_the_header_only(tmp_path: Path) -> None:
    path = raw_file(tmp_path / "big.gguf", [info(dims=(2**20, 2**15))], data=0)
    with path.open("rb+") as file:
        file.truncate(20_000_000_000)  # a sparse file
    start = time.perf_counter()
    w = gguf_files.open(path)["w"]
    assert time.perf_counter() - start < LIMIT
    assert w.nbytes == 2**35 // 32 * 18
    assert not w[-1:].dequantize().any()


def test_shapes(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tensors: dict[str, QuantTensor | Array] = {
        "norm": rng.standard_normal(100).astype(np.float32),
        "scalar": np.array(7, np.float32),
        "half": rng.standard_normal((3, 5)).astype(np.float16),
        "fortran": np.asfortranarray(rng.standard_normal((4, 6)).astype(np.float32)),
        "big_endian": np.arange(8, dtype=">f4"),
        "experts": random_tensor(formats.get("q4_K"), (4, 3, 256)),
        "four": random_tensor(formats.get("q8_0"), (2, 2, 2, 32)),
        "one": random_tensor(formats.get("q5_0"), (64,)),
        "some_rows": random_tensor(formats.get("q6_K"), (9, 256))[2:5],
        "no_rows": random_tensor(formats.get("q6_K"), (9, 256))[5:5],
    }
    path = tmp_path / "a.gguf"
    gguf_files.save(path, tensors)
    model = gguf_files.open(path)
    assert list(model) == list(tensors)
    for name, given in tensors.items():
        if isinstance(given, QuantTensor):
            assert model[name] == given
        else:
            assert model[name].shape == (given.shape or (1,))
            assert np.array_equal(model[name].dequantize().reshape(given.shape), given)
    assert model["half"].format.name == "f16"
    assert [len(t.shape) for t in gguf.GGUFReader(path).tensors][:2] == [1, 1]


METADATA: dict[str, Any] = {
    "general.architecture": "llama",
    "general.name": "a näme",
    "empty": "",
    "a.u32": 4_000_000_000,
    "a.i32": -5,
    "a.u64": 2**64 - 1,
    "a.i64": -(2**63),
    "a.bool": True,
    "a.f32": 0.5,
    "a.f64": 1e300,
    "a.inf": -math.inf,
    "list.int": [1, 2, 3],
    "list.negative": [1, -2],
    "list.wide": [-1, 2**40],
    "list.float": [0.25, 1.5],
    "list.mixed": [1, 1.5],
    "list.str": ["<s>", "", "▁the", "\0"],
    "list.bool": [True, False],
    "bytes": b"\xff\xfe",
    "list.bytes": ["a", b"\xc3"],
}


def test_metadata_round_trips(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    gguf_files.save(path, {}, METADATA)
    model = gguf_files.open(path)
    assert model.metadata == METADATA
    assert list(model.metadata) == list(METADATA)
    assert {name: type(v) for name, v in model.metadata.items()} == {
        name: type(v) for name, v in METADATA.items()
    }
    assert model.metadata.types == {
        "general.architecture": "string", "general.name": "string", "empty": "string",
        "a.u32": "uint32", "a.i32": "int32", "a.u64": "uint64", "a.i64": "int64",
        "a.bool": "bool", "a.f32": "float32", "a.f64": "float64", "a.inf": "float32",
        "list.int": "array[uint32]", "list.negative": "array[int32]", "list.wide": "array[int64]",
        "list.float": "array[float32]", "list.mixed": "array[float32]",
        "list.str": "array[string]", "list.bool": "array[bool]",
        "bytes": "string", "list.bytes": "array[string]",
    }  # fmt: skip
    assert (model.architecture, len(model), model.path) == ("llama", 0, path)
    fields = gguf.GGUFReader(path).fields
    for name, value in model.metadata.items():
        if "bytes" not in name:  # at which gguf's reader raises
            assert fields[name].contents() == value


def test_a_copy_keeps_the_types(tmp_path: Path) -> None:
    """Copying a file through kernelgen changes no byte of it."""
    kinds = gguf.GGUFValueType
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    for kind, value in {
        kinds.UINT8: 1, kinds.INT8: 2, kinds.UINT16: 3, kinds.INT16: 4, kinds.UINT32: 5,
        kinds.INT32: 6, kinds.UINT64: 7, kinds.INT64: 8, kinds.FLOAT32: 0.1, kinds.FLOAT64: 0.1,
        kinds.BOOL: False, kinds.STRING: "s",
    }.items():  # fmt: skip
        writer.add_key_value(f"k.{kind.name}", value, kind)
        writer.add_key_value(f"l.{kind.name}", [value] * 3, kinds.ARRAY, kind)
    writer.add_quantization_version(2)
    writer.add_custom_alignment(64)
    for n in range(3):
        writer.add_tensor(f"w{n}", np.arange(7 + n, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    model = gguf_files.open(tmp_path / "a.gguf")
    assert model.metadata["k.FLOAT64"] == 0.1
    assert model.metadata["k.FLOAT32"] == float(np.float32(0.1))
    assert model.metadata["general.alignment"] == 64
    gguf_files.save(tmp_path / "b.gguf", model, model.metadata)
    copied = gguf_files.open(tmp_path / "b.gguf")
    assert dict(copied) == dict(model)
    assert copied.metadata == model.metadata
    assert copied.metadata.types == model.metadata.types
    again = pickle.loads(pickle.dumps(model.metadata))
    assert (again, again.types) == (model.metadata, model.metadata.types)


def test_changed_metadata_keeps_types_that_fit() -> None:
    old = Metadata({"a": 1, "b": 2}, {"a": "uint8", "b": "int64"})
    new = old.copy() | {"c": 3} | Metadata({"b": 4}, {"b": "int16"})
    assert new == {"a": 1, "b": 4, "c": 3}
    assert new.types == {"a": "uint8", "b": "int16"}
    assert old.types == {"a": "uint8", "b": "int64"}


def test_types_of_metadata(tmp_path: Path) -> None:
    given = Metadata(
        {"a": 300, "b": 7, "c": [1, 2]}, {"a": "uint8", "b": "int64", "c": "array[int8]"}
    )
    scalars = {
        "d": np.int16(3),
        "e": np.float64(0.1),
        "f": np.arange(3, dtype=np.uint8),
        "g": (1, 2),
    }
    gguf_files.save(tmp_path / "a.gguf", {}, given | scalars)
    seen = gguf_files.open(tmp_path / "a.gguf").metadata
    assert {name: seen.types[name] for name in "abcdefg"} == {
        "a": "uint32",  # 300 is no uint8
        "b": "int64", "c": "array[int8]", "d": "int16", "e": "float64", "f": "array[uint8]",
        "g": "array[uint32]",
    }  # fmt: skip
    assert (seen["e"], seen["f"], seen["g"]) == (0.1, [0, 1, 2], [1, 2])


def test_what_saving_adds(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    gguf_files.save(path, {"w": np.ones(4, np.float32)})
    assert gguf_files.open(path).metadata == {"general.architecture": "kernelgen"}
    gguf_files.save(path, {"w": random_tensor(formats.get("q8_0"), (32,))})
    # the specification wants it where a tensor is quantized
    assert gguf_files.open(path).metadata["general.quantization_version"] == 2


def test_empty_lists_are_left_out_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    entry = string("none") + struct.pack("<IIQ", 9, 8, 0)
    model = gguf_files.open(raw_file(tmp_path / "a.gguf", [], [entry]))
    assert model.metadata == {"none": []}
    gguf_files.save(tmp_path / "b.gguf", {}, model.metadata)
    assert "none" not in gguf_files.open(tmp_path / "b.gguf").metadata
    assert "'none' is an empty list" in caplog.text


def test_arrays_of_arrays_come_flattened(tmp_path: Path) -> None:
    inner = [struct.pack("<IQ2i", 5, 2, n, n + 1) for n in (1, 5)]
    entry = string("nested") + struct.pack("<IIQ", 9, 9, 2) + b"".join(inner)
    model = gguf_files.open(raw_file(tmp_path / "a.gguf", [], [entry, number("next", 3)]))
    assert model.metadata == {"nested": [1, 2, 5, 6], "next": 3}


# -- a model is a mapping


def test_names_that_are_not_there(tmp_path: Path) -> None:
    gguf_files.save(tmp_path / "a.gguf", {"blk.0.attn_q": np.ones(4, np.float32)})
    model = gguf_files.open(tmp_path / "a.gguf")
    assert "blk.0.attn_q" in model
    assert "blk.0.attn_k" not in model
    assert model.get("blk.0.attn_k") is None
    with pytest.raises(KeyError) as info:
        model["blk.0.attn_k"]
    assert isinstance(info.value, FileError)
    assert str(info.value) == (
        f"{tmp_path / 'a.gguf'} has no tensor 'blk.0.attn_k' among its 1;"
        " did you mean 'blk.0.attn_q'?"
    )
    with pytest.raises(FileError, match="list\\(model\\) names all"):
        model["z"]


def test_types_kernelgen_does_not_know(tmp_path: Path) -> None:
    """...neither those that gguf knows (24: I8, 26: I32) nor later ones."""
    path = raw_file(
        tmp_path / "a.gguf",
        [
            info("a", (256, 1), 24), info("b", (32, 2), 2, 96), info("c", (7,), 26, 160),
            info("d", (5, 5), 999, 192), info("e", (2**60,), 77, 0),
        ],
    )  # fmt: skip
    model = gguf_files.open(path)
    assert list(model) == ["b"]
    assert model.skipped == {"a": "I8", "c": "I32", "d": "ggml type 999", "e": "ggml type 77"}
    assert "a" not in model
    for name, kind in model.skipped.items():
        with pytest.raises(FormatError) as info_:
            model[name]
        text = str(info_.value)
        assert f"tensor {name!r} of {path} is in {kind}, which kernelgen does not know" in text
        assert all(fmt.name in text for fmt in formats.FORMATS)
    assert "  d  ggml type 999, not known" in repr(model)


def test_registered_formats_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A format of ggml that kernelgen does not know and a user describes is known from then on; a
    namesake is not it."""
    monkeypatch.delitem(formats._by_name, "tq2_0")
    path = raw_file(tmp_path / "a.gguf", [info("w", (256, 2), 35)], data=132)  # TQ2_0
    assert gguf_files.open(path).skipped == {"w": "TQ2_0"}
    described = BlockFormat(
        name="tq2_0", block=256, group=256, nbytes=66, fields={"qs": "u8[64]", "d": "f16"},
        code=lambda b, i: (b.qs[i // 128 * 32 + i % 32] >> (2 * (i // 32 % 4))) & 3,
        scale=lambda b, g: b.d, bias=1,
    )  # fmt: skip
    namesake = BlockFormat(
        name="tq2_0", block=32, group=32, nbytes=32, fields={"qs": "u8[32]"},
        code=lambda b, i: b.qs[i],
    )  # fmt: skip
    for fmt, known in ((described, True), (namesake, False)):
        formats.register(fmt)
        try:
            assert ("w" in gguf_files.open(path)) is known
            w = random_tensor(fmt, (2, 256))
            if known:
                want = gguf.quants.dequantize(w.data, gguf.GGMLQuantizationType.TQ2_0)
                assert np.array_equal(w.dequantize(), want)
                w.save(tmp_path / "b.gguf")
                assert gguf_files.open(tmp_path / "b.gguf")["weight"] == w
            else:
                with pytest.raises(FormatError, match="a format that ggml does not have"):
                    w.save(tmp_path / "b.gguf")
        finally:
            formats.unregister("tq2_0")


def test_repr(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    tensors: dict[str, QuantTensor | Array] = {
        "w": random_tensor(formats.get("q4_K"), (3, 256)), "norm": np.ones(4, np.float32),
    }  # fmt: skip
    gguf_files.save(path, tensors)
    assert repr(gguf_files.open(path)).splitlines() == [
        f"{path}: kernelgen, 2 tensors, 448 B",
        "  w     q4_K  3 x 256  432 B",
        "  norm  f32   4         16 B",
    ]
    gguf_files.save(path, {f"w{n}": np.ones(4, np.float32) for n in range(100)})
    lines = repr(gguf_files.open(path)).splitlines()
    assert len(lines) == 1 + 30 + 1 + 5
    assert lines[31] == "  ... 65 more"
    gguf_files.save(path, {})
    assert repr(gguf_files.open(path)) == f"{path}: kernelgen, 0 tensors, 0 B"


def test_gguf_is_imported_on_use(tmp_path: Path) -> None:
    code = (
        "import sys, kernelgen.gguf_files as g\n"
        "assert 'gguf' not in sys.modules\n"
        "sys.modules['gguf'] = None\n"
        "from kernelgen.errors import FileError\n"
        "for call in (lambda: g.open(sys.argv[1]), lambda: g.save(sys.argv[1], {})):\n"
        "    try: call()\n"
        "    except FileError as e: assert 'pip install gguf' in str(e), e\n"
        "    else: raise SystemExit('no error')\n"
    )
    path = raw_file(tmp_path / "a.gguf", [])
    root = Path(gguf_files.__file__).parents[1]
    subprocess.run([sys.executable, "-c", code, str(path)], check=True, cwd=root)


# -- files that are wrong


def test_what_is_no_file(tmp_path: Path) -> None:
    refused(tmp_path / "none.gguf", "does not exist", "check the path")
    refused(tmp_path / "none" / "none.gguf", "does not exist")
    refused(tmp_path, "is a folder")
    (tmp_path / "empty.gguf").touch()
    refused(tmp_path / "empty.gguf", "is empty")
    (tmp_path / "a.txt").write_text("hello, this is not a model")
    refused(tmp_path / "a.txt", "not a GGUF file", "b'hell'")
    refused(tmp_path / "a.txt" / "b.gguf", "cannot be read")
    refused("bad\0name", "is not a path")
    os.mkfifo(tmp_path / "pipe")
    refused(tmp_path / "pipe", "not a regular file")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root reads all")
def test_a_file_without_rights(tmp_path: Path) -> None:
    path = raw_file(tmp_path / "a.gguf", [info()])
    path.chmod(0)
    refused(path, "Permission denied", "check path")


@pytest.mark.parametrize("size", range(1, 24))
def test_a_start_of_a_header(tmp_path: Path, size: int) -> None:
    path = raw_file(tmp_path / "a.gguf", [info()])
    path.write_bytes(path.read_bytes()[:size])
    refused(path, "is truncated: it has", f"{size} bytes")


def test_versions(tmp_path: Path) -> None:
    for version in (0, 1, 4, 2**31 + 3):
        path = raw_file(tmp_path / "a.gguf", [info()], version=version)
        refused(path, f"version {version};", "reads 2 and 3")
    assert list(gguf_files.open(raw_file(tmp_path / "a.gguf", [info()], version=2))) == ["w"]
    big = raw_file(tmp_path / "a.gguf", [info()], version=3 << 24)
    refused(big, "big-endian", "gguf-convert-endian")


HUGE = (2**24, 2**32, 2**62, 2**63, 2**64 - 1)


def array(kind: int, count: int, data: bytes = b"") -> bytes:
    return string("array") + struct.pack("<IIQ", 9, kind, count) + data


@pytest.mark.parametrize("huge", HUGE)
def test_huge_numbers(tmp_path: Path, huge: int) -> None:
    path = tmp_path / "a.gguf"
    refused(raw_file(path, [info()], counts=(huge, 0)), f"promises {huge} tensors")
    refused(raw_file(path, [info()], counts=(1, huge)), f"{huge} metadata entries")
    refused(raw_file(path, [info(dims=(32, huge))]), "tensor 'w' ends at byte")
    refused(raw_file(path, [info(dims=(huge, huge, huge, huge))]), "truncated or damaged")
    refused(raw_file(path, [info(offset=huge // 32 * 32)]), "tensor 'w' ends at byte")
    for kind in range(14):
        refused(raw_file(path, [], [array(kind, huge)]), "truncated or damaged")
    # a name, a string, a string in a list that go on beyond the end
    length = struct.pack("<Q", huge)
    refused(raw_file(path, [length + b"w"], counts=(1, 0)), "header runs to byte")
    refused(raw_file(path, [], [length + b"w"], counts=(0, 1)), "header runs to byte")
    refused(raw_file(path, [], [string("k") + struct.pack("<I", 8) + length]), "header runs to")
    refused(raw_file(path, [], [array(8, 1, length)]), "header runs to byte")
    if huge < 2**32:
        raw = string("w") + struct.pack("<I", huge)
        refused(raw_file(path, [raw], counts=(1, 0)), "header runs to byte")


@pytest.fixture
def sparse(tmp_path: Path) -> Iterator[Path]:
    """A file name whose file the test makes gigabytes of zeros long."""
    yield tmp_path / "sparse.gguf"
    (tmp_path / "sparse.gguf").unlink()


@pytest.mark.parametrize("kind", [0, 1, 4, 6, 7, 10, 12])
def test_counts_that_a_large_file_could_hold(sparse: Path, kind: int) -> None:
    """Damaged counts in files of zeros, where every entry that is read looks like one."""
    for counts, keys in (
        ((2**26, 0), []), ((0, 2**26), []), ((0, 2), [array(kind, 2**29)]),
    ):  # fmt: skip
        raw_file(sparse, [], keys, counts=counts)
        with sparse.open("rb+") as file:
            file.truncate(2**33)
        refused(sparse, "truncated or damaged")


def test_tensors_that_are_wrong(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    refused(raw_file(path, [info("w"), info("w")]), "two tensors named 'w'")
    refused(
        raw_file(path, [info(dims=(33, 2))]),
        "rows of tensor 'w' have 33 elements, and q4_0 has blocks of 32",
    )
    refused(raw_file(path, [info(dims=(0, 2))]), "rows of tensor 'w' have 0 elements")
    refused(raw_file(path, [info(dims=())]), "rows of tensor 'w' have 1 elements")
    refused(raw_file(path, [info(dims=(300, 2), kind=16)]), "and iq2_xxs has blocks of 256")
    refused(raw_file(path, [info(dims=(32, 1, 1, 1, 1))]), "5 dimensions", "ggml has 4")
    refused(raw_file(path, [info(offset=8)]), "begins at offset 8, not a multiple", "alignment 32")
    refused(raw_file(path, [info()], data=35), "tensor 'w' ends at byte 132, but the file at 131")
    refused(raw_file(path, [info(dims=(7,), kind=26)], data=27), "tensor 'w' ends at byte")
    refused(raw_file(path, [info(b"\xff")]), "truncated or damaged", "utf-8")


def test_metadata_that_is_wrong(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    refused(raw_file(path, [], [number("k", 1), number("k", 2)]), "Duplicate k")
    refused(raw_file(path, [], [number("GGUF.version", 1)]), "Duplicate GGUF.version")
    refused(raw_file(path, [], [string("k") + struct.pack("<I", 99)]), "99 is not a valid")
    refused(raw_file(path, [], [number(b"\xff", 1)]), "utf-8")
    for alignment in (0, 3, 2**32 - 1):
        refused(raw_file(path, [info()], [number("general.alignment", alignment)]), "alignment")
    refused(raw_file(path, [info()], [number("general.alignment", 2**31)]), "ends at byte")
    refused(raw_file(path, [], [string("general.alignment") + struct.pack("<IB", 0, 8)]))
    # lists in lists in lists...
    refused(raw_file(path, [], [array(9, 1, struct.pack("<IQ", 9, 1) * 5000)]))
    gguf_files.open(raw_file(path, [], [number("general.architecture", 7)]))  # odd, but readable


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A file with every kind of entry, of a few hundred bytes, its header first."""
    path = tmp_path_factory.mktemp("small") / "small.gguf"
    tensors: dict[str, QuantTensor | Array] = {
        "norm": np.arange(3, dtype=np.float32),
        "q4": random_tensor(formats.get("q4_0"), (2, 64)),
        "experts": random_tensor(formats.get("q8_0"), (2, 1, 32)),
    }
    metadata = {
        "a": 1, "b": "text", "c": [1.5, 2.5], "d": ["x", "yz"], "e": True, "f": [1, 2, 3],
        "general.alignment": 32,
    }  # fmt: skip
    gguf_files.save(path, tensors, metadata)
    return path.read_bytes()


def test_every_truncation(tmp_path: Path, small: bytes) -> None:
    """No prefix of a file is read as the whole: it is refused, with the file's end in its data."""
    path = tmp_path / "a.gguf"
    path.write_bytes(small)
    model = survives(path)
    assert model is not None
    last = model["experts"]
    padding = len(small) - (small.index(last.data.tobytes()) + last.nbytes)
    for size in range(len(small) - padding):
        path.write_bytes(small[:size])
        assert survives(path) is None, size
    path.write_bytes(small[: len(small) - padding])
    assert survives(path) is not None  # what follows the last tensor is not missed


def header_size(small: bytes) -> int:
    return small.index(np.arange(3, dtype=np.float32).tobytes())


def test_every_byte_damaged(tmp_path: Path, small: bytes) -> None:
    """Each byte of the header, in turn, takes values that are likely to hurt."""
    path = tmp_path / "a.gguf"
    outcomes = {True: 0, False: 0}
    for at in range(header_size(small)):
        for value in {0, 9, 0x7F, 0xFF, small[at] ^ 1, small[at] ^ 0x40}:
            path.write_bytes(small[:at] + bytes([value]) + small[at + 1 :])
            outcomes[survives(path) is None] += 1
    assert min(outcomes.values()) > 100  # both happen: the test looks at something


@pytest.mark.parametrize("seed", range(4))
def test_random_damage(tmp_path: Path, small: bytes, seed: int) -> None:
    """Several bytes, words or stretches of the header at once; pieces cut out or put in."""
    path = tmp_path / "a.gguf"
    rng = np.random.default_rng(seed)
    end = header_size(small)
    for _ in range(300):
        damaged = bytearray(small)
        for _ in range(rng.integers(1, 5)):
            at, size = int(rng.integers(4, end)), int(rng.integers(1, 17))
            match rng.integers(0, 4):
                case 0:
                    damaged[at : at + size] = rng.bytes(size)
                case 1:
                    damaged[at : at + 8] = struct.pack("<Q", 2 ** int(rng.integers(0, 64)) - 1)
                case 2:
                    del damaged[at : at + size]
                case 3:
                    damaged[at:at] = damaged[at : at + size]
        path.write_bytes(damaged)
        survives(path)


def test_random_files(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    path = tmp_path / "a.gguf"
    for _ in range(300):
        counts = struct.pack("<QQ", *rng.integers(0, 4, 2).tolist())
        words = rng.choice([0, 0, 0, 1, 2, 4, 8, 9, 32, 255], rng.integers(0, 400)).astype("u1")
        path.write_bytes(b"GGUF\3\0\0\0" + counts + words.tobytes())
        survives(path)


# -- saving


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.gguf"
    w = random_tensor(formats.get("q8_0"), (2, 32))
    w.save(path)
    before = path.read_bytes()

    def no_space(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def broken(*args: Any, **kwargs: Any) -> None:
        raise ValueError("something\nbroke")

    def interrupted(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt("stop")

    for owner, name, action, error, text in (
        (gguf.GGUFWriter, "write_tensors_to_file", no_space, FileError, "No space left"),
        (gguf.GGUFWriter, "write_tensors_to_file", broken, FileError, "something broke"),
        (gguf.GGUFWriter, "write_kv_data_to_file", interrupted, KeyboardInterrupt, "stop"),
        (os, "replace", no_space, FileError, f"{path} was not written: No space left"),
        (os, "fsync", no_space, FileError, "No space left"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, action)
            with pytest.raises(error, match=re.escape(text)) as info:
                gguf_files.save(path, {"other": w})
            assert "\n" not in str(info.value)
        assert path.read_bytes() == before
        assert [p.name for p in tmp_path.iterdir()] == ["a.gguf"]


def test_saving_over_the_file_that_is_open(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    gguf_files.save(path, {"w": random_tensor(formats.get("q8_0"), (20, 64))})
    model = gguf_files.open(path)
    before = model["w"].dequantize()
    gguf_files.save(path, {"part": model["w"][5:7]})
    assert np.array_equal(model["w"].dequantize(), before)
    assert np.array_equal(gguf_files.open(path)["part"].dequantize(), before[5:7])


def test_saving_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link.gguf").symlink_to(tmp_path / "real" / "a.gguf")
    gguf_files.save(tmp_path / "link.gguf", {"w": np.ones(4, np.float32)})
    assert (tmp_path / "link.gguf").is_symlink()
    assert "w" in gguf_files.open(tmp_path / "real" / "a.gguf")


def test_saved_files_have_the_usual_rights(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    gguf_files.save(tmp_path / "a.gguf", {})
    assert (tmp_path / "a.gguf").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_what_cannot_be_saved(tmp_path: Path) -> None:
    f32 = np.ones((2, 2), np.float32)
    w = random_tensor(formats.get("q8_0"), (32,))
    cases: list[tuple[str, Any, Any, type[KernelgenError], str]] = [
        ("none/a.gguf", {"w": w}, {}, FileError, "was not written: No such file or directory"),
        (".", {"w": w}, {}, FileError, "is a folder"),
        ("a.gguf", {"w": f32.astype(np.float64)}, {}, ShapeError, "array of float64"),
        ("a.gguf", {"w": np.arange(3)}, {}, ShapeError, "array of int64"),
        ("a.gguf", {"w": f32.reshape(1, 1, 1, 2, 2)}, {}, ShapeError, "at most 4 dimensions"),
        ("a.gguf", {"w" * 64: w}, {}, FileError, "a string of 1 to 63 bytes"),
        ("a.gguf", {"": w}, {}, FileError, "a tensor was named ''"),
        ("a.gguf", {3: w}, {}, FileError, "a tensor was named 3"),
        ("a.gguf", {"w": w}, {"k": {"a": 1}}, FileError, "metadata 'k' is"),
        ("a.gguf", {"w": w}, {"k": None}, FileError, "of type NoneType"),
        ("a.gguf", {"w": w}, {"k": [1, "a"]}, FileError, "of type list"),
        ("a.gguf", {"w": w}, {"k": 2**64}, FileError, "of type int"),
        ("a.gguf", {"w": w}, {"k": [-1, 2**63]}, FileError, "of type list"),
        ("a.gguf", {"w": w}, {"general.alignment": 3}, FileError, "Invalid alignment"),
    ]
    for name, tensors, metadata, error, text in cases:
        with pytest.raises(error, match=re.escape(text)) as info:
            gguf_files.save(tmp_path / name, tensors, metadata)
        assert "\n" not in str(info.value)
        assert list(tmp_path.iterdir()) == []


def test_rows_that_ggml_cannot_hold_are_not_written(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="f32"):
        gguf_files.save(tmp_path / "a.gguf", {"w": np.ones((3, 0), np.float32)})


def test_the_guards_need_the_reader_they_guard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Were the package's reader rewritten, its files would be refused, not read unguarded."""
    path = raw_file(tmp_path / "a.gguf", [info()])
    monkeypatch.delattr(gguf.GGUFReader, "_build_tensors")
    with pytest.raises(FileError, match=r"GGUFReader\._build_tensors"):
        gguf_files.open(path)


@pytest.mark.skipif(not GGUF_DUMP.exists(), reason="gguf-dump is not beside python")
def test_files_are_read_by_other_tools(tmp_path: Path) -> None:
    random_tensor(formats.get("q4_K"), (2, 256)).save(tmp_path / "a.gguf", "blk.0.w")
    done = subprocess.run(
        [str(GGUF_DUMP), str(tmp_path / "a.gguf")], capture_output=True, text=True, check=True
    )
    assert "blk.0.w" in done.stdout

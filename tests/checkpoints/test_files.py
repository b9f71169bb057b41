"""Folders, shards, configs, layouts beyond the recorded ones, and what is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import kernelgen
from kernelgen.checkpoints import Checkpoint
from kernelgen.cli import app
from kernelgen.errors import FileError, FormatError
from kernelgen.ir import formats
from kernelgen.ir.encode import code_table
from tests.checkpoints.files import (
    Array,
    bits_along,
    checkpoint,
    gptq_layer,
    named,
    retyped,
)

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False, "desc_act": False}
RNG = np.random.default_rng(11)


def exact(model: Any, name: str, want: Array) -> None:
    np.testing.assert_array_equal(model[name].dequantize(), want)


# ---- folders and files -------------------------------------------------------------------------


def test_two_shards_and_plain_floats(tmp_path: Path) -> None:
    planes, want = gptq_layer(RNG, 8, 64, 32)
    norm, head = RNG.standard_normal(64).astype(np.float32), np.ones((2, 64), np.float16)
    half = RNG.standard_normal(64).astype(np.float32).view(np.uint16)[1::2]
    index = np.arange(3)
    checkpoint(tmp_path, named("a", planes), GPTQ, "model-00001-of-00002.safetensors")
    second = "model-00002-of-00002.safetensors"
    checkpoint(tmp_path, {"norm": norm, "head": head, "half": half, "ids": index}, None, second)
    retyped(tmp_path / second, {"half": "BF16"})
    (tmp_path / "extra.safetensors").write_bytes(b"what the index does not name is not read")
    weight_map = {f"a.{name}": "model-00001-of-00002.safetensors" for name in planes}
    weight_map |= dict.fromkeys(("norm", "head", "half", "ids"), second)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    model = kernelgen.open(tmp_path)
    assert isinstance(model, Checkpoint)
    assert {name: w.format.name for name, w in model.items()} == {
        "a.weight": "uint4_g32", "norm": "f32", "head": "f16", "half": "bf16",
    }  # fmt: skip
    exact(model, "a.weight", want)
    exact(model, "norm", norm)
    exact(model, "head", head.astype(np.float32))
    exact(model, "half", (half.astype(np.uint32) << 16).view(np.float32))
    assert model.skipped == {"ids": "I64"} and model.metadata["model_type"] == "made_up"
    assert not model["norm"].data.flags.owndata  # mapped
    with pytest.raises(FormatError, match=r"'ids' of .* is in I64, which kernelgen does not read"):
        model["ids"]
    with pytest.raises(KeyError, match=r"has no tensor 'norn' among its 4; did you mean 'norm'"):
        model["norn"]
    assert "a.weight" in repr(list(model)) and "4 tensors" in repr(model)


def test_a_file_by_itself_finds_its_config(tmp_path: Path) -> None:
    planes, want = gptq_layer(RNG, 8, 64, 64)
    checkpoint(tmp_path, named("a", planes), None, "some.safetensors")
    (tmp_path / "quantize_config.json").write_text(json.dumps({"bits": 4, "group_size": 64}))
    exact(kernelgen.open(tmp_path / "some.safetensors"), "a.weight", want)


@pytest.mark.parametrize("command", ["inspect"])
def test_the_command_line_shows_a_folder(tmp_path: Path, command: str) -> None:
    planes, _ = gptq_layer(RNG, 8, 64, 32)
    checkpoint(tmp_path, named("a", planes) | {"ids": np.arange(3)}, GPTQ)
    shown = CliRunner().invoke(app, [command, str(tmp_path)])
    assert shown.exit_code == 0
    assert "a.weight" in shown.stdout and "uint4_g32" in shown.stdout
    assert "ids is in I64" in shown.stdout and "quantization_config" in shown.stdout
    told = json.loads(CliRunner().invoke(app, [command, str(tmp_path), "--json"]).stdout)
    assert told["tensors"] == [
        {"name": "a.weight", "shape": [8, 64], "format": "uint4_g32", "bytes": 8 * 2 * 19}
    ]


def test_kernels_of_a_folder(tmp_path: Path) -> None:
    planes, _ = gptq_layer(RNG, 8, 64, 32)
    folder = checkpoint(tmp_path / "model", named("a", planes), GPTQ)
    build = ["build", "--target", "numpy", "--op", "matvec", "--out", str(tmp_path / "out")]
    made = CliRunner().invoke(app, [*build, "--model", str(folder)])
    assert made.exit_code == 0, made.stderr
    assert [one.name for one in (tmp_path / "out" / "numpy").glob("*uint4_g32*")]
    other = CliRunner().invoke(app, [*build, "--model", str(folder), "--format", "nf4_g64"])
    assert other.exit_code == 1 and "has uint4_g32, none of the formats asked for" in other.stderr


def test_a_folder_quantized_to_gguf(tmp_path: Path) -> None:
    weight = RNG.standard_normal((8, 64)).astype(np.float32)
    folder = checkpoint(tmp_path / "model", {"a.weight": weight})
    out = tmp_path / "a.gguf"
    done = CliRunner().invoke(app, ["quantize", str(folder), str(out), "--format", "q8_0"])
    assert done.exit_code == 0, done.stderr
    assert kernelgen.open(out)["a.weight"].format.name == "q8_0"


# ---- layouts -----------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("version", [1, 2])
def test_both_versions_of_gptq(tmp_path: Path, bits: int, version: int) -> None:
    """Zero points up to 2**bits, which only the first version can store."""
    planes, want = gptq_layer(RNG, 32, 64, 16, bits, plus=2 - version)
    config = {**GPTQ, "bits": bits, "group_size": 16}
    if version == 2:
        config["checkpoint_format"] = "gptq_v2"
    model = kernelgen.open(checkpoint(tmp_path, named("a", planes), config))
    exact(model, "a.weight", want)


def test_groups_of_all_lengths(tmp_path: Path) -> None:
    """Blocks are the longest that divide a group; the last group may be shorter."""
    for group, block in ((256, 128), (96, 32), (8, 8), (24, 8), (-1, 128)):
        k = 768 if group < 0 else 3 * group
        planes, want = gptq_layer(RNG, 8, k, k if group < 0 else group)
        folder = checkpoint(
            tmp_path / str(group), named("a", planes), {**GPTQ, "group_size": group}
        )
        model = kernelgen.open(folder)
        exact(model, "a.weight", want)
        assert model["a.weight"].format.name == f"uint4_g{block}"
    planes, want = gptq_layer(RNG, 8, 128, 64)
    cut = {
        "qweight": planes["qweight"][:12],
        "qzeros": planes["qzeros"],
        "scales": planes["scales"],
    }
    folder = checkpoint(tmp_path / "cut", named("a", cut), {**GPTQ, "group_size": 64})
    exact(kernelgen.open(folder), "a.weight", want[:, :96])


def test_act_order_with_groups_of_unlike_length(tmp_path: Path) -> None:
    planes, _ = gptq_layer(RNG, 8, 64, 32)
    index = RNG.permutation(np.repeat([0, 1], [16, 48])).astype(np.int32)
    model = kernelgen.open(checkpoint(tmp_path, named("a", {**planes, "g_idx": index}), GPTQ))
    codes = (planes["qweight"].view(np.uint32)[:, None] >> (4 * np.arange(8))[:, None]) & 15
    zeros = ((planes["qzeros"].view(np.uint32)[..., None] >> (4 * np.arange(8))) & 15) + 1
    scales = planes["scales"].astype(np.float32)
    want = scales[index] * (codes.reshape(64, 8) - zeros.reshape(2, 8)[index].astype(np.float32))
    exact(model, "a.weight", want.T)
    assert model["a.weight"].format.name == "uint4_g16"


@pytest.mark.parametrize("padded", [False, True])
def test_integers_as_compressed_tensors_packed_them_before(tmp_path: Path, padded: bool) -> None:
    """Three bits as a stream, or ten to a word; zero points that are not packed; act-order."""
    n, k = 6, 64
    codes, zeros = RNG.integers(0, 8, (n, k)), RNG.integers(-4, 4, (n, 2))
    scales = RNG.uniform(0.01, 0.1, (n, 2)).astype(np.float16)
    if padded:
        filled = np.zeros((n, 70), np.int64)
        filled[:, :k] = codes
        words = (filled.reshape(n, 7, 10) << (3 * np.arange(10))).sum(axis=2).astype(np.int32)
    else:
        words = bits_along(codes, 3, 1)
    index = RNG.permutation(np.repeat([0, 1], 32)).astype(np.int32)
    planes = {
        "weight_packed": words, "weight_scale": scales, "weight_shape": np.array([n, k]),
        "weight_zero_point": zeros.astype(np.int8), "weight_g_idx": index,
    }  # fmt: skip
    args = {"num_bits": 3, "type": "int", "symmetric": False, "group_size": 32}
    groups = {
        "other": {"targets": ["Linear"], "weights": {**args, "num_bits": 8}},
        "ours": {"targets": ["re:.*proj$"], "weights": args},
    }
    config = {"quant_method": "compressed-tensors", "config_groups": groups}
    model = kernelgen.open(checkpoint(tmp_path, named("b.proj", planes), config))
    want = scales.astype(np.float32)[:, index] * (codes - 4 - zeros[:, index]).astype(np.float32)
    exact(model, "b.proj.weight", want)


def e4m3(codes: Array) -> Array:
    """Eight-bit floats, by the definition: OCP OFP8, table 1."""
    sign, exponent, mantissa = codes >> 7, codes >> 3 & 15, (codes & 7).astype(np.float64)
    size = np.where(exponent == 0, mantissa * 2.0**-9, (1 + mantissa / 8) * 2.0 ** (exponent - 7.0))
    return np.where(sign, -size, size).astype(np.float32)


@pytest.mark.parametrize(
    ("scale_name", "shape", "block"),
    [("_scale_inv", (2, 3), [128, 128]), ("_scale", (1,), None), ("_scale", (200, 1), None),
     ("_scale", (), None)],
)  # fmt: skip
def test_fp8(
    tmp_path: Path, scale_name: str, shape: tuple[int, ...], block: list[int] | None
) -> None:
    """By blocks of 128 x 128, with smaller ones at the edges, by matrix, and by row."""
    n, k = 200, 320
    codes = RNG.integers(0, 0x7F, (n, k)) | RNG.integers(0, 2, (n, k)) << 7
    scales = RNG.uniform(0.5, 2, shape).astype(np.float32)
    planes = {"a.weight": codes.astype(np.uint8), f"a.weight{scale_name}": scales}
    config = {"quant_method": "fp8", "weight_block_size": block}
    folder = checkpoint(tmp_path, planes, config)
    retyped(folder / "model.safetensors", {"a.weight": "F8_E4M3"})
    wide = scales
    if block:
        wide = np.repeat(np.repeat(scales, 128, axis=0), 128, axis=1)[:n, :k]
    exact(kernelgen.open(folder), "a.weight", wide * e4m3(codes))


def test_fp8_without_scales_or_config(tmp_path: Path) -> None:
    codes = np.arange(256, dtype=np.uint8).reshape(8, 32)
    folder = checkpoint(tmp_path, {"a.weight": codes})
    retyped(folder / "model.safetensors", {"a.weight": "F8_E5M2"})
    wide = (codes.astype(np.uint16) << 8).view(np.float16)  # f16 has three more zeros
    exact(kernelgen.open(folder), "a.weight", wide.astype(np.float32))


def test_bitsandbytes_blocks_that_are_longer_than_rows(tmp_path: Path) -> None:
    n, k = 8, 32
    codes = RNG.integers(0, 16, n * k)
    book = np.array(code_table(formats.get("nf4_g64")), np.float32)
    absmax = RNG.uniform(0.1, 1, 4).astype(np.float32)
    state = json.dumps({"blocksize": 64, "shape": [n, k], "quant_type": "nf4", "dtype": "float16"})
    planes = {
        "a.weight": (codes[::2] << 4 | codes[1::2]).astype(np.uint8)[:, None],
        "a.weight.absmax": absmax, "a.weight.quant_map": book,
        "a.weight.quant_state.bitsandbytes__nf4": np.frombuffer(state.encode(), np.uint8),
    }  # fmt: skip
    folder = checkpoint(tmp_path, planes)  # found by the names of tensors
    exact(kernelgen.open(folder), "a.weight", (book[codes] * np.repeat(absmax, 64)).reshape(n, k))


def test_hqq_along_columns_is_skipped(tmp_path: Path) -> None:
    def text(word: str) -> Array:
        return np.frombuffer(word.encode(), np.uint8)

    planes = {
        "W_q": np.zeros((32, 32), np.uint8), "scale": np.ones((1, 32), np.float16),
        "zero": np.ones((1, 32), np.float16), "shape": np.array([32, 64]),
        "packing": text("4bit_u8"), "axis": np.array(0, np.int32), "bias": np.ones(32, np.float16),
    }  # fmt: skip
    model = kernelgen.open(checkpoint(tmp_path, named("a", planes)))
    assert list(model) == ["a.bias"]
    with pytest.raises(FormatError, match="groups of HQQ that run down the columns"):
        model["a.weight"]


# ---- what is refused ---------------------------------------------------------------------------


def _layer(tmp_path: Path, change: Callable[[dict[str, Array]], Any], config: Any = GPTQ) -> Path:
    planes, _ = gptq_layer(np.random.default_rng(0), 8, 64, 32)
    change(planes)
    return checkpoint(tmp_path, named("a", planes), config)


def _set(name: str, value: Array) -> Callable[[dict[str, Array]], Any]:
    return lambda planes: planes.update({name: value})


REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no scales": (lambda p: _layer(p, lambda planes: planes.pop("scales")), "no 'a.scales'"),
    "no zeros": (lambda p: _layer(p, lambda planes: planes.pop("qzeros")), "no 'a.qzeros'"),
    "method": (lambda p: _layer(p, id, {"quant_method": "exl2"}), "quantized by 'exl2'"),
    "no method": (lambda p: _layer(p, id, {"bits": 4}), "without a quant_method"),
    "no config": (lambda p: _layer(p, id, None), "no config beside it"),
    "version": (
        lambda p: _layer(p, id, {**GPTQ, "checkpoint_format": "marlin"}), "says gptq with"
    ),
    "awq version": (
        lambda p: _layer(p, id, {"quant_method": "awq", "version": "gemv"}), "kernelgen reads gemm"
    ),
    "group size": (lambda p: _layer(p, id, {**GPTQ, "group_size": 64}), "has 2 groups, and 64"),
    "kind of size": (lambda p: _layer(p, id, {**GPTQ, "group_size": "32"}), "group_size = '32'"),
    "scales": (
        lambda p: _layer(p, _set("scales", np.ones((2, 16), np.float16))), "has shape"
    ),
    "scale type": (
        lambda p: _layer(p, _set("scales", np.ones((2, 8), np.int32))), "is of I32, where F16"
    ),
    "weight type": (
        lambda p: _layer(p, _set("qweight", np.ones((8, 8), np.int64))), "is of I64, where I32"
    ),
    "weight": (
        lambda p: _layer(p, _set("qweight", np.ones((8, 9), np.int32))), r"shape \(8, 9\), where"
    ),
    "no matrix": (lambda p: _layer(p, _set("qweight", np.ones(8, np.int32))), "a matrix was"),
    "index": (
        lambda p: _layer(p, _set("g_idx", np.full(64, 7, np.int32))), "names groups 7 ... 7"
    ),
    "index length": (
        lambda p: _layer(p, _set("g_idx", np.zeros(60, np.int32))), r"where \(64,\) was"
    ),
    "odd groups": (
        lambda p: _layer(p, _set("g_idx", np.repeat([0, 1], [31, 33]).astype(np.int32))),
        "reads multiples of 8",
    ),
    "no folder": (lambda p: p / "none.safetensors", "does not exist"),
    "empty folder": (lambda p: p, "has no .safetensors files"),
    "empty file": (lambda p: _written(p, b""), "cannot be read as a safetensors file"),
    "no safetensors": (lambda p: _written(p, b"GGUF" * 99), "cannot be read as a safetensors file"),
    "config": (lambda p: _beside(_layer(p, id), "config.json", "{"), "is not JSON"),
    "config kind": (lambda p: _beside(_layer(p, id), "config.json", "[]"), "JSON list"),
    "config part": (
        lambda p: _beside(_layer(p, id), "config.json", '{"quantization_config": "gptq"}'),
        "that is no object",
    ),
    "index file": (lambda p: _index(p, {"a.qweight": "b.safetensors"}), "b.safetensors does not"),
    "index place": (lambda p: _index(p, {"a.qweight": "../b"}), "names '../b', which is no file"),
    "index lies": (
        lambda p: _index(p, {"a.bias": "model.safetensors"}), "has the tensor 'a.bias', and it"
    ),
    "index empty": (lambda p: _index(p, None), "has no weight_map"),
    "twice": (lambda p: checkpoint(_layer(p, id), {"a.scales": np.ones(2)}, None, "z.safetensors"),
              "another file"),
}  # fmt: skip


def _written(folder: Path, content: bytes) -> Path:
    (folder / "a.safetensors").write_bytes(content)
    return folder / "a.safetensors"


def _beside(folder: Path, name: str, text: str) -> Path:
    (folder / name).write_text(text)
    return folder


def _index(folder: Path, weight_map: Any) -> Path:
    text = json.dumps({"weight_map": weight_map})
    return _beside(_layer(folder, id), "model.safetensors.index.json", text)


@pytest.mark.parametrize("name", REFUSED)
def test_refused_in_one_sentence(tmp_path: Path, name: str) -> None:
    make, text = REFUSED[name]
    path = make(tmp_path)
    with pytest.raises(FileError, match=text) as info:
        for _ in kernelgen.open(path).listing():
            pass
    said = str(info.value)
    assert "\n" not in said and not said.endswith(".") and len(said) < 600
    shown = CliRunner().invoke(app, ["inspect", str(path)])
    assert shown.exit_code == 1 and shown.stdout == ""
    assert re.fullmatch(r"error: [^\n]*\n", shown.stderr)


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    folder = _layer(tmp_path, id)
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    for size in range(0, len(whole), 7):
        file.write_bytes(whole[:size])
        with pytest.raises(FileError, match="cannot be read as a safetensors file"):
            kernelgen.open(folder)


def test_damaged_headers_never_crash(tmp_path: Path) -> None:
    """Bytes of the header and of small planes changed at random: a sentence, or a checkpoint."""
    folder = _layer(tmp_path, _set("g_idx", np.repeat([0, 1], 32).astype(np.int32)))
    file = folder / "model.safetensors"
    whole, rng = file.read_bytes(), np.random.default_rng(1)
    outcomes = {True: 0, False: 0}
    for _ in range(300):
        damaged = bytearray(whole)
        for at in rng.integers(0, len(whole), 2):
            damaged[at] = rng.integers(0, 256)
        file.write_bytes(damaged)
        try:
            for w in kernelgen.open(folder).values():
                w.dequantize()
            outcomes[True] += 1
        except (FileError, FormatError) as error:
            assert "\n" not in str(error)
            outcomes[False] += 1
    assert min(outcomes.values()) > 10

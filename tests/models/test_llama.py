"""Decoders against a plain numpy reference of the same model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kernelgen import models
from kernelgen.api import runtime_of
from kernelgen.errors import FileError, FormatError, ShapeError
from tests.models import reference, tiny

TOKENS = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 58]
FACTORS = np.linspace(1, 8, tiny.HEAD_DIM // 2).astype(np.float32)

VARIANTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-tied": {"tied": True},
    "llama-window": {"metadata": {"attention.sliding_window": 4}},
    "llama-factors": {"extra": {"rope_freqs.weight": FACTORS}},
    "llama-linear": {
        "metadata": {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}
    },
    "llama-partial": {"metadata": {"rope.dimension_count": 8}},
    "qwen2-yarn": {
        "architecture": "qwen2",
        "metadata": {
            "rope.scaling.type": "yarn", "rope.scaling.factor": 4.0,
            "rope.scaling.original_context_length": 64,
        },
    },
    "llama-q8_0": {"fmt": "q8_0"},
    "llama-mixed": {"fmt": "q8_0", "value_fmt": "q4_0"},
    "qwen2": {"architecture": "qwen2", "tied": True},
    "qwen3": {"architecture": "qwen3"},
}  # fmt: skip


def cosine(a: Any, b: Any) -> float:
    """The worst of all rows."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    parts = (a * b).sum(-1) / np.sqrt((a * a).sum(-1) * (b * b).sum(-1))
    return float(parts.min())


def greedy(model: models.Decoder, prompt: list[int], count: int, **options: Any) -> list[int]:
    return list(models.Generation(model, prompt, count, **options))


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_those_of_the_reference(variant: str, tmp_path: Path) -> None:
    path = tiny.write(tmp_path / "model.gguf", **VARIANTS[variant])
    model = models.open(path, "numpy", "fp32")
    cache = model.sequences(capacity=16, format="f32")
    first = model.forward([(0, TOKENS[:6])], cache, every=True)
    later = [model.forward([(0, [one])], cache)[0] for one in TOKENS[6:]]
    wanted = reference.logits(path, TOKENS)
    got = np.vstack([first, *later])
    assert np.abs(got - wanted).max() < 1e-4 * np.abs(wanted).max()
    assert cosine(got, wanted) >= 0.999999
    assert list(cache.lengths) == [len(TOKENS)]


@pytest.mark.parametrize(
    ("format", "value_format", "least"),
    [("f16", None, 0.9999), ("q8_0", None, 0.999), ("q8_0", "q4_0", 0.97)],
)
def test_caches_lose_little(
    format: str, value_format: str | None, least: float, tmp_path: Path
) -> None:
    path = tiny.write(tmp_path / "model.gguf")
    model = models.open(path, "numpy", "fp32")
    cache = model.sequences(capacity=16, format=format, value_format=value_format)
    got = model.forward([(0, TOKENS)], cache, every=True)
    assert cosine(got, reference.logits(path, TOKENS)) >= least


@pytest.mark.parametrize("fmt", ["q8_0", "q4_0"])
def test_activations_of_8_bits_lose_little(fmt: str, tmp_path: Path) -> None:
    path = tiny.write(tmp_path / "model.gguf", fmt=fmt)
    model = models.open(path, "numpy")
    got = model.forward([(0, TOKENS)], model.sequences(capacity=16), every=True)
    assert cosine(got, reference.logits(path, TOKENS)) >= 0.999


def test_yarn_and_qwens_pairing_are_read_from_the_file(tmp_path: Path) -> None:
    metadata = {
        "rope.scaling.type": "yarn", "rope.scaling.factor": 4.0,
        "rope.scaling.original_context_length": 64,
    }  # fmt: skip
    found = models.open(tiny.write(tmp_path / "a.gguf", "qwen2", metadata=metadata), "numpy").shape
    assert found.pairing == "half" and found.scaling is not None
    assert (found.scaling.factor, found.scaling.context) == (4.0, 64)  # type: ignore[union-attr]
    assert found.scaling.magnitude == pytest.approx(0.1 * np.log(4) + 1)  # type: ignore[union-attr]


@pytest.mark.parametrize("target", ["c", "opencl", "wgsl"])
def test_all_targets_give_the_same_tokens(target: str, tmp_path: Path) -> None:
    runtime = runtime_of(target)
    if (reason := runtime.available()) is not None:
        pytest.skip(reason)
    path = tiny.write(tmp_path / "model.gguf")
    wanted = greedy(models.open(path, "numpy", "fp32"), TOKENS[:5], 4)
    model = models.open(path, target, "fp32")
    assert greedy(model, TOKENS[:5], 4) == wanted
    logits = model.forward([(0, TOKENS)], model.sequences(capacity=16), every=True)
    assert cosine(logits, reference.logits(path, TOKENS)) >= 0.9999


def test_greedy_tokens_are_those_of_the_reference(tmp_path: Path) -> None:
    path = tiny.write(tmp_path / "model.gguf", fmt="f32")
    tokens = list(TOKENS[:3])
    for _ in range(6):
        tokens.append(int(reference.logits(path, tokens)[-1].argmax()))
    model = models.open(path, "numpy", "fp32")
    assert greedy(model, TOKENS[:3], 6) == tokens[3:]
    # what ends a text is not given out
    assert (
        greedy(model, TOKENS[:3], 6, ends=tokens[5:6]) == tokens[3:5][: tokens[3:].index(tokens[5])]
    )


def test_generation_ends_where_the_context_is_full(tmp_path: Path) -> None:
    model = models.open(tiny.write(tmp_path / "model.gguf", context=8), "numpy")
    assert len(greedy(model, TOKENS[:6], 100)) == 3  # two more are read, and a last one is made
    with pytest.raises(ShapeError, match="context of 8"):
        greedy(model, TOKENS, 1)
    with pytest.raises(ShapeError, match="at least one"):
        greedy(model, [], 1)


def test_perplexity_is_that_of_the_reference(tmp_path: Path) -> None:
    path = tiny.write(tmp_path / "model.gguf", fmt="f32")
    text = [int(one) for one in np.random.default_rng(5).integers(0, tiny.VOCABULARY, 37)]
    losses: list[float] = []
    for start in (0, 16):
        part = [1, *text[start + 1 : start + 16]]
        x = reference.logits(path, part)[8:-1]
        x -= x.max(axis=-1, keepdims=True)
        losses += list(np.log(np.exp(x).sum(-1)) - x[np.arange(7), part[9:]])
    model, told = models.open(path, "numpy", "fp32"), []
    found = models.perplexity(
        model, text, context=16, bos=1, format="f32", tell=lambda *one: told.append(one)
    )
    assert found == pytest.approx(np.exp(np.mean(losses)), rel=1e-4)
    assert [(done, of) for done, of, _ in told] == [(1, 2), (2, 2)] and told[-1][2] == found
    with pytest.raises(ShapeError, match="at least two parts"):
        models.perplexity(model, text[:20], context=16)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "architecture": ({"architecture": "mamba"}, "architecture 'mamba'; llama, qwen2, qwen3"),
    "tensor": ({"without": "blk.1.ffn_up.weight"}, "no tensor 'blk.1.ffn_up.weight'"),
    "key": ({"metadata": {"block_count": None}}, "no llama.block_count"),
    "layers": ({"metadata": {"attention.head_count_kv": [2, 1]}}, "same in all layers"),
    "heads": ({"metadata": {"attention.head_count_kv": 3}}, "heads are a multiple"),
    "kind": ({"metadata": {"block_count": "two"}}, "one whole number"),
    "experts": ({"metadata": {"expert_count": 8}}, "mixture of experts"),
    "scaling": ({"metadata": {"rope.scaling.type": "longrope"}}, "none, linear and yarn"),
    "shape": ({"metadata": {"embedding_length": 32}}, "by its metadata it is any x 32"),
    "unused": ({"extra": {"blk.0.ffn_gate_inp.weight": FACTORS}}, "no place for"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_is_no_such_model_is_refused_in_a_sentence(case: str, tmp_path: Path) -> None:
    options, message = WRONG[case]
    path = tiny.write(tmp_path / "model.gguf", **options)
    with pytest.raises(FileError) as caught:
        models.open(path, "numpy")
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_caches_are_refused_in_a_sentence(tmp_path: Path) -> None:
    model = models.open(tiny.write(tmp_path / "model.gguf"), "numpy")
    with pytest.raises(FormatError):
        model.sequences(format="q4_K")  # heads of 32 elements, blocks of 256
    cache = model.sequences(capacity=4)
    with pytest.raises(ShapeError, match="do not fit"):
        model.forward([(0, TOKENS)], cache)
    assert list(cache.lengths) == [0]
    with pytest.raises(ShapeError, match="at least one"):
        model.forward([(0, [])], cache)
    with pytest.raises(ShapeError, match="sequences"):
        model.forward([(1, [1])], cache)
    with pytest.raises(ShapeError, match="tokens 64 to 64 were given; the model has 64"):
        model.forward([(0, [tiny.VOCABULARY])], cache)

"""Logits against llama.cpp's on the same file, where llama-cpp-python is installed."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from bench import made_model
from kernelgen import models
from tests.models import vocabularies

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        find_spec("llama_cpp") is None, reason="there is no llama.cpp: pip install llama-cpp-python"
    ),
]

Array = npt.NDArray[Any]

POSITIONS = 256

#: parts of so many positions of the text that a model has learnt
PARTS = 4

LAYOUTS = ("f16", "q8_0", "q4_K", "q4_K_M")

#: characters that a model learns, and steps in which it does, two minutes of two idle cores: it
#: is as sure of what follows as a large model is of any text
CHARACTERS, STEPS = 8000, 200

#: In a process of its own, as it brings its own threads.  Its extra buffers hold weights repacked
#: for AMX, with which 0.3.36 crashes on batches of these quantized weights.
SCRIPT = """
import sys, numpy, llama_cpp
import llama_cpp.llama_cpp as low
def plain(given=low.llama_model_default_params):
    found = given()
    found.use_extra_bufts = False
    return found
low.llama_model_default_params = plain
path, ids, out = sys.argv[1:]
tokens = numpy.load(ids).tolist()
n = len(tokens)
model = llama_cpp.Llama(path, n_ctx=n, n_batch=n, logits_all=True, n_threads=2, verbose=False)
model.eval(tokens)
numpy.save(out, model.scores[:n])
"""


def theirs(path: Path, tokens: list[int]) -> Array:
    """(tokens, vocabulary) of llama.cpp, float64."""
    ids, out = path.with_name("ids.npy"), path.with_name("logits.npy")
    np.save(ids, tokens)
    command = [sys.executable, "-c", SCRIPT, *map(str, (path, ids, out))]
    subprocess.run(command, check=True, timeout=600)
    return np.load(out).astype(np.float64)


def divergence(p: Array, q: Array) -> float:
    """The mean Kullback-Leibler divergence, in nats, of the probabilities that logits stand for."""
    p, q = (x - x.max(-1, keepdims=True) for x in (p, q))
    p, q = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (p, q))
    return float((np.exp(p) * (p - q)).sum(-1).mean())


def cosines(a: Array, b: Array) -> Array:
    found: Array = (a * b).sum(-1) / np.sqrt((a**2).sum(-1) * (b**2).sum(-1))
    return found


#: rows of logits, of each position: of llama.cpp, of kernelgen, and of kernelgen without rounding
Logits = tuple[Array, Array, Array]


def compared(path: Path, tokens: list[int]) -> Logits:
    def logits(precision: str, cache: str) -> Array:
        model = models.open(path, "c", precision)
        kept = model.sequences(capacity=POSITIONS, format=cache)
        return model.forward([(0, tokens)], kept, every=True).astype(np.float64)

    return theirs(path, tokens), logits("auto", "f16"), logits("fp32", "f32")


def told(what: str, found: Logits) -> dict[str, tuple[float, float, float]]:
    """Least cosine, share of positions with the same most probable token, divergence of pairs;
    where llama.cpp and kernelgen choose differently, how far apart the two tokens are in exact
    logits, and with whom these agree."""
    other, ours, exact = found
    result = {}
    for name, (a, b) in {
        "llama.cpp, ours": (other, ours), "exact, ours": (exact, ours),
        "exact, llama.cpp": (exact, other),
    }.items():  # fmt: skip
        same = float((a.argmax(-1) == b.argmax(-1)).mean())
        result[name] = (float(cosines(a, b).min()), same, divergence(a, b))
        print(f"{what}: {name}: cosine {result[name][0]:.6f}, top-1 {same:.4f},", end=" ")
        print(f"KL {result[name][2]:.2e}")
    top = [x.argmax(-1) for x in (exact, ours, other)]
    for at in np.flatnonzero(top[1] != top[2]):
        gap = abs(exact[at, top[1][at]] - exact[at, top[2][at]])
        said = [
            name for name, one in (("ours", top[1]), ("llama.cpp", top[2])) if one[at] == top[0][at]
        ]
        print(f"{what}: position {at}: {gap:.4f} apart, exact is {' '.join(said) or 'neither'}")
    ordered = np.sort(exact, -1)
    gaps = ordered[:, -1] - ordered[:, -2]
    print(f"{what}: the two largest logits are {np.median(gaps):.2f} apart (median)", end=", ")
    print(f"{(gaps < 0.05).mean():.3f} of them less than 0.05")
    return result


def check(
    layout: str, found: Logits, result: dict[str, tuple[float, float, float]], share: float
) -> None:
    """`share` is how often the same token must be the most probable one."""
    other, ours, exact = found
    cosine, same, lost = result["llama.cpp, ours"]
    assert same >= share
    if layout == "f16":
        assert cosine >= 0.9999 and lost < 1e-5
        return
    assert cosine >= 0.999 and lost < 2e-3
    assert result["exact, ours"][1] >= 0.98
    assert result["exact, ours"][2] <= 1.2 * result["exact, llama.cpp"][2]
    # where they differ, the two tokens are nearly as probable
    at, first, second = np.arange(len(ours)), ours.argmax(-1), other.argmax(-1)
    assert np.abs(exact[at, first] - exact[at, second]).max() < 0.1 * exact.std()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_are_those_of_llama_cpp(layout: str, tmp_path: Path, record_property: Any) -> None:
    """Random weights, in which each token asks for one other to follow it, so weakly that rounding
    decides at some positions.

    Both programs round activations of quantized weights to 8 bits, each in its own way; so both are
    measured by logits of which nothing was rounded, too.
    """
    _, words = vocabularies.byte_level()
    path = made_model.write(
        tmp_path / "made.gguf", layout, width=512, hidden=1536, heads=8, kv_heads=2, tokens=words,
        context=512, sharpness=2.0, following=0.35,
    )  # fmt: skip
    count = len(words["tokenizer.ggml.tokens"])
    tokens = [int(one) for one in np.random.default_rng(1).integers(0, count, POSITIONS)]
    found = compared(path, tokens)
    result = told(f"random {layout}", found)
    record_property(layout, result)
    check(layout, found, result, 0.99 if layout == "f16" else 0.97)


@pytest.fixture(scope="module")
def learnt() -> tuple[dict[str, Array], dict[str, Any], list[int]]:
    """Trained weights, their vocabulary, and the tokens that were learnt."""
    pytest.importorskip("torch")
    from bench import trained_model

    text = trained_model.corpus()
    tokenizer, words = trained_model.vocabulary(text)
    tokens = tokenizer.encode(text[:CHARACTERS]).ids
    values, losses = trained_model.trained(np.array(tokens), STEPS)
    assert np.mean(losses[-10:]) < 0.2 * losses[0]
    return values, words, tokens[: PARTS * POSITIONS]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_so_of_a_trained_model(
    layout: str,
    learnt: tuple[dict[str, Array], dict[str, Any], list[int]],
    tmp_path: Path,
    record_property: Any,
) -> None:
    from bench import trained_model

    values, words, tokens = learnt
    path = trained_model.write(tmp_path / "trained.gguf", layout, values, words)
    parts = [compared(path, tokens[at : at + POSITIONS]) for at in range(0, len(tokens), POSITIONS)]
    other, ours, exact = (np.concatenate(one) for one in zip(*parts, strict=True))
    found = other, ours, exact
    result = told(f"trained {layout}", found)
    record_property(layout, result)
    check(layout, found, result, 0.99)

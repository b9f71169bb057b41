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

LAYOUTS = ("f16", "q8_0", "q4_K", "q4_K_M")

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


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_are_those_of_llama_cpp(layout: str, tmp_path: Path, record_property: Any) -> None:
    """The most probable token has two thirds of the probability in this model, as in text.

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

    def logits(precision: str, cache: str) -> Array:
        model = models.open(path, "c", precision)
        kept = model.sequences(capacity=POSITIONS, format=cache)
        return model.forward([(0, tokens)], kept, every=True).astype(np.float64)

    ours, exact, other = logits("auto", "f16"), logits("fp32", "f32"), theirs(path, tokens)
    pairs = {"llama.cpp, ours": (other, ours), "exact, ours": (exact, ours),
             "exact, llama.cpp": (exact, other)}  # fmt: skip
    found = {}
    for name, (a, b) in pairs.items():
        same = float((a.argmax(-1) == b.argmax(-1)).mean())
        found[name] = (float(cosines(a, b).min()), same, divergence(a, b))
        print(f"{layout}: {name}: cosine {found[name][0]:.6f}, top-1 {same:.4f},", end=" ")
        print(f"KL {found[name][2]:.2e}")
        record_property(f"{layout}: {name}", found[name])
    cosine, same, lost = found["llama.cpp, ours"]
    if layout == "f16":
        assert cosine >= 0.9999 and same >= 0.99 and lost < 1e-5
        return
    assert cosine >= 0.999 and same >= 0.97 and lost < 2e-3
    assert found["exact, ours"][1] >= 0.99
    assert found["exact, ours"][2] <= 1.2 * found["exact, llama.cpp"][2]
    # where they differ, the two tokens are nearly as probable
    at, first, second = np.arange(POSITIONS), ours.argmax(-1), other.argmax(-1)
    assert np.abs(exact[at, first] - exact[at, second]).max() < 0.1 * exact.std()

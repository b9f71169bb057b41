"""Metadata that are not what they should be: an error of one sentence, or none; never another."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest

pytest.importorskip("tokenizers")

from kernelgen.errors import KernelgenError
from kernelgen.models import Hyperparameters, Tokenizer
from tests.models import tiny, vocabularies

VALUES: list[Any] = [
    None, "", "x", b"\xff", -1, 0, 1, 1 << 40, -1.5, 0.0, float("nan"), float("inf"), True, [],
    [1, 2], ["a", ""], [b"\xff"], [[1]], [None],
]  # fmt: skip


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_sizes_of_any_kind(value: Any) -> None:
    whole = tiny._metadata(256, {
        "rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "expert_count": 0,
        "rope.scaling.original_context_length": 64, "attention.sliding_window": 4,
        "rope.scaling.attn_factor": 1.0, "rope.dimension_count": 32,
        "rope.scaling.yarn_beta_fast": 32.0, "rope.scaling.yarn_beta_slow": 1.0,
    })  # fmt: skip
    metadata = {"general.architecture": "llama"} | {f"llama.{k}": v for k, v in whole.items()}
    Hyperparameters.of(metadata)
    for key in metadata:
        check(lambda: Hyperparameters.of(metadata | {key: value}))  # noqa: B023


@pytest.mark.parametrize("value", VALUES, ids=repr)
@pytest.mark.parametrize("kind", ["gpt2", "llama", "t5"])
def test_vocabularies_of_any_kind(kind: str, value: Any, vocabulary: dict[str, Any]) -> None:
    metadata = vocabulary[kind]

    def use(changed: dict[str, Any]) -> None:
        made = Tokenizer(changed)
        ids = made.encode("The block's scale: 12 ü", special=True)
        list(made.stream([*ids, made.size + 7]))

    use(metadata)
    for key in (*metadata, "tokenizer.ggml.add_bos_token", "tokenizer.ggml.add_space_prefix"):
        check(lambda: use(metadata | {key: value}))  # noqa: B023


@pytest.fixture(scope="module")
def vocabulary() -> dict[str, Any]:
    """Metadata by the kind of the model."""
    return {
        "gpt2": vocabularies.byte_level(300)[1],
        "llama": vocabularies.pieces(120),
        "t5": vocabularies.unigram(120)[1],
    }


def check(call: Any) -> None:
    with contextlib.suppress(KernelgenError):
        try:
            call()
        except KernelgenError as error:
            assert "\n" not in str(error)
            raise

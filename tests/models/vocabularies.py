"""Small real vocabularies, trained here, as the metadata of a GGUF file."""

from __future__ import annotations

import json
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

TEXTS = [
    "The kernel reads a block, decodes it and multiplies; the block's scale comes last.",
    "We're quantizing weights to 4 bits, 8 bits and 16 bits: 1234567 numbers don't lie.",
    "Größe und Maße, naïve café,日本語のテキスト, emoji 🙂🙃 and\ttabs\n\nand lines.",
    "def matmul(x, w):\n    return x @ w.T  # two spaces  and   three\n",
] * 4


def byte_level(
    size: int = 400, pre: str = "gpt-2", **more: Any
) -> tuple[Tokenizer, dict[str, Any]]:
    """A byte-level BPE as `tokenizers` trains it, and as a file describes it; the last two tokens
    are <s> and </s>."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    made.train_from_iterator(TEXTS, trainer)
    inside = json.loads(made.to_str())["model"]
    tokens = sorted(inside["vocab"], key=inside["vocab"].get)
    merges = [one if isinstance(one, str) else " ".join(one) for one in inside["merges"]]
    metadata = {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": [*tokens, "<s>", "</s>"],
        "tokenizer.ggml.token_type": [1] * len(tokens) + [3, 3],
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": len(tokens),
        "tokenizer.ggml.eos_token_id": len(tokens) + 1,
        **{f"tokenizer.ggml.{key}": value for key, value in more.items()},
    }  # fmt: skip
    return made, metadata


def pieces(size: int = 300) -> dict[str, Any]:
    """A SentencePiece-like BPE: pieces with scores, bytes for what has no piece."""
    made = Tokenizer(models.BPE())
    made.normalizer = normalizers.Replace(" ", "\u2581")
    trainer = trainers.BpeTrainer(vocab_size=size, show_progress=False)
    made.train_from_iterator([" " + one for one in TEXTS[:2]], trainer)
    vocabulary = made.get_vocab()
    learnt = sorted(vocabulary, key=lambda one: vocabulary[one])
    special = ["<unk>", "<s>", "</s>"]
    raw = [f"<0x{n:02X}>" for n in range(256)]
    count = len(special) + len(raw)
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": special + raw + learnt,
        "tokenizer.ggml.scores": [0.0] * count + [-float(n) for n in range(len(learnt))],
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * len(learnt),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }


def unigram(size: int = 200) -> tuple[Tokenizer, dict[str, Any]]:
    """A unigram model as `tokenizers` trains it, and as a file describes it."""
    made = Tokenizer(models.Unigram())
    made.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    trainer = trainers.UnigramTrainer(
        vocab_size=size, unk_token="<unk>", special_tokens=["<unk>"], show_progress=False
    )
    made.train_from_iterator(TEXTS, trainer)
    found = json.loads(made.to_str())["model"]["vocab"]
    return made, {
        "tokenizer.ggml.model": "t5",
        "tokenizer.ggml.tokens": [piece for piece, _ in found],
        "tokenizer.ggml.scores": [score for _, score in found],
        "tokenizer.ggml.token_type": [2] + [1] * (len(found) - 1),
        "tokenizer.ggml.unknown_token_id": 0,
    }

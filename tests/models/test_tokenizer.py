"""Tokenizers from metadata: against those that trained the vocabulary, and there and back."""

from __future__ import annotations

import builtins
import itertools
import re
from typing import Any

import pytest

pytest.importorskip("tokenizers")

from kernelgen.errors import FileError
from kernelgen.models import Tokenizer
from tests.models import vocabularies

SAMPLES = [
    "The block's scale", " leading and trailing ", "12345 6", "日本語 🙂 ~ \x00 ü", "",
    "a\n\n b\t\tc   d", "We'RE they'Ll DON'T", "def f(x):\n        return x\r\n",
    "e\u0301 \u2581 \ud7ff",
]  # fmt: skip


@pytest.mark.parametrize("text", SAMPLES)
def test_byte_level_tokens_are_those_of_the_trained_tokenizer(text: str) -> None:
    trained, metadata = vocabularies.byte_level()
    made = Tokenizer(metadata)
    assert made.encode(text) == trained.encode(text).ids
    assert made.decode(made.encode(text)) == text


#: what a text is cut into, of the trained models' own expressions
CUTS = [
    ("llama-bpe", "12345 don'T\n\n x", ["123", "45", " don", "'T", "\n\n", " x"]),
    ("qwen2", "12 don't  a\r\n", ["1", "2", " don", "'t", " ", " a", "\r\n"]),
    ("tekken", "HelloWorld 12/\n", ["Hello", "World", " ", "1", "2", "/\n"]),
    ("smollm", "12 don't  a", ["1", "2", " don", "'t", " ", " a"]),
    ("gpt-2", "12345 don't  a", ["12345", " don", "'t", " ", " a"]),
]


@pytest.mark.parametrize(("pre", "text", "wanted"), CUTS)
def test_text_is_cut_as_the_file_says(pre: str, text: str, wanted: list[str]) -> None:
    made = Tokenizer(vocabularies.byte_level(pre=pre)[1])
    cut = made._made.pre_tokenizer.pre_tokenize_str(text)
    assert [text[start:end] for _, (start, end) in cut] == wanted
    assert made.decode(made.encode(text)) == text


def best_merges(metadata: dict[str, Any], text: str) -> list[str]:
    """SentencePiece's algorithm: merge the neighbours of the best score until none are left."""
    scores = dict(
        zip(metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.scores"], strict=True)
    )
    found = list("\u2581" + text.replace(" ", "\u2581"))
    while True:
        pairs = [
            (scores[a + b], -n) for n, (a, b) in enumerate(itertools.pairwise(found))
            if a + b in scores
        ]  # fmt: skip
        if not pairs:
            return found
        at = -max(pairs)[1]
        found[at : at + 2] = [found[at] + found[at + 1]]


@pytest.mark.parametrize(
    "text", ["The kernel reads", "a block  block", "weights don't lie: 4 bits"]
)
def test_pieces_are_merged_by_their_scores(text: str) -> None:
    metadata = vocabularies.pieces()
    made = Tokenizer(metadata)
    names = metadata["tokenizer.ggml.tokens"]
    ids = made.encode(text)
    assert ids[0] == made.bos == 1
    assert [names[one] for one in ids[1:]] == best_merges(metadata, text)


@pytest.mark.parametrize("text", [one for one in SAMPLES if "\u2581" not in one])
def test_pieces_there_and_back(text: str) -> None:
    made = Tokenizer(vocabularies.pieces())
    assert made.decode(made.encode(text)) == text


@pytest.mark.parametrize("text", ["The kernel reads a block", "Größe", "naïve  weights 16"])
def test_unigram_tokens_are_those_of_the_trained_tokenizer(text: str) -> None:
    trained, metadata = vocabularies.unigram()
    made = Tokenizer(metadata)
    assert made.encode(text) == trained.encode(text).ids and made.bos is None
    assert made.decode(made.encode(text)) == text


@pytest.mark.parametrize("metadata", [vocabularies.byte_level()[1], vocabularies.pieces()])
def test_a_stream_is_the_text_in_whole_characters(metadata: dict[str, Any]) -> None:
    made = Tokenizer(metadata)
    text = "naïve 日本語 🙂🙃 end"
    pieces = list(made.stream(made.encode(text)))
    assert "".join(pieces) == text and "\ufffd" not in "".join(pieces) and len(pieces) > 3


def test_control_tokens_count_only_where_they_are_asked_for() -> None:
    made = Tokenizer(vocabularies.byte_level(add_bos_token=True)[1])
    end = next(iter(made.ends))
    assert made.encode("a</s>", special=True)[-1] == end
    plain = made.encode("a</s>")
    assert plain[0] == made.bos and end not in plain and made.decode(plain) == "a</s>"
    # that in front is not said twice
    assert made.encode("<s>a", special=True).count(made.bos) == 1
    assert made.decode(made.encode("a</s>", special=True)) == "a"


TEMPLATE = """{{ bos_token }}{% for m in messages %}
[{{ m.role }}] {{ m['content'] | trim }}
{% endfor %}
{% if add_generation_prompt %}[assistant]{% endif %}"""


def test_conversations_are_written_by_the_files_template() -> None:
    _, metadata = vocabularies.byte_level()
    made = Tokenizer(metadata | {"tokenizer.chat_template": TEMPLATE})
    text = made.chat([{"role": "user", "content": " Why? "}])
    assert text == "<s>[user] Why?\n[assistant]"
    ids = made.encode(text, special=True)
    assert made.decode(ids) == text.removeprefix("<s>")
    with pytest.raises(FileError, match=r"no tokenizer\.chat_template"):
        Tokenizer(metadata).chat([])


@pytest.mark.parametrize(
    "template",
    ["{{ raise_exception('no') }}", "{% if %}", "{{ 1 / 0 }}", "{{ messages.__class__.mro() }}",
     "{{ range(10000000) | list }}"],
)  # fmt: skip
def test_a_template_that_fails_is_answered_in_a_sentence(template: str) -> None:
    _, metadata = vocabularies.byte_level()
    made = Tokenizer(metadata | {"tokenizer.chat_template": template})
    with pytest.raises(FileError, match="conversations of the file fails"):
        made.chat([{"role": "user", "content": "a"}])


WRONG = [
    ({"tokenizer.ggml.model": "bert"}, "no tokenizer .*'bert'.*gpt2, llama, t5"),
    ({"tokenizer.ggml.model": ["gpt2"]}, "no tokenizer"),
    ({"tokenizer.ggml.pre": ["gpt-2"]}, "contradicts itself"),
    ({"tokenizer.ggml.model": None}, "no tokenizer"),
    ({"tokenizer.ggml.pre": "jina"}, "cuts text as 'jina'"),
    ({"tokenizer.ggml.tokens": None}, "tokenizer.ggml.tokens"),
    ({"tokenizer.ggml.merges": ["no such"]}, "contradicts itself"),
    ({"tokenizer.ggml.merges": ["alone"]}, "contradicts itself"),
    ({"tokenizer.ggml.token_type": [1]}, "token_type for each"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG)
def test_damaged_metadata_are_refused(changes: dict[str, Any], message: str) -> None:
    _, metadata = vocabularies.byte_level()
    kept = {key: value for key, value in (metadata | changes).items() if value is not None}
    with pytest.raises(FileError, match=message) as caught:
        Tokenizer(kept)
    assert "\n" not in str(caught.value)


def test_scores_are_needed() -> None:
    metadata = vocabularies.pieces()
    del metadata["tokenizer.ggml.scores"]
    with pytest.raises(FileError, match=re.escape("tokenizer.ggml.scores")):
        Tokenizer(metadata)


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = builtins.__import__

    def without(name: str, *args: Any, **options: Any) -> Any:
        if name == "tokenizers":
            raise ImportError(name)
        return plain(name, *args, **options)

    metadata = vocabularies.byte_level()[1]
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(FileError, match="pip install kernelgen\\[models\\]"):
        Tokenizer(metadata)

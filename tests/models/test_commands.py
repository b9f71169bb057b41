"""`kernelgen run`, `bench-model`, `perplexity`."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("tokenizers")

from kernelgen import models
from tests.models import tiny, vocabularies
from tests.test_cli import error_of, json_of, run


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a byte-level vocabulary."""
    _, metadata = vocabularies.byte_level()
    count = len(metadata["tokenizer.ggml.tokens"])
    path = tmp_path_factory.mktemp("models") / "tiny.gguf"
    return tiny.write(path, "qwen2", vocabulary=count, metadata=metadata)


def test_run_streams_text_then_says_what_ran(file: Path) -> None:
    model = models.open(file, "numpy", "fp32")
    tokenizer = models.Tokenizer(model.file.metadata)
    ids = tokenizer.encode("The block")
    wanted = list(models.Generation(model, ids, 5, ends=tokenizer.ends))
    text = "".join(tokenizer.stream(wanted))
    options = ("--prompt", "The block", "-n", 5, "--target", "numpy", "--precision", "fp32")
    result = run("run", file, *options)
    assert result.stdout == text + "\n"
    said = result.stderr.splitlines()
    assert said[0].startswith(f"target numpy: prompt {len(ids)} tokens, ")
    assert "tokens/s" in said[0]
    found = json_of("run", file, *options)
    assert (found["text"], found["tokens"]) == (text, len(wanted))


def test_run_by_chance_is_repeatable(file: Path) -> None:
    options = ("-p", "The", "-n", 8, "--target", "numpy", "--temperature", 1.5, "--top-k", 50)
    first, again = (json_of("run", file, *options, "--seed", 7)["text"] for _ in range(2))
    assert first == again
    assert any(json_of("run", file, *options, "--seed", n)["text"] != first for n in (8, 9, 10))


def test_run_answers_by_the_models_template(file: Path, tmp_path: Path) -> None:
    _, metadata = vocabularies.byte_level()
    count = len(metadata["tokenizer.ggml.tokens"])
    metadata["tokenizer.chat_template"] = "{% for m in messages %}{{ m.content }}!{% endfor %}"
    path = tiny.write(tmp_path / "chat.gguf", "qwen2", vocabulary=count, metadata=metadata)
    options = ("-n", 4, "--target", "numpy")
    answer = json_of("run", path, "-p", "The", "--chat", *options)
    plain = json_of("run", file, "-p", "The!", *options)
    assert (answer["text"], answer["prompt_tokens"]) == (plain["text"], plain["prompt_tokens"])
    assert "no tokenizer.chat_template" in error_of("run", file, "-p", "a", "--chat", *options)


def test_run_names_the_kernels(file: Path) -> None:
    # a cache in a format that no other test has, so that the kernels of attention are new
    options = ("-p", "The", "-n", 2, "--target", "numpy", "--cache", "q5_1,q4_1")
    found = json_of("run", file, *options)
    assert any("attention" in name for name in found["kernels"])


def test_bench_model_prints_a_line_for_each_test(file: Path) -> None:
    sizes = ("-p", 4, "-n", 3, "-r", 2, "--tenants", 2, "--target", "numpy")
    shown = run("bench-model", file, *sizes).stdout
    assert "pp4" in shown and "tg3" in shown and "±" in shown
    tests = json_of("bench-model", file, *sizes)["tests"]
    assert [(one["test"], one["tenants"]) for one in tests] == [("pp4", 2), ("tg3", 2)]
    assert all(one["mean"] > 0 for one in tests)


def test_perplexity_of_a_text(file: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("".join(vocabularies.TEXTS), encoding="utf-8")
    options = ("--context", 64, "--target", "numpy", "--precision", "fp32")
    found = json_of("perplexity", file, text, *options)
    model = models.open(file, "numpy", "fp32")
    ids = models.Tokenizer(model.file.metadata).encode(text.read_text(encoding="utf-8"))
    assert found["tokens"] == len(ids)
    assert found["perplexity"] == pytest.approx(models.perplexity(model, ids, context=64))
    shown = run("perplexity", file, text, *options).stdout
    assert shown.startswith(f"perplexity {found['perplexity']:.4f} over {len(ids)} tokens")


def test_mistakes_are_answered_in_a_sentence(file: Path, tmp_path: Path) -> None:
    mute = tiny.write(tmp_path / "mute.gguf")
    assert "no tokenizer" in error_of("run", mute, "-p", "a", "--target", "numpy")
    other = tiny.write(tmp_path / "other.gguf", "mamba")
    assert "architecture 'mamba'" in error_of("run", other, "-p", "a")
    _, metadata = vocabularies.byte_level()
    small = tiny.write(tmp_path / "small.gguf", metadata=metadata)
    assert "do not belong together" in error_of("run", small, "-p", "a", "--target", "numpy")
    assert "does not exist" in error_of("bench-model", tmp_path / "none.gguf")
    assert "context of 256" in error_of("bench-model", file, "-p", 300, "--target", "numpy")
    assert "at least one" in error_of("run", file, "-p", "", "--target", "numpy")
    raw = tmp_path / "raw.txt"
    raw.write_bytes(b"\xff\xfe")
    assert "not text in UTF-8" in error_of("perplexity", file, raw)
    short = tmp_path / "short.txt"
    short.write_text("short", encoding="utf-8")
    assert "two parts" in error_of("perplexity", file, short, "--target", "numpy")

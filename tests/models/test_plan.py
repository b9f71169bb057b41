"""Plans: who holds what, what is refused, and what it costs; all without a second process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as some

import kernelgen
from kernelgen import models
from kernelgen.errors import ConfigError, FileError, FormatError
from kernelgen.models.ranks import outline
from kernelgen.models.ranks.costs import Costs, Link, Machine
from kernelgen.models.ranks.group import dealt, split, undealt
from kernelgen.models.ranks.plan import COLUMNS, ROWS
from tests.models import tiny
from tests.test_cli import error_of, json_of, run

ROOT = Path(__file__).resolve().parent.parent.parent

#: 8 heads of 64, 4 of keys, 5 layers
SHAPE: dict[str, Any] = {
    "general.architecture": "llama", "llama.block_count": 5, "llama.embedding_length": 256,
    "llama.feed_forward_length": 768, "llama.attention.head_count": 8,
    "llama.attention.head_count_kv": 4, "llama.attention.key_length": 64,
    "llama.attention.layer_norm_rms_epsilon": 1e-5, "llama.context_length": 512,
    "vocabulary": 101, "format": "q4_K", "formats": {"ffn_down": "q8_0"},
}  # fmt: skip


def outlined(path: Path, **changes: Any) -> Path:
    path.write_text(json.dumps(SHAPE | changes), encoding="utf-8")
    return path


def plan(tmp_path: Path, changes: dict[str, Any] | None = None, **cut: int) -> models.Plan:
    shape, tensors = outline.read(outlined(tmp_path / "shape.json", **(changes or {})))
    return models.Plan(shape, tensors, where="it", **cut)


@pytest.mark.parametrize(
    ("cut", "changes"),
    [
        ({}, {}),
        ({"tp": 2, "pp": 2}, {}),
        ({"tp": 2, "pp": 3}, {"tied": True}),
        ({"tp": 4, "pp": 5, "dp": 2}, {"format": "q8_0"}),
        ({"tp": 2}, {"llama.feed_forward_length": 1280, "formats": {}}),
    ],
)
def test_every_element_is_held_once(
    cut: dict[str, int], changes: dict[str, Any], tmp_path: Path
) -> None:
    """But norms, which all tensor ranks have, and a tied embedding, which two stages have."""
    made = plan(tmp_path, changes, **cut)
    parts = [made.part(stage, t) for stage in range(made.pp) for t in range(made.tp)]
    for name, w in made.tensors.items():
        holders = [part for part in parts if part.holds(name)]
        if len(w.shape) < 2:
            assert len(holders) == made.tp
            continue
        twice = name == "token_embd.weight" and made.tied and made.pp > 1
        times = np.zeros(w.shape, np.int32)
        for part in holders:
            rows, columns = part.of(name, w.shape)
            times[rows.start : rows.stop, columns.start : columns.stop] += 1
            assert part.nbytes(name, w) == len(rows) * w.format.row_bytes(len(columns))
        assert (times == 1 + twice).all(), name
    assert [n for stage in made.stages for n in stage] == list(range(5))
    places = [made.place(rank) for rank in range(made.ranks)]
    assert len(set(places)) == made.ranks
    assert max(places) == (made.dp - 1, made.pp - 1, made.tp - 1)


def test_projections_of_a_rank_belong_to_its_heads(tmp_path: Path) -> None:
    made = plan(tmp_path, {"format": "q8_0"}, tp=4)
    for tensor in range(4):
        part = made.part(0, tensor)
        assert (part.shape.heads, part.shape.kv_heads, part.shape.hidden) == (2, 1, 192)
        assert part.of("blk.0.attn_k.weight", (256, 256))[0] == range(64 * tensor, 64 * tensor + 64)
        queries = range(128 * tensor, 128 * tensor + 128)
        assert part.of("blk.0.attn_q.weight", (512, 256))[0] == queries
        assert part.of("blk.0.attn_output.weight", (256, 512))[1] == queries
        assert part.leads == (tensor == 0)


def test_the_network_is_cut_unevenly_where_blocks_ask_for_it(tmp_path: Path) -> None:
    changes = {"llama.feed_forward_length": 1280, "formats": {"ffn_down": "q6_K"}}
    made = plan(tmp_path, changes, tp=2)
    assert [len(made.part(0, n).cut.hidden) for n in range(2)] == [768, 512]
    assert made.part(0, 1).of("blk.0.ffn_up.weight", (1280, 256))[0] == range(768, 1280)
    # the vocabulary, too
    assert [len(made.part(0, n).cut.tokens) for n in range(2)] == [51, 50]


def test_a_part_of_a_tensor_is_its_elements(tmp_path: Path) -> None:
    made = plan(tmp_path, tp=2)
    rng = np.random.default_rng(0)
    for name in ("blk.1.attn_v.weight", "blk.1.ffn_down.weight", "blk.1.attn_output.weight"):
        shape, fmt = made.tensors[name].shape, made.tensors[name].format
        w = kernelgen.quantize(rng.standard_normal(shape).astype(np.float32), fmt)
        parts = [made.part(0, n).matrix(name, w).dequantize() for n in range(2)]
        kind = name.split(".")[2]
        axis = 0 if kind in ROWS else 1
        assert kind in ROWS or kind in COLUMNS
        assert np.array_equal(np.concatenate(parts, axis), w.dequantize())
    bias = np.arange(256, dtype=np.float32)
    first, second = made.part(0, 0), made.part(0, 1)
    assert np.array_equal(second.vector("blk.1.attn_k.bias", bias), bias[128:])
    # what is added to a sum over ranks is added once
    assert np.array_equal(first.vector("blk.1.attn_output.bias", bias), bias)
    assert second.vector("blk.1.attn_output.bias", bias) is None
    assert np.array_equal(second.vector("blk.1.attn_norm.weight", bias), bias)


REFUSED: dict[str, tuple[dict[str, Any], dict[str, int], str]] = {
    "heads": ({}, {"tp": 3}, "has 4 heads of keys and values, which divide among 1, 2 or 4 ranks"),
    "more than heads": ({}, {"tp": 8}, "4 heads of keys"),
    "blocks of heads": (
        {}, {"tp": 4},
        "128 columns of blk.0.attn_output.weight of it, which is cut only between blocks of 256",
    ),
    "blocks of the network": (
        {"formats": {"attn_output": "q8_0"}}, {"tp": 4},
        "the 768 columns of blk.0.ffn_down.weight of it are 3 pieces of 256 elements",
    ),
    "vocabulary": (
        {"vocabulary": 3, "format": "q8_0"}, {"tp": 4}, "vocabulary of 3 tokens",
    ),
    "stages": ({}, {"pp": 6}, "6 stages were asked for; it has 5 layers"),
    "nothing": ({}, {"dp": 0}, "each is at least 1"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_impossible_cuts_are_refused_in_a_sentence(case: str, tmp_path: Path) -> None:
    changes, cut, message = REFUSED[case]
    with pytest.raises(ConfigError) as caught:
        plan(tmp_path, changes, **cut)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"vocabulary": "many"}, FileError, '"vocabulary" is a number'),
        ({"format": None}, FileError, '"format" the name'),
        ({"format": "q9_9"}, FormatError, "'q9_9' is not known"),
        ({"formats": {"ffn": "q8_0"}}, FileError, "gives 'ffn' a format; matrices are token_embd"),
        ({"llama.block_count": None}, FileError, "no llama.block_count"),
        ({"llama.feed_forward_length": 100}, FormatError, "multiple of 32"),
    ],
)
def test_shapes_that_say_too_little(
    changes: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error) as caught:
        outline.read(outlined(tmp_path / "shape.json", **changes))
    assert message in str(caught.value)
    (tmp_path / "broken.json").write_text("[1", encoding="utf-8")
    assert "is not JSON" in error_of("plan", tmp_path / "broken.json")
    (tmp_path / "list.json").write_text("[1]", encoding="utf-8")
    assert "not an object" in error_of("plan", tmp_path / "list.json")


@given(counts=some.lists(some.integers(1, 9), min_size=1, max_size=5), pieces=some.integers(1, 12))
def test_micro_batches_have_all_tokens_in_order(counts: list[int], pieces: int) -> None:
    turns = [(n, [100 * n + t for t in range(count)]) for n, count in enumerate(counts)]
    found = split(turns, pieces)
    assert len(found) == min(pieces, sum(counts))
    sizes = [sum(len(tokens) for _, tokens in piece) for piece in found]
    assert max(sizes) - min(sizes) <= 1
    together = [(n, t) for piece in found for n, tokens in piece for t in tokens]
    assert together == [(n, t) for n, tokens in turns for t in tokens]
    assert all(len({n for n, _ in piece}) == len(piece) for piece in found)


def test_prompts_are_dealt_and_come_back_in_order() -> None:
    for count in range(7):
        hands = [dealt(list(range(count)), n, 3) for n in range(3)]
        assert list(undealt(hands)) == list(range(count))


def test_costs_of_a_small_plan_by_hand(tmp_path: Path) -> None:
    changes = {"format": "f16", "formats": {}, "llama.block_count": 2}
    made = plan(tmp_path, changes, tp=2, pp=2)
    machine = Machine(1e9, Link(1e9, 1e-6), Link(1e8, 1e-5), per_node=2, compute=1e12)
    costs = Costs(made, machine, context=100)
    layer = 2 * (512 * 256 + 2 * 256 * 256 + 256 * 512 + 3 * 768 * 256)
    norms = 2 * 256 * 4
    first, second, *rest = costs.shares()
    assert first.ranks == range(1) and first.heads == 4
    assert first.weights == layer // 2 + norms + 51 * 256 * 2
    assert (first.read, second.read) == (layer // 2 + norms, layer // 2 + norms)
    assert rest[0].read == layer // 2 + norms + 256 * 4 + 51 * 256 * 2
    assert first.kept == 2 * 100 * 2 * 64 * 2  # of 2 heads, keys and values of two bytes
    step = costs.decode(3)
    sums, onward, gather, broadcast = step.messages
    assert (sums.times, sums.nbytes, sums.sent) == (2 * 2 + 1, 3 * 256 * 4, 5 * 2 * 3 * 256 * 4)
    assert sums.seconds == pytest.approx(5 * 2 * (1e-6 + 1.5 * 256 * 4 / 1e9))
    assert (onward.link, onward.sent) == ("network", 2 * 3 * 256 * 4)
    assert onward.seconds == pytest.approx(1e-5 + 3 * 256 * 4 / 1e8)
    assert gather.seconds == pytest.approx(1e-6 + 3 * 101 * 2 / 1e9)
    assert broadcast.seconds == pytest.approx(1e-5 + 3 * 101 * 4 / 1e8)
    reading = (first.read + 3 * first.kept + rest[0].read + 3 * rest[0].kept) / 1e9
    assert step.reading == pytest.approx(reading)
    assert step.seconds == pytest.approx(reading + step.telling)
    # a prompt: stages overlap, so the slower one counts for each micro-batch but one
    slow = Costs(made, Machine(1e15, Link(1e15, 0), Link(1e15, 0), 2, 1e6), context=100)
    one, four = slow.prompt(100), slow.prompt(100, 4)
    assert four.seconds == pytest.approx(one.seconds * 5 / 8, rel=0.05)
    flops = 2 * 100 * (layer // 4 + 4 * 128 * 50)
    assert one.computing == pytest.approx((2 * flops + 2 * 51 * 256) / 1e6)


def test_parts_of_a_file_add_up(tmp_path: Path) -> None:
    path = tiny.write(tmp_path / "model.gguf", fmt="q8_0", value_fmt="q4_0")
    given = ("--memory", 10, "--link", 1, "--link-latency", 20)
    found = json_of("plan", path, "--tp", 2, "--pp", 2, *given)
    matrices = sum(w.nbytes for w in kernelgen.open(path).values() if len(w.shape) == 2)
    vectors = 4 * tiny.WIDTH * (2 * tiny.LAYERS + 1)
    parts = sum(one["weights"] * len(one["ranks"]) for one in found["shares"])
    assert parts == matrices + 2 * vectors  # tensor ranks each have the norms
    assert found["steps"][0]["seconds"] > 0
    shown = run("plan", path, "--tp", 2, "--pp", 2, *given).stdout
    assert "4 ranks: 1 replica of 2 stages of 2 tensor ranks" in shown
    assert "all-reduce" in shown and "a prompt" not in shown
    assert "computing" in run("plan", path, "--memory", 10, "--compute", 1).stdout
    assert "5 stages" in error_of("plan", path, "--pp", 5)
    assert "name a folder that has, or a .gguf" in error_of("plan", tmp_path)


@pytest.mark.slow
def test_bandwidths_are_measured_where_they_are_not_given(tmp_path: Path) -> None:
    pytest.importorskip("torch.distributed")
    path = tiny.write(tmp_path / "model.gguf")
    found = json_of("plan", path, "--tp", 2)
    assert 1e8 < found["memory"] < 1e13
    assert 1e6 < found["link"]["bandwidth"] < 1e12 and 1e-7 < found["link"]["latency"] < 1


def test_tables_on_the_page_are_what_the_command_prints() -> None:
    text = (ROOT / "docs" / "distributed.md").read_text(encoding="utf-8")
    blocks = [block for block in text.split("```")[1::2] if "$ kernelgen plan" in block]
    assert len(blocks) >= 2
    for block in blocks:
        command, _, printed = block.partition("$ kernelgen plan ")[2].partition("\n\n")
        words = command.replace("\\\n", " ").split()
        words[0] = str(ROOT / words[0])
        shown = run("plan", *words).stdout
        wanted = [line.rstrip() for line in shown.splitlines()]
        assert printed.strip("\n") == "\n".join(wanted).strip("\n")

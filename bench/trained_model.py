"""A small model of the Llama kind, trained for a minute or two, as a GGUF file.

    python -m bench.trained_model trained.gguf [--layout q4_K] [--characters 8000] [--steps 200]

It learns this repository's documents, or the beginning of them, with a byte-level vocabulary of its
own.  Of 8000 characters it knows nearly each that follows after 200 steps; of all of them what it
says is babble.  As in a real model some tokens are far more probable than others, and weights
and activations are distributed as training leaves them.  So it shows how often two programs choose
the same token, of which random weights say little.  Needs torch and tokenizers.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from torch.nn import functional

from bench import made_model

Array = npt.NDArray[Any]

WIDTH, HIDDEN, HEADS, KV_HEADS, LAYERS, VOCABULARY = 512, 1536, 8, 2, 4, 1024
EPS, ROPE_BASE = 1e-5, 10000.0

#: sequences and tokens of a step
BATCH, TOKENS = 4, 128

ROOT = Path(__file__).parents[1]


def corpus() -> str:
    """The documents."""
    files = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
    return "\n\n".join(one.read_text("utf-8") for one in files)


def vocabulary(text: str) -> tuple[Tokenizer, dict[str, Any]]:
    """A byte-level BPE of `VOCABULARY` tokens, and as a file describes it."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<s>", "</s>"]
    made.train_from_iterator(
        text.splitlines(keepends=True),
        trainers.BpeTrainer(
            vocab_size=VOCABULARY - len(special), initial_alphabet=alphabet, show_progress=False
        ),
    )
    inside = json.loads(made.to_str())["model"]
    tokens = sorted(inside["vocab"], key=inside["vocab"].get)
    merges = [one if isinstance(one, str) else " ".join(one) for one in inside["merges"]]
    return made, {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens + special,
        "tokenizer.ggml.token_type": [made_model.NORMAL] * len(tokens)
        + [made_model.CONTROL] * len(special),
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": len(tokens), "tokenizer.ggml.eos_token_id": len(tokens) + 1,
    }  # fmt: skip


class _Layer(nn.Module):
    """A transformer block; names are those of GGUF."""

    def __init__(self) -> None:
        super().__init__()
        dim = WIDTH // HEADS
        self.attn_norm = nn.RMSNorm(WIDTH, EPS)
        self.attn_q = nn.Linear(WIDTH, WIDTH, bias=False)
        self.attn_k = nn.Linear(WIDTH, KV_HEADS * dim, bias=False)
        self.attn_v = nn.Linear(WIDTH, KV_HEADS * dim, bias=False)
        self.attn_output = nn.Linear(WIDTH, WIDTH, bias=False)
        self.ffn_norm = nn.RMSNorm(WIDTH, EPS)
        self.ffn_gate = nn.Linear(WIDTH, HIDDEN, bias=False)
        self.ffn_up = nn.Linear(WIDTH, HIDDEN, bias=False)
        self.ffn_down = nn.Linear(HIDDEN, WIDTH, bias=False)

    def forward(self, x: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
        y = self.attn_norm(x)
        q, k, v = (
            one(y).unflatten(-1, (-1, WIDTH // HEADS)).transpose(1, 2)
            for one in (self.attn_q, self.attn_k, self.attn_v)
        )
        q, k = (_turned(one, turn) for one in (q, k))
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.attn_output(y.transpose(1, 2).flatten(2))
        y = self.ffn_norm(x)
        return x + self.ffn_down(functional.silu(self.ffn_gate(y)) * self.ffn_up(y))


def _turned(x: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
    """Rotary positions of neighbouring pairs."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turn).flatten(-2).to(x.dtype)


class _Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token_embd = nn.Embedding(VOCABULARY, WIDTH)
        self.blk = nn.ModuleList(_Layer() for _ in range(LAYERS))
        self.output_norm = nn.RMSNorm(WIDTH, EPS)
        self.output = nn.Linear(WIDTH, VOCABULARY, bias=False)
        for one in self.parameters():
            if one.ndim == 2:
                nn.init.normal_(one, std=0.02)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        dim = WIDTH // HEADS
        angles = torch.outer(
            torch.arange(ids.shape[1]), ROPE_BASE ** (-torch.arange(0, dim, 2) / dim)
        )
        x, turn = self.token_embd(ids), torch.polar(torch.ones_like(angles), angles)
        for layer in self.blk:
            x = layer(x, turn)
        logits: torch.Tensor = self.output(self.output_norm(x))
        return logits


def trained(ids: Array, steps: int, seed: int = 0) -> tuple[dict[str, Array], list[float]]:
    """Weights by the names of GGUF after so many steps of AdamW over pieces of `ids`, and the loss
    of each step, in nats for a token."""
    torch.manual_seed(seed)
    rng, model = np.random.default_rng(seed), _Model()
    peak = 1e-3
    optimizer = torch.optim.AdamW(model.parameters(), peak, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak, steps, pct_start=0.1)
    losses = []
    for batch in _batches(ids, steps, rng):
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(batch[:, :-1])
        loss = functional.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
    return {name: one.numpy() for name, one in model.state_dict().items()}, losses


def _batches(ids: Array, steps: int, rng: np.random.Generator) -> Iterator[torch.Tensor]:
    for _ in range(steps):
        starts = rng.integers(0, len(ids) - TOKENS, BATCH)
        yield torch.from_numpy(np.stack([ids[at : at + TOKENS + 1] for at in starts]))


def write(path: str | Path, layout: str, values: dict[str, Array], words: dict[str, Any]) -> Path:
    """Write trained weights; `layout` as `made_model.write` has it."""
    return made_model.write(
        path, layout, layers=LAYERS, width=WIDTH, hidden=HIDDEN, heads=HEADS, kv_heads=KV_HEADS,
        tokens=words, context=1024, values=values,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path", type=Path)
    parser.add_argument("--layout", default="q4_K")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--characters", type=int, help="of the documents; default: all")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    text = corpus()
    tokenizer, words = vocabulary(text)
    ids = np.array(tokenizer.encode(text[: given.characters]).ids)
    values, losses = trained(ids, given.steps, given.seed)
    print(write(given.path, given.layout, values, words))
    print(f"loss {losses[0]:.2f} at first, {np.mean(losses[-10:]):.2f} at last")


if __name__ == "__main__":
    main()

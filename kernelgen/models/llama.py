"""Llama, Mistral, Qwen2 and Qwen3: what these decoders compute, in kernelgen's public functions.

Sources: Touvron et al., "LLaMA" (2023); Ainslie et al., "GQA" (2023); the Qwen2 (2024) and Qwen3
(2025) reports.  Names of tensors are those of the GGUF specification.
"""

from __future__ import annotations

import functools
import itertools
import logging
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

import kernelgen
from kernelgen.errors import FileError, ShapeError
from kernelgen.gguf_files import Model
from kernelgen.ir.ops.rope import Factors, Scaling
from kernelgen.kv_cache import KVCache
from kernelgen.models.batch import Batch
from kernelgen.models.hyperparameters import Hyperparameters
from kernelgen.models.ranks.group import Ranks
from kernelgen.models.ranks.group import Turn as Turn
from kernelgen.models.ranks.plan import Part
from kernelgen.recording import Recording, contiguous, record
from kernelgen.tensor import QuantTensor, Stacked

Array = npt.NDArray[Any]

log = logging.getLogger("kernelgen")

#: tokens of a page of a cache of several sequences
PAGE = 32

#: single tokens that go through each matrix together: up to so many rows no target has kernels that
#: add up in another order than those for one (docs/models.md)
TOGETHER = 16

#: recorded steps that a cache keeps; each has the activations of all layers
RECORDED = 2


@dataclass(frozen=True)
class Projection:
    """A matrix of weights (N, K), or several `Stacked`, and a bias (N,) where the model has
    one."""

    w: Any
    bias: Array | None = None


@dataclass(frozen=True)
class Layer:
    """The weights of a transformer block; `q_norm` and `k_norm` (head_dim,) are Qwen3's."""

    attention_norm: Array
    q: Projection
    k: Projection
    v: Projection
    q_norm: Array | None
    k_norm: Array | None
    out: Projection
    ffn_norm: Array
    gate: Projection
    up: Projection
    down: Projection

    @functools.cached_property
    def qkv(self) -> tuple[Projection, ...]:
        """q, k and v; as one matrix those that follow each other in one format."""
        runs = itertools.groupby((self.q, self.k, self.v), lambda one: one.w.format)
        return tuple(_stacked(list(some)) for _, some in runs)


class Sequences:
    """The keys and values of all layers for some sequences, each of its own length.

    layers   a `kernelgen.KVCache` each
    """

    def __init__(self, layers: list[KVCache]) -> None:
        self.layers = layers
        self.steps: dict[Any, Any] = {}  # what a `Decoder` recorded, by itself

    @property
    def lengths(self) -> npt.NDArray[np.int32]:
        """Tokens that each sequence has, (sequences,)."""
        return self.layers[0].lengths

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values, used or not."""
        return sum(one.nbytes for one in self.layers)

    @property
    def free_pages(self) -> int:
        """Pages that no sequence has; each is one of every layer."""
        return self.layers[0].free_pages

    def truncate(self, length: int = 0, sequence: int | None = None) -> None:
        """Forget all but the first `length` tokens of a sequence, or of all."""
        for one in self.layers:
            one.truncate(length, sequence)


@dataclass(frozen=True)
class _Step:
    """A step that was recorded: the next token of each of some sequences."""

    model: Decoder
    batch: Batch
    recording: Recording
    logits: Array


class Decoder:
    """A model of the Llama kind over the memory-mapped weights of a GGUF file.

    target     where all kernels run; by default the best here
    precision  of the products of prompts, as `kernelgen.matmul` has it
    decode_precision  of those of single tokens that follow; by default the same
    together   single tokens that go through each matrix together.  More than the default may be
               faster; on c, results then depend in their last digits on how many there are
    ranks      the processes among which the model is cut; by default this one has all of it

    `shape` is that of the whole model, `part` what this rank holds, and `layers` are its own.
    Weights are repacked for the target in the first call that uses them, and kept.
    Raises FileError for an architecture that is not known, and for tensors that are missing, of
    another shape, or of no use.
    """

    def __init__(
        self,
        file: Model,
        target: str | None = None,
        precision: str = "auto",
        ranks: Ranks | None = None,
        decode_precision: str | None = None,
        together: int = TOGETHER,
    ) -> None:
        if together < 1:
            raise ShapeError(f"{together} tokens were to go together; at least one does")
        self.file = file
        self.ranks = ranks or Ranks()
        self.target = target or kernelgen.api.default_target()
        self.precision, self.decode_precision = precision, decode_precision or precision
        self.together = together
        self.shape = shape = Hyperparameters.of(file.metadata, str(file.path))
        self.part = self.ranks.plan(shape, file, str(file.path))
        self.vocabulary: int = file["token_embd.weight"].shape[0]
        with self.ranks.together():
            scaling = self._read(file)
        self._turning: dict[str, Any] = {
            "dims": shape.rope_dims, "base": shape.rope_base, "pairing": shape.pairing,
            "scaling": scaling, "target": self.target,
        }  # fmt: skip

    def _read(self, file: Model) -> Scaling | None:
        """Take this rank's weights; gives what stretches rotary positions."""
        shape, part = self.shape, self.part
        weights = _Weights(file, part)
        if part.first or (part.last and part.tied):
            self.embedding = weights.matrix("token_embd", None, shape.width)
        self.layers = [_layer(weights, f"blk.{n}.", shape) for n in part.layers]
        if part.last:
            self.norm = weights.vector("output_norm.weight", shape.width)
            output = self.embedding if part.tied else weights.matrix("output", self.vocabulary)
            self.output = Projection(output)
        factors = weights.optional("rope_freqs.weight", shape.rope_dims // 2)
        weights.check_all_used()
        return shape.scaling if factors is None else Factors(tuple(factors.tolist()))

    def sequences(
        self,
        count: int = 1,
        *,
        capacity: int | None = None,
        format: str = "f16",
        value_format: str | None = None,
        pool: int | None = None,
    ) -> Sequences:
        """An empty cache for `count` sequences of at most `capacity` tokens (by default the
        model's context, at most 4096).

        Several share `pool` pages of 32 tokens, by default enough for all at full length.
        """
        shape = self.part.shape
        room = min(shape.context, 4096) if capacity is None else capacity
        return Sequences(
            [
                KVCache(
                    shape.kv_heads, shape.head_dim, capacity=room, batches=count, format=format,
                    value_format=value_format, value_dim=shape.value_dim,
                    page=PAGE if count > 1 else 0, pool=pool,
                )
                for _ in range(shape.layers)
            ]
        )  # fmt: skip

    def forward(self, turns: Sequence[Turn], cache: Sequences, *, every: bool = False) -> Array:
        """Logits after the new tokens of some sequences, which the cache then has.

        turns   the sequences, each at most once, and their new tokens, at least one of each
        every   after every new token, not only the last of each sequence

        Single tokens go through each matrix together, up to `together` of them; several of one
        sequence, a prompt or a piece of it, by themselves.  So what a sequence gets does not depend
        on the others.
        Returns float32 (sequences or tokens, vocabulary), in the order of `turns`.
        Raises ShapeError, and keeps nothing, where there is no room.
        """
        counts = [len(tokens) for _, tokens in turns]
        self._check(turns, counts, cache)
        calls = _calls(counts, self.together)
        if len(calls) == 1:
            return self._call(turns, cache, every)
        rows = counts if every else [1] * len(turns)
        starts = np.cumsum([0, *rows])
        logits = np.empty((starts[-1], self.vocabulary), np.float32)
        for some in calls:
            found = self._call([turns[n] for n in some], cache, every)
            logits[np.concatenate([np.arange(starts[n], starts[n + 1]) for n in some])] = found
        return logits

    def _call(self, turns: Sequence[Turn], cache: Sequences, every: bool) -> Array:
        """Logits of equally many new tokens of some sequences."""
        decodes = len(turns[0][1]) == 1
        if decodes and self.ranks.count == 1:
            return self._step(turns, cache)
        # pieces of one prompt: each begins where the one before has ended
        pieces = (Batch(some, cache.lengths, decodes) for some in self.ranks.pieces(turns))
        return self._run(pieces, cache, decodes or every)

    def _step(self, turns: Sequence[Turn], cache: Sequences) -> Array:
        """Logits of a single token of each; what is launched is recorded, and replayed in the
        steps that follow of as many sequences."""
        key = (id(self), len(turns))
        step: _Step | None = cache.steps.pop(key, None)
        if step is None:
            while len(cache.steps) >= RECORDED:  # the one that was not taken for longest
                del cache.steps[next(iter(cache.steps))]
            batch = Batch(turns, cache.lengths, True)
            with record((batch.ids, batch.lengths)) as recording:
                logits = self._run([batch], cache, True)
            cache.steps[key] = _Step(self, batch, recording, logits)
            if recording.refused:
                log.debug("steps of %d sequences are not replayed: %s", key[1], recording.refused)
            return logits.copy()
        cache.steps[key] = step
        if step.recording.refused:
            return self._run([Batch(turns, cache.lengths, True)], cache, True)
        step.batch.load(turns, cache.lengths)
        step.recording.replay()
        return step.logits.copy()

    def _run(self, batches: Iterable[Batch], cache: Sequences, every: bool) -> Array:
        """Logits of batches that go through the stages one behind the other, or of the last token
        alone."""
        parts = []
        for batch in batches:
            parts.append(self._blocks(batch, cache))
        x = parts[0] if len(parts) == 1 else np.concatenate(parts)
        if not every:
            x = x[-1:]
        decodes = batch.decodes
        return self.ranks.logits(lambda: self._logits(x, decodes), len(x), self.vocabulary)

    def _check(self, turns: Sequence[Turn], counts: Sequence[int], cache: Sequences) -> None:
        """Refuse on every rank what one of them could not do."""
        if not turns or not all(counts):
            raise ShapeError("a model was called without tokens; each sequence gets at least one")
        which = [sequence for sequence, _ in turns]
        if not all(0 <= one < len(cache.lengths) for one in which):
            raise ShapeError(
                f"sequences {which} were named; the cache has {len(cache.lengths)}, from 0 on"
            )
        for _, tokens in turns:
            if not 0 <= min(tokens) <= max(tokens) < self.vocabulary:
                raise ShapeError(
                    f"tokens {min(tokens)} to {max(tokens)} were given; the model has"
                    f" {self.vocabulary}, from 0 on"
                )
        cache.layers[0].check_room(which, counts)

    def _blocks(self, batch: Batch, cache: Sequences) -> Array:
        """What this rank's layers make of new tokens, (tokens, width)."""
        if self.part.first:
            x = self._embed(batch.ids)
        else:
            x = self.ranks.receive((len(batch.ids), self.shape.width))
        for layer, kv in zip(self.layers, cache.layers, strict=True):
            x = self._attention(layer, x, kv, batch)
            x = self._feed_forward(layer, x, batch.decodes)
        if not self.part.last:
            self.ranks.send(x)
        return x

    def _embed(self, ids: Array) -> Array:
        """Rows of the embedding, each from the rank that has it."""
        tokens = self.part.cut.tokens
        if len(tokens) == self.vocabulary:
            found: Array = kernelgen.get_rows(self.embedding, ids, target=self.target)
            return found
        own = (ids >= tokens.start) & (ids < tokens.stop)
        x = kernelgen.get_rows(
            self.embedding, np.where(own, ids - tokens.start, 0), target=self.target
        )
        x[~own] = 0
        return self.ranks.sum(x)

    def _logits(self, x: Array, decodes: bool) -> Array:
        """Of this rank's part of the vocabulary, (rows, tokens of it)."""
        return self._project(x, self.output, decodes, norm=self.norm, norm_eps=self.shape.eps)

    def _attention(self, layer: Layer, x: Array, kv: KVCache, batch: Batch) -> Array:
        """x + attention(norm(x)), x (tokens, width)."""
        q, k, v = self._qkv(layer, x, batch)
        pages = batch.append(kv, k, v, self.target)
        y = kernelgen.attention(
            contiguous(batch.heads_first(q)), kv.keys, kv.values, causal=True,
            window=self.shape.window, lengths=batch.lengths, pages=pages, target=self.target,
        )  # fmt: skip
        return self._add(x, batch.tokens_first(y), layer.out, batch.decodes)

    def _qkv(self, layer: Layer, x: Array, batch: Batch) -> tuple[Array, Array, Array]:
        """Queries, keys and values, (tokens, heads, elements) each, the former two turned."""
        shape = self.part.shape  # its own heads
        sizes = ((shape.heads, shape.head_dim), (shape.kv_heads, shape.head_dim),
                 (shape.kv_heads, shape.value_dim))  # fmt: skip
        normed: dict[str, Any] = {"norm": layer.attention_norm, "norm_eps": shape.eps}
        parts = [self._project(x, one, batch.decodes, **normed) for one in layer.qkv]
        q, k, v = _heads(parts, sizes)
        q, k = (
            self._turned(contiguous(y), weight, batch)
            for y, weight in ((q, layer.q_norm), (k, layer.k_norm))
        )
        return q, k, v

    def _turned(self, x: Array, norm: Array | None, batch: Batch) -> Array:
        """Rotary positions in x (tokens, heads, elements), which may be normalized first."""
        if norm is not None:
            x = kernelgen.rms_norm(x, norm, self.shape.eps, target=self.target)
        found: Array = kernelgen.rope(x, batch.positions(x.shape[1]), **self._turning)
        return found

    def _feed_forward(self, layer: Layer, x: Array, decodes: bool) -> Array:
        """x + down(silu(gate(norm(x))) * up(norm(x)))."""
        normed: dict[str, Any] = {"norm": layer.ffn_norm, "norm_eps": self.shape.eps}
        gate, up = layer.gate, layer.up
        plain = gate.bias is None and up.bias is None
        if plain and gate.w.format is up.w.format:
            y = kernelgen.gated_matmul(
                x, gate.w, up.w, "silu", target=self.target, precision=self._precision(decodes),
                **normed,
            )  # fmt: skip
        else:
            other = self._project(x, up, decodes, **normed)
            y = self._project(
                x, gate, decodes, activation="silu", epilogue=_times, operands=[other], **normed
            )
        return self._add(x, y, layer.down, decodes)

    def _add(self, x: Array, y: Array, one: Projection, decodes: bool) -> Array:
        """x + one(y), of which each tensor rank has some columns, and y those elements."""
        residual = x if self.part.leads else None
        return self.ranks.sum(self._project(y, one, decodes, residual=residual))

    def _project(self, x: Array, one: Projection, decodes: bool, **fused: Any) -> Array:
        found: Array = kernelgen.matmul(
            x, one.w, bias=one.bias, target=self.target, precision=self._precision(decodes),
            **fused,
        )  # fmt: skip
        return found

    def _precision(self, decodes: bool) -> str:
        return self.decode_precision if decodes else self.precision


def _heads(parts: Sequence[Array], sizes: Sequence[tuple[int, int]]) -> list[Array]:
    """Heads of elements, (tokens, heads, elements) each, that lie one behind the other in the
    columns of some matrices; none is in two of these."""
    found, rest, at = [], list(parts), 0
    for heads, elements in sizes:
        if at == rest[0].shape[1]:
            rest, at = rest[1:], 0
        some = rest[0][:, at : at + heads * elements]
        found.append(some.reshape(len(some), heads, elements))
        at += heads * elements
    return found


def _stacked(parts: list[Projection]) -> Projection:
    """Projections of one input and format as one."""
    if len(parts) == 1:
        return parts[0]
    w = Stacked(*(one.w for one in parts))
    if all(one.bias is None for one in parts):
        return Projection(w)
    given = [np.zeros(one.w.shape[0]) if one.bias is None else one.bias for one in parts]
    bias = np.concatenate(given, dtype=np.float32)
    bias.flags.writeable = False
    return Projection(w, bias)


def _times(y: Any, other: Any) -> Any:
    return y * other


def open(
    path: str | os.PathLike[str],
    target: str | None = None,
    precision: str = "auto",
    ranks: Ranks | None = None,
    decode_precision: str | None = None,
    together: int = TOGETHER,
) -> Decoder:
    """The decoder in a GGUF file (see `Decoder`), on this rank; what one rank cannot open, none
    can."""
    with (ranks or Ranks()).together():
        file = kernelgen.open(path)
        if not isinstance(file, Model):
            raise FileError(
                f"{path} is a checkpoint in safetensors; models are run from GGUF files"
            )
        Hyperparameters.of(file.metadata, str(file.path))
    return Decoder(file, target, precision, ranks, decode_precision, together)


def _calls(counts: Sequence[int], most: int) -> list[list[int]]:
    """Which sequences, by the number of their tokens, go through the layers together: of those
    with one, at most so many."""
    singles = [n for n, count in enumerate(counts) if count == 1]
    calls = [singles[at : at + most] for at in range(0, len(singles), most)]
    return calls + [[n] for n, count in enumerate(counts) if count > 1]


def _layer(weights: _Weights, prefix: str, shape: Hyperparameters) -> Layer:
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    values, inside = shape.kv_heads * shape.value_dim, shape.heads * shape.value_dim
    width, hidden = shape.width, shape.hidden

    def projection(name: str, n: int, k: int) -> Projection:
        w = weights.matrix(prefix + name, n, k)
        return Projection(w, weights.optional(f"{prefix}{name}.bias", n))

    return Layer(
        attention_norm=weights.vector(f"{prefix}attn_norm.weight", width),
        q=projection("attn_q", queries, width),
        k=projection("attn_k", keys, width),
        v=projection("attn_v", values, width),
        q_norm=weights.optional(f"{prefix}attn_q_norm.weight", shape.head_dim),
        k_norm=weights.optional(f"{prefix}attn_k_norm.weight", shape.head_dim),
        out=projection("attn_output", width, inside),
        ffn_norm=weights.vector(f"{prefix}ffn_norm.weight", width),
        gate=projection("ffn_gate", hidden, width),
        up=projection("ffn_up", hidden, width),
        down=projection("ffn_down", width, hidden),
    )


class _Weights:
    """A rank's part of the tensors of a file, each checked for its shape and counted as used."""

    def __init__(self, file: Model, part: Part) -> None:
        self._file, self._part = file, part
        self._used: set[str] = set()

    def _take(self, name: str, shape: tuple[int | None, ...]) -> QuantTensor:
        self._used.add(name)
        found = self._file[name]
        fits = len(found.shape) == len(shape) and all(
            want in (None, has) for want, has in zip(shape, found.shape, strict=True)
        )
        if not fits:
            wanted = " x ".join("any" if n is None else str(n) for n in shape)
            raise FileError(
                f"tensor {name!r} of {self._file.path} is {' x '.join(map(str, found.shape))}; by"
                f" its metadata it is {wanted}"
            )
        return found

    def matrix(self, name: str, n: int | None, k: int | None = None) -> QuantTensor:
        name = f"{name}.weight"
        return self._part.matrix(name, self._take(name, (n, k)))

    def vector(self, name: str, size: int) -> Array:
        found = self._take(name, (size,)).dequantize().copy()  # its own, not a view
        found.flags.writeable = False  # recordings want to know that it stays what it is
        return found

    def optional(self, name: str, size: int) -> Array | None:
        return self._part.vector(name, self.vector(name, size)) if name in self._file else None

    def check_all_used(self) -> None:
        """Raises FileError where a tensor has no place in the model: it is another one, then."""
        names = filter(self._part.holds, (*self._file, *self._file.skipped))
        rest = [name for name in names if name not in self._used]
        if rest:
            shown = ", ".join(rest[:3]) + ", ..." * (len(rest) > 3)
            raise FileError(
                f"{self._file.path} has tensors that a model of architecture"
                f" {self._file.architecture} has no place for ({shown}); it is one of another kind"
            )

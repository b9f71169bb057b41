"""Which rank holds what: the cut of a model over tensor ranks, stages and replicas.

Sources: Shoeybi et al., "Megatron-LM" (2019), for how the matrices of a block are cut so that it
needs two all-reduces; Huang et al., "GPipe" (2019), for stages and micro-batches.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy.typing as npt

from kernelgen.errors import ConfigError
from kernelgen.ir.block import BlockFormat
from kernelgen.models.hyperparameters import Hyperparameters
from kernelgen.tensor import QuantTensor

Array = npt.NDArray[Any]

#: which rows of a matrix (N, K) a tensor rank holds, by the field of `Cut` that counts them
ROWS = {
    "token_embd": "tokens", "output": "tokens", "attn_q": "queries", "attn_k": "keys",
    "attn_v": "values", "ffn_gate": "hidden", "ffn_up": "hidden",
}  # fmt: skip
#: which columns; each rank then has a part of every sum, so the products are summed over ranks
COLUMNS = {"attn_output": "inside", "ffn_down": "hidden"}
#: what only the first or the last stage has
ENTRANCE, EXIT = ("token_embd",), ("output", "output_norm")

_LAYER = re.compile(r"blk\.(\d+)\.(.+)")


class Outline(Protocol):
    """What a plan has to know of a tensor; a QuantTensor says it, too."""

    @property
    def format(self) -> BlockFormat:
        """The format of its blocks."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Elements along each dimension."""


@dataclass(frozen=True)
class Cut:
    """The part of a tensor rank, in elements of each kind of dimension.

    heads    of keys and values
    queries, keys, values   rows of the projections
    inside   elements of all heads' results
    hidden   elements inside the feed-forward network
    tokens   of the vocabulary
    """

    heads: range
    queries: range
    keys: range
    values: range
    inside: range
    hidden: range
    tokens: range


@dataclass(frozen=True)
class Part:
    """What one rank holds of a model.

    shape    hyperparameters as this rank sees them: its own layers, heads and hidden elements
    layers   its transformer blocks, counted in the whole model
    cut      its part of their matrices
    leads    whether it is the first of its tensor ranks, which adds what is added once
    first, last   whether its stage is the first, the last
    tied     whether the embedding is the output matrix, too
    """

    shape: Hyperparameters
    layers: range
    cut: Cut
    leads: bool
    first: bool
    last: bool
    tied: bool

    def holds(self, name: str) -> bool:
        """Whether this rank reads a tensor; of names that no model has it says yes."""
        layer, kind, _ = _named(name)
        if layer is not None:  # one that the model does not have is for the last stage to judge
            return layer in self.layers or (self.last and layer >= self.layers.stop)
        if kind in ENTRANCE:
            return self.first or (self.last and self.tied)
        return self.last or kind not in EXIT

    def matrix(self, name: str, w: QuantTensor) -> QuantTensor:
        """Its rows, which share the data, or its columns, which do not, of a matrix (N, K)."""
        rows, columns = self.of(name, w.shape)
        if len(columns) < w.shape[1]:
            return w.cut_columns(columns.start, columns.stop)
        return w if len(rows) == w.shape[0] else w[rows.start : rows.stop]

    def vector(self, name: str, x: Array) -> Array | None:
        """Its elements of a norm or a bias (N,); None where another rank adds it."""
        own = self._elements(name, len(x))
        return x[own.start : own.stop] if own else None

    def _elements(self, name: str, size: int) -> range:
        _, kind, what = _named(name)
        if what == "bias" and kind in COLUMNS:
            return range(size if self.leads else 0)
        if what == "bias" and kind in ROWS:
            own: range = getattr(self.cut, ROWS[kind])
            return own
        return range(size)

    def of(self, name: str, shape: tuple[int, ...]) -> tuple[range, range]:
        """Rows and columns of a matrix that this rank holds."""
        _, kind, _ = _named(name)
        rows, columns = range(shape[0]), range(shape[-1])
        if kind in ROWS:
            rows = getattr(self.cut, ROWS[kind])
        if kind in COLUMNS:
            columns = getattr(self.cut, COLUMNS[kind])
        return rows, columns

    def nbytes(self, name: str, w: Outline) -> int:
        """Bytes of its part of a tensor."""
        if len(w.shape) < 2:
            return (
                w.format.row_bytes(w.shape[0]) * len(self._elements(name, w.shape[0])) // w.shape[0]
            )
        rows, columns = self.of(name, w.shape)
        return len(rows) * w.format.row_bytes(len(columns))


class Plan:
    """A model over `tp` tensor ranks, `pp` stages and `dp` replicas: tp * pp * dp ranks.

    shape     hyperparameters of the whole model
    tensors   its tensors by their names in GGUF; of each only format and shape are looked at
    where     what the model is called in errors

    Ranks are counted through tensor ranks first, then stages, then replicas, so that those which
    speak most with each other are neighbours.
    Raises ConfigError for a cut that the model or the format of a matrix does not allow.
    """

    def __init__(
        self,
        shape: Hyperparameters,
        tensors: Mapping[str, Any],
        *,
        tp: int = 1,
        pp: int = 1,
        dp: int = 1,
        where: str = "the model",
    ) -> None:
        if min(tp, pp, dp) < 1:
            raise ConfigError(
                f"{tp} tensor ranks, {pp} stages and {dp} replicas were asked for; each is at"
                " least 1"
            )
        self.shape, self.tensors, self.where = shape, tensors, where
        self.tp, self.pp, self.dp = tp, pp, dp
        self.vocabulary: int = tensors["token_embd.weight"].shape[0]
        self.tied = "output.weight" not in tensors
        if pp > shape.layers:
            raise ConfigError(
                f"{pp} stages were asked for; {where} has {shape.layers} layers, and a stage has"
                " at least one"
            )
        self.stages = shares(shape.layers, pp)
        self._cuts = self._cut()

    @property
    def ranks(self) -> int:
        """How many there are."""
        return self.tp * self.pp * self.dp

    def place(self, rank: int) -> tuple[int, int, int]:
        """Replica, stage and tensor rank of a rank."""
        if not 0 <= rank < self.ranks:
            raise ConfigError(f"rank {rank} was asked for; the plan has {self.ranks}, from 0 on")
        return rank // (self.tp * self.pp), rank // self.tp % self.pp, rank % self.tp

    def part(self, stage: int = 0, tensor: int = 0) -> Part:
        """What such a rank of each replica holds."""
        cut, layers = self._cuts[tensor], self.stages[stage]
        heads = len(cut.heads) * (self.shape.heads // self.shape.kv_heads)
        own = replace(
            self.shape, layers=len(layers), heads=heads, kv_heads=len(cut.heads),
            hidden=len(cut.hidden),
        )  # fmt: skip
        last = stage == self.pp - 1
        return Part(own, layers, cut, tensor == 0, stage == 0, last, self.tied)

    def held(self, part: Part) -> Iterator[tuple[str, int]]:
        """Names of a part's tensors, and their bytes."""
        for name, w in self.tensors.items():
            if part.holds(name):
                yield name, part.nbytes(name, w)

    def _cut(self) -> list[Cut]:
        """Parts of all tensor ranks, of blocks that are whole."""
        shape, tp = self.shape, self.tp
        if shape.kv_heads % tp:
            raise ConfigError(
                f"{tp} tensor ranks were asked for; {self.where} has {shape.kv_heads} heads of"
                f" keys and values, which divide among"
                f" {_listed(n for n in range(1, shape.kv_heads + 1) if shape.kv_heads % n == 0)}"
            )
        if self.vocabulary < tp:
            raise ConfigError(
                f"{tp} tensor ranks were asked for; {self.where} has a vocabulary of"
                f" {self.vocabulary} tokens, and a rank holds at least one"
            )
        each = shape.kv_heads // tp
        group = shape.heads // shape.kv_heads
        self._check_heads(each * group * shape.value_dim)
        unit = self._unit_of_hidden()
        heads = shares(shape.kv_heads, tp)
        hidden = shares(shape.hidden // unit, tp)
        tokens = shares(self.vocabulary, tp)
        return [
            Cut(
                heads=h,
                queries=_times(h, group * shape.head_dim),
                keys=_times(h, shape.head_dim),
                values=_times(h, shape.value_dim),
                inside=_times(h, group * shape.value_dim),
                hidden=_times(inner, unit),
                tokens=some,
            )
            for h, inner, some in zip(heads, hidden, tokens, strict=True)
        ]

    def _by_columns(self, kind: str) -> Iterator[tuple[str, BlockFormat]]:
        for n in range(self.shape.layers):
            name = f"blk.{n}.{kind}.weight"
            if name in self.tensors:  # else it is found missing when it is read
                yield name, self.tensors[name].format

    def _check_heads(self, columns: int) -> None:
        """Refuse a cut of the heads' results that falls within a block."""
        for name, fmt in self._by_columns("attn_output"):
            if self.tp > 1 and columns % fmt.block:
                raise ConfigError(
                    f"{self.tp} tensor ranks were asked for; each would hold {columns} columns of"
                    f" {name} of {self.where}, which is cut only between blocks of {fmt.block}"
                    f" elements ({fmt.name}): use fewer ranks, or a format of smaller blocks"
                )

    def _unit_of_hidden(self) -> int:
        """Elements by which the feed-forward network can be cut: whole blocks in all layers."""
        if self.tp == 1:
            return 1
        found = list(self._by_columns("ffn_down"))
        unit = math.lcm(*(fmt.block for _, fmt in found))
        if self.shape.hidden // unit < self.tp:
            name, fmt = max(found, key=lambda one: one[1].block)
            raise ConfigError(
                f"{self.tp} tensor ranks were asked for; the {self.shape.hidden} columns of {name}"
                f" of {self.where} are {self.shape.hidden // unit} pieces of {unit} elements, as"
                f" {fmt.name} is cut only between blocks: use fewer ranks, or a format of smaller"
                " blocks"
            )
        return unit


def shares(count: int, parts: int) -> list[range]:
    """0 ... count - 1 in so many ranges that differ by at most one, the shorter ones last."""
    each, more = divmod(count, parts)
    starts = [n * each + min(n, more) for n in range(parts + 1)]
    return [range(a, b) for a, b in itertools.pairwise(starts)]


def _times(some: range, by: int) -> range:
    return range(some.start * by, some.stop * by)


def _named(name: str) -> tuple[int | None, str, str]:
    """Layer, kind and suffix of a tensor's name: 0, "attn_q", "weight"."""
    found = _LAYER.fullmatch(name)
    kind, _, what = (found[2] if found else name).rpartition(".")
    return (int(found[1]) if found else None), kind, what


def _listed(numbers: Iterator[int]) -> str:
    *some, last = map(str, numbers)
    return f"{', '.join(some)} or {last} ranks" if some else f"{last} rank"

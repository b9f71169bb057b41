"""What a plan costs: bytes that ranks hold, read and send, and the time that this takes.

The time of a step is that of reading weights and keys and values, or of computing where that takes
longer, plus the messages, one after the other: nothing overlaps but stages in a prompt.  So it is
what a machine with these bandwidths could reach, not what kernels do.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from kernelgen.ir import formats
from kernelgen.models.ranks.plan import ENTRANCE, Part, Plan

#: bytes of an element of what ranks send: float32
ELEMENT = 4
SUMS = "all-reduce"


@dataclass(frozen=True)
class Link:
    """A way between ranks: bytes in a second each way, and seconds before the first comes."""

    bandwidth: float
    latency: float

    def send(self, nbytes: float) -> float:
        """Seconds of one message."""
        return self.latency + nbytes / self.bandwidth

    def all_reduce(self, nbytes: float, ranks: int) -> float:
        """Seconds of a sum over ranks in a ring: each sends 2 (n - 1) / n of its bytes in 2 (n - 1)
        steps (Patarasuk and Yuan, 2009)."""
        return 2 * self.all_gather(nbytes, ranks)

    def all_gather(self, nbytes: float, ranks: int) -> float:
        """Seconds until all ranks have `nbytes`, of which each had its part."""
        return (ranks - 1) * self.send(nbytes / ranks)


@dataclass(frozen=True)
class Machine:
    """What ranks run on.

    memory     bytes in a second that a rank reads
    inside     between ranks of a node, `between` of two nodes
    per_node   ranks of a node
    compute    operations in a second of a rank, multiplications and additions each counted; None
               where it is not known, and then computing takes no time
    """

    memory: float
    inside: Link
    between: Link
    per_node: int
    compute: float | None = None


@dataclass(frozen=True)
class Share:
    """What a rank has. Bytes.

    ranks     of the first replica that hold as much
    layers    of its stage
    weights   all that it holds
    read      of these, what each token needs: all but the embedding, of which it needs one row
    kept      keys and values of one sequence
    """

    ranks: range
    layers: range
    heads: int
    kv_heads: int
    hidden: int
    weights: int
    read: int
    kept: int


@dataclass(frozen=True)
class Message:
    """What ranks of a replica tell each other in a step.

    times   in a step, one after the other
    nbytes  that each is about
    sent    by all ranks of a replica together, in all
    link    within a "node" or over the "network"
    seconds of all
    """

    what: str
    times: int
    nbytes: int
    sent: int
    link: str
    seconds: float


@dataclass(frozen=True)
class Estimate:
    """A step of `tokens` tokens of each of some sequences, in so many micro-batches.

    reading, computing, telling   seconds along the way of a token; of the first two only the
                                  longer one of each stage counts
    """

    tokens: int
    sequences: int
    micro: int
    reading: float
    computing: float
    telling: float
    seconds: float
    messages: tuple[Message, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for --json."""
        return asdict(self)


class Costs:
    """The costs of a plan on a machine.

    context   tokens of a sequence that the cache has
    format    of keys, `value_format` of values
    """

    def __init__(
        self, plan: Plan, machine: Machine, *, context: int, format: str = "f16",
        value_format: str | None = None,
    ) -> None:  # fmt: skip
        self.plan, self.machine, self.context = plan, machine, context
        self._formats = formats.get(format), formats.get(value_format or format)

    def shares(self) -> Iterator[Share]:
        """Of each stage the tensor ranks that hold equally much, those in a row together."""
        for stage in range(self.plan.pp):
            found: list[Share] = []
            for tensor in range(self.plan.tp):
                rank = stage * self.plan.tp + tensor
                one = self._share(self.plan.part(stage, tensor), rank)
                last = found[-1] if found else None
                if last is not None and replace(last, ranks=one.ranks) == one:
                    found[-1] = replace(one, ranks=range(last.ranks.start, rank + 1))
                else:
                    found.append(one)
            yield from found

    def _share(self, part: Part, rank: int) -> Share:
        weights = read = 0
        for name, nbytes in self.plan.held(part):
            weights += nbytes
            entrance = name.partition(".")[0] in ENTRANCE
            read += nbytes if not entrance or (part.last and part.tied) else 0
        keys, values = self._formats
        shape = part.shape
        row = keys.row_bytes(shape.head_dim) + values.row_bytes(shape.value_dim)
        return Share(
            range(rank, rank + 1), part.layers, shape.heads, shape.kv_heads, shape.hidden,
            weights, read, len(part.layers) * shape.kv_heads * row * self.context,
        )  # fmt: skip

    def decode(self, sequences: int = 1) -> Estimate:
        """One more token of each of some sequences, whose caches are full."""
        return self._step(1, sequences, 1)

    def prompt(self, tokens: int, micro: int = 1) -> Estimate:
        """A prompt of one sequence, in micro-batches."""
        return self._step(tokens, 1, micro)

    def _step(self, tokens: int, sequences: int, micro: int) -> Estimate:
        machine = self.machine
        rows = -(-tokens // micro) * sequences
        reading, computing, stages = [], [], []
        for part, most in self._stages():
            kept = sequences * most.kept if tokens == 1 else 0  # of a prompt it is next to nothing
            read = (most.read + kept) / machine.memory
            work = self._operations(part, rows, tokens) / (machine.compute or float("inf"))
            sums = self._sums(part, rows)
            reading.append(read)
            computing.append(work)
            stages.append(max(read, work) + (sums.seconds if sums else 0.0))
        messages = tuple(self._messages(rows, sequences, micro))
        told = [one.seconds for one in messages]
        seconds = sum(stages) + (micro - 1) * max(stages)
        seconds += sum(one.seconds for one in messages if one.what != SUMS)
        return Estimate(
            tokens, sequences, micro, micro * max(reading) + sum(reading) - max(reading),
            micro * max(computing) + sum(computing) - max(computing), sum(told), seconds, messages,
        )  # fmt: skip

    def _stages(self) -> Iterator[tuple[Part, Share]]:
        """The part of each stage that has most to read."""
        for stage in range(self.plan.pp):
            parts = [self.plan.part(stage, tensor) for tensor in range(self.plan.tp)]
            yield max(((p, self._share(p, 0)) for p in parts), key=lambda one: one[1].read)

    def _operations(self, part: Part, rows: int, tokens: int) -> float:
        """Multiplications and additions of a rank for so many rows of activations."""
        elements = 0.0
        for name, w in self.plan.tensors.items():
            if len(w.shape) < 2 or not part.holds(name):
                continue
            own, columns = part.of(name, w.shape)
            last = name.partition(".")[0] in ("output", *ENTRANCE)
            if last and not part.last:
                continue
            # of a prompt only the last token is foretold from
            share = 1.0 if not last or tokens == 1 else 1 / rows
            elements += len(own) * len(columns) * share
        seen = self.context if tokens == 1 else tokens / 2
        shape = part.shape
        attention = len(part.layers) * shape.heads * (shape.head_dim + shape.value_dim) * seen
        return 2.0 * rows * (elements + attention)

    def _link(self, first: int, last: int) -> tuple[str, Link]:
        """Between two ranks and all that lie between them."""
        alike = first // self.machine.per_node == last // self.machine.per_node
        return ("node", self.machine.inside) if alike else ("network", self.machine.between)

    def _sums(self, part: Part, rows: int) -> Message | None:
        tp = self.plan.tp
        if tp == 1:
            return None
        where, link = self._widest()
        times = 2 * len(part.layers) + part.first
        nbytes = rows * self.plan.shape.width * ELEMENT
        seconds = times * link.all_reduce(nbytes, tp)
        return Message(SUMS, times, nbytes, times * 2 * (tp - 1) * nbytes, where, seconds)

    def _widest(self) -> tuple[str, Link]:
        """Between the tensor ranks of a stage, where some stage has them on two nodes."""
        starts = range(0, self.plan.tp * self.plan.pp, self.plan.tp)
        found = dict(self._link(start, start + self.plan.tp - 1) for start in starts)
        return ("network", found["network"]) if "network" in found else ("node", found["node"])

    def _messages(self, rows: int, sequences: int, micro: int) -> Iterator[Message]:
        """All messages that a step waits for; while a micro-batch travels, the others compute."""
        plan, tp = self.plan, self.plan.tp
        nbytes = rows * plan.shape.width * ELEMENT
        sums = [one for n in range(plan.pp) if (one := self._sums(plan.part(n), rows))]
        if sums:
            longest = max(one.seconds for one in sums)
            yield Message(
                SUMS, micro * sum(one.times for one in sums), nbytes,
                micro * sum(one.sent for one in sums), sums[0].link,
                sum(one.seconds for one in sums) + (micro - 1) * longest,
            )  # fmt: skip
        between = [self._link(n * tp, (n + 1) * tp) for n in range(plan.pp - 1)]
        for where, link in dict(between).items():
            times = [one for one, _ in between].count(where)
            yield Message(
                "to the next stage", times, nbytes, micro * times * tp * nbytes, where,
                times * link.send(nbytes),
            )  # fmt: skip
        logits = sequences * plan.vocabulary * ELEMENT
        if tp > 1:
            where, link = self._widest()
            seconds = link.all_gather(logits, tp)
            yield Message("gather of logits", 1, logits, (tp - 1) * logits, where, seconds)
        if plan.pp > 1:
            where, link = self._link(0, tp * plan.pp - 1)
            seconds = (plan.pp - 1).bit_length() * link.send(logits)  # along a tree
            sent = tp * (plan.pp - 1) * logits
            yield Message("broadcast of logits", 1, logits, sent, where, seconds)

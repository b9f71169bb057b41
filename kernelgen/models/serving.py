"""Many sequences over one copy of the weights: continuous batching (Yu et al., "Orca", 2022) over a
cache of pages (Kwon et al., 2023)."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from kernelgen.errors import KernelgenError, ShapeError
from kernelgen.models.generation import BATCH
from kernelgen.models.llama import PAGE, Array, Decoder, Turn
from kernelgen.models.sampling import Sampler


@dataclass(eq=False)
class Request:
    """A prompt, and what followed it so far.

    count    tokens at most
    tokens   those that were made
    done     whether no more will come
    error    why it was ended, where its sampler failed
    """

    prompt: list[int]
    count: int
    sampler: Sampler
    tokens: list[int] = field(default_factory=list)
    done: bool = False
    error: str | None = None
    _read: int = 0

    @property
    def _room(self) -> int:
        """Pages that it may come to need; the last token is never read."""
        return -(-(len(self.prompt) + self.count - 1) // PAGE)


class Server:
    """Serves up to `tenants` requests at once; others wait.

    tenants   sequences of the cache
    capacity  tokens of a sequence at most, prompt and answer
    pool      pages of 32 tokens that all share; by default enough for all at full length
    format    of keys, `value_format` of values
    ends      tokens after which nothing follows; they are not given out

    In each step the next token of every running request goes through the model with those of the
    others, and pieces of the prompts of new ones each by itself, cut as `Generation` cuts them: so
    each request gets the tokens that it gets alone.  A request starts when the pages that it may
    come to need are free, so that none has to be stopped.  A server is for one thread at a time.
    """

    def __init__(
        self,
        model: Decoder,
        tenants: int,
        *,
        capacity: int | None = None,
        pool: int | None = None,
        format: str = "f16",
        value_format: str | None = None,
        ends: Collection[int] = (),
    ) -> None:
        room = min(model.shape.context, 4096) if capacity is None else capacity
        self.model, self.capacity, self.ends = model, room, frozenset(ends)
        self.cache = model.sequences(
            # one sequence alone would get no pages
            max(tenants, 2), capacity=room, format=format, value_format=value_format,
            pool=tenants * -(-room // PAGE) if pool is None else pool,
        )  # fmt: skip
        self._pages = self.cache.free_pages
        self._free = list(range(tenants))[::-1]
        self._waiting: deque[Request] = deque()
        self._running: dict[int, Request] = {}

    @property
    def running(self) -> int:
        """Requests that have a place now."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Requests that have none yet."""
        return len(self._waiting)

    def submit(self, prompt: Sequence[int], count: int, sampler: Sampler | None = None) -> Request:
        """A new request; raises ShapeError for one that could never be served."""
        made = Request(list(prompt), count, sampler or Sampler())
        most = min(self.capacity, self._pages * PAGE)
        if not prompt or count < 1 or len(prompt) + count - 1 > most:
            raise ShapeError(
                f"{count} tokens after a prompt of {len(prompt)} were asked for; both are at least"
                f" 1, and together at most {most + 1}"
            )
        self._waiting.append(made)
        return made

    def step(self) -> list[Request]:
        """One run of the model; gives those requests that got a token or ended.

        Nothing happens, and the result is empty, where there is no request.
        """
        self._admit()
        turns = self._turns()
        if not turns:
            return []
        logits = self.model.forward(turns, self.cache)
        changed = []
        for (sequence, tokens), row in zip(turns, logits, strict=True):
            one = self._running[sequence]
            one._read += len(tokens)
            if one._read < len(one.prompt):
                continue
            self._add_token(one, row)
            if one.done:
                self._leave(sequence)
            changed.append(one)
        return changed

    def _add_token(self, one: Request, logits: Array) -> None:
        try:
            token = one.sampler(logits)
        except KernelgenError as error:  # the others go on
            one.error, one.done = str(error), True
            return
        if token not in self.ends:
            one.tokens.append(token)
        one.done = token in self.ends or len(one.tokens) >= one.count

    def cancel(self, request: Request) -> None:
        """End a request; what it has so far stays with it."""
        if request in self._waiting:
            self._waiting.remove(request)
        for sequence, one in tuple(self._running.items()):
            if one is request:
                self._leave(sequence)
        request.done = True

    def run(self) -> None:
        """Steps until all requests are done."""
        while self._waiting or self._running:
            self.step()

    def _admit(self) -> None:
        """In the order in which they came: a large request is not overtaken for ever."""
        taken = sum(one._room for one in self._running.values())
        while self._waiting and self._free and taken + self._waiting[0]._room <= self._pages:
            one = self._waiting.popleft()
            taken += one._room
            self._running[self._free.pop()] = one

    def _turns(self) -> list[Turn]:
        """Tokens of each sequence for the next step; of prompts a piece, and more while they have
        not more tokens in all."""
        turns: list[Turn] = []
        size = left = BATCH * self.model.ranks.stages
        for sequence, one in self._running.items():
            if one.tokens:
                turns.append((sequence, one.tokens[-1:]))
                continue
            piece = one.prompt[one._read : one._read + size]
            if piece and len(piece) <= left:
                turns.append((sequence, piece))
                left -= len(piece)
        return turns

    def _leave(self, sequence: int) -> None:
        del self._running[sequence]
        self.cache.truncate(0, sequence)
        self._free.append(sequence)

"""Keys and values of tokens that were seen before: a cache that is quantized as it grows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from kernelgen.api_attention import attention
from kernelgen.api_blocks import blocks_of
from kernelgen.errors import ShapeError
from kernelgen.ir import formats
from kernelgen.ir.block import BlockFormat
from kernelgen.quantizer import nearest
from kernelgen.targets.driver import Held
from kernelgen.tensor import QuantTensor, quantize

Array = npt.NDArray[Any]

#: formats that are elements as numpy has them
_PLAIN: dict[str, npt.DTypeLike] = {"f16": np.float16, "f32": np.float32}


class KVCache:
    """Keys and values of `batches` sequences, each of its own length, in block formats.

    heads         of keys and values
    head_dim      elements of a key, `value_dim` of a value (by default as many)
    capacity      tokens that a sequence may have
    format        of keys, `value_format` of values (by default the same)
    page          tokens of a page.  With pages, sequences take them from a pool as they grow
                  (Kwon et al., 2023), and memory is `pool` pages in all, by default enough for
                  all sequences at full length; without, each has room for `capacity` tokens
    search        whether to search for scales of least error, as `kernelgen.quantize` does, which
                  takes 30 times as long; where a format lacks the simple rule of
                  `kernelgen.round_to_nearest`, that is always so

    `keys`, `values`, `lengths` (int32, one a sequence) and `pages` (int32 (batches, pages of a
    sequence), or None) are what `kernelgen.attention` takes.  Copies on devices follow each
    change.  A cache is for one thread at a time.

    Raises ShapeError where sizes contradict each other, FormatError where a format does not fit.
    """

    def __init__(
        self,
        heads: int,
        head_dim: int,
        *,
        capacity: int,
        batches: int = 1,
        format: str | BlockFormat = "f16",
        value_format: str | BlockFormat | None = None,
        value_dim: int | None = None,
        page: int = 0,
        pool: int | None = None,
        search: bool = False,
    ) -> None:
        if min(heads, head_dim, capacity, batches) < 1 or page < 0:
            raise ShapeError(
                f"a cache of {batches} x {capacity} tokens of {heads} heads of {head_dim} elements"
                f" in pages of {page} was asked for; all but the page, which may be 0, are positive"
            )
        of_key = format if isinstance(format, BlockFormat) else formats.get(format)
        given = value_format or of_key
        of_value = given if isinstance(given, BlockFormat) else formats.get(given)
        each = -(-capacity // page) if page else 0
        if page:
            count = batches * each if pool is None else pool
            outer = (count, heads, page)
        else:
            outer = (batches, heads, capacity)
        self.lengths: npt.NDArray[np.int32] = np.zeros(batches, np.int32)
        self.pages: npt.NDArray[np.int32] | None = None
        self._capacity, self._page = capacity, page
        self._free = list(range(outer[0]))[::-1] if page else []
        if page:
            self.pages = np.zeros((batches, each), np.int32)
        self._search = tuple(
            search or (not fmt.float_codes and nearest.lacks_rule(fmt) is not None)
            for fmt in (of_key, of_value)
        )
        self._bytes, self._tensors = [], []
        for fmt, elements in ((of_key, head_dim), (of_value, value_dim or head_dim)):
            self._bytes.append(np.zeros((*outer, fmt.row_bytes(elements)), np.uint8))
            self._tensors.append(QuantTensor(fmt, (*outer, elements), self._bytes[-1]))

    @property
    def keys(self) -> QuantTensor:
        """(batches, heads, capacity, head_dim), or (pool, heads, page, head_dim)."""
        return self._tensors[0]

    @property
    def values(self) -> QuantTensor:
        """The same of values."""
        return self._tensors[1]

    @property
    def nbytes(self) -> int:
        """Bytes of all blocks, used or not."""
        return sum(w.nbytes for w in self._tensors)

    @property
    def free_pages(self) -> int:
        """Pages of the pool that no sequence has."""
        return len(self._free)

    def append(
        self,
        k: Array,
        v: Array,
        batches: Iterable[int] | None = None,
        *,
        target: str | None = None,
    ) -> None:
        """Quantize and keep the keys and values of new tokens.

        k, v     floats (n, heads, T, elements): T tokens for each of n sequences
        batches  which sequences; by default all, in their order
        target   whose kernel quantizes; by default the best here

        Raises ShapeError, and keeps nothing, where shapes do not fit, or there is no room.
        """
        which = list(range(len(self.lengths)) if batches is None else batches)
        for x, w, what in ((k, self.keys, "k"), (v, self.values, "v")):
            want = (len(which), w.shape[1], k.shape[2] if k.ndim == 4 else -1, w.shape[3])
            if x.shape != want:
                raise ShapeError(
                    f"{what} of shape {x.shape} was given for {len(which)} sequences; it is"
                    f" (sequences, {w.shape[1]} heads, tokens, {w.shape[3]} elements), tokens as"
                    " many in k as in v"
                )
        rows = self._blocks(k, v, target)
        count = k.shape[2]
        self._make_room(which, count)
        for data, place, w in zip(rows, self._bytes, self._tensors, strict=True):
            self._write(which, data, place, w)
        self.lengths[which] += count

    def appender(
        self, k: Array, v: Array, *, target: str | None = None
    ) -> Callable[[Sequence[int]], None]:
        """A function of n sequences that appends a token to each, from what k and v (n, heads, 1,
        elements) hold by then: `append` for many steps, of which `check_room` says before that
        there is room."""
        names = [w.format.name for w in self._tensors]
        if not all(name in _PLAIN for name in names) or k.shape[2] != 1:
            return lambda batches: self.append(k, v, batches, target=target)
        places = [place.view(_PLAIN[n]) for place, n in zip(self._bytes, names, strict=True)]

        def append(batches: Sequence[int]) -> None:
            if any(w.prepared for w in self._tensors):  # copies, which have to follow
                self.append(k, v, batches, target=target)
                return
            for n, b in enumerate(batches):
                at = int(self.lengths[b])
                row = b
                if self.pages is not None:
                    number, at = divmod(at, self._page)
                    if not at:
                        self.pages[b, number] = self._free.pop()
                    row = self.pages[b, number]
                places[0][row, :, at] = k[n, :, 0]
                places[1][row, :, at] = v[n, :, 0]
                self.lengths[b] += 1

        return append

    def _blocks(self, k: Array, v: Array, target: str | None) -> list[Array]:
        """Both as blocks; at once where they are alike, as a few rows cost little more than one."""
        if self.keys.format is self.values.format and k.shape == v.shape:
            both = np.empty((2, *k.shape), np.float32)
            both[0], both[1] = k, v
            return [*self._made(both, 0, target)]
        given = [np.ascontiguousarray(x, np.float32) for x in (k, v)]
        return [self._made(x, n, target) for n, x in enumerate(given)]

    def _made(self, x: Array, which: int, target: str | None) -> Array:
        """The blocks of keys (0) or of values (1)."""
        fmt = self._tensors[which].format
        if self._search[which]:
            return quantize(x, fmt).data
        return blocks_of(x, fmt, target)

    def check_room(self, batches: Sequence[int], counts: Sequence[int]) -> None:
        """Raises ShapeError where so many more tokens of each of some sequences do not fit."""
        known = range(len(self.lengths))
        if len(set(batches)) < len(batches) or not all(b in known for b in batches):
            raise ShapeError(
                f"sequences {batches} were named; each is at most once, from 0 to {known[-1]}"
            )
        lengths = [int(self.lengths[b]) for b in batches]
        longest = max((has + more for has, more in zip(lengths, counts, strict=True)), default=0)
        if longest > self._capacity:
            raise ShapeError(
                f"{longest} tokens of a sequence do not fit a cache for {self._capacity}; make it"
                " larger, or truncate the sequence"
            )
        if self.pages is None:
            return
        missing = sum(
            -(-(has + more) // self._page) - -(-has // self._page)
            for has, more in zip(lengths, counts, strict=True)
        )
        if missing > len(self._free):
            raise ShapeError(
                f"{missing} more pages are needed, and {len(self._free)} are free; truncate"
                " sequences that have ended, or make the pool larger"
            )

    def _make_room(self, which: list[int], count: int) -> None:
        """Pages for `count` more tokens of some sequences, or ShapeError."""
        self.check_room(which, [count] * len(which))
        if self.pages is None:
            return
        has = {b: -(-int(self.lengths[b]) // self._page) for b in which}
        wants = {b: -(-(int(self.lengths[b]) + count) // self._page) for b in which}
        for b in which:
            for n in range(has[b], wants[b]):
                self.pages[b, n] = self._free.pop()

    def _write(self, which: list[int], rows: Array, place: Array, w: QuantTensor) -> None:
        """Blocks (n, heads, T, bytes) of some sequences behind those they have, on all devices."""
        count = rows.shape[2]
        at = self.lengths[which][:, None] + np.arange(count)
        outer = np.array(which, int)[:, None]
        if self.pages is not None:
            outer, at = self.pages[outer, at // self._page], at % self._page
        place[outer, :, at] = rows.swapaxes(1, 2)
        for key, copy in tuple(w.prepared.items()):
            if not isinstance(copy, Held):  # of another op; made again when it is wanted
                del w.prepared[key]
                continue
            for n, b in enumerate(which):
                for first, some in self._runs(int(self.lengths[b]), count):
                    start, batch = int(at[n, first]), outer[n, first if self._page else 0]
                    copy.renew(place, int(batch), slice(start, start + some))

    def _runs(self, start: int, count: int) -> Iterator[tuple[int, int]]:
        """Of `count` tokens from a place on, those that lie side by side: the first, how many."""
        done = 0
        while done < count:
            room = self._page - (start + done) % self._page if self._page else count
            some = min(count - done, room)
            yield done, some
            done += some

    def truncate(self, length: int = 0, batch: int | None = None) -> None:
        """Forget all but the first `length` tokens of a sequence, or of all."""
        for b in range(len(self.lengths)) if batch is None else (batch,):
            if not 0 <= length <= self.lengths[b]:
                raise ShapeError(
                    f"sequence {b} was to be cut to {length} tokens; it has {self.lengths[b]}"
                )
            if self.pages is not None:
                has, keeps = (-(-int(n) // self._page) for n in (self.lengths[b], length))
                self._free += [int(n) for n in self.pages[b, keeps:has][::-1]]
            self.lengths[b] = length

    def attention(self, q: Array, **options: Any) -> Array:
        """`kernelgen.attention` of q (batches, H, T, head_dim) over all that is kept: the last of
        the T queries stands at the last token."""
        found: Array = attention(
            q, self.keys, self.values, lengths=self.lengths, pages=self.pages, **options
        )
        return found

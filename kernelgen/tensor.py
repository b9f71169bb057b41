"""A quantized tensor: the bytes of its blocks, their format, and the shape they stand for."""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Any, SupportsIndex

import numpy as np
import numpy.typing as npt

from kernelgen.errors import FormatError, ShapeError
from kernelgen.ir import formats
from kernelgen.ir.block import BlockFormat

Array = npt.NDArray[Any]


class QuantTensor:
    """Weights in a block format, as they lie in a file.

    format  name of a format in any case, or a `BlockFormat`
    shape   elements: (N, K) for a matrix, (E, N, K) for a stack of them, (K,) for a vector; K is
            the innermost, which the blocks run along, and a multiple of the format's block
    data    uint8, the bytes of the blocks in C order, in an array of any shape with the right
            size; memory maps and other contiguous arrays are not copied
    name    what a file calls it, for people
    columns  int32 (K,), a permutation of 0 ... K-1, where columns are stored in another order:
            column j of the blocks is column columns[j] of the matrix (GPTQ's act-order)

    Its data is read-only: targets keep repacked copies of it.  `w[n]` and `w[a:b]` are tensors
    that share the data; `cut_columns` gives one of some columns.  Tensors are equal when format,
    shape and bytes are.

    Raises FormatError for an unknown format or a K it cannot hold, ShapeError for any other
    contradiction between shape and data.
    """

    __slots__ = ("__weakref__", "_columns", "_data", "_format", "_prepared", "_shape", "name")

    name: str | None

    def __init__(
        self,
        format: str | BlockFormat,
        shape: Iterable[int],
        data: Array,
        name: str | None = None,
        columns: npt.ArrayLike | None = None,
    ) -> None:
        self._format = fmt = _as_format(format)
        self._shape = _as_shape(fmt, shape)
        self._columns = None if columns is None else _as_columns(columns, self._shape[-1])
        self.name = name
        if not isinstance(data, np.ndarray) or data.dtype != np.uint8:
            seen = data.dtype if isinstance(data, np.ndarray) else type(data).__name__
            raise ShapeError(
                f"the data of a {fmt.name} tensor is a numpy array of uint8, the bytes of its"
                f" blocks, not {seen}; floats are turned into blocks by kernelgen.quantize"
            )
        rows, row_bytes = math.prod(self._shape[:-1]), fmt.row_bytes(self._shape[-1])
        if data.size != rows * row_bytes:
            raise ShapeError(
                f"a {fmt.name} tensor of shape {_times(self._shape)} takes {rows} x {row_bytes} ="
                f" {rows * row_bytes} bytes, but its data has {data.size}; check shape and format"
            )
        # the plain view drops numpy's memmap class, whose every slice is slow, not the mapping
        self._data: npt.NDArray[np.uint8] = (
            np.ascontiguousarray(data).view(np.ndarray).reshape(*self._shape[:-1], row_bytes)
        )
        self._data.flags.writeable = False
        #: repacked copies, kept here by targets under keys of their own
        self._prepared: dict[Hashable, Any] = {}

    @property
    def format(self) -> BlockFormat:
        """The format of the blocks."""
        return self._format

    @property
    def shape(self) -> tuple[int, ...]:
        """Elements along each dimension; the blocks run along the last."""
        return self._shape

    @property
    def data(self) -> npt.NDArray[np.uint8]:
        """The bytes, uint8 (..., row_bytes), contiguous and read-only."""
        return self._data

    @property
    def columns(self) -> npt.NDArray[np.int32] | None:
        """Which column of the matrix each stored column is, (K,), read-only; None: in order."""
        return self._columns

    @property
    def prepared(self) -> dict[Hashable, Any]:
        """Copies that targets repacked or uploaded, under keys of their own."""
        return self._prepared

    @property
    def rows(self) -> int:
        """Rows of K elements: the product of all dimensions but the last."""
        return math.prod(self._shape[:-1])

    @property
    def nbytes(self) -> int:
        """Bytes of all blocks."""
        return int(self._data.nbytes)

    @property
    def bits(self) -> float:
        """Bits per element, scales included."""
        return self._format.bits

    def dequantize(self, rows: Any = None) -> npt.NDArray[np.float32]:
        """The values, float32, in an array of their own.

        Without `rows`, of the tensor's shape.  With `rows`, a number, a slice or integers of
        shape S that count the rows of K elements (through all leading dimensions), only those
        rows: (K,), (n, K) or (*S, K).
        """
        fmt, k = self._format, self._shape[-1]
        picked = self._data
        if rows is not None:
            picked = self._pick(rows)
        blocks = picked.reshape(*picked.shape[:-1], k // fmt.block, fmt.nbytes)
        return self.in_order(fmt.decode(blocks).reshape(*picked.shape[:-1], k))

    def in_order(self, values: Array) -> Array:
        """Values (..., K) of stored columns, in the order of the matrix; itself where that is the
        same."""
        if self._columns is None:
            return values
        placed = np.empty_like(values)
        placed[..., self._columns] = values
        return placed

    def row(self, n: SupportsIndex) -> QuantTensor:
        """Row n, a tensor of shape (K,) that shares the data.

        Rows are counted through all leading dimensions; negative n counts from the end.
        """
        at = _index(n, self.rows, "row", self)
        flat = self._data.reshape(self.rows, self._format.row_bytes(self._shape[-1]))
        return self._part(self._shape[-1:], flat[at])

    def _part(self, shape: tuple[int, ...], data: Array) -> QuantTensor:
        return QuantTensor(self._format, shape, data, columns=self._columns)

    def __getitem__(self, key: SupportsIndex | slice) -> QuantTensor:
        """`w[n]`, or rows `w[a:b]`, along the first dimension; shares the data."""
        if len(self._shape) == 1:
            raise ShapeError(
                f"{self!r} is one row, and blocks are not cut; dequantize() it to index elements"
            )
        if isinstance(key, slice):
            start, stop, step = key.indices(len(self))
            if step != 1:
                raise ShapeError(
                    f"{self!r} was sliced in steps of {step}; rows are shared only in steps of 1:"
                    " dequantize(slice) takes any"
                )
            shape = (max(0, stop - start), *self._shape[1:])
            return self._part(shape, self._data[start:stop])
        at = _index(key, len(self), "index", self)
        return self._part(self._shape[1:], self._data[at])

    def cut_columns(self, start: int, stop: int) -> QuantTensor:
        """Columns start ... stop - 1 of all rows, a tensor (..., stop - start) of its own bytes;
        itself where these are all.

        Raises ShapeError where the cut is not between blocks, or where the blocks have another
        order than the columns.
        """
        block, k = self._format.block, self._shape[-1]
        if (start, stop) == (0, k):
            return self
        if self._columns is not None:
            raise ShapeError(
                f"columns {start} to {stop} of {self!r} were asked for; its blocks hold columns in"
                " another order, so only rows of it can be cut"
            )
        if not 0 <= start < stop <= k or start % block or stop % block:
            raise ShapeError(
                f"columns {start} to {stop} of {self!r} were asked for; a cut is between blocks,"
                f" at multiples of {block} from 0 to {k}"
            )
        blocks = self._data.reshape(*self._shape[:-1], k // block, self._format.nbytes)
        return QuantTensor(
            self._format, (*self._shape[:-1], stop - start),
            blocks[..., start // block : stop // block, :], self.name,
        )  # fmt: skip

    def __len__(self) -> int:
        return self._shape[0]

    def __iter__(self) -> Iterator[QuantTensor]:
        return (self[n] for n in range(len(self)))

    def save(self, path: str | os.PathLike[str], name: str | None = None) -> None:
        """Write a GGUF file that holds this tensor alone; an existing file is replaced at once.

        `name` is the tensor's name there: its own by default, or "weight" where it has none.
        Raises FileError where it cannot be written, FormatError where ggml has no such format.
        """
        from kernelgen import gguf_files  # it stands above this module

        gguf_files.save(path, {name or self.name or "weight": self})

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        if copy is False:
            raise ValueError("a QuantTensor has no floats to share; leave out copy=False")
        return self.dequantize().astype(dtype or np.float32, copy=False)

    # x @ w would dequantize, and multiply by the transpose of what a weight matrix means
    __array_ufunc__ = None

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, QuantTensor):
            return NotImplemented
        return (
            self._format is other._format
            and self._shape == other._shape
            and _same(self._columns, other._columns)
            and bool(np.array_equal(self._data, other._data))
        )

    __hash__ = None  # type: ignore[assignment]

    def __reduce__(self) -> tuple[Any, ...]:
        return QuantTensor, (self._format, self._shape, self._data, self.name, self._columns)

    def __repr__(self) -> str:
        name = "" if self.name is None else f"{self.name!r}, "
        size = human_bytes(self.nbytes)
        return f"QuantTensor({name}{self._format.name}, {_times(self._shape)}, {size})"

    def _pick(self, rows: Any) -> Array:
        """Bytes of the rows that `rows` names, uint8 (..., row_bytes)."""
        flat = self._data.reshape(self.rows, self._format.row_bytes(self._shape[-1]))
        if isinstance(rows, slice):
            return flat[rows]
        wanted = np.asarray(rows)
        if wanted.size and wanted.dtype.kind not in "iu":
            raise ShapeError(
                f"rows of {self!r} were asked for by {wanted.dtype}; name them by integers or a"
                " slice"
            )
        if wanted.size:
            for extreme in (wanted.min(), wanted.max()):
                _index(extreme, self.rows, "row", self)
        picked: Array = flat[wanted.astype(np.intp)]
        return picked


def quantize(
    x: npt.ArrayLike,
    fmt: str | BlockFormat,
    importance: npt.ArrayLike | None = None,
    progress: Callable[[int, int], None] | None = None,
    threads: int | None = None,
    scale: str = "best",
) -> QuantTensor:
    """`x`, floats (..., K), in format `fmt`: a tensor of the same shape.

    importance  float (K,), the weight of each column's squared error; all equal by default
    progress    called with (rows done, all rows) now and then
    threads     threads to use; one per CPU by default
    scale       "best": scales of least error; "ocp": those of OCP Microscaling Formats v1.0, for
                formats that share a power of two, whose bits have to be those of others

    Raises FormatError where K is not a multiple of the format's block or the format has no such
    scales, ShapeError where x or importance is empty, not of floats, or not finite (see
    kernelgen.quantizer.quantize).
    """
    from kernelgen import quantizer  # only those who quantize pay for its import

    target = _as_format(fmt)
    values = np.asarray(x)
    shape = _as_shape(target, values.shape)
    data = quantizer.quantize(
        values, target, importance=importance, progress=progress, threads=threads, scale=scale
    )
    return QuantTensor(target, shape, data)


def human_bytes(count: float) -> str:
    """A number of bytes for people: 144 B, 33.0 MB."""
    if count < 1000:
        return f"{count:.0f} B"
    for unit in ("kB", "MB", "GB"):
        count /= 1000
        if count < 999.95:
            return f"{count:.1f} {unit}"
    return f"{count / 1000:.1f} TB"


class _Together:
    """Matrices (N, K) of one format as one, for a product with all of them.

    The bytes are there only until `forget` is called, as targets keep repacked copies; read again
    they are made again.
    """

    __slots__ = ("__weakref__", "_data", "_parts", "_prepared", "_shape")

    #: columns are in order
    columns = None

    def __init__(self, parts: tuple[QuantTensor, ...], shape: tuple[int, ...]) -> None:
        self._parts, self._shape = parts, shape
        self._data: npt.NDArray[np.uint8] | None = None
        self._prepared: dict[Hashable, Any] = {}

    @property
    def format(self) -> BlockFormat:
        """The format of all."""
        return self._parts[0].format

    @property
    def shape(self) -> tuple[int, ...]:
        """(rows of all, K)."""
        return self._shape

    @property
    def data(self) -> npt.NDArray[np.uint8]:
        """The bytes, uint8 (rows of all, row_bytes)."""
        found = self._data  # which another thread may forget meanwhile
        if found is None:
            found = self._data = self._joined()
            found.flags.writeable = False
        return found

    def _joined(self) -> npt.NDArray[np.uint8]:
        raise NotImplementedError

    @property
    def prepared(self) -> dict[Hashable, Any]:
        """Copies that targets repacked or uploaded, under keys of their own."""
        return self._prepared

    def forget(self) -> None:
        """Free the bytes; what targets keep stays."""
        self._data = None


class Interleaved(_Together):
    """Two matrices (N, K) of one format as one, for a gated product: `apart` rows of the first, as
    many of the second, and so on; rows of zero bytes fill up the last ones."""

    __slots__ = ("_apart",)

    def __init__(self, first: QuantTensor, second: QuantTensor, apart: int = 1) -> None:
        if first.format is not second.format or first.shape != second.shape:
            raise ShapeError(
                f"{first.format.name} {_times(first.shape)} and {second.format.name}"
                f" {_times(second.shape)} were given; gate and up have one format and one shape"
            )
        if len(first.shape) != 2:
            raise ShapeError(f"gate and up are matrices (N, K), not of shape {first.shape}")
        self._apart = apart
        n, k = first.shape
        super().__init__((first, second), (-(-n // apart) * 2 * apart, k))

    def _joined(self) -> npt.NDArray[np.uint8]:
        apart, (n, row_bytes) = self._apart, self._parts[0].data.shape
        whole = n // apart
        parts = np.zeros((self._shape[0] // (2 * apart), 2, apart, row_bytes), np.uint8)
        for which, one in enumerate(self._parts):
            parts[:whole, which] = one.data[: whole * apart].reshape(whole, apart, row_bytes)
            parts[whole:, which, : n - whole * apart] = one.data[whole * apart :]
        return parts.reshape(-1, row_bytes)


class Stacked(_Together):
    """Matrices (N, K) of one format and one K as one that has the rows of the first, then those of
    the second, and so on."""

    __slots__ = ()

    def __init__(self, *parts: QuantTensor) -> None:
        first = parts[0]
        for one in parts:
            fits = len(one.shape) == 2 and one.shape[1] == first.shape[-1]
            if not fits or one.format is not first.format or one.columns is not None:
                raise ShapeError(
                    f"{first!r} and {one!r} were to be stacked; they are matrices of one format"
                    " with as many columns, in order"
                )
        super().__init__(parts, (sum(one.shape[0] for one in parts), first.shape[1]))

    def _joined(self) -> npt.NDArray[np.uint8]:
        return np.concatenate([one.data for one in self._parts])


def _times(shape: Iterable[int]) -> str:
    return " x ".join(map(str, shape))


def _as_format(given: object) -> BlockFormat:
    if isinstance(given, BlockFormat):
        return given
    if isinstance(given, str):
        return formats.get(given)
    raise FormatError(
        f"a format is given by its name or as a BlockFormat, not as {type(given).__name__}"
    )


def _as_shape(fmt: BlockFormat, given: object) -> tuple[int, ...]:
    """`given` as a shape that `fmt` can hold."""
    try:
        shape = tuple(operator.index(size) for size in given)  # type: ignore[attr-defined]
    except TypeError:
        raise ShapeError(
            f"the shape of a {fmt.name} tensor is a tuple of integers such as (4096, 256), not"
            f" {given!r}"
        ) from None
    if not shape:
        raise ShapeError(
            f"a {fmt.name} tensor needs a dimension for its blocks to run along, and shape () has"
            " none; use (K,)"
        )
    if min(shape) < 0:
        raise ShapeError(f"the shape of a {fmt.name} tensor was given as {shape}; sizes are >= 0")
    fmt.row_bytes(shape[-1])
    return shape


def _as_columns(given: npt.ArrayLike, k: int) -> npt.NDArray[np.int32]:
    """`given` as a permutation of k columns."""
    array = np.asarray(given)
    whole = array.dtype.kind in "iu" and array.shape == (k,)
    if not whole or not np.array_equal(np.sort(array), np.arange(k)):
        raise ShapeError(
            f"columns are a permutation of 0 ... {k - 1}, integers ({k},), and this array of"
            f" {array.dtype} {array.shape} is none"
        )
    columns = array.astype(np.int32)
    columns.flags.writeable = False
    return columns


def _same(a: Array | None, b: Array | None) -> bool:
    if a is None or b is None:
        return a is b
    return bool(np.array_equal(a, b))


def _index(given: Any, count: int, what: str, tensor: QuantTensor) -> int:
    """`given` as a number in 0..count-1, counted from the end where negative."""
    try:
        at = operator.index(given)
    except TypeError:
        raise ShapeError(
            f"{tensor!r} was indexed by {type(given).__name__}; use an integer or a slice"
        ) from None
    if not -count <= at < count:
        raise ShapeError(f"{what} {at} of {tensor!r} was asked for; it has {count}")
    return at % count

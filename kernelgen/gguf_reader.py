"""gguf.GGUFReader, guarded against files that are not what they say.

The package's reader trusts the file: past the end numpy slices are merely short, so a damaged
count makes it loop for hours, a truncated string passes as a shorter one, and one tensor of a type
that is newer than the package hides all others.  It also makes an array of every element of every
array, which takes 9 seconds for a vocabulary of 128 000 tokens.  The methods it is made of are
replaced here where that matters: every read is checked against the end of the file, arrays are
read in one piece, and tensors are left to kernelgen.gguf_files to judge.

Importing this module imports gguf, which takes 0.1 s: do it where a file is opened.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from typing import Any, Literal

import gguf
import numpy as np
import numpy.typing as npt
from gguf.gguf_reader import ReaderField

from kernelgen.errors import FileError

#: methods of gguf.GGUFReader that are replaced here, and must exist for the guards to hold
_GUARDED = ("_get", "_get_field_parts", "_get_tensor_info_field", "_build_tensors")

#: names that the reader adds to the metadata of the file
_ADDED = ("GGUF.version", "GGUF.tensor_count", "GGUF.kv_count")

#: elements of all lists in the metadata of a file; a vocabulary with its merges has a million
_MAX_LISTED = 1 << 23

_LENGTH = struct.Struct("<Q")


class DamagedError(Exception):
    """What in a file contradicts itself, as the end of a sentence."""


@dataclass(frozen=True)
class TensorInfo:
    """What the header says of a tensor, none of it checked: dims has the innermost first, `start`
    is the byte of the file that its data begins at."""

    name: str
    dims: tuple[int, ...]
    type_number: int
    start: int


class GuardedReader(gguf.GGUFReader):
    """Reads the header of a little-endian GGUF file of version 2 or 3, and maps all of it.

    infos  what the header says of the tensors, in its order
    Raises DamagedError, and whatever the package raises.
    """

    infos: list[TensorInfo]

    def __init__(self, path: str | os.PathLike[str]) -> None:
        missing = [name for name in _GUARDED if not hasattr(gguf.GGUFReader, name)]
        if missing:
            raise FileError(
                f"the installed gguf package has no GGUFReader.{missing[0]}, which kernelgen"
                " guards against damaged files; install gguf 0.18 or 0.19"
            )
        self._names: set[str] = set()
        self._listed = 0
        super().__init__(path)

    def _get(
        self,
        offset: int,
        dtype: npt.DTypeLike,
        count: int = 1,
        override_order: Literal["I", "S", "<"] | None = None,
    ) -> npt.NDArray[Any]:
        end = int(offset) + np.dtype(dtype).itemsize * int(count)
        self._check_end(end)
        return super()._get(offset, dtype, count, override_order)

    def _check_end(self, end: int) -> None:
        if end > len(self.data):
            raise DamagedError(
                f"its header runs to byte {end}, but the file ends at {len(self.data)}"
            )

    def _get_field_parts(
        self, orig_offs: int, raw_type: int
    ) -> tuple[int, list[Any], list[int], list[gguf.GGUFValueType]]:
        kind = gguf.GGUFValueType(int(raw_type))
        if kind is not gguf.GGUFValueType.ARRAY:
            return super()._get_field_parts(orig_offs, raw_type)
        head = [self._get(orig_offs, np.uint32), self._get(orig_offs + 4, np.uint64)]
        item, count = gguf.GGUFValueType(int(head[0][0])), int(head[1][0])
        offset = orig_offs + 12
        # in a large file a wrong count need not run beyond the end
        self._listed += count
        if self._listed > _MAX_LISTED:
            raise DamagedError(
                f"its metadata claims lists of {self._listed} elements, and kernelgen reads"
                f" {_MAX_LISTED}"
            )
        if item is gguf.GGUFValueType.ARRAY:
            return super()._get_field_parts(orig_offs, raw_type)
        if item is gguf.GGUFValueType.STRING:
            strings, end = self._strings(offset, count)
            parts = [*head, *strings]
            return end - orig_offs, parts, list(range(2, len(parts))), [kind, item]
        items = self._get(offset, self.gguf_scalar_to_np[item], count)
        return 12 + int(items.nbytes), [*head, items], [2], [kind, item]

    def _strings(self, offset: int, count: int) -> tuple[list[memoryview], int]:
        """`count` strings that begin at `offset`, and where they end."""
        self._check_end(offset + _LENGTH.size * count)
        whole = self.data.data
        found = []
        for _ in range(count):
            self._check_end(offset + _LENGTH.size)
            start = offset + _LENGTH.size
            offset = start + _LENGTH.unpack_from(whole, offset)[0]
            self._check_end(offset)
            found.append(whole[start:offset])
        return found, offset

    def _get_tensor_info_field(self, orig_offs: int) -> ReaderField:
        field = super()._get_tensor_info_field(orig_offs)
        # at once, not after the last: a count that is wrong reads the same zeros again and again
        if field.name in self._names:
            raise DamagedError(f"it has two tensors named {field.name!r}")
        self._names.add(field.name)
        return field

    def _build_tensors(self, start_offs: int, fields: list[ReaderField]) -> None:
        start = int(start_offs)
        self.infos = []
        for field in fields:
            _, _, _, dims, type_number, offset = field.parts
            at = int(offset[0])
            if at % int(self.alignment):
                raise DamagedError(
                    f"tensor {field.name!r} begins at offset {at}, not a multiple of the file's"
                    f" alignment {self.alignment}"
                )
            dimensions = tuple(int(size) for size in dims)
            info = TensorInfo(field.name, dimensions, int(type_number[0]), start + at)
            self.infos.append(info)

    def metadata(self) -> tuple[dict[str, Any], dict[str, str]]:
        """The metadata as plain values, and the types the file gives them: uint32, or
        array[string].  Arrays of arrays come flattened, strings that are not UTF-8 as bytes."""
        values: dict[str, Any] = {}
        types: dict[str, str] = {}
        for name, field in self.fields.items():
            if name in _ADDED:
                continue
            item = field.types[-1]
            if item is gguf.GGUFValueType.STRING:
                found: list[Any] = [_text(field.parts[at].tobytes()) for at in field.data]
            else:
                found = [value for at in field.data for value in field.parts[at].tolist()]
            is_array = field.types[0] is gguf.GGUFValueType.ARRAY
            values[name] = found if is_array else found[0]
            types[name] = f"array[{item.name.lower()}]" if is_array else item.name.lower()
        return values, types


def _text(raw: bytes) -> str | bytes:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return raw

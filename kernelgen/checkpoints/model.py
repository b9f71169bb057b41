"""A checkpoint as a mapping of tensors."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from kernelgen.checkpoints.groups import Stored
from kernelgen.errors import FileError, FormatError
from kernelgen.tensor import QuantTensor, human_bytes


class _NoTensorError(FileError, KeyError):
    """A name that the checkpoint does not have."""

    __str__ = Exception.__str__


class Checkpoint(Mapping[str, QuantTensor]):
    """The tensors of safetensors files by name.

    Float tensors are memory-mapped.  Quantized ones are turned into blocks when first asked for,
    and kept.  The files must not be truncated meanwhile.

    path      the file or folder
    metadata  config.json, and what the files say of themselves
    skipped   name -> in what the tensors are that kernelgen does not read; asking for one is a
              FormatError
    """

    def __init__(self, path: Path, stored: Iterable[Stored], metadata: Mapping[str, Any]) -> None:
        self.path = path
        self.metadata = dict(metadata)
        self._stored = {one.name: one for one in stored if one.skipped is None}
        self.skipped = {one.name: one.skipped for one in stored if one.skipped is not None}
        self._made: dict[str, QuantTensor] = {}

    @property
    def architecture(self) -> str:
        """What config.json calls it, such as "llama"; empty where it says nothing."""
        return str(self.metadata.get("model_type", ""))

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors as blocks, without the skipped."""
        return sum(nbytes for *_, nbytes in self.listing())

    def listing(self) -> Iterator[tuple[str, tuple[int, ...], str, int]]:
        """Name, shape, format and bytes of each tensor; reads scales, not weights."""
        for one in self._stored.values():
            fmt = one.format()
            rows = 1
            for size in one.shape[:-1]:
                rows *= size
            yield one.name, one.shape, fmt.name, rows * fmt.row_bytes(one.shape[-1])

    def __getitem__(self, name: str) -> QuantTensor:
        made = self._made.get(name)
        if made is not None:
            return made
        if name in self._stored:
            return self._made.setdefault(name, self._stored[name].tensor())
        if name in self.skipped:
            raise FormatError(
                f"tensor {name!r} of {self.path} is in {self.skipped[name]}, which kernelgen does"
                " not read; docs/formats-in-planes.md says what it reads"
            )
        close = difflib.get_close_matches(str(name), self._stored, 1)
        hint = f"did you mean {close[0]!r}?" if close else "list(model) names all"
        raise _NoTensorError(f"{self.path} has no tensor {name!r} among its {len(self)}; {hint}")

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)

    def __contains__(self, name: object) -> bool:
        return name in self._stored

    def __repr__(self) -> str:
        kind, size = self.architecture or "no architecture", human_bytes(self.nbytes)
        return f"{self.path}: {kind}, {len(self)} tensors, {size}"

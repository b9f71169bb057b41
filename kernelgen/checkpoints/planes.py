"""Safetensors files: their tensors by name, memory-mapped, of one file or of a folder of shards.

The `safetensors` package judges a file's header; the data is mapped here, as the package copies it
and has no arrays of bfloat16 or eight-bit floats.
"""

from __future__ import annotations

import difflib
import json
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kernelgen.errors import FileError

Array = npt.NDArray[Any]

INDEX = "model.safetensors.index.json"

#: numpy's dtype for those that it has; others are read as bytes
_DTYPES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1",
    "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "u1", "BOOL": "?",
}  # fmt: skip

_AGAIN = "download or copy it again"


@dataclass(frozen=True)
class Plane:
    """A tensor of a file.

    dtype  as safetensors names it: F16, BF16, F8_E4M3, I32, ...
    raw    its bytes, uint8, mapped
    """

    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    raw: npt.NDArray[np.uint8]

    def array(self) -> Array:
        """Its elements, of numpy's type, in its shape; of types that numpy lacks the bytes or, for
        bfloat16, float32."""
        if self.dtype == "BF16":
            wide = self.raw.view("<u2").astype(np.uint32) << 16
            return wide.view(np.float32).reshape(self.shape)
        found = self.raw.view(_DTYPES.get(self.dtype, "u1"))
        return found.reshape(self.shape)

    def scales(self) -> Array:
        """Its floats as float16, where they are that, or else float32."""
        if self.dtype not in ("F16", "BF16", "F32"):
            raise self.error(f"is of {self.dtype}; scales are F16, BF16 or F32")
        return self.array()

    def must_be(self, dtypes: str, shape: Iterable[int] | None = None) -> Plane:
        """Itself, if it is of one of these types (names with spaces between) and this shape."""
        if self.dtype not in dtypes.split():
            raise self.error(
                f"is of {self.dtype}, where {dtypes.replace(' ', ' or ')} was expected"
            )
        if shape is not None and self.shape != tuple(shape):
            raise self.error(f"has shape {self.shape}, where {tuple(shape)} was expected")
        return self

    def error(self, what: str) -> FileError:
        """A FileError about this tensor."""
        return FileError(
            f"tensor {self.name!r} of {self.path} {what}; it does not fit the others of its layer,"
            " or the quantization config: check both, or convert the model again"
        )


class Planes(Mapping[str, Plane]):
    """The tensors of a checkpoint by name.

    path      the file or folder
    metadata  what the files say of themselves: text by name
    """

    def __init__(
        self, path: Path, planes: Mapping[str, Plane], metadata: Mapping[str, str]
    ) -> None:
        self.path, self.metadata = path, dict(metadata)
        self._planes = dict(planes)

    def __getitem__(self, name: str) -> Plane:
        return self._planes[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._planes)

    def __len__(self) -> int:
        return len(self._planes)

    def need(self, name: str, of: str) -> Plane:
        """The tensor that `of` needs; a FileError where it is missing."""
        found = self._planes.get(name)
        if found is None:
            close = difflib.get_close_matches(name, self._planes, 1)
            hint = f"; there is {close[0]!r}" if close else ""
            raise FileError(
                f"{self.path} has {of!r} but no {name!r}, which belongs to it{hint}: open the"
                f" folder with all files of the checkpoint, or {_AGAIN}"
            )
        return found

    def prefixes(self, suffix: str) -> list[str]:
        """Names that end in `suffix`, without it."""
        return [name.removesuffix(suffix) for name in self if name.endswith(suffix)]


def read_planes(path: Path) -> Planes:
    """The tensors of a .safetensors file, or of all such files of a folder."""
    if not path.is_dir():
        planes, metadata = _read_file(path)
        return Planes(path, planes, metadata)
    found: dict[str, Plane] = {}
    said: dict[str, str] = {}
    index, files = _shards(path)
    for file in files:
        planes, metadata = _read_file(file)
        twice = found.keys() & planes.keys()
        if twice:
            raise FileError(
                f"{file} has the tensor {min(twice)!r} that another file of {path} has, too; open"
                " one of them by itself"
            )
        found |= planes
        said |= metadata
    missing = index.keys() - found.keys()
    if missing:
        name = min(missing)
        raise FileError(
            f"{path / INDEX} says that {index[name]} has the tensor {name!r}, and it does not;"
            f" {_AGAIN}"
        )
    return Planes(path, found, said)


def _shards(folder: Path) -> tuple[dict[str, str], list[Path]]:
    """What the index says (tensor -> file), and the files."""
    at = folder / INDEX
    if at.exists():
        index = read_json(at).get("weight_map")
        if not isinstance(index, dict) or not all(isinstance(one, str) for one in index.values()):
            raise FileError(f"{at} has no weight_map of tensors to files; {_AGAIN}")
        names = sorted(set(index.values()))
        for name in names:
            if Path(name).name != name:
                raise FileError(f"{at} names {name!r}, which is no file beside it; {_AGAIN}")
        return index, [folder / name for name in names]
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileError(
            f"{folder} has no .safetensors files; name a folder that has, or a .gguf file"
        )
    return {}, files


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file."""
    try:
        found = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise FileError(f"{path} cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise FileError(f"{path} is not JSON ({error}); {_AGAIN}") from None
    if not isinstance(found, dict):
        raise FileError(f"{path} holds a JSON {type(found).__name__}, not an object; {_AGAIN}")
    return found


def _read_file(path: Path) -> tuple[dict[str, Plane], dict[str, str]]:
    try:
        import safetensors
    except ImportError as error:
        raise FileError(
            f"{path} is read by the safetensors package, which cannot be imported ({error}); run"
            " pip install safetensors"
        ) from error
    if path.exists() and not path.is_file():
        raise FileError(f"{path} is not a regular file; name a .safetensors file on disk")
    try:
        with safetensors.safe_open(path, framework="np"):
            pass  # the header is sound: all tensors lie in the file, and none on another
        data = np.memmap(path, np.uint8, "r").view(np.ndarray)
    except FileNotFoundError:
        raise FileError(
            f"{path} does not exist (looked for from {Path.cwd()}); check the path"
        ) from None
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise FileError(
            f"{path} cannot be read as a safetensors file ({' '.join(str(error).split())});"
            f" {_AGAIN}"
        ) from None
    (size,) = struct.unpack("<Q", data[:8].tobytes())
    header = json.loads(data[8 : 8 + size].tobytes())
    metadata = header.pop("__metadata__", None) or {}
    planes = {}
    for name, one in header.items():
        start, stop = (8 + size + at for at in one["data_offsets"])
        planes[name] = Plane(path, name, one["dtype"], tuple(one["shape"]), data[start:stop])
    return planes, metadata

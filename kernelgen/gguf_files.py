"""GGUF files: their tensors, memory-mapped, and writing them.

Reading and writing go through the `gguf` package, which is imported when a file is opened or
saved.  GGUF names dimensions from the innermost out; shapes here are numpy's, (N, K).
"""

from __future__ import annotations

import difflib
import importlib
import logging
import math
import os
import secrets
import stat
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from kernelgen.errors import FileError, FormatError, ShapeError
from kernelgen.ir import formats
from kernelgen.ir.block import BlockFormat
from kernelgen.tensor import QuantTensor, human_bytes

if TYPE_CHECKING:
    from kernelgen.gguf_reader import GuardedReader, TensorInfo

Array = npt.NDArray[Any]
PathLike = str | os.PathLike[str]

_log = logging.getLogger(__name__)

#: magic, version, counts of tensors and of metadata
_HEADER = struct.Struct("<4sIQQ")
#: bytes of the smallest tensor entry and the smallest metadata entry
_SMALLEST_TENSOR, _SMALLEST_KEY = 24, 13
#: ggml: GGML_MAX_DIMS, and GGML_MAX_NAME without its final zero
_MAX_DIMS, _MAX_NAME = 4, 63

_AGAIN = "download or copy it again"
#: formats of ggml's whose numbers the gguf package, of version 0.19, does not have
_NEWER = {42: "q2_0"}


class Metadata(dict[str, Any]):
    """A file's metadata, name -> str, int, float, bool or a list of one of these (bytes for a
    string that is not UTF-8).

    types  name -> the type it has in the file, such as "uint32" or "array[string]", so that a copy
           of the file keeps it; values without one get a type that fits
    """

    def __init__(
        self,
        values: Mapping[str, Any] | Iterable[tuple[str, Any]] = (),
        types: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(values)
        self.types: dict[str, str] = dict(types or {})

    def copy(self) -> Metadata:
        """A copy that keeps the types."""
        return Metadata(self, self.types)

    def __or__(self, other: Any) -> Any:
        if not isinstance(other, Mapping):
            return NotImplemented
        types = other.types if isinstance(other, Metadata) else {}
        return Metadata({**self, **other}, self.types | types)

    def __reduce__(self) -> tuple[Any, ...]:
        return Metadata, (dict(self), self.types)


class _NoTensorError(FileError, KeyError):
    """A name that the file does not have; a KeyError too, as for any mapping."""

    # KeyError would show the sentence in quotes
    __str__ = Exception.__str__


class Model(Mapping[str, QuantTensor]):
    """The tensors of a GGUF file by name, in the file's order, as memory maps.

    path      the file; it must not be truncated while its tensors are in use
    metadata  plain Python values by name
    skipped   name -> type name of the tensors whose type kernelgen does not know: they are not
              among the keys, and asking for one is a FormatError
    """

    def __init__(
        self,
        path: Path,
        tensors: Mapping[str, QuantTensor],
        metadata: Metadata,
        skipped: Mapping[str, str],
    ) -> None:
        self.path = path
        self.metadata = metadata
        self.skipped = dict(skipped)
        self._tensors = dict(tensors)

    @property
    def architecture(self) -> str:
        """What the file calls its architecture, such as "llama"; empty where it says nothing."""
        return str(self.metadata.get("general.architecture", ""))

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, without the skipped."""
        return sum(tensor.nbytes for tensor in self._tensors.values())

    def listing(self) -> Iterator[tuple[str, tuple[int, ...], str, int]]:
        """Name, shape, format and bytes of each tensor."""
        for name, w in self._tensors.items():
            yield name, w.shape, w.format.name, w.nbytes

    def __getitem__(self, name: str) -> QuantTensor:
        found = self._tensors.get(name)
        if found is not None:
            return found
        if name in self.skipped:
            known = ", ".join(fmt.name for fmt in formats.formats())
            raise FormatError(
                f"tensor {name!r} of {self.path} is in {self.skipped[name]}, which kernelgen does"
                f" not know; known are {known}; describe others with kernelgen.register_format and"
                " open the file again"
            )
        close = difflib.get_close_matches(str(name), self._tensors, 1)
        hint = f"did you mean {close[0]!r}?" if close else "list(model) names all"
        raise _NoTensorError(
            f"{self.path} has no tensor {name!r} among its {len(self) + len(self.skipped)}; {hint}"
        )

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __repr__(self) -> str:
        kind, size = self.architecture or "no architecture", human_bytes(self.nbytes)
        lines = [f"{self.path}: {kind}, {len(self)} tensors, {size}"]
        table = [
            (name, w.format.name, " x ".join(map(str, w.shape)), human_bytes(w.nbytes))
            for name, w in self._tensors.items()
        ]
        shown, tail = (table, []) if len(table) <= 40 else (table[:30], table[-5:])
        widths = [max(map(len, column)) for column in zip(*shown, *tail, strict=True)]
        for row in shown:
            lines.append(_aligned(row, widths))
        if tail:
            lines.append(f"  ... {len(table) - len(shown) - len(tail)} more")
        lines += [_aligned(row, widths) for row in tail]
        lines += [f"  {name}  {kind}, not known" for name, kind in [*self.skipped.items()][:10]]
        if len(self.skipped) > 10:
            lines.append(f"  ... {len(self.skipped) - 10} more not known")
        return "\n".join(lines)


def open(path: PathLike) -> Model:
    """The tensors of the GGUF file at `path`; nothing but its header is read.

    Raises FileError, in one sentence, for a file that is missing, truncated, damaged or not GGUF.
    Tensors of types kernelgen does not know are in `Model.skipped`.
    """
    where = Path(path)
    _check_start(where)
    reader_module = _import("kernelgen.gguf_reader")
    try:
        reader: GuardedReader = reader_module.GuardedReader(where)
        metadata = Metadata(*reader.metadata())
        tensors, skipped = _tensors(reader)
    except FileError:
        raise
    except reader_module.DamagedError as error:
        raise FileError(f"{where} is truncated or damaged: {error}; {_AGAIN}") from None
    except OSError as error:
        raise _os_error("cannot be read", where, error) from error
    # the package's reader meets a damaged header with whatever error comes first
    except (
        ValueError, LookupError, ArithmeticError, TypeError, RecursionError, MemoryError,
        struct.error,
    ) as error:  # fmt: skip
        seen = " ".join(str(error).split()) or type(error).__name__
        raise FileError(
            f"{where} is truncated or damaged: its header cannot be read ({seen}); {_AGAIN}"
        ) from error
    return Model(where, tensors, metadata, skipped)


def save(
    path: PathLike,
    tensors: Mapping[str, QuantTensor | Array],
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Write a GGUF file of these tensors; an existing file is replaced at once or stays as it is.

    tensors   name (at most 63 bytes) -> QuantTensor, or float32 or float16 array, of at most 4
              dimensions
    metadata  name -> str, int, float, bool, numpy scalar, or a list of one of these.  Types are
              those of a `Metadata`, else the scalar's own, else the first of uint32, int32, int64,
              uint64 that fits, and float32.  Empty lists, which the gguf package cannot write, are
              left out, with a warning.  "general.architecture" is "kernelgen" by default.

    Raises FileError where it cannot be written, FormatError for a format that ggml does not have,
    ShapeError for an array that is not of floats.
    """
    where = Path(path)
    gguf = _import("gguf")
    blocks = {name: _as_tensor(name, given) for name, given in tensors.items()}
    types = {name: _type_number(gguf, name, tensor.format) for name, tensor in blocks.items()}
    values = dict(metadata or {})
    architecture = values.pop("general.architecture", "") or "kernelgen"
    alignment = values.pop("general.alignment", None)
    if any(not tensor.format.float_codes for tensor in blocks.values()):
        values.setdefault("general.quantization_version", gguf.GGML_QUANT_VERSION)

    if where.is_dir():
        raise FileError(f"{where} is a folder; name a file in it to write a GGUF file")
    # through a link to the file it names, and in its folder, so that the rename stays on one disk
    final = Path(os.path.realpath(where))
    part = final.with_name(f".kernelgen-{secrets.token_hex(8)}.part")
    try:
        writer = gguf.GGUFWriter(part, str(architecture))
        try:
            if alignment is not None:
                writer.add_custom_alignment(alignment)
            recorded = metadata.types if isinstance(metadata, Metadata) else {}
            for name, value in values.items():
                _add_value(gguf, writer, name, value, recorded.get(name))
            for name, tensor in blocks.items():
                # as int8, because the shape of uint8 is taken for bytes, not elements
                signed = tensor.data.view(np.int8)
                writer.add_tensor(name, signed, raw_shape=tensor.shape, raw_dtype=types[name])
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()
        _flush_to_disk(part)
        os.replace(part, final)
    except OSError as error:
        raise _os_error("was not written", where, error) from error
    except (ValueError, TypeError, OverflowError, struct.error) as error:
        seen = " ".join(str(error).split())
        raise FileError(f"{where} was not written, because gguf refused it: {seen}") from error
    finally:
        part.unlink(missing_ok=True)


def _import(name: str) -> Any:
    """The module, which needs the gguf package."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise FileError(
            f"GGUF files are read and written by the gguf package, which cannot be imported"
            f" ({error}); run pip install gguf"
        ) from error


def _os_error(what: str, where: Path, error: OSError) -> FileError:
    return FileError(f"{where} {what}: {error.strerror or error}; check path, rights and disk")


def _check_start(where: Path) -> None:
    """Refuse what is no GGUF file by its first 24 bytes, before anything is mapped."""
    try:
        status = where.stat()
        if stat.S_ISDIR(status.st_mode):
            raise FileError(f"{where} is a folder; name a GGUF file in it")
        if not stat.S_ISREG(status.st_mode):  # a pipe would block for ever
            raise FileError(f"{where} is not a regular file; name a GGUF file on disk")
        with where.open("rb") as file:
            start = file.read(_HEADER.size)
    except FileNotFoundError:
        raise FileError(
            f"{where} does not exist (looked for from {Path.cwd()}); check the path"
        ) from None
    except OSError as error:
        raise _os_error("cannot be read", where, error) from error
    except ValueError as error:  # a zero byte in the name
        raise FileError(f"{where!s:.200} is not a path: {error}; check it") from None
    size = status.st_size
    if not start:
        raise FileError(f"{where} is empty; {_AGAIN}")
    if start[:4] != b"GGUF"[: len(start)]:
        raise FileError(
            f"{where} is not a GGUF file: it begins with {start[:4]!r}, not b'GGUF'; convert other"
            " kinds with llama.cpp's convert_hf_to_gguf.py"
        )
    if len(start) < _HEADER.size:
        raise FileError(
            f"{where} is truncated: it has {size} bytes, and the start of a GGUF header alone has"
            f" {_HEADER.size}; {_AGAIN}"
        )
    _, version, tensors, keys = _HEADER.unpack(start)
    if version & 0xFFFF == 0 and version:
        raise FileError(
            f"{where} is a big-endian GGUF file; kernelgen reads little-endian ones: convert it"
            " with gguf-convert-endian"
        )
    if version not in (2, 3):
        raise FileError(
            f"{where} is a GGUF file of version {version}; kernelgen reads 2 and 3: convert the"
            " model again with a current llama.cpp"
        )
    if tensors * _SMALLEST_TENSOR + keys * _SMALLEST_KEY > size - _HEADER.size:
        raise FileError(
            f"{where} is truncated or damaged: its header promises {tensors} tensors and {keys}"
            f" metadata entries, more than its {size} bytes can hold; {_AGAIN}"
        )


def _tensors(reader: GuardedReader) -> tuple[dict[str, QuantTensor], dict[str, str]]:
    """The tensors of known types, and the type names of the others."""
    from kernelgen.gguf_reader import DamagedError

    tensors, skipped = {}, {}
    mapped = reader.data.view(np.ndarray)
    for info in reader.infos:
        if len(info.dims) > _MAX_DIMS:
            raise DamagedError(
                f"tensor {info.name!r} has {len(info.dims)} dimensions, and ggml has {_MAX_DIMS}"
            )
        shape = tuple(reversed(info.dims)) or (1,)
        kind, fmt, sizes = _type_of(info)
        end = info.start
        if sizes is not None:
            block, nbytes = sizes
            if shape[-1] % block or shape[-1] == 0:
                raise DamagedError(
                    f"rows of tensor {info.name!r} have {shape[-1]} elements, and {kind} has"
                    f" blocks of {block}"
                )
            end += math.prod(shape) // block * nbytes
        if end > len(mapped):
            raise DamagedError(
                f"the data of tensor {info.name!r} ends at byte {end}, but the file at"
                f" {len(mapped)}"
            )
        if fmt is None:
            skipped[info.name] = kind
        else:
            tensors[info.name] = QuantTensor(fmt, shape, mapped[info.start : end], info.name)
    return tensors, skipped


def _type_of(info: TensorInfo) -> tuple[str, BlockFormat | None, tuple[int, int] | None]:
    """The name of a tensor's type, its format where kernelgen knows it, and where anybody does
    the elements and the bytes of a block."""
    import gguf

    try:
        kind = gguf.GGMLQuantizationType(info.type_number)
    except ValueError:
        if info.type_number not in _NEWER:
            return f"ggml type {info.type_number}", None, None
        newer = formats.get(_NEWER[info.type_number])
        return newer.name, newer, (newer.block, newer.nbytes)
    for fmt in formats.formats():
        if _is_type(gguf, fmt, kind):
            return fmt.name, fmt, (fmt.block, fmt.nbytes)
    return kind.name, None, gguf.GGML_QUANT_SIZES.get(kind)


def _is_type(gguf: Any, fmt: BlockFormat, kind: Any) -> bool:
    """Whether a format is this type of ggml's, a gguf.GGMLQuantizationType.

    A registered format may have the name and yet be another one, so sizes have to agree, too; not
    those of kernelgen's own, as gguf 0.19 has 40 bytes for q8_1, which ggml gives 36.
    """
    return fmt.name.upper() == kind.name and (
        fmt in formats.FORMATS or gguf.GGML_QUANT_SIZES.get(kind) == (fmt.block, fmt.nbytes)
    )


def _type_number(gguf: Any, name: str, fmt: BlockFormat) -> Any:
    """ggml's number for a format, a gguf.GGMLQuantizationType where the package knows it."""
    for number, newer in _NEWER.items():
        if fmt is formats.get(newer):
            return number
    kind = gguf.GGMLQuantizationType.__members__.get(fmt.name.upper())
    if kind is None or not _is_type(gguf, fmt, kind):
        raise FormatError(
            f"tensor {name!r} is in {fmt.name}, a format that ggml does not have, so a GGUF file"
            " cannot hold it; quantize it to one of ggml's, or keep the bytes of its data"
        )
    return kind


def _as_tensor(name: str, given: QuantTensor | Array) -> QuantTensor:
    """What is to be written under `name`."""
    if not isinstance(name, str) or not 0 < len(name.encode("utf-8", "replace")) <= _MAX_NAME:
        raise FileError(
            f"a tensor was named {name!r}; in a GGUF file a name is a string of 1 to {_MAX_NAME}"
            " bytes"
        )
    if isinstance(given, QuantTensor):
        tensor = given
        if tensor.columns is not None:
            raise FormatError(
                f"tensor {name!r} has its columns in another order, which a GGUF file cannot say;"
                " quantize its values, w.dequantize(), again"
            )
    else:
        array = np.asarray(given)
        kinds = {"f4": ("f32", "<f4"), "f2": ("f16", "<f2")}
        found = kinds.get(f"{array.dtype.kind}{array.dtype.itemsize}")
        if found is None:
            raise ShapeError(
                f"tensor {name!r} is an array of {array.dtype}; float32, float16 and QuantTensors"
                " are written to GGUF files: convert it with astype"
            )
        shape = array.shape or (1,)
        flat = np.ascontiguousarray(array, found[1]).reshape(-1)
        tensor = QuantTensor(found[0], shape, flat.view(np.uint8), name)
    if len(tensor.shape) > _MAX_DIMS:
        raise ShapeError(
            f"tensor {name!r} has shape {tensor.shape}; GGUF files hold at most {_MAX_DIMS}"
            " dimensions: reshape it"
        )
    return tensor


_INTEGERS = {
    f"{sign}int{bits}": ((0, 2**bits - 1) if sign else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1))
    for bits in (8, 16, 32, 64)
    for sign in ("u", "")
}
_CHOSEN = ("uint32", "int32", "int64", "uint64")
_LARGEST_F32 = float(np.finfo(np.float32).max)


def _add_value(gguf: Any, writer: Any, name: str, value: Any, recorded: str | None) -> None:
    """Add metadata, in the type on record where the value fits it."""
    own = value.dtype.name if isinstance(value, (np.generic, np.ndarray)) else None
    plain = value.tolist() if own else value
    is_array = isinstance(plain, Sequence) and not isinstance(plain, (str, bytes))
    items = list(plain) if is_array else [plain]
    if not items:
        _log.warning("metadata %r is an empty list, which gguf cannot write: left out", name)
        return
    if recorded is not None:
        recorded = recorded.removeprefix("array[").removesuffix("]")
    kind = next(
        (k for k in (own, recorded, *_CHOSEN, "bool", "string", "float32", "float64")
         if k is not None and all(_fits(item, k) for item in items)),
        None,
    )  # fmt: skip
    if kind is None:
        raise FileError(
            f"metadata {name!r} is {str(value)[:80]!r} of type {type(value).__name__}; a GGUF file"
            " holds strings, booleans, floats, integers of 64 bits, and lists of one of these"
        )
    types = gguf.GGUFValueType
    if is_array:
        writer.add_key_value(name, items, types.ARRAY, types[kind.upper()])
    else:
        writer.add_key_value(name, plain, types[kind.upper()])


def _fits(value: object, kind: str) -> bool:
    """Whether a metadata value can be written as this type."""
    if kind in _INTEGERS:
        low, high = _INTEGERS[kind]
        return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
    if kind in ("float32", "float64"):
        if isinstance(value, int) and not isinstance(value, bool):
            return abs(value) <= 2 ** (24 if kind == "float32" else 53)  # exactly
        if not isinstance(value, float):
            return False
        return kind == "float64" or not _LARGEST_F32 < abs(value) < math.inf
    if kind == "bool":
        return isinstance(value, bool)
    return kind == "string" and isinstance(value, (str, bytes))


def _flush_to_disk(path: Path) -> None:
    """Have the bytes on disk before the name points at them."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _aligned(row: tuple[str, ...], widths: list[int]) -> str:
    name, kind, shape, size = (text.ljust(width) for text, width in zip(row, widths, strict=True))
    return f"  {name}  {kind}  {shape}  {size.strip():>{widths[3]}}"

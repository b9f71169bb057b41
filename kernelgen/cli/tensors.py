"""Files of tensors: `quantize`, `inspect`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import typer

from kernelgen import api
from kernelgen.cli import format_files
from kernelgen.cli.terminal import AsJson, console, print_json, progress_bar, table
from kernelgen.errors import FileError, KernelgenError, ShapeError
from kernelgen.gguf_files import Metadata
from kernelgen.ir.block import BlockFormat
from kernelgen.tensor import QuantTensor, human_bytes

Array = npt.NDArray[Any]
#: a tensor's floats: what is taken from it is float32 (rows, K)
Rows = Callable[[slice], Array]

#: elements that are converted at once, so that a large tensor needs no float copy of itself
_CHUNK = 1 << 23
#: values of metadata are cut there, for people
_LONGEST_VALUE = 60

_FLOATS = ("f32", "f16", "bf16")


@dataclass(frozen=True)
class Source:
    """A tensor of the input.

    format, nbytes  of the input
    rows            its rows as floats
    tensor          itself, if it can be kept as it is
    """

    name: str
    shape: tuple[int, ...]
    format: str
    nbytes: int
    rows: Rows
    tensor: QuantTensor | None = None

    @property
    def count(self) -> int:
        """Rows of K elements."""
        return math.prod(self.shape[:-1])


@dataclass(frozen=True)
class Quantized:
    """What became of a tensor.

    error    root mean square of the error relative to that of the values; None where it was kept
    because  why it was kept
    """

    name: str
    shape: tuple[int, ...]
    before: str
    after: str
    bytes_before: int
    bytes_after: int
    error: float | None
    because: str | None


def quantize(
    source: Annotated[
        Path,
        typer.Argument(metavar="IN", help="A .gguf file, a .npy array, or what holds safetensors."),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT.gguf", help="The file to write.")],
    format: Annotated[str, typer.Option("--format", metavar="F", help="The format to store in.")],
    importance: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.npy", help="A weight for the squared error of each of the K columns."
        ),
    ] = None,
    name: Annotated[
        str, typer.Option(metavar="NAME", help='Name of the tensor of a .npy; "weight" by default.')
    ] = "",
    scale: Annotated[
        str,
        typer.Option(
            metavar="S", help="best: of least error; ocp: the rule of the OCP MX specification."
        ),
    ] = "best",
    as_json: AsJson = False,
) -> None:
    """Quantize the float matrices of a file; everything else in a GGUF file is kept as it is."""
    fmt = format_files.format_of(format)
    if not out.absolute().parent.is_dir():
        raise FileError(f"{out} cannot be written: its folder does not exist; make it first")
    weights = None if importance is None else _load(importance)
    sources, metadata = _read(source, name)
    reasons = {one.name: _keep_because(one, fmt) for one in sources}
    changing = [one for one in sources if reasons[one.name] is None]
    _check_importance(weights, changing)
    tensors = {one.name: one.tensor for one in sources if one.tensor is not None}
    errors: dict[str, float] = {}
    with progress_bar(console(stderr=True)) as progress:
        task = progress.add_task("", total=sum(one.count for one in changing))
        for one in changing:
            progress.update(task, description=f"{one.name}, rows")
            tensors[one.name], errors[one.name] = _convert(
                one, fmt, weights, scale, lambda rows: progress.advance(task, rows)
            )
    api.save(out, tensors, metadata)
    report = [
        Quantized(
            one.name, one.shape, one.format, tensors[one.name].format.name, one.nbytes,
            tensors[one.name].nbytes, errors.get(one.name), reasons[one.name],
        )
        for one in sources
    ]  # fmt: skip
    if as_json:
        print_json({"file": str(out), "tensors": [asdict(one) for one in report]})
    else:
        _print_report(out, report)


def _load(path: Path) -> Array:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise FileError(f"{path} does not exist; check the path") from None
    except (ValueError, EOFError) as error:
        raise FileError(
            f"{path} cannot be read as a .npy file ({error}); write it with numpy.save"
        ) from None
    if not isinstance(array, np.ndarray):
        raise FileError(f"{path} holds several arrays; save one with numpy.save")
    return array


def _read(path: Path, name: str) -> tuple[list[Source], Mapping[str, Any]]:
    """The tensors of the input, and its metadata."""
    if path.suffix.lower() == ".npy":
        return [_array_source(_load(path), name or "weight", path)], {}
    model = api.open(path)
    if name:
        raise FileError(f"--name {name} names the tensor of a .npy; those of {path} have names")
    if model.skipped:
        lost = ", ".join(f"{tensor} ({kind})" for tensor, kind in model.skipped.items())
        raise FileError(
            f"{path} has tensors in formats that kernelgen does not know and so cannot copy: {lost}"
        )
    sources = [
        Source(key, w.shape, w.format.name, w.nbytes, w.dequantize, w) for key, w in model.items()
    ]
    # the config of a checkpoint is no metadata of a GGUF file
    return sources, model.metadata if isinstance(model.metadata, Metadata) else {}


def _array_source(array: Array, name: str, path: Path) -> Source:
    if array.ndim == 0 or array.size == 0 or array.dtype.kind != "f":
        raise ShapeError(
            f"{path} holds an array of {array.dtype} of shape {array.shape}; only floats with at"
            " least one dimension, none of them empty, can be quantized"
        )
    flat = array.reshape(-1, array.shape[-1])
    kind = {"<f4": "f32", "<f2": "f16"}.get(array.dtype.str, array.dtype.name)
    return Source(name, array.shape, kind, array.nbytes, lambda rows: flat[rows])


def _keep_because(one: Source, fmt: BlockFormat) -> str | None:
    """Why a tensor of a GGUF file stays as it is, or None; that of a .npy never does."""
    if one.tensor is None:
        return None
    if one.format not in _FLOATS or one.format == fmt.name:
        return f"{one.format} already"
    if len(one.shape) < 2:
        return "no matrix"
    if one.shape[-1] % fmt.block:
        return f"{one.shape[-1]} columns, no multiple of {fmt.block}"
    return "empty" if not math.prod(one.shape) else None


def _check_importance(weights: Array | None, quantized: list[Source]) -> None:
    lengths = sorted({one.shape[-1] for one in quantized})
    if weights is not None and (weights.ndim != 1 or len(weights) not in lengths):
        raise ShapeError(
            f"the importance has shape {weights.shape}; what is quantized has rows of"
            f" {', '.join(map(str, lengths)) or 'no'} columns, and one weight belongs to each"
        )


def _convert(
    source: Source, fmt: BlockFormat, weights: Array | None, scale: str,
    advance: Callable[[int], object],
) -> tuple[QuantTensor, float]:  # fmt: skip
    """The tensor in another format, and its relative error; a chunk of rows at a time."""
    k = source.shape[-1]
    if weights is not None and len(weights) != k:
        weights = None  # they belong to other tensors
    data = np.empty((source.count, fmt.row_bytes(k)), np.uint8)
    error = power = 0.0
    step = max(1, _CHUNK // k)
    for start in range(0, source.count, step):
        exact = source.rows(slice(start, start + step))
        done = 0

        def tell(rows: int, _all: int) -> None:
            nonlocal done
            advance(rows - done)
            done = rows

        try:
            part = api.quantize(exact, fmt, weights, tell, scale=scale)
        except KernelgenError as problem:
            raise type(problem)(f"tensor {source.name}: {problem}") from problem
        data[start : start + step] = part.data
        error += _sum_of_squares(part.dequantize() - exact)
        power += _sum_of_squares(exact)
    relative = math.sqrt(error / power) if power else math.sqrt(error)
    return QuantTensor(fmt, source.shape, data), relative


def _sum_of_squares(x: Array) -> float:
    return float(np.sum(np.square(x, dtype=np.float64)))


def _print_report(out: Path, report: list[Quantized]) -> None:
    numbers = ["size", "then", "relative RMSE"]
    shown = table("tensor", "shape", "format", *numbers, "", right=numbers)
    for one in report:
        shown.add_row(
            one.name,
            _times(one.shape),
            one.before if one.error is None else f"{one.before} -> {one.after}",
            human_bytes(one.bytes_before),
            human_bytes(one.bytes_after),
            "" if one.error is None else f"{one.error:.4g}",
            "" if one.because is None else f"kept: {one.because}",
        )
    console().print(shown)
    before, after = sum(r.bytes_before for r in report), sum(r.bytes_after for r in report)
    share = f" ({after / before:.1%})" if before else ""
    print(f"{out}: {human_bytes(after)} of tensors instead of {human_bytes(before)}{share}")


def _times(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def inspect(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE", help="A .gguf or .safetensors file, or a folder of the latter."
        ),
    ],
    as_json: AsJson = False,
) -> None:
    """Show the metadata and the tensors of a file or checkpoint."""
    model = api.open(file)
    listing = list(model.listing())
    if as_json:
        print_json(
            {
                "file": str(model.path),
                "metadata": model.metadata,
                "tensors": [
                    {"name": name, "shape": shape, "format": kind, "bytes": nbytes}
                    for name, shape, kind, nbytes in listing
                ],
                "skipped": model.skipped,
            }
        )
        return
    facts = table("metadata", "value")
    for key, value in model.metadata.items():
        facts.add_row(key, _shortened(value))
    tensors = table("tensor", "shape", "format", "size", right=["size"])
    for name, shape, kind, nbytes in listing:
        tensors.add_row(name, _times(shape), kind, human_bytes(nbytes))
    out = console()
    out.print(facts)
    out.print(tensors)
    for name, kind in model.skipped.items():
        out.print(f"{name} is in {kind}, which kernelgen does not know", soft_wrap=True)
    elements = sum(math.prod(shape) for _, shape, _, _ in listing)
    total = sum(nbytes for *_, nbytes in listing)
    bits = f", {8 * total / elements:.2f} bits an element" if elements else ""
    out.print(f"{len(model)} tensors, {human_bytes(total)}{bits}")


def _shortened(value: Any) -> str:
    """A value of the metadata in one short line; of a list, its length and how it begins."""
    if isinstance(value, list):
        head = ", ".join(repr(one) for one in value[:8])
        return f"{len(value)} values: {_shortened(head)}" + ", ..." * (len(value) > 8)
    text = value if isinstance(value, str) else repr(value)
    line = " ".join(text[: 4 * _LONGEST_VALUE].split())
    shortened = line if len(line) <= _LONGEST_VALUE else line[: _LONGEST_VALUE - 3] + "..."
    return "".join(c if c.isprintable() else "?" for c in shortened)

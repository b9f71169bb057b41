"""What users call from Python."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from kernelgen import targets as target_list
from kernelgen.config import Config
from kernelgen.errors import ShapeError, TargetError
from kernelgen.generate import generate, generate_walk
from kernelgen.ir import formats as format_list
from kernelgen.ir.block import BlockFormat
from kernelgen.problem import MATVEC_ROWS
from kernelgen.targets.base import Kernel, Runtime
from kernelgen.tensor import QuantTensor, quantize
from kernelgen.tuner import lookup

if TYPE_CHECKING:
    from kernelgen.checkpoints import Checkpoint
    from kernelgen.gguf_files import Model

log = logging.getLogger("kernelgen")

Array = npt.NDArray[Any]


def formats() -> list[str]:
    """Names of all known formats."""
    return [f.name for f in format_list.formats()]


def register_format(fmt: BlockFormat) -> BlockFormat:
    """Make a format known by its name to every op, target and command."""
    return format_list.register(fmt)


def unregister_format(name: str) -> None:
    """Forget a registered format."""
    format_list.unregister(name)


def open(path: str | os.PathLike[str]) -> Model | Checkpoint:
    """The tensors of a file by name, memory-mapped.

    path  a GGUF file, a .safetensors file, or a folder of .safetensors files and their config.json
    """
    if os.path.isdir(path) or os.fspath(path).endswith(".safetensors"):
        from kernelgen import checkpoints

        return checkpoints.open(path)
    from kernelgen import gguf_files

    return gguf_files.open(path)


def save(
    path: str | os.PathLike[str],
    tensors: Mapping[str, QuantTensor | Array],
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Write tensors to a GGUF file; an existing file is replaced at once or not at all."""
    from kernelgen import gguf_files

    gguf_files.save(path, tensors, metadata)


def kernel(
    op: str,
    format: str | BlockFormat,
    target: str | None = None,
    config: Config | Mapping[str, Any] | None = None,
    precision: str = "",
) -> Kernel:
    """The generated kernel of an op ("dequantize", "quantize", "matvec", "matmul", "prepare").

    `config` is the walk's default when left out; a mapping gives fields by name.
    """
    fmt = format_list.get(format) if isinstance(format, str) else format
    manifest = target_list.get(target or default_target())
    walk = manifest.walk(op, fmt, precision)
    if isinstance(config, Mapping):
        config = walk.config.from_dict(config)
    return generate(op, fmt, manifest, config, walk.precision)


def source(
    op: str,
    format: str | BlockFormat,
    target: str | None = None,
    config: Config | Mapping[str, Any] | None = None,
    precision: str = "",
) -> str:
    """The source text of a kernel (see `kernel`)."""
    return kernel(op, format, target, config, precision).source


@functools.cache
def runtime_of(target: str) -> Runtime:
    """The runtime of a target, opened once."""
    return target_list.get(target).runtime()


@functools.cache
def default_target() -> str:
    """The first target that can run here; a skipped one is logged with its reason."""
    reasons: list[str] = []
    for name in target_list.PREFERENCE:
        reason = runtime_of(name).available()
        if reason is None:
            for line in reasons:
                log.warning("%s; falling back to target %s, which is slower", line, name)
            return name
        reasons.append(f"target {name} cannot run here: {reason}")
    raise TargetError("; ".join(reasons))


Runner = Callable[[Array, QuantTensor, Array], None]


@functools.lru_cache(maxsize=4096)
def _matmul_runner(
    target: str, fmt: BlockFormat, m: int, n: int, k: int, precision: str, max_error: float | None
) -> Runner:
    """The compiled kernel for M rows of activations and weights (N, K), ready to be called, in
    the configuration that the tuner's cache has for it.  The one look-up of a warm call."""
    runtime = runtime_of(target)
    reason = runtime.available()
    if reason is not None:
        raise TargetError(
            f"target {target} cannot run here: {reason}; `kernelgen devices` shows what can"
        )
    manifest = target_list.get(target)
    choice = lookup.choose(manifest, runtime, fmt, precision, (m, n, k), max_error)
    return runtime.matmul(generate_walk(choice.walk, fmt, manifest, choice.config))


def matmul(
    x: Array,
    w: QuantTensor,
    *,
    target: str | None = None,
    precision: str = "auto",
    max_error: float | None = None,
    out: Array | None = None,
) -> Array:
    """y = x @ w.T with the weights decoded inside the kernel.

    x          (..., K) float32 or float16
    w          (N, K) in any format
    target     default: the first of the machine's targets that can run
    precision  "fp32": activations stay float; "int8": they are quantized to 8 bits by block, and
               products are summed in integers; "auto": int8 where the format's own error is as
               large (see kernelgen.problem.choose_precision)
    max_error  takes what `kernelgen tune --max-error` found under the same bound; where nothing was
               tuned under it, "auto" stands for float32
    out        (..., N) of x's dtype, C-contiguous, to write into

    Returns (..., N) of x's dtype.  The first call for a format compiles, and repacks w once.
    Raises ShapeError, TargetError, CompileError.
    """
    shape = x.shape
    n, k = w.shape if len(w.shape) == 2 else _not_a_matrix(w)
    if not shape or shape[-1] != k:
        raise ShapeError(
            f"x of shape {shape} was given for weights of shape {w.shape}: x needs {k} columns"
        )
    m = x.size // k
    rows = x if x.dtype == np.float32 else _as_float32(x)
    if len(shape) != 2:
        rows = rows.reshape(m, k)
    if w.columns is not None:
        rows = rows[:, w.columns]
    if not rows.flags.c_contiguous:
        rows = np.ascontiguousarray(rows)
    direct = out is None or out.dtype == np.float32
    y = np.empty((m, n), np.float32) if out is None or not direct else _writable(out, shape, n, x)
    if m:
        # kernels are told apart by each M up to 8, then by powers of two (tuner.space.row_bucket)
        bucket = m if m <= MATVEC_ROWS else min(1 << (m - 1).bit_length(), 4096)
        run = _matmul_runner(
            target or default_target(), w.format, bucket, n, k, precision, max_error
        )
        run(rows, w, y.reshape(m, n))
    if out is not None:
        if not direct:
            _writable(out, shape, n, x)[...] = y.reshape(*shape[:-1], n)
        return out
    result = y if len(shape) == 2 else y.reshape(*shape[:-1], n)
    return result if x.dtype == np.float32 else result.astype(x.dtype)


def _not_a_matrix(w: QuantTensor) -> tuple[int, int]:
    raise ShapeError(
        f"weights are matrices (N, K), not of shape {w.shape}; w[e] takes one of a stack"
    )


def _as_float32(x: Array) -> Array:
    if x.dtype != np.float16:
        raise ShapeError(f"x must be float32 or float16, not {x.dtype}; convert it with x.astype")
    return x.astype(np.float32)


def _writable(out: Array, shape: tuple[int, ...], n: int, x: Array) -> Array:
    wanted = (*shape[:-1], n)
    if out.shape != wanted or out.dtype != x.dtype or not out.flags.c_contiguous:
        raise ShapeError(
            f"out must be a C-contiguous {x.dtype} array of shape {wanted}, not {out.dtype}"
            f" {out.shape}"
        )
    if not out.flags.writeable or np.may_share_memory(out, x):
        raise ShapeError("out must be writable and must not overlap x; give another array")
    return out


def get_rows(w: QuantTensor, ids: Array, *, target: str | None = None) -> Array:
    """Rows of w that `ids`, integers of any shape, names: float32 (*ids.shape, K).

    What an embedding does.  Raises ShapeError for a row that w does not have.
    """
    name = target or default_target()
    ids = np.asarray(ids)
    rows = runtime_of(name).get_rows(kernel("get_rows", w.format, name), w, ids.reshape(-1))
    return w.in_order(rows.reshape(*ids.shape, w.shape[-1]))


def dequantize(w: QuantTensor, *, target: str | None = None) -> Array:
    """Values of w, float32, decoded by a kernel (`w.dequantize()` is the numpy reference)."""
    name = target or default_target()
    return w.in_order(runtime_of(name).dequantize(kernel("dequantize", w.format, name), w))


def prepare(w: QuantTensor, target: str | None = None) -> QuantTensor:
    """Repack w now for the matmuls of a target, which else happens in the first call.

    Returns w, which keeps the repacked copy beside its native blocks.
    """
    name = target or default_target()
    runtime, manifest = runtime_of(name), target_list.get(name)
    *_, n, k = (1, *w.shape)
    for m in (1, 16 * MATVEC_ROWS):  # a matvec and a matmul
        choice = lookup.choose(manifest, runtime, w.format, "auto", (m, n, k))
        runtime.prepare(generate_walk(choice.walk, w.format, manifest, choice.config), w)
    return w


__all__ = [
    "default_target", "dequantize", "formats", "get_rows", "kernel", "matmul", "open", "prepare",
    "quantize", "register_format", "save", "source", "unregister_format",
]  # fmt: skip

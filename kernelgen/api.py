"""What users call from Python."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import numpy.typing as npt

from kernelgen import arrays
from kernelgen import targets as target_list
from kernelgen.config import Config
from kernelgen.dispatch import Fallback, any_array, of_choice, once, report, runtime_of, target_for
from kernelgen.errors import ShapeError, TargetError
from kernelgen.generate import generate, generate_walk
from kernelgen.ir import formats as format_list
from kernelgen.ir.block import BlockFormat
from kernelgen.ir.ops.epilogue import PLAIN, Fusion
from kernelgen.problem import MATVEC_ROWS, row_bucket
from kernelgen.recording import launch, note
from kernelgen.targets import resident
from kernelgen.targets.base import Kernel, Runtime
from kernelgen.targets.device import DeviceRuntime
from kernelgen.tensor import QuantTensor, Stacked, quantize
from kernelgen.tuner import lookup

if TYPE_CHECKING:
    from kernelgen.checkpoints import Checkpoint
    from kernelgen.gguf_files import Model

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
    fused: Fusion = PLAIN,
) -> Kernel:
    """The generated kernel of an op ("dequantize", "quantize", "matvec", "matmul", "prepare").

    `config` is the walk's default when left out; a mapping gives fields by name.  `fused` is what a
    product does besides (kernelgen.ir.ops.epilogue).
    """
    fmt = format_list.get(format) if isinstance(format, str) else format
    manifest = target_list.get(target or default_target())
    walk = manifest.walk(op, fmt, precision)
    if isinstance(config, Mapping):
        config = walk.config.from_dict(config)
    return generate(op, fmt, manifest, config, walk.precision, fused)


def source(
    op: str,
    format: str | BlockFormat,
    target: str | None = None,
    config: Config | Mapping[str, Any] | None = None,
    precision: str = "",
    fused: Fusion = PLAIN,
) -> str:
    """The source text of a kernel (see `kernel`)."""
    return kernel(op, format, target, config, precision, fused).source


def default_target(on_fallback: str | None = None) -> str:
    """The target of numpy arrays; what should have served instead is logged with its reason."""
    return target_for(None, None, on_fallback)


@dataclass(frozen=True)
class Runner:
    """A compiled kernel, ready to be called, and what it does less well than could be wished."""

    run: Callable[[Array, QuantTensor, Array], None]
    kernel: Kernel
    runtime: Runtime
    fallbacks: tuple[Fallback, ...]

    @functools.cached_property
    def on_device(self) -> Callable[[Any, QuantTensor, Any], None]:
        """The same for x and y on the device."""
        assert isinstance(self.runtime, DeviceRuntime)
        return resident.matmul(self.runtime, self.kernel)


def require(target: str) -> Runtime:
    """The runtime of a target that can run here; raises TargetError where it cannot."""
    runtime = runtime_of(target)
    reason = runtime.available()
    if reason is not None:
        raise TargetError(
            f"target {target} cannot run here: {reason}; `kernelgen devices` shows what can"
        )
    return runtime


@once
def _matmul_runner(
    target: str, fmt: BlockFormat, m: int, n: int, k: int, precision: str, max_error: float | None
) -> Runner:
    """The compiled kernel for M rows of activations and weights (N, K), ready to be called, in
    the configuration that the tuner's cache has for it.  The one look-up of a warm call."""
    runtime = require(target)
    manifest = target_list.get(target)
    choice = lookup.choose(manifest, runtime, fmt, precision, (m, n, k), max_error)
    made = generate_walk(choice.walk, fmt, manifest, choice.config)
    found = of_choice(manifest, choice, fmt, precision, max_error)
    return Runner(runtime.matmul(made), made, runtime, found)


def _runner_for(
    target: str, w: QuantTensor, m: int, precision: str, max_error: float | None, on_fallback: Any
) -> Runner:
    n, k = w.shape
    found = _matmul_runner(target, w.format, row_bucket(m), n, k, precision, max_error)
    if found.fallbacks:
        report(found.fallbacks, on_fallback)
    return found


def _matmul_on_device(
    x: Any,
    w: QuantTensor,
    *,
    target: str,
    precision: str = "auto",
    max_error: float | None = None,
    out: Any = None,
    on_fallback: str | None = None,
    operands: Sequence[Any] = (),
    norm_eps: float = 0.0,
    **fused: Any,
) -> Any:
    """`matmul` of an array that lies where the target's kernels work: the result is there, too,
    and nothing waits for it.  NotImplemented where something is fused with it,
    or columns are in another order."""
    if operands or w.columns is not None or any(one is not None for one in fused.values()):
        return NotImplemented
    shape = tuple(x.shape)
    n, k = w.shape if len(w.shape) == 2 else not_a_matrix(w)
    if not shape or shape[-1] != k:
        _wrong_columns(shape, w)
    rows = arrays.as_float32(x).reshape(math.prod(shape[:-1]), k)
    y = arrays.empty_like(x, (rows.shape[0], n))
    if rows.shape[0]:
        found = _runner_for(target, w, rows.shape[0], precision, max_error, on_fallback)
        found.on_device(rows, w, y)
    result = arrays.as_type_of(y.reshape(*shape[:-1], n), x)
    if out is None:
        return result
    if tuple(out.shape) != tuple(result.shape) or out.dtype != x.dtype:
        raise ShapeError(
            f"out must be a {x.dtype} array of shape {tuple(result.shape)}, not {out.dtype}"
            f" {tuple(out.shape)}"
        )
    out[...] = result
    return out


@any_array(_matmul_on_device)
def matmul(
    x: Any,
    w: QuantTensor,
    *,
    scale: Any = None,
    bias: Any = None,
    activation: Any = None,
    epilogue: Callable[..., Any] | None = None,
    operands: Sequence[Any] = (),
    residual: Any = None,
    norm: Any = None,
    norm_eps: float = 1e-6,
    target: str | None = None,
    precision: str = "auto",
    max_error: float | None = None,
    out: Any = None,
    on_fallback: str | None = None,
) -> Any:
    """y = x @ w.T with the weights decoded inside the kernel, and what is fused with it.

    x          (..., K) float32, float16 or bfloat16: a numpy array, or one of torch, cupy or any
               library that speaks DLPack
    w          (N, K) in any format
    target     default: what serves the place where x lies; for numpy arrays the best device here
    precision  "fp32": activations stay float; "int8": they are quantized to 8 bits by block, and
               products are summed in integers; "auto": int8 where the format's own error is as
               large (see kernelgen.problem.choose_precision), or bf16, where for many rows that is
               faster, as on CPUs with AMX
    max_error  takes what `kernelgen tune --max-error` found under the same bound; where nothing was
               tuned under it, "auto" stands for float32
    out        (..., N) of x's dtype, C-contiguous, to write into
    on_fallback  "log": what serves less well than something that should be there is logged once;
               "error": it is an error; default: what KERNELGEN_ON_FALLBACK says, or "log"

    What may be fused, in the order in which it is done, at the place where y is stored:

    norm       (K,): rows of x are first divided by their root mean square and multiplied by this;
               norm_eps, by default 1e-6, is added to the mean of squares
    scale      a number, or an array that broadcasts to y: y * scale
    bias       (N,): y + bias
    activation "silu", "gelu", "gelu_tanh", "gelu_quick", "relu", "relu_squared", "sigmoid", "tanh",
               or a function of an expression
    epilogue   a function of y and of `operands`, a sequence of arrays that broadcast to y, written
               with Python's operators and `kernelgen.ir` (where, maximum, call...)
    residual   (..., N): y + residual; out may be this very array

    Returns (..., N) of x's dtype, library and device.  The first call for a format compiles, and
    repacks w once.  Raises ShapeError, TargetError (FallbackError is one), CompileError.
    """
    if operands or not (scale is bias is activation is epilogue is residual is norm is None):
        from kernelgen import api_fused

        return api_fused.matmul(
            x, w, scale=scale, bias=bias, activation=activation, epilogue=epilogue,
            operands=operands, residual=residual, norm=norm, norm_eps=norm_eps, target=target,
            precision=precision, max_error=max_error, out=out, on_fallback=on_fallback,
        )  # fmt: skip
    shape = x.shape
    n, k = w.shape if len(w.shape) == 2 else not_a_matrix(w)
    if not shape or shape[-1] != k:
        _wrong_columns(shape, w)
    m = x.size // k
    rows = x if x.dtype == np.float32 else as_float32(x)
    if len(shape) != 2:
        rows = rows.reshape(m, k)
    if w.columns is not None:
        rows = rows[:, w.columns]
    if not rows.flags.c_contiguous:
        rows = np.ascontiguousarray(rows)
    direct = out is None or out.dtype == np.float32
    y = np.empty((m, n), np.float32) if out is None or not direct else writable(out, shape, n, x)
    if m:
        name = target or default_target(on_fallback)
        found = _runner_for(name, w, m, precision, max_error, on_fallback)
        launch(found.run, rows, w, y.reshape(m, n), fills=(y,))
    if out is not None:
        if not direct:
            writable(out, shape, n, x)[...] = y.reshape(*shape[:-1], n)
        return out
    result = y if len(shape) == 2 else y.reshape(*shape[:-1], n)
    return result if x.dtype == np.float32 else result.astype(x.dtype)


def _wrong_columns(shape: tuple[int, ...], w: QuantTensor) -> NoReturn:
    raise ShapeError(
        f"x of shape {shape} was given for weights of shape {w.shape}: x needs {w.shape[1]} columns"
    )


def not_a_matrix(w: QuantTensor | Stacked) -> tuple[int, int]:
    raise ShapeError(
        f"weights are matrices (N, K), not of shape {w.shape}; w[e] takes one of a stack"
    )


def as_float32(x: Array) -> Array:
    if x.dtype != np.float16:
        raise ShapeError(f"x must be float32 or float16, not {x.dtype}; convert it with x.astype")
    return x.astype(np.float32)


def writable(out: Array, shape: tuple[int, ...], n: int, x: Array) -> Array:
    wanted = (*shape[:-1], n)
    if out.shape != wanted or out.dtype != x.dtype or not out.flags.c_contiguous:
        raise ShapeError(
            f"out must be a C-contiguous {x.dtype} array of shape {wanted}, not {out.dtype}"
            f" {out.shape}"
        )
    if not out.flags.writeable or np.may_share_memory(out, x):
        raise ShapeError("out must be writable and must not overlap x; give another array")
    return out


@once
def _row_reader(target: str, fmt: BlockFormat) -> Kernel:
    return kernel("get_rows", fmt, target)


def _reading(
    runtime: Runtime, kernel: Kernel, w: QuantTensor, ids: Array, rows: Array
) -> Callable[[], object]:
    """What fills `rows` with those that `ids` names by then."""
    bind = getattr(runtime, "bind_rows", None)
    if bind is not None and ids.dtype == np.int64 and ids.flags.c_contiguous:
        found: Callable[[], object] = bind(kernel, w, ids, rows)
        return found
    return lambda: np.copyto(rows, runtime.get_rows(kernel, w, ids))


@any_array()
def get_rows(
    w: QuantTensor, ids: Any, *, target: str | None = None, on_fallback: str | None = None
) -> Any:
    """Rows of w that `ids`, integers of any shape, names: float32 (*ids.shape, K), of the library
    and on the device of `ids`.

    What an embedding does; `on_fallback` as in `matmul`.  Raises ShapeError for a row that w does
    not have.
    """
    name = target or default_target(on_fallback)
    ids = np.asarray(ids)
    runtime, kernel, flat = runtime_of(name), _row_reader(name, w.format), ids.reshape(-1)
    rows = runtime.get_rows(kernel, w, flat)
    note(_reading(runtime, kernel, w, flat, rows), (flat,), (rows,))
    return w.in_order(rows.reshape(*ids.shape, w.shape[-1]))


def dequantize(
    w: QuantTensor, *, target: str | None = None, on_fallback: str | None = None
) -> Array:
    """Values of w, float32, decoded by a kernel (`w.dequantize()` is the numpy reference)."""
    name = target or default_target(on_fallback)
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
    "quantize", "register_format", "runtime_of", "save", "source", "unregister_format",
]  # fmt: skip

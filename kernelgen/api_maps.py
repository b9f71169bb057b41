"""What users call from Python: maps, and how arrays reach the kernels of maps and rows."""

from __future__ import annotations

import functools
import inspect
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import as_strided

from kernelgen import api
from kernelgen import targets as target_list
from kernelgen.dispatch import once
from kernelgen.errors import ShapeError
from kernelgen.generate import generate_walk
from kernelgen.ir.expr import BOOL, F32, U32, Expr
from kernelgen.ir.ops import functions, maps
from kernelgen.ir.ops.maps import Map
from kernelgen.ir.ops.rows import Kind as Kind
from kernelgen.ir.ops.rows import result_arrays
from kernelgen.ir.ops.tensors import COL, MANY, ROW, TYPES, Tensor
from kernelgen.problem import power_of_two
from kernelgen.recording import launch
from kernelgen.tuner import lookup
from kernelgen.tuner.problems import MapProblem

Array = npt.NDArray[Any]

#: elements of what a kernel is given at once: buffers of 128 MiB, as every device has them
_PIECE = 1 << 25

#: types by the names that numpy, and ml_dtypes, give them
_TYPES = {
    "float32": "f32", "float16": "f16", "bfloat16": "bf16", "float8_e4m3fn": "f8_e4m3",
    "float8_e5m2": "f8_e5m2", "int32": "i32", "uint32": "u32", "int16": "i16", "uint16": "u16",
    "int8": "i8", "uint8": "u8", "bool": "bool",
}  # fmt: skip
_NUMPY = {ours: theirs for theirs, ours in _TYPES.items()}
_FROM_ML_DTYPES = ("bf16", "f8_e4m3", "f8_e5m2")


# ---- types and arrays --------------------------------------------------------------------------


@functools.cache
def type_of(dtype: Any) -> str:
    """The type of elements that a numpy dtype, its name, or one of `kernelgen.ir.ops.tensors.TYPES`
    stands for."""
    if isinstance(dtype, str) and dtype in TYPES:
        return dtype
    name = dtype if isinstance(dtype, str) else np.dtype(dtype).name
    if name not in _TYPES:
        raise ShapeError(
            f"elements of {name} were given; {', '.join(_TYPES)} are allowed: convert with astype"
        )
    return _TYPES[name]


def numpy_dtype(dtype: str) -> np.dtype[Any]:
    """The numpy dtype of a type; those that numpy itself does not have are of ml_dtypes."""
    if dtype not in _FROM_ML_DTYPES:
        return np.dtype(_NUMPY[dtype])
    try:
        import ml_dtypes
    except ImportError as error:
        raise ShapeError(
            f"an array of {_NUMPY[dtype]} was asked for, which numpy has with ml_dtypes only:"
            " pip install kernelgen[floats]"
        ) from error
    found: np.dtype[Any] = np.dtype(getattr(ml_dtypes, _NUMPY[dtype]))
    return found


def raw(array: Array, dtype: str, written: bool = False) -> Array:
    """The elements as kernels take them: numbers that not all of numpy knows as integers."""
    if dtype in _FROM_ML_DTYPES or dtype == "bool" or (written and dtype == "f16"):
        return array.view(f"u{array.itemsize}")
    return array


def as_array(x: Any) -> Array:
    """An array as it was given; Python's numbers as f32 or i32."""
    if isinstance(x, bool | int | float):
        return np.asarray(x, np.bool_ if isinstance(x, bool) else type(x)).astype(
            {bool: np.bool_, int: np.int32, float: np.float32}[type(x)]
        )
    return np.asarray(x)


def outputs(
    kind: Kind, shape: tuple[int, ...], out: Any
) -> tuple[tuple[Array, ...], dict[str, Array]]:
    """New arrays, or those given, and what kernels fill of them."""
    wanted = [(o, shape) for o in kind.outputs]
    wanted += [(o, (*shape[:-1], *([o.of] if o.of > 1 else []))) for o in result_arrays(kind)]
    if out is None:
        made = tuple(np.empty(size, numpy_dtype(o.dtype)) for o, size in wanted)
    else:
        made = tuple(out) if isinstance(out, tuple | list) else (out,)
        given = [(a.shape, type_of(a.dtype), a.flags.c_contiguous) for a in made]
        if given != [(size, o.dtype, True) for o, size in wanted]:
            raise ShapeError(
                f"out of {[f'{a.dtype} {a.shape}' for a in made]} was given; it must be contiguous,"
                f" {[f'{_NUMPY[o.dtype]} {size}' for o, size in wanted]}"
            )
    filled = {o.name: raw(a, o.dtype, True) for (o, _), a in zip(wanted, made, strict=True)}
    return made, filled


@once
def _runner(target: str, kind: Kind, rows: int, columns: int) -> Any:
    """The compiled kernel of a kind, ready to be called, in the configuration that the tuner's
    cache has for such arrays."""
    runtime = api.require(target)
    manifest = target_list.get(target)
    choice = lookup.choose_for(manifest, runtime, MapProblem(kind, rows, columns))
    return runtime.apply(generate_walk(choice.walk, kind, manifest, choice.config))


def run(
    target: str | None,
    kind: Kind,
    arrays: Mapping[str, Array],
    shared: Iterable[str],
    size: tuple[int, int],
    outputs: Mapping[str, Array],
) -> None:
    """Fill outputs, some rows at a time; arrays other than those shared have rows as their first
    axis."""
    m, n = size
    if not m or (not n and not any(o.size for o in outputs.values())):
        return
    if n >= MANY:
        raise ShapeError(f"rows of {n} elements were given; fewer than {MANY} are allowed")
    far = max((_reach(a) for a in arrays.values()), default=0)
    if far >= 1 << 31:
        raise ShapeError(
            f"an array whose first and last element lie {far} elements apart was given; fewer than"
            " 2^31 are allowed"
        )
    bucket = power_of_two(min(m, _PIECE)), power_of_two(n)
    run = _runner(target or api.default_target(), kind, *bucket)
    same, each = set(shared), {o.name for o in kind.outputs}
    flat = {
        name: a.reshape(m, n) if name in each else a.reshape(m, *([-1] * (a.size > m)))
        for name, a in outputs.items()
    }
    step = max(1, _PIECE // max(1, n))
    if step >= m:
        launch(run, arrays, m, n, flat, fills=flat.values())
        return
    for start in range(0, m, step):
        part = slice(start, min(start + step, m))
        some = {name: a if name in same else a[part] for name, a in arrays.items()}
        filled = {name: a[part] for name, a in flat.items()}
        launch(run, some, part.stop - start, n, filled, fills=filled.values())


def _reach(array: Array) -> int:
    """Elements from the first to the last of rows that a kernel is given at once."""
    if array.flags.c_contiguous and array.size <= _PIECE:
        return int(array.size)
    rows = max(1, _PIECE // max(1, array.shape[-1] if array.ndim > 1 else 1))
    sizes = (min(array.shape[0], rows), *array.shape[1:]) if array.ndim else ()
    steps = (abs(s) // array.itemsize for s in array.strides)
    return sum((n - 1) * s for n, s in zip(sizes, steps, strict=True) if n > 1)


def _steps(array: Array) -> tuple[str | int, ...]:
    """Strides of two axes as a kernel is made for them: 0 and, of columns, 1 are known; others are
    given at the launch."""
    row, col = (s // array.itemsize for s in array.strides)
    if array.shape[1] == 1:
        col = 1
    return ("row" if row else 0, col if col in (0, 1) else "col")


def tensor(name: str, array: Array, dtype: str, *, shared: bool = False) -> Tensor:
    """What stands for an array (rows, columns), (rows,), or (columns,) that all rows share."""
    if array.ndim == 1:
        step = array.strides[0] // array.itemsize if array.size > 1 else 1
        known = shared and step == 1
        return Tensor(name, dtype, (1 if known else f"{name}_col" if shared else f"{name}_row",))
    steps = (f"{name}_{s}" if isinstance(s, str) else s for s in _steps(array))
    return Tensor(name, dtype, tuple(steps))


# ---- maps --------------------------------------------------------------------------------------


def _collapsed(shape: tuple[int, ...], arrays: Sequence[Array]) -> list[Array]:
    """The arrays over at most two axes: those of a shape that lie side by side in all of them are
    one; an array for which that is not enough is copied."""
    views = [np.broadcast_to(a, shape) for a in arrays]
    groups: list[list[int]] = []
    for axis in (n for n, size in enumerate(shape) if size != 1):
        last = groups[-1][-1] if groups else -1
        if groups and all(v.strides[last] == v.strides[axis] * shape[axis] for v in views):
            groups[-1].append(axis)
        else:
            groups.append([axis])
    if len(groups) > 2:
        columns = math.prod(shape[a] for a in groups[-1])
        return [np.ascontiguousarray(v).reshape(-1, columns) for v in views]
    missing = 2 - len(groups)
    sizes = [1] * missing + [math.prod(shape[a] for a in one) for one in groups]
    return [
        as_strided(v, sizes, [0] * missing + [v.strides[one[-1]] for one in groups]) for v in views
    ]


class MapFunction:
    """A function of elements as a function of arrays (see `map`)."""

    def __init__(self, function: Callable[..., Any], label: str, dtype: Any = None) -> None:
        self._function = function
        self._label = label
        self._dtype = dtype
        self._names = _parameters(function)
        self._kinds: dict[Any, Map] = {}
        functools.update_wrapper(self, function, updated=())

    def __call__(
        self, *arrays: Any, target: str | None = None, dtype: Any = None, out: Any = None
    ) -> Any:
        """The result for arrays that broadcast to one shape; `out`: contiguous arrays of it."""
        if len(arrays) != len(self._names):
            raise ShapeError(
                f"{len(arrays)} arrays were given to {self._label}, which takes"
                f" {', '.join(self._names)}"
            )
        given = [as_array(x) for x in arrays]
        try:
            shape = np.broadcast_shapes(*(a.shape for a in given))
        except ValueError:
            raise ShapeError(
                f"arrays of shapes {', '.join(str(a.shape) for a in given)} were given to"
                f" {self._label}; they must broadcast to one shape"
            ) from None
        types = [type_of(a.dtype) for a in given]
        plain = [raw(a, t) for a, t in zip(given, types, strict=True)]
        if any(s % a.itemsize for a in plain for s in a.strides):
            plain = [np.ascontiguousarray(a) for a in plain]
        views = _collapsed(shape, plain) if math.prod(shape) else plain
        kind = self._kind(types, views, dtype or self._dtype)
        made, filled = outputs(kind, shape, out)
        if made[0].size:
            m, n = views[0].shape
            self._fill(target, kind, dict(zip(self._names, views, strict=True)), (m, n), filled)
        return made if len(made) > 1 else made[0]

    def _fill(
        self,
        target: str | None,
        kind: Map,
        arrays: Mapping[str, Array],
        size: tuple[int, int],
        outputs: Mapping[str, Array],
    ) -> None:
        m, n = size
        if m > 1 or n <= _PIECE:
            run(target, kind, arrays, (), size, outputs)
            return
        flat = {name: a.reshape(-1) for name, a in outputs.items()}
        for start in range(0, n, _PIECE):  # of one long row
            part = slice(start, min(start + _PIECE, n))
            some = {name: a[:, part] for name, a in arrays.items()}
            count = part.stop - start
            run(target, kind, some, (), (1, count), {k: a[part] for k, a in flat.items()})

    def _kind(self, types: list[str], views: list[Array], dtype: Any) -> Map:
        """The map for arrays of these types and strides, traced once."""
        # arrays without elements are not laid out
        steps = tuple(_steps(v) if v.ndim == 2 and v.size else (0, 1) for v in views)
        key = (tuple(types), steps, dtype if dtype is None else str(dtype))
        found = self._kinds.get(key)
        if found is None:
            inputs = tuple(
                Tensor(name, t, tuple(f"{name}_{s}" if isinstance(s, str) else s for s in step))
                for name, t, step in zip(self._names, types, steps, strict=True)
            )
            found = self._kinds[key] = self._traced(inputs, types, dtype)
        return found

    def _traced(self, inputs: tuple[Tensor, ...], types: list[str], dtype: Any) -> Map:
        elements = [one[ROW, COL] for one in inputs]
        result = self._function(*elements)
        values = result if isinstance(result, tuple) else (result,)
        made = [v if isinstance(v, Expr) else functions.number(v) for v in values]
        wanted = [dtype] * len(made) if not isinstance(dtype, tuple) else list(dtype)
        if len(wanted) != len(made):
            raise ShapeError(
                f"{len(wanted)} types were given for the {len(made)} results of {self._label}"
            )
        named = tuple(
            type_of(w) if w is not None else _natural(v, types)
            for v, w in zip(made, wanted, strict=True)
        )
        return maps.trace(lambda *_: tuple(made), inputs, named, self._label)


def _natural(value: Expr, types: list[str]) -> str:
    """The type of a result that nobody asked for by name: that of the inputs where they agree and
    can hold it, else of 32 bits."""
    if value.dtype is BOOL:
        return "bool"
    floats = [t for t in types if t.startswith(("f", "bf"))]
    if value.dtype is F32:
        return floats[0] if len(set(floats)) == 1 else "f32"
    if len(set(types)) == 1 and types[0] not in ("bool", *floats):
        return types[0]
    return "u32" if value.dtype is U32 else "i32"


#: what kernels call values of their own
_TAKEN = re.compile(r"(each|kept|same)_|(stored|of_row|array)\d|.*_(row|col|here|all|run|word\d+)$")


def _parameters(function: Callable[..., Any]) -> tuple[str, ...]:
    found = inspect.signature(function).parameters.values()
    plain = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    if not found or any(p.kind not in plain for p in found):
        raise ShapeError(
            "a map was asked for of a function without, or with special, parameters; it takes one"
            " for each array"
        )
    return tuple(
        f"array{n}" if _TAKEN.match(p.name) or not p.name.isascii() else p.name
        for n, p in enumerate(found)
    )


def map(function: Callable[..., Any], *, dtype: Any = None, name: str = "") -> MapFunction:
    """A function of elements, in Python's operators and the functions of this module and of
    `kernelgen.ir`, as a function of arrays: kernelgen.map(lambda x, y: silu(x) * y)(a, b).

    It takes arrays that broadcast to one shape, of floats of 32, 16 and 8 bits or of integers up to
    32 bits, and gives a new array of that shape, or several where the function gives a tuple.  Each
    is computed in f32, i32 or u32 and rounded once.

    dtype   of the result; by default that of the inputs, where these agree
    name    what its kernels are called

    Results may be written into an input (`out=`) that is contiguous and has their type.
    """
    label = name or getattr(function, "__name__", "")
    return MapFunction(
        function, label if label.isidentifier() and label.isascii() else "map", dtype
    )

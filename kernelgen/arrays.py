"""Arrays of other libraries: torch's tensors, cupy's arrays, and whatever else speaks DLPack.

Kernels on the CPU take numpy arrays.  Here others become numpy's where they lie, and results
become theirs again; what lies on a device is copied only if `host` is asked for it.  No library is
imported: an array's own is found from its type.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Hashable
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from kernelgen.errors import ShapeError

Array = npt.NDArray[Any]

#: floats that kernels take: more than the eight bits of an exponent and a sign numpy has of these
FLOATS = ("float32", "float16", "bfloat16")

#: DLPack's numbers of memory that the CPU reads: its own, pinned for one vendor's devices or
#: another's, and managed
HOST_KINDS = (1, 3, 11, 13)

#: the number for devices that DLPack does not know
NOWHERE = -1

#: torch's devices whose number need not be asked for, which costs ten times as much, or which older
#: versions do not tell
_TORCHS = {"cpu": 1, "mps": 8}


def is_foreign(x: object) -> bool:
    """Whether x is an array of another library than numpy."""
    return hasattr(x, "__dlpack_device__") and not isinstance(x, np.ndarray | np.generic)


def kind_of(x: Any) -> int:
    """The kind of device on which an array of another library lies, as DLPack numbers them."""
    named = getattr(getattr(x, "device", None), "type", None)
    if named in _TORCHS:
        return _TORCHS[named]
    if named == "meta":
        raise ShapeError("a tensor on the meta device has no values; give one that has memory")
    try:
        return int(x.__dlpack_device__()[0])
    except ValueError:  # torch, for devices that DLPack has no number for
        return NOWHERE


def dtype_name(x: Any) -> str:
    """The name of an array's element type, as "float32" or "bfloat16"."""
    return _name(x.dtype)


@functools.cache
def _name(dtype: Any) -> str:
    return str(dtype).rpartition(".")[2]


@functools.cache
def _library(kind: Any) -> Any:
    """The module that makes arrays of a type: the package of the type, or of one it derives from,
    that reads DLPack."""
    for base in kind.__mro__:
        package = sys.modules.get(base.__module__.partition(".")[0])
        if hasattr(package, "from_dlpack"):
            return package
    return None


def library_of(x: Any) -> Any:
    """The module of an array's library: of functions such as from_dlpack, and of element types."""
    spaces, kind = getattr(x, "__array_namespace__", None), cast(Hashable, type(x))
    found = spaces() if spaces is not None else _library(kind)
    if found is None:
        raise ShapeError(
            f"an array of type {type(x).__name__} was given, whose library reads no DLPack; convert"
            " it with numpy.asarray"
        )
    return found


def _plain(x: Any) -> Any:
    """The array without what cannot leave its library: a gradient that is not asked for."""
    if getattr(x, "requires_grad", False):
        if library_of(x).is_grad_enabled():
            raise ShapeError(
                "x requires a gradient, which kernelgen's own functions do not give; use those of"
                " kernelgen.torch, torch.no_grad(), or x.detach()"
            )
        return x.detach()
    return x


def to_host(x: Any) -> Any:
    """The array in the CPU's memory, still its library's; copied where it lies elsewhere."""
    x = _plain(x)
    if kind_of(x) in HOST_KINDS:
        return x
    for name in ("cpu", "get"):  # torch's name for it, and cupy's
        if hasattr(x, name):
            return getattr(x, name)()
    return np.from_dlpack(x, device="cpu", copy=True)


def bits_of(x: Any) -> Array:
    """A bfloat16 array's memory as numpy's uint16, of the same shape."""
    x = to_host(x)
    if isinstance(x, np.ndarray):
        return x.view(np.uint16)
    return _shared(x.view(library_of(x).int16)).view(np.uint16)


def _shared(x: Any) -> Array:
    """numpy's view of an array in the CPU's memory."""
    if isinstance(x, np.ndarray):
        return x
    if hasattr(x, "detach"):  # a tensor, which has a way of its own
        shared: Array = x.numpy()
        return shared
    return np.from_dlpack(x)


def host(x: Any) -> Array:
    """The array as numpy's: of the same memory where the CPU reads it, except that bfloat16, which
    numpy does not know, becomes float32."""
    if dtype_name(x) != "bfloat16":
        return _shared(to_host(x))
    return (bits_of(x).astype(np.uint32) << 16).view(np.float32)


def to_bfloat16(y: Array) -> Array:
    """float32 rounded to bfloat16, to nearest, to even where two are as near: its bits, uint16."""
    bits = np.ascontiguousarray(y, np.float32).view(np.uint32)
    nearest = ((bits + (((bits >> 16) & 1) + 0x7FFF)) >> 16).astype(np.uint16)
    if np.isnan(y).any():  # rounding could carry a NaN's bits into the sign
        nearest = np.where(np.isnan(y), np.uint16(0x7FC0), nearest)
    return nearest


def give_back(y: Array, like: Any) -> Any:
    """A result as an array of another's library, on its device; floats get its element type if
    that is one of `FLOATS`.  On the CPU nothing is copied unless the type changes."""
    library, wanted = library_of(like), dtype_name(like)
    if y.dtype.kind == "f" and wanted in FLOATS and y.dtype.name != wanted:
        if wanted == "bfloat16":
            bits = to_bfloat16(y).view(np.int16)
            return _moved(bits, like, library).view(library.bfloat16)
        y = y.astype(wanted)
    return _moved(y, like, library)


def _moved(y: Array, like: Any, library: Any) -> Any:
    """A result as an array of a library, on the device of one of its arrays."""
    here = kind_of(like) in HOST_KINDS
    if here or hasattr(like, "to"):
        # torch has a way of its own, which is quicker
        made = getattr(library, "from_numpy", library.from_dlpack)(y)
        return made if here else made.to(like.device)
    with like.device:  # cupy's current device
        return library.asarray(y)


# ---- on the device --------------------------------------------------------------------------


def as_float32(x: Any) -> Any:
    """The array where it lies, float32 and C-contiguous, by its own library."""
    x, name = _plain(x), dtype_name(x)
    if name not in FLOATS:
        raise ShapeError(f"x must be float32, float16 or bfloat16, not {name}")
    if hasattr(x, "contiguous"):
        return x.float().contiguous()
    return library_of(x).ascontiguousarray(x, dtype=np.float32)


def is_float(x: Any) -> bool:
    """Whether an array of any library is of floats."""
    return "float" in dtype_name(x)


def as_operand(x: Any) -> Any:
    """The array where it lies, float32 or, for integers and booleans, int32; C-contiguous."""
    x = _plain(x)
    if hasattr(x, "contiguous"):
        return (x.float() if is_float(x) else x.int()).contiguous()
    return library_of(x).ascontiguousarray(x, dtype=np.float32 if is_float(x) else np.int32)


def contiguous(x: Any) -> Any:
    """The array where it lies, C-contiguous, by its own library."""
    x = _plain(x)
    return x.contiguous() if hasattr(x, "contiguous") else library_of(x).ascontiguousarray(x)


def empty_like(x: Any, shape: tuple[int, ...]) -> Any:
    """A float32 array of that shape beside x, by its library, on its device."""
    library = library_of(x)
    if hasattr(x, "new_empty"):
        return x.new_empty(shape, dtype=library.float32)
    with x.device:
        return library.empty(shape, library.float32)


def as_type_of(y: Any, x: Any) -> Any:
    """y in the element type of x, both of one library."""
    if y.dtype == x.dtype:
        return y
    return y.to(x.dtype) if hasattr(y, "to") else y.astype(x.dtype)

"""One operation of ggml on the CPU, as a rival: llama.cpp's library or ik_llama.cpp's, by ctypes.

    library = Ggml(Path("llama.cpp/build/bin"), threads=2)
    w = library.tensor("q4_K", (k, n), blocks)
    x = library.tensor("f32", (k, m), rows)
    product = library.graph(lambda c: library.call("ggml_mul_mat", c, w.handle, x.handle))
    product.run()
    y = product.result()

Sizes are in ggml's order, the innermost first.  llama.cpp repacks weights by the buffer that they
are put in (`Ggml.places`), ik_llama.cpp in place (`Ggml.repack`): `products` gives a product for
each way that serves a type, so that the fastest can be taken.  What belongs to ggml is freed with
the object that stands for it.

Build llama.cpp by clang, or by a gcc above 12: what gcc 12 makes of its code for AMX crashes, as
that compiler's _tile_loadconfig is not told to read more than 8 bytes of the configuration.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Iterator
from ctypes import POINTER, c_bool, c_char_p, c_int, c_int64, c_size_t, c_void_p
from pathlib import Path
from typing import Any

import numpy as np

#: where a build of either leaves its libraries, seen from the folder that is given
_FOLDERS = ("", "build/bin", "bin", "lib", "build/ggml/src", "ggml/src", "build/src", "src")

#: types of ggml go by number; those in files lie below
_FILE_TYPES = 64

#: tensors that a context has room for, and of these the ones that a graph may make
_ROOM, _NODES = 256, 16

_P, _S = c_void_p, c_size_t
#: what is called, by both libraries alike: result, arguments
_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "ggml_type_name": (c_char_p, [c_int]),
    "ggml_tensor_overhead": (_S, []),
    "ggml_graph_overhead": (_S, []),
    "ggml_free": (None, [_P]),
    "ggml_nbytes": (_S, [_P]),
    "ggml_new_tensor_4d": (_P, [_P, c_int, c_int64, c_int64, c_int64, c_int64]),
    "ggml_mul_mat": (_P, [_P, _P, _P]),
    "ggml_new_graph": (_P, [_P]),
    "ggml_build_forward_expand": (None, [_P, _P]),
    "ggml_backend_cpu_init": (_P, []),
    "ggml_backend_cpu_set_n_threads": (None, [_P, c_int]),
    "ggml_backend_cpu_buffer_type": (_P, []),
    "ggml_backend_buft_name": (c_char_p, [_P]),
    "ggml_backend_alloc_ctx_tensors_from_buft": (_P, [_P, _P]),
    "ggml_backend_buffer_free": (None, [_P]),
    "ggml_backend_tensor_set": (None, [_P, _P, _S, _S]),
    "ggml_backend_tensor_get": (None, [_P, _P, _S, _S]),
    "ggml_backend_graph_compute": (c_int, [_P, _P]),
    "ggml_backend_supports_op": (c_bool, [_P, _P]),
}
#: what only llama.cpp has, and only ik_llama.cpp
_REGISTRY: dict[str, tuple[Any, list[Any]]] = {
    "ggml_backend_cpu_reg": (_P, []),
    "ggml_backend_reg_dev_get": (_P, [_P, _S]),
    "ggml_backend_reg_get_proc_address": (_P, [_P, c_char_p]),
}
_REPACKING: dict[str, tuple[Any, list[Any]]] = {
    "iqk_repack_tensor": (None, [_P]),
    "iqk_repacked_type": (c_int, [_P]),
}


class GgmlError(Exception):
    """The library is not there, or cannot do what was asked."""


class _InitParams(ctypes.Structure):
    """ggml_init_params of ggml.h."""

    _fields_ = (("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool))


_Log = ctypes.CFUNCTYPE(None, c_int, c_char_p, c_void_p)


@_Log
def _silent(level: int, text: bytes, data: int) -> None:
    """ggml tells of every tensor that it repacks."""


class _Room:
    """A context: where descriptions of tensors and of graphs lie, not elements.  ik_llama.cpp
    allows 64 of them, so each takes many, and is freed when the last that lies there has gone."""

    def __init__(self, library: Ggml) -> None:
        size = _ROOM * library.call("ggml_tensor_overhead")
        size += _ROOM // _NODES * library.call("ggml_graph_overhead")
        made: int | None = library.call("ggml_init", _InitParams(size + 1024, None, True))
        if made is None:
            raise GgmlError(f"{library.name} has no memory for a context")
        self.context, self.left = made, _ROOM
        weakref.finalize(self, library.call, "ggml_free", made)


class Tensor:
    """A tensor of ggml with memory of its own.

    handle  ggml's pointer
    type    number of its type, as it was made
    nbytes  bytes of its elements as ggml counts them
    """

    def __init__(self, library: Ggml, type_: int, sizes: tuple[int, ...], place: int) -> None:
        self._library, self.type = library, type_
        self._room = library.room(1)
        filled = (*sizes, 1, 1, 1)[:4]
        self.handle: int = library.call("ggml_new_tensor_4d", self._room.context, type_, *filled)
        self.nbytes: int = library.call("ggml_nbytes", self.handle)
        library.allocate(self._room, place, self)

    def set(self, data: np.ndarray) -> None:
        """Put the elements there, given as an array of as many bytes; repacks, if the place does.

        Raises GgmlError where the bytes are not as many.
        """
        data = np.ascontiguousarray(data)
        if data.nbytes != self.nbytes:
            raise GgmlError(f"a tensor of {self.nbytes} bytes was given {data.nbytes}")
        address = data.ctypes.data
        self._library.call("ggml_backend_tensor_set", self.handle, address, 0, self.nbytes)


class Graph:
    """What leads to one tensor, ready to run.

    build  makes nodes in the context that it is given, and returns the last
    """

    def __init__(self, library: Ggml, build: Callable[[int], int]) -> None:
        self._library, self._build = library, build  # which knows the tensors that must live on
        self._room = library.room(_NODES)
        self._node = build(self._room.context)
        self._graph = library.call("ggml_new_graph", self._room.context)
        library.call("ggml_build_forward_expand", self._graph, self._node)
        library.allocate(self._room, library.default_place, self)
        # looked up once: what a call costs besides the work is two pointers
        compute, backend, graph = library.compute, library.backend, self._graph

        def run() -> None:
            if (status := compute(backend, graph)) != 0:
                raise GgmlError(f"{library.name} could not compute: status {status}")

        self.run: Callable[[], None] = run

    def supported(self) -> bool:
        """Whether the CPU does the last operation with its arguments where they lie."""
        library = self._library
        return bool(library.call("ggml_backend_supports_op", library.backend, self._node))

    def result(self) -> np.ndarray:
        """The last tensor's elements in one dimension, float32, as of the last run."""
        size = self._library.call("ggml_nbytes", self._node)
        y = np.empty(size // 4, np.float32)
        self._library.call("ggml_backend_tensor_get", self._node, y.ctypes.data, 0, size)
        return y


class Ggml:
    """A ggml with its CPU backend.

    folder   of a build, or of its shared libraries
    threads  that it computes with
    name     "llama.cpp" or "ik_llama.cpp"
    backend  ggml's pointer
    compute  its function that runs a graph

    Raises GgmlError where the folder has no such library.
    """

    def __init__(self, folder: Path, threads: int) -> None:
        self._libraries = _load(Path(folder))
        self._functions: dict[str, Any] = {}
        self.is_ik = self._has("iqk_repack_tensor")
        self.name = "ik_llama.cpp" if self.is_ik else "llama.cpp"
        for name, signature in (_SIGNATURES | (_REPACKING if self.is_ik else _REGISTRY)).items():
            self.declare(name, *signature)
        self.declare("ggml_init", _P, [_InitParams])
        if self._has("ggml_log_set"):
            self.declare("ggml_log_set", None, [_Log, _P])
            self.call("ggml_log_set", _silent, None)
        self._room = _Room(self)  # the first makes ggml's tables
        self.backend: int = self.call("ggml_backend_cpu_init")
        self.call("ggml_backend_cpu_set_n_threads", self.backend, threads)
        self.default_place: int = self.call("ggml_backend_cpu_buffer_type")
        self.compute = self._functions["ggml_backend_graph_compute"]

    def _has(self, name: str) -> bool:
        return any(hasattr(library, name) for library in self._libraries)

    def declare(self, name: str, result: Any, arguments: list[Any]) -> None:
        """Say the types of a function, by which `call` knows it.

        Raises GgmlError where the library lacks it.
        """
        for library in self._libraries:
            if hasattr(library, name):
                function = getattr(library, name)
                function.restype, function.argtypes = result, arguments
                self._functions[name] = function
                return
        raise GgmlError(f"{self.name} has no function {name}: it is too old or too new for this")

    def call(self, name: str, *arguments: Any) -> Any:
        """Call a function that was declared."""
        return self._functions[name](*arguments)

    def room(self, tensors: int) -> _Room:
        """Room for the descriptions of so many tensors and of a graph."""
        if self._room.left < tensors:
            self._room = _Room(self)
        self._room.left -= tensors
        return self._room

    def allocate(self, room: _Room, place: int, owner: object) -> None:
        """Memory for all tensors of a context that have none, which is freed with its owner."""
        made: int | None = self.call(
            "ggml_backend_alloc_ctx_tensors_from_buft", room.context, place
        )
        if made is None:
            raise GgmlError(f"{self.name} has no memory for these tensors")
        weakref.finalize(owner, self.call, "ggml_backend_buffer_free", made)

    def type_number(self, name: str) -> int:
        """The number of a type of files, by its name, such as "q4_K".

        Raises GgmlError where the library does not know it.
        """
        for number in range(_FILE_TYPES):
            found = self.call("ggml_type_name", number)
            if found is not None and found.decode() == name:
                return number
        raise GgmlError(f"{self.name} has no type {name}")

    def places(self) -> dict[str, int]:
        """Where weights can lie, by name: the CPU's plain memory, and the buffers that repack
        what is put there (of which llama.cpp has some, ik_llama.cpp none)."""
        found = {"plain": self.default_place}
        if self.is_ik:
            return found
        registry = self.call("ggml_backend_cpu_reg")
        device = self.call("ggml_backend_reg_dev_get", registry, 0)
        address = self.call(
            "ggml_backend_reg_get_proc_address", registry, b"ggml_backend_dev_get_extra_bufts"
        )
        if address is None:
            return found
        extra = ctypes.CFUNCTYPE(POINTER(c_void_p), c_void_p)(address)(device)
        for place in _until_null(extra):
            found[self.call("ggml_backend_buft_name", place).decode()] = place
        return found

    def tensor(
        self, type_name: str, sizes: tuple[int, ...], data: np.ndarray | None = None, place: int = 0
    ) -> Tensor:
        """A tensor of these sizes, the innermost first, and its elements if they are given."""
        made = Tensor(self, self.type_number(type_name), sizes, place or self.default_place)
        if data is not None:
            made.set(data)
        return made

    def graph(self, build: Callable[[int], int]) -> Graph:
        """What `build`, which gets a context, makes."""
        return Graph(self, build)

    def repack(self, w: Tensor) -> bool:
        """Interleave rows in place, as `-rtr 1` of ik_llama.cpp does; whether there is a type for
        that.  What was in the tensor is in another type afterwards."""
        if not self.is_ik or self.call("iqk_repacked_type", w.handle) == w.type:
            return False
        self.call("iqk_repack_tensor", w.handle)
        return True


def _until_null(pointers: Any) -> Iterator[int]:
    index = 0
    while pointers[index]:
        yield pointers[index]
        index += 1


def _load(folder: Path) -> list[ctypes.CDLL]:
    """libggml-base and libggml-cpu of llama.cpp, or the one libggml of ik_llama.cpp."""
    suffix = next((s for s in (".so", ".dylib", ".dll") if any(_with(folder, s))), None)
    if suffix is None:
        raise GgmlError(f"{folder} has no library of ggml; give the folder of a build of llama.cpp")
    found = {path.name.split(".")[0].removeprefix("lib"): path for path in _with(folder, suffix)}
    wanted = ["ggml-base", "ggml-cpu"] if "ggml-cpu" in found else ["ggml"]
    if missing := [name for name in wanted if name not in found]:
        raise GgmlError(f"{folder} has no library {' or '.join(missing)}")
    return [ctypes.CDLL(str(found[name].resolve())) for name in wanted]


def _with(folder: Path, suffix: str) -> Iterator[Path]:
    for inside in _FOLDERS:
        yield from (folder / inside).glob(f"*ggml*{suffix}")


def products(
    library: Ggml, type_name: str, blocks: np.ndarray, x: dict[int, np.ndarray]
) -> dict[str, dict[int, Graph]]:
    """x @ w.T for each x, float32 (M, K) by M, in each way that the library has for the type.

    blocks  uint8 (N, bytes of a row), as they lie in a GGUF file
    Gives graphs by the way's name and M, whose results are (M, N).
    """
    k = next(iter(x.values())).shape[1]
    inputs = {m: library.tensor("f32", (k, m), rows) for m, rows in x.items()}

    def over(w: Tensor) -> dict[int, Graph]:
        return {m: library.graph(_product(library, w, rows)) for m, rows in inputs.items()}

    found: dict[str, dict[int, Graph]] = {}
    for name, place in library.places().items():
        w = library.tensor(type_name, (k, len(blocks)), place=place)
        graphs = over(w)
        if all(graph.supported() for graph in graphs.values()):
            w.set(blocks)
            found[name] = graphs
    if library.is_ik:
        w = library.tensor(type_name, (k, len(blocks)), blocks)
        if library.repack(w):
            found["repacked"] = over(w)
    return found


def _product(library: Ggml, w: Tensor, x: Tensor) -> Callable[[int], int]:
    return lambda context: int(library.call("ggml_mul_mat", context, w.handle, x.handle))

"""What others multiply quantized matrices with on a CPU, each in every way that it has.

A rival that keeps the blocks of the same format (llama.cpp, ik_llama.cpp) gets them as they lie in
a file.  The others quantize the same values anew, with the bits that they have, or take them as
floats.  Nothing here is imported before it is used, and a rival that is not installed says so.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

import kernelgen
from bench.ggml import Ggml, GgmlError, Graph, products
from kernelgen.targets.c.runtime import threads
from kernelgen.tensor import QuantTensor

Array = np.ndarray

#: elements that share a scale where a rival lets one choose: as many as in most block formats
GROUP = 32

#: formats of more bits than this keep more than a rival of 4 bits does
FOUR_BITS_SERVE = 5.0


#: how ways of ggml that leave blocks as they lie in files begin
PLAIN = "plain"


class AbsentError(Exception):
    """Why a rival does not run here."""


@dataclass(frozen=True)
class Problem:
    """x @ w.T for several x, and w of which only some rows differ.

    n       rows of w
    rows    float32 (R, K), the values of the rows that differ
    ms      rows of each x
    format  of w, for those who take its blocks
    blocks  uint8 (R, bytes of a row), of the rows that differ
    memory  bytes that copies of w are to come to together, of which each call takes the next
    """

    n: int
    rows: Array
    ms: tuple[int, ...]
    format: str = ""
    blocks: Array | None = None
    memory: int = 0

    @functools.cached_property
    def x(self) -> dict[int, Array]:
        """float32 (M, K) by M, the same for the same shape."""
        rng = np.random.default_rng(self.n)
        return {m: rng.standard_normal((m, self.k), np.float32) for m in self.ms}

    @functools.cached_property
    def w(self) -> QuantTensor:
        """(N, K)"""
        assert self.blocks is not None
        return QuantTensor(self.format, (self.n, self.k), self.spread(self.blocks))

    @property
    def k(self) -> int:
        """Elements of a row."""
        return int(self.rows.shape[1])

    def spread(self, rows: Array) -> Array:
        """What belongs to the R rows that differ, (R, ...), for all N rows."""
        return np.resize(rows, (self.n, *rows.shape[1:]))

    def copies(self, bits: float) -> Iterator[Problem]:
        """The same problem, as often as weights of so many bits each come to `memory`."""
        nbytes = self.n * self.k * bits / 8
        for _ in range(max(1, math.ceil(self.memory / nbytes))):
            yield replace(self)  # which has made no w yet

    def error(self, m: int, y: Array) -> float:
        """The root mean square of what a result, (M, N), is off by, relative to the values'."""
        few = self.x[m].astype(np.float64) @ self.rows.T.astype(np.float64)
        expected = few[:, np.arange(self.n) % len(self.rows)]
        return float(np.sqrt(np.mean((y - expected) ** 2) / np.mean(few**2)))


@dataclass(frozen=True)
class Product:
    """run does the work; result gives what came out, (M, N), some time after."""

    run: Callable[[], object]
    result: Callable[[], Array]


#: products by the way that they are done, and by M
Ways = dict[str, dict[int, Product]]


def in_rotation(copies: list[Ways]) -> Ways:
    """Of the same ways with copies of the weights: each run is that of the next copy."""
    if len(copies) == 1:
        return copies[0]

    def rotating(products: list[Product]) -> Product:
        turn = itertools.cycle(products)
        last = products[0]

        def run() -> None:
            nonlocal last
            last = next(turn)
            last.run()

        return Product(run, lambda: last.result())

    for copy in copies:
        for by_m in copy.values():
            by_m[min(by_m)].run()  # packs
    return {
        way: {m: rotating([copy[way][m] for copy in copies]) for m in by_m}
        for way, by_m in copies[0].items()
    }


@dataclass(frozen=True)
class Rival:
    """Somebody else's product.

    same    whether it multiplies the blocks of the format itself
    bits    of its codes
    error   that it may have by `Problem.error`; activations of 8 bits make 0.01 of it
    make    gives its ways for a problem; raises AbsentError
    """

    name: str
    same: bool
    bits: int
    error: float
    make: Callable[[Problem], Ways]

    def made(self, problem: Problem) -> Ways:
        """Its ways, over as many copies of the weights as the problem asks for.

        Raises AbsentError."""
        bits: float = self.bits
        if self.same:
            assert problem.blocks is not None
            bits = 8 * problem.blocks.size / problem.rows.size
        return in_rotation([self.make(copy) for copy in problem.copies(bits)])

    def serves(self, bits: float) -> bool:
        """Whether it keeps about as much as a format of so many bits does."""
        return self.same or self.bits > 4 or bits <= FOUR_BITS_SERVE


def rivals(llama: list[Path], ik: list[Path]) -> list[Rival]:
    """All of them, kernelgen first; the folders are of builds of llama.cpp and ik_llama.cpp."""
    return [
        Rival("kernelgen", True, 0, 0.02, _kernelgen),
        Rival("llama.cpp", True, 0, 0.02, functools.partial(_ggml, "llama.cpp", tuple(llama))),
        Rival("ik_llama.cpp", True, 0, 0.02, functools.partial(_ggml, "ik_llama.cpp", tuple(ik))),
        Rival("numpy float32", False, 32, 1e-5, _numpy),
        Rival("torch bfloat16", False, 16, 0.01, _torch_bfloat16),
        Rival("torch int8", False, 8, 0.03, _torch_int8),
        Rival("torch int4", False, 4, 0.2, _torch_int4),
        Rival("onnxruntime int8", False, 8, 0.03, functools.partial(_onnxruntime, 8)),
        Rival("onnxruntime int4", False, 4, 0.2, functools.partial(_onnxruntime, 4)),
        Rival("OpenVINO int8", False, 8, 0.03, functools.partial(_openvino, 8)),
        Rival("OpenVINO int4", False, 4, 0.2, functools.partial(_openvino, 4)),
    ]


def _grouped(rows: Array, bits: int, group: int) -> tuple[Array, Array]:
    """Codes, int8 (R, K), symmetric about 0, and scales, float32 (R, K / group)."""
    most = 2 ** (bits - 1) - 1
    blocks = rows.reshape(len(rows), -1, group)
    scales = np.abs(blocks).max(-1, keepdims=True) / most
    codes = np.rint(blocks / np.where(scales, scales, 1)).astype(np.int8)
    return codes.reshape(rows.shape), scales[..., 0].astype(np.float32)


# ---- of the same format ---------------------------------------------------------------------


def _kernelgen(problem: Problem) -> Ways:
    w = problem.w

    def one(x: Array) -> Product:
        y = np.empty((len(x), problem.n), np.float32)
        return Product(lambda: kernelgen.matmul(x, w, target="c", out=y), lambda: y)

    return {"matmul": {m: one(x) for m, x in problem.x.items()}}


@functools.cache
def _library(folder: Path) -> Ggml:
    return Ggml(folder, threads())


def _ggml(name: str, folders: tuple[Path, ...], problem: Problem) -> Ways:
    if not folders:
        raise AbsentError(f"no build of {name} was given")
    ways: Ways = {}
    problems = []
    for number, folder in enumerate(folders):
        of_build = f", build {number + 1}" if number else ""
        try:
            library = _library(folder)
            if library.name != name:
                raise GgmlError(f"{folder} is a build of {library.name}, not of {name}")
            made = products(library, problem.format, problem.w.data, problem.x)
        except (GgmlError, OSError) as error:
            problems.append(str(error))
            continue
        for way, graphs in made.items():
            ways[way + of_build] = {m: _of_graph(graph, m) for m, graph in graphs.items()}
    if not ways:
        raise AbsentError("; ".join(problems))
    return ways


def _of_graph(graph: Graph, m: int) -> Product:
    return Product(graph.run, lambda: graph.result().reshape(m, -1))


# ---- numpy and torch ------------------------------------------------------------------------


def _numpy(problem: Problem) -> Ways:
    dense = problem.spread(problem.rows)

    def one(x: Array) -> Product:
        y = np.empty((len(x), len(dense)), np.float32)
        return Product(lambda: np.matmul(x, dense.T, out=y), lambda: y)

    return {"matmul": {m: one(x) for m, x in problem.x.items()}}


def _torch() -> Any:
    try:
        import torch
    except ImportError as error:
        raise AbsentError(f"torch is not installed ({error})") from error
    torch.set_num_threads(threads())
    return torch


def _torch_products(problem: Problem, dtype: Any, call: Callable[[Any], Any]) -> dict[int, Product]:
    """A product for each x, given to `call` as a tensor of the dtype."""
    torch = _torch()

    def one(x: Any) -> Product:
        kept: list[Any] = [None]

        def run() -> None:
            with torch.inference_mode():
                kept[0] = call(x)

        return Product(run, lambda: kept[0].float().numpy())

    return {m: one(torch.from_numpy(x).to(dtype)) for m, x in problem.x.items()}


def _torch_bfloat16(problem: Problem) -> Ways:
    torch = _torch()
    w = torch.from_numpy(problem.spread(problem.rows)).bfloat16()
    linear = torch.nn.functional.linear
    return {"linear": _torch_products(problem, torch.bfloat16, lambda x: linear(x, w))}


def _torch_int8(problem: Problem) -> Ways:
    """One scale a row: activations in bfloat16, the faster dtype of that kernel, or quantized by
    each of torch's engines."""
    torch = _torch()
    codes, scales = _grouped(problem.rows, 8, problem.k)
    q = torch.from_numpy(problem.spread(codes))
    scale = torch.from_numpy(problem.spread(scales[:, 0]))
    half = scale.bfloat16()
    ways: Ways = {
        "_weight_int8pack_mm": _torch_products(
            problem, torch.bfloat16, lambda x: torch.ops.aten._weight_int8pack_mm(x, q, half)
        )
    }
    zeros = torch.zeros(len(q), dtype=torch.int64)
    w = torch._make_per_channel_quantized_tensor(q, scale.double(), zeros, 0)
    before = torch.backends.quantized.engine
    for engine in {"onednn", "fbgemm"} & set(torch.backends.quantized.supported_engines):
        torch.backends.quantized.engine = engine
        packed = torch.ops.quantized.linear_prepack(w, None)
        ways[f"linear_dynamic, {engine}"] = _torch_products(
            problem, torch.float32,
            lambda x, packed=packed: torch.ops.quantized.linear_dynamic(x, packed),
        )  # fmt: skip
    torch.backends.quantized.engine = before
    return ways


def _torch_int4(problem: Problem) -> Ways:
    torch = _torch()
    codes, scales = _grouped(problem.rows, 4, GROUP)
    q = torch.from_numpy(problem.spread(codes)).int() + 8
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q, 1)
    scale = torch.from_numpy(problem.spread(scales)).T
    # a scale and what a code of 8 stands for, by group and row
    both = torch.stack((scale, torch.zeros_like(scale)), -1).contiguous().bfloat16()
    # with other dtypes this kernel takes many times as long
    return {
        "_weight_int4pack_mm_for_cpu": _torch_products(
            problem, torch.bfloat16,
            lambda x: torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, GROUP, both),
        )
    }  # fmt: skip


# ---- engines --------------------------------------------------------------------------------


def _onnxruntime(bits: int, problem: Problem) -> Ways:
    """MatMulNBits with int8 activations (accuracy level 4), its fastest."""
    try:
        import onnx
        import onnxruntime
    except ImportError as error:
        raise AbsentError(f"onnxruntime or onnx is not installed ({error})") from error
    onnxruntime.set_default_logger_severity(3)
    n, k = problem.n, problem.k
    codes, scales = _grouped(problem.rows, bits, GROUP)
    shifted = (codes.astype(np.int16) + 2 ** (bits - 1)).astype(np.uint8)
    if bits == 4:
        shifted = shifted[:, 0::2] | shifted[:, 1::2] << 4
    packed = problem.spread(shifted.reshape(len(codes), k // GROUP, -1))
    numbers = problem.spread(scales)
    helper, types = onnx.helper, onnx.TensorProto
    node = helper.make_node(
        "MatMulNBits", ["x", "w", "scales"], ["y"], domain="com.microsoft", K=k, N=n, bits=bits,
        block_size=GROUP, accuracy_level=4,
    )  # fmt: skip
    weights = [
        helper.make_tensor("w", types.UINT8, packed.shape, packed.tobytes(), raw=True),
        helper.make_tensor("scales", types.FLOAT, (numbers.size,), numbers.tobytes(), raw=True),
    ]
    graph = helper.make_graph(
        [node], "product",
        [helper.make_tensor_value_info("x", types.FLOAT, ["m", k])],
        [helper.make_tensor_value_info("y", types.FLOAT, ["m", n])], weights,
    )  # fmt: skip
    sets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=sets, ir_version=9)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads(), 1
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return {"MatMulNBits": {m: _of_session(session, x, n) for m, x in problem.x.items()}}


def _of_session(session: Any, x: Array, n: int) -> Product:
    y = np.empty((len(x), n), np.float32)
    bound = session.io_binding()
    bound.bind_input("x", "cpu", 0, np.float32, x.shape, x.ctypes.data)
    bound.bind_output("y", "cpu", 0, np.float32, y.shape, y.ctypes.data)
    # x lives in the problem, which the result's function keeps
    return Product(lambda: session.run_with_iobinding(bound), lambda _x=x: y)  # type: ignore[misc]


def _openvino(bits: int, problem: Problem) -> Ways:
    """Weights that are decompressed inside the product: with int8 activations, and with bfloat16
    where the CPU has units for it."""
    try:
        import openvino
        from openvino import opset13 as ops
    except ImportError as error:
        raise AbsentError(f"openvino is not installed ({error})") from error
    n, k = problem.n, problem.k
    codes, scales = _grouped(problem.rows, bits, GROUP)
    if bits == 4:
        nibbles = codes.astype(np.uint8) & 15
        packed = problem.spread(nibbles[:, 0::2] | nibbles[:, 1::2] << 4)
        kind = openvino.Type.i4
    else:
        packed, kind = problem.spread(codes), openvino.Type.i8
    shape = openvino.Shape([n, k // GROUP, GROUP])
    weights = openvino.op.Constant(openvino.Tensor(packed.reshape(-1), shape, kind))
    halves = ops.constant(problem.spread(scales).reshape(n, -1, 1).astype(np.float16))
    x = ops.parameter([-1, k], np.float32)
    scaled = ops.multiply(ops.convert(weights, "f16"), halves)
    w = ops.convert(ops.reshape(scaled, np.array([n, k], np.int64), False), "f32")
    model = openvino.Model([ops.matmul(x, w, False, True)], [x])
    core = openvino.Core()
    common = {"INFERENCE_NUM_THREADS": threads(), "NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY"}
    ways: Ways = {}
    for way, precision, group in _openvino_ways(core):
        compiled = core.compile_model(
            model, "CPU",
            common | {"INFERENCE_PRECISION_HINT": precision,
                      "DYNAMIC_QUANTIZATION_GROUP_SIZE": group},
        )  # fmt: skip
        # weights are packed when they are first used
        kept = (packed, compiled)
        ways[way] = {m: _of_request(openvino, compiled, x, kept) for m, x in problem.x.items()}
    return ways


def _openvino_ways(core: Any) -> Iterator[tuple[str, str, int]]:
    yield "int8 activations", "f32", GROUP
    if "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        yield "bfloat16", "bf16", 0


def _of_request(openvino: Any, compiled: Any, x: Array, kept: Any) -> Product:
    """`kept` is what must live as long, as does x."""
    request = compiled.create_infer_request()
    request.set_input_tensor(openvino.Tensor(x, shared_memory=True))
    return Product(request.infer, lambda _kept=(kept, x): request.get_output_tensor().data)  # type: ignore[misc]

"""The Triton target: run by its interpreter (or a GPU), compiled ahead of time for others."""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernelgen import targets
from kernelgen.config import Config
from kernelgen.errors import CompileError, TargetError
from kernelgen.files import build, file_name, kernels
from kernelgen.generate import generate
from kernelgen.ir import BlockFormat, formats, table, where
from kernelgen.ir.evaluate import evaluate
from kernelgen.ir.expr import (
    I32,
    LOADS,
    U32,
    Expr,
    cast,
    const,
    load,
    spread,
    substitute,
    transform,
    var,
    walk,
)
from kernelgen.ir.layout import NATIVE, PLANES
from kernelgen.ir.ops import matmul, quantize_activations
from kernelgen.ir.rules import simplify
from kernelgen.problem import relative_error, tolerance
from kernelgen.targets.base import Kernel, Walk
from kernelgen.targets.triton import runtime as triton_runtime
from kernelgen.targets.triton.dialect import TENSORS, UNROLLED, TensorPrinter, UnrolledPrinter
from kernelgen.targets.triton.runtime import GPUS, Binary, compile_ahead, compile_all
from kernelgen.targets.triton.steps import (
    LONGEST_TABLE,
    _selected,
    _without_tables,
    tensor_steps,
)
from kernelgen.tensor import QuantTensor
from kernelgen.verify import sample_weights, verify
from tests.device_checks import most_slow
from tests.ir.strategies import FIELDS, IX, POINTS, STORED, U, bools, ints, value
from tests.made_up import THREE_BITS
from tests.test_numpy_target import ODD, edge_blocks, finite_blocks, same_bits

Array = npt.NDArray[Any]

TARGET = targets.get("triton")
RUNTIME: Any = TARGET.runtime()
REASON = RUNTIME.available()

pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

#: names that Python, Triton or the templates use; groups of which no power of two is one
AWKWARD = BlockFormat(
    name="awkward_names", block=48, group=24, nbytes=4 + 2 + 2 + 24 + 6 + 2,
    fields={
        "tl": "u32", "np": "f16", "w": "u8[2]", "x": "u8[24]", "blocks": "u8[6]", "range": "i16",
    },
    ints={"first": lambda b, g: b.w[g] & 31, "row": lambda b, g: b.range >> (3 * g)},
    code=lambda b, i: (
        ((b.x[i % 24] >> (4 * (i // 24))) & 15) | (((b.blocks[i % 6] >> (i // 6)) & 1) << 4)
    ),
    scale=lambda b, g: b.np * b.first[g],
    offset=lambda b, g: b.np * (b.row[g] // 3 % 5 + (cast(I32, b.tl >> 29) - 4) // 3),
    bias=11,
)  # fmt: skip

#: groups of eight and a table that is longer than a word's bytes; branches that read outside
SMALL = BlockFormat(
    name="small", block=16, group=8, nbytes=2 + 16,
    fields={"d": "f16", "qs": "u8[16]"},
    code=lambda b, i: table(tuple(range(-20, 20)), b.qs[i] % 40),
    scale=lambda b, g: b.d * where(g < 1, b.qs[g + 15] & 3, b.qs[g - 1] & 7),
)  # fmt: skip

EVERY = (*formats.FORMATS, *ODD, AWKWARD, SMALL, THREE_BITS)


def name_of(thing: Any) -> str:
    return getattr(thing, "name", str(thing))


def variants(one: Walk, fmt: BlockFormat) -> Iterator[Config]:
    """The default, and every other value of every choice that changes the source."""
    default = one.config.default(TARGET.capabilities)
    yield default
    for field in dataclasses.fields(default):
        for choice in field.metadata["choices"]:
            if field.name not in ("warps", "stages") and choice != getattr(default, field.name):
                yield dataclasses.replace(default, **{field.name: choice})


def compiled_only(config: Config) -> bool:
    """Whether the interpreter has no word for something: an instruction by its name."""
    return "dot" in config.features


def product_error(kernel: Kernel, m: int, n: int, blocks: int) -> float:
    fmt = kernel.format
    k = blocks * fmt.block
    data = finite_blocks(fmt, n * blocks)
    if kernel.precision == "fp16":  # for numbers that have fewer bits, weights as there are
        data = sample_weights(fmt, n, k)
    w = QuantTensor(fmt, (n, k), data)
    x = np.random.default_rng(m).standard_normal((m, k), np.float32)
    seen = x
    if kernel.precision == "int8":
        seen = quantize_activations(x, fmt.block, fmt.group).values()
    y = np.full((m, n), np.nan, np.float32)
    RUNTIME.matmul(kernel)(x, w, y)
    return relative_error(y, matmul(seen, w.dequantize()))


# ---- against the reference ---------------------------------------------------------------------


@pytest.mark.parametrize("name", ["q4_K", "mxfp4", "bf16", "iq2_xs"])
def test_verified(name: str) -> None:
    results = list(verify(TARGET, [formats.get(name)]))
    ops = {r.op for r in results}
    assert ops >= {"dequantize", "get_rows", "matvec", "matmul"}
    assert [(r.op, r.precision, r.problem) for r in results if not r.ok] == []
    assert {r.how for r in results} == {RUNTIME.how()}


@pytest.mark.slow
@pytest.mark.parametrize("fmt", formats.FORMATS, ids=name_of)
def test_every_format_is_verified(fmt: BlockFormat) -> None:
    assert [(r.op, r.precision, r.problem) for r in verify(TARGET, [fmt]) if not r.ok] == []


@pytest.mark.parametrize("layout", ["native", "planes"])
@pytest.mark.parametrize("fmt", most_slow(EVERY), ids=name_of)
def test_decoding_is_exact(fmt: BlockFormat, layout: str) -> None:
    w = QuantTensor(fmt, (5, 8 * fmt.block), edge_blocks(fmt))
    kernel = generate("dequantize", fmt, TARGET, config(fmt, "dequantize", layout=layout))
    assert same_bits(RUNTIME.dequantize(kernel, w), w.dequantize())
    kernel = generate("get_rows", fmt, TARGET, config(fmt, "get_rows", layout=layout))
    for chosen in ([3], [4, 0, 4, 2, 1, 1], []):
        rows = np.array(chosen, np.int64)
        assert same_bits(RUNTIME.get_rows(kernel, w, rows), w.dequantize(rows))


def config(fmt: BlockFormat, op: str, precision: str = "", **values: Any) -> Config:
    return TARGET.walk(op, fmt, precision).config(**values)


@pytest.mark.parametrize("fmt", [formats.get("q4_K"), formats.get("q8_0"), AWKWARD], ids=name_of)
def test_quantized_activations_are_equal(fmt: BlockFormat) -> None:
    rng = np.random.default_rng(1)
    x = rng.standard_normal((12, 3 * fmt.block), np.float32)
    x[1] = 0
    x[2] *= np.float32(1e-42)
    x[3] *= np.float32(1e37)
    x[4, 5], x[5, 6], x[6, 7] = np.nan, np.inf, -np.inf
    x[7] = np.arange(x.shape[1]) % 255 - 127  # whole numbers
    x[8] = (np.arange(x.shape[1]) % 254 - 126.5) * 2  # halves, which round to even
    x[9] = -0.0
    kernel = generate("quantize", fmt, TARGET)
    got, want = RUNTIME.quantize(kernel, x), quantize_activations(x, fmt.block, fmt.group)
    assert np.array_equal(got.q, want.q)
    assert same_bits(got.scale, want.scale) and same_bits(got.sums, want.sums)


@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize(
    "fmt", [AWKWARD, SMALL, *ODD, *map(formats.get, ("q5_0", "q8_K"))], ids=name_of
)
def test_products(fmt: BlockFormat, precision: str) -> None:
    if precision == "int8" and fmt.float_codes:
        with pytest.raises(TargetError, match="floats"):
            generate("matmul", fmt, TARGET, precision=precision)
        return
    for op, m, n, blocks in (("matvec", 1, 3, 1), ("matvec", 8, 5, 3), ("matmul", 11, 3, 3)):
        kernel = generate(op, fmt, TARGET, precision=precision)
        assert product_error(kernel, m, n, blocks) <= tolerance(op), kernel.source


@pytest.mark.parametrize("op", ["matvec", "matmul"])
@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize("name", ["q4_K", "iq4_nl"])
def test_configurations_compute_the_same(name: str, precision: str, op: str) -> None:
    fmt = formats.get(name)
    for chosen in variants(TARGET.walk(op, fmt, precision), fmt):
        if compiled_only(chosen):
            continue
        kernel = generate(op, fmt, TARGET, chosen, precision)
        error = product_error(kernel, *((3, 5) if op == "matvec" else (19, 21)), 2)
        assert error <= tolerance(op, precision), chosen


@pytest.mark.slow
@pytest.mark.parametrize("fmt", EVERY, ids=name_of)
def test_every_format_in_every_configuration(fmt: BlockFormat) -> None:
    for one in TARGET.walks:
        if one.op not in ("matvec", "matmul") or one.accepts(fmt) is not None:
            continue
        for chosen in variants(one, fmt):
            if compiled_only(chosen) or (fmt in ODD and one.precision == "fp16"):
                continue
            kernel = generate(one.op, fmt, TARGET, chosen, one.precision)
            error = product_error(kernel, 3 if one.op == "matvec" else 19, 5, 3)
            assert error <= tolerance(one.op, one.precision), chosen


def test_what_is_not_finite_stays_so() -> None:
    fmt = formats.get("q4_1")
    w = QuantTensor(fmt, (20, 64), edge_blocks(fmt))
    x = np.ones((3, 64), np.float32)
    x[1, 3], x[2, 40] = np.inf, np.nan
    for op, precision in itertools.product(("matvec", "matmul"), ("fp32", "int8")):
        y = np.empty((3, 20), np.float32)
        RUNTIME.matmul(generate(op, fmt, TARGET, precision=precision))(x, w, y)
        seen = x if precision == "fp32" else quantize_activations(x, 32, 32).values()
        assert relative_error(y, matmul(seen, w.dequantize())) <= 1e-5


# ---- the source --------------------------------------------------------------------------------


def sources() -> dict[str, str]:
    return {file_name(k, TARGET): k.source for k in kernels(TARGET, EVERY)}


def digest() -> str:
    texts = [kernel.source for kernel in kernels(TARGET, (AWKWARD, SMALL, formats.get("q4_K")))]
    return hashlib.sha256("".join(texts).encode()).hexdigest()


def test_the_source_is_readable_python() -> None:
    for name, text in sources().items():
        module = ast.parse(text, name)
        assert ast.get_docstring(module)
        assert max(map(len, text.splitlines())) <= 100, name
        assert "kernelgen." not in text.replace("kernelgen 0.", "")
        for line in text.splitlines():
            assert line == line.rstrip(), name
        # the interpreter takes the last line that begins with this for the function's head
        assert sum(line.strip().startswith("def ") for line in text.splitlines()) == 1


def test_the_source_is_the_same_in_every_process() -> None:
    run = subprocess.run(
        [sys.executable, "-c", "from tests.test_triton import digest; print(digest())"],
        env=os.environ | {"PYTHONHASHSEED": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert run.stdout.strip() == digest()


STANDALONE = """
import importlib.util, os, sys
os.environ["TRITON_INTERPRET"] = "1"
sys.modules["kernelgen"] = None  # importing it fails
import numpy as np, torch
def entry(name):
    spec = importlib.util.spec_from_file_location(name, f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, "kernelgen_" + name)
w, x = torch.from_numpy(np.load("w.npy")), torch.from_numpy(np.load("x.npy"))
(m, k), n = x.shape, len(w)
xq = torch.empty((m, k), dtype=torch.int8)
xd, xs, y = torch.empty((m, k // 256)), torch.empty((m, k // 32)), torch.empty((m, n))
entry("quantize_q4_K_int8")[(-(-m * (k // 256) // 4),)](x, xq, xd, xs, m, k)
entry("matmul_q4_K_int8")[(-(-n // 64), -(-m // 64))](w, xq, xd, xs, y, m, n, k)
np.save("y.npy", y.numpy())
"""


def test_files_need_triton_alone(tmp_path: Path) -> None:
    fmt = formats.get("q4_K")
    build(TARGET, tmp_path, [fmt])
    folder = tmp_path / "triton"
    w = QuantTensor(fmt, (5, 512), finite_blocks(fmt, 10))
    x = np.random.default_rng(1).standard_normal((9, 512), np.float32)
    np.save(folder / "w.npy", w.data)
    np.save(folder / "x.npy", x)
    subprocess.run([sys.executable, "-c", STANDALONE], cwd=folder, check=True)
    seen = quantize_activations(x, fmt.block, fmt.group).values()
    assert relative_error(np.load(folder / "y.npy"), matmul(seen, w.dequantize())) <= 1e-5


def test_rejected_source_is_named_with_its_line() -> None:
    kernel = generate("dequantize", THREE_BITS, TARGET)
    broken = kernel.source.replace("codes >> shift", "codes >> absent")
    bad = dataclasses.replace(kernel, source=broken, hash="broken")
    w = QuantTensor(THREE_BITS, (1, 64), np.zeros((1, 28), np.uint8))
    line = next(n for n, text in enumerate(broken.splitlines(), 1) if "absent" in text)
    with pytest.raises(CompileError, match=rf"dequantize three_bits.*absent.* at line {line}:"):
        RUNTIME.dequantize(bad, w)
    with pytest.raises(CompileError, match=rf"absent.* at line {line}:"):
        compile_ahead(bad, "cuda:90")


# ---- the steps ---------------------------------------------------------------------------------

_BYTES = st.lists(st.integers(-128, 127), min_size=1, max_size=LONGEST_TABLE)
_WIDE = st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=LONGEST_TABLE)
_REAL = st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=20)


@given(st.one_of(_BYTES, _WIDE, _REAL))
def test_selections_are_the_table(values: list[Any]) -> None:
    index = var("index", len(values))
    at = np.arange(len(values))
    want = evaluate(table(values, index), {"index": at})
    got = evaluate(simplify(_selected(table(values, index).attr, index)), {"index": at})
    assert got.dtype == want.dtype and np.array_equal(np.broadcast_to(got, want.shape), want)


def test_a_long_table_is_refused() -> None:
    fmt = dataclasses.replace(SMALL, code=lambda b, i: table(range(-80, 0), b.qs[i] % 80))
    with pytest.raises(TargetError, match=r"table of 80 values.*up to 64"):
        generate("matmul", fmt, TARGET, precision="int8")


@given(st.sampled_from((1, 2, 4)), st.lists(st.integers(0, 2**32 - 1), min_size=1))
def test_spreads_in_plain_operations(bits: int, words: list[int]) -> None:
    x = var("x", 1 << 32, U32)
    given_ = {"x": np.array(words, np.uint32)}
    packed = spread(bits, x)
    plain = _without_tables(packed)
    assert all(node.op != "spread" for node in walk(plain))
    assert np.array_equal(evaluate(plain, given_), evaluate(packed, given_))


@pytest.mark.parametrize("layout", [NATIVE, PLANES], ids=name_of)
def test_words_are_loaded_whole_where_they_are_aligned(layout: Any) -> None:
    steps = tensor_steps(formats.get("q6_K"), layout)
    loaded = {p.field.name: p.dtype for p in steps.pointers}
    assert loaded["ql"] == ("uint32" if layout is PLANES else "uint16")
    assert (loaded["d"], loaded["scales"]) == ("float16", "int8")
    assert bool(steps.words) == (layout is NATIVE)


def test_only_what_is_taken_is_compiled() -> None:
    fmt = formats.get("q4_K")
    unrolled = config(fmt, "matmul", "int8", unroll=True)
    assert " if (g < 4) else " in generate("matmul", fmt, TARGET, unrolled, "int8").source
    assert "tl.where(" not in generate("matmul", fmt, TARGET, unrolled, "int8").source
    rolled = generate("matmul", fmt, TARGET, config(fmt, "matmul", "int8"), "int8").source
    assert "tl.maximum(g - 4, 0)" in rolled  # all branches load: none outside of its field


# ---- the dialect -------------------------------------------------------------------------------

HEADER = "import triton\nimport triton.language as tl\n\n\n@triton.jit\ndef run({names}, out):\n"


def run_printed(expr: Expr, printer: TensorPrinter) -> Array:
    """An expression of tests.ir.strategies as a kernel computes it, at all points."""
    import torch

    names: dict[str, Array] = {}

    def pointed(node: Expr) -> Expr | None:
        if node.op != "load":
            return None
        one = node.attr
        names[f"{one.name}_p"] = STORED[one.name][0]
        at = var(f"{one.name}_p", 1 << 31)
        return Expr("fetch", node.dtype, (at, node.args[0]), (one.storage, one.storage.nbytes))

    body = transform(expr, pointed)
    lines = []
    for node in walk(body):
        if node.op == "var" and not node.attr[0].endswith("_p"):
            name = node.attr[0]
            dtype = np.int32 if node.dtype is I32 else np.uint32
            names[f"{name}_in"] = np.resize(POINTS[name].astype(dtype), 64)
            lines.append(f"    {name} = tl.load({name}_in + tl.arange(0, 64))")
    lines.append(f"    value = {printer(body)}")
    # a constant is a number until something is beside it
    lines.append("    value = tl.broadcast_to(tl.cast(value, tl.int64), (64,))")
    lines.append("    tl.store(out + tl.arange(0, 64), value)")
    source = HEADER.format(names=", ".join(names)) + "\n".join(lines) + "\n"
    function = triton_runtime.load(source, f"<{hashlib.sha256(source.encode()).hexdigest()}>").run
    device = "cpu" if RUNTIME.how() == "emulated" else "cuda"
    tensors = [torch.from_numpy(v.copy()).to(device) for v in names.values()]
    out = torch.empty(64, dtype=torch.int64, device=device)
    with np.errstate(all="ignore"):
        function[(1,)](*tensors, out)
    result: Array = out.cpu().numpy()[:48]
    return result


def as_in_walks(expr: Expr) -> Expr:
    """The same without variables of u32, which no walk has."""
    return substitute(expr, {U: load(FIELDS["big"], IX % 4)})


def unnamed(expr: Expr) -> Expr:
    plain = transform(expr, lambda node: node.args[0] if node.op == "named" else None)
    return simplify(_without_tables(simplify(plain)))


@settings(max_examples=60)
@given(st.one_of(ints(I32), ints(U32), bools()).map(as_in_walks))
def test_printed_expressions_mean_the_same(expr: Expr) -> None:
    plain = unnamed(expr)
    if not any(n.op in ("var", *LOADS) for n in walk(plain)):
        return  # a number, whose type is that of what is beside it
    want = np.broadcast_to(value(expr), (3, 48))[0] if value(expr).ndim > 1 else value(expr)
    got = run_printed(plain, TensorPrinter(TENSORS, str))
    assert np.array_equal(got, np.broadcast_to(want, (48,)).astype(np.int64)), plain


def test_what_is_known_is_decided_before() -> None:
    g = var("g", 8)
    printer = UnrolledPrinter(UNROLLED, str)
    assert printer(where(g < 4, g + 1, g * 2)) == "((g + 1) if (g < 4) else (g * 2))"
    assert TensorPrinter(TENSORS, str)(where(g < 4, g, const(2, I32))) == "tl.where(g < 4, g, 2)"


# ---- the runtime -------------------------------------------------------------------------------


def test_results_say_what_they_are_worth() -> None:
    import torch

    assert RUNTIME.how() == ("run" if torch.cuda.is_available() else "emulated")
    assert RUNTIME.describe()[0]["triton"]


LATE = """
import sys
import triton.language
from kernelgen import targets
import torch
reason = targets.get("triton").runtime().available()
assert torch.cuda.is_available() or "TRITON_INTERPRET=1" in reason, reason
"""


def test_a_late_start_gives_a_reason() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    subprocess.run([sys.executable, "-c", LATE], env=environment, check=True)


# ---- ahead of time -----------------------------------------------------------------------------

#: instructions that a kernel must become, by GPU
UNITS = {"cuda:80": "mma.sync", "cuda:90": "wgmma", "cuda:100": "tcgen05.mma", "hip": "v_mfma"}


def compiled(made: list[tuple[Kernel, str]]) -> list[Binary]:
    results = compile_all(made)
    bad = [
        (k.entry, gpu, r) for (k, gpu), r in zip(made, results, strict=True) if isinstance(r, str)
    ]
    assert bad == []
    return [r for r in results if isinstance(r, Binary)]


@pytest.mark.parametrize("name", ["q4_K", "q6_K"])
def test_matrix_units_multiply_integers(name: str) -> None:
    kernel = generate("matmul", formats.get(name), TARGET, precision="int8")
    for binary in compiled([(kernel, gpu) for gpu in GPUS]):
        unit = UNITS.get(binary.gpu) or UNITS[binary.gpu.partition(":")[0]]
        assert unit in binary.assembly
        assert binary.size > 1000 and binary.kind in ("cubin", "hsaco")


def test_compiled_for_all_gpus() -> None:
    made = [generate("matvec", AWKWARD, TARGET, precision="int8")]
    made += [generate("get_rows", formats.get("mxfp4"), TARGET)]
    made += [generate("matmul", formats.get("bf16"), TARGET)]
    compiled(list(itertools.product(made, GPUS)))


def test_four_products_in_an_instruction() -> None:
    fmt = formats.get("q4_K")
    kernel = generate("matvec", fmt, TARGET, config(fmt, "matvec", "int8", dot="packed"), "int8")
    (binary,) = compiled([(kernel, "cuda:80")])
    assert "dp4a" in binary.assembly
    assert "ld.global.v4" in binary.assembly  # sixteen bytes of codes at once


def test_rounding_is_not_fused() -> None:
    (binary,) = compiled([(generate("quantize", formats.get("q4_K"), TARGET), "cuda:90")])
    assert "fma." not in binary.assembly and "div.rn.f32" in binary.assembly


def test_an_unknown_gpu_is_named() -> None:
    with pytest.raises(TargetError, match=r"'sm_90'.*cuda:90"):
        compile_ahead(generate("quantize", formats.get("q4_K"), TARGET), "sm_90")


@pytest.mark.slow
@pytest.mark.parametrize("gpu", GPUS)
def test_everything_compiles(gpu: str) -> None:
    made = [(kernel, gpu) for kernel in kernels(TARGET, EVERY)]
    compiled(made)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["q4_K", "q6_K", "iq4_nl"])
def test_every_configuration_compiles(name: str) -> None:
    fmt = formats.get(name)
    made = [
        (generate(one.op, fmt, TARGET, chosen, one.precision), "cuda:90")
        for one in TARGET.walks
        for chosen in variants(one, fmt)
    ]
    compiled(made)

"""The numpy target: what it writes means what the formats mean, and stands on its own."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import subprocess
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernelgen import generate as generate_module
from kernelgen import targets
from kernelgen.config import NoConfig
from kernelgen.errors import TargetError
from kernelgen.files import file_name, kernels
from kernelgen.generate import generate
from kernelgen.ir import (
    F32,
    U32,
    BlockFormat,
    bitcast,
    cast,
    const,
    equal,
    formats,
    table,
    var,
    where,
)
from kernelgen.ir.evaluate import NUMPY_DTYPES
from kernelgen.ir.expr import I32, Expr, call, logical_not, spread, transform, walk
from kernelgen.ir.ops import matmul, quantize_activations
from kernelgen.ir.rules import simplify
from kernelgen.problem import relative_error
from kernelgen.targets.numpy.dialect import ARRAYS, ArrayPrinter, statement
from kernelgen.targets.numpy.steps import array_steps
from kernelgen.tensor import QuantTensor
from tests.ir.strategies import POINTS, STORED, bools, ints, value

Array = npt.NDArray[Any]

TARGET = targets.get("numpy")
RUNTIME: Any = TARGET.runtime()

# ---- formats that nobody would write -----------------------------------------------------------

#: every name is one that Python, numpy or the templates use; two differ by the underscore that
#: renaming would give the other
AWKWARD = BlockFormat(
    name="awkward", block=32, group=8, nbytes=4 + 2 + 2 + 4 + 8 + 32,
    fields={
        "np": "u32", "dict": "f16", "scale": "u16", "i": "u8[4]", "x": "i16[4]", "len": "i8[32]",
    },
    ints={"blocks": lambda b, g: b.i[g] & 7, "scale_": lambda b, g: b.x[g] + b.scale},
    code=lambda b, i: (
        (b.len[i] & 15) ^ cast(I32, ((b.np >> i) & 1) | (b.np >> 28))
    ),
    scale=lambda b, g: b.dict * b.blocks[g],
    offset=lambda b, g: b.dict * (b.scale_[g] + b.blocks[3 - g] + b.blocks[0]),
    bias=-3,
    source='a "made up" one: """ \\N and\n' + "long " * 30,
)  # fmt: skip

#: branches that are not taken read outside of fields and tables; one field indexes another
OUTSIDE = BlockFormat(
    name="outside", block=64, group=8, nbytes=2 + 8 + 4 + 32,
    fields={"d": "f16", "sc": "u8[8]", "pick": "u8[4]", "qs": "u8[32]"},
    code=lambda b, i: where(
        i < 32, b.qs[i] & 15, (b.qs[(b.pick[i % 4] + i) % 32] >> 4) + table((1, 2, 3), i % 3)
    ),
    scale=lambda b, g: b.d * where(
        g < 3, b.sc[4 * g - 1 + where(g < 1, const(1, I32), 0)],
        where(g < 6, table((5, 7, 11, 13, 17, 19), g), b.sc[7 * (g - 6)]),
    ),
)  # fmt: skip

#: codes from a table of floats; scales that only the group decides, in more values than a line has
GRID = (*(float(np.float32(np.sin(v))) * (1 + v % 3) for v in range(15)), float("inf"))
FLOATS = BlockFormat(
    name="floats", block=32, group=4, nbytes=16 + 4,
    fields={"qs": "u8[16]", "shift": "f32"},
    code=lambda b, i: table(GRID, (b.qs[i % 16] >> (4 * (i // 16))) & 15),
    scale=lambda b, g: table(tuple(1.0 / (v + 1) for v in range(8)), g),
    offset=lambda b, g: call("sqrt", b.shift * b.shift) - 0.25,
)  # fmt: skip

#: nothing in a block but one code for all its elements
CONSTANT = BlockFormat(
    name="constant", block=32, group=4, nbytes=1, fields={"q": "u8"},
    code=lambda b, i: b.q, scale=lambda b, g: where(g < 1, const(0.5, F32), 2.0),
    offset=lambda b, g: bitcast(F32, const(0x7FC00000, U32)) + const(1.0, F32),
)  # fmt: skip

ODD = (AWKWARD, OUTSIDE, FLOATS, CONSTANT)
ALL = (*formats.FORMATS, *ODD)
INTEGERS = tuple(f for f in ALL if not f.float_codes)


def ids(fmt: BlockFormat) -> str:
    return fmt.name


def edge_blocks(fmt: BlockFormat) -> Array:
    """Zeros, ones, and random bytes with the floats that come out wrong first."""
    rng = np.random.default_rng(fmt.nbytes)
    blocks = rng.integers(0, 256, (40, fmt.nbytes), np.uint8)
    blocks[0], blocks[1], blocks[2] = 0, 255, 128
    fields = fmt.split(blocks[3:])
    special = [0.0, -0.0, 1.0, -1.0, 6e-8, -6e-8, 6e-5, 65504.0, np.inf, -np.inf, np.nan, 0.3]
    for one in fmt.layout_fields:
        if one.storage.name in ("f16", "f32"):
            rows = fields[one.name]
            rows[: len(special)] = np.array(special)[:, None]
            rows[len(special) : 2 * len(special)] = rng.permutation(special)[:, None]
    blocks[3:] = fmt.join(fields)
    return blocks


def finite_blocks(fmt: BlockFormat, count: int) -> Array:
    rng = np.random.default_rng(count)
    blocks = rng.integers(0, 256, (4 * count, fmt.nbytes), np.uint8)
    fields = fmt.split(blocks)
    for one in fmt.layout_fields:
        if one.storage.name in ("f16", "f32"):
            fields[one.name] = rng.uniform(-1, 1, fields[one.name].shape)
    blocks = fmt.join(fields)
    values = np.abs(fmt.decode(blocks)).max(axis=1)
    good = blocks[values < 1e6]
    return good[np.arange(count) % len(good)] if len(good) else blocks[:count]


def same_bits(a: Array, b: Array) -> bool:
    """Equal to the last bit and the sign of zero; any NaN for any NaN."""
    assert a.dtype == b.dtype == np.float32 and a.shape == b.shape
    nan = np.isnan(a) & np.isnan(b)
    return bool(((a.view(np.uint32) == b.view(np.uint32)) | nan).all())


# ---- against the reference ---------------------------------------------------------------------


@pytest.mark.parametrize("fmt", ALL, ids=ids)
def test_dequantize_is_exact(fmt: BlockFormat) -> None:
    blocks = edge_blocks(fmt)
    kernel = generate("dequantize", fmt, TARGET)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = RUNTIME.function(kernel)(blocks)
    assert kernel.entry == f"dequantize_{fmt.name}"
    assert same_bits(got, fmt.decode(blocks))
    w = QuantTensor(fmt, (5, 8 * fmt.block), blocks)
    assert same_bits(RUNTIME.dequantize(kernel, w), w.dequantize())
    assert same_bits(RUNTIME.function(kernel)(blocks[::2]), fmt.decode(blocks[::2]))
    assert RUNTIME.function(kernel)(blocks[:0]).shape == (0, fmt.block)


def test_many_blocks_are_decoded_in_chunks() -> None:
    fmt = formats.get("q4_0")
    blocks = np.tile(edge_blocks(fmt), (500, 1))
    got = RUNTIME.function(generate("dequantize", fmt, TARGET))(blocks)
    assert same_bits(got, fmt.decode(blocks))


@pytest.mark.parametrize("fmt", ALL, ids=ids)
def test_get_rows(fmt: BlockFormat) -> None:
    w = QuantTensor(fmt, (8, 5 * fmt.block), edge_blocks(fmt))
    kernel = generate("get_rows", fmt, TARGET)
    for chosen in ([3], [7, 0, 7, 2], []):
        rows = np.array(chosen, np.int64)
        assert same_bits(RUNTIME.get_rows(kernel, w, rows), w.dequantize(rows))


@pytest.mark.parametrize("fmt", INTEGERS, ids=ids)
def test_quantize_is_equal(fmt: BlockFormat) -> None:
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
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = RUNTIME.quantize(kernel, x)
    want = quantize_activations(x, fmt.block, fmt.group)
    assert got.q.dtype == np.int8 and np.array_equal(got.q, want.q)
    assert same_bits(got.scale, want.scale) and same_bits(got.sums, want.sums)
    empty = RUNTIME.quantize(kernel, x[:0])
    assert empty.q.shape == (0, x.shape[1]) and empty.scale.shape == (0, 3)


@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize("fmt", ALL, ids=ids)
def test_matmul_is_the_double_precision_product(fmt: BlockFormat, precision: str) -> None:
    if precision == "int8" and fmt.float_codes:
        with pytest.raises(TargetError, match="floats"):
            generate("matmul", fmt, TARGET, precision=precision)
        return
    n, k = 7, 6 * fmt.block
    w = QuantTensor(fmt, (n, k), finite_blocks(fmt, n * 6))
    x = np.random.default_rng(2).standard_normal((11, k), np.float32)
    x[3] = 0
    seen = x
    if precision == "int8":
        seen = quantize_activations(x, fmt.block, fmt.group).values()
    want = matmul(seen, w.dequantize())
    for op, m in (("matvec", 1), ("matvec", 8), ("matmul", 11), ("matmul", 0)):
        kernel = generate(op, fmt, TARGET, precision=precision)
        y = np.full((m, n), np.nan, np.float32)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            RUNTIME.matmul(kernel)(x[:m], w, y)
        assert m == 0 or relative_error(y, want[:m]) <= 1e-6


def test_rows_of_weights_are_decoded_some_at_a_time() -> None:
    fmt = formats.get("q8_0")
    k = 16 * fmt.block
    w = QuantTensor(fmt, (9000, k), finite_blocks(fmt, 9000 * 16))
    x = np.random.default_rng(4).standard_normal((2, k), np.float32)
    y = np.empty((2, 9000), np.float32)
    RUNTIME.matmul(generate("matmul", fmt, TARGET, precision="fp32"))(x, w, y)
    assert relative_error(y, matmul(x, w.dequantize())) <= 1e-6


def test_what_is_not_finite_stays_so() -> None:
    fmt = formats.get("q4_1")
    w = QuantTensor(fmt, (20, 64), edge_blocks(fmt))
    x = np.ones((3, 64), np.float32)
    x[1, 3], x[2, 40] = np.inf, np.nan
    y = np.empty((3, 20), np.float32)
    for precision in ("fp32", "int8"):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            RUNTIME.matmul(generate("matmul", fmt, TARGET, precision=precision))(x, w, y)
        seen = x if precision == "fp32" else quantize_activations(x, 32, 32).values()
        assert relative_error(y, matmul(seen, w.dequantize())) <= 1e-6


# ---- the source --------------------------------------------------------------------------------


def sources() -> dict[str, str]:
    return {file_name(k, TARGET): k.source for k in kernels(TARGET, ALL)}


#: runs in a Python that has no kernelgen: every file, on the same input
ALONE = """
import importlib.util, json, pathlib, sys
sys.modules["kernelgen"] = None  # importing it fails
import numpy as np
folder = pathlib.Path(sys.argv[1])
done = {}
for path in sorted(folder.glob("*.py")):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    arguments = np.load(path.with_suffix(".npz"))
    result = getattr(module, path.stem)(*[arguments[name] for name in arguments.files])
    np.savez(path.with_suffix(".out.npz"), *(result if isinstance(result, tuple) else (result,)))
    done[path.stem] = getattr(module, path.stem).__doc__
others = [name for name in sys.modules if name.split(".")[0] in ("jinja2", "kernelgen", "gguf")]
print(json.dumps([done, others]))
"""


def test_files_need_numpy_alone(tmp_path: Path) -> None:
    wanted: dict[str, Any] = {}
    for name, text in sources().items():
        (tmp_path / name).write_text(text, "utf-8")
    for kernel in kernels(TARGET, ALL):
        op, kind = kernel.op, kernel.subject
        fmt = kind.k if op == "attention" else kind
        blocks = finite_blocks(fmt, 12)
        x = np.random.default_rng(5).standard_normal((3, 4 * fmt.block), np.float32)
        w = blocks.reshape(3, -1)
        rows = np.array([2, 0])
        given_: tuple[Array, ...] = {
            "dequantize": (blocks,), "get_rows": (w, rows), "quantize": (x,),
        }.get(op, (x, w))  # fmt: skip
        if op == "attention":
            q = np.random.default_rng(6).standard_normal((1, 4, 3, kind.head_dim), np.float32)
            row = kind.head_dim // fmt.block
            cache = finite_blocks(fmt, 14 * row).reshape(1, 2, 7, -1)
            given_ = (q, cache, cache[:, :, ::-1])
        np.savez(tmp_path / f"{kernel.entry}.npz", *given_)
        here = RUNTIME.function(kernel)(*given_)
        wanted[kernel.entry] = here if isinstance(here, tuple) else (here,)
    command = [sys.executable, "-I", "-c", ALONE, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    documented, others = json.loads(done.stdout)
    assert others == ["kernelgen"]
    assert set(documented) == set(wanted) and all(documented.values())
    for name, want in wanted.items():
        with np.load(tmp_path / f"{name}.out.npz") as got:
            assert len(got.files) == len(want)
            for a, b in zip(got.files, want, strict=True):
                assert np.array_equal(got[a], b, equal_nan=True), name


def test_text_is_well_kept() -> None:
    for name, text in sources().items():
        tree = ast.parse(text, name)
        doc = ast.get_docstring(tree) or ""
        assert "Generated by kernelgen" in doc and ", hash " in doc
        assert text.endswith("\n") and not text.endswith("\n\n") and "\n\n\n\n" not in text
        assert max(map(len, text.splitlines())) <= 100, name
        assert not any(line.endswith(" ") for line in text.splitlines()), name
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                assert ast.get_docstring(node) and node.returns is not None
                assert all(a.annotation is not None for a in node.args.args)
        stored = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and _is_set(n)}
        used = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and not _is_set(n)}
        assert stored - used <= {"_"}, f"{name} sets {stored - used} and does not use it"


def _is_set(node: ast.Name) -> bool:
    return isinstance(node.ctx, ast.Store)


def test_source_says_what_the_format_is() -> None:
    text = generate("dequantize", formats.get("q4_K"), TARGET).source
    for line in (
        "Format q4_K: blocks of 256 elements in groups of 32, 144 bytes a block, little endian:",
        "       4  scales u8[12]",
        "An element is scale * code + offset; scale and offset belong to its group.",
        "Source of the bit layout: ggml: ggml-common.h",
        '    d = blocks[:, 0:2].view("<f2").astype(np.float32)',
        "    code = (qs[:, i // 64 * 32 + i % 32] >> (i // 32 % 2 * 4)) & 15",
        "    scale = np.repeat(d * sc.astype(np.float32), 32, axis=-1)",
        "    return scale * code.astype(np.float32) + offset",
    ):
        assert f"\n{line}" in text


def test_names_of_a_formats_author_do_not_hide_others() -> None:
    text = generate("matmul", AWKWARD, TARGET, precision="int8").source
    for line in ("np_ = ", "dict_ = ", "scale__ = ", "scale_ = ", "i_ = ", "len_ = ", "x = "):
        assert f"\n    {line}" in text
    assert "scale u16" in text  # in prose it has its own name


def test_same_text_in_every_process() -> None:
    def digest(texts: dict[str, str]) -> str:
        return hashlib.sha256(json.dumps(texts, sort_keys=True).encode()).hexdigest()

    generate_module._render.cache_clear()
    first = digest(sources())
    generate_module._render.cache_clear()
    assert digest(sources()) == first
    script = (
        "import hashlib, json, tests.test_numpy_target as t;"
        "print(hashlib.sha256(json.dumps(t.sources(), sort_keys=True).encode()).hexdigest())"
    )
    root = str(Path(__file__).resolve().parent.parent)
    env = os.environ | {"PYTHONHASHSEED": "12345", "PYTHONPATH": root}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=True)
    assert done.stdout.strip() == first


# ---- the runtime -------------------------------------------------------------------------------


def test_runtime_says_what_it_is() -> None:
    assert RUNTIME.available() is None
    (device,) = RUNTIME.describe()
    assert device["numpy"] == np.__version__ and device["blas"]
    w = QuantTensor("f32", (1, 4), np.zeros(16, np.uint8))
    assert RUNTIME.prepare(generate("matmul", w.format, TARGET), w) is w.data
    assert NoConfig().legal(RUNTIME.capabilities()) is None


def test_tracebacks_show_the_generated_lines() -> None:
    kernel = generate("dequantize", formats.get("q4_0"), TARGET)
    function = RUNTIME.function(kernel)
    assert function is RUNTIME.function(kernel)
    try:
        function(np.zeros((2, 5), np.uint8))
    except (ValueError, IndexError):
        text = traceback.format_exc()
    assert f"<kernelgen dequantize_q4_0 {kernel.hash}>" in text
    assert "decoded[start : start + step] = decode(blocks[start : start + step])" in text


# ---- the dialect -------------------------------------------------------------------------------

_WIDENED = {"u32": np.uint32, "f16": np.float32, "f32": np.float32}


def printed(expr: Expr) -> tuple[str, dict[str, Any]]:
    """Text of an expression of tests.ir.strategies, and what its names mean."""
    tables: dict[str, str] = {}

    def name(values: tuple[Any, ...]) -> str:
        return tables.setdefault(repr(values), f"table_{len(tables)}")

    text = ArrayPrinter(ARRAYS, name)(expr)
    scope: dict[str, Any] = {"np": np}
    for node in walk(expr):
        if node.op == "var":
            scope[node.attr[0]] = POINTS[node.attr[0]].astype(NUMPY_DTYPES[node.dtype])
        if node.op == "load":
            dtype = _WIDENED.get(node.attr.storage.name, np.int32)
            scope[node.attr.name] = STORED[node.attr.name].astype(dtype)
        if node.op == "table":
            scope[name(node.attr)] = np.array(node.attr, NUMPY_DTYPES[node.dtype])
    return text, scope


def unnamed(expr: Expr) -> Expr:
    return simplify(transform(expr, lambda node: node.args[0] if node.op == "named" else None))


@given(st.one_of(ints(I32), ints(U32), bools()))
def test_printed_expressions_mean_the_same(expr: Expr) -> None:
    text, scope = printed(unnamed(expr))
    want = value(expr)
    with np.errstate(all="ignore"):
        got = np.asarray(eval(text, scope))
    if unnamed(expr).op != "const":  # constants take their type from what is beside them
        assert got.dtype == want.dtype
    a, b = np.broadcast_arrays(got, want)
    assert np.array_equal(a, b)


@given(st.one_of(ints(I32), ints(U32), bools()), st.integers(0, 80))
def test_broken_lines_mean_the_same(expr: Expr, indent: int) -> None:
    text, _ = printed(unnamed(expr))
    broken = statement("name = ", text, indent)
    assert ast.dump(ast.parse(broken.lstrip())) == ast.dump(ast.parse(f"name = {text}"))


def test_long_statements_are_broken_where_a_person_would() -> None:
    long = " | ".join(f"(some_name_{n} & {n})" for n in range(3))
    assert statement("code = ", long, 40).splitlines() == [
        " " * 40 + "code = (",
        " " * 44 + "(some_name_0 & 0)",
        " " * 44 + "| (some_name_1 & 1)",
        " " * 44 + "| (some_name_2 & 2)",
        " " * 40 + ")",
    ]
    assert statement("code = ", f"({long}).astype(np.int32)", 40).splitlines()[0::4] == [
        " " * 40 + "code = (",
        " " * 40 + ").astype(np.int32)",
    ]
    assert statement("x = ", "y" * 120) == "    x = " + "y" * 120  # there is nowhere to break


def test_types_survive_where_only_constants_meet() -> None:
    g = var("g", 8)
    printer = ArrayPrinter(ARRAYS, str)
    assert printer(where(g < 4, const(1.5, F32), 2.5)) == "np.where(g < 4, np.float32(1.5), 2.5)"
    assert printer(where(g < 4, const(1, I32), 2)) == "np.where(g < 4, np.int32(1), 2)"
    assert printer(bitcast(F32, const(0x7FC00000, U32))).endswith(".view(np.float32)")
    assert printer(cast(U32, g) << g) == "g.astype(np.uint32) << g.astype(np.uint32)"
    assert printer(const(float("-inf"), F32)) == "-np.inf"


def test_text_is_python_where_it_is_not_mathematics() -> None:
    g = var("g", 8)
    printer = ArrayPrinter(ARRAYS, str)
    assert printer(equal(g < 4, g < 2)) == "(g < 4) == (g < 2)"
    assert printer(logical_not(g < 4)) == "~(g < 4)"
    assert printer(g + -(2**31)) == "g + -2147483648"  # the opposite is no int32
    qs = formats.get("q4_0").view.qs
    assert printer(qs[qs[g]]) == "np.take_along_axis(qs, np.clip(qs[:, g], 0, 15), axis=1)"
    assert printer(qs[99]) == "qs[:, 15:16]"


def test_a_packed_operation_has_no_word() -> None:
    with pytest.raises(TargetError, match="spread1"):
        ArrayPrinter(ARRAYS, str)(spread(1, cast(U32, var("g", 8))))


def test_a_group_integer_keeps_its_name() -> None:
    steps = array_steps(formats.get("q4_K"), NoConfig())
    assert [one.name for one in steps.ints] == ["sc", "mn"]
    assert array_steps(formats.get("q6_K"), NoConfig()).ints == ()  # it is a field already

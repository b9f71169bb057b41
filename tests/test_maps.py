"""Maps and row reductions on every target, run, emulated or interpreted, against numpy."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from kernelgen import targets
from kernelgen.errors import KernelgenError
from kernelgen.files import all_kernels, contents
from kernelgen.generate import generate_walk
from kernelgen.ir.expr import I32, const, where
from kernelgen.ir.floats import FLOATS as FLOAT_TYPES
from kernelgen.ir.ops import functions as f
from kernelgen.ir.ops import library, maps, rows
from kernelgen.ir.ops.maps import Map
from kernelgen.ir.ops.rows import Reduction, Rows
from kernelgen.ir.ops.samples import numbers_of, poisoned, raw_type
from kernelgen.ir.ops.tensors import COL, ROW, Output, Tensor
from kernelgen.targets.base import Kernel
from kernelgen.verify_maps import verify, wrong_conversions
from tests.cuda_binaries import compiled, why_no_compiler
from tests.map_cases import (
    FLOATS,
    STEPS,
    VARIANTS,
    WANTED,
    apply,
    arrays_of,
    device,
    error,
    largest_error,
    results,
    silu,
)
from tests.test_wgsl import rejected, tint  # noqa: F401

Array = npt.NDArray[Any]

RUN = ("numpy", "c", "opencl", "wgsl")
OTHERS = tuple(name for name in VARIANTS if name not in RUN)
#: of the library, what has something of its own: few enough to be emulated every time
SOME = ("gelu", "rope_neighbours", "softmax_mask", "rms_norm_residual", "top8")


def width(name: str, n: int) -> int:
    """Columns: the library's rotary positions are of one size, and its top-k of 8 or more."""
    return library.HEAD_DIM if name.startswith("rope") else max(n, 8 * (name == "top8"), 1)


def test_the_library_is_what_is_tested() -> None:
    assert set(library.NAMES) == set(WANTED)


@pytest.mark.parametrize("target", RUN)
@pytest.mark.parametrize("name", library.NAMES)
def test_the_library_runs(name: str, target: str) -> None:
    run = apply(target, library.get(name))
    for m, n in ((3, 37), (1, 1)):
        assert largest_error(run, name, "f32", m, width(name, n)) <= STEPS["f32"]


@pytest.mark.parametrize("target", OTHERS)
@pytest.mark.parametrize("name", SOME)
def test_some_of_the_library_elsewhere(name: str, target: str) -> None:
    run = apply(target, library.get(name))
    assert largest_error(run, name, "f32", 3, width(name, 37)) <= STEPS["f32"]


@pytest.mark.slow
@pytest.mark.parametrize("target", VARIANTS)
@pytest.mark.parametrize("name", library.NAMES)
@pytest.mark.parametrize("dtype", STEPS)
def test_all_of_the_library(name: str, target: str, dtype: str) -> None:
    run = apply(target, library.get(name, dtype))
    kept = name.removeprefix("cast_")
    bound = max(STEPS[dtype], STEPS.get(kept, 0))
    long = 32000 if target in RUN else 4099
    for m, n in ((1, 1), (7, 33), (2, 4096), (1, long)):
        assert largest_error(run, name, dtype, m, width(name, n)) <= bound, (m, n)


@pytest.mark.parametrize("target", RUN[1:])
def test_long_rows(target: str) -> None:
    for name in ("softmax", "layer_norm", "argmax"):
        run = apply(target, library.get(name))
        for m, n in ((2, 4096), (1, 32000)):
            assert largest_error(run, name, "f32", m, n) <= STEPS["f32"]


@pytest.mark.slow
@pytest.mark.parametrize("isa", ["avx512", "avx2", "scalar"])
def test_instruction_sets(isa: str) -> None:
    """All of the library with vectors of other lengths."""
    runtime = targets.get("c").runtime(isa)
    if (reason := runtime.available()) is not None:
        pytest.skip(reason)
    found = list(verify(targets.get("c"), runtime=runtime))
    assert len(found) == 3 * len(library.NAMES)
    assert [one.problem for one in found if not one.ok] == []


@pytest.mark.parametrize("target", RUN[:3])
def test_exponentials(target: str) -> None:
    """To within 2 units in the last place, where they are neither infinite nor next to nothing."""
    x = np.concatenate([np.linspace(-86, 88.7, 40_001), np.linspace(-1e-3, 1e-3, 999)])
    x = np.append(x, [-np.inf, -1e30, -104, 89, 1e30, np.inf, np.nan]).astype(np.float32)
    kind = maps.trace(f.exp, (library.one_row("x"),), ("f32",), "exp")
    found = poisoned(kind, 1, x.size)
    apply(target, kind)({"x": x.reshape(1, -1)}, 1, x.size, found)
    got, want = found["out"][0].astype(np.float64), np.exp(x[:-7].astype(np.float64))
    assert (np.abs(got[:-7] - want) <= 2 * np.spacing(want.astype(np.float32))).all()
    assert np.array_equal(got[-7:-4] < 2**-125, [True] * 3) and np.isposinf(got[-4:-1]).all()
    assert np.isnan(got[-1])


# ---- a user's own


def own(x: Any, y: Any) -> Any:
    """Five operations."""
    return f.silu(x) * y - f.tanh(y + 0.5)


@pytest.mark.parametrize("target", VARIANTS)
def test_a_function_of_the_users(target: str) -> None:
    """Of a row and of a column that others share, and a column that is read backwards."""
    inputs = (
        Tensor("float", "f16", ("float_row", 1)),
        Tensor("tile", "f32", (0, "tile_col")),
    )
    kind = maps.trace(own, inputs, ("f32",), "own")
    rng = np.random.default_rng(0)
    x = rng.standard_normal((5, 19)).astype(np.float16)
    y = rng.standard_normal((1, 57)).astype(np.float32)[:, ::3]
    (got,) = results(apply(target, kind), kind, {"float": x, "tile": y}, 5, 19)
    wide, other = x.astype(np.float64), y.astype(np.float64)
    assert error(got, silu(wide) * other - np.tanh(other + 0.5)) <= STEPS["f32"]


#: every type of elements at once, of integers that wrap and of floats that do not fit
MIXED_INPUTS = (
    Tensor("u", "u8", ("u_row", 1)), Tensor("i", "i16", ("i_row", 1)),
    Tensor("x", "f32", ("x_row", 1)), Tensor("w", "u32", ("w_row", 1)),
    Tensor("b", "i8", ("b_row", 1)), Tensor("h", "u16", ("h_row", 1)), Tensor("k", "i32", (1,)),
)  # fmt: skip


def mixed() -> Map:
    u, i, x, w, b, h = (one[ROW, COL] for one in MIXED_INPUTS[:-1])
    k = MIXED_INPUTS[-1][COL]
    outputs = {
        "a": ("i8", u + i), "c": ("u16", x * 1000.0), "d": ("i32", i * k * k),
        "e": ("bool", x < 0.0), "g": ("u8", x * 200.0), "j": ("u32", w * 3 + h),
        "l": ("i16", where(b < 0, b // 3, b % 7)), "m": ("f16", f.number(u) / 7.0),
    }  # fmt: skip
    made = (Output(name, dtype, value) for name, (dtype, value) in outputs.items())
    return Map(MIXED_INPUTS, tuple(made), "mixed")


@pytest.mark.parametrize("target", VARIANTS)
def test_all_types(target: str) -> None:
    kind = mixed()
    run = apply(target, kind)
    for m, n in ((3, 13), (1, 1)):
        arrays = arrays_of(kind, m, n)
        arrays["k"] = np.arange(n, dtype=np.int32) * 40503 - 5
        if n > 4:
            arrays["x"] = np.ascontiguousarray(arrays["x"])
            arrays["x"][0, :5] = [np.nan, np.inf, -np.inf, 1e30, -1e30]
        for one in kind.inputs:  # bits of the types that they are of
            if one.dtype in ("i8", "i16", "i32"):
                arrays[one.name] = arrays[one.name].view(f"i{one.storage.nbytes}")
        found = poisoned(kind, m, n)
        run(arrays, m, n, found)
        want = maps.evaluate_map(
            kind, {k: np.ascontiguousarray(v) for k, v in arrays.items()}, m, n
        )
        for out in kind.outputs:
            assert np.array_equal(found[out.name], want[out.name].astype(raw_type(out))), out.name
        x = arrays["x"].astype(np.float64)
        cut = np.clip(np.trunc(np.nan_to_num(x * 200, nan=0.0)), 0, 255)
        assert np.array_equal(found["g"], cut)


# ---- what is no number, and ties


@pytest.mark.parametrize("target", VARIANTS)
def test_extremes_are_those_of_numpy(target: str) -> None:
    x = np.random.default_rng(3).standard_normal((6, 40)).astype(np.float32)
    x[0, 7], x[1], x[2] = np.nan, -np.inf, 0.0
    x[2, 5:9], x[3, [4, 9]], x[4, [3, 20]] = -0.0, 7.0, np.inf
    x[5, [2, 30]] = -np.inf, np.float32(np.uint32(0xFFC00000).view(np.float32))
    for name, numpy_says in (("max", np.max), ("min", np.min), ("argmax", np.argmax)):
        kind = library.get(name)
        found = poisoned(kind, 6, 40)
        apply(target, kind)({"x": x}, 6, 40, found)
        with np.errstate(invalid="ignore"):
            want = numpy_says(x, axis=-1)
        assert np.array_equal(found["out"], want, equal_nan=name != "argmax"), name


@pytest.mark.parametrize("target", VARIANTS)
def test_a_row_without_numbers(target: str) -> None:
    """Softmax of -inf alone, and of NaN, is NaN in every element, and other rows do not see it."""
    x = np.zeros((4, 11), np.float32)
    x[0], x[2, 3], x[3, 4] = -np.inf, np.nan, -np.inf
    kind = library.get("softmax")
    found = poisoned(kind, 4, 11)
    apply(target, kind)({"x": x}, 4, 11, found)
    assert np.isnan(found["out"][[0, 2]]).all()
    np.testing.assert_allclose(found["out"][1], 1 / 11, rtol=1e-6)
    np.testing.assert_allclose(found["out"][3], np.where(np.arange(11) == 4, 0, 0.1), rtol=1e-6)


# ---- conversions


def same_bits(got: Array, want: Array) -> None:
    """The same numbers to the bit, and NaN where there is one."""
    width = f"u{want.itemsize}"
    with np.errstate(invalid="ignore"):
        nan = np.isnan(want.astype(np.float32))
        assert np.array_equal(np.isnan(got.view(want.dtype).astype(np.float32)), nan)
    different = (got.view(width) != want.view(width)) & ~nan
    assert not different.any(), (got.view(width)[different][:4], want.view(width)[different][:4])


def to_fewer_bits(target: str, dtype: str, x: Array) -> None:
    """Float32 becomes what ml_dtypes makes of it."""
    kind = library.get(f"cast_{dtype}")
    found = poisoned(kind, 1, x.size)
    apply(target, kind)({"x": x.reshape(1, -1)}, 1, x.size, found)
    with np.errstate(over="ignore", invalid="ignore"):
        same_bits(found["out"].reshape(-1), x.astype(FLOATS[dtype]))


@pytest.mark.parametrize("dtype", FLOAT_TYPES)
@pytest.mark.parametrize("target", VARIANTS)
def test_to_fewer_bits(target: str, dtype: str) -> None:
    to_fewer_bits(target, dtype, numbers_of("f32")[:: 1 if target in RUN else 97])


@pytest.mark.parametrize("dtype", FLOAT_TYPES)
@pytest.mark.parametrize("target", VARIANTS)
def test_from_fewer_bits(target: str, dtype: str) -> None:
    """Every number of a type, on every target."""
    given = numbers_of(dtype)
    kind = library.get("cast_f32", dtype)
    found = poisoned(kind, 1, given.size)
    apply(target, kind)({"x": given.reshape(1, -1)}, 1, given.size, found)
    same_bits(found["out"].reshape(-1), given.view(FLOATS[dtype]).astype(np.float32))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", FLOAT_TYPES)
@pytest.mark.parametrize("target", VARIANTS)
def test_a_million_conversions(target: str, dtype: str) -> None:
    x = np.random.default_rng(7).integers(0, 1 << 32, 1 << 20, np.uint32)
    to_fewer_bits(target, dtype, np.concatenate([x.view(np.float32), numbers_of("f32")]))


def test_a_wrong_conversion_is_seen() -> None:
    """Of one number, a NaN that is none, and the sign of a zero."""
    kind = library.get("cast_f16")
    run = apply("numpy", kind)
    x = np.array([1.5, np.nan, 0.0, -2.0], np.float32)

    def wrong(inputs: Any, m: int, n: int, outputs: Any) -> None:
        run(inputs, m, n, outputs)
        outputs["out"][0, :3] ^= np.array([1, 0x7FFF, 0x8000], np.uint16)

    assert wrong_conversions(run, kind, x) == 0
    assert wrong_conversions(wrong, kind, x) == 3


# ---- configurations, files, refusals


@pytest.mark.slow
@pytest.mark.parametrize("target", ["c", "opencl"])
def test_configurations_agree(target: str) -> None:
    """Also results that are written past the caches, whole or from an odd address on."""
    for name in ("swiglu", "softmax"):
        kind = library.get(name)
        walk = targets.get(target).walk(library.op_of(kind), kind)
        caps = device(target).capabilities()
        for config in walk.config.space():
            if walk.refuses(config, kind, caps) is None and config.as_dict().get("chunk") != 65536:
                run = apply(target, kind, **config.as_dict())
                for m, n in ((70, 5003),) if target == "c" else ((3, 700),):
                    assert largest_error(run, name, "f32", m, n) <= STEPS["f32"], config


def test_streamed_results_begin_anywhere() -> None:
    kind = library.get("relu")
    run = apply("c", kind, stream=1)
    x = np.random.default_rng(0).standard_normal((1, 300_001)).astype(np.float32)
    for offset in range(3):
        whole = np.full(300_020, np.nan, np.float32)
        run({"x": x}, 1, 300_001, {"out": whole[offset : offset + 300_001]})
        assert np.array_equal(whole[offset : offset + 300_001], np.maximum(x[0], 0))
        assert np.isnan(whole[:offset]).all() and np.isnan(whole[offset + 300_001 :]).all()


@pytest.mark.parametrize("target", VARIANTS)
def test_what_is_built(target: str) -> None:
    made = list(all_kernels(targets.get(target), [], ("map", "rows")))
    assert len({one.entry for one in made}) == len(made) == len(library.NAMES)
    assert all(one.entry in one.source and f"hash {one.hash}" in one.source for one in made)
    assert '"label": "softmax"' in contents(targets.get(target), made)["manifest.json"]
    for one in made:
        assert one.source.endswith("\n") and "\n\n\n\n" not in one.source
        assert not any(line != line.rstrip() for line in one.source.splitlines()), one.name


def texts(name: str) -> list[Kernel]:
    """Kernels of every element type."""
    target = targets.get(name)
    kinds = [library.get(one, dtype) for one in library.NAMES for dtype in ("f32", "bf16")]
    found = []
    for kind in (*kinds, mixed()):
        walk = target.walk(library.op_of(kind), kind)
        found.append(generate_walk(walk, kind, target))
    return found


def test_tint_takes_every_kernel(tint: Path) -> None:  # noqa: F811
    # all but one have as few arrays as every device binds at once
    kernels = [k for k in texts("wgsl") if sum(a.role != "size" for a in k.arguments) <= 8]
    assert len(kernels) == 2 * len(library.NAMES) and rejected(tint, kernels) == {}
    one = next(k for k in kernels if k.op == "rows")
    broken = one.source.replace("r: u32 = group_x", "r: u32 = group_x + thread")
    assert rejected(tint, [dataclasses.replace(one, source=broken)])


@pytest.mark.slow
@pytest.mark.skipif(why_no_compiler() is not None, reason=str(why_no_compiler()))
def test_nvcc_takes_every_kernel(tmp_path: Path) -> None:
    for binary in compiled(texts("cuda"), "sm_80", tmp_path).values():
        assert not binary.said and not binary.spilled


@pytest.mark.slow
def test_every_kernel_compiles_for_gpus() -> None:
    if targets.get("triton").runtime().available():
        pytest.skip("there is no triton")
    from kernelgen.targets.triton.runtime import GPUS, compile_all

    made = compile_all([(kernel, gpu) for kernel in texts("triton") for gpu in GPUS[1::2]])
    assert [one for one in made if isinstance(one, str)] == []


@pytest.mark.slow
@pytest.mark.parametrize("target", VARIANTS)
def test_verify_passes(target: str) -> None:
    found = list(verify(targets.get(target), runtime=device(target), shapes=((1, 1), (5, 33))))
    assert len(found) == 3 * len(library.NAMES)
    assert [one.problem for one in found if not one.ok] == []


def test_verify_can_fail() -> None:
    class Wrong:
        def __getattr__(self, name: str) -> Any:
            return getattr(device("numpy"), name)

        def apply(self, kernel: Kernel) -> Any:
            run = device("numpy").apply(kernel)

            def off(inputs: Any, m: int, n: int, outputs: Any) -> None:
                run(inputs, m, n, outputs)
                for one in outputs.values():
                    one.reshape(-1)[0] = 77

            return off

    wrong: Any = Wrong()
    shapes = ((3, 7),)
    found = verify(targets.get("numpy"), runtime=wrong, dtypes=("f32",), shapes=shapes)
    assert not any(one.ok for one in found)


X = Tensor("x", "f32", ("x_row", 1))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Map((X,), ()), "needs one at least"),
        (lambda: Map((X, X), (Output("y", "f32", X[ROW, COL]),)), "two things are called x"),
        (lambda: Map((X,), (Output("x_row", "f32", X[ROW, COL]),)), "two things are called x_row"),
        (lambda: Tensor("x", "f64", (1,)), "elements of f64"),
        (lambda: X[ROW], "indexed with 1 numbers; it has 2"),
        (lambda: Reduction("a", "max", X[ROW, COL]), "a max of f32"),
        (lambda: Rows((X,), (), (Output("y", "f32", X[ROW, COL]),)), "one of each"),
        (
            lambda: Rows(
                (X,), (Reduction("a", "sum", X[ROW, COL]),), (), (Output("y", "f32", X[ROW, COL]),)
            ),
            "made of single elements",
        ),
        (lambda: library.get("mean"), "known maps and row reductions are add"),
        (lambda: targets.get("c").walk("rows", library.get("silu")), "another kind of thing"),
    ],
)
def test_refusals(make: Any, says: str) -> None:
    with pytest.raises(KernelgenError, match=says):
        make()


def test_reductions_share_passes() -> None:
    """Those that do not need each other go through a row together."""
    row = rows.Row()
    x = X[ROW, COL]
    total, most = row.sum(x), row.max(x)
    row.sum((x - total) * most, "weighted")
    kind = row.done((X,), results=(Output("y", "i32", const(0, I32)),))
    assert [[one.name for one in some] for some in kind.passes] == [
        ["total", "largest"], ["weighted"],
    ]  # fmt: skip

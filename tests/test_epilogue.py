"""Epilogues, gated products and the norm in front: what they mean, and every target against it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from kernelgen import targets, verify_epilogue
from kernelgen.errors import ConfigError, ExprError, ShapeError
from kernelgen.generate import generate, generate_walk
from kernelgen.ir import BlockFormat, formats
from kernelgen.ir.evaluate import evaluate
from kernelgen.ir.expr import Expr, call, number, walk
from kernelgen.ir.ops import epilogue as ops
from kernelgen.ir.ops.epilogue import Epilogue, Fusion, Operand, RmsNorm
from kernelgen.problem import tolerance
from kernelgen.targets.base import Kernel, Runtime, Target, Walk
from kernelgen.targets.triton.runtime import compile_all
from kernelgen.tensor import Interleaved, QuantTensor
from kernelgen.verify import random_blocks
from kernelgen.verify_epilogue import KINDS, SAMPLE, SHAPES, SLACK, check
from tests.cuda_binaries import compiled, serves, why_no_compiler
from tests.made_up import THREE_BITS

Array = npt.NDArray[Any]

Q4, Q4K, F16 = (formats.get(name) for name in ("q4_0", "q4_K", "f16"))


# ---- what they mean -----------------------------------------------------------------------------


def _erf(x: Array) -> Array:
    return np.vectorize(math.erf)(x)


MEANING: dict[str, Callable[[Array], Array]] = {
    "silu": lambda x: x / (1 + np.exp(-x)),
    "gelu": lambda x: x * (1 + _erf(x / np.sqrt(2))) / 2,
    "gelu_tanh": lambda x: x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))) / 2,
    "gelu_quick": lambda x: x / (1 + np.exp(-1.702 * x)),
    "relu": lambda x: np.maximum(x, 0),
    "relu_squared": lambda x: np.maximum(x, 0) ** 2,
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "tanh": np.tanh,
}


@pytest.mark.parametrize("words", ["all", "few"])
@pytest.mark.parametrize("name", ops.ACTIVATIONS)
def test_an_activation_is_what_its_name_says(name: str, words: str) -> None:
    x = np.concatenate([np.linspace(-30, 30, 4001), [0.0, -0.0, 1e-30, -300.0, 300.0]])
    x = x.astype(np.float32)
    value = ops.trace(ops.activation(name), ops.SUM)
    if words == "few":  # a language with neither erf nor tanh
        value = ops.in_words(value, lambda function: function not in ("erf", "tanh"))
        assert not [n for n in walk(value) if n.op == "call" and n.attr in ("erf", "tanh")]
    with np.errstate(over="ignore"):
        want = MEANING[name](x.astype(np.float64))
    np.testing.assert_allclose(evaluate(value, {"sum": x}), want, rtol=2e-6, atol=1.5e-6)


def test_values_that_are_used_twice_get_a_name() -> None:
    value, _ = ops.chain(("bias", lambda s: s + Operand("bias", "n").value), ("gelu", ops.gelu))
    named, rest = ops.statements(value)
    x = np.linspace(-4, 4, 33, dtype=np.float32)
    known: dict[str, Any] = {"sum": x, "bias": np.flip(x)}
    whole = evaluate(value, known)
    for name, one in named:
        known[name] = evaluate(one, known)
    np.testing.assert_array_equal(evaluate(rest, known), whole)
    assert [name for name, _ in named] == ["x1"]  # the sum and the bias
    assert rest is not value


def test_rms_norm_is_what_its_authors_say() -> None:
    x = np.random.default_rng(0).standard_normal((3, 64)).astype(np.float32)
    weight = np.linspace(0.5, 2, 64, dtype=np.float32)
    want = [row / math.sqrt(float(np.mean(row.astype(np.float64) ** 2)) + 0.1) for row in x]
    got = ops.rms_norm(RmsNorm(0.1), x, weight)
    np.testing.assert_allclose(got, np.array(want) * weight, rtol=1e-6)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Epilogue(ops.SUM < 1.0), "it must be f32"),
        (lambda: Epilogue(ops.SUM + number("other")), "the epilogue reads other; it may read sum"),
        (lambda: Epilogue(ops.SUM, gated=True), "it may read gate, up"),
        (lambda: Operand("row", "m"), "its name may be bias"),
        (lambda: ops.activation("selu"), "there are silu, gelu"),
        (lambda: ops.trace(np.exp, ops.SUM), "kernelgen.ir"),
        (lambda: ops.trace(lambda a, b: a, ops.SUM), "does not take 1 expressions"),
        (lambda: RmsNorm(-1.0), "it must be a number from 0 on"),
        (lambda: Interleaved(_tensor(Q4, 4), _tensor(Q4, 6)), "one format and one shape"),
    ],
)
def test_what_makes_no_sense_is_refused(make: Callable[[], object], said: str) -> None:
    with pytest.raises((ExprError, ShapeError), match=said):
        make()


def _tensor(fmt: Any, n: int, k: int = 0) -> QuantTensor:
    k = k or 2 * fmt.block
    return QuantTensor(fmt, (n, k), random_blocks(fmt, n, k))


@pytest.mark.parametrize("apart", [1, 8])
@pytest.mark.parametrize("n", [1, 5, 8, 17])
def test_two_matrices_as_one(n: int, apart: int) -> None:
    gate, up = _tensor(Q4, n), QuantTensor(Q4, (n, 64), 255 - _tensor(Q4, n).data)
    both = Interleaved(gate, up, apart)
    assert both.data.shape == (both.shape[0], Q4.row_bytes(64)) and both.shape[0] % 2 == 0
    for i in range(n):
        at = i // apart * 2 * apart + i % apart
        np.testing.assert_array_equal(both.data[at], gate.data[i])
        np.testing.assert_array_equal(both.data[at + apart], up.data[i])
    before = both.data
    both.forget()
    np.testing.assert_array_equal(both.data, before)
    assert int(np.count_nonzero(both.data.any(axis=1))) <= 2 * n  # the rest is zero


def test_an_empty_fusion_changes_nothing() -> None:
    for target in targets.targets():
        for op, fmt in (("matmul", Q4K), ("matvec", F16)):
            plain = generate(op, fmt, target)
            assert generate(op, fmt, target, fused=Fusion()) is plain
            assert "finish(" not in plain.source and "norm_weight" not in plain.source


# ---- every target -------------------------------------------------------------------------------

#: walks that are quick to try; a style of "" is the shared walk
QUICK = {
    "numpy": None,
    "c": (("matvec", "int8", ""),),
    "opencl": (("matvec", "int8", ""),),
    "wgsl": (("matvec", "int8", ""),),
    "triton": (("matvec", "int8", ""),),
    "metal": (("matmul", "fp32", "matrix"), ("matmul", "fp16", "matrix"), ("matvec", "fp32", "")),
    "cuda": (
        ("matmul", "fp16", "wgmma"), ("matmul", "int8", "mma"), ("matvec", "fp16", "half2"),
    ),
}  # fmt: skip


def _runtime(target: Target) -> Runtime:
    found = target.reach()
    reason = found.available()
    if reason is not None:
        pytest.skip(reason)
    return found


def _hold(target: Target, one: Walk, fmt: Any, kinds: Any, config: Any = None) -> None:
    """A walk with each kind of epilogue, on every shape."""
    runtime = _runtime(target)
    bound = SLACK * tolerance(one.op, one.precision)
    for kind in kinds:
        for m, n in SHAPES[one.op]:
            chosen = config or one.default(fmt, runtime.capabilities(), m)
            kernel = generate_walk(one, fmt, target, chosen, KINDS[kind])
            error = check(kernel, KINDS[kind], target, runtime, (m, n, 3 * fmt.block))
            assert error <= bound, f"{kernel.entry} {chosen} {m}x{n}: {error} > {bound}"


@pytest.mark.parametrize("name", QUICK)
def test_products_end_as_they_are_told(name: str) -> None:
    target, quick = targets.get(name), QUICK[name]
    for one in (w for w in target.walks if w.op in SHAPES):
        if quick is None:
            _hold(target, one, Q4, KINDS)
        elif (one.op, one.precision, one.style) in quick:
            _hold(target, one, Q4, SAMPLE)


@pytest.mark.slow
@pytest.mark.parametrize("fmt", ["q4_K", "q6_K", "mxfp4", "f16", "three_bits"])
@pytest.mark.parametrize("name", QUICK)
def test_every_product_ends_as_it_is_told(name: str, fmt: str) -> None:
    target = targets.get(name)
    one = THREE_BITS if fmt == "three_bits" else formats.get(fmt)
    results = list(verify_epilogue.verify(target, [one], runtime=_runtime(target)))
    assert len(results) >= 2 * len(KINDS)
    assert [(r.op, r.precision, r.problem) for r in results if not r.ok] == []


def test_a_wrong_epilogue_would_be_seen() -> None:
    target = targets.get("numpy")
    kernel = generate("matmul", Q4, target, fused=KINDS["silu"])
    assert check(kernel, KINDS["gelu_quick"], target, _runtime(target), (17, 37, 96)) > 1e-2
    gated = generate("matmul", Q4, target, fused=KINDS["swiglu"])
    assert check(gated, KINDS["geglu"], target, _runtime(target), (17, 37, 96)) > 1e-2


def _changed(target: Target, op: str, precision: str, style: str, **changes: Any) -> Any:
    one = target.walk(op, Q4, precision, style=style)
    config = one.default(Q4, _runtime(target).capabilities())
    return one, dataclasses.replace(config, **changes)


@pytest.mark.parametrize(
    ("name", "op", "precision", "style", "changes"),
    [
        ("opencl", "matvec", "fp32", "", {"rows": 1}),
        ("wgsl", "matmul", "fp32", "", {"thread_n": 4, "layout": "native"}),
        ("cuda", "matvec", "int8", "warp", {"rows": 1, "columns": 2}),
        ("cuda", "matmul", "fp16", "mma", {"split": 2, "tile_m": 16}),
        ("cuda", "matmul", "int8", "mma", {"workers": 108}),
        ("metal", "matvec", "int8", "", {"reduce": "subgroup"}),
        ("c", "matmul", "fp32", "", {"layout": "native"}),
    ],
)
def test_epilogues_follow_the_last_sum_in_other_configurations(
    name: str, op: str, precision: str, style: str, changes: dict[str, Any]
) -> None:
    target = targets.get(name)
    one, config = _changed(target, op, precision, style, **changes)
    _hold(target, one, Q4, ("gated_own",), config)


@pytest.mark.parametrize(
    ("name", "op", "changes", "said"),
    [
        ("opencl", "matmul", {"thread_n": 1}, "thread_n must be even"),
        ("triton", "matvec", {"rows": 1}, "rows must be even"),
    ],
)
def test_a_configuration_that_parts_pairs_is_refused(
    name: str, op: str, changes: dict[str, Any], said: str
) -> None:
    target = targets.get(name)
    one = target.walk(op, Q4, "fp32")
    config = dataclasses.replace(one.default(Q4, target.capabilities), **changes)
    with pytest.raises(ConfigError, match=said):
        generate_walk(one, Q4, target, config, KINDS["swiglu"])
    assert generate_walk(one, Q4, target, config, KINDS["silu"]).source


@pytest.mark.parametrize("name", ["numpy", "c", "opencl"])
def test_a_residual_may_be_the_result_itself(name: str) -> None:
    target = targets.get(name)
    runtime, kind = _runtime(target), KINDS["residual"]
    kernel = generate("matvec", Q4, target, precision="int8", fused=kind)
    for shape in ((1, 37, 96), (3, 37, 96)):
        error = check(kernel, kind, target, runtime, shape, alias=True)
        assert error <= SLACK * tolerance("matvec", "int8")


def test_buffers_that_hold_few_rows_are_cut_with_their_operands(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    target = targets.get("opencl")
    runtime: Any = _runtime(target)
    # room for about 32 rows of weights, so that y comes in pieces
    monkeypatch.setattr(runtime.driver(), "largest", 34 * Q4.row_bytes(96))
    _hold(target, target.walk("matmul", Q4, "fp32"), Q4, ("own", "gated_own"))


#: fields that are called what an epilogue calls its own
NAMESAKE = BlockFormat(
    name="namesake", block=32, group=32, nbytes=18, fields={"bias": "f16", "finish": "u8[16]"},
    code=lambda b, i: (b.finish[i % 16] >> (4 * (i // 16))) & 15,
    scale=lambda b, g: b.bias, bias=8,
)  # fmt: skip


@pytest.mark.parametrize("name", ["numpy", "wgsl"])
def test_names_of_a_format_do_not_hide_those_of_an_epilogue(name: str) -> None:
    target = targets.get(name)
    _hold(target, target.walk("matvec", NAMESAKE, "fp32"), NAMESAKE, ("own",))


def test_a_function_may_call_any_of_the_languages_functions() -> None:
    def every(x: Expr) -> Expr:
        total = x
        for function in ("exp", "log", "sqrt", "rsqrt", "tanh", "sin", "cos", "abs", "erf"):
            total = total + call(function, call("abs", x) * 0.01 + 1.0)
        return total

    fused = Fusion(Epilogue(ops.trace(every, ops.SUM)))
    for name in ("numpy", "c"):
        target = targets.get(name)
        kernel = generate("matvec", Q4, target, precision="fp32", fused=fused)
        error = check(kernel, fused, target, _runtime(target), (3, 37, 96))
        assert error <= SLACK * tolerance("matvec", "fp32")


# ---- other instruction sets, and compilers for chips that are not here --------------------------


@pytest.mark.slow
@pytest.mark.parametrize("isa", targets.get("c").variants)
def test_epilogues_in_every_instruction_set(isa: str) -> None:
    target = targets.get("c")
    runtime = target.runtime(isa)
    reason = runtime.available()
    if reason is not None:
        pytest.skip(reason)
    results = list(verify_epilogue.verify(target, [Q4K], kinds=SAMPLE, runtime=runtime))
    assert len(results) == 4 * len(SAMPLE)
    assert [(r.op, r.precision, r.problem) for r in results if not r.ok] == []


def _of_target(name: str) -> list[Kernel]:
    """Kernels of every product with telling epilogues, and those that normalize in front."""
    target = targets.get(name)
    found: dict[str, Kernel] = {}
    for one in (w for w in target.walks if w.op in SHAPES and w.accepts(Q4K) is None):
        for kind in (*SAMPLE, "gelu_tanh"):
            kernel = generate_walk(one, Q4K, target, None, KINDS[kind])
            found |= {each.entry: each for each in (kernel, *kernel.needs.values())}
    return list(found.values())


@pytest.mark.slow
@pytest.mark.skipif(why_no_compiler() is not None, reason=str(why_no_compiler()))
@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_epilogues_spill_no_registers(arch: str, tmp_path: Path) -> None:
    made = [kernel for kernel in _of_target("cuda") if serves(kernel, arch)]
    for entry, binary in compiled(made, arch, tmp_path).items():
        assert (binary.stack, binary.spilled) == (0, 0), entry


@pytest.mark.slow
def test_epilogues_compile_for_gpus() -> None:
    pytest.importorskip("triton")
    made = _of_target("triton")
    for gpu in ("cuda:90", "hip:gfx942"):
        answers = compile_all([(kernel, gpu) for kernel in made])
        assert [
            (k.entry, a) for k, a in zip(made, answers, strict=True) if isinstance(a, str)
        ] == []

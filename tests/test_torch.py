"""kernelgen.torch: layers, operators and attention, in real modules on the CPU."""

from __future__ import annotations

import copy
import io
import logging
import os
import pickle
import subprocess
import sys
import threading
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kernelgen
from kernelgen import dispatch
from kernelgen.errors import FormatError, KernelgenError, ShapeError
from kernelgen.ir.ops import quantize_activations
from kernelgen.problem import relative_error
from kernelgen.targets.c import team

torch = pytest.importorskip("torch", reason="pip install torch==2.13.0")

import kernelgen.torch as kt  # noqa: E402 - needs torch
from kernelgen.torch import held  # noqa: E402

DIM, HEADS, HIDDEN = 256, 4, 512
F = torch.nn.functional


class Block(torch.nn.Module):
    """A pre-norm transformer block, as language models have them."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = torch.nn.LayerNorm(DIM), torch.nn.LayerNorm(DIM)
        self.qkv = torch.nn.Linear(DIM, 3 * DIM, bias=False)
        self.out = torch.nn.Linear(DIM, DIM)
        self.gate, self.up = torch.nn.Linear(DIM, HIDDEN), torch.nn.Linear(DIM, HIDDEN)
        self.down = torch.nn.Linear(HIDDEN, DIM)
        self.attend: Any = F.scaled_dot_product_attention

    def forward(self, x: Any) -> Any:
        b, t, _ = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, t, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        x = x + self.out(self.attend(q, k, v, is_causal=True).transpose(1, 2).reshape(b, t, DIM))
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Model(torch.nn.Module):
    """Four blocks between an embedding and a head, whose width is no multiple of 256."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(50, DIM)
        self.blocks = torch.nn.ModuleList(Block() for _ in range(4))
        self.lm_head = torch.nn.Linear(DIM, 50)

    def forward(self, tokens: Any) -> Any:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.lm_head(x)


def model(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return Model().eval()


@pytest.fixture(scope="module")
def quantized() -> Any:
    made = model()
    kt.replace_linears(made, "q4_K", skip=("lm_head",))
    return made


TOKENS = torch.randint(0, 50, (2, 7), generator=torch.Generator().manual_seed(1))


def with_floats(quantized: Any) -> Any:
    """The model with each quantized layer dequantized."""
    made = copy.deepcopy(quantized)
    for parent in list(made.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, kt.QuantLinear):
                plain = torch.nn.Linear(
                    child.in_features, child.out_features, child.bias is not None
                )
                with torch.no_grad():
                    plain.weight.copy_(child.weight)
                    if child.bias is not None:
                        plain.bias.copy_(child.bias)
                setattr(parent, name, plain)
    return made.eval()


def apart(got: Any, want: Any) -> float:
    return float((got.float() - want.float()).pow(2).mean().sqrt() / want.float().std())


# ---- a layer --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def layer() -> Any:
    torch.manual_seed(2)
    return kt.QuantLinear.from_linear(torch.nn.Linear(512, 24), "q4_K")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(512,), (1, 512), (2, 3, 512), (0, 512)])
def test_a_layer_is_the_reference(layer: Any, shape: tuple[int, ...], dtype: Any) -> None:
    x = torch.randn(shape).to(dtype)
    with torch.no_grad():
        y = layer(x)
    assert y.shape == (*shape[:-1], 24) and y.dtype == dtype
    if not x.numel():
        return
    fmt, bias = layer.quant_format, layer.bias.detach().numpy()
    seen = quantize_activations(x.float().reshape(-1, 512).numpy(), fmt.block, fmt.group).values()
    want = seen @ layer.tensor.dequantize().astype(np.float64).T + bias
    bound = {torch.float32: 1e-5, torch.float16: 2**-10, torch.bfloat16: 2**-7}[dtype]
    assert relative_error(y.float().reshape(-1, 24).numpy(), want) < 2 * bound * (
        1 + abs(want).max()
    )


def test_floats_stay_floats_where_asked_for() -> None:
    w = kernelgen.quantize(np.random.default_rng(0).standard_normal((9, 64)), "q8_0")
    exact = kt.QuantLinear.from_tensor(w, torch.ones(9), precision="fp32")
    x = torch.randn(3, 64)
    want = F.linear(x, exact.weight, torch.ones(9))
    with torch.no_grad():
        torch.testing.assert_close(exact(x), want, rtol=1e-5, atol=1e-5)


def test_strided_activations_and_shared_memory(layer: Any) -> None:
    x = torch.randn(8, 1024)[::2, ::2]
    with torch.no_grad():
        torch.testing.assert_close(layer(x), layer(x.contiguous()), rtol=0, atol=0)
    assert layer.tensor.data.ctypes.data == layer.blocks.data_ptr()
    assert held.weights_of(layer.blocks, "q4_K", 512).data.ctypes.data == layer.blocks.data_ptr()


def test_gradients(layer: Any) -> None:
    x = torch.randn(2, 3, 512, requires_grad=True)
    weights = torch.randn(2, 3, 24)
    layer.bias.grad = None
    (layer(x) * weights).sum().backward()
    torch.testing.assert_close(x.grad, weights @ layer.weight, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.bias.grad, weights.sum((0, 1)))
    assert not layer.blocks.requires_grad


def test_the_operators_keep_torchs_contract(layer: Any) -> None:
    x = torch.randn(3, 512, requires_grad=True)
    kept = torch.library.opcheck(
        torch.ops.kernelgen.matmul.default, (x, layer.blocks, "q4_K", 512, "auto")
    )
    assert set(kept.values()) == {"SUCCESS"}
    kept = torch.library.opcheck(
        torch.ops.kernelgen.dequantize.default, (layer.blocks, "q4_K", 512)
    )
    assert set(kept.values()) == {"SUCCESS"}
    q = torch.randn(1, 2, 3, 32)
    kept = torch.library.opcheck(torch.ops.kernelgen.attention.default, (q, q, q, None, True, None))
    assert set(kept.values()) == {"SUCCESS"}


def test_modes_and_tracing_see_the_operator(layer: Any) -> None:
    """A plain call goes past torch's dispatcher; not where somebody listens there."""
    called: list[str] = []

    class Dispatch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            called.append(str(func))
            return func(*args, **kwargs or {})

    class Function(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            called.append(str(func))
            return func(*args, **kwargs or {})

    x = torch.randn(2, 512)
    with torch.no_grad():
        plain = layer(x)
        for mode in (Dispatch, Function):
            called.clear()
            with mode():
                torch.testing.assert_close(layer(x), plain, rtol=0, atol=0)
            assert any("kernelgen.matmul" in one for one in called), mode
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            traced = torch.jit.trace(layer, (x,))
        torch.testing.assert_close(traced(x + 1), layer(x + 1), rtol=0, atol=0)


def test_a_tensor_is_weights_too() -> None:
    w = kernelgen.quantize(np.random.default_rng(1).standard_normal((5, 32)), "q8_0")
    x = torch.randn(2, 32, requires_grad=True)
    y = kt.matmul(x, w, precision="fp32")
    y.sum().backward()
    values = torch.from_numpy(w.dequantize())
    torch.testing.assert_close(y, x @ values.T, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x.grad, values.sum(0).expand(2, -1))
    blocks = torch.from_numpy(w.data.copy())
    torch.testing.assert_close(kt.matmul(x, blocks, "Q8_0", precision="fp32"), y)
    torch.testing.assert_close(kt.dequantize(blocks, "q8_0", 32), values, rtol=0, atol=0)


def test_written_blocks_are_packed_anew(layer: Any) -> None:
    made = copy.deepcopy(layer)
    x = torch.randn(2, 512)
    with torch.no_grad():
        before = made(x)
        made.blocks[:12].copy_(layer.blocks[12:])
        after = made(x)
    bias = layer.bias.detach()
    torch.testing.assert_close((after - bias)[:, :12], (before - bias)[:, 12:])
    torch.testing.assert_close(after[:, 12:], before[:, 12:])


def test_what_was_repacked_goes_with_the_layer(layer: Any) -> None:
    made = copy.deepcopy(layer)
    with torch.no_grad():
        made(torch.randn(1, 512))
        made.blocks.detach()
    key = id(made.blocks)
    assert held._held[key].weights.prepared
    del made
    assert key not in held._held


def test_threads_of_kernels_leave_the_cores_to_torch(
    layer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where they are not torch's own (tests/c/test_team.py), they sleep when they have nothing to
    do; each thread that calls sees to it for its own."""
    runtime: Any = kernelgen.api.runtime_of("c")
    if dispatch.decide(1).target != "c" or "KMP_BLOCKTIME" in os.environ:
        pytest.skip("the c target does not serve, or the user has decided")
    between = team.team()
    if between is not None:
        monkeypatch.setattr(team, "_another", lambda: None)
        monkeypatch.setattr(between, "shared", False)
    found: dict[str, int] = {}

    def ask(name: str, call: Any) -> None:
        with torch.no_grad():
            call()
            call()
        loaded = next(iter(runtime._programs.values())).library
        library = loaded if between is None else between.own
        if hasattr(library, "kmp_get_blocktime") and hasattr(dispatch._sharing, "c"):
            found[name] = library.kmp_get_blocktime()

    x = torch.ones(1, 512)
    calls = {
        "layer": lambda: layer(x),
        "tensor": lambda: kernelgen.matmul(x, layer.tensor),
    }
    for name, call in calls.items():
        thread = threading.Thread(target=ask, args=(name, call))
        thread.start()
        thread.join()
    if not found:
        pytest.skip("this compiler's OpenMP is not LLVM's")
    assert found == {"layer": 0, "tensor": 0}


# ---- its state ------------------------------------------------------------------------------


def test_state(layer: Any) -> None:
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    assert set(state) == {"blocks", "bias", "_extra_state"}
    assert all(isinstance(one, torch.Tensor) for one in state.values())
    other = kt.QuantLinear(512, 24, "q4_K")
    assert other.load_state_dict(state, strict=True) == torch.nn.modules.module._IncompatibleKeys(
        [], []
    )
    x = torch.randn(2, 512)
    with torch.no_grad():
        torch.testing.assert_close(other(x), layer(x), rtol=0, atol=0)


def test_loading_into_a_layer_that_was_used(layer: Any) -> None:
    other = kt.QuantLinear.from_linear(torch.nn.Linear(512, 24), "q4_K")
    x = torch.randn(2, 512)
    with torch.no_grad():
        other(x)
        other.load_state_dict(layer.state_dict())
        torch.testing.assert_close(other(x), layer(x), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("other", "says"),
    [
        (lambda: kt.QuantLinear(512, 24, "q4_0"), "is q4_K .* the layer is q4_0"),
        (lambda: kt.QuantLinear(256, 48, "q4_K"), r"\(24, 512\), and the layer is .*\(48, 256\)"),
    ],
)
def test_a_state_of_something_else_is_refused(layer: Any, other: Any, says: str) -> None:
    with pytest.raises(FormatError, match=says):
        other().load_state_dict(layer.state_dict())
    with pytest.raises(FormatError, match="does not name a format"):
        layer.load_state_dict({**layer.state_dict(), "_extra_state": torch.zeros(3)})
    with pytest.raises(RuntimeError, match="Missing key"):
        other().load_state_dict({}, strict=True)


def test_pickle_and_copy(layer: Any) -> None:
    x = torch.randn(1, 512)
    with torch.no_grad():
        for made in (pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer)):
            torch.testing.assert_close(made(x), layer(x), rtol=0, atol=0)
            assert made.quant_format is layer.quant_format


def test_meta_device(layer: Any) -> None:
    made = kt.QuantLinear.from_linear(torch.nn.Linear(512, 24, device="meta"), "q4_K")
    assert made.blocks.device.type == "meta"
    assert made(torch.empty(3, 512, device="meta")).shape == (3, 24)
    made = made.to_empty(device="cpu")
    made.load_state_dict(layer.state_dict())
    assigned = kt.QuantLinear(512, 24, "q4_K", device="meta")
    assigned.load_state_dict(layer.state_dict(), assign=True)
    x = torch.randn(2, 512)
    with torch.no_grad():
        torch.testing.assert_close(made(x), layer(x), rtol=0, atol=0)
        torch.testing.assert_close(assigned(x), layer(x), rtol=0, atol=0)
    with pytest.raises(ShapeError, match="bring them together"):
        layer(torch.empty(3, 512, device="meta"))


def test_changing_the_type_leaves_the_blocks_alone(layer: Any) -> None:
    made = copy.deepcopy(layer).to(torch.bfloat16)
    assert made.blocks.dtype == torch.uint8 and made.bias.dtype == torch.bfloat16
    assert made(torch.randn(1, 512, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("call", "kind", "says"),
    [
        (lambda layer: kt.QuantLinear(300, 4, "q4_K"), FormatError, "300"),
        (lambda layer: kt.QuantLinear(256, 4, "q9_K"), FormatError, "known are"),
        (lambda layer: kt.QuantLinear(256, 4, "q4_K", precision="fp8"), KernelgenError, "fp8"),
        (lambda layer: layer(torch.randn(2, 511)), ShapeError, "x needs 512 columns"),
        (lambda layer: layer(torch.randn(2, 512).double()), ShapeError, "not torch.float64"),
        (
            lambda layer: kt.matmul(torch.randn(2, 512), layer.blocks[:, 1:], "q4_K"), ShapeError,
            r"uint8 \(N, 288\)",
        ),
        (
            lambda layer: kernelgen.matmul(torch.ones(1, 512, requires_grad=True), layer.tensor),
            ShapeError, "use those of kernelgen.torch",
        ),
    ],
)  # fmt: skip
def test_refusals(layer: Any, call: Any, kind: type[Exception], says: str) -> None:
    with pytest.raises(kind, match=says):
        call(layer)


# ---- models ---------------------------------------------------------------------------------


def test_a_model_is_its_dequantized_self(quantized: Any) -> None:
    with torch.no_grad():
        got, want, plain = (m(TOKENS) for m in (quantized, with_floats(quantized), model()))
    # the activations of 28 matmuls are rounded to eight bits, each off by about half a percent
    assert 0 < apart(got, want) < 0.03
    # and the weights to four and a half: that the logits are alike at all shows the right layers
    assert apart(got, plain) < 0.3


def test_compiled_is_eager(quantized: Any) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(quantized, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(TOKENS), quantized(TOKENS), rtol=1e-5, atol=1e-5)
        one = TOKENS[:1, :1]
        torch.testing.assert_close(compiled(one), quantized(one), rtol=1e-5, atol=1e-5)


def test_compiled_gradients_are_eager_ones(layer: Any) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x, y = (torch.ones(3, 512, requires_grad=True) for _ in range(2))
    compiled(x).square().sum().backward()
    layer(y).square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_inductor(quantized: Any) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(quantized, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for tokens in (TOKENS, TOKENS[:1], TOKENS[:1, :3]):
            # norms are rounded otherwise, and with them some activations to another of 255 steps
            assert apart(compiled(tokens), quantized(tokens)) < 0.01
    weights = [m.blocks for m in quantized.modules() if isinstance(m, kt.QuantLinear)]
    known = dict(held._held)
    with torch.no_grad():
        compiled(TOKENS)
    assert {id(w) for w in weights} <= held._held.keys() <= known.keys()


def test_export(quantized: Any, tmp_path: Path) -> None:
    rows = torch.export.Dim("rows", min=1, max=8)
    with torch.no_grad():
        program = torch.export.export(quantized, (TOKENS,), dynamic_shapes=({0: rows},))
        path = tmp_path / "model.pt2"
        torch.export.save(program, path)
        loaded = torch.export.load(path).module()
        for tokens in (TOKENS, TOKENS[:1]):
            torch.testing.assert_close(loaded(tokens), quantized(tokens), rtol=1e-5, atol=1e-5)
    called = {str(n.target) for n in program.graph.nodes if n.op == "call_function"}
    assert "kernelgen.matmul.default" in called


def test_the_state_of_a_model(quantized: Any) -> None:
    fresh = model(3)
    kt.replace_linears(fresh, "q4_K", skip=("lm_head",))
    fresh.load_state_dict(quantized.state_dict(), strict=True)
    with torch.no_grad():
        torch.testing.assert_close(fresh(TOKENS), quantized(TOKENS), rtol=0, atol=0)


def test_attention_in_a_model(quantized: Any) -> None:
    made = copy.deepcopy(quantized)
    for block in made.blocks:
        block.attend = kt.scaled_dot_product_attention
    with torch.no_grad():
        # sums in another order, then 24 roundings to eight bits, of which some fall the other way
        assert apart(made(TOKENS), quantized(TOKENS)) < 0.01


def test_encoder_layers_of_torch() -> None:
    """They would read the weights of their linear layers themselves."""
    torch.manual_seed(0)
    made = torch.nn.TransformerEncoder(
        torch.nn.TransformerEncoderLayer(64, 2, 128, batch_first=True), 1
    ).eval()
    x = torch.randn(2, 3, 64)
    with torch.no_grad():
        want = made(x)
        report = kt.replace_linears(made, "q8_0")
        reads: list[int] = []
        weight = kt.QuantLinear.weight
        kt.QuantLinear.weight = property(lambda self: reads.append(1) or weight.fget(self))
        try:
            got = made(x)
        finally:
            kt.QuantLinear.weight = weight
    assert set(report.formats) == {"layers.0.linear1", "layers.0.linear2"} and not reads
    assert "reads its weights itself" in report.skipped["layers.0.self_attn.out_proj"]
    assert 0 < apart(got, want) < 0.02


# ---- replace_linears ------------------------------------------------------------------------


class Odd(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wide = torch.nn.Linear(256, 4)
        self.odd = torch.nn.Linear(96, 4)
        self.odder = torch.nn.Linear(33, 4)
        self.again = self.wide
        self.inner = torch.nn.Sequential(torch.nn.Linear(256, 4), torch.nn.ReLU())


def test_what_does_not_fit_is_said(caplog: pytest.LogCaptureFixture) -> None:
    made = Odd()
    with caplog.at_level(logging.WARNING, "kernelgen"):
        report = kt.replace_linears(made, "q4_K")
    assert report.formats == {"wide": "q4_K", "again": "q4_K", "inner.0": "q4_K"}
    assert made.again is made.wide and isinstance(made.odd, torch.nn.Linear)
    assert "K=96 is no multiple of the 256" in report.skipped["odd"]
    assert "keep their floats" in caplog.text and "3 linear layers" in str(report)
    assert 0 < report.after < report.before / 6


def test_another_format_for_what_does_not_fit() -> None:
    made = Odd()
    report = kt.replace_linears(made, "q4_K", fallback="q8_0")
    assert report.formats["odd"] == "q8_0" and made.odd.quant_format.name == "q8_0"
    assert "nor of q8_0's 32" in report.skipped["odder"]


@pytest.mark.parametrize("skip", [("inner.0",), ("inner.*",), ("0",)])
def test_skip(skip: tuple[str, ...]) -> None:
    report = kt.replace_linears(Odd(), "q4_K", skip)
    assert "left alone" in report.skipped["inner.0"] and "wide" in report.formats


def test_a_format_for_each() -> None:
    report = kt.replace_linears(
        Odd(), lambda name, layer: None if name == "wide" else "q8_0" if "inner" in name else "f16"
    )
    assert report.formats == {"odd": "f16", "odder": "f16", "inner.0": "q8_0"}


def test_importance_reaches_the_quantizer() -> None:
    weight = np.linspace(1e-3, 1, 256).astype(np.float32)
    torch.manual_seed(0)
    plain, weighted = torch.nn.Sequential(torch.nn.Linear(256, 8)), None
    weighted = copy.deepcopy(plain)
    kt.replace_linears(plain, "q2_K")
    kt.replace_linears(weighted, "q2_K", importance=lambda name: weight)
    assert not torch.equal(plain[0].blocks, weighted[0].blocks)


def test_a_linear_layer_alone() -> None:
    with pytest.raises(ShapeError, match=r"use QuantLinear\.from_linear"):
        kt.replace_linears(torch.nn.Linear(32, 4), "q8_0")
    with pytest.raises(FormatError, match="known are"):
        kt.replace_linears(Odd(), "q9_K")


# ---- attention ------------------------------------------------------------------------------

CASES = {
    "plain": (((2, 4, 5), (2, 4, 9)), {}),
    "causal": (((2, 4, 9), (2, 4, 9)), {"is_causal": True}),
    "causal, more keys": (((2, 4, 5), (2, 4, 9)), {"is_causal": True}),
    "causal, fewer keys": (((2, 4, 9), (2, 4, 5)), {"is_causal": True, "scale": 0.3}),
    "shared heads": (((2, 4, 5), (2, 2, 9)), {"enable_gqa": True}),
    "booleans": (((2, 4, 5), (2, 4, 9)), {"attn_mask": torch.ones(5, 9).tril(2) > 0}),
    "floats": (((2, 4, 5), (2, 4, 9)), {"attn_mask": torch.linspace(-3, 1, 90).view(2, 1, 5, 9)}),
    "fewer keys": (((2, 4, 9), (2, 4, 5)), {"attn_mask": torch.ones(9, 5).tril(-2) > 0}),
    "one key column": (((2, 4, 9), (2, 4, 5)), {"attn_mask": torch.linspace(-3, 1, 9)[:, None]}),
    "never": (((2, 4, 9), (2, 4, 5)), {"attn_mask": torch.ones(9, 5).triu().log()}),
    "no head": (((2, 5), (2, 9)), {"attn_mask": torch.ones(2, 5, 9).tril(1) > 0}),
    "no batch": (((5,), (9,)), {}),
    "batches": (((2, 3, 4, 5), (2, 3, 4, 9)), {"attn_mask": torch.ones(2, 1, 1, 5, 9) > 0}),
    "one of k": (((2, 4, 5), (1, 4, 9)), {}),
}


@pytest.mark.parametrize("name", CASES)
def test_attention_is_torchs(name: str) -> None:
    (queries, keys), options = CASES[name]
    torch.manual_seed(0)
    q, k, v = torch.randn(*queries, 32), torch.randn(*keys, 32), torch.randn(*keys, 32)
    want = F.scaled_dot_product_attention(q, k, v, **options)
    got = kt.scaled_dot_product_attention(q, k, v, **options)
    torch.testing.assert_close(got, want.nan_to_num(), rtol=1e-4, atol=1e-5)


def test_attention_in_half_precision() -> None:
    torch.manual_seed(0)
    for dtype, bound in ((torch.float16, 2e-3), (torch.bfloat16, 1.6e-2)):
        q, k, v = (torch.randn(1, 3, 6, 32).to(dtype).transpose(1, 2) for _ in range(3))
        got = kt.scaled_dot_product_attention(q, k, v)
        want = F.scaled_dot_product_attention(q.float(), k.float(), v.float())
        assert got.dtype == dtype and apart(got, want) < bound


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"dropout_p": 0.1}, "give 0"),
        ({"is_causal": True, "attn_mask": torch.ones(5, 5) > 0}, "both given"),
        ({"attn_mask": torch.ones(5, 5, dtype=torch.int32)}, "booleans and floats"),
    ],
)
def test_attention_refuses(options: dict[str, Any], says: str) -> None:
    q = torch.randn(1, 2, 5, 32)
    with pytest.raises(ShapeError, match=says):
        kt.scaled_dot_product_attention(q, q, q, **options)


def test_attention_refuses_heads_and_gradients() -> None:
    q, k = torch.randn(1, 4, 5, 32), torch.randn(1, 2, 5, 32)
    with pytest.raises(ShapeError, match="enable_gqa=True"):
        kt.scaled_dot_product_attention(q, k, k)
    with pytest.raises(ShapeError, match="4, 3 and 3 heads"):
        kt.scaled_dot_product_attention(q, k[:, [0, 1, 1]], k[:, [0, 1, 1]], enable_gqa=True)
    with pytest.raises(ShapeError, match="4, 4 and 3 dimensions"):
        kt.scaled_dot_product_attention(q, q, q[0])
    y = kt.scaled_dot_product_attention(q.requires_grad_(), q, q)
    with pytest.raises(KernelgenError, match="gradient of attention"):
        y.sum().backward()


def test_attention_compiles() -> None:
    torch._dynamo.reset()
    q = torch.randn(1, 2, 5, 32)
    compiled = torch.compile(kt.scaled_dot_product_attention, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(
        compiled(q, q, q, is_causal=True),
        kt.scaled_dot_product_attention(q, q, q, is_causal=True), rtol=0, atol=0,
    )  # fmt: skip


# ---- beside a software Vulkan driver --------------------------------------------------------

WGSL = """
w = kernelgen.quantize(np.ones((8, 32), np.float32), "q8_0")
print(kernelgen.matmul(np.ones((1, 32), np.float32), w, target="wgsl").sum().round())
"""
COMPILE = """
import torch, kernelgen.torch
layer = torch.compile(kernelgen.torch.QuantLinear(32, 8, "q8_0"), backend="aot_eager")
print(layer(torch.ones(1, 32)).sum().item())
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "program",
    [WGSL + COMPILE, "import kernelgen.torch\n" + WGSL + COMPILE],
    ids=["driver first", "torch first"],
)
def test_torch_compile_beside_another_llvm(program: str) -> None:
    """torch.compile loads Triton, which must not call the driver's LLVM."""
    reason = kernelgen.targets.get("wgsl").runtime().available()
    if reason is not None:
        pytest.skip(reason)
    done = subprocess.run(
        [sys.executable, "-c", "import kernelgen, numpy as np\n" + program],
        capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0 and done.stdout.split() == ["256.0", "0.0"], done.stderr


# ---- benchmarks -----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "options", "says"),
    [
        ("torch_layers.py", "--dims 256 --rows 1 3 --turns 1", "whole block"),
        ("torch_layers.py", "--dims 256 --rows 2 --turns 1 --cpu --format q8_0", "q8_0 ms"),
        ("overhead.py", "--targets c numpy cuda --turns 1", "QuantLinear, torch.compile"),
    ],
)
def test_benchmarks_run(file: str, options: str, says: str) -> None:
    """As they are; their figures mean nothing here."""
    path = Path(__file__).parent.parent / "bench" / file
    done = subprocess.run(
        [sys.executable, str(path), *options.split()], capture_output=True, text=True, timeout=300,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0 and says in done.stdout, done.stdout + done.stderr


def test_columns_in_another_order_stay_with_the_layer() -> None:
    """GPTQ's act-order: the layer permutes what it is given, and its state says how."""
    rng = np.random.default_rng(9)
    plain = kernelgen.quantize(rng.standard_normal((24, 64), np.float32), "q8_0")
    order = rng.permutation(64)
    w = kernelgen.QuantTensor("q8_0", plain.shape, plain.data, columns=order)
    x = torch.from_numpy(rng.standard_normal((3, 64), np.float32))
    layer = kt.QuantLinear.from_tensor(w, precision="fp32")
    want = x @ torch.from_numpy(w.dequantize()).T
    torch.testing.assert_close(layer(x), want, rtol=1e-4, atol=1e-4)
    assert layer.tensor == w
    torch.testing.assert_close(layer.weight, torch.from_numpy(w.dequantize()))
    fresh = kt.QuantLinear(64, 24, "q8_0", bias=False, precision="fp32")
    fresh.load_state_dict(layer.state_dict())
    torch.testing.assert_close(fresh(x), layer(x))

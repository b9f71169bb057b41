"""Layers of PyTorch and the model runner take every format: what follows from its description."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import kernelgen
from bench import made_model
from kernelgen import models
from kernelgen.ir import formats
from tests.test_formats_in_planes import ONE_OF_EACH

QUANTIZED = tuple(fmt.name for fmt in formats.FORMATS if fmt.block > 1)

K = 256


def slowly(names: tuple[str, ...]) -> list[object]:
    return [pytest.param(one, marks=pytest.mark.slow) for one in names]


@pytest.mark.parametrize("name", ["hqq3_g64", *slowly((*QUANTIZED, *ONE_OF_EACH))])
def test_a_layer_of_pytorch(name: str) -> None:
    torch = pytest.importorskip("torch")
    kt = pytest.importorskip("kernelgen.torch")
    torch.manual_seed(0)
    linear, x = torch.nn.Linear(K, 24), torch.randn(3, K)
    layer = kt.QuantLinear.from_linear(linear, name, precision="fp32")
    again = kt.QuantLinear(K, 24, name, precision="fp32")
    again.load_state_dict(layer.state_dict())
    weight = kernelgen.quantize(linear.weight.detach().numpy(), name).dequantize()
    with torch.no_grad():
        y, same = layer(x), again(x)
    want = x.double().numpy() @ weight.astype(np.float64).T + linear.bias.detach().numpy()
    assert np.abs(y.numpy() - want).max() < 1e-5 * want.std()
    assert torch.equal(y, same)


@pytest.mark.parametrize(
    ("name", "target"),
    [("tq2_0", "numpy"), *(pytest.param(one, "c", marks=pytest.mark.slow) for one in QUANTIZED)],
)
def test_a_model_whose_matrices_have_the_format(name: str, target: str, tmp_path: Path) -> None:
    """Logits are those of the same model with its values as floats."""
    small = {"layers": 1, "width": K, "hidden": K, "heads": 2, "kv_heads": 1}
    path = made_model.write(tmp_path / "q.gguf", name, tokens=made_model.vocabulary(300), **small)
    file = kernelgen.open(path)
    values = {key: tensor.dequantize() for key, tensor in file.items()}
    kernelgen.save(tmp_path / "f.gguf", values, file.metadata)
    logits = []
    for one in (path, tmp_path / "f.gguf"):
        model = models.open(one, target, "fp32")
        cache = model.sequences(capacity=8, format="f32")
        model.forward([(0, [3, 141, 59])], cache)
        logits.append(model.forward([(0, [265])], cache)[0])
    assert np.abs(logits[0] - logits[1]).max() < 1e-4 * logits[1].std()

"""Scales by the rule of OCP Microscaling Formats v1.0, bit by bit as others have them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from gguf import quants
from gguf.constants import GGMLQuantizationType
from typer.testing import CliRunner

import kernelgen
from kernelgen.cli import app
from kernelgen.errors import FormatError

Array = npt.NDArray[Any]

#: name -> bits of exponent and mantissa, bias, magnitudes of the encoding that are numbers
ELEMENTS = {
    "mxfp4": (2, 1, 1, 8), "mxfp6_e2m3": (2, 3, 1, 32), "mxfp6_e3m2": (3, 2, 3, 32),
    "mxfp8_e4m3": (4, 3, 7, 127), "mxfp8_e5m2": (5, 2, 15, 124),
}  # fmt: skip


def sample() -> Array:
    """Of many sizes; groups of zeros, of ties, of powers of two, subnormal and close to the end."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((40, 256)) * 10.0 ** rng.integers(-6, 7, (40, 1))
    x[0, :32] = 0
    x[1] = np.tile(np.arange(-16, 16) / 4, 8)
    x[2] = 2.0 ** np.tile(np.arange(-16, 16), 8)
    x[3] *= 1e-41
    x[4, ::7] = np.finfo(np.float32).max
    x[5] = np.round(x[5] * 16 / np.abs(x[5]).max()) / 8
    return x.astype(np.float32)


def by_definition(group: Array, exponent: int, mantissa: int, bias: int, count: int) -> Array:
    """Values of a group, from the specification: sections 5.3 and 6.3."""
    sizes = []
    for code in range(count):
        e, m = code >> mantissa, (code & (2**mantissa - 1)) / 2**mantissa
        sizes.append(m * 2.0 ** (1 - bias) if e == 0 else (1 + m) * 2.0 ** (e - bias))
    largest = max(abs(float(v)) for v in group)
    if largest == 0:
        return np.zeros(len(group), np.float32)
    shared = math.floor(math.log2(largest)) - math.floor(math.log2(sizes[-1]))
    scale = 2.0 ** min(max(shared, -127), 127)
    values = []
    for v in group:
        # of two at the same distance the even code
        code = min(range(count), key=lambda c: (abs(sizes[c] - abs(v) / scale), c % 2))
        values.append(math.copysign(sizes[code] * scale, v))
    return np.array(values, np.float32)


@pytest.mark.parametrize("name", ELEMENTS)
def test_values_are_those_of_the_specification(name: str) -> None:
    x = sample()[:, :64]
    w = kernelgen.quantize(x, name, scale="ocp")
    want = [by_definition(group.astype(np.float64), *ELEMENTS[name]) for group in x.reshape(-1, 32)]
    np.testing.assert_array_equal(w.dequantize().reshape(-1, 32), np.array(want))


def test_bytes_are_those_of_gguf() -> None:
    x = sample()[6:]  # of ties it takes the smaller one
    want = quants.quantize(x, GGMLQuantizationType.MXFP4)
    seen = kernelgen.quantize(x, "mxfp4", scale="ocp").data
    np.testing.assert_array_equal(seen.reshape(want.shape), want)


@pytest.mark.parametrize("name", ELEMENTS)
def test_the_best_scale_errs_less(name: str) -> None:
    x = np.random.default_rng(1).standard_normal((16, 512), np.float32)
    errors = [np.square(kernelgen.quantize(x, name, scale=s).dequantize() - x).mean()
              for s in ("best", "ocp")]  # fmt: skip
    assert errors[0] < errors[1] < 1.7 * errors[0]


@pytest.mark.parametrize("name", ["q4_K", "nvfp4", "iq2_xxs", "uint4_g64", "nf4_g64", "f16"])
def test_formats_that_share_no_exponent(name: str) -> None:
    with pytest.raises(FormatError, match=f"the OCP rule for scales was asked for in {name}"):
        kernelgen.quantize(np.ones((1, 256), np.float32), name, scale="ocp")


def test_what_the_rule_does_not_take() -> None:
    x = np.ones((1, 32), np.float32)
    with pytest.raises(FormatError, match="scale is 'floor'; it can be best or ocp"):
        kernelgen.quantize(x, "mxfp4", scale="floor")
    with pytest.raises(FormatError, match="importance was given with scale='ocp'"):
        kernelgen.quantize(x, "mxfp4", importance=np.ones(32), scale="ocp")


def test_the_command_takes_it(tmp_path: Path) -> None:
    x = sample()
    np.save(tmp_path / "x.npy", x)
    made = {}
    for scale in ("best", "ocp"):
        out = tmp_path / f"{scale}.gguf"
        told = CliRunner().invoke(
            app, ["quantize", str(tmp_path / "x.npy"), str(out), "--format", "mxfp4",
                  "--scale", scale],
        )  # fmt: skip
        assert told.exit_code == 0, told.output
        made[scale] = kernelgen.open(out)["weight"]
    assert made["ocp"] == kernelgen.quantize(x, "mxfp4", scale="ocp") != made["best"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "dtype"),
    [("mxfp8_e4m3", "float8_e4m3fn"), ("mxfp8_e5m2", "float8_e5m2"), ("mxfp4", "fp4")],
)
def test_values_are_those_of_torchao(name: str, dtype: str) -> None:
    torch = pytest.importorskip("torch")
    reason = "torchao is not installed"
    mx = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor", reason=reason)
    x = np.delete(sample(), (3, 4), axis=0)  # subnormal numbers vanish there
    element = torch.float4_e2m1fn_x2 if dtype == "fp4" else getattr(torch, dtype)
    theirs = mx.MXTensor.to_mx(torch.from_numpy(x), element, 32, mx.ScaleCalculationMode.FLOOR)
    want = theirs.dequantize(torch.float32).numpy()
    np.testing.assert_array_equal(kernelgen.quantize(x, name, scale="ocp").dequantize(), want)

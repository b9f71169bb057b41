"""Attention whose keys or values have codes from a grid: a long table that kernels look into."""

from __future__ import annotations

import json

import numpy as np
import pytest

from kernelgen import targets
from kernelgen.config import Capabilities
from kernelgen.files import contents
from kernelgen.generate import generate_walk
from kernelgen.ir import formats
from kernelgen.ir.ops import attention as ops
from kernelgen.ir.ops.attention import Attention
from kernelgen.ir.steps import codebook
from kernelgen.problem import relative_error, rounded, tolerance
from kernelgen.targets.codebook import codebook_of
from kernelgen.tensor import QuantTensor
from kernelgen.verify import random_blocks

GRIDS = tuple(fmt.name for fmt in formats.FORMATS if codebook(fmt))
#: two tables, one for both, one for the keys, one for the values
PAIRS = (("iq2_xxs", "iq3_xxs"), ("iq2_xs", "iq2_xs"), ("iq3_s", "q8_0"), ("q4_0", "iq1_s"))
QUICK = (("wgsl", 0), ("triton", 0), ("triton", 3))


def kind_of(k: str, v: str) -> Attention:
    _, mask = ops.trace(None, ops.causal)
    return Attention(256, formats.get(k), formats.get(v), mask=mask, label="causal")


def error(target: str, kind: Attention, precision: str, t: int, s: int) -> float:
    """Of one run over random bytes, as every row of a grid is to be met."""
    manifest = targets.get(target)
    runtime = manifest.reach()
    if reason := runtime.available():
        pytest.skip(reason)
    walk = manifest.walk("attention", kind, precision)
    kernel = generate_walk(walk, kind, manifest, walk.default(kind, runtime.capabilities(), t))
    k, v = (
        QuantTensor(fmt, (1, 2, s, 256), random_blocks(fmt, 2 * s, 256).reshape(1, 2, s, -1))
        for fmt in (kind.k, kind.v)
    )
    q = np.random.default_rng(0).standard_normal((1, 2, t, 256), np.float32)
    q /= np.std(k.dequantize())  # of such bytes scores are large, and so are their errors
    seen = (rounded(x, precision) for x in (q, k.dequantize(), v.dequantize()))
    y = np.full(q.shape, np.nan, np.float32)
    runtime.attention(kernel)(q, k, v, {}, y)
    return relative_error(y, ops.attention(kind, *seen))


@pytest.mark.parametrize(
    ("target", "pair"),
    [
        pytest.param(name, pair, id=f"{name}-{'-'.join(pair)}",
                     marks=() if (name, n) in QUICK else pytest.mark.slow)
        for name in ("wgsl", "triton") for n, pair in enumerate(PAIRS)
    ],
)  # fmt: skip
def test_where_tables_are_arguments(target: str, pair: tuple[str, str]) -> None:
    assert error(target, kind_of(*pair), "fp32", 7, 21) <= tolerance("attention")


@pytest.mark.slow
@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("target", targets.NAMES)
def test_every_grid(target: str, name: str) -> None:
    kind = kind_of(name, name)
    for precision in ("fp32", "fp16"):
        walks = [w for w in targets.get(target).walks if w.op == "attention"]
        if any(w.precision == precision for w in walks):
            for t, s in ((1, 140), (9, 40)):
                bound = tolerance("attention", precision)
                assert error(target, kind, precision, t, s) <= bound, (precision, t, s)


@pytest.mark.parametrize("name", [f.name for f in formats.formats()])
def test_no_format_is_refused(name: str) -> None:
    """Neither for keys nor for values, by any target."""
    kind = kind_of(name, name)
    for target in targets.targets():
        refusals = [w.accepts(kind) for w in target.walks if w.op == "attention"]
        assert None in refusals, (target.name, refusals)


def test_tables_lie_one_behind_the_other() -> None:
    k, v = (codebook(formats.get(name)) for name in ("iq2_xxs", "iq3_xxs"))
    assert k and v
    assert codebook_of(kind_of("iq2_xxs", "iq3_xxs")) == (*k, *v)
    assert codebook_of(kind_of("iq2_xxs", "iq2_xxs")) == k
    assert codebook_of(kind_of("q8_0", "iq3_xxs")) == v
    assert codebook_of(kind_of("q8_0", "q8_0")) is None


@pytest.mark.parametrize("name", ["wgsl", "triton"])
def test_a_host_is_told_the_table(name: str) -> None:
    target, kind = targets.get(name), kind_of("iq2_xxs", "iq3_xxs")
    walk = target.walk("attention", kind)
    kernel = generate_walk(walk, kind, target, walk.default(kind, Capabilities(), 1))
    manifest = json.loads(contents(target, [kernel])["manifest.json"])
    (one,) = (m for m in manifest["kernels"] if m["op"] == "attention")
    (table,) = (a for a in one["arguments"] if a["role"] == "table")
    assert one["tables"] == {table["name"]: list(codebook_of(kind) or ())}
    assert table["shape"] == [str(len(one["tables"][table["name"]]))]

"""Attention with keys and values in every format, on every target, in each precision it offers."""

from __future__ import annotations

import pytest

from kernelgen import targets, verify_attention
from kernelgen.ir import formats
from kernelgen.verify_attention import VARIANTS
from tests.test_formats_in_planes import ONE_OF_EACH

CAUSAL = next(one for one in VARIANTS if one.name == "causal")
EVERY = (*(fmt.name for fmt in formats.FORMATS), *ONE_OF_EACH)

#: for `make test`: what no other test has as keys and values
SAMPLE = (("numpy", "hqq3_g32"), ("numpy", "mxfp6_e3m2"), ("c", "nf4_g64"))


def check(target: str, name: str, queries: tuple[int, ...]) -> None:
    """Prefill and decode, with heads of 64 elements or of a block."""
    manifest, fmt = targets.get(target), formats.get(name)
    runtime = manifest.reach()
    if reason := runtime.available():
        pytest.skip(reason)
    results = list(
        verify_attention.verify(
            manifest, [fmt], runtime=runtime, head_dims=(max(64, fmt.block),), variants=(CAUSAL,),
            queries=queries,
        )
    )  # fmt: skip
    assert "fp32" in {one.precision for one in results}
    assert [(one.precision, one.problem) for one in results if not one.ok] == []


@pytest.mark.parametrize(("target", "name"), SAMPLE)
def test_a_sample(target: str, name: str) -> None:
    check(target, name, (9,))


@pytest.mark.slow
@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("target", targets.NAMES)
def test_every_format(target: str, name: str) -> None:
    check(target, name, (1, 9))

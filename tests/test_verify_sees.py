"""`kernelgen verify` sees kernels that decode a single entry or a single sign wrongly, though it
judges a result that stands alone by the size of its sum."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from kernelgen import targets, verify
from kernelgen.generate import generate_walk
from kernelgen.ir import formats
from kernelgen.ir.block import BlockFormat
from kernelgen.ir.expr import Expr, Table, cast, equal, table, transform, var, where
from kernelgen.problem import tolerance
from kernelgen.targets.base import Kernel

#: the element that is wrong, of each block
ELEMENT = 77


def wrong_entry(fmt: BlockFormat) -> BlockFormat:
    """One number of the grid is that of its neighbour, whose row is another."""

    def change(node: Expr) -> Expr | None:
        if node.op != "table" or len(node.attr) < 256:
            return None
        values = list(node.attr)
        at = next(n for n in range(len(values) // 2, len(values)) if values[n] != values[n - 1])
        values[at] = values[at - 1]
        return table(Table(values), node.args[0])

    return with_code(fmt, lambda code, i: transform(code, change))


def wrong_sign(fmt: BlockFormat) -> BlockFormat:
    """One element of a block is mirrored at the bias."""
    return with_code(
        fmt, lambda code, i: where(equal(i, ELEMENT), 2 * fmt.bias - cast(code.dtype, code), code)
    )


def with_code(fmt: BlockFormat, change: Callable[[Expr, Expr], Expr]) -> BlockFormat:
    values = {one.name: getattr(fmt, one.name) for one in dataclasses.fields(fmt)}
    made = BlockFormat(**values | {"code": lambda b, i: change(fmt.code(b, i), i)})
    i = var("i", fmt.block)
    assert made.code_expr(i) is not fmt.code_expr(i), "nothing is wrong"
    return made


def as_if(target: str, fmt: BlockFormat, wrong: BlockFormat) -> Callable[..., Kernel]:
    """Generates what decodes as `wrong` says, and calls it a kernel of `fmt`."""

    def made(one: Any, subject: BlockFormat, manifest: Any, config: Any) -> Kernel:
        assert subject is fmt and manifest.name == target
        kernel = generate_walk(one, wrong, manifest, config)
        return dataclasses.replace(kernel, subject=fmt)

    return made


FAULTS = {"entry": wrong_entry, "sign": wrong_sign}


@pytest.mark.parametrize(
    ("target", "name", "fault"),
    [("numpy", "iq2_xxs", "entry"),
     *(pytest.param("numpy", "iq3_s", fault, marks=pytest.mark.slow) for fault in FAULTS),
     *(pytest.param("c", name, fault, marks=pytest.mark.slow)
       for name in ("iq2_xxs", "iq1_m") for fault in FAULTS)],
)  # fmt: skip
def test_every_kernel_that_is_wrong_fails(
    target: str, name: str, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fmt, manifest = formats.get(name), targets.get(target)
    monkeypatch.setattr(verify, "generate_walk", as_if(target, fmt, FAULTS[fault](fmt)))
    results = list(verify.verify(manifest, [fmt], ("dequantize", "get_rows", "matvec", "matmul")))
    assert len(results) >= 4
    assert [(r.op, r.precision, r.error) for r in results if r.ok] == []
    assert all("exceeds" in str(r.problem) for r in results)


@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize("name", ["q1_0", "q6_K"])
def test_a_result_that_stands_alone(name: str, precision: str) -> None:
    """One row, one column, one block: right where it is right, and not where one sign is wrong."""
    fmt, manifest = formats.get(name), targets.get("numpy")
    bound = tolerance("matvec", precision)
    errors = []
    for described in (fmt, wrong_sign(fmt)):
        one = manifest.walk("matvec", described, precision)
        config = one.default(described, manifest.capabilities)
        kernel = as_if("numpy", fmt, described)(one, fmt, manifest, config)
        errors.append(verify.check(kernel, manifest.runtime(), 1, 1, fmt.block))
    assert errors[0] <= bound < 100 * bound < errors[1]

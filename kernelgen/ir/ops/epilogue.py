"""What is done to a product before it is stored (`Epilogue`), and to its activations before they
are multiplied (`RmsNorm`).

    y[m, n] = value(sum over k of x[m, k] * w[n, k], operands at m, n)

A gated product has two rows of weights for each result, `gate` and `up`:

    y[m, n] = value(sum of x[m, k] * gate[n, k], sum of x[m, k] * up[n, k], operands at m, n)
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from kernelgen.errors import ExprError
from kernelgen.ir.evaluate import evaluate
from kernelgen.ir.expr import (
    BOOL,
    F32,
    Expr,
    call,
    cast,
    const,
    number,
    show,
    transform,
    walk,
    where,
)
from kernelgen.ir.rules import simplify

Array = npt.NDArray[Any]

#: a sum over k; of a gated product the two of a result
SUM, GATE, UP = number("sum"), number("gate"), number("up")

#: shapes of operands by their axes
_SHAPES = {"": ("1",), "n": ("N",), "m": ("M",), "mn": ("M", "N")}


@dataclass(frozen=True)
class Operand:
    """A float32 array that an epilogue reads at each result: `axes` are "" (one number for all),
    "n", "m", or "mn".  No kernel calls anything of its own by the names that it may have: "bias",
    "residual", "multiplier", "operand0", "operand1"..."""

    name: str
    axes: str

    def __post_init__(self) -> None:
        if not re.fullmatch(r"bias|residual|multiplier|operand\d+", self.name):
            raise ExprError(
                f"an operand is called {self.name!r}; its name may be bias, residual, multiplier,"
                " operand0, operand1 and so on"
            )

    @property
    def value(self) -> Expr:
        """What it is at a result."""
        return number(self.name)

    @property
    def shape(self) -> tuple[str, ...]:
        """Its shape, in the sizes of a product."""
        return _SHAPES[self.axes]


@dataclass(frozen=True)
class Epilogue:
    """What becomes of sums before they are stored.

    value     f32, in `sum`, or in `gate` and `up` where it is `gated`, and in operands by name
    operands  arrays that it reads
    gated     whether a result is made of the sums of two rows of weights
    label     what it is called in names; by default a hash of the expression
    """

    value: Expr
    operands: tuple[Operand, ...] = ()
    gated: bool = False
    label: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        if self.value.dtype is not F32:
            raise ExprError(f"the epilogue is {self.value.dtype.value}; it must be f32")
        read = {node.attr[0] for node in walk(self.value) if node.op == "var"}
        unknown = sorted(read - set(self.parameters))
        if unknown:
            raise ExprError(
                f"the epilogue reads {', '.join(unknown)}; it may read {', '.join(self.parameters)}"
            )

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of what it is computed from, in order."""
        sums = ("gate", "up") if self.gated else ("sum",)
        return (*sums, *(one.name for one in self.operands))

    @property
    def name(self) -> str:
        """What it is called in names of kernels and files."""
        if self.label:
            return self.label
        return hashlib.sha256(f"{show(self.value)}; {self.parameters}".encode()).hexdigest()[:8]


@dataclass(frozen=True)
class RmsNorm:
    """Rows of activations divided by their root mean square, and multiplied by a weight for each
    column (Zhang and Sennrich, 2019): x / sqrt(mean of x^2 + eps) * weight."""

    eps: float = 1e-6

    def __post_init__(self) -> None:
        if not (math.isfinite(self.eps) and self.eps >= 0):
            raise ExprError(f"eps of a norm is {self.eps}; it must be a number from 0 on")


#: what the norm's weight is called among the arguments of a kernel
NORM_WEIGHT = "norm_weight"


@dataclass(frozen=True)
class Fusion:
    """What a product does besides: nothing, or an epilogue, or a norm in front, or both."""

    epilogue: Epilogue | None = None
    norm: RmsNorm | None = None

    @property
    def name(self) -> str:
        """What it is called in names of kernels and files; "" where it is nothing."""
        parts = ("rms" if self.norm else "", self.epilogue.name if self.epilogue else "")
        return "_".join(filter(None, parts))

    @property
    def names(self) -> frozenset[str]:
        """Names that it takes in a kernel's source."""
        found = {"finish", NORM_WEIGHT} if self.name else set()
        return frozenset(found | set(self.epilogue.parameters if self.epilogue else ()))


PLAIN = Fusion()


# ---- functions in wide use ----------------------------------------------------------------------


def sigmoid(x: Expr) -> Expr:
    """1 / (1 + exp(-x)); no exponential in it is above 1."""
    falling = call("exp", -call("abs", x))
    return where(x < 0.0, falling, 1.0) / (1.0 + falling)


def silu(x: Expr) -> Expr:
    """x * sigmoid(x) (Elfwing et al., 2017)."""
    return x * sigmoid(x)


def gelu(x: Expr) -> Expr:
    """x times the normal distribution's function of x (Hendrycks and Gimpel, 2016)."""
    return 0.5 * x * (1.0 + call("erf", x * math.sqrt(0.5)))


def gelu_tanh(x: Expr) -> Expr:
    """GELU by the tanh that its authors give for it."""
    inside = math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)
    return 0.5 * x * (1.0 + call("tanh", inside))


def gelu_quick(x: Expr) -> Expr:
    """GELU by the sigmoid that its authors give for it."""
    return x * sigmoid(1.702 * x)


def relu(x: Expr) -> Expr:
    """x, or 0 below 0."""
    return where(x < 0.0, 0.0, x)


def relu_squared(x: Expr) -> Expr:
    """The square of `relu` (So et al., 2021)."""
    return relu(x) * relu(x)


def tanh(x: Expr) -> Expr:
    """The hyperbolic tangent."""
    return call("tanh", x)


Activation = Callable[[Expr], Expr]

#: by the names that they have
ACTIVATIONS: dict[str, Activation] = {
    one.__name__: one
    for one in (silu, gelu, gelu_tanh, gelu_quick, relu, relu_squared, sigmoid, tanh)
}


def activation(asked: str | Activation) -> Activation:
    """An activation by its name, or the function itself."""
    if callable(asked):
        return asked
    found = ACTIVATIONS.get(asked)
    if found is None:
        raise ExprError(
            f"activation {asked!r} was asked for; there are {', '.join(ACTIVATIONS)}, and any"
            " function of an expression"
        )
    return found


def trace(function: Callable[..., Any], *values: Expr) -> Expr:
    """What a Python function makes of expressions, as an f32 expression."""
    try:
        found = function(*values)
    except TypeError as error:
        raise ExprError(
            f"the function {getattr(function, '__name__', function)} does not take"
            f" {len(values)} expressions ({error}); write it with Python's operators and"
            " kernelgen.ir (where, maximum, call...)"
        ) from error
    if not isinstance(found, Expr):
        found = const(found, F32)
    if found.dtype is BOOL:
        found = where(found, 1.0, 0.0)
    return cast(F32, found)


def chain(*steps: tuple[str, Callable[[Expr], Expr] | None]) -> tuple[Expr, str]:
    """A sum that goes through functions, each with its name for the label; None is left out."""
    value, names = SUM, list[str]()
    for name, step in steps:
        if step is not None:
            value, names = trace(step, value), [*names, name]
    return value, "_".join(names)


def gated(act: str | Activation) -> Epilogue:
    """act(gate) * up: SwiGLU of "silu", GEGLU of "gelu" (Shazeer, 2020)."""
    value = trace(activation(act), GATE) * UP
    return Epilogue(value, gated=True, label=f"{act}_gated" if isinstance(act, str) else "")


# ---- how it is written ---------------------------------------------------------------------------


def statements(value: Expr) -> tuple[tuple[tuple[str, Expr], ...], Expr]:
    """An expression as values that it uses more than once, by name and in order, and what is left
    in these names."""
    value = simplify(value)
    uses: dict[Expr, int] = {}
    for node in walk(value):
        for one in node.args:
            uses[one] = uses.get(one, 0) + 1
    names: dict[Expr, Expr] = {}
    found: list[tuple[str, Expr]] = []
    for node in walk(value):
        if uses.get(node, 0) > 1 and node.args and node.dtype is F32:
            name = f"x{len(found) + 1}"
            found.append((name, _outermost(node, names)))
            names[node] = number(name)
    return tuple(found), _outermost(value, names)


def _outermost(value: Expr, names: dict[Expr, Expr]) -> Expr:
    """`value` in the names, the largest parts first."""
    if value in names:
        return names[value]
    args = tuple(_outermost(one, names) for one in value.args)
    return Expr(value.op, value.dtype, args, value.attr) if value.args else value


#: where the series of tanh has all digits of a float32: x + x**3 * (c0 + x**2 * (c1 + ...))
_SMALL = 0.375
_SERIES = (-1 / 3, 2 / 15, -17 / 315, 62 / 2835, -1382 / 155925)

_ERF = (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592)


def _tanh_of(x: Expr) -> Expr:
    """tanh by its series, and by an exponential."""
    square, series = x * x, const(_SERIES[-1], F32)
    for factor in reversed(_SERIES[:-1]):
        series = series * square + factor
    # finite where the exponential is not
    large = 1.0 - 2.0 / (call("exp", 2.0 * x) + 1.0)
    return where(call("abs", x) < _SMALL, x + x * square * series, large)


def _erf_of(x: Expr) -> Expr:
    """erf by a polynomial and an exponential, off by 1.5e-7 at most (Abramowitz and Stegun,
    7.1.26)."""
    t = 1.0 / (1.0 + 0.3275911 * call("abs", x))
    series: Expr = const(0.0, F32)
    for factor in _ERF:
        series = (series + factor) * t
    near = 1.0 - series * call("exp", -(x * x))
    return where(x < 0.0, -near, near)


def in_words(value: Expr, has: Callable[[str], bool]) -> Expr:
    """The same for a language that has only some functions."""
    known = {"tanh": _tanh_of, "erf": _erf_of}
    missing = {name: function for name, function in known.items() if not has(name)}

    def change(node: Expr) -> Expr | None:
        return (
            missing[node.attr](*node.args) if node.op == "call" and node.attr in missing else None
        )

    return transform(value, change)


# ---- what it computes ----------------------------------------------------------------------------


def apply(epilogue: Epilogue, sums: Sequence[Array], arrays: Mapping[str, Array]) -> Array:
    """The results, float32 (M, N), of sums (M, N): one, or of a gated product two.  Operands are by
    name, each of the shape that its axes say."""
    shape = sums[0].shape
    given = dict(zip(("gate", "up") if epilogue.gated else ("sum",), sums, strict=True))
    given |= {one.name: spread(one, arrays[one.name], shape) for one in epilogue.operands}
    flat = {name: np.asarray(a, np.float32).reshape(-1) for name, a in given.items()}
    value = np.broadcast_to(evaluate(epilogue.value, flat), sums[0].size)
    return value.astype(np.float32).reshape(shape)


def spread(one: Operand, array: Array, shape: tuple[int, ...]) -> Array:
    """An operand at every result (M, N)."""
    columns = {"m": (-1, 1), "mn": shape}.get(one.axes, (1, -1))
    return np.broadcast_to(np.asarray(array).reshape(columns), shape)


def rms_norm(norm: RmsNorm, x: Array, weight: Array) -> Array:
    """Rows x (M, K) normalized and times weight (K,), float64."""
    x = np.asarray(x, np.float64)
    with np.errstate(all="ignore"):
        factor = 1 / np.sqrt(np.mean(np.square(x), axis=-1, keepdims=True) + norm.eps)
        result: Array = x * factor * np.asarray(weight, np.float64)
    return result

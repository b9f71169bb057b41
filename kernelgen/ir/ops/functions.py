"""Functions of one f32 that maps are made of, as expressions: the same on every language.

What languages disagree about, or do not have (the error function; sines of large angles), is made
of operations that all have.
"""

from __future__ import annotations

import math

from kernelgen.ir.expr import (
    BOOL,
    F32,
    I32,
    U32,
    Expr,
    bitcast,
    call,
    cast,
    const,
    equal,
    logical_not,
    maximum,
    where,
)
from kernelgen.ir.floats import is_nan

#: erfc(z) = exp(-z^2) * t * (c0 + c1 t + ...), t = 1 / (1 + z/2), z >= 0, to within 2.4e-7 of it:
#: a least-squares fit of our own, reweighted until its errors were even
_ERFC = (
    0.2820864, 0.28237537, 0.2431033, 0.20268886, -0.026630642, 0.27807474, -0.48720682,
    0.28457844, -0.059069693,
)  # fmt: skip

#: erf(x) = x * (c0 + c1 x^2 + ...) for small x: Taylor's series
_ERF = tuple(2 / math.sqrt(math.pi) * (-1) ** n / math.factorial(n) / (2 * n + 1) for n in range(7))
_ERF_SMALL = 0.5

#: erfc and sigmoid of less are 0 in f32, and exponentials of squares overflow
_FAR = 10.0


def number(x: Expr | int | float) -> Expr:
    """A value as f32."""
    return cast(F32, x) if isinstance(x, Expr) else const(x, F32)


def polynomial(x: Expr, factors: tuple[float, ...]) -> Expr:
    """factors[0] + factors[1] * x + ..."""
    result = const(factors[-1], F32)
    for factor in reversed(factors[:-1]):
        result = result * x + factor
    return result


def exp(x: Expr) -> Expr:
    """e to the power of x."""
    return call("exp", number(x))


def log(x: Expr) -> Expr:
    """The natural logarithm."""
    return call("log", number(x))


def sqrt(x: Expr) -> Expr:
    """The square root."""
    return call("sqrt", number(x))


def rsqrt(x: Expr) -> Expr:
    """1 / sqrt(x)."""
    return call("rsqrt", number(x))


def tanh(x: Expr) -> Expr:
    """The hyperbolic tangent."""
    return call("tanh", number(x))


def absolute(x: Expr) -> Expr:
    """|x|."""
    return call("abs", number(x))


def erfc_positive(z: Expr) -> Expr:
    """1 - erf(z) for z >= 0, to a relative error of 1e-6, and to 2^-126 absolutely."""
    near = where(z < _FAR, z, _FAR)  # NaN becomes a number: see its users
    t = 1.0 / (1.0 + 0.5 * near)
    return exp(-(near * near)) * (t * polynomial(t, _ERFC))


def erf(x: Expr) -> Expr:
    """The error function, to within 5e-7."""
    x = number(x)
    size = absolute(x)
    large = 1.0 - erfc_positive(size)
    small = x * polynomial(x * x, _ERF)
    value = where(size < _ERF_SMALL, small, where(x < 0.0, -large, large))
    return where(is_nan(x), x, value)


def relu(x: Expr) -> Expr:
    """x where it is positive, else 0; NaN stays."""
    x = number(x)
    return where(x < 0.0, 0.0, x)


def sigmoid(x: Expr) -> Expr:
    """1 / (1 + exp(-x))."""
    return 1.0 / (1.0 + exp(-number(x)))


def silu(x: Expr) -> Expr:
    """x * sigmoid(x)."""
    x = number(x)
    return x / (1.0 + exp(-x))


def gelu(x: Expr) -> Expr:
    """x * (1 + erf(x / sqrt(2))) / 2 (Hendrycks and Gimpel, 2016); without cancellation where x is
    far below zero."""
    x = number(x)
    half = 0.5 * erfc_positive(absolute(x) * math.sqrt(0.5))
    value = where(x < 0.0, x * half, x - x * half)
    # an infinity times nothing is NaN
    return where(is_nan(x), x, where(x < -14.0, 0.0, where(14.0 < x, x, value)))


def gelu_tanh(x: Expr) -> Expr:
    """gelu by its usual approximation, x * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3))) / 2."""
    x = number(x)
    inner = math.sqrt(2 / math.pi) * (x + 0.044715 * (x * x * x))
    # (1 + tanh(u)) / 2 is a sigmoid of 2u, without cancellation
    value = x / (1.0 + exp(-2.0 * maximum(inner, -40.0)))
    return where(x < -10.0, 0.0, value)


#: sin and cos for angles up to a quarter of a turn's half, by Taylor's series
_SIN = tuple((-1) ** n / math.factorial(2 * n + 1) for n in range(5))
_COS = tuple((-1) ** n / math.factorial(2 * n) for n in range(6))


def sin_cos_of_turns(turns: Expr) -> tuple[Expr, Expr]:
    """Sine and cosine of an angle that a u32 gives in units of 2^-32 of a turn, to within 1e-7."""
    quarter = (turns + (1 << 29)) >> 30
    rest = bitcast(I32, turns - (quarter << 30))
    x = cast(F32, rest) * (2 * math.pi / 2**32)
    square = x * x
    sine, cosine = x * polynomial(square, _SIN), polynomial(square, _COS)
    swapped = const(0, I32) < bitcast(I32, quarter & 1)
    s, c = where(swapped, cosine, sine), where(swapped, sine, cosine)
    s_sign, c_sign = (quarter & 2) << 30, ((quarter + 1) & 2) << 30
    return _signed(s, s_sign), _signed(c, c_sign)


def _signed(x: Expr, sign: Expr) -> Expr:
    """x, its sign changed where the highest bit of a u32 says so."""
    return bitcast(F32, bitcast(U32, x) ^ sign)


def nonzero(x: Expr) -> Expr:
    """Whether a value is not 0; a condition as it is."""
    return x if x.dtype is BOOL else logical_not(equal(x, 0))

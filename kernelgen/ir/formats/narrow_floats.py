"""Floats of eight bits as expressions of their bits.

Nothing here depends on what a device does with subnormal numbers.
"""

from __future__ import annotations

from kernelgen.ir.expr import F32, I32, Expr, bitcast, cast, const, equal, where


def half_e8m0(e: Expr) -> Expr:
    """2**(e - 128), f32: half of the power of two that the bits e stand for, 0..255.

    Source: OCP Microscaling Formats v1.0.  Below e = 2 the result is subnormal: 2**-128 and 2**-127
    are the bits 1 << 21 and 1 << 22.
    """
    return bitcast(F32, where(e < 2, const(1 << 21, I32) << (e & 1), (e - 1) << 23))


def half_ue4m3(x: Expr) -> Expr:
    """Half of the number, f32, whose exponent (bias 7) is bits 3..6 of x and whose mantissa is bits
    0..2: f8 E4M3 without its sign.  The NaN 0x7F is 0.

    Source: OCP 8-bit Floating Point Specification v1.0; ggml: ggml_ue4m3_to_fp32.
    """
    exponent, mantissa = (x >> 3) & 15, x & 7
    normal = bitcast(F32, ((exponent + 119) << 23) | (mantissa << 20))
    small = cast(F32, mantissa) * 2.0**-10
    return where(equal(x, 0x7F), 0.0, where(equal(exponent, 0), small, normal))


def e8m0(e: Expr) -> Expr:
    """2**(e - 127), f32, of the bits 0..255; 255 is NaN.

    Source: OCP Microscaling Formats v1.0.
    """
    power = where(equal(e, 0), const(1 << 22, I32), e << 23)
    return bitcast(F32, where(equal(e, 255), const(0x7FC00000, I32), power))


def small_float(x: Expr, exponent_bits: int, mantissa_bits: int, bias: int) -> Expr:
    """The number, f32, whose bits are x: a sign, an exponent and a mantissa; all are finite."""
    return bitcast(F32, _finite(x, exponent_bits, mantissa_bits, bias))


def e4m3fn(x: Expr) -> Expr:
    """f8 E4M3, f32, of the bits 0..255: bias 7, no infinity, 0x7F and 0xFF are NaN.

    Source: OCP 8-bit Floating Point Specification v1.0.
    """
    nan = equal(x & 0x7F, 0x7F)
    return bitcast(F32, where(nan, const(0x7FC00000, I32), _finite(x, 4, 3, 7)))


def e5m2(x: Expr) -> Expr:
    """f8 E5M2, f32, of the bits 0..255: bias 15; the largest exponent is infinity and NaN.

    Source: OCP 8-bit Floating Point Specification v1.0.
    """
    beyond = 0x7F800000 | ((x & 3) << 21) | ((x >> 7) << 31)
    return bitcast(F32, where(equal((x >> 2) & 31, 31), beyond, _finite(x, 5, 2, 15)))


def _finite(x: Expr, exponent_bits: int, mantissa_bits: int, bias: int) -> Expr:
    """The bits of an f32."""
    mantissa = x & ((1 << mantissa_bits) - 1)
    exponent = (x >> mantissa_bits) & ((1 << exponent_bits) - 1)
    small = bitcast(I32, cast(F32, mantissa) * 2.0 ** (1 - bias - mantissa_bits))
    normal = ((exponent + (127 - bias)) << 23) | (mantissa << (23 - mantissa_bits))
    sign = (x >> (exponent_bits + mantissa_bits)) << 31
    return where(equal(exponent, 0), small, normal) | sign

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

"""Floating-point types of 16 bits and fewer, as expressions on their bits.

Rounding is to the nearest, to even where two are as near; what is too large becomes infinite, or
NaN in a type that has no infinity.  All is integer arithmetic, so that it is the same on devices
that take subnormal numbers for zero.

Sources: IEEE 754-2019; bfloat16 as hardware has it; Micikevicius et al., "FP8 formats for deep
learning" (2022) for the types of 8 bits.
"""

from __future__ import annotations

from dataclasses import dataclass

from kernelgen.ir.expr import (
    F32,
    I32,
    U32,
    Expr,
    bitcast,
    cast,
    const,
    equal,
    maximum,
    minimum,
    where,
)

#: the bits of an infinite float32, and those that are not its sign
_INFINITY, _MAGNITUDE = 0x7F800000, 0x7FFFFFFF


@dataclass(frozen=True)
class FloatType:
    """A sign, `exponent` bits and `mantissa` bits, from the highest bit down.

    infinite   whether the largest exponent means infinity and NaN; else only the largest number of
               all does, which is NaN
    """

    name: str
    exponent: int
    mantissa: int
    infinite: bool = True

    @property
    def width(self) -> int:
        """Bits of all."""
        return 1 + self.exponent + self.mantissa

    @property
    def bias(self) -> int:
        """What is added to exponents."""
        return (1 << (self.exponent - 1)) - 1

    @property
    def beyond(self) -> int:
        """The magnitude above all finite ones: infinity, or NaN where there is none."""
        if self.infinite:
            return ((1 << self.exponent) - 1) << self.mantissa
        return (1 << (self.exponent + self.mantissa)) - 1

    def decode(self, bits: Expr) -> Expr:
        """The f32 that an integer's lowest bits stand for."""
        bits = cast(U32, bits)
        if self.exponent == 8:
            return bitcast(F32, bits << (32 - self.width))
        drop, least = 23 - self.mantissa, 1 << self.mantissa
        magnitude = bits & ((1 << (self.width - 1)) - 1)
        sign = (bits >> (self.width - 1) & 1) << 31
        normal = (magnitude << drop) + ((127 - self.bias) << 23)
        # below the least normal number there are multiples of one power of two
        tiny = cast(F32, cast(I32, magnitude)) * 2.0 ** (1 - self.bias - self.mantissa)
        finite = where(magnitude < least, bitcast(U32, tiny), normal)
        if self.infinite:
            special = (magnitude << drop) | _INFINITY
            value = where(magnitude < self.beyond, finite, special)
        else:
            value = where(magnitude < self.beyond, finite, const(0x7FC00000, U32))
        return bitcast(F32, value | sign)

    def encode(self, x: Expr) -> Expr:
        """The bits of an f32 in this type, as a u32."""
        bits = bitcast(U32, x)
        size, sign = bits & _MAGNITUDE, (bits >> 31) << (self.width - 1)
        drop = 23 - self.mantissa
        half = (1 << (drop - 1)) - 1
        rounded = size + half + (size >> drop & 1)
        finite = (rounded - ((127 - self.bias) << 23)) >> drop
        if self.exponent < 8:
            finite = where(size < ((128 - self.bias) << 23), self._small(size), finite)
        limit = const(self.beyond, U32)
        nan = self.beyond | (1 << (self.mantissa - 1))
        value = where(size < _INFINITY + 1, minimum(finite, limit), const(nan, U32))
        return value | sign

    def _small(self, size: Expr) -> Expr:
        """Magnitudes below the least normal number: a multiple of the least of all."""
        exponent = cast(I32, size >> 23)
        digits = (size & 0x7FFFFF) | 0x800000
        drop = 23 - self.mantissa + 128 - self.bias
        # 24 digits shifted by 25 are nothing, rounded as well
        shift = maximum(minimum(drop - exponent, 25), 1)
        half = (const(1, U32) << (shift - 1)) - 1
        return (digits + half + (digits >> shift & 1)) >> shift


#: by name
FLOATS = {
    one.name: one
    for one in (
        FloatType("f16", 5, 10),
        FloatType("bf16", 8, 7),
        FloatType("f8_e5m2", 5, 2),
        FloatType("f8_e4m3", 4, 3, infinite=False),
    )
}


def is_nan(x: Expr) -> Expr:
    """Whether an f32 is no number, by its bits: some languages assume that all are."""
    return const(_INFINITY, U32) < (bitcast(U32, x) & _MAGNITUDE)


def order_key(x: Expr) -> Expr:
    """An i32 that orders f32, the negative zero below the other and NaN above all."""
    plain = where(is_nan(x), const(_MAGNITUDE, I32), bitcast(I32, x))
    return plain ^ ((plain >> 31) & _MAGNITUDE)


def sort_key(x: Expr) -> Expr:
    """An i32 that orders f32 as numpy does: both zeros alike, NaN above all."""
    key = order_key(x)
    return where(equal(key, -1), const(0, I32), key)


def of_sort_key(key: Expr) -> Expr:
    """The f32 of an `order_key` or `sort_key`."""
    return bitcast(F32, key ^ ((key >> 31) & _MAGNITUDE))

// Words of kernelgen in the Metal Shading Language.
#include <metal_stdlib>
%% if "matrix" in features
#include <metal_simdgroup_matrix>
%% endif
using namespace metal;
// Metal's default is fast math, for which there are no NaNs and sums have no order. Compilers
// before version 3.2 of the language do not know these lines: there, compile without fast math.
#pragma METAL fp math_mode(safe)
%% if not contract
#pragma METAL fp contract(off)
%% endif
#define i32(x) ((int)(x))
#define u32(x) ((uint)(x))
#define f32(x) ((float)(x))
#define f32_bits(x) as_type<uint>(x)
#define bits_f32(x) as_type<float>(x)
#define nearest(x) rint(x)
#define to_half(x) ((half)(x))
#define from_half(x) ((float)(x))
%% if "subgroups" in features
#define subgroup_sum(x) simd_sum(x)
%% endif


typedef device const uchar *bytes;

inline ushort u16_bytes(bytes p) { return ushort(p[0] | p[1] << 8); }
inline ushort u16_aligned(bytes p) { return *(device const ushort *)p; }
inline uint u32_aligned(bytes p) { return *(device const uint *)p; }
inline uint u32_halves(bytes p) { return u16_aligned(p) | uint(u16_aligned(p + 2)) << 16; }
inline uint u32_bytes(bytes p) { return u16_bytes(p) | uint(u16_bytes(p + 2)) << 16; }

// Four products of signed bytes, added to a sum.
inline int dot4(uint a, uint b, int sum) {
    const int4 products = int4(as_type<char4>(a)) * int4(as_type<char4>(b));
    return sum + products.x + products.y + products.z + products.w;
}

// Bit l of x to byte l, l = 0..3: the product puts copies of the four bits at distances of 7.
inline uint spread1(uint x) { return ((x & 15u) * 0x00204081u) & 0x01010101u; }

// The bytes of x, at most 127 and not 0, negated where those of `bits` are 1 and not 0: ~x + 1, which
// leaves no byte.
inline uint negate_bytes(uint x, uint bits) { return (x ^ bits * 255u) + bits; }

inline uint lookup(constant const char *table, uint x) {
    return as_type<uint>(char4(table[x & 15], table[x >> 8 & 15], table[x >> 16 & 15], table[x >> 24 & 15]));
}

// From here on the number of a thread in its group has the name of an address space, which is also
// what variables have anyway.
#define thread thread_number


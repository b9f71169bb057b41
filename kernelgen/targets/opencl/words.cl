// Words of kernelgen in OpenCL C 1.2.
%% if not contract
#pragma OPENCL FP_CONTRACT OFF
%% endif
%% if "subgroups" in features
#pragma OPENCL EXTENSION cl_khr_subgroups : enable
#define subgroup_sum(x) sub_group_reduce_add(x)
%% endif
#define i32(x) ((int)(x))
#define u32(x) ((uint)(x))
#define f32(x) ((float)(x))
#define f32_bits(x) as_uint(x)
#define bits_f32(x) as_float(x)
#define nearest(x) rint(x)

typedef __global const uchar *bytes;

// Half precision as 16 bits: every device can convert it, also one that cannot calculate in it.
// The conversions are of memory; characters may lie where another type is read or written.
inline float from_half(uint x) {
    uchar halves[2] __attribute__((aligned(2))) = {x & 255, x >> 8};
    return vload_half(0, (const half *)halves);
}
inline ushort to_half(float x) {
    uchar halves[2] __attribute__((aligned(2)));
    vstore_half_rte(x, 0, (half *)halves);
    return halves[0] | halves[1] << 8;
}

inline uint u16_bytes(bytes p) { return p[0] | (uint)p[1] << 8; }
inline uint u16_aligned(bytes p) { return *(__global const ushort *)p; }
inline uint u32_bytes(bytes p) { return as_uint(vload4(0, p)); }
inline uint u32_halves(bytes p) { return as_uint(vload2(0, (__global const ushort *)p)); }
inline uint u32_aligned(bytes p) { return *(__global const uint *)p; }
inline float f16_aligned(bytes p) { return vload_half(0, (__global const half *)p); }
inline float f16_bytes(bytes p) { return from_half(u16_bytes(p)); }

// Four products of signed bytes, added to a sum.
inline int dot4(uint a, uint b, int sum) {
%% if "dot" in features
    return sum + dot_4x8packed_ss_int(a, b);
%% else
    // by shifts: compilers for CPUs turn these into vectors of words, but none of what is a vector
    return sum + ((int)(a << 24) >> 24) * ((int)(b << 24) >> 24)
               + ((int)(a << 16) >> 24) * ((int)(b << 16) >> 24)
               + ((int)(a << 8) >> 24) * ((int)(b << 8) >> 24) + ((int)a >> 24) * ((int)b >> 24);
%% endif
}

// Bit l of x to byte l, l = 0..3: the product puts copies of the four bits at distances of 7.
inline uint spread1(uint x) { return ((x & 15u) * 0x00204081u) & 0x01010101u; }

// The bytes of x, at most 127 and not 0, negated where those of `bits` are 1 and not 0: ~x + 1, which
// leaves no byte.
inline uint negate_bytes(uint x, uint bits) { return (x ^ bits * 255u) + bits; }

inline uint lookup(__constant const char *table, uint x) {
    return as_uint((char4)(table[x & 15], table[(x >> 8) & 15], table[(x >> 16) & 15], table[(x >> 24) & 15]));
}


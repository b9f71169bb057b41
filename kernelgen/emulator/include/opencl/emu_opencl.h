// OpenCL C with half, sub-groups and integer dot products, on the engine
#pragma once
#include "../cl/emu_cl.h"

#define restrict __restrict
#define CLK_LOCAL_MEM_FENCE 1
#define CLK_GLOBAL_MEM_FENCE 2
#define cl_khr_fp16 1
#define cl_khr_subgroups 1
#define cl_intel_subgroups 1
#define cl_khr_subgroup_shuffle 1
#define cl_khr_subgroup_shuffle_relative 1
#define cl_khr_subgroup_ballot 1
#define cl_khr_integer_dot_product 1
#define __opencl_c_integer_dot_product_input_4x8bit_packed 1
#define __opencl_c_subgroups 1
#define INFINITY __builtin_inff()
#define NAN __builtin_nanf("")
#define FLT_MAX 3.402823466e+38f
#define INT_MAX 0x7fffffff
#define INT_MIN (-INT_MAX - 1)
#define M_PI_F 3.14159265358979323846f

// ---- work-items

static inline size_t get_local_id(uint d) { return d < 3 ? emu_self->in_block[d] : 0; }
static inline size_t get_group_id(uint d) { return d < 3 ? emu_self->block[d] : 0; }
static inline size_t get_local_size(uint d) { return d < 3 ? emu_self->block_dim[d] : 1; }
static inline size_t get_num_groups(uint d) { return d < 3 ? emu_self->grid[d] : 1; }
static inline size_t get_global_size(uint d) { return get_local_size(d) * get_num_groups(d); }
static inline size_t get_global_offset(uint) { return 0; }
static inline size_t get_global_id(uint d) {
    return get_group_id(d) * get_local_size(d) + get_local_id(d);
}
static inline uint get_work_dim() {
    return emu_self->block_dim[2] * emu_self->grid[2] > 1   ? 3
           : emu_self->block_dim[1] * emu_self->grid[1] > 1 ? 2 : 1;
}
static inline size_t get_local_linear_id() { return emu_self->linear; }
static inline void barrier(uint, EMU_LINE) { emu_barrier(0, 0, line, 1); }
static inline void work_group_barrier(uint, EMU_LINE) { emu_barrier(0, 0, line, 1); }
static inline void mem_fence(uint) {}
static inline void read_mem_fence(uint) {}
static inline void write_mem_fence(uint) {}

// ---- sub-groups

static inline uint get_sub_group_local_id() { return emu_self->lane; }
static inline uint get_sub_group_size() { return emu_self->subgroup_lanes; }
static inline uint get_max_sub_group_size() { return emu_self->subgroup_size; }
static inline uint get_sub_group_id() { return emu_self->subgroup; }
static inline uint get_num_sub_groups() {
    uint threads = emu_self->block_dim[0] * emu_self->block_dim[1] * emu_self->block_dim[2];
    return (threads + emu_self->subgroup_size - 1) / emu_self->subgroup_size;
}
static inline void sub_group_barrier(uint, EMU_LINE) { emu_subgroup_barrier(0, line); }
static inline int sub_group_all(int v, EMU_LINE) { return (int)emu_vote(EMU_ALL, 0, v != 0, line); }
static inline int sub_group_any(int v, EMU_LINE) { return (int)emu_vote(EMU_ANY, 0, v != 0, line); }
static inline uint4 sub_group_ballot(int v, EMU_LINE) {
    ulong all = emu_vote(EMU_BALLOT, 0, v != 0, line);
    return (uint4)((uint)all, (uint)(all >> 32), 0, 0);
}
#define EMU_SHUFFLES(name, mode)                                                                   \
    template <class T> static inline T name(T v, uint by, EMU_LINE) {                              \
        return emu_shuffle_value(mode, v, (int)by, line);                                          \
    }
EMU_SHUFFLES(sub_group_broadcast, EMU_IDX)
EMU_SHUFFLES(sub_group_non_uniform_broadcast, EMU_IDX)
EMU_SHUFFLES(sub_group_shuffle, EMU_IDX)
EMU_SHUFFLES(sub_group_shuffle_xor, EMU_BFLY)
EMU_SHUFFLES(sub_group_shuffle_up, EMU_UP)
EMU_SHUFFLES(sub_group_shuffle_down, EMU_DOWN)
EMU_SHUFFLES(sub_group_rotate, EMU_ROTATE)
EMU_SHUFFLES(intel_sub_group_shuffle, EMU_IDX)
EMU_SHUFFLES(intel_sub_group_shuffle_xor, EMU_BFLY)
#define EMU_REDUCTIONS(what, op)                                                                   \
    template <class T> static inline T sub_group_reduce_##what(T v, EMU_LINE) {                    \
        return emu_reduce_value(EMU_REDUCE, op, v, line);                                          \
    }                                                                                              \
    template <class T> static inline T sub_group_scan_inclusive_##what(T v, EMU_LINE) {            \
        return emu_reduce_value(EMU_INCLUSIVE, op, v, line);                                       \
    }
EMU_REDUCTIONS(add, EMU_ADD)
EMU_REDUCTIONS(min, EMU_MIN)
EMU_REDUCTIONS(max, EMU_MAX)
template <class T> static inline T sub_group_scan_exclusive_add(T v, EMU_LINE) {
    return emu_reduce_value(EMU_EXCLUSIVE, EMU_ADD, v, line);
}

// ---- integer dot products

#define EMU_DOT4(name, A, B, R)                                                                    \
    static inline R dot_4x8packed_##name(uint a, uint b) {                                         \
        R sum = 0;                                                                                 \
        for (int i = 0; i < 32; i += 8) sum += (R)(A)(a >> i) * (R)(B)(b >> i);                    \
        return sum;                                                                                \
    }
EMU_DOT4(ss_int, char, char, int)
EMU_DOT4(su_int, char, uchar, int)
EMU_DOT4(us_int, uchar, char, int)
EMU_DOT4(uu_uint, uchar, uchar, uint)
#define EMU_DOT4_SAT(name, R, low, high)                                                           \
    static inline R dot_acc_sat_4x8packed_##name(uint a, uint b, R c) {                            \
        long sum = (long)dot_4x8packed_##name(a, b) + (long)c;                                     \
        return (R)(sum < low ? low : sum > high ? high : sum);                                     \
    }
EMU_DOT4_SAT(ss_int, int, -0x80000000l, 0x7fffffffl)
EMU_DOT4_SAT(su_int, int, -0x80000000l, 0x7fffffffl)
EMU_DOT4_SAT(us_int, int, -0x80000000l, 0x7fffffffl)
EMU_DOT4_SAT(uu_uint, uint, 0l, 0xffffffffl)
static inline int dot(char4 a, char4 b) { return a.x * b.x + a.y * b.y + a.z * b.z + a.w * b.w; }
static inline uint dot(uchar4 a, uchar4 b) { return a.x * b.x + a.y * b.y + a.z * b.z + a.w * b.w; }

// ---- conversions and bits

#define EMU_CONVERT_TO(T, n)                                                                       \
    template <class V> static inline T##n convert_##T##n(V v) {                                    \
        return __builtin_convertvector(v, T##n);                                                   \
    }                                                                                              \
    template <class V> static inline T##n as_##T##n(V v) { return __builtin_bit_cast(T##n, v); }
#define EMU_CONVERT(T)                                                                             \
    template <class V> static inline T convert_##T(V v) { return (T)v; }                           \
    template <class V> static inline T as_##T(V v) { return __builtin_bit_cast(T, v); }            \
    EMU_CONVERT_TO(T, 2) EMU_CONVERT_TO(T, 3) EMU_CONVERT_TO(T, 4) EMU_CONVERT_TO(T, 8)            \
    EMU_CONVERT_TO(T, 16)
EMU_TYPES(EMU_CONVERT)
#define EMU_CONVERT_SAT(T, low, high)                                                              \
    static inline T convert_##T##_sat(float v) { return (T)clamp(truncf(v), low, high); }          \
    static inline T convert_##T##_sat_rte(float v) { return (T)clamp(nearbyintf(v), low, high); }  \
    static inline T convert_##T##_rte(float v) { return (T)nearbyintf(v); }                        \
    static inline T convert_##T##_rtz(float v) { return (T)truncf(v); }
EMU_CONVERT_SAT(char, -128.f, 127.f)
EMU_CONVERT_SAT(uchar, 0.f, 255.f)
EMU_CONVERT_SAT(short, -32768.f, 32767.f)
EMU_CONVERT_SAT(int, -2147483648.f, 2147483520.f)
static inline uint abs(int v) { return v < 0 ? -(uint)v : (uint)v; }
static inline uint clz(uint v) { return v ? (uint)__builtin_clz(v) : 32; }
static inline int mul24(int a, int b) { return a * b; }
static inline int mad24(int a, int b, int c) { return a * b + c; }
template <class T> static inline T rotate(T v, T n) {
    n &= 8 * sizeof(T) - 1;
    return n ? (v << n) | (v >> (8 * sizeof(T) - n)) : v;
}
template <class T, class C> static inline T select(T a, T b, C c) { return c ? b : a; }

#define EMU_MATH_NATIVE(f, how) EMU_MATH1(native_##f, how) EMU_MATH1(half_##f, how)
EMU_ALL_MATH1(EMU_MATH_NATIVE)
static inline float native_recip(float x) { return 1 / x; }
static inline float native_divide(float x, float y) { return x / y; }

// ---- loads and stores of vectors, whose parts alone must be aligned

#define EMU_VLOAD_N(T, n, space)                                                                   \
    static inline T##n vload##n(size_t at, const space T *p) {                                     \
        T##n r;                                                                                    \
        for (int i = 0; i < n; i++) r[i] = p[at * n + i];                                          \
        return r;                                                                                  \
    }
#define EMU_VSTORE_N(T, n, space)                                                                  \
    static inline void vstore##n(T##n v, size_t at, space T *p) {                                  \
        for (int i = 0; i < n; i++) p[at * n + i] = v[i];                                          \
    }
#define EMU_VMEMORY(T, n)                                                                          \
    EMU_VLOAD_N(T, n, __global) EMU_VLOAD_N(T, n, __local) EMU_VLOAD_N(T, n, __constant)           \
    EMU_VLOAD_N(T, n, __private) EMU_VSTORE_N(T, n, __global) EMU_VSTORE_N(T, n, __local)          \
    EMU_VSTORE_N(T, n, __private)
#define EMU_VMEMORY_OF(T)                                                                          \
    EMU_VMEMORY(T, 2) EMU_VMEMORY(T, 3) EMU_VMEMORY(T, 4) EMU_VMEMORY(T, 8) EMU_VMEMORY(T, 16)
EMU_TYPES(EMU_VMEMORY_OF)
#define EMU_HALVES_N(n, space)                                                                     \
    static inline float##n vload_half##n(size_t at, const space half *p) {                         \
        return __builtin_convertvector(vload##n(at, p), float##n);                                 \
    }
#define EMU_HALVES(space)                                                                          \
    static inline float vload_half(size_t at, const space half *p) { return p[at]; }               \
    EMU_HALVES_N(2, space) EMU_HALVES_N(4, space) EMU_HALVES_N(8, space)
EMU_HALVES(__global)
EMU_HALVES(__local)
EMU_HALVES(__constant)
EMU_HALVES(__private)
static inline void vstore_half(float v, size_t at, __global half *p) { p[at] = (half)v; }
static inline void vstore_half(float v, size_t at, __local half *p) { p[at] = (half)v; }
static inline void vstore_half(float v, size_t at, __private half *p) { p[at] = (half)v; }
#define EMU_STORE_HALF(space)                                                                      \
    static inline void vstore_half_rte(float v, size_t at, space half *p) { p[at] = (half)v; }
EMU_STORE_HALF(__global)
EMU_STORE_HALF(__local)
EMU_STORE_HALF(__private)

// ---- atomics

#define EMU_ATOMIC_ON(name, op, T, space)                                                          \
    static inline T name(volatile space T *p, T v, EMU_LINE) {                                     \
        return emu_rmw(EMU_ANYWHERE(p), op, v, (T)0, line);                                        \
    }
#define EMU_ATOMIC_SPACES(name, op, T)                                                             \
    EMU_ATOMIC_ON(name, op, T, __global) EMU_ATOMIC_ON(name, op, T, __local)
#define EMU_ATOMIC(name, op) EMU_ATOMIC_SPACES(name, op, int) EMU_ATOMIC_SPACES(name, op, uint)
EMU_ATOMIC(atomic_add, EMU_ADD)
EMU_ATOMIC(atomic_sub, EMU_SUB)
EMU_ATOMIC(atomic_xchg, EMU_EXCH)
EMU_ATOMIC(atomic_min, EMU_MIN)
EMU_ATOMIC(atomic_max, EMU_MAX)
EMU_ATOMIC(atomic_and, EMU_BAND)
EMU_ATOMIC(atomic_or, EMU_BOR)
EMU_ATOMIC(atomic_xor, EMU_BXOR)
EMU_ATOMIC_SPACES(atomic_xchg, EMU_EXCH, float)
#define EMU_ATOMIC_MORE(T, space)                                                                  \
    static inline T atomic_inc(volatile space T *p, EMU_LINE) {                                    \
        return emu_rmw(EMU_ANYWHERE(p), EMU_ADD, (T)1, (T)0, line);                                \
    }                                                                                              \
    static inline T atomic_dec(volatile space T *p, EMU_LINE) {                                    \
        return emu_rmw(EMU_ANYWHERE(p), EMU_SUB, (T)1, (T)0, line);                                \
    }                                                                                              \
    static inline T atomic_cmpxchg(volatile space T *p, T compare, T v, EMU_LINE) {                \
        return emu_rmw(EMU_ANYWHERE(p), EMU_CAS, v, compare, line);                                \
    }
EMU_ATOMIC_MORE(int, __global)
EMU_ATOMIC_MORE(int, __local)
EMU_ATOMIC_MORE(uint, __global)
EMU_ATOMIC_MORE(uint, __local)

// The Metal Shading Language on the engine.  Compiled as C++ for OpenCL, which has the same
// address spaces under other names.
#pragma once
#include "../cl/emu_cl.h"

#define device __global
#define threadgroup __local
#define constant __constant
#define thread __private
// OpenCL's keywords are names like any other
#define local emu_name_local
#define global emu_name_global
#define generic emu_name_generic
#define read_only emu_name_read_only
#define write_only emu_name_write_only
#define read_write emu_name_read_write
#define __METAL__ 1
#define __METAL_VERSION__ 310
#define INFINITY __builtin_inff()
#define NAN __builtin_nanf("")
#define FLT_MAX 3.402823466e+38f
#define INT_MAX 0x7fffffff
#define INT_MIN (-INT_MAX - 1)
#define M_PI_F 3.14159265358979323846f

typedef __bf16 bfloat;
EMU_VECTOR(bfloat, 2)
EMU_VECTOR(bfloat, 3)
EMU_VECTOR(bfloat, 4)

// ---- constructors: vectors from numbers and vectors, converted; they are macros, since these
// types cannot have constructors

template <class V> struct EmuLanes { enum { value = 1 }; };
#define EMU_LANES(T, n) template <> struct EmuLanes<T##n> { enum { value = n }; };
#define EMU_LANES_OF(T) EMU_LANES(T, 2) EMU_LANES(T, 3) EMU_LANES(T, 4)
EMU_TYPES(EMU_LANES_OF)
EMU_LANES_OF(bfloat)
template <class R, class T, class A> static inline void emu_put(R &r, int &at, A a) {
    if constexpr (EmuLanes<A>::value == 1) r[at++] = (T)a;
    else
        for (int i = 0; i < EmuLanes<A>::value; i++) r[at++] = (T)a[i];
}
template <class R, class T, class... A> static inline R emu_make(A... a) {
    R r;
    int at = 0;
    (emu_put<R, T>(r, at, a), ...);
    if (at == 1)
        for (int i = 1; i < EmuLanes<R>::value; i++) r[i] = r[0];
    return r;
}
#define float2(...) emu_make<float2, float>(__VA_ARGS__)
#define float3(...) emu_make<float3, float>(__VA_ARGS__)
#define float4(...) emu_make<float4, float>(__VA_ARGS__)
#define half2(...) emu_make<half2, half>(__VA_ARGS__)
#define half3(...) emu_make<half3, half>(__VA_ARGS__)
#define half4(...) emu_make<half4, half>(__VA_ARGS__)
#define bfloat2(...) emu_make<bfloat2, bfloat>(__VA_ARGS__)
#define bfloat3(...) emu_make<bfloat3, bfloat>(__VA_ARGS__)
#define bfloat4(...) emu_make<bfloat4, bfloat>(__VA_ARGS__)
#define int2(...) emu_make<int2, int>(__VA_ARGS__)
#define int3(...) emu_make<int3, int>(__VA_ARGS__)
#define int4(...) emu_make<int4, int>(__VA_ARGS__)
#define uint2(...) emu_make<uint2, uint>(__VA_ARGS__)
#define uint3(...) emu_make<uint3, uint>(__VA_ARGS__)
#define uint4(...) emu_make<uint4, uint>(__VA_ARGS__)
#define short2(...) emu_make<short2, short>(__VA_ARGS__)
#define short4(...) emu_make<short4, short>(__VA_ARGS__)
#define ushort2(...) emu_make<ushort2, ushort>(__VA_ARGS__)
#define ushort4(...) emu_make<ushort4, ushort>(__VA_ARGS__)
#define char4(...) emu_make<char4, char>(__VA_ARGS__)
#define uchar4(...) emu_make<uchar4, uchar>(__VA_ARGS__)
#define uchar2(...) emu_make<uchar2, uchar>(__VA_ARGS__)
#define ulong2(...) emu_make<ulong2, ulong>(__VA_ARGS__)

// ---- what attributes of a kernel's parameters name

static inline uint3 emu_three(const __global uint *three) {
    uint3 r;
    for (int i = 0; i < 3; i++) r[i] = three[i];
    return r;
}
#define emu_thread_position_in_threadgroup emu_three(emu_self->in_block)
#define emu_threadgroup_position_in_grid emu_three(emu_self->block)
#define emu_threads_per_threadgroup emu_three(emu_self->block_dim)
#define emu_dispatch_threads_per_threadgroup emu_threads_per_threadgroup
#define emu_threadgroups_per_grid emu_three(emu_self->grid)
#define emu_threads_per_grid (emu_threadgroups_per_grid * emu_threads_per_threadgroup)
#define emu_thread_position_in_grid                                                                \
    (emu_threadgroup_position_in_grid * emu_threads_per_threadgroup +                              \
     emu_thread_position_in_threadgroup)
#define emu_thread_index_in_threadgroup emu_self->linear
#define emu_thread_index_in_simdgroup emu_self->lane
#define emu_simdgroup_index_in_threadgroup emu_self->subgroup
#define emu_threads_per_simdgroup emu_self->subgroup_size
#define emu_thread_execution_width emu_self->subgroup_size
#define emu_simdgroups_per_threadgroup                                                             \
    ((emu_self->block_dim[0] * emu_self->block_dim[1] * emu_self->block_dim[2] +                   \
      emu_self->subgroup_size - 1) / emu_self->subgroup_size)
template <class T> static inline T emu_builtin(uint v) { return (T)v; }
template <class T> static inline T emu_builtin(uint3 v) {
    if constexpr (EmuLanes<T>::value == 1) return (T)v[0];
    else {
        T r;
        for (int i = 0; i < EmuLanes<T>::value; i++) r[i] = v[i];
        return r;
    }
}

namespace metal {

enum class mem_flags { mem_none = 0, mem_device = 1, mem_threadgroup = 2, mem_texture = 4 };
static inline mem_flags operator|(mem_flags a, mem_flags b) {
    return (mem_flags)((int)a | (int)b);
}
static inline void threadgroup_barrier(mem_flags, EMU_LINE) { emu_barrier(0, 0, line, 1); }
static inline void simdgroup_barrier(mem_flags, EMU_LINE) { emu_subgroup_barrier(0, line); }

template <class To, class From> static inline To as_type(From v) {
    return __builtin_bit_cast(To, v);
}
static inline int abs(int v) { return v < 0 ? -v : v; }
static inline float abs(float v) { return fabsf(v); }
static inline half abs(half v) { return (half)fabsf((float)v); }
static inline float saturate(float v) { return fmin(fmax(v, 0.f), 1.f); }
template <class T, class C> static inline T select(T a, T b, C c) { return c ? b : a; }
static inline uint extract_bits(uint v, uint at, uint n) { return v >> at & ((1u << n) - 1); }
static inline uint clz(uint v) { return v ? (uint)__builtin_clz(v) : 32; }

// ---- SIMD-groups

#define EMU_SIMD_REDUCE(name, kind, op)                                                            \
    template <class T> static inline T name(T v, EMU_LINE) {                                       \
        return emu_reduce_value(kind, op, v, line);                                                \
    }
EMU_SIMD_REDUCE(simd_sum, EMU_REDUCE, EMU_ADD)
EMU_SIMD_REDUCE(simd_product, EMU_REDUCE, EMU_MUL)
EMU_SIMD_REDUCE(simd_min, EMU_REDUCE, EMU_MIN)
EMU_SIMD_REDUCE(simd_max, EMU_REDUCE, EMU_MAX)
EMU_SIMD_REDUCE(simd_and, EMU_REDUCE, EMU_BAND)
EMU_SIMD_REDUCE(simd_or, EMU_REDUCE, EMU_BOR)
EMU_SIMD_REDUCE(simd_xor, EMU_REDUCE, EMU_BXOR)
EMU_SIMD_REDUCE(simd_prefix_inclusive_sum, EMU_INCLUSIVE, EMU_ADD)
EMU_SIMD_REDUCE(simd_prefix_exclusive_sum, EMU_EXCLUSIVE, EMU_ADD)
#define EMU_SIMD_SHUFFLE(name, mode)                                                               \
    template <class T> static inline T name(T v, ushort by, EMU_LINE) {                            \
        return emu_shuffle_value(mode, v, by, line);                                               \
    }
EMU_SIMD_SHUFFLE(simd_shuffle, EMU_IDX)
EMU_SIMD_SHUFFLE(simd_broadcast, EMU_IDX)
EMU_SIMD_SHUFFLE(simd_shuffle_xor, EMU_BFLY)
EMU_SIMD_SHUFFLE(simd_shuffle_up, EMU_UP)
EMU_SIMD_SHUFFLE(simd_shuffle_down, EMU_DOWN)
EMU_SIMD_SHUFFLE(simd_shuffle_rotate_down, EMU_ROTATE)
template <class T> static inline T simd_broadcast_first(T v, EMU_LINE) {
    return emu_value<T>(emu_vote(EMU_FIRST, 0, emu_bits(v), line));
}
static inline bool simd_all(bool v, EMU_LINE) { return emu_vote(EMU_ALL, 0, v, line); }
static inline bool simd_any(bool v, EMU_LINE) { return emu_vote(EMU_ANY, 0, v, line); }
struct simd_vote {
    ulong mask;
    explicit operator ulong() const { return mask; }
};
static inline simd_vote simd_ballot(bool v, EMU_LINE) {
    return {emu_vote(EMU_BALLOT, 0, v, line)};
}
static inline bool simd_is_first() { return emu_self->lane == 0; }

// ---- 8 x 8 matrices: two elements in each lane, but which is nobody's business

// vectors of two, since C++ for OpenCL cannot copy a template's classes between address spaces
template <class T> struct EmuMatrix;
#define EMU_MATRIX(T)                                                                              \
    typedef T simdgroup_##T##8x8 __attribute__((ext_vector_type(2)));                              \
    template <> struct EmuMatrix<T> { typedef simdgroup_##T##8x8 type; };
EMU_MATRIX(float)
EMU_MATRIX(half)
EMU_MATRIX(bfloat)
template <class T, int rows, int columns>
using simdgroup_matrix = typename EmuMatrix<T>::type;
template <class T, int rows, int columns>
static inline typename EmuMatrix<T>::type make_filled_simdgroup_matrix(T v) {
    typename EmuMatrix<T>::type m;
    m[0] = m[1] = v;
    return m;
}
static inline ulong emu_place(int i, ulong pitch, ulong2 origin, bool across) {
    ulong row = emu_self->lane / 4, column = emu_self->lane % 4 * 2 + i;
    return across ? (origin.y + column) * pitch + origin.x + row
                  : (origin.y + row) * pitch + origin.x + column;
}
// inlined, so that what is found in them has the kernel's line
#define EMU_INLINE static inline __attribute__((always_inline))
#define EMU_MATRIX_MEMORY(space)                                                                   \
    template <class T>                                                                             \
    EMU_INLINE void simdgroup_load(__private typename EmuMatrix<T>::type &m, const space T *p,     \
                                   ulong pitch = 8, ulong2 origin = (ulong2)(0, 0),                \
                                   bool across = false, EMU_LINE) {                                \
        emu_vote(EMU_ANY, 0, 0, line); /* all lanes must be here */                                \
        for (int i = 0; i < 2; i++) m[i] = p[emu_place(i, pitch, origin, across)];                 \
    }                                                                                              \
    template <class T>                                                                             \
    EMU_INLINE void simdgroup_store(typename EmuMatrix<T>::type m, space T *p, ulong pitch = 8,    \
                                    ulong2 origin = (ulong2)(0, 0), bool across = false,           \
                                    EMU_LINE) {                                                    \
        emu_vote(EMU_ANY, 0, 0, line);                                                             \
        for (int i = 0; i < 2; i++) p[emu_place(i, pitch, origin, across)] = m[i];                 \
    }
EMU_MATRIX_MEMORY(__global)
EMU_MATRIX_MEMORY(__local)
extern "C" void emu_multiply8(__private float *sum, float a0, float a1, float b0, float b1,
                              int line);
template <class D, class A, class B, class C>
static inline void simdgroup_multiply_accumulate(__private D &d, A a, B b, C c, EMU_LINE) {
    float sum[2] = {(float)c[0], (float)c[1]};
    emu_multiply8(sum, (float)a[0], (float)a[1], (float)b[0], (float)b[1], line);
    d[0] = sum[0];
    d[1] = sum[1];
}
template <class D, class A, class B>
static inline void simdgroup_multiply(__private D &d, A a, B b, EMU_LINE) {
    float2 none = 0.f;
    simdgroup_multiply_accumulate(d, a, b, none, line);
}

// ---- atomics

enum memory_order { memory_order_relaxed, memory_order_acquire, memory_order_release };
template <class T> struct atomic { T value; };
// a kernel's parameter must be of a complete type
template struct atomic<int>;
template struct atomic<uint>;
template struct atomic<float>;
// OpenCL has types of these names, which nothing can hide
#define atomic_int atomic<int>
#define atomic_uint atomic<uint>
#define atomic_float atomic<float>
#define EMU_METAL_ATOMIC(name, op, space)                                                          \
    template <class T>                                                                             \
    static inline T atomic_##name##_explicit(volatile space atomic<T> *p, T v, memory_order,       \
                                             EMU_LINE) {                                           \
        return emu_rmw(EMU_ANYWHERE(p), op, v, (T)0, line);                                        \
    }                                                                                              \
    template <class T, class V>                                                                    \
    static inline T atomic_##name##_explicit(volatile space atomic<T> *p, V v, memory_order o,     \
                                             EMU_LINE) {                                           \
        return atomic_##name##_explicit(p, (T)v, o, line);                                         \
    }
#define EMU_METAL_ATOMICS(space)                                                                   \
    EMU_METAL_ATOMIC(fetch_add, EMU_ADD, space) EMU_METAL_ATOMIC(fetch_sub, EMU_SUB, space)        \
    EMU_METAL_ATOMIC(fetch_min, EMU_MIN, space) EMU_METAL_ATOMIC(fetch_max, EMU_MAX, space)        \
    EMU_METAL_ATOMIC(fetch_and, EMU_BAND, space) EMU_METAL_ATOMIC(fetch_or, EMU_BOR, space)        \
    EMU_METAL_ATOMIC(fetch_xor, EMU_BXOR, space) EMU_METAL_ATOMIC(exchange, EMU_EXCH, space)       \
    EMU_METAL_ATOMIC(store, EMU_STORE, space)                                                      \
    template <class T>                                                                             \
    static inline T atomic_load_explicit(const volatile space atomic<T> *p, memory_order,          \
                                         EMU_LINE) {                                               \
        return emu_rmw(EMU_ANYWHERE(p), EMU_LOAD, (T)0, (T)0, line);                               \
    }                                                                                              \
    template <class T>                                                                             \
    static inline bool atomic_compare_exchange_weak_explicit(                                      \
        volatile space atomic<T> *p, __private T *expected, T v, memory_order, memory_order,       \
        EMU_LINE) {                                                                                \
        T wanted = *expected;                                                                      \
        *expected = emu_rmw(EMU_ANYWHERE(p), EMU_CAS, v, wanted, line);                            \
        return emu_bits(*expected) == emu_bits(wanted);                                            \
    }
EMU_METAL_ATOMICS(__global)
EMU_METAL_ATOMICS(__local)

// ---- what is called metal::exp, fast::exp, precise::exp too

#define EMU_USING(f, how) using ::f;
#define EMU_ALL_USING EMU_ALL_MATH1(EMU_USING) EMU_ALL_MATH2(EMU_USING)
EMU_ALL_USING
using ::clamp;
using ::dot;
using ::fma;
using ::max;
using ::min;
using ::mix;
using ::popcount;
namespace fast {
EMU_ALL_USING
using ::fma;
} // namespace fast
namespace precise {
EMU_ALL_USING
using ::fma;
} // namespace precise
} // namespace metal

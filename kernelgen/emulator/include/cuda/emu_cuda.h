// CUDA C++ on the engine: the words of the language, and what every kernel has without an include.
#pragma once
#include <limits.h>
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <time.h>

#include <cmath>
#include <type_traits>
#include <utility>

#include "../../native/engine.h"

#ifndef __CUDACC__
#define __CUDACC__ 1
#endif
#ifndef __CUDA_ARCH__
#define __CUDA_ARCH__ 800
#endif

#define __global__
#define __device__
#define __host__
#define __constant__
#define __managed__
#define __grid_constant__
#define __forceinline__ inline __attribute__((always_inline))
#ifndef __noinline__
#define __noinline__ __attribute__((noinline))
#endif
#define __launch_bounds__(...)
#define __cluster_dims__(...)
#define __maxnreg__(...)
#define __align__(n) __attribute__((aligned(n)))
// One thread of a process runs one block: what is a thread's own is a block's own.
#define __shared__ thread_local

// ---- vectors

#define EMU_VECTORS(T, name, a2, a4)                                                               \
    struct name##1 { T x; };                                                                       \
    struct alignas(a2) name##2 { T x, y; };                                                        \
    struct name##3 { T x, y, z; };                                                                 \
    struct alignas(a4) name##4 { T x, y, z, w; };                                                  \
    static inline name##1 make_##name##1(T x) { return {x}; }                                      \
    static inline name##2 make_##name##2(T x, T y) { return {x, y}; }                              \
    static inline name##3 make_##name##3(T x, T y, T z) { return {x, y, z}; }                      \
    static inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
EMU_VECTORS(signed char, char, 2, 4)
EMU_VECTORS(unsigned char, uchar, 2, 4)
EMU_VECTORS(short, short, 4, 8)
EMU_VECTORS(unsigned short, ushort, 4, 8)
EMU_VECTORS(int, int, 8, 16)
EMU_VECTORS(unsigned, uint, 8, 16)
EMU_VECTORS(long, long, 16, 16)
EMU_VECTORS(unsigned long, ulong, 16, 16)
EMU_VECTORS(long long, longlong, 16, 16)
EMU_VECTORS(unsigned long long, ulonglong, 16, 16)
EMU_VECTORS(float, float, 8, 16)
EMU_VECTORS(double, double, 16, 16)
#undef EMU_VECTORS

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
    constexpr dim3(uint3 v) : x(v.x), y(v.y), z(v.z) {}
    constexpr operator uint3() const { return {x, y, z}; }
};

namespace emu {
static inline const uint3 &index(const uint32_t *three) {
    return *reinterpret_cast<const uint3 *>(three);
}
template <class To, class From> inline To bits(From from) {
    static_assert(sizeof(To) <= 8 && sizeof(From) <= 8, "at most 8 bytes");
    To to{};
    memcpy(&to, &from, sizeof to < sizeof from ? sizeof to : sizeof from);
    return to;
}
} // namespace emu
#define threadIdx (::emu::index(emu_self->thread))
#define blockIdx (::emu::index(emu_self->block))
#define blockDim (::emu::index(emu_self->block_dim))
#define gridDim (::emu::index(emu_self->grid))
#define warpSize 32

// ---- waiting.  __builtin_LINE as a default argument is the line of the call.

#define EMU_LINE int line = __builtin_LINE()
static inline void __syncthreads(EMU_LINE) { emu_barrier(0, 0, line, 1); }
static inline int __syncthreads_count(int v, EMU_LINE) {
    return emu_barrier_reduce(EMU_COUNT, v, line);
}
static inline int __syncthreads_and(int v, EMU_LINE) {
    return emu_barrier_reduce(EMU_AND, v, line);
}
static inline int __syncthreads_or(int v, EMU_LINE) { return emu_barrier_reduce(EMU_OR, v, line); }
static inline void __syncwarp(unsigned mask = 0xffffffff, EMU_LINE) {
    emu_subgroup_barrier(mask, line);
}
static inline void __threadfence() {}
static inline void __threadfence_block() {}
static inline void __threadfence_system() {}
static inline void __nanosleep(unsigned, EMU_LINE) { emu_yield(line); }
static inline long long clock64() { return (long long)emu_clock(); }
[[noreturn]] static inline void __trap(EMU_LINE) {
    emu_fail("trap", line, "the kernel called __trap()");
}
#undef assert
#ifdef NDEBUG
#define assert(x) ((void)0)
#else
#define assert(x) ((x) ? (void)0 : emu_fail("trap", __LINE__, "assertion failed: %s", #x))
#endif
#define printf(...) emu_print(__VA_ARGS__)

// ---- warps

template <class T>
static inline T emu_shfl(int mode, unsigned mask, T value, int by, int width, int line) {
    return emu::bits<T>(emu_shuffle(mode, mask, emu::bits<uint64_t>(value), by, width, line));
}
template <class T>
static inline T __shfl_sync(unsigned mask, T v, int lane, int width = 32, EMU_LINE) {
    return emu_shfl(EMU_IDX, mask, v, lane, width, line);
}
template <class T>
static inline T __shfl_up_sync(unsigned mask, T v, unsigned by, int width = 32, EMU_LINE) {
    return emu_shfl(EMU_UP, mask, v, int(by), width, line);
}
template <class T>
static inline T __shfl_down_sync(unsigned mask, T v, unsigned by, int width = 32, EMU_LINE) {
    return emu_shfl(EMU_DOWN, mask, v, int(by), width, line);
}
template <class T>
static inline T __shfl_xor_sync(unsigned mask, T v, int by, int width = 32, EMU_LINE) {
    return emu_shfl(EMU_BFLY, mask, v, by, width, line);
}
static inline unsigned __ballot_sync(unsigned mask, int v, EMU_LINE) {
    return unsigned(emu_vote(EMU_BALLOT, mask, v != 0, line));
}
static inline int __any_sync(unsigned mask, int v, EMU_LINE) {
    return int(emu_vote(EMU_ANY, mask, v != 0, line));
}
static inline int __all_sync(unsigned mask, int v, EMU_LINE) {
    return int(emu_vote(EMU_ALL, mask, v != 0, line));
}
template <class T> static inline unsigned __match_any_sync(unsigned mask, T v, EMU_LINE) {
    return unsigned(emu_vote(EMU_MATCH_ANY, mask, emu::bits<uint64_t>(v), line));
}
template <class T>
static inline unsigned __match_all_sync(unsigned mask, T v, int *all, EMU_LINE) {
    unsigned same = unsigned(emu_vote(EMU_MATCH_ALL, mask, emu::bits<uint64_t>(v), line));
    *all = same != 0;
    return same;
}
#define EMU_REDUCE_SYNC(name, op)                                                                  \
    static inline unsigned name(unsigned mask, unsigned v, EMU_LINE) {                             \
        return unsigned(emu_subgroup_reduce(EMU_REDUCE, op, EMU_U32, mask, v, line));              \
    }                                                                                              \
    static inline int name(unsigned mask, int v, EMU_LINE) {                                       \
        return int(emu_subgroup_reduce(EMU_REDUCE, op, EMU_S32, mask, unsigned(v), line));         \
    }
EMU_REDUCE_SYNC(__reduce_add_sync, EMU_ADD)
EMU_REDUCE_SYNC(__reduce_min_sync, EMU_MIN)
EMU_REDUCE_SYNC(__reduce_max_sync, EMU_MAX)
EMU_REDUCE_SYNC(__reduce_and_sync, EMU_BAND)
EMU_REDUCE_SYNC(__reduce_or_sync, EMU_BOR)
EMU_REDUCE_SYNC(__reduce_xor_sync, EMU_BXOR)
#undef EMU_REDUCE_SYNC
// Lanes that have not returned; on a GPU also divergence takes lanes away.
static inline unsigned __activemask() {
    unsigned n = emu_self->subgroup_lanes;
    return n >= 32 ? 0xffffffffu : (1u << n) - 1;
}

// ---- atomics

namespace emu {
template <class T> constexpr int type_code() {
    if (std::is_same<T, float>::value) return EMU_F32;
    if (std::is_same<T, double>::value) return EMU_F64;
    if (sizeof(T) == 2) return EMU_U16;
    if (sizeof(T) == 8) return std::is_signed<T>::value ? EMU_S64 : EMU_U64;
    return std::is_signed<T>::value ? EMU_S32 : EMU_U32;
}
template <class T> struct same { using type = T; };
template <class T> using exactly = typename same<T>::type; // takes no part in deduction
template <class T> inline T rmw(int op, T *p, T v, T compare, int line) {
    return bits<T>(emu_atomic(const_cast<std::remove_volatile_t<T> *>(p), op, type_code<T>(),
                              bits<uint64_t>(v), bits<uint64_t>(compare), line));
}
} // namespace emu
#define EMU_ATOMIC_FUNCTION(name, op)                                                              \
    template <class T> static inline T name(T *p, emu::exactly<T> v, EMU_LINE) {                   \
        return emu::rmw<T>(op, p, v, T(), line);                                                   \
    }                                                                                              \
    template <class T> static inline T name##_block(T *p, emu::exactly<T> v, EMU_LINE) {           \
        return emu::rmw<T>(op, p, v, T(), line);                                                   \
    }                                                                                              \
    template <class T> static inline T name##_system(T *p, emu::exactly<T> v, EMU_LINE) {          \
        return emu::rmw<T>(op, p, v, T(), line);                                                   \
    }
EMU_ATOMIC_FUNCTION(atomicAdd, EMU_ADD)
EMU_ATOMIC_FUNCTION(atomicSub, EMU_SUB)
EMU_ATOMIC_FUNCTION(atomicExch, EMU_EXCH)
EMU_ATOMIC_FUNCTION(atomicMin, EMU_MIN)
EMU_ATOMIC_FUNCTION(atomicMax, EMU_MAX)
EMU_ATOMIC_FUNCTION(atomicInc, EMU_INC)
EMU_ATOMIC_FUNCTION(atomicDec, EMU_DEC)
EMU_ATOMIC_FUNCTION(atomicAnd, EMU_BAND)
EMU_ATOMIC_FUNCTION(atomicOr, EMU_BOR)
EMU_ATOMIC_FUNCTION(atomicXor, EMU_BXOR)
#undef EMU_ATOMIC_FUNCTION
template <class T>
static inline T atomicCAS(T *p, emu::exactly<T> compare, emu::exactly<T> v, EMU_LINE) {
    return emu::rmw<T>(EMU_CAS, p, v, compare, line);
}

// ---- loads and stores with hints, which are loads and stores

#define EMU_LOAD_HINT(name)                                                                        \
    template <class T> static inline T name(const T *p) { return *p; }
EMU_LOAD_HINT(__ldg)
EMU_LOAD_HINT(__ldcg)
EMU_LOAD_HINT(__ldca)
EMU_LOAD_HINT(__ldcs)
EMU_LOAD_HINT(__ldlu)
EMU_LOAD_HINT(__ldcv)
#undef EMU_LOAD_HINT
#define EMU_STORE_HINT(name)                                                                       \
    template <class T> static inline void name(T *p, emu::exactly<T> v) { *p = v; }
EMU_STORE_HINT(__stwb)
EMU_STORE_HINT(__stcg)
EMU_STORE_HINT(__stcs)
EMU_STORE_HINT(__stwt)
#undef EMU_STORE_HINT
static inline size_t __cvta_generic_to_shared(const void *p) { return emu_shared_address(p); }
static inline void *__cvta_shared_to_generic(size_t a, EMU_LINE) {
    return emu_shared_pointer(a, line);
}
static inline size_t __cvta_generic_to_global(const void *p) { return size_t(p); }

static inline void __pipeline_memcpy_async(void *to, const void *from, size_t n, size_t zeros = 0,
                                           EMU_LINE) {
    emu_async_copy(to, from, int(n), int(n - zeros), line);
}
static inline void __pipeline_commit() { emu_async_commit(); }
static inline void __pipeline_wait_prior(int groups) { emu_async_wait(groups); }

// ---- whole numbers

static inline int __popc(unsigned x) { return __builtin_popcount(x); }
static inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
static inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
static inline int __clzll(long long x) { return x ? __builtin_clzll((unsigned long long)x) : 64; }
static inline int __ffs(int x) { return __builtin_ffs(x); }
static inline int __ffsll(long long x) { return __builtin_ffsll(x); }
static inline unsigned __brev(unsigned x) {
    unsigned r = 0;
    for (int i = 0; i < 32; i++) r |= (x >> i & 1) << (31 - i);
    return r;
}
static inline int __mul24(int a, int b) { return (a << 8 >> 8) * (b << 8 >> 8); }
static inline int __mulhi(int a, int b) { return int((long long)a * b >> 32); }
static inline unsigned __umulhi(unsigned a, unsigned b) {
    return unsigned((unsigned long long)a * b >> 32);
}
static inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
    return (unsigned long long)((unsigned __int128)a * b >> 64);
}
static inline unsigned __funnelshift_l(unsigned lo, unsigned hi, unsigned n) {
    return unsigned(((uint64_t(hi) << 32 | lo) << (n & 31)) >> 32);
}
static inline unsigned __funnelshift_r(unsigned lo, unsigned hi, unsigned n) {
    return unsigned((uint64_t(hi) << 32 | lo) >> (n & 31));
}
static inline unsigned __byte_perm(unsigned a, unsigned b, unsigned choice) {
    uint64_t bytes = uint64_t(b) << 32 | a;
    unsigned r = 0;
    for (int i = 0; i < 4; i++) r |= unsigned(bytes >> 8 * (choice >> 4 * i & 7) & 255) << 8 * i;
    return r;
}
#define EMU_DP(A, B, S)                                                                            \
    static inline S __dp4a(A a, B b, S c) {                                                        \
        for (int i = 0; i < 4; i++)                                                                \
            c = S(unsigned(c) + unsigned(S(emu::byte(a, i)) * S(emu::byte(b, i))));                \
        return c;                                                                                  \
    }
namespace emu {
static inline int byte(int w, int i) { return int8_t(w >> 8 * i); }
static inline unsigned byte(unsigned w, int i) { return uint8_t(w >> 8 * i); }
} // namespace emu
EMU_DP(int, int, int)
EMU_DP(unsigned, unsigned, unsigned)
#undef EMU_DP
static inline int __dp4a(char4 a, char4 b, int c) {
    return c + a.x * b.x + a.y * b.y + a.z * b.z + a.w * b.w;
}
static inline unsigned __dp4a(uchar4 a, uchar4 b, unsigned c) {
    return c + unsigned(a.x * b.x + a.y * b.y + a.z * b.z + a.w * b.w);
}
static inline int __dp2a_lo(int a, int b, int c) {
    return c + int16_t(a) * int8_t(b) + int16_t(a >> 16) * int8_t(b >> 8);
}
static inline int __dp2a_hi(int a, int b, int c) { return __dp2a_lo(a, b >> 16, c); }
// four or two numbers in a word
#define EMU_PACKED(name, T, n, result)                                                             \
    static inline unsigned name(unsigned a, unsigned b) {                                          \
        unsigned r = 0;                                                                            \
        for (int i = 0; i < n; i++) {                                                              \
            int x = T(a >> 32 / n * i), y = T(b >> 32 / n * i);                                    \
            r |= (unsigned(result) & (n == 4 ? 0xffu : 0xffffu)) << 32 / n * i;                    \
        }                                                                                          \
        return r;                                                                                  \
    }
EMU_PACKED(__vadd4, uint8_t, 4, x + y)
EMU_PACKED(__vsub4, uint8_t, 4, x - y)
EMU_PACKED(__vadd2, uint16_t, 2, x + y)
EMU_PACKED(__vsub2, uint16_t, 2, x - y)
EMU_PACKED(__vaddss4, int8_t, 4, (x + y > 127 ? 127 : x + y < -128 ? -128 : x + y))
EMU_PACKED(__vsubss4, int8_t, 4, (x - y > 127 ? 127 : x - y < -128 ? -128 : x - y))
EMU_PACKED(__vcmpeq4, uint8_t, 4, (x == y ? 255 : 0))
EMU_PACKED(__vcmpne4, uint8_t, 4, (x != y ? 255 : 0))
EMU_PACKED(__vcmpgtu4, uint8_t, 4, (x > y ? 255 : 0))
EMU_PACKED(__vmaxs4, int8_t, 4, (x > y ? x : y))
EMU_PACKED(__vmins4, int8_t, 4, (x < y ? x : y))
#undef EMU_PACKED

// ---- functions of numbers.  std's min and max take two of one type; CUDA's take any two.

#define EMU_MINMAX(T)                                                                              \
    static inline T min(T a, T b) { return b < a ? b : a; }                                        \
    static inline T max(T a, T b) { return a < b ? b : a; }
EMU_MINMAX(int)
EMU_MINMAX(unsigned)
EMU_MINMAX(long)
EMU_MINMAX(unsigned long)
EMU_MINMAX(long long)
EMU_MINMAX(unsigned long long)
#undef EMU_MINMAX
static inline unsigned min(int a, unsigned b) { return min(unsigned(a), b); }
static inline unsigned min(unsigned a, int b) { return min(a, unsigned(b)); }
static inline unsigned max(int a, unsigned b) { return max(unsigned(a), b); }
static inline unsigned max(unsigned a, int b) { return max(a, unsigned(b)); }
static inline float min(float a, float b) { return fminf(a, b); }
static inline float max(float a, float b) { return fmaxf(a, b); }
static inline double min(double a, double b) { return fmin(a, b); }
static inline double max(double a, double b) { return fmax(a, b); }
using std::abs;
using std::isfinite;
using std::isinf;
using std::isnan;

static inline float rsqrtf(float x) { return 1 / sqrtf(x); }
static inline double rsqrt(double x) { return 1 / sqrt(x); }
// macros, since the C library has functions of these names
#define __expf(x) expf(x)
#define __logf(x) logf(x)
#define __log2f(x) log2f(x)
#define __log10f(x) log10f(x)
#define __sinf(x) sinf(x)
#define __cosf(x) cosf(x)
#define __tanf(x) tanf(x)
#define __powf(x, y) powf(x, y)
static inline float __fdividef(float x, float y) { return x / y; }
static inline float __saturatef(float x) { return x > 0 ? fminf(x, 1) : 0; }
static inline float __frcp_rn(float x) { return 1 / x; }
static inline float __fsqrt_rn(float x) { return sqrtf(x); }
static inline float __frsqrt_rn(float x) { return 1 / sqrtf(x); }
static inline float __fadd_rn(float a, float b) { return a + b; }
static inline float __fsub_rn(float a, float b) { return a - b; }
static inline float __fmul_rn(float a, float b) { return a * b; }
static inline float __fdiv_rn(float a, float b) { return a / b; }
static inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
static inline int __float2int_rn(float x) { return int(nearbyintf(x)); }
static inline int __float2int_rz(float x) { return int(x); }
static inline int __float2int_rd(float x) { return int(floorf(x)); }
static inline int __float2int_ru(float x) { return int(ceilf(x)); }
static inline unsigned __float2uint_rn(float x) { return unsigned(nearbyintf(x)); }
static inline unsigned __float2uint_rz(float x) { return unsigned(x); }
static inline float __int2float_rn(int x) { return float(x); }
static inline float __uint2float_rn(unsigned x) { return float(x); }
static inline int __float_as_int(float x) { return emu::bits<int>(x); }
static inline unsigned __float_as_uint(float x) { return emu::bits<unsigned>(x); }
static inline float __int_as_float(int x) { return emu::bits<float>(x); }
static inline float __uint_as_float(unsigned x) { return emu::bits<float>(x); }
static inline long long __double_as_longlong(double x) { return emu::bits<long long>(x); }
static inline double __longlong_as_double(long long x) { return emu::bits<double>(x); }
#define CUDART_INF_F __builtin_inff()
#define CUDART_NAN_F __builtin_nanf("")

// ---- inline assembly: what the rewriting of asm statements calls

namespace emu {
// The constraint says the register's kind; NVCC demands that the type has its size.
template <char kind, class T> inline EmuOperand operand(T &value, bool reads, bool writes) {
    using Plain = std::remove_cv_t<T>;
    constexpr size_t bytes = kind == 'h' ? 2 : kind == 'l' || kind == 'd' ? 8 : 4;
    static_assert(sizeof(Plain) == bytes, "an operand of this constraint has another size");
    static_assert(kind != 'f' || std::is_same<Plain, float>::value, "\"f\" takes a float");
    static_assert(kind != 'd' || std::is_same<Plain, double>::value, "\"d\" takes a double");
    EmuOperand o{};
    if (reads) memcpy(&o.bits, const_cast<const Plain *>(&value), bytes);
    o.target = writes ? const_cast<Plain *>(&value) : nullptr;
    o.bytes = bytes;
    o.constraint = kind;
    return o;
}
template <char kind, class T> inline EmuOperand out(T &value) {
    return operand<kind>(value, false, true);
}
template <char kind, class T> inline EmuOperand inout(T &value) {
    return operand<kind>(value, true, true);
}
template <char kind, class T> inline EmuOperand in(const T &value) {
    if constexpr (kind == 'n') {
        EmuOperand o{};
        o.bits = uint64_t(value);
        return o;
    } else if constexpr (std::is_integral<T>::value && kind == 'r' && sizeof(T) < 4) {
        return operand<kind>(int(value), false); // promoted, as by the compiler
    } else {
        return operand<kind>(const_cast<T &>(value), true, false);
    }
}
template <char kind> inline EmuOperand operand(int value, bool) {
    EmuOperand o{};
    o.bits = uint32_t(value);
    o.constraint = kind;
    return o;
}
} // namespace emu

// ---- launches: a kernel is called through its type, as cuLaunchKernel does with void**

namespace emu {
template <class T> struct argument {
    using type = std::remove_cv_t<std::remove_reference_t<T>>;
    static constexpr char number = std::is_signed<type>::value ? 'i' : 'u';
    static constexpr char kind = std::is_pointer<type>::value          ? 'p'
                                 : std::is_floating_point<type>::value ? 'f'
                                 : std::is_integral<type>::value       ? number
                                                                       : 'o';
};
template <class... Args, size_t... I>
inline void call(void (*kernel)(Args...), void **args, std::index_sequence<I...>) {
    (void)args;
    kernel(*static_cast<typename argument<Args>::type *>(args[I])...);
}
template <class... Args> inline void call(void (*kernel)(Args...), void **args) {
    call(kernel, args, std::index_sequence_for<Args...>());
}
// "p8 i4 f4": of each argument the kind and the bytes
template <class... Args> inline void describe(void (*)(Args...), char *text) {
    auto add = [&text](char kind, size_t bytes) {
        *text++ = kind;
        if (bytes > 99) *text++ = char('0' + bytes / 100 % 10);
        if (bytes > 9) *text++ = char('0' + bytes / 10 % 10);
        *text++ = char('0' + bytes % 10);
        *text++ = ' ';
    };
    (void)add;
    (add(argument<Args>::kind, sizeof(typename argument<Args>::type)), ...);
    *text = 0;
}
} // namespace emu
// A place in thread-local storage shows the engine where shared memory is.
extern "C" __attribute__((weak)) void *emu_statics(size_t *bytes) {
    static thread_local char here;
    *bytes = 0;
    return &here;
}
#define EMU_ENTRY(symbol, ...)                                                                     \
    extern "C" void emu_entry_##symbol(void **args) { ::emu::call(&__VA_ARGS__, args); }           \
    extern "C" void emu_describe_##symbol(char *text) { ::emu::describe(&__VA_ARGS__, text); }

// What OpenCL and Metal share on the engine.  Both are compiled as C++ for OpenCL for the CPU, so
// that address spaces are part of the types, and mixing them up is an error.
#pragma once
#pragma OPENCL EXTENSION cl_khr_fp16 : enable
#pragma OPENCL EXTENSION cl_khr_fp64 : enable
#pragma OPENCL EXTENSION __cl_clang_function_pointers : enable

typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
typedef ulong size_t;
typedef long ptrdiff_t;
typedef signed char int8_t;
typedef uchar uint8_t;
typedef short int16_t;
typedef ushort uint16_t;
typedef int int32_t;
typedef uint uint32_t;
typedef long int64_t;
typedef ulong uint64_t;

#define EMU_VECTOR(T, n) typedef T T##n __attribute__((ext_vector_type(n)));
#define EMU_VECTORS(T)                                                                             \
    EMU_VECTOR(T, 2) EMU_VECTOR(T, 3) EMU_VECTOR(T, 4) EMU_VECTOR(T, 8) EMU_VECTOR(T, 16)
#define EMU_INTEGERS(X) X(char) X(uchar) X(short) X(ushort) X(int) X(uint) X(long) X(ulong)
#define EMU_FLOATS(X) X(half) X(float)
#define EMU_TYPES(X) EMU_INTEGERS(X) EMU_FLOATS(X)
EMU_TYPES(EMU_VECTORS)
EMU_VECTORS(double)

// ---- the engine; engine.h has the same

extern "C" {
struct EmuIndex {
    uint in_block[3], block[3], block_dim[3], grid[3];
    uint linear, lane, subgroup, subgroup_size, subgroup_lanes;
    int line;
};
extern __global EmuIndex *__global emu_self;
void emu_barrier(int id, int count, int line, int strict);
void emu_yield(int line);
enum { EMU_IDX, EMU_UP, EMU_DOWN, EMU_BFLY, EMU_ROTATE };
ulong emu_shuffle(int mode, ulong mask, ulong value, int by, int width, int line);
enum { EMU_BALLOT, EMU_ANY, EMU_ALL, EMU_MATCH_ANY, EMU_MATCH_ALL, EMU_FIRST };
ulong emu_vote(int kind, ulong mask, ulong value, int line);
enum { EMU_REDUCE, EMU_INCLUSIVE, EMU_EXCLUSIVE };
ulong emu_subgroup_reduce(int kind, int op, int type, ulong mask, ulong value, int line);
void emu_subgroup_barrier(ulong mask, int line);
enum {
    EMU_ADD, EMU_SUB, EMU_EXCH, EMU_MIN, EMU_MAX, EMU_INC, EMU_DEC, EMU_CAS,
    EMU_BAND, EMU_BOR, EMU_BXOR, EMU_LOAD, EMU_STORE, EMU_MUL
};
enum { EMU_U32, EMU_S32, EMU_U64, EMU_S64, EMU_F32, EMU_F64, EMU_F16, EMU_BF16,
       EMU_F16X2, EMU_BF16X2, EMU_U16 };
ulong emu_atomic(__global void *p, int op, int type, ulong value, ulong compare, int line);
int printf(const __constant char *format, ...);

float expf(float); float exp2f(float); float exp10f(float); float logf(float); float log2f(float);
float log10f(float); float sqrtf(float); float sinf(float); float cosf(float); float tanf(float);
float tanhf(float); float sinhf(float); float coshf(float); float asinf(float); float acosf(float);
float atanf(float); float fabsf(float); float floorf(float); float ceilf(float);
float roundf(float);
float nearbyintf(float); float truncf(float); float erff(float); float cbrtf(float);
float powf(float, float); float fmaxf(float, float); float fminf(float, float);
float fmodf(float, float); float atan2f(float, float); float copysignf(float, float);
float fmaf(float, float, float); float ldexpf(float, int); double fma(double, double, double);
}

#define EMU_LINE int line = __builtin_LINE()

// ---- values as bits

template <class T> static inline ulong emu_bits(T value) {
    ulong bits = 0;
    __builtin_memcpy(&bits, &value, sizeof value);
    return bits;
}
template <class T> static inline T emu_value(ulong bits) {
    T value;
    __builtin_memcpy(&value, &bits, sizeof value);
    return value;
}
template <class T> struct EmuCode { enum { value = EMU_U32 }; };
template <> struct EmuCode<char> { enum { value = EMU_S32 }; };
template <> struct EmuCode<short> { enum { value = EMU_S32 }; };
template <> struct EmuCode<int> { enum { value = EMU_S32 }; };
template <> struct EmuCode<long> { enum { value = EMU_S64 }; };
template <> struct EmuCode<ulong> { enum { value = EMU_U64 }; };
template <> struct EmuCode<float> { enum { value = EMU_F32 }; };
template <> struct EmuCode<half> { enum { value = EMU_F16 }; };
// to 32 bits, since the engine computes in these
template <class T> static inline ulong emu_wide(T v) { return emu_bits(v); }
template <> inline ulong emu_wide(char v) { return (uint)(int)v; }
template <> inline ulong emu_wide(short v) { return (uint)(int)v; }

// ---- an operation of the subgroup on each part of a vector


template <class T>
static inline T emu_shuffle_value(int mode, T v, int by, int line) {
    return emu_value<T>(emu_shuffle(mode, 0, emu_bits(v), by, (int)emu_self->subgroup_size, line));
}
template <class T>
static inline T emu_reduce_value(int kind, int op, T v, int line) {
    return emu_value<T>(emu_subgroup_reduce(kind, op, EmuCode<T>::value, 0, emu_wide(v), line));
}
#define EMU_PARTS(T, n)                                                                            \
    static inline T##n emu_shuffle_value(int mode, T##n v, int by, int line) {                     \
        T##n r;                                                                                    \
        for (int i = 0; i < n; i++) r[i] = emu_shuffle_value(mode, (T)v[i], by, line);             \
        return r;                                                                                  \
    }                                                                                              \
    static inline T##n emu_reduce_value(int kind, int op, T##n v, int line) {                      \
        T##n r;                                                                                    \
        for (int i = 0; i < n; i++) r[i] = emu_reduce_value(kind, op, (T)v[i], line);              \
        return r;                                                                                  \
    }
#define EMU_PARTS_OF(T) EMU_PARTS(T, 2) EMU_PARTS(T, 3) EMU_PARTS(T, 4)
EMU_TYPES(EMU_PARTS_OF)

// ---- functions of floats: of one, then of each part of a vector

#define EMU_WIDE1(f, T, n)                                                                         \
    static inline T##n f(T##n a) {                                                                 \
        T##n r;                                                                                    \
        for (int i = 0; i < n; i++) r[i] = f((T)a[i]);                                             \
        return r;                                                                                  \
    }
#define EMU_WIDE2(f, T, n)                                                                         \
    static inline T##n f(T##n a, T##n b) {                                                         \
        T##n r;                                                                                    \
        for (int i = 0; i < n; i++) r[i] = f((T)a[i], (T)b[i]);                                    \
        return r;                                                                                  \
    }
#define EMU_WIDE3(f, T, n)                                                                         \
    static inline T##n f(T##n a, T##n b, T##n c) {                                                 \
        T##n r;                                                                                    \
        for (int i = 0; i < n; i++) r[i] = f((T)a[i], (T)b[i], (T)c[i]);                           \
        return r;                                                                                  \
    }
#define EMU_WIDTHS(X, f, T) X(f, T, 2) X(f, T, 3) X(f, T, 4) X(f, T, 8) X(f, T, 16)
#define EMU_MATH1(f, how)                                                                          \
    static inline float f(float x) { return how; }                                                 \
    static inline half f(half h) {                                                                 \
        float x = h;                                                                               \
        return (half)(how);                                                                        \
    }                                                                                              \
    EMU_WIDTHS(EMU_WIDE1, f, float) EMU_WIDTHS(EMU_WIDE1, f, half)
#define EMU_MATH2(f, how)                                                                          \
    static inline float f(float x, float y) { return how; }                                        \
    static inline half f(half g, half h) {                                                         \
        float x = g, y = h;                                                                        \
        return (half)(how);                                                                        \
    }                                                                                              \
    EMU_WIDTHS(EMU_WIDE2, f, float) EMU_WIDTHS(EMU_WIDE2, f, half)
#define EMU_ALL_MATH1(X)                                                                           \
    X(exp, expf(x)) X(exp2, exp2f(x)) X(exp10, exp10f(x)) X(log, logf(x)) X(log2, log2f(x))        \
    X(log10, log10f(x)) X(sqrt, sqrtf(x)) X(rsqrt, 1 / sqrtf(x)) X(sin, sinf(x)) X(cos, cosf(x))   \
    X(tan, tanf(x)) X(tanh, tanhf(x)) X(sinh, sinhf(x)) X(cosh, coshf(x)) X(asin, asinf(x))        \
    X(acos, acosf(x)) X(atan, atanf(x)) X(fabs, fabsf(x)) X(floor, floorf(x)) X(ceil, ceilf(x))    \
    X(round, roundf(x)) X(rint, nearbyintf(x)) X(trunc, truncf(x)) X(erf, erff(x))
#define EMU_ALL_MATH2(X)                                                                           \
    X(pow, powf(x, y)) X(fmax, fmaxf(x, y)) X(fmin, fminf(x, y)) X(fmod, fmodf(x, y))              \
    X(atan2, atan2f(x, y)) X(copysign, copysignf(x, y))
EMU_ALL_MATH1(EMU_MATH1)
EMU_ALL_MATH2(EMU_MATH2)

static inline float fma(float a, float b, float c) { return fmaf(a, b, c); }
static inline half fma(half a, half b, half c) {
    return (half)fma((double)a, (double)b, (double)c);
}
static inline float mad(float a, float b, float c) { return a * b + c; }
static inline half mad(half a, half b, half c) { return a * b + c; }
static inline float mix(float a, float b, float t) { return a + (b - a) * t; }
EMU_WIDTHS(EMU_WIDE3, fma, float) EMU_WIDTHS(EMU_WIDE3, fma, half)
EMU_WIDTHS(EMU_WIDE3, mad, float) EMU_WIDTHS(EMU_WIDE3, mad, half)
static inline float ldexp(float x, int e) { return ldexpf(x, e); }
static inline bool isnan(float x) { return x != x; }
static inline bool isinf(float x) { return fabsf(x) == __builtin_inff(); }

#define EMU_MINMAX(T)                                                                              \
    static inline T min(T a, T b) { return b < a ? b : a; }                                        \
    static inline T max(T a, T b) { return a < b ? b : a; }                                        \
    static inline T clamp(T v, T low, T high) { return min(max(v, low), high); }                   \
    EMU_WIDTHS(EMU_WIDE2, min, T) EMU_WIDTHS(EMU_WIDE2, max, T) EMU_WIDTHS(EMU_WIDE3, clamp, T)
EMU_TYPES(EMU_MINMAX)
#define EMU_COUNTS(T)                                                                              \
    static inline T popcount(T v) {                                                                \
        return (T)__builtin_popcountl((ulong)v & (~0ul >> (64 - 8 * sizeof(T))));                  \
    }                                                                                              \
    EMU_WIDTHS(EMU_WIDE1, popcount, T)
EMU_INTEGERS(EMU_COUNTS)

#define EMU_DOT(T, n)                                                                              \
    static inline T dot(T##n a, T##n b) {                                                          \
        float sum = 0;                                                                             \
        for (int i = 0; i < n; i++) sum += (float)a[i] * (float)b[i];                              \
        return (T)sum;                                                                             \
    }
EMU_DOT(float, 2) EMU_DOT(float, 3) EMU_DOT(float, 4)
EMU_DOT(half, 2) EMU_DOT(half, 3) EMU_DOT(half, 4)

// ---- atomics.  The engine takes any address; the cast says so to the compiler.

#define EMU_ANYWHERE(p) ((__global void *)(ulong)(p))
template <class T>
static inline T emu_rmw(__global void *p, int op, T v, T compare, int line) {
    return emu_value<T>(emu_atomic(p, op, EmuCode<T>::value, emu_bits(v), emu_bits(compare), line));
}

// ---- what a launch asks of a kernel: "p8 i4 f4", of each argument the kind and the bytes

template <class T> struct EmuKind { enum { value = 'o' }; };
template <class T> struct EmuKind<T *> { enum { value = 'p' }; };
template <class T> struct EmuKind<T *__restrict> { enum { value = 'p' }; };
#define EMU_KIND(T, k) template <> struct EmuKind<T> { enum { value = k }; };
EMU_KIND(char, 'i') EMU_KIND(short, 'i') EMU_KIND(int, 'i') EMU_KIND(long, 'i') EMU_KIND(bool, 'u')
EMU_KIND(uchar, 'u') EMU_KIND(ushort, 'u') EMU_KIND(uint, 'u') EMU_KIND(ulong, 'u')
EMU_KIND(half, 'f') EMU_KIND(float, 'f') EMU_KIND(double, 'f')
template <class T> struct EmuKind<const T> { enum { value = EmuKind<T>::value }; };
template <class T> static inline char *emu_describe(char *text) {
    uint bytes = sizeof(T);
    *text++ = (char)EmuKind<T>::value;
    if (bytes > 99) *text++ = (char)('0' + bytes / 100 % 10);
    if (bytes > 9) *text++ = (char)('0' + bytes / 10 % 10);
    *text++ = (char)('0' + bytes % 10);
    *text++ = ' ';
    *text = 0;
    return text;
}
template <class T> static inline T emu_argument(void *p) { return *(__private T *)p; }

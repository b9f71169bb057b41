// Vector words for the kernels of kernelgen, for the instruction set that the compiler is told of.
//
// A vector has LANES 32-bit lanes, one for each row of a tile.  u32v, i32v and f32v are GNU vector
// types: operators work on all lanes, and a scalar operand is the same in all of them.
#ifndef KERNELGEN_WORDS_H
#define KERNELGEN_WORDS_H

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "blocks are little-endian, and the words of kernelgen take them as they lie in memory"
#endif

// The words of the best instruction set that is switched on.  Two macros choose differently:
// KERNELGEN_SCALAR   plain C
// KERNELGEN_AVX512   AVX-512, from a header of that name that has its intrinsics (KERNELGEN_VNNI
//                    too) on a machine that does not: how the tests run it everywhere
#if defined(KERNELGEN_SCALAR)
#define LANES 4
#elif defined(KERNELGEN_AVX512) || defined(__AVX512BW__)
#define LANES 16
#elif defined(__AVX2__) && defined(__F16C__)
#define LANES 8
#else
#define LANES 4
#endif

#if defined(__ARM_NEON) && defined(__aarch64__) && !defined(KERNELGEN_SCALAR)
#define NEON 1
#else
#define NEON 0
#endif

#if LANES > 4
#include <immintrin.h>
#endif

// UNROLL is for the loops over words and elements, UNROLL_GROUPS for the loop around them: it makes
// shifts of group integers constant, where UNROLLED_GROUPS says so.
#if LANES == 4 && !NEON
#define UNROLL  // every plain word is a loop itself: unrolled they take ten seconds to compile
#define UNROLL_GROUPS
#define UNROLLED_GROUPS 0
#elif defined(__clang__)
#define UNROLL _Pragma("clang loop unroll(full)")
#define UNROLL_GROUPS UNROLL
#define UNROLLED_GROUPS 1
#else
#define UNROLLED_GROUPS 0
#define UNROLL _Pragma("GCC unroll 16")
#define UNROLL_GROUPS  // a tenth faster, and twenty times as long to compile
#endif
#define INLINE static inline __attribute__((always_inline, unused))

#if defined(_OPENMP)
#include <omp.h>
#define THREADS omp_get_max_threads()
#define PARALLEL_FOR _Pragma("omp parallel for schedule(static)")
#define PARALLEL _Pragma("omp parallel")
#define FOR _Pragma("omp for schedule(static)")
// Whoever is free takes the next turn.
#define FOR_FREE _Pragma("omp for schedule(dynamic, 1)")
#define PRAGMA(...) _Pragma(#__VA_ARGS__)
#else
#define THREADS 1
#define PARALLEL_FOR
#define PARALLEL
#define FOR
#define FOR_FREE
#endif

// Asks for bytes that are read soon; there need not be any.
INLINE void prefetch(const uint8_t *from, ptrdiff_t bytes) {
    for (ptrdiff_t i = 0; i < bytes; i += 64) __builtin_prefetch(from + i);
}
// The same of the second cache, which has room for more that is under way.
INLINE void prefetch_far(const uint8_t *from, ptrdiff_t bytes) {
    for (ptrdiff_t i = 0; i < bytes; i += 64) __builtin_prefetch(from + i, 0, 2);
}
// Lines of `bytes` bytes that fall to word j of so many in group g of so many: each line to one word,
// which spreads them best.  Where g is no constant a group has lines of its own, one of them perhaps
// that of its neighbour, and what depends on j alone still is one.
struct lines { ptrdiff_t begin, end; };
INLINE struct lines lines_of(ptrdiff_t bytes, int g, int groups, int j, int words) {
    ptrdiff_t before = 0, part = g * words + j, parts = groups * words;
    if (!UNROLLED_GROUPS) bytes = (bytes + groups - 1) / groups, before = g * bytes, part = j, parts = words;
    return (struct lines){
        before + (bytes * part / parts + 63) / 64 * 64, before + (bytes * (part + 1) / parts + 63) / 64 * 64};
}

// ---- one element ----------------------------------------------------------------------------

INLINE uint16_t load_u16(const void *p) { uint16_t x; memcpy(&x, p, 2); return x; }
INLINE uint32_t load_u32(const void *p) { uint32_t x; memcpy(&x, p, 4); return x; }
INLINE float bits_to_f32(uint32_t x) { float y; memcpy(&y, &x, 4); return y; }
INLINE uint32_t f32_to_bits(float x) { uint32_t y; memcpy(&y, &x, 4); return y; }

// Exact, subnormals and NaN included, also in a process that flushes subnormal floats to zero.
INLINE float f16_to_f32(uint16_t h) {
#if defined(__F16C__) && LANES > 4
    return _cvtsh_ss(h);
#elif NEON
    __fp16 x;
    memcpy(&x, &h, sizeof x);
    return (float)x;
#else
    const uint32_t magnitude = (uint32_t)(h & 0x7FFF) << 13;
    const uint32_t normal = magnitude + (112u << 23);
    // a leading bit puts the digits of a subnormal into place, and is taken away again
    const uint32_t subnormal = f32_to_bits(bits_to_f32(magnitude + (113u << 23)) - 0x1p-14f);
    const uint32_t infinite = magnitude | 0x7F800000;
    const uint32_t exponent = h & 0x7C00;
    const uint32_t bits = exponent == 0 ? subnormal : exponent == 0x7C00 ? infinite : normal;
    return bits_to_f32(bits | (uint32_t)(h & 0x8000) << 16);
#endif
}

// Element `index` of a field: `field` points at the field's first byte.
INLINE int32_t u16_at(const uint8_t *field, ptrdiff_t index) { return load_u16(field + 2 * index); }
INLINE int32_t i16_at(const uint8_t *field, ptrdiff_t index) {
    return (int16_t)load_u16(field + 2 * index);
}
INLINE uint32_t u32_at(const uint8_t *field, ptrdiff_t index) { return load_u32(field + 4 * index); }
INLINE float f16_at(const uint8_t *field, ptrdiff_t index) {
    return f16_to_f32(load_u16(field + 2 * index));
}
INLINE float f32_at(const uint8_t *field, ptrdiff_t index) {
    return bits_to_f32(load_u32(field + 4 * index));
}

// ---- LANES rows -----------------------------------------------------------------------------

typedef uint32_t u32v __attribute__((vector_size(4 * LANES)));
typedef int32_t i32v __attribute__((vector_size(4 * LANES)));
typedef float f32v __attribute__((vector_size(4 * LANES)));

// Unit `index` of a field, of all rows of the tile: `field` points at the field's first unit.
INLINE u32v rows_u32(const uint8_t *field, ptrdiff_t index) {
    u32v x;
    memcpy(&x, field + index * 4 * LANES, sizeof x);
    return x;
}
INLINE f32v rows_f32(const uint8_t *field, ptrdiff_t index) { return (f32v)rows_u32(field, index); }

INLINE f32v to_f32(i32v x) { return __builtin_convertvector(x, f32v); }
INLINE f32v unsigned_to_f32(u32v x) { return __builtin_convertvector(x, f32v); }
INLINE i32v to_i32(f32v x) { return __builtin_convertvector(x, i32v); }
INLINE u32v splat_u32(uint32_t x) { return (u32v){0} + x; }
INLINE i32v splat_i32(int32_t x) { return (i32v){0} + x; }
INLINE f32v splat_f32(float x) { return x - (f32v){0}; }

// a where the condition holds, which is -1 there and else 0; b in the other rows.
INLINE i32v blend_i32(i32v condition, i32v a, i32v b) { return (a & condition) | (b & ~condition); }
INLINE u32v blend_u32(i32v condition, u32v a, u32v b) {
    return (u32v)blend_i32(condition, (i32v)a, (i32v)b);
}
INLINE f32v blend_f32(i32v condition, f32v a, f32v b) {
    return (f32v)blend_i32(condition, (i32v)a, (i32v)b);
}

// An entry of a table for each row.
#define gather(table, index) \
    _Generic((table)[0], float: gather_f32, int32_t: gather_i32, uint32_t: gather_u32, uint8_t: gather_u8, \
             int8_t: gather_i8)(table, index)
#define GATHER(name, entry, vector)                             \
    INLINE vector name(const entry *table, i32v index) {        \
        vector y;                                               \
        for (int n = 0; n < LANES; n++) y[n] = table[index[n]]; \
        return y;                                               \
    }
GATHER(gather_f32, float, f32v)
GATHER(gather_i32, int32_t, i32v)
#if LANES == 16
INLINE u32v gather_u32(const uint32_t *table, i32v index) {
    return (u32v)_mm512_i32gather_epi32((__m512i)index, table, 4);
}
#elif LANES == 8
INLINE u32v gather_u32(const uint32_t *table, i32v index) {
    return (u32v)_mm256_i32gather_epi32((const int *)table, (__m256i)index, 4);
}
#else
GATHER(gather_u32, uint32_t, u32v)
#endif
GATHER(gather_u8, uint8_t, i32v)
GATHER(gather_i8, int8_t, i32v)

// A function of one float, for each row.
#define each_row(function, x)                                         \
    ({                                                                \
        f32v each_row_result = x;                                     \
        for (int n = 0; n < LANES; n++)                               \
            each_row_result[n] = (float)function(each_row_result[n]); \
        each_row_result;                                              \
    })

// Four fields of so many bits that follow one another in x go to the bottom of a byte each.
INLINE u32v spread(u32v x, int bits) {
    const uint32_t mask = (1u << bits) - 1;
    return (x & mask) | ((x >> bits) & mask) << 8 | ((x >> 2 * bits) & mask) << 16
           | ((x >> 3 * bits) & mask) << 24;
}
// The bytes of x, at most 127 and not 0, negated where those of `bits` are 1 and not 0: ~x + 1, which
// leaves no byte.
INLINE u32v negate_bytes(u32v x, u32v bits) { return (x ^ bits * 255u) + bits; }
#if LANES < 16
// The same for single bits: the product puts copies of the four at distances of 7.
INLINE u32v spread1(u32v x) { return ((x & 15u) * 0x00204081u) & 0x01010101u; }
#endif

#if LANES == 16
#include "words_avx512.h"
#elif LANES == 8
#include "words_avx2.h"
#elif NEON
#include "words_neon.h"
#else
#include "words_plain.h"
#endif

#ifndef SIGNED_CODES
// Signed codes, and such entries of a table, as dot_signed wants them.
INLINE u32v signed_codes(u32v codes) { return codes; }
INLINE u32v signed_lookup(const void *table, u32v index) { return lookup(table, index); }
#endif

// The second and fourth byte of each lane, to 16 bits each.
INLINE u32v odd_bytes(u32v x) {
    typedef uint16_t halves __attribute__((vector_size(4 * LANES)));
    return (u32v)((halves)x >> 8);
}
#ifndef BYTE_OF
// (x >> from) & 255, of bits that begin with a byte.
INLINE u32v byte_of(u32v x, int from) { return (x >> from) & 255u; }
#endif
// ---- bits of bytes, which some CPUs move in one instruction ---------------------------------

#ifndef BITS_OF
// In each byte the bits of x >> from that `mask` has, moved up; none may leave its byte.
INLINE u32v bits_of(u32v x, int from, uint32_t mask, int up) { return ((x >> from) & mask) << up; }
// The bits of two words together.
INLINE u32v bits_of_two(u32v x, int from, uint32_t mask, int up, u32v y, int y_from, uint32_t y_mask,
                        int y_up) {
    return bits_of(x, from, mask, up) | bits_of(y, y_from, y_mask, y_up);
}
// Four bits that follow one another, each to a byte and there moved up.
INLINE u32v spread1_of(u32v x, int from, int up) { return spread1(x >> from) << up; }
// Entries of a table of 16, for four bits of each byte.
INLINE u32v lookup_of(const void *table, u32v x, int from) {
    return lookup(table, (x >> from) & 0x0F0F0F0Fu);
}
INLINE u32v signed_lookup_of(const void *table, u32v x, int from) {
    return signed_lookup(table, (x >> from) & 0x0F0F0F0Fu);
}
#endif

// How many words a partial sum takes before it may pass `most`, for codes that reach so far from
// their bias against activations up to 127: all `words` of a group, or a number that divides them.
#define MOST_STEPS(most, reach) ((most) / (PARTIAL_PRODUCTS * 127 * (reach)))
#define DIVIDES(n, most, reach, words) ((n) <= MOST_STEPS(most, reach) && (words) % (n) == 0)
#define STEPS_WITHIN(most, reach, words)                 \
    (DIVIDES(words, most, reach, words) ? (words)        \
     : DIVIDES(8, most, reach, words)   ? 8              \
     : DIVIDES(4, most, reach, words)   ? 4              \
     : DIVIDES(3, most, reach, words)   ? 3              \
     : DIVIDES(2, most, reach, words)   ? 2 : 1)
#define STEPS(reach, words) STEPS_WITHIN(PARTIAL_MAX, reach, words)
// Whether partial sums had better be weighed with integers (`add_weighed`) than become floats of groups:
// they must fit what is weighed, and not be too many.
#define WEIGHED_STEPS(reach, words) STEPS_WITHIN(WEIGHED_MAX, reach, words)
#define WEIGHS(reach, words)                        \
    (MOST_STEPS(WEIGHED_MAX, reach) >= 1            \
     && (words) <= WEIGHED_STEPS(reach, words) * WEIGHED_MOST)

// The sum of the first two bytes of each four, and of the last two; written for compilers that take
// bytes out of vectors one by one.
INLINE void sums_of_pairs(const int8_t *x, int count, int32_t *low, int32_t *high) {
    typedef uint32_t four __attribute__((vector_size(16)));
    int i = 0;
    *low = *high = 0;
    while (i + 16 <= count) {
        four both = {0};
        const int begin = i, end = count - i < 512 ? count / 16 * 16 : i + 512;  // so far 16 bits hold it
        for (; i < end; i += 16) {
            four above;
            memcpy(&above, x + i, 16);
            above ^= 0x80808080u;  // above it by 128, and so not negative
            both += (above & 0x00FF00FFu) + (above >> 8 & 0x00FF00FFu);
        }
        const uint32_t sums = both[0] + both[1] + both[2] + both[3];
        *low += (int32_t)(sums & 0xFFFFu) - (end - begin) * 64;
        *high += (int32_t)(sums >> 16) - (end - begin) * 64;
    }
    for (; i < count; i += 4) *low += x[i] + x[i + 1], *high += x[i + 2] + x[i + 3];
}
INLINE int32_t sum_of_bytes(const int8_t *x, int count) {
    int32_t low, high;
    sums_of_pairs(x, count, &low, &high);
    return low + high;
}

// What a partial sum begins with, where codes are `center` too large, for the activations of so
// many words; `dot_unsigned` and `dot_signed` then give sums of codes less the center.
INLINE uint32_t partial_seed(const int8_t *x, int center, int words) {
    int32_t low, high;
    sums_of_pairs(x, 4 * words, &low, &high);
#if PARTIAL_PRODUCTS == 4
    return (uint32_t)(-center * (low + high));
#else
    return ((uint32_t)(-center * low) & 0xFFFFu) | (uint32_t)(-center * high) << 16;
#endif
}

#endif

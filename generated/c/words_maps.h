// Words for kernels whose lanes run along the columns of a row: maps and row reductions.
#ifndef KERNELGEN_WORDS_MAPS_H
#define KERNELGEN_WORDS_MAPS_H

#include "words_flash.h"

// Threads are worth waking for so many elements.
#if defined(_OPENMP)
#define PARALLEL_IF(elements) PRAGMA(omp parallel if ((elements) > 16384))
#else
#define PARALLEL_IF(elements)
#endif

typedef uint16_t u16v __attribute__((vector_size(2 * LANES)));
typedef uint8_t u8v __attribute__((vector_size(LANES)));

INLINE i32v rows_i32(const uint8_t *field, ptrdiff_t index) { return (i32v)rows_u32(field, index); }
INLINE u32v to_u32(f32v x) { return __builtin_convertvector(x, u32v); }
INLINE f32v sqrt_f32(f32v x) {
    f32v y;
    for (int n = 0; n < LANES; n++) y[n] = sqrtf(x[n]);
    return y;
}

// exp to within 1 unit in the last place with AVX-512, 0 below the least normal number, as a result
// that is subnormal takes a hundred times as long; elsewhere as exp_f32.
INLINE f32v exp_each(f32v x) {
#if LANES == 16
    // of these the second operand is the result where one is NaN
    const __m512 above = _mm512_max_ps(_mm512_set1_ps(-88.0f), (__m512)x);
    const f32v inside = (f32v)_mm512_min_ps(_mm512_set1_ps(89.0f), above);
    // reduced as in exp_parts; the polynomial is a fit of our own, to within 2^-28
    const f32v sum = inside * 1.44269504f + 0x1.8p23f, power = sum - 0x1.8p23f;
    const f32v r = (inside - power * 0.693359375f) - power * -2.12194440e-4f;
    f32v y = r * 1.3814573e-3f + 8.36872e-3f;
    y = y * r + 4.166839e-2f;
    y = y * r + 0.16666521f;
    y = y * r + 0.49999994f;
    y = (y * r + 1.0f) * r + 1.0f;
    const __mmask16 normal = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-87.33654f), _CMP_NLT_UQ);
    return (f32v)_mm512_maskz_scalef_ps(normal, (__m512)y, (__m512)power);
#else
    return exp_f32(x);
#endif
}

// The smaller, and the larger, of two; b where one of them is NaN.
#define LEAST(a, b) ({ __typeof__(a) a_ = (a), b_ = (b); a_ < b_ ? a_ : b_; })
#define MOST(a, b) ({ __typeof__(a) a_ = (a), b_ = (b); b_ < a_ ? a_ : b_; })
#define OF_TWO(type)                                                                       \
    INLINE type##v least_##type(type##v a, type##v b) { return blend_##type(a < b, a, b); } \
    INLINE type##v most_##type(type##v a, type##v b) { return blend_##type(b < a, a, b); }
OF_TWO(f32)
OF_TWO(i32)
OF_TWO(u32)

// ---- stores ---------------------------------------------------------------------------------

// Past the caches where `stream` says so, from an address that whole vectors divide.
INLINE void store4(uint8_t *to, u32v x, const int stream) {
#if LANES == 16
    if (stream) {
        _mm512_stream_si512((__m512i *)to, (__m512i)x);
        return;
    }
#elif LANES == 8
    if (stream) {
        _mm256_stream_si256((__m256i *)to, (__m256i)x);
        return;
    }
#endif
    (void)stream;
    memcpy(to, &x, sizeof x);
}
INLINE void store2(uint8_t *to, u32v x, const int stream) {
    const u16v y = __builtin_convertvector(x, u16v);
#if LANES == 16
    if (stream) {
        _mm256_stream_si256((__m256i *)to, (__m256i)y);
        return;
    }
#elif LANES == 8
    if (stream) {
        _mm_stream_si128((__m128i *)to, (__m128i)y);
        return;
    }
#endif
    (void)stream;
    memcpy(to, &y, sizeof y);
}
INLINE void store1(uint8_t *to, u32v x, const int stream) {
    (void)stream;
    const u8v y = __builtin_convertvector(x, u8v);
    memcpy(to, &y, sizeof y);
}

INLINE void put4(uint8_t *to, uint32_t x) { memcpy(to, &x, 4); }
INLINE void put2(uint8_t *to, uint32_t x) {
    const uint16_t y = (uint16_t)x;
    memcpy(to, &y, 2);
}
INLINE void put1(uint8_t *to, uint32_t x) { *to = (uint8_t)x; }

// Elements of so many bytes before the first address that whole vectors of them divide.
INLINE int before_aligned(const uint8_t *p, const int nbytes) {
    return (int)((-(uintptr_t)p & (uintptr_t)(nbytes * LANES - 1)) / (uintptr_t)nbytes);
}
// What was written past the caches is there for other threads.
INLINE void streamed(void) {
#if LANES > 4
    _mm_sfence();
#endif
}

// ---- reductions -----------------------------------------------------------------------------

#define JOIN_SUM(a, b) ((int32_t)((uint32_t)(a) + (uint32_t)(b)))  // it wraps
#define JOIN_MAX(a, b) ((a) < (b) ? (b) : (a))
#define JOIN_MIN(a, b) ((b) < (a) ? (b) : (a))
INLINE i32v join_sum(i32v a, i32v b) { return (i32v)((u32v)a + (u32v)b); }
INLINE i32v join_max(i32v a, i32v b) { return blend_i32(a < b, b, a); }
INLINE i32v join_min(i32v a, i32v b) { return blend_i32(b < a, b, a); }

// All lanes of an integer vector as one.
#define ACROSS(name, join)                                            \
    INLINE int32_t name(i32v x) {                                     \
        int32_t y = x[0];                                             \
        for (int n = 1; n < LANES; n++) y = join(y, x[n]);            \
        return y;                                                     \
    }
ACROSS(sum_across, JOIN_SUM)
ACROSS(max_across, JOIN_MAX)
ACROSS(min_across, JOIN_MIN)

#endif

// AVX2, FMA and F16C: eight rows.  Products of bytes are summed in 16 bits as long as they fit.
#include <immintrin.h>

INLINE f32v rows_f16(const uint8_t *field, ptrdiff_t index) {
    const __m128i x = _mm_loadu_si128((const __m128i *)(field + index * 2 * LANES));
    return (f32v)_mm256_cvtph_ps(x);
}
INLINE i32v rows_u8(const uint8_t *field, ptrdiff_t index) {
    const __m128i x = _mm_loadl_epi64((const __m128i *)(field + index * LANES));
    return (i32v)_mm256_cvtepu8_epi32(x);
}
INLINE i32v rows_i8(const uint8_t *field, ptrdiff_t index) {
    const __m128i x = _mm_loadl_epi64((const __m128i *)(field + index * LANES));
    return (i32v)_mm256_cvtepi8_epi32(x);
}
INLINE i32v rows_u16(const uint8_t *field, ptrdiff_t index) {
    const __m128i x = _mm_loadu_si128((const __m128i *)(field + index * 2 * LANES));
    return (i32v)_mm256_cvtepu16_epi32(x);
}
INLINE i32v rows_i16(const uint8_t *field, ptrdiff_t index) {
    const __m128i x = _mm_loadu_si128((const __m128i *)(field + index * 2 * LANES));
    return (i32v)_mm256_cvtepi16_epi32(x);
}

INLINE u32v lookup(const void *table, u32v index) {
    const __m128i entries = _mm_loadu_si128((const __m128i *)table);
    return (u32v)_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(entries), (__m256i)index);
}

// To the nearest integer, to even where two are as near.
INLINE i32v to_nearest(f32v x) { return (i32v)_mm256_cvtps_epi32((__m256)x); }
// The lowest byte of each lane, which holds a signed byte.
INLINE void store_bytes(int8_t *to, i32v x) {
    const __m128i low = _mm256_castsi256_si128((__m256i)x), high = _mm256_extracti128_si256((__m256i)x, 1);
    const __m128i halves = _mm_packs_epi32(low, high);
    _mm_storel_epi64((__m128i *)to, _mm_packs_epi16(halves, halves));
}

#define SIGNED_BIAS 0
#define WEIGHED_MAX 32767

#if defined(__AVXVNNI__) && !defined(__AVX512VL__)

typedef i32v partial;
#define PARTIAL_MAX 2147483647
#define PARTIAL_PRODUCTS 4

INLINE partial dot_unsigned(partial sum, u32v codes, int32_t x) {
    return (partial)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)codes, _mm256_set1_epi32(x));
}
INLINE i32v widen(partial sum) { return sum; }

// A sum of 32 bits is one of 16 and what is left of its sign, which meets zero.
#define WEIGHED_MOST 2
INLINE i32v factor_of(i32v x) { return x & 0xFFFF; }
INLINE i32v add_weighed(i32v total, partial sum, i32v factor) {
    return (i32v)_mm256_dpwssd_avx_epi32((__m256i)total, (__m256i)sum, (__m256i)factor);
}
INLINE i32v dot_pairs(i32v sum, u32v pairs, int32_t x) {
    return (i32v)_mm256_dpwssd_avx_epi32((__m256i)sum, (__m256i)pairs, _mm256_set1_epi32(x));
}

#else

typedef int16_t partial __attribute__((vector_size(32)));
#define PARTIAL_MAX 32767
#define PARTIAL_PRODUCTS 2

// Sums in the order of the source: clang would make trees of them, of which so many are under way that
// they do not fit the registers.
INLINE partial in_order(partial sum) {
    __asm__("" : "+x"(sum));
    return sum;
}
INLINE partial dot_unsigned(partial sum, u32v codes, int32_t x) {
    return in_order(sum + (partial)_mm256_maddubs_epi16((__m256i)codes, _mm256_set1_epi32(x)));
}
INLINE i32v widen(partial sum) {
    return (i32v)_mm256_madd_epi16((__m256i)sum, _mm256_set1_epi16(1));
}

#define WEIGHED_MOST 65536  // it costs as much as to widen
INLINE i32v factor_of(i32v x) { return (x & 0xFFFF) | x << 16; }
INLINE i32v add_weighed(i32v total, partial sum, i32v factor) {
    return total + (i32v)_mm256_madd_epi16((__m256i)sum, (__m256i)factor);
}
INLINE i32v dot_pairs(i32v sum, u32v pairs, int32_t x) {
    return sum + (i32v)_mm256_madd_epi16((__m256i)pairs, _mm256_set1_epi32(x));
}

#endif

// The sign of a code goes to the activation, so that the code is unsigned for the instruction.
INLINE partial dot_signed(partial sum, u32v codes, int32_t x) {
    const __m256i xs = _mm256_sign_epi8(_mm256_set1_epi32(x), (__m256i)codes);
    const u32v magnitude = (u32v)_mm256_abs_epi8((__m256i)codes);
#if PARTIAL_PRODUCTS == 4
    return (partial)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)magnitude, xs);
#else
    return in_order(sum + (partial)_mm256_maddubs_epi16((__m256i)magnitude, xs));
#endif
}

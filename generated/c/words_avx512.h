// AVX-512: sixteen rows.  With VNNI one instruction multiplies and adds four bytes a lane.
#if defined(KERNELGEN_AVX512)
#include KERNELGEN_AVX512
#else
#include <immintrin.h>
#endif

INLINE f32v rows_f16(const uint8_t *field, ptrdiff_t index) {
    const __m256i x = _mm256_loadu_si256((const __m256i *)(field + index * 2 * LANES));
    return (f32v)_mm512_cvtph_ps(x);
}
INLINE i32v rows_u8(const uint8_t *field, ptrdiff_t index) {
    const __m128i x = _mm_loadu_si128((const __m128i *)(field + index * LANES));
    return (i32v)_mm512_cvtepu8_epi32(x);
}
INLINE i32v rows_i8(const uint8_t *field, ptrdiff_t index) {
    const __m128i x = _mm_loadu_si128((const __m128i *)(field + index * LANES));
    return (i32v)_mm512_cvtepi8_epi32(x);
}
INLINE i32v rows_u16(const uint8_t *field, ptrdiff_t index) {
    const __m256i x = _mm256_loadu_si256((const __m256i *)(field + index * 2 * LANES));
    return (i32v)_mm512_cvtepu16_epi32(x);
}
INLINE i32v rows_i16(const uint8_t *field, ptrdiff_t index) {
    const __m256i x = _mm256_loadu_si256((const __m256i *)(field + index * 2 * LANES));
    return (i32v)_mm512_cvtepi16_epi32(x);
}

INLINE u32v lookup(const void *table, u32v index) {
    const __m128i entries = _mm_loadu_si128((const __m128i *)table);
    return (u32v)_mm512_shuffle_epi8(_mm512_broadcast_i32x4(entries), (__m512i)index);
}

#if defined(__AVX512VNNI__) || defined(KERNELGEN_VNNI)

typedef i32v partial;
#define PARTIAL_MAX 2147483647
#define PARTIAL_PRODUCTS 4
// dot_signed adds 128 to the codes, to have them unsigned: its sums are too large by 128 times the
// sum of the activations.
#define SIGNED_BIAS 128.0f

INLINE partial dot_unsigned(partial sum, u32v codes, int32_t x) {
    return (partial)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)codes, _mm512_set1_epi32(x));
}
INLINE partial dot_signed(partial sum, u32v codes, int32_t x) {
    return dot_unsigned(sum, codes ^ 0x80808080u, x);
}
INLINE i32v widen(partial sum) { return sum; }

#else

typedef int16_t partial __attribute__((vector_size(64)));
#define PARTIAL_MAX 32767
#define PARTIAL_PRODUCTS 2
#define SIGNED_BIAS 0.0f

INLINE partial dot_unsigned(partial sum, u32v codes, int32_t x) {
    return sum + (partial)_mm512_maddubs_epi16((__m512i)codes, _mm512_set1_epi32(x));
}
INLINE partial dot_signed(partial sum, u32v codes, int32_t x) {
    const __m512i xs = _mm512_set1_epi32(x);
    const __mmask64 negative = _mm512_movepi8_mask((__m512i)codes);
    const __m512i flipped = _mm512_mask_sub_epi8(xs, negative, _mm512_setzero_si512(), xs);
    return sum + (partial)_mm512_maddubs_epi16(_mm512_abs_epi8((__m512i)codes), flipped);
}
INLINE i32v widen(partial sum) {
    return (i32v)_mm512_madd_epi16((__m512i)sum, _mm512_set1_epi16(1));
}

#endif

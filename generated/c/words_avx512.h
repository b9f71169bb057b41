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

// Four single bits to bytes: a product of 32 bits takes four times as long.
INLINE u32v spread1(u32v x) {
    const __m512i lowest = _mm512_set4_epi32(0x0C0C0C0C, 0x08080808, 0x04040404, 0);
    const __m512i copies = _mm512_shuffle_epi8((__m512i)x, lowest);
    const __mmask64 set = _mm512_test_epi8_mask(copies, _mm512_set1_epi32(0x08040201));
    return (u32v)_mm512_maskz_mov_epi8(set, _mm512_set1_epi8(1));
}

// To the nearest integer, to even where two are as near.
INLINE i32v to_nearest(f32v x) { return (i32v)_mm512_cvtps_epi32((__m512)x); }
// The lowest byte of each lane.
INLINE void store_bytes(int8_t *to, i32v x) {
    _mm_storeu_si128((__m128i *)to, _mm512_cvtepi32_epi8((__m512i)x));
}

#define WEIGHED_MAX 32767

#if defined(__AVX512VNNI__) || defined(KERNELGEN_VNNI)

typedef i32v partial;
#define PARTIAL_MAX 2147483647
#define PARTIAL_PRODUCTS 4
// dot_signed adds 128 to the codes, to have them unsigned: its sums are too large by 128 times the
// sum of the activations.
#define SIGNED_BIAS 128

INLINE partial dot_unsigned(partial sum, u32v codes, int32_t x) {
    return (partial)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)codes, _mm512_set1_epi32(x));
}
INLINE partial dot_signed(partial sum, u32v codes, int32_t x) {
    return dot_unsigned(sum, codes ^ 0x80808080u, x);
}
INLINE i32v widen(partial sum) { return sum; }

// sum + two products of 16 bits in each lane.  As an intrinsic, clang makes two instructions of it
// and keeps so many sums under way that they do not fit the registers.
INLINE i32v dot_words(i32v sum, u32v a, u32v b) {
#if defined(__AVX512VNNI__)
    __asm__("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
    return sum;
#else
    return (i32v)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
#endif
}

// A sum of 32 bits is one of 16 and what is left of its sign, which meets zero.
#define WEIGHED_MOST 2
INLINE i32v factor_of(i32v x) { return x & 0xFFFF; }
INLINE i32v add_weighed(i32v total, partial sum, i32v factor) {
    return dot_words(total, (u32v)sum, (u32v)factor);
}
INLINE i32v dot_pairs(i32v sum, u32v pairs, int32_t x) {
    return dot_words(sum, pairs, splat_u32((uint32_t)x));
}

#else

typedef int16_t partial __attribute__((vector_size(64)));
#define PARTIAL_MAX 32767
#define PARTIAL_PRODUCTS 2
#define SIGNED_BIAS 0

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

#define WEIGHED_MOST 65536  // it costs as much as to widen
INLINE i32v factor_of(i32v x) { return (x & 0xFFFF) | x << 16; }
INLINE i32v add_weighed(i32v total, partial sum, i32v factor) {
    return total + (i32v)_mm512_madd_epi16((__m512i)sum, (__m512i)factor);
}
INLINE i32v dot_pairs(i32v sum, u32v pairs, int32_t x) {
    return sum + (i32v)_mm512_madd_epi16((__m512i)pairs, _mm512_set1_epi32(x));
}

#endif

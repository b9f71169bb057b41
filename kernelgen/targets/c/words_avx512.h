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

INLINE __m512i table_of_16(const void *entries) {
    return _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)entries));
}
// Each entry too large by 128, as signed codes are.
INLINE __m512i signed_table_of_16(const void *entries) {
    return (__m512i)((u32v)table_of_16(entries) ^ 0x80808080u);
}
INLINE u32v lookup(const void *table, u32v index) {
    return (u32v)_mm512_shuffle_epi8(table_of_16(table), (__m512i)index);
}

// Four single bits to bytes: a product of 32 bits takes four times as long.
INLINE u32v spread1(u32v x) {
    const __m512i lowest = _mm512_set4_epi32(0x0C0C0C0C, 0x08080808, 0x04040404, 0);
    const __m512i copies = _mm512_shuffle_epi8((__m512i)x, lowest);
    const __mmask64 set = _mm512_test_epi8_mask(copies, _mm512_set1_epi32(0x08040201));
    return (u32v)_mm512_maskz_mov_epi8(set, _mm512_set1_epi8(1));
}

// Clang knows the numbers when it has unrolled the loops around these; others would compute them.
#if defined(__clang__) && !defined(KERNELGEN_AVX512)
#define BYTE_OF
// (x >> from) & 255, of bits that begin with a byte.
INLINE u32v byte_of(u32v x, int from) {
    if (from == 0 || from % 8) return (x >> from) & 255u;
    if (from == 24) return x >> 24;
    const __m512i rows = _mm512_set4_epi32(0x8080800C, 0x80808008, 0x80808004, 0x80808000);
    return (u32v)_mm512_shuffle_epi8((__m512i)x, _mm512_add_epi8(rows, _mm512_set1_epi32(from / 8)));
}
#endif

#if defined(BYTE_OF) && defined(__GFNI__) && defined(__AVX512VBMI__)
#define BITS_OF

// Each byte times a matrix of bits, whose row for bit n of the result is byte 7 - n.
INLINE u32v by_matrix(u32v x, uint64_t matrix) {
    return (u32v)_mm512_gf2p8affine_epi64_epi8((__m512i)x, _mm512_set1_epi64((long long)matrix), 0);
}
INLINE uint64_t matrix_of(int from, uint32_t mask, int up) {
    uint64_t matrix = 0;
    UNROLL
    for (int n = 0; n < 8; n++)
        if (mask >> n & 1) matrix |= (uint64_t)1 << (from + n) << 8 * (7 - n - up);
    return matrix;
}

// In each byte the bits of x >> from that `mask` has, moved up; none may leave its byte.
INLINE u32v bits_of(u32v x, int from, uint32_t mask, int up) {
    return from || up ? by_matrix(x, matrix_of(from, mask, up)) : x & mask;
}
// The bits of two words together: those of one byte are made of bits of both where these do not
// clash, else of one and the other with its halves exchanged.
INLINE u32v bits_of_two(u32v x, int from, uint32_t mask, int up, u32v y, int y_from, uint32_t y_mask,
                        int y_up) {
    const uint32_t upper = 0xF0F0F0F0u, lower = 0x0F0F0F0Fu;
    uint32_t here = mask << from, there = y_mask << y_from, chosen;
    const int in_half = !(there & upper) || !(there & lower);
    if ((!from && !up) || (!y_from && !y_up) || (here & there && !in_half))
        return bits_of(x, from, mask, up) | bits_of(y, y_from, y_mask, y_up);
    if (here & there) {
        y = by_matrix(y, 0x1020408001020408u);
        y_from ^= 4;
        there = y_mask << y_from;
        if (here & there) return bits_of(x, from, mask, up) | bits_of(y, y_from, y_mask, y_up);
    }
    // the same for as many codes as may be
    chosen = !(here & upper) && !(there & lower) ? lower : !(here & lower) && !(there & upper) ? upper : here;
    return by_matrix((x & chosen) | (y & ~chosen),
                     matrix_of(from, mask, up) | matrix_of(y_from, y_mask, y_up));
}
// Four bits that follow one another, each to a byte and there moved up: bytes are taken from any bit
// of two rows on.
INLINE u32v spread1_of(u32v x, int from, int up) {
    uint64_t at = 0;
    UNROLL
    for (int n = 0; n < 8; n++) at |= (uint64_t)((n / 4 * 32 + from + n % 4 - up) & 63) << 8 * n;
    return (u32v)_mm512_multishift_epi64_epi8(_mm512_set1_epi64((long long)at), (__m512i)x)
           & (0x01010101u << up);
}
// Entries of a table of 16, for four bits of each byte: six bits are looked at, of which two say
// which of four copies.
INLINE u32v lookup_of(const void *table, u32v x, int from) {
    return (u32v)_mm512_permutexvar_epi8((__m512i)(x >> from), table_of_16(table));
}
INLINE u32v signed_lookup_of(const void *table, u32v x, int from) {
    return (u32v)_mm512_permutexvar_epi8((__m512i)(x >> from), signed_table_of_16(table));
}
#endif

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
// Signed codes are multiplied as unsigned ones that are too large by 128.
#define SIGNED_BIAS 128
#define SIGNED_CODES
INLINE u32v signed_codes(u32v codes) { return codes ^ 0x80808080u; }
INLINE u32v signed_lookup(const void *table, u32v index) {
    return (u32v)_mm512_shuffle_epi8(signed_table_of_16(table), (__m512i)index);
}

INLINE partial dot_unsigned(partial sum, u32v codes, int32_t x) {
    return (partial)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)codes, _mm512_set1_epi32(x));
}
INLINE partial dot_signed(partial sum, u32v codes, int32_t x) {
    return dot_unsigned(sum, codes, x);
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

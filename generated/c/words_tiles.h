// Words for matrix units that multiply tiles, which are registers of 16 rows of 64 bytes.  Where the
// compiler was told of no such unit, plain C computes the same.
//
//   tiles_begin(depth)      before a thread uses tiles: 0..3 hold sums, 4 and 5 (a) have rows of
//                           `depth` words, 6 and 7 (b) have `depth` rows; tiles_end() after it
//   tile_zero(t), tile_load(t, from, stride), tile_store(t, to, stride)    stride in bytes
//   tile_load_once(t, from, stride)    the same as tile_load, of what is not to stay in the first cache
//   tile_dot_bf16(c, a, b)  c[m][n] += a[m][2k] b[k][2n] + a[m][2k+1] b[k][2n+1]    float32
//   tile_dot_int8(c, a, b)  c[m][n] += sum over i = 0..3 of a[m][4k+i] b[k][4n+i]   int32
//
// A column of b so holds 2 or 4 numbers side by side that follow one another along the sum.
#ifndef KERNELGEN_WORDS_TILES_H
#define KERNELGEN_WORDS_TILES_H

#include "words_flash.h"

enum { TILE = 16, TILE_BYTES = 1024, TILE_STRIDE = 64 };

// The half of a float32 that bfloat16 is, cut off.
INLINE f32v upper(f32v x) { return (f32v)((u32v)x & 0xFFFF0000u); }

#if defined(__AMX_BF16__) && defined(__AMX_INT8__) && defined(__AVX512BF16__) \
    && defined(__AVX512DQ__) && LANES == 16
#include "words_amx.h"
#else

// ---- plain C --------------------------------------------------------------------------------

static _Thread_local uint8_t tile_registers[8][TILE_BYTES];
static _Thread_local int tile_depth;

INLINE void tiles_begin(int depth) { tile_depth = depth; }
INLINE void tiles_end(void) {}
INLINE void tiles_allowed(void) {}

INLINE void tile_zero(int t) { memset(tile_registers[t], 0, TILE_BYTES); }
INLINE void tile_load(int t, const void *from, ptrdiff_t stride) {
    const int rows = t < 6 ? TILE : tile_depth, bytes = t == 4 || t == 5 ? 4 * tile_depth : TILE_STRIDE;
    for (int m = 0; m < rows; m++)
        memcpy(tile_registers[t] + m * TILE_STRIDE, (const uint8_t *)from + m * stride, (size_t)bytes);
}
#define tile_load_once tile_load
INLINE void tile_store(int t, void *to, ptrdiff_t stride) {
    for (int m = 0; m < TILE; m++)
        memcpy((uint8_t *)to + m * stride, tile_registers[t] + m * TILE_STRIDE, TILE_STRIDE);
}

INLINE void tile_dot_bf16(int c, int a, int b) {
    for (int m = 0; m < TILE; m++) {
        uint32_t left[TILE];
        float sum[TILE];
        memcpy(left, tile_registers[a] + m * TILE_STRIDE, sizeof left);
        memcpy(sum, tile_registers[c] + m * TILE_STRIDE, sizeof sum);
        for (int k = 0; k < tile_depth; k++)
            for (int n = 0; n < TILE; n++) {
                const uint32_t right = load_u32(tile_registers[b] + k * TILE_STRIDE + 4 * n);
                sum[n] += bits_to_f32(left[k] << 16) * bits_to_f32(right << 16)
                          + bits_to_f32(left[k] & 0xFFFF0000u) * bits_to_f32(right & 0xFFFF0000u);
            }
        memcpy(tile_registers[c] + m * TILE_STRIDE, sum, sizeof sum);
    }
}

INLINE void tile_dot_int8(int c, int a, int b) {
    for (int m = 0; m < TILE; m++) {
        const int8_t *left = (const int8_t *)tile_registers[a] + m * TILE_STRIDE;
        int32_t sum[TILE];
        memcpy(sum, tile_registers[c] + m * TILE_STRIDE, sizeof sum);
        for (int k = 0; k < tile_depth; k++)
            for (int n = 0; n < TILE; n++) {
                const int8_t *right = (const int8_t *)tile_registers[b] + k * TILE_STRIDE + 4 * n;
                for (int i = 0; i < 4; i++) sum[n] += left[4 * k + i] * right[i];
            }
        memcpy(tile_registers[c] + m * TILE_STRIDE, sum, sizeof sum);
    }
}

// The nearest bfloat16, to even where two are as near, in the upper half; what is no number stays.
INLINE u32v rounded(f32v x) {
    const u32v bits = (u32v)x;
    return blend_u32(x == x, bits + (((bits >> 16) & 1u) + 0x7FFFu), bits | 0x400000u);
}

// The nearest number of half precision: 11 bits, fewer below 2^-14; infinite from 65520 on.
INLINE f32v nearest_half(f32v x) {
    const u32v bits = (u32v)x, size = bits & 0x7FFFFFFFu;
    const u32v normal = (size + (((size >> 13) & 1u) + 0xFFFu)) & ~0x1FFFu;
    const f32v small = ((f32v)size + 0.5f) - 0.5f;  // a unit in the last place of 1/2 is 2^-24
    const u32v finite = blend_u32((f32v)size < 0x1p-14f, (u32v)small, normal);
    const u32v near = blend_u32((f32v)finite < 65520.0f, finite, splat_u32(0x7F800000u));
    return (f32v)(blend_u32(x == x, near, size) | (bits & 0x80000000u));
}

// The numbers of a, then those of b, as bfloat16.
INLINE u32v pairs(f32v a, f32v b) {
    const u32v x = rounded(a), y = rounded(b);
    uint16_t halves[2 * LANES];
    for (int n = 0; n < LANES; n++) halves[n] = x[n] >> 16, halves[LANES + n] = y[n] >> 16;
    u32v words;
    memcpy(&words, halves, sizeof words);
    return words;
}
// In each lane a number of a, and one of b above it, as bfloat16.
INLINE u32v beside(f32v a, f32v b) { return rounded(a) >> 16 | (rounded(b) & 0xFFFF0000u); }

// 2^x for x up to 0, and NaN, to within 8e-5 of it, of which bfloat16 sees nothing; 0 from -127 on.
// The polynomial is the best of its degree by relative error on -1/2..1/2 (Lawson's iteration).
INLINE f32v exp2_falling(f32v x) {
    const f32v t = larger(splat_f32(-127.0f), x);
    const f32v sum = t + (0x1.8p23f + 127.0f);  // its lowest bits are a float's exponent
    const f32v r = t - (sum - (0x1.8p23f + 127.0f));
    f32v y = r * 0.05517166853f + 0.24261114001f;
    y = y * r + 0.69326096773f;
    y = y * r + 0.99992805719f;
    return y * (f32v)((u32v)sum << 23);
}

#endif

// NaN of any kind as one that rounding does not make a number of.
INLINE f32v quiet(f32v x) {
    const u32v bits = (u32v)x;  // compared as floats, halves that these were would be, one by one
    return (f32v)blend_u32((bits & 0x7FFFFFFFu) > 0x7F800000u, splat_u32(0x7FC00000u), bits);
}

// Four codes of each row, bytes, times a scale and plus a base, as two words of bfloat16, rounded to
// nearest.  A byte at bit 8 of the float 2^15 makes it 2^15 + byte; the base makes up for that, and
// for signed bytes being taken as 128 more.
#define CODE_ZERO(is_signed) (32768.0f + 128.0f * (is_signed))
INLINE void scale_codes(u32v codes, int is_signed, f32v scale, f32v base, u32v words[2]) {
    const u32v shifted[4] = {codes << 8, codes, codes >> 8, codes >> 16};
    u32v values[4];
    UNROLL
    for (int l = 0; l < 4; l++) {
        const f32v code = (f32v)((shifted[l] & 0xFF00u) ^ (is_signed ? 0x47008000u : 0x47000000u));
        values[l] = (u32v)(scale * code + base) + 0x8000u;
    }
    words[0] = values[0] >> 16 | (values[1] & 0xFFFF0000u);
    words[1] = values[2] >> 16 | (values[3] & 0xFFFF0000u);
}

// Products of 16 bits, two in each lane.
typedef int16_t i16v __attribute__((vector_size(4 * LANES)));

// Four codes of each row, less a bias, times a number of the row: of the bytes 0 and 2, and 1 and 3.
INLINE void multiply_codes(u32v codes, int is_signed, int bias, i32v factor, i16v products[2]) {
    const i16v twice = (i16v)(((u32v)factor & 0xFFFFu) | (u32v)factor << 16);
    const i16v even = (i16v)codes << 8, odd = (i16v)codes;
    if (is_signed) {
        products[0] = ((even >> 8) - (int16_t)bias) * twice;
        products[1] = ((odd >> 8) - (int16_t)bias) * twice;
    } else {
        products[0] = ((i16v)(codes & 0x00FF00FFu) - (int16_t)bias) * twice;
        products[1] = ((i16v)(codes >> 8 & 0x00FF00FFu) - (int16_t)bias) * twice;
    }
}
// Such products as bytes, in the order of the codes: their lowest seven bits, and what is above
// these, which may be negative; or all of them, where they are bytes.
INLINE u32v lowest_seven(const i16v products[2]) {
    return ((u32v)products[0] & 0x007F007Fu) | ((u32v)products[1] & 0x007F007Fu) << 8;
}
INLINE u32v above_seven(const i16v products[2]) {
    return ((u32v)(products[0] >> 7) & 0x00FF00FFu) | ((u32v)(products[1] >> 7) & 0x00FF00FFu) << 8;
}
INLINE u32v whole_bytes(const i16v products[2]) {
    return ((u32v)products[0] & 0x00FF00FFu) | ((u32v)products[1] & 0x00FF00FFu) << 8;
}

// Lane n of the result is the largest lane of x[n]; NaN is none.
#define TOP_STEP(x, size)                                        \
    for (int n = 0; n < LANES; n += 2 * size) {                  \
        const f32v a = x[n], b = x[n + size];                    \
        x[n] = larger(EVENS##size(a, b), ODDS##size(a, b));      \
    }
INLINE f32v tops_of(f32v x[LANES]) {
    UNROLL TOP_STEP(x, 1)
    UNROLL TOP_STEP(x, 2)
#if LANES >= 8
    UNROLL TOP_STEP(x, 4)
#endif
#if LANES >= 16
    UNROLL TOP_STEP(x, 8)
#endif
    return x[0];
}

#endif

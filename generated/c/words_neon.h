// NEON of 64-bit ARM: four rows.  With the dot product extension one instruction multiplies and
// adds four bytes a lane.  (The 8-bit matrix extension would want two rows and eight columns of
// weights side by side, another layout than the one row per lane of all other words.)
#include <arm_neon.h>

INLINE f32v rows_f16(const uint8_t *field, ptrdiff_t index) {
    const uint16x4_t x = vld1_u16((const uint16_t *)(field + index * 2 * LANES));
    return (f32v)vcvt_f32_f16(vreinterpret_f16_u16(x));
}
INLINE i32v rows_u8(const uint8_t *field, ptrdiff_t index) {
    const uint8x8_t x = vreinterpret_u8_u32(vdup_n_u32(load_u32(field + index * LANES)));
    return (i32v)vmovl_u16(vget_low_u16(vmovl_u8(x)));
}
INLINE i32v rows_i8(const uint8_t *field, ptrdiff_t index) {
    const int8x8_t x = vreinterpret_s8_u32(vdup_n_u32(load_u32(field + index * LANES)));
    return (i32v)vmovl_s16(vget_low_s16(vmovl_s8(x)));
}
INLINE i32v rows_u16(const uint8_t *field, ptrdiff_t index) {
    return (i32v)vmovl_u16(vld1_u16((const uint16_t *)(field + index * 2 * LANES)));
}
INLINE i32v rows_i16(const uint8_t *field, ptrdiff_t index) {
    return (i32v)vmovl_s16(vld1_s16((const int16_t *)(field + index * 2 * LANES)));
}

INLINE u32v lookup(const void *table, u32v index) {
    return (u32v)vqtbl1q_s8(vld1q_s8((const int8_t *)table), (uint8x16_t)index);
}

// To the nearest integer, to even where two are as near.
INLINE i32v to_nearest(f32v x) { return (i32v)vcvtnq_s32_f32((float32x4_t)x); }
// The lowest byte of each lane.
INLINE void store_bytes(int8_t *to, i32v x) {
    for (int n = 0; n < LANES; n++) to[n] = (int8_t)x[n];
}

typedef i32v partial;
#define PARTIAL_MAX 2147483647
#define PARTIAL_PRODUCTS 4
#define SIGNED_BIAS 0
#define WEIGHED_MAX PARTIAL_MAX
#define WEIGHED_MOST 1

INLINE partial dot_signed(partial sum, u32v codes, int32_t x) {
    const int8x16_t xs = vreinterpretq_s8_s32(vdupq_n_s32(x));
#if defined(__ARM_FEATURE_DOTPROD)
    return (partial)vdotq_s32((int32x4_t)sum, (int8x16_t)codes, xs);
#else
    // two products of bytes fit 16 bits
    const int16x8_t low = vmull_s8(vget_low_s8((int8x16_t)codes), vget_low_s8(xs));
    const int16x8_t high = vmull_high_s8((int8x16_t)codes, xs);
    return (partial)vpadalq_s16((int32x4_t)sum, vpaddq_s16(low, high));
#endif
}
INLINE partial dot_unsigned(partial sum, u32v codes, int32_t x) {
    return dot_signed(sum, codes, x);  // codes are at most 127
}
INLINE i32v widen(partial sum) { return sum; }

INLINE i32v factor_of(i32v x) { return x; }
INLINE i32v add_weighed(i32v total, partial sum, i32v factor) { return total + sum * factor; }
INLINE i32v dot_pairs(i32v sum, u32v pairs, int32_t x) {
    const i32v low = (i32v)(pairs << 16) >> 16, high = (i32v)pairs >> 16;
    return sum + low * (int16_t)x + high * (x >> 16);
}

// Words for kernels whose lanes run along a row, or along keys: attention.  They are written once,
// in vector operators and shuffles; the compiler knows the instructions.
#ifndef KERNELGEN_WORDS_FLASH_H
#define KERNELGEN_WORDS_FLASH_H

#include "words.h"

// How many floats lie in a row that holds n of them: whole vectors.
#define PADDED(n) (((n) + LANES - 1) / LANES * LANES)

INLINE f32v load_lanes(const float *p) { f32v x; memcpy(&x, p, sizeof x); return x; }
INLINE void store_lanes(float *p, f32v x) { memcpy(p, &x, sizeof x); }

// Asks for memory that is written soon.
INLINE void prefetch_written(const void *to, size_t bytes) {
    for (size_t i = 0; i < bytes; i += 64) __builtin_prefetch((const uint8_t *)to + i, 1);
}

// ---- across lanes ---------------------------------------------------------------------------

// Pairs of blocks of lanes, block by block: of a and b, each in `size` lanes, the even blocks of
// both (evens), or the odd ones (odds).
#if defined(__clang__)
#define PICK(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define PICK(a, b, ...) __builtin_shuffle(a, b, (i32v){__VA_ARGS__})
#endif

#if LANES == 16
#define LANE_IDS ((i32v){0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15})
#define EVENS1(a, b) PICK(a, b, 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30)
#define ODDS1(a, b) PICK(a, b, 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31)
#define EVENS2(a, b) PICK(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29)
#define ODDS2(a, b) PICK(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31)
#define EVENS4(a, b) PICK(a, b, 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27)
#define ODDS4(a, b) PICK(a, b, 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31)
#define EVENS8(a, b) PICK(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23)
#define ODDS8(a, b) PICK(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31)
#elif LANES == 8
#define LANE_IDS ((i32v){0, 1, 2, 3, 4, 5, 6, 7})
#define EVENS1(a, b) PICK(a, b, 0, 8, 2, 10, 4, 12, 6, 14)
#define ODDS1(a, b) PICK(a, b, 1, 9, 3, 11, 5, 13, 7, 15)
#define EVENS2(a, b) PICK(a, b, 0, 1, 8, 9, 4, 5, 12, 13)
#define ODDS2(a, b) PICK(a, b, 2, 3, 10, 11, 6, 7, 14, 15)
#define EVENS4(a, b) PICK(a, b, 0, 1, 2, 3, 8, 9, 10, 11)
#define ODDS4(a, b) PICK(a, b, 4, 5, 6, 7, 12, 13, 14, 15)
#else
#define LANE_IDS ((i32v){0, 1, 2, 3})
#define EVENS1(a, b) PICK(a, b, 0, 4, 2, 6)
#define ODDS1(a, b) PICK(a, b, 1, 5, 3, 7)
#define EVENS2(a, b) PICK(a, b, 0, 1, 4, 5)
#define ODDS2(a, b) PICK(a, b, 2, 3, 6, 7)
#endif

// A square of floats is turned around, in steps of blocks of 1, 2, 4... rows and lanes.
#define TURN_STEP(x, size)                                           \
    for (int n = 0; n < LANES; n++)                                  \
        if (!(n & size)) {                                           \
            const f32v a = x[n], b = x[n + size];                    \
            x[n] = EVENS##size(a, b), x[n + size] = ODDS##size(a, b); \
        }
INLINE void turn(f32v x[LANES]) {
    UNROLL TURN_STEP(x, 1)
    UNROLL TURN_STEP(x, 2)
#if LANES >= 8
    UNROLL TURN_STEP(x, 4)
#endif
#if LANES >= 16
    UNROLL TURN_STEP(x, 8)
#endif
}

// Lane n of the result is the sum of the lanes of x[n].
#define SUM_STEP(x, size)                                       \
    for (int n = 0; n < LANES; n += 2 * size) {                 \
        const f32v a = x[n], b = x[n + size];                   \
        x[n] = EVENS##size(a, b) + ODDS##size(a, b);            \
    }
INLINE f32v sums_of(f32v x[LANES]) {
    UNROLL SUM_STEP(x, 1)
    UNROLL SUM_STEP(x, 2)
#if LANES >= 8
    UNROLL SUM_STEP(x, 4)
#endif
#if LANES >= 16
    UNROLL SUM_STEP(x, 8)
#endif
    return x[0];
}

// The larger of two; b where one of them is NaN.
INLINE f32v larger(f32v a, f32v b) { return blend_f32(b < a, a, b); }

INLINE float largest_lane(f32v x) {
#if LANES >= 16
    x = larger(x, ODDS8(x, x));
#endif
#if LANES >= 8
    x = larger(x, ODDS4(x, x));
#endif
    x = larger(x, ODDS2(x, x));
    x = larger(x, ODDS1(x, x));
    return x[0];
}
INLINE float sum_of_lanes(f32v x) {
#if LANES >= 16
    x += ODDS8(x, x);
#endif
#if LANES >= 8
    x += ODDS4(x, x);
#endif
    x += ODDS2(x, x);
    x += ODDS1(x, x);
    return x[0];
}

// ---- functions ------------------------------------------------------------------------------

// The power of two next to exp(x), as its exponent in `sum`, and what exp(x) is a multiple of it.
// The first of the two constants that make up log(2) has few digits, so that its product is exact;
// the polynomial is Cephes' (expf.c).
INLINE f32v exp_parts(f32v x, f32v *sum) {
    *sum = x * 1.44269504f + 0x1.8p23f;  // rounds to whole powers, in its lowest bits
    const f32v power = *sum - 0x1.8p23f;
    const f32v r = (x - power * 0.693359375f) - power * -2.12194440e-4f;
    f32v y = r * 1.9875691500e-4f + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    return y * (r * r) + r + 1.0f;
}

// exp of numbers up to 0, and NaN, to within 2 units in the last place; 0 below exp(-87).
INLINE f32v exp_falling(f32v x) {
    f32v sum;
    const f32v y = exp_parts(larger(splat_f32(-87.0f), x), &sum);
    const f32v power = (f32v)(((u32v)sum << 23) + (127u << 23));
    return blend_f32(x < -87.0f, splat_f32(0), y * power);
}

// exp to within 2 units in the last place; 0 below exp(-86.6).
INLINE f32v exp_f32(f32v x) {
    f32v sum;
    const f32v y = exp_parts(larger(splat_f32(-87.0f), x), &sum);
    // half of the power, twice: 2^128 is no float
    const f32v half = (f32v)(((u32v)sum << 23) + (126u << 23));
    const f32v some = blend_f32(x < -86.6f, splat_f32(0), (y * half) * 2.0f);
    return blend_f32(x < 88.72284f, some, x * INFINITY);
}

INLINE f32v abs_f32(f32v x) { return (f32v)((u32v)x & 0x7FFFFFFFu); }

// tanh: a polynomial for small numbers, which is Cephes' (tanhf.c), and exp for others.
INLINE f32v tanh_f32(f32v x) {
    const f32v size = abs_f32(x), square = x * x;
    f32v small = square * -5.70498872745e-3f + 2.06390887954e-2f;
    small = small * square - 5.37397155531e-2f;
    small = small * square + 1.33314422036e-1f;
    small = small * square - 3.33332819422e-1f;
    small = small * square * x + x;
    const f32v grown = 1.0f - 2.0f / (exp_f32(size + size) + 1.0f);
    const f32v signed_ = (f32v)((u32v)grown | ((u32v)x & 0x80000000u));
    return blend_f32(size < 0.625f, small, signed_);
}

// What a function gives of a field and an index, for each lane.
#define at_each(function, field, index, vector)                              \
    ({                                                                       \
        const i32v at_each_index = index;                                    \
        vector at_each_result;                                               \
        for (int n = 0; n < LANES; n++)                                      \
            at_each_result[n] = function(field, at_each_index[n]);           \
        at_each_result;                                                      \
    })

#endif

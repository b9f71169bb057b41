// No known instruction set: four rows, in plain C.

INLINE f32v rows_f16(const uint8_t *field, ptrdiff_t index) {
    f32v y;
    for (int n = 0; n < LANES; n++) y[n] = f16_to_f32(load_u16(field + (index * LANES + n) * 2));
    return y;
}
INLINE i32v rows_u8(const uint8_t *field, ptrdiff_t index) {
    i32v y;
    for (int n = 0; n < LANES; n++) y[n] = field[index * LANES + n];
    return y;
}
INLINE i32v rows_i8(const uint8_t *field, ptrdiff_t index) {
    i32v y;
    for (int n = 0; n < LANES; n++) y[n] = (int8_t)field[index * LANES + n];
    return y;
}
INLINE i32v rows_u16(const uint8_t *field, ptrdiff_t index) {
    i32v y;
    for (int n = 0; n < LANES; n++) y[n] = load_u16(field + (index * LANES + n) * 2);
    return y;
}
INLINE i32v rows_i16(const uint8_t *field, ptrdiff_t index) {
    i32v y;
    for (int n = 0; n < LANES; n++) y[n] = (int16_t)load_u16(field + (index * LANES + n) * 2);
    return y;
}

INLINE u32v lookup(const void *table, u32v index) {
    u32v y = {0};
    for (int n = 0; n < LANES; n++)
        for (int l = 0; l < 4; l++)
            y[n] |= (uint32_t)((const uint8_t *)table)[(index[n] >> 8 * l) & 15] << 8 * l;
    return y;
}

// To the nearest integer, to even where two are as near.
INLINE i32v to_nearest(f32v x) {
    i32v y;
    for (int n = 0; n < LANES; n++) y[n] = (int32_t)rintf(x[n]);
    return y;
}
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
    for (int l = 0; l < 4; l++)
        sum += ((i32v)(codes << (24 - 8 * l)) >> 24) * (int32_t)(int8_t)((uint32_t)x >> 8 * l);
    return sum;
}
INLINE partial dot_unsigned(partial sum, u32v codes, int32_t x) {
    for (int l = 0; l < 4; l++)
        sum += (i32v)((codes >> 8 * l) & 255u) * (int32_t)(int8_t)((uint32_t)x >> 8 * l);
    return sum;
}
INLINE i32v widen(partial sum) { return sum; }

INLINE i32v factor_of(i32v x) { return x; }
INLINE i32v add_weighed(i32v total, partial sum, i32v factor) { return total + sum * factor; }
INLINE i32v dot_pairs(i32v sum, u32v pairs, int32_t x) {
    const i32v low = (i32v)(pairs << 16) >> 16, high = (i32v)pairs >> 16;
    return sum + low * (int16_t)x + high * (x >> 16);
}

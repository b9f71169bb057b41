// Intel AMX: tiles of bytes and of bfloat16; AVX-512 rounds to bfloat16.
#include <immintrin.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

// Asks the system to let this process use tiles; without that, using them ends it.
INLINE void tiles_allowed(void) {
#if defined(__linux__)
    if (syscall(SYS_arch_prctl, 0x1023, 18)) abort();  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
#endif
}

INLINE void tiles_begin(int depth) {
    struct {
        uint8_t palette, row, none[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } shapes;
    memset(&shapes, 0, sizeof shapes);
    shapes.palette = 1;
    for (int t = 0; t < 8; t++) {
        shapes.bytes[t] = (uint16_t)(t == 4 || t == 5 ? 4 * depth : TILE_STRIDE);
        shapes.rows[t] = (uint8_t)(t < 6 ? TILE : depth);
    }
    _tile_loadconfig(&shapes);
}
INLINE void tiles_end(void) { _tile_release(); }

#if defined(__clang__)
#define TILE_MEMORY
#else
#define TILE_MEMORY __asm__ volatile("" ::: "memory");  // gcc does not know that tiles read memory
#endif
#define tile_zero(t) _tile_zero(t)
#define tile_load(t, from, stride)           \
    do {                                     \
        TILE_MEMORY                          \
        _tile_loadd(t, from, stride);        \
    } while (0)
#define tile_load_once(t, from, stride)      \
    do {                                     \
        TILE_MEMORY                          \
        _tile_stream_loadd(t, from, stride); \
    } while (0)
#define tile_store(t, to, stride)            \
    do {                                     \
        _tile_stored(t, to, stride);         \
        TILE_MEMORY                          \
    } while (0)
#define tile_dot_bf16(c, a, b) _tile_dpbf16ps(c, a, b)
#define tile_dot_int8(c, a, b) _tile_dpbssd(c, a, b)

// The nearest number of half precision.
INLINE f32v nearest_half(f32v x) {
    return (f32v)_mm512_cvtph_ps(_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT));
}

// The numbers of a, then those of b, as bfloat16, rounded to nearest.
INLINE u32v pairs(f32v a, f32v b) {
    return (u32v)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a);
}
// In each lane a number of a, and one of b above it, as bfloat16.
INLINE u32v beside(f32v a, f32v b) {
    const __m512i turns = (__m512i)(LANE_IDS + ((LANE_IDS + 16) << 16));
    return (u32v)_mm512_permutexvar_epi16(turns, (__m512i)pairs(a, b));
}

// 2^x for x up to 0, and NaN, to within 8e-5 of it, of which bfloat16 sees nothing.
// The polynomial is the best of its degree by relative error on 0..1 (Lawson's iteration).
INLINE f32v exp2_falling(f32v x) {
    const f32v r = (f32v)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEG_INF);  // x - floor(x)
    f32v y = r * 0.07802452147f + 0.22606717050f;
    y = y * r + 0.69583350420f;
    y = y * r + 0.99992519617f;
    return (f32v)_mm512_scalef_ps((__m512)y, (__m512)x);  // times 2^floor(x)
}

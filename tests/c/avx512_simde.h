// AVX-512 in terms of what the machine has: SIMDe, and what its version 0.7.4 lacks or has wrong.
#include <string.h>

#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>

#define WIDEN(name, from_type, from_elements)                                   \
    static inline __attribute__((always_inline)) __m512i name(from_type x) {    \
        from_elements from;                                                     \
        int32_t to __attribute__((vector_size(64)));                            \
        memcpy(&from, &x, sizeof from);                                         \
        for (int n = 0; n < 16; n++) to[n] = from[n];                           \
        return (__m512i)to;                                                     \
    }

typedef uint8_t bytes __attribute__((vector_size(16)));
typedef int8_t signed_bytes __attribute__((vector_size(16)));
typedef uint16_t halves __attribute__((vector_size(32)));
typedef int16_t signed_halves __attribute__((vector_size(32)));

WIDEN(widen_bytes, __m128i, bytes)
WIDEN(widen_signed_bytes, __m128i, signed_bytes)
WIDEN(widen_halves, __m256i, halves)
WIDEN(widen_signed_halves, __m256i, signed_halves)

#undef _mm512_cvtepu8_epi32
#undef _mm512_cvtepi8_epi32
#undef _mm512_cvtepu16_epi32
#undef _mm512_cvtepi16_epi32
#define _mm512_cvtepu8_epi32 widen_bytes
#define _mm512_cvtepi8_epi32 widen_signed_bytes
#define _mm512_cvtepu16_epi32 widen_halves
#define _mm512_cvtepi16_epi32 widen_signed_halves

static inline __m512 cvtph_ps(__m256i x) {
    halves from;
    float to __attribute__((vector_size(64)));
    memcpy(&from, &x, sizeof from);
    for (int n = 0; n < 16; n++) to[n] = f16_to_f32(from[n]);  // of words.h
    return (__m512)to;
}
#undef _mm512_cvtph_ps
#define _mm512_cvtph_ps cvtph_ps

#undef _mm512_madd_epi16  // an alias with the arguments of its masked form
#define _mm512_madd_epi16 simde_mm512_madd_epi16

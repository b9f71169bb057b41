// half, bfloat16 and their pairs.  Every operation is rounded once, as on a GPU.
#pragma once
#include "emu_cuda.h"

namespace emu {
struct F16 {
    static uint16_t to(double v) { return emu_to_f16(v); }
    static float from(uint16_t b) { return float(bits<_Float16>(b)); }
    static uint16_t to(float v) { return bits<uint16_t>(static_cast<_Float16>(v)); }
};
struct BF16 {
    static uint16_t to(double v) { return emu_to_bf16(v); }
    static float from(uint16_t b) { return bits<float>(uint32_t(b) << 16); }
    static uint16_t to(float v) {
        uint32_t u = bits<uint32_t>(v);
        return v != v ? 0x7fff : uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16);
    }
};

template <class F> struct alignas(2) Small {
    uint16_t raw;
    Small() = default;
    Small(float v) : raw(F::to(v)) {}
    Small(double v) : raw(F::to(v)) {}
    template <class I, class = std::enable_if_t<std::is_integral<I>::value>>
    Small(I v) : raw(F::to(double(v))) {}
    operator float() const { return F::from(raw); }
    static Small of(uint16_t b) {
        Small s;
        s.raw = b;
        return s;
    }
    Small &operator+=(Small b) { return *this = *this + b; }
    Small &operator-=(Small b) { return *this = *this - b; }
    Small &operator*=(Small b) { return *this = *this * b; }
    Small &operator/=(Small b) { return *this = *this / b; }
    friend Small operator+(Small a, Small b) { return Small(float(a) + float(b)); }
    friend Small operator-(Small a, Small b) { return Small(float(a) - float(b)); }
    friend Small operator*(Small a, Small b) { return Small(float(a) * float(b)); }
    friend Small operator/(Small a, Small b) { return Small(float(a) / float(b)); }
    friend Small operator-(Small a) { return of(a.raw ^ 0x8000); }
    friend bool operator==(Small a, Small b) { return float(a) == float(b); }
    friend bool operator!=(Small a, Small b) { return float(a) != float(b); }
    friend bool operator<(Small a, Small b) { return float(a) < float(b); }
    friend bool operator<=(Small a, Small b) { return float(a) <= float(b); }
    friend bool operator>(Small a, Small b) { return float(a) > float(b); }
    friend bool operator>=(Small a, Small b) { return float(a) >= float(b); }
};
template <class F> struct alignas(4) Pair {
    Small<F> x, y;
    Pair() = default;
    Pair(Small<F> x, Small<F> y) : x(x), y(y) {}
    friend Pair operator+(Pair a, Pair b) { return {a.x + b.x, a.y + b.y}; }
    friend Pair operator-(Pair a, Pair b) { return {a.x - b.x, a.y - b.y}; }
    friend Pair operator*(Pair a, Pair b) { return {a.x * b.x, a.y * b.y}; }
    friend Pair operator/(Pair a, Pair b) { return {a.x / b.x, a.y / b.y}; }
    friend Pair operator-(Pair a) { return {-a.x, -a.y}; }
    Pair &operator+=(Pair b) { return *this = *this + b; }
    Pair &operator*=(Pair b) { return *this = *this * b; }
};
template <class F> inline Small<F> fused(Small<F> a, Small<F> b, Small<F> c) {
    return Small<F>::of(F::to(fma(double(float(a)), double(float(b)), double(float(c)))));
}
} // namespace emu

using __half = emu::Small<emu::F16>;
using __half2 = emu::Pair<emu::F16>;
using half = __half;
using half2 = __half2;
using __nv_bfloat16 = emu::Small<emu::BF16>;
using __nv_bfloat162 = emu::Pair<emu::BF16>;
using nv_bfloat16 = __nv_bfloat16;
using nv_bfloat162 = __nv_bfloat162;

// what both have under one name
#define EMU_BOTH(H, H2)                                                                            \
    static inline H __hadd(H a, H b) { return a + b; }                                             \
    static inline H __hsub(H a, H b) { return a - b; }                                             \
    static inline H __hmul(H a, H b) { return a * b; }                                             \
    static inline H __hdiv(H a, H b) { return a / b; }                                             \
    static inline H __hfma(H a, H b, H c) { return emu::fused(a, b, c); }                          \
    static inline H __hneg(H a) { return -a; }                                                     \
    static inline H __habs(H a) { return H::of(a.raw & 0x7fff); }                                  \
    static inline H __hmax(H a, H b) { return H(fmaxf(a, b)); }                                    \
    static inline H __hmin(H a, H b) { return H(fminf(a, b)); }                                    \
    static inline bool __heq(H a, H b) { return a == b; }                                          \
    static inline bool __hne(H a, H b) { return a != b; }                                          \
    static inline bool __hlt(H a, H b) { return a < b; }                                           \
    static inline bool __hle(H a, H b) { return a <= b; }                                          \
    static inline bool __hgt(H a, H b) { return a > b; }                                           \
    static inline bool __hge(H a, H b) { return a >= b; }                                          \
    static inline bool __hisnan(H a) { return std::isnan(float(a)); }                              \
    static inline bool __hisinf(H a) { return std::isinf(float(a)); }                              \
    static inline H hexp(H a) { return H(expf(a)); }                                               \
    static inline H hexp2(H a) { return H(exp2f(a)); }                                             \
    static inline H hlog(H a) { return H(logf(a)); }                                               \
    static inline H hsqrt(H a) { return H(sqrtf(a)); }                                             \
    static inline H hrsqrt(H a) { return H(1 / sqrtf(a)); }                                        \
    static inline H hrcp(H a) { return H(1 / float(a)); }                                          \
    static inline H hfloor(H a) { return H(floorf(a)); }                                           \
    static inline H hrint(H a) { return H(nearbyintf(a)); }                                        \
    static inline H2 __hadd2(H2 a, H2 b) { return a + b; }                                         \
    static inline H2 __hsub2(H2 a, H2 b) { return a - b; }                                         \
    static inline H2 __hmul2(H2 a, H2 b) { return a * b; }                                         \
    static inline H2 __h2div(H2 a, H2 b) { return a / b; }                                         \
    static inline H2 __hfma2(H2 a, H2 b, H2 c) {                                                   \
        return {emu::fused(a.x, b.x, c.x), emu::fused(a.y, b.y, c.y)};                             \
    }                                                                                              \
    static inline H2 __hneg2(H2 a) { return -a; }                                                  \
    static inline H2 __habs2(H2 a) { return {__habs(a.x), __habs(a.y)}; }                          \
    static inline H2 __hmax2(H2 a, H2 b) { return {__hmax(a.x, b.x), __hmax(a.y, b.y)}; }          \
    static inline H2 __hmin2(H2 a, H2 b) { return {__hmin(a.x, b.x), __hmin(a.y, b.y)}; }          \
    static inline H2 h2exp(H2 a) { return {hexp(a.x), hexp(a.y)}; }                                \
    static inline H2 h2exp2(H2 a) { return {hexp2(a.x), hexp2(a.y)}; }                             \
    static inline H2 h2sqrt(H2 a) { return {hsqrt(a.x), hsqrt(a.y)}; }                             \
    static inline H atomicAdd(H *p, H v, EMU_LINE) {                                               \
        return H::of(uint16_t(emu_atomic(p, EMU_ADD, emu::small_code(v), v.raw, 0, line)));        \
    }                                                                                              \
    static inline H2 atomicAdd(H2 *p, H2 v, EMU_LINE) {                                            \
        int code = emu::small_code(v.x) == EMU_F16 ? EMU_F16X2 : EMU_BF16X2;                       \
        return emu::bits<H2>(uint32_t(                                                             \
            emu_atomic(p, EMU_ADD, code, emu::bits<uint32_t>(v), 0, line)));                       \
    }
namespace emu {
static inline int small_code(__half) { return EMU_F16; }
static inline int small_code(__nv_bfloat16) { return EMU_BF16; }
} // namespace emu
EMU_BOTH(__half, __half2)
EMU_BOTH(__nv_bfloat16, __nv_bfloat162)
#undef EMU_BOTH

// what has the type in its name
#define EMU_NAMED(H, H2, half_, half2_, float22)                                                   \
    static inline H __float2##half_(float v) { return H(v); }                                      \
    static inline H __float2##half_##_rn(float v) { return H(v); }                                 \
    static inline H __double2##half_(double v) { return H(v); }                                    \
    static inline float __##half_##2float(H v) { return float(v); }                                \
    static inline H __int2##half_##_rn(int v) { return H(v); }                                     \
    static inline H __uint2##half_##_rn(unsigned v) { return H(v); }                               \
    static inline H __short2##half_##_rn(short v) { return H(v); }                                 \
    static inline H __ushort2##half_##_rn(unsigned short v) { return H(v); }                       \
    static inline int __##half_##2int_rn(H v) { return int(nearbyintf(v)); }                       \
    static inline int __##half_##2int_rz(H v) { return int(float(v)); }                            \
    static inline H __ushort_as_##half_(unsigned short v) { return H::of(v); }                     \
    static inline H __short_as_##half_(short v) { return H::of(uint16_t(v)); }                     \
    static inline unsigned short __##half_##_as_ushort(H v) { return v.raw; }                      \
    static inline short __##half_##_as_short(H v) { return short(v.raw); }                         \
    static inline H2 __float2##half2_##_rn(float v) { return {H(v), H(v)}; }                       \
    static inline H2 __floats2##half2_##_rn(float x, float y) { return {H(x), H(y)}; }             \
    static inline H2 __float22##half2_##_rn(float2 v) { return {H(v.x), H(v.y)}; }                 \
    static inline float2 float22(H2 v) { return {float(v.x), float(v.y)}; }                        \
    static inline H2 __##half_##2##half2_(H v) { return {v, v}; }                                  \
    static inline H2 __halves2##half2_(H x, H y) { return {x, y}; }                                \
    static inline H2 make_##half2_(H x, H y) { return {x, y}; }                                    \
    static inline H __low2##half_(H2 v) { return v.x; }                                            \
    static inline H __high2##half_(H2 v) { return v.y; }                                           \
    static inline H2 __low2##half2_(H2 v) { return {v.x, v.x}; }                                   \
    static inline H2 __high2##half2_(H2 v) { return {v.y, v.y}; }                                  \
    static inline H2 __lows2##half2_(H2 a, H2 b) { return {a.x, b.x}; }                            \
    static inline H2 __highs2##half2_(H2 a, H2 b) { return {a.y, b.y}; }                           \
    static inline H2 __lowhigh2highlow(H2 v) { return {v.y, v.x}; }
EMU_NAMED(__half, __half2, half, half2, __half22float2)
EMU_NAMED(__nv_bfloat16, __nv_bfloat162, bfloat16, bfloat162, __bfloat1622float2)
#undef EMU_NAMED
static inline float __low2float(__half2 v) { return float(v.x); }
static inline float __high2float(__half2 v) { return float(v.y); }
static inline float __low2float(__nv_bfloat162 v) { return float(v.x); }
static inline float __high2float(__nv_bfloat162 v) { return float(v.y); }
static inline __half __float2half_rz(float v) {
    __half h(v);
    if (fabsf(float(h)) > fabsf(v)) h.raw--;
    return h;
}

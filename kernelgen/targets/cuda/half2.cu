%# The exponent of 1024, whose last bit is 1, above a code; what is subtracted gives the number back.
%% set shift = code_shift(fmt)
%% set zero = 1024 + code_center(fmt) + (128 if steps.signed else 0)
// Two numbers of half precision in a word, and arithmetic on both at once.

// Two numbers, rounded to half precision, in a word.
static __device__ __forceinline__ unsigned int halves(float low, float high) {
    unsigned int both;
    asm("{.reg .b16 l, h; cvt.rn.f16.f32 l, %1; cvt.rn.f16.f32 h, %2; mov.b32 %0, {l, h};}"
        : "=r"(both)
        : "f"(low), "f"(high));
    return both;
}

// a * b + c, rounded once.
static __device__ __forceinline__ unsigned int fma2(unsigned int a, unsigned int b,
                                                    unsigned int c) {
    unsigned int result;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(c));
    return result;
}

// a * b.
static __device__ __forceinline__ unsigned int multiply2(unsigned int a, unsigned int b) {
    return fma2(a, b, 0x80008000u);
}

// The sum of two numbers, which are floats before they are added.
static __device__ __forceinline__ float sum2(unsigned int x) {
    float low, high;
    asm("{.reg .b16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h;}"
        : "=f"(low), "=f"(high)
        : "r"(x));
    return low + high;
}

// Two codes of a word, at most 255, less ${code_center(fmt)} and over ${2**shift}, which is exact: bytes
// that `which` selects become the last bits of 1024 + code.
static __device__ __forceinline__ unsigned int code_halves(unsigned int codes, unsigned int which) {
    // 1 / ${2**shift}, and ${-zero} times that
    return fma2(__byte_perm(codes, 0x00006464u, which), ${half_word(1 / 2**shift)},
                ${half_word(-zero / 2**shift)});
}

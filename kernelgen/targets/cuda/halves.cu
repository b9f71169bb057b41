// Two numbers, rounded to ${half}, in a word.
static __device__ __forceinline__ unsigned int halves(float low, float high) {
    unsigned int both;
    asm("cvt.rn.${half}x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
}


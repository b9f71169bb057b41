// As load_matrices, but each matrix is turned over: a lane gets two elements of column lane / 4.
static __device__ __forceinline__ void load_turned(unsigned int *to, unsigned int from) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(from)
                 : "memory");
}

// 2^x, to 22 bits; of -infinity it is 0.
static __device__ __forceinline__ float power2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Of the four lanes that share a row, the largest number, and the sum.
static __device__ __forceinline__ float largest_of_row(float x) {
    x = fmaxf(x, __shfl_xor_sync(0xFFFFFFFFu, x, 1));
    return fmaxf(x, __shfl_xor_sync(0xFFFFFFFFu, x, 2));
}
static __device__ __forceinline__ float sum_of_row(float x) {
    x += __shfl_xor_sync(0xFFFFFFFFu, x, 1);
    return x + __shfl_xor_sync(0xFFFFFFFFu, x, 2);
}

// What is subtracted from numbers in the place of scores where this is the largest of them: without
// any key all weights are zero.
static __device__ __forceinline__ float base_of(float top) {
    return top == NEVER ? 0.0f : top * UNIT;
}

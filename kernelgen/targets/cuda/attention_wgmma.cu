%% set half = half_type[precision]

// The same of a matrix whose rows, of 64 numbers in turn, are to be its columns; the next 64 of each
// of the KEYS rows lie behind the first of all.
static __device__ __forceinline__ unsigned long long matrix_turned(const void *p) {
    return matrix(p) + ((unsigned long long)(KEYS * 8u - 1u) << 16);
}

// Wait until all products but those of the last group are done.
static __device__ __forceinline__ void products_wait_but_last() {
    asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
}

// The units see what this thread wrote to shared memory, or had copied there.
static __device__ __forceinline__ void writes_show() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// A sum that products have left in a register is not looked at before this.
static __device__ __forceinline__ void settle(float &sum) { asm volatile("" : "+f"(sum)::"memory"); }

// Start a product of 64 x 16 queries and 16 x ${config.keys} keys of type ${half}, both from shared memory, added
// to float32 sums, or in their place.
static __device__ __forceinline__ void multiply_queries(float *sums, unsigned long long a,
                                                        unsigned long long b, unsigned int adds) {
%% set n = config.keys // 2
    asm volatile(
        "{.reg .pred adds; setp.ne.u32 adds, %${n + 2}, 0; "
        "wgmma.mma_async.sync.aligned.m64n${config.keys}k16.f32.${half}.${half} {"
%% for some in operands(n)
        "${some}${"" if loop.last else ", "}"
%% endfor
        "}, %${n}, %${n + 1}, adds, 1, 1, 0, 0;}"
        : ${floats(n)}
        : "l"(a), "l"(b), "r"(adds));
}

// Start a product of 64 x 16 weights, from registers of four warps, and 16 x ${V.width} values, which lie in
// rows, added to float32 sums.
static __device__ __forceinline__ void multiply_weights(float *sums, const unsigned int *a,
                                                        unsigned long long b) {
%% set n = V.width // 2
    asm volatile(
        "{.reg .pred adds; setp.eq.u32 adds, 0, 0; "
        "wgmma.mma_async.sync.aligned.m64n${V.width}k16.f32.${half}.${half} {"
%% for some in operands(n)
        "${some}${"" if loop.last else ", "}"
%% endfor
        "}, {%${n}, %${n + 1}, %${n + 2}, %${n + 3}}, %${n + 4}, adds, 1, 1, 1;}"
        : ${floats(n)}
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

// One seeded bug per kernel; `// BUG` marks the line that a finding must name.

#define SHARED_ADDRESS(p) (unsigned)__cvta_generic_to_shared(p)

extern "C" __global__ void missing_barrier(const float* x, float* y) {
    __shared__ float tile[64];
    tile[threadIdx.x] = x[threadIdx.x];
    y[threadIdx.x] = tile[63 - threadIdx.x];  // BUG
}

extern "C" __global__ void divergent_barrier(const float* x, float* y) {
    __shared__ float tile[64];
    tile[threadIdx.x] = x[threadIdx.x];
    if (threadIdx.x < 40) {
        __syncthreads();  // BUG
        y[threadIdx.x] = tile[threadIdx.x];
    } else {
        __syncwarp(0xffffff00);
        y[threadIdx.x] = 0;
        __syncthreads();  // BUG
    }
}

extern "C" __global__ void mismatched_mask(const float* x, float* y) {
    float v = x[threadIdx.x];
    if (threadIdx.x % 32 < 16)
        v = __shfl_xor_sync(0x0000ffff, v, 1);
    else
        v = __shfl_xor_sync(0xffffffff, v, 1);  // BUG
    __syncwarp();  // BUG
    y[threadIdx.x] = v;
}

// the reader of the second round is overtaken by the writer of the third
extern "C" __global__ void shared_race(const float* x, float* y) {
    __shared__ float tile[64];
    float sum = 0;
    for (int i = 0; i < 4; i++) {
        tile[threadIdx.x] = x[threadIdx.x] + i;  // BUG
        __syncthreads();
        sum += tile[(threadIdx.x + 32) % 64];  // BUG
    }
    y[threadIdx.x] = sum;
}

extern "C" __global__ void out_of_bounds(const float* x, float* y) {
    y[threadIdx.x] = x[threadIdx.x + 1];  // BUG
}

extern "C" __global__ void before_the_start(const float* x, float* y) {
    y[threadIdx.x] = x[(int)threadIdx.x - 1];  // BUG
}

extern "C" __global__ void shared_out_of_bounds(const float* x, float* y) {
    extern __shared__ float dynamic[];
    dynamic[threadIdx.x + 1] = x[threadIdx.x];  // BUG
    __syncthreads();
    y[threadIdx.x] = dynamic[threadIdx.x + 1];
}

extern "C" __global__ void uninitialised(const float* x, float* y) {
    __shared__ float tile[64];
    if (threadIdx.x < 63) tile[threadIdx.x] = x[threadIdx.x];
    __syncthreads();
    y[threadIdx.x] = tile[threadIdx.x];  // BUG
}

extern "C" __global__ void weak_wait(const float* x, float* y) {
    __shared__ __align__(16) float tile[2][64];
    for (int stage = 0; stage < 2; stage++) {
        unsigned to = SHARED_ADDRESS(&tile[stage][threadIdx.x]);
        const float* from = x + 64 * stage + threadIdx.x;
        asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" :: "r"(to), "l"(from) : "memory");
        asm volatile("cp.async.commit_group;");
    }
    asm volatile("cp.async.wait_group 1;" ::: "memory");
    __syncthreads();
    y[threadIdx.x] = tile[1][63 - threadIdx.x];  // BUG
}

extern "C" __global__ void misaligned(const float* x, float* y) {
    unsigned long long v = *reinterpret_cast<const unsigned long long*>(x + 1);  // BUG
    y[threadIdx.x] = v;
}

extern "C" __global__ void misaligned_vector(const float* x, float* y) {
    float4 v = *reinterpret_cast<const float4*>(x + 2);  // BUG
    y[threadIdx.x] = v.x + v.y;
}

extern "C" __global__ void hang(const float* x, float* y) {
    while (*(volatile const float*)x >= 0) {}  // BUG
    y[threadIdx.x] = 1;
}

extern "C" __global__ void unknown_instruction(const float* x, float* y) {
    asm volatile("barrier.cluster.arrive.aligned;");  // BUG
    y[threadIdx.x] = x[threadIdx.x];
}

extern "C" __global__ void asserts(const float* x, float* y) {
    assert(x[threadIdx.x] < 63);  // BUG
    y[threadIdx.x] = 0;
}

extern "C" __global__ void too_much_stack(const float* x, float* y) {
    volatile char big[400000];
    for (int i = 0; i < 400000; i += 1000) big[i] = 1;
    y[threadIdx.x] = big[0] + x[0];
}

// blocks that write the same place: each block of 64 writes one word more
extern "C" __global__ void global_race(const float* x, float* y) {
    int i = blockIdx.x * 63 + threadIdx.x;
    y[i] = x[threadIdx.x] + blockIdx.x;
}

// a shuffle does not order memory, and a barrier of one warp orders only that warp
extern "C" __global__ void weak_order(const float* x, float* y) {
    __shared__ float first, tile[64];
    tile[threadIdx.x] = x[threadIdx.x];
    if (threadIdx.x == 0) first = x[0];  // BUG
    __syncwarp();
    float v = __shfl_sync(0xffffffff, x[threadIdx.x], 0);
    y[threadIdx.x] = v + first + tile[threadIdx.x ^ 1];  // BUG
}

// only one thread of one block is at fault
extern "C" __global__ void one_of_many(const float* x, float* y) {
    unsigned i = threadIdx.x;
    if (blockIdx.x == 2 && blockIdx.y == 1 && threadIdx.x == 37) i += 64;
    y[threadIdx.x] = x[i];  // BUG
}

// Products of matrices as Hopper has them: wgmma from shared memory that bulk copies fill.
// A launch may ask for one bug.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

#define DEVICE __device__ __forceinline__

DEVICE uint32_t shared_address(const void* p) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// ---- mbarriers

DEVICE void barrier_make(uint64_t* bar, uint32_t arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(bar)),
                 "r"(arrivals));
}
DEVICE void barrier_arrive(uint64_t* bar) {
    asm volatile("mbarrier.arrive.release.cta.shared::cta.b64 _, [%0];" ::"r"(shared_address(bar))
                 : "memory");
}
DEVICE void barrier_expect(uint64_t* bar, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(
                     shared_address(bar)),
                 "r"(bytes)
                 : "memory");
}
DEVICE void barrier_wait(uint64_t* bar, uint32_t parity) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again_%=:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@done bra.uni ready_%=;\n"
        "bra.uni again_%=;\n"
        "ready_%=:\n"
        "}\n" ::"r"(shared_address(bar)),
        "r"(parity)
        : "memory");
}
DEVICE bool barrier_test(uint64_t* bar, uint64_t state) {
    uint32_t done;
    asm volatile(
        "{ .reg .pred p; mbarrier.test_wait.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
        : "=r"(done)
        : "r"(shared_address(bar)), "l"(state)
        : "memory");
    return done;
}
DEVICE void bulk_copy(void* to, const void* from, uint32_t bytes, uint64_t* bar) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
        ::"r"(shared_address(to)), "l"(from), "r"(bytes), "r"(shared_address(bar))
        : "memory");
}
DEVICE bool elected() {
    uint32_t is;
    asm volatile(
        "{ .reg .pred p; elect.sync _|p, 0xffffffff; selp.u32 %0, 1, 0, p; }" : "=r"(is));
    return is;
}

// ---- wgmma

DEVICE void proxy_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
DEVICE void multiply_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void multiply_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int left> DEVICE void multiply_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(left) : "memory");
}
DEVICE uint64_t matrix(const void* p, uint64_t leading, uint64_t stride, uint64_t swizzle) {
    return (shared_address(p) & 0x3ffff) >> 4 | leading >> 4 << 16 | stride >> 4 << 32 |
           swizzle << 62;
}
#define SUMS8(d, i)                                                                              \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
        "+f"(d[i + 6]), "+f"(d[i + 7])
#define NAMES8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define NAMES32                                                                               \
    NAMES8 ", %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, " \
           "%24, %25, %26, %27, %28, %29, %30, %31"

DEVICE void multiply_n64(float (&d)[32], uint64_t a, uint64_t b) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 {" NAMES32 "}, %32, %33, 1, 1, 1, 0, "
        "0;"
        : SUMS8(d, 0), SUMS8(d, 8), SUMS8(d, 16), SUMS8(d, 24)
        : "l"(a), "l"(b));
}

// y[m][n] = x[m][k] w[n][k]; tiles of 64 x 64, k by 64; tiles of w are swizzled in memory already.
// A warp of its own copies tiles of w; the warpgroup swizzles those of x itself.
constexpr int STAGES = 2, TILE_BYTES = 64 * 128;
enum Bug { NONE, EXPECT, PARITY, COUNT, PROXY, FENCE, WAIT, READ, RELEASE, SHOW, OVERWRITE };

extern "C" __global__ void __launch_bounds__(160)
    pipeline(const half* __restrict__ x, const uint8_t* __restrict__ tiles, float* y, int k,
             int bug) {
    extern __shared__ __align__(1024) uint8_t memory[];
    __shared__ uint64_t full[STAGES], empty[STAGES];
    uint8_t *tile_w = memory, *tile_x = memory + STAGES * TILE_BYTES;
    const int t = threadIdx.x, rounds = k / 64;
    if (t == 128) {
        for (int s = 0; s < STAGES; s++) {
            barrier_make(&full[s], bug == COUNT ? 2 : 1);
            barrier_make(&empty[s], 1);
        }
        if (bug != SHOW) asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    if (t >= 128) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
        if (elected()) {
            for (int i = 0; i < rounds; i++) {
                int s = i % STAGES;
                barrier_wait(&empty[s], (i / STAGES & 1) ^ 1);
                if (bug != EXPECT) barrier_expect(&full[s], TILE_BYTES);
                const uint8_t* from = tiles + (blockIdx.x * rounds + i) * TILE_BYTES;
                bulk_copy(tile_w + s * TILE_BYTES, from, TILE_BYTES, &full[s]);
                if (bug == EXPECT) barrier_arrive(&full[s]);
            }
        }
        return;
    }
    float sums[32] = {};
    for (int i = 0; i < rounds; i++) {
        int s = i % STAGES;
        for (int c = t; c < 64 * 8; c += 128) {
            int row = c / 8, chunk = c % 8;
            int4 v = *reinterpret_cast<const int4*>(x + (blockIdx.y * 64 + row) * k + i * 64 +
                                                    chunk * 8);
            *reinterpret_cast<int4*>(tile_x + row * 128 + (chunk ^ row % 8) * 16) = v;
        }
        if (bug != PROXY) proxy_fence();
        asm volatile("bar.sync 1, 128;" ::: "memory");
        barrier_wait(&full[s], (i / STAGES & 1) ^ (bug == PARITY));
        if (bug != FENCE) multiply_begin();
        for (int step = 0; step < 4; step++)
            multiply_n64(sums, matrix(tile_x + step * 32, 0, 1024, 1),
                         matrix(tile_w + s * TILE_BYTES + step * 32, 0, 1024, 1));
        multiply_commit();
        if (bug == RELEASE) {
            asm volatile("bar.sync 1, 128;" ::: "memory");
            if (t == 0) barrier_arrive(&empty[s]);
        }
        if (bug == OVERWRITE) tile_x[t * 16 + 1] ^= 0x55;
        if (bug == READ && sums[31] == 1e30f) y[0] = 0;
        if (bug != WAIT) multiply_wait<0>();
        asm volatile("bar.sync 1, 128;" ::: "memory");
        if (bug != RELEASE && t == 0) barrier_arrive(&empty[s]);
    }
    int row = blockIdx.y * 64 + t / 32 * 16 + t % 32 / 4, n = gridDim.x * 64;
    for (int i = 0; i < 32; i++)
        y[(row + i / 2 % 2 * 8) * n + blockIdx.x * 64 + i / 4 * 8 + t % 4 * 2 + i % 2] = sums[i];
}

// ---- bytes, both sides as core matrices of 8 x 16 bytes one after the other, no swizzle

extern "C" __global__ void bytes(const int8_t* a, const uint8_t* b, int* y) {
    __shared__ __align__(128) uint8_t tile_a[64 * 64], tile_b[32 * 64];  // k is 64
    const int t = threadIdx.x;
    auto place = [](int row, int k) {  // 4 core matrices along k, then the next 8 rows
        return row / 8 * 512 + k / 16 * 128 + row % 8 * 16 + k % 16;
    };
    for (int i = t; i < 64 * 64; i += 128) tile_a[place(i / 64, i % 64)] = uint8_t(a[i]);
    for (int i = t; i < 32 * 64; i += 128) tile_b[place(i / 64, i % 64)] = b[i];
    proxy_fence();
    __syncthreads();
    int d[16];
    for (int i = 0; i < 16; i++) d[i] = 1000 * i;
    multiply_begin();
    for (int step = 0; step < 2; step++) {
        uint64_t left = matrix(tile_a + step * 256, 128, 512, 0);
        uint64_t right = matrix(tile_b + step * 256, 128, 512, 0);
        asm volatile(
            "{\n.reg .pred p;\nsetp.ne.b32 p, %18, 0;\n"
            "wgmma.mma_async.sync.aligned.m64n32k32.s32.s8.u8 {" NAMES8
            ", %8, %9, %10, %11, %12, %13, %14, %15}, %16, %17, p;\n}"
            : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3]), "+r"(d[4]), "+r"(d[5]), "+r"(d[6]),
              "+r"(d[7]), "+r"(d[8]), "+r"(d[9]), "+r"(d[10]), "+r"(d[11]), "+r"(d[12]),
              "+r"(d[13]), "+r"(d[14]), "+r"(d[15])
            : "l"(left), "l"(right), "r"(step));  // the first round clears the sums
    }
    multiply_commit();
    multiply_wait<0>();
    int row = t / 32 * 16 + t % 32 / 4;
    for (int i = 0; i < 16; i++)
        y[(row + i / 2 % 2 * 8) * 32 + i / 4 * 8 + t % 4 * 2 + i % 2] = d[i];
}

// ---- A from registers, rows of B as long as a swizzle of 32, 64 or 128 bytes; bf16, n is 16

template <int WIDTH> DEVICE void from_registers(const __nv_bfloat16* a, const __nv_bfloat16* b,
                                                float* y) {
    constexpr int K = WIDTH / 2, MODE = WIDTH == 128 ? 1 : WIDTH == 64 ? 2 : 3;
    __shared__ __align__(1024) uint8_t tile[16 * WIDTH];
    const int t = threadIdx.x, row = t / 32 * 16 + t % 32 / 4;
    for (int i = t; i < 16 * WIDTH / 16; i += 128) {
        // chunks of 16 bytes by the bits of their address above the seventh
        int at = i * 16, to = at ^ ((at >> 7) % (WIDTH / 16)) << 4;
        *reinterpret_cast<int4*>(tile + to) = reinterpret_cast<const int4*>(b)[i];
    }
    proxy_fence();
    __syncthreads();
    float d[8] = {};
    uint32_t r[K / 16][4];
    for (int step = 0; step < K / 16; step++)
        for (int i = 0; i < 4; i++)
            r[step][i] = *reinterpret_cast<const uint32_t*>(
                a + (row + i % 2 * 8) * K + step * 16 + i / 2 * 8 + t % 4 * 2);
    multiply_begin();
    for (int step = 0; step < K / 16; step++)
        asm volatile("wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 {" NAMES8
                     "}, {%8, %9, %10, %11}, %12, 1, 1, -1, 0;"
                     : SUMS8(d, 0)
                     : "r"(r[step][0]), "r"(r[step][1]), "r"(r[step][2]), "r"(r[step][3]),
                       "l"(matrix(tile + step * 32, 0, 8 * WIDTH, MODE)));
    multiply_commit();
    multiply_wait<0>();
    for (int i = 0; i < 8; i++)
        y[(row + i / 2 % 2 * 8) * 16 + i / 4 * 8 + t % 4 * 2 + i % 2] = d[i];
}
extern "C" __global__ void registers_32(const __nv_bfloat16* a, const __nv_bfloat16* b, float* y) {
    from_registers<32>(a, b, y);
}
extern "C" __global__ void registers_64(const __nv_bfloat16* a, const __nv_bfloat16* b, float* y) {
    from_registers<64>(a, b, y);
}
extern "C" __global__ void registers_128(const __nv_bfloat16* a, const __nv_bfloat16* b,
                                         float* y) {
    from_registers<128>(a, b, y);
}

// ---- both sides with their rows along m and n: w[k][n], x[k][m], k is 32, m 64, n 128

extern "C" __global__ void transposed(const half* x, const half* w, float* y) {
    __shared__ __align__(1024) uint8_t tile_x[32 * 128];      // no swizzle: 8 x 8 one by one
    __shared__ __align__(1024) uint8_t tile_w[2 * 32 * 128];  // two halves of n, swizzled
    const int t = threadIdx.x;
    for (int i = t; i < 32 * 8; i += 128) {
        int k = i / 8, c = i % 8;  // along m first, then along k
        *reinterpret_cast<int4*>(tile_x + k / 8 * 1024 + c * 128 + k % 8 * 16) =
            reinterpret_cast<const int4*>(x)[i];
    }
    for (int i = t; i < 32 * 16; i += 128) {
        int k = i / 16, c = i % 16;
        *reinterpret_cast<int4*>(tile_w + c / 8 * 4096 + k * 128 + (c % 8 ^ k % 8) * 16) =
            reinterpret_cast<const int4*>(w)[i];
    }
    proxy_fence();
    __syncthreads();
    float d[64] = {};
    multiply_begin();
    for (int step = 0; step < 2; step++)
        asm volatile(
            "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 {" NAMES32
            ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
            "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
            "%64, %65, 1, 1, 1, 1, 1;"
            : SUMS8(d, 0), SUMS8(d, 8), SUMS8(d, 16), SUMS8(d, 24), SUMS8(d, 32), SUMS8(d, 40),
              SUMS8(d, 48), SUMS8(d, 56)
            : "l"(matrix(tile_x + step * 2048, 1024, 128, 0)),
              "l"(matrix(tile_w + step * 2048, 4096, 1024, 1)));
    multiply_commit();
    multiply_wait<0>();
    int row = t / 32 * 16 + t % 32 / 4;
    for (int i = 0; i < 64; i++)
        y[(row + i / 2 % 2 * 8) * 128 + i / 4 * 8 + t % 4 * 2 + i % 2] = d[i];
}

// ---- mbarriers alone: rounds between two warps, by state; and cp.async that arrives at one

extern "C" __global__ void by_state(const int* x, int* y, int rounds) {
    __shared__ uint64_t bar;
    __shared__ int cell[64];
    const int t = threadIdx.x;
    if (t == 0) barrier_make(&bar, 64);
    __syncthreads();
    int sum = 0;
    for (int i = 0; i < rounds; i++) {
        uint64_t state;
        cell[t] = x[i * 64 + t];
        asm volatile("mbarrier.arrive.shared::cta.b64 %0, [%1];"
                     : "=l"(state)
                     : "r"(shared_address(&bar))
                     : "memory");
        while (!barrier_test(&bar, state)) {}
        sum += cell[63 - t];
        asm volatile("mbarrier.arrive.shared::cta.b64 %0, [%1];"
                     : "=l"(state)
                     : "r"(shared_address(&bar))
                     : "memory");
        while (!barrier_test(&bar, state)) {}
    }
    y[t] = sum;
    __syncthreads();
    if (t == 0) asm volatile("mbarrier.inval.shared::cta.b64 [%0];" ::"r"(shared_address(&bar)));
}

extern "C" __global__ void tracked(const int4* x, int4* y) {
    __shared__ uint64_t bar;
    __shared__ int4 tile[64];
    const int t = threadIdx.x;
    if (t == 0) barrier_make(&bar, 64);
    __syncthreads();
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(&tile[t])),
                 "l"(x + t));
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(
        shared_address(&bar)));
    barrier_wait(&bar, 0);
    y[t] = tile[63 - t];
}

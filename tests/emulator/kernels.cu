// Kernels in several people's styles, none of them kernelgen's: they must run as on a GPU.
#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

namespace cg = cooperative_groups;

// ---- inclusive scan of a block by warp shuffles

__device__ __forceinline__ int warp_scan(int v) {
    const int lane = threadIdx.x & 31;
#pragma unroll
    for (int by = 1; by < 32; by <<= 1) {
        int left = __shfl_up_sync(0xffffffffu, v, by);
        if (lane >= by) v += left;
    }
    return v;
}

extern "C" __global__ void __launch_bounds__(256) scan(const int* __restrict__ x, int* y, int n) {
    __shared__ int sums[8];
    int i = blockIdx.x * blockDim.x + threadIdx.x, warp = threadIdx.x >> 5;
    int v = warp_scan(i < n ? x[i] : 0);
    if ((threadIdx.x & 31) == 31) sums[warp] = v;
    __syncthreads();
    if (warp == 0) {
        int s = threadIdx.x < 8 ? sums[threadIdx.x] : 0;
        s = warp_scan(s);
        if (threadIdx.x < 8) sums[threadIdx.x] = s;
    }
    __syncthreads();
    if (i < n) y[i] = v + (warp ? sums[warp - 1] : 0);
}

// ---- GEMM: 64 x 64 tiles, k by 32, two stages of cp.async, ldmatrix, mma.m16n8k16

namespace gemm {
constexpr int TILE = 64, DEPTH = 32, PITCH = DEPTH + 8, PITCH_B = TILE + 8;

__device__ __forceinline__ unsigned shared_address(const void* p) {
    return static_cast<unsigned>(__cvta_generic_to_shared(p));
}
__device__ __forceinline__ void copy16(void* to, const void* from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;\n" ::"r"(shared_address(to)),
                 "l"(from));
}
__device__ __forceinline__ void commit() { asm volatile("cp.async.commit_group;\n" ::); }
template <int left> __device__ __forceinline__ void wait() {
    asm volatile("cp.async.wait_group %0;\n" ::"n"(left));
}
__device__ __forceinline__ void load4(uint32_t (&r)[4], const void* p) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(p)));
}
__device__ __forceinline__ void load2_trans(uint32_t (&r)[2], const void* p) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];\n"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(shared_address(p)));
}
__device__ __forceinline__ void multiply(float (&c)[4], const uint32_t (&a)[4],
                                         const uint32_t (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
}  // namespace gemm

// c[m][n] = a[m][k] b[k][n]; m, n in 64s, k in 32s; 4 warps, each 16 rows
extern "C" __global__ void __launch_bounds__(128)
    matmul(const half* __restrict__ a, const half* __restrict__ b, float* c, int m, int n, int k) {
    using namespace gemm;
    __shared__ __align__(16) half tile_a[2][TILE][PITCH];
    __shared__ __align__(16) half tile_b[2][DEPTH][PITCH_B];
    const int t = threadIdx.x, lane = t % 32, warp = t / 32;
    const int row = blockIdx.y * TILE, column = blockIdx.x * TILE;
    float sums[8][4] = {};

    auto fetch = [&](int stage, int at) {
        for (int i = t; i < TILE * DEPTH / 8; i += 128) {
            int r = i / (DEPTH / 8), q = i % (DEPTH / 8) * 8;
            copy16(&tile_a[stage][r][q], &a[(row + r) * k + at + q]);
        }
        for (int i = t; i < TILE * DEPTH / 8; i += 128) {
            int r = i / (TILE / 8), q = i % (TILE / 8) * 8;
            copy16(&tile_b[stage][r][q], &b[(at + r) * n + column + q]);
        }
        commit();
    };

    fetch(0, 0);
    for (int at = 0, stage = 0; at < k; at += DEPTH, stage ^= 1) {
        if (at + DEPTH < k) fetch(stage ^ 1, at + DEPTH);
        else commit();
        wait<1>();
        __syncthreads();
#pragma unroll
        for (int step = 0; step < DEPTH; step += 16) {
            uint32_t fa[4], fb[2];
            load4(fa, &tile_a[stage][warp * 16 + lane % 16][step + lane / 16 * 8]);
            for (int j = 0; j < 8; j++) {
                load2_trans(fb, &tile_b[stage][step + lane % 16][j * 8]);
                multiply(sums[j], fa, fb);
            }
        }
        __syncthreads();
    }
    for (int j = 0; j < 8; j++) {
        int r = row + warp * 16 + lane / 4, q = column + j * 8 + lane % 4 * 2;
        *reinterpret_cast<float2*>(&c[r * n + q]) = make_float2(sums[j][0], sums[j][1]);
        *reinterpret_cast<float2*>(&c[(r + 8) * n + q]) = make_float2(sums[j][2], sums[j][3]);
    }
}

// ---- sum of everything: tree in shared memory, shuffles, then an atomic of each block

extern "C" __global__ void reduce(const float* x, float* sum, int* largest, int n) {
    extern __shared__ float partial[];
    float v = 0;
    int most = INT_MIN;
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) {
        v += x[i];
        most = max(most, __float_as_int(x[i]));
    }
    partial[threadIdx.x] = v;
    __syncthreads();
    for (unsigned s = blockDim.x / 2; s > 16; s >>= 1) {
        if (threadIdx.x < s) partial[threadIdx.x] += partial[threadIdx.x + s];
        __syncthreads();
    }
    if (threadIdx.x < 32) {
        v = partial[threadIdx.x];
        for (int by = 16; by; by /= 2) v += __shfl_down_sync(~0u, v, by);
        if (threadIdx.x == 0) atomicAdd(sum, v);
    }
    atomicMax(largest, most);
}

// ---- a histogram in shared memory, then in global memory

extern "C" __global__ void histogram(const unsigned char* x, unsigned* bins, int n) {
    __shared__ unsigned local[256];
    for (int i = threadIdx.x; i < 256; i += blockDim.x) local[i] = 0;
    __syncthreads();
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x)
        atomicAdd(&local[x[i]], 1u);
    __syncthreads();
    for (int i = threadIdx.x; i < 256; i += blockDim.x) atomicAdd(&bins[i], local[i]);
}

// ---- blocks in a row: each waits for the one before it, as split sums do

__device__ unsigned tickets;

extern "C" __global__ void in_turn(int* turn, int* values, unsigned* drawn) {
    __shared__ int before;
    if (threadIdx.x == 0) {
        drawn[atomicAdd(&tickets, 1u)] = 1;
        while (atomicAdd(turn, 0) != (int)blockIdx.x) {}
        __threadfence();
        before = blockIdx.x ? ((volatile int*)values)[blockIdx.x - 1] : 0;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        values[blockIdx.x] = before + (int)blockIdx.x + 1;
        __threadfence();
        atomicExch(turn, (int)blockIdx.x + 1);
    }
}

// ---- votes, groups, masks of parts of a warp

extern "C" __global__ void votes(const int* x, unsigned* y) {
    int t = threadIdx.x, lane = t % 32;
    y[t] = __ballot_sync(0xffffffff, x[t] > 0);
    y[64 + t] = __match_any_sync(0xffffffff, x[t]);
    if (lane < 8) y[128 + t] = __reduce_add_sync(0x000000ff, x[t]);
    else y[128 + t] = __shfl_sync(0xffffff00, x[t], 8);
    auto tile = cg::tiled_partition<4>(cg::this_thread_block());
    y[192 + t] = tile.shfl_xor(x[t], 1) + 100 * tile.thread_rank();
    y[256 + t] = __syncthreads_count(x[t] > 0) * 10 + __syncthreads_or(t == 5);
}

// ---- 16-bit floats and words of small integers

extern "C" __global__ void small_floats(const half2* h, const __nv_bfloat162* b, float* y) {
    int t = threadIdx.x;
    half2 p = __hfma2(h[t], __float2half2_rn(0.5f), __halves2half2(__float2half(1.f), h[t].x));
    float2 f = __half22float2(p);
    __nv_bfloat162 q = __hadd2(b[t], __float2bfloat162_rn(3.f));
    y[4 * t] = f.x;
    y[4 * t + 1] = f.y;
    y[4 * t + 2] = __low2float(q);
    y[4 * t + 3] = __bfloat162float(q.y) + (float)(h[t].x * h[t].y);
}

extern "C" __global__ void integers(const int* a, const unsigned* b, int* y) {
    int t = threadIdx.x;
    y[4 * t] = __dp4a(a[t], (int)b[t], 7);
    y[4 * t + 1] = (int)__byte_perm(a[t], b[t], 0x6521);
    y[4 * t + 2] = (int)__vsubss4(a[t], b[t]);
    y[4 * t + 3] = __popc(b[t]) + __clz(a[t]) + (int)__brev(b[t]);
}

// ---- templates and a struct by value

struct Affine {
    float scale;
    int shift;
    const float* bias;
};

template <typename T, int N> __global__ void affine(const T* x, T* y, Affine f) {
    for (int i = threadIdx.x; i < N; i += blockDim.x) y[i] = x[i] * f.scale + f.shift + f.bias[i];
}
template __global__ void affine<float, 40>(const float*, float*, Affine);

// ---- barriers of fewer threads than the block: pairs of warps, then single warps

extern "C" __global__ void pairs(const int* x, int* y) {
    __shared__ int tile[128], sums[4];
    int t = threadIdx.x, pair = t / 64;
    tile[t] = x[t];
    asm volatile("bar.sync %0, %1;" ::"r"(pair + 1), "r"(64) : "memory");
    int v = tile[pair * 64 + 63 - t % 64];
    if (t % 32 == 0) sums[t / 32] = v;
    __syncwarp();
    y[t] = v + sums[t / 32];
}

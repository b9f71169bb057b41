// Metal kernels in the styles of other projects
#include <metal_stdlib>
#include <metal_simdgroup_matrix>
using namespace metal;

#define QK8_0 32
struct block_q8_0 {
    half d;
    int8_t qs[QK8_0];
};

struct Sizes {
    uint rows, k;
};

// one row per simdgroup: each lane takes blocks in turn, then the lanes' sums are added
kernel void mul_mv_q8_0(device const block_q8_0* weights [[buffer(0)]],
                        device const float* x [[buffer(1)]],
                        device float* y [[buffer(2)]],
                        constant Sizes& sizes [[buffer(3)]],
                        uint3 tgpig [[threadgroup_position_in_grid]],
                        ushort lane [[thread_index_in_simdgroup]],
                        ushort sg [[simdgroup_index_in_threadgroup]]) {
    const uint row = tgpig.x * 2 + sg;
    if (row >= sizes.rows) return;
    const uint blocks = sizes.k / QK8_0;
    device const block_q8_0* w = weights + row * blocks;
    float sum = 0.f;
    for (uint i = lane; i < blocks; i += 32) {
        float part = 0.f;
        for (short j = 0; j < QK8_0; ++j) part += w[i].qs[j] * x[i * QK8_0 + j];
        sum += part * w[i].d;
    }
    const float all = simd_sum(sum);
    if (lane == 0) y[row] = all;
}

// c = a b: 32 x 32 per threadgroup of four simdgroups, each 16 x 16 in 8 x 8 pieces
template <typename T>
inline void stage(device const T* from, threadgroup T* to, uint pitch, uint t) {
    for (uint i = t; i < 32 * 16; i += 128) to[i] = from[(i / 16) * pitch + i % 16];
}

kernel void mul_mm(device const half* a [[buffer(0)]], device const half* b [[buffer(1)]],
                   device float* c [[buffer(2)]], constant uint& n [[buffer(3)]],
                   constant uint& k [[buffer(4)]], threadgroup half* shared [[threadgroup(0)]],
                   uint2 tile [[threadgroup_position_in_grid]],
                   uint t [[thread_index_in_threadgroup]],
                   uint sg [[simdgroup_index_in_threadgroup]]) {
    threadgroup half* tile_a = shared;
    threadgroup half tile_b[16 * 32];
    simdgroup_float8x8 sums[2][2];
    for (int i = 0; i < 2; i++)
        for (int j = 0; j < 2; j++) sums[i][j] = make_filled_simdgroup_matrix<float, 8, 8>(0.f);
    for (uint at = 0; at < k; at += 16) {
        stage(a + tile.y * 32 * k + at, tile_a, k, t);
        for (uint i = t; i < 16 * 32; i += 128)
            tile_b[i] = b[(at + i / 32) * n + tile.x * 32 + i % 32];
        threadgroup_barrier(mem_flags::mem_threadgroup);
        for (uint q = 0; q < 16; q += 8) {
            simdgroup_half8x8 ma[2], mb[2];
            for (uint i = 0; i < 2; i++) {
                simdgroup_load(ma[i], tile_a + ((sg / 2) * 16 + i * 8) * 16 + q, 16);
                simdgroup_load(mb[i], tile_b + q * 32 + (sg % 2) * 16 + i * 8, 32);
            }
            for (int i = 0; i < 2; i++)
                for (int j = 0; j < 2; j++)
                    simdgroup_multiply_accumulate(sums[i][j], ma[i], mb[j], sums[i][j]);
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);
    }
    for (uint i = 0; i < 2; i++)
        for (uint j = 0; j < 2; j++)
            simdgroup_store(sums[i][j], c, n,
                            ulong2(tile.x * 32 + sg % 2 * 16 + j * 8,
                                   tile.y * 32 + sg / 2 * 16 + i * 8));
}

// softmax of a row: reductions of simdgroups, then of their results; bfloat out
kernel void softmax(device const float4* x [[buffer(0)]], device bfloat* y [[buffer(1)]],
                    device atomic_uint* done [[buffer(2)]], constant uint& n [[buffer(3)]],
                    uint row [[threadgroup_position_in_grid]],
                    uint t [[thread_position_in_threadgroup]],
                    uint threads [[threads_per_threadgroup]],
                    uint lane [[thread_index_in_simdgroup]],
                    uint sg [[simdgroup_index_in_threadgroup]]) {
    threadgroup float partial[32];
    device const float4* from = x + row * (n / 4);
    float4 most = float4(-INFINITY);
    for (uint i = t; i < n / 4; i += threads) most = max(most, from[i]);
    float top = simd_max(max(max(most.x, most.y), max(most.z, most.w)));
    if (lane == 0) partial[sg] = top;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    top = simd_max(lane < threads / 32 ? partial[lane] : -INFINITY);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    float4 parts = 0.f;
    for (uint i = t; i < n / 4; i += threads) parts += exp(from[i] - top);
    float sum = simd_sum(dot(parts, float4(1.0)));
    if (lane == 0) partial[sg] = sum;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    sum = simd_sum(lane < threads / 32 ? partial[lane] : 0.f);
    for (uint i = t; i < n / 4; i += threads) {
        const float4 v = fast::exp(from[i] - top) / sum;
        for (int j = 0; j < 4; j++) y[row * n + 4 * i + j] = bfloat(v[j]);
    }
    if (t == 0) atomic_fetch_add_explicit(done, 1, memory_order_relaxed);
}

// ---- bugs; `// BUG` marks the line

kernel void missing_barrier(device const float* x [[buffer(0)]], device float* y [[buffer(1)]],
                            uint t [[thread_position_in_threadgroup]]) {
    threadgroup float tile[64];
    tile[t] = x[t];
    y[t] = tile[63 - t];  // BUG
}

kernel void early_return(device const float* x [[buffer(0)]], device float* y [[buffer(1)]],
                         uint t [[thread_position_in_threadgroup]]) {
    threadgroup float tile[64];
    tile[t] = x[t];
    if (t > 50) return;
    threadgroup_barrier(mem_flags::mem_threadgroup);  // BUG
    y[t] = tile[50 - t];
}

kernel void too_far(device const float* x [[buffer(0)]], device float* y [[buffer(1)]],
                    uint t [[thread_position_in_threadgroup]]) {
    y[t] = x[t + 1];  // BUG
}

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

// counts of 64 kinds of values: a threadgroup counts in its own memory, then adds to those of all
kernel void histogram(device const uchar* x [[buffer(0)]], device atomic_uint* counts [[buffer(1)]],
                      constant uint& n [[buffer(2)]], uint i [[thread_position_in_grid]],
                      uint t [[thread_position_in_threadgroup]],
                      uint threads [[threads_per_grid]]) {
    threadgroup atomic_uint local[64];
    if (t < 64) atomic_store_explicit(&local[t], 0u, memory_order_relaxed);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (; i < n; i += threads)
        atomic_fetch_add_explicit(&local[x[i] & 63], 1u, memory_order_relaxed);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (t < 64) {
        const uint count = atomic_load_explicit(&local[t], memory_order_relaxed);
        atomic_fetch_add_explicit(&counts[t], count, memory_order_relaxed);
    }
}

// running sums of each row: shuffles within a simdgroup, the simdgroups' sums by the first of them
kernel void running_sums(device const int2* x [[buffer(0)]], device int2* y [[buffer(1)]],
                         uint row [[threadgroup_position_in_grid]],
                         uint t [[thread_index_in_threadgroup]],
                         uint threads [[threads_per_threadgroup]],
                         ushort lane [[thread_index_in_simdgroup]],
                         ushort sg [[simdgroup_index_in_threadgroup]],
                         ushort simds [[simdgroups_per_threadgroup]]) {
    threadgroup int sums[32];
    const int2 mine = x[row * threads + t];
    int sum = mine.x + mine.y;
    for (ushort step = 1; step < 32; step <<= 1) {
        const int below = simd_shuffle_up(sum, step);
        sum += select(0, below, lane >= step);
    }
    if (lane == 31) sums[sg] = sum;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (sg == 0) {
        const int other = lane < simds ? sums[lane] : 0;
        const int before = simd_prefix_exclusive_sum(other);
        if (lane < simds) sums[lane] = before;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    sum += sums[sg];
    y[row * threads + t] = int2(sum - mine.y, sum);
}

// c = a b^T of bfloat, 16 x 16 for a simdgroup of its own; the next tiles are loaded by vectors of
// four while these are multiplied
kernel void mul_mm_ahead(device const bfloat4* a [[buffer(0)]],
                         device const bfloat4* b [[buffer(1)]], device float* c [[buffer(2)]],
                         constant uint2& size [[buffer(3)]],
                         uint2 tile [[threadgroup_position_in_grid]],
                         uint lane [[thread_index_in_simdgroup]]) {
    threadgroup bfloat4 tiles[2][2][64];
    const uint fours = size.y / 4, from = (lane / 4) * fours + lane % 4;
    device const bfloat4* rows_a = a + tile.y * 16 * fours + from;
    device const bfloat4* rows_b = b + tile.x * 16 * fours + from;
    simdgroup_matrix<float, 8, 8> sums[4];
    for (uint i = 0; i < 4; i++) sums[i] = make_filled_simdgroup_matrix<float, 8, 8>(0.f);
    for (uint half_tile = 0; half_tile < 2; half_tile++) {
        tiles[0][0][half_tile * 32 + lane] = rows_a[half_tile * 8 * fours];
        tiles[0][1][half_tile * 32 + lane] = rows_b[half_tile * 8 * fours];
    }
    for (uint k = 0, now = 0; k < fours; k += 4, now ^= 1) {
        simdgroup_barrier(mem_flags::mem_threadgroup);
        if (k + 4 < fours) {
            for (uint half_tile = 0; half_tile < 2; half_tile++) {
                const uint at = half_tile * 8 * fours + k + 4;
                tiles[now ^ 1][0][half_tile * 32 + lane] = rows_a[at];
                tiles[now ^ 1][1][half_tile * 32 + lane] = rows_b[at];
            }
        }
        threadgroup const bfloat* left = (threadgroup const bfloat*)tiles[now][0];
        threadgroup const bfloat* right = (threadgroup const bfloat*)tiles[now][1];
        for (uint q = 0; q < 16; q += 8) {
            for (uint i = 0; i < 4; i++) {
                simdgroup_matrix<bfloat, 8, 8> m, n;
                simdgroup_load(m, left, 16, ulong2(q, i / 2 * 8));
                simdgroup_load(n, right, 16, ulong2(q, i % 2 * 8), true);
                simdgroup_multiply_accumulate(sums[i], m, n, sums[i]);
            }
        }
    }
    for (uint i = 0; i < 4; i++)
        simdgroup_store(sums[i], c, size.x,
                        ulong2(tile.x * 16 + i % 2 * 8, tile.y * 16 + i / 2 * 8));
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

kernel void some_lanes(device const float* x [[buffer(0)]], device float* y [[buffer(1)]],
                       uint t [[thread_position_in_threadgroup]],
                       uint lane [[thread_index_in_simdgroup]]) {
    y[t] = x[t];
    if (lane < 20) y[t] = simd_sum(x[t]);
    threadgroup_barrier(mem_flags::mem_device);  // BUG: the others wait here
}

kernel void tile_of_another(device const float* x [[buffer(0)]], device float* y [[buffer(1)]],
                            uint t [[thread_position_in_threadgroup]],
                            uint sg [[simdgroup_index_in_threadgroup]]) {
    threadgroup float tile[2][64];
    tile[t / 32][t % 32] = tile[t / 32][32 + t % 32] = x[t];
    simdgroup_barrier(mem_flags::mem_threadgroup);
    simdgroup_float8x8 m;
    simdgroup_load(m, tile[1 - sg], 8);  // BUG
    simdgroup_store(m, y, 8);
}

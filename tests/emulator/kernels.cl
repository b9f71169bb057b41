// OpenCL with what PoCL lacks: arithmetic on half, sub-groups of any size, integer dot products
#pragma OPENCL EXTENSION cl_khr_fp16 : enable
#pragma OPENCL EXTENSION cl_khr_subgroups : enable

#define TILE 64

typedef struct {
    half d;
    char qs[32];
} block_q8_0;

// a row per sub-group
__kernel void row_sums(__global const half *restrict x, __global float *restrict y, const uint k,
                       const uint rows) {
    const uint row = get_group_id(0) * get_num_sub_groups() + get_sub_group_id();
    if (row >= rows) return;
    half2 sum = (half2)(0.0h, 0.0h);
    for (uint i = get_sub_group_local_id(); i < k / 2; i += get_sub_group_size())
        sum = fma(vload2(i, x + row * k), (half2)(1.0h), sum);
    const float all = sub_group_reduce_add((float)sum.x + (float)sum.y);
    if (get_sub_group_local_id() == 0) y[row] = all;
}

// shuffles: the sum of neighbours, a scan, a broadcast
__kernel void shuffles(__global const int *x, __global int4 *y) {
    const size_t i = get_global_id(0);
    const int v = x[i];
    y[i] = (int4)(v + sub_group_shuffle_xor(v, 1), sub_group_scan_inclusive_add(v),
                  sub_group_broadcast(v, 2), sub_group_scan_exclusive_add(v));
}

__attribute__((reqd_work_group_size(64, 1, 1)))
__kernel void dots(__global const uint *a, __global const uint *b, __global int *y) {
    const size_t i = get_global_id(0);
    int sum = dot_acc_sat_4x8packed_ss_int(a[i], b[i], 100);
    sum += dot_4x8packed_us_int(a[i], b[i]);
    y[i] = sum + dot(as_char4(a[i]), as_char4(b[i])) + convert_int_rte(2.5f);
}

// a tree in local memory whose size the launch gives, and an atomic
__kernel void total(__global const float *x, __global int *sum, __local int *partial, int n) {
    const uint t = get_local_id(0);
    int v = 0;
    for (int i = get_global_id(0); i < n; i += get_global_size(0)) v += convert_int(x[i]);
    partial[t] = v;
    barrier(CLK_LOCAL_MEM_FENCE);
    for (uint s = get_local_size(0) / 2; s > 0; s >>= 1) {
        if (t < s) partial[t] += partial[t + s];
        barrier(CLK_LOCAL_MEM_FENCE);
    }
    if (t == 0) atomic_add(sum, partial[0]);
}

__kernel void transpose(__global const float *x, __global float *y) {
    __local float tile[16][17];
    const int c = get_local_id(0), r = get_local_id(1);
    tile[r][c] = x[get_global_id(1) * get_global_size(0) + get_global_id(0)];
    barrier(CLK_LOCAL_MEM_FENCE);
    y[(get_group_id(0) * 16 + r) * get_global_size(1) + get_group_id(1) * 16 + c] = tile[c][r];
}

// ---- bugs; `// BUG` marks the line

__kernel void missing_barrier(__global const float *x, __global float *y) {
    __local float tile[TILE];
    const uint t = get_local_id(0);
    tile[t] = x[t];
    y[t] = tile[TILE - 1 - t];  // BUG
}

__kernel void divergent_shuffle(__global const float *x, __global float *y) {
    const uint t = get_local_id(0);
    float v = x[t];
    if (t % 4 != 0) v = sub_group_shuffle_xor(v, 1);  // BUG
    else barrier(CLK_LOCAL_MEM_FENCE);  // BUG
    y[t] = v;
}

__kernel void unwritten(__global const float *x, __global float *y, __local float *tmp) {
    const uint t = get_local_id(0);
    if (t != 7) tmp[t] = x[t];
    barrier(CLK_LOCAL_MEM_FENCE);
    y[t] = tmp[t];  // BUG
}

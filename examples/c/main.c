// Multiplies by a quantized matrix with kernels from generated/c: no Python, no library.
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernelgen.h"

enum { M = 3, N = 100, K = 512, BLOCK = 32, BLOCK_BYTES = 34, BLOCKS = N * K / BLOCK };

static float weights[N * K], x[M * K], y[M * N], values[N * K];
static uint8_t blocks[BLOCKS * BLOCK_BYTES];

// A positive float as an IEEE half, rounded to the nearest; small and huge numbers are left out.
static uint16_t to_half(float positive) {
    uint32_t bits;
    memcpy(&bits, &positive, sizeof bits);
    return (uint16_t)((bits + 0x0FFF + ((bits >> 13) & 1)) >> 13) - (112 << 10);
}

// A block of q8_0: a half, the scale, and 32 signed bytes.
static void quantize(const float *from, uint8_t *block) {
    float largest = 1e-4f;
    for (int i = 0; i < BLOCK; i++) largest = fmaxf(largest, fabsf(from[i]));
    const uint16_t scale = to_half(largest / 127);
    memcpy(block, &scale, sizeof scale);
    for (int i = 0; i < BLOCK; i++) block[2 + i] = (uint8_t)(int8_t)lrintf(from[i] / largest * 127);
}

// Root mean square of y - x * matrix^T, relative to that of the product itself.
static double error(const float *matrix) {
    double difference = 0, product = 0;
    for (int m = 0; m < M; m++)
        for (int n = 0; n < N; n++) {
            double sum = 0;
            for (int k = 0; k < K; k++) sum += (double)x[m * K + k] * matrix[n * K + k];
            difference += (y[m * N + n] - sum) * (y[m * N + n] - sum);
            product += sum * sum;
        }
    return sqrt(difference / product);
}

static int report(const char *what, double seen, double allowed) {
    printf("%-44s %.1e  (allowed %.0e)\n", what, seen, allowed);
    return !(seen <= allowed);
}

int main(void) {
    for (int i = 0; i < N * K; i++) weights[i] = (float)rand() / (float)RAND_MAX - 0.5f;
    for (int i = 0; i < M * K; i++) x[i] = (float)rand() / (float)RAND_MAX - 0.5f;
    for (int b = 0; b < BLOCKS; b++) quantize(weights + b * BLOCK, blocks + b * BLOCK_BYTES);
    kernelgen_dequantize_q8_0(blocks, values, BLOCKS);

    // once for each matrix: rows of a tile side by side
    uint8_t *tiles = malloc((size_t)kernelgen_prepare_q8_0_bytes(N, K));
    uint8_t *scratch = malloc((size_t)kernelgen_matvec_q8_0_int8_scratch(M, K));
    if (!tiles || !scratch) return 1;
    kernelgen_prepare_q8_0(blocks, tiles, N, K);

    kernelgen_matvec_q8_0_fp32(x, tiles, y, M, N, K);
    int failed = report("float activations, against the same weights", error(values), 1e-6);
    kernelgen_matvec_q8_0_int8(x, tiles, y, scratch, M, N, K);
    failed += report("int8 activations, against the same weights", error(values), 1e-2);
    failed += report("int8 activations, against the exact weights", error(weights), 1e-2);
    free(tiles);
    free(scratch);
    return failed;
}

// Multiplies by a q8_0 matrix with the library of `kernelgen build --package --target c`.
#include <kernelgen.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { M = 3, N = 100, K = 512 };

static float values[N * K], x[M * K], y[M * N];

static void stop_at(int status) {
    if (status >= 0) return;
    fprintf(stderr, "%s\n", kernelgen_message(status));
    exit(1);
}

int main(void) {
    const int format = kernelgen_format_named("q8_0");
    stop_at(format);
    // blocks as a file has them: a scale, here 2^-8 as a half, and 32 signed bytes
    const int64_t bytes = N * K / kernelgen_block(format) * kernelgen_block_bytes(format);
    uint8_t *blocks = malloc((size_t)bytes);
    for (int64_t i = 0; i < bytes; i++) blocks[i] = (uint8_t)rand();
    const uint16_t scale = 0x1C00;
    for (int64_t i = 0; i < bytes; i += kernelgen_block_bytes(format)) memcpy(blocks + i, &scale, 2);
    for (int i = 0; i < M * K; i++) x[i] = (float)rand() / (float)RAND_MAX - 0.5f;

    // once for each matrix, for the instruction set in use
    uint8_t *tiles = malloc((size_t)kernelgen_prepared_bytes(format, N, K));
    stop_at(kernelgen_prepare(format, blocks, tiles, N, K));
    kernelgen_dequantize_q8_0(blocks, values, N * K / kernelgen_block(format));

    int failed = 0;
    for (int precision = KERNELGEN_AUTO; precision <= KERNELGEN_FP32; precision++) {
        const int64_t wanted = kernelgen_scratch_bytes(format, precision, M, N, K);
        stop_at((int)wanted);
        uint8_t *scratch = wanted ? malloc((size_t)wanted) : NULL;
        stop_at(kernelgen_matmul(format, precision, x, tiles, y, scratch, M, N, K));
        double difference = 0, product = 0;
        for (int m = 0; m < M; m++)
            for (int n = 0; n < N; n++) {
                double sum = 0;
                for (int k = 0; k < K; k++) sum += (double)x[m * K + k] * values[n * K + k];
                difference += (y[m * N + n] - sum) * (y[m * N + n] - sum);
                product += sum * sum;
            }
        const double error = sqrt(difference / product), allowed = precision ? 1e-6 : 2e-2;
        printf("%s, %s: error %.1e (allowed %.0e)\n", kernelgen_isa(),
               kernelgen_choose(format, precision, M, N, K), error, allowed);
        failed |= !(error <= allowed);
        free(scratch);
    }
    free(tiles);
    free(blocks);
    return failed;
}

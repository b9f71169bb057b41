// What this machine can do at most: bytes read in a second, and products of bytes in registers.
// Compiled by bench/cpu_limits.py for the instruction set whose kernels are measured.

#include <omp.h>
#include <stdint.h>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

// the widest register, whatever it is: loads of 64 bytes
typedef uint64_t line __attribute__((vector_size(64), aligned(64)));

enum { STREAMS_MOST = 8 };

// Reads every cache line of `bytes` once, and gives a value that depends on all of them.  Each
// thread has a contiguous part, which it reads in `streams` places at a time, `ahead` lines before
// they are needed where that is not 0.
uint64_t read_all(const uint8_t *data, int64_t bytes, int64_t streams, int64_t ahead)
{
    uint64_t result = 0;
#pragma omp parallel reduction(^ : result)
    {
        const int64_t lines = bytes / 64, threads = omp_get_num_threads();
        const int64_t share = lines / threads / streams, me = omp_get_thread_num();
        const line *from = (const line *)data + me * share * streams;
        line sum[STREAMS_MOST] = {0};
        for (int64_t i = 0; i < share; i++)
            for (int64_t s = 0; s < streams; s++) {
                const line *at = from + s * share + i;
                if (ahead)
                    __builtin_prefetch(at + ahead);
                sum[s] ^= *at;
            }
        for (int s = 0; s < STREAMS_MOST; s++)
            for (int i = 0; i < 8; i++)
                result ^= sum[s][i];
    }
    return result;
}

// Each does `rounds` rounds in every thread and gives the multiplications and additions of one
// round of one thread, 0 where the instruction set has no such instruction.  `sink` gets what keeps
// the compiler from leaving them out.

#if defined(__AVX512VNNI__) || defined(__AVXVNNI__) || defined(__AVX2__) ||                       \
    defined(__ARM_FEATURE_DOTPROD)
// as many sums as hide the latency of the instruction
enum { SUMS = 10 };
#endif

#if defined(__AVX512VNNI__)
typedef __m512i vector;
static inline vector dot(vector sum, vector a, vector b) { return _mm512_dpbusd_epi32(sum, a, b); }
#elif defined(__AVXVNNI__)
typedef __m256i vector;
static inline vector dot(vector sum, vector a, vector b)
{
    return _mm256_dpbusd_avx_epi32(sum, a, b);
}
#elif defined(__AVX2__)
// products of bytes in sums of 16 bits, which is how far the codes of most formats let them grow
typedef __m256i vector;
static inline vector dot(vector sum, vector a, vector b)
{
    return _mm256_add_epi16(sum, _mm256_maddubs_epi16(a, b));
}
#elif defined(__ARM_FEATURE_DOTPROD)
typedef int32x4_t vector;
static inline vector dot(vector sum, vector a, vector b)
{
    return vdotq_s32(sum, vreinterpretq_s8_s32(a), vreinterpretq_s8_s32(b));
}
#endif

int64_t dot_vectors(int64_t rounds, int32_t *sink)
{
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__) || defined(__AVX2__) ||                       \
    defined(__ARM_FEATURE_DOTPROD)
    int32_t result = 0;
#pragma omp parallel reduction(+ : result)
    {
        vector sums[SUMS], a = {1}, b = {2};
        for (int i = 0; i < SUMS; i++)
            sums[i] = a;
        for (int64_t r = 0; r < rounds; r++) {
#pragma GCC unroll 16
            for (int i = 0; i < SUMS; i++)
                sums[i] = dot(sums[i], a, b);
            __asm__ volatile("" ::: "memory");
        }
        for (int i = 0; i < SUMS; i++)
            result += (int32_t)sums[i][0];
    }
    *sink = result;
    return 2 * SUMS * (int64_t)sizeof(vector);
#else
    (void)rounds, (void)sink;
    return 0;
#endif
}

int64_t dot_tiles(int64_t rounds, int32_t *sink)
{
#if defined(__AMX_INT8__)
    enum { ROWS = 16, BYTES = 64, TILES = 4 };
    int32_t result = 0;
#pragma omp parallel reduction(+ : result)
    {
        struct {
            uint8_t palette, start, reserved[14];
            uint16_t bytes[16];
            uint8_t rows[16];
        } config = {.palette = 1};
        int8_t data[ROWS * BYTES] = {1};
        int32_t sums[ROWS * BYTES / 4];
        for (int i = 0; i < 8; i++) {
            config.bytes[i] = BYTES;
            config.rows[i] = ROWS;
        }
        __asm__ volatile("" ::: "memory");
        _tile_loadconfig(&config);
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        _tile_loadd(4, data, BYTES);
        _tile_loadd(5, data, BYTES);
        _tile_loadd(6, data, BYTES);
        _tile_loadd(7, data, BYTES);
        for (int64_t r = 0; r < rounds; r++) {
            _tile_dpbusd(0, 4, 6);
            _tile_dpbusd(1, 4, 7);
            _tile_dpbusd(2, 5, 6);
            _tile_dpbusd(3, 5, 7);
        }
        _tile_stored(3, sums, BYTES);
        _tile_release();
        result += sums[0];
    }
    *sink = result;
    return 2 * TILES * (int64_t)ROWS * ROWS * BYTES;
#else
    (void)rounds, (void)sink;
    return 0;
#endif
}

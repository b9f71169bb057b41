// Words of kernelgen in CUDA C++. No header is included, so that NVRTC needs none.
#define i32(x) ((int)(x))
#define u32(x) ((unsigned int)(x))
#define f32(x) ((float)(x))
#define f32_bits(x) __float_as_uint(x)
#define bits_f32(x) __uint_as_float(x)
#define nearest(x) rintf(x)

typedef const unsigned char *bytes;

static __device__ __forceinline__ unsigned int u16_bytes(bytes p) { return p[0] | p[1] << 8; }
static __device__ __forceinline__ unsigned int u16_aligned(bytes p) {
    return *(const unsigned short *)p;
}
static __device__ __forceinline__ unsigned int u32_aligned(bytes p) {
    return *(const unsigned int *)p;
}
static __device__ __forceinline__ unsigned int u32_halves(bytes p) {
    return u16_aligned(p) | u16_aligned(p + 2) << 16;
}
static __device__ __forceinline__ unsigned int u32_bytes(bytes p) {
    return u16_bytes(p) | u16_bytes(p + 2) << 16;
}

// Half precision to single, exactly; one instruction since compute capability 5.3.
static __device__ __forceinline__ float f16_to_f32(unsigned int h) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"((unsigned short)h));
    return value;
}

// Four products of signed bytes, added to a sum; one instruction since compute capability 6.1.
static __device__ __forceinline__ int dot4(unsigned int a, unsigned int b, int sum) {
    return __dp4a((int)a, (int)b, sum);
}

// Bit l of x to byte l, l = 0..3: the product puts copies of the four bits at distances of 7.
static __device__ __forceinline__ unsigned int spread1(unsigned int x) {
    return ((x & 15u) * 0x00204081u) & 0x01010101u;
}

// The bytes of x, at most 127 and not 0, negated where those of `bits` are 1 and not 0: ~x + 1, which
// leaves no byte.
static __device__ __forceinline__ unsigned int negate_bytes(unsigned int x, unsigned int bits) {
    return (x ^ bits * 255u) + bits;
}

// The bytes of a table of 16 that the bytes of x, at most 15, name.  Two permutations look into a
// half of the table each, by three bits; the fourth chooses.  Lanes that want different places of
// constant memory would wait for each other instead.
static __device__ __forceinline__ unsigned int lookup(const signed char *table, unsigned int x) {
    const unsigned int *t = (const unsigned int *)table;
    const unsigned int which = __byte_perm(x | x >> 4, 0u, 0x4420u);
    const unsigned int upper = (x >> 3 & 0x01010101u) * 255u;
    return (__byte_perm(t[0], t[1], which) & ~upper) | (__byte_perm(t[2], t[3], which) & upper);
}

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

// Half precision to single, subnormals, infinities and NaN included: the exponent is moved by a
// multiplication by 2^112.
static __device__ __forceinline__ float f16_to_f32(unsigned int h) {
    const unsigned int magnitude = (h & 0x7FFFu) << 13;
    const float normal = __uint_as_float(magnitude) * 0x1p112f;
    const float special = __uint_as_float(magnitude | 0x7F800000u);
    const float value = (h & 0x7C00u) == 0x7C00u ? special : normal;
    return __uint_as_float(__float_as_uint(value) | (h & 0x8000u) << 16);
}

// Four products of signed bytes, added to a sum; one instruction since compute capability 6.1.
static __device__ __forceinline__ int dot4(unsigned int a, unsigned int b, int sum) {
    return __dp4a((int)a, (int)b, sum);
}

// Bit l of x to byte l, l = 0..3: the product puts copies of the four bits at distances of 7.
static __device__ __forceinline__ unsigned int spread1(unsigned int x) {
    return ((x & 15u) * 0x00204081u) & 0x01010101u;
}

static __device__ __forceinline__ unsigned int lookup(const signed char *table, unsigned int x) {
    return (table[x & 15] & 255u) | (table[x >> 8 & 15] & 255u) << 8 |
           (table[x >> 16 & 15] & 255u) << 16 | (table[x >> 24 & 15] & 255u) << 24;
}


// Code l of a word, at most 255, as a float: put below the exponent of 2^23, which then goes.
static __device__ __forceinline__ float code_value(unsigned int codes, unsigned int l) {
    return __uint_as_float(__byte_perm(codes, 0x4B000000u, 0x7440u + l)) - 8388608.0f;
}

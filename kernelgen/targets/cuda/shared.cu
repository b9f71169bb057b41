// Where an array in shared memory lies, as the instructions below want it.
static __device__ __forceinline__ unsigned int shared_address(const void *p) {
    return (unsigned int)__cvta_generic_to_shared(p);
}


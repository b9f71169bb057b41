// A matrix in shared memory for the units: rows of 128 bytes, whose pieces of 16 bytes are swapped
// by the lowest three bits of the row, in groups of eight rows, 1024 bytes apart.
static __device__ __forceinline__ unsigned long long matrix(const void *p) {
    return (unsigned long long)((shared_address(p) & 0x3FFFFu) >> 4) | 1ull << 16 | 64ull << 32 |
           1ull << 62;
}

// What this thread wrote to registers is there for the products that follow.
static __device__ __forceinline__ void products_begin() {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

// All products since the last time are a group.
static __device__ __forceinline__ void products_end() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Wait until all products are done.
static __device__ __forceinline__ void products_wait() {
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
}

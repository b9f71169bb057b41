// Instructions of tensor cores and of asynchronous copies, each by the name of what it does.

%% include "shared.cu"
// Start a copy of 16 bytes from global to shared memory that needs no register; of no bytes, it
// writes zeros.  It goes past the first cache, which would keep what nobody reads again.
static __device__ __forceinline__ void copy16(unsigned int to, const void *from, unsigned int n) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(n)
                 : "memory");
}

// The same for 8 bytes.
static __device__ __forceinline__ void copy8(unsigned int to, const void *from, unsigned int n) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(to), "l"(from), "r"(n)
                 : "memory");
}

// The same for 4 bytes.
static __device__ __forceinline__ void copy4(unsigned int to, const void *from, unsigned int n) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from), "r"(n)
                 : "memory");
}

// All copies that this thread started since the last time are a group.
static __device__ __forceinline__ void copies_end() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}

%% for n in range(4)
// Wait until all groups of copies of this thread but the last ${n} are there.
static __device__ __forceinline__ void copies_wait${n}() {
    asm volatile("cp.async.wait_group ${n};" ::: "memory");
}

%% endfor
// Load four matrices of 8 rows of 16 bytes: each lane gives the address of a row, and gets 4 bytes
// of row lane / 4 of each matrix, which is how the second factor of a product is held.
static __device__ __forceinline__ void load_matrices(unsigned int *to, unsigned int from) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(from)
                 : "memory");
}
%% if precision == "int8"

// A product of 16 x 32 and 32 x 8 signed bytes, added to sums.
static __device__ __forceinline__ void multiply32(int *sums, const unsigned int *a, unsigned int b0,
                                                  unsigned int b1) {
    asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, "
                 "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+r"(sums[0]), "+r"(sums[1]), "+r"(sums[2]), "+r"(sums[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// The same of half the length.
static __device__ __forceinline__ void multiply16(int *sums, const unsigned int *a,
                                                  unsigned int b) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, "
                 "{%4, %5}, {%6}, {%0, %1, %2, %3};"
                 : "+r"(sums[0]), "+r"(sums[1]), "+r"(sums[2]), "+r"(sums[3])
                 : "r"(a[0]), "r"(a[1]), "r"(b));
}
%% else
%% set half = half_type[precision]

%% include "halves.cu"
// A product of 16 x 16 and 16 x 8 numbers of type ${half}, added to float32 sums.
static __device__ __forceinline__ void multiply(float *sums, const unsigned int *a, unsigned int b0,
                                                unsigned int b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.${half}.${half}.f32 {%0, %1, %2, %3}, "
                 "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

%% include "code_value.cu"
%% endif


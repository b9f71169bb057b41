// Instructions of compute capability 9.0: barriers in shared memory, copies by an engine of their
// own, and products of four warps together.

%% include "shared.cu"
// A barrier whose phase ends with the arrival of so many, and of all bytes that they expect.
static __device__ __forceinline__ void barrier_create(unsigned long long *barrier, unsigned int n) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(n)
                 : "memory");
}

// The copy engine sees the barriers that this thread created.
static __device__ __forceinline__ void barriers_show() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Arrive.
static __device__ __forceinline__ void barrier_arrive(unsigned long long *barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
                 : "memory");
}

// Arrive, and say how many bytes are under way.
static __device__ __forceinline__ void barrier_expect(unsigned long long *barrier,
                                                      unsigned int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(
                     shared_address(barrier)),
                 "r"(bytes)
                 : "memory");
}

// Whether the phase of this parity has ended; the hardware waits a while before it says no.
static __device__ __forceinline__ unsigned int barrier_passed(unsigned long long *barrier,
                                                              unsigned int parity) {
    unsigned int passed;
    asm volatile("{.reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; "
                 "selp.u32 %0, 1, 0, p;}"
                 : "=r"(passed)
                 : "r"(shared_address(barrier)), "r"(parity)
                 : "memory");
    return passed;
}

// Wait for the end of the phase of this parity; before the first phase, that of parity 1 is over.
static __device__ __forceinline__ void barrier_wait(unsigned long long *barrier,
                                                    unsigned int parity) {
    while (!barrier_passed(barrier, parity)) {
    }
}

// Have the copy engine bring bytes, a multiple of 16, to shared memory, and tell a barrier.
static __device__ __forceinline__ void copy_bulk(void *to, const void *from, unsigned int bytes,
                                                 unsigned long long *barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes "
                 "[%0], [%1], %2, [%3];" ::"r"(shared_address(to)),
                 "l"(from), "r"(bytes), "r"(shared_address(barrier))
                 : "memory");
}

%% include "warpgroup.cu"
%% set half = half_type[precision]
%% set n = config.tile_m // 2

%% include "halves.cu"
// Start a product of 64 x 16 and 16 x ${config.tile_m} numbers of type ${half}, added to float32
// sums: the first factor from registers of four warps, the second from shared memory.
static __device__ __forceinline__ void multiply(float *sums, const unsigned int *a,
                                                unsigned long long b) {
    asm volatile(
        "{.reg .pred adds; setp.eq.u32 adds, 0, 0; "
        "wgmma.mma_async.sync.aligned.m64n${config.tile_m}k16.f32.${half}.${half} {"
%% for some in operands(n)
        "${some}${"" if loop.last else ", "}"
%% endfor
        "}, {%${n}, %${n + 1}, %${n + 2}, %${n + 3}}, %${n + 4}, adds, 1, 1, 0;}"
        : ${floats(n)}
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

%% include "code_value.cu"


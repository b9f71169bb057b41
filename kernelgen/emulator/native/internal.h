// The engine's own state: one worker process runs one block at a time.
#pragma once
#include <stdarg.h>

#include <map>
#include <memory>
#include <vector>

#include "engine.h"

namespace emu {

constexpr uint32_t kMaxThreads = 1024, kMaxDynamic = 1 << 20, kMaxBuffers = 64;
// 32-bit shared addresses begin here, as small numbers are none.  Matrix descriptors keep the low
// 18 bits of them: static shared memory is in the first KiBs of these, dynamic behind it.
constexpr uint32_t kWindow = 0x01000000, kWindowEnd = 0x02000000, kDescriptorBits = 0x3ffff;
constexpr uint32_t kWarpgroup = 128; // threads of one

// What has been seen of each actor: the block's threads, its copy engine, its warpgroups' units
struct Clock {
    uint32_t epoch = 0;
    std::vector<uint32_t> seen;
    uint32_t fence_epoch = 0; // what fence.proxy.async had been executed behind
    std::vector<uint32_t> fenced;
};

// Where something was done: a line, or an offset of the machine code that a line belongs to
struct Where {
    int line;
    uint64_t pc;
};

struct AsyncCopy {
    void *to;
    const void *from;
    int bytes, from_bytes, line;
    uint32_t group, thread, serial;
};

enum State : uint8_t { kReady, kAtBarrier, kInSubgroup, kAtMbarrier, kInWarpgroup, kDone };

struct Fiber {
    EmuIndex index; // first: emu_self points at it
    void *sp;
    State state;
    bool strict;
    int barrier, barrier_count, wait_line;
    uint32_t reductions; // reducing barriers that it has passed
    uint32_t polls;      // atomic operations that changed nothing
    EmuOp *op;
    uint32_t group;  // number of cp.async groups committed
    uint32_t serial; // number of cp.async executed
    std::vector<AsyncCopy> copies;
    const void *mbarrier;  // that it waits at
    uint32_t wgmma_groups; // number of wgmma groups committed
    bool wgmma_fenced;
    uint32_t shows; // how many mbarriers there had been at its last fence to the copy engine
    std::vector<std::pair<const void *, Where>> early; // uses of accumulators before their wait
};

// An mbarrier object.  Its 64 bits in shared memory only say that it is one.
struct Mbarrier {
    uint32_t expected, pending; // arrivals of a phase, and those that are missing
    int32_t bytes = 0;          // that copies still have to bring
    uint32_t phase = 0;         // how many have ended
    int line;                   // where it was made
    uint32_t maker, number;     // by which thread, and how many there were before
    Clock arriving, ended;      // what the phase under way, and the last, have seen
    std::vector<AsyncCopy> copies; // bulk copies that have not arrived
    std::vector<std::pair<uint32_t, uint32_t>> tracked; // thread, and how many of its cp.async
};

struct Wgmma; // ptx_wgmma.cpp
struct Warpgroup {
    uint32_t waiting = 0;
    std::shared_ptr<Wgmma> wgmma; // what it multiplies
};

struct Subgroup {
    uint64_t alive = 0, waiting = 0; // lanes that have not returned; that wait in an operation
};

struct Block {
    uint32_t number;
    std::vector<Fiber> fibers;
    std::vector<uint32_t> queue; // ring of the threads that can run
    uint32_t head = 0, queued = 0, done = 0, idle_yields = 0;
    int votes[2][3]; // of reducing barriers, in turn
    std::vector<Subgroup> subgroups;
    std::vector<Warpgroup> warpgroups;
    std::map<const void *, Mbarrier> mbarriers;
    uint32_t mbarriers_made = 0;
    uint32_t timeouts = 0;     // of waits at mbarriers, since something last happened
    uint32_t waiting[16] = {}; // threads at each barrier
    unsigned char *stacks = nullptr;
    std::vector<unsigned char> saved; // its shared memory while another block runs
};

struct Finding {
    char kind[16];
    char text[256];
    int32_t line, other_line;
    uint32_t block[3], thread[3];
    uint64_t pc, other_pc; // offsets into the kernel's library, where the line is not known
    uint32_t count, reserved;
};

struct Buffer {
    void *data; // the caller's bytes, copied in before and out after
    uint64_t bytes;
    unsigned char *base; // where the kernel sees them
    unsigned char *map;  // with its unmapped pages
    uint64_t map_bytes;
};

enum Flags : uint32_t {
    kChecked = 1,
    kEagerCopies = 2,
    kBuffersAtStart = 4,
    kExitIsDivergence = 8
};

struct Pointer { // an argument that is to hold a buffer's address
    void **slot;
    uint64_t buffer;
};

// mirrored by ctypes in engine.py
struct Launch {
    const char *library, *symbol;
    uint32_t grid[3], block[3];
    uint32_t dynamic_shared, subgroup, order, seed, flags, workers, poison, buffer_count;
    double seconds;
    Buffer *buffers;
    Pointer *pointers;
    void **args;
    Finding *findings;
    const uint32_t *hidden; // offsets of static bytes that are the compiler's, not the kernel's
    uint64_t hidden_count;
    uint32_t finding_count, max_findings, atomics, pointer_count;
    char error[256];
};

struct Shared { // what the processes of a launch share
    uint32_t next_block, stop, findings, atomics;
    Finding list[64];
};

struct World {
    Launch *launch;
    Shared *shared;
    Block *block;
    void (*entry)(void **);
    void *scheduler; // its stack pointer while a fiber runs
    uintptr_t code_base, code_end;
    unsigned char *statics; // static shared memory
    size_t static_bytes;
    unsigned char *dynamic; // dynamic shared memory
    uint32_t threads;
    bool checked;
};
extern World world;

inline Fiber *self() { return reinterpret_cast<Fiber *>(emu_self); }
inline uint64_t bit(uint32_t lane) { return uint64_t(1) << lane; }

void report(const char *kind, Where where, Where other, const Fiber *fiber, const char *format,
            ...);
void vreport(const char *kind, Where where, Where other, const Fiber *fiber, const char *format,
             va_list args);
[[noreturn]] void abandon_block();
uint64_t code_offset(const void *pc);
// "byte 4096 of argument 1 (4096 bytes)", or false if it is near none
bool describe_address(const void *pointer, char *text, size_t size);
bool outside_buffers(const void *pointer, size_t bytes);

// `old` and `value` joined by an EmuRmw in an EmuType
uint64_t combine_bits(int op, int type, uint64_t old, uint64_t value, uint64_t compare);

// Waits in `state` until somebody makes the running thread ready again.
void suspend(State state, int line);
void wake(Fiber &fiber);
// In the reverse order, lets those go first that the running thread has just made ready.
void step_back();
// An operation of all 128 threads of a warpgroup: the last to arrive calls op->run.
void warpgroup_op(EmuOp *op);
void arrive(const AsyncCopy &copy);

// mbarriers
void mbarrier_init(void *place, uint32_t count, int line);
void mbarrier_invalidate(void *place, int line);
void mbarrier_expect(void *place, uint32_t bytes, int line);
uint64_t mbarrier_arrive(void *place, uint32_t count, int line);
void mbarrier_track_copies(void *place, int line);
bool mbarrier_test(void *place, uint32_t parity, bool suspends, int line);
uint32_t mbarrier_phase(void *place, int line);
void mbarrier_copy(void *to, const void *from, uint32_t bytes, void *place, int line);
void mbarriers_show(); // those that there are, to the copy engine, by the running thread
bool mbarriers_advance(Block &block); // when no thread can run; whether one can now
void mbarriers_describe(const Fiber &fiber, char *text, size_t size);
void mbarriers_end(Block &block);
void wgmma_end(Block &block);
// In a checked build: a local variable is used, which may be an accumulator under way.  That an asm
// statement takes it in is no use; what has been used otherwise is reported.
void wgmma_accumulator_used(const void *pointer, Where where);
void wgmma_report_early(const EmuOperand *operands, int count);

// Fibers
constexpr size_t kStackBytes = 256 << 10;
void switch_stack(void **from, void *to);
void run_block(Block &block);
bool start_block(Block &block, uint32_t number);

// The record of accesses to shared memory in a checked build
void shadow_begin_block();
void shadow_barrier();
void shadow_partial(const std::vector<uint32_t> &threads);
void shadow_resume();
void shadow_async(const AsyncCopy &copy, bool arrived);
void shadow_release(Clock &into);       // what the running thread has done and seen
void shadow_acquire(const Clock &from); // the running thread sees it
void shadow_bulk(const AsyncCopy &copy, Clock &into); // the copy engine has written it
void shadow_proxy_fence();
// A warpgroup's unit reads what all of its threads had seen in `issue`, and has done so in `done`.
void shadow_issue(uint32_t warpgroup, Clock &issue);
void shadow_matrix_read(uint32_t warpgroup, const Clock &issue, const void *p, size_t bytes,
                        int line);
void shadow_matrix_done(uint32_t warpgroup, Clock &done);
} // namespace emu

// The engine's own state: one worker process runs one block at a time.
#pragma once
#include <stdarg.h>
#include <vector>

#include "engine.h"

namespace emu {

constexpr uint32_t kMaxThreads = 1024, kMaxDynamic = 1 << 20, kMaxBuffers = 64;
// 32-bit shared addresses: two windows, neither of which holds small numbers or ends of the other
constexpr uint32_t kStaticWindow = 0x01000000, kDynamicWindow = 0x02000000;

struct AsyncCopy {
    void *to;
    const void *from;
    int bytes, from_bytes, line;
    uint32_t group;
};

enum State : uint8_t { kReady, kAtBarrier, kInSubgroup, kDone };

struct Fiber {
    EmuIndex index; // first: emu_self points at it
    void *sp;
    State state;
    bool strict;
    int barrier, barrier_count, wait_line;
    uint32_t reductions; // reducing barriers that it has passed
    uint32_t polls;      // atomic operations that changed nothing
    EmuOp *op;
    uint32_t group; // number of cp.async groups committed
    std::vector<AsyncCopy> copies;
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
    uint32_t threads;
    bool checked;
};
extern World world;

inline Fiber *self() { return reinterpret_cast<Fiber *>(emu_self); }
inline uint64_t bit(uint32_t lane) { return uint64_t(1) << lane; }

// Where something was done: a line, or an offset of the machine code that a line belongs to
struct Where {
    int line;
    uint64_t pc;
};
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
} // namespace emu

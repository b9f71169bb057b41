// Fibers, their order, barriers, operations of subgroups, and copies that arrive late.
#include "internal.h"

#include <stdio.h>
#include <string.h>
#include <sys/mman.h>

#include <algorithm>

EmuIndex *emu_self;
alignas(4096) unsigned char emu_dynamic_shared[emu::kMaxDynamic + 8192];

namespace emu {

World world;

// ---- the switch of stacks: save what a callee must keep, exchange the stack pointer, restore

#if defined(__APPLE__)
#define EMU_SYMBOL(name) "_" name
#else
#define EMU_SYMBOL(name) name
#endif
extern "C" void emu_switch_stack(void **from, void *to);
extern "C" void emu_start_fiber(void);

// clang-format off
#define EMU_SWITCH_HEAD                                                                            \
    ".text\n.p2align 4\n.globl " EMU_SYMBOL("emu_switch_stack") "\n"                              \
    EMU_SYMBOL("emu_switch_stack") ":\n"
#if defined(__x86_64__)
asm(EMU_SWITCH_HEAD
    "  push %rbp\n  push %rbx\n  push %r12\n  push %r13\n  push %r14\n  push %r15\n"
    "  mov %rsp, (%rdi)\n  mov %rsi, %rsp\n"
    "  pop %r15\n  pop %r14\n  pop %r13\n  pop %r12\n  pop %rbx\n  pop %rbp\n  ret\n");
constexpr size_t kSavedWords = 6;
#elif defined(__aarch64__)
asm(EMU_SWITCH_HEAD
    "  sub sp, sp, #160\n"
    "  stp x19, x20, [sp]\n  stp x21, x22, [sp, #16]\n  stp x23, x24, [sp, #32]\n"
    "  stp x25, x26, [sp, #48]\n  stp x27, x28, [sp, #64]\n  stp x29, x30, [sp, #80]\n"
    "  stp d8, d9, [sp, #96]\n  stp d10, d11, [sp, #112]\n  stp d12, d13, [sp, #128]\n"
    "  stp d14, d15, [sp, #144]\n"
    "  mov x9, sp\n  str x9, [x0]\n  mov sp, x1\n"
    "  ldp x19, x20, [sp]\n  ldp x21, x22, [sp, #16]\n  ldp x23, x24, [sp, #32]\n"
    "  ldp x25, x26, [sp, #48]\n  ldp x27, x28, [sp, #64]\n  ldp x29, x30, [sp, #80]\n"
    "  ldp d8, d9, [sp, #96]\n  ldp d10, d11, [sp, #112]\n  ldp d12, d13, [sp, #128]\n"
    "  ldp d14, d15, [sp, #144]\n  add sp, sp, #160\n  ret\n");
#else
#error "the emulator runs on x86-64 and aarch64"
#endif
// clang-format on

// Dynamic shared memory as kernels declare it, no better aligned than they say
#define EMU_ALIGNED(n)                                                                             \
    asm(".globl " EMU_SYMBOL("emu_dynamic_shared_" #n) "\n.set " EMU_SYMBOL(                       \
        "emu_dynamic_shared_" #n) ", " EMU_SYMBOL("emu_dynamic_shared") " + " #n "\n");
EMU_ALIGNED(16)
EMU_ALIGNED(32)
EMU_ALIGNED(64)
EMU_ALIGNED(128)
EMU_ALIGNED(256)
EMU_ALIGNED(512)

void switch_stack(void **from, void *to) { emu_switch_stack(from, to); }

// ---- the queue of threads that can run

static void enqueue(Block &block, Fiber &fiber) {
    fiber.state = kReady;
    uint32_t size = world.threads;
    block.queue[(block.head + block.queued++) % size] = fiber.index.linear;
}

// Those that go on after waiting for some of the block.  In the reverse order they go before all
// others, so that one warp runs ahead of the rest as far as it can.
static void enqueue_some(Block &block, const std::vector<uint32_t> &freed) {
    if (world.launch->order != 1) {
        for (uint32_t t : freed) enqueue(block, block.fibers[t]);
        return;
    }
    for (size_t i = freed.size(); i-- > 0;) {
        Fiber &fiber = block.fibers[freed[i]];
        fiber.state = kReady;
        block.head = (block.head + world.threads - 1) % world.threads;
        block.queue[block.head] = fiber.index.linear;
        block.queued++;
    }
}

// Leaves the running thread, which has been put where it belongs, for the next that can run.
static void run_next() {
    Block &block = *world.block;
    void **from = &self()->sp;
    if (block.queued == 0 && !mbarriers_advance(block)) {
        emu_self = nullptr;
        switch_stack(from, world.scheduler);
        return;
    }
    Fiber &next = block.fibers[block.queue[block.head]];
    block.head = (block.head + 1) % world.threads;
    block.queued--;
    if (&next == self()) return;
    emu_self = &next.index;
    switch_stack(from, next.sp);
}

void suspend(State state, int line) {
    Fiber &me = *self();
    me.index.line = me.wait_line = line;
    me.state = state;
    run_next();
}

void wake(Fiber &fiber) {
    world.block->idle_yields = world.block->timeouts = 0;
    static std::vector<uint32_t> one(1);
    one[0] = fiber.index.linear;
    enqueue_some(*world.block, one);
}

void step_back() {
    if (world.launch->order != 1) return;
    enqueue(*world.block, *self());
    run_next();
}

void abandon_block() {
    void *lost;
    world.block->queued = 0;
    __atomic_store_n(&world.shared->stop, 1, __ATOMIC_RELAXED);
    emu_self = nullptr;
    switch_stack(&lost, world.scheduler);
    __builtin_unreachable();
}

// The order in which threads run: forward, in reverse, or shuffled anew each time
static const std::vector<uint32_t> &thread_order() {
    static uint64_t state = 0;
    static std::vector<uint32_t> order;
    if (order.size() != world.threads) {
        bool reverse = world.launch->order == 1;
        order.resize(world.threads);
        for (uint32_t i = 0; i < world.threads; i++) order[i] = reverse ? world.threads - 1 - i : i;
    }
    if (world.launch->order == 2) {
        if (!state) state = 0x9E3779B97F4A7C15u * (world.launch->seed + 1) + world.block->number;
        for (uint32_t i = world.threads - 1; i > 0; i--) {
            state = state * 6364136223846793005u + 1442695040888963407u;
            std::swap(order[i], order[(state >> 33) % (i + 1)]);
        }
    }
    return order;
}

// ---- barriers

static bool barrier_complete(Block &block, int id, int count) {
    uint32_t waiting = block.waiting[id];
    if (count) return waiting >= uint32_t(count);
    return waiting && waiting + block.done == world.threads;
}

// Lets all go on that wait at a barrier whose last thread has come.  It comes late in the order
// too: whoever arrived last is no special thread.
static void release_barrier(Block &block, int id, int count) {
    static std::vector<uint32_t> freed;
    freed.clear();
    Fiber *first = nullptr;
    for (uint32_t t : thread_order()) {
        Fiber &f = block.fibers[t];
        if (f.state != kAtBarrier || f.barrier != id) continue;
        if (!first) first = &f;
        if (f.strict && f.wait_line != first->wait_line)
            report("barrier", {f.wait_line, 0}, {first->wait_line, 0}, &f,
                   "divergent barrier: this thread waits at the barrier of line %d, thread %u of "
                   "the block at that of line %d",
                   f.wait_line, first->index.linear, first->wait_line);
        freed.push_back(t);
    }
    if (!count && block.done && (world.launch->flags & kExitIsDivergence))
        report("barrier", {first->wait_line, 0}, {}, first,
               "divergent barrier: %u threads of the block returned without reaching it",
               block.done);
    if (world.checked) {
        if (count && freed.size() < world.threads) shadow_partial(freed);
        else shadow_barrier();
    }
    block.idle_yields = block.timeouts = 0;
    block.waiting[id] = 0;
    enqueue_some(block, freed);
}

static void release_if_of_all(Block &block, int id) {
    for (const Fiber &f : block.fibers)
        if (f.state == kAtBarrier && f.barrier == id && f.barrier_count) return;
    release_barrier(block, id, 0);
}

// ---- operations of subgroups

static Fiber *lane_of(Block &block, const Fiber &fiber, uint32_t lane) {
    uint32_t t = fiber.index.linear - fiber.index.lane + lane;
    return lane < fiber.index.subgroup_lanes ? &block.fibers[t] : nullptr;
}

// Runs the operation that `fiber` waits in, if all of its lanes have come.
static void try_subgroup(Block &block, Fiber &fiber) {
    Subgroup &group = block.subgroups[fiber.index.subgroup];
    uint64_t mask = fiber.op->mask ? fiber.op->mask & group.alive : group.alive;
    if (mask & ~group.waiting) return;
    EmuOp *ops[64] = {};
    for (uint32_t l = 0; l < fiber.index.subgroup_lanes; l++) {
        if (!(mask & bit(l))) continue;
        ops[l] = lane_of(block, fiber, l)->op;
        if (ops[l]->mask != fiber.op->mask) return;
    }
    for (uint32_t l = 0; l < fiber.index.subgroup_lanes; l++)
        if (ops[l] && (ops[l]->run != fiber.op->run || ops[l]->site != fiber.op->site)) {
            Fiber *other = lane_of(block, fiber, l);
            report("mask", {fiber.wait_line, 0}, {other->wait_line, 0}, &fiber,
                   "lanes of one mask wait in different operations: this one in %s of line %d, "
                   "lane %u in %s of line %d",
                   fiber.op->name, fiber.wait_line, l, ops[l]->name, other->wait_line);
            abandon_block();
        }
    EmuIndex *running = emu_self;
    emu_self = &fiber.index;
    fiber.op->run(ops, mask, int(fiber.index.subgroup_size));
    emu_self = running;
    block.idle_yields = block.timeouts = 0;
    group.waiting &= ~mask;
    static std::vector<uint32_t> freed;
    freed.clear();
    bool reverse = world.launch->order == 1;
    for (uint32_t i = 0; i < fiber.index.subgroup_lanes; i++) {
        uint32_t l = reverse ? fiber.index.subgroup_lanes - 1 - i : i;
        if (!(mask & bit(l))) continue;
        Fiber *other = lane_of(block, fiber, l);
        freed.push_back(other->index.linear);
    }
    enqueue_some(block, freed);
    if (world.checked && fiber.op->orders_memory) shadow_partial(freed);
}

void warpgroup_op(EmuOp *op) {
    Fiber &me = *self();
    Block &block = *world.block;
    uint32_t number = me.index.linear / kWarpgroup, first = number * kWarpgroup;
    if (first + kWarpgroup > world.threads)
        emu_fail("mask", op->line, "%s needs a warpgroup of 128 threads, but the block has %u",
                 op->name, world.threads);
    me.op = op;
    me.index.line = me.wait_line = op->line;
    me.state = kInWarpgroup;
    Warpgroup &group = block.warpgroups[number];
    if (++group.waiting == kWarpgroup) {
        static std::vector<uint32_t> freed;
        freed.clear();
        EmuOp *ops[kWarpgroup];
        for (uint32_t l = 0; l < kWarpgroup; l++) {
            Fiber &other = block.fibers[first + l];
            ops[l] = other.op;
            if (other.op->site != op->site)
                emu_fail("mask", op->line,
                         "threads of a warpgroup execute different instructions: this one %s of "
                         "line %d, thread %u of the block %s of line %d",
                         op->name, op->line, first + l, other.op->name, other.op->line);
            freed.push_back(first + l);
        }
        if (world.launch->order == 1) std::reverse(freed.begin(), freed.end());
        op->run(ops, 0, int(kWarpgroup));
        group.waiting = 0;
        block.idle_yields = block.timeouts = 0;
        enqueue_some(block, freed);
    }
    run_next();
}

// A thread that returns may be the one that others waited for.
static void thread_done() {
    Block &block = *world.block;
    Fiber &me = *self();
    me.state = kDone;
    block.done++;
    block.subgroups[me.index.subgroup].alive &= ~bit(me.index.lane);
    block.idle_yields = block.timeouts = 0;
    for (uint32_t l = 0; l < me.index.subgroup_lanes; l++) {
        Fiber *other = lane_of(block, me, l);
        if (other->state == kInSubgroup) try_subgroup(block, *other);
    }
    for (int id = 0; id < 16; id++) // a barrier of all threads no longer waits for this one
        if (block.waiting[id] && barrier_complete(block, id, 0)) release_if_of_all(block, id);
    run_next();
    __builtin_unreachable();
}

extern "C" void emu_start_fiber(void) {
    world.entry(world.launch->args);
    if (world.checked) wgmma_report_early(nullptr, 0);
    thread_done();
}

// ---- blocks

static unsigned char *make_stacks() {
    size_t bytes = size_t(world.threads) * kStackBytes;
    void *map = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (map == MAP_FAILED) return nullptr;
    for (uint32_t t = 0; t < world.threads; t++) // overflow meets an unmapped page
        mprotect(static_cast<char *>(map) + t * kStackBytes, 16384, PROT_NONE);
    return static_cast<unsigned char *>(map);
}

// Writes the poison that a kernel sees where it has written nothing.
static void poison_shared() {
    int poison = int(world.launch->poison);
    memset(emu_dynamic_shared, 0xC5, size_t(world.dynamic - emu_dynamic_shared));
    memset(world.dynamic, poison, world.launch->dynamic_shared);
    memset(world.dynamic + world.launch->dynamic_shared, 0xC5, 4096);
    if (world.static_bytes) memset(world.statics, poison, world.static_bytes);
}

static void check_canary() {
    const unsigned char *end = world.dynamic + world.launch->dynamic_shared;
    for (int i = 0; i < 4096; i++)
        if (end[i] != 0xC5) {
            report("bounds", {0, 0}, {}, &world.block->fibers[0],
                   "a thread of this block wrote byte %u of dynamic shared memory, of which the "
                   "launch gave %u bytes",
                   world.launch->dynamic_shared + i, world.launch->dynamic_shared);
            return;
        }
}

bool start_block(Block &block, uint32_t number) {
    const Launch &launch = *world.launch;
    uint32_t n = world.threads, sub = launch.subgroup;
    block.number = number;
    block.fibers.assign(n, Fiber());
    block.queue.assign(n, 0);
    block.head = block.queued = block.done = block.idle_yields = 0;
    memset(block.waiting, 0, sizeof block.waiting);
    for (int *votes : block.votes) {
        votes[EMU_COUNT] = votes[EMU_OR] = 0;
        votes[EMU_AND] = 1;
    }
    block.subgroups.assign((n + sub - 1) / sub, Subgroup());
    block.warpgroups.assign((n + kWarpgroup - 1) / kWarpgroup, Warpgroup());
    block.mbarriers.clear();
    block.timeouts = block.mbarriers_made = 0;
    if (!block.stacks && !(block.stacks = make_stacks())) return false;
    for (uint32_t t = 0; t < n; t++) {
        Fiber &f = block.fibers[t];
        EmuIndex &at = f.index;
        uint32_t rest = t, where = number;
        for (int a = 0; a < 3; a++) {
            at.block_dim[a] = launch.block[a];
            at.grid[a] = launch.grid[a];
            at.thread[a] = rest % launch.block[a];
            at.block[a] = where % launch.grid[a];
            rest /= launch.block[a];
            where /= launch.grid[a];
        }
        at.linear = t;
        at.lane = t % sub;
        at.subgroup = t / sub;
        at.subgroup_size = sub;
        at.subgroup_lanes = n - (t - at.lane) < sub ? n - (t - at.lane) : sub;
        block.subgroups[at.subgroup].alive |= bit(at.lane);
        void **top = reinterpret_cast<void **>(block.stacks + (t + 1) * kStackBytes) - 32;
        // the words that switch_stack restores, then where it returns to, on a stack aligned as
        // after a call
#if defined(__x86_64__)
        memset(top, 0, 32 * sizeof(void *));
        top[kSavedWords] = reinterpret_cast<void *>(emu_start_fiber);
        f.sp = top;
#else
        memset(top, 0, 32 * sizeof(void *));
        top[11] = reinterpret_cast<void *>(emu_start_fiber);
        f.sp = top;
#endif
    }
    world.block = &block;
    for (uint32_t t : thread_order()) enqueue(block, block.fibers[t]);
    poison_shared();
    if (world.checked) shadow_begin_block();
    return true;
}

// Why nobody can go on: says where all wait, of one thread per place.
static void report_deadlock(Block &block) {
    const Fiber *first = nullptr; // the most telling one
    char text[200] = "";
    size_t used = 0;
    std::vector<int> lines;
    auto rank = [](const Fiber *f) {
        return !f ? 0 : f->state == kAtMbarrier ? 3 : f->state == kAtBarrier ? 2 : 1;
    };
    for (Fiber &f : block.fibers) {
        if (f.state == kDone) continue;
        bool known = false;
        for (int line : lines) known |= line == f.wait_line;
        if (rank(&f) > rank(first)) first = &f;
        if (known || used + 70 > sizeof text) continue;
        lines.push_back(f.wait_line);
        const char *at = f.state == kAtBarrier    ? "the barrier"
                         : f.state == kAtMbarrier ? "the mbarrier"
                                                  : f.op->name;
        used += size_t(snprintf(text + used, sizeof text - used, "%sthread %u at %s of line %d",
                                used ? ", " : "", f.index.linear, at, f.wait_line));
    }
    char why[200] = "";
    if (first->state == kAtMbarrier) mbarriers_describe(*first, why, sizeof why);
    const char *what[] = {"", "divergent operation", "divergent barrier",
                          "deadlock at an mbarrier"};
    report(rank(first) == 1 ? "mask" : "barrier", {first->wait_line, 0}, {}, first,
           "%s: %s%u of %u threads returned, and the rest wait for each other: %s",
           what[rank(first)], why, block.done, world.threads, text);
    __atomic_store_n(&world.shared->stop, 1, __ATOMIC_RELAXED);
}

// Runs a block to its end, or until all of its threads only poll memory.
void run_block(Block &block) {
    world.block = &block;
    if (block.queued) {
        Fiber &first = block.fibers[block.queue[block.head]];
        block.head = (block.head + 1) % world.threads;
        block.queued--;
        emu_self = &first.index;
        switch_stack(&world.scheduler, first.sp);
    }
    if (__atomic_load_n(&world.shared->stop, __ATOMIC_RELAXED)) return;
    if (block.queued) return; // polls: other blocks first
    if (block.done < world.threads) {
        report_deadlock(block);
        return;
    }
    check_canary();
    mbarriers_end(block);
    wgmma_end(block);
}

// ---- cp.async: bytes arrive when they are waited for, which no machine does but any machine may

void arrive(const AsyncCopy &copy) {
    memcpy(copy.to, copy.from, size_t(copy.from_bytes));
    memset(static_cast<char *>(copy.to) + copy.from_bytes, 0, size_t(copy.bytes - copy.from_bytes));
}

} // namespace emu

using namespace emu;

extern "C" {

void emu_barrier(int id, int count, int line, int strict) {
    Fiber &me = *self();
    me.index.line = me.wait_line = line;
    if (id < 0 || id > 15) emu_fail("barrier", line, "barrier %d; they are numbered 0 to 15", id);
    me.barrier = id;
    me.barrier_count = count;
    me.strict = strict;
    me.state = kAtBarrier;
    Block &block = *world.block;
    block.waiting[id]++;
    if (barrier_complete(block, id, count)) release_barrier(block, id, count);
    run_next();
}

int emu_barrier_reduce(int what, int value, int line) {
    // two places in turn: the other one is cleared between the barriers, when nobody uses it
    Fiber &me = *self();
    int *votes = world.block->votes[me.reductions & 1];
    int *other = world.block->votes[++me.reductions & 1];
    votes[EMU_COUNT] += value != 0;
    votes[EMU_AND] &= value != 0;
    votes[EMU_OR] |= value != 0;
    emu_barrier(0, 0, line, 1);
    int result = votes[what];
    other[EMU_COUNT] = other[EMU_OR] = 0;
    other[EMU_AND] = 1;
    emu_barrier(0, 0, line, 1);
    return result;
}

void emu_subgroup(EmuOp *op) {
    Fiber &me = *self();
    Block &block = *world.block;
    me.index.line = me.wait_line = op->line;
    me.op = op;
    if (op->mask && !(op->mask & bit(me.index.lane)))
        emu_fail("mask", op->line, "lane %u calls %s with mask 0x%llx, which does not name it",
                 me.index.lane, op->name, static_cast<unsigned long long>(op->mask));
    me.state = kInSubgroup;
    uint64_t &waiting = block.subgroups[me.index.subgroup].waiting;
    for (uint64_t others = waiting & op->mask; others; others &= others - 1) {
        uint32_t l = uint32_t(__builtin_ctzll(others));
        const Fiber *other = lane_of(block, me, l);
        if (other->op->mask != op->mask && (other->op->mask & bit(me.index.lane)))
            emu_fail("mask", op->line,
                     "mismatched masks: %s with 0x%llx, but lane %u waits in %s of line %d with "
                     "0x%llx",
                     op->name, static_cast<unsigned long long>(op->mask), l, other->op->name,
                     other->wait_line, static_cast<unsigned long long>(other->op->mask));
    }
    waiting |= bit(me.index.lane);
    try_subgroup(block, me);
    run_next();
}

void emu_yield(int line) {
    Fiber &me = *self();
    Block &block = *world.block;
    if (line) me.index.line = line;
    if (++block.idle_yields > 4 * world.threads + 64) {
        // nobody gets on: let other blocks run
        block.idle_yields = 0;
        enqueue(block, me);
        emu_self = nullptr;
        switch_stack(&me.sp, world.scheduler);
        return;
    }
    enqueue(block, me);
    run_next();
}

void emu_fail(const char *kind, int line, const char *format, ...) {
    va_list args;
    va_start(args, format);
    vreport(kind, {line, 0}, {}, self(), format, args);
    va_end(args);
    abandon_block();
}

void emu_async_copy(void *to, const void *from, int bytes, int from_bytes, int line) {
    Fiber &me = *self();
    me.index.line = line;
    if (from_bytes) emu_touch(from, size_t(from_bytes), EMU_READ, line);
    emu_touch(to, size_t(bytes), EMU_WRITE, line);
    AsyncCopy copy{to, from, bytes, from_bytes, line, me.group, me.index.linear, me.serial++};
    if (world.launch->flags & kEagerCopies) {
        arrive(copy);
        return;
    }
    if (world.checked) shadow_async(copy, false);
    me.copies.push_back(copy);
}

void emu_async_commit(void) { self()->group++; }

void emu_async_wait(int groups_left) {
    Fiber &me = *self();
    size_t kept = 0;
    for (const AsyncCopy &copy : me.copies) {
        bool waited = groups_left < 0 || copy.group + uint32_t(groups_left) < me.group;
        if (!waited) {
            me.copies[kept++] = copy;
            continue;
        }
        arrive(copy);
        if (world.checked) shadow_async(copy, true);
    }
    me.copies.resize(kept);
}

} // extern "C"

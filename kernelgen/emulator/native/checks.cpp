// What a checked build sees.
//
// Its kernel is compiled with the compilers' own instrumentation (-fsanitize=thread, alignment,
// bounds, shift), but is linked with the functions below in place of theirs: they know fibers,
// barriers and shared memory.  For each byte of shared memory they keep the last write, two reads
// and the copy that is under way, and hold each new access against these.
#include "internal.h"

#include <stdio.h>
#include <string.h>
#include <sys/mman.h>

#include <algorithm>

namespace emu {

// `where` is a line with the top bit set, else an offset of the code
struct Access {
    uint32_t epoch, clock, where;
    uint16_t thread;
    uint16_t atomic;
};
struct Cell {
    Access write, read[2];
    uint32_t copy_line; // of a copy that has not arrived, else 0
    uint32_t copy_thread;
    bool hidden; // the compiler's own: whether a variable has been constructed
};

constexpr uint32_t kLineBit = 0x80000000;

// Who has synchronized with whom.  A barrier of the block starts a new epoch, and orders all that
// came before; within an epoch each thread has a vector clock, for barriers of fewer threads.
// Actors are the threads, then the copy engine, then the unit of each warpgroup.
static struct {
    Cell *cells;
    size_t statics, bytes;       // static shared memory first, dynamic behind it
    uint32_t epoch, first_epoch; // now, and at the block's start
    bool known_start;            // false once a block was resumed: it may have written anything
    std::vector<uint32_t> clock; // of each actor, its own
    std::vector<uint32_t> seen;  // [thread][actor]: how much of the other it has seen
    std::vector<uint32_t> seen_epoch;
    uint32_t actors;
    std::vector<Clock> fences; // of each thread, what its last fence.proxy.async came behind
} shadow;

// Who looks at memory, and what it has seen
struct Viewer {
    uint32_t actor, epoch;
    const uint32_t *seen;
};

static Where unpack(uint32_t where) {
    if (where & kLineBit) return {int(where & ~kLineBit), 0};
    return {0, where};
}

void shadow_begin_block() {
    size_t bytes = world.static_bytes + world.launch->dynamic_shared;
    if (!shadow.cells) {
        shadow.statics = world.static_bytes;
        shadow.bytes = bytes;
        shadow.cells =
            static_cast<Cell *>(mmap(nullptr, (bytes + 1) * sizeof(Cell), PROT_READ | PROT_WRITE,
                                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
        if (shadow.cells == MAP_FAILED)
            emu_fail("crash", 0, "no memory for the record of accesses");
        for (uint64_t i = 0; i < world.launch->hidden_count; i++)
            if (world.launch->hidden[i] < shadow.statics)
                shadow.cells[world.launch->hidden[i]].hidden = true;
        shadow.actors = world.threads + 1 + (world.threads + kWarpgroup - 1) / kWarpgroup;
        shadow.clock.assign(shadow.actors, 1);
        shadow.seen.assign(size_t(world.threads) * shadow.actors, 0);
        shadow.seen_epoch.assign(world.threads, 0);
    }
    shadow.fences.assign(world.threads, Clock());
    shadow.first_epoch = ++shadow.epoch;
    shadow.known_start = true;
}

void shadow_barrier() { shadow.epoch++; }

void shadow_resume() {
    shadow.epoch++;
    shadow.known_start = false;
}

static uint32_t *seen_by(uint32_t thread) {
    uint32_t *row = &shadow.seen[size_t(thread) * shadow.actors];
    if (shadow.seen_epoch[thread] != shadow.epoch) {
        std::fill(row, row + shadow.actors, 0);
        shadow.seen_epoch[thread] = shadow.epoch;
    }
    return row;
}

static void join(uint32_t *into, const uint32_t *from) {
    for (uint32_t i = 0; i < shadow.actors; i++) into[i] = std::max(into[i], from[i]);
}

// A clock of now: what it held of earlier epochs is known to all.
static std::vector<uint32_t> &current(Clock &clock) {
    if (clock.epoch != shadow.epoch || clock.seen.empty()) {
        clock.epoch = shadow.epoch;
        clock.seen.assign(shadow.actors, 0);
    }
    return clock.seen;
}

void shadow_partial(const std::vector<uint32_t> &threads) {
    std::vector<uint32_t> all(shadow.actors, 0);
    for (uint32_t t : threads) {
        join(all.data(), seen_by(t));
        all[t] = std::max(all[t], shadow.clock[t]);
    }
    for (uint32_t t : threads) {
        std::copy(all.begin(), all.end(), seen_by(t));
        shadow.clock[t]++;
    }
}

void shadow_release(Clock &into) {
    uint32_t t = self()->index.linear;
    std::vector<uint32_t> &seen = current(into);
    join(seen.data(), seen_by(t));
    seen[t] = shadow.clock[t]++;
}

void shadow_acquire(const Clock &from) {
    if (from.epoch == shadow.epoch && !from.seen.empty())
        join(seen_by(self()->index.linear), from.seen.data());
}

void shadow_proxy_fence() {
    uint32_t t = self()->index.linear;
    Clock &fence = shadow.fences[t];
    fence.epoch = 0; // only what is seen now
    current(fence);
    shadow_release(fence);
}

void shadow_issue(uint32_t warpgroup, Clock &issue) {
    std::vector<uint32_t> &seen = current(issue);
    std::fill(seen.begin(), seen.end(), ~0u);
    issue.fenced.assign(shadow.actors, 0);
    for (uint32_t t = warpgroup * kWarpgroup; t < (warpgroup + 1) * kWarpgroup; t++) {
        const uint32_t *row = seen_by(t);
        for (uint32_t i = 0; i < shadow.actors; i++)
            seen[i] = std::min(seen[i], i == t ? shadow.clock[t] : row[i]);
        const Clock &fence = shadow.fences[t];
        if (fence.epoch < issue.fence_epoch || fence.seen.empty()) continue;
        if (fence.epoch > issue.fence_epoch) issue.fenced.assign(shadow.actors, 0);
        issue.fence_epoch = fence.epoch;
        join(issue.fenced.data(), fence.seen.data());
    }
    // what the threads do from here on is not before the product
    for (uint32_t l = 0; l < kWarpgroup; l++) shadow.clock[warpgroup * kWarpgroup + l]++;
}

static bool current(const Access &a) { return a.epoch >= shadow.first_epoch; }

// Whether all actors that synchronize as the program says find `a` done before now.
static bool before(const Access &a, const Viewer &viewer) {
    if (a.epoch != viewer.epoch) return a.epoch < viewer.epoch;
    return a.thread == viewer.actor || viewer.seen[a.thread] >= a.clock;
}

static Viewer viewer_now() {
    uint32_t t = self()->index.linear;
    return {t, shadow.epoch, seen_by(t)};
}

static const char *const kVerb[] = {"reads", "writes", "updates atomically", "reads",
                                   "sets atomically"};

static void report_race(const Access &a, const char *did, int how, Where where, const char *place,
                        const Viewer &viewer) {
    char who[48];
    if (a.thread < world.threads) {
        const uint32_t *at = world.block->fibers[a.thread].index.thread;
        snprintf(who, sizeof who, "thread (%u, %u, %u)", at[0], at[1], at[2]);
    } else if (a.thread == world.threads) {
        snprintf(who, sizeof who, "a bulk copy");
    } else {
        snprintf(who, sizeof who, "wgmma of warpgroup %u", a.thread - world.threads - 1);
    }
    report("race", where, unpack(a.where), self(),
           "race on %s: this %s %s what %s %s on line {other}, and nothing orders the two", place,
           viewer.actor < world.threads ? "thread" : "wgmma", kVerb[how], who, did);
}

static void name_byte(size_t at, char *text, size_t size) {
    bool is_static = at < shadow.statics;
    snprintf(text, size, "byte %zu of %s shared memory", is_static ? at : at - shadow.statics,
             is_static ? "static" : "dynamic");
}

static void check_bytes(size_t first, size_t bytes, int how, Where where, const Viewer &viewer) {
    const Fiber &me = *self();
    uint32_t thread = viewer.actor;
    Access now{shadow.epoch, shadow.clock[thread],
               where.line ? uint32_t(where.line) | kLineBit : uint32_t(where.pc), uint16_t(thread),
               uint16_t(how == EMU_ATOMIC || how == EMU_SET)};
    char place[64];
    bool told = false;
    for (size_t i = first; i < first + bytes; i++) {
        Cell &cell = shadow.cells[i];
        if (cell.hidden) return;
        bool written = current(cell.write) || !shadow.known_start;
        if (!told && how != EMU_WRITE && how != EMU_SET && !written) {
            told = true;
            name_byte(i, place, sizeof place);
            report("uninitialised", where, {}, &me,
                   "this thread %s %s, which no thread has written", kVerb[how], place);
        }
        if (!told && cell.copy_line && current(cell.write)) {
            told = true;
            name_byte(i, place, sizeof place);
            report("async", where, {int(cell.copy_line), 0}, &me,
                   "this thread %s %s, where the copy that thread %u of the block started on line "
                   "%u has not been waited for",
                   kVerb[how], place, cell.copy_thread, cell.copy_line);
        }
        bool both_atomic = cell.write.atomic && now.atomic;
        if (!told && current(cell.write) && !both_atomic && !before(cell.write, viewer)) {
            told = true;
            name_byte(i, place, sizeof place);
            report_race(cell.write, cell.write.atomic ? "updated" : "wrote", how, where, place,
                        viewer);
        }
        if (how == EMU_READ) {
            Access *slot = &cell.read[0];
            if (current(*slot) && slot->thread != thread && !before(*slot, viewer))
                slot = &cell.read[1];
            *slot = now;
            continue;
        }
        for (const Access &read : cell.read)
            if (!told && current(read) && !before(read, viewer)) {
                told = true;
                name_byte(i, place, sizeof place);
                report_race(read, "read", how, where, place, viewer);
            }
        cell.write = now;
    }
}

// The place of an address among the cells, or -1
static long cell_of(const void *pointer) {
    const unsigned char *p = static_cast<const unsigned char *>(pointer);
    if (size_t(p - world.statics) < shadow.statics) return p - world.statics;
    size_t dynamic = size_t(p - world.dynamic);
    return dynamic < shadow.bytes - shadow.statics ? long(shadow.statics + dynamic) : -1;
}

static void check_access(const void *pointer, size_t bytes, int how, Where where) {
    if (!emu_self) return;
    const unsigned char *p = static_cast<const unsigned char *>(pointer);
    if (size_t(p - world.block->stacks) < size_t(world.threads) * kStackBytes) {
        wgmma_accumulator_used(pointer, where);
        return;
    }
    if (outside_buffers(pointer, bytes)) {
        char text[128];
        describe_address(pointer, text, sizeof text);
        report("bounds", where, {}, self(), "out of bounds: this thread %s %zu bytes from %s",
               kVerb[how], bytes, text);
        abandon_block();
    }
    long at = cell_of(pointer);
    if (at < 0) return;
    size_t rest = std::min(bytes, shadow.bytes - size_t(at));
    check_bytes(size_t(at), rest, how, where, viewer_now());
}

void shadow_async(const AsyncCopy &copy, bool arrived) {
    long at = cell_of(copy.to);
    if (at < 0) return;
    const Fiber &me = *self();
    for (size_t i = size_t(at); i < size_t(at) + size_t(copy.bytes) && i < shadow.bytes; i++) {
        Cell &cell = shadow.cells[i];
        cell.copy_line = arrived ? 0 : uint32_t(copy.line);
        cell.copy_thread = me.index.linear;
        if (arrived) // it happens now, for all that synchronize with this thread from here on
            cell.write = {shadow.epoch, shadow.clock[me.index.linear],
                          uint32_t(copy.line) | kLineBit, uint16_t(me.index.linear), 0};
    }
}

void shadow_bulk(const AsyncCopy &copy, Clock &into) {
    uint32_t engine = world.threads;
    long at = cell_of(copy.to);
    std::vector<uint32_t> &seen = current(into);
    seen[engine] = shadow.clock[engine];
    for (size_t i = size_t(at); at >= 0 && i < size_t(at) + size_t(copy.bytes); i++) {
        if (i >= shadow.bytes) break;
        Cell &cell = shadow.cells[i];
        cell.copy_line = 0;
        cell.write = {shadow.epoch, shadow.clock[engine], uint32_t(copy.line) | kLineBit,
                      uint16_t(engine), 0};
    }
    shadow.clock[engine]++;
}

void shadow_matrix_read(uint32_t warpgroup, const Clock &issue, const void *p, size_t bytes,
                        int line) {
    emu_touch(p, bytes, EMU_NOTHING, line);
    long at = cell_of(p);
    if (at < 0) return;
    Viewer unit{world.threads + 1 + warpgroup, issue.epoch, issue.seen.data()};
    check_bytes(size_t(at), bytes, EMU_READ, {line, 0}, unit);
    const Access &write = shadow.cells[at].write;
    // copies of the engine, and what nobody wrote, need no fence
    if (!current(write) || write.thread >= world.threads || shadow.cells[at].copy_line) return;
    const Clock &own = shadow.fences[write.thread];
    bool by_writer = own.epoch > write.epoch ||
                     (own.epoch == write.epoch && own.seen[write.thread] >= write.clock);
    bool by_reader =
        issue.fence_epoch > write.epoch ||
        (issue.fence_epoch == write.epoch && issue.fenced[write.thread] >= write.clock);
    if (by_writer || by_reader) return;
    char place[64];
    name_byte(size_t(at), place, sizeof place);
    report("proxy", {line, 0}, unpack(write.where), self(),
           "wgmma reads %s, which thread %u of the block wrote on line {other}, without a "
           "fence.proxy.async between",
           place, write.thread);
}

void shadow_matrix_done(uint32_t warpgroup, Clock &done) {
    uint32_t unit = world.threads + 1 + warpgroup;
    current(done)[unit] = shadow.clock[unit]++;
}

} // namespace emu

using namespace emu;

extern "C" {

void emu_touch(const void *pointer, size_t bytes, int how, int line) {
    if (world.checked && how != EMU_NOTHING) {
        check_access(pointer, bytes, how, {line, 0});
    } else if (outside_buffers(pointer, bytes)) {
        char text[128];
        describe_address(pointer, text, sizeof text);
        emu_fail("bounds", line, "out of bounds: this thread %s %zu bytes from %s", kVerb[how],
                 bytes, text);
    }
}

// ---- calls that -fsanitize=thread puts before each access

static Where caller(const void *address) {
    uint64_t offset = code_offset(address); // of the next instruction
    return {0, offset ? offset - 1 : 0};
}

// The compiler says which accesses it takes to be aligned; to 8 bytes is enough for it.
static void check_aligned(const void *p, size_t bytes, Where where) {
    size_t alignment = bytes < 8 ? bytes : 8;
    if (emu_self && reinterpret_cast<uintptr_t>(p) % alignment)
        report("misaligned", where, {}, self(),
               "address %p is not a multiple of %zu, as an "
               "access to %zu bytes needs",
               p, alignment, bytes);
}

#define EMU_HOOK(name, bytes, how)                                                                 \
    void __tsan_unaligned_##name(void *p) {                                                        \
        check_access(p, bytes, how, caller(__builtin_return_address(0)));                          \
    }                                                                                              \
    void __tsan_##name(void *p) {                                                                  \
        Where where = caller(__builtin_return_address(0));                                         \
        check_aligned(p, bytes, where);                                                            \
        check_access(p, bytes, how, where);                                                        \
    }
#define EMU_HOOKS(n)                                                                               \
    EMU_HOOK(read##n, n, EMU_READ)                                                                 \
    EMU_HOOK(write##n, n, EMU_WRITE)                                                               \
    EMU_HOOK(volatile_read##n, n, EMU_ATOMIC)                                                      \
    EMU_HOOK(volatile_write##n, n, EMU_SET)                                                        \
    EMU_HOOK(read_write##n, n, EMU_WRITE)
EMU_HOOKS(1)
EMU_HOOKS(2)
EMU_HOOKS(4)
EMU_HOOKS(8)
EMU_HOOKS(16)

void __tsan_read_range(void *p, size_t n) {
    check_access(p, n, EMU_READ, caller(__builtin_return_address(0)));
}
void __tsan_write_range(void *p, size_t n) {
    check_access(p, n, EMU_WRITE, caller(__builtin_return_address(0)));
}
void *__tsan_memcpy(void *to, const void *from, size_t n) {
    check_access(from, n, EMU_READ, caller(__builtin_return_address(0)));
    check_access(to, n, EMU_WRITE, caller(__builtin_return_address(0)));
    return memcpy(to, from, n);
}
void *__tsan_memmove(void *to, const void *from, size_t n) {
    check_access(from, n, EMU_READ, caller(__builtin_return_address(0)));
    check_access(to, n, EMU_WRITE, caller(__builtin_return_address(0)));
    return memmove(to, from, n);
}
void *__tsan_memset(void *to, int value, size_t n) {
    check_access(to, n, EMU_WRITE, caller(__builtin_return_address(0)));
    return memset(to, value, n);
}
void __tsan_init(void) {}
void __tsan_func_entry(void *) {}
void __tsan_func_exit(void) {}
void __tsan_vptr_update(void **, void *) {}
void __tsan_vptr_read(void **) {}

// ---- calls of -fsanitize=alignment,bounds,shift-exponent; their data begin with a place

struct Place {
    const char *file;
    uint32_t line, column;
};
struct TypeName {
    uint16_t kind, info;
    char name[1];
};
struct AlignmentData {
    Place place;
    const TypeName *type;
    uint8_t log_alignment, what;
};
struct BoundsData {
    Place place;
    const TypeName *array, *index;
};

void __ubsan_handle_type_mismatch_v1(AlignmentData *data, uintptr_t pointer) {
    if (!emu_self) return;
    report("misaligned", {int(data->place.line), 0}, {}, self(),
           "address %p is not a multiple of %u, as an access of type %s needs",
           reinterpret_cast<void *>(pointer), 1u << data->log_alignment, data->type->name);
    if (!pointer) abandon_block();
}
void __ubsan_handle_out_of_bounds(BoundsData *data, uintptr_t index) {
    if (!emu_self) return;
    report("bounds", {int(data->place.line), 0}, {}, self(),
           "out of bounds: index %lld of an array of type %s", static_cast<long long>(index),
           data->array->name);
}
void __ubsan_handle_shift_out_of_bounds(Place *place, uintptr_t, uintptr_t right) {
    if (!emu_self) return;
    report("undefined", {int(place->line), 0}, {}, self(), "shift by %lld",
           static_cast<long long>(right));
}
void __ubsan_handle_divrem_overflow(Place *place, uintptr_t, uintptr_t) {
    if (!emu_self) return;
    report("undefined", {int(place->line), 0}, {}, self(), "division by zero, or overflow in one");
}

} // extern "C"

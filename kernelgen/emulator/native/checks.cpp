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
static struct {
    Cell *cells;
    size_t statics, bytes;       // static shared memory first, dynamic behind it
    uint32_t epoch, first_epoch; // now, and at the block's start
    bool known_start;            // false once a block was resumed: it may have written anything
    std::vector<uint32_t> clock; // of each thread, its own
    std::vector<uint32_t> seen;  // [thread][other]: how much of the other it has seen
    std::vector<uint32_t> seen_epoch;
} shadow;

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
        shadow.clock.assign(world.threads, 1);
        shadow.seen.assign(size_t(world.threads) * world.threads, 0);
        shadow.seen_epoch.assign(world.threads, 0);
    }
    shadow.first_epoch = ++shadow.epoch;
    shadow.known_start = true;
}

void shadow_barrier() { shadow.epoch++; }

void shadow_resume() {
    shadow.epoch++;
    shadow.known_start = false;
}

static uint32_t *seen_by(uint32_t thread) {
    uint32_t *row = &shadow.seen[size_t(thread) * world.threads];
    if (shadow.seen_epoch[thread] != shadow.epoch) {
        std::fill(row, row + world.threads, 0);
        shadow.seen_epoch[thread] = shadow.epoch;
    }
    return row;
}

void shadow_partial(const std::vector<uint32_t> &threads) {
    std::vector<uint32_t> all(world.threads, 0);
    for (uint32_t t : threads) {
        const uint32_t *row = seen_by(t);
        for (uint32_t i = 0; i < world.threads; i++) all[i] = std::max(all[i], row[i]);
        all[t] = std::max(all[t], shadow.clock[t]);
    }
    for (uint32_t t : threads) {
        std::copy(all.begin(), all.end(), seen_by(t));
        shadow.clock[t]++;
    }
}

static bool current(const Access &a) { return a.epoch >= shadow.first_epoch; }

// Whether all threads that synchronize as the program says find `a` done before now.
static bool before(const Access &a, uint32_t thread) {
    if (a.epoch < shadow.epoch || a.thread == thread) return true;
    return seen_by(thread)[a.thread] >= a.clock;
}

static const char *const kVerb[] = {"reads", "writes", "updates atomically"};

static void report_race(const Access &a, const char *did, int how, Where where, const char *place) {
    const Fiber &other = world.block->fibers[a.thread];
    report("race", where, unpack(a.where), self(),
           "race on %s: this thread %s what thread (%u, %u, %u) %s on line {other}, and nothing "
           "orders the two",
           place, kVerb[how], other.index.thread[0], other.index.thread[1], other.index.thread[2],
           did);
}

static void name_byte(size_t at, char *text, size_t size) {
    bool is_static = at < shadow.statics;
    snprintf(text, size, "byte %zu of %s shared memory", is_static ? at : at - shadow.statics,
             is_static ? "static" : "dynamic");
}

static void check_bytes(size_t first, size_t bytes, int how, Where where) {
    const Fiber &me = *self();
    uint32_t thread = me.index.linear;
    Access now{shadow.epoch, shadow.clock[thread],
               where.line ? uint32_t(where.line) | kLineBit : uint32_t(where.pc), uint16_t(thread),
               uint16_t(how == EMU_ATOMIC)};
    char place[64];
    bool told = false;
    for (size_t i = first; i < first + bytes; i++) {
        Cell &cell = shadow.cells[i];
        if (cell.hidden) return;
        bool written = current(cell.write) || !shadow.known_start;
        if (!told && how != EMU_WRITE && !written) {
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
        bool both_atomic = cell.write.atomic && how == EMU_ATOMIC;
        if (!told && current(cell.write) && !both_atomic && !before(cell.write, thread)) {
            told = true;
            name_byte(i, place, sizeof place);
            report_race(cell.write, cell.write.atomic ? "updated" : "wrote", how, where, place);
        }
        if (how == EMU_READ) {
            Access *slot = &cell.read[0];
            if (current(*slot) && slot->thread != thread && !before(*slot, thread))
                slot = &cell.read[1];
            *slot = now;
            continue;
        }
        for (const Access &read : cell.read)
            if (!told && current(read) && !before(read, thread)) {
                told = true;
                name_byte(i, place, sizeof place);
                report_race(read, "read", how, where, place);
            }
        cell.write = now;
    }
}

// The place of an address among the cells, or -1
static long cell_of(const void *pointer) {
    const unsigned char *p = static_cast<const unsigned char *>(pointer);
    if (size_t(p - world.statics) < shadow.statics) return p - world.statics;
    size_t dynamic = size_t(p - emu_dynamic_shared);
    return dynamic < shadow.bytes - shadow.statics ? long(shadow.statics + dynamic) : -1;
}

static void check_access(const void *pointer, size_t bytes, int how, Where where) {
    if (!emu_self) return;
    const unsigned char *p = static_cast<const unsigned char *>(pointer);
    if (size_t(p - world.block->stacks) < size_t(world.threads) * kStackBytes) return;
    if (outside_buffers(pointer, bytes)) {
        char text[128];
        describe_address(pointer, text, sizeof text);
        report("bounds", where, {}, self(), "out of bounds: this thread %s %zu bytes from %s",
               kVerb[how], bytes, text);
        abandon_block();
    }
    long at = cell_of(pointer);
    if (at >= 0) check_bytes(size_t(at), std::min(bytes, shadow.bytes - size_t(at)), how, where);
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

} // namespace emu

using namespace emu;

extern "C" {

void emu_touch(const void *pointer, size_t bytes, int how, int line) {
    if (world.checked) {
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
    EMU_HOOK(volatile_write##n, n, EMU_ATOMIC)                                                     \
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

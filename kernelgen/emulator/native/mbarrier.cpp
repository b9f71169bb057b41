// mbarriers: phases that end when enough threads have arrived and enough bytes have come.
//
// A bulk copy arrives as late as it may: when no thread of the block can run, and one waits at its
// mbarrier.  A thread that does not wait reads what was there before.
#include "internal.h"

#include <stdio.h>
#include <string.h>

#include <algorithm>

namespace emu {

namespace {

constexpr uint64_t kMark = 0x6d62617272696572; // in shared memory, for an mbarrier that is valid
constexpr uint32_t kMostCount = (1u << 20) - 1;
constexpr uint32_t kMostTimeouts = 64;

Mbarrier &find(void *place, int line) {
    Block &block = *world.block;
    self()->index.line = line;
    if (uintptr_t(place) % 8)
        emu_fail("misaligned", line, "an mbarrier at %p, which is not a multiple of 8", place);
    emu_touch(place, 8, EMU_ATOMIC, line);
    auto found = block.mbarriers.find(place);
    if (found == block.mbarriers.end())
        emu_fail("uninitialised", line, "no thread has made an mbarrier here with mbarrier.init");
    if (memcmp(place, &kMark, 8))
        emu_fail("bounds", line, "the mbarrier that line %d made has been overwritten",
                 found->second.line);
    return found->second;
}

void end_phase_if_complete(const void *place, Mbarrier &b) {
    if (b.pending || b.bytes) return;
    b.phase++;
    b.pending = b.expected;
    std::swap(b.ended, b.arriving);
    b.arriving = Clock();
    world.block->timeouts = 0;
    for (Fiber &f : world.block->fibers)
        if (f.state == kAtMbarrier && f.mbarrier == place) wake(f);
}

void arrive_at(const void *place, Mbarrier &b, uint32_t count, int line) {
    if (!count || count > b.pending)
        emu_fail("barrier", line,
                 "%u arrivals at an mbarrier whose phase lacks only %u of its %u (line %d)", count,
                 b.pending, b.expected, b.line);
    b.pending -= count;
    end_phase_if_complete(place, b);
}

void expect(Mbarrier &b, int64_t bytes, int line) {
    int64_t sum = b.bytes + bytes;
    if (sum > int64_t(kMostCount) || -sum > int64_t(kMostCount))
        emu_fail("barrier", line, "an mbarrier counts at most %u bytes, but would have %lld",
                 kMostCount, static_cast<long long>(sum));
    b.bytes = int32_t(sum);
}

// What an mbarrier's copies have brought; whether there was any.
bool deliver(const void *place, Mbarrier &b) {
    std::vector<AsyncCopy> copies;
    std::vector<std::pair<uint32_t, uint32_t>> tracked;
    copies.swap(b.copies);
    tracked.swap(b.tracked);
    for (const AsyncCopy &copy : copies) {
        arrive(copy);
        if (world.checked) shadow_bulk(copy, b.arriving);
        expect(b, -int64_t(copy.bytes), copy.line);
        end_phase_if_complete(place, b);
    }
    for (auto [thread, count] : tracked) { // of these a thread has waited for some itself
        std::vector<AsyncCopy> &own = world.block->fibers[thread].copies;
        size_t kept = 0;
        for (const AsyncCopy &copy : own) {
            if (copy.serial >= count) {
                own[kept++] = copy;
                continue;
            }
            arrive(copy);
            if (world.checked) shadow_bulk(copy, b.arriving);
        }
        own.resize(kept);
        arrive_at(place, b, 1, b.line);
    }
    return !copies.empty() || !tracked.empty();
}

} // namespace

void mbarrier_init(void *place, uint32_t count, int line) {
    if (!count || count > kMostCount)
        emu_fail("barrier", line, "an mbarrier of %u arrivals; 1 to %u are possible", count,
                 kMostCount);
    if (uintptr_t(place) % 8)
        emu_fail("misaligned", line, "an mbarrier at %p, which is not a multiple of 8", place);
    auto found = world.block->mbarriers.find(place);
    if (found != world.block->mbarriers.end() && !memcmp(place, &kMark, 8))
        emu_fail("barrier", line, "an mbarrier that line %d made is made again, and was not ended"
                 " with mbarrier.inval", found->second.line);
    emu_touch(place, 8, EMU_WRITE, line);
    memcpy(place, &kMark, 8);
    Mbarrier &made = world.block->mbarriers[place] = Mbarrier();
    made.expected = made.pending = count;
    made.line = line;
    made.maker = self()->index.linear;
    made.number = world.block->mbarriers_made++;
}

void mbarriers_show() { self()->shows = world.block->mbarriers_made; }

void mbarrier_invalidate(void *place, int line) {
    find(place, line);
    emu_touch(place, 8, EMU_WRITE, line);
    world.block->mbarriers.erase(place);
    memset(place, 0, 8);
}

void mbarrier_expect(void *place, uint32_t bytes, int line) {
    Mbarrier &b = find(place, line);
    expect(b, bytes, line);
    end_phase_if_complete(place, b); // where the bytes came first
}

uint64_t mbarrier_arrive(void *place, uint32_t count, int line) {
    Mbarrier &b = find(place, line);
    uint32_t phase = b.phase;
    if (world.checked) shadow_release(b.arriving);
    arrive_at(place, b, count, line);
    if (b.phase != phase) step_back();
    return phase;
}

uint32_t mbarrier_phase(void *place, int line) { return find(place, line).phase; }

// The thread's copies of cp.async so far: when they have come, that is an arrival.
void mbarrier_track_copies(void *place, int line) {
    Mbarrier &b = find(place, line);
    Fiber &me = *self();
    if (world.checked) shadow_release(b.arriving);
    b.tracked.push_back({me.index.linear, me.serial});
    if (world.launch->flags & kEagerCopies) deliver(place, b);
}

void mbarrier_copy(void *to, const void *from, uint32_t bytes, void *place, int line) {
    Mbarrier &b = find(place, line);
    if (world.block->fibers[b.maker].shows <= b.number && self()->shows <= b.number)
        report("proxy", {line, 0}, {}, self(),
               "the copy engine is given the mbarrier of line %d, without a fence.mbarrier_init or "
               "fence.proxy.async after it was made",
               b.line);
    emu_touch(from, bytes, EMU_READ, line);
    emu_touch(to, bytes, EMU_WRITE, line);
    AsyncCopy copy{to, from, int(bytes), int(bytes), line, 0, self()->index.linear, 0};
    if (world.checked) shadow_async(copy, false);
    b.copies.push_back(copy);
    if (world.launch->flags & kEagerCopies) deliver(place, b);
}

// Whether the phase of a parity has ended; that is, whether the one under way is of the other.
bool mbarrier_test(void *place, uint32_t parity, bool suspends, int line) {
    Mbarrier *b = &find(place, line);
    if ((b->phase & 1) == (parity & 1)) {
        Fiber &me = *self();
        me.mbarrier = place;
        if (suspends) {
            suspend(kAtMbarrier, line);
        } else {
            emu_yield(line);
            deliver(place, find(place, line));
        }
        b = &find(place, line);
        if ((b->phase & 1) == (parity & 1)) return false;
    }
    if (world.checked) shadow_acquire(b->ended);
    return true;
}

bool mbarriers_advance(Block &block) {
    std::vector<const void *> waited;
    for (const Fiber &f : block.fibers)
        if (f.state == kAtMbarrier) waited.push_back(f.mbarrier);
    if (waited.empty()) return false;
    std::sort(waited.begin(), waited.end());
    waited.erase(std::unique(waited.begin(), waited.end()), waited.end());
    for (const void *place : waited) {
        auto found = block.mbarriers.find(place);
        if (found != block.mbarriers.end()) deliver(place, found->second);
    }
    if (block.queued) return true;
    // waits end after some time, and a program may do something else then
    if (block.timeouts >= kMostTimeouts) return false;
    uint32_t timeouts = block.timeouts + 1;
    for (Fiber &f : block.fibers)
        if (f.state == kAtMbarrier) wake(f);
    block.timeouts = timeouts;
    return true;
}

void mbarriers_describe(const Fiber &fiber, char *text, size_t size) {
    auto found = world.block->mbarriers.find(fiber.mbarrier);
    if (found == world.block->mbarriers.end()) return;
    const Mbarrier &b = found->second;
    snprintf(text, size,
             "the mbarrier of line %d is in phase %u, which lacks %u of %u arrivals and %d bytes; ",
             b.line, b.phase, b.pending, b.expected, b.bytes);
}

void mbarriers_end(Block &block) {
    for (auto &[place, b] : block.mbarriers)
        for (const AsyncCopy &copy : b.copies)
            report("async", {copy.line, 0}, {}, &block.fibers[copy.thread],
                   "the block ended before this copy of %d bytes was waited for", copy.bytes);
}

} // namespace emu

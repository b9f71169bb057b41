// Instructions of asynchronous copies and mbarriers, and jumps, which waits at these need.
#include "ptx.h"

namespace emu::ptx {

namespace {

constexpr Type kWord, kWide{kBits, 64, 1, 0};

void *object(Exec &e, const Instr &i, size_t operand) {
    return address(e, i, i.operands[operand]);
}

void init(Exec &e, const Instr &i) {
    mbarrier_init(object(e, i, 0), uint32_t(e.get(i.operands[1], kWord)), e.line);
}

void invalidate(Exec &e, const Instr &i) { mbarrier_invalidate(object(e, i, 0), e.line); }

void expect_bytes(Exec &e, const Instr &i) {
    mbarrier_expect(object(e, i, 0), uint32_t(e.get(i.operands[1], kWord)), e.line);
}

// mbarrier.arrive{.expect_tx} {state,} [object]{, count or bytes}
void arrive_instr(Exec &e, const Instr &i) {
    size_t at = i.operands[0].form == Operand::kMemory ? 0 : 1;
    void *place = object(e, i, at);
    bool more = i.operands.size() > at + 1;
    uint32_t number = more ? uint32_t(e.get(i.operands[at + 1], kWord)) : 1;
    if (i.has("expect_tx")) {
        mbarrier_expect(place, number, e.line);
        number = 1;
    }
    uint64_t state = mbarrier_arrive(place, number, e.line);
    if (at) e.set(i.operands[0], state);
}

// mbarrier.{try,test}_wait{.parity} done, [object], parity or state{, time}
void wait(Exec &e, const Instr &i) {
    bool parity = i.has("parity");
    uint32_t which = uint32_t(e.get(i.operands[2], parity ? kWord : kWide));
    e.set(i.operands[0], mbarrier_test(object(e, i, 1), which, i.has("try_wait"), e.line));
}

void bulk_copy(Exec &e, const Instr &i) {
    void *to = address_in(true, e, i, i.operands[0]);
    void *from = address_in(false, e, i, i.operands[1]);
    uint32_t bytes = uint32_t(e.get(i.operands[2], kWord));
    void *place = address_in(true, e, i, i.operands[3]);
    aligned(e, i, to, 16);
    aligned(e, i, from, 16);
    if (bytes % 16)
        emu_fail("misaligned", e.line,
                 "a copy of %u bytes, which is not a multiple of 16, in \"%s\"", bytes,
                 i.text.c_str());
    mbarrier_copy(to, from, bytes, place, e.line);
}

void track(Exec &e, const Instr &i) { mbarrier_track_copies(object(e, i, 0), e.line); }

void proxy_fence(Exec &, const Instr &) {
    mbarriers_show();
    if (world.checked) shadow_proxy_fence();
}

void show_mbarriers(Exec &, const Instr &) { mbarriers_show(); }

void set_registers(Exec &e, const Instr &i) {
    uint64_t count = e.get(i.operands[0], kWord);
    if (count < 24 || count > 256 || count % 8)
        emu_fail("instruction", e.line, "\"%s\": 24 to 256 registers in eights are possible",
                 i.text.c_str());
}

// elect.sync lane|elected, mask: the lowest lane of the mask, always
void elect(EmuOp *const *ops, uint64_t mask, int size) {
    int leader = __builtin_ctzll(mask);
    for (int l = 0; l < size; l++) {
        if (!ops[l]) continue;
        const WarpOp &op = *static_cast<WarpOp *>(ops[l]);
        const Operand &to = op.instr->operands[0];
        op.exec->set(to, uint64_t(leader));
        if (to.second >= 0) op.exec->registers[to.second] = l == leader;
    }
}

void elect_sync(Exec &e, const Instr &i) { warp_op(e, i, e.get(i.operands[1], kWord), elect); }

void jump(Exec &e, const Instr &i) { e.next = size_t(i.code); }

Handler find_mbarrier(const Instr &i) {
    size_t n = i.operands.size();
    if (i.words.size() < 3 || i.words.back() != "b64" || i.has("shared::cluster")) return nullptr;
    if (i.has("init")) return n == 2 ? init : nullptr;
    if (i.has("inval")) return n == 1 ? invalidate : nullptr;
    if (i.has("test_wait") || i.has("try_wait")) return n >= 3 ? wait : nullptr;
    if (i.has("noComplete")) return nullptr;
    if (i.has("arrive")) return n >= (i.has("expect_tx") ? 2u : 1u) ? arrive_instr : nullptr;
    return i.words[1] == "expect_tx" && n == 2 ? expect_bytes : nullptr;
}

} // namespace

Handler find_async(Instr &i) {
    const std::string &name = i.words[0];
    size_t n = i.operands.size();
    if (name == "bra") return jump;
    if (name == "mbarrier") return find_mbarrier(i);
    if (name == "setmaxnreg") return n == 1 ? set_registers : nullptr;
    if (name == "elect") return i.has("sync") && n == 2 ? elect_sync : nullptr;
    if (name == "fence" && i.has("mbarrier_init")) return show_mbarriers;
    if (name == "fence" && i.has("proxy")) return i.has("async") ? proxy_fence : nullptr;
    if (name != "cp" || !i.has("async")) return nullptr;
    if (i.has("mbarrier")) return i.has("arrive") && i.has("noinc") && n == 1 ? track : nullptr;
    bool to_shared = i.words.size() > 3 && i.words[3].compare(0, 6, "shared") == 0;
    if (!i.has("bulk") || i.has("tensor") || i.has("prefetch") || !to_shared) return nullptr;
    bool known = i.has("global") && i.has("mbarrier::complete_tx::bytes");
    return known && !i.has_prefix("multicast") && n >= 4 ? bulk_copy : nullptr;
}

} // namespace emu::ptx

// Instructions that touch memory or wait.
#include <string.h>

#include <algorithm>
#include <map>

#include "ptx.h"

namespace emu::ptx {

void *address_in(bool shared, const Exec &exec, const Instr &instr, const Operand &memory) {
    uint64_t value = uint64_t(memory.number);
    Operand base = memory;
    base.form = Operand::kRegister;
    base.negated = false;
    if (memory.slot != -1) value += exec.get(base, Type{kBits, 64, 1, 0});
    if (memory.second >= 0) value += exec.registers[memory.second];
    if (shared) return emu_shared_pointer(value, exec.line);
    if (value < kWindowEnd)
        emu_fail("bounds", exec.line, "0x%llx is no address of global memory in \"%s\"",
                 static_cast<unsigned long long>(value), instr.text.c_str());
    return reinterpret_cast<void *>(value);
}

void *address(const Exec &exec, const Instr &instr, const Operand &memory) {
    return address_in(instr.has_prefix("shared"), exec, instr, memory);
}

void aligned(const Exec &e, const Instr &i, const void *p, size_t bytes) {
    if (reinterpret_cast<uintptr_t>(p) % bytes)
        emu_fail("misaligned", e.line, "address %p in \"%s\" is not a multiple of %zu", p,
                 i.text.c_str(), bytes);
}

static uint64_t extended(const void *p, Type t) {
    uint64_t value = 0;
    memcpy(&value, p, t.bits / 8);
    if (t.kind == kSigned && t.bits < 32)
        value = uint32_t(int64_t(value << (64 - t.bits)) >> (64 - t.bits));
    return value;
}

static void load(Exec &e, const Instr &i) {
    Type t = i.types.back();
    const Operand &to = i.operands[0];
    size_t size = size_t(t.bits) * t.lanes / 8, count = std::max<size_t>(1, to.parts.size());
    t.bits = uint8_t(8 * size);
    char *p = static_cast<char *>(address(e, i, i.operands[1]));
    aligned(e, i, p, size * count);
    bool atomic = i.has("acquire") || i.has("relaxed") || i.has("volatile");
    if (atomic && count == 1 && (size == 4 || size == 8)) {
        int type = size == 8 ? EMU_U64 : EMU_U32;
        e.set(to, emu_atomic(p, EMU_LOAD, type, 0, 0, e.line));
        return;
    }
    emu_touch(p, size * count, EMU_READ, e.line);
    if (to.form != Operand::kVector) e.set(to, extended(p, t));
    for (size_t n = 0; n < to.parts.size(); n++) e.set(to.parts[n], extended(p + n * size, t));
}

static void store(Exec &e, const Instr &i) {
    Type t = i.types.back();
    const Operand &from = i.operands[1];
    size_t size = size_t(t.bits) * t.lanes / 8, count = std::max<size_t>(1, from.parts.size());
    char *p = static_cast<char *>(address(e, i, i.operands[0]));
    aligned(e, i, p, size * count);
    bool atomic = i.has("release") || i.has("relaxed") || i.has("volatile");
    if (atomic && count == 1 && (size == 4 || size == 8)) {
        emu_atomic(p, EMU_STORE, size == 8 ? EMU_U64 : EMU_U32, e.get(from, t), 0, e.line);
        return;
    }
    emu_touch(p, size * count, EMU_WRITE, e.line);
    for (size_t n = 0; n < count; n++) {
        uint64_t value = e.get(from.parts.empty() ? from : from.parts[n], t);
        memcpy(p + n * size, &value, size);
    }
}

static void atomic(Exec &e, const Instr &i) {
    static const std::map<std::string, EmuRmw> operations = {
        {"add", EMU_ADD}, {"exch", EMU_EXCH}, {"min", EMU_MIN}, {"max", EMU_MAX},
        {"inc", EMU_INC}, {"dec", EMU_DEC},   {"cas", EMU_CAS}, {"and", EMU_BAND},
        {"or", EMU_BOR},  {"xor", EMU_BXOR}};
    Type t = i.types.back();
    bool red = i.words[0] == "red";
    size_t at = red ? 0 : 1; // red has no result
    int type = t.bits == 64 ? EMU_U64 : EMU_U32;
    if (t.kind == kSigned) type = t.bits == 64 ? EMU_S64 : EMU_S32;
    if (t.kind == kFloat) {
        type = t.bits == 64 ? EMU_F64 : EMU_F32;
        if (t.bits == 16 && t.family == 'f') type = t.lanes == 2 ? EMU_F16X2 : EMU_F16;
        if (t.bits == 16 && t.family == 'b') type = t.lanes == 2 ? EMU_BF16X2 : EMU_BF16;
    }
    if (t.bits == 16 && t.kind != kFloat) type = EMU_U16;
    int op = -1;
    for (const std::string &w : i.words)
        if (operations.count(w)) op = operations.at(w);
    if (op < 0 || i.operands.size() < at + 2) unknown(i, e.line);
    void *p = address(e, i, i.operands[at]);
    uint64_t first = e.get(i.operands[at + 1], t);
    uint64_t second = op == EMU_CAS ? e.get(i.operands[at + 2], t) : 0;
    uint64_t old = op == EMU_CAS ? emu_atomic(p, op, type, second, first, e.line)
                                 : emu_atomic(p, op, type, first, 0, e.line);
    if (!red) e.set(i.operands[0], old);
}

static void to_shared(Exec &e, const Instr &i) {
    Type t = i.types.back();
    uint64_t value = e.get(i.operands[1], t);
    void *pointer = reinterpret_cast<void *>(value);
    if (i.has("to") && i.has_prefix("shared")) value = emu_shared_address(pointer);
    else if (i.has_prefix("shared")) value = uint64_t(emu_shared_pointer(value, e.line));
    e.set(i.operands[0], value);
}

static void copy_async(Exec &e, const Instr &i) {
    if (i.has("commit_group")) return emu_async_commit();
    if (i.has("wait_all")) return emu_async_wait(-1);
    Type t;
    if (i.has("wait_group")) return emu_async_wait(int(e.get(i.operands[0], t)));
    char *to = static_cast<char *>(address_in(true, e, i, i.operands[0]));
    int bytes = int(e.get(i.operands[2], t)), from_bytes = bytes;
    // the last operand is a cache policy where the name says so
    size_t sizes = i.operands.size() - (i.has_prefix("L2::cache_hint") ? 1 : 0);
    if (sizes > 3) from_bytes = int(e.get(i.operands[3], t));
    bool fits = i.has("cg") ? bytes == 16 : bytes == 4 || bytes == 8 || bytes == 16;
    if (!fits || from_bytes < 0 || from_bytes > bytes)
        emu_fail("instruction", e.line, "cp.async of %d bytes from %d: \"%s\"", bytes, from_bytes,
                 i.text.c_str());
    char *from = static_cast<char *>(address_in(false, e, i, i.operands[1]));
    aligned(e, i, to, size_t(bytes));
    if (from_bytes) aligned(e, i, from, size_t(bytes));
    emu_async_copy(to, from, bytes, from_bytes, e.line);
}

static void barrier(Exec &e, const Instr &i) {
    Type t;
    if (i.has("warp")) {
        warp_op(e, i, e.get(i.operands[0], t), [](EmuOp *const *, uint64_t, int) {}, true);
        return;
    }
    int id = i.operands.empty() ? 0 : int(e.get(i.operands[0], t));
    int count = i.operands.size() > 1 ? int(e.get(i.operands[1], t)) : 0;
    emu_barrier(id, count, e.line, 0);
}

static void nothing(Exec &, const Instr &) {}
static void sleep(Exec &e, const Instr &) { emu_yield(e.line); }
static void policy(Exec &e, const Instr &i) { e.set(i.operands[0], 1); }
static void trap(Exec &e, const Instr &) { emu_fail("trap", e.line, "the kernel ran into a trap"); }
static void active(Exec &e, const Instr &i) {
    uint32_t lanes = emu_self->subgroup_lanes;
    e.set(i.operands[0], lanes >= 32 ? 0xffffffffu : (1u << lanes) - 1);
}

Handler find_memory(Instr &instr) {
    struct Entry {
        Handler handler;
        size_t operands;
        bool typed;
    };
    static const std::map<std::string, Entry> names = {
        {"ld", {load, 2, true}},
        {"ldu", {load, 2, true}},
        {"st", {store, 2, true}},
        {"atom", {atomic, 3, true}},
        {"red", {atomic, 2, true}},
        {"cvta", {to_shared, 2, true}},
        {"membar", {nothing, 0, false}},
        {"fence", {nothing, 0, false}},
        {"prefetch", {nothing, 1, false}},
        {"prefetchu", {nothing, 1, false}},
        {"griddepcontrol", {nothing, 0, false}},
        {"nanosleep", {sleep, 1, false}},
        {"createpolicy", {policy, 1, false}},
        {"trap", {trap, 0, false}},
        {"activemask", {active, 1, false}},
    };
    bool waits = instr.words[0] == "bar" || instr.words[0] == "barrier";
    if (waits) {
        bool known = instr.has("sync") && !instr.has("cluster") && !instr.has("red");
        return known && (!instr.has("warp") || !instr.operands.empty()) ? barrier : nullptr;
    }
    if (instr.words[0] == "cp" && instr.has("async")) {
        if (instr.has("bulk") || instr.has("mbarrier")) return nullptr;
        bool group = instr.has("commit_group") || instr.has("wait_all");
        if (instr.has("wait_group")) return instr.operands.size() == 1 ? copy_async : nullptr;
        return group || instr.operands.size() >= 3 ? copy_async : nullptr;
    }
    auto found = names.find(instr.words[0]);
    if (found == names.end() || instr.operands.size() < found->second.operands) return nullptr;
    return found->second.typed && instr.types.empty() ? nullptr : found->second.handler;
}

} // namespace emu::ptx

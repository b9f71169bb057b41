// wgmma: products of matrices by the 128 threads of a warpgroup, from shared memory.
//
// They happen as late as they may: at the wait, from what shared memory holds then.  Until then the
// accumulators hold a NaN that nobody else makes.
#include <stdio.h>
#include <string.h>

#include <algorithm>
#include <deque>
#include <list>

#include "ptx.h"

namespace emu {

namespace {
// What accumulators hold while a product is under way
constexpr uint32_t kUnderWay = 0x7fd1a7e5;

// Where elements of an operand lie in shared memory, as its 64-bit descriptor says
struct Matrix {
    uint32_t start, leading, stride, swizzle; // bytes; 0 or 32, 64, 128
    bool k_major;
};

// The sums of one tile, in each thread n/2 of them
struct Accumulator {
    std::vector<uint32_t> sums;   // 64 x n
    std::vector<void *> targets;  // [thread][i]: the variables that the assembly names
    std::vector<bool> has_result; // of each thread
    uint32_t left = 0;            // products not done yet
    int n, line;
};

struct Product {
    Accumulator *to;
    const ptx::Instr *instr;
    Matrix a, b;
    std::vector<uint64_t> a_words; // where A is in registers: [thread][4]
    std::vector<uint8_t> before;   // what shared memory held when it was issued
    uint32_t group;
    bool from_zero, negate;
    int line;
    Clock issued;
};
} // namespace

struct Wgmma {
    std::deque<Product> products;
    std::list<Accumulator> pending;
    std::vector<Clock> done; // of each group
};

void wgmma_accumulator_used(const void *pointer, Where where) {
    Fiber &me = *self();
    uint32_t w = me.index.linear / kWarpgroup, l = me.index.linear % kWarpgroup;
    if (!world.block->warpgroups[w].wgmma) return;
    for (const Accumulator &one : world.block->warpgroups[w].wgmma->pending) {
        if (one.has_result[l]) continue;
        auto first = one.targets.begin() + long(l * uint32_t(one.n) / 2), last = first + one.n / 2;
        if (std::find(first, last, pointer) != last) me.early.push_back({pointer, where});
    }
}

void wgmma_report_early(const EmuOperand *operands, int count) {
    Fiber &me = *self();
    for (auto [pointer, where] : me.early) {
        bool taken_in = false;
        for (int i = 0; i < count; i++) taken_in |= operands[i].target == pointer;
        if (!taken_in)
            report("async", where, {}, &me,
                   "an accumulator of wgmma is used before wgmma.wait_group");
    }
    me.early.clear();
}

void wgmma_end(Block &block) {
    for (size_t w = 0; w < block.warpgroups.size(); w++) {
        if (!block.warpgroups[w].wgmma) continue;
        for (const Accumulator &one : block.warpgroups[w].wgmma->pending)
            report("async", {one.line, 0}, {}, &block.fibers[w * kWarpgroup],
                   "the block ended before all of the warpgroup waited for this wgmma");
    }
}

} // namespace emu

namespace emu::ptx {

namespace {

constexpr Type kWord, kWide{kBits, 64, 1, 0}, kTruth{kPredicate, 1, 1, 0};

const WarpOp &thread(EmuOp *const *ops, uint32_t l) { return *static_cast<WarpOp *>(ops[l]); }

Wgmma &state_of(uint32_t warpgroup) {
    std::shared_ptr<Wgmma> &state = world.block->warpgroups[warpgroup].wgmma;
    if (!state) state = std::make_shared<Wgmma>();
    return *state;
}

// ---- operands in shared memory

Matrix describe(const Exec &e, const Instr &i, uint64_t bits, bool k_major) {
    constexpr uint64_t kReserved = 0x3FF1C000C000C000; // base offset besides, which must be 0
    if (bits & (kReserved | uint64_t(7) << 49))
        emu_fail("instruction", e.line,
                 "the matrix descriptor 0x%llx in \"%.60s\" has a base offset or reserved bits "
                 "set, which the emulator does not know",
                 static_cast<unsigned long long>(bits), i.text.c_str());
    auto field = [bits](int at) { return uint32_t(bits >> at & 0x3fff) << 4; };
    const uint32_t swizzles[] = {0, 128, 64, 32};
    return {field(0), field(16), field(32), swizzles[bits >> 62], k_major};
}

// The address of 16 bytes: chunk `c` of the contiguous axis (K where it is major, else M or N) at
// place `r` of the other one.  Eight places of the latter are together; a swizzle exchanges chunks
// by bits of their own address.
uint32_t chunk_address(const Matrix &m, uint32_t r, uint32_t c) {
    uint32_t at = m.start;
    if (!m.swizzle) { // eight rows of 16 bytes are together
        at += r % 8 * 16;
        at += m.k_major ? r / 8 * m.stride + c * m.leading : c * m.stride + r / 8 * m.leading;
        return at & kDescriptorBits;
    }
    uint32_t chunks = m.swizzle / 16;
    at += r / 8 * m.stride + r % 8 * m.swizzle + c % chunks * 16;
    if (!m.k_major) at += c / chunks * m.leading;
    at &= kDescriptorBits;
    return at ^ (at >> 7 & (chunks - 1)) << 4;
}

template <class T> T number(const uint8_t *p, Type t);
template <> float number<float>(const uint8_t *p, Type t) {
    uint64_t bits = 0;
    memcpy(&bits, p, t.bits / 8);
    return to_float(bits, t);
}
template <> int32_t number<int32_t>(const uint8_t *p, Type t) {
    return t.kind == kSigned ? int32_t(int8_t(*p)) : int32_t(*p);
}

// Rows of an operand (along M or N), and how many chunks of 16 bytes hold them
struct Shape {
    uint32_t rows, depth;
    Type type;
    uint32_t places(const Matrix &m) const { return m.k_major ? rows : depth; }
    uint32_t chunks(const Matrix &m) const {
        return (m.k_major ? depth : rows) * type.bits / 128;
    }
};

// Does something with the bytes of each chunk: use(bytes, r, c).
template <class Use> void each_chunk(const Matrix &m, const Shape &s, int line, Use use) {
    for (uint32_t r = 0; r < s.places(m); r++)
        for (uint32_t c = 0; c < s.chunks(m); c++) {
            void *p = emu_shared_pointer(kWindow + chunk_address(m, r, c), line);
            emu_touch(p, 16, EMU_NOTHING, line);
            use(static_cast<uint8_t *>(p), r, c);
        }
}

// All elements of an operand, [row][k]
template <class T> void load_matrix(std::vector<T> &to, const Matrix &m, const Shape &s, int line) {
    uint32_t per = 128u / s.type.bits, bytes = s.type.bits / 8;
    to.resize(s.rows * s.depth);
    each_chunk(m, s, line, [&](const uint8_t *from, uint32_t r, uint32_t c) {
        for (uint32_t j = 0; j < per; j++) {
            uint32_t row = m.k_major ? r : c * per + j, k = m.k_major ? c * per + j : r;
            to[row * s.depth + k] = number<T>(from + j * bytes, s.type);
        }
    });
}

// ---- registers: thread l of the warpgroup has rows 16*(l/32) + (l%32)/4 and 8 below; of A in
// register r the word l%4 of chunk r/2 of k, of D in register i columns 8*(i/4) + 2*(l%4) + i%2

uint32_t row_of(uint32_t l, uint32_t lower) { return l / 32 * 16 + l % 32 / 4 + 8 * lower; }

template <class T>
void load_registers(std::vector<T> &to, const Product &p, uint32_t depth, Type t) {
    uint32_t per = 32u / t.bits;
    to.resize(64 * depth);
    for (uint32_t l = 0; l < kWarpgroup; l++)
        for (uint32_t r = 0; r < 4; r++)
            for (uint32_t j = 0; j < per; j++) {
                auto word = uint32_t(p.a_words[l * 4 + r]);
                auto *bytes = reinterpret_cast<const uint8_t *>(&word) + j * t.bits / 8;
                uint32_t k = r / 2 * 4 * per + l % 4 * per + j;
                to[row_of(l, r % 2) * depth + k] = number<T>(bytes, t);
            }
}

Shape left_of(const Product &p) {
    Type t = p.instr->types[1];
    return {64, 256u / t.bits, t};
}
Shape right_of(const Product &p) {
    Type t = p.instr->types[2];
    return {uint32_t(p.to->n), 256u / t.bits, t};
}

template <class Use> void each_chunk(const Product &p, Use use) {
    if (p.a_words.empty()) each_chunk(p.a, left_of(p), p.line, use);
    each_chunk(p.b, right_of(p), p.line, use);
}

// Shared memory must still hold what it held when the product was issued: the unit may have read it
// then.  A checked build says who wrote it, and whether it might have.
void check_unchanged(uint32_t warpgroup, const Product &p) {
    size_t at = 0;
    bool same = true;
    each_chunk(p, [&](const uint8_t *bytes, uint32_t, uint32_t) {
        if (world.checked) shadow_matrix_read(warpgroup, p.issued, bytes, 16, p.line);
        else same &= !memcmp(bytes, &p.before[at], 16);
        at += 16;
    });
    if (!same)
        report("race", {p.line, 0}, {}, self(),
               "shared memory that this wgmma reads was written before wgmma.wait_group");
}

// T is the type of products and sums.
template <class T> void multiply(const Product &p) {
    const Instr &i = *p.instr;
    Shape l = left_of(p), r = right_of(p);
    uint32_t depth = l.depth, n = r.rows;
    std::vector<T> left, right, turned(depth * n);
    if (p.a_words.empty()) load_matrix(left, p.a, l, p.line);
    else load_registers(left, p, depth, l.type);
    load_matrix(right, p.b, r, p.line);
    for (uint32_t x = 0; x < n; x++)
        for (uint32_t k = 0; k < depth; k++) turned[k * n + x] = right[x * depth + k];
    T *sums = reinterpret_cast<T *>(p.to->sums.data());
    std::vector<T> row(n);
    for (uint32_t y = 0; y < 64; y++) {
        std::fill(row.begin(), row.end(), T(0));
        for (uint32_t k = 0; k < depth; k++) {
            T factor = p.negate ? -left[y * depth + k] : left[y * depth + k];
            const T *other = &turned[k * n];
            for (uint32_t x = 0; x < n; x++) row[x] += factor * other[x];
        }
        for (uint32_t x = 0; x < n; x++) {
            T &sum = sums[y * n + x];
            T old = p.from_zero ? T(0) : sum;
            if (i.has("satfinite")) {
                int64_t wide = int64_t(old) + int64_t(row[x]);
                sum = T(std::min<int64_t>(std::max<int64_t>(wide, INT32_MIN), INT32_MAX));
            } else {
                sum = old + row[x];
            }
        }
    }
}

void execute(uint32_t warpgroup, Wgmma &state) {
    const Product &p = state.products.front();
    check_unchanged(warpgroup, p);
    if (p.instr->types[0].kind == kFloat) multiply<float>(p);
    else multiply<int32_t>(p);
    p.to->left--;
    if (world.checked) {
        if (state.done.size() <= p.group) state.done.resize(p.group + 1);
        shadow_matrix_done(warpgroup, state.done[p.group]);
    }
    state.products.pop_front();
}

uint32_t sum_at(const Accumulator &one, uint32_t l, uint32_t i) {
    return one.sums[row_of(l, i / 2 % 2) * uint32_t(one.n) + i / 4 * 8 + l % 4 * 2 + i % 2];
}

// ---- the instructions

// The accumulator that all threads name: one that is pending, or a new one
Accumulator &accumulator(EmuOp *const *ops, Wgmma &state, int n, int line) {
    uint32_t count = uint32_t(n) / 2;
    std::vector<void *> targets;
    for (uint32_t l = 0; l < kWarpgroup; l++) {
        const WarpOp &op = thread(ops, l);
        for (const Operand &part : op.instr->operands[0].parts) {
            void *target = part.slot >= 0 ? op.exec->operands[part.slot].target : nullptr;
            if (!target)
                emu_fail("instruction", line,
                         "the accumulators of wgmma must be operands of the asm statement");
            targets.push_back(target);
        }
    }
    for (Accumulator &one : state.pending) {
        uint32_t same = 0;
        for (uint32_t l = 0; l < kWarpgroup; l++) {
            bool this_one = one.targets[l * uint32_t(one.n) / 2] == targets[l * count];
            same += this_one && !one.has_result[l];
        }
        if (!same) continue;
        if (same == kWarpgroup && one.targets == targets) return one;
        emu_fail("async", line,
                 "this wgmma adds to accumulators of that of line %d, for which some threads of "
                 "the warpgroup have waited and others have not", one.line);
    }
    state.pending.emplace_back();
    Accumulator &made = state.pending.back();
    made.n = n;
    made.line = line;
    made.targets = std::move(targets);
    made.has_result.assign(kWarpgroup, false);
    made.sums.assign(64u * uint32_t(n), 0);
    for (uint32_t l = 0; l < kWarpgroup; l++)
        for (uint32_t i = 0; i < count; i++) {
            const WarpOp &op = thread(ops, l);
            made.sums[row_of(l, i / 2 % 2) * uint32_t(n) + i / 4 * 8 + l % 4 * 2 + i % 2] =
                uint32_t(op.exec->get(op.instr->operands[0].parts[i], kWord));
        }
    return made;
}

void issue(EmuOp *const *ops, uint64_t, int) {
    const WarpOp &first = thread(ops, 0);
    const Instr &i = *first.instr;
    uint32_t warpgroup = first.fiber->index.linear / kWarpgroup;
    bool has_words = i.operands[1].form == Operand::kVector;
    uint32_t groups = first.fiber->wgmma_groups;
    Product p;
    auto same = [&](size_t operand, Type t) {
        uint64_t value = first.exec->get(i.operands[operand], t);
        for (uint32_t l = 1; l < kWarpgroup; l++)
            if (thread(ops, l).exec->get(i.operands[operand], t) != value)
                emu_fail("mask", first.line,
                         "threads of a warpgroup give \"%.60s\" different values of operand %zu",
                         i.text.c_str(), operand);
        return value;
    };
    for (uint32_t l = 0; l < kWarpgroup; l++) {
        const Fiber &fiber = *thread(ops, l).fiber;
        if (!fiber.wgmma_fenced)
            emu_fail("async", first.line, "wgmma.mma_async before any wgmma.fence of thread %u",
                     fiber.index.linear);
        if (fiber.wgmma_groups != groups)
            emu_fail("mask", first.line,
                     "threads of a warpgroup have committed different numbers of wgmma groups");
        for (size_t r = 0; has_words && r < 4; r++)
            p.a_words.push_back(thread(ops, l).exec->get(i.operands[1].parts[r], kWord));
    }
    bool is_float = i.types[0].kind == kFloat;
    size_t scales = is_float ? 2 : 0; // 1 or -1 of each side, then whether each is transposed
    auto option = [&](size_t at) {
        return at < i.operands.size() ? int64_t(first.exec->get(i.operands[at], kWide)) : 0;
    };
    bool turned_a = !has_words && option(4 + scales) != 0;
    bool turned_b = option(4 + scales + (has_words ? 0 : 1)) != 0;
    p.negate = is_float && (int32_t(option(4)) < 0) != (int32_t(option(5)) < 0);
    if (!has_words) p.a = describe(*first.exec, i, same(1, kWide), !turned_a);
    p.b = describe(*first.exec, i, same(2, kWide), !turned_b);
    p.from_zero = !same(3, kTruth);
    p.instr = &i;
    p.group = groups;
    p.line = first.line;
    int n = 0;
    for (const std::string &w : i.words)
        if (sscanf(w.c_str(), "m64n%dk", &n) == 1) break;
    Wgmma &state = state_of(warpgroup);
    p.to = &accumulator(ops, state, n, first.line);
    p.to->left++;
    if (world.checked) shadow_issue(warpgroup, p.issued);
    else
        each_chunk(p, [&](const uint8_t *bytes, uint32_t, uint32_t) {
            p.before.insert(p.before.end(), bytes, bytes + 16);
        });
    state.products.push_back(std::move(p));
    for (uint32_t l = 0; l < kWarpgroup; l++)
        for (const Operand &part : i.operands[0].parts) thread(ops, l).exec->set(part, kUnderWay);
}

void mma_async(Exec &e, const Instr &i) {
    WarpOp op;
    op.mask = 0;
    op.run = issue;
    op.site = &i;
    op.name = "wgmma";
    op.line = e.line;
    op.orders_memory = false;
    op.exec = &e;
    op.instr = &i;
    op.fiber = self();
    warpgroup_op(&op);
}

void fence(Exec &, const Instr &) { self()->wgmma_fenced = true; }
void commit(Exec &, const Instr &) { self()->wgmma_groups++; }

// All groups but the last few are done for this thread, and its accumulators have their sums.
void wait_group(Exec &e, const Instr &i) {
    Fiber &me = *self();
    uint32_t left = uint32_t(e.get(i.operands[0], kWord));
    uint32_t warpgroup = me.index.linear / kWarpgroup, l = me.index.linear % kWarpgroup;
    Wgmma &state = state_of(warpgroup);
    while (!state.products.empty() && state.products.front().group + left < me.wgmma_groups)
        execute(warpgroup, state);
    for (uint32_t g = 0; world.checked && g < state.done.size() && g + left < me.wgmma_groups; g++)
        shadow_acquire(state.done[g]);
    for (auto one = state.pending.begin(); one != state.pending.end();) {
        uint32_t count = uint32_t(one->n) / 2;
        for (uint32_t d = 0; !one->left && !one->has_result[l] && d < count; d++) {
            void *target = one->targets[l * count + d];
            uint32_t sum = sum_at(*one, l, d);
            if (memcmp(target, &kUnderWay, 4))
                emu_fail("async", e.line,
                         "accumulator %u of the wgmma of line %d was written, or moved to another "
                         "variable, before this wait",
                         d, one->line);
            memcpy(target, &sum, 4);
        }
        if (!one->left) one->has_result[l] = true;
        bool all = std::find(one->has_result.begin(), one->has_result.end(), false) ==
                   one->has_result.end();
        one = all ? state.pending.erase(one) : std::next(one);
    }
}

bool known_product(const Instr &i) {
    int n = 0, k = 0;
    for (const std::string &w : i.words)
        if (sscanf(w.c_str(), "m64n%dk%d", &n, &k) == 2) break;
    if (i.types.size() != 3 || i.operands.size() < 4 || i.has_prefix("sp")) return false;
    const Type &d = i.types[0], &a = i.types[1], &b = i.types[2];
    if (a.bits != b.bits || d.bits != 32 || k * a.bits != 256 || n < 8 || n > 256 || n % 8)
        return false;
    bool in_registers = i.operands[1].form == Operand::kVector;
    size_t more = i.operands.size() - 4;
    if (d.kind == kFloat) {
        if (a.kind != kFloat || b.kind != kFloat || (a.bits != 8 && a.family != b.family))
            return false;
        if (more != 2 + (a.bits != 16 ? 0u : in_registers ? 1u : 2u)) return false;
    } else if (d.kind != kSigned || a.bits != 8 || a.kind == kFloat || b.kind == kFloat || more) {
        return false;
    }
    return i.operands[0].parts.size() == size_t(n) / 2 &&
           (!in_registers || i.operands[1].parts.size() == 4);
}

} // namespace

Handler find_wgmma(Instr &i) {
    if (i.words[0] != "wgmma" || !i.has("sync") || !i.has("aligned")) return nullptr;
    if (i.has("fence")) return fence;
    if (i.has("commit_group")) return commit;
    if (i.has("wait_group")) return i.operands.size() == 1 ? wait_group : nullptr;
    return i.has("mma_async") && known_product(i) ? mma_async : nullptr;
}

} // namespace emu::ptx

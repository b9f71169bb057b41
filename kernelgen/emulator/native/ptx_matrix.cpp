// Instructions of a whole warp: mma, ldmatrix, stmatrix, movmatrix, shfl.
#include <stdio.h>
#include <string.h>

#include <algorithm>

#include "ptx.h"

namespace emu::ptx {

void warp_op(Exec &exec, const Instr &instr, uint64_t mask,
             void (*run)(EmuOp *const *, uint64_t, int), bool orders_memory) {
    WarpOp op;
    op.mask = mask;
    op.run = run;
    // .aligned: all lanes execute the same instruction; a barrier may be met at several places
    op.site = orders_memory ? nullptr : &instr;
    op.name = instr.words[0].c_str();
    op.line = exec.line;
    op.orders_memory = orders_memory;
    op.exec = &exec;
    op.instr = &instr;
    op.fiber = self();
    emu_subgroup(&op);
}

namespace {

constexpr Type kWord;

const WarpOp &lane(EmuOp *const *ops, int l) { return *static_cast<WarpOp *>(ops[l]); }

uint64_t part(const WarpOp &op, size_t operand, size_t n) {
    const Operand &o = op.instr->operands[operand];
    return op.exec->get(o.form == Operand::kVector ? o.parts[n] : o, kWord);
}

void set_part(const WarpOp &op, size_t operand, size_t n, uint64_t value) {
    const Operand &o = op.instr->operands[operand];
    op.exec->set(o.form == Operand::kVector ? o.parts[n] : o, value);
}

size_t parts(const Operand &o) { return o.form == Operand::kVector ? o.parts.size() : 1; }

void need_all(EmuOp *const *ops, uint64_t mask) {
    if (mask == 0xffffffff) return;
    for (int l = 0; l < 32; l++)
        if (ops[l])
            emu_fail("mask", ops[l]->line, "%s needs all 32 lanes, but only 0x%llx take part",
                     ops[l]->name, static_cast<unsigned long long>(mask));
}

// ---- mma.m{8,16}n8k*: fragments as the PTX manual draws them.  In all types alike, register r of
// A holds row lane/4 + 8*(r%2), register r of B column lane/4, and of the k-th's chunk of 4 words
// (r/2 in A, r in B) the word lane%4.  C holds rows lane/4 and 8 below, columns 2*(lane%4) + {0,1}.

struct Shape {
    int m, n, k;
};

bool parse_shape(const std::string &word, Shape &s) {
    return sscanf(word.c_str(), "m%dn%dk%d", &s.m, &s.n, &s.k) == 3;
}

template <class T> T element(uint64_t word, int at, Type t);
template <> float element<float>(uint64_t word, int at, Type t) {
    return to_float(word >> at * t.bits, t);
}
template <> int element<int>(uint64_t word, int at, Type t) {
    uint32_t field = uint32_t(word >> at * t.bits) & ((1u << t.bits) - 1);
    return t.kind == kSigned ? int(field << (32 - t.bits)) >> (32 - t.bits) : int(field);
}

// T is the type of products and sums
template <class T> void multiply(EmuOp *const *ops, uint64_t mask, int) {
    need_all(ops, mask);
    const Instr &i = *lane(ops, 0).instr;
    Shape s{i.code & 255, 8, i.code >> 8};
    Type d = i.types[0], a = i.types[1], b = i.types[2], c = i.types[3];
    int per_word = 32 / a.bits, chunk = 4 * per_word, rows = s.m / 8;
    T left[16][64], right[64][8];
    for (int l = 0; l < 32; l++) {
        const WarpOp &op = lane(ops, l);
        for (int r = 0; r < rows * s.k / chunk; r++) {
            uint64_t word = part(op, 1, size_t(r));
            int k = r / rows * chunk + l % 4 * per_word;
            for (int j = 0; j < per_word; j++)
                left[l / 4 + 8 * (r % rows)][k + j] = element<T>(word, j, a);
        }
        for (int r = 0; r < s.k / chunk; r++) {
            uint64_t word = part(op, 2, size_t(r));
            int k = r * chunk + l % 4 * per_word;
            for (int j = 0; j < per_word; j++) right[k + j][l / 4] = element<T>(word, j, b);
        }
    }
    T sums[16][8] = {};
    for (int y = 0; y < s.m; y++)
        for (int k = 0; k < s.k; k++)
            for (int x = 0; x < 8; x++) sums[y][x] += left[y][k] * right[k][x];
    for (int l = 0; l < 32; l++) {
        const WarpOp &op = lane(ops, l);
        uint64_t words[4] = {};
        for (int n = 0; n < s.m / 4; n++) {
            int y = l / 4 + 8 * (n / 2), x = l % 4 * 2 + n % 2;
            bool packed = c.bits == 16, to_packed = d.bits == 16;
            uint64_t old =
                packed ? part(op, 3, size_t(n / 2)) >> 16 * (n % 2) : part(op, 3, size_t(n));
            if constexpr (sizeof(T) == 4 && T(0.5f) != T(0)) {
                uint64_t bits = from_double(double(sums[y][x] + to_float(old, c)), d);
                words[to_packed ? n / 2 : n] |= bits << (to_packed ? 16 * (n % 2) : 0);
            } else {
                int64_t sum = int64_t(sums[y][x]) + int32_t(old);
                if (i.has("satfinite"))
                    sum = std::min<int64_t>(std::max<int64_t>(sum, INT32_MIN), INT32_MAX);
                words[n] = uint32_t(sum);
            }
        }
        for (int n = 0; n < s.m / 4 / (d.bits == 16 ? 2 : 1); n++)
            set_part(op, 0, size_t(n), words[n]);
    }
}

void mma(Exec &e, const Instr &i) {
    bool whole = i.types[1].kind != kFloat;
    warp_op(e, i, 0xffffffff, whole ? multiply<int> : multiply<float>);
}

bool known_mma(Instr &i) {
    Shape s{};
    for (const std::string &w : i.words)
        if (parse_shape(w, s)) break;
    if (i.operands.size() != 4 || i.types.size() != 4 || !i.has("row") || !i.has("col"))
        return false;
    if (i.words[1] != "sync" || !i.has("aligned") || i.has_prefix("sp")) return false;
    const Type &d = i.types[0], &a = i.types[1], &b = i.types[2], &c = i.types[3];
    bool shape = false;
    if (a.kind == kFloat) {
        if (a.family != b.family && a.bits != 8) return false;
        if (c.kind != kFloat || d.kind != kFloat ||
            (a.family != 'f' && (c.bits != 32 || d.bits != 32)))
            return false;
        if (a.family == 'f' && a.bits != 16) return false;
        int words = s.k * a.bits / 32; // of a row
        shape = s.m == 16 && s.n == 8 && (words == 4 || words == 8) && !(a.bits == 8 && words == 4);
    } else {
        if (a.bits != 8 || b.bits != 8 || c.kind != kSigned || d.kind != kSigned) return false;
        shape = s.n == 8 && ((s.m == 16 && (s.k == 16 || s.k == 32)) || (s.m == 8 && s.k == 16));
    }
    if (!shape) return false;
    i.code = s.m | s.k << 8;
    size_t chunks = size_t(s.k) * a.bits / 32 / 4, sums = size_t(s.m) / 4;
    return parts(i.operands[0]) == sums / (d.bits == 16 ? 2 : 1) &&
           parts(i.operands[1]) == chunks * size_t(s.m) / 8 && parts(i.operands[2]) == chunks &&
           parts(i.operands[3]) == sums / (c.bits == 16 ? 2 : 1);
}

// ---- 8x8 matrices of 16-bit elements: lanes 8n..8n+7 give the rows' addresses of matrix n

uint16_t *row_of(EmuOp *const *ops, size_t matrix, size_t row, size_t memory, int how) {
    const WarpOp &op = lane(ops, int(8 * matrix + row));
    EmuIndex *running = emu_self;
    emu_self = &op.fiber->index;
    void *p = address(*op.exec, *op.instr, op.instr->operands[memory]);
    if (uintptr_t(p) % 16)
        emu_fail("misaligned", op.line, "the row's address in \"%s\" is not a multiple of 16",
                 op.instr->text.c_str());
    emu_touch(p, 16, how, op.line);
    emu_self = running;
    return static_cast<uint16_t *>(p);
}

void move_matrices(EmuOp *const *ops, uint64_t mask, int) {
    need_all(ops, mask);
    const Instr &i = *lane(ops, 0).instr;
    bool load = i.words[0] == "ldmatrix", across = i.has("trans");
    size_t registers = load ? 0 : 1, memory = load ? 1 : 0;
    for (size_t m = 0; m < parts(i.operands[registers]); m++) {
        uint16_t *rows[8];
        for (size_t r = 0; r < 8; r++)
            rows[r] = row_of(ops, m, r, memory, load ? EMU_READ : EMU_WRITE);
        for (int l = 0; l < 32; l++) {
            uint64_t word = load ? 0 : part(lane(ops, l), registers, m);
            for (int j = 0; j < 2; j++) {
                uint16_t *at = across ? &rows[l % 4 * 2 + j][l / 4] : &rows[l / 4][l % 4 * 2 + j];
                if (load) word |= uint64_t(*at) << 16 * j;
                else *at = uint16_t(word >> 16 * j);
            }
            if (load) set_part(lane(ops, l), registers, m, word);
        }
    }
}

void transpose(EmuOp *const *ops, uint64_t mask, int) {
    need_all(ops, mask);
    uint16_t from[8][8];
    for (int l = 0; l < 32; l++)
        for (int j = 0; j < 2; j++)
            from[l / 4][l % 4 * 2 + j] = uint16_t(part(lane(ops, l), 1, 0) >> 16 * j);
    for (int l = 0; l < 32; l++)
        set_part(lane(ops, l), 0, 0,
                 uint64_t(from[l % 4 * 2][l / 4]) | uint64_t(from[l % 4 * 2 + 1][l / 4]) << 16);
}

// ---- shfl.sync.mode.b32 d|p, a, b, c, mask

void shuffle(EmuOp *const *ops, uint64_t mask, int) {
    uint64_t results[32] = {};
    for (int l = 0; l < 32; l++) {
        if (!ops[l]) continue;
        const WarpOp &op = lane(ops, l);
        int b = int(part(op, 2, 0) & 31), c = int(part(op, 3, 0));
        int clamp = c & 31, segment = c >> 8 & 31;
        int last = (l & segment) | (clamp & ~segment), first = l & segment, from;
        bool inside;
        if (op.instr->has("up")) inside = (from = l - b) >= last;
        else if (op.instr->has("down")) inside = (from = l + b) <= last;
        else if (op.instr->has("bfly")) inside = (from = l ^ b) <= last;
        else inside = (from = first | (b & ~segment)) <= last;
        if (!inside) from = l;
        if (!(mask & bit(uint32_t(from))))
            emu_fail("mask", op.line, "lane %d shuffles from lane %d, which takes no part", l,
                     from);
        results[l] = part(lane(ops, from), 1, 0) | uint64_t(inside) << 32;
    }
    for (int l = 0; l < 32; l++) {
        if (!ops[l]) continue;
        const WarpOp &op = lane(ops, l);
        set_part(op, 0, 0, uint32_t(results[l]));
        int predicate = op.instr->operands[0].second;
        if (predicate >= 0) op.exec->registers[predicate] = results[l] >> 32;
    }
}

template <void (*run)(EmuOp *const *, uint64_t, int)> void whole_warp(Exec &e, const Instr &i) {
    warp_op(e, i, 0xffffffff, run);
}

void shfl(Exec &e, const Instr &i) { warp_op(e, i, e.get(i.operands[4], kWord), shuffle); }

} // namespace

Handler find_matrix(Instr &instr) {
    const std::string &name = instr.words[0];
    if (name == "mma") return known_mma(instr) ? mma : nullptr;
    if (name == "shfl") return instr.has("sync") && instr.operands.size() == 5 ? shfl : nullptr;
    if (name == "movmatrix") return instr.operands.size() == 2 ? whole_warp<transpose> : nullptr;
    if (name != "ldmatrix" && name != "stmatrix") return nullptr;
    if (instr.operands.size() != 2 || !instr.has("m8n8") || !instr.has("b16")) return nullptr;
    size_t count = instr.has("x4") ? 4 : instr.has("x2") ? 2 : instr.has("x1") ? 1 : 0;
    return parts(instr.operands[name == "ldmatrix" ? 0 : 1]) == count ? whole_warp<move_matrices>
                                                                      : nullptr;
}

} // namespace emu::ptx

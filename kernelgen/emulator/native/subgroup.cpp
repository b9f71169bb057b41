// Shuffles, votes and reductions: what the languages' operations of a subgroup have in common.
#include "internal.h"

using namespace emu;

namespace {

struct Op : EmuOp {
    uint64_t value, result;
    int kind, by, width, op, type;
};

Op &lane(EmuOp *const *ops, int l) { return *static_cast<Op *>(ops[l]); }

uint64_t run(Op &op, void (*run)(EmuOp *const *, uint64_t, int), const char *name, uint64_t mask,
             int line) {
    op.mask = mask;
    op.run = run;
    op.site = nullptr;
    op.name = name;
    op.line = line;
    op.orders_memory = false;
    emu_subgroup(&op);
    return op.result;
}

void shuffle(EmuOp *const *ops, uint64_t mask, int size) {
    for (int l = 0; l < size; l++) {
        if (!ops[l]) continue;
        Op &op = lane(ops, l);
        int first = l / op.width * op.width, last = first + op.width - 1, from = l;
        switch (op.kind) {
        case EMU_IDX: from = first + (op.by & (op.width - 1)); break;
        case EMU_UP: from = l - op.by < first ? l : l - op.by; break;
        case EMU_DOWN: from = op.by > last - l ? l : l + op.by; break;
        case EMU_BFLY: from = (l ^ op.by) > last ? l : l ^ op.by; break;
        case EMU_ROTATE: from = first + (l - first + op.by) % op.width; break;
        }
        bool there = from >= 0 && from < 64 && (mask & bit(uint32_t(from)));
        if (!there && op.mask)
            emu_fail("mask", op.line, "lane %d shuffles from lane %d, which takes no part", l,
                     from);
        op.result = there ? lane(ops, from).value : ~uint64_t(0);
    }
}

void vote(EmuOp *const *ops, uint64_t mask, int size) {
    uint64_t set = 0;
    int first = __builtin_ctzll(mask);
    bool same = true;
    for (int l = 0; l < size; l++) {
        if (!ops[l]) continue;
        if (lane(ops, l).value) set |= bit(uint32_t(l));
        same &= lane(ops, l).value == lane(ops, first).value;
    }
    for (int l = 0; l < size; l++) {
        if (!ops[l]) continue;
        Op &op = lane(ops, l);
        switch (op.kind) {
        case EMU_BALLOT: op.result = set; break;
        case EMU_ANY: op.result = set != 0; break;
        case EMU_ALL: op.result = set == mask; break;
        case EMU_MATCH_ALL: op.result = same ? mask : 0; break;
        case EMU_FIRST: op.result = lane(ops, first).value; break;
        case EMU_MATCH_ANY:
            op.result = 0;
            for (int o = 0; o < size; o++)
                if (ops[o] && lane(ops, o).value == op.value) op.result |= bit(uint32_t(o));
        }
    }
}

void reduce(EmuOp *const *ops, uint64_t, int size) {
    uint64_t sum = 0;
    bool any = false;
    for (int l = 0; l < size; l++) {
        if (!ops[l]) continue;
        Op &op = lane(ops, l);
        op.result = sum; // of those before
        sum = any ? combine_bits(op.op, op.type, sum, op.value, 0) : op.value;
        any = true;
        if (op.kind == EMU_INCLUSIVE) op.result = sum;
    }
    for (int l = 0; l < size; l++)
        if (ops[l] && lane(ops, l).kind == EMU_REDUCE) lane(ops, l).result = sum;
}

struct Multiply : EmuOp {
    float *sum, a[2], b[2];
};

// Lane l has elements 2*(l%4) and the next of row l/4.
void multiply8(EmuOp *const *ops, uint64_t mask, int) {
    if (mask != 0xffffffff)
        emu_fail("mask", ops[__builtin_ctzll(mask)]->line,
                 "a product of matrices needs all 32 lanes, but only 0x%llx take part",
                 static_cast<unsigned long long>(mask));
    float a[8][8], b[8][8];
    auto part = [&](int l) -> Multiply & { return *static_cast<Multiply *>(ops[l]); };
    for (int l = 0; l < 32; l++)
        for (int i = 0; i < 2; i++) {
            a[l / 4][l % 4 * 2 + i] = part(l).a[i];
            b[l / 4][l % 4 * 2 + i] = part(l).b[i];
        }
    for (int l = 0; l < 32; l++)
        for (int i = 0; i < 2; i++)
            for (int k = 0; k < 8; k++) part(l).sum[i] += a[l / 4][k] * b[k][l % 4 * 2 + i];
}

void nothing(EmuOp *const *, uint64_t, int) {}

} // namespace

extern "C" {

uint64_t emu_shuffle(int mode, uint64_t mask, uint64_t value, int by, int width, int line) {
    if (width < 1 || width > int(emu_self->subgroup_size) || (width & (width - 1)))
        emu_fail("mask", line, "a shuffle of width %d in a subgroup of %u lanes", width,
                 emu_self->subgroup_size);
    Op op;
    op.kind = mode;
    op.value = value;
    op.by = by;
    op.width = width;
    return run(op, shuffle, "a shuffle", mask, line);
}

uint64_t emu_vote(int kind, uint64_t mask, uint64_t value, int line) {
    Op op;
    op.kind = kind;
    op.value = value;
    return run(op, vote, "a vote", mask, line);
}

uint64_t emu_subgroup_reduce(int kind, int what, int type, uint64_t mask, uint64_t value,
                             int line) {
    Op op;
    op.kind = kind;
    op.op = what;
    op.type = type;
    op.value = value;
    return run(op, reduce, "a reduction", mask, line);
}

// sum += a * b of 8 x 8 matrices, of which each lane has two elements
void emu_multiply8(float *sum, float a0, float a1, float b0, float b1, int line) {
    Multiply op;
    op.mask = 0;
    op.run = multiply8;
    op.site = nullptr;
    op.name = "a product of matrices";
    op.line = line;
    op.orders_memory = false;
    op.sum = sum;
    op.a[0] = a0, op.a[1] = a1, op.b[0] = b0, op.b[1] = b1;
    emu_subgroup(&op);
}

void emu_subgroup_barrier(uint64_t mask, int line) {
    EmuOp op;
    op.mask = mask;
    op.run = nothing;
    op.site = nullptr;
    op.name = "the subgroup's barrier";
    op.line = line;
    op.orders_memory = true;
    emu_subgroup(&op);
}

} // extern "C"

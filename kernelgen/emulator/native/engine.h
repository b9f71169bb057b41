// What a language's header sees of the engine.
//
// The engine runs every thread of a block as a fiber of one OS thread, and blocks in several
// processes.  So inside a process one thread runs at a time and switches only inside the functions
// below: plain globals are enough, and no lock is needed anywhere.
#pragma once
#include <stddef.h>
#include <stdint.h>

extern "C" {

// Where a thread is.  `line` is the last source line that it is known to have been on.
struct EmuIndex {
    uint32_t thread[3], block[3], block_dim[3], grid[3];
    uint32_t linear;         // number of the thread in its block
    uint32_t lane, subgroup; // place in its subgroup; number of the subgroup in the block
    uint32_t subgroup_size;
    uint32_t subgroup_lanes; // lanes that this subgroup has: fewer in a ragged last one
    int32_t line;
};
extern EmuIndex *emu_self;

// One lane's part in an operation of a subgroup.  Lanes hand in one each; the last to arrive calls
// `run`, which computes for all.  That is the whole mechanism behind shuffles, votes, reductions,
// ldmatrix and mma.
struct EmuOp {
    uint64_t mask; // lanes that take part; 0 means all that have not returned
    void (*run)(EmuOp *const *lanes, uint64_t mask, int size); // must be the same in all lanes
    const void *site; // must be the same in all lanes, where it is not null
    const char *name; // for messages
    int line;
    bool orders_memory; // what was written before is seen after
};
void emu_subgroup(EmuOp *op);

// What languages have in common.  Values are bits; mask 0 is for languages without masks, where a
// lane that is not there gives a shuffle nothing, which is no error.
enum { EMU_IDX, EMU_UP, EMU_DOWN, EMU_BFLY, EMU_ROTATE };
uint64_t emu_shuffle(int mode, uint64_t mask, uint64_t value, int by, int width, int line);
enum { EMU_BALLOT, EMU_ANY, EMU_ALL, EMU_MATCH_ANY, EMU_MATCH_ALL, EMU_FIRST };
uint64_t emu_vote(int kind, uint64_t mask, uint64_t value, int line);
enum { EMU_REDUCE, EMU_INCLUSIVE, EMU_EXCLUSIVE }; // `op` is EMU_ADD, EMU_MIN...
uint64_t emu_subgroup_reduce(int kind, int op, int type, uint64_t mask, uint64_t value, int line);
void emu_multiply8(float *sum, float a0, float a1, float b0, float b1, int line);
void emu_subgroup_barrier(uint64_t mask, int line);

// Barrier `id` of `count` threads; 0 means all of the block.  `strict` demands that all wait on the
// same line: language-level barriers do, numbered barriers of assembly do not.
enum { EMU_COUNT, EMU_AND, EMU_OR };
void emu_barrier(int id, int count, int line, int strict);
int emu_barrier_reduce(int what, int value, int line);

// Lets others run.  A thread that polls memory must call it, else it waits forever.
void emu_yield(int line);
// Reports what the kernel did wrong and ends the block.
[[noreturn]] void emu_fail(const char *kind, int line, const char *format, ...);

// Shared memory whose size the launch gives.
extern unsigned char emu_dynamic_shared[];
// Shared addresses as 32-bit numbers, and back (null if it is none)
uint32_t emu_shared_address(const void *pointer);
void *emu_shared_pointer(uint64_t address, int line);

// Checked as the compiled text's own accesses are in a checked build
// NOTHING: only whether it is in bounds; SET: an atomic store, which reads nothing
enum { EMU_READ, EMU_WRITE, EMU_ATOMIC, EMU_NOTHING, EMU_SET };
void emu_touch(const void *pointer, size_t bytes, int how, int line);

// Read-modify-write that is atomic among threads of all blocks; returns the old bits.
enum EmuRmw {
    EMU_ADD,
    EMU_SUB,
    EMU_EXCH,
    EMU_MIN,
    EMU_MAX,
    EMU_INC,
    EMU_DEC,
    EMU_CAS,
    EMU_BAND,
    EMU_BOR,
    EMU_BXOR,
    EMU_LOAD,
    EMU_STORE,
    EMU_MUL
};
enum EmuType {
    EMU_U32,
    EMU_S32,
    EMU_U64,
    EMU_S64,
    EMU_F32,
    EMU_F64,
    EMU_F16,
    EMU_BF16,
    EMU_F16X2,
    EMU_BF16X2,
    EMU_U16
};
uint64_t emu_atomic(void *p, int op, int type, uint64_t value, uint64_t compare, int line);

// Copies that need not have arrived before they are waited for
void emu_async_copy(void *to, const void *from, int bytes, int from_bytes, int line);
void emu_async_commit(void);
void emu_async_wait(int groups_left); // -1: all, committed or not

// Inline assembly.  `bits` goes in and comes out; `target` is where an output is written.
struct EmuOperand {
    uint64_t bits;
    void *target;
    uint8_t bytes;
    char constraint;
};
void emu_ptx(void **site, const char *text, EmuOperand *operands, int count, int line);

void emu_print(const char *format, ...);
uint64_t emu_clock(void);

// float to and from 16-bit floats, to nearest even
uint16_t emu_to_f16(double value);
uint16_t emu_to_bf16(double value);
float emu_from_f16(uint16_t bits);
float emu_from_bf16(uint16_t bits);
} // extern "C"

// PTX, as inline assembly has it: parsed once per place in the text, then interpreted.
#pragma once
#include <string>
#include <vector>

#include "internal.h"

namespace emu::ptx {

enum Kind : uint8_t { kUnsigned, kSigned, kBits, kFloat, kPredicate };

// A type such as f16x2: `kind`, bits of an element, and how many
struct Type {
    Kind kind = kBits;
    uint8_t bits = 32, lanes = 1;
    char family = 0; // of floats: 'f' IEEE, 'b' bf16, 't' tf32, '4' e4m3, '5' e5m2
};

struct Operand {
    enum Form : uint8_t { kRegister, kNumber, kMemory, kVector, kSink } form = kNumber;
    bool negated = false;      // !p, or -x
    bool is_float = false;     // a number with a point, or 0f...
    int slot = 0, second = -1; // register; second of p|q
    int64_t number = 0;        // number, or offset of [register + offset]
    double real = 0;
    std::vector<Operand> parts; // of a vector
};

struct Exec;
struct Instr;
using Handler = void (*)(Exec &, const Instr &);

struct Instr {
    Handler handler = nullptr;
    std::string text;               // for messages
    std::vector<std::string> words; // of the name, parted at its points
    std::vector<Type> types;        // among them
    std::vector<Operand> operands;
    int guard = -1; // register of @p
    bool guard_negated = false;
    int code = 0; // what the handler makes of the name

    // Whether a word is in the name, or begins one.  Handlers ask each time with the same literals,
    // so answers are kept by their addresses.
    bool has(const char *word) const { return ask(known_, word, false); }
    bool has_prefix(const char *prefix) const { return ask(known_prefixes_, prefix, true); }

  private:
    using Answers = std::vector<std::pair<const char *, bool>>;
    mutable Answers known_, known_prefixes_;
    bool ask(Answers &answers, const char *text, bool prefix) const {
        for (const auto &[literal, answer] : answers)
            if (literal == text) return answer;
        bool found = false;
        for (const std::string &w : words) found |= prefix ? w.rfind(text, 0) == 0 : w == text;
        answers.push_back({text, found});
        return found;
    }
};

struct Site {
    std::vector<Instr> code;
    int slots = 0;
};

// One execution by one thread: registers are the operands first, then those declared inside.
struct Exec {
    uint64_t *registers;
    int line;
    const EmuOperand *operands;
    size_t next = 0; // number of the instruction that follows

    uint64_t get(const Operand &o, Type t) const;
    void set(const Operand &o, uint64_t value) const;
};

// A part in an operation of the warp
struct WarpOp : EmuOp {
    Exec *exec;
    const Instr *instr;
    Fiber *fiber;
};
void warp_op(Exec &exec, const Instr &instr, uint64_t mask,
             void (*run)(EmuOp *const *, uint64_t, int), bool orders_memory = false);

Site *parse(const char *text, int operands, int line);
bool parse_type(const std::string &word, Type &type);
[[noreturn]] void unknown(const Instr &instr, int line);

// The interpretation of a name, or null
Handler find_arithmetic(Instr &instr);
Handler find_memory(Instr &instr);
Handler find_matrix(Instr &instr);
Handler find_async(Instr &instr);
Handler find_wgmma(Instr &instr);

float to_float(uint64_t bits, Type t);
uint64_t from_double(double value, Type t);
void *address(const Exec &exec, const Instr &instr, const Operand &memory);
void *address_in(bool shared, const Exec &exec, const Instr &instr, const Operand &memory);
void aligned(const Exec &exec, const Instr &instr, const void *p, size_t bytes);
} // namespace emu::ptx

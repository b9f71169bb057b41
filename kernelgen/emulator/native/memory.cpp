// Small services: shared addresses, atomics, 16-bit floats, output.
#include "internal.h"

#include <math.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

#include <algorithm>

using namespace emu;

namespace {

double round_to_odd_float(double value) {
    // rounding twice is right if the first time an inexact value ends in a set bit
    float f = float(value);
    if (double(f) == value || !(fabs(value) < INFINITY)) return f;
    uint32_t bits;
    memcpy(&bits, &f, 4);
    if (!(bits & 1)) bits += (fabs(double(f)) < fabs(value)) ? 1 : -1;
    memcpy(&f, &bits, 4);
    return f;
}

template <class T> T as(uint64_t bits) {
    T value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

template <class T> uint64_t bits_of(T value) {
    uint64_t bits = 0;
    memcpy(&bits, &value, sizeof value);
    return bits;
}

template <class T> T combine(int op, T old, T value, T compare) {
    switch (op) {
    case EMU_ADD: return T(old + value);
    case EMU_SUB: return T(old - value);
    case EMU_MUL: return T(old * value);
    case EMU_MIN: return value < old ? value : old;
    case EMU_MAX: return old < value ? value : old;
    case EMU_INC: return old >= value ? T(0) : T(old + T(1));
    case EMU_DEC: return old == T(0) || old > value ? value : T(old - T(1));
    case EMU_CAS: return bits_of(old) == bits_of(compare) ? value : old;
    case EMU_LOAD: return old;
    default: return value;
    }
}

} // namespace

namespace emu {
uint64_t combine_bits(int op, int type, uint64_t old, uint64_t value, uint64_t compare) {
    if (op == EMU_BAND) return old & value;
    if (op == EMU_BOR) return old | value;
    if (op == EMU_BXOR) return old ^ value;
    auto halves = [&](uint16_t (*to)(double), float (*from)(uint16_t)) {
        uint64_t result = 0;
        for (int i = 0; i < (type == EMU_F16X2 || type == EMU_BF16X2 ? 2 : 1); i++) {
            float a = from(uint16_t(old >> 16 * i)), b = from(uint16_t(value >> 16 * i));
            result |= uint64_t(to(combine<float>(op, a, b, 0))) << 16 * i;
        }
        return result;
    };
    switch (type) {
    case EMU_S32:
        return bits_of(combine(op, as<int32_t>(old), as<int32_t>(value), as<int32_t>(compare)));
    case EMU_U64: return combine<uint64_t>(op, old, value, compare);
    case EMU_S64: return bits_of(combine(op, int64_t(old), int64_t(value), int64_t(compare)));
    case EMU_F32: return bits_of(combine(op, as<float>(old), as<float>(value), as<float>(compare)));
    case EMU_F64:
        return bits_of(combine(op, as<double>(old), as<double>(value), as<double>(compare)));
    case EMU_U16: return combine<uint16_t>(op, uint16_t(old), uint16_t(value), uint16_t(compare));
    case EMU_F16:
    case EMU_F16X2: return halves(emu_to_f16, emu_from_f16);
    case EMU_BF16:
    case EMU_BF16X2: return halves(emu_to_bf16, emu_from_bf16);
    default: return combine<uint32_t>(op, uint32_t(old), uint32_t(value), uint32_t(compare));
    }
}

} // namespace emu

namespace {

// Addresses are aligned as the memory behind them is, and a gap is left between the two.
uint32_t static_window() { return kWindow + 4096 + uint32_t(uintptr_t(world.statics) % 4096); }
uint32_t dynamic_window() {
    return (static_window() + uint32_t(world.static_bytes) + 4096 + 1023) / 4096 * 4096;
}

template <class Word>
uint64_t exchange(void *p, int op, int type, uint64_t value, uint64_t compare) {
    Word *word = static_cast<Word *>(p);
    Word old = __atomic_load_n(word, __ATOMIC_SEQ_CST);
    while (op != EMU_LOAD) {
        Word wanted = Word(combine_bits(op, type, old, value, compare));
        if (__atomic_compare_exchange_n(word, &old, wanted, false, __ATOMIC_SEQ_CST,
                                        __ATOMIC_SEQ_CST))
            break;
    }
    return old;
}

} // namespace

extern "C" {

uint64_t emu_atomic(void *p, int op, int type, uint64_t value, uint64_t compare, int line) {
    bool is64 = type == EMU_U64 || type == EMU_S64 || type == EMU_F64;
    bool is16 = type == EMU_F16 || type == EMU_BF16 || type == EMU_U16;
    size_t bytes = is64 ? 8 : is16 ? 2 : 4;
    Fiber &me = *self();
    me.index.line = line;
    if (uintptr_t(p) % bytes)
        emu_fail("misaligned", line,
                 "atomic operation on address %p, which is not a multiple of %zu", p, bytes);
    emu_touch(p, bytes, op == EMU_STORE ? EMU_SET : EMU_ATOMIC, line);
    world.shared->atomics = 1;
    uint64_t old = is64   ? exchange<uint64_t>(p, op, type, value, compare)
                   : is16 ? exchange<uint16_t>(p, op, type, value, compare)
                          : exchange<uint32_t>(p, op, type, value, compare);
    // a thread that polls looks again and again at what stays the same
    bool unchanged = op == EMU_LOAD || (op == EMU_CAS && old != compare) ||
                     (op == EMU_EXCH && old == value) || (op == EMU_ADD && !value) ||
                     (op == EMU_BOR && !value) ||
                     ((op == EMU_MAX || op == EMU_MIN) && old == value);
    if (unchanged && ++me.polls > 8) {
        me.polls = 0;
        emu_yield(line);
    }
    return old;
}

uint32_t emu_shared_address(const void *pointer) {
    const unsigned char *p = static_cast<const unsigned char *>(pointer);
    if (p >= emu_dynamic_shared && p < emu_dynamic_shared + kMaxDynamic)
        return dynamic_window() + uint32_t(p - emu_dynamic_shared);
    if (size_t(p - world.statics) < world.static_bytes)
        return static_window() + uint32_t(p - world.statics);
    emu_fail("bounds", 0, "address %p is not in shared memory, but is used as if it were", pointer);
}

void *emu_shared_pointer(uint64_t address, int line) {
    if (address >= dynamic_window() && address - dynamic_window() < kMaxDynamic)
        return emu_dynamic_shared + (address - dynamic_window());
    if (address >= static_window() && address - static_window() < world.static_bytes)
        return world.statics + (address - static_window());
    emu_fail("bounds", line, "0x%llx is not an address of shared memory",
             static_cast<unsigned long long>(address));
}

uint16_t emu_to_f16(double value) {
    if (value != value) return 0x7fff;
    return uint16_t(bits_of(static_cast<_Float16>(value)));
}

float emu_from_f16(uint16_t bits) { return float(as<_Float16>(bits)); }

uint16_t emu_to_bf16(double value) {
    if (value != value) return 0x7fff;
    uint32_t bits = uint32_t(bits_of(float(round_to_odd_float(value))));
    return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

float emu_from_bf16(uint16_t bits) { return as<float>(uint64_t(bits) << 16); }

// What clang calls for bfloat, and older runtime libraries lack; a 16-bit float travels as one.
_Float16 __truncsfbf2(float value) { return as<_Float16>(emu_to_bf16(double(value))); }
_Float16 __truncdfbf2(double value) { return as<_Float16>(emu_to_bf16(value)); }

void emu_print(const char *format, ...) {
    va_list args;
    va_start(args, format);
    vprintf(format, args);
    va_end(args);
    fflush(stdout);
}

uint64_t emu_clock(void) {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return uint64_t(t.tv_sec) * 1000000000u + uint64_t(t.tv_nsec);
}

} // extern "C"

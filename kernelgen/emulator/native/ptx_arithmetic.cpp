// Instructions that only compute, and how registers are read and written.
#include <math.h>
#include <string.h>

#include <algorithm>
#include <map>
#include <unordered_map>

#include "ptx.h"

namespace emu::ptx {

// ---- values

static uint64_t truncate(uint64_t value, unsigned bits) {
    return bits >= 64 ? value : value & ((uint64_t(1) << bits) - 1);
}

static int64_t sign_extend(uint64_t value, unsigned bits) {
    return bits >= 64 ? int64_t(value) : int64_t(value << (64 - bits)) >> (64 - bits);
}

template <class To, class From> static To recast(From from) {
    To to{};
    memcpy(&to, &from, std::min(sizeof to, sizeof from));
    return to;
}

static float from_byte_float(uint8_t bits, bool e5m2) {
    if (e5m2) return emu_from_f16(uint16_t(bits << 8));
    if ((bits & 0x7f) == 0x7f) return NAN;
    int exponent = bits >> 3 & 15, fraction = bits & 7;
    float size =
        exponent ? ldexpf(float(fraction + 8), exponent - 10) : ldexpf(float(fraction), -9);
    return bits & 0x80 ? -size : size;
}

float to_float(uint64_t bits, Type t) {
    switch (t.family) {
    case 'b': return emu_from_bf16(uint16_t(bits));
    case 't': return recast<float>(uint32_t(bits) & 0xffffe000u);
    case '4': return from_byte_float(uint8_t(bits), false);
    case '5': return from_byte_float(uint8_t(bits), true);
    default: return t.bits == 16 ? emu_from_f16(uint16_t(bits)) : recast<float>(uint32_t(bits));
    }
}

static double to_double(uint64_t bits, Type t) {
    if (t.kind == kSigned) return double(sign_extend(bits, t.bits));
    if (t.kind != kFloat) return double(truncate(bits, t.bits));
    return t.bits == 64 ? recast<double>(bits) : double(to_float(bits, t));
}

uint64_t from_double(double value, Type t) {
    if (t.family == 'b') return emu_to_bf16(value);
    if (t.bits == 64) return recast<uint64_t>(value);
    if (t.bits == 16) return emu_to_f16(value);
    uint32_t bits = recast<uint32_t>(float(value));
    if (t.family == 't') bits = (bits + 0x1000) & 0xffffe000u; // .rna
    return bits;
}

static uint64_t special(int which) {
    const EmuIndex &i = *emu_self;
    uint64_t lane = uint64_t(1) << i.lane;
    switch (which) {
    case 0:
    case 1:
    case 2: return i.thread[which];
    case 3:
    case 4:
    case 5: return i.block_dim[which - 3];
    case 6:
    case 7:
    case 8: return i.block[which - 6];
    case 9:
    case 10:
    case 11: return i.grid[which - 9];
    case 12: return i.lane;
    case 13: return i.subgroup;
    case 14:
    case 15:
    case 18: return emu_clock();
    case 17: return lane - 1;
    case 19: return 2 * lane - 1;
    case 20: return lane;
    case 21: return uint32_t(~(lane - 1));
    case 22: return uint32_t(~(2 * lane - 1));
    default: return 0; // %smid
    }
}

uint64_t Exec::get(const Operand &o, Type t) const {
    if (o.form == Operand::kNumber) {
        if (t.kind == kFloat) return from_double(o.is_float ? o.real : double(o.number), t);
        if (o.is_float)
            return t.bits == 64 ? recast<uint64_t>(o.real) : recast<uint32_t>(float(o.real));
        return truncate(uint64_t(o.number), t.bits);
    }
    if (o.form != Operand::kRegister) return 0;
    uint64_t value = o.slot >= 0 ? registers[o.slot] : special(-2 - o.slot);
    if (t.kind == kPredicate) return (value & 1) ^ uint64_t(o.negated);
    return truncate(value, unsigned(t.bits) * t.lanes);
}

void Exec::set(const Operand &o, uint64_t value) const {
    if (o.form == Operand::kRegister && o.slot >= 0) registers[o.slot] = value;
}

// ---- names that do the same at every type

enum Code {
    kAdd,
    kSub,
    kMul,
    kMad,
    kFma,
    kMin,
    kMax,
    kDiv,
    kRem,
    kAnd,
    kOr,
    kXor,
    kNot,
    kShl,
    kShr,
    kNeg,
    kAbs,
    kRcp,
    kSqrt,
    kRsqrt,
    kEx2,
    kLg2,
    kSin,
    kCos,
    kTanh,
    kPopc,
    kClz,
    kBrev,
    kMov,
    kCnot,
    kCopysign
};

static double float_result(int code, double a, double b, double c, bool wide) {
    switch (code) {
    case kAdd: return a + b;
    case kSub: return a - b;
    case kMul: return a * b;
    case kMad:
    case kFma: return wide ? fma(a, b, c) : double(fmaf(float(a), float(b), float(c)));
    case kMin: return fmin(a, b);
    case kMax: return fmax(a, b);
    case kDiv: return a / b;
    case kNeg: return -a;
    case kAbs: return fabs(a);
    case kRcp: return 1 / a;
    case kSqrt: return sqrt(a);
    case kRsqrt: return 1 / sqrt(a);
    case kEx2: return exp2(a);
    case kLg2: return log2(a);
    case kSin: return sin(a);
    case kCos: return cos(a);
    case kTanh: return tanh(a);
    case kCopysign: return copysign(b, a);
    default: return a;
    }
}

static uint64_t int_result(const Instr &i, Type t, uint64_t ua, uint64_t ub, uint64_t uc) {
    bool is_signed = t.kind == kSigned;
    int64_t a = sign_extend(ua, t.bits), b = sign_extend(ub, t.bits);
    switch (i.code) {
    case kAdd: return ua + ub;
    case kSub: return ua - ub;
    case kMul:
    case kMad: {
        __int128 product =
            is_signed ? __int128(a) * b : __int128(static_cast<unsigned __int128>(ua) * ub);
        uint64_t part = i.has("hi") ? uint64_t(product >> t.bits) : uint64_t(product);
        return part + (i.code == kMad ? uc : 0);
    }
    case kMin: return is_signed ? uint64_t(std::min(a, b)) : std::min(ua, ub);
    case kMax: return is_signed ? uint64_t(std::max(a, b)) : std::max(ua, ub);
    case kDiv: return !ub ? ~uint64_t(0) : is_signed ? uint64_t(__int128(a) / b) : ua / ub;
    case kRem: return !ub ? ua : is_signed ? uint64_t(__int128(a) % b) : ua % ub;
    case kAnd: return ua & ub;
    case kOr: return ua | ub;
    case kXor: return ua ^ ub;
    case kNot: return ~ua;
    case kCnot: return ua == 0;
    case kShl: return ub >= t.bits ? 0 : ua << ub; // a GPU clamps
    case kShr:
        return is_signed      ? uint64_t(a >> std::min<uint64_t>(ub, t.bits - 1u))
               : ub >= t.bits ? 0
                              : ua >> ub;
    case kNeg: return 0 - ua;
    case kAbs: return uint64_t(a < 0 ? -a : a);
    case kPopc: return uint64_t(__builtin_popcountll(ua));
    case kClz: return ua ? uint64_t(__builtin_clzll(ua)) - (64u - t.bits) : t.bits;
    case kBrev: {
        uint64_t r = 0;
        for (unsigned n = 0; n < t.bits; n++) r |= (ua >> n & 1) << (t.bits - 1 - n);
        return r;
    }
    default: return ua;
    }
}

static uint64_t relu_or_saturate(const Instr &i, Type t, uint64_t bits) {
    double v = to_double(bits, t);
    if (i.has("relu") && !(v > 0)) return v != v ? bits : 0;
    if (i.has("sat")) return from_double(v > 0 ? std::min(v, 1.0) : 0, t);
    return bits;
}

static void compute(Exec &e, const Instr &i) {
    Type t = i.types.back();
    uint64_t v[3] = {};
    for (size_t n = 1; n < i.operands.size() && n <= 3; n++) {
        Type of = t;
        if (n == 2 && (i.code == kShl || i.code == kShr)) of = Type{kUnsigned, 32, 1, 0};
        if (n == 3 && i.has("wide")) of.bits = uint8_t(2 * of.bits);
        v[n - 1] = e.get(i.operands[n], of);
    }
    uint64_t result = 0;
    if (t.kind == kFloat && i.code != kMov) {
        for (int lane = 0; lane < t.lanes; lane++) {
            double in[3];
            for (int n = 0; n < 3; n++) {
                in[n] = to_double(v[n] >> lane * t.bits, t);
                if (size_t(n) + 1 < i.operands.size() && i.operands[size_t(n) + 1].negated &&
                    i.operands[size_t(n) + 1].form == Operand::kRegister)
                    in[n] = -in[n];
            }
            double real = float_result(i.code, in[0], in[1], in[2], t.bits != 32);
            uint64_t bits = relu_or_saturate(i, t, from_double(real, t));
            result |= truncate(bits, t.bits) << lane * t.bits;
        }
    } else {
        result = int_result(i, t, v[0], v[1], v[2]);
        unsigned bits = i.has("wide") ? 2u * t.bits : unsigned(t.bits) * t.lanes;
        if (i.code == kPopc || i.code == kClz) bits = 32;
        result = truncate(result, bits);
    }
    e.set(i.operands[0], result);
}

static void move(Exec &e, const Instr &i) {
    const Operand &to = i.operands[0], &from = i.operands[1];
    Type t = i.types.back();
    if (to.form == Operand::kVector) { // mov.b32 {lo, hi}, x
        Type part = t;
        part.bits = uint8_t(t.bits / to.parts.size());
        uint64_t value = e.get(from, t);
        for (size_t n = 0; n < to.parts.size(); n++)
            e.set(to.parts[n], truncate(value >> n * part.bits, part.bits));
    } else if (from.form == Operand::kVector) {
        Type part = t;
        part.bits = uint8_t(t.bits / from.parts.size());
        uint64_t value = 0;
        for (size_t n = 0; n < from.parts.size(); n++)
            value |= e.get(from.parts[n], part) << n * part.bits;
        e.set(to, value);
    } else {
        e.set(to, e.get(from, t));
    }
}

// ---- names of their own

static void lop3(Exec &e, const Instr &i) {
    Type t;
    uint64_t in[3], table = e.get(i.operands[4], t), result = 0;
    for (size_t n = 0; n < 3; n++) in[n] = e.get(i.operands[n + 1], t);
    for (int b = 0; b < 32; b++) {
        unsigned at = unsigned((in[0] >> b & 1) << 2 | (in[1] >> b & 1) << 1 | (in[2] >> b & 1));
        result |= (table >> at & 1) << b;
    }
    e.set(i.operands[0], result);
}

static void prmt(Exec &e, const Instr &i) {
    Type t;
    uint64_t bytes = e.get(i.operands[1], t) | e.get(i.operands[2], t) << 32, result = 0;
    uint64_t choice = e.get(i.operands[3], t);
    unsigned c = unsigned(choice & 3);
    for (unsigned n = 0; n < 4; n++) {
        unsigned at = unsigned(choice >> 4 * n & 15);
        if (i.has("f4e")) at = c + n;
        if (i.has("b4e")) at = (c - n) & 7;
        if (i.has("rc8")) at = c;
        if (i.has("ecl")) at = std::max(n, c);
        if (i.has("ecr")) at = std::min(n, c);
        if (i.has("rc16")) at = (c & 1) * 2 + (n & 1);
        bool named = i.words.size() > 2;
        uint64_t byte = bytes >> 8 * (at & 7) & 255;
        if (!named && (at & 8)) byte = byte & 0x80 ? 255 : 0; // its sign, spread
        result |= byte << 8 * n;
    }
    e.set(i.operands[0], result);
}

static bool compares(const std::string &how, double a, double b, bool is_float) {
    bool unordered = is_float && (a != a || b != b);
    if (how == "eq") return a == b;
    if (how == "ne") return !unordered && a != b;
    if (how == "lt" || how == "lo") return a < b;
    if (how == "le" || how == "ls") return a <= b;
    if (how == "gt" || how == "hi") return a > b;
    if (how == "ge" || how == "hs") return a >= b;
    if (how == "num") return !unordered;
    if (how == "nan") return unordered;
    return unordered || compares(how.substr(0, 2), a, b, false); // equ, neu, ltu...
}

static bool compares_whole(const std::string &how, uint64_t a, uint64_t b, Type t) {
    int64_t x = sign_extend(a, t.bits), y = sign_extend(b, t.bits);
    int order = t.kind == kSigned ? (x > y) - (x < y) : (a > b) - (a < b);
    return compares(how, order, 0, false);
}

static void setp(Exec &e, const Instr &i) {
    Type t = i.types.back(), predicate{kPredicate, 1, 1, 0};
    uint64_t a = e.get(i.operands[1], t), b = e.get(i.operands[2], t);
    const std::string &how = i.words[1];
    bool yes = t.kind == kFloat ? compares(how, to_double(a, t), to_double(b, t), true)
                                : compares_whole(how, a, b, t);
    bool no = !yes;
    if (i.operands.size() > 3) {
        bool c = e.get(i.operands[3], predicate);
        auto combine = [&](bool v) {
            return i.has("and") ? v && c : i.has("or") ? v || c : v != c;
        };
        yes = combine(yes);
        no = combine(no);
    }
    e.set(i.operands[0], yes);
    if (i.operands[0].second >= 0) e.registers[i.operands[0].second] = no;
}

static void selp(Exec &e, const Instr &i) {
    bool first = e.get(i.operands[3], Type{kPredicate, 1, 1, 0});
    e.set(i.operands[0], e.get(i.operands[first ? 1 : 2], i.types.back()));
}

static uint64_t convert(double value, uint64_t bits, Type to, Type from, const Instr &i) {
    if (to.kind == kFloat) {
        if (from.kind != kFloat && from.bits > 32 && to.bits == 32) // twice rounded otherwise
            value = double(from.kind == kSigned ? float(int64_t(bits)) : float(bits));
        return relu_or_saturate(i, to, from_double(value, to));
    }
    if (from.kind != kFloat) {
        int64_t v = from.kind == kSigned ? sign_extend(bits, from.bits) : int64_t(bits);
        if (i.has("sat")) {
            int64_t low = to.kind == kSigned ? -(int64_t(1) << (to.bits - 1)) : 0;
            int64_t high = (int64_t(1) << (to.kind == kSigned ? to.bits - 1 : to.bits)) - 1;
            v = std::min(std::max(v, low), high);
        }
        return truncate(uint64_t(v), to.bits);
    }
    double whole = i.has("rni")   ? nearbyint(value)
                   : i.has("rmi") ? floor(value)
                   : i.has("rpi") ? ceil(value)
                                  : trunc(value);
    double low = to.kind == kSigned ? -ldexp(1, to.bits - 1) : 0;
    double high = ldexp(1, to.kind == kSigned ? to.bits - 1 : to.bits);
    if (whole != whole) return 0;
    if (whole >= high) return truncate(~uint64_t(0), to.kind == kSigned ? to.bits - 1u : to.bits);
    if (whole < low) whole = low; // conversions to whole numbers saturate
    return truncate(to.kind == kSigned ? uint64_t(int64_t(whole)) : uint64_t(whole), to.bits);
}

static void cvt(Exec &e, const Instr &i) {
    Type to = i.types[0], from = i.types[1];
    if (to.lanes == 2) { // cvt.rn.bf16x2.f32 d, hi, lo
        uint64_t result = 0;
        for (size_t n = 0; n < 2; n++) {
            double v = to_double(e.get(i.operands[2 - n], from), from);
            result |= relu_or_saturate(i, to, from_double(v, to)) << 16 * n;
        }
        e.set(i.operands[0], result);
        return;
    }
    uint64_t bits = e.get(i.operands[1], from);
    double value = to_double(bits, from);
    if (to.kind == kFloat && from.kind == kFloat && i.has("rni")) value = nearbyint(value);
    if (to.bits == 16 && i.has("rz")) { // toward zero: the value cut to the type's bits
        uint64_t rounded = from_double(value, to);
        if (fabs(to_double(rounded, to)) > fabs(value)) rounded--;
        e.set(i.operands[0], rounded);
        return;
    }
    e.set(i.operands[0], convert(value, bits, to, from, i));
}

static void funnel(Exec &e, const Instr &i) {
    Type t;
    uint64_t both = e.get(i.operands[1], t) | e.get(i.operands[2], t) << 32;
    uint64_t by = e.get(i.operands[3], t);
    by = i.has("wrap") ? by & 31 : std::min<uint64_t>(by, 32);
    e.set(i.operands[0], truncate(i.has("l") ? both << by >> 32 : both >> by, 32));
}

static void bit_field(Exec &e, const Instr &i) {
    Type t = i.types.back(), count{kUnsigned, 32, 1, 0};
    if (i.words[0] == "bfe") {
        uint64_t a = e.get(i.operands[1], t);
        unsigned first = unsigned(e.get(i.operands[2], count) & 255);
        unsigned length = unsigned(e.get(i.operands[3], count) & 255);
        uint64_t field = first >= t.bits ? 0 : truncate(a >> first, length);
        if (length && t.kind == kSigned && first + length <= t.bits)
            field = truncate(uint64_t(sign_extend(field, length)), t.bits);
        e.set(i.operands[0], length ? field : 0);
        return;
    }
    uint64_t a = e.get(i.operands[1], t), b = e.get(i.operands[2], t);
    unsigned first = unsigned(e.get(i.operands[3], count) & 255);
    unsigned length = unsigned(e.get(i.operands[4], count) & 255);
    uint64_t mask = first >= t.bits ? 0 : truncate(truncate(~uint64_t(0), length) << first, t.bits);
    e.set(i.operands[0], (b & ~mask) | ((first >= t.bits ? 0 : a << first) & mask));
}

static void dot(Exec &e, const Instr &i) {
    Type t;
    uint64_t a = e.get(i.operands[1], t), b = e.get(i.operands[2], t);
    int64_t sum = sign_extend(e.get(i.operands[3], t), 32);
    auto part = [](uint64_t word, int at, unsigned bits, Type type) {
        uint64_t field = truncate(word >> unsigned(at) * bits, bits);
        return type.kind == kSigned ? sign_extend(field, bits) : int64_t(field);
    };
    bool four = i.words[0] == "dp4a";
    for (int n = 0; n < (four ? 4 : 2); n++)
        sum += part(a, n, four ? 8 : 16, i.types[0]) *
               part(b, n + (!four && i.has("hi") ? 2 : 0), 8, i.types[1]);
    e.set(i.operands[0], truncate(uint64_t(sum), 32));
}

Handler find_arithmetic(Instr &instr) {
    static const std::map<std::string, std::pair<Code, size_t>> plain = {
        {"add", {kAdd, 3}},   {"sub", {kSub, 3}},     {"mul", {kMul, 3}},
        {"mad", {kMad, 4}},   {"fma", {kFma, 4}},     {"min", {kMin, 3}},
        {"max", {kMax, 3}},   {"div", {kDiv, 3}},     {"rem", {kRem, 3}},
        {"and", {kAnd, 3}},   {"or", {kOr, 3}},       {"xor", {kXor, 3}},
        {"not", {kNot, 2}},   {"shl", {kShl, 3}},     {"shr", {kShr, 3}},
        {"neg", {kNeg, 2}},   {"abs", {kAbs, 2}},     {"rcp", {kRcp, 2}},
        {"sqrt", {kSqrt, 2}}, {"rsqrt", {kRsqrt, 2}}, {"ex2", {kEx2, 2}},
        {"lg2", {kLg2, 2}},   {"sin", {kSin, 2}},     {"cos", {kCos, 2}},
        {"tanh", {kTanh, 2}}, {"popc", {kPopc, 2}},   {"clz", {kClz, 2}},
        {"brev", {kBrev, 2}}, {"cnot", {kCnot, 2}},   {"copysign", {kCopysign, 3}},
    };
    static const std::map<std::string, std::pair<Handler, size_t>> own = {
        {"lop3", {lop3, 5}},  {"prmt", {prmt, 4}},     {"setp", {setp, 3}},     {"selp", {selp, 4}},
        {"shf", {funnel, 4}}, {"bfe", {bit_field, 4}}, {"bfi", {bit_field, 5}}, {"dp4a", {dot, 4}},
        {"dp2a", {dot, 4}},   {"mov", {move, 2}},      {"cvt", {cvt, 2}},
    };
    // what changes a result and is not done here must not pass unseen
    for (const char *word : {"cc", "rm", "rp", "satfinite", "nan", "xorsign"})
        if (instr.has(word)) return nullptr;
    if (instr.types.empty()) return nullptr;
    auto p = plain.find(instr.words[0]);
    if (p != plain.end() && instr.operands.size() == p->second.second) {
        instr.code = p->second.first;
        return compute;
    }
    auto o = own.find(instr.words[0]);
    if (o == own.end() || instr.operands.size() < o->second.second) return nullptr;
    if (o->second.first == cvt && instr.types.size() < 2) return nullptr;
    if (o->second.first == lop3 && instr.words.size() != 2) return nullptr;
    return o->second.first;
}

} // namespace emu::ptx

using namespace emu;
using namespace emu::ptx;

extern "C" void emu_ptx(void **place, const char *text, EmuOperand *operands, int count, int line) {
    static std::unordered_map<void **, Site *> sites;
    static std::pair<void **, Site *> recent[256]; // by a few bits of the address
    self()->index.line = line;
    if (world.checked) wgmma_report_early(operands, count);
    auto &last = recent[uintptr_t(place) / sizeof(void *) % 256];
    if (last.first != place) {
        Site *&known = sites[place];
        if (!known) known = parse(text, count, line);
        last = {place, known};
    }
    const Site *site = last.second;
    uint64_t registers[256];
    if (site->slots > 256) emu_fail("instruction", line, "more than 256 registers in an asm");
    memset(registers + count, 0, size_t(site->slots - count) * sizeof *registers);
    for (int i = 0; i < count; i++) registers[i] = operands[i].bits;
    Exec exec{registers, line, operands};
    while (exec.next < site->code.size()) {
        const Instr &instr = site->code[exec.next++];
        if (instr.guard >= 0 && (registers[instr.guard] & 1) == uint64_t(instr.guard_negated))
            continue;
        instr.handler(exec, instr);
    }
    for (int i = 0; i < count; i++)
        if (operands[i].target) memcpy(operands[i].target, &registers[i], operands[i].bytes);
}

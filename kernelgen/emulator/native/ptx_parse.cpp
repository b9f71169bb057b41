// The text of an asm statement, to instructions.
#include <ctype.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <map>
#include <unordered_map>

#include "ptx.h"

namespace emu::ptx {

bool parse_type(const std::string &word, Type &type) {
    static const std::map<std::string, Type> types = {
        {"pred", {kPredicate, 1, 1, 0}},  {"b8", {kBits, 8, 1, 0}},
        {"b16", {kBits, 16, 1, 0}},       {"b32", {kBits, 32, 1, 0}},
        {"b64", {kBits, 64, 1, 0}},       {"u8", {kUnsigned, 8, 1, 0}},
        {"u16", {kUnsigned, 16, 1, 0}},   {"u32", {kUnsigned, 32, 1, 0}},
        {"u64", {kUnsigned, 64, 1, 0}},   {"s8", {kSigned, 8, 1, 0}},
        {"s16", {kSigned, 16, 1, 0}},     {"s32", {kSigned, 32, 1, 0}},
        {"s64", {kSigned, 64, 1, 0}},     {"f16", {kFloat, 16, 1, 'f'}},
        {"f16x2", {kFloat, 16, 2, 'f'}},  {"bf16", {kFloat, 16, 1, 'b'}},
        {"bf16x2", {kFloat, 16, 2, 'b'}}, {"f32", {kFloat, 32, 1, 'f'}},
        {"f64", {kFloat, 64, 1, 'f'}},    {"tf32", {kFloat, 32, 1, 't'}},
        {"e4m3", {kFloat, 8, 1, '4'}},    {"e5m2", {kFloat, 8, 1, '5'}},
    };
    auto found = types.find(word);
    if (found == types.end()) return false;
    type = found->second;
    return true;
}

namespace {

class Parser {
  public:
    Parser(const char *text, int operands, int line) : p_(text), line_(line), slots_(operands) {
        inputs_ = operands;
    }

    Site *run() {
        Site *site = new Site();
        for (skip(); *p_; skip()) {
            if (*p_ == '{' || *p_ == '}' || *p_ == ';') {
                p_++;
                continue;
            }
            std::string statement;
            int depth = 0; // braces inside a statement hold a vector
            while (*p_ && (*p_ != ';' || depth) && !(*p_ == '}' && !depth)) {
                depth += *p_ == '{';
                depth -= *p_ == '}';
                if (!skip_comment()) statement += *p_++;
            }
            for (size_t end; (end = label_end(statement));) {
                labels_[statement.substr(0, statement.find_first_of(": \t\n"))] = site->code.size();
                end = statement.find_first_not_of(" \t\n", end);
                statement = end == std::string::npos ? "" : statement.substr(end);
            }
            if (statement.compare(0, 4, ".reg") == 0) declare(statement);
            else if (!statement.empty()) site->code.push_back(instruction(statement));
        }
        for (auto &[number, name] : branches_) {
            if (!labels_.count(name)) fail("no label " + name, site->code[number].text);
            site->code[number].code = int(labels_[name]);
        }
        site->slots = slots_;
        return site;
    }

  private:
    const char *p_; // what is left of the text, then of a statement
    int line_, slots_, inputs_;
    size_t instructions_ = 0;
    std::unordered_map<std::string, int> names_;
    std::unordered_map<std::string, size_t> labels_;       // number of the instruction behind each
    std::vector<std::pair<size_t, std::string>> branches_; // numbers of those that jump, and where

    // Behind the colon of "name:" at a statement's start, or 0.  A name may have %= in it.
    static size_t label_end(const std::string &statement) {
        size_t at = 0;
        while (at < statement.size() && (is_name(statement[at]) || statement[at] == '=')) at++;
        if (!at) return 0;
        while (at < statement.size() && isspace(static_cast<unsigned char>(statement[at]))) at++;
        bool colon = at < statement.size() && statement[at] == ':';
        return colon && statement[at + 1] != ':' ? at + 1 : 0;
    }

    bool skip_comment() {
        if (p_[0] != '/' || (p_[1] != '/' && p_[1] != '*')) return false;
        const char *end = p_[1] == '/' ? strchr(p_, '\n') : strstr(p_ + 2, "*/");
        p_ = !end ? p_ + strlen(p_) : p_[1] == '/' ? end : end + 2;
        return true;
    }
    void skip() {
        while (*p_ && (isspace(static_cast<unsigned char>(*p_)) || skip_comment()))
            if (isspace(static_cast<unsigned char>(*p_))) p_++;
    }
    [[noreturn]] void fail(const std::string &what, const std::string &text) {
        emu_fail("instruction", line_, "%s in the assembly \"%s\"", what.c_str(), text.c_str());
    }

    static bool is_name(char c) {
        return isalnum(static_cast<unsigned char>(c)) || c == '_' || c == '$' || c == '%';
    }
    std::string name() {
        std::string result;
        while (is_name(*p_) || (*p_ == '.' && !result.empty())) result += *p_++;
        return result;
    }

    // .reg .pred p, q;  .reg .b32 r<4>
    void declare(const std::string &statement) {
        const char *rest = p_;
        p_ = statement.c_str() + 4;
        skip();
        while (*p_ == '.') {
            p_++;
            while (is_name(*p_)) p_++;
            skip();
        }
        while (*p_) {
            std::string base = name();
            if (base.empty()) fail("a declaration that is not understood", statement);
            skip();
            if (*p_ == '<') {
                long count = strtol(p_ + 1, const_cast<char **>(&p_), 10);
                for (long i = 0; i < count; i++) names_[base + std::to_string(i)] = slots_++;
                if (*p_ == '>') p_++;
            } else {
                names_[base] = slots_++;
            }
            skip();
            if (*p_ == ',') p_++;
            skip();
        }
        p_ = rest;
    }

    int reg(const std::string &text, const std::string &statement) {
        if (text.size() > 1 && text[0] == '%' && isdigit(static_cast<unsigned char>(text[1]))) {
            int slot = atoi(text.c_str() + 1);
            if (slot >= inputs_)
                fail("operand " + text + ", which the statement lacks,", statement);
            return slot;
        }
        static const char *const special[] = {
            "%%tid.x",       "%%tid.y",       "%%tid.z",       "%%ntid.x",  "%%ntid.y",
            "%%ntid.z",      "%%ctaid.x",     "%%ctaid.y",     "%%ctaid.z", "%%nctaid.x",
            "%%nctaid.y",    "%%nctaid.z",    "%%laneid",      "%%warpid",  "%%clock",
            "%%globaltimer", "%%smid",        "%%lanemask_lt", "%%clock64", "%%lanemask_le",
            "%%lanemask_eq", "%%lanemask_ge", "%%lanemask_gt"};
        for (size_t i = 0; i < sizeof special / sizeof *special; i++)
            if (text == special[i]) return -2 - int(i);
        auto found = names_.find(text);
        if (found == names_.end()) fail("\"" + text + "\", which is no register,", statement);
        return found->second;
    }

    Operand operand(const std::string &statement) {
        Operand o;
        skip();
        if (*p_ == '{' || *p_ == '[') {
            bool vector = *p_++ == '{';
            if (vector) {
                o.form = Operand::kVector;
                for (skip(); *p_ && *p_ != '}'; skip()) {
                    o.parts.push_back(operand(statement));
                    skip();
                    if (*p_ == ',') p_++;
                }
            } else {
                o = operand(statement);
                skip();
                bool minus = *p_ == '-';
                if (*p_ == '+' || minus) {
                    p_++;
                    Operand offset = operand(statement);
                    if (offset.form == Operand::kRegister) o.second = offset.slot;
                    else o.number += minus ? -offset.number : offset.number;
                }
                skip();
                if (o.form == Operand::kNumber) o.slot = -1;
                o.form = Operand::kMemory;
            }
            if (*p_ != (vector ? '}' : ']')) fail("an operand that is not closed", statement);
            p_++;
            return o;
        }
        if (*p_ == '!' || *p_ == '-') {
            o.negated = true;
            p_++;
            skip();
        }
        if (p_[0] == '0' && (p_[1] == 'f' || p_[1] == 'F' || p_[1] == 'd' || p_[1] == 'D')) {
            bool wide = tolower(p_[1]) == 'd';
            uint64_t bits = strtoull(p_ + 2, const_cast<char **>(&p_), 16);
            float narrow;
            uint32_t low = uint32_t(bits);
            memcpy(&narrow, &low, 4);
            if (wide) memcpy(&o.real, &bits, 8);
            else o.real = double(narrow);
            o.is_float = true;
            return o;
        }
        if (isdigit(static_cast<unsigned char>(*p_))) {
            char *end, *real_end;
            o.number = int64_t(strtoull(p_, &end, 0));
            o.real = strtod(p_, &real_end);
            bool hex = p_[0] == '0' && tolower(p_[1]) == 'x';
            o.is_float = !hex && real_end > end;
            p_ = o.is_float ? real_end : end;
            if (*p_ == 'U') p_++;
            if (o.negated) {
                o.number = -o.number;
                o.real = -o.real;
                o.negated = false;
            }
            return o;
        }
        std::string text = name();
        if (text.empty()) fail("an operand that is not understood", statement);
        o.form = text == "_" ? Operand::kSink : Operand::kRegister;
        if (text != "_") o.slot = reg(text, statement);
        if (*p_ == '|') {
            p_++;
            std::string other = name();
            o.second = other == "_" ? -1 : reg(other, statement);
        }
        return o;
    }

    Instr instruction(std::string statement) {
        while (!statement.empty() && isspace(static_cast<unsigned char>(statement.back())))
            statement.pop_back();
        Instr instr;
        instr.text = statement;
        const char *rest = p_;
        p_ = statement.c_str();
        if (*p_ == '@') {
            p_++;
            if (*p_ == '!') {
                instr.guard_negated = true;
                p_++;
            }
            instr.guard = reg(name(), statement);
            skip();
        }
        std::string word;
        for (; is_name(*p_) || *p_ == '.' || *p_ == ':'; p_++) {
            if (*p_ != '.') word += *p_;
            if (*p_ == '.' || !(is_name(p_[1]) || p_[1] == '.' || p_[1] == ':')) {
                if (!word.empty()) instr.words.push_back(word);
                word.clear();
            }
        }
        for (const std::string &w : instr.words) {
            Type t;
            if (parse_type(w, t)) instr.types.push_back(t);
        }
        if (!instr.words.empty() && instr.words[0] == "bra") {
            skip();
            branches_.push_back({instructions_, p_});
            p_ = "";
        }
        instructions_++;
        for (skip(); *p_; skip()) {
            instr.operands.push_back(operand(statement));
            skip();
            if (*p_ == ',') p_++;
            else if (*p_) fail("text after an operand", statement);
        }
        p_ = rest;
        if (!instr.words.empty()) {
            for (auto find : {find_arithmetic, find_async, find_wgmma, find_memory, find_matrix}) {
                instr.handler = find(instr);
                if (instr.handler) return instr;
            }
        }
        unknown(instr, line_);
    }
};

} // namespace

void unknown(const Instr &instr, int line) {
    emu_fail("instruction", line, "the emulator does not know the instruction \"%s\"",
             instr.text.c_str());
}

Site *parse(const char *text, int operands, int line) { return Parser(text, operands, line).run(); }

} // namespace emu::ptx

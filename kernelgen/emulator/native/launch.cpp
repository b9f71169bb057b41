// A launch: guarded buffers, worker processes, and what becomes of a fault or a hang.
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "internal.h"

#include <dlfcn.h>
#if !defined(__APPLE__)
#include <link.h>
#endif
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <time.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <string>

namespace emu {

constexpr size_t kPage = 16384;       // a multiple of every system's page
constexpr size_t kGuard = 64 * kPage; // unmapped on both sides of a buffer
constexpr unsigned char kSlack = 0xA7;
constexpr uint32_t kMaxFindings = sizeof(Shared::list) / sizeof(Finding);

// ---- findings

uint64_t code_offset(const void *pc) {
    uintptr_t at = reinterpret_cast<uintptr_t>(pc);
    return at >= world.code_base && at < world.code_end ? at - world.code_base : 0;
}

void vreport(const char *kind, Where where, Where other, const Fiber *fiber, const char *format,
             va_list args) {
    Shared &shared = *world.shared;
    uint32_t known = std::min(__atomic_load_n(&shared.findings, __ATOMIC_ACQUIRE), kMaxFindings);
    if (!where.line && !where.pc && fiber) where.line = fiber->index.line;
    for (uint32_t i = 0; i < known; i++) {
        Finding &f = shared.list[i];
        if (f.line == where.line && f.pc == where.pc && !strcmp(f.kind, kind)) {
            __atomic_fetch_add(&f.count, 1, __ATOMIC_RELAXED);
            return;
        }
    }
    uint32_t at = __atomic_fetch_add(&shared.findings, 1, __ATOMIC_ACQ_REL);
    if (at >= kMaxFindings) return;
    Finding &f = shared.list[at];
    snprintf(f.kind, sizeof f.kind, "%s", kind);
    vsnprintf(f.text, sizeof f.text, format, args);
    f.line = where.line;
    f.pc = where.pc;
    f.other_line = other.line;
    f.other_pc = other.pc;
    f.count = 1;
    for (int a = 0; fiber && a < 3; a++) {
        f.block[a] = fiber->index.block[a];
        f.thread[a] = fiber->index.thread[a];
    }
}

void report(const char *kind, Where where, Where other, const Fiber *fiber, const char *format,
            ...) {
    va_list args;
    va_start(args, format);
    vreport(kind, where, other, fiber, format, args);
    va_end(args);
}

bool describe_address(const void *pointer, char *text, size_t size) {
    const unsigned char *p = static_cast<const unsigned char *>(pointer);
    for (uint32_t i = 0; i < world.launch->buffer_count; i++) {
        const Buffer &b = world.launch->buffers[i];
        if (p < b.map || p >= b.map + b.map_bytes) continue;
        snprintf(text, size, "byte %lld of buffer %u, which has %llu bytes",
                 static_cast<long long>(p - b.base), i, static_cast<unsigned long long>(b.bytes));
        return true;
    }
    if (p >= emu_dynamic_shared && p < emu_dynamic_shared + kMaxDynamic + 8192) {
        snprintf(text, size, "byte %lld of dynamic shared memory, which has %u bytes",
                 static_cast<long long>(p - world.dynamic), world.launch->dynamic_shared);
        return true;
    }
    return false;
}

bool outside_buffers(const void *pointer, size_t bytes) {
    const unsigned char *p = static_cast<const unsigned char *>(pointer);
    for (uint32_t i = 0; i < world.launch->buffer_count; i++) {
        const Buffer &b = world.launch->buffers[i];
        if (p >= b.map && p < b.map + b.map_bytes)
            return p < b.base || p + bytes > b.base + b.bytes;
    }
    if (p >= emu_dynamic_shared && p < emu_dynamic_shared + kMaxDynamic)
        return p < world.dynamic || p + bytes > world.dynamic + world.launch->dynamic_shared;
    return false;
}

// ---- faults

static const void *program_counter(void *context) {
    ucontext_t *uc = static_cast<ucontext_t *>(context);
#if defined(__APPLE__) && defined(__aarch64__)
    return reinterpret_cast<void *>(uc->uc_mcontext->__ss.__pc);
#elif defined(__APPLE__)
    return reinterpret_cast<void *>(uc->uc_mcontext->__ss.__rip);
#elif defined(__aarch64__)
    return reinterpret_cast<void *>(uc->uc_mcontext.pc);
#else
    return reinterpret_cast<void *>(uc->uc_mcontext.gregs[REG_RIP]);
#endif
}

static void on_signal(int number, siginfo_t *info, void *context) {
    const Fiber *fiber = emu_self ? self() : nullptr;
    Where where{0, code_offset(program_counter(context))};
    if (!where.pc && fiber) where.line = fiber->index.line;
    if (!fiber) {
        report("crash", where, {}, nullptr,
               "signal %d between threads: a bug of the emulator, or "
               "memory that a kernel overwrote",
               number);
        _exit(1);
    }
    char text[128];
    const unsigned char *address = static_cast<unsigned char *>(info->si_addr);
    const unsigned char *stacks = world.block->stacks;
    if (number == SIGPROF) {
        report("hang", where, {}, fiber, "still running after %g seconds of CPU time",
               world.launch->seconds);
        __atomic_store_n(&world.shared->stop, 1, __ATOMIC_RELAXED);
        _exit(0); // it may have been anywhere, also in malloc
    }
    if (number == SIGFPE)
        report("undefined", where, {}, fiber, "integer division by zero, or of the lowest by -1");
    else if (number == SIGILL || number == SIGTRAP)
        report("trap", where, {}, fiber, "the kernel ran into a trap");
    else if (address >= stacks && address < stacks + world.threads * kStackBytes)
        report("overflow", where, {}, fiber, "a thread used more than %zu KiB of stack",
               kStackBytes >> 10);
    else if (describe_address(address, text, sizeof text))
        report("bounds", where, {}, fiber, "out of bounds: %s", text);
    else if (!address)
        report("bounds", where, {}, fiber,
               "a null pointer, a misaligned vector access, or an "
               "address that no pointer can have");
    else
        report("bounds", where, {}, fiber, "out of bounds: address %p is in no buffer",
               static_cast<const void *>(address));
    abandon_block();
}

static void catch_signals() {
    static unsigned char stack[64 << 10];
    stack_t alternate{};
    alternate.ss_sp = stack;
    alternate.ss_size = sizeof stack;
    sigaltstack(&alternate, nullptr);
    struct sigaction action{};
    action.sa_sigaction = on_signal;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    for (int s : {SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGTRAP, SIGPROF})
        sigaction(s, &action, nullptr);
    itimerval timer{};
    double seconds = world.launch->seconds;
    timer.it_value.tv_sec = time_t(seconds);
    timer.it_value.tv_usec = suseconds_t((seconds - double(time_t(seconds))) * 1e6) + 1;
    // of CPU time: what else the machine does must not make a kernel hang
    setitimer(ITIMER_PROF, &timer, nullptr);
    sigset_t all;
    sigemptyset(&all);
    sigprocmask(SIG_SETMASK, &all, nullptr);
}

// ---- memory

static void *map_pages(size_t bytes, int protection) {
    void *map = mmap(nullptr, bytes, protection, MAP_SHARED | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return map == MAP_FAILED ? nullptr : map;
}

// The bytes end where an unmapped page begins, or begin where one ends.  Ends are rounded to 16
// bytes, as wide loads need; what lies between is watched.
static bool map_buffer(Buffer &b, bool at_start) {
    size_t pages = (b.bytes + kPage - 1) / kPage * kPage;
    b.map_bytes = pages + 2 * kGuard;
    b.map = static_cast<unsigned char *>(map_pages(b.map_bytes, PROT_NONE));
    if (!b.map) return false;
    if (pages && mprotect(b.map + kGuard, pages, PROT_READ | PROT_WRITE)) return false;
    b.base = b.map + kGuard + (at_start ? 0 : (pages - b.bytes) & ~size_t(15));
    memset(b.map + kGuard, kSlack, pages);
    memcpy(b.base, b.data, b.bytes);
    return true;
}

static void unmap_buffer(Buffer &b, uint32_t number) {
    size_t pages = b.map_bytes - 2 * kGuard;
    const unsigned char *first = b.map + kGuard;
    for (size_t i = 0; i < pages; i++) {
        long long at = first + i - b.base;
        if ((at >= 0 && at < static_cast<long long>(b.bytes)) || first[i] == kSlack) continue;
        report("bounds", {}, {}, nullptr,
               "some thread wrote byte %lld of buffer %u, which has "
               "%llu bytes",
               at, number, static_cast<unsigned long long>(b.bytes));
        break;
    }
    memcpy(b.data, b.base, b.bytes);
    munmap(b.map, b.map_bytes);
}

#if !defined(__APPLE__)
struct Module {
    uintptr_t inside; // an address in it
    uintptr_t base = 0, end = 0;
    unsigned char *tls = nullptr;
    size_t tls_bytes = 0;
    bool share;
};

static int visit_module(dl_phdr_info *info, size_t, void *data) {
    Module &m = *static_cast<Module *>(data);
    bool found = false;
    uintptr_t end = 0;
    for (int i = 0; i < info->dlpi_phnum; i++) {
        const auto &h = info->dlpi_phdr[i];
        uintptr_t start = info->dlpi_addr + h.p_vaddr;
        if (h.p_type != PT_LOAD) continue;
        found |= m.inside >= start && m.inside < start + h.p_memsz;
        end = std::max(end, uintptr_t(start + h.p_memsz));
    }
    if (!found) return 0;
    m.base = info->dlpi_addr;
    m.end = end;
    for (int i = 0; i < info->dlpi_phnum; i++) {
        const auto &h = info->dlpi_phdr[i];
        uintptr_t start = info->dlpi_addr + h.p_vaddr;
        if (h.p_type == PT_TLS) {
            m.tls = static_cast<unsigned char *>(info->dlpi_tls_data);
            m.tls_bytes = h.p_memsz;
        }
        if (h.p_type != PT_LOAD || !(h.p_flags & PF_W) || !m.share) continue;
        // global variables are one for all blocks, so one for all processes
        uintptr_t page = uintptr_t(sysconf(_SC_PAGESIZE)), first = start / page * page;
        size_t bytes = (start + h.p_memsz - first + page - 1) / page * page;
        std::string copy(reinterpret_cast<char *>(first), bytes);
        void *at = mmap(reinterpret_cast<void *>(first), bytes, PROT_READ | PROT_WRITE,
                        MAP_SHARED | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
        if (at != MAP_FAILED) memcpy(at, copy.data(), bytes);
    }
    return 1;
}
#endif

// Where the library's code and its static shared memory are.
static void look_into_library(void *library, void *inside, bool in_worker) {
    using Statics = void *(*)(size_t *);
    Statics statics = reinterpret_cast<Statics>(dlsym(library, "emu_statics"));
    world.statics = nullptr;
    world.static_bytes = 0;
    // what is declared with little alignment must not have more
    auto offset = static_cast<const uint32_t *>(dlsym(library, "emu_dynamic_offset"));
    world.dynamic = emu_dynamic_shared + (offset ? *offset : 0);
    // its address is in thread-local storage unless it says how much there is
    if (statics) world.statics = static_cast<unsigned char *>(statics(&world.static_bytes));
#if !defined(__APPLE__)
    Module module;
    module.inside = uintptr_t(inside);
    // shared memory that is not a thread's own must stay a process's own
    module.share = !in_worker && !world.static_bytes;
    dl_iterate_phdr(visit_module, &module);
    world.code_base = module.base;
    world.code_end = module.end;
    if (!world.static_bytes) {
        world.statics = module.tls;
        world.static_bytes = module.tls ? module.tls_bytes : 0;
    }
#else
    Dl_info info;
    if (dladdr(inside, &info)) world.code_base = uintptr_t(info.dli_fbase);
    world.code_end = world.code_base + (64 << 20);
    (void)in_worker;
#endif
}

// ---- workers

static void save_shared(Block &block) {
    size_t dynamic = world.launch->dynamic_shared;
    block.saved.resize(dynamic + world.static_bytes);
    std::copy(world.dynamic, world.dynamic + dynamic, block.saved.begin());
    std::copy(world.statics, world.statics + world.static_bytes,
              block.saved.begin() + long(dynamic));
}

static void restore_shared(const Block &block) {
    size_t dynamic = world.launch->dynamic_shared;
    memcpy(world.dynamic, block.saved.data(), dynamic);
    if (world.static_bytes) memcpy(world.statics, block.saved.data() + dynamic, world.static_bytes);
    if (world.checked) shadow_resume();
}

// Runs blocks until none are left.  A block whose threads all poll steps back for the others, as
// they would run beside it on a GPU.
static void work(uint32_t blocks) {
    std::vector<Block *> polling;
    std::vector<Block *> spare;
    size_t turn = 0;
    while (!__atomic_load_n(&world.shared->stop, __ATOMIC_RELAXED)) {
        Block *block = nullptr;
        uint32_t number = blocks;
        if (polling.size() < 256)
            number = __atomic_fetch_add(&world.shared->next_block, 1, __ATOMIC_RELAXED);
        if (number < blocks) {
            if (spare.empty()) spare.push_back(new Block());
            block = spare.back();
            spare.pop_back();
            bool reverse = world.launch->order == 1;
            if (!start_block(*block, reverse ? blocks - 1 - number : number)) {
                report("crash", {}, {}, nullptr, "no memory for the stacks of a block's threads");
                return;
            }
        } else {
            if (polling.empty()) return;
            turn = (turn + 1) % polling.size();
            block = polling[turn];
            polling.erase(polling.begin() + long(turn));
            restore_shared(*block);
        }
        run_block(*block);
        if (block->queued) {
            save_shared(*block);
            polling.push_back(block);
        } else {
            spare.push_back(block);
        }
    }
}

[[noreturn]] static void worker(void *library, uint32_t blocks) {
    look_into_library(library, reinterpret_cast<void *>(world.entry), true);
    catch_signals();
    work(blocks);
    fflush(stdout);
    _exit(0);
}

static double now() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return double(t.tv_sec) + 1e-9 * double(t.tv_nsec);
}

// Runs all blocks.  Most launches are over before a second worker would have begun, so more than
// one start only when the first has been at it for a while.
static bool run_workers(void *library, uint32_t blocks, uint32_t count, double seconds) {
    constexpr double kAlone = 0.004;
    // a worker's own clock, which counts CPU time, rings first unless it gets next to none
    double begin = now(), end = begin + 20 * seconds + 5;
    std::vector<pid_t> left;
    bool started = false;
    auto start = [&] {
        pid_t child = fork();
        if (child == 0) worker(library, blocks);
        if (child > 0) left.push_back(child);
        started |= child > 0;
    };
    start();
    useconds_t pause = 20;
    for (uint32_t others = count - 1; !left.empty();) {
        for (; others && now() > begin + kAlone; others--) {
            if (__atomic_load_n(&world.shared->next_block, __ATOMIC_RELAXED) < blocks) start();
        }
        for (size_t i = 0; i < left.size();) {
            int status = 0;
            pid_t got = waitpid(left[i], &status, WNOHANG);
            if (got == 0) {
                i++;
                continue;
            }
            if (got > 0 && WIFSIGNALED(status))
                report("crash", {}, {}, nullptr, "a worker died of signal %d (%s)",
                       WTERMSIG(status), now() > end ? "it hung" : "unexpectedly");
            left.erase(left.begin() + long(i));
        }
        if (now() > end)
            for (pid_t child : left) kill(child, SIGKILL);
        usleep(pause);
        pause = std::min<useconds_t>(pause * 2, 250);
    }
    return started;
}

} // namespace emu

using namespace emu;

// Returns 0, or 1 with `error` set if the launch itself is impossible.
extern "C" int emu_launch(Launch *launch) {
    auto refuse = [&](const char *why) {
        snprintf(launch->error, sizeof launch->error, "%s", why);
        return 1;
    };
    static bool busy = false;
    if (__atomic_exchange_n(&busy, true, __ATOMIC_ACQUIRE)) return refuse("a launch is running");
    struct Release {
        ~Release() { __atomic_store_n(&busy, false, __ATOMIC_RELEASE); }
    } release;
    uint64_t threads = uint64_t(launch->block[0]) * launch->block[1] * launch->block[2];
    uint64_t blocks = uint64_t(launch->grid[0]) * launch->grid[1] * launch->grid[2];
    if (!threads || threads > kMaxThreads) return refuse("a block has 1 to 1024 threads");
    if (!blocks || blocks > 0x7fffffff) return refuse("a grid has 1 to 2^31 - 1 blocks");
    if (launch->dynamic_shared > kMaxDynamic) return refuse("shared memory is at most 1 MiB");
    void *library = dlopen(launch->library, RTLD_NOW | RTLD_LOCAL);
    if (!library) return refuse(dlerror());
    void *entry = dlsym(library, launch->symbol);
    if (!entry) return refuse("no such entry");

    world = World();
    world.launch = launch;
    world.threads = uint32_t(threads);
    world.checked = launch->flags & kChecked;
    world.entry = reinterpret_cast<void (*)(void **)>(entry);
    look_into_library(library, entry, false);
    world.shared = static_cast<Shared *>(map_pages(sizeof(Shared), PROT_READ | PROT_WRITE));
    if (!world.shared) return refuse("no memory");
    for (uint32_t i = 0; i < launch->buffer_count; i++) {
        if (!map_buffer(launch->buffers[i], launch->flags & kBuffersAtStart))
            return refuse("no memory for a buffer");
    }
    for (uint32_t i = 0; i < launch->pointer_count; i++)
        *launch->pointers[i].slot = launch->buffers[launch->pointers[i].buffer].base;

    fflush(stdout);
    uint32_t count = uint32_t(std::min<uint64_t>(blocks, std::max(1u, launch->workers)));
    bool started = run_workers(library, uint32_t(blocks), count, launch->seconds);

    for (uint32_t i = 0; i < launch->buffer_count; i++) unmap_buffer(launch->buffers[i], i);
    launch->finding_count = std::min({world.shared->findings, kMaxFindings, launch->max_findings});
    memcpy(launch->findings, world.shared->list, launch->finding_count * sizeof(Finding));
    launch->atomics = world.shared->atomics;
    munmap(world.shared, sizeof(Shared));
    dlclose(library);
    return started ? 0 : refuse("no process could be started");
}

extern "C" uint64_t emu_struct_bytes(int which) {
    return which == 0 ? sizeof(Launch) : which == 1 ? sizeof(Buffer) : sizeof(Finding);
}

// The kinds and sizes of a kernel's arguments, as the function of that name writes them.
extern "C" int emu_describe(const char *path, const char *symbol, char *text, char *error) {
    void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    auto describe = library ? reinterpret_cast<void (*)(char *)>(dlsym(library, symbol)) : nullptr;
    if (describe) describe(text);
    else snprintf(error, 256, "%s", dlerror());
    if (library) dlclose(library);
    return describe ? 0 : 1;
}

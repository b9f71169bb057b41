// The entry points of LLVM's OpenMP that compiled kernels call, over threads that somebody else has:
// any library with GCC's entry points, of which LLVM's own is one.  So kernels of clang share the
// threads of a library that was compiled by GCC.
//
// What a kernel calls is the interface that clang's code generation assumes (llvm-project:
// openmp/runtime/src/kmp.h, clang/lib/Frontend/OpenMP/OMPKinds.def); GCC's is in its libgomp.h.
#include <stdarg.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>

// Threads, and who they are.
struct pool {
    void (*parallel)(void (*run)(void *), void *data, unsigned threads, unsigned flags);
    void (*barrier)(void);
    int (*thread_num)(void), (*num_threads)(void), (*max_threads)(void);
};

typedef void (*task)(int32_t *, int32_t *, ...);

// Loops in which whoever is free takes the next turns have a counter each.  Between two of them is
// a barrier, so no thread is two loops ahead of another.
enum { COUNTERS = 4 };

struct team {
    const struct pool *pool;
    task run;
    void **arguments;
    int32_t count;
    _Atomic int64_t taken[COUNTERS];
};

struct member {
    struct team *team;
    int id, size;
    unsigned loop;  // which counter
    int64_t lower, step, turns, chunk;
};

static _Thread_local struct member me = {.size = 1};
static _Atomic(const struct pool *) current;

// The threads of regions that begin later.
void kernelgen_use(const struct pool *pool) { atomic_store(&current, pool); }

// What kernels are told to call in place of omp_get_max_threads, which is a name that other libraries
// of the process have, too.
int kernelgen_max_threads(void) { return atomic_load(&current)->max_threads(); }

// ---- a region -------------------------------------------------------------------------------

// A function takes its arguments as calls in this machine's C pass them; more than it has are
// ignored.
#define FOUR(i) a[i], a[i + 1], a[i + 2], a[i + 3]
#define SIXTEEN(i) FOUR(i), FOUR(i + 4), FOUR(i + 8), FOUR(i + 12)
#define SIXTY_FOUR(i) SIXTEEN(i), SIXTEEN(i + 16), SIXTEEN(i + 32), SIXTEEN(i + 48)
enum { FEW = 16, MOST = 128 };

static void call(const struct team *team, int32_t id) {
    int32_t bound = 0;
    void **a = team->arguments;
    if (team->count <= FEW) team->run(&id, &bound, SIXTEEN(0));
    else team->run(&id, &bound, SIXTY_FOUR(0), SIXTY_FOUR(64));
}

static void run_member(void *data) {
    struct team *team = data;
    const struct member before = me;
    me = (struct member){.team = team, .id = team->pool->thread_num(),
                         .size = team->pool->num_threads()};
    call(team, me.id);
    me = before;
}

void __kmpc_fork_call(void *where, int32_t count, task run, ...) {
    (void)where;
    void *arguments[MOST];
    if (count > MOST) abort();  // team.py links no kernel that may have more
    va_list given;
    va_start(given, run);
    for (int32_t i = 0; i < count; i++) arguments[i] = va_arg(given, void *);
    va_end(given);
    for (int32_t i = count; i < (count <= FEW ? FEW : MOST); i++) arguments[i] = NULL;
    struct team team = {.pool = atomic_load(&current), .run = run, .arguments = arguments,
                        .count = count};
    team.pool->parallel(run_member, &team, 0, 0);
}

// A region that one thread goes through, as it is small.  The code in between is called directly.
static _Thread_local struct member outside;

void __kmpc_serialized_parallel(void *where, int32_t id) {
    (void)where, (void)id;
    outside = me;
    me = (struct member){.size = 1};
}

void __kmpc_end_serialized_parallel(void *where, int32_t id) {
    (void)where, (void)id;
    me = outside;
}

int32_t __kmpc_global_thread_num(void *where) {
    (void)where;
    return me.id;
}

void __kmpc_barrier(void *where, int32_t id) {
    (void)where, (void)id;
    if (me.size > 1) me.team->pool->barrier();
}

// ---- loops ----------------------------------------------------------------------------------

// Of a loop from *lower to *upper, both included, the part that is this thread's: one piece, or with
// a chunk those that are *stride apart.
#define STATIC(name, type, change)                                                                \
    void name(void *where, int32_t id, int32_t schedule, int32_t *last, type *lower, type *upper, \
              change *stride, change step, change chunk) {                                        \
        enum { CHUNKED = 33, KINDS = 0xFFFF };                                                    \
        (void)where, (void)id;                                                                    \
        const int64_t first = (int64_t)*lower, turns = ((int64_t)*upper - first) / step + 1;      \
        const int64_t size = me.size;                                                             \
        if ((schedule & KINDS) == CHUNKED) {                                                      \
            *last = (turns - 1) / chunk % size == me.id;                                          \
            *stride = (change)(chunk * step * size);                                              \
            *lower = (type)(first + me.id * chunk * step);                                        \
            *upper = (type)(first + ((me.id + 1) * chunk - 1) * step);                            \
            return;                                                                               \
        }                                                                                         \
        const int64_t each = turns / size, rest = turns % size;                                   \
        const int64_t from = me.id * each + (me.id < rest ? me.id : rest);                        \
        const int64_t mine = each + (me.id < rest);                                               \
        *last = mine && from + mine == turns;                                                     \
        *stride = (change)(turns * step);                                                         \
        *lower = (type)(first + from * step);                                                     \
        *upper = (type)(first + (from + mine - 1) * step);                                        \
    }

STATIC(__kmpc_for_static_init_4, int32_t, int32_t)
STATIC(__kmpc_for_static_init_4u, uint32_t, int32_t)
STATIC(__kmpc_for_static_init_8, int64_t, int64_t)
STATIC(__kmpc_for_static_init_8u, uint64_t, int64_t)

void __kmpc_for_static_fini(void *where, int32_t id) { (void)where, (void)id; }

// The same where whoever is free takes the next `chunk` turns.
static void begin(int64_t lower, int64_t upper, int64_t step, int64_t chunk) {
    me.lower = lower, me.step = step, me.chunk = chunk < 1 ? 1 : chunk;
    me.turns = (upper - lower) / step + 1;
    me.loop++;
    if (me.team)  // nobody is there yet, and nobody is where it was last used
        atomic_store(&me.team->taken[(me.loop + 2) % COUNTERS], 0);
}

static int64_t take(void) {
    if (me.team) return atomic_fetch_add(&me.team->taken[me.loop % COUNTERS], me.chunk);
    const int64_t from = me.loop ? 0 : me.turns;
    me.loop = 0;  // one thread takes all at once
    me.chunk = me.turns;
    return from;
}

#define DYNAMIC(init, next, type, change)                                                         \
    void init(void *where, int32_t id, int32_t schedule, type lower, type upper, change step,     \
              change chunk) {                                                                     \
        (void)where, (void)id, (void)schedule;                                                    \
        begin((int64_t)lower, (int64_t)upper, step, chunk);                                       \
    }                                                                                             \
    int32_t next(void *where, int32_t id, int32_t *last, type *lower, type *upper, change *step) {\
        (void)where, (void)id;                                                                    \
        const int64_t from = take();                                                              \
        if (from >= me.turns) return 0;                                                           \
        const int64_t to = me.turns - from < me.chunk ? me.turns : from + me.chunk;               \
        *last = to == me.turns;                                                                   \
        *lower = (type)(me.lower + from * me.step);                                               \
        *upper = (type)(me.lower + (to - 1) * me.step);                                           \
        *step = (change)me.step;                                                                  \
        return 1;                                                                                 \
    }

DYNAMIC(__kmpc_dispatch_init_4, __kmpc_dispatch_next_4, int32_t, int32_t)
DYNAMIC(__kmpc_dispatch_init_4u, __kmpc_dispatch_next_4u, uint32_t, int32_t)
DYNAMIC(__kmpc_dispatch_init_8, __kmpc_dispatch_next_8, int64_t, int64_t)
DYNAMIC(__kmpc_dispatch_init_8u, __kmpc_dispatch_next_8u, uint64_t, int64_t)

// Later clangs (from 19 on) say when they are done with a loop.
void __kmpc_dispatch_deinit(void *where, int32_t id) { (void)where, (void)id; }

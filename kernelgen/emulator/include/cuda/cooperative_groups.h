// The groups that need no launch of a special kind
#pragma once
#include "emu_cuda.h"

namespace cooperative_groups {
struct thread_block {
    static void sync(EMU_LINE) { emu_barrier(0, 0, line, 1); }
    static unsigned thread_rank() { return emu_self->linear; }
    static unsigned size() { return blockDim.x * blockDim.y * blockDim.z; }
    static unsigned num_threads() { return size(); }
    static dim3 group_index() { return blockIdx; }
    static dim3 thread_index() { return threadIdx; }
};
static inline thread_block this_thread_block() { return {}; }

template <unsigned N> struct thread_block_tile {
    static unsigned thread_rank() { return emu_self->lane % N; }
    static unsigned meta_group_rank() { return emu_self->linear / N; }
    static unsigned meta_group_size() { return thread_block::size() / N; }
    static constexpr unsigned size() { return N; }
    static constexpr unsigned num_threads() { return N; }
    static unsigned mask() {
        return N == 32 ? 0xffffffffu : ((1u << N % 32) - 1) << emu_self->lane / N * N;
    }
    static void sync(EMU_LINE) { emu_subgroup_barrier(mask(), line); }
    template <class T> static T shfl(T v, int l, EMU_LINE) {
        return emu_shfl(EMU_IDX, mask(), v, l, N, line);
    }
    template <class T> static T shfl_up(T v, unsigned by, EMU_LINE) {
        return emu_shfl(EMU_UP, mask(), v, int(by), N, line);
    }
    template <class T> static T shfl_down(T v, unsigned by, EMU_LINE) {
        return emu_shfl(EMU_DOWN, mask(), v, int(by), N, line);
    }
    template <class T> static T shfl_xor(T v, int by, EMU_LINE) {
        return emu_shfl(EMU_BFLY, mask(), v, by, N, line);
    }
    static int any(int v, EMU_LINE) { return int(emu_vote(EMU_ANY, mask(), v != 0, line)); }
    static int all(int v, EMU_LINE) { return int(emu_vote(EMU_ALL, mask(), v != 0, line)); }
    static unsigned ballot(int v, EMU_LINE) {
        return unsigned(emu_vote(EMU_BALLOT, mask(), v != 0, line)) >> emu_self->lane / N * N;
    }
};
template <unsigned N> thread_block_tile<N> tiled_partition(const thread_block &) { return {}; }
template <class Group> void sync(const Group &group, EMU_LINE) { group.sync(line); }
} // namespace cooperative_groups

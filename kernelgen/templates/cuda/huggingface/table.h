// Kernels by name.
#pragma once

namespace kernelgen {
struct Entry {
    const char *name;
    const void *function;
};
}  // namespace kernelgen

// The kernels of one instruction set.
#pragma once

#include <cstddef>
#include <cstdint>

#define KERNELGEN_QUOTE(name) #name
#define KERNELGEN_TEXT(name) KERNELGEN_QUOTE(name)

namespace kernelgen {

// A product; one of the first two functions is there, the third says how many bytes of scratch
// memory the second wants.
struct Product {
    const char *format, *precision;
    bool matvec;
    void (*run)(const float *, const uint8_t *, float *, int64_t, int64_t, int64_t);
    void (*run_with_scratch)(const float *, const uint8_t *, float *, uint8_t *, int64_t, int64_t,
                             int64_t);
    int64_t (*scratch)(int64_t, int64_t);
};

struct Format {
    const char *name;
    int64_t block, bytes;
    int64_t (*prepared_bytes)(int64_t, int64_t);
    void (*prepare)(const uint8_t *, uint8_t *, int64_t, int64_t);
    void (*dequantize)(const uint8_t *, float *, int64_t);
};

struct Table {
    const char *isa;
    const Product *products;
    size_t product_count;
    const Format *formats;
    size_t format_count;
};

}  // namespace kernelgen

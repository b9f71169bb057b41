// Calls one kernel: driver INPUT OUTPUT.
//
// ARGUMENTS, CALL, SIZES_RIGHT and SCRATCH_BYTES are defined above this text, the kernel follows below.  INPUT
// has, for each argument, its role and its size as int64, and the bytes of what is read.  Results
// go to OUTPUT one after the other.  Memory is allocated to the byte, so that a sanitizer sees
// every step beyond it, and is poisoned: what is not written stays NaN.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#if defined(FLUSH_SUBNORMALS)
#include <xmmintrin.h>
#endif

enum { READ, WRITTEN, SCRATCH, SIZE };

static void *must(const void *result, const char *what) {
    if (!result) {
        fprintf(stderr, "%s failed\n", what);
        exit(2);
    }
    return (void *)result;
}

int main(int count, char **words) {
    FILE *in = must(count == 3 ? fopen(words[1], "rb") : NULL, "opening the input");
    FILE *out = must(fopen(words[2], "wb"), "opening the output");
    void *at[ARGUMENTS];
    int64_t role[ARGUMENTS], size[ARGUMENTS];
    for (int i = 0; i < ARGUMENTS; i++) {
        int64_t head[2];
        must(fread(head, sizeof head, 1, in) == 1 ? in : NULL, "reading an argument");
        role[i] = head[0];
        size[i] = head[1];
        at[i] = NULL;
        if (role[i] == SIZE || role[i] == SCRATCH) continue;
        at[i] = must(malloc(size[i] ? (size_t)size[i] : 1), "malloc");
#if !defined(UNINITIALIZED)
        memset(at[i], 0xFF, (size_t)size[i]);
#endif
        if (role[i] == READ && size[i])
            must(fread(at[i], (size_t)size[i], 1, in) == 1 ? in : NULL, "reading an argument");
    }
    for (int i = 0; i < ARGUMENTS; i++)  // as large as the kernel says, now that sizes are known
        if (role[i] == SCRATCH) {
            size[i] = SCRATCH_BYTES;
            at[i] = must(malloc((size_t)size[i]), "malloc");
#if !defined(UNINITIALIZED)
            memset(at[i], 0xFF, (size_t)size[i]);
#endif
        }
    must(SIZES_RIGHT ? in : NULL, "the kernel wants another size: the check of sizes");
#if defined(FLUSH_SUBNORMALS)
    _mm_setcsr(_mm_getcsr() | 0x8040);
#endif
    CALL;
    for (int i = 0; i < ARGUMENTS; i++)
        if (role[i] == WRITTEN && size[i])
            must(fwrite(at[i], (size_t)size[i], 1, out) == 1 ? out : NULL, "writing a result");
    for (int i = 0; i < ARGUMENTS; i++) free(at[i]);
    fclose(in);
    return fclose(out);
}

// Shared by the kernel files: the list of implementations and the layout of quantized activations.
//
// A kernel file is compiled with the flags of its instruction set, so everything here is static: an inline function
// with external linkage could be merged into a program that runs on a CPU without those instructions. For the same
// reason kernel files include no C++ standard headers.
#ifndef MOBIE_KERNELS_H
#define MOBIE_KERNELS_H

#include <stdint.h>
#include <string.h>

#include "arith.h"
#include "mobie.h"

#if defined(__FAST_MATH__)
#error "the kernels promise the same bits everywhere: compile them without -ffast-math"
#endif

// One per kernel file. Where the compiler lacks the instructions, the file compiles to MOBIE_NO_KERNELS: no name.
extern "C" {
extern const mobie_kernels mobie_kernels_ref, mobie_kernels_avx2, mobie_kernels_avxvnni, mobie_kernels_avx512,
    mobie_kernels_avx512vnni, mobie_kernels_avx512vbmi, mobie_kernels_amx, mobie_kernels_neon,
    mobie_kernels_neon_dotprod;
}
#define MOBIE_NO_KERNELS { nullptr, nullptr, nullptr, 0 }

// Blocks in group g of a row of n weights: 4, or what is left in the last group.
static inline int mobie_group_blocks(int64_t n, int64_t g) {
    const int64_t left = n / MOBIE_BLOCK_LEN - 4 * g;
    return left < 4 ? (int) left : 4;
}

// Rows of activations may start anywhere, so what follows the values may be unaligned.
static inline mobie_act_group mobie_get_act_group(const void * act, int64_t n, int64_t g) {
    mobie_act_group group;
    memcpy(&group, (const char *) act + n + g * sizeof(group), sizeof(group));
    return group;
}

static inline float mobie_act_scale(const void * act, int64_t n, int64_t g) {
    return mobie_get_act_group(act, n, g).scale;
}

static inline void mobie_set_act_group(void * act, int64_t n, int64_t g, const mobie_act_group & group) {
    memcpy((char *) act + n + g * sizeof(group), &group, sizeof(group));
}

// Zeros between the last group and the end of the row, so that a row has no undefined bytes.
static inline void mobie_clear_act_padding(void * act, int64_t n) {
    const size_t used = (size_t) n + mobie_n_groups(n) * sizeof(mobie_act_group);
    memset((char *) act + used, 0, mobie_act_size(n) - used);
}

// Prefetches `size` bytes, as far as they lie before `end`, into L2.
static inline void mobie_ask_memory(const char * from, int64_t size, const char * end) {
    for (int64_t i = 0; i < size && from + i < end; i += 64) {
        __builtin_prefetch(from + i, 0, 2);
    }
}

static inline float mobie_float_of_bits(int32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof(x));
    return x;
}

#endif

// The arithmetic that every implementation shares, in functions that run on CPUs and on NVIDIA GPUs alike: the rounding
// of activations (FORMAT.md, "Products"), and how a GPU thread reads blocks and forms integer products. A test runs all
// of it on a CPU against the reference, bit for bit, so that only what touches a GPU's memory and its warps is left to
// be tested on a card.
#ifndef MOBIE_ARITH_H
#define MOBIE_ARITH_H

#include <stdint.h>

#include "mobie.h"

#if defined(__CUDACC__)
#define MOBIE_HD static __host__ __device__ __forceinline__
#else
#define MOBIE_HD static inline
#endif

// Below this maximum a group of activations counts as zero: neither its scale nor 127 / max leaves the normal floats,
// so the bits do not depend on whether the processor flushes denormals.
#define MOBIE_ACT_MIN 0x1p-100f
#define MOBIE_ACT_MAX 0x1.fffffep127f  // the largest float; beyond it are infinity and NaN

// What the integer sums of a row are multiplied by at the end.
#define MOBIE_UNIT 0x1p-7f

MOBIE_HD int64_t mobie_n_groups(int64_t n) {
    return (n + MOBIE_GROUP_LEN - 1) / MOBIE_GROUP_LEN;
}

// --- floats, rounded to nearest after every operation ----------------------------------------------------------------

// nvcc would fuse a product and a sum, and with -use_fast_math approximate a quotient; the intrinsics forbid both. On a
// CPU the files are compiled with -ffp-contract=off.
#if defined(__CUDA_ARCH__)
MOBIE_HD float mobie_mul(float a, float b) {
    return __fmul_rn(a, b);
}
MOBIE_HD float mobie_add(float a, float b) {
    return __fadd_rn(a, b);
}
MOBIE_HD float mobie_div(float a, float b) {
    return __fdiv_rn(a, b);
}
MOBIE_HD float mobie_nan() {
    return __int_as_float(0x7fc00000);
}
#else
MOBIE_HD float mobie_mul(float a, float b) {
    return a * b;
}
MOBIE_HD float mobie_add(float a, float b) {
    return a + b;
}
MOBIE_HD float mobie_div(float a, float b) {
    return a / b;
}
MOBIE_HD float mobie_nan() {
    return __builtin_nanf("");
}
#endif

// Scale of a group of activations, and what they are multiplied by, from their largest magnitude. A group that is not
// finite gets scale NaN and values 0: every product with it is NaN, as it would be in float arithmetic.
MOBIE_HD float mobie_act_scale_of(float max) {
    return !(max <= MOBIE_ACT_MAX) ? mobie_nan() : max < MOBIE_ACT_MIN ? 0 : mobie_div(max, 127);
}

MOBIE_HD float mobie_act_inverse_of(float max) {
    return max < MOBIE_ACT_MIN ? 0 : mobie_div(127, max);
}

// --- a block in a GPU thread -----------------------------------------------------------------------------------------

// Bytes chosen from the eight of (lo, hi) by the four low nibbles of `select`, each 0 to 7.
MOBIE_HD uint32_t mobie_permute(uint32_t lo, uint32_t hi, uint32_t select) {
#if defined(__CUDA_ARCH__)
    uint32_t result;  // not __byte_perm, which clears the bits of `select` that do not matter
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(result) : "r"(lo), "r"(hi), "r"(select));
    return result;
#else
    const uint64_t bytes  = (uint64_t) hi << 32 | lo;
    uint32_t       result = 0;
    for (int i = 0; i < 4; i++) {
        result |= (uint32_t) (bytes >> 8 * (select >> 4 * i & 7) & 0xff) << 8 * i;
    }
    return result;
#endif
}

// sum + the products of four signed bytes with four others
MOBIE_HD int32_t mobie_dot4(uint32_t a, uint32_t b, int32_t sum) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 610
    return __dp4a((int32_t) a, (int32_t) b, sum);
#else
    for (int i = 0; i < 4; i++) {
        sum += (int8_t) (a >> 8 * i) * (int8_t) (b >> 8 * i);
    }
    return sum;
#endif
}

// 32 bits of (lo, hi) from bit `shift` of lo on, shift 0 to 32
MOBIE_HD uint32_t mobie_funnel(uint32_t lo, uint32_t hi, uint32_t shift) {
#if defined(__CUDA_ARCH__)
    return __funnelshift_rc(lo, hi, shift);
#else
    return (uint32_t) (((uint64_t) hi << 32 | lo) >> shift);
#endif
}

// A block's two words of signs, and its scale.
typedef struct {
    uint32_t signs[2];
    int32_t  scale;
} mobie_bits;

// A block is 9 bytes and starts anywhere: taken out of the three aligned words it lies in, from byte `at` (0 to 3) on.
MOBIE_HD mobie_bits mobie_take_block(uint32_t w0, uint32_t w1, uint32_t w2, uint32_t at) {
    mobie_bits b;
    b.signs[0] = mobie_funnel(w0, w1, 8 * at + 8);
    b.signs[1] = mobie_funnel(w1, w2, 8 * at + 8);
    b.scale    = (int32_t) (w0 >> 8 * at & 0xff);
    return b;
}

// Signs become bytes by permutation: a nibble of four signs selects one of eight bytes, and the eight are so chosen
// that only one bit of the nibble matters. So one instruction makes four weights, +1 or -1, of every fourth sign of 16.
// Bit 3 would mean something else to the instruction: it is cleared, and its signs are shifted to bit 0.
//
// `k` is which of the four signs of a nibble; the bytes belong to weights 4 i + k of 16, i = 0..3.
typedef struct {
    uint32_t lo, hi;  // the eight bytes
    uint32_t shift;
} mobie_sign_table;

MOBIE_HD mobie_sign_table mobie_signs_of(int k) {
    mobie_sign_table t;
    t.lo    = k == 1 ? 0x0101ffffu : k == 2 ? 0xffffffffu : 0x01ff01ffu;
    t.hi    = k == 1 ? 0x0101ffffu : k == 2 ? 0x01010101u : 0x01ff01ffu;
    t.shift = k == 3 ? 3 : 0;
    return t;
}

// The weights 4 i + k, i = 0..3, of the lower and the upper 16 of a word of signs, as bytes +1 or -1.
MOBIE_HD void mobie_expand(uint32_t signs, mobie_sign_table t, uint32_t * lower, uint32_t * upper) {
    const uint32_t nibbles = signs >> t.shift & 0x77777777u;
    *lower                 = mobie_permute(t.lo, t.hi, nibbles);
    *upper                 = mobie_permute(t.lo, t.hi, nibbles >> 16);
}

// Activations lie in the order in which expanded weights come: of 64, the value of column 16 s + 4 i + k is at
// 16 k + 4 s + i. So what one k needs is 16 bytes in a row, in a dot product and in a tensor core's fragment alike.
MOBIE_HD int mobie_act_position(int column) {
    return column % 4 * 16 + column / 16 * 4 + column / 4 % 4;
}

// Product of a block with 64 activations in that order, four to a word: scale * sum of +-q. `zero` is 0; a GPU's kernel
// passes one that its compiler takes for a variable, so that the tables stay in registers.
MOBIE_HD int32_t mobie_dot_block(mobie_bits b, const uint32_t * q, uint32_t zero) {
    int32_t sum = 0;
#if defined(__CUDACC__)
#pragma unroll
#endif
    for (int k = 0; k < 4; k++) {
        mobie_sign_table t = mobie_signs_of(k);
        t.lo += zero;
        t.hi = k == 2 ? t.hi + zero : t.lo;
#if defined(__CUDACC__)
#pragma unroll
#endif
        for (int word = 0; word < 2; word++) {
            uint32_t lower, upper;
            mobie_expand(b.signs[word], t, &lower, &upper);
            sum = mobie_dot4(lower, q[4 * k + 2 * word], sum);
            sum = mobie_dot4(upper, q[4 * k + 2 * word + 1], sum);
        }
    }
    return sum * b.scale;
}

#endif

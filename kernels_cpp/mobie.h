// The MoBiE tensor type: block layout and products. The bytes and the arithmetic are those of FORMAT.md.
//
// This header is plain C so that ggml's C files can include it; it needs no ggml header.
#ifndef MOBIE_H
#define MOBIE_H

#include <stddef.h>
#include <stdint.h>

// The functions below cross the border of ggml's shared libraries.
#if defined(__GNUC__)
#define MOBIE_API __attribute__((visibility("default")))
#else
#define MOBIE_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

enum {
    MOBIE_BLOCK_LEN = 64,   // weights per block
    MOBIE_GROUP_LEN = 256,  // activations per activation scale
};

typedef struct {
    uint8_t scale;     // magnitude of the 64 weights, in units of 2^-7
    uint8_t signs[8];  // bit j of the little-endian 64-bit word: weight j is positive
} mobie_block;

#ifdef __cplusplus
static_assert(sizeof(mobie_block) == 9, "mobie_block must be 9 bytes without padding");
#else
_Static_assert(sizeof(mobie_block) == 9, "mobie_block must be 9 bytes without padding");
#endif

// --- codec -----------------------------------------------------------------------------------------------------------
// n: number of weights, a multiple of 64.

// Signs and mean magnitudes of x at expert scale 1 (FORMAT.md, "From floats to blocks").
MOBIE_API void mobie_quantize_row(const float * x, mobie_block * y, int64_t n);
MOBIE_API void mobie_dequantize_row(const mobie_block * x, float * y, int64_t n);

// --- products --------------------------------------------------------------------------------------------------------

// What belongs to a group of up to 256 activations besides its values.
typedef struct {
    float   scale;
    int16_t sums[4];  // of the values at each block of 64; 0 where the last group is shorter
} mobie_act_group;

// Bytes of one row of n quantized activations: n int8, then ceil(n / 256) mobie_act_group, padded to 64 bytes.
// Kernels accept rows at any address; rows that start on a 64-byte boundary are faster.
MOBIE_API size_t mobie_act_size(int64_t n);

// One implementation of the two hot functions. All implementations give the same bits.
typedef struct {
    const char * name;  // "ref", "avx2", "avx512vnni", ...

    // x: n finite floats -> act: mobie_act_size(n) bytes.
    void (*quantize_act)(const float * x, void * act, int64_t n);

    // y[t][r] = row r of w times act[t], for r < n_rows and t < n_act.
    //   w:          first block of the first row, at any address
    //   row_bytes:  distance of two rows, n / 64 * 9 where they follow each other
    //   act, y:     n_act pointers each, so that tokens of one expert need not lie together
    //   work:       work_size bytes of the calling thread's own on a 64-byte boundary, whatever is in them
    void (*matmul)(int64_t n, const mobie_block * w, size_t row_bytes, int64_t n_rows, const void * const * act,
                   float * const * y, int64_t n_act, void * work);

    // Bytes that matmul takes as work memory rather than from the stack, which may be small (musl: 128 KB a thread).
    size_t work_size;
} mobie_kernels;

// The fastest implementation this CPU runs. The environment variable MOBIE_ISA=NAME restricts the choice to that one
// where the CPU has it (an unknown or unsupported name is reported once on stderr and ignored). Decided at the first
// call; thread-safe.
MOBIE_API const mobie_kernels * mobie_kernels_best(void);

// All implementations this CPU runs, slowest ("ref") first; *n receives their number.
MOBIE_API const mobie_kernels * const * mobie_kernels_all(int * n);

#ifdef __cplusplus
}
#endif
#endif

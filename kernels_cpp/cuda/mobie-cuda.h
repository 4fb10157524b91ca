// Products with MoBiE weights on NVIDIA GPUs, without any ggml header. Tensor cores are used from compute
// capability 7.5 on; older cards do without.
//
// Everything is asynchronous on the stream given; pointers are to device memory. Results are those of the CPU, bit for
// bit (FORMAT.md, "Products"), except where an activation function is applied.
#ifndef MOBIE_CUDA_H
#define MOBIE_CUDA_H

#include <cuda_runtime_api.h>
#include <stdint.h>

#include "../arith.h"
#include "../mobie.h"

// Quantized activations: rows of n int8, padded with zeros to whole groups of 256, in the order of
// mobie_act_position(); and one scale per group.
typedef struct {
    int8_t * q;      // [rows][mobie_n_groups(n) * 256], 16-byte aligned
    float *  scale;  // [rows][mobie_n_groups(n)]
    int64_t  n;      // columns, a multiple of 64
} mobie_cuda_act;

// Rows [i3][i2][i1] of floats with the strides given (in floats) -> act, packed in that order.
cudaError_t mobie_cuda_quantize(const float * x, const int64_t ne[4], const int64_t stride[4], mobie_cuda_act act,
                                cudaStream_t stream);

// What follows a product of gate and up in the same kernel. `clamp` and `oai` bound their inputs first.
typedef enum { MOBIE_GLU_SWIGLU, MOBIE_GLU_GEGLU, MOBIE_GLU_SWIGLU_OAI, MOBIE_GLU_SWIGLU_CLAMP } mobie_glu;

// The matrices of a tensor, one per expert (or a single one), rows of blocks.
typedef struct {
    const void *  w;      // first block of the first row
    const float * scale;  // per expert, or null: 1
    const float * bias;   // [expert][n_rows] added after the scale, or null
} mobie_cuda_matrix;

typedef struct {
    mobie_cuda_matrix up;
    mobie_cuda_matrix gate;  // gate.w null: a plain product; otherwise the result is glu(gate x, up x)
    mobie_glu         glu;
    float             glu_limit;
    int64_t           n_rows;
    int64_t           row_bytes;     // distance of two rows
    int64_t           expert_bytes;  // distance of two experts
    int64_t           n_expert;

    mobie_cuda_act act;

    // Which expert meets which row of activations. Without ids there is one matrix, and token t has row t of act.
    const int32_t * ids;         // [token][used], or null
    int64_t         ids_stride;  // of two tokens, in elements
    int64_t         n_tokens;
    int64_t         n_used;         // experts per token; 1 without ids
    int64_t         n_rows_of_act;  // rows of act per token: 1, or n_used (slot u has row token * n_used + u)

    float * y;         // [token][used][n_rows]
    int64_t y_stride;  // of two (token, used) rows, in floats
} mobie_cuda_product;

// Kernel 1: one thread per result, byte by byte. The measure of the others.
cudaError_t mobie_cuda_naive(const mobie_cuda_product * p, cudaStream_t stream);

// Kernel 2: four lanes of a warp per row and group, dp4a. For few tokens: every (token, used) pair reads its expert.
cudaError_t mobie_cuda_mul_vec(const mobie_cuda_product * p, cudaStream_t stream);

// Kernel 3: tiles on the int8 tensor cores, signs unpacked once per tile. For many tokens; no gate.
//
// With ids, the (token, used) pairs sorted by expert: those of expert e are number bounds[e] to bounds[e + 1] - 1 of
// rows_in (their row of act) and rows_out (token * n_used + used). `tiles` is memory for mobie_cuda_tiles_size() bytes.
typedef struct {
    const int32_t * bounds;
    const int32_t * rows_in;
    const int32_t * rows_out;
    void *          tiles;
} mobie_cuda_routing;

size_t mobie_cuda_tiles_size(int64_t n_pairs, int64_t n_expert);

// tile_tokens: 8, 16, 32 or 64 tokens of a tile; 0 leaves the choice to the number of tokens
cudaError_t mobie_cuda_mul_mat(const mobie_cuda_product * p, const mobie_cuda_routing * routing, int tile_tokens,
                               cudaStream_t stream);

// Up to this many tokens kernel 2 is the faster one, without ids and with.
enum { MOBIE_CUDA_VEC_TOKENS = 1, MOBIE_CUDA_VEC_TOKENS_IDS = 8 };

#endif

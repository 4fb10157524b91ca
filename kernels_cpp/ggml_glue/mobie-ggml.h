// What the patched ggml-cpu calls. The only files of kernels_cpp that see ggml headers are in this folder.
#ifndef MOBIE_GGML_H
#define MOBIE_GGML_H

#include <stdbool.h>
#include <stddef.h>

#ifdef __cplusplus
extern "C" {
#endif

struct ggml_cgraph;
struct ggml_compute_params;
struct ggml_tensor;

// MUL_MAT and MUL_MAT_ID with MoBiE weights and F32 activations, called by every thread of the pool. A fourth source of
// MUL_MAT_ID, F32 [n_expert], holds the scales of the experts.
// false: not ours (another op or type, or the reference implementation is asked for), ggml goes on as usual.
bool mobie_ggml_compute_forward(const struct ggml_compute_params * params, struct ggml_tensor * dst);

// The same for node node_n of a graph where the node behind it multiplies its result, and nothing else uses that, by
// one weight for each token and expert: both at once, the same bits. false: not so, or not ours.
bool mobie_ggml_compute_forward_weighted(const struct ggml_compute_params * params, const struct ggml_cgraph * cgraph,
                                         int node_n);

// Bytes of work memory mobie_ggml_compute_forward needs for dst, weighted or not; 0 where it returns false.
size_t mobie_ggml_work_size(const struct ggml_tensor * dst, int n_threads);

// ggml's row of the type: one row of weights times one row of Q8_0 blocks. Slow and obvious; it is what the op tests
// compare the kernels with, and what serves Q8_0 activations.
void mobie_ggml_vec_dot_q8_0(int n, float * s, size_t bs, const void * vx, size_t bx, const void * vy, size_t by,
                             int nrc);

#ifdef __cplusplus
}
#endif
#endif

// Translates ggml's tensors into calls of the kernels: quantize the activations once, sort the (token, expert) pairs by
// expert, and let the threads take chunks of rows until none is left.

#include "mobie-ggml.h"

#include <algorithm>
#include <cstdint>

#define GGML_COMMON_DECL_CPP
#include "ggml-common.h"
#include "ggml-cpu-impl.h"
#include "ggml-impl.h"

#include "../mobie.h"

namespace {

// Rows a thread takes at a time. A chunk must outweigh the counter it is drawn from (32 rows of 2048 columns are 9 KB
// of weights), and the kernels prepare per call what its rows share, the activations' order or tables of them: with
// several tokens they reach their speed from 256 rows on, in tiles of 64. Few rows keep many threads busy; so chunks
// are large where there is enough work for all, and shrink to MIN_ROWS where there is not.
constexpr int64_t MIN_ROWS       = 32;
constexpr int64_t TILE_ROWS      = 64;
constexpr int64_t MAX_ROWS       = 1024;
constexpr int64_t TASKS_A_THREAD = 8;

int64_t chunk_rows(int64_t n_rows, int64_t n_jobs, int n_threads) {
    const int64_t fair = n_rows * n_jobs / (TASKS_A_THREAD * n_threads);
    return std::clamp(fair / TILE_ROWS * TILE_ROWS, MIN_ROWS, MAX_ROWS);
}

// Tokens of one call of a kernel; more only repeat the unpacking of the chunk's rows.
constexpr int64_t BATCH = 256;

// Products of one weight matrix with `n` activation rows, those from `first` on in the work area's pointer lists.
struct job {
    const char * w;
    float        scale;  // of the expert
    int64_t      first;
    int64_t      n;
};

bool is_ours(const ggml_tensor * dst) {
    return (dst->op == GGML_OP_MUL_MAT || dst->op == GGML_OP_MUL_MAT_ID) && dst->src[0]->type == GGML_TYPE_MOBIE &&
           dst->src[1]->type == GGML_TYPE_F32 && dst->src[1]->nb[0] == sizeof(float) &&
           dst->src[0]->nb[0] == sizeof(mobie_block);
}

// llama.cpp hands the scales of the experts, F32 [n_expert], over as a fourth source of MUL_MAT_ID. ggml's own product
// would ignore them, so an operation that has them never goes there.
bool has_scales(const ggml_tensor * dst) {
    return dst->op == GGML_OP_MUL_MAT_ID && dst->src[3];
}

// The weights, F32 [1, n_used, n_tokens], if `mul` is the product of dst with such, else null.
const ggml_tensor * weights_of(const ggml_tensor * mul, const ggml_tensor * dst) {
    const ggml_tensor * weights = mul->src[0] == dst ? mul->src[1] : nullptr;
    const bool fit = weights && weights->type == GGML_TYPE_F32 && weights->ne[0] == 1 && weights->ne[1] == dst->ne[1] &&
                     weights->ne[2] == dst->ne[2] && weights->ne[3] == dst->ne[3] && mul->nb[0] == sizeof(float);
    return fit ? weights : nullptr;
}

// The work memory: quantized activation rows, then one pointer pair and weight per product row, then the jobs, then
// what the kernels need, for each thread.
struct work {
    char *        act;
    const void ** x;
    float **      y;
    float *       weights;
    job *         jobs;
    int64_t *     n_jobs;
    char *        kernels;
    size_t        kernels_size;  // for each thread
    size_t        size;

    work(const ggml_tensor * dst, int n_threads, void * base) {
        const ggml_tensor * src1   = dst->src[1];
        const int64_t       n_act  = src1->ne[1] * src1->ne[2] * src1->ne[3];
        const int64_t       n_out  = dst->ne[1] * dst->ne[2] * dst->ne[3];
        const int64_t       n_mats = dst->op == GGML_OP_MUL_MAT_ID ? dst->src[0]->ne[2] : dst->ne[2] * dst->ne[3];

        uintptr_t at   = GGML_PAD((uintptr_t) base, 64);
        auto      take = [&at](size_t bytes) {
            const uintptr_t p = at;
            at += GGML_PAD(bytes, 64);
            return p;
        };
        act          = (char *) take(n_act * mobie_act_size(src1->ne[0]));
        x            = (const void **) take(n_out * sizeof(*x));
        y            = (float **) take(n_out * sizeof(*y));
        weights      = (float *) take(n_out * sizeof(*weights));
        jobs         = (job *) take(n_mats * sizeof(*jobs));
        n_jobs       = (int64_t *) take(sizeof(*n_jobs));
        kernels_size = GGML_PAD(mobie_kernels_best()->work_size, 64);
        kernels      = (char *) take(n_threads * kernels_size);
        size         = at - (uintptr_t) base + 64;  // the base may need up to 63 bytes to be aligned
    }
};

char * row_at(const ggml_tensor * t, int64_t i1, int64_t i2, int64_t i3) {
    return (char *) t->data + i1 * t->nb[1] + i2 * t->nb[2] + i3 * t->nb[3];
}

char * act_at(const work & wk, const ggml_tensor * src1, int64_t i1, int64_t i2, int64_t i3) {
    return wk.act + ((i3 * src1->ne[2] + i2) * src1->ne[1] + i1) * mobie_act_size(src1->ne[0]);
}

// One job per matrix of the batch; ggml broadcasts src0 over the outer dimensions of src1.
void plan_mul_mat(const ggml_tensor * dst, work & wk) {
    const ggml_tensor * src0 = dst->src[0];
    const ggml_tensor * src1 = dst->src[1];
    int64_t             n    = 0;
    *wk.n_jobs               = 0;
    for (int64_t i3 = 0; i3 < dst->ne[3]; ++i3) {
        for (int64_t i2 = 0; i2 < dst->ne[2]; ++i2) {
            const char * w          = row_at(src0, 0, i2 / (dst->ne[2] / src0->ne[2]), i3 / (dst->ne[3] / src0->ne[3]));
            wk.jobs[(*wk.n_jobs)++] = { w, 1.0f, n, dst->ne[1] };
            for (int64_t i1 = 0; i1 < dst->ne[1]; ++i1, ++n) {
                wk.x[n] = act_at(wk, src1, i1, i2, i3);
                wk.y[n] = (float *) row_at(dst, i1, i2, i3);
            }
        }
    }
}

// One job per expert that has tokens: a counting sort of ids [n_used, n_tokens] by expert. Results go to `mul` where
// they are weighted, else to dst.
void plan_mul_mat_id(const ggml_tensor * dst, const ggml_tensor * mul, work & wk) {
    const ggml_tensor * src0     = dst->src[0];
    const ggml_tensor * src1     = dst->src[1];
    const ggml_tensor * ids      = dst->src[2];
    const ggml_tensor * scale    = dst->src[3];
    const ggml_tensor * weights  = mul ? weights_of(mul, dst) : nullptr;
    const int64_t       n_expert = src0->ne[2];
    const auto          expert   = [ids](int64_t used, int64_t token) {
        return *(const int32_t *) ((const char *) ids->data + used * ids->nb[0] + token * ids->nb[1]);
    };

    for (int64_t e = 0; e < n_expert; ++e) {
        wk.jobs[e] = { row_at(src0, 0, e, 0), scale ? ((const float *) scale->data)[e] : 1.0f, 0, 0 };
    }
    for (int64_t token = 0; token < ids->ne[1]; ++token) {
        for (int64_t used = 0; used < ids->ne[0]; ++used) {
            GGML_ASSERT(expert(used, token) >= 0 && expert(used, token) < n_expert);
            ++wk.jobs[expert(used, token)].n;
        }
    }
    for (int64_t e = 1; e < n_expert; ++e) {
        wk.jobs[e].first = wk.jobs[e - 1].first + wk.jobs[e - 1].n;
    }
    for (int64_t e = 0; e < n_expert; ++e) {
        wk.jobs[e].n = 0;  // counts again, as the next free place
    }
    for (int64_t token = 0; token < ids->ne[1]; ++token) {
        for (int64_t used = 0; used < ids->ne[0]; ++used) {
            job &         j = wk.jobs[expert(used, token)];
            const int64_t n = j.first + j.n++;
            wk.x[n]         = act_at(wk, src1, used % src1->ne[1], token, 0);
            wk.y[n]         = (float *) row_at(mul ? mul : dst, used, token, 0);
            if (weights) {
                wk.weights[n] = *(const float *) row_at(weights, used, token, 0);
            }
        }
    }
    *wk.n_jobs = std::remove_if(wk.jobs, wk.jobs + n_expert, [](const job & j) { return j.n == 0; }) - wk.jobs;
    // Experts with many tokens first, so that no thread begins with the largest when the others are done.
    std::sort(wk.jobs, wk.jobs + *wk.n_jobs, [](const job & a, const job & b) { return a.n > b.n; });
}

// dst, and with `mul` the product of dst with weights instead.
void compute(const ggml_compute_params * params, const ggml_tensor * dst, const ggml_tensor * mul) {
    const ggml_tensor *   src0    = dst->src[0];
    const ggml_tensor *   src1    = dst->src[1];
    const mobie_kernels * kernels = mobie_kernels_best();
    const int64_t         n       = src0->ne[0];
    const int64_t         n_rows  = src0->ne[1];

    work wk(dst, params->nth, params->wdata);
    GGML_ASSERT(params->wsize >= wk.size);
    GGML_ASSERT(dst->nb[0] == sizeof(float));
    GGML_ASSERT(!has_scales(dst) || (dst->src[3]->type == GGML_TYPE_F32 && ggml_nelements(dst->src[3]) == src0->ne[2]));

    const int64_t n_act = src1->ne[1] * src1->ne[2] * src1->ne[3];
    for (int64_t i = params->ith; i < n_act; i += params->nth) {
        const int64_t i1 = i % src1->ne[1];
        const int64_t i2 = i / src1->ne[1] % src1->ne[2];
        const int64_t i3 = i / src1->ne[1] / src1->ne[2];
        kernels->quantize_act((const float *) row_at(src1, i1, i2, i3), act_at(wk, src1, i1, i2, i3), n);
    }
    if (params->ith == 0) {
        if (dst->op == GGML_OP_MUL_MAT_ID) {
            plan_mul_mat_id(dst, mul, wk);
        } else {
            plan_mul_mat(dst, wk);
        }
        ggml_threadpool_chunk_set(params->threadpool, 0);
    }
    ggml_barrier(params->threadpool);

    const int64_t chunk    = chunk_rows(n_rows, *wk.n_jobs, params->nth);
    const int64_t n_chunks = (n_rows + chunk - 1) / chunk;
    const int64_t n_tasks  = *wk.n_jobs * n_chunks;
    for (int64_t t; (t = ggml_threadpool_chunk_add(params->threadpool, 1)) < n_tasks;) {
        const job &   j     = wk.jobs[t / n_chunks];
        const int64_t row   = t % n_chunks * chunk;
        const int64_t count = std::min(chunk, n_rows - row);
        for (int64_t i = 0; i < j.n; i += BATCH) {
            const int64_t m = std::min(BATCH, j.n - i);
            float *       y[BATCH];
            for (int64_t k = 0; k < m; ++k) {
                y[k] = wk.y[j.first + i + k] + row;
            }
            kernels->matmul(n, (const mobie_block *) (j.w + row * src0->nb[1]), src0->nb[1], count, wk.x + j.first + i,
                            y, m, wk.kernels + params->ith * wk.kernels_size);
            const float scale = j.scale;
            for (int64_t k = 0; k < m; ++k) {
                const float weight = mul ? wk.weights[j.first + i + k] : 1.0f;
                for (int64_t r = 0; r < count; ++r) {
                    y[k][r] = (y[k][r] * scale) * weight;  // two roundings, as in two operations
                }
            }
        }
    }
}

}  // namespace

size_t mobie_ggml_work_size(const struct ggml_tensor * dst, int n_threads) {
    return is_ours(dst) ? work(dst, n_threads, nullptr).size : 0;
}

bool mobie_ggml_compute_forward(const struct ggml_compute_params * params, struct ggml_tensor * dst) {
    if (!is_ours(dst) || (params->use_ref && !has_scales(dst))) {
        return false;
    }
    compute(params, dst, nullptr);
    return true;
}

bool mobie_ggml_compute_forward_weighted(const struct ggml_compute_params * params, const struct ggml_cgraph * cgraph,
                                         int node_n) {
    const ggml_tensor * dst   = cgraph->nodes[node_n];
    const ggml_op       ops[] = { GGML_OP_MUL_MAT_ID, GGML_OP_MUL };
    if (!is_ours(dst) || !ggml_can_fuse(cgraph, node_n, ops, 2)) {
        return false;
    }
    const ggml_tensor * mul = cgraph->nodes[node_n + 1];
    if (mul->type != GGML_TYPE_F32 || !weights_of(mul, dst)) {
        return false;
    }
    compute(params, dst, mul);
    return true;
}

void mobie_ggml_vec_dot_q8_0(int n, float * s, size_t bs, const void * vx, size_t bx, const void * vy, size_t by,
                             int nrc) {
    GGML_ASSERT(nrc == 1);
    GGML_UNUSED(bs);
    GGML_UNUSED(bx);
    GGML_UNUSED(by);
    const mobie_block * x   = (const mobie_block *) vx;
    const block_q8_0 *  y   = (const block_q8_0 *) vy;
    float               sum = 0.0f;
    for (int i = 0; i < n / QK8_0; ++i) {
        const mobie_block & b   = x[i * QK8_0 / MOBIE_BLOCK_LEN];
        const int           at  = i * QK8_0 % MOBIE_BLOCK_LEN;
        int                 dot = 0;
        for (int j = 0; j < QK8_0; ++j) {
            const bool plus = b.signs[(at + j) / 8] >> (at + j) % 8 & 1;
            dot += plus ? y[i].qs[j] : -y[i].qs[j];
        }
        sum += GGML_FP16_TO_FP32(y[i].d) * (float) (dot * b.scale);
    }
    *s = sum / 128;
}

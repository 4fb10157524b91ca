// The kernels of mobie-cuda.h. What they compute is in arith.h; here is who computes what.
//
// Limits. One token: 1.125 bits of memory traffic per weight; kernel 2 spends about 29 ALU and 17 multiplier
// instructions per block of 64 weights and lane, half a cycle per weight and warp lane, which an SM does a little
// faster than its share of the card's memory delivers. Many tokens: the tensor cores; kernel 3 spends per 16 x 64
// weights and 8 tokens two m16n8k32 and four multiply-adds that apply the block scales.
#include "mobie-cuda.h"

namespace {

constexpr int WARP = 32;

// --- activations -----------------------------------------------------------------------------------------------------

constexpr int QUANTIZE_WARPS = 4;

struct rows_of_floats {
    const float * x;
    int64_t       ne1, ne2;
    int64_t       s1, s2, s3;
};

// A warp per group: a lane has 8 columns. In the order of mobie_act_position() column 8 m + j of a block lies at
// 16 (j % 4) + 2 m + j / 4, so a lane writes pairs of bytes.
template <bool ALIGNED>
__global__ void quantize(rows_of_floats rows, mobie_cuda_act act, int64_t n_rows) {
    const int     lane     = threadIdx.x;
    const int64_t n_groups = mobie_n_groups(act.n);
    const int64_t index    = (int64_t) blockIdx.x * QUANTIZE_WARPS + threadIdx.y;
    const int64_t row      = index / n_groups;
    const int64_t group    = index % n_groups;
    if (row >= n_rows) {
        return;
    }
    const int64_t i1 = row % rows.ne1, i2 = row / rows.ne1 % rows.ne2, i3 = row / rows.ne1 / rows.ne2;
    const int64_t column = group * MOBIE_GROUP_LEN + 8 * lane;
    const float * from   = rows.x + i1 * rows.s1 + i2 * rows.s2 + i3 * rows.s3 + column;

    float x[8] = {};
    if (column < act.n) {  // n is a multiple of 64
        if (ALIGNED) {
            const float4 a = ((const float4 *) from)[0], b = ((const float4 *) from)[1];
            x[0] = a.x, x[1] = a.y, x[2] = a.z, x[3] = a.w, x[4] = b.x, x[5] = b.y, x[6] = b.z, x[7] = b.w;
        } else {
            for (int j = 0; j < 8; j++) {
                x[j] = from[j];
            }
        }
    }
    float max    = 0;
    bool  finite = true;
    for (int j = 0; j < 8; j++) {
        max    = fmaxf(max, fabsf(x[j]));
        finite = finite && fabsf(x[j]) <= MOBIE_ACT_MAX;  // false for NaN
    }
    for (int offset = WARP / 2; offset; offset /= 2) {
        max = fmaxf(max, __shfl_xor_sync(~0u, max, offset));
    }
    finite              = __all_sync(~0u, finite);
    const float inverse = finite ? mobie_act_inverse_of(max) : 0;

    int8_t * to = act.q + (row * n_groups + group) * MOBIE_GROUP_LEN + lane / 8 * MOBIE_BLOCK_LEN + 2 * (lane % 8);
    for (int k = 0; k < 4; k++) {
        const int low               = finite ? __float2int_rn(mobie_mul(x[k], inverse)) : 0;
        const int high              = finite ? __float2int_rn(mobie_mul(x[k + 4], inverse)) : 0;
        *(uint16_t *) (to + 16 * k) = (uint16_t) ((low & 0xff) | (high & 0xff) << 8);
    }
    if (lane == 0) {
        act.scale[row * n_groups + group] = finite ? mobie_act_scale_of(max) : mobie_nan();
    }
}

// --- what the product kernels share ----------------------------------------------------------------------------------

__device__ float scaled(float sum, float scale) {
    return mobie_mul(mobie_mul(sum, MOBIE_UNIT), scale);
}

__device__ float finish(const mobie_cuda_matrix & m, float sum, int expert, int64_t row, int64_t n_rows) {
    const float y = scaled(sum, m.scale ? m.scale[expert] : 1.0f);
    return m.bias ? mobie_add(y, m.bias[expert * n_rows + row]) : y;
}

__device__ float silu(float x, float slope = 1.0f) {
    return x / (1.0f + expf(-x * slope));
}

__device__ float apply_glu(mobie_glu glu, float limit, float gate, float up) {
    switch (glu) {
        case MOBIE_GLU_GEGLU:
            return 0.5f * gate * (1.0f + tanhf(0.797884561f * gate * (1.0f + 0.044715f * gate * gate))) * up;
        case MOBIE_GLU_SWIGLU_OAI:
            return silu(fminf(gate, limit), 1.702f) * (1.0f + fmaxf(fminf(up, limit), -limit));
        case MOBIE_GLU_SWIGLU_CLAMP:
            return silu(fminf(gate, limit)) * fmaxf(fminf(up, limit), -limit);
        default:
            return silu(gate) * up;
    }
}

struct pair_of {
    int     expert;
    int64_t act_row;
};

__device__ pair_of find_pair(const mobie_cuda_product & p, int64_t pair) {
    if (!p.ids) {
        return { 0, pair };
    }
    const int64_t token = pair / p.n_used, used = pair % p.n_used;
    return { p.ids[token * p.ids_stride + used], token * p.n_rows_of_act + used % p.n_rows_of_act };
}

// --- kernel 1 --------------------------------------------------------------------------------------------------------

__device__ float naive_sum(const mobie_cuda_product & p, const void * w, int expert, int64_t row, int64_t act_row) {
    const int64_t       n_groups = mobie_n_groups(p.act.n);
    const mobie_block * b = (const mobie_block *) ((const char *) w + expert * p.expert_bytes + row * p.row_bytes);
    const int8_t *      q = p.act.q + act_row * n_groups * MOBIE_GROUP_LEN;
    float               y = 0;
    for (int64_t g = 0; g < n_groups; g++) {
        int32_t sum = 0;
        for (int64_t i = 4 * g; i < 4 * g + 4 && i < p.act.n / MOBIE_BLOCK_LEN; i++) {
            int32_t block_sum = 0;
            for (int j = 0; j < MOBIE_BLOCK_LEN; j++) {
                const int x = q[i * MOBIE_BLOCK_LEN + mobie_act_position(j)];
                block_sum += b[i].signs[j / 8] >> (j % 8) & 1 ? x : -x;
            }
            sum += b[i].scale * block_sum;
        }
        y = mobie_add(y, mobie_mul(p.act.scale[act_row * n_groups + g], (float) sum));
    }
    return y;
}

__global__ void naive(mobie_cuda_product p, int64_t first_pair) {
    const int64_t row = (int64_t) blockIdx.x * blockDim.x + threadIdx.x;
    if (row >= p.n_rows) {
        return;
    }
    const int64_t pair = first_pair + blockIdx.y;
    const pair_of at   = find_pair(p, pair);
    float         y    = finish(p.up, naive_sum(p, p.up.w, at.expert, row, at.act_row), at.expert, row, p.n_rows);
    if (p.gate.w) {
        const float gate = naive_sum(p, p.gate.w, at.expert, row, at.act_row);
        y                = apply_glu(p.glu, p.glu_limit, finish(p.gate, gate, at.expert, row, p.n_rows), y);
    }
    p.y[pair * p.y_stride + row] = y;
}

// --- kernel 2 --------------------------------------------------------------------------------------------------------

// The four lanes of a quad take the four blocks of a group, for four rows at once (with a gate: two rows of each
// matrix), so that every lane ends up with the sum of one of them. GROUPS quads share the groups of a row, the others
// have rows of their own. A lane's activations stay in its registers for all its rows.
constexpr int VEC_WARPS = 4;
constexpr int STREAMS   = 4;

// A lane's block of activations and where it lies in a row of weights.
struct lane_block {
    uint32_t q[16];
    float    scale;  // of the group
    uint32_t at;     // byte of the row

    __device__ lane_block(const mobie_cuda_act & act, int64_t row, int group, int block) {
        const int     n_blocks = (int) (act.n / MOBIE_BLOCK_LEN), n_groups = (n_blocks + 3) / 4;
        const int     index  = 4 * group + block;
        const bool    inside = index < n_blocks;  // else no activations, and some weights
        const uint4 * from   = (const uint4 *) (act.q + (row * n_groups * 4 + (inside ? index : 0)) * MOBIE_BLOCK_LEN);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const uint4 v = inside ? __ldg(from + i) : make_uint4(0, 0, 0, 0);
            q[4 * i] = v.x, q[4 * i + 1] = v.y, q[4 * i + 2] = v.z, q[4 * i + 3] = v.w;
        }
        scale = group < n_groups ? act.scale[row * n_groups + group] : 0;
        at    = (inside ? index : 0) * (uint32_t) sizeof(mobie_block);
    }
};

// Of the products of four rows with the activations of a quad's lanes, lane i gets the sum of row i.
// ALIGNED: rows are whole words apart, so that a lane's block lies alike in each of them. `opaque` is a zero the
// compiler does not know: constants that it knows it loads anew for every use.
template <bool GATE, bool ALIGNED>
__device__ int32_t multiply_rows(const lane_block & x, const char * up, const char * gate,
                                 const uint32_t (&later)[STREAMS], int block, uint32_t opaque) {
    uint32_t words[STREAMS][3], offset[STREAMS];
#pragma unroll
    for (int s = 0; s < STREAMS; s++) {
        const uintptr_t from = (uintptr_t) (GATE && s >= STREAMS / 2 ? gate : up) + x.at + (ALIGNED ? 0 : later[s]);
        const char *    word = (const char *) (from & ~(uintptr_t) 3) + (ALIGNED ? later[s] : 0);
        offset[s]            = (uint32_t) (from & 3);
#pragma unroll
        for (int i = 0; i < 3; i++) {
            words[s][i] = __ldg((const uint32_t *) word + i);
        }
    }
    int32_t sum[STREAMS];
#pragma unroll
    for (int s = 0; s < STREAMS; s++) {
        sum[s] = mobie_dot_block(mobie_take_block(words[s][0], words[s][1], words[s][2], offset[s]), x.q, opaque);
    }
    const bool    upper = block & 2, odd = block & 1;
    const int32_t keep0 = (upper ? sum[2] : sum[0]) + __shfl_xor_sync(~0u, upper ? sum[0] : sum[2], 2);
    const int32_t keep1 = (upper ? sum[3] : sum[1]) + __shfl_xor_sync(~0u, upper ? sum[1] : sum[3], 2);
    return (odd ? keep1 : keep0) + __shfl_xor_sync(~0u, odd ? keep0 : keep1, 1);
}

// ONE_STEP: the quads take all groups of a row at once, so that a lane keeps its activations for all its rows.
template <int GROUPS, bool GATE, bool ALIGNED, bool ONE_STEP>
__global__ void __launch_bounds__(VEC_WARPS * WARP) mul_vec(mobie_cuda_product p, int n_sets, int64_t first_pair) {
    constexpr int ROWS      = GATE ? STREAMS / 2 : STREAMS;  // of a quad at a time
    constexpr int WARP_ROWS = 8 / GROUPS * ROWS;

    const int      block = threadIdx.x % 4, quad = threadIdx.x / 4, part = quad % GROUPS;
    const int      first_lane = quad / GROUPS * GROUPS * 4 + block;  // of those with this lane's row
    const uint32_t n_rows = (uint32_t) p.n_rows, row_bytes = (uint32_t) p.row_bytes;
    const int64_t  pair = first_pair + blockIdx.y;
    const pair_of  at   = find_pair(p, pair);

    // with a gate, lanes 0 and 1 of a quad end up with rows of up, 2 and 3 with rows of gate
    const bool                is_up = !GATE || block < ROWS;
    const mobie_cuda_matrix & mine  = is_up ? p.up : p.gate;
    const float               scale = mine.scale ? mine.scale[at.expert] : 1.0f;
    const float *             bias  = mine.bias ? mine.bias + at.expert * p.n_rows : nullptr;

    const int64_t expert  = at.expert * p.expert_bytes;
    const int     n_steps = ONE_STEP ? 1 : ((int) mobie_n_groups(p.act.n) + GROUPS - 1) / GROUPS;
    lane_block    x(p.act, at.act_row, part, block);

    uint32_t warp_row = (blockIdx.x * VEC_WARPS + threadIdx.y) * n_sets * WARP_ROWS;
    for (int set = 0; set < n_sets && warp_row < n_rows; set++, warp_row += WARP_ROWS) {
        const uint32_t row0 = warp_row + quad / GROUPS * ROWS;
        const size_t   skip = expert + (size_t) min(row0, n_rows - 1) * row_bytes;
        uint32_t       later[STREAMS];  // bytes from row0 on; beyond the last row an earlier one again
#pragma unroll
        for (int s = 0; s < STREAMS; s++) {
            later[s] = row0 + s % ROWS < n_rows ? s % ROWS * row_bytes : 0;
        }
        float y = 0;
        for (int step = 0; step < n_steps; step++) {
            if (!ONE_STEP) {
                x = lane_block(p.act, at.act_row, step * GROUPS + part, block);
            }
            const int32_t total = multiply_rows<GATE, ALIGNED>(
                x, (const char *) p.up.w + skip, (const char *) p.gate.w + skip, later, block, threadIdx.z);
            const float product = mobie_mul(x.scale, (float) total);
#pragma unroll
            for (int i = 0; i < GROUPS; i++) {  // in the order of the groups; beyond the last one zeros
                y = mobie_add(y, GROUPS == 1 ? product : __shfl_sync(~0u, product, first_lane + 4 * i));
            }
        }
        const uint32_t row    = row0 + block % ROWS;
        float          result = scaled(y, scale);
        if (bias && row < n_rows) {
            result = mobie_add(result, bias[row]);
        }
        if (GATE) {
            result = apply_glu(p.glu, p.glu_limit, __shfl_xor_sync(~0u, result, 2), result);
        }
        if (part == 0 && is_up && row < n_rows) {
            p.y[pair * p.y_stride + row] = result;
        }
    }
}

// --- kernel 3 --------------------------------------------------------------------------------------------------------

// A block of threads takes 128 rows of one matrix and 8 N tokens, group by group: the weights as they lie in the file
// and the activations are copied to shared memory while the group before is multiplied. A warp has 16 rows. It makes
// its fragments of signs from the bits itself: the four lanes of a quad need the same words of a row, each another
// table.
constexpr int MAT_WARPS   = 8;
constexpr int MAT_THREADS = MAT_WARPS * WARP;
constexpr int MAT_ROWS    = 16 * MAT_WARPS;
// A group of a row is 36 bytes that start anywhere: four pieces of 16 bytes hold them. A fifth keeps the banks apart.
constexpr int PIECES     = 4;
constexpr int ROW_PIECES = 5;

struct tile {
    int expert, first, count, unused;
};

template <int N>
struct mat_stage {
    uint4 weights[MAT_ROWS][ROW_PIECES];
    uint4 act[8 * N][MOBIE_GROUP_LEN / 16];  // odd tokens have the halves of every 128 bytes swapped, for the banks
    float scale[8 * N];
};

#if __CUDA_ARCH__ >= 800
__device__ void copy16(void * to, const void * from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"((uint32_t) __cvta_generic_to_shared(to)), "l"(from));
}
__device__ void copy4(void * to, const void * from) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"((uint32_t) __cvta_generic_to_shared(to)), "l"(from));
}
__device__ void await_copies() {
    asm volatile("cp.async.wait_all;");
}
#else
__device__ void copy16(void * to, const void * from) {
    *(uint4 *) to = *(const uint4 *) from;
}
__device__ void copy4(void * to, const void * from) {
    *(uint32_t *) to = *(const uint32_t *) from;
}
__device__ void await_copies() {}
#endif

// c = d + a b for signed bytes: 16 rows, 32 columns, 8 tokens
__device__ void multiply(int32_t (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, const int32_t (&d)[4]) {
#if __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%10, %11, %12, %13};"
        : "=r"(c[0]), "=r"(c[1]), "=r"(c[2]), "=r"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "r"(d[0]), "r"(d[1]), "r"(d[2]), "r"(d[3]));
#elif __CUDA_ARCH__ >= 750
#pragma unroll
    for (int i = 0; i < 2; i++) {  // eight rows
        asm("mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32 {%0, %1}, {%2}, {%3}, {%4, %5};"
            : "=r"(c[2 * i]), "=r"(c[2 * i + 1])
            : "r"(a[i]), "r"(b0), "r"(d[2 * i]), "r"(d[2 * i + 1]));
        asm("mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32 {%0, %1}, {%2}, {%3}, {%0, %1};"
            : "+r"(c[2 * i]), "+r"(c[2 * i + 1])
            : "r"(a[2 + i]), "r"(b1));
    }
#else
    __trap();  // mobie_cuda_mul_mat does not come here
#endif
}

// What a thread copies of every group. Bytes are counted in 32 bits from the piece in which a tensor begins.
template <int N>
struct copier {
    static constexpr int WEIGHT_COPIES = MAT_ROWS * PIECES / MAT_THREADS;
    static constexpr int ACT_PIECES    = MOBIE_GROUP_LEN / 16;
    static constexpr int ACT_COPIES    = (8 * N * ACT_PIECES + MAT_THREADS - 1) / MAT_THREADS;

    const char *  weights;
    const char *  act;
    const float * scale;
    uint32_t      start[WEIGHT_COPIES];  // of the group in the row
    uint32_t      end[WEIGHT_COPIES];    // of the row; 0 beyond the last row
    uint32_t      from[ACT_COPIES];

    __device__ copier(const mobie_cuda_product & p, const uint32_t * row_in, const char * w, uint32_t row0) {
        const int      thread   = threadIdx.y * WARP + threadIdx.x;
        const uint32_t n_groups = (uint32_t) mobie_n_groups(p.act.n);
        weights                 = (const char *) ((uintptr_t) w & ~(uintptr_t) 15);
        act                     = (const char *) p.act.q;
#pragma unroll
        for (int i = 0; i < WEIGHT_COPIES; i++) {
            const uint32_t row  = row0 + thread / PIECES + i * (MAT_THREADS / PIECES);
            const uint32_t used = (uint32_t) p.act.n / MOBIE_BLOCK_LEN * (uint32_t) sizeof(mobie_block);
            start[i]            = ((uint32_t) (uintptr_t) w & 15) + row * (uint32_t) p.row_bytes;
            end[i]              = row < p.n_rows ? start[i] + used : 0;
        }
#pragma unroll
        for (int i = 0; i < ACT_COPIES; i++) {
            const int token = min(thread / ACT_PIECES + i * (MAT_THREADS / ACT_PIECES), 8 * N - 1);
            from[i]         = row_in[token] * n_groups * MOBIE_GROUP_LEN + thread % ACT_PIECES * 16;
        }
        scale = p.act.scale + (size_t) row_in[min(thread, 8 * N - 1)] * n_groups;
    }

    // the next group
    __device__ void copy(mat_stage<N> & m) {
        const int thread = threadIdx.y * WARP + threadIdx.x, piece = thread % PIECES;
#pragma unroll
        for (int i = 0; i < WEIGHT_COPIES; i++) {
            const uint32_t at = (start[i] & ~15u) + 16 * piece;
            if (at < end[i]) {  // no piece without a byte of the row
                copy16(&m.weights[thread / PIECES + i * (MAT_THREADS / PIECES)][piece], weights + at);
            }
            start[i] += 4 * sizeof(mobie_block);
        }
#pragma unroll
        for (int i = 0; i < ACT_COPIES; i++) {
            const int token = thread / ACT_PIECES + i * (MAT_THREADS / ACT_PIECES);
            if (8 * N * ACT_PIECES % MAT_THREADS == 0 || token < 8 * N) {
                copy16(&m.act[token][thread % ACT_PIECES ^ (token & 1) << 2], act + from[i]);
            }
            from[i] += MOBIE_GROUP_LEN;
        }
        if (thread < 8 * N) {
            copy4(&m.scale[thread], scale);
        }
        scale++;
    }
};

template <int N>
__global__ void __launch_bounds__(MAT_THREADS, 2)
    mul_mat(mobie_cuda_product p, const int32_t * rows_in, const int32_t * rows_out, const tile * tiles) {
    extern __shared__ uint4 memory[];
    __shared__ uint32_t     row_in[8 * N];
    mat_stage<N> *          stages = (mat_stage<N> *) memory;

    const int thread = threadIdx.y * WARP + threadIdx.x, lane = threadIdx.x;
    tile      t = { 0, (int) blockIdx.y * 8 * N, 0, 0 };
    if (tiles) {
        if ((int) blockIdx.y >= tiles[0].count) {
            return;
        }
        t = tiles[1 + blockIdx.y];
    } else {
        t.count = (int) min((int64_t) 8 * N, p.n_tokens - t.first);
    }
    if (thread < 8 * N) {
        const int i    = t.first + min(thread, t.count - 1);
        row_in[thread] = rows_in ? rows_in[i] : i;
    }
    __syncthreads();

    const char *   w        = (const char *) p.up.w + t.expert * p.expert_bytes;
    const uint32_t row0     = blockIdx.x * MAT_ROWS;
    const int      n_groups = (int) mobie_n_groups(p.act.n);

    // A lane's two rows are 8 apart.
    const int              my_row = threadIdx.y * 16 + lane / 4;
    const int              k      = lane % 4;
    const mobie_sign_table table  = mobie_signs_of(k);
    const uint32_t         start0 = (uint32_t) (uintptr_t) w + (row0 + my_row) * (uint32_t) p.row_bytes;

    float     y[N][4] = {};
    copier<N> next(p, row_in, w, row0);
    next.copy(stages[0]);
    for (int group = 0; group < n_groups; group++) {
        await_copies();
        __syncthreads();  // this group is there, and nobody reads the one before any more
        if (group + 1 < n_groups) {
            next.copy(stages[(group + 1) % 2]);
        }
        const mat_stage<N> & m        = stages[group % 2];
        const uint32_t       in_row   = group * 4 * sizeof(mobie_block);
        const uint32_t       start[2] = { (start0 + in_row) & 15, (start0 + 8 * (uint32_t) p.row_bytes + in_row) & 15 };
        int32_t              sum[N][4] = {};
#pragma unroll 1  // unrolled, the fragments of all blocks would be made at once and not find room in the registers
        for (int block = 0; block < 4; block++) {
            uint32_t a[2][4];  // [word of signs]
            int32_t  scale[2];
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const uint32_t   byte = start[i] + (uint32_t) sizeof(mobie_block) * block;
                const uint32_t * from = (const uint32_t *) &m.weights[my_row + 8 * i][0] + byte / 4;
                const mobie_bits bits = mobie_take_block(from[0], from[1], from[2], byte % 4);
                scale[i]              = bits.scale;
#pragma unroll
                for (int word = 0; word < 2; word++) {
                    mobie_expand(bits.signs[word], table, &a[word][i], &a[word][i + 2]);
                }
            }
#pragma unroll
            for (int j = 0; j < N; j++) {
                const int     token   = 8 * j + lane / 4;
                const uint4   b       = m.act[token][(4 * block + k) ^ (token & 1) << 2];
                const int32_t zero[4] = {};
                int32_t       c[4];
                multiply(c, a[0], b.x, b.y, zero);
                multiply(c, a[1], b.z, b.w, c);
                sum[j][0] += scale[0] * c[0];
                sum[j][1] += scale[0] * c[1];
                sum[j][2] += scale[1] * c[2];
                sum[j][3] += scale[1] * c[3];
            }
        }
#pragma unroll
        for (int j = 0; j < N; j++) {
            const float2 d = *(const float2 *) &m.scale[8 * j + 2 * k];
            y[j][0]        = mobie_add(y[j][0], mobie_mul(d.x, (float) sum[j][0]));
            y[j][1]        = mobie_add(y[j][1], mobie_mul(d.y, (float) sum[j][1]));
            y[j][2]        = mobie_add(y[j][2], mobie_mul(d.x, (float) sum[j][2]));
            y[j][3]        = mobie_add(y[j][3], mobie_mul(d.y, (float) sum[j][3]));
        }
    }
    const float scale = p.up.scale ? p.up.scale[t.expert] : 1.0f;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const uint32_t row = row0 + my_row + 8 * i;
        if (row >= p.n_rows) {
            break;
        }
        const float bias = p.up.bias ? p.up.bias[t.expert * p.n_rows + row] : 0.0f;
#pragma unroll
        for (int j = 0; j < N; j++) {
#pragma unroll
            for (int column = 0; column < 2; column++) {
                const int token = 8 * j + 2 * k + column;
                if (token < t.count) {
                    const int64_t at           = rows_out ? rows_out[t.first + token] : t.first + token;
                    const float   result       = scaled(y[j][2 * i + column], scale);
                    p.y[at * p.y_stride + row] = p.up.bias ? mobie_add(result, bias) : result;
                }
            }
        }
    }
}

// tiles[0].count: their number; then the tiles of `length` tokens, expert by expert. One warp.
__global__ void make_tiles(const int32_t * bounds, int n_expert, int length, tile * tiles) {
    const int lane  = threadIdx.x;
    int       total = 0;
    for (int first = 0; first < n_expert; first += WARP) {
        const int expert = first + lane;
        const int begin  = expert < n_expert ? bounds[expert] : 0;
        const int n      = expert < n_expert ? bounds[expert + 1] - begin : 0;
        const int mine   = (n + length - 1) / length;
        int       sum    = mine;  // over the lanes up to this one
        for (int offset = 1; offset < WARP; offset *= 2) {
            const int lower = __shfl_up_sync(~0u, sum, offset);
            sum += lane >= offset ? lower : 0;
        }
        for (int i = 0; i < mine; i++) {
            tiles[1 + total + sum - mine + i] = { expert, begin + i * length, min(length, n - i * length), 0 };
        }
        total += __shfl_sync(~0u, sum, WARP - 1);
    }
    if (lane == 0) {
        tiles[0] = { 0, 0, total, 0 };
    }
}

int64_t most_tiles(int64_t n_pairs, int64_t n_expert, int64_t length) {
    const int64_t n = n_pairs / length + n_expert;
    return n < n_pairs ? n : n_pairs;
}

}  // namespace

// --- calls -----------------------------------------------------------------------------------------------------------

// A grid has at most so many blocks in y. Large batches reach it where no tensor cores take them.
static const int64_t MOST_PAIRS = 65535;

// Calls launch(first pair, number of pairs) until all are done.
template <typename F> static void for_pairs(const mobie_cuda_product & p, const F & launch) {
    const int64_t n_pairs = p.n_tokens * p.n_used;
    for (int64_t first = 0; first < n_pairs; first += MOST_PAIRS) {
        launch(first, n_pairs - first < MOST_PAIRS ? n_pairs - first : MOST_PAIRS);
    }
}

cudaError_t mobie_cuda_quantize(const float * x, const int64_t ne[4], const int64_t stride[4], mobie_cuda_act act,
                                cudaStream_t stream) {
    const rows_of_floats rows    = { x, ne[1], ne[2], stride[1], stride[2], stride[3] };
    const int64_t        n_rows  = ne[1] * ne[2] * ne[3];
    const int64_t        n_warps = n_rows * mobie_n_groups(act.n);
    const bool           aligned = ((uintptr_t) x | stride[1] * 4 | stride[2] * 4 | stride[3] * 4) % 16 == 0;
    const dim3 grid((unsigned) ((n_warps + QUANTIZE_WARPS - 1) / QUANTIZE_WARPS)), block(WARP, QUANTIZE_WARPS);
    if (aligned) {
        quantize<true><<<grid, block, 0, stream>>>(rows, act, n_rows);
    } else {
        quantize<false><<<grid, block, 0, stream>>>(rows, act, n_rows);
    }
    return cudaGetLastError();
}

cudaError_t mobie_cuda_naive(const mobie_cuda_product * p, cudaStream_t stream) {
    for_pairs(*p, [&](int64_t first, int64_t n) {
        const dim3 grid((unsigned) ((p->n_rows + 127) / 128), (unsigned) n);
        naive<<<grid, 128, 0, stream>>>(*p, first);
    });
    return cudaGetLastError();
}

template <int GROUPS, bool GATE, bool ONE_STEP>
static void launch_vec(const mobie_cuda_product & p, cudaStream_t stream) {
    const int     rows    = 8 / GROUPS * (GATE ? STREAMS / 2 : STREAMS);
    const int64_t n_pairs = p.n_tokens * p.n_used;
    const int64_t n_warps = (p.n_rows + rows - 1) / rows;
    // With much to do, a warp goes on with its activations; with little, every warp is wanted.
    int n_sets = 1;
    while (n_sets < 16 && n_warps * n_pairs >= (int64_t) n_sets << 15) {
        n_sets *= 2;
    }
    const unsigned blocks = (unsigned) ((n_warps + n_sets * VEC_WARPS - 1) / (n_sets * VEC_WARPS));
    const dim3     block(WARP, VEC_WARPS);
    const bool     aligned =
        ((uintptr_t) p.up.w | (uintptr_t) p.gate.w | p.row_bytes | p.expert_bytes) % sizeof(uint32_t) == 0;
    for_pairs(p, [&](int64_t first, int64_t n) {
        const dim3 grid(blocks, (unsigned) n);
        if (aligned) {
            mul_vec<GROUPS, GATE, true, ONE_STEP><<<grid, block, 0, stream>>>(p, n_sets, first);
        } else {
            mul_vec<GROUPS, GATE, false, ONE_STEP><<<grid, block, 0, stream>>>(p, n_sets, first);
        }
    });
}

template <bool GATE>
static void choose_vec(const mobie_cuda_product & p, cudaStream_t stream) {
    const int64_t n_groups = mobie_n_groups(p.act.n);
    if (n_groups > 8) {
        launch_vec<8, GATE, false>(p, stream);
    } else if (n_groups > 4) {
        launch_vec<8, GATE, true>(p, stream);
    } else if (n_groups > 2) {
        launch_vec<4, GATE, true>(p, stream);
    } else if (n_groups > 1) {
        launch_vec<2, GATE, true>(p, stream);
    } else {
        launch_vec<1, GATE, true>(p, stream);
    }
}

cudaError_t mobie_cuda_mul_vec(const mobie_cuda_product * p, cudaStream_t stream) {
    if (p->gate.w) {
        choose_vec<true>(*p, stream);
    } else {
        choose_vec<false>(*p, stream);
    }
    return cudaGetLastError();
}

size_t mobie_cuda_tiles_size(int64_t n_pairs, int64_t n_expert) {
    return (1 + most_tiles(n_pairs, n_expert, 8)) * sizeof(tile);
}

template <int N>
static cudaError_t launch_mat(const mobie_cuda_product & p, const mobie_cuda_routing * routing, cudaStream_t stream) {
    const size_t      shared = 2 * sizeof(mat_stage<N>);
    const cudaError_t error =
        shared <= 48 << 10
            ? cudaSuccess
            : cudaFuncSetAttribute(mul_mat<N>, cudaFuncAttributeMaxDynamicSharedMemorySize, (int) shared);
    if (error != cudaSuccess) {
        return error;
    }
    const int64_t n_pairs = p.n_tokens * p.n_used;
    const dim3    block(WARP, MAT_WARPS);
    dim3          grid((unsigned) ((p.n_rows + MAT_ROWS - 1) / MAT_ROWS), (unsigned) ((n_pairs + 8 * N - 1) / (8 * N)));
    if (!routing) {
        mul_mat<N><<<grid, block, shared, stream>>>(p, nullptr, nullptr, nullptr);
        return cudaGetLastError();
    }
    tile * tiles = (tile *) routing->tiles;
    grid.y       = (unsigned) most_tiles(n_pairs, p.n_expert, 8 * N);
    make_tiles<<<1, WARP, 0, stream>>>(routing->bounds, (int) p.n_expert, 8 * N, tiles);
    mul_mat<N><<<grid, block, shared, stream>>>(p, routing->rows_in, routing->rows_out, tiles);
    return cudaGetLastError();
}

cudaError_t mobie_cuda_mul_mat(const mobie_cuda_product * p, const mobie_cuda_routing * routing, int tile_tokens,
                               cudaStream_t stream) {
    int device = 0, major = 0, minor = 0;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    if (10 * major + minor < 75) {  // no int8 tensor cores
        return mobie_cuda_mul_vec(p, stream);
    }
    if (tile_tokens == 0) {
        const int64_t tokens = p->n_tokens * p->n_used / (routing ? p->n_expert : 1);  // of an expert, on average
        tile_tokens          = tokens <= 8 ? 8 : tokens <= 16 ? 16 : tokens <= 40 ? 32 : 64;
    }
    switch (tile_tokens) {
        case 8:
            return launch_mat<1>(*p, routing, stream);
        case 16:
            return launch_mat<2>(*p, routing, stream);
        case 32:
            return launch_mat<4>(*p, routing, stream);
        default:
            return launch_mat<8>(*p, routing, stream);
    }
}

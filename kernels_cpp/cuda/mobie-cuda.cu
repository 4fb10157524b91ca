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

__device__ float finish(const mobie_cuda_matrix & m, float sum, int expert, int64_t row, int64_t n_rows) {
    const float y = mobie_mul(mobie_mul(sum, MOBIE_UNIT), m.scale ? m.scale[expert] : 1.0f);
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

__global__ void naive(mobie_cuda_product p) {
    const int64_t row = (int64_t) blockIdx.x * blockDim.x + threadIdx.x;
    if (row >= p.n_rows) {
        return;
    }
    const int64_t pair = blockIdx.y;
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

template <int GROUPS, bool GATE>
__global__ void __launch_bounds__(VEC_WARPS * WARP) mul_vec(mobie_cuda_product p, int n_sets) {
    constexpr int ROWS      = GATE ? STREAMS / 2 : STREAMS;  // of a quad at a time
    constexpr int WARP_ROWS = 8 / GROUPS * ROWS;

    const int lane = threadIdx.x, block = lane % 4, quad = lane / 4, part = quad % GROUPS;
    const int warp = blockIdx.x * VEC_WARPS + threadIdx.y;

    const int64_t pair     = blockIdx.y;
    const pair_of at       = find_pair(p, pair);
    const int     n_blocks = (int) (p.act.n / MOBIE_BLOCK_LEN);
    const int     n_groups = (n_blocks + 3) / 4;
    const int     n_steps  = (n_groups + GROUPS - 1) / GROUPS;

    const int8_t * act_q     = p.act.q + at.act_row * n_groups * MOBIE_GROUP_LEN;
    const float *  act_scale = p.act.scale + at.act_row * n_groups;

    uint32_t q[16];
    float    d = 0;
    for (int set = 0; set < n_sets; set++) {
        const int64_t row0 = ((int64_t) warp * n_sets + set) * WARP_ROWS + quad / GROUPS * ROWS;
        if (row0 - quad / GROUPS * ROWS >= p.n_rows) {
            return;  // the whole warp
        }
        const char * rows[STREAMS];
#pragma unroll
        for (int s = 0; s < STREAMS; s++) {
            const char *  w   = (const char *) (GATE && s >= ROWS ? p.gate.w : p.up.w);
            const int64_t row = min(row0 + s % ROWS, p.n_rows - 1);
            rows[s]           = w + at.expert * p.expert_bytes + row * p.row_bytes;
        }
        float y = 0;
        for (int step = 0; step < n_steps; step++) {
            const int  group  = step * GROUPS + part;
            const int  index  = 4 * group + block;
            const bool inside = index < n_blocks;

            uint32_t words[STREAMS][3], offset[STREAMS];
#pragma unroll
            for (int s = 0; s < STREAMS; s++) {
                const uintptr_t  from = (uintptr_t) rows[s] + (inside ? index : 0) * (int) sizeof(mobie_block);
                const uint32_t * word = (const uint32_t *) (from & ~(uintptr_t) 3);
                offset[s]             = (uint32_t) (from & 3);
#pragma unroll
                for (int i = 0; i < 3; i++) {
                    words[s][i] = __ldg(word + i);
                }
            }
            if (n_steps > 1 || set == 0) {
                const uint4 * from = (const uint4 *) (act_q + (inside ? index : 0) * MOBIE_BLOCK_LEN);
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const uint4 v = inside ? __ldg(from + i) : make_uint4(0, 0, 0, 0);
                    q[4 * i] = v.x, q[4 * i + 1] = v.y, q[4 * i + 2] = v.z, q[4 * i + 3] = v.w;
                }
                d = group < n_groups ? act_scale[group] : 0;
            }
            int32_t sum[STREAMS];
#pragma unroll
            for (int s = 0; s < STREAMS; s++) {
                sum[s] = mobie_dot_block(mobie_take_block(words[s][0], words[s][1], words[s][2], offset[s]), q);
            }
            // four sums over four lanes, one left for each: lane `block` keeps that of stream `block`
            const bool    upper = block & 2, odd = block & 1;
            const int32_t keep0 = (upper ? sum[2] : sum[0]) + __shfl_xor_sync(~0u, upper ? sum[0] : sum[2], 2);
            const int32_t keep1 = (upper ? sum[3] : sum[1]) + __shfl_xor_sync(~0u, upper ? sum[1] : sum[3], 2);
            const int32_t total = (odd ? keep1 : keep0) + __shfl_xor_sync(~0u, odd ? keep0 : keep1, 1);

            const float product = mobie_mul(d, (float) total);
            if (GROUPS == 1) {
                y = mobie_add(y, product);
            } else {
#pragma unroll
                for (int i = 0; i < GROUPS; i++) {  // in the order of the groups; beyond the last one zeros
                    y = mobie_add(y, __shfl_sync(~0u, product, quad / GROUPS * GROUPS * 4 + 4 * i + block));
                }
            }
        }
        const int64_t row = row0 + block % ROWS;
        if (!GATE) {
            if (part == 0 && row < p.n_rows) {
                p.y[pair * p.y_stride + row] = finish(p.up, y, at.expert, row, p.n_rows);
            }
        } else {
            const float other = __shfl_xor_sync(~0u, y, 2);  // lanes 0 and 1 have up, 2 and 3 gate
            if (part == 0 && block < ROWS && row < p.n_rows) {
                p.y[pair * p.y_stride + row] =
                    apply_glu(p.glu, p.glu_limit, finish(p.gate, other, at.expert, row, p.n_rows),
                              finish(p.up, y, at.expert, row, p.n_rows));
            }
        }
    }
}

// --- kernel 3 --------------------------------------------------------------------------------------------------------

// A block of threads takes 128 rows of one matrix and 8 N tokens, group by group: the weights as they lie in the file
// and the activations go to shared memory, one group ahead of the products. A warp has 32 rows. It makes its fragments
// of signs from the bits itself: the four lanes of a quad need the same words of a row, each another table of signs.
constexpr int MAT_WARPS = 4;
constexpr int MAT_ROWS  = 32 * MAT_WARPS;
constexpr int ROW_WORDS = 10;  // a group of a row: 36 bytes, which start anywhere in the first word

struct tile {
    int expert, first, count, unused;
};

template <int N>
struct mat_memory {
    uint32_t weights[2][MAT_ROWS][ROW_WORDS];
    uint4    act[2][8 * N][MOBIE_GROUP_LEN / 16];  // 16-byte pieces; odd tokens have their halves of 64 bytes swapped
    float    scale[2][8 * N];
    int64_t  row_in[8 * N];
};

#if __CUDA_ARCH__ >= 800
__device__ void copy16(void * to, const void * from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"((uint32_t) __cvta_generic_to_shared(to)), "l"(from));
}
__device__ void copy4(void * to, const void * from) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"((uint32_t) __cvta_generic_to_shared(to)), "l"(from));
}
__device__ void close_copies() {
    asm volatile("cp.async.commit_group;");
}
template <int AHEAD>
__device__ void await_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(AHEAD));
}
#else
__device__ void copy16(void * to, const void * from) {
    *(uint4 *) to = *(const uint4 *) from;
}
__device__ void copy4(void * to, const void * from) {
    *(uint32_t *) to = *(const uint32_t *) from;
}
__device__ void close_copies() {}
template <int AHEAD>
__device__ void await_copies() {}
#endif

// c += a b for signed bytes: 16 rows, 32 columns, 8 tokens
__device__ void multiply(int32_t (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#if __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
        "%3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
#pragma unroll
    for (int half = 0; half < 2; half++) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            asm("mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32 {%0, %1}, {%2}, {%3}, {%0, %1};"
                : "+r"(c[2 * i]), "+r"(c[2 * i + 1])
                : "r"(a[2 * half + i]), "r"(half ? b1 : b0));
        }
    }
#endif
}

template <int N>
__device__ void load_group(mat_memory<N> & m, int stage, const mobie_cuda_product & p, const char * w, uint32_t row0,
                           int group, int n_groups) {
    // Ten threads copy a row, twelve rows at a time. Bytes are counted from the aligned word the matrix begins in.
    constexpr int  ROWS_AT_ONCE = MAT_WARPS * WARP / ROW_WORDS;
    const int      thread       = threadIdx.y * WARP + threadIdx.x;
    const char *   base         = (const char *) ((uintptr_t) w & ~(uintptr_t) 3);
    const uint32_t in_row       = group * 4 * sizeof(mobie_block);
    const uint32_t left         = (uint32_t) p.act.n / MOBIE_BLOCK_LEN * sizeof(mobie_block) - in_row;
    const uint32_t word         = thread % ROW_WORDS;
    const uint32_t row_bytes    = (uint32_t) p.row_bytes;
    uint32_t       row          = thread / ROW_WORDS;
    uint32_t       start        = (uint32_t) ((uintptr_t) w & 3) + (row0 + row) * row_bytes + in_row;
#pragma unroll 2
    for (; row < MAT_ROWS; row += ROWS_AT_ONCE, start += ROWS_AT_ONCE * row_bytes) {
        const uint32_t from = (start & ~3u) + 4 * word;
        // a word beyond the row may be beyond the tensor
        if (row0 + row < p.n_rows && from < start + left && thread < ROWS_AT_ONCE * ROW_WORDS) {
            copy4(&m.weights[stage][row][word], base + from);
        }
    }
#pragma unroll
    for (int i = 0; i < N; i++) {
        const int token = thread / 16 + 8 * i, piece = thread % 16;
        copy16(&m.act[stage][token][piece ^ (token & 1) << 2],
               p.act.q + (m.row_in[token] * n_groups + group) * MOBIE_GROUP_LEN + 16 * piece);
    }
    if (thread < 8 * N) {
        copy4(&m.scale[stage][thread], p.act.scale + m.row_in[thread] * n_groups + group);
    }
    close_copies();
}

template <int N>
__global__ void __launch_bounds__(MAT_WARPS * WARP, N == 8   ? 2
                                                    : N == 4 ? 3
                                                             : 4)
    mul_mat(mobie_cuda_product p, const int32_t * rows_in, const int32_t * rows_out, const tile * tiles) {
    __shared__ mat_memory<N> m;

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
        const int i      = t.first + min(thread, t.count - 1);
        m.row_in[thread] = rows_in ? rows_in[i] : i;
    }
    __syncthreads();

    const char *   w        = (const char *) p.up.w + t.expert * p.expert_bytes;
    const uint32_t row0     = blockIdx.x * MAT_ROWS;
    const int      n_groups = (int) mobie_n_groups(p.act.n);

    // A lane's four rows are 8 apart; two and two make a fragment.
    const int              first_row = threadIdx.y * 32 + lane / 4;
    const int              k         = lane % 4;
    const mobie_sign_table table     = mobie_signs_of(k);
    uint32_t               offset[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        offset[i] = ((uint32_t) (uintptr_t) w + (row0 + first_row + 8 * i) * (uint32_t) p.row_bytes) & 3;
    }

    float y[2][N][4] = {};
    load_group(m, 0, p, w, row0, 0, n_groups);
    for (int group = 0; group < n_groups; group++) {
        const int stage = group % 2;
        if (group + 1 < n_groups) {
            load_group(m, 1 - stage, p, w, row0, group + 1, n_groups);
            await_copies<1>();
        } else {
            await_copies<0>();
        }
        __syncthreads();

        int32_t sum[2][N][4] = {};
#pragma unroll 1  // unrolled, the fragments of all blocks would be made at once and not find room in the registers
        for (int block = 0; block < 4; block++) {
            uint32_t a[2][2][4];  // [rows][word of signs]
            int32_t  scale[4];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int        byte = (int) sizeof(mobie_block) * block + offset[i];
                const uint32_t * from = &m.weights[stage][first_row + 8 * i][byte / 4];
                const mobie_bits bits = mobie_take_block(from[0], from[1], from[2], byte % 4);
                scale[i]              = bits.scale;
#pragma unroll
                for (int word = 0; word < 2; word++) {
                    mobie_expand(bits.signs[word], table, &a[i / 2][word][i % 2], &a[i / 2][word][i % 2 + 2]);
                }
            }
#pragma unroll
            for (int j = 0; j < N; j++) {
                const int   token = 8 * j + lane / 4;
                const uint4 b     = m.act[stage][token][(4 * block + k) ^ (token & 1) << 2];
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    int32_t c[4] = {};
                    multiply(c, a[i][0], b.x, b.y);
                    multiply(c, a[i][1], b.z, b.w);
                    sum[i][j][0] += scale[2 * i] * c[0];
                    sum[i][j][1] += scale[2 * i] * c[1];
                    sum[i][j][2] += scale[2 * i + 1] * c[2];
                    sum[i][j][3] += scale[2 * i + 1] * c[3];
                }
            }
        }
#pragma unroll
        for (int j = 0; j < N; j++) {
            const float2 d = *(const float2 *) &m.scale[stage][8 * j + 2 * k];
#pragma unroll
            for (int i = 0; i < 2; i++) {
                y[i][j][0] = mobie_add(y[i][j][0], mobie_mul(d.x, (float) sum[i][j][0]));
                y[i][j][1] = mobie_add(y[i][j][1], mobie_mul(d.y, (float) sum[i][j][1]));
                y[i][j][2] = mobie_add(y[i][j][2], mobie_mul(d.x, (float) sum[i][j][2]));
                y[i][j][3] = mobie_add(y[i][j][3], mobie_mul(d.y, (float) sum[i][j][3]));
            }
        }
        __syncthreads();
    }
#pragma unroll
    for (int j = 0; j < N; j++) {
#pragma unroll
        for (int column = 0; column < 2; column++) {
            const int token = 8 * j + 2 * k + column;
            if (token >= t.count) {
                continue;
            }
            float * to = p.y + (rows_out ? rows_out[t.first + token] : t.first + token) * p.y_stride;
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const uint32_t row = row0 + first_row + 8 * i;
                if (row < p.n_rows) {
                    to[row] = finish(p.up, y[i / 2][j][i % 2 * 2 + column], t.expert, row, p.n_rows);
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
    const dim3 grid((unsigned) ((p->n_rows + 127) / 128), (unsigned) (p->n_tokens * p->n_used));
    naive<<<grid, 128, 0, stream>>>(*p);
    return cudaGetLastError();
}

template <int GROUPS, bool GATE>
static void launch_vec(const mobie_cuda_product & p, cudaStream_t stream) {
    const int     rows    = 8 / GROUPS * (GATE ? STREAMS / 2 : STREAMS);
    const int64_t n_pairs = p.n_tokens * p.n_used;
    const int64_t n_warps = (p.n_rows + rows - 1) / rows;
    // With much to do, a warp goes on with its activations; with little, every warp is wanted.
    const int  n_sets = n_warps * n_pairs >= 1 << 16 ? 4 : n_warps * n_pairs >= 1 << 15 ? 2 : 1;
    const dim3 grid((unsigned) ((n_warps + n_sets * VEC_WARPS - 1) / (n_sets * VEC_WARPS)), (unsigned) n_pairs);
    mul_vec<GROUPS, GATE><<<grid, dim3(WARP, VEC_WARPS), 0, stream>>>(p, n_sets);
}

template <bool GATE>
static void choose_vec(const mobie_cuda_product & p, cudaStream_t stream) {
    const int64_t n_groups = mobie_n_groups(p.act.n);
    if (n_groups > 4) {
        launch_vec<8, GATE>(p, stream);
    } else if (n_groups > 2) {
        launch_vec<4, GATE>(p, stream);
    } else if (n_groups > 1) {
        launch_vec<2, GATE>(p, stream);
    } else {
        launch_vec<1, GATE>(p, stream);
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
static void launch_mat(const mobie_cuda_product & p, const mobie_cuda_routing * routing, cudaStream_t stream) {
    const int64_t n_pairs = p.n_tokens * p.n_used;
    const dim3    block(WARP, MAT_WARPS);
    dim3          grid((unsigned) ((p.n_rows + MAT_ROWS - 1) / MAT_ROWS), (unsigned) ((n_pairs + 8 * N - 1) / (8 * N)));
    if (!routing) {
        mul_mat<N><<<grid, block, 0, stream>>>(p, nullptr, nullptr, nullptr);
        return;
    }
    tile * tiles = (tile *) routing->tiles;
    grid.y       = (unsigned) most_tiles(n_pairs, p.n_expert, 8 * N);
    make_tiles<<<1, WARP, 0, stream>>>(routing->bounds, (int) p.n_expert, 8 * N, tiles);
    mul_mat<N><<<grid, block, 0, stream>>>(p, routing->rows_in, routing->rows_out, tiles);
}

cudaError_t mobie_cuda_mul_mat(const mobie_cuda_product * p, const mobie_cuda_routing * routing, int tile_tokens,
                               cudaStream_t stream) {
    if (tile_tokens == 0) {
        const int64_t tokens = p->n_tokens * p->n_used / (routing ? p->n_expert : 1);  // of an expert, on average
        tile_tokens          = tokens <= 8 ? 8 : tokens <= 16 ? 16 : tokens <= 40 ? 32 : 64;
    }
    switch (tile_tokens) {
        case 8:
            launch_mat<1>(*p, routing, stream);
            break;
        case 16:
            launch_mat<2>(*p, routing, stream);
            break;
        case 32:
            launch_mat<4>(*p, routing, stream);
            break;
        default:
            launch_mat<8>(*p, routing, stream);
            break;
    }
    return cudaGetLastError();
}

// The reference: FORMAT.md, "Products", line by line. Slow and obvious; the others must give its bits.
#include <math.h>

#include "kernels.h"

static void quantize_act(const float * x, void * act, int64_t n) {
    int8_t * q = (int8_t *) act;
    for (int64_t g = 0; g < mobie_n_groups(n); g++) {
        const int64_t begin = g * MOBIE_GROUP_LEN;
        const int64_t end   = begin + mobie_group_blocks(n, g) * MOBIE_BLOCK_LEN;

        float max = 0;
        bool  nan = false;
        for (int64_t i = begin; i < end; i++) {
            max = fabsf(x[i]) > max ? fabsf(x[i]) : max;
            nan = nan || x[i] != x[i];
        }
        const bool zero   = max < MOBIE_ACT_MIN;
        const bool finite = !nan && max <= MOBIE_ACT_MAX;

        mobie_act_group group = {};
        group.scale           = !finite ? (float) NAN : zero ? 0 : max / 127;
        const float inv       = 127 / max;
        for (int64_t i = begin; i < end; i++) {
            q[i] = finite && !zero ? (int8_t) rintf(x[i] * inv) : 0;
            group.sums[(i - begin) / MOBIE_BLOCK_LEN] += q[i];
        }
        mobie_set_act_group(act, n, g, group);
    }
    mobie_clear_act_padding(act, n);
}

static float dot(int64_t n, const mobie_block * w, const void * act) {
    const int8_t * q = (const int8_t *) act;
    float          y = 0;
    for (int64_t g = 0; g < mobie_n_groups(n); g++) {
        int32_t sum = 0;
        for (int b = 0; b < mobie_group_blocks(n, g); b++, w++, q += MOBIE_BLOCK_LEN) {
            int32_t block_sum = 0;
            for (int j = 0; j < MOBIE_BLOCK_LEN; j++) {
                block_sum += w->signs[j / 8] >> (j % 8) & 1 ? q[j] : -q[j];
            }
            sum += w->scale * block_sum;
        }
        y += mobie_act_scale(act, n, g) * (float) sum;
    }
    return y * MOBIE_UNIT;
}

static void matmul(int64_t n, const mobie_block * w, size_t row_bytes, int64_t n_rows, const void * const * act,
                   float * const * y, int64_t n_act, void *) {
    for (int64_t t = 0; t < n_act; t++) {
        for (int64_t r = 0; r < n_rows; r++) {
            y[t][r] = dot(n, (const mobie_block *) ((const char *) w + r * row_bytes), act[t]);
        }
    }
}

const mobie_kernels mobie_kernels_ref = { "ref", quantize_act, matmul, 0 };

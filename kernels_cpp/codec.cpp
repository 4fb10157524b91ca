// Rows of floats to blocks and back: FORMAT.md, "The block" and "From floats to blocks".
#include <math.h>
#include <string.h>

#include "mobie.h"

static const float UNIT = 0x1p-7f;

size_t mobie_act_size(int64_t n) {
    const size_t n_groups = (n + MOBIE_GROUP_LEN - 1) / MOBIE_GROUP_LEN;
    return ((size_t) n + n_groups * sizeof(mobie_act_group) + 63) / 64 * 64;
}

void mobie_quantize_row(const float * x, mobie_block * y, int64_t n) {
    for (int64_t b = 0; b < n / MOBIE_BLOCK_LEN; b++, x += MOBIE_BLOCK_LEN) {
        double sum = 0;  // in the order of the columns: the sum of 64 magnitudes may round
        for (int j = 0; j < MOBIE_BLOCK_LEN; j++) {
            sum += fabs((double) x[j]);
        }
        const double code = rint(sum / MOBIE_BLOCK_LEN / UNIT);  // halves to even

        memset(&y[b], 0, sizeof(y[b]));
        y[b].scale = code < 255 ? (uint8_t) code : 255;  // NaN too: a row with NaN must not become zeros
        if (y[b].scale == 0) {
            continue;  // zero blocks are nine zero bytes
        }
        for (int j = 0; j < MOBIE_BLOCK_LEN; j++) {
            y[b].signs[j / 8] |= (x[j] >= 0) << (j % 8);
        }
    }
}

void mobie_dequantize_row(const mobie_block * x, float * y, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        const mobie_block * b    = &x[i / MOBIE_BLOCK_LEN];
        const int           j    = i % MOBIE_BLOCK_LEN;
        const int           code = b->signs[j / 8] >> (j % 8) & 1 ? b->scale : -b->scale;
        y[i]                     = (float) code * UNIT;  // from the integer, so that a zero is never a negative zero
    }
}

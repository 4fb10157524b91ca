// What the kernel files for 64-bit ARM share: the work per token.
#ifndef MOBIE_KERNELS_NEON_H
#define MOBIE_KERNELS_NEON_H

#include <arm_neon.h>

#include "kernels.h"

static void quantize_act(const float * x, void * act, int64_t n) {
    for (int64_t g = 0; g < mobie_n_groups(n); g++) {
        const int     n_vec = 16 * mobie_group_blocks(n, g);  // of 4 floats
        const float * xg    = x + g * MOBIE_GROUP_LEN;
        int8_t *      q     = (int8_t *) act + g * MOBIE_GROUP_LEN;

        // Magnitudes compared as integers: the order of floats, with infinity and then NaN on top.
        uint32x4_t top = vdupq_n_u32(0);
        for (int i = 0; i < n_vec; i++) {
            top = vmaxq_u32(top, vreinterpretq_u32_f32(vabsq_f32(vld1q_f32(xg + 4 * i))));
        }
        const float     max   = mobie_float_of_bits((int32_t) vmaxvq_u32(top));
        mobie_act_group group = { mobie_act_scale_of(max), {} };

        const float32x4_t inv  = vdupq_n_f32(mobie_act_inverse_of(max));
        const int32x4_t   keep = vdupq_n_s32(max <= MOBIE_ACT_MAX ? -1 : 0);
        for (int b = 0; b < n_vec / 16; b++) {
            int32x4_t sums = vdupq_n_s32(0);
            for (int i = 16 * b; i < 16 * b + 16; i += 2) {
                int32x4_t v[2];
                for (int k = 0; k < 2; k++) {
                    v[k] = vandq_s32(vcvtnq_s32_f32(vmulq_f32(vld1q_f32(xg + 4 * (i + k)), inv)), keep);
                    sums = vaddq_s32(sums, v[k]);
                }
                vst1_s8(q + 4 * i, vmovn_s16(vcombine_s16(vmovn_s32(v[0]), vmovn_s32(v[1]))));
            }
            group.sums[b] = (int16_t) vaddvq_s32(sums);
        }
        mobie_set_act_group(act, n, g, group);
    }
    mobie_clear_act_padding(act, n);
}

#endif

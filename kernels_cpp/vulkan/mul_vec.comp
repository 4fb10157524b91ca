#version 450
// Products for few tokens: every (token, used) pair reads its expert. A workgroup has 32 rows of one pair. Sixteen
// threads share the blocks of four rows; each keeps its block of activations for all four.
#extension GL_GOOGLE_include_directive : require
#include "product.glsl"

layout(local_size_x = 128) in;

layout(binding = 0) readonly buffer I { uint ids[]; };

const uint LANES = 16, ROWS = 4, WORKGROUP_ROWS = 128 / LANES * ROWS;
const uint MAX_GROUPS = 16, MAX_BLOCKS = MAX_GROUPS * GROUP_BLOCKS;  // at a time

shared int   products[WORKGROUP_ROWS][MAX_BLOCKS];
shared float scaled[WORKGROUP_ROWS][MAX_GROUPS];

void main() {
    const uint thread = gl_LocalInvocationIndex, lane = thread % LANES;
    const uint first_row = gl_WorkGroupID.x * WORKGROUP_ROWS, my_row = thread / LANES * ROWS;
    const uint pair = gl_WorkGroupID.y;
    const uint expert =
        p.n_expert == 0 ? 0 : min(ids[p.ids_first + pair / p.n_used * p.ids_stride + pair % p.n_used], p.n_expert - 1);
    const uint act_at = act_row_of(pair) * n_groups() * GROUP_PARTS;

    precise float sum = 0.0;  // of row `thread`
    for (uint first_group = 0; first_group < n_groups(); first_group += MAX_GROUPS) {
        const uint count = min(n_groups() - first_group, MAX_GROUPS), first_block = first_group * GROUP_BLOCKS;
        for (uint i = lane; i < count * GROUP_BLOCKS; i += LANES) {
            const uint group_at = act_at + (first_group + i / GROUP_BLOCKS) * GROUP_PARTS;
            const uint at = group_at + i % GROUP_BLOCKS * BLOCK_PARTS;
            const uvec4 first[2] = { act[at], act[at + 1] }, second[2] = { act[at + 2], act[at + 3] };
            const uint magnitude = act[group_at + GROUP_SUMS][i % GROUP_BLOCKS];
            // beyond a row's end all activations are zero, whatever the weights
            const uint block = min(first_block + i, p.n_blocks - 1);
            [[unroll]] for (uint r = 0; r < ROWS; r++) {
                const uint row = min(first_row + my_row + r, p.n_rows - 1);
                products[my_row + r][i] = dot_block(weights_at(expert, row, block), first, second, magnitude);
            }
        }
        barrier();
        for (uint i = thread; i < WORKGROUP_ROWS * count; i += 128) {
            const uint row = i / count, group = i % count, at = group * GROUP_BLOCKS;
            const int whole =
                products[row][at] + products[row][at + 1] + products[row][at + 2] + products[row][at + 3];
            const uint part = act_at + (first_group + group) * GROUP_PARTS + GROUP_SCALE;
            precise float product = uintBitsToFloat(act[part].x) * float(whole);
            scaled[row][group] = product;
        }
        barrier();
        if (thread < WORKGROUP_ROWS) {
            for (uint group = 0; group < count; group++) {
                sum = sum + scaled[thread][group];
            }
        }
        barrier();
    }
    if (thread < WORKGROUP_ROWS && first_row + thread < p.n_rows) {
        y[p.y_first + pair * p.y_stride + first_row + thread] = finished(sum, expert);
    }
}

#version 450
// Products for many tokens: a workgroup has 64 rows of one expert and up to 32 of its tokens, in shared memory group by
// group. A thread has four rows and four tokens.
#extension GL_GOOGLE_include_directive : require
#include "product.glsl"

layout(local_size_x = 128) in;

layout(binding = 0) readonly buffer R { uint routing[]; };  // as route.comp makes it

const uint ROWS = 4, ROW_THREADS = 16, TILE_ROWS = ROWS * ROW_THREADS;
const uint TOKENS = 4, TOKEN_THREADS = 8, TILE_TOKENS = TOKENS * TOKEN_THREADS;

shared uvec4 parts[TILE_TOKENS][GROUP_SUMS + 1];  // without the scale; an odd number of uvec4, for the banks
shared float scales[TILE_TOKENS];
shared uvec4 weights[GROUP_BLOCKS][TILE_ROWS];    // signs, signs, scale
shared uint  act_rows[TILE_TOKENS], pairs[TILE_TOKENS];

void main() {
    const uint thread = gl_LocalInvocationIndex;
    const uint first_row = gl_WorkGroupID.x * TILE_ROWS, expert = gl_WorkGroupID.y;
    const uint first_token = gl_WorkGroupID.z * TILE_TOKENS;
    const uint begin = p.n_expert == 0 ? 0 : routing[2 * expert];
    const uint total = p.n_expert == 0 ? p.n_tokens : routing[2 * expert + 1];
    if (first_token >= total) {
        return;
    }
    const uint count = min(total - first_token, TILE_TOKENS);
    if (thread < count) {
        const uint token = begin + first_token + thread, pair = p.n_expert == 0 ? token : routing[2 * p.n_expert + token];
        pairs[thread] = pair;
        act_rows[thread] = act_row_of(pair);
    }

    const uint my_row = thread % ROW_THREADS, my_token = thread / ROW_THREADS;  // and every sixteenth, every eighth
    precise float sum[ROWS][TOKENS];
    [[unroll]] for (uint r = 0; r < ROWS; r++) {
        [[unroll]] for (uint t = 0; t < TOKENS; t++) {
            sum[r][t] = 0.0;
        }
    }
    for (uint group = 0; group < n_groups(); group++) {
        barrier();
        for (uint i = thread; i < count * GROUP_PARTS; i += 128) {
            const uint token = i / GROUP_PARTS, part = i % GROUP_PARTS;
            const uvec4 value = act[(act_rows[token] * n_groups() + group) * GROUP_PARTS + part];
            if (part == GROUP_SCALE) {
                scales[token] = uintBitsToFloat(value.x);
            } else {
                parts[token][part] = value;
            }
        }
        for (uint i = thread; i < TILE_ROWS * GROUP_BLOCKS; i += 128) {
            const uint row = i / GROUP_BLOCKS, block = i % GROUP_BLOCKS;
            // beyond a row's end all activations are zero, whatever the weights
            const block_bits b = weights_at(expert, min(first_row + row, p.n_rows - 1),
                                            min(group * GROUP_BLOCKS + block, p.n_blocks - 1));
            weights[block][row] = uvec4(b.signs, b.scale, 0);
        }
        barrier();
        int whole[ROWS][TOKENS];
        [[unroll]] for (uint r = 0; r < ROWS; r++) {
            [[unroll]] for (uint t = 0; t < TOKENS; t++) {
                whole[r][t] = 0;
            }
        }
        for (uint block = 0; block < GROUP_BLOCKS; block++) {
            block_bits b[ROWS];
            [[unroll]] for (uint r = 0; r < ROWS; r++) {
                const uvec4 value = weights[block][my_row + r * ROW_THREADS];
                b[r] = block_bits(value.xy, value.z);
            }
            [[unroll]] for (uint t = 0; t < TOKENS; t++) {
                if (t * TOKEN_THREADS < count) {
                    const uint token = my_token + t * TOKEN_THREADS, at = block * BLOCK_PARTS;
                    const uvec4 first[2] = { parts[token][at], parts[token][at + 1] };
                    const uvec4 second[2] = { parts[token][at + 2], parts[token][at + 3] };
                    const uint magnitude = parts[token][GROUP_SUMS][block];
                    [[unroll]] for (uint r = 0; r < ROWS; r++) {
                        whole[r][t] += dot_block(b[r], first, second, magnitude);
                    }
                }
            }
        }
        [[unroll]] for (uint t = 0; t < TOKENS; t++) {
            const float scale_of_group = scales[my_token + t * TOKEN_THREADS];
            [[unroll]] for (uint r = 0; r < ROWS; r++) {
                precise float product = scale_of_group * float(whole[r][t]);
                sum[r][t] = sum[r][t] + product;
            }
        }
    }
    [[unroll]] for (uint t = 0; t < TOKENS; t++) {
        const uint token = my_token + t * TOKEN_THREADS;
        if (token < count) {
            [[unroll]] for (uint r = 0; r < ROWS; r++) {
                const uint row = first_row + my_row + r * ROW_THREADS;
                if (row < p.n_rows) {
                    y[p.y_first + pairs[token] * p.y_stride + row] = finished(sum[r][t], expert);
                }
            }
        }
    }
}

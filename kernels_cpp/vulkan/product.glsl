// What the two shaders of products share.
#extension GL_GOOGLE_include_directive : require
#include "mobie.glsl"

layout(push_constant) uniform parameters {
    uint w_first;       // byte of the first block
    uint row_bytes;     // distance of two rows
    uint expert_bytes;  // distance of two experts
    uint n_rows;        // of an expert
    uint n_blocks;      // of a row
    uint n_expert;      // 0: one matrix, and token t has row t of the activations
    uint n_tokens;
    uint n_used;         // experts of a token
    uint n_rows_of_act;  // rows of activations of a token: 1, or n_used
    uint act_first;      // row of the activations
    uint ids_first;
    uint ids_stride;     // distance of two tokens
    uint has_scale;
    uint scale_first;
    uint y_first;
    uint y_stride;       // distance of two (token, used) rows
} p;

layout(binding = 2) readonly buffer W { uint w[]; };
layout(binding = 1) readonly buffer A { uvec4 act[]; };
layout(binding = 3) readonly buffer S { float scale[]; };  // of an expert
layout(binding = 4) writeonly buffer Y { float y[]; };

uint n_groups() {
    return (p.n_blocks + GROUP_BLOCKS - 1) / GROUP_BLOCKS;
}

block_bits weights_at(uint expert, uint row, uint block) {
    const uint byte = p.w_first + expert * p.expert_bytes + row * p.row_bytes + block * BLOCK_BYTES;
    const uint word = byte / 4;
    return take_block(w[word], w[word + 1], w[word + 2], byte % 4);
}

// What becomes of the sum over a row's groups.
float finished(float sum, uint expert) {
    precise float result = sum * UNIT;
    if (p.has_scale != 0) {
        result *= scale[p.scale_first + expert];
    }
    return result;
}

// Row of the activations of a (token, used) pair.
uint act_row_of(uint pair) {
    return p.act_first + pair / p.n_used * p.n_rows_of_act + pair % p.n_used % p.n_rows_of_act;
}

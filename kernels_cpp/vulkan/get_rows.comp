#version 450
// Rows of a tensor, decoded.
#extension GL_GOOGLE_include_directive : require
#include "mobie.glsl"

layout(local_size_x = 64) in;

layout(push_constant) uniform parameters {
    uint n;                // columns, a multiple of 64
    uint w_first;          // byte of the first block
    uint w1, w2, w3;       // distances in bytes
    uint ne0, ne1, ne2;    // of the ids
    uint ids_first;
    uint i0, i1, i2;       // distances of the ids
    uint y_first;
    uint y1, y2, y3;       // distances of the results
} p;

layout(binding = 0) readonly buffer W { uint w[]; };
layout(binding = 1) readonly buffer I { uint ids[]; };
layout(binding = 2) writeonly buffer Y { float y[]; };

void main() {
    const uint column = gl_GlobalInvocationID.x;
    if (column >= p.n) {
        return;
    }
    for (uint i = gl_WorkGroupID.y; i < p.ne0 * p.ne1 * p.ne2; i += gl_NumWorkGroups.y) {
        const uint at0 = i % p.ne0, at1 = i / p.ne0 % p.ne1, at2 = i / p.ne0 / p.ne1;
        const uint id = ids[p.ids_first + at0 * p.i0 + at1 * p.i1 + at2 * p.i2];
        const uint byte = p.w_first + id * p.w1 + at1 * p.w2 + at2 * p.w3 + column / BLOCK_LEN * BLOCK_BYTES;
        const block_bits b = take_block(w[byte / 4], w[byte / 4 + 1], w[byte / 4 + 2], byte % 4);
        const bool plus = (b.signs[column / 32 % 2] >> column % 32 & 1) != 0;
        // from the integer, so that a zero is never a negative zero
        y[p.y_first + at0 * p.y1 + at1 * p.y2 + at2 * p.y3 + column] = float(plus ? int(b.scale) : -int(b.scale)) * UNIT;
    }
}

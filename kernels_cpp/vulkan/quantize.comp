#version 450
// Rows of floats -> groups of quantized activations, as mobie.glsl lays them out. A workgroup has a group of 256
// columns. Everything but one product per column is done in integers, since devices may approximate quotients.
#extension GL_GOOGLE_include_directive : require
#include "mobie.glsl"

layout(local_size_x = 64) in;

layout(push_constant) uniform parameters {
    uint n;              // columns, a multiple of 64
    uint n_groups;       // of a row
    uint n_rows;         // ne1 * ne2 * ne3
    uint ne1, ne2;
    uint first;          // of the first row; all in floats
    uint s1, s2, s3;     // distance of rows
} p;

layout(binding = 0) readonly buffer X { uint x[]; };  // the bits of floats
layout(binding = 1) writeonly buffer A { uint act[]; };

const uint GROUP_LEN = BLOCK_LEN * GROUP_BLOCKS, COLUMNS = GROUP_LEN / 64;

const uint MANTISSA = 0x7fffff, HIDDEN = 0x800000, INFINITE = 0x7f800000, NO_NUMBER = 0x7fc00000;
const uint TINY = 27 << 23;                // 2^-100: below, a group counts as zero
const uint SEVENS = 127 << 17;             // 127 with 24 bits, as a mantissa has them

shared uint value[GROUP_LEN];              // |q|, and bit 7: plus
shared uint largest, sums[GROUP_BLOCKS];

// A quotient of 25 or 26 bits, `more`: and a remainder -> the float `quotient` 2^(exponent - 150), nearest, ties to even
uint rounded(uint quotient, bool more, uint exponent) {
    const uint extra = findMSB(quotient) - 23, tie = 1 << (extra - 1);
    const uint rest = quotient & (2 * tie - 1);
    uint mantissa = quotient >> extra;
    if (rest > tie || (rest == tie && (more || (mantissa & 1) != 0))) {
        mantissa++;
    }
    return (exponent + extra << 23) + (mantissa - HIDDEN);
}

// max / 127
uint scale_of(uint max) {
    const uint mantissa = (max & MANTISSA) | HIDDEN, exponent = max >> 23;
    return rounded((mantissa << 8) / 127, (mantissa << 8) % 127 != 0, exponent - 8);
}

// 127 / max
uint inverse_of(uint max) {
    const uint mantissa = (max & MANTISSA) | HIDDEN, exponent = max >> 23;
    uint quotient = SEVENS >= mantissa ? 1 : 0, rest = SEVENS - quotient * mantissa;
    for (uint i = 0; i < 25; i++) {
        rest *= 2;
        const uint bit = rest >= mantissa ? 1 : 0;
        rest -= bit * mantissa;
        quotient = 2 * quotient + bit;
    }
    return rounded(quotient, rest != 0, 258 - exponent);
}

void main() {
    const uint thread = gl_LocalInvocationIndex, group = gl_WorkGroupID.x;
    for (uint row = gl_WorkGroupID.y; row < p.n_rows; row += gl_NumWorkGroups.y) {
        const uint from = p.first + row % p.ne1 * p.s1 + row / p.ne1 % p.ne2 * p.s2 + row / p.ne1 / p.ne2 * p.s3;
        if (thread == 0) {
            largest = 0;
        }
        if (thread < GROUP_BLOCKS) {
            sums[thread] = 0;
        }
        barrier();
        uint bits[COLUMNS];
        [[unroll]] for (uint i = 0; i < COLUMNS; i++) {
            const uint column = group * GROUP_LEN + 64 * i + thread;
            bits[i] = column < p.n ? x[from + column] : 0;
            atomicMax(largest, bits[i] & 0x7fffffff);
        }
        barrier();
        const bool finite = largest < INFINITE, zero = largest < TINY;
        const float inverse = uintBitsToFloat(!finite || zero ? 0 : inverse_of(largest));
        [[unroll]] for (uint i = 0; i < COLUMNS; i++) {
            const precise float q = roundEven(uintBitsToFloat(finite ? bits[i] : 0) * inverse);
            value[64 * i + thread] = uint(abs(q)) | (q < 0 ? 0 : 128);
            atomicAdd(sums[i], uint(abs(q)));
        }
        barrier();
        // a thread has a bit of 32 columns
        const uint word = thread / 8, bit = thread % 8, to = 4 * GROUP_PARTS * (row * p.n_groups + group);
        uint plane = 0;
        for (uint i = 0; i < 32; i++) {
            plane |= (value[32 * word + i] >> bit & 1) << i;
        }
        act[to + thread] = plane;
        if (thread < GROUP_BLOCKS) {
            act[to + 4 * GROUP_SUMS + thread] = sums[thread];
        }
        if (thread == 0) {
            act[to + 4 * GROUP_SCALE] = !finite ? NO_NUMBER : zero ? 0 : scale_of(largest);
        }
        barrier();
    }
}

// What the shaders share: blocks of weights, groups of quantized activations, and their product in integers.
//
// Activations are stored by bits. Of 32 of them, as FORMAT.md's "Products" rounds them, one word holds bit 0 of all
// magnitudes, seven words hold all of their bits, and an eighth word which ones are plus. A word of signs of the
// weights, xor that eighth word, then says which products are negative, and a bit of all of them is counted at once:
//
//     sum +-q = sum |q|  -  2 sum_k 2^k bitCount((signs ^ plus) & magnitudes_k)
//
// So a block of 64 weights takes 14 ands and 14 counts, and neither weights nor activations are ever unpacked. It needs
// no extension: no 8-bit types, no dot product, no subgroups.
#extension GL_EXT_control_flow_attributes : require

const uint BLOCK_LEN = 64, BLOCK_BYTES = 9, GROUP_BLOCKS = 4;

// A group of 256 activations in uvec4: four for each block (for each of its two words: magnitudes 0 to 3, then
// magnitudes 4 to 6 and plus), then sum |q| of the four blocks, then the group's scale in the bits of a float.
const uint BLOCK_PARTS = 4, GROUP_SUMS = 16, GROUP_SCALE = 17, GROUP_PARTS = 18;

// What the integer sums of a row are multiplied by at the end.
const float UNIT = 1.0 / 128.0;

// A block: two words of signs, and its scale.
struct block_bits {
    uvec2 signs;
    uint  scale;
};

// A block is 9 bytes and starts anywhere: taken out of the three words it lies in, from byte `at` (0 to 3) on.
block_bits take_block(uint w0, uint w1, uint w2, uint at) {
    const uint up = 8 * at, down = 24 - up;
    return block_bits(uvec2(w0 >> up >> 8 | w1 << down, w1 >> up >> 8 | w2 << down), w0 >> up & 0xff);
}

// scale * sum of +-q over a block. `first` and `second`: the words' parts; `magnitude`: sum |q|
int dot_block(block_bits w, uvec4 first[2], uvec4 second[2], uint magnitude) {
    const uvec2 negative = w.signs ^ uvec2(first[1].w, second[1].w);
    const ivec4 low      = bitCount(negative.x & first[0]) + bitCount(negative.y & second[0]);
    const ivec3 high     = bitCount(negative.x & first[1].xyz) + bitCount(negative.y & second[1].xyz);
    const int   sum = low.x + (low.y << 1) + (low.z << 2) + (low.w << 3) + (high.x << 4) + (high.y << 5) + (high.z << 6);
    return int(w.scale) * (int(magnitude) - 2 * sum);
}

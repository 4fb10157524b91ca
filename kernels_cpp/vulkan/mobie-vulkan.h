// Products with MoBiE weights on GPUs by Vulkan: the shaders of this folder, compiled, and what they are called with.
// No Vulkan header and no ggml header is needed.
//
// Buffers are storage buffers of 32-bit words; offsets and distances are in words of the buffer's type unless their
// name says bytes. The device needs nothing beyond Vulkan 1.2's core. Results are those of the CPU, bit for bit
// (FORMAT.md, "Products"), where the device rounds sums and products of floats to nearest even, as GPUs do; Vulkan
// leaves them the choice.
#ifndef MOBIE_VULKAN_H
#define MOBIE_VULKAN_H

#include <stddef.h>
#include <stdint.h>

typedef enum {
    MOBIE_VULKAN_QUANTIZE,  // x, act
    MOBIE_VULKAN_ROUTE,     // ids, routing
    MOBIE_VULKAN_MUL_VEC,   // ids, act, w, scale, y
    MOBIE_VULKAN_MUL_MAT,   // routing, act, w, scale, y
    MOBIE_VULKAN_GET_ROWS,  // w, ids, y
    MOBIE_VULKAN_SHADERS,
} mobie_vulkan_shader_id;

typedef struct {
    const char *     name;
    const uint32_t * code;  // SPIR-V
    size_t           code_bytes;
    uint32_t         parameter_bytes;  // of the push constants, a structure below
} mobie_vulkan_shader;

// All have this many bindings, which are to be bound even where fewer are used: drivers look at what an earlier shader
// left in a set (Mesa 22.3's lavapipe, at buffers that are gone). For the same reason act and routing, which may be
// made anew while sets are in use, come first, where every shader of the backend has a buffer.
enum { MOBIE_VULKAN_BUFFERS = 5 };

// By mobie_vulkan_shader_id.
extern const mobie_vulkan_shader mobie_vulkan_shaders[MOBIE_VULKAN_SHADERS];

// Rows of floats -> quantized activations, MOBIE_VULKAN_ACT_GROUP_BYTES for each group of 256 columns of a row.
// Workgroups: groups of a row; rows, or fewer.
enum { MOBIE_VULKAN_ACT_GROUP_BYTES = 288 };

typedef struct {
    uint32_t n;         // columns, a multiple of 64
    uint32_t n_groups;  // of a row
    uint32_t n_rows;    // ne1 * ne2 * ne3
    uint32_t ne1, ne2;
    uint32_t first;       // of the first row
    uint32_t s1, s2, s3;  // distance of rows
} mobie_vulkan_quantize;

// Which (token, used) pairs meet which expert: 2 n_expert + n_pairs words. Workgroups: n_expert.
typedef struct {
    uint32_t n_expert;
    uint32_t n_pairs;
    uint32_t n_used;
    uint32_t ids_first;
    uint32_t ids_stride;  // of two tokens
} mobie_vulkan_route;

// Both products. Workgroups of MUL_VEC: (rows / MOBIE_VULKAN_VEC_ROWS; pairs); of MUL_MAT: (rows /
// MOBIE_VULKAN_MAT_ROWS; n_expert, or 1 without; tokens / MOBIE_VULKAN_MAT_TOKENS).
enum { MOBIE_VULKAN_VEC_ROWS = 32, MOBIE_VULKAN_MAT_ROWS = 64, MOBIE_VULKAN_MAT_TOKENS = 32 };

// Up to this many tokens MUL_VEC is meant to be the faster one, without ids and with.
enum { MOBIE_VULKAN_VEC_TOKENS = 1, MOBIE_VULKAN_VEC_TOKENS_IDS = 8 };

typedef struct {
    uint32_t w_first_byte;
    uint32_t row_bytes;     // distance of two rows
    uint32_t expert_bytes;  // distance of two experts
    uint32_t n_rows;        // of an expert
    uint32_t n_blocks;      // of a row
    uint32_t n_expert;      // 0: one matrix, no ids, and token t has row t of the activations
    uint32_t n_tokens;
    uint32_t n_used;         // experts of a token; 1 without ids
    uint32_t n_rows_of_act;  // rows of activations of a token: 1, or n_used
    uint32_t act_first;      // row of the activations
    uint32_t ids_first;
    uint32_t ids_stride;  // of two tokens
    uint32_t has_scale;   // of the experts; otherwise 1
    uint32_t scale_first;
    uint32_t y_first;
    uint32_t y_stride;  // of two (token, used) rows
} mobie_vulkan_product;

// Rows of a tensor, decoded. Workgroups: columns / 64; ids, or fewer.
typedef struct {
    uint32_t n;  // columns, a multiple of 64
    uint32_t w_first_byte;
    uint32_t w1_bytes, w2_bytes, w3_bytes;  // distances
    uint32_t ne0, ne1, ne2;                 // of the ids
    uint32_t ids_first;
    uint32_t i0, i1, i2;  // distances of the ids
    uint32_t y_first;
    uint32_t y1, y2, y3;  // distances of the results
} mobie_vulkan_get_rows;

#endif

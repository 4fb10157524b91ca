// What the benchmarks of products share: types by name, random weights and activations.
#pragma once

#include <strings.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "ggml.h"

static std::mt19937 rng(1);

[[noreturn]] static void fail(const std::string & what) {
    fprintf(stderr, "%s\n", what.c_str());
    exit(1);
}

static inline ggml_type type_of(const std::string & name) {
    for (int i = 0; i < GGML_TYPE_COUNT; ++i) {
        const char * known = ggml_type_name((ggml_type) i);
        if (known && strcasecmp(known, name.c_str()) == 0) {
            return (ggml_type) i;
        }
    }
    fail("no type " + name);
}

static inline std::vector<float> normal(size_t n) {
    std::normal_distribution<float> d;
    std::vector<float>              x(n);
    for (float & v : x) {
        v = d(rng);
    }
    return x;
}

// Rows of random weights: a few quantized, then repeated.
static inline void fill(ggml_type type, char * data, int64_t n, int64_t n_rows) {
    const int64_t            made      = std::min<int64_t>(n_rows, 64);
    const size_t             row_bytes = ggml_row_size(type, n);
    const std::vector<float> x         = normal(made * n), importance(n, 1.0f);
    std::vector<char>        rows(made * row_bytes);
    ggml_quantize_chunk(type, x.data(), rows.data(), 0, made, n, importance.data());
    for (int64_t r = 0; r < n_rows; ++r) {
        memcpy(data + r * row_bytes, rows.data() + r * 37 % made * row_bytes, row_bytes);
    }
}

static inline std::vector<std::string> split(const char * list) {
    std::vector<std::string> parts;
    for (const char * at = list;; ++at) {
        const char * end = strchr(at, ',');
        parts.emplace_back(at, end ? end - at : strlen(at));
        if (!end) {
            return parts;
        }
        at = end;
    }
}

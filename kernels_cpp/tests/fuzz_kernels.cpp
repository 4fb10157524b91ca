// Codec, validation and products on inputs that libFuzzer makes (tools/fuzz.py builds and runs it).
//
// The input is a shape, activations and blocks. Checked: a kernel of this CPU or one with played tiles, another one
// from input to input, gives the reference's bits, writes all of its result and nothing beside it (AddressSanitizer),
// every pattern is valid and decodes to finite numbers, and what was decoded is quantized to the same blocks again.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <vector>

#include "ggml.h"
#include "mobie.h"

// Tiles in C++, which machines without AMX run, too: amx_played.cpp (no name: not for this compiler), tiles_plain.cpp.
extern "C" const mobie_kernels mobie_kernels_amx_played, mobie_kernels_tiles_plain;

namespace {

// The reference, what else this CPU runs, and what plays tiles.
std::vector<const mobie_kernels *> implementations() {
    int                                n;
    const mobie_kernels * const *      all = mobie_kernels_all(&n);
    std::vector<const mobie_kernels *> found(all, all + n);
    if (mobie_kernels_amx_played.name &&
        std::any_of(all, all + n, [](const mobie_kernels * k) { return !strcmp(k->name, "avx512vbmi"); })) {
        found.push_back(&mobie_kernels_amx_played);
    }
    found.push_back(&mobie_kernels_tiles_plain);
    return found;
}

// Bytes of the input, zeros beyond its end.
struct reader {
    const uint8_t * at;
    const uint8_t * end;

    uint8_t byte() { return at < end ? *at++ : 0; }

    void fill(void * to, size_t size) {
        const size_t n = (size_t) (end - at) < size ? end - at : size;
        memcpy(to, at, n);
        memset((char *) to + n, 0, size - n);
        at += n;
    }
};

void must(bool ok, const char * what, const char * who = "") {
    if (!ok) {
        fprintf(stderr, "WRONG: %s %s\n", what, who);
        abort();
    }
}

// The same bits; the payload of a NaN is not part of the contract.
bool same(const float * a, const float * b, size_t n) {
    for (size_t i = 0; i < n; i++) {
        if (memcmp(a + i, b + i, sizeof(*a)) != 0 && !(std::isnan(a[i]) && std::isnan(b[i]))) {
            return false;
        }
    }
    return true;
}

// Its work memory, of exactly the size it asks for, made once: new memory is the most expensive part of an input.
void * work_of(const mobie_kernels * kernels) {
    static std::map<const mobie_kernels *, void *> all;
    void *&                                        work = all[kernels];
    if (!work) {
        work = aligned_alloc(64, kernels->work_size);
    }
    return work;
}

void check_codec(const std::vector<mobie_block> & w, const std::vector<float> & x) {
    const int64_t      n = (int64_t) w.size() * MOBIE_BLOCK_LEN;
    std::vector<float> y(n);
    must(ggml_validate_row_data(GGML_TYPE_MOBIE, w.data(), w.size() * sizeof(mobie_block)), "a pattern is not valid");
    mobie_dequantize_row(w.data(), y.data(), n);
    std::vector<mobie_block> again(w.size());
    mobie_quantize_row(y.data(), again.data(), n);
    for (size_t b = 0; b < w.size(); b++) {
        const mobie_block zero = {};
        must(memcmp(&again[b], w[b].scale ? &w[b] : &zero, sizeof(zero)) == 0, "decoding and quantizing");
        for (int j = 0; j < MOBIE_BLOCK_LEN; j++) {
            must(std::fabs(y[b * MOBIE_BLOCK_LEN + j]) * 128 == w[b].scale, "decoding");
        }
    }
    std::vector<mobie_block> any(x.size() / MOBIE_BLOCK_LEN), chunk(any.size());
    mobie_quantize_row(x.data(), any.data(), x.size());
    const size_t written = ggml_quantize_chunk(GGML_TYPE_MOBIE, x.data(), chunk.data(), 0, 1, x.size(), nullptr);
    must(written == chunk.size() * sizeof(mobie_block) && memcmp(any.data(), chunk.data(), written) == 0,
         "ggml_quantize_chunk");
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t * data, size_t size) {
    reader        in       = { data, data + size };
    const int     which    = in.byte();        // kernel
    const bool    wide     = in.byte() == 77;  // past the thresholds of the blocked paths
    const int64_t n_blocks = 1 + in.byte() % (wide ? 40 : 6);
    const int64_t n_rows   = 1 + in.byte() % (wide ? 200 : 35);
    const int     tokens   = in.byte();
    const int64_t n_act    = 1 + (wide ? tokens % 80 : tokens < 192 ? tokens % 4 : tokens % 40);
    const size_t  padding  = in.byte() % 4 ? 0 : in.byte();  // between two rows
    const size_t  misalign = in.byte() % 4 ? 0 : in.byte() % 64;
    const int64_t n        = n_blocks * MOBIE_BLOCK_LEN;

    // a few rows of the input, again and again with other scales
    std::vector<float>       x(2 * n);
    std::vector<mobie_block> blocks(2 * n_blocks);
    in.fill(x.data(), x.size() * sizeof(float));
    in.fill(blocks.data(), blocks.size() * sizeof(mobie_block));
    check_codec(blocks, x);

    const size_t         packed = n_blocks * sizeof(mobie_block), row_bytes = packed + padding;
    std::vector<uint8_t> w(misalign + row_bytes * (n_rows - 1) + packed);  // nothing follows the last row
    for (int64_t r = 0; r < n_rows; r++) {
        mobie_block * row = (mobie_block *) (w.data() + misalign + r * row_bytes);
        memcpy(row, blocks.data() + r % 2 * n_blocks, packed);
        for (int64_t b = 0; b < n_blocks; b++) {
            row[b].scale += (uint8_t) (r / 2);
        }
    }

    static const auto    kernels  = implementations();
    const size_t         act_size = mobie_act_size(n);
    std::vector<uint8_t> ref_act(2 * act_size), act(2 * act_size + misalign);
    std::vector<float>   ref(n_act * n_rows), y(n_act * n_rows);
    const size_t         chosen = 1 + which % (kernels.size() - 1);
    for (size_t k = 0; k <= chosen; k += chosen) {
        memset(act.data(), 0xff, act.size());
        std::vector<const void *> act_rows;
        std::vector<float *>      y_rows;
        for (int i = 0; i < 2; i++) {
            kernels[k]->quantize_act(x.data() + i * n, act.data() + misalign + i * act_size, n);
        }
        if (k == 0) {
            memcpy(ref_act.data(), act.data() + misalign, ref_act.size());
        }
        must(memcmp(ref_act.data(), act.data() + misalign, ref_act.size()) == 0, "activations of", kernels[k]->name);
        std::vector<float> & out = k ? y : ref;
        memset(out.data(), 0xff, out.size() * sizeof(float));
        for (int64_t t = 0; t < n_act; t++) {
            act_rows.push_back(act.data() + misalign + t % 2 * act_size);
            y_rows.push_back(out.data() + t * n_rows);
        }
        kernels[k]->matmul(n, (const mobie_block *) (w.data() + misalign), row_bytes, n_rows, act_rows.data(),
                           y_rows.data(), n_act, work_of(kernels[k]));
        must(same(out.data(), ref.data(), out.size()), "products of", kernels[k]->name);
    }
    return 0;
}

// Checks and times every implementation this CPU runs, and checks in C++ what it does not run of AMX.
//
//   check_kernels [--seed N] [--vectors DIR] [--bench [MB]]
//
// Checked: bytes and float bits equal to those of the reference; the reference against a double-precision product of
// the decoded weights; both against the golden vectors. All buffers end at an unmapped page, and outputs start as NaN
// patterns, so that reading or writing beyond the end and not writing at all are found. Exit status 1 on any failure.
#if defined(__x86_64__)
#include <immintrin.h>
#endif
#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cinttypes>
#include <cmath>
#include <csignal>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <fstream>
#include <iterator>
#include <map>
#include <memory>
#include <random>
#include <sstream>
#include <string>
#include <vector>

#include "mobie.h"

#if defined(__has_feature)  // clang's way to say what GCC defines
#if __has_feature(address_sanitizer)
#define __SANITIZE_ADDRESS__ 1
#endif
#endif

#if defined(MOBIE_CHECK_EVEX)
extern "C" const mobie_kernels mobie_kernels_avxvnni_evex;  // avxvnni_evex.cpp
#endif
#if defined(MOBIE_CHECK_AMX_PLAYED)
extern "C" const mobie_kernels mobie_kernels_amx_played;  // amx_played.cpp
#endif
extern "C" {  // tiles_plain.cpp
extern const mobie_kernels mobie_kernels_tiles_plain;
void                       mobie_set_played_shapes(const uint8_t *), mobie_get_played_shapes(uint8_t *);
}

namespace {

// What this CPU runs, slowest ("ref") first, and what stands for an implementation that it does not run.
std::vector<const mobie_kernels *> implementations() {
    int                                n;
    const mobie_kernels * const *      all = mobie_kernels_all(&n);
    std::vector<const mobie_kernels *> found(all, all + n);
#if defined(MOBIE_CHECK_EVEX)
    const bool vex = std::any_of(all, all + n, [](const mobie_kernels * k) { return !strcmp(k->name, "avxvnni"); });
    if (!vex && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512vnni")) {
        found.push_back(&mobie_kernels_avxvnni_evex);
    }
#endif
#if defined(MOBIE_CHECK_AMX_PLAYED)
    const bool vbmi = std::any_of(all, all + n, [](const mobie_kernels * k) { return !strcmp(k->name, "avx512vbmi"); });
    if (vbmi && mobie_kernels_amx_played.name) {
        found.push_back(&mobie_kernels_amx_played);
    }
#endif
    found.push_back(&mobie_kernels_tiles_plain);
    return found;
}

// Bytes of work memory that are enough for any of them.
size_t most_work() {
    size_t most = 0;
    for (const mobie_kernels * k : implementations()) {
        most = std::max(most, k->work_size);
    }
    return most;
}

// --- bookkeeping -----------------------------------------------------------------------------------------------------

std::map<std::string, std::pair<int64_t, int64_t>> counts;  // name: checks, failures

// One check: counts it, and prints the message of a failure (the first 20 of each name).
__attribute__((format(printf, 3, 4))) bool check(bool ok, const std::string & name, const char * format, ...) {
    auto & [n, n_failed] = counts[name];
    n++;
    if (!ok && ++n_failed <= 20) {
        va_list args;
        va_start(args, format);
        printf("FAIL %s: ", name.c_str());
        vprintf(format, args);
        printf("\n");
        va_end(args);
    }
    return ok;
}

// size bytes that end at an unmapped page and start behind bytes nobody may change.
struct guarded {
    static constexpr uint8_t POISON = 0xff;  // floats of these bytes are NaN
    size_t                   page   = sysconf(_SC_PAGESIZE), used, mapped;
    uint8_t *                base;
    uint8_t *                data;

    explicit guarded(size_t size) : used(size), mapped((size + page - 1) / page * page + page) {
        base = (uint8_t *) mmap(nullptr, mapped + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (base == MAP_FAILED || mprotect(base + mapped, page, PROT_NONE) != 0) {
            perror("mmap");
            exit(2);
        }
        memset(base, POISON, mapped);
        data = base + mapped - size;
    }
    guarded(const guarded &) = delete;
    ~guarded() { munmap(base, mapped + page); }

    bool untouched_before() const {
        return std::all_of(base, data, [](uint8_t byte) { return byte == POISON; });
    }
    float * floats() { return (float *) data; }
};

uint32_t bits_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof(bits));
    return bits;
}

// Equal bits; the payload of a NaN is not part of the contract.
bool same(float a, float b) {
    return bits_of(a) == bits_of(b) || (std::isnan(a) && std::isnan(b));
}

// --- inputs ----------------------------------------------------------------------------------------------------------

using rng_t = std::mt19937_64;

enum weight_kind { W_RANDOM, W_EXTREME, W_ALL_PLUS, W_ALL_MINUS, W_ZERO, N_WEIGHT_KINDS };
enum act_kind { A_NORMAL, A_EXTREME, A_ZERO, A_DENORMAL, A_HUGE, A_OUTLIER, A_NOT_FINITE, N_ACT_KINDS };

// Any pattern of nine bytes is a valid block.
void fill_weights(mobie_block * w, int64_t n_blocks, weight_kind kind, rng_t & rng) {
    for (int64_t b = 0; b < n_blocks; b++) {
        const uint64_t signs = kind == W_ALL_PLUS ? ~0ull : kind == W_ALL_MINUS ? 0 : rng();
        w[b].scale           = kind == W_ZERO ? 0 : kind == W_RANDOM ? (uint8_t) rng() : 255;
        memcpy(w[b].signs, &signs, sizeof(signs));
    }
}

void fill_act(float * x, int64_t n, act_kind kind, rng_t & rng) {
    std::normal_distribution<float> normal;
    for (int64_t i = 0; i < n; i++) {
        const float v = normal(rng);
        switch (kind) {
            case A_EXTREME:
                x[i] = v < 0 ? -3.5f : 3.5f;
                break;  // q = +-127
            case A_ZERO:
                x[i] = v < 0 ? -0.0f : 0.0f;
                break;
            case A_DENORMAL:
                x[i] = ldexpf(v, i / MOBIE_GROUP_LEN % 2 ? -100 : -135);
                break;
            case A_HUGE:
                x[i] = v * 1e30f;
                break;
            case A_OUTLIER:
                x[i] = rng() % 300 ? v : v * 1000;
                break;
            case A_NOT_FINITE:
                x[i] = rng() % 100 ? v : rng() % 2 ? INFINITY : -NAN;
                break;
            default:
                x[i] = v;
                break;
        }
    }
}

// --- checks ----------------------------------------------------------------------------------------------------------

mobie_act_group act_group(const uint8_t * act, int64_t n, int64_t g) {
    mobie_act_group group;
    memcpy(&group, act + n + g * sizeof(group), sizeof(group));
    return group;
}

// The product in double precision from decoded weights and decoded activations, and a bound of the float result's
// distance: 2^-24 relative for each rounded product, sum and conversion, of the sum of magnitudes.
void brute_force(int64_t n, const mobie_block * w, const uint8_t * act, double * y, double * bound) {
    std::vector<float> weight(n);
    mobie_dequantize_row(w, weight.data(), n);
    double magnitudes = 0;
    *y                = 0;
    int n_groups      = 0;
    for (int64_t begin = 0; begin < n; begin += MOBIE_GROUP_LEN, n_groups++) {
        const float d     = act_group(act, n, n_groups).scale;
        double      group = 0;
        for (int64_t i = begin; i < std::min(n, begin + MOBIE_GROUP_LEN); i++) {
            group += (double) weight[i] * (int8_t) act[i] * d;
        }
        *y += group;
        magnitudes += fabs(group);
    }
    *bound = (n_groups + 1) * 0x1.1p-24 * magnitudes;
}

// A quantized activation is within half a step, and the largest of a group is 127 steps.
void check_act_laws(const float * x, const uint8_t * act, int64_t n) {
    for (int64_t begin = 0, g = 0; begin < n; begin += MOBIE_GROUP_LEN, g++) {
        const int64_t end     = std::min(n, begin + MOBIE_GROUP_LEN);
        const float   d       = act_group(act, n, g).scale;
        float         max     = 0;
        bool          finite  = true;
        int           sums[4] = {};
        for (int64_t i = begin; i < end; i++) {
            max    = std::max(max, fabsf(x[i]));
            finite = finite && std::isfinite(x[i]);
        }
        if (!finite) {
            check(std::isnan(d), "act laws", "scale %g of a group that is not finite", d);
            continue;
        }
        bool ok = max < 0x1p-100f ? d == 0 : d == max / 127;
        for (int64_t i = begin; i < end; i++) {
            sums[(i - begin) / MOBIE_BLOCK_LEN] += (int8_t) act[i];
            ok = ok && fabs((double) x[i] - (double) d * (int8_t) act[i]) <= (d == 0 ? 0x1p-100 : 0.50001 * d);
        }
        ok = ok && std::equal(sums, sums + 4, act_group(act, n, g).sums);
        check(ok, "act laws", "n %" PRId64 " group %" PRId64 " max %g scale %g", n, g, max, d);
    }
}

// What is being computed, for the message of a crash: an access beyond a buffer ends at the unmapped page behind it.
char         what[200];
const char * running = "";

void on_crash(int) {
    const char * parts[] = { "FAIL ", running, ": access beyond the end of a buffer: ", what, "\n" };
    for (const char * part : parts) {
        if (write(STDOUT_FILENO, part, strlen(part)) < 0) {
            break;
        }
    }
    _exit(1);
}

struct problem {
    int64_t     n, n_rows, n_act;
    size_t      row_padding;  // bytes between two rows
    int         misalign;     // of weights and activations
    weight_kind w;
    act_kind    a;
};

void check_problem(const problem & p, rng_t & rng) {
    const auto kernels   = implementations();
    const int  n_kernels = (int) kernels.size();
    snprintf(what, sizeof(what),
             "n %" PRId64 " rows %" PRId64 " tokens %" PRId64 " padding %zu misalign %d kinds %d %d", p.n, p.n_rows,
             p.n_act, p.row_padding, p.misalign, p.w, p.a);

    const size_t packed = p.n / MOBIE_BLOCK_LEN * sizeof(mobie_block), row_bytes = packed + p.row_padding;
    guarded      weights(row_bytes * (p.n_rows - 1) + packed);  // nothing follows the last row
    for (int64_t r = 0; r < p.n_rows; r++) {
        fill_weights((mobie_block *) (weights.data + r * row_bytes), p.n / MOBIE_BLOCK_LEN, p.w, rng);
    }
    const auto row = [&](int64_t r) { return (const mobie_block *) (weights.data + r * row_bytes); };

    // Activations end at the guard where misalign is 0, else start at an odd address.
    const size_t                      act_size = mobie_act_size(p.n);
    std::vector<std::vector<uint8_t>> ref_act(p.n_act, std::vector<uint8_t>(act_size));
    guarded                           x(p.n * sizeof(float)), act((act_size + p.misalign) * p.n_act);
    std::vector<const void *>         act_rows(p.n_act);
    for (int64_t t = 0; t < p.n_act; t++) {
        fill_act(x.floats(), p.n, p.a, rng);
        running = kernels[0]->name;
        kernels[0]->quantize_act(x.floats(), ref_act[t].data(), p.n);
        check_act_laws(x.floats(), ref_act[t].data(), p.n);
        for (int k = 1; k < n_kernels; k++) {
            guarded out(act_size + p.misalign);
            running = kernels[k]->name;
            kernels[k]->quantize_act(x.floats(), out.data, p.n);
            check(memcmp(out.data, ref_act[t].data(), act_size) == 0 && out.untouched_before() &&
                      std::all_of(out.data + act_size, out.data + act_size + p.misalign,
                                  [](uint8_t b) { return b == guarded::POISON; }),
                  kernels[k]->name, "activations: %s", what);
        }
        // Tokens in reverse, so that nothing relies on their order in memory.
        uint8_t * place = act.data + (act_size + p.misalign) * (p.n_act - 1 - t) + p.misalign;
        memcpy(place, ref_act[t].data(), act_size);
        act_rows[t] = place;
    }

    std::vector<std::vector<float>> ref(p.n_act);
    for (int k = 0; k < n_kernels; k++) {
        std::vector<std::unique_ptr<guarded>> y;
        std::vector<float *>                  y_rows;
        for (int64_t t = 0; t < p.n_act; t++) {
            y.push_back(std::make_unique<guarded>(p.n_rows * sizeof(float)));
            y_rows.push_back(y.back()->floats());
        }
        guarded work(kernels[k]->work_size);
        check((uintptr_t) work.data % 64 == 0, kernels[k]->name, "work memory of no multiple of 64");
        running = kernels[k]->name;
        kernels[k]->matmul(p.n, row(0), row_bytes, p.n_rows, act_rows.data(), y_rows.data(), p.n_act, work.data);
        check(work.untouched_before(), kernels[k]->name, "wrote before the work memory: %s", what);
        for (int64_t t = 0; t < p.n_act; t++) {
            check(y[t]->untouched_before(), kernels[k]->name, "wrote before the result: %s", what);
            if (k == 0) {
                ref[t].assign(y_rows[t], y_rows[t] + p.n_rows);
            }
            for (int64_t r = 0; r < p.n_rows; r++) {
                if (k > 0) {
                    check(same(y_rows[t][r], ref[t][r]), kernels[k]->name,
                          "row %" PRId64 " token %" PRId64 ": %a, ref %a: %s", r, t, y_rows[t][r], ref[t][r], what);
                } else if (p.a != A_NOT_FINITE) {
                    double truth, bound;
                    brute_force(p.n, row(r), ref_act[t].data(), &truth, &bound);
                    check(fabs(y_rows[t][r] - truth) <= bound, "ref",
                          "row %" PRId64 " token %" PRId64 ": %.9g, wanted %.9g +- %.2g: %s", r, t, y_rows[t][r], truth,
                          bound, what);
                }
            }
        }
    }
}

void check_kernels(rng_t & rng) {
    const int64_t widths[] = { 64, 128, 192, 256, 320, 768, 1408, 2048, 2880 };
    for (const int64_t n : widths) {
        for (int64_t n_act = 1; n_act <= 9; n_act++) {
            for (int w = 0; w < N_WEIGHT_KINDS; w++) {
                for (int a = 0; a < N_ACT_KINDS; a++) {
                    if (w != W_RANDOM && a > A_EXTREME && n > 256) {
                        continue;  // the reference is slow
                    }
                    check_problem({ n, 1 + (int64_t) (rng() % 19), n_act, rng() % 2 ? rng() % 100 : 0,
                                    (int) (rng() % 2 ? rng() % 64 : 0), (weight_kind) w, (act_kind) a },
                                  rng);
                }
            }
        }
    }
    // Past the thresholds of the blocked paths: tiles of 32, 64 and 128 rows, batches of 16 and 64 tokens, spans of
    // 1024 columns.
    for (int64_t n_rows : { 1, 31, 33, 47, 48, 64, 65, 127, 129, 200 }) {
        for (int64_t n_act : { 1, 2, 7, 16, 33 }) {
            check_problem({ 320, n_rows, n_act, 0, 0, W_RANDOM, A_NORMAL }, rng);
            check_problem({ 1408, n_rows, n_act, 5, 1, W_EXTREME, A_EXTREME }, rng);
        }
    }
    for (int64_t n_act = 1; n_act <= 40; n_act++) {
        check_problem({ 1088, 50 + (int64_t) (rng() % 90), n_act, 0, 0, W_RANDOM, A_NORMAL }, rng);
    }
    for (int64_t n_act : { 47, 48, 49, 63, 64, 65, 81 }) {
        check_problem({ 832, 1 + (int64_t) (rng() % 140), n_act, rng() % 2 ? 7u : 0u, 0, W_EXTREME, A_EXTREME }, rng);
    }
    for (int64_t n_act : { 100, 257 }) {
        check_problem({ 2048, 70, n_act, 0, 0, W_RANDOM, A_OUTLIER }, rng);
    }
    for (int64_t n_act : { 1, 2, 5, 16, 17 }) {  // more columns than there is room for tables or activations
        check_problem({ 17 * 1024 + 192, 50, n_act, 0, 0, W_RANDOM, A_NORMAL }, rng);
    }
}

// Threads of musl have 128 KB, so nothing large may lie on the stack. A frame too large is a crash.
void check_stack() {
#if !defined(__SANITIZE_ADDRESS__)
    const auto products = [](void *) -> void * {
        const int64_t             n = 2048, n_rows = 200, n_act = 33;
        static mobie_block        w[n_rows * n / MOBIE_BLOCK_LEN];
        static float              x[n], y[n_act][n_rows];
        std::vector<uint8_t>      act(mobie_act_size(n));
        std::vector<const void *> act_rows(n_act, act.data());
        std::vector<float *>      y_rows;
        std::transform(y, y + n_act, std::back_inserter(y_rows), [](float * row) { return row; });
        for (const mobie_kernels * k : implementations()) {
            guarded work(k->work_size);
            k->quantize_act(x, act.data(), n);
            for (const int64_t tokens : { (int64_t) 1, n_act }) {
                k->matmul(n, w, n / MOBIE_BLOCK_LEN * sizeof(mobie_block), n_rows, act_rows.data(), y_rows.data(),
                          tokens, work.data);
            }
        }
        return nullptr;
    };
    running = "on a small stack";
    pthread_attr_t attr;
    pthread_t      thread;
    pthread_attr_init(&attr);
    if (check(!pthread_attr_setstacksize(&attr, 128 << 10) && !pthread_create(&thread, &attr, products, nullptr),
              "stack", "no thread with a small one")) {
        pthread_join(thread, nullptr);
    }
    pthread_attr_destroy(&attr);
#endif
}

// The shapes of AMX's tiles belong to the whole thread, and others set them once: a product leaves them as it finds
// them. Of played tiles everywhere, of the registers where there are any.
#if defined(MOBIE_CHECK_AMX_PLAYED)
__attribute__((target("amx-tile"))) void set_shapes(const uint8_t * c) {
    __asm__ volatile("ldtilecfg (%0)" : : "r"(c) : "memory");
}
__attribute__((target("amx-tile"))) void get_shapes(uint8_t * c) {
    __asm__ volatile("sttilecfg (%0)" : : "r"(c) : "memory");
}
#endif

void check_shapes_are_kept(const mobie_kernels * k, void (*set)(const uint8_t *), void (*get)(uint8_t *)) {
    for (const int in_use : { 0, 1 }) {
        uint8_t before[64]          = {}, after[64];
        before[0]                   = (uint8_t) in_use;  // 0: none, as after TILERELEASE
        before[16]                  = in_use ? 48 : 0;   // of tile 0: bytes of a row, rows
        before[48]                  = in_use ? 7 : 0;
        const int64_t             n = 256, n_rows = 40, n_act = 20;
        std::vector<mobie_block>  w(n_rows * n / MOBIE_BLOCK_LEN);
        std::vector<float>        x(n, 1.0f), y(n_rows);
        std::vector<uint8_t>      act(mobie_act_size(n));
        std::vector<const void *> act_rows(n_act, act.data());
        std::vector<float *>      y_rows(n_act, y.data());
        guarded                   work(k->work_size);
        k->quantize_act(x.data(), act.data(), n);
        set(before);
        k->matmul(n, w.data(), n / MOBIE_BLOCK_LEN * sizeof(mobie_block), n_rows, act_rows.data(), y_rows.data(), n_act,
                  work.data);
        get(after);
        check(memcmp(before, after, sizeof(before)) == 0, k->name, "other shapes of tiles than before, %s in use",
              in_use ? "some" : "none");
    }
    const uint8_t none[64] = {};
    set(none);
}

void check_shapes_are_kept() {
    check_shapes_are_kept(&mobie_kernels_tiles_plain, mobie_set_played_shapes, mobie_get_played_shapes);
#if defined(MOBIE_CHECK_AMX_PLAYED)
    for (const mobie_kernels * k : implementations()) {
        if (strcmp(k->name, "amx") == 0) {
            check_shapes_are_kept(k, set_shapes, get_shapes);
        }
    }
#endif
}

void check_codec(rng_t & rng) {
    for (const int64_t n : { 64, 192, 2880 }) {
        for (int kind = 0; kind < N_ACT_KINDS; kind++) {
            guarded x(n * sizeof(float)), blocks(n / 64 * sizeof(mobie_block)), y(n * sizeof(float));
            fill_act(x.floats(), n, (act_kind) kind, rng);
            mobie_block * w = (mobie_block *) blocks.data;
            mobie_quantize_row(x.floats(), w, n);
            mobie_dequantize_row(w, y.floats(), n);
            bool ok = blocks.untouched_before() && y.untouched_before();
            for (int64_t i = 0; i < n; i++) {
                const mobie_block & b   = w[i / 64];
                const int           j   = i % 64;
                double              sum = 0;
                for (int k = 0; k < 64; k++) {
                    sum += fabs((double) x.floats()[i - j + k]);
                }
                const double code = std::isnan(sum) ? 255 : std::min(255.0, nearbyint(sum / 64 * 128));
                const float  want = code == 0 ? 0.0f : (float) (x.floats()[i] >= 0 ? code : -code) / 128;
                ok                = ok && b.scale == code && bits_of(y.floats()[i]) == bits_of(want);
            }
            check(ok, "codec", "n %" PRId64 " kind %d", n, kind);

            // Again from the decoded weights: the same bytes (zero blocks have zero signs).
            std::vector<mobie_block> again(n / 64);
            mobie_quantize_row(y.floats(), again.data(), n);
            check(memcmp(again.data(), w, n / 64 * sizeof(mobie_block)) == 0, "codec",
                  "not idempotent: n %" PRId64 " kind %d", n, kind);
        }
    }
    for (int scale = 0; scale < 256; scale++) {
        mobie_block b      = { (uint8_t) scale, {} };
        b.signs[rng() % 8] = (uint8_t) rng();
        float y[64];
        mobie_dequantize_row(&b, y, 64);
        bool ok = true;
        for (int j = 0; j < 64; j++) {
            const float magnitude = scale / 128.0f;
            ok = ok && bits_of(y[j]) == bits_of(scale && !(b.signs[j / 8] >> (j % 8) & 1) ? -magnitude : magnitude);
        }
        check(ok, "codec", "decoding scale %d", scale);
    }
}

// --- golden vectors --------------------------------------------------------------------------------------------------

// A file of cases: lines "case NAME", then "FIELD HEX" with little-endian bytes; '#' starts a comment.
using fields = std::map<std::string, std::vector<uint8_t>>;

template <typename F>
void for_each_case(const std::string & path, const F & f) {
    std::ifstream file(path);
    if (!check(file.good(), "vectors", "cannot read %s", path.c_str())) {
        return;
    }
    std::string line, name;
    fields      current;
    const auto  finish = [&] {
        if (!name.empty()) {
            f(name, current);
        }
        current.clear();
    };
    while (std::getline(file, line)) {
        std::istringstream words(line);
        std::string        key, value;
        words >> key >> value;
        if (key == "case") {
            finish();
            name = value;
        } else if (!key.empty() && key[0] != '#') {
            for (size_t i = 0; i + 1 < value.size(); i += 2) {
                current[key].push_back((uint8_t) std::stoi(value.substr(i, 2), nullptr, 16));
            }
        }
    }
    finish();
}

template <typename T>
std::vector<T> as(const std::vector<uint8_t> & bytes) {
    std::vector<T> values(bytes.size() / sizeof(T));
    memcpy(values.data(), bytes.data(), values.size() * sizeof(T));
    return values;
}

void check_vectors(const std::string & dir) {
    for_each_case(dir + "/decode.txt", [](const std::string & name, fields & c) {
        const int64_t      n = c["floats"].size() / sizeof(float);
        std::vector<float> y(n);
        mobie_dequantize_row(as<mobie_block>(c["blocks"]).data(), y.data(), n);
        check(n > 0 && memcmp(y.data(), c["floats"].data(), c["floats"].size()) == 0, "vectors", "decode %s",
              name.c_str());
    });
    for_each_case(dir + "/quantize.txt", [](const std::string & name, fields & c) {
        const int64_t        n = c["floats"].size() / sizeof(float);
        std::vector<uint8_t> blocks(c["blocks"].size());
        mobie_quantize_row(as<float>(c["floats"]).data(), (mobie_block *) blocks.data(), n);
        check(n > 0 && blocks == c["blocks"], "vectors", "quantize %s", name.c_str());
    });
    for_each_case(dir + "/product.txt", [](const std::string & name, fields & c) {
        const auto               kernels   = implementations();
        const int                n_kernels = (int) kernels.size();
        const std::vector<float> x         = as<float>(c["activations"]);
        const std::vector<float> want      = as<float>(c["result"]);
        const int64_t            n         = x.size();
        const size_t             row_bytes = n / MOBIE_BLOCK_LEN * sizeof(mobie_block);
        for (int k = 0; k < n_kernels; k++) {
            std::vector<uint8_t> act(mobie_act_size(n), 0xff);
            kernels[k]->quantize_act(x.data(), act.data(), n);
            check(act == c["quantized"], "vectors", "product %s, activations, %s", name.c_str(), kernels[k]->name);

            std::vector<float> y(want.size(), NAN);
            const void *       act_row = act.data();
            float *            y_row   = y.data();
            guarded            work(kernels[k]->work_size);
            kernels[k]->matmul(n, as<mobie_block>(c["blocks"]).data(), row_bytes, y.size(), &act_row, &y_row, 1,
                               work.data);
            check(!want.empty() && c["blocks"].size() == row_bytes * want.size() &&
                      std::equal(y.begin(), y.end(), want.begin(), same),
                  "vectors", "product %s, result, %s", name.c_str(), kernels[k]->name);
        }
    });
}

// --- benchmark -------------------------------------------------------------------------------------------------------

// Seconds that this thread has run, so that what else the machine does counts only where it slows the core down.
double now() {
    timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return (double) t.tv_sec + 1e-9 * (double) t.tv_nsec;
}

double median(std::vector<double> v) {
    std::sort(v.begin(), v.end());
    return v[v.size() / 2];
}

// Reads size bytes; the result depends on all of them.
uint64_t read_all(const uint8_t * data, size_t size) {
    uint64_t sum[16] = {};
    for (size_t i = 0; i + sizeof(sum) <= size; i += sizeof(sum)) {
        uint64_t v[16];
        memcpy(v, data + i, sizeof(v));
        for (int k = 0; k < 16; k++) {
            sum[k] += v[k];
        }
    }
    uint64_t total = 0;
    for (const uint64_t s : sum) {
        total += s;
    }
    return total;
}

// Products of int8 per second, in 10^9: what the widest dot product instruction does with operands in registers.
#if defined(__x86_64__)
__attribute__((target("avx512f,avx512vnni"))) uint64_t dot_products_512(int64_t rounds) {
    __m512i       sum[12] = {};
    const __m512i x       = _mm512_set1_epi8(1);
    for (int64_t i = 0; i < rounds; i++) {
#pragma GCC unroll 12
        for (int k = 0; k < 12; k++) {
            sum[k] = _mm512_dpbusd_epi32(sum[k], x, x);
            __asm__ volatile("" : "+v"(sum[k]));  // keep the loop
        }
    }
    return rounds * 12 * 64;
}
#endif

// 0 where the bench knows no such instruction.
double int8_peak() {
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512vnni")) {
        std::vector<double> speeds;
        for (int i = 0; i < 15; i++) {
            const double   start    = now();
            const uint64_t products = dot_products_512(500000);
            speeds.push_back(products / (now() - start) * 1e-9);
        }
        return median(speeds);
    }
#endif
    return 0;
}

// Median seconds of each function, in alternation so that a slow moment of the machine meets all of them.
template <typename F>
std::vector<double> time_in_turns(int n_functions, int rounds, const F & f) {
    std::vector<std::vector<double>> seconds(n_functions);
    for (int round = 0; round < rounds + 1; round++) {  // the first warms up
        for (int k = 0; k < n_functions; k++) {
            const double start = now();
            f(k);
            if (round > 0) {
                seconds[k].push_back(now() - start);
            }
        }
    }
    std::vector<double> medians;
    for (const auto & s : seconds) {
        medians.push_back(median(s));
    }
    return medians;
}

// A layer's matrices in a prompt: every token goes to 8 of 128 experts, weights and results are in memory.
void bench_experts(rng_t & rng, int64_t n, int64_t n_rows) {
    constexpr int                 n_experts = 128, n_tokens = 512, n_used = 8;
    int                           n_kernels;
    const mobie_kernels * const * kernels   = mobie_kernels_all(&n_kernels);
    const size_t                  row_bytes = n / MOBIE_BLOCK_LEN * sizeof(mobie_block);
    std::vector<mobie_block>      w(n_experts * n_rows * (n / MOBIE_BLOCK_LEN));
    fill_weights(w.data(), w.size(), W_RANDOM, rng);
    std::vector<float>   x(n), y((size_t) n_tokens * n_used * n_rows + 16);
    std::vector<uint8_t> act(mobie_act_size(n) * n_tokens + 64);
    const auto           aligned = [](auto * p) { return p + (64 - (uintptr_t) p % 64) % 64 / sizeof(*p); };

    std::vector<std::vector<const void *>> act_rows(n_experts);
    std::vector<std::vector<float *>>      y_rows(n_experts);
    std::vector<int>                       ids(n_experts);
    for (int e = 0; e < n_experts; e++) {
        ids[e] = e;
    }
    for (int t = 0; t < n_tokens; t++) {
        uint8_t * row = aligned(act.data()) + t * mobie_act_size(n);
        fill_act(x.data(), n, A_NORMAL, rng);
        kernels[0]->quantize_act(x.data(), row, n);
        std::shuffle(ids.begin(), ids.end(), rng);
        for (int i = 0; i < n_used; i++) {
            act_rows[ids[i]].push_back(row);
            y_rows[ids[i]].push_back(aligned(y.data()) + ((size_t) t * n_used + i) * n_rows);
        }
    }
    guarded    work(most_work());
    const auto s = time_in_turns(n_kernels - 1, 9, [&](int k) {
        for (int e = 0; e < n_experts; e++) {
            kernels[k + 1]->matmul(n, w.data() + e * n_rows * (n / MOBIE_BLOCK_LEN), row_bytes, n_rows,
                                   act_rows[e].data(), y_rows[e].data(), act_rows[e].size(), work.data);
        }
    });
    printf("%d experts of %" PRId64 " x %" PRId64 ", %d for each of %d tokens:", n_experts, n_rows, n, n_used,
           n_tokens);
    for (int k = 1; k < n_kernels; k++) {
        printf("  %s %.1f", kernels[k]->name, (double) n_tokens * n_used * n_rows * n / s[k - 1] * 1e-9);
    }
    printf("\n");
}

void bench(rng_t & rng, size_t megabytes) {
    int                           n_kernels;
    const mobie_kernels * const * kernels   = mobie_kernels_all(&n_kernels);
    const int64_t                 n         = 2048;
    const size_t                  row_bytes = n / MOBIE_BLOCK_LEN * sizeof(mobie_block);
    const int64_t                 n_rows    = (megabytes << 20) / row_bytes;
    std::vector<mobie_block>      w(n_rows * (n / MOBIE_BLOCK_LEN));
    fill_weights(w.data(), w.size(), W_RANDOM, rng);

    const int                 max_act = 512;
    std::vector<float>        x(n), y((size_t) std::max<int64_t>(n_rows, 768 * max_act));
    std::vector<uint8_t>      act(mobie_act_size(n) * max_act + 64);
    uint8_t *                 aligned = act.data() + (64 - (uintptr_t) act.data() % 64) % 64;
    std::vector<const void *> act_rows;
    std::vector<float *>      y_rows;
    for (int t = 0; t < max_act; t++) {
        fill_act(x.data(), n, A_NORMAL, rng);
        kernels[0]->quantize_act(x.data(), aligned + t * mobie_act_size(n), n);
        act_rows.push_back(aligned + t * mobie_act_size(n));
    }

    // One token, weights from memory. The reference does a 64th.
    printf("one token, %zu MB of weights, rows of %" PRId64 ", one thread, medians\n", megabytes, n);
    y_rows = { y.data() };
    guarded           work(most_work());
    volatile uint64_t sink;
    const auto        share   = [&](int k) { return k == 0 ? n_rows / 64 : n_rows; };
    const auto        seconds = time_in_turns(n_kernels + 1, 15, [&](int k) {
        if (k == n_kernels) {
            sink = read_all((const uint8_t *) w.data(), n_rows * row_bytes);
        } else {
            kernels[k]->matmul(n, w.data(), row_bytes, share(k), act_rows.data(), y_rows.data(), 1, work.data);
        }
    });
    (void) sink;
    const double read = n_rows * row_bytes / seconds[n_kernels] * 1e-9;
    for (int k = 0; k < n_kernels; k++) {
        const double bytes = share(k) * row_bytes / seconds[k] * 1e-9;
        printf("  %-12s %8.2f Gweights/s %7.2f GB/s %4.0f %% of a plain read\n", kernels[k]->name,
               share(k) * n / seconds[k] * 1e-9, bytes, 100 * bytes / read);
    }
    printf("  %-12s %27.2f GB/s\n", "plain read", read);

    // Several tokens, one expert's matrix, in cache.
    const int64_t expert_rows = std::min<int64_t>(768, n_rows);
    const double  peak        = int8_peak();
    printf("%" PRId64 " x %" PRId64 " in cache, 10^9 products/s", expert_rows, n);
    if (peak > 0) {
        printf(" (share of %.0f, vpdpbusd of 512 bits alone)", peak);
    }
    printf("\n");
    for (const int n_act : { 1, 2, 3, 4, 8, 32, 128, 512 }) {
        y_rows.clear();
        for (int t = 0; t < n_act; t++) {
            y_rows.push_back(y.data() + t * expert_rows);
        }
        const int  repeats = std::max(1, 64 / n_act);
        const auto s       = time_in_turns(n_kernels - 1, 9, [&](int k) {
            for (int i = 0; i < repeats; i++) {
                kernels[k + 1]->matmul(n, w.data(), row_bytes, expert_rows, act_rows.data(), y_rows.data(), n_act,
                                       work.data);
            }
        });
        printf("  %3d tokens:", n_act);
        for (int k = 1; k < n_kernels; k++) {
            const double speed = (double) repeats * n_act * expert_rows * n / s[k - 1] * 1e-9;
            printf("  %s %.1f", kernels[k]->name, speed);
            if (peak > 0) {
                printf(" (%.0f %%)", 100 * speed / peak);
            }
        }
        printf("\n");
    }
    bench_experts(rng, 2048, 768);
    bench_experts(rng, 768, 2048);

    const auto s = time_in_turns(n_kernels, 9, [&](int k) {
        for (int i = 0; i < 1000; i++) {
            kernels[k]->quantize_act(x.data(), aligned, n);
        }
    });
    for (int k = 0; k < n_kernels; k++) {
        printf("quantize_act %-12s %7.2f Gvalues/s\n", kernels[k]->name, 1000 * n / s[k] * 1e-9);
    }
}

}  // namespace

int main(int argc, char ** argv) {
    uint64_t    seed      = std::random_device{}();
    size_t      megabytes = 0;
    std::string vectors;
    for (int i = 1; i < argc; i++) {
        const std::string arg       = argv[i];
        const bool        has_value = i + 1 < argc && argv[i + 1][0] != '-';
        if (arg == "--seed" && has_value) {
            seed = strtoull(argv[++i], nullptr, 0);
        } else if (arg == "--vectors" && has_value) {
            vectors = argv[++i];
        } else if (arg == "--bench") {
            megabytes = has_value ? strtoull(argv[++i], nullptr, 0) : 256;
        } else {
            fprintf(stderr, "unknown argument %s\nusage: check_kernels [--seed N] [--vectors DIR] [--bench [MB]]\n",
                    argv[i]);
            return 2;
        }
    }

    const auto kernels   = implementations();
    const int  n_kernels = (int) kernels.size();
    printf("seed %" PRIu64 ", implementations:", seed);
    for (int k = 0; k < n_kernels; k++) {
        printf(" %s%s", kernels[k]->name, kernels[k] == mobie_kernels_best() ? " (chosen)" : "");
    }
    printf("\n");

    setvbuf(stdout, nullptr, _IOLBF, 0);
    signal(SIGSEGV, on_crash);
    signal(SIGBUS, on_crash);
    rng_t rng(seed);
    check_codec(rng);
    check_kernels(rng);
    check_stack();
    check_shapes_are_kept();
    if (!vectors.empty()) {
        check_vectors(vectors);
    }
    int64_t n_failed = 0;
    for (const auto & [name, count] : counts) {
        printf("%-12s %9" PRId64 " checks, %" PRId64 " failed\n", name.c_str(), count.first, count.second);
        n_failed += count.second;
    }
    if (n_failed == 0 && megabytes > 0) {
        bench(rng, megabytes);
    }
    return n_failed ? 1 : 0;
}

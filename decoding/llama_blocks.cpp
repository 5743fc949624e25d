// Blocks of a Llama on a few rows (a decoding step, a verification), and the products that they are made of.
//
// Decoding is bound by reading the weights: every product here reads them once, at the memory's speed, whatever the number of rows.
// Each row's sums are added in the same order in passes of any width, so a token gets the very same bits whether it
// is decoded alone or verified among others. Sums in fp32; W is float, or bf16 as uint16_t. Vectors of 16 floats,
// which the compiler splits where the machine has narrower ones.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>
#include <omp.h>

typedef float floats __attribute__((vector_size(64)));
typedef uint16_t halves __attribute__((vector_size(32)));
typedef uint32_t words __attribute__((vector_size(64)));
typedef float four __attribute__((vector_size(16)));
constexpr int64_t LANES = 16;
constexpr int64_t AHEAD = 8192;  // bytes of prefetch: without it products of two or more rows take twice the time

// ---- numbers ----

static inline floats load(const float* from) {
    floats v;
    std::memcpy(&v, from, sizeof v);
    return v;
}

static inline floats load(const uint16_t* from) {  // bf16 is the upper half of a float
    halves h;
    std::memcpy(&h, from, sizeof h);
    return (floats)(__builtin_convertvector(h, words) << 16);
}

static inline float to_float(float v) { return v; }

static inline float to_float(uint16_t v) {
    uint32_t bits = uint32_t(v) << 16;
    float f;
    std::memcpy(&f, &bits, sizeof f);
    return f;
}

static inline void store(float v, float* to) { *to = v; }

static inline void store(float v, uint16_t* to) {  // to nearest, ties to even
    uint32_t bits;
    std::memcpy(&bits, &v, sizeof bits);
    *to = uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

static inline void store(floats v, float* to) { std::memcpy(to, &v, sizeof v); }

static inline void store(floats v, uint16_t* to) {
    words bits = (words)v;
    halves h = __builtin_convertvector((bits + 0x7fff + ((bits >> 16) & 1)) >> 16, halves);
    std::memcpy(to, &h, sizeof h);
}

// What is left of a number, or of 16, that is stored as W.
template <typename W, typename V>
static inline V rounded(V v) {
    W stored[sizeof(V) / sizeof(float)];
    store(v, stored);
    if constexpr (sizeof(V) == sizeof(float)) return to_float(stored[0]);
    else return load(stored);
}

template <typename W>
static inline floats load_or_zero(const W* from, int64_t at) { return from ? load(from + at) : floats{}; }

// ---- products ----

// The sums of four vectors' lanes: interleave and add until each lane of a quarter holds one partial sum of each.
static inline four sums(floats a, floats b, floats c, floats d) {
    floats ab = __builtin_shufflevector(a, b, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29) +
                __builtin_shufflevector(a, b, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
    floats cd = __builtin_shufflevector(c, d, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29) +
                __builtin_shufflevector(c, d, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
    floats abcd = __builtin_shufflevector(ab, cd, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
                  __builtin_shufflevector(ab, cd, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
    return (__builtin_shufflevector(abcd, abcd, 0, 1, 2, 3) + __builtin_shufflevector(abcd, abcd, 4, 5, 6, 7)) +
           (__builtin_shufflevector(abcd, abcd, 8, 9, 10, 11) + __builtin_shufflevector(abcd, abcd, 12, 13, 14, 15));
}

// out[4 t] = four rows of w (each of length k) times row t of x, for T rows.
template <int T, typename W>
static inline void four_products(const W* w, const float* x, four* out, int64_t k) {
    floats total[T][4] = {};
    int64_t i = 0;
    for (; i + LANES <= k; i += LANES) {
        floats column[T];
        for (int t = 0; t < T; t++) column[t] = load(x + t * k + i);
        for (int r = 0; r < 4; r++) {
            floats weights = load(w + r * k + i);
            __builtin_prefetch(w + r * k + i + AHEAD / sizeof(W));
            for (int t = 0; t < T; t++) total[t][r] += weights * column[t];
        }
    }
    for (int t = 0; t < T; t++) {
        four& sum = out[4 * t] = sums(total[t][0], total[t][1], total[t][2], total[t][3]);
        for (int64_t j = i; j < k; j++)
            for (int r = 0; r < 4; r++) sum[r] += to_float(w[r * k + j]) * x[t * k + j];
    }
}

// The same for any number of rows, in groups whose sums stay in 24 of the 32 vector registers.
template <typename W>
static inline void four_products(const W* w, const float* x, four* out, int64_t k, int64_t rows) {
    while (rows > 0) {
        int64_t group = rows <= 6 ? rows : rows < 12 ? (rows + 1) / 2 : 6;
        switch (group) {
            case 1: four_products<1>(w, x, out, k); break;
            case 2: four_products<2>(w, x, out, k); break;
            case 3: four_products<3>(w, x, out, k); break;
            case 4: four_products<4>(w, x, out, k); break;
            case 5: four_products<5>(w, x, out, k); break;
            default: four_products<6>(w, x, out, k);
        }
        rows -= group;
        x += group * k;
        out += 4 * group;
    }
}

// out[t] = sixteen rows of w times row t of x.
template <typename W>
static inline void products(const W* w, const float* x, floats* out, int64_t k, int64_t rows) {
    for (int64_t quarter = 0; quarter < 4; quarter++) four_products(w + 4 * quarter * k, x, (four*)out + quarter, k, rows);
}

// ---- one pass ----

template <typename W>
struct Block {
    const W *qkv, *qkv_bias, *out, *out_bias, *gate_up, *gate_up_bias, *down, *down_bias, *attention_norm, *mlp_norm;
    W *keys, *values;  // of the first text (kv_heads, capacity, head_dim)
};

struct Shape {
    int64_t hidden, heads, kv_heads, head_dim, intermediate, capacity, text_stride;  // the last: from one text's keys to the next's
    float eps;
};

// T rows; the keys and values of row t go to slot slots[t] of text texts[t]. A row sees its text up to its own slot. With `visible` (T, T)
// all rows are the first text's and lie behind `start` slots that each sees, besides the rows j with visible[t, j].
template <typename W>
struct Rows {
    int64_t count;
    const int64_t *slots, *texts;
    int64_t start;
    const W *cos, *sin;  // (T, head_dim), of which the first half is read, and (T, head_dim / 2)
    const uint8_t* visible;
};

template <typename W>
static void norm(const float* x, const W* weight, float* out, int64_t rows, int64_t size, float eps) {
    for (int64_t t = 0; t < rows; t++) {
        float square = 0;
        for (int64_t i = 0; i < size; i++) square += x[t * size + i] * x[t * size + i];
        float scale = 1 / std::sqrt(square / size + eps);
        for (int64_t i = 0; i < size; i++) out[t * size + i] = rounded<W>(rounded<W>(x[t * size + i] * scale) * to_float(weight[i]));
    }
}

template <typename W>
static void rotate(float* head, const W* cos, const W* sin, int64_t half) {
    for (int64_t i = 0; i < half; i++) {
        float a = head[i], b = head[i + half], c = to_float(cos[i]), s = to_float(sin[i]);
        head[i] = rounded<W>(a * c - b * s);
        head[i + half] = rounded<W>(b * c + a * s);
    }
}

struct Scratch {  // of one thread
    std::vector<float> normed, queries, scores;
    std::vector<floats> sums;
};

// Rotates the queries and keys of one key-value head in qkv (T, heads + 2 kv_heads, head_dim), and stores its keys and values.
template <typename W>
static void place(const Block<W>& block, const Shape& shape, const Rows<W>& rows, int64_t kv, float* qkv) {
    const int64_t size = shape.head_dim, groups = shape.heads / shape.kv_heads;
    for (int64_t t = 0; t < rows.count; t++) {
        const W *cos = rows.cos + t * size, *sin = rows.sin + t * size / 2;
        float* row = qkv + t * (shape.heads + 2 * shape.kv_heads) * size;
        float *key = row + (shape.heads + kv) * size, *value = key + shape.kv_heads * size;
        const int64_t slot = rows.texts[t] * shape.text_stride + (kv * shape.capacity + rows.slots[t]) * size;
        rotate(key, cos, sin, size / 2);
        for (int64_t g = 0; g < groups; g++) rotate(row + (kv * groups + g) * size, cos, sin, size / 2);
        for (int64_t i = 0; i < size; i++) store(key[i], block.keys + slot + i);
        for (int64_t i = 0; i < size; i++) store(value[i], block.values + slot + i);
    }
}

// The weights that a query gives to the first `seen` slots, from its scores; what it does not see among the pass's rows weighs 0.
static float soften(float* score, int64_t seen, int64_t start, const uint8_t* visible) {
    for (int64_t s = start; visible && s < seen; s++)
        if (!visible[s - start]) score[s] = -1e30f;
    float most = -1e30f, total = 0;
    for (int64_t s = 0; s < seen; s++) most = score[s] > most ? score[s] : most;
    for (int64_t s = 0; s < seen; s++) score[s] = std::exp(score[s] - most);
    for (int64_t s = 0; s < seen; s++) total += score[s];
    return total;
}

// The query heads of key-value head `kv` in row t: qkv (T, heads + 2 kv_heads, head_dim) -> attended (T, heads, head_dim).
template <typename W>
static void attend(const Block<W>& block, const Shape& shape, const Rows<W>& rows, int64_t kv, int64_t t, const float* qkv, float* attended, Scratch& own) {
    const int64_t size = shape.head_dim, groups = shape.heads / shape.kv_heads;
    const int64_t seen = rows.visible ? rows.start + rows.count : rows.slots[t] + 1, padded = (seen + 3) / 4 * 4;
    const int64_t first = rows.texts[t] * shape.text_stride + kv * shape.capacity * size;
    const W *keys = block.keys + first, *values = block.values + first;
    const float* query = qkv + (t * (shape.heads + 2 * shape.kv_heads) + kv * groups) * size;
    float* out = attended + (t * shape.heads + kv * groups) * size;
    own.queries.resize(groups * size);
    own.scores.resize(groups * padded);
    own.sums.resize(groups);
    four* sums = (four*)own.sums.data();
    const float scale = 1 / std::sqrt(float(size));
    for (int64_t i = 0; i < groups * size; i++) own.queries[i] = query[i] * scale;
    for (int64_t s = 0; s < padded; s += 4) {
        four_products(keys + s * size, own.queries.data(), sums, size, groups);
        for (int64_t g = 0; g < groups; g++) std::memcpy(&own.scores[g * padded + s], sums + 4 * g, sizeof(four));
    }
    for (int64_t g = 0; g < groups; g++) {
        float* score = &own.scores[g * padded];
        const float total = soften(score, seen, rows.start, rows.visible ? rows.visible + t * rows.count : nullptr);
        for (int64_t i = 0; i < size; i += LANES) {
            floats mixed[4] = {};  // four chains of additions: one alone would wait for itself
            int64_t s = 0;
            for (; s + 4 <= seen; s += 4)
                for (int c = 0; c < 4; c++) mixed[c] += score[s + c] * load(values + (s + c) * size + i);
            for (; s < seen; s++) mixed[0] += score[s] * load(values + s * size + i);
            store(rounded<W>(((mixed[0] + mixed[1]) + (mixed[2] + mixed[3])) / total), out + g * size + i);
        }
    }
}

// x (T, hidden) += in (T, inner) times w (hidden, inner) transposed; for the threads of a parallel region.
template <typename W>
static void add_product(const W* w, const W* bias, const float* in, int64_t inner, float* x, int64_t hidden, int64_t rows, Scratch& own) {
    own.sums.resize(rows);
#pragma omp for schedule(static)
    for (int64_t n = 0; n < hidden; n += LANES) {
        products(w + n * inner, in, own.sums.data(), inner, rows);
        for (int64_t t = 0; t < rows; t++) {
            float* to = x + t * hidden + n;
            store(rounded<W>(load(to) + rounded<W>(own.sums[t] + load_or_zero(bias, n))), to);
        }
    }
}

static inline floats silu(floats v) {
    float powers[LANES];
    store(-v, powers);
    for (int64_t i = 0; i < LANES; i++) powers[i] = std::exp(powers[i]);
    return v / (1 + load(powers));
}

template <typename W>
static void run_block(const Block<W>& block, const Shape& shape, const Rows<W>& rows, float* x, float* qkv, float* attended, float* gated, Scratch& own) {
    const int64_t count = rows.count, width = (shape.heads + 2 * shape.kv_heads) * shape.head_dim;
    own.normed.resize(count * shape.hidden);
    own.sums.resize(count);
    norm(x, block.attention_norm, own.normed.data(), count, shape.hidden, shape.eps);
#pragma omp for schedule(static)
    for (int64_t n = 0; n < width; n += LANES) {
        products(block.qkv + n * shape.hidden, own.normed.data(), own.sums.data(), shape.hidden, count);
        for (int64_t t = 0; t < count; t++) store(rounded<W>(own.sums[t] + load_or_zero(block.qkv_bias, n)), qkv + t * width + n);
    }
#pragma omp for schedule(static)
    for (int64_t kv = 0; kv < shape.kv_heads; kv++) place(block, shape, rows, kv, qkv);
#pragma omp for schedule(static) collapse(2)
    for (int64_t t = 0; t < count; t++)
        for (int64_t kv = 0; kv < shape.kv_heads; kv++) attend(block, shape, rows, kv, t, qkv, attended, own);
    add_product(block.out, block.out_bias, attended, shape.heads * shape.head_dim, x, shape.hidden, count, own);
    norm(x, block.mlp_norm, own.normed.data(), count, shape.hidden, shape.eps);
    own.sums.resize(2 * count);
#pragma omp for schedule(static)
    for (int64_t n = 0; n < shape.intermediate; n += LANES) {
        floats *gate = own.sums.data(), *up = gate + count;
        products(block.gate_up + n * shape.hidden, own.normed.data(), gate, shape.hidden, count);
        products(block.gate_up + (shape.intermediate + n) * shape.hidden, own.normed.data(), up, shape.hidden, count);
        for (int64_t t = 0; t < count; t++) {
            floats g = rounded<W>(gate[t] + load_or_zero(block.gate_up_bias, n));
            floats u = rounded<W>(up[t] + load_or_zero(block.gate_up_bias, shape.intermediate + n));
            store(rounded<W>(rounded<W>(silu(g)) * u), gated + t * shape.intermediate + n);
        }
    }
    add_product(block.down, block.down_bias, gated, shape.intermediate, x, shape.hidden, count, own);
}

template <typename W>
static void run_blocks(const Block<W>* blocks, int64_t number, const Shape& shape, const Rows<W>& rows, W* x, int threads) {
    static thread_local std::vector<float> wide, qkv, attended, gated;
    wide.resize(rows.count * shape.hidden);
    qkv.resize(rows.count * (shape.heads + 2 * shape.kv_heads) * shape.head_dim);
    attended.resize(rows.count * shape.heads * shape.head_dim);
    gated.resize(rows.count * shape.intermediate);
    for (size_t i = 0; i < wide.size(); i++) wide[i] = to_float(x[i]);
    float *shared_x = wide.data(), *shared_qkv = qkv.data(), *shared_attended = attended.data(), *shared_gated = gated.data();
#pragma omp parallel num_threads(threads)
    {
        static thread_local Scratch own;
        for (int64_t i = 0; i < number; i++) run_block(blocks[i], shape, rows, shared_x, shared_qkv, shared_attended, shared_gated, own);
    }
    for (size_t i = 0; i < wide.size(); i++) store(wide[i], x + i);
}

// out (T, n) = RMS norm of x (T, k) times w (n, k) transposed.
template <typename W>
static void run_head(const W* weight, const W* w, const W* bias, const W* x, W* out, int64_t n, int64_t k, int64_t rows, float eps, int threads) {
    static thread_local std::vector<float> wide, normed;
    wide.resize(rows * k);
    normed.resize(rows * k);
    for (size_t i = 0; i < wide.size(); i++) wide[i] = to_float(x[i]);
    norm(wide.data(), weight, normed.data(), rows, k, eps);
    const float* shared = normed.data();
#pragma omp parallel num_threads(threads)
    {
        static thread_local std::vector<floats> own;
        own.resize(rows);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < n; i += LANES) {
            products(w + i * k, shared, own.data(), k, rows);
            for (int64_t t = 0; t < rows; t++) store(own[t] + load_or_zero(bias, i), out + t * n + i);
        }
    }
}

// Numbers of outputs and head_dim must be multiples of 16, and all arrays dense.
#define EXPORT(W, name)                                                                                                           \
    extern "C" void run_blocks_##name(const Block<W>* blocks, int64_t number, const Shape* shape, const Rows<W>* rows, W* x, int threads) { \
        run_blocks(blocks, number, *shape, *rows, x, threads);                                                                   \
    }                                                                                                                            \
    extern "C" void run_head_##name(const W* weight, const W* w, const W* bias, const W* x, W* out, int64_t n, int64_t k, int64_t rows, float eps, int threads) { \
        run_head(weight, w, bias, x, out, n, k, rows, eps, threads);                                                             \
    }
EXPORT(float, fp32)
EXPORT(uint16_t, bf16)

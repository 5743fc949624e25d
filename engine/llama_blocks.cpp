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
constexpr int64_t LANES = 16;
constexpr int64_t FAR = 12288, NEAR = 3072;  // bytes of prefetch into the L2 and L1 caches: without the first, two or more rows take up to twice the time

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

// Lane 4 q + r of the result is the sum of quarter q of vector r's lanes, of four vectors.
static inline floats quarter_sums(floats a, floats b, floats c, floats d) {
    floats ab = __builtin_shufflevector(a, b, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29) +
                __builtin_shufflevector(a, b, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
    floats cd = __builtin_shufflevector(c, d, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29) +
                __builtin_shufflevector(c, d, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
    return __builtin_shufflevector(ab, cd, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
           __builtin_shufflevector(ab, cd, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
}

// The quarters of four such results added: lane i is the sum of vector i's lanes, of sixteen vectors.
static inline floats whole_sums(floats a, floats b, floats c, floats d) {
    floats ab = __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
                __builtin_shufflevector(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
    floats cd = __builtin_shufflevector(c, d, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
                __builtin_shufflevector(c, d, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
    return __builtin_shufflevector(ab, cd, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
           __builtin_shufflevector(ab, cd, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
}

// Four rows of w (each of length k) times each of T rows of x: the sums of quarters. Not inlined, as the compiler would run short of registers.
template <int T, typename W>
__attribute__((noinline)) static void four_products(const W* w, const float* x, floats* out, int64_t k) {
    floats total[T][4];
#pragma GCC unroll 8
    for (int t = 0; t < T; t++) total[t][0] = total[t][1] = total[t][2] = total[t][3] = floats{};
    for (int64_t i = 0; i < k; i += LANES) {
        floats column[T];
#pragma GCC unroll 8
        for (int t = 0; t < T; t++) column[t] = load(x + t * k + i);
#pragma GCC unroll 4
        for (int r = 0; r < 4; r++) {
            const floats weights = load(w + r * k + i);
            __builtin_prefetch(w + r * k + i + FAR / sizeof(W), 0, 2);
            __builtin_prefetch(w + r * k + i + NEAR / sizeof(W));
#pragma GCC unroll 8
            for (int t = 0; t < T; t++) total[t][r] += weights * column[t];
        }
    }
#pragma GCC unroll 8
    for (int t = 0; t < T; t++) out[t] = quarter_sums(total[t][0], total[t][1], total[t][2], total[t][3]);
}

// The same for any number of rows of x, in groups whose sums stay in 24 of the 32 vector registers.
template <typename W>
static inline void four_products(const W* w, const float* x, floats* out, int64_t k, int64_t rows) {
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
        out += group;
    }
}

// out[t] = sixteen rows of w times row t of x; `space` holds four times as many vectors.
template <typename W>
static inline void products(const W* w, const float* x, floats* out, floats* space, int64_t k, int64_t rows) {
    for (int64_t quarter = 0; quarter < 4; quarter++) four_products(w + 4 * quarter * k, x, space + quarter * rows, k, rows);
    for (int64_t t = 0; t < rows; t++) out[t] = whole_sums(space[t], space[rows + t], space[2 * rows + t], space[3 * rows + t]);
}

// ---- one pass ----

template <typename W>
struct Block {
    const W *qkv, *qkv_bias, *out, *out_bias, *gate_up, *gate_up_bias, *down, *down_bias, *attention_norm, *mlp_norm;  // no gate_up: no MLP
    W *keys, *values;  // of the first text (kv_heads, capacity, head_dim)
};

struct Shape {
    int64_t hidden, heads, kv_heads, head_dim, intermediate, capacity, text_stride;  // the last: from one text's keys to the next's
    float eps;
};

// T rows. Row t goes to slot slots[t] of text texts[t] and is rotated to positions[t]; without these, to slot start + t of text `text`,
// rotated to its slot. A row sees its text up to its own slot. With `visible` (T, window) it sees, of the last `window` slots up to the
// pass's last, those j with visible[t, j], and all before them.
template <typename W>
struct Rows {
    int64_t count, start, one_text;
    const int64_t *slots, *texts, *positions;
    const W *cosines, *sines;  // (texts, capacity, head_dim), of which the first half is read, and (texts, capacity, head_dim / 2)
    int64_t tables;            // texts that have tables of their own; 1: all share the first
    const uint8_t* visible;
    int64_t window;

    int64_t text(int64_t t) const { return texts ? texts[t] : one_text; }
    int64_t slot(int64_t t) const { return slots ? slots[t] : start + t; }
    int64_t table_row(int64_t t, int64_t capacity) const { return text(t) % tables * capacity + (positions ? positions[t] : slot(t)); }
};

// What to run: x (T, hidden) through `number` blocks in place. Before block `kept_at` (or at the end) x is copied to kept (texts, capacity, hidden).
template <typename W>
struct Pass {
    const Block<W>* blocks;
    int64_t number;
    W *x, *kept;
    int64_t kept_at;
};

// RMS norm, then `inner` (k, hidden) where there is one (else k = hidden), then w (n, k).
template <typename W>
struct Head {
    const W *norm, *inner, *inner_bias, *w, *bias;
    int64_t hidden, k, n;
    float eps;
};

template <typename W>
static void norm(const float* x, const W* weight, float* out, int64_t rows, int64_t size, float eps) {
    for (int64_t t = 0; t < rows; t++) {
        float square = 0;
#pragma omp simd reduction(+ : square)
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

// Room for `size` numbers, aligned.
static inline float* room(std::vector<floats>& store, int64_t size) {
    store.resize((size + LANES - 1) / LANES);
    return (float*)store.data();
}

struct Scratch {  // of one thread
    std::vector<floats> normed, queries, scores, sums, space;
};

// Rotates the queries and keys of one key-value head in qkv (T, heads + 2 kv_heads, head_dim), and stores its keys and values.
template <typename W>
static void place(const Block<W>& block, const Shape& shape, const Rows<W>& rows, int64_t kv, float* qkv) {
    const int64_t size = shape.head_dim, groups = shape.heads / shape.kv_heads;
    for (int64_t t = 0; t < rows.count; t++) {
        const int64_t at = rows.table_row(t, shape.capacity);
        const W *cos = rows.cosines + at * size, *sin = rows.sines + at * size / 2;
        float* row = qkv + t * (shape.heads + 2 * shape.kv_heads) * size;
        float *key = row + (shape.heads + kv) * size, *value = key + shape.kv_heads * size;
        const int64_t slot = rows.text(t) * shape.text_stride + (kv * shape.capacity + rows.slot(t)) * size;
        rotate(key, cos, sin, size / 2);
        for (int64_t g = 0; g < groups; g++) rotate(row + (kv * groups + g) * size, cos, sin, size / 2);
        for (int64_t i = 0; i < size; i++) store(key[i], block.keys + slot + i);
        for (int64_t i = 0; i < size; i++) store(value[i], block.values + slot + i);
    }
}

// The weights that a query gives to the first `seen` slots, from its scores; what it does not see of the last `window` weighs 0.
static float soften(float* score, int64_t seen, int64_t window, const uint8_t* visible) {
    for (int64_t i = 0; visible && i < window; i++)
        if (!visible[i]) score[seen - window + i] = -1e30f;
    float most = -1e30f, total = 0;
#pragma omp simd reduction(max : most)
    for (int64_t s = 0; s < seen; s++) most = score[s] > most ? score[s] : most;
    for (int64_t s = 0; s < seen; s++) score[s] = std::exp(score[s] - most);
#pragma omp simd reduction(+ : total)
    for (int64_t s = 0; s < seen; s++) total += score[s];
    return total;
}

// The query heads of key-value head `kv` in row t: qkv (T, heads + 2 kv_heads, head_dim) -> attended (T, heads, head_dim).
template <typename W>
static void attend(const Block<W>& block, const Shape& shape, const Rows<W>& rows, int64_t kv, int64_t t, const float* qkv, float* attended, Scratch& own) {
    const int64_t size = shape.head_dim, groups = shape.heads / shape.kv_heads;
    const int64_t seen = rows.visible ? rows.start + rows.count : rows.slot(t) + 1, padded = (seen + LANES - 1) / LANES * LANES;
    const int64_t first = rows.text(t) * shape.text_stride + kv * shape.capacity * size;
    const W *keys = block.keys + first, *values = block.values + first;
    const float* query = qkv + (t * (shape.heads + 2 * shape.kv_heads) + kv * groups) * size;
    float* out = attended + (t * shape.heads + kv * groups) * size;
    float *queries = room(own.queries, groups * size), *scores = room(own.scores, groups * padded);
    own.sums.resize(groups);
    own.space.resize(4 * groups);
    const float scale = 1 / std::sqrt(float(size));
    for (int64_t i = 0; i < groups * size; i++) queries[i] = query[i] * scale;
    for (int64_t s = 0; s < padded; s += LANES) {
        products(keys + s * size, queries, own.sums.data(), own.space.data(), size, groups);
        for (int64_t g = 0; g < groups; g++) store(own.sums[g], scores + g * padded + s);
    }
    for (int64_t g = 0; g < groups; g++) {
        float* score = scores + g * padded;
        const float total = soften(score, seen, rows.window, rows.visible ? rows.visible + t * rows.window : nullptr);
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

// out (T, n) = in (T, k) times w (n, k) transposed, rounded to W; for the threads of a parallel region.
template <typename W, typename To>
static void put_product(const W* w, const W* bias, const float* in, int64_t k, To* out, int64_t n, int64_t rows, Scratch& own) {
    own.sums.resize(rows);
    own.space.resize(4 * rows);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < n; i += LANES) {
        products(w + i * k, in, own.sums.data(), own.space.data(), k, rows);
        for (int64_t t = 0; t < rows; t++) store(rounded<W>(own.sums[t] + load_or_zero(bias, i)), out + t * n + i);
    }
}

// x (T, hidden) += in (T, inner) times w (hidden, inner) transposed; for the threads of a parallel region.
template <typename W>
static void add_product(const W* w, const W* bias, const float* in, int64_t inner, float* x, int64_t hidden, int64_t rows, Scratch& own) {
    own.sums.resize(rows);
    own.space.resize(4 * rows);
#pragma omp for schedule(static)
    for (int64_t n = 0; n < hidden; n += LANES) {
        products(w + n * inner, in, own.sums.data(), own.space.data(), inner, rows);
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
    float* normed = room(own.normed, count * shape.hidden);
    norm(x, block.attention_norm, normed, count, shape.hidden, shape.eps);
    put_product(block.qkv, block.qkv_bias, normed, shape.hidden, qkv, width, count, own);
#pragma omp for schedule(static)
    for (int64_t kv = 0; kv < shape.kv_heads; kv++) place(block, shape, rows, kv, qkv);
#pragma omp for schedule(static) collapse(2)
    for (int64_t t = 0; t < count; t++)
        for (int64_t kv = 0; kv < shape.kv_heads; kv++) attend(block, shape, rows, kv, t, qkv, attended, own);
    add_product(block.out, block.out_bias, attended, shape.heads * shape.head_dim, x, shape.hidden, count, own);
    if (!block.gate_up) return;
    norm(x, block.mlp_norm, normed, count, shape.hidden, shape.eps);
    own.sums.resize(2 * count);
    own.space.resize(4 * count);
#pragma omp for schedule(static)
    for (int64_t n = 0; n < shape.intermediate; n += LANES) {
        floats *gate = own.sums.data(), *up = gate + count;
        products(block.gate_up + n * shape.hidden, normed, gate, own.space.data(), shape.hidden, count);
        products(block.gate_up + (shape.intermediate + n) * shape.hidden, normed, up, own.space.data(), shape.hidden, count);
        for (int64_t t = 0; t < count; t++) {
            floats g = rounded<W>(gate[t] + load_or_zero(block.gate_up_bias, n));
            floats u = rounded<W>(up[t] + load_or_zero(block.gate_up_bias, shape.intermediate + n));
            store(rounded<W>(rounded<W>(silu(g)) * u), gated + t * shape.intermediate + n);
        }
    }
    add_product(block.down, block.down_bias, gated, shape.intermediate, x, shape.hidden, count, own);
}

template <typename W>
static void keep(const float* x, const Pass<W>& pass, const Shape& shape, const Rows<W>& rows) {
    for (int64_t t = 0; t < rows.count; t++) {
        W* to = pass.kept + (rows.text(t) * shape.capacity + rows.slot(t)) * shape.hidden;
        for (int64_t i = 0; i < shape.hidden; i++) store(x[t * shape.hidden + i], to + i);
    }
}

template <typename W>
static void run_blocks(const Pass<W>& pass, const Shape& shape, const Rows<W>& rows, int threads) {
    static thread_local std::vector<floats> store_x, store_qkv, store_attended, store_gated;
    const int64_t size = rows.count * shape.hidden;
    float *x = room(store_x, size), *qkv = room(store_qkv, rows.count * (shape.heads + 2 * shape.kv_heads) * shape.head_dim);
    float *attended = room(store_attended, rows.count * shape.heads * shape.head_dim), *gated = room(store_gated, rows.count * shape.intermediate);
    for (int64_t i = 0; i < size; i++) x[i] = to_float(pass.x[i]);
#pragma omp parallel num_threads(threads) if (pass.number > 0)
    {
        static thread_local Scratch own;
        for (int64_t i = 0; i <= pass.number; i++) {
            if (pass.kept && i == pass.kept_at) {
#pragma omp single
                keep(x, pass, shape, rows);
            }
            if (i < pass.number) run_block(pass.blocks[i], shape, rows, x, qkv, attended, gated, own);
        }
    }
    for (int64_t i = 0; i < size; i++) store(x[i], pass.x + i);
}

// out (T, n) = what `head` makes of x (T, hidden).
template <typename W>
static void run_head(const Head<W>& head, const W* x, W* out, int64_t rows, int threads) {
    static thread_local std::vector<floats> store_x, store_normed, store_middle;
    const int64_t size = rows * head.hidden;
    float *wide = room(store_x, size), *normed = room(store_normed, size), *middle = head.inner ? room(store_middle, rows * head.k) : normed;
    for (int64_t i = 0; i < size; i++) wide[i] = to_float(x[i]);
    norm(wide, head.norm, normed, rows, head.hidden, head.eps);
#pragma omp parallel num_threads(threads)
    {
        static thread_local Scratch own;
        if (head.inner) put_product(head.inner, head.inner_bias, normed, head.hidden, middle, head.k, rows, own);
        put_product(head.w, head.bias, middle, head.k, out, head.n, rows, own);
    }
}

// All sizes but the numbers of rows and heads must be multiples of 16, and all arrays dense.
#define EXPORT(W, name)                                                                                                           \
    extern "C" void run_blocks_##name(const Pass<W>* pass, const Shape* shape, const Rows<W>* rows, int threads) {               \
        run_blocks(*pass, *shape, *rows, threads);                                                                               \
    }                                                                                                                            \
    extern "C" void run_head_##name(const Head<W>* head, const W* x, W* out, int64_t rows, int threads) {                        \
        run_head(*head, x, out, rows, threads);                                                                                  \
    }
EXPORT(float, fp32)
EXPORT(uint16_t, bf16)

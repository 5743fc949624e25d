// What sampling.py does with a few rows of logits, without a call per elementary step.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

// ---- policy_probs ----

constexpr float LEAST = std::numeric_limits<float>::lowest();  // without infinities, which -ffast-math does not know

static inline uint32_t bits_of(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

constexpr uint32_t INFINITE = 0x7f800000u, MINUS = 0x80000000u;

// Whether n logits hold no NaN and no +inf, and something above -inf. By their bits: -ffast-math takes every number for finite.
static bool is_law(const float* logits, int64_t n) {
    uint32_t wrong = 0, some = 0;
    for (int64_t i = 0; i < n; i++) {
        const uint32_t bits = bits_of(logits[i]);
        const uint32_t finite = (bits & INFINITE) != INFINITE, low = bits == (INFINITE | MINUS);
        wrong |= !(finite | low);
        some |= finite;
    }
    return some && !wrong;
}

template <typename Real> static void fill_nan(Real* values, int64_t n) {
    std::fill_n(values, n, std::numeric_limits<Real>::quiet_NaN());
}

// 0 for what is less likely than the k-th likeliest of n logits.
static void keep_top_k(std::vector<float>& scaled, int64_t k) {
    std::vector<float> sorted(scaled);
    std::nth_element(sorted.begin(), sorted.begin() + (k - 1), sorted.end(), [](float a, float b) { return a > b; });
    const float least = sorted[k - 1];
    for (float& value : scaled)
        if (value < least) value = LEAST;
}

constexpr uint32_t LEVELS = (0x3f800000u >> 20) + 1;  // that of 1 is the highest

// The upper bits of a probability: orders them coarsely.
static inline uint32_t level(float prob) {
    return std::min(bits_of(prob) >> 20, LEVELS - 1);
}

// Leaves the smallest head of `probs` whose mass reaches top_p, ties by id: whole levels from the top, and of the level that crosses, sorted, what is needed.
static void keep_nucleus(float* probs, int64_t n, float top_p) {
    double mass[LEVELS] = {};
    for (int64_t i = 0; i < n; i++) mass[level(probs[i])] += probs[i];
    uint32_t crossing = LEVELS - 1;
    double kept = 0;
    while (crossing > 0 && kept + mass[crossing] < top_p) kept += mass[crossing--];
    static thread_local std::vector<int64_t> candidates;
    candidates.clear();
    for (int64_t i = 0; i < n; i++)
        if (level(probs[i]) == crossing) candidates.push_back(i);
    std::sort(candidates.begin(), candidates.end(), [&](int64_t a, int64_t b) { return probs[a] != probs[b] ? probs[a] > probs[b] : a < b; });
    for (int64_t token : candidates) {
        if (kept < top_p) kept += probs[token];
        else probs[token] = 0;
    }
    for (int64_t i = 0; i < n; i++) probs[i] = level(probs[i]) >= crossing ? probs[i] / float(kept) : 0.0f;
}

// Whether there is a distribution; of logits that are not finite there is none, and `probs` becomes NaN.
static bool row_probs(const float* logits, float* probs, int64_t n, float temperature, int64_t top_k, float top_p) {
    static thread_local std::vector<float> scaled;
    if (!is_law(logits, n)) {
        fill_nan(probs, n);
        return false;
    }
    if (temperature == 0) {
        std::fill(probs, probs + n, 0.0f);
        probs[std::max_element(logits, logits + n) - logits] = 1;
        return true;
    }
    scaled.assign(logits, logits + n);
    for (float& value : scaled) value /= temperature;
    if (top_k > 0 && top_k < n) keep_top_k(scaled, top_k);
    float most = LEAST, total = 0;
    scaled.resize((n + 15) / 16 * 16, LEAST);  // so that equal logits take the same instructions, and get equal probabilities
#pragma omp simd reduction(max : most)
    for (size_t i = 0; i < scaled.size(); i++) most = scaled[i] > most ? scaled[i] : most;
    for (float& value : scaled) value = std::exp(value - most);
#pragma omp simd reduction(+ : total)
    for (size_t i = 0; i < scaled.size(); i++) total += scaled[i];
    for (float& value : scaled) value /= total;
    std::copy(scaled.begin(), scaled.begin() + n, probs);
    if (top_p < 1) keep_nucleus(probs, n, top_p);
    return true;
}

extern "C" void policy_probs(
    const float* logits, float* probs, int64_t rows, int64_t n, float temperature, int64_t top_k, float top_p, int threads) {
#pragma omp parallel for num_threads(threads) if (rows > 1)
    for (int64_t row = 0; row < rows; row++) row_probs(logits + row * n, probs + row * n, n, temperature, top_k, top_p);
}

// ---- noise ----

constexpr uint64_t GOLDEN = 0x9E3779B97F4A7C15u, MULTIPLIER = 0xBF58476D1CE4E5B9u;

static uint64_t mix(uint64_t bits) {  // splitmix64's finalizer
    bits = (bits ^ (bits >> 30)) * MULTIPLIER;
    bits = (bits ^ (bits >> 27)) * 0x94D049BB133111EBu;
    return bits ^ (bits >> 31);
}

static inline double unit(uint64_t bits) { return ((bits >> 12) + 0.5) * 0x1p-52; }

// sampling.Noise of N texts: a key each, or one for all, and where the round starts in each if its noise is its own.
struct Noise {
    const uint64_t *keys, *starts;
    int64_t rows_per_key;

    uint64_t of(int64_t row) const {
        const int64_t text = row / rows_per_key;
        return starts ? mix(keys[text] ^ (starts[text] + 1) * MULTIPLIER) : keys[text];
    }
};

// What one purpose makes of positions.
struct Places {
    uint64_t spacing, offset;

    uint64_t key(uint64_t text_key, uint64_t position) const { return mix(text_key ^ (position * spacing + offset) * GOLDEN); }
};

// ---- draw ----

struct Drawn {
    int64_t token;
    double margin;
};

// The token with the largest p / e, e the exponential noise of the row's key and the token's id, and the distance of the two largest log(p / e).
static Drawn draw_row(const float* probs, uint64_t row, const int64_t* ids, int64_t n) {
    double best = 0, second = 0;
    int64_t chosen = 0;
    for (int64_t i = 0; i < n; i++) {
        if (probs[i] == 0) continue;
        const double score = probs[i] / -std::log(unit(mix(row ^ (uint64_t(ids ? ids[i] : i) + 1) * GOLDEN)));
        if (score > best) {
            second = best;
            best = score;
            chosen = i;
        } else if (score > second) {
            second = score;
        }
    }
    return {ids ? ids[chosen] : chosen, std::log(best) - std::log(second)};
}

extern "C" void draw(
    const float* probs, const Noise* noise, const Places* places, const uint64_t* positions, const int64_t* ids, int64_t rows, int64_t n,
    int64_t* tokens, double* margins) {
    for (int64_t row = 0; row < rows; row++) {
        const Drawn drawn = draw_row(probs + row * n, places->key(noise->of(row), positions[row]), ids, n);
        tokens[row] = drawn.token;
        margins[row] = drawn.margin;
    }
}

// ---- verification: of each text p (gamma + 1, n), drafted (gamma), positions (gamma + 1) ----

extern "C" void verify_coupled(
    const float* p, const int64_t* drafted, const Noise* noise, const Places* places, const uint64_t* positions,
    int64_t texts, int64_t gamma, int64_t n, int64_t* accepted, int64_t* next) {
    for (int64_t text = 0; text < texts; text++, p += (gamma + 1) * n, drafted += gamma, positions += gamma + 1) {
        int64_t& kept = accepted[text] = 0;
        do next[text] = draw_row(p + kept * n, places->key(noise->of(text), positions[kept]), nullptr, n).token;
        while (kept < gamma && next[text] == drafted[kept] && ++kept);
    }
}

// q (gamma, n_q) of each text: its columns are the tokens `ids`, ascending, or all in order.
extern "C" void verify_rejection(
    const float* p, const float* q, const int64_t* ids, const int64_t* drafted, const Noise* noise, const Places* accept, const Places* residual,
    const uint64_t* positions, int64_t texts, int64_t gamma, int64_t n, int64_t n_q, int64_t* accepted, int64_t* next) {
    static thread_local std::vector<float> excess;
    for (int64_t text = 0; text < texts; text++, p += (gamma + 1) * n, q += gamma * n_q, drafted += gamma, positions += gamma + 1) {
        const uint64_t key = noise->of(text);
        const auto keeps = [&](int64_t i) {
            const int64_t column = ids ? std::lower_bound(ids, ids + n_q, drafted[i]) - ids : drafted[i];
            return unit(mix(accept->key(key, positions[i]))) * q[i * n_q + column] < p[i * n + drafted[i]];
        };
        int64_t& kept = accepted[text] = 0;
        while (kept < gamma && keeps(kept)) kept++;
        const float* source = p + kept * n;
        if (kept < gamma) {
            excess.assign(source, source + n);
            const float* row = q + kept * n_q;
            float mass = 0;
            if (ids) for (int64_t j = 0; j < n_q; j++) excess[ids[j]] -= row[j];
            else for (int64_t i = 0; i < n; i++) excess[i] -= row[i];
            for (float& value : excess) value = std::max(value, 0.0f);
#pragma omp simd reduction(+ : mass)
            for (size_t i = 0; i < excess.size(); i++) mass += excess[i];
            if (mass > 0) source = excess.data();  // not normalised: to draw, the order of the scores is enough
        }
        next[text] = draw_row(source, residual->key(key, positions[kept]), nullptr, n).token;
    }
}

// ---- trees ----

// Walks from node 0 to the child that equals the target's draw, while there is one, through n nodes of which parents come first. Where there is no
// distribution to draw from it ends with the token -1.
extern "C" void verify_match(
    const float* logits, const int64_t* tokens, const int64_t* parents, const int64_t* depths, int64_t nodes, int64_t n,
    float temperature, int64_t top_k, float top_p, const Noise* noise, const Places* places, const uint64_t* start, uint8_t* reached, int64_t* drawn) {
    static thread_local std::vector<float> probs;
    probs.resize(n);
    int64_t node = 0;
    for (int64_t next = 0; next < nodes; node = next) {
        reached[node] = 1;
        *drawn = -1;
        if (!row_probs(logits + node * n, probs.data(), n, temperature, top_k, top_p)) return;
        *drawn = draw_row(probs.data(), places->key(noise->of(0), *start + 1 + depths[node]), nullptr, n).token;
        for (next = node + 1; next < nodes && !(parents[next] == node && tokens[next] == *drawn);) next++;
    }
}

// One of many candidates.
struct Candidate {
    float score;
    int64_t column;
};

constexpr float LEAST_EXPONENTIAL = 3e-8f;  // what −log(u) is where u rounds to 1

// For each row of logits (rows, n) the `count` tokens with the largest score = sharpness * logit + weight * g, g the Gumbel noise of the row's position,
// best first, and the log of their shares of softmax(scores); NaN where logits are not finite.
extern "C" void gumbel_children(
    const float* logits, int64_t rows, int64_t n, float sharpness, float weight, const Noise* noise, const Places* places, const uint64_t* positions,
    const int64_t* ids, int64_t count, int64_t* tokens, double* values) {
    static thread_local std::vector<float> gumbel, scores, shares;
    gumbel.assign(n, 0.0f);
    scores.resize(n);
    shares.resize(n);
    for (int64_t row = 0; row < rows; row++) {
        if (weight > 0 && (row == 0 || positions[row] != positions[row - 1])) {
            const uint64_t key = places->key(noise->of(0), positions[row]);
            for (int64_t i = 0; i < n; i++) gumbel[i] = float(unit(mix(key ^ (uint64_t(ids ? ids[i] : i) + 1) * GOLDEN)));
            for (float& value : gumbel) value = -std::log(std::max(-std::log(value), LEAST_EXPONENTIAL));
        }
        float most = LEAST, total = 0;
        for (int64_t i = 0; i < n; i++) scores[i] = sharpness * logits[row * n + i] + weight * gumbel[i];
#pragma omp simd reduction(max : most)
        for (int64_t i = 0; i < n; i++) most = scores[i] > most ? scores[i] : most;
        for (int64_t i = 0; i < n; i++) shares[i] = std::exp(scores[i] - most);  // in a loop of its own: with SVE, GCC 12 miscompiles the reduction with the call in it
#pragma omp simd reduction(+ : total)
        for (int64_t i = 0; i < n; i++) total += shares[i];
        std::vector<Candidate> best;
        for (int64_t i = 0; i < n; i++) {
            if (int64_t(best.size()) == count && scores[i] <= best.back().score) continue;
            const auto at = std::upper_bound(best.begin(), best.end(), scores[i], [](float score, const Candidate& c) { return score > c.score; });
            best.insert(at, {scores[i], i});
            if (int64_t(best.size()) > count) best.pop_back();
        }
        for (int64_t k = 0; k < count; k++) {
            tokens[row * count + k] = ids ? ids[best[k].column] : best[k].column;
            values[row * count + k] = best[k].score - most - std::log(total);
        }
        if (!is_law(logits + row * n, n)) fill_nan(values + row * count, count);
    }
}

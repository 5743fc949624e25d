// What sampling.py does with a few rows of logits, without a call per elementary step.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

// ---- policy_probs ----

// 0 for what is less likely than the k-th likeliest of n logits.
static void keep_top_k(std::vector<float>& scaled, int64_t k) {
    std::vector<float> sorted(scaled);
    std::nth_element(sorted.begin(), sorted.begin() + (k - 1), sorted.end(), [](float a, float b) { return a > b; });
    const float least = sorted[k - 1];
    for (float& value : scaled)
        if (value < least) value = -1e30f;
}

// Leaves the smallest head of `probs` whose mass reaches top_p, ties by id. A token below (1 - top_p) / n cannot be in it, as all such together weigh less than the tail.
static void keep_nucleus(float* probs, int64_t n, float top_p) {
    static thread_local std::vector<int64_t> candidates;
    candidates.clear();
    const float least = (1 - top_p) / n;
    for (int64_t i = 0; i < n; i++)
        if (probs[i] >= least) candidates.push_back(i);
    std::sort(candidates.begin(), candidates.end(), [&](int64_t a, int64_t b) { return probs[a] != probs[b] ? probs[a] > probs[b] : a < b; });
    static thread_local std::vector<float> kept;
    kept.clear();
    float before = 0;
    for (int64_t token : candidates) {
        if (before >= top_p) break;
        kept.push_back(probs[token]);
        before += kept.back();
    }
    std::fill(probs, probs + n, 0.0f);
    for (size_t i = 0; i < kept.size(); i++) probs[candidates[i]] = kept[i] / before;
}

extern "C" void policy_probs(const float* logits, float* probs, int64_t rows, int64_t n, float temperature, int64_t top_k, float top_p) {
    static thread_local std::vector<float> scaled;
    for (int64_t row = 0; row < rows; row++, logits += n, probs += n) {
        if (temperature == 0) {
            std::fill(probs, probs + n, 0.0f);
            probs[std::max_element(logits, logits + n) - logits] = 1;
            continue;
        }
        scaled.assign(logits, logits + n);
        for (float& value : scaled) value /= temperature;
        if (top_k > 0 && top_k < n) keep_top_k(scaled, top_k);
        float most = -1e30f, total = 0;
        for (float value : scaled) most = value > most ? value : most;
        scaled.resize((n + 15) / 16 * 16, -1e30f);  // so that equal logits take the same instructions, and get equal probabilities
        for (float& value : scaled) value = std::exp(value - most);
        for (float value : scaled) total += value;
        for (float& value : scaled) value /= total;
        std::copy(scaled.begin(), scaled.begin() + n, probs);
        if (top_p < 1) keep_nucleus(probs, n, top_p);
    }
}

// ---- draw ----

constexpr uint64_t GOLDEN = 0x9E3779B97F4A7C15u;

static uint64_t mix(uint64_t bits) {  // splitmix64's finalizer
    bits = (bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9u;
    bits = (bits ^ (bits >> 27)) * 0x94D049BB133111EBu;
    return bits ^ (bits >> 31);
}

static inline uint64_t row_key(uint64_t key, uint64_t place) { return mix(key ^ place * GOLDEN); }

static inline double unit(uint64_t bits) { return ((bits >> 12) + 0.5) * 0x1p-52; }

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

// The first `rows_per_key` rows belong to the first key, and so on; a row's place is its position and purpose.
extern "C" void draw(
    const float* probs, const uint64_t* keys, const uint64_t* places, const int64_t* ids, int64_t rows, int64_t rows_per_key, int64_t n,
    int64_t* tokens, double* margins) {
    for (int64_t row = 0; row < rows; row++) {
        const Drawn drawn = draw_row(probs + row * n, row_key(keys[row / rows_per_key], places[row]), ids, n);
        tokens[row] = drawn.token;
        margins[row] = drawn.margin;
    }
}

// ---- verify_rejection ----

// For each text p (gamma + 1, n), q (gamma, n), drafted (gamma), accept_places (gamma), residual_places (gamma + 1).
extern "C" void verify_rejection(
    const float* p, const float* q, const int64_t* drafted, const uint64_t* keys, const uint64_t* accept_places, const uint64_t* residual_places,
    int64_t texts, int64_t texts_per_key, int64_t gamma, int64_t n, int64_t* accepted, int64_t* next) {
    static thread_local std::vector<float> excess;
    excess.resize(n);
    for (int64_t text = 0; text < texts; text++) {
        const uint64_t key = keys[text / texts_per_key];
        int64_t kept = 0;
        while (kept < gamma && unit(mix(row_key(key, accept_places[kept]))) * q[kept * n + drafted[kept]] < p[kept * n + drafted[kept]]) kept++;
        const float* source = p + kept * n;
        if (kept < gamma) {
            float mass = 0;
            for (int64_t i = 0; i < n; i++) excess[i] = std::max(source[i] - q[kept * n + i], 0.0f);
            for (int64_t i = 0; i < n; i++) mass += excess[i];
            if (mass > 0) source = excess.data();  // not normalised: to draw, the order of the scores is enough
        }
        accepted[text] = kept;
        next[text] = draw_row(source, row_key(key, residual_places[kept]), nullptr, n).token;
        p += (gamma + 1) * n;
        q += gamma * n;
        drafted += gamma;
        accept_places += gamma;
        residual_places += gamma + 1;
    }
}

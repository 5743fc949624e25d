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
        for (int64_t i = 0; i < n; i++) probs[i] = std::exp(scaled[i] - most);
        for (int64_t i = 0; i < n; i++) total += probs[i];
        for (int64_t i = 0; i < n; i++) probs[i] /= total;
        if (top_p < 1) keep_nucleus(probs, n, top_p);
    }
}

// ---- draw ----

static uint64_t mix(uint64_t bits) {  // splitmix64's finalizer
    bits = (bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9u;
    bits = (bits ^ (bits >> 27)) * 0x94D049BB133111EBu;
    return bits ^ (bits >> 31);
}

// Of each row the token with the largest p / e, e the exponential noise of its row key and id, and the distance of the two largest log(p / e).
extern "C" void draw(const float* probs, const uint64_t* row_keys, const int64_t* ids, int64_t rows, int64_t n, int64_t* tokens, double* margins) {
    for (int64_t row = 0; row < rows; row++, probs += n) {
        double best = 0, second = 0;
        int64_t chosen = 0;
        for (int64_t i = 0; i < n; i++) {
            if (probs[i] == 0) continue;
            const uint64_t id = ids ? ids[i] : i;
            const uint64_t bits = mix(row_keys[row] ^ (id + 1) * 0x9E3779B97F4A7C15u) >> 12;
            const double score = probs[i] / -std::log((bits + 0.5) * 0x1p-52);
            if (score > best) {
                second = best;
                best = score;
                chosen = i;
            } else if (score > second) {
                second = score;
            }
        }
        tokens[row] = ids ? ids[chosen] : chosen;
        margins[row] = std::log(best) - std::log(second);
    }
}

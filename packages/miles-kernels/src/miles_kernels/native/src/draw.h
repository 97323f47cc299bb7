/* Keyed Gumbel noise and one draw from a row of logits; the hash is that of miles_kernels.ops.sample, word for word. */
#ifndef MILES_DRAW_H
#define MILES_DRAW_H

#include "rows.h"

#define BLOCK 128L
#define LOG_BLOCK 4.8521f /* ln 128, rounded up: no block has more mass than its largest odds times this */

INLINE uint64_t mix64(uint64_t x) {
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
    return x ^ (x >> 31);
}

/* The two 32-bit keys of a row. */
INLINE void row_keys(int64_t seed, int64_t sample_id, int64_t position, uint32_t keys[2]) {
    uint64_t state = mix64((uint64_t)seed * 0x9E3779B97F4A7C15u + (uint64_t)sample_id + 0x243F6A8885A308D3u);
    state = mix64(state + (uint64_t)position * 0xD1342543DE82EF95u);
    keys[0] = (uint32_t)state, keys[1] = (uint32_t)(state >> 32);
}

/* Noise of eight token ids: -ln(-log1p(-v)) for v = (k + 1/2) / 2^32 of the keyed hash k. */
INLINE f8 noise8(u8 ids, const uint32_t keys[2]) {
    u8 bits = ids * 0x9E3779B1u + 0x13198A2Fu;
    bits ^= bits >> 16;
    bits = (bits ^ keys[0]) * 0x85EBCA6Bu;
    bits = (bits ^ (bits >> 15)) + keys[1];
    bits *= 0xC2B2AE35u;
    bits ^= bits >> 13;
    bits *= 0x27D4EB2Fu;
    bits ^= bits >> 16;
    /* the 32-bit integer as a float, rounded once: 65536 high is exact */
    f8 high = __builtin_convertvector((i8)(bits >> 16), f8), low = __builtin_convertvector((i8)(bits & 0xFFFFu), f8);
    f8 v = (high * 65536.0f + low + 0.5f) * -2.3283064365386963e-10f; /* -2^-32 */
    v = max8(v, all8(5.9604644775390625e-08f - 1.0f));
    f8 u = v + 1.0f;
    f8 minus = log8(u) + (v - (u - 1.0f)) / u; /* log1p(v), with what was lost in u put back */
    return -log8(-minus);
}

INLINE u8 ids8(long first) {
    u8 lane = {0, 1, 2, 3, 4, 5, 6, 7};
    return lane + (uint32_t)first;
}

/* Scaled logits i .. i + 7 of a row, -inf past its end. */
INLINE f8 scaled8(const float *logits, long V, long i, float temperature) {
    f8 z = V - i >= 8 ? load8(logits + i) : load_part(logits + i, V - i, -INFINITY);
    return temperature != 1.0f ? z / all8(temperature) : z;
}

/* Largest of logits / temperature (+ noise where `keys` is given) among ids first .. stop - 1, the lowest id on a tie. */
INLINE int64_t draw_token(const float *logits, long V, long first, long stop, float temperature, const uint32_t *keys) {
    f8 best = all8(-INFINITY);
    i8 where = alli8(0);
    i8 lane = {0, 1, 2, 3, 4, 5, 6, 7};
    for (long i = first; i < stop; i += 8) {
        f8 z = scaled8(logits, V, i, temperature);
        if (keys) z += noise8(ids8(i), keys);
        i8 better = z > best;
        best = pick8(better, z, best);
        where = (better & (lane + (int32_t)i)) | (~better & where);
    }
    int64_t token = 0;
    float top = -INFINITY;
    for (int i = 0; i < 8; i++)
        if (best[i] > top || (best[i] == top && where[i] < token)) top = best[i], token = where[i];
    return token;
}

/* First id of the drawn block: the largest logarithm of its mass + noise of id -1 - block. Masses that cannot win are not added up. */
INLINE long draw_block(const float *logits, long V, const uint32_t keys[2], float temperature) {
    f8 noise = all8(0);
    float best = -INFINITY;
    long drawn = 0;
    for (long b = 0; b * BLOCK < V; b++) {
        long first = b * BLOCK, stop = V - first < BLOCK ? V : first + BLOCK;
        if (b % 8 == 0) noise = noise8(~ids8(b), keys);
        f8 top8s = all8(-INFINITY), mass = all8(0);
        for (long i = first; i < stop; i += 8) top8s = max8(scaled8(logits, V, i, temperature), top8s);
        float top = top8(top8s);
        if (!(top > -INFINITY) || top + noise[b % 8] + LOG_BLOCK < best) continue;
        for (long i = first; i < stop; i += 8) mass += exp8(scaled8(logits, V, i, temperature) - all8(top));
        float score = top + log8(all8(sum8(mass)))[0] + noise[b % 8];
        if (score > best) best = score, drawn = first;
    }
    return drawn;
}

/* One token of a row: a block by its mass, then a token of it; `greedy` takes the largest logit. */
INLINE int64_t draw_row(const float *logits, long V, const uint32_t keys[2], float temperature, int greedy) {
    if (greedy) return draw_token(logits, V, 0, V, 1.0f, 0);
    long first = draw_block(logits, V, keys, temperature);
    return draw_token(logits, V, first, V - first < BLOCK ? V : first + BLOCK, temperature, keys);
}

/* Draw, and the log-probability of what was drawn under softmax(logits / temperature) in chunks; -1 where it is not finite. */
INLINE void sample_row(const float *logits, long V, long chunk, int64_t seed, int64_t sample_id, int64_t position, float temperature,
                       int64_t *token, float *logprob) {
    uint32_t keys[2];
    row_keys(seed, sample_id, position, keys);
    int greedy = temperature == 0.0f;
    if (greedy) temperature = 1.0f;
    *token = draw_row(logits, V, keys, temperature, greedy);
    float state[4] = {0, 0, 0, 0};
    for (long start = 0; start < V; start += chunk)
        lse_chunk(logits + start, V - start < chunk ? V - start : chunk, temperature, *token - start, start > 0, 0, state);
    *logprob = (state[3] - state[0]) - log_total(state[1]);
    if (*logprob - *logprob != 0) *token = -1;
}

#endif

/* Keyed Gumbel noise and one draw from a row of logits; the hash is that of miles_kernels.ops.sample, word for word. */
#ifndef MILES_DRAW_H
#define MILES_DRAW_H

#include "rows.h"

#define LARGEST_NOISE 23.0f /* -ln(2^-33) = 22.87 is the most the noise can be */

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

/* argmax of logits / temperature + noise, lowest id on a tie; `greedy` leaves the noise out. Vectors that cannot win are skipped. */
INLINE int64_t draw_row(const float *logits, long V, const uint32_t keys[2], float temperature, int greedy) {
    f8 best = all8(-INFINITY);
    i8 where = alli8(0);
    i8 lane = {0, 1, 2, 3, 4, 5, 6, 7};
    int divide = temperature != 1.0f;
    float most = -INFINITY; /* a lower bound of the best score */
    for (long i = 0; i < V; i += 8) {
        f8 z = V - i >= 8 ? load8(logits + i) : load_part(logits + i, V - i, -INFINITY);
        if (divide) z /= all8(temperature);
        if (!greedy) {
            i8 may = z > all8(most - LARGEST_NOISE);
            int64_t any[4];
            memcpy(any, &may, 32);
            if (!(any[0] | any[1] | any[2] | any[3])) continue;
            z += noise8(ids8(i), keys);
        }
        i8 better = z > best;
        best = pick8(better, z, best);
        where = (better & (lane + (int32_t)i)) | (~better & where);
        most = top8(best);
    }
    long token = 0;
    float top = -INFINITY;
    for (int i = 0; i < 8; i++)
        if (best[i] > top || (best[i] == top && where[i] < token)) top = best[i], token = where[i];
    return token;
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

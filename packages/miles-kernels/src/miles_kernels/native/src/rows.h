/* Row-wise operations: each row is a function of itself only. */
#ifndef MILES_ROWS_H
#define MILES_ROWS_H

#include "simd.h"

/* x / rms(x) * weight over n elements; the sum of squares over four interleaved vectors of lanes, folded (0+1)+(2+3). */
INLINE float inverse_rms(const float *x, long n, float eps) {
    f8 s[4] = {all8(0), all8(0), all8(0), all8(0)};
    long i = 0;
    for (; i + 32 <= n; i += 32)
        for (int j = 0; j < 4; j++) {
            f8 v = load8(x + i + 8 * j);
            s[j] = fma8(v, v, s[j]);
        }
    for (int j = 0; i < n; i += 8, j++) {
        f8 v = n - i >= 8 ? load8(x + i) : load_part(x + i, n - i, 0.0f);
        s[j] = fma8(v, v, s[j]);
    }
    return 1.0f / sqrtf(sum8((s[0] + s[1]) + (s[2] + s[3])) / (float)n + eps);
}

INLINE void norm_row(const float *x, const float *weight, float *out, long n, float eps) {
    float scale = inverse_rms(x, n, eps);
    for (long i = 0; i < n; i++) out[i] = (x[i] * scale) * weight[i];
}

/* dx of norm_row, and this row's contribution grad * x / rms(x) added to dw. */
INLINE void norm_row_backward(const float *x, const float *weight, const float *grad, float *dx, float *dw, long n, float eps) {
    float scale = inverse_rms(x, n, eps);
    f8 s = all8(0);
    long i = 0;
    for (; i + 8 <= n; i += 8) s = fma8(load8(grad + i) * load8(weight + i), load8(x + i), s);
    if (i < n) s = fma8(load_part(grad + i, n - i, 0) * load_part(weight + i, n - i, 0), load_part(x + i, n - i, 0), s);
    float slope = sum8(s) / (float)n * scale * scale; /* mean(grad w x) / ms */
    for (i = 0; i < n; i++) {
        float normed = x[i] * scale;
        dx[i] = (grad[i] * weight[i] - x[i] * slope) * scale;
        dw[i] += grad[i] * normed;
    }
}

/* out = x * cos + rotate_half(x) * sin, the tables holding the sign (D even). */
INLINE void rope_row(const float *x, const float *cos, const float *sin, float *out, long n) {
    long half = n / 2;
    for (long i = 0; i < half; i++) {
        float a = x[i], b = x[i + half];
        out[i] = a * cos[i] + b * sin[i];
        out[i + half] = b * cos[i + half] + a * sin[i + half];
    }
}

/* g / (1 + e^-g) * u */
INLINE void swiglu_row(const float *gate, const float *up, float *out, long n) {
    long i = 0;
    for (; i + 8 <= n; i += 8) {
        f8 g = load8(gate + i);
        store8(out + i, g / (exp8(-g) + 1.0f) * load8(up + i));
    }
    if (i < n) {
        f8 g = load_part(gate + i, n - i, 0);
        store_part(out + i, n - i, g / (exp8(-g) + 1.0f) * load_part(up + i, n - i, 0));
    }
}

INLINE void swiglu_vector_backward(f8 g, f8 u, f8 d, f8 *dg, f8 *du) {
    f8 sigmoid = 1.0f / (exp8(-g) + 1.0f), silu = g * sigmoid;
    *du = d * silu;
    *dg = ((g - silu) * sigmoid + sigmoid) * u * d; /* sigmoid (1 + g - silu) */
}

INLINE void swiglu_row_backward(const float *gate, const float *up, const float *grad, float *dgate, float *dup, long n) {
    long i = 0;
    f8 dg, du;
    for (; i + 8 <= n; i += 8) {
        swiglu_vector_backward(load8(gate + i), load8(up + i), load8(grad + i), &dg, &du);
        store8(dgate + i, dg), store8(dup + i, du);
    }
    if (i < n) {
        swiglu_vector_backward(load_part(gate + i, n - i, 0), load_part(up + i, n - i, 0), load_part(grad + i, n - i, 0), &dg, &du);
        store_part(dgate + i, n - i, dg), store_part(dup + i, n - i, du);
    }
}

/* Attention of `group` query heads q[g * D] that share a key/value head, over keys [first, last] given by slots; `room` holds
 * 8 * ceil((last + 8) / 8) floats. Scores and row sums keep key j in lane j mod 8, values are added in ascending order of keys. */
INLINE void attend(const float *q, long group, const float *k_pool, const float *v_pool, long slot_stride, const int64_t *slots,
                   long first, long last, long D, float scale, float *out, float *room) {
    long start = first & ~7L, stop = (last & ~7L) + 8;
    for (long g = 0; g < group; g++) {
        const float *query = q + g * D;
        float scaled[512];
        for (long d = 0; d < D; d++) scaled[d] = query[d] * scale;
        float *p = room - start;
        for (long j = start; j < first; j++) p[j] = -INFINITY;
        for (long j = last + 1; j < stop; j++) p[j] = -INFINITY;
        f8 top = all8(-INFINITY);
        for (long j = first; j <= last; j++) {
            const float *key = k_pool + slots[j] * slot_stride;
            f8 s = all8(0);
            for (long d = 0; d < D; d += 8) s = fma8(load8(scaled + d), load8(key + d), s);
            p[j] = sum8(s);
        }
        for (long j = start; j < stop; j += 8) top = max8(load8(p + j), top);
        f8 most = all8(top8(top)), total = all8(0);
        for (long j = start; j < stop; j += 8) {
            f8 e = exp8(load8(p + j) - most);
            store8(p + j, e);
            total += e;
        }
        float inverse = 1.0f / sum8(total);
        float *o = out + g * D;
        long d = 0;
        for (; d + 32 <= D; d += 32) {
            f8 a[4] = {all8(0), all8(0), all8(0), all8(0)};
            for (long j = first; j <= last; j++) {
                const float *value = v_pool + slots[j] * slot_stride + d;
                f8 weight = all8(p[j]);
                for (int i = 0; i < 4; i++) a[i] = fma8(weight, load8(value + 8 * i), a[i]);
            }
            for (int i = 0; i < 4; i++) store8(o + d + 8 * i, a[i] * inverse);
        }
        for (; d < D; d += 8) {
            f8 a = all8(0);
            for (long j = first; j <= last; j++) a = fma8(all8(p[j]), load8(v_pool + slots[j] * slot_stride + d), a);
            store8(o + d, a * inverse);
        }
    }
}

/* One chunk of a row's running log-sum-exp (Milakov & Gimelshein 2018): state = {top, total, weighted, target}. */
INLINE void lse_chunk(const float *z, long n, float divisor, long target, int begun, int entropy, float *state) {
    f8 top = all8(-INFINITY), inverse = all8(divisor);
    long i = 0;
    int divide = divisor != 1.0f;
#define SCALED(x) (divide ? (x) / inverse : (x))
    for (; i + 8 <= n; i += 8) top = max8(SCALED(load8(z + i)), top);
    if (i < n) top = max8(SCALED(load_part(z + i, n - i, -INFINITY)), top);
    float most = top8(top);
    if (!(most > -3.40282347e38f)) most = -3.40282347e38f;
    if (begun && state[0] > most) most = state[0];
    f8 shift = all8(most), total = all8(0), weighted = all8(0);
    for (i = 0; i < n; i += 8) {
        f8 shifted = (n - i >= 8 ? SCALED(load8(z + i)) : SCALED(load_part(z + i, n - i, -INFINITY))) - shift;
        f8 e = exp8(shifted);
        total += e;
        if (entropy) weighted += e * pick8(shifted < all8(-200.0f), all8(-200.0f), shifted);
    }
#undef SCALED
    float sum = sum8(total), mean = sum8(weighted);
    if (begun) {
        float drop = state[0] - most, rescale = exp8(all8(drop))[0];
        mean += (state[2] + state[1] * drop) * rescale;
        sum += state[1] * rescale;
    }
    state[0] = most, state[1] = sum, state[2] = mean;
    if (target >= 0 && target < n) state[3] = divide ? z[target] / divisor : z[target];
}

/* ln(total), one rounding of a double: shared by every path that finishes a log-sum-exp. */
INLINE float log_total(float total) { return (float)log((double)total); }

#endif

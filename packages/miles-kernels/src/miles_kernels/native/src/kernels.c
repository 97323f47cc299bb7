/* Entry points. Every pointer is to contiguous float32 or int64 unless strides are given; `threads` is how many may work. */
#include "simd.h"

#include "pool.h"
#include "gemm.h"
#include "rows.h"
#include "draw.h"

#include <stdlib.h>

#define EXPORT __attribute__((visibility("default")))
#define ROWS_EACH 16

typedef struct {
    const float *x, *weight, *grad;
    float *out, *out2, *room;
    long rows, n, repeat, depth;
    float eps;
    const float *a, *b;
    const int64_t *index, *index2, *index3;
    long i, j, k, l, m;
    int flag;
} Call;

/* ------------------------------------------------------------------ linear */

static void linear_task(void *given, int rank, int count) {
    Call *c = given;
    long start, stop;
    share(c->rows, PANEL, rank, count, &start, &stop);
    for (long r = start; r < stop; r++) to_panel(c->room, c->k, r, c->x + r * c->k);
    barrier(count);
    share(c->n, COLUMN_UNIT, rank, count, &start, &stop);
    gemm_columns(c->room, c->rows, c->weight, c->k, c->depth, 0, 0, c->out, c->n, start, stop);
}

/* out[M, N] = x[M, K] w[N, K]^T. Returns 0, or 1 without memory. */
EXPORT int mk_linear(const float *x, const float *w, float *out, long M, long N, long K, long depth, int threads) {
    float *panels = calloc((M + PANEL - 1) / PANEL * PANEL * K, sizeof(float));
    if (!panels) return 1;
    Call c = {.x = x, .weight = w, .out = out, .room = panels, .rows = M, .n = N, .k = K, .depth = depth};
    run(linear_task, &c, threads);
    free(panels);
    return 0;
}

/* ------------------------------------------------------------------ norm, swiglu */

static void norm_task(void *given, int rank, int count) {
    Call *c = given;
    long start, stop;
    share(c->rows, ROWS_EACH, rank, count, &start, &stop);
    for (long r = start; r < stop; r++)
        norm_row(c->x + r * c->n, c->weight + r % c->repeat * c->n, c->out + r * c->n, c->n, c->eps);
}

/* out[R, n] = x / rms(x) * weight[r mod repeat, n] */
EXPORT void mk_norm(const float *x, const float *weight, float *out, long R, long n, long repeat, float eps, int threads) {
    Call c = {.x = x, .weight = weight, .out = out, .rows = R, .n = n, .repeat = repeat, .eps = eps};
    run(norm_task, &c, threads);
}

#define DW_ROWS 64 /* rows per partial sum of dw, whatever the number of threads */

static void norm_backward_task(void *given, int rank, int count) {
    Call *c = given;
    long start, stop, size = c->repeat * c->n;
    share(c->rows, DW_ROWS * c->repeat, rank, count, &start, &stop);
    for (long r = start; r < stop; r++) {
        float *dw = c->room + r / (DW_ROWS * c->repeat) * size + r % c->repeat * c->n;
        norm_row_backward(c->x + r * c->n, c->weight + r % c->repeat * c->n, c->grad + r * c->n, c->out + r * c->n, dw, c->n, c->eps);
    }
}

/* dx[R, n] and dw[repeat, n], the latter summed over blocks of rows in order. Returns 0, or 1 without memory. */
EXPORT int mk_norm_backward(const float *x, const float *weight, const float *grad, float *dx, float *dw, long R, long n, long repeat,
                            float eps, int threads) {
    long blocks = (R + DW_ROWS * repeat - 1) / (DW_ROWS * repeat), size = repeat * n;
    float *parts = calloc(blocks * size, sizeof(float));
    if (!parts && blocks) return 1;
    Call c = {.x = x, .weight = weight, .grad = grad, .out = dx, .room = parts, .rows = R, .n = n, .repeat = repeat, .eps = eps};
    run(norm_backward_task, &c, threads);
    memset(dw, 0, size * sizeof(float));
    for (long block = 0; block < blocks; block++)
        for (long i = 0; i < size; i++) dw[i] += parts[block * size + i];
    free(parts);
    return 0;
}

static void swiglu_task(void *given, int rank, int count) {
    Call *c = given;
    long start, stop;
    share(c->rows, ROWS_EACH, rank, count, &start, &stop);
    for (long r = start; r < stop; r++) {
        const float *gate = c->x + r * 2 * c->n;
        if (c->grad)
            swiglu_row_backward(gate, gate + c->n, c->grad + r * c->n, c->out + r * 2 * c->n, c->out + r * 2 * c->n + c->n, c->n);
        else swiglu_row(gate, gate + c->n, c->out + r * c->n, c->n);
    }
}

/* out[R, n] of gate_up[R, 2n] */
EXPORT void mk_swiglu(const float *gate_up, float *out, long R, long n, int threads) {
    Call c = {.x = gate_up, .out = out, .rows = R, .n = n};
    run(swiglu_task, &c, threads);
}

/* d gate_up[R, 2n] */
EXPORT void mk_swiglu_backward(const float *gate_up, const float *grad, float *out, long R, long n, int threads) {
    Call c = {.x = gate_up, .grad = grad, .out = out, .rows = R, .n = n};
    run(swiglu_task, &c, threads);
}

/* ------------------------------------------------------------------ attention over one bucket of a plan */

static void attention_task(void *given, int rank, int count) {
    Call *c = given;
    long S = c->rows, Lq = c->i, Lk = c->j, Hkv = c->k, D = c->l, group = c->repeat, window = c->m, width = Hkv * group * D;
    float *room = c->room + rank * (Lk + 16);
    for (long item = rank; item < S * Lq; item += count) {
        long s = item / Lq, token = c->index[item], last = c->index2[item];
        if (token < 0) continue;
        long first = window > 0 && last - window + 1 > 0 ? last - window + 1 : 0;
        for (long h = 0; h < Hkv; h++)
            attend(c->x + token * width + h * group * D, group, c->a + h * c->n, c->b + h * c->n, c->depth, c->index3 + s * Lk, first,
                   last, D, c->eps, c->out + token * width + h * group * D, room);
    }
}

/* Rows q_index[S, Lq] of q, out [T, Hkv * group, D] at positions q_pos[S, Lq] (pads: q_index < 0) over pools with the strides of a
 * head and of a slot, by kv_index[S, Lk]. Returns 0, or 1 without memory. */
EXPORT int mk_attention(const float *q, const float *k_pool, const float *v_pool, long head_stride, long slot_stride,
                        const int64_t *q_index, const int64_t *q_pos, const int64_t *kv_index, float *out, long S, long Lq, long Lk,
                        long Hkv, long group, long D, float scale, long window, int threads) {
    if (threads > MAX_THREADS) threads = MAX_THREADS;
    if (threads < 1) threads = 1;
    float *room = malloc(threads * (Lk + 16) * sizeof(float));
    if (!room) return 1;
    Call c = {.x = q, .a = k_pool, .b = v_pool, .n = head_stride, .depth = slot_stride, .index = q_index, .index2 = q_pos,
              .index3 = kv_index, .out = out, .rows = S, .i = Lq, .j = Lk, .k = Hkv, .l = D, .repeat = group, .eps = scale,
              .m = window, .room = room};
    run(attention_task, &c, threads);
    free(room);
    return 0;
}

/* ------------------------------------------------------------------ log-probability, noise, draws */

static void lse_task(void *given, int rank, int count) {
    Call *c = given;
    long start, stop;
    share(c->rows, 1, rank, count, &start, &stop);
    for (long r = start; r < stop; r++)
        lse_chunk(c->x + r * c->k, c->n, c->a ? c->a[r] : 1.0f, c->index[r] - c->i, c->i > 0, c->flag, c->out + 4 * r);
}

/* One chunk z[R, n] (row stride `stride`, first column `start`) into state[R, 4]. divisor[R] or null. */
EXPORT void mk_lse(const float *z, long stride, const float *divisor, const int64_t *targets, float *state, long R, long n, long start,
                   int entropy, int threads) {
    Call c = {.x = z, .k = stride, .a = divisor, .index = targets, .out = state, .rows = R, .n = n, .i = start, .flag = entropy};
    run(lse_task, &c, threads);
}

/* logprob[R], entropy[R] (or null) of state[R, 4] */
EXPORT void mk_lse_finish(const float *state, float *logprob, float *entropy, long R) {
    for (long r = 0; r < R; r++) {
        const float *s = state + 4 * r;
        float log_sum = log_total(s[1]);
        logprob[r] = (s[3] - s[0]) - log_sum;
        if (entropy) entropy[r] = log_sum - s[2] / s[1];
    }
}

/* noise[B, n] of ids [n] (shared 1) or [B, n], under keys[B, 2] */
EXPORT void mk_gumbel(const uint32_t *keys, const int32_t *ids, int shared, float *noise, long B, long n) {
    for (long b = 0; b < B; b++)
        for (long i = 0; i < n; i += 8) {
            u8 id = {0};
            long size = n - i < 8 ? n - i : 8;
            memcpy(&id, ids + (shared ? 0 : b * n) + i, size * 4);
            store_part(noise + b * n + i, size, noise8(id, keys + 2 * b));
        }
}

typedef struct {
    const float *logits, *temperature;
    const int64_t *seed, *sample_id, *position;
    int64_t *token;
    float *logprob;
    long rows, V, chunk;
} Sampler;

static void sample_task(void *given, int rank, int count) {
    Sampler *s = given;
    for (long r = rank; r < s->rows; r += count)
        sample_row(s->logits + r * s->V, s->V, s->chunk, s->seed[r], s->sample_id[r], s->position[r],
                   s->temperature ? s->temperature[r] : 1.0f, s->token + r, s->logprob + r);
}

/* Unfiltered draws: token[R] and logprob[R] of logits[R, V]; temperature[R] (0: greedy) or null for 1. */
EXPORT void mk_sample(const float *logits, const float *temperature, const int64_t *seed, const int64_t *sample_id,
                      const int64_t *position, int64_t *token, float *logprob, long R, long V, long chunk, int threads) {
    Sampler s = {logits, temperature, seed, sample_id, position, token, logprob, R, V, chunk};
    run(sample_task, &s, threads);
}

EXPORT void mk_map(int which, const float *x, float *out, long n) { /* exp (0) and log (1), for tests */
    for (long i = 0; i < n; i += 8) {
        long size = n - i < 8 ? n - i : 8;
        f8 v = load_part(x + i, size, 1.0f);
        store_part(out + i, size, which ? log8(v) : exp8(v));
    }
}

#include "decode.h"

/* out[M, N] = x[M, K] w[N, K]^T with the bits of a BLAS whose kernel sums K in blocks of `depth`.
 *
 * Each output is a chain of fused multiply-adds over ascending k, begun anew every `depth` and the blocks added in order. Rows of x
 * lie across the lanes, so a row's bits cannot depend on its neighbours, and the weights are read in place, once per call.
 */
#ifndef MILES_GEMM_H
#define MILES_GEMM_H

#include "simd.h"

#define PANEL 16 /* rows of x in one panel: panel[k * 16 + row] */

/* One block of `C` columns: sums of `V` vectors of rows per column into tot[C][16]. */
#define GEMM_BLOCK(C, V)                                                                                              \
    INLINE void gemm_##C##x##V(const float *panel, const float *w, long K, long depth, float (*tot)[PANEL]) {         \
        for (long k0 = 0; k0 < K; k0 += depth) {                                                                      \
            long k1 = k0 + depth < K ? k0 + depth : K;                                                                \
            f8 acc[C][V];                                                                                             \
            for (int c = 0; c < C; c++)                                                                               \
                for (int v = 0; v < V; v++) acc[c][v] = all8(0);                                                      \
            for (long k = k0; k < k1; k++) {                                                                          \
                f8 x[V];                                                                                              \
                for (int v = 0; v < V; v++) x[v] = load8(panel + k * PANEL + 8 * v);                                  \
                for (int c = 0; c < C; c++) {                                                                         \
                    f8 b = all8(w[c * K + k]);                                                                        \
                    for (int v = 0; v < V; v++) acc[c][v] = fma8(x[v], b, acc[c][v]);                                 \
                }                                                                                                     \
            }                                                                                                         \
            for (int c = 0; c < C; c++)                                                                               \
                for (int v = 0; v < V; v++)                                                                           \
                    store8(tot[c] + 8 * v, k0 ? load8(tot[c] + 8 * v) + acc[c][v] : acc[c][v]);                       \
        }                                                                                                             \
    }
GEMM_BLOCK(8, 1)
GEMM_BLOCK(1, 1)
GEMM_BLOCK(6, 2)
GEMM_BLOCK(1, 2)

#define COLUMN_UNIT 24

/* How deep a block of sums is. A negative depth is that of a BLAS which halves K where two blocks would do (MKL on AVX2). */
INLINE long block_depth(long K, long depth) {
    if (depth > 0) return depth;
    return K > -depth && K <= -2 * depth ? K / 2 : -depth;
}

/* Columns [n0, n1): panels of all rows against a few weight rows at a time, so that weights come from memory once.
 * `add`: out += result (+ bias). Sum, bias and residual are rounded one after the other, as separate operations are. */
static void gemm_columns(const float *panels, long M, const float *w, long K, long depth, const float *bias, int add,
                         float *out, long ldo, long n0, long n1) {
    float tot[8][PANEL];
    depth = block_depth(K, depth);
    for (long n = n0; n < n1; n += COLUMN_UNIT) {
        long end = n1 - n < COLUMN_UNIT ? n1 : n + COLUMN_UNIT;
        for (long m = 0; m < M; m += PANEL) {
            long rows = M - m < PANEL ? M - m : PANEL;
            const float *panel = panels + m * K;
            for (long c = n; c < end;) {
                long width = rows > 8 ? 6 : 8;
                if (end - c < width) width = 1;
                if (width == 6) gemm_6x2(panel, w + c * K, K, depth, tot);
                else if (width == 8) gemm_8x1(panel, w + c * K, K, depth, tot);
                else if (rows > 8) gemm_1x2(panel, w + c * K, K, depth, tot);
                else gemm_1x1(panel, w + c * K, K, depth, tot);
                for (long r = 0; r < rows; r++) {
                    float *o = out + (m + r) * ldo + c;
                    for (long i = 0; i < width; i++) {
                        float y = tot[i][r];
                        if (bias) y += bias[c + i];
                        o[i] = add ? o[i] + y : y;
                    }
                }
                c += width;
            }
        }
    }
}

/* Row r of x into its panel. */
INLINE void to_panel(float *panels, long K, long r, const float *x) {
    float *p = panels + r / PANEL * PANEL * K + r % PANEL;
    for (long k = 0; k < K; k++) p[k * PANEL] = x[k];
}

#endif

/* Eight float lanes, one fixed meaning on every machine.
 *
 * Every reduction in this library runs over these eight lanes in one stated order, every fused multiply-add is written as one,
 * and the compiler is told not to contract anything else; so the bits depend on neither the instruction set nor the compiler.
 */
#ifndef MILES_SIMD_H
#define MILES_SIMD_H

#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(__AVX2__) && defined(__FMA__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define INLINE static inline __attribute__((always_inline))

typedef float f8 __attribute__((vector_size(32)));
typedef int32_t i8 __attribute__((vector_size(32)));
typedef uint32_t u8 __attribute__((vector_size(32)));
typedef float f8u __attribute__((vector_size(32), aligned(4)));

INLINE f8 load8(const float *p) { return (f8) * (const f8u *)p; }
INLINE void store8(float *p, f8 x) { *(f8u *)p = (f8u)x; }
INLINE f8 all8(float x) { return (f8){x, x, x, x, x, x, x, x}; }
INLINE i8 alli8(int32_t x) { return (i8){x, x, x, x, x, x, x, x}; }

/* a * b + c, rounded once */
INLINE f8 fma8(f8 a, f8 b, f8 c) {
#if defined(__AVX2__) && defined(__FMA__)
    return (f8)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
    float32x4_t x[2], y[2], z[2];
    memcpy(x, &a, 32), memcpy(y, &b, 32), memcpy(z, &c, 32);
    z[0] = vfmaq_f32(z[0], x[0], y[0]), z[1] = vfmaq_f32(z[1], x[1], y[1]);
    memcpy(&c, z, 32);
    return c;
#else
    for (int i = 0; i < 8; i++) c[i] = fmaf(a[i], b[i], c[i]);
    return c;
#endif
}

/* mask ? a : b, by lane; masks are comparison results (all ones or zero) */
INLINE f8 pick8(i8 mask, f8 a, f8 b) { return (f8)((mask & (i8)a) | (~mask & (i8)b)); }
/* the larger; b where a is NaN */
INLINE f8 max8(f8 a, f8 b) { return pick8(a > b, a, b); }

/* ((0+4)+(2+6)) + ((1+5)+(3+7)) */
INLINE float sum8(f8 x) { return ((x[0] + x[4]) + (x[2] + x[6])) + ((x[1] + x[5]) + (x[3] + x[7])); }
INLINE float top8(f8 x) {
    float m = x[0];
    for (int i = 1; i < 8; i++) m = x[i] > m ? x[i] : m;
    return m;
}

/* The first n < 8 floats of p, the rest `fill`. */
INLINE f8 load_part(const float *p, long n, float fill) {
    float lanes[8] = {fill, fill, fill, fill, fill, fill, fill, fill};
    for (long i = 0; i < n; i++) lanes[i] = p[i];
    return load8(lanes);
}
INLINE void store_part(float *p, long n, f8 x) {
    float lanes[8];
    store8(lanes, x);
    for (long i = 0; i < n; i++) p[i] = lanes[i];
}

/* e^x to about 1 ulp: 2^n e^r with |r| <= ln2 / 2 and a degree-7 polynomial; 0 below -87.3, inf above 88.7, NaN kept. */
INLINE f8 exp8(f8 x) {
    const f8 magic = all8(12582912.0f); /* 1.5 * 2^23: adding it rounds to an integer */
    f8 t = fma8(x, all8(1.44269504088896341f), magic);
    f8 n = t - magic;
    i8 k = (i8)t - (i8)magic;
    f8 r = fma8(n, all8(-0.693359375f), x);
    r = fma8(n, all8(2.12194440e-4f), r);
    f8 p = all8(1.9841270e-4f);
    p = fma8(p, r, all8(1.3888889e-3f));
    p = fma8(p, r, all8(8.3333333e-3f));
    p = fma8(p, r, all8(4.1666667e-2f));
    p = fma8(p, r, all8(1.6666667e-1f));
    p = fma8(p, r, all8(0.5f));
    p = fma8(p, r, all8(1.0f));
    p = fma8(p, r, all8(1.0f));
    i8 half = k >> 1; /* in two steps, so that 2^128 does not overflow early */
    p = p * (f8)((half + 127) << 23) * (f8)((k - half + 127) << 23);
    p = pick8(x < all8(-87.33654f), all8(0.0f), p);
    return pick8(x > all8(88.72283f), all8(INFINITY), p);
}

/* ln x of a normal positive x to about 1 ulp: mantissa in [sqrt(1/2), sqrt(2)), ln m = 2 artanh((m - 1) / (m + 1)) as a series. */
INLINE f8 log8(f8 x) {
    i8 bits = (i8)x;
    i8 e = ((bits - 0x3f3504f3) >> 23);
    f8 m = (f8)(bits - (e << 23));
    f8 exponent = __builtin_convertvector(e, f8);
    f8 s = (m - 1.0f) / (m + 1.0f), z = s * s;
    f8 p = all8(0.18181818f);
    p = fma8(p, z, all8(0.22222222f));
    p = fma8(p, z, all8(0.28571429f));
    p = fma8(p, z, all8(0.4f));
    p = fma8(p, z, all8(0.66666667f));
    f8 tail = fma8(exponent, all8(-2.12194440e-4f), s * z * p);
    /* 2 s = (m - 1) - s (m - 1): exact first term keeps relative precision near 1 */
    f8 body = (m - 1.0f) + (tail - s * (m - 1.0f));
    return fma8(exponent, all8(0.693359375f), body);
}

#endif

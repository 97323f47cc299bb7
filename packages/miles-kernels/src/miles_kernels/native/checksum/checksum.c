/* The checksum of miles_kernels.checksum, term for term: sums over blocks of 2048 words, mixed and added modulo 2^64. */
#include <stdint.h>
#include <string.h>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define EXPORT __attribute__((visibility("default")))
#define WORDS 2048L
#define LOW 0x9E3779B1u
#define HIGH 0x85EBCA77u
#define GOLDEN 0x9E3779B97F4A7C15u

static uint64_t mix(uint64_t x) {
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
    return x ^ (x >> 31);
}

static uint64_t term(uint64_t word, uint32_t j) {
    uint64_t x = (uint32_t)word + LOW * (j + 1), y = (uint32_t)(word >> 32) + HIGH * (j + 1);
    x = (uint32_t)x, y = (uint32_t)y;
    return x * y + (y << 32) + x;
}

/* Sum of the terms of `count` words. */
static uint64_t block_sum(const unsigned char *at, long count) {
    uint64_t sum = 0;
    long j = 0;
#if defined(__AVX2__)
    __m256i key = _mm256_setr_epi32((int)LOW, (int)HIGH, (int)(LOW * 2), (int)(HIGH * 2), (int)(LOW * 3), (int)(HIGH * 3),
                                    (int)(LOW * 4), (int)(HIGH * 4));
    const __m256i step = _mm256_setr_epi32((int)(LOW * 4), (int)(HIGH * 4), (int)(LOW * 4), (int)(HIGH * 4), (int)(LOW * 4),
                                           (int)(HIGH * 4), (int)(LOW * 4), (int)(HIGH * 4));
    __m256i a = _mm256_setzero_si256(), b = a, c = a, d = a;
#define TERM(to, plain, offset)                                                                  \
    {                                                                                            \
        __m256i x = _mm256_add_epi32(_mm256_loadu_si256((const void *)(at + 8 * j + offset)), key); \
        to = _mm256_add_epi64(to, _mm256_mul_epu32(x, _mm256_srli_epi64(x, 32)));                \
        plain = _mm256_add_epi64(plain, x);                                                      \
        key = _mm256_add_epi32(key, step);                                                       \
    }
    for (; j + 8 <= count; j += 8) {
        TERM(a, b, 0)
        TERM(c, d, 32)
    }
    uint64_t lanes[4];
    _mm256_storeu_si256((void *)lanes, _mm256_add_epi64(_mm256_add_epi64(a, b), _mm256_add_epi64(c, d)));
    sum = lanes[0] + lanes[1] + lanes[2] + lanes[3];
#endif
    for (; j < count; j++) {
        uint64_t word;
        memcpy(&word, at + 8 * j, 8);
        sum += term(word, (uint32_t)j);
    }
    return sum;
}

/* Sum over the blocks of `size` bytes, the first being block `first` of its tensor; copied to `target` first, a block at a time,
 * and then read from there, where `target` is given. Little-endian machines only. */
EXPORT uint64_t mk_checksum(const unsigned char *source, unsigned char *target, long size, long first) {
    uint64_t total = 0;
    for (long at = 0, block = first; at < size; at += 8 * WORDS, block++) {
        long here = size - at < 8 * WORDS ? size - at : 8 * WORDS, words = here / 8;
        const unsigned char *from = source + at;
        if (target) {
            memcpy(target + at, from, (size_t)here);
            from = target + at;
        }
        uint64_t sum = block_sum(from, words);
        if (here % 8) {
            uint64_t last = 0;
            memcpy(&last, from + 8 * words, (size_t)(here % 8));
            sum += term(last, (uint32_t)words);
        }
        total += mix(sum + (uint64_t)(block + 1) * GOLDEN);
    }
    return total;
}

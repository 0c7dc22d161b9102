/* Vectors of doubles, and how elements of any dtype are read into them. */

#include <math.h>
#include <stdint.h>
#include <string.h>

/* Vectors of the width that the processor has: compilers take wider ones to pieces badly. */
#if defined(__AVX512F__)
#define LANES 8
#elif defined(__AVX__)
#define LANES 4
#else
#define LANES 2
#endif
typedef double vec __attribute__((vector_size(8 * LANES), may_alias));
typedef double loose __attribute__((vector_size(8 * LANES), may_alias, aligned(8))); /* at any element */
typedef int64_t ints __attribute__((vector_size(8 * LANES), may_alias));
typedef uint64_t bits __attribute__((vector_size(8 * LANES), may_alias));
typedef float narrow __attribute__((vector_size(4 * LANES), may_alias));
typedef int32_t bins __attribute__((vector_size(4 * LANES), may_alias));

enum { FLOAT32, FLOAT64, FLOAT16, BFLOAT16, UINT8, INT8, INT16, INT32 };

/* -------- lanes */

static inline vec all(double x) { return x - (vec){0}; }
static inline vec either(ints mask, vec yes, vec no) { return (vec)((mask & (ints)yes) | (~mask & (ints)no)); }
static inline vec size_of(vec x) { return (vec)((ints)x & INT64_MAX); }
static inline vec larger(vec x, vec most) { return either((ints)(x > most), x, most); } /* a NaN in x is passed over */

static double sum(vec x)
{
    for (int half = LANES / 2; half; half /= 2)
        for (int lane = 0; lane < half; lane++)
            x[lane] += x[lane + half];
    return x[0];
}

static int64_t total(ints x)
{
    int64_t result = 0;
    for (int lane = 0; lane < LANES; lane++)
        result += x[lane];
    return result;
}

static double largest(vec x)
{
    double result = x[0];
    for (int lane = 1; lane < LANES; lane++)
        result = x[lane] > result ? x[lane] : result;
    return result;
}

/* -------- reading */

#define CONVERT(kind, type, value)                                                                                     \
    case kind: {                                                                                                       \
        typedef type __attribute__((aligned(1), may_alias)) any;                                                       \
        const any *from = (const any *)data + start;                                                                   \
        for (int64_t i = 0; i < n; i++)                                                                                \
            to[i] = value;                                                                                             \
        break;                                                                                                         \
    }

static inline float of_bits(uint32_t bits)
{
    float result;
    memcpy(&result, &bits, sizeof result);
    return result;
}

static inline float of_half(uint16_t half)
{
    uint32_t sign = (uint32_t)(half & 0x8000) << 16, rest = half & 0x7FFF;
    uint32_t normal = (rest << 13) + (112u << 23), special = (rest << 13) | 0x7F800000;
    float small = (float)(int32_t)rest * 0x1p-24f;
    uint32_t subnormal;
    memcpy(&subnormal, &small, sizeof small);
    return of_bits(sign | (rest < 0x400 ? subnormal : rest < 0x7C00 ? normal : special));
}

/* `n` elements from `start` on as doubles, and zeros behind them up to a whole vector. */
static void load(double *restrict to, const void *data, int64_t kind, int64_t start, int64_t n)
{
    switch (kind) {
        CONVERT(FLOAT32, float, (double)from[i])
        CONVERT(FLOAT64, double, from[i])
        CONVERT(FLOAT16, uint16_t, (double)of_half(from[i]))
        CONVERT(BFLOAT16, uint16_t, (double)of_bits((uint32_t)from[i] << 16))
        CONVERT(UINT8, uint8_t, (double)from[i])
        CONVERT(INT8, int8_t, (double)from[i])
        CONVERT(INT16, int16_t, (double)from[i])
        CONVERT(INT32, int32_t, (double)from[i])
    }
    for (int64_t i = n; i % LANES; i++)
        to[i] = 0;
}

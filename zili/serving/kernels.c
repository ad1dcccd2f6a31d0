/* What an engine does between the products of a layer, each in one pass over memory.

Compiled by kernels.py for the sizes of one model: HEADS, KV_HEADS, HEAD_DIM, and BFLOAT16 where its numbers are that.
Sums are float32. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { GROUP = HEADS / KV_HEADS, HALF = HEAD_DIM / 2, WIDTH = (HEADS + 2 * KV_HEADS) * HEAD_DIM };
enum { ENOUGH = 8192 }; /* numbers for which it pays to wake other threads */

#ifdef BFLOAT16
typedef uint16_t number;

static inline float wide(number x) {
    uint32_t bits = (uint32_t)x << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* To the nearest, and between two to the even one. */
static inline number narrow(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return (bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded;
}
#else
typedef float number;

static inline float wide(number x) { return x; }
static inline number narrow(float value) { return value; }
#endif

/* e^x of x <= 0, without a branch: 2^n times the series of what is left, off by 2e-7 of it at most. */
static inline float exponential(float x) {
    x = x < -87.0f ? -87.0f : x;
    float n = rintf(x * 1.44269504f);
    float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float series = 1.0f + r * (1.0f + r * (0.5f + r * (1.0f / 6 + r * (1.0f / 24 + r * (1.0f / 120 + r / 720)))));
    uint32_t bits = (uint32_t)((int32_t)n + 127) << 23;
    float power;
    memcpy(&power, &bits, sizeof power);
    return series * power;
}

/* RMSNorm of x [rows, width]: x / sqrt(mean(x^2) + eps) * weight [width]. */
void norm(int64_t rows, int64_t width, const number *x, const float *weight, float eps, number *out) {
#pragma omp parallel for if (rows * width > ENOUGH)
    for (int64_t row = 0; row < rows; row++) {
        const number *from = x + row * width;
        number *to = out + row * width;
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < width; i++) sum += wide(from[i]) * wide(from[i]);
        float scale = 1 / sqrtf(sum / width + eps);
        for (int64_t i = 0; i < width; i++) to[i] = narrow(wide(from[i]) * scale * weight[i]);
    }
}

/* SwiGLU: silu of the first half of each row of joined [rows, 2 * width], times the second; out [rows, width]. */
void swiglu(int64_t rows, int64_t width, const number *joined, number *out) {
#pragma omp parallel for if (rows * width > ENOUGH)
    for (int64_t row = 0; row < rows; row++) {
        const number *gate = joined + row * 2 * width, *up = gate + width;
        for (int64_t i = 0; i < width; i++) {
            float x = wide(gate[i]), power = exponential(-fabsf(x));
            out[row * width + i] = narrow(x * (x < 0 ? power : 1) / (1 + power) * wide(up[i]));
        }
    }
}

/* A head turned by its position; `to` may be `from`. */
static inline void turn(const number *from, const float *cos, const float *sin, number *to) {
    for (int i = 0; i < HALF; i++) {
        float a = wide(from[i]), b = wide(from[i + HALF]);
        to[i] = narrow(a * cos[i] - b * sin[i]);
        to[i + HALF] = narrow(b * cos[i] + a * sin[i]);
    }
}

/* Turns the queries of heads [tokens, WIDTH] where they are, and puts keys, turned, and values where they are kept:
   in rows [tokens, KV_HEADS] of keys and values [..., HEAD_DIM]. cos, sin [tokens, HEAD_DIM]. */
void place(int64_t tokens, number *heads, const float *cos, const float *sin, const int64_t *rows, number *keys,
           number *values) {
#pragma omp parallel for if (tokens * WIDTH > ENOUGH)
    for (int64_t token = 0; token < tokens; token++) {
        number *head = heads + token * WIDTH;
        const float *c = cos + token * HEAD_DIM, *s = sin + token * HEAD_DIM;
        for (int h = 0; h < HEADS; h++, head += HEAD_DIM) turn(head, c, s, head);
        for (int k = 0; k < KV_HEADS; k++, head += HEAD_DIM) {
            int64_t row = rows[token * KV_HEADS + k] * HEAD_DIM;
            turn(head, c, s, keys + row);
            memcpy(values + row, head + KV_HEADS * HEAD_DIM, HEAD_DIM * sizeof(number));
        }
    }
}

/* The heads of one token that share a key head, over `length` keys and values; `scores` [GROUP, length] is scratch. */
static void attend_one(const number *query, const number *key, const number *value, int64_t length, float *scores,
                       number *out) {
    float wanted[GROUP][HEAD_DIM], highest[GROUP], total[GROUP], sum[GROUP][HEAD_DIM];
    for (int g = 0; g < GROUP; g++) {
        highest[g] = -INFINITY;
        for (int i = 0; i < HEAD_DIM; i++) wanted[g][i] = wide(query[g * HEAD_DIM + i]) / sqrtf(HEAD_DIM);
    }
    for (int64_t t = 0; t < length; t++, key += HEAD_DIM) {
        float row[HEAD_DIM];
        for (int i = 0; i < HEAD_DIM; i++) row[i] = wide(key[i]);
        for (int g = 0; g < GROUP; g++) {
            float score = 0;
#pragma omp simd reduction(+ : score)
            for (int i = 0; i < HEAD_DIM; i++) score += wanted[g][i] * row[i];
            scores[g * length + t] = score;
            highest[g] = score > highest[g] ? score : highest[g];
        }
    }
    for (int g = 0; g < GROUP; g++) {
        float all = 0, *score = scores + g * length;
#pragma omp simd reduction(+ : all)
        for (int64_t t = 0; t < length; t++) all += score[t] = exponential(score[t] - highest[g]);
        total[g] = all;
    }
    memset(sum, 0, sizeof sum);
    for (int64_t t = 0; t < length; t++, value += HEAD_DIM) {
        float row[HEAD_DIM];
        for (int i = 0; i < HEAD_DIM; i++) row[i] = wide(value[i]);
        for (int g = 0; g < GROUP; g++)
            for (int i = 0; i < HEAD_DIM; i++) sum[g][i] += scores[g * length + t] * row[i];
    }
    for (int g = 0; g < GROUP; g++)
        for (int i = 0; i < HEAD_DIM; i++) out[g * HEAD_DIM + i] = narrow(sum[g][i] / total[g]);
}

/* Attention of single tokens, each to its own sequence, after `place`: queries [tokens, HEADS * HEAD_DIM] with `stride`
   from one to the next, positions [tokens], out [tokens, HEADS * HEAD_DIM]. Returns whether there was memory for it. */
int attend(int64_t tokens, const number *queries, int64_t stride, const int64_t *positions, const int64_t *rows,
           const number *keys, const number *values, number *out) {
    int64_t longest = 0;
    int failed = 0;
    for (int64_t token = 0; token < tokens; token++)
        longest = positions[token] >= longest ? positions[token] + 1 : longest;
#pragma omp parallel reduction(| : failed)
    {
        float *scores = malloc(sizeof(float) * GROUP * longest);
        failed = !scores;
#pragma omp for schedule(dynamic) collapse(2)
        for (int64_t token = 0; token < tokens; token++)
            for (int k = 0; k < KV_HEADS; k++) {
                int64_t first = (rows[token * KV_HEADS + k] - positions[token]) * HEAD_DIM;
                int64_t group = k * GROUP * HEAD_DIM;
                if (scores)
                    attend_one(queries + token * stride + group, keys + first, values + first, positions[token] + 1,
                               scores, out + token * HEADS * HEAD_DIM + group);
            }
        free(scores);
    }
    return !failed;
}

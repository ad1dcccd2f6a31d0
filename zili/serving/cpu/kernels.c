/* What a layer does for a step of an engine: products, and what lies between them, each in one pass over memory.

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

/* e^x of x <= 0, without a branch: 2^n times the series of what is left, off by 2.3e-7 of it at most. */
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

/* Some numbers at once, whole registers of them. Rows of a product meet them there: ROWS * VECTORS sums, VECTORS of the
   weight and a number of a row are all the registers there are, so that each is fetched once. */
#ifdef __AVX512F__
enum { LANES = 16, ROWS = 8, VECTORS = 3 };
#define KEEP(register) __asm__("" : "+v"(register))
#elif defined(__AVX__)
enum { LANES = 8, ROWS = 4, VECTORS = 3 };
#define KEEP(register) __asm__("" : "+x"(register))
#else
enum { LANES = 4, ROWS = 4, VECTORS = 4 };
#define KEEP(register) (void)(register)
#endif
enum { BLOCK = VECTORS * LANES, MOST = 64 };
typedef float vector __attribute__((vector_size(LANES * sizeof(float)), aligned(sizeof(number)), may_alias));

static inline vector wide_vector(const number *from) {
#ifdef BFLOAT16
    typedef number narrow_vector
        __attribute__((vector_size(LANES * sizeof(number)), aligned(sizeof(number)), may_alias));
    typedef uint32_t bits __attribute__((vector_size(LANES * sizeof(uint32_t))));
    return (vector)(__builtin_convertvector(*(const narrow_vector *)from, bits) << 16);
#else
    return *(const vector *)from;
#endif
}

/* Outputs in a block of a weight. */
int64_t block(void) { return BLOCK; }

/* `rows` rows of x [rows, in], at most ROWS, times a block [in, BLOCK] of a weight; adds bias and other where there are
   any. `left` outputs of the block there are, of `out` in a row. Meanwhile it asks for what is read next, at `ahead`,
   `step` bytes for each number of a row. */
static void tile(int64_t rows, int64_t in, int64_t out, const float *x, const number *weight, const char *ahead,
                 int64_t step, int64_t left, const float *bias, const number *other, number *to) {
    const float *row[ROWS];
    vector sum[ROWS][VECTORS];
    for (int r = 0; r < ROWS; r++) {
        row[r] = x + (r < rows ? r : rows - 1) * in;
        for (int v = 0; v < VECTORS; v++) sum[r][v] = (vector){0};
    }
    for (int64_t i = 0; i < in; i++, weight += BLOCK, ahead += step) {
        vector kept[VECTORS];
        for (int v = 0; v < VECTORS; v++) {
            kept[v] = wide_vector(weight + v * LANES);
            KEEP(kept[v]); /* else GCC fetches it again for each row, which takes a third to a half longer */
        }
        __builtin_prefetch(ahead);
        for (int r = 0; r < ROWS; r++)
            for (int v = 0; v < VECTORS; v++) sum[r][v] += kept[v] * row[r][i];
    }
    for (int r = 0; r < rows; r++, to += out) {
        float found[BLOCK];
        memcpy(found, sum[r], sizeof found);
        for (int64_t o = 0; o < (left < BLOCK ? left : BLOCK); o++)
            to[o] = narrow(found[o] + (bias ? bias[o] : 0) + (other ? wide(other[r * out + o]) : 0));
    }
}

/* to [rows, out], a row at least, is x [rows, in] times weight, plus bias [out] and other [rows, out] unless these are
   null. The weight lies in blocks, [out / BLOCK, in, BLOCK], so that it is read as it lies. Returns whether there was
   memory for it. */
int product(int64_t rows, int64_t in, int64_t out, const number *x, const number *weight, const float *bias,
            const number *other, number *to) {
    const float *wide_x = (const float *)x;
#ifdef BFLOAT16
    float *scratch = malloc(sizeof(float) * rows * in);
    if (!scratch) return 0;
    for (int64_t i = 0; i < rows * in; i++) scratch[i] = wide(x[i]);
    wide_x = scratch;
#endif
    /* MOST rows at a time, which stay near while they meet all blocks; all parts of about one size. */
    int64_t parts = (rows + MOST - 1) / MOST, blocks = (out + BLOCK - 1) / BLOCK;
    int64_t tiles = (rows + parts * ROWS - 1) / (parts * ROWS), size = tiles * ROWS;
    int64_t step = BLOCK * sizeof(number) / tiles;
#pragma omp parallel for schedule(static) collapse(2)
    for (int64_t part = 0; part < parts; part++)
        for (int64_t b = 0; b < blocks; b++) {
            int64_t first = part * size, last = rows < first + size ? rows : first + size, o = b * BLOCK;
            const char *ahead = (const char *)(weight + (o + BLOCK) * in);
            for (int64_t row = first; row < last; row += ROWS, ahead += step * in)
                tile(last - row < ROWS ? last - row : ROWS, in, out, wide_x + row * in, weight + o * in, ahead, step,
                     out - o, bias ? bias + o : 0, other ? other + row * out + o : 0, to + row * out + o);
        }
#ifdef BFLOAT16
    free(scratch);
#endif
    return 1;
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

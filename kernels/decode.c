/* One token through GPT-2, on a CPU with AVX512: what model.py's forward() does for one sequence, one new token and a cache.
 * decode.py builds this, fills in the structs and checks it against model.py.
 *
 * Every weight is read once and from memory, so its bytes are the floor; everything here is about reaching the rate of that
 * reading. For each 64 bytes of weights a core may spend some eight cycles. bfloat16: one instruction multiplies 32 pairs and
 * adds them up. int8: converting to float takes too long, so x becomes 16-bit integers instead, split into two bytes, each of
 * which multiplies 64 weights in one instruction (VNNI); 16 bits are twice those of the bfloat16 that x is rounded to otherwise.
 *
 * Between the layers numbers are float32. Rows and heads are dealt out to OpenMP's threads, which are torch's own: both come from
 * the one libgomp that is loaded.
 */
#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

/* WIDEST, the longest vector, and LONGEST, the most positions, come from decode.py, which refuses what is larger. */
#define AHEAD 4096 /* bytes to prefetch ahead: the hardware's own prefetching ends at each page; 3.4 -> 3.0 ms in int8 */

typedef struct { /* y = W x + b; W (rows, width), bfloat16, or int8 if scales is not null */
    const void *weight;
    const float *scales;     /* (rows) */
    const int32_t *row_sums; /* (rows): of int8 weights */
    const uint16_t *bias;    /* (rows) bfloat16, or null */
    long rows, width;
} Linear;

typedef struct { /* LayerNorm: (width) bfloat16 each, bias or null */
    const uint16_t *weight, *bias;
} Norm;

typedef struct {
    Norm ln_1, ln_2;
    Linear c_attn, attn_proj, c_fc, mlp_proj;
    uint16_t *keys, *values; /* (heads, positions, head width) bfloat16: one layer of the cache */
} Layer;

typedef struct {
    const uint16_t *wte, *wpe; /* (tokens, width), (positions, width) bfloat16 */
    const Layer *layers;
    Norm ln_f;
    Linear head;
    long n_layer, n_head, n_embd, tokens, positions;
} Model;

static float to_float(uint16_t bf16) {
    uint32_t bits = (uint32_t)bf16 << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

static uint16_t to_bf16(float value) { /* to the nearest, ties to even */
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

static __m512 floats(const uint16_t *bf16) { /* 16 of them */
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)bf16)), 16));
}

static float dot_bf16(const uint16_t *w, const uint16_t *x, long width) { /* width a multiple of 32 */
    __m512 sums[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
    long i = 0;
    for (; i + 128 <= width; i += 128) /* four sums at a time: none waits for its own last product */
        for (int k = 0; k < 4; k++) {
            __m512i v = _mm512_loadu_si512(w + i + 32 * k);
            _mm_prefetch((const char *)(w + i + 32 * k) + AHEAD, _MM_HINT_T0);
            sums[k] = _mm512_dpbf16_ps(sums[k], (__m512bh)v, (__m512bh)_mm512_loadu_si512(x + i + 32 * k));
        }
    for (; i < width; i += 32)
        sums[0] = _mm512_dpbf16_ps(sums[0], (__m512bh)_mm512_loadu_si512(w + i), (__m512bh)_mm512_loadu_si512(x + i));
    return _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(sums[0], sums[1]), _mm512_add_ps(sums[2], sums[3])));
}

/* The sum of w[i] * (256 high[i] + low[i] - 32768); row_sum: of w. Width a multiple of 64. Integers add up exactly, sixteen sums
 * of each byte; one float32 sum at the end takes a third of the time of two in integers. */
static float dot_int8(const int8_t *w, const uint8_t *high, const uint8_t *low, long width, int32_t row_sum) {
    __m512i l0 = _mm512_setzero_si512(), l1 = l0, h1 = l0;
    __m512i h0 = _mm512_zextsi128_si512(_mm_cvtsi32_si128(-128 * row_sum)); /* 256 * 128 = 32768 */
    long i = 0;
    for (; i + 128 <= width; i += 128) { /* each sum stays below WIDEST * 255 * 127 < 2^31 */
        __m512i v = _mm512_loadu_si512(w + i), u = _mm512_loadu_si512(w + i + 64);
        _mm_prefetch((const char *)(w + i + AHEAD), _MM_HINT_T0);
        _mm_prefetch((const char *)(w + i + 64 + AHEAD), _MM_HINT_T0);
        h0 = _mm512_dpbusd_epi32(h0, _mm512_load_si512(high + i), v);
        l0 = _mm512_dpbusd_epi32(l0, _mm512_load_si512(low + i), v);
        h1 = _mm512_dpbusd_epi32(h1, _mm512_load_si512(high + i + 64), u);
        l1 = _mm512_dpbusd_epi32(l1, _mm512_load_si512(low + i + 64), u);
    }
    for (; i < width; i += 64) {
        __m512i v = _mm512_loadu_si512(w + i);
        h0 = _mm512_dpbusd_epi32(h0, _mm512_load_si512(high + i), v);
        l0 = _mm512_dpbusd_epi32(l0, _mm512_load_si512(low + i), v);
    }
    __m512 highs = _mm512_cvtepi32_ps(_mm512_add_epi32(h0, h1)), lows = _mm512_cvtepi32_ps(_mm512_add_epi32(l0, l1));
    return _mm512_reduce_add_ps(_mm512_fmadd_ps(highs, _mm512_set1_ps(256), lows));
}

static void linear(const Linear *m, const float *x, float *y, int threads) {
    uint16_t rounded[WIDEST] __attribute__((aligned(64)));
    uint8_t high[WIDEST] __attribute__((aligned(64))), low[WIDEST] __attribute__((aligned(64)));
    float step = 1, largest = 0;
    if (m->scales) {
        for (long i = 0; i < m->width; i++)
            largest = fmaxf(largest, fabsf(x[i]));
        step = largest > 0 ? largest / 32767 : 1;
        for (long i = 0; i < m->width; i++) {
            int32_t u = (int32_t)rintf(x[i] / step) + 32768; /* 1 ... 65535: the instruction wants x without a sign */
            high[i] = (uint8_t)(u >> 8), low[i] = (uint8_t)u;
        }
    } else
        for (long i = 0; i < m->width; i++)
            rounded[i] = to_bf16(x[i]);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long r = 0; r < m->rows; r++) {
        float sum;
        if (m->scales)
            sum = dot_int8((const int8_t *)m->weight + r * m->width, high, low, m->width, m->row_sums[r]) * step * m->scales[r];
        else
            sum = dot_bf16((const uint16_t *)m->weight + r * m->width, rounded, m->width);
        y[r] = sum + (m->bias ? to_float(m->bias[r]) : 0.0f);
    }
}

static void norm(const Norm *m, const float *x, float *y, long width) {
    float mean = 0, variance = 0;
    for (long i = 0; i < width; i++)
        mean += x[i] / width;
    for (long i = 0; i < width; i++)
        variance += (x[i] - mean) * (x[i] - mean) / width;
    float scale = 1 / sqrtf(variance + 1e-5f); /* nn.LayerNorm's epsilon */
    for (long i = 0; i < width; i++)
        y[i] = (x[i] - mean) * scale * to_float(m->weight[i]) + (m->bias ? to_float(m->bias[i]) : 0.0f);
}

/* qkv (3, heads, D): append k and v at `position`, attend to all up to it. y (heads, D). D a multiple of 32, up to 256. */
static void attend(const Model *m, const Layer *layer, const float *qkv, float *y, long position, int threads) {
    long D = m->n_embd / m->n_head;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long head = 0; head < m->n_head; head++) {
        uint16_t q[256], *keys = layer->keys + head * m->positions * D, *values = layer->values + head * m->positions * D;
        for (long d = 0; d < D; d++) {
            q[d] = to_bf16(qkv[head * D + d]);
            keys[position * D + d] = to_bf16(qkv[m->n_embd + head * D + d]);
            values[position * D + d] = to_bf16(qkv[2 * m->n_embd + head * D + d]);
        }
        float scores[LONGEST], largest = -INFINITY, total = 0;
        for (long s = 0; s <= position; s++) {
            scores[s] = dot_bf16(keys + s * D, q, D) / sqrtf((float)D);
            largest = fmaxf(largest, scores[s]);
        }
        for (long s = 0; s <= position; s++)
            total += scores[s] = expf(scores[s] - largest);
        __m512 sums[16] = {0};
        for (long s = 0; s <= position; s++)
            for (long d = 0; d < D; d += 16)
                sums[d / 16] = _mm512_fmadd_ps(_mm512_set1_ps(scores[s] / total), floats(values + s * D + d), sums[d / 16]);
        for (long d = 0; d < D; d += 16)
            _mm512_storeu_ps(y + head * D + d, sums[d / 16]);
    }
}

/* Logits (rows of the head) after `token` at `position`; the cache holds the positions before it, and then this one too.
 * Returns 0, or -1 for a token or a position that has no row: nothing is read then. */
int decode(const Model *m, long token, long position, float *logits, int threads) {
    long C = m->n_embd;
    if (token < 0 || token >= m->tokens || position < 0 || position >= m->positions)
        return -1;
    float x[WIDEST], read[WIDEST], made[WIDEST];
    for (long i = 0; i < C; i++)
        x[i] = to_float(m->wte[token * C + i]) + to_float(m->wpe[position * C + i]);
    for (long n = 0; n < m->n_layer; n++) {
        const Layer *layer = m->layers + n;
        norm(&layer->ln_1, x, read, C);
        linear(&layer->c_attn, read, made, threads);
        attend(m, layer, made, read, position, threads);
        linear(&layer->attn_proj, read, made, threads);
        for (long i = 0; i < C; i++)
            x[i] += made[i];
        norm(&layer->ln_2, x, read, C);
        linear(&layer->c_fc, read, made, threads);
        for (long i = 0; i < 4 * C; i++) /* GELU's tanh form */
            made[i] *= 0.5f * (1 + tanhf(0.7978845608f * (made[i] + 0.044715f * made[i] * made[i] * made[i])));
        linear(&layer->mlp_proj, made, read, threads);
        for (long i = 0; i < C; i++)
            x[i] += read[i];
    }
    norm(&m->ln_f, x, read, C);
    linear(&m->head, read, logits, threads);
    return 0;
}

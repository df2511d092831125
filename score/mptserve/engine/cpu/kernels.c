/* Linear layers with weights in bfloat16, 8 or 4 bits, and attention, for x86 processors with AVX2 or more.

   Compiled by library.py on the machine that runs it. Everything here is deterministic: a row's output depends on its
   input alone, not on the rows beside it and not on the number of threads.

   Vectors are GCC's, as wide as the processor's. Only products of bytes and reductions of a vector name instructions.

   Shape letters as in model.py: N tokens of a step, H heads, D head size; T tokens of a slot. A panel is two vectors of
   outputs of a linear layer. */

#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if !defined(__AVX2__) || !defined(__FMA__)
#error "needs AVX2 and FMA"
#endif

#define INLINE static inline __attribute__((always_inline))
#define GROUP 32 /* inputs with a scale and a zero of their own in 4 bits */
#if defined(__AVX512VNNI__)
#define LANES 16
#else
#define LANES 8
#endif
#define PARTS 2 /* vectors of sums for a row: with more, fewer rows fit into the registers, and weights are read again */
#define PANEL (PARTS * LANES)

typedef float floats __attribute__((vector_size(4 * LANES)));
typedef float loose __attribute__((vector_size(4 * LANES), aligned(4))); /* somewhere in memory */
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t uints __attribute__((vector_size(4 * LANES)));
typedef uint16_t shorts __attribute__((vector_size(2 * LANES)));
typedef uint8_t bytes __attribute__((vector_size(4 * LANES)));
typedef uint16_t pairs __attribute__((vector_size(4 * LANES)));
typedef int8_t few __attribute__((vector_size(LANES)));

/* ---- what the sets of instructions do differently ----
   ROWS: rows that one pass over a panel computes, as many as the registers hold sums of.  ROWS4: the same for 4 bits,
   which need sums of a group beside those of the row.
   code8: loads 8-bit codes for dot8.  dot8: acc + sums of 4 neighbours of w * a, where code is code8(w).
   dot4: part + sums of neighbours of w * a for 4-bit w.  total4: turns up to 8 such sums into sums of 4 neighbours. */

#if defined(__AVX512VNNI__)
#define ROWS 12
#define ROWS4 8
#define COLUMNS 8 /* of a prompt's scores or outputs, for all queries of a tile */
INLINE ints dot(ints acc, bytes w, ints a) { return (ints)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)w, (__m512i)a); }
INLINE ints spread(int32_t x) { return (ints)_mm512_set1_epi32(x); }
INLINE float sum(floats x) { return _mm512_reduce_add_ps((__m512)x); }
INLINE int total_of(ints x) { return _mm512_reduce_add_epi32((__m512i)x); }
INLINE floats larger(floats x, floats y) { return (floats)_mm512_max_ps((__m512)x, (__m512)y); }
INLINE float largest_of(floats x) { return _mm512_reduce_max_ps((__m512)x); }
#else
#define ROWS 6
#define ROWS4 6 /* the sums of rows that leave the registers are needed once in a group: no slower than with 3 */
#define COLUMNS 2
INLINE ints spread(int32_t x) { return (ints)_mm256_set1_epi32(x); }
INLINE float sum(floats x) {
  __m128 y = _mm_add_ps(_mm256_castps256_ps128((__m256)x), _mm256_extractf128_ps((__m256)x, 1));
  y = _mm_add_ps(y, _mm_movehl_ps(y, y));
  return _mm_cvtss_f32(_mm_add_ss(y, _mm_movehdup_ps(y)));
}
INLINE int total_of(ints x) {
  for (int i = 1; i < LANES; i++) x[0] += x[i];
  return x[0];
}
INLINE floats larger(floats x, floats y) { return (floats)_mm256_max_ps((__m256)x, (__m256)y); }
INLINE float largest_of(floats x) {
  for (int i = 1; i < LANES; i++) x[0] = x[0] > x[i] ? x[0] : x[i];
  return x[0];
}
#if defined(__AVXVNNI__)
INLINE ints dot(ints acc, bytes w, ints a) { return (ints)_mm256_dpbusd_avx_epi32((__m256i)acc, (__m256i)w, (__m256i)a); }
#elif defined(PORTABLE_VNNI) /* the same without the instruction, for tests of what is around it */
INLINE ints dot(ints acc, bytes w, ints a) {
  const int8_t *codes = (const int8_t *)&a;
  for (int i = 0; i < 4 * LANES; i++) acc[i / 4] += w[i] * codes[i];
  return acc;
}
#endif
#endif

#if defined(__AVX512VNNI__) || defined(__AVXVNNI__) || defined(PORTABLE_VNNI)
#define OFFSET 128 /* 8-bit codes are stored with it added, and taken as unsigned */
INLINE bytes code8(const uint8_t *w) { return *(const bytes *)w; }
INLINE ints dot8(ints acc, bytes code, const uint8_t *w, ints a) { return (void)w, dot(acc, code, a); }
INLINE ints dot4(ints part, bytes w, ints a) { return dot(part, w, a); }
INLINE ints total4(ints part) { return part; }
#else
/* Products are added in pairs, in 16 bits, where 2 * 255 * 127 overflows. So 8-bit codes are signed, and pass their sign
   to the activation. With 4 bits eight pairs fit: 8 * 2 * 15 * 127 < 2^15. */
#define OFFSET 0
INLINE ints pairs_added(__m256i x) { return (ints)_mm256_madd_epi16(x, _mm256_set1_epi16(1)); }
INLINE bytes code8(const uint8_t *w) { return (bytes)_mm256_abs_epi8(_mm256_load_si256((const __m256i *)w)); }
INLINE ints dot8(ints acc, bytes code, const uint8_t *w, ints a) {
  const __m256i with_sign = _mm256_sign_epi8((__m256i)a, _mm256_load_si256((const __m256i *)w));
  return acc + pairs_added(_mm256_maddubs_epi16((__m256i)code, with_sign));
}
INLINE ints dot4(ints part, bytes w, ints a) {
  return (ints)_mm256_add_epi16((__m256i)part, _mm256_maddubs_epi16((__m256i)w, (__m256i)a));
}
INLINE ints total4(ints part) { return pairs_added((__m256i)part); }
#endif

/* Say how this library reads weights: outputs of a panel, and what is added to 8-bit codes. */
void layout(int *panel, int *offset) { *panel = PANEL, *offset = OFFSET; }

/* ---- functions of floats ---- */

INLINE floats all(float x) { return x - (floats){}; }
INLINE floats load(const float *p) { return *(const loose *)p; }
INLINE floats bf16(const uint16_t *p) {
  shorts bits;
  memcpy(&bits, p, sizeof bits);
  return (floats)(__builtin_convertvector(bits, uints) << 16);
}
INLINE floats pick(ints where, floats x, floats y) { return (floats)((where & (ints)x) | (~where & (ints)y)); }
INLINE floats size_of(floats x) { return (floats)((ints)x & 0x7fffffff); }

/* e^x for x <= 0 (Cody and Waite's reduction, a polynomial of degree 6; relative error below 2e-7); 0 below -87. */
INLINE floats exp_of(floats x) {
  const floats magic = all(12582912.0f); /* 1.5 * 2^23: adding it rounds to integers */
  floats t = larger(x, all(-87.0f)) * 1.44269504f + magic, n = t - magic;
  floats r = larger(x, all(-87.0f)) - n * 0.693359375f + n * 2.12194440e-4f;
  floats p = all(1.0f / 720);
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  floats y = (floats)((ints)p + ((ints)t << 23));
  return pick(x < -87.0f, (floats){}, y);
}

/* GELU by the error function of Abramowitz and Stegun 7.1.26 (error below 2e-7). */
INLINE floats gelu_of(floats x) {
  floats u = x * 0.70710678f, a = size_of(u), t = 1.0f / (1.0f + 0.3275911f * a);
  floats p = ((((1.061405429f * t - 1.453152027f) * t + 1.421413741f) * t - 0.284496736f) * t + 0.254829592f) * t;
  floats erf = 1.0f - p * exp_of(-a * a);
  return 0.5f * x * (1.0f + pick(u < 0, -erf, erf));
}

/* ---- activations ---- */

/* Return this thread's buffer number `which`, of at least `size` bytes, kept from call to call; NULL without memory. */
static void *buffer(int which, size_t size) {
  static __thread struct {
    void *at;
    size_t size;
  } kept[6];
  if (kept[which].size < size) {
    free(kept[which].at);
    kept[which].at = aligned_alloc(64, (size + 63) / 64 * 64);
    kept[which].size = kept[which].at ? size : 0;
  }
  return kept[which].at;
}

typedef struct {
  const float *weight, *bias; /* bias may be missing; without weight there is no norm */
  float eps;
} norm;

/* Write norm(x) to y, both [n_in], n_in a multiple of 32. */
static void normed(const float *x, norm n, int n_in, float *y) {
  floats total = {}, squares = {};
  for (int k = 0; k < n_in; k += LANES) total += load(x + k);
  float mean = sum(total) / n_in;
  for (int k = 0; k < n_in; k += LANES) {
    floats d = load(x + k) - mean;
    squares += d * d;
  }
  float rstd = 1.0f / sqrtf(sum(squares) / n_in + n.eps);
  for (int k = 0; k < n_in; k += LANES) {
    floats v = (load(x + k) - mean) * rstd * load(n.weight + k);
    *(loose *)(y + k) = n.bias ? v + load(n.bias + k) : v;
  }
}

/* Round x [n_in] to codes of -127 … 127; return the value of one step, or NaN if x has NaN or infinities.
   total: the sum of the codes. */
INLINE float rounded(const float *x, int n_in, int8_t *codes, int *total) {
  floats most = all(1e-30f), zeros = {};
  for (int k = 0; k < n_in; k += LANES) {
    most = larger(size_of(load(x + k)), most);
    zeros += load(x + k) * 0.0f; /* or NaN */
  }
  const float largest = largest_of(most), scale = 127.0f / largest;
  const floats magic = all(12582912.0f);
  ints sums = {};
  for (int k = 0; k < n_in; k += LANES) {
    ints code = (ints)(load(x + k) * scale + magic) - (ints)magic;
    few narrow = __builtin_convertvector(code, few);
    sums += code;
    memcpy(codes + k, &narrow, LANES);
  }
  *total = total_of(sums);
  return largest / 127.0f + sum(zeros);
}

/* A row of activations is a row of 4-byte words: n_in floats for weights in bfloat16, n_in / 4 words of codes for 8 bits,
   and for 4 bits GROUP_WORDS for each group: 8 words of codes, the value of one step, that times the sum of the group's
   codes, and -8 times the sum. */
typedef union {
  float real;
  int32_t whole;
} word;
#define GROUP_WORDS 11

static int words_of(int bits, int n_in) { return bits == 16 ? n_in : bits == 8 ? n_in / 4 : n_in / GROUP * GROUP_WORDS; }

/* Write row x [n_in] as words for weights of `bits` bits. step, total: of the row's codes, 8 bits only. */
static void to_words(int bits, const float *x, int n_in, word *out, float *step, int *total) {
  if (bits == 16) memcpy(out, x, (size_t)n_in * 4);
  if (bits == 8) *step = rounded(x, n_in, (int8_t *)out, total);
  for (int k = 0; bits == 4 && k < n_in; k += GROUP, out += GROUP_WORDS) {
    int sum_of_codes;
    out[8].real = rounded(x + k, GROUP, (int8_t *)out, &sum_of_codes);
    out[9].real = out[8].real * sum_of_codes;
    out[10].whole = -8 * sum_of_codes;
  }
}

/* ---- linear layers ---- */

#define PAD 16 /* words after each row of activations: rows a power of two apart would push each other out of the cache */
#define AHEAD 2048 /* bytes between a weight and the one that is prefetched: the processor stops at the end of a page */

typedef struct {
  int n_rows, n_out, n_in;
  const uint8_t *w;
  const float *scale; /* per output; 8 bits only */
  const float *bias, *residual;
  int gelu;
  float *y;
  const float *steps; /* [n_rows], 8 bits only: the value of one step of the row, and the sum of its codes */
  const int *totals;
} layer;

/* Finish a vector of row m's sums, from output n on: bias, GELU, residual; store it. */
static __attribute__((noinline)) void finish(const layer *l, int m, int n, floats y) {
  float *out = l->y + (size_t)m * l->n_out + n;
  const float *residual = l->residual ? l->residual + (size_t)m * l->n_out + n : NULL;
  if (n + LANES <= l->n_out) {
    if (l->bias) y += load(l->bias + n);
    if (l->gelu) y = gelu_of(y);
    if (residual) y += load(residual);
    *(loose *)out = y;
    return;
  }
  for (int i = 0; n + i < l->n_out; i++) y[i] += l->bias ? l->bias[n + i] : 0;
  if (l->gelu) y = gelu_of(y);
  for (int i = 0; n + i < l->n_out; i++) out[i] = y[i] + (residual ? residual[i] : 0);
}

/* One panel of 8-bit weights, [n_in / 4, PANEL, 4] bytes, with `rows` rows from m on, whose words are a [.., rows]. */
INLINE void panel8(const layer *l, int rows, int m, int n, const word *a) {
  const uint8_t *w = l->w + (size_t)n * l->n_in;
  ints acc[ROWS][PARTS];
  for (int r = 0; r < rows; r++)
    for (int p = 0; p < PARTS; p++) acc[r][p] = (ints){} - OFFSET * l->totals[m + r];
  for (int k = 0; k < l->n_in; k += 4, w += 4 * PANEL, a += rows) {
    for (int line = 0; line < 4 * PANEL; line += 64) __builtin_prefetch(w + AHEAD + line);
    for (int p = 0; p < PARTS; p++) {
      const bytes code = code8(w + p * sizeof code);
      for (int r = 0; r < rows; r++) acc[r][p] = dot8(acc[r][p], code, w + p * sizeof code, spread(a[r].whole));
    }
  }
  for (int r = 0; r < rows; r++)
    for (int p = 0; p < PARTS && n + p * LANES < l->n_out; p++)
      finish(l, m + r, n + p * LANES,
             __builtin_convertvector(acc[r][p], floats) * (load(l->scale + n + p * LANES) * l->steps[m + r]));
}

/* The same for 4 bits: a group of the panel is [4, PANEL, 4] bytes, then its scales and zeros in bfloat16. Byte (j, n, t)
   holds the codes of output n for the group's inputs 4 j + t (low half) and 16 + 4 j + t (high half).
   a: [n_in / 32, GROUP_WORDS, rows]. */
#define GROUP_BYTES (PANEL * GROUP / 2 + 2 * 2 * PANEL)
INLINE void panel4(const layer *l, int rows, int m, int n, const word *a) {
  const int groups = l->n_in / GROUP;
  const uint8_t *w = l->w + (size_t)(n / PANEL) * groups * GROUP_BYTES;
  floats y[ROWS4][PARTS];
  for (int r = 0; r < rows; r++)
    for (int p = 0; p < PARTS; p++) y[r][p] = (floats){};
  for (int g = 0; g < groups; g++, w += GROUP_BYTES, a += GROUP_WORDS * rows) {
    for (int line = 0; line < GROUP_BYTES; line += 64) __builtin_prefetch(w + AHEAD + line);
    ints acc[ROWS4][PARTS];
    for (int r = 0; r < rows; r++)
      for (int p = 0; p < PARTS; p++) acc[r][p] = (ints){};
#pragma GCC unroll 1 /* or the activations of all are loaded first, and the sums leave the registers: half the speed */
    for (int j = 0; j < 4; j++) {
      bytes low[PARTS], high[PARTS];
      for (int p = 0; p < PARTS; p++) {
        const bytes both = *(const bytes *)(w + 4 * PANEL * j + p * sizeof both);
        low[p] = both & 15, high[p] = (bytes)((pairs)both >> 4) & 15;
      }
      for (int r = 0; r < rows; r++) {
        const ints x = spread(a[j * rows + r].whole), y = spread(a[(4 + j) * rows + r].whole);
        for (int p = 0; p < PARTS; p++) acc[r][p] = dot4(acc[r][p], low[p], x);
        for (int p = 0; p < PARTS; p++) acc[r][p] = dot4(acc[r][p], high[p], y);
      }
    }
    const uint16_t *scale = (const uint16_t *)(w + PANEL * GROUP / 2), *zero = scale + PANEL;
    for (int p = 0; p < PARTS; p++) {
      const floats scales = bf16(scale + p * LANES), zeros = bf16(zero + p * LANES);
      for (int r = 0; r < rows; r++) {
        ints code_sums = total4(acc[r][p]) + spread(a[10 * rows + r].whole);
        y[r][p] += __builtin_convertvector(code_sums, floats) * (scales * a[8 * rows + r].real);
        y[r][p] += zeros * a[9 * rows + r].real;
      }
    }
  }
  for (int r = 0; r < rows; r++)
    for (int p = 0; p < PARTS && n + p * LANES < l->n_out; p++) finish(l, m + r, n + p * LANES, y[r][p]);
}

/* The same for weights in bfloat16, which become float32 before they are multiplied: [n_in, LANES, 2], the outputs n and
   n + LANES side by side. a: [n_in, rows]. */
INLINE void panel16(const layer *l, int rows, int m, int n, const word *a) {
  const uint8_t *w = l->w + (size_t)n * l->n_in * 2;
  floats y[ROWS][PARTS];
  for (int r = 0; r < rows; r++)
    for (int p = 0; p < PARTS; p++) y[r][p] = (floats){};
  for (int k = 0; k < l->n_in; k++, w += 2 * PANEL, a += rows) {
    __builtin_prefetch(w + AHEAD);
    const uints both = *(const uints *)w;
    const floats part[PARTS] = {(floats)(both << 16), (floats)(both & 0xffff0000u)};
    for (int r = 0; r < rows; r++)
      for (int p = 0; p < PARTS; p++) y[r][p] += a[r].real * part[p];
  }
  for (int r = 0; r < rows; r++)
    for (int p = 0; p < PARTS && n + p * LANES < l->n_out; p++) finish(l, m + r, n + p * LANES, y[r][p]);
}

/* Return how many rows to compute next: as few passes as possible, of about equal size. */
static int at_once(int left, int most) {
  const int turns = (left + most - 1) / most;
  return (left + turns - 1) / turns;
}

/* Run `what` with R, a constant that the compiler can unroll for, equal to `rows`. */
#define WITH(rows, n, most, what) \
  if (rows == n && n <= most) { \
    enum { R = n <= most ? n : 1 }; \
    what; \
  }
#define EACH(rows, most, what) \
  WITH(rows, 1, most, what) WITH(rows, 2, most, what) WITH(rows, 3, most, what) WITH(rows, 4, most, what) \
  WITH(rows, 5, most, what) WITH(rows, 6, most, what) WITH(rows, 7, most, what) WITH(rows, 8, most, what) \
  WITH(rows, 9, most, what) WITH(rows, 10, most, what) WITH(rows, 11, most, what) WITH(rows, 12, most, what)

/* y = f(norm(x) Wᵀ): x [n_rows, n_in] float32 -> y [n_rows, n_out]; norm, bias, GELU and residual where given.
   bits: of a weight, 16, 8 or 4.  n_in: a multiple of 32.  Returns 0, or 1 without memory. */
int linear(int bits, int n_rows, int n_out, int n_in, const float *x, const float *norm_weight, const float *norm_bias,
           float eps, const uint8_t *w, const float *scale, const float *bias, const float *residual, int gelu, float *y) {
  const norm before = {norm_weight, norm_bias, eps};
  const int panels = (n_out + PANEL - 1) / PANEL, words = words_of(bits, n_in), stride = words + PAD;
  const int most = bits == 4 ? ROWS4 : ROWS;
  word *each = buffer(0, (size_t)n_rows * stride * 4);
  word *together = buffer(1, (size_t)(n_rows > 1 ? n_rows : 0) * words * 4 + 1);
  float *steps = buffer(2, (size_t)n_rows * 8 + 1);
  if (!n_rows) return 0;
  if (!each || !together || !steps) return 1;
  int *totals = (int *)(steps + n_rows), failed = 0;
  const layer l = {n_rows, n_out, n_in, w, scale, bias, residual, gelu, y, steps, totals};
#pragma omp parallel
  {
#pragma omp for schedule(static)
    for (int m = 0; m < n_rows; m++) {
      const float *row = x + (size_t)m * n_in;
      float *own = norm_weight ? buffer(4, (size_t)n_in * 4) : NULL;
      if (norm_weight && !own) {
        failed = 1;
        continue;
      }
      if (norm_weight) normed(row, before, n_in, own), row = own;
      to_words(bits, row, n_in, each + (size_t)m * stride, steps + m, totals + m);
    }
    /* The rows of one pass over a panel, interleaved word by word. */
    const word *a = n_rows > 1 ? together : each;
    for (int m = 0, rows; n_rows > 1 && m < n_rows; m += rows) {
      rows = at_once(n_rows - m, most);
#pragma omp for schedule(static) nowait
      for (int i = 0; i < words; i++)
        for (int r = 0; r < rows; r++) together[(size_t)m * words + i * rows + r] = each[(size_t)(m + r) * stride + i];
    }
#pragma omp barrier
#pragma omp for schedule(dynamic, 4) nowait
    for (int p = 0; p < panels; p++) {
      const int n = p * PANEL;
      for (int m = 0, rows; m < n_rows; m += rows) {
        rows = at_once(n_rows - m, most);
        const word *in = a + (size_t)m * words;
        if (bits == 16) {
          EACH(rows, ROWS, panel16(&l, R, m, n, in));
        } else if (bits == 8) {
          EACH(rows, ROWS, panel8(&l, R, m, n, in));
        } else {
          EACH(rows, ROWS4, panel4(&l, R, m, n, in));
        }
      }
    }
  }
  return failed;
}

/* ---- attention ---- */

/* One query at the end of keys [n, D]: out [D] = softmax(scale q·k - slope (n - 1 - i)) · values, from key `first`. */
INLINE void attend_one(int D, const float *q, const float *keys, const float *values, int first, int n, float slope,
                       float scale, float *scores, float *out) {
  float most = -INFINITY;
  for (int i = first; i < n; i++) {
    floats s = {};
    for (int d = 0; d < D; d += LANES) s += load(q + d) * load(keys + (size_t)i * D + d);
    scores[i - first] = sum(s) * scale - slope * (n - 1 - i);
    most = scores[i - first] > most ? scores[i - first] : most;
  }
  const int count = n - first, whole = (count + LANES - 1) / LANES * LANES;
  for (int i = count; i < whole; i++) scores[i] = -INFINITY;
  floats total = {};
  for (int i = 0; i < whole; i += LANES) {
    floats e = exp_of(load(scores + i) - most);
    *(loose *)(scores + i) = e;
    total += e;
  }
  const float share = 1.0f / sum(total);
  for (int d = 0; d < D; d += 4 * LANES) {
    const int lines = D - d < 4 * LANES ? (D - d) / LANES : 4;
    floats y[4] = {};
    for (int i = 0; i < count; i++)
      for (int j = 0; j < 4; j++)
        if (j < lines) y[j] += scores[i] * load(values + (size_t)(first + i) * D + d + j * LANES);
    for (int j = 0; j < lines; j++) *(loose *)(out + d + j * LANES) = y[j] * share;
  }
}

/* Write keys and values kv [n_tokens, 2, H, D], with kv_stride floats from token to token, into
   cache [2, n_slots, H, T, D].  slots, positions: [n_tokens], where they go.  Few tokens are not worth waking threads. */
void store(int n_tokens, int H, int D, int T, int n_slots, const float *kv, int64_t kv_stride, const int64_t *slots,
           const int64_t *positions, float *cache) {
#pragma omp parallel for schedule(static) if (n_tokens > 64)
  for (int i = 0; i < n_tokens; i++)
    for (int half = 0; half < 2; half++)
      for (int h = 0; h < H; h++)
        memcpy(cache + ((((size_t)half * n_slots + slots[i]) * H + h) * T + positions[i]) * D,
               kv + i * kv_stride + ((size_t)half * H + h) * D, (size_t)D * 4);
}

/* Decoding rows: q [rows, H, D] with q_stride floats from row to row, cache [2, slots, H, T, D] -> out [rows, H, D].
   slots, positions: [rows].  first: [rows, H], the first key that each reads, or NULL for all.  D: a multiple of 16. */
int attend(int rows, int H, int D, int T, int n_slots, const float *q, int64_t q_stride, const float *cache,
           const int64_t *slots, const int64_t *positions, const int64_t *first, const float *slopes, float scale,
           float *out) {
  int failed = 0;
#pragma omp parallel
  {
#pragma omp for schedule(dynamic, 2) nowait
    for (int i = 0; i < rows * H; i++) {
      const int row = i / H, h = i % H, n = (int)positions[row] + 1;
      float *scores = buffer(3, ((size_t)n + LANES) * 4);
      if (!scores) {
        failed = 1;
        continue;
      }
      const float *keys = cache + ((size_t)slots[row] * H + h) * T * D, *values = keys + (size_t)n_slots * H * T * D;
      attend_one(D, q + row * q_stride + h * D, keys, values, first ? (int)first[i] : 0, n, slopes[h], scale, scores,
                 out + (size_t)i * D);
    }
  }
  return failed;
}

/* Prompts go through attention in tiles of 32 queries, one query in each element of the vectors: its sums run over keys
   in one order, whichever queries are beside it. Keys come in blocks of 32 (Milakov and Gimelshein, arXiv 1805.02867: a
   running maximum, by which what was summed before is brought down). */
#define TILE 32
#define TURNS (TILE / LANES)
typedef floats tile_values[TURNS]; /* a number for each query of a tile */

/* sums[c] += in[i * step + c * stride] * x[i] over n i, for COLUMNS c. */
INLINE void add_products(const float *in, int64_t stride, int64_t step, int n, const tile_values *x, tile_values *sums) {
  tile_values acc[COLUMNS];
  for (int c = 0; c < COLUMNS; c++)
    for (int t = 0; t < TURNS; t++) acc[c][t] = sums[c][t];
  for (int i = 0; i < n; i++)
    for (int c = 0; c < COLUMNS; c++)
      for (int t = 0; t < TURNS; t++) acc[c][t] += in[i * step + c * stride] * x[i][t];
  for (int c = 0; c < COLUMNS; c++)
    for (int t = 0; t < TURNS; t++) sums[c][t] = acc[c][t];
}

/* Queries q [n, D] at positions start … start + n - 1, `q_stride` floats apart, over keys and values [start + n, D] from
   key `first` on: out [n, D], `out_stride` floats apart.  work: tile_values [2 D + 32]. */
INLINE void attend_tile(int D, int start, int n, const float *q, int64_t q_stride, const float *keys,
                        const float *values, int first, float slope, float scale, tile_values *work, float *out,
                        int64_t out_stride) {
  tile_values *turned = work, *y = work + D, *scores = work + 2 * D, most, total;
  ints position[TURNS] = {};
  for (int t = 0; t < TURNS; t++) {
    most[t] = all(-INFINITY), total[t] = (floats){};
    for (int i = 0; i < LANES; i++) position[t][i] = start + t * LANES + i;
  }
  memset(work, 0, 2 * D * sizeof(tile_values));
  for (int i = 0; i < n; i++) /* row by row: rows a power of two apart push each other out of the cache */
    for (int d = 0; d < D; d++) ((float *)turned)[d * TILE + i] = q[i * q_stride + d] * scale;
  for (int from = first; from < start + n; from += TILE) {
    const int count = start + n - from < TILE ? start + n - from : TILE;
    tile_values now, shrink;
    int grew = 0;
    memset(scores, 0, TILE * sizeof(tile_values));
    for (int k = 0; k < count; k += COLUMNS) /* perhaps some keys too many, which count for nothing */
      add_products(keys + (size_t)(from + k) * D, D, 1, D, turned, scores + k);
    for (int t = 0; t < TURNS; t++) now[t] = most[t];
    for (int k = 0; k < count; k++)
      for (int t = 0; t < TURNS; t++) {
        ints away = from + k - position[t];
        floats score = scores[k][t] + slope * __builtin_convertvector(away, floats);
        scores[k][t] = pick(away > 0, all(-INFINITY), score);
        now[t] = larger(scores[k][t], now[t]);
      }
    for (int t = 0; t < TURNS; t++) {
      shrink[t] = exp_of(most[t] - now[t]);
      total[t] *= shrink[t];
      for (int i = 0; i < LANES; i++) grew |= now[t][i] > most[t][i];
      most[t] = now[t];
    }
    for (int d = 0; d < D && grew; d++)
      for (int t = 0; t < TURNS; t++) y[d][t] *= shrink[t];
    for (int k = 0; k < count; k++)
      for (int t = 0; t < TURNS; t++) {
        scores[k][t] = exp_of(scores[k][t] - most[t]);
        total[t] += scores[k][t];
      }
    for (int d = 0; d < D; d += COLUMNS) add_products(values + (size_t)from * D + d, 1, D, count, scores, y + d);
  }
  for (int d = 0; d < D; d++)
    for (int t = 0; t < TURNS; t++) y[d][t] *= 1.0f / total[t];
  for (int i = 0; i < n; i++)
    for (int d = 0; d < D; d++) out[i * out_stride + d] = ((float *)y)[d * TILE + i];
}

/* Tiles of prompts: q [N, H, D] with q_stride floats from token to token, cache [2, slots, H, T, D] -> out [N, H, D].
   tiles: [n_tiles, 4], slot, position of the first query, its token in the step, and how many queries.
   first: [n_tiles, H], the first key that each reads, or NULL for all.  D: a multiple of 16. */
int attend_tiles(int n_tiles, int H, int D, int T, int n_slots, const float *q, int64_t q_stride, const float *cache,
                 const int64_t *tiles, const int64_t *first, const float *slopes, float scale, float *out) {
  int failed = 0;
#pragma omp parallel
  {
#pragma omp for schedule(dynamic, 1) nowait
    for (int i = 0; i < n_tiles * H; i++) {
      const int64_t *tile = tiles + i / H * 4, token = tile[2];
      const int h = i % H;
      tile_values *work = buffer(5, (2 * D + TILE) * sizeof(tile_values));
      if (!work) {
        failed = 1;
        continue;
      }
      const float *keys = cache + ((size_t)tile[0] * H + h) * T * D, *values = keys + (size_t)n_slots * H * T * D;
      attend_tile(D, (int)tile[1], (int)tile[3], q + token * q_stride + h * D, q_stride, keys, values,
                  first ? (int)first[i] : 0, slopes[h], scale, work, out + (token * H + h) * D, (int64_t)H * D);
    }
  }
  return failed;
}

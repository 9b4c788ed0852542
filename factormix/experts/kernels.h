// The loops of ffn.cpp. Included once for each instruction set, inside a namespace of its own, with
//   ROWS    rows of weights that a tile holds in registers, a multiple of 6
//   GROUPS  groups of 16 tokens that a tile holds, 1 or 2
//   BITS    of the processor's vectors where int8.h knows its instructions: 256 or 512; else 0
//   PAIRS   1 where the processor multiplies pairs of bfloat16 (AVX512-BF16)

#include "lanes.h"

// ---- up to 8 tokens: each row is read once, where it lies, for all the tokens that want it

// The processor's own prefetching starts anew at each short row and block; the rows behind this one are wanted next.
INLINE void ahead(const void* w, int64_t line) { __builtin_prefetch(static_cast<const char*>(w) + line + kAhead); }

#include "int8.h"

// The sum over lanes of sum[t] is w . x[t], for N tokens at a time.
template <int N, typename W>
INLINE void multiply(const W* w, const float* const* x, int64_t n, Lanes* sum) {
  Lanes even[N] = {}, odd[N] = {};  // two chains each, to hide the latency of an addition
  int64_t i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
    Lanes a, b, c, d;
    for (size_t line = 0; line < sizeof(W) * 2 * kLanes; line += 64) ahead(w + i, line);
    load(w + i, a);
    load(w + i + kLanes, b);
    UNROLL for (int t = 0; t < N; ++t) {
      load(x[t] + i, c);
      load(x[t] + i + kLanes, d);
      even[t] += a * c;
      odd[t] += b * d;
    }
  }
  UNROLL for (int t = 0; t < N; ++t) {
    even[t] += odd[t];
    for (int64_t j = i; j < n; ++j) even[t][0] += value(w + j) * x[t][j];
    sum[t] = even[t];
  }
}

#if PAIRS
template <int N>
INLINE void multiply(const Bf16* w, const Bf16* const* x, int64_t n, Lanes* sum) {
  __m512 even[N], odd[N];
  UNROLL for (int t = 0; t < N; ++t) even[t] = odd[t] = _mm512_setzero_ps();
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
    ahead(w + i, 0), ahead(w + i, 64);
    const __m512bh a = (__m512bh)_mm512_loadu_si512(w + i), b = (__m512bh)_mm512_loadu_si512(w + i + 2 * kLanes);
    UNROLL for (int t = 0; t < N; ++t) {
      even[t] = _mm512_dpbf16_ps(even[t], a, (__m512bh)_mm512_loadu_si512(x[t] + i));
      odd[t] = _mm512_dpbf16_ps(odd[t], b, (__m512bh)_mm512_loadu_si512(x[t] + i + 2 * kLanes));
    }
  }
  if (i < n) {  // up to 63 more, absent ones zero
    const int64_t m = n - i;
    const __mmask32 first = m >= 32 ? ~0u : (1u << m) - 1, second = m > 32 ? (1u << (m - 32)) - 1 : 0;
    const __m512bh a = (__m512bh)_mm512_maskz_loadu_epi16(first, w + i);
    const __m512bh b = (__m512bh)_mm512_maskz_loadu_epi16(second, w + i + 2 * kLanes);
    UNROLL for (int t = 0; t < N; ++t) {
      even[t] = _mm512_dpbf16_ps(even[t], a, (__m512bh)_mm512_maskz_loadu_epi16(first, x[t] + i));
      odd[t] = _mm512_dpbf16_ps(odd[t], b, (__m512bh)_mm512_maskz_loadu_epi16(second, x[t] + i + 2 * kLanes));
    }
  }
  UNROLL for (int t = 0; t < N; ++t) sum[t] = (Lanes)_mm512_add_ps(even[t], odd[t]);
}
#endif

template <typename W, typename C>
NOINLINE void row(const W* w, const C* const* x, int tokens, int64_t n, Lanes* sum) {
  switch (tokens) {
    case 1: return multiply<1>(w, x, n, sum);
    case 2: return multiply<2>(w, x, n, sum);
    case 3: return multiply<3>(w, x, n, sum);
    case 4: return multiply<4>(w, x, n, sum);
    case 5: return multiply<5>(w, x, n, sum);
    case 6: return multiply<6>(w, x, n, sum);
    case 7: return multiply<7>(w, x, n, sum);
    default: return multiply<8>(w, x, n, sum);
  }
}

// The rows of x of a block's tokens, in the type that is multiplied: themselves, or converted into room.
INLINE void rows_of(const Ffn& f, const Block& b, float* room, const float** x) {
  for (int t = 0; t < b.tokens; ++t) {
    const int64_t at = b.token[t] * f.hidden;
    x[t] = f.bf16 ? as(static_cast<const Bf16*>(f.input) + at, room + t * f.hidden, f.hidden)
                  : static_cast<const float*>(f.input) + at;
  }
}
INLINE void rows_of(const Ffn& f, const Block& b, float*, const Bf16** x) {
  for (int t = 0; t < b.tokens; ++t) x[t] = static_cast<const Bf16*>(f.input) + b.token[t] * f.hidden;
}

// Neurons begin to end of a block, (tokens, width).
template <typename W, typename C>
NOINLINE void lean_neurons(const Ffn& f, const Block& b, int64_t begin, int64_t end, Scratch& s) {
  const C* x[kLean];
  rows_of(f, b, s.panel, x);
  C* h = reinterpret_cast<C*>(f.h + b.first_h);
  const W* w = static_cast<const W*>(b.up);
  for (int64_t j = begin; j < end; j += kLanes) {
    const int64_t n = std::min<int64_t>(kLanes, end - j);
    Lanes gate[kLean][kLanes], up[kLean][kLanes], sum[kLean];
    for (int64_t r = 0; r < n; ++r) {
      row(w + (j + r) * f.hidden, x, b.tokens, f.hidden, sum);
      for (int t = 0; t < b.tokens; ++t) gate[t][r] = sum[t];
      if (!f.gated) continue;
      row(w + (b.width + j + r) * f.hidden, x, b.tokens, f.hidden, sum);
      for (int t = 0; t < b.tokens; ++t) up[t][r] = sum[t];
    }
    for (int t = 0; t < b.tokens; ++t) {
      for (int64_t r = n; r < kLanes; ++r) gate[t][r] = up[t][r] = Lanes{};
      float g[kLanes], u[kLanes];
      store(g, totals(gate[t]));
      if (f.gated) store(u, totals(up[t]));
      for (int64_t r = 0; r < kLanes; ++r) {
        const int64_t at = std::min(j + r, end - 1);
        g[r] = g[r] * b.up_scale(at) + b.bias(at, f.bf16);
        u[r] = f.gated ? u[r] * b.up_scale(b.width + at) + b.bias(b.width + at, f.bf16) : 1.0f;
      }
      Lanes pre, factor;
      load(g, pre), load(u, factor);
      store(g, b.weight[t] * activate(f.kind, pre) * factor);
      C* to = h + t * b.width + j;
      if (sizeof(C) == 4) std::memcpy(to, g, n * sizeof(float));
      else for (int64_t r = 0; r < n; ++r) to[r] = as(g[r], C{});
    }
  }
}

template <typename C>
INLINE void neurons_of(const Ffn& f, const Block& b, const C** h) {
  for (int t = 0; t < b.tokens; ++t) h[t] = reinterpret_cast<const C*>(f.h + b.first_h) + t * b.width;
}

// Outputs begin to end of all tokens, where all blocks are lean and the tokens as few.
template <typename W, typename C>
NOINLINE void few_outputs(const Ffn& f, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; i += kLanes) {
    const int64_t n = std::min<int64_t>(kLanes, end - i);
    Lanes sum[kLean][kLanes];
    for (int64_t t = 0; t < f.tokens; ++t)
      for (int r = 0; r < kLanes; ++r) sum[t][r] = Lanes{};
    for (const Block& b : f.blocks) {
      const C* h[kLean];
      neurons_of(f, b, h);
      for (int64_t r = 0; r < n; ++r) {
        Lanes part[kLean];
        row(static_cast<const W*>(b.down) + (i + r) * b.width, h, b.tokens, b.width, part);
        for (int t = 0; t < b.tokens; ++t) sum[b.token[t]][r] += part[t] * b.down_scale(i + r);
      }
    }
    for (int64_t t = 0; t < f.tokens; ++t) {
      float y[kLanes];
      store(y, totals(sum[t]));
      std::memcpy(f.y + t * f.hidden + i, y, n * sizeof(float));
    }
  }
}

// Outputs begin to end of a block's tokens, added to what is there.
template <typename W, typename C>
NOINLINE void lean_outputs(const Ffn& f, const Block& b, int64_t begin, int64_t end) {
  const C* h[kLean];
  neurons_of(f, b, h);
  for (int64_t i = begin; i < end; i += kLanes) {
    const int64_t n = std::min<int64_t>(kLanes, end - i);
    Lanes sum[kLean][kLanes], part[kLean];
    for (int64_t r = 0; r < n; ++r) {
      row(static_cast<const W*>(b.down) + (i + r) * b.width, h, b.tokens, b.width, part);
      for (int t = 0; t < b.tokens; ++t) sum[t][r] = part[t] * b.down_scale(i + r);
    }
    for (int t = 0; t < b.tokens; ++t) {
      for (int64_t r = n; r < kLanes; ++r) sum[t][r] = Lanes{};
      const Lanes more = totals(sum[t]);
      float* y = f.y + b.token[t] * f.hidden + i;
      for (int64_t r = 0; r < n; ++r) y[r] += more[r];
    }
  }
}

// ---- more tokens: 16 of them side by side in a vector; a tile of rows times one or two such groups stays in registers

// out[r * G + g] = the R rows times group g; x holds the groups one behind the other, (n, 16) each. The rows of the
// next tile, `next` numbers on, are fetched into the second-level cache meanwhile.
template <int R, int G>
INLINE void tile(const float* const* w, const float* x, int64_t n, int64_t next, Lanes* out) {
  Lanes sum[R][G] = {};
  for (int64_t from = 0; from < n; from += kLanes) {
    UNROLL for (int r = 0; r < R; ++r) __builtin_prefetch(w[r] + from + next, 0, 2);
    const int64_t to = std::min(n, from + kLanes);
    for (int64_t i = from; i < to; ++i) {
      Lanes v[G];
      UNROLL for (int g = 0; g < G; ++g) load(x + (g * n + i) * kLanes, v[g]);
      UNROLL for (int r = 0; r < R; ++r) UNROLL for (int g = 0; g < G; ++g) sum[r][g] += v[g] * w[r][i];
    }
  }
  UNROLL for (int r = 0; r < R; ++r) UNROLL for (int g = 0; g < G; ++g) out[r * G + g] = sum[r][g];
}

#if PAIRS
// The same for pairs of bfloat16: x is (n / 2, 16) words, neighbours of a row in one word.
template <int R, int G>
INLINE void tile(const Bf16* const* w, const float* x, int64_t n, int64_t next, Lanes* out) {
  __m512 sum[R][G];
  UNROLL for (int r = 0; r < R; ++r) UNROLL for (int g = 0; g < G; ++g) sum[r][g] = _mm512_setzero_ps();
  for (int64_t from = 0; from < n / 2; from += kLanes) {
    UNROLL for (int r = 0; r < R; ++r) __builtin_prefetch(w[r] + 2 * from + next, 0, 2);
    const int64_t to = std::min(n / 2, from + kLanes);
    for (int64_t i = from; i < to; ++i) {
      __m512bh v[G];
      UNROLL for (int g = 0; g < G; ++g) v[g] = (__m512bh)_mm512_loadu_si512(x + (g * (n / 2) + i) * kLanes);
      UNROLL for (int r = 0; r < R; ++r) {
        int pair;
        std::memcpy(&pair, w[r] + 2 * i, sizeof pair);
        const __m512bh both = (__m512bh)_mm512_set1_epi32(pair);
        UNROLL for (int g = 0; g < G; ++g) sum[r][g] = _mm512_dpbf16_ps(sum[r][g], v[g], both);
      }
    }
  }
  UNROLL for (int r = 0; r < R; ++r) UNROLL for (int g = 0; g < G; ++g) out[r * G + g] = (Lanes)sum[r][g];
}
#endif

template <int R, typename C, typename Row>  // out (R, groups)
NOINLINE void tiles(const Row* w, const float* x, int groups, int64_t n, int64_t next, Lanes* out) {
  const int64_t words = sizeof(C) == 2 ? n / 2 : n;
  int g = 0;
#if GROUPS == 2
  for (; g + 2 <= groups; g += 2) {
    Lanes part[R * 2];
    tile<R, 2>(w, x + g * words * kLanes, n, next, part);
    for (int r = 0; r < R; ++r) out[r * groups + g] = part[2 * r], out[r * groups + g + 1] = part[2 * r + 1];
  }
#endif
  for (; g < groups; ++g) {
    Lanes part[R];
    tile<R, 1>(w, x + g * words * kLanes, n, next, part);
    for (int r = 0; r < R; ++r) out[r * groups + g] = part[r];
  }
}

template <typename C, typename Row>
INLINE void tiles(int rows, const Row* w, const float* x, int groups, int64_t n, int64_t next, Lanes* out) {
  switch (rows) {
    case ROWS: return tiles<ROWS, C>(w, x, groups, n, next, out);
#if ROWS > 8
    case 8: return tiles<8, C>(w, x, groups, n, next, out);
#endif
    case 4: return tiles<4, C>(w, x, groups, n, next, out);
    case 2: return tiles<2, C>(w, x, groups, n, next, out);
    default: return tiles<1, C>(w, x, groups, n, next, out);
  }
}

INLINE int fitting(int64_t rows) {  // the largest tile
  return rows >= ROWS ? ROWS : ROWS > 8 && rows >= 8 ? 8 : rows >= 4 ? 4 : rows >= 2 ? 2 : 1;
}

// The tokens' rows of x, 16 to a group, transposed: (words, 16) a group.
template <typename C, typename X>
INLINE void gather(const Ffn& f, const X* x, const int* token, int tokens, float* out) {
  constexpr int kEach = sizeof(C) == 2 ? 2 : 1;  // numbers to a word
  const int64_t words = f.hidden / kEach;
  for (int at = 0; at < tokens; at += kLanes, out += words * kLanes) {
    const int n = std::min(kLanes, tokens - at);
    for (int64_t i = 0; i < words; i += kLanes) {
      const int64_t m = std::min<int64_t>(kLanes, words - i);
      Lanes v[kLanes] = {};
      for (int t = 0; t < n; ++t) {
        const X* from = x + token[at + t] * f.hidden + i * kEach;
        if (m < kLanes)
          for (int64_t l = 0; l < m; ++l)
            if (kEach == 2) std::memcpy(reinterpret_cast<float*>(&v[t]) + l, from + 2 * l, 4);
            else v[t][l] = value(from + l);
        else if (kEach == 2) std::memcpy(&v[t], from, sizeof v[t]);
        else load(from, v[t]);
      }
      transpose(v);
      for (int64_t l = 0; l < m; ++l) store(out + (i + l) * kLanes, v[l]);
    }
  }
}

// Some neurons of a block for some of its tokens, into f.h as `gather` would lay them out.
template <typename W, typename C>
INLINE void many_neurons(const Ffn& f, const Task& task, Scratch& s) {
  const Block& b = f.blocks[task.block];
  if (b.lean) return lean_neurons<W, C>(f, b, task.begin, task.end, s);
  const int groups = (task.tokens + kLanes - 1) / kLanes, both = f.gated ? 2 : 1;
  const int* token = b.token + task.token;
  if (f.bf16) gather<C>(f, static_cast<const Bf16*>(f.input), token, task.tokens, s.panel);
  else if (sizeof(C) == 4) gather<float>(f, static_cast<const float*>(f.input), token, task.tokens, s.panel);
  float weight[kPanel] = {};
  for (int t = 0; t < task.tokens; ++t) weight[t] = b.weight[task.token + t];
  const int64_t words = sizeof(C) == 2 ? b.width / 2 : b.width;
  float* h = f.h + b.first_h + task.token / kLanes * words * kLanes;
  C* room = reinterpret_cast<C*>(s.rows);
  Lanes out[ROWS * kPanel / kLanes];
  for (int64_t j = task.begin; j < task.end;) {
    const int rows = std::max(both, fitting((task.end - j) * both)), n = rows / both;
    decltype(as(static_cast<const W*>(nullptr), room, 0)) w[ROWS];
    for (int r = 0; r < rows; ++r) {
      const int64_t at = r < n ? j + r : b.width + j + r - n;
      w[r] = as(static_cast<const W*>(b.up) + at * f.hidden, room + r * f.hidden, f.hidden);
    }
    tiles<C>(rows, w, s.panel, groups, f.hidden, n * f.hidden, out);
    for (int g = 0; g < groups; ++g) {
      Lanes factor, low = {};
      load(weight + g * kLanes, factor);
      for (int r = 0; r < n; ++r) {
        const int64_t at = j + r, beside = b.width + at;
        Lanes v = out[r * groups + g] * b.up_scale(at) + b.bias(at, f.bf16);
        v = factor * activate(f.kind, v);
        if (f.gated) v *= out[(n + r) * groups + g] * b.up_scale(beside) + b.bias(beside, f.bf16);
        float* to = h + (g * words + (sizeof(C) == 2 ? (j + r) / 2 : j + r)) * kLanes;
        if (sizeof(C) == 4) store(to, v);
        else if (r % 2 == 0) low = v;
        else store(to, reinterpret_cast<Lanes>(rounded(low) | (rounded(v) << 16)));
      }
    }
    j += n;
  }
}

// Outputs begin to end of all tokens, added up in the order of the blocks.
template <typename W, typename C>
INLINE void many_outputs(const Ffn& f, int64_t begin, int64_t end, Scratch& s) {
  constexpr int kChunk = 48;  // a multiple of 12 and of 16
  for (int64_t t = 0; t < f.tokens; ++t) std::fill(f.y + t * f.hidden + begin, f.y + t * f.hidden + end, 0.0f);
  C* room = reinterpret_cast<C*>(s.rows);
  Lanes out[kChunk * kPanel / kLanes];
  for (const Block& b : f.blocks) {
    if (b.lean) {
      lean_outputs<W, C>(f, b, begin, end);
      continue;
    }
    const int64_t words = sizeof(C) == 2 ? b.width / 2 : b.width;
    for (int at = 0; at < b.tokens; at += f.panel) {
      const int tokens = std::min(f.panel, b.tokens - at), groups = (tokens + kLanes - 1) / kLanes;
      const float* h = f.h + b.first_h + at / kLanes * words * kLanes;
      for (int64_t i = begin; i < end; i += kChunk) {
        const int64_t n = std::min<int64_t>(kChunk, end - i);
        for (int64_t r = 0; r < n;) {
          const int rows = fitting(n - r);
          decltype(as(static_cast<const W*>(nullptr), room, 0)) w[ROWS];
          for (int q = 0; q < rows; ++q)
            w[q] = as(static_cast<const W*>(b.down) + (i + r + q) * b.width, room + q * b.width, b.width);
          tiles<C>(rows, w, h, groups, b.width, rows * b.width, out + r * groups);
          if (b.down_scales)
            for (int q = 0; q < rows * groups; ++q) out[r * groups + q] *= b.down_scale(i + r + q / groups);
          r += rows;
        }
        for (int64_t r = 0; r < n; r += kLanes)
          for (int g = 0; g < groups; ++g) {
            const int64_t m = std::min<int64_t>(kLanes, n - r);
            Lanes v[kLanes] = {};
            for (int64_t q = 0; q < m; ++q) v[q] = out[(r + q) * groups + g];
            transpose(v);
            for (int t = 0; t < std::min(kLanes, tokens - g * kLanes); ++t) {
              float* y = f.y + b.token[at + g * kLanes + t] * f.hidden + i + r;
              Lanes sum;
              if (m < kLanes) {
                for (int64_t q = 0; q < m; ++q) y[q] += v[t][q];
              } else {
                load(y, sum), store(y, sum + v[t]);
              }
            }
          }
      }
    }
  }
}

// ---- scores of experts

typedef double Doubles __attribute__((vector_size(64)));
typedef float Eight __attribute__((vector_size(32)));

template <typename X>
INLINE void widened(const X* from, int64_t n, double* to) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    Lanes v;
    Eight half[2];
    load(from + i, v);
    std::memcpy(half, &v, sizeof v);
    UNROLL for (int q = 0; q < 2; ++q) {
      const Doubles d = __builtin_convertvector(half[q], Doubles);
      std::memcpy(to + i + 8 * q, &d, sizeof d);
    }
  }
  for (; i < n; ++i) to[i] = value(from + i);
}
NOINLINE void widened(const void* from, bool bf16, int64_t n, double* to) {
  bf16 ? widened(static_cast<const Bf16*>(from), n, to) : widened(static_cast<const float*>(from), n, to);
}

// z[t * experts + e] for N tokens, 4 experts at a time; each sum is made in one order, whatever the batch.
template <int N>
NOINLINE void scores(const double* x, const double* w, int64_t n, int64_t experts, float* z) {
  for (int64_t e = 0; e < experts; e += 4) {
    const double* at[4];
    for (int r = 0; r < 4; ++r) at[r] = w + std::min(e + r, experts - 1) * n;
    Doubles sum[N][4] = {};
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) {
      Doubles v[N], u;
      UNROLL for (int t = 0; t < N; ++t) std::memcpy(&v[t], x + t * n + i, sizeof v[t]);
      UNROLL for (int r = 0; r < 4; ++r) {
        std::memcpy(&u, at[r] + i, sizeof u);
        UNROLL for (int t = 0; t < N; ++t) sum[t][r] += v[t] * u;
      }
    }
    for (int t = 0; t < N; ++t)
      for (int64_t r = 0; r < std::min<int64_t>(4, experts - e); ++r) {
        double total = 0;
        for (int l = 0; l < 8; ++l) total += sum[t][r][l];
        for (int64_t j = i; j < n; ++j) total += x[t * n + j] * at[r][j];
        z[t * experts + e + r] = static_cast<float>(total);
      }
  }
}

// ---- the doors

// Scores of tokens begin to end, (tokens, R).
void score(const Ffn& f, int64_t begin, int64_t end, float* z) {
  const int64_t n = f.hidden;
  std::vector<double> room((f.routed + kScored) * n);
  double *w = room.data(), *x = w + f.routed * n;
  widened(f.router, f.router_bf16, f.routed * n, w);
  for (int64_t t = begin; t < end; z += std::min<int64_t>(kScored, end - t) * f.routed, t += kScored) {
    const int64_t count = std::min<int64_t>(kScored, end - t);
    widened(static_cast<const char*>(f.input) + t * n * (f.bf16 ? 2 : 4), f.bf16, count * n, x);
    if (count == kScored) scores<kScored>(x, w, n, f.routed, z);
    else for (int64_t q = 0; q < count; ++q) scores<1>(x + q * n, w, n, f.routed, z + q * f.routed);
  }
}

template <typename W, typename C>
void step(const Ffn& f, const Task* up, int64_t begin, int64_t end, Scratch& s) {
  if (up) return many_neurons<W, C>(f, *up, s);
  f.few ? few_outputs<W, C>(f, begin, end) : many_outputs<W, C>(f, begin, end, s);
}

// Some neurons; or, with null, outputs begin to end of all tokens.
void step(const Ffn& f, const Task* up, int64_t begin, int64_t end, Scratch& s) {
#if PAIRS
  if (f.pairs) return f.int8 ? step<int8_t, Bf16>(f, up, begin, end, s) : step<Bf16, Bf16>(f, up, begin, end, s);
#endif
  if (f.int8) return step<int8_t, float>(f, up, begin, end, s);
  f.bf16 ? step<Bf16, float>(f, up, begin, end, s) : step<float, float>(f, up, begin, end, s);
}

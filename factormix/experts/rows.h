// Up to 8 tokens: each row is read once, where it lies, for all the tokens that want it. A part of kernels.h.

// The processor's own prefetching starts anew at each short row and block; the rows behind this one are wanted next.
constexpr int64_t kAhead = BITS == 512 ? 2048 : 4096;  // bytes, as measured
INLINE void ahead(const void* w, int64_t line) { __builtin_prefetch(static_cast<const char*>(w) + line + kAhead); }

#include "int8.h"

// The sum over lanes of sum[t] is w . x[t], for N tokens at a time.
template <int N, typename W>
INLINE void multiply(const W* w, const float* const* x, int64_t n, Lanes* sum) {
  if constexpr (kParts > 1 && N > 6) {  // more than 16 registers hold
    multiply<4>(w, x, n, sum);
    return multiply<N - 4>(w, x + 4, n, sum + 4);
  }
  constexpr int kChains = kParts > 2 ? 4 : 2, kStep = kChains * kPart;  // to hide the latency of an addition
  Part chain[N][kChains] = {};
  int64_t i = 0;
  for (; i + kStep <= n; i += kStep) {
    Part a[kChains], c;
    for (size_t line = 0; line < sizeof(W) * kStep; line += 64) ahead(w + i, line);
    UNROLL for (int s = 0; s < kChains; ++s) load(w + i + s * kPart, a[s]);
    UNROLL for (int t = 0; t < N; ++t) UNROLL for (int s = 0; s < kChains; ++s) {
      load(x[t] + i + s * kPart, c);
      chain[t][s] += a[s] * c;
    }
  }
  UNROLL for (int t = 0; t < N; ++t) {
    UNROLL for (int s = 1; s < kChains; ++s) chain[t][0] += chain[t][s];
    for (int64_t j = i; j < n; ++j) chain[t][0][0] += value(w + j) * x[t][j];
    sum[t] = Lanes{};
    store(reinterpret_cast<float*>(sum + t), chain[t][0]);
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
      totals(gate[t], g);
      if (f.gated) totals(up[t], u);
      for (int64_t r = 0; r < kLanes; ++r) {
        const int64_t at = std::min(j + r, end - 1);
        g[r] = g[r] * b.up_scale(at) + b.bias(at, f.bf16);
        u[r] = f.gated ? u[r] * b.up_scale(b.width + at) + b.bias(b.width + at, f.bf16) : 1.0f;
      }
      UNROLL for (int p = 0; p < kParts; ++p) {
        Part pre, factor;
        load(g + p * kPart, pre), load(u + p * kPart, factor);
        store(g + p * kPart, b.weight[t] * activate(f.kind, pre) * factor);
      }
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
      totals(sum[t], y);
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
      float more[kLanes];
      totals(sum[t], more);
      float* y = f.y + b.token[t] * f.hidden + i;
      for (int64_t r = 0; r < n; ++r) y[r] += more[r];
    }
  }
}

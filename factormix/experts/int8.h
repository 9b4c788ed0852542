// int8 weights: widened where they are multiplied, scaled once a row. A part of kernels.h.
// A number of 8 bits is exact in float32 and in bfloat16, so what is summed is the weights as they were rounded.

// A row as the tiles take it; what they multiply is C.
template <typename C>
struct Int8Row {
  const int8_t* at;
};
template <typename C>
INLINE Int8Row<C> as(const int8_t* w, C*, int64_t) { return {w}; }

// As the `tile` of float32 in tiles.h; 16 numbers of each row at a time are widened, which the nearest cache holds.
template <int R, int G>
INLINE void tile(const Int8Row<float>* w, const float* x, int64_t n, int64_t next, float* out) {
  Part sum[R][G * kParts] = {}, v[G * kParts];
  alignas(64) float wide[R][kLanes];
  for (int64_t from = 0; from < n; from += kLanes) {
    const int64_t m = std::min<int64_t>(kLanes, n - from);
    if (from % 64 == 0)
      UNROLL for (int r = 0; r < R; ++r) __builtin_prefetch(w[r].at + from + next, 0, 2);
    UNROLL for (int r = 0; r < R; ++r) {
      if (m == kLanes) widen(w[r].at + from, wide[r]);
      else for (int64_t i = 0; i < m; ++i) wide[r][i] = value(w[r].at + from + i);
    }
    for (int64_t i = 0; i < m; ++i) {
      beside<G>(x, n, from + i, v);
      UNROLL for (int r = 0; r < R; ++r) UNROLL for (int q = 0; q < G * kParts; ++q) sum[r][q] += v[q] * wide[r][i];
    }
  }
  UNROLL for (int r = 0; r < R; ++r) UNROLL for (int q = 0; q < G * kParts; ++q)
    store(out + (r * G * kParts + q) * kPart, sum[r][q]);
}

#if PAIRS
INLINE __m512bh widened(__m256i bytes) {  // 32 of them, in order
  const __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_castsi256_si128(bytes)));
  const __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_extracti128_si256(bytes, 1)));
  return _mm512_cvtne2ps_pbh(high, low);
}

// The sum over lanes of sum[t] is w . x[t], for N tokens at a time.
template <int N>
INLINE void multiply(const int8_t* w, const Bf16* const* x, int64_t n, Lanes* sum) {
  __m512 even[N], odd[N];
  UNROLL for (int t = 0; t < N; ++t) even[t] = odd[t] = _mm512_setzero_ps();
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
    ahead(w + i, 0);
    const __m512bh a = widened(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(w + i)));
    const __m512bh b = widened(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(w + i + 2 * kLanes)));
    UNROLL for (int t = 0; t < N; ++t) {
      even[t] = _mm512_dpbf16_ps(even[t], a, (__m512bh)_mm512_loadu_si512(x[t] + i));
      odd[t] = _mm512_dpbf16_ps(odd[t], b, (__m512bh)_mm512_loadu_si512(x[t] + i + 2 * kLanes));
    }
  }
  for (; i < n; i += 2 * kLanes) {  // up to 63 more, absent ones zero
    const __mmask32 there = n - i >= 32 ? ~0u : (1u << (n - i)) - 1;
    const __m512bh a = widened(_mm256_maskz_loadu_epi8(there, w + i));
    UNROLL for (int t = 0; t < N; ++t)
      even[t] = _mm512_dpbf16_ps(even[t], a, (__m512bh)_mm512_maskz_loadu_epi16(there, x[t] + i));
  }
  UNROLL for (int t = 0; t < N; ++t) sum[t] = (Lanes)_mm512_add_ps(even[t], odd[t]);
}

// As the `tile` of pairs in tiles.h.
template <int R, int G>
INLINE void tile(const Int8Row<Bf16>* w, const float* x, int64_t n, int64_t next, float* out) {
  __m512 sum[R][G];
  UNROLL for (int r = 0; r < R; ++r) UNROLL for (int g = 0; g < G; ++g) sum[r][g] = _mm512_setzero_ps();
  alignas(64) int wide[R][kLanes];  // pairs
  for (int64_t from = 0; from < n / 2; from += kLanes) {
    const int64_t m = std::min<int64_t>(kLanes, n / 2 - from);
    const __mmask32 there = m == kLanes ? ~0u : (1u << 2 * m) - 1;
    UNROLL for (int r = 0; r < R; ++r) {
      __builtin_prefetch(w[r].at + 2 * from + next, 0, 2);
      _mm512_store_si512(wide[r], (__m512i)widened(_mm256_maskz_loadu_epi8(there, w[r].at + 2 * from)));
    }
    for (int64_t i = 0; i < m; ++i) {
      __m512bh v[G];
      UNROLL for (int g = 0; g < G; ++g) v[g] = (__m512bh)_mm512_loadu_si512(x + (g * (n / 2) + from + i) * kLanes);
      UNROLL for (int r = 0; r < R; ++r) {
        const __m512bh both = (__m512bh)_mm512_set1_epi32(wide[r][i]);
        UNROLL for (int g = 0; g < G; ++g) sum[r][g] = _mm512_dpbf16_ps(sum[r][g], v[g], both);
      }
    }
  }
  UNROLL for (int r = 0; r < R; ++r) UNROLL for (int g = 0; g < G; ++g)
    store(out + (r * G + g) * kLanes, (Part)sum[r][g]);
}
#endif

// int8 weights: widened where they are multiplied, scaled once a row. A part of kernels.h.
// A number of 8 bits is exact in float32 and in bfloat16, so what is summed is the weights as they were rounded.

INLINE void load(const int8_t* p, Lanes& v) {
#if BITS == 512
  v = (Lanes)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#elif BITS == 256
  __m256 half[2];
  UNROLL for (int q = 0; q < 2; ++q)
    half[q] = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p + 8 * q))));
  std::memcpy(&v, half, sizeof v);
#else
  UNROLL for (int l = 0; l < kLanes; ++l) v[l] = p[l];
#endif
}

// A row widened into room.
INLINE const float* as(const int8_t* w, float* room, int64_t n) {
  int64_t i = 0;
  for (Lanes v; i + kLanes <= n; i += kLanes) load(w + i, v), store(room + i, v);
  for (; i < n; ++i) room[i] = value(w + i);
  return room;
}

#if PAIRS
INLINE __m512bh widened(__m256i bytes) {  // 32 of them, in order
  const __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_castsi256_si128(bytes)));
  const __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_extracti128_si256(bytes, 1)));
  return _mm512_cvtne2ps_pbh(high, low);
}

INLINE const Bf16* as(const int8_t* w, Bf16* room, int64_t n) {
  int64_t i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes)
    _mm512_storeu_si512(room + i, (__m512i)widened(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(w + i))));
  for (; i < n; ++i) room[i] = bf16_of(value(w + i));
  return room;
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
#endif

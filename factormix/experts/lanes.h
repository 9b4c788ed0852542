// 16 float32 side by side: loads and rounding, the activations, transposition and sums across. A part of kernels.h.

INLINE void load(const float* p, Lanes& v) { std::memcpy(&v, p, sizeof v); }
INLINE void load(const Bf16* p, Lanes& v) {
  Halves h;
  std::memcpy(&h, p, sizeof h);
  v = reinterpret_cast<Lanes>(__builtin_convertvector(h, Words) << 16);
}
INLINE void store(float* p, const Lanes& v) { std::memcpy(p, &v, sizeof v); }

INLINE Words rounded(Lanes v) {  // to bfloat16, in the low half of each word; to the nearest, ties to even
  const Words w = reinterpret_cast<Words>(v);
  const Words r = (w + 0x7fffu + ((w >> 16) & 1u)) >> 16;
  return v == v ? r : Words{} + 0x7fc0u;
}

// ---- a few lanes of mathematics

INLINE Lanes exponential(Lanes x) {
  x = x < -87.0f ? Lanes{} - 87.0f : x;  // NaN stays
  const Lanes beyond = x > 88.0f ? Lanes{} + INFINITY : Lanes{};  // a little early; nothing here needs the last numbers
  x = x > 88.0f ? Lanes{} + 88.0f : x;
  const Lanes shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the fraction is rounded away
  const Lanes n = shifted - 12582912.0f;
  const Lanes r = x - n * 0.693359375f + n * 2.12194440e-4f;  // |r| <= ln 2 / 2
  Lanes p = r * 1.3888889e-3f + 8.3333333e-3f;                // Taylor, to r^6 / 720
  p = p * r + 4.1666667e-2f;
  p = p * r + 1.6666667e-1f;
  p = p * r + 0.5f;
  p = p * r * r + r + 1.0f;
  return beyond + reinterpret_cast<Lanes>(reinterpret_cast<Words>(p) + (reinterpret_cast<Words>(shifted) << 23));
}

INLINE Lanes error_function(Lanes x) {  // Abramowitz and Stegun 7.1.26: within 1.5e-7
  const Lanes a = x < 0.0f ? -x : x, t = 1.0f / (1.0f + 0.3275911f * a);
  Lanes p = t * 1.061405429f - 1.453152027f;
  p = p * t + 1.421413741f;
  p = p * t - 0.284496736f;
  p = (p * t + 0.254829592f) * t;
  const Lanes e = 1.0f - p * exponential(-a * a);
  return x < 0.0f ? -e : e;
}

NOINLINE Lanes activate(int kind, Lanes v) {
  switch (kind) {
    case kSilu: return v / (1.0f + exponential(-v));
    case kGelu: return 0.5f * v * (1.0f + error_function(v * 0.70710678f));
    case kGeluTanh: {  // 0.5 v (1 + tanh u) = v / (1 + exp(-2u))
      return v / (1.0f + exponential(-1.59576912f * (v + 0.044715f * v * v * v)));
    }
    default: return v < 0.0f ? Lanes{} : v;
  }
}

// ---- 16 vectors against each other

#define AT(l) ((l)&D ? 16 + (l)-D : (l))
#define OF(l) ((l)&D ? 16 + (l) : (l) + D)
#define ALL(F) F(0), F(1), F(2), F(3), F(4), F(5), F(6), F(7), F(8), F(9), F(10), F(11), F(12), F(13), F(14), F(15)
#if defined(__clang__)
#define MIX(a, b, F) __builtin_shufflevector(a, b, ALL(F))
#else
#define MIX(a, b, F) __builtin_shuffle(a, b, Ints{ALL(F)})
#endif

template <int D>
INLINE void exchange(Lanes* v) {  // bit D of the vector's index with bit D of the lane's
  UNROLL for (int i = 0; i < 16; ++i)
    if (!(i & D)) {
      const Lanes a = v[i], b = v[i + D];
      v[i] = MIX(a, b, AT), v[i + D] = MIX(a, b, OF);
    }
}

NOINLINE void transpose(Lanes* v) { exchange<8>(v), exchange<4>(v), exchange<2>(v), exchange<1>(v); }

template <int D>
INLINE void fold(const Lanes* v, Lanes* out) {  // halves the vectors, each lane a sum of two
  UNROLL for (int i = 0; i < D; ++i) out[i] = MIX(v[i], v[i + D], AT) + MIX(v[i], v[i + D], OF);
}

NOINLINE Lanes totals(const Lanes* v) {  // lane l: the sum of v[l]'s lanes, whatever stands beside it
  Lanes a[8], b[4], c[2], d[1];
  fold<8>(v, a), fold<4>(a, b), fold<2>(b, c), fold<1>(c, d);
  return d[0];
}

#undef AT
#undef OF
#undef ALL
#undef MIX

INLINE float as(float v, float) { return v; }
INLINE Bf16 as(float v, Bf16) { return bf16_of(v); }

// A row in the type that is multiplied: itself, or converted into room.
INLINE const float* as(const float* w, float*, int64_t) { return w; }
INLINE const Bf16* as(const Bf16* w, Bf16*, int64_t) { return w; }
INLINE const float* as(const Bf16* w, float* room, int64_t n) {
  int64_t i = 0;
  for (Lanes v; i + kLanes <= n; i += kLanes) load(w + i, v), store(room + i, v);
  for (; i < n; ++i) room[i] = value(w + i);
  return room;
}

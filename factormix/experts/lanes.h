// The processor's own vectors, `Part`, of which kParts make up 16 lanes: loads and rounding, the activations,
// transposition and sums across. A part of kernels.h. (A vector wider than the processor's is a place in memory to
// compilers, so no inner loop computes in `Lanes`.)

constexpr int kPart = BITS / 32;  // float32 to a Part
constexpr int kParts = kLanes / kPart;
typedef float Part __attribute__((vector_size(BITS / 8)));
typedef int32_t Ints __attribute__((vector_size(BITS / 8)));
typedef uint32_t Words __attribute__((vector_size(BITS / 8)));
typedef uint16_t Halves __attribute__((vector_size(BITS / 16)));

INLINE void load(const float* p, Part& v) { std::memcpy(&v, p, sizeof v); }
INLINE void load(const Bf16* p, Part& v) {
  Halves h;
  std::memcpy(&h, p, sizeof h);
  v = reinterpret_cast<Part>(__builtin_convertvector(h, Words) << 16);
}
INLINE void load(const int8_t* p, Part& v) {
#if BITS == 512
  v = (Part)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#elif BITS == 256
  v = (Part)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#else
  UNROLL for (int l = 0; l < kPart; ++l) v[l] = p[l];
#endif
}
INLINE void store(float* p, const Part& v) { std::memcpy(p, &v, sizeof v); }

INLINE Words rounded(Part v) {  // to bfloat16, in the low half of each word; to the nearest, ties to even
  const Words w = reinterpret_cast<Words>(v);
  const Words r = (w + 0x7fffu + ((w >> 16) & 1u)) >> 16;
  return v == v ? r : Words{} + 0x7fc0u;
}

// ---- a few lanes of mathematics

INLINE Part exponential(Part x) {
  x = x < -87.0f ? Part{} - 87.0f : x;  // NaN stays
  const Part beyond = x > 88.0f ? Part{} + INFINITY : Part{};  // a little early; nothing here needs the last numbers
  x = x > 88.0f ? Part{} + 88.0f : x;
  const Part shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the fraction is rounded away
  const Part n = shifted - 12582912.0f;
  const Part r = x - n * 0.693359375f + n * 2.12194440e-4f;  // |r| <= ln 2 / 2
  Part p = r * 1.3888889e-3f + 8.3333333e-3f;                // Taylor, to r^6 / 720
  p = p * r + 4.1666667e-2f;
  p = p * r + 1.6666667e-1f;
  p = p * r + 0.5f;
  p = p * r * r + r + 1.0f;
  return beyond + reinterpret_cast<Part>(reinterpret_cast<Words>(p) + (reinterpret_cast<Words>(shifted) << 23));
}

INLINE Part error_function(Part x) {  // Abramowitz and Stegun 7.1.26: within 1.5e-7
  const Part a = x < 0.0f ? -x : x, t = 1.0f / (1.0f + 0.3275911f * a);
  Part p = t * 1.061405429f - 1.453152027f;
  p = p * t + 1.421413741f;
  p = p * t - 0.284496736f;
  p = (p * t + 0.254829592f) * t;
  const Part e = 1.0f - p * exponential(-a * a);
  return x < 0.0f ? -e : e;
}

NOINLINE Part activate(int kind, Part v) {
  switch (kind) {
    case kSilu: return v / (1.0f + exponential(-v));
    case kGelu: return 0.5f * v * (1.0f + error_function(v * 0.70710678f));
    case kGeluTanh: {  // 0.5 v (1 + tanh u) = v / (1 + exp(-2u))
      return v / (1.0f + exponential(-1.59576912f * (v + 0.044715f * v * v * v)));
    }
    default: return v < 0.0f ? Part{} : v;
  }
}

// ---- vectors against each other

#define AT(l) ((l)&D ? kPart + (l)-D : (l))
#define OF(l) ((l)&D ? kPart + (l) : (l) + D)
#if BITS == 512
#define ALL(F) F(0), F(1), F(2), F(3), F(4), F(5), F(6), F(7), F(8), F(9), F(10), F(11), F(12), F(13), F(14), F(15)
#elif BITS == 256
#define ALL(F) F(0), F(1), F(2), F(3), F(4), F(5), F(6), F(7)
#else
#define ALL(F) F(0), F(1), F(2), F(3)
#endif
#if defined(__clang__)
#define MIX(a, b, F) __builtin_shufflevector(a, b, ALL(F))
#else
#define MIX(a, b, F) __builtin_shuffle(a, b, Ints{ALL(F)})
#endif

template <int D>
INLINE void exchange(Part* v) {  // bit D, and the lower ones, of the vector's index with the same bit of the lane's
  UNROLL for (int i = 0; i < kPart; ++i)
    if (!(i & D)) {
      const Part a = v[i], b = v[i + D];
      v[i] = MIX(a, b, AT), v[i + D] = MIX(a, b, OF);
    }
  if constexpr (D > 1) exchange<D / 2>(v);
}

NOINLINE void transpose(float* v) {  // (16, 16)
  for (int a = 0; a < kLanes; a += kPart)
    for (int b = a; b < kLanes; b += kPart) {
      Part above[kPart], below[kPart];  // the square (a, b) and its mirror image
      UNROLL for (int i = 0; i < kPart; ++i) load(v + (a + i) * kLanes + b, above[i]);
      exchange<kPart / 2>(above);
      if (a != b) {
        UNROLL for (int i = 0; i < kPart; ++i) load(v + (b + i) * kLanes + a, below[i]);
        exchange<kPart / 2>(below);
        UNROLL for (int i = 0; i < kPart; ++i) store(v + (a + i) * kLanes + b, below[i]);
      }
      UNROLL for (int i = 0; i < kPart; ++i) store(v + (b + i) * kLanes + a, above[i]);
    }
}

template <int D>
INLINE void fold(Part* v) {  // halves the vectors until one is left, each lane a sum of two
  UNROLL for (int i = 0; i < D; ++i) v[i] = MIX(v[i], v[i + D], AT) + MIX(v[i], v[i + D], OF);
  if constexpr (D > 1) fold<D / 2>(v);
}

NOINLINE void totals(const Lanes* v, float* out) {  // out[l]: the sum of v[l]'s lanes, whatever stands beside it
  for (int a = 0; a < kLanes; a += kPart) {
    Part sum[kPart];
    UNROLL for (int i = 0; i < kPart; ++i) {
      const float* lanes = reinterpret_cast<const float*>(v + a + i);
      load(lanes, sum[i]);
      UNROLL for (int p = 1; p < kParts; ++p) {
        Part more;
        load(lanes + p * kPart, more), sum[i] += more;
      }
    }
    fold<kPart / 2>(sum);
    store(out + a, sum[0]);
  }
}

#undef AT
#undef OF
#undef ALL
#undef MIX

template <typename W>
INLINE void widen(const W* from, float* to) {  // 16 numbers
  UNROLL for (int p = 0; p < kParts; ++p) {
    Part v;
    load(from + p * kPart, v), store(to + p * kPart, v);
  }
}

template <int G>  // place i of G groups of 16 tokens, (n, 16) each, one behind the other
INLINE void beside(const float* x, int64_t n, int64_t i, Part* v) {
  UNROLL for (int g = 0; g < G; ++g) UNROLL for (int p = 0; p < kParts; ++p)
    load(x + (g * n + i) * kLanes + p * kPart, v[g * kParts + p]);
}

INLINE float as(float v, float) { return v; }
INLINE Bf16 as(float v, Bf16) { return bf16_of(v); }

// A row in the type that is multiplied: itself, or converted into room.
INLINE const float* as(const float* w, float*, int64_t) { return w; }
INLINE const Bf16* as(const Bf16* w, Bf16*, int64_t) { return w; }
INLINE const float* as(const Bf16* w, float* room, int64_t n) {
  int64_t i = 0;
  for (Part v; i + kPart <= n; i += kPart) load(w + i, v), store(room + i, v);
  for (; i < n; ++i) room[i] = value(w + i);
  return room;
}

// Scores of experts, summed in float64. A part of kernels.h.

typedef double Doubles __attribute__((vector_size(BITS / 8)));
typedef float Singles __attribute__((vector_size(BITS / 16)));
typedef uint32_t SingleWords __attribute__((vector_size(BITS / 16)));
typedef uint16_t SingleHalves __attribute__((vector_size(BITS / 32)));
constexpr int kDoubles = BITS / 64, kEight = 8 / kDoubles;  // numbers to a vector, vectors to 8 numbers

INLINE void load(const double* p, Doubles& v) { std::memcpy(&v, p, sizeof v); }
INLINE void load(const float* p, Doubles& v) {
  Singles f;
  std::memcpy(&f, p, sizeof f);
  v = __builtin_convertvector(f, Doubles);
}
INLINE void load(const Bf16* p, Doubles& v) {
  SingleHalves h;
  std::memcpy(&h, p, sizeof h);
  v = __builtin_convertvector(reinterpret_cast<Singles>(__builtin_convertvector(h, SingleWords) << 16), Doubles);
}

template <typename X>
INLINE void widened(const X* from, int64_t n, double* to) {
  int64_t i = 0;
  for (Doubles v; i + kDoubles <= n; i += kDoubles) load(from + i, v), std::memcpy(to + i, &v, sizeof v);
  for (; i < n; ++i) to[i] = value(from + i);
}
NOINLINE void widened(const void* from, bool bf16, int64_t n, double* to) {
  bf16 ? widened(static_cast<const Bf16*>(from), n, to) : widened(static_cast<const float*>(from), n, to);
}

// z[t * experts + e] for N tokens, some experts at a time; each sum is made in one order, whatever the batch: 8 by 8.
template <int N, typename W>
NOINLINE void scores(const double* x, const W* w, int64_t n, int64_t experts, float* z) {
  constexpr int kExperts = kEight == 1 || N == 1 ? 4 : 1;  // as many as the registers hold
  for (int64_t e = 0; e < experts; e += kExperts) {
    const W* at[kExperts];
    for (int r = 0; r < kExperts; ++r) at[r] = w + std::min(e + r, experts - 1) * n;
    Doubles sum[N][kExperts][kEight] = {};
    int64_t i = 0;
    for (; i + 8 <= n; i += 8)
      UNROLL for (int q = 0; q < kEight; ++q) {
        Doubles v[N], u;
        UNROLL for (int t = 0; t < N; ++t) load(x + t * n + i + q * kDoubles, v[t]);
        UNROLL for (int r = 0; r < kExperts; ++r) {
          load(at[r] + i + q * kDoubles, u);
          UNROLL for (int t = 0; t < N; ++t) sum[t][r][q] += v[t] * u;
        }
      }
    for (int t = 0; t < N; ++t)
      for (int64_t r = 0; r < std::min<int64_t>(kExperts, experts - e); ++r) {
        double total = 0;
        for (int l = 0; l < 8; ++l) total += sum[t][r][l / kDoubles][l % kDoubles];
        for (int64_t j = i; j < n; ++j) total += x[t * n + j] * value(at[r] + j);
        z[t * experts + e + r] = static_cast<float>(total);
      }
  }
}

// Scores of tokens begin to end, (tokens, R). For many of them the router is widened once.
void score(const Ffn& f, int64_t begin, int64_t end, float* z) {
  const int64_t n = f.hidden;
  const bool many = end - begin >= kScored;
  std::vector<double> room(((many ? f.routed : 0) + kScored) * n);
  double *x = room.data(), *w = x + kScored * n;
  if (many) widened(f.router, f.router_bf16, f.routed * n, w);
  for (int64_t t = begin; t < end; z += std::min<int64_t>(kScored, end - t) * f.routed, t += kScored) {
    const int64_t count = std::min<int64_t>(kScored, end - t);
    widened(static_cast<const char*>(f.input) + t * n * (f.bf16 ? 2 : 4), f.bf16, count * n, x);
    if (count == kScored) {
      scores<kScored>(x, w, n, f.routed, z);
      continue;
    }
    for (int64_t q = 0; q < count; ++q) {
      float* to = z + q * f.routed;
      if (many) scores<1>(x + q * n, w, n, f.routed, to);
      else if (f.router_bf16) scores<1>(x + q * n, static_cast<const Bf16*>(f.router), n, f.routed, to);
      else scores<1>(x + q * n, static_cast<const float*>(f.router), n, f.routed, to);
    }
  }
}

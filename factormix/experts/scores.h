// Scores of experts, summed in float64. A part of kernels.h.

typedef double Doubles __attribute__((vector_size(64)));
typedef float Eight __attribute__((vector_size(32)));
typedef uint32_t EightWords __attribute__((vector_size(32)));

INLINE void load(const double* p, Doubles& v) { std::memcpy(&v, p, sizeof v); }
INLINE void load(const float* p, Doubles& v) {
  Eight f;
  std::memcpy(&f, p, sizeof f);
  v = __builtin_convertvector(f, Doubles);
}
INLINE void load(const Bf16* p, Doubles& v) {
  uint16_t h __attribute__((vector_size(16)));
  std::memcpy(&h, p, sizeof h);
  v = __builtin_convertvector(reinterpret_cast<Eight>(__builtin_convertvector(h, EightWords) << 16), Doubles);
}

template <typename X>
INLINE void widened(const X* from, int64_t n, double* to) {
  int64_t i = 0;
  for (Doubles v; i + 8 <= n; i += 8) load(from + i, v), std::memcpy(to + i, &v, sizeof v);
  for (; i < n; ++i) to[i] = value(from + i);
}
NOINLINE void widened(const void* from, bool bf16, int64_t n, double* to) {
  bf16 ? widened(static_cast<const Bf16*>(from), n, to) : widened(static_cast<const float*>(from), n, to);
}

// z[t * experts + e] for N tokens, 4 experts at a time; each sum is made in one order, whatever the batch.
template <int N, typename W>
NOINLINE void scores(const double* x, const W* w, int64_t n, int64_t experts, float* z) {
  for (int64_t e = 0; e < experts; e += 4) {
    const W* at[4];
    for (int r = 0; r < 4; ++r) at[r] = w + std::min(e + r, experts - 1) * n;
    Doubles sum[N][4] = {};
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) {
      Doubles v[N], u;
      UNROLL for (int t = 0; t < N; ++t) std::memcpy(&v[t], x + t * n + i, sizeof v[t]);
      UNROLL for (int r = 0; r < 4; ++r) {
        load(at[r] + i, u);
        UNROLL for (int t = 0; t < N; ++t) sum[t][r] += v[t] * u;
      }
    }
    for (int t = 0; t < N; ++t)
      for (int64_t r = 0; r < std::min<int64_t>(4, experts - e); ++r) {
        double total = 0;
        for (int l = 0; l < 8; ++l) total += sum[t][r][l];
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

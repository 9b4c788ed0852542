// Decoding on a CPU: the shared neurons and the chosen experts of a few tokens, in one call.
//
//     y_t = F_shared(x_t) + sum over the K chosen i of s_ti * E_i(x_t)
//
// At a few tokens an FFN costs the bytes it reads, so every chosen row is read once, where it lies, for all the tokens
// that want it, and nothing is copied. Two loops in one parallel region: over neurons (gate and up rows, activation),
// then over the rows of the down projections. Sums are float32 for every weight dtype. Plain C++ without torch's headers:
// compiled in a second or two, for any version of torch. No ISA flags: the loops are compiled for three levels and the
// loader picks one (x86; elsewhere the compiler's baseline).

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>
#ifdef _OPENMP
#include <omp.h>
#endif

namespace {

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define CLONES __attribute__((target_clones("arch=skylake-avx512", "arch=haswell", "default")))
#else
#define CLONES
#endif
#define INLINE inline __attribute__((always_inline))

constexpr int kTokens = 4;  // tokens that share one read of a row
constexpr int kLanes = 16;
constexpr int64_t kSerial = 1 << 16;  // weights too few for a second thread to pay
typedef float Lanes __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));

struct Bf16 {
  uint16_t bits;
};

INLINE void load(const float* p, Lanes& v) { std::memcpy(&v, p, sizeof v); }
INLINE void load(const Bf16* p, Lanes& v) {
  Halves h;
  std::memcpy(&h, p, sizeof h);
  const Words w = __builtin_convertvector(h, Words) << 16;
  std::memcpy(&v, &w, sizeof v);
}

INLINE float value(const float* p) { return *p; }
INLINE float value(const Bf16* p) {
  const uint32_t w = static_cast<uint32_t>(p->bits) << 16;
  float f;
  std::memcpy(&f, &w, sizeof f);
  return f;
}

// sum[t] += w[i] * x[t][i], lane by lane, for N tokens at a time.
template <int N, typename W>
INLINE void multiply(const W* w, const float* const* x, int64_t n, Lanes* sum) {
  Lanes even[N], odd[N] = {};  // two chains each, to hide the latency of an addition
  for (int t = 0; t < N; ++t) even[t] = sum[t];
  int64_t i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
    Lanes a, b, c, d;
    load(w + i, a);
    load(w + i + kLanes, b);
    for (int t = 0; t < N; ++t) {
      load(x[t] + i, c);
      load(x[t] + i + kLanes, d);
      even[t] += a * c;
      odd[t] += b * d;
    }
  }
  for (int t = 0; t < N; ++t) {
    even[t] += odd[t];
    for (int64_t j = i; j < n; ++j) even[t][0] += value(w + j) * x[t][j];
    sum[t] = even[t];
  }
}

template <typename W>
INLINE void row(const W* w, const float* const* x, int tokens, int64_t n, Lanes* sum) {
  switch (tokens) {
    case 1: return multiply<1>(w, x, n, sum);
    case 2: return multiply<2>(w, x, n, sum);
    case 3: return multiply<3>(w, x, n, sum);
    default: return multiply<4>(w, x, n, sum);
  }
}

INLINE float total(Lanes v) {
  for (int half = kLanes / 2; half; half /= 2)
    for (int l = 0; l < half; ++l) v[l] += v[l + half];
  return v[0];
}

enum Activation : int { kSilu, kGelu, kGeluTanh, kRelu };

INLINE float activate(int kind, float v) {
  switch (kind) {
    case kSilu: return v / (1.0f + std::exp(-v));
    case kGelu: return 0.5f * v * (1.0f + std::erf(v * 0.70710678f));
    case kGeluTanh: return 0.5f * v * (1.0f + std::tanh(0.79788456f * (v + 0.044715f * v * v * v)));
    default: return v > 0 ? v : 0.0f;
  }
}

// One block of neurons and the tokens that want it.
template <typename W>
struct Block {
  const W *up, *down, *bias;  // (rows, H), (H, width), (rows) or null
  int64_t width, first;       // first: of its neurons among those of all blocks
  int tokens;
  int token[kTokens];
  float scale[kTokens];
  const float* x[kTokens];
  float* h[kTokens];  // (width) each
};

template <typename W>
struct Job {
  std::vector<Block<W>> blocks;
  int64_t neurons = 0, hidden, tokens;
  int kind;
  bool gated;
  float* y;  // (T, H)
};

// Neurons begin to end of all blocks, for the tokens that want them.
template <typename W>
INLINE void neurons(Job<W>& job, int64_t begin, int64_t end) {
  size_t at = 0;
  for (int64_t n = begin; n < end; ++n) {
    while (n >= job.blocks[at].first + job.blocks[at].width) ++at;
    auto& b = job.blocks[at];
    const int64_t j = n - b.first;
    Lanes gate[kTokens] = {}, up[kTokens] = {};
    row(b.up + j * job.hidden, b.x, b.tokens, job.hidden, gate);
    if (job.gated) row(b.up + (b.width + j) * job.hidden, b.x, b.tokens, job.hidden, up);
    for (int t = 0; t < b.tokens; ++t) {
      const float g = total(gate[t]) + (b.bias ? value(b.bias + j) : 0.0f);
      const float u = job.gated ? total(up[t]) + (b.bias ? value(b.bias + b.width + j) : 0.0f) : 1.0f;
      b.h[t][j] = b.scale[t] * activate(job.kind, g) * u;
    }
  }
}

// Outputs begin to end of all tokens.
template <typename W>
INLINE void outputs(Job<W>& job, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    Lanes sum[kTokens] = {};
    for (auto& b : job.blocks) {
      Lanes part[kTokens] = {};
      row(b.down + i * b.width, b.h, b.tokens, b.width, part);
      for (int t = 0; t < b.tokens; ++t) sum[b.token[t]] += part[t];
    }
    for (int64_t t = 0; t < job.tokens; ++t) job.y[t * job.hidden + i] = total(sum[t]);
  }
}

CLONES void run_neurons(Job<float>& job, int64_t begin, int64_t end) { neurons(job, begin, end); }
CLONES void run_neurons(Job<Bf16>& job, int64_t begin, int64_t end) { neurons(job, begin, end); }
CLONES void run_outputs(Job<float>& job, int64_t begin, int64_t end) { outputs(job, begin, end); }
CLONES void run_outputs(Job<Bf16>& job, int64_t begin, int64_t end) { outputs(job, begin, end); }

template <typename W>
void run(Job<W>& job, int threads) {
  std::vector<float> kept(job.neurons * kTokens);
  for (auto& b : job.blocks)
    for (int t = 0; t < b.tokens; ++t) b.h[t] = kept.data() + b.first * kTokens + t * b.width;
  if (job.neurons * job.hidden < kSerial) threads = 1;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    int64_t me = 0, all = 1;
#ifdef _OPENMP
    me = omp_get_thread_num(), all = omp_get_num_threads();
#endif
    run_neurons(job, job.neurons * me / all, job.neurons * (me + 1) / all);
#pragma omp barrier
    run_outputs(job, job.hidden * me / all, job.hidden * (me + 1) / all);
  }
}

}  // namespace

// The arguments of one call, as native.py lays them out. Pointers may be null where a part is absent.
struct Call {
  const float* x;                                // (T, H)
  const int64_t* chosen;                         // (T, K)
  const float* scale;                            // (T, K)
  const void *up, *down, *bias;                  // (R, rows, H), (R, H, W), (R, rows)
  const void *shared_up, *shared_down, *shared_bias;  // the same for one expert
  float* y;                                      // (T, H)
  int64_t tokens, hidden, routed, active, width, shared_width, bf16, kind, gated, threads;
};

template <typename W>
int64_t decode(const Call& call) {
  const int64_t rows = (call.gated ? 2 : 1) * call.width;
  Job<W> job;
  job.hidden = call.hidden, job.tokens = call.tokens, job.kind = static_cast<int>(call.kind), job.gated = call.gated;
  job.y = call.y;
  auto add = [&](const void* up, const void* down, const void* bias, int64_t at, int64_t size, int64_t width) {
    auto part = [](const void* p, int64_t offset) { return p ? static_cast<const W*>(p) + offset : nullptr; };
    job.blocks.push_back({part(up, at * size * call.hidden), part(down, at * call.hidden * width), part(bias, at * size),
                          width, job.neurons, 0, {}, {}, {}, {}});
    job.neurons += width;
  };
  auto join = [&](Block<W>& b, int64_t t, float scale) {
    b.token[b.tokens] = static_cast<int>(t);
    b.scale[b.tokens] = scale;
    b.x[b.tokens++] = call.x + t * call.hidden;
  };
  if (call.shared_up) {
    add(call.shared_up, call.shared_down, call.shared_bias, 0, 0, call.shared_width);
    for (int64_t t = 0; t < call.tokens; ++t) join(job.blocks.back(), t, 1.0f);
  }
  std::vector<int> where(call.routed, -1);  // block of an expert
  for (int64_t t = 0; t < call.tokens; ++t)
    for (int64_t k = 0; k < call.active; ++k) {
      const int64_t expert = call.chosen[t * call.active + k];
      if (expert < 0 || expert >= call.routed) return 1;
      if (where[expert] < 0) {
        where[expert] = static_cast<int>(job.blocks.size());
        add(call.up, call.down, call.bias, expert, rows, call.width);
      }
      if (job.blocks[where[expert]].tokens == kTokens) return 1;
      join(job.blocks[where[expert]], t, call.scale ? call.scale[t * call.active + k] : 1.0f);
    }
  run(job, static_cast<int>(call.threads));
  return 0;
}

// 0, or 1 for an expert that does not exist or that a token has twice.
extern "C" int64_t factormix_decode(const Call* call) { return call->bf16 ? decode<Bf16>(*call) : decode<float>(*call); }

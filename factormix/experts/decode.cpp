// Decoding on a CPU: the shared neurons and the chosen experts of a few tokens, in one operator.
//
//     y_t = F_shared(x_t) + sum over the K chosen i of s_ti * E_i(x_t)
//
// At a few tokens an FFN costs the bytes it reads, so every chosen row is read once, where it lies, for all the tokens
// that want it, and nothing is copied. Two parallel loops: over neurons (gate and up rows, activation), then over the
// rows of the down projections. Sums are float32 for every weight dtype. No ISA flags: the row product is compiled
// for three levels and the loader picks one (x86; elsewhere the compiler's baseline).

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define CLONES __attribute__((target_clones("arch=skylake-avx512", "arch=haswell", "default")))
#else
#define CLONES
#endif
#define INLINE inline __attribute__((always_inline))

constexpr int kTokens = 4;  // tokens that share one read of a row
constexpr int kLanes = 16;
typedef float Lanes __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));

INLINE void load(const float* p, Lanes& v) { std::memcpy(&v, p, sizeof v); }
INLINE void load(const at::BFloat16* p, Lanes& v) {
  Halves h;
  std::memcpy(&h, p, sizeof h);
  const Words w = __builtin_convertvector(h, Words) << 16;
  std::memcpy(&v, &w, sizeof v);
}

// out[t] = sum_i w[i] * x[t][i], for N tokens at a time.
template <int N, typename W>
INLINE void dot(const W* w, const float* const* x, int64_t n, float* out) {
  Lanes even[N] = {}, odd[N] = {};  // two chains each, to hide the latency of an addition
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
    const Lanes both = even[t] + odd[t];
    float sum = 0;
    for (int l = 0; l < kLanes; ++l) sum += both[l];
    for (int64_t j = i; j < n; ++j) sum += static_cast<float>(w[j]) * x[t][j];
    out[t] = sum;
  }
}

template <typename W>
INLINE void dots(const W* w, const float* const* x, int tokens, int64_t n, float* out) {
  switch (tokens) {
    case 1: return dot<1>(w, x, n, out);
    case 2: return dot<2>(w, x, n, out);
    case 3: return dot<3>(w, x, n, out);
    default: return dot<4>(w, x, n, out);
  }
}

CLONES void row(const float* w, const float* const* x, int tokens, int64_t n, float* out) { dots(w, x, tokens, n, out); }
CLONES void row(const at::BFloat16* w, const float* const* x, int tokens, int64_t n, float* out) {
  dots(w, x, tokens, n, out);
}

enum Activation : int64_t { kSilu, kGelu, kGeluTanh, kRelu };

inline float activate(int64_t kind, float v) {
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
  int tokens = 0;
  int token[kTokens];
  float scale[kTokens];
  const float* x[kTokens];
  float* h[kTokens];  // (width) each
};

template <typename W>
void run(std::vector<Block<W>>& blocks, int64_t neurons, int64_t hidden, int64_t kind, bool gated, int tokens, float* y) {
  std::vector<float> kept(neurons * kTokens);
  for (auto& b : blocks)
    for (int t = 0; t < b.tokens; ++t) b.h[t] = kept.data() + b.first * kTokens + t * b.width;
  const int64_t grain = std::max<int64_t>(1, 32768 / hidden);  // rows worth a second thread
  at::parallel_for(0, neurons, grain, [&](int64_t begin, int64_t end) {
    size_t at = 0;
    for (int64_t n = begin; n < end; ++n) {
      while (n >= blocks[at].first + blocks[at].width) ++at;
      auto& b = blocks[at];
      const int64_t j = n - b.first;
      float gate[kTokens], up[kTokens];
      row(b.up + j * hidden, b.x, b.tokens, hidden, gate);
      if (gated) row(b.up + (b.width + j) * hidden, b.x, b.tokens, hidden, up);
      for (int t = 0; t < b.tokens; ++t) {
        if (b.bias) gate[t] += static_cast<float>(b.bias[j]);
        if (b.bias && gated) up[t] += static_cast<float>(b.bias[b.width + j]);
        b.h[t][j] = b.scale[t] * activate(kind, gate[t]) * (gated ? up[t] : 1.0f);
      }
    }
  });
  at::parallel_for(0, hidden, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      float sum[kTokens] = {}, part[kTokens];
      for (auto& b : blocks) {
        row(b.down + i * b.width, b.h, b.tokens, b.width, part);
        for (int t = 0; t < b.tokens; ++t) sum[b.token[t]] += part[t];
      }
      for (int t = 0; t < tokens; ++t) y[t * hidden + i] = sum[t];
    }
  });
}

template <typename W>
at::Tensor decode_as(const at::Tensor& x, const std::optional<at::Tensor>& chosen, const std::optional<at::Tensor>& scale,
                     const std::optional<at::Tensor>& up, const std::optional<at::Tensor>& down,
                     const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& shared_up,
                     const std::optional<at::Tensor>& shared_down, const std::optional<at::Tensor>& shared_bias,
                     int64_t kind, bool gated) {
  const int64_t tokens = x.size(0), hidden = x.size(1);
  const at::Tensor in = x.to(at::kFloat).contiguous();
  std::vector<Block<W>> blocks;
  int64_t neurons = 0;
  auto add = [&](const W* u, const W* d, const W* b, int64_t width) -> Block<W>& {
    blocks.push_back({u, d, b, width, neurons});
    neurons += width;
    return blocks.back();
  };
  auto join = [&](Block<W>& b, int t, float s) {
    b.token[b.tokens] = t;
    b.scale[b.tokens] = s;
    b.x[b.tokens++] = in.const_data_ptr<float>() + t * hidden;
  };
  auto data = [](const std::optional<at::Tensor>& t) { return t ? t->const_data_ptr<W>() : nullptr; };
  if (shared_up) {
    auto& b = add(data(shared_up), data(shared_down), data(shared_bias), shared_down->size(1));
    for (int t = 0; t < tokens; ++t) join(b, t, 1.0f);
  }
  if (chosen) {
    const int64_t routed = up->size(0), rows = up->size(1), width = down->size(2), active = chosen->size(1);
    const at::Tensor picks = chosen->contiguous(), weights = scale ? scale->to(at::kFloat).contiguous() : at::Tensor();
    const int64_t* pick = picks.const_data_ptr<int64_t>();
    const float* weight = scale ? weights.const_data_ptr<float>() : nullptr;
    std::vector<int> where(routed, -1);  // block of an expert
    blocks.reserve(blocks.size() + tokens * active);
    for (int t = 0; t < tokens; ++t)
      for (int64_t k = 0; k < active; ++k) {
        const int64_t e = pick[t * active + k];
        TORCH_CHECK(e >= 0 && e < routed, "expert ", e, " of ", routed);
        if (where[e] < 0) {
          where[e] = static_cast<int>(blocks.size());
          add(data(up) + e * rows * hidden, data(down) + e * hidden * width, bias ? data(bias) + e * rows : nullptr, width);
        }
        join(blocks[where[e]], t, weight ? weight[t * active + k] : 1.0f);
      }
  }
  at::Tensor y = at::empty({tokens, hidden}, in.options());
  run(blocks, neurons, hidden, kind, gated, static_cast<int>(tokens), y.mutable_data_ptr<float>());
  return y.to(x.scalar_type());
}

at::Tensor decode(const at::Tensor& x, const std::optional<at::Tensor>& chosen, const std::optional<at::Tensor>& scale,
                  const std::optional<at::Tensor>& up, const std::optional<at::Tensor>& down,
                  const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& shared_up,
                  const std::optional<at::Tensor>& shared_down, const std::optional<at::Tensor>& shared_bias, int64_t kind,
                  bool gated) {
  TORCH_CHECK(x.dim() == 2 && x.size(0) <= kTokens, "decode takes (T, H) with T at most ", kTokens);
  for (const auto& w : {up, down, bias, shared_up, shared_down, shared_bias})
    TORCH_CHECK(!w || (w->is_contiguous() && w->scalar_type() == x.scalar_type()), "weights: contiguous, of x's dtype");
  return x.scalar_type() == at::kFloat
             ? decode_as<float>(x, chosen, scale, up, down, bias, shared_up, shared_down, shared_bias, kind, gated)
             : decode_as<at::BFloat16>(x, chosen, scale, up, down, bias, shared_up, shared_down, shared_bias, kind, gated);
}

}  // namespace

TORCH_LIBRARY(factormix_native, m) {
  m.def(
      "decode(Tensor x, Tensor? chosen, Tensor? scale, Tensor? up, Tensor? down, Tensor? bias, Tensor? shared_up, "
      "Tensor? shared_down, Tensor? shared_bias, int kind, bool gated) -> Tensor");
}
TORCH_LIBRARY_IMPL(factormix_native, CPU, m) { m.impl("decode", decode); }

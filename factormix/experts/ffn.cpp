// A sparse FFN on a CPU in one call: router, shared neurons and the chosen experts.
//
//     y_t = F_shared(x_t) + sum over the K chosen i of s_ti * E_i(x_t)
//
// Tokens are grouped by expert and nothing is copied but the tokens. An expert's up to 8 tokens cost the bytes they
// read: each row is read once, where it lies. More tokens stand side by side in vectors, and tiles of rows are
// multiplied with them in registers: a row is read once for up to 64 tokens, and the neurons come out laid out as the
// down projection wants them. Sums are float32 for every weight dtype. Two steps, neurons then outputs, in one parallel
// region. Weights may be int8 with a float32 scale a row (int8.h). Plain C++ without torch's headers: for any version
// of torch. No ISA flags: kernels.h is compiled for several instruction sets, and the processor picks at run time.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>
#ifdef _OPENMP
#include <omp.h>
#endif
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define SETS 1  // several instruction sets in one file
#include <immintrin.h>
#endif

namespace {

#define INLINE inline __attribute__((always_inline))
#define NOINLINE __attribute__((noinline))
#if defined(__clang__)
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif

constexpr int kLean = 8;      // tokens for which a row is multiplied as it lies, at most
constexpr int kScored = 4;    // tokens that are scored together
constexpr int kLanes = 16;    // float32 to a vector
constexpr int kPanel = 64;    // tokens that share one read of a row, at most
constexpr int kChunk = 1024;  // tokens that are grouped at a time: bounds the scratch memory
constexpr int64_t kSerial = 1 << 16;       // weights too few for a second thread to pay
constexpr int64_t kPanelBytes = 1 << 19;   // of the tokens in a panel: they stay in the second-level cache
typedef float Lanes __attribute__((vector_size(4 * kLanes)));

struct Bf16 {
  uint16_t bits;
};

INLINE double value(const double* p) { return *p; }
INLINE float value(const float* p) { return *p; }
INLINE float value(const Bf16* p) {
  const uint32_t w = static_cast<uint32_t>(p->bits) << 16;
  float f;
  std::memcpy(&f, &w, sizeof f);
  return f;
}
INLINE float value(const int8_t* p) { return *p; }
INLINE Bf16 bf16_of(float f) {  // to the nearest, ties to even
  uint32_t w;
  std::memcpy(&w, &f, sizeof w);
  return {static_cast<uint16_t>(f == f ? (w + 0x7fffu + ((w >> 16) & 1u)) >> 16 : 0x7fc0u)};
}

enum Activation : int { kSilu, kGelu, kGeluTanh, kRelu };
enum Gate : int { kGiven, kConstant, kSigmoid };

// One expert, or the shared neurons, and the tokens that want it.
struct Block {
  const void *up, *down;            // (rows, H), (H, width)
  const float *up_scales, *down_scales;  // (rows), (H) of int8 weights, or null
  const void* up_bias;              // (rows), float32 or bfloat16 as x, or null
  int64_t width, first_h;           // first_h: where its neurons begin in Ffn::h
  int tokens;
  bool lean;
  const int* token;
  const float* weight;

  INLINE float up_scale(int64_t row) const { return up_scales ? up_scales[row] : 1.0f; }
  INLINE float down_scale(int64_t row) const { return down_scales ? down_scales[row] : 1.0f; }
  INLINE float bias(int64_t row, bool bf16) const {
    if (!up_bias) return 0.0f;
    return bf16 ? value(static_cast<const Bf16*>(up_bias) + row) : value(static_cast<const float*>(up_bias) + row);
  }
};

struct Ffn {
  const void* input;  // (T, H)
  float* y;           // (T, H)
  Bf16* rounded;      // (T, H), what y is rounded into; or null
  const void* router;
  int64_t tokens, hidden, routed;
  int kind;
  bool gated, bf16, int8, router_bf16;  // bf16: x, and the weights too unless int8
  bool few, pairs;  // all blocks lean and added up in registers; bfloat16 multiplied as such
  int panel;  // tokens, a multiple of 16
  std::vector<Block> blocks;
  float* h;  // the neurons: (tokens, width) of a lean block, (width, 16) of a group of tokens
};

struct Task {  // neurons begin to end of a block for some of its tokens
  int block, token, tokens;
  int64_t begin, end;
};

struct Scratch {  // of one thread
  float *panel, *rows;
};

namespace baseline {
#define ROWS 6
#define GROUPS 1
#define PAIRS 0
#define BITS 128
#include "kernels.h"
#undef ROWS
#undef GROUPS
#undef BITS
}  // namespace baseline

#ifdef SETS
#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace avx2 {
#define ROWS 6
#define GROUPS 1
#define BITS 256
#include "kernels.h"
#undef ROWS
#undef GROUPS
#undef BITS
}  // namespace avx2
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl")
namespace avx512 {
#define ROWS 12
#define GROUPS 2
#define BITS 512
#include "kernels.h"
}  // namespace avx512
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")
namespace avx512_bf16 {
#undef PAIRS
#define PAIRS 1
#include "kernels.h"
}  // namespace avx512_bf16
#pragma GCC pop_options
#endif

struct Level {
  void (*score)(const Ffn&, int64_t, int64_t, float*);
  void (*step)(const Ffn&, const Task*, int64_t, int64_t, Scratch&);
};

#define LEVEL(name) {name::score, name::step}
const Level kLevels[] = {
    LEVEL(baseline),
#ifdef SETS
    LEVEL(avx2), LEVEL(avx512), LEVEL(avx512_bf16),
#endif
};

int best() {
#ifdef SETS
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return 0;
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl"))
    return 1;
  return __builtin_cpu_supports("avx512bf16") ? 3 : 2;
#else
  return 0;
#endif
}

int level = best();

// Memory that a thread keeps from call to call, unless it is much.
struct Kept {
  std::vector<float> room;
  float* take(int64_t floats) {
    if (static_cast<int64_t>(room.size()) < floats + kLanes) room = std::vector<float>(floats + kLanes);
    const auto at = reinterpret_cast<uintptr_t>(room.data());
    return reinterpret_cast<float*>((at + 63) / 64 * 64);
  }
  void leave() {
    if (room.size() > (1 << 22)) room = {};  // 16 MiB
  }
};
thread_local Kept kept_mine, kept_all, kept_sums;

template <typename F>
void parallel(int threads, const F& work) {  // work(me, all)
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    int me = 0, all = 1;
#ifdef _OPENMP
    me = omp_get_thread_num(), all = omp_get_num_threads();
#endif
    work(me, all);
  }
}

void wait_for_all() {
#pragma omp barrier
}

void run(Ffn& f, int64_t neurons, int threads) {
  f.pairs = level == 3 && f.bf16;
  for (Block& b : f.blocks) b.lean = b.tokens <= kLean;
  f.few = f.tokens <= kLean;
  for (const Block& b : f.blocks)  // tiles of pairs need whole pairs
    f.pairs = f.pairs && (b.lean || (b.width % 2 == 0 && f.hidden % 2 == 0));
  const int64_t each = f.pairs ? 2 : 4;
  f.panel = kPanel;
  while (f.panel > kLanes && f.panel * f.hidden * each > kPanelBytes) f.panel -= kLanes;
  int64_t size = 0, work = 0, widest = f.hidden;
  for (Block& b : f.blocks) {
    const int64_t places = b.lean ? b.tokens : (b.tokens + kLanes - 1) / kLanes * kLanes;
    b.first_h = size;
    size += (places * b.width * each / 4 + kLanes) / kLanes * kLanes;
    work += (b.tokens + f.panel - 1) / f.panel * b.width;
    widest = std::max(widest, b.width);
  }
  f.h = kept_all.take(size);
  if (neurons * f.hidden * f.tokens < kSerial) threads = 1;
  const int64_t pieces = f.few ? threads : 8 * threads;
  const int64_t piece = threads == 1 ? work : std::max<int64_t>(48, (work / pieces + 23) / 24 * 24);
  std::vector<Task> tasks;
  for (int i = 0; i < static_cast<int>(f.blocks.size()); ++i)
    for (int at = 0; at < f.blocks[i].tokens; at += f.panel)
      for (int64_t j = 0; j < f.blocks[i].width; j += piece)
        tasks.push_back({i, at, std::min(f.panel, f.blocks[i].tokens - at), j, std::min(f.blocks[i].width, j + piece)});
  const int64_t strips = (f.hidden + 47) / 48, shares = threads == 1 ? 1 : std::min<int64_t>(4 * threads, strips);
  const Level& at = kLevels[level];
  std::atomic<size_t> up{0};
  std::atomic<int64_t> down{0};
  parallel(threads, [&](int, int) {
    Scratch s;
    s.panel = kept_mine.take(f.panel * f.hidden + 12 * widest);
    s.rows = s.panel + f.panel * f.hidden;
    for (size_t i; (i = up++) < tasks.size();) at.step(f, &tasks[i], 0, 0, s);
    wait_for_all();
    for (int64_t i; (i = down++) < shares;)  // as equal as whole strips allow: all threads are to end together
      at.step(f, nullptr, strips * i / shares * 48, std::min(f.hidden, strips * (i + 1) / shares * 48), s);
    kept_mine.leave();
  });
}

// The K greatest of R scores, best first; of equal ones the first. NaN counts as the greatest, as torch.sort has it.
void choose(const float* z, int64_t routed, int64_t active, int64_t* chosen) {
  auto better = [&](int64_t a, int64_t b) {
    if (z[a] != z[a] || z[b] != z[b]) return z[a] != z[a] && (z[b] == z[b] || a < b);
    return z[a] > z[b] || (z[a] == z[b] && a < b);
  };
  int64_t kept = 0;
  for (int64_t i = 0; i < routed; ++i) {
    int64_t at = std::min(kept, active - 1);
    if (kept == active && !better(i, chosen[at])) continue;
    if (kept < active) at = kept++;
    for (; at > 0 && better(i, chosen[at - 1]); --at) chosen[at] = chosen[at - 1];
    chosen[at] = i;
  }
}

}  // namespace

// The arguments of one call, as native.py lays them out. Pointers may be null where a part is absent.
struct Call {
  const void* x;         // (T, H)
  void* y;               // (T, H)
  const void* router;    // (R, H), or null: `chosen` is given
  float* scores;         // (T, R), written; may be null
  int64_t* chosen;       // (T, K), read; or written, and may be null
  const float* weights;  // (T, K) of gate kGiven, or null for 1
  const void *up, *down, *up_bias;                       // (R, rows, H), (R, H, W), (R, rows)
  const void *shared_up, *shared_down, *shared_up_bias;  // the same for one expert
  const float *up_scale, *down_scale, *shared_up_scale, *shared_down_scale;  // of int8 weights: (R, rows), (R, H)
  int64_t tokens, hidden, routed, active, width, shared_width, bf16, int8, router_bf16, kind, gated, gate, threads;
  double factor;  // of gate kConstant
};

namespace {

Ffn ffn(const Call& c) {
  Ffn f{};
  f.hidden = c.hidden, f.routed = c.routed, f.kind = static_cast<int>(c.kind);
  f.gated = c.gated, f.bf16 = c.bf16, f.int8 = c.int8, f.router = c.router, f.router_bf16 = c.router_bf16;
  return f;
}

// Scores and choices of tokens begin to end.
void route(const Call& c, int64_t begin, int64_t end, float* scores, int threads) {
  Ffn f = ffn(c);
  f.input = c.x;
  parallel((end - begin) * c.routed * c.hidden < kSerial * 4 ? 1 : threads, [&](int64_t me, int64_t all) {
    const int64_t n = end - begin, first = begin + n * me / all, last = begin + n * (me + 1) / all;
    float* z = scores + (first - begin) * c.routed;
    kLevels[level].score(f, first, last, z);
    for (int64_t t = first; t < last; ++t, z += c.routed) choose(z, c.routed, c.active, c.chosen + t * c.active);
  });
}

// Tokens begin to end, from the choice on. False for an expert that does not exist or that a token has twice.
bool mix(const Call& c, int64_t begin, int64_t end, const float* scores, int threads) {
  const int64_t size = c.bf16 ? 2 : 4;
  const int64_t rows = (c.gated ? 2 : 1) * c.width, n = end - begin, pairs = n * c.active;
  Ffn f = ffn(c);
  f.tokens = n;
  f.input = static_cast<const char*>(c.x) + begin * c.hidden * size;
  f.y = c.bf16 ? kept_sums.take(n * c.hidden) : static_cast<float*>(c.y) + begin * c.hidden;
  f.rounded = c.bf16 ? static_cast<Bf16*>(c.y) + begin * c.hidden : nullptr;

  // tokens by expert: a counting sort, the shared neurons in front
  const int64_t* chosen = c.chosen + begin * c.active;
  std::vector<int> start(c.routed + 1, 0), last(c.routed, -1), token(pairs + n);
  std::vector<float> weight(pairs + n, 1.0f);
  for (int64_t t = 0; t < n; ++t)
    for (int64_t k = 0; k < c.active; ++k) {
      const int64_t e = chosen[t * c.active + k];
      if (e < 0 || e >= c.routed || last[e] == t) return false;
      last[e] = static_cast<int>(t), ++start[e + 1];
    }
  for (int64_t e = 0; e < c.routed; ++e) start[e + 1] += start[e];
  std::vector<int> next(start);
  for (int64_t t = 0; t < n; ++t)
    for (int64_t k = 0; k < c.active; ++k) {
      const int64_t e = chosen[t * c.active + k], at = next[e]++;
      token[at] = static_cast<int>(t);
      if (c.gate == kConstant) weight[at] = static_cast<float>(c.factor);
      else if (c.gate == kSigmoid) weight[at] = 1.0f / (1.0f + std::exp(-scores[t * c.routed + e]));
      else if (c.weights) weight[at] = c.weights[(begin + t) * c.active + k];
    }
  int64_t neurons = 0;
  auto add = [&](const void* up, const void* down, const float* up_scale, const float* down_scale, const void* bias,
                 int64_t e, int64_t r, int64_t width, int count, const int* tokens, const float* weights) {
    auto part = [&](const void* p, int64_t at, int64_t each) {
      return p ? static_cast<const char*>(p) + at * each : nullptr;
    };
    auto scales = [&](const float* p, int64_t at) { return p ? p + at : nullptr; };
    const int64_t each = c.int8 ? 1 : size;
    const void *own_up = part(up, e * r * c.hidden, each), *own_down = part(down, e * c.hidden * width, each);
    f.blocks.push_back({own_up, own_down, scales(up_scale, e * r), scales(down_scale, e * c.hidden),
                        part(bias, e * r, size), width, 0, count, false, tokens, weights});
    neurons += width;
  };
  if (c.shared_up) {
    for (int64_t t = 0; t < n; ++t) token[pairs + t] = static_cast<int>(t);
    add(c.shared_up, c.shared_down, c.shared_up_scale, c.shared_down_scale, c.shared_up_bias, 0, 0, c.shared_width,
        static_cast<int>(n), &token[pairs], &weight[pairs]);
  }
  for (int64_t e = 0; e < c.routed; ++e)
    if (start[e + 1] > start[e])
      add(c.up, c.down, c.up_scale, c.down_scale, c.up_bias, e, rows, c.width, start[e + 1] - start[e],
          &token[start[e]], &weight[start[e]]);

  run(f, neurons, threads);
  kept_all.leave(), kept_sums.leave();
  return true;
}

}  // namespace

// 0, or 1 for an expert that does not exist or that a token has twice.
extern "C" int64_t factormix_ffn(const Call* call) {
  Call c = *call;
  std::vector<float> scores;
  std::vector<int64_t> chosen;
  if (c.router && !c.scores) scores.resize(c.tokens * c.routed), c.scores = scores.data();
  if (c.router && !c.chosen) chosen.resize(c.tokens * c.active), c.chosen = chosen.data();
  const int threads = static_cast<int>(c.threads);
  for (int64_t begin = 0; begin < c.tokens; begin += kChunk) {
    const int64_t end = std::min(c.tokens, begin + kChunk);
    float* z = c.scores + begin * c.routed;
    if (c.router) route(c, begin, end, z, threads);
    if ((c.up || c.shared_up) && !mix(c, begin, end, z, threads)) return 1;
  }
  return 0;
}

// The instruction set in use, 0 the compiler's baseline, after setting it to `wanted` where that is one that runs here.
extern "C" int64_t factormix_level(int64_t wanted) {
  if (wanted >= 0 && wanted <= best()) level = static_cast<int>(wanted);
  return level;
}

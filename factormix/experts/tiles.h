// More than 8 tokens: 16 of them side by side in a vector; a tile of rows times one or two such groups stays in
// registers. A part of kernels.h.

// out (R, G, 16) = the R rows times the groups; x holds the groups one behind the other, (n, 16) each. The rows of the
// next tile, `next` numbers on, are fetched into the second-level cache meanwhile.
template <int R, int G>
INLINE void tile(const float* const* w, const float* x, int64_t n, int64_t next, float* out) {
  Part sum[R][G * kParts] = {}, v[G * kParts];
  for (int64_t from = 0; from < n; from += kLanes) {
    UNROLL for (int r = 0; r < R; ++r) __builtin_prefetch(w[r] + from + next, 0, 2);
    const int64_t to = std::min(n, from + kLanes);
    for (int64_t i = from; i < to; ++i) {
      beside<G>(x, n, i, v);
      UNROLL for (int r = 0; r < R; ++r) UNROLL for (int q = 0; q < G * kParts; ++q) sum[r][q] += v[q] * w[r][i];
    }
  }
  UNROLL for (int r = 0; r < R; ++r) UNROLL for (int q = 0; q < G * kParts; ++q)
    store(out + (r * G * kParts + q) * kPart, sum[r][q]);
}

#if PAIRS
// The same for pairs of bfloat16: x is (n / 2, 16) words, neighbours of a row in one word.
template <int R, int G>
INLINE void tile(const Bf16* const* w, const float* x, int64_t n, int64_t next, float* out) {
  __m512 sum[R][G];
  UNROLL for (int r = 0; r < R; ++r) UNROLL for (int g = 0; g < G; ++g) sum[r][g] = _mm512_setzero_ps();
  for (int64_t from = 0; from < n / 2; from += kLanes) {
    UNROLL for (int r = 0; r < R; ++r) __builtin_prefetch(w[r] + 2 * from + next, 0, 2);
    const int64_t to = std::min(n / 2, from + kLanes);
    for (int64_t i = from; i < to; ++i) {
      __m512bh v[G];
      UNROLL for (int g = 0; g < G; ++g) v[g] = (__m512bh)_mm512_loadu_si512(x + (g * (n / 2) + i) * kLanes);
      UNROLL for (int r = 0; r < R; ++r) {
        int pair;
        std::memcpy(&pair, w[r] + 2 * i, sizeof pair);
        const __m512bh both = (__m512bh)_mm512_set1_epi32(pair);
        UNROLL for (int g = 0; g < G; ++g) sum[r][g] = _mm512_dpbf16_ps(sum[r][g], v[g], both);
      }
    }
  }
  UNROLL for (int r = 0; r < R; ++r) UNROLL for (int g = 0; g < G; ++g)
    store(out + (r * G + g) * kLanes, (Part)sum[r][g]);
}
#endif

template <int R, typename C, typename Row>  // out (R, groups, 16)
NOINLINE void tiles(const Row* w, const float* x, int groups, int64_t n, int64_t next, float* out) {
  const int64_t words = sizeof(C) == 2 ? n / 2 : n;
  int g = 0;
#if GROUPS == 2
  for (; g + 2 <= groups; g += 2) {
    alignas(64) float part[R][2 * kLanes];
    tile<R, 2>(w, x + g * words * kLanes, n, next, part[0]);
    for (int r = 0; r < R; ++r) std::memcpy(out + (r * groups + g) * kLanes, part[r], sizeof part[r]);
  }
#endif
  for (; g < groups; ++g) {
    alignas(64) float part[R][kLanes];
    tile<R, 1>(w, x + g * words * kLanes, n, next, part[0]);
    for (int r = 0; r < R; ++r) std::memcpy(out + (r * groups + g) * kLanes, part[r], sizeof part[r]);
  }
}

template <typename C, typename Row>
INLINE void tiles(int rows, const Row* w, const float* x, int groups, int64_t n, int64_t next, float* out) {
  switch (rows) {
    case ROWS: return tiles<ROWS, C>(w, x, groups, n, next, out);
#if ROWS > 8
    case 8: return tiles<8, C>(w, x, groups, n, next, out);
#endif
    case 4: return tiles<4, C>(w, x, groups, n, next, out);
    case 2: return tiles<2, C>(w, x, groups, n, next, out);
    default: return tiles<1, C>(w, x, groups, n, next, out);
  }
}

INLINE int fitting(int64_t rows) {  // the largest tile
  return rows >= ROWS ? ROWS : ROWS > 8 && rows >= 8 ? 8 : rows >= 4 ? 4 : rows >= 2 ? 2 : 1;
}

// The tokens' rows of x, 16 to a group, transposed: (words, 16) a group.
template <typename C, typename X>
INLINE void gather(const Ffn& f, const X* x, const int* token, int tokens, float* out) {
  constexpr int kEach = sizeof(C) == 2 ? 2 : 1;  // numbers to a word
  const int64_t words = f.hidden / kEach;
  for (int at = 0; at < tokens; at += kLanes, out += words * kLanes) {
    const int n = std::min(kLanes, tokens - at);
    for (int64_t i = 0; i < words; i += kLanes) {
      const int64_t m = std::min<int64_t>(kLanes, words - i);
      alignas(64) float v[kLanes][kLanes] = {};
      for (int t = 0; t < n; ++t) {
        const X* from = x + token[at + t] * f.hidden + i * kEach;
        if (kEach == 2) std::memcpy(v[t], from, m * sizeof(float));
        else if (m == kLanes) widen(from, v[t]);
        else for (int64_t l = 0; l < m; ++l) v[t][l] = value(from + l);
      }
      transpose(v[0]);
      std::memcpy(out + i * kLanes, v, m * sizeof v[0]);
    }
  }
}

// One of a pair of bfloat16 in each word: first the even one, then the odd one above it.
INLINE void put_half(float* to, bool odd, Part v) {
  Words w = rounded(v);
  if (odd) {
    Words even;
    std::memcpy(&even, to, sizeof even);
    w = even | (w << 16);
  }
  std::memcpy(to, &w, sizeof w);
}

// Some neurons of a block for some of its tokens, into f.h as `gather` would lay them out.
template <typename W, typename C>
INLINE void many_neurons(const Ffn& f, const Task& task, Scratch& s) {
  const Block& b = f.blocks[task.block];
  if (b.lean) return lean_neurons<W, C>(f, b, task.begin, task.end, s);
  const int groups = (task.tokens + kLanes - 1) / kLanes, both = f.gated ? 2 : 1;
  const int* token = b.token + task.token;
  if (f.bf16) gather<C>(f, static_cast<const Bf16*>(f.input), token, task.tokens, s.panel);
  else if (sizeof(C) == 4) gather<float>(f, static_cast<const float*>(f.input), token, task.tokens, s.panel);
  float weight[kPanel] = {};
  for (int t = 0; t < task.tokens; ++t) weight[t] = b.weight[task.token + t];
  const int64_t words = sizeof(C) == 2 ? b.width / 2 : b.width;
  float* h = f.h + b.first_h + task.token / kLanes * words * kLanes;
  C* room = reinterpret_cast<C*>(s.rows);
  alignas(64) float out[ROWS * kPanel];
  for (int64_t j = task.begin; j < task.end;) {
    const int rows = std::max(both, fitting((task.end - j) * both)), n = rows / both;
    decltype(as(static_cast<const W*>(nullptr), room, 0)) w[ROWS];
    for (int r = 0; r < rows; ++r) {
      const int64_t at = r < n ? j + r : b.width + j + r - n;
      w[r] = as(static_cast<const W*>(b.up) + at * f.hidden, room + r * f.hidden, f.hidden);
    }
    tiles<C>(rows, w, s.panel, groups, f.hidden, n * f.hidden, out);
    for (int r = 0; r < n; ++r) {
      const int64_t at = j + r, word = sizeof(C) == 2 ? at / 2 : at;
      for (int q = 0; q < groups * kParts; ++q) {
        const int lane = q * kPart;
        Part v, u, factor;
        load(out + r * groups * kLanes + lane, v), load(weight + lane, factor);
        v = factor * activate(f.kind, v * b.up_scale(at) + b.bias(at, f.bf16));
        if (f.gated) {
          load(out + (n + r) * groups * kLanes + lane, u);
          v *= u * b.up_scale(b.width + at) + b.bias(b.width + at, f.bf16);
        }
        float* to = h + (lane / kLanes * words + word) * kLanes + lane % kLanes;
        if (sizeof(C) == 2) put_half(to, at % 2, v);
        else store(to, v);
      }
    }
    j += n;
  }
}

// Outputs begin to end of all tokens, added up in the order of the blocks.
template <typename W, typename C>
INLINE void many_outputs(const Ffn& f, int64_t begin, int64_t end, Scratch& s) {
  constexpr int kChunk = 48;  // a multiple of 12 and of 16
  for (int64_t t = 0; t < f.tokens; ++t) std::fill(f.y + t * f.hidden + begin, f.y + t * f.hidden + end, 0.0f);
  C* room = reinterpret_cast<C*>(s.rows);
  alignas(64) float out[kChunk * kPanel];
  for (const Block& b : f.blocks) {
    if (b.lean) {
      lean_outputs<W, C>(f, b, begin, end);
      continue;
    }
    const int64_t words = sizeof(C) == 2 ? b.width / 2 : b.width;
    for (int at = 0; at < b.tokens; at += f.panel) {
      const int tokens = std::min(f.panel, b.tokens - at), groups = (tokens + kLanes - 1) / kLanes;
      const float* h = f.h + b.first_h + at / kLanes * words * kLanes;
      for (int64_t i = begin; i < end; i += kChunk) {
        const int64_t n = std::min<int64_t>(kChunk, end - i);
        for (int64_t r = 0; r < n;) {
          const int rows = fitting(n - r);
          decltype(as(static_cast<const W*>(nullptr), room, 0)) w[ROWS];
          for (int q = 0; q < rows; ++q)
            w[q] = as(static_cast<const W*>(b.down) + (i + r + q) * b.width, room + q * b.width, b.width);
          tiles<C>(rows, w, h, groups, b.width, rows * b.width, out + r * groups * kLanes);
          if (b.down_scales)
            for (int q = 0; q < rows * groups * kParts; ++q) {
              float* sums = out + r * groups * kLanes + q * kPart;
              Part v;
              load(sums, v), store(sums, v * b.down_scale(i + r + q / (groups * kParts)));
            }
          r += rows;
        }
        for (int64_t r = 0; r < n; r += kLanes)
          for (int g = 0; g < groups; ++g) {
            const int64_t m = std::min<int64_t>(kLanes, n - r);
            alignas(64) float v[kLanes][kLanes] = {};
            for (int64_t q = 0; q < m; ++q)
              std::memcpy(v[q], out + ((r + q) * groups + g) * kLanes, sizeof v[q]);
            transpose(v[0]);
            for (int t = 0; t < std::min(kLanes, tokens - g * kLanes); ++t) {
              float* y = f.y + b.token[at + g * kLanes + t] * f.hidden + i + r;
              if (m < kLanes) {
                for (int64_t q = 0; q < m; ++q) y[q] += v[t][q];
                continue;
              }
              UNROLL for (int p = 0; p < kParts; ++p) {
                Part sum, more;
                load(y + p * kPart, sum), load(v[t] + p * kPart, more);
                store(y + p * kPart, sum + more);
              }
            }
          }
      }
    }
  }
}

// The loops of ffn.cpp. Included once for each instruction set, inside a namespace of its own, with
//   ROWS    rows of weights that a tile holds in registers, a multiple of 6
//   GROUPS  groups of 16 tokens that a tile holds, 1 or 2
//   BITS    of the processor's vectors: 128, 256 or 512
//   PAIRS   1 where the processor multiplies pairs of bfloat16 (AVX512-BF16)

#include "lanes.h"
#include "rows.h"
#include "scores.h"
#include "tiles.h"

// Outputs begin to end of all tokens, rounded to bfloat16.
NOINLINE void round_outputs(const Ffn& f, int64_t begin, int64_t end) {
  for (int64_t t = 0; t < f.tokens; ++t) {
    const float* y = f.y + t * f.hidden;
    Bf16* to = f.rounded + t * f.hidden;
    int64_t i = begin;
    for (Part v; i + kPart <= end; i += kPart) {
      load(y + i, v);
      const Halves h = __builtin_convertvector(rounded(v), Halves);
      std::memcpy(to + i, &h, sizeof h);
    }
    for (; i < end; ++i) to[i] = bf16_of(y[i]);
  }
}

template <typename W, typename C>
void step(const Ffn& f, const Task* up, int64_t begin, int64_t end, Scratch& s) {
  if (up) return many_neurons<W, C>(f, *up, s);
  f.few ? few_outputs<W, C>(f, begin, end) : many_outputs<W, C>(f, begin, end, s);
  if (f.rounded) round_outputs(f, begin, end);
}

// Some neurons; or, with null, outputs begin to end of all tokens.
void step(const Ffn& f, const Task* up, int64_t begin, int64_t end, Scratch& s) {
#if PAIRS
  if (f.pairs) return f.int8 ? step<int8_t, Bf16>(f, up, begin, end, s) : step<Bf16, Bf16>(f, up, begin, end, s);
#endif
  if (f.int8) return step<int8_t, float>(f, up, begin, end, s);
  f.bf16 ? step<Bf16, float>(f, up, begin, end, s) : step<float, float>(f, up, begin, end, s);
}

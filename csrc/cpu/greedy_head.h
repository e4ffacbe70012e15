// What greedy_head.cpp (bounds, memory, threads, the AMX tiles) hands to greedy_head_simd.cpp (arithmetic).
#pragma once

#include <cstdint>

#include "dispatch.h"

namespace lmvae {

constexpr int64_t kHeadPanel = 32;  // vocabulary entries that lie together
constexpr int64_t kHeadDepth = 32;  // inputs of one step of a panel

struct GreedyHeadArgs {
  int64_t rows, in, steps, vocabulary, panels;
  const float* x;          // [rows, in]
  const float* weight;     // [vocabulary, in]
  const uint16_t* halves;  // the weight in bf16, [panels][steps][2][16 pairs][16 entries][2 of a pair]
};

struct HeadBest {
  float value;
  int64_t id;
};

// A NaN counts as the largest, as in torch.argmax; of equal values the lowest id.
inline bool better(float value, int64_t id, const HeadBest& than) {
  if (value > than.value) return true;
  const bool same = value == than.value || (value != value && than.value != than.value);
  if (same) return id < than.id;
  return value != value && than.value == than.value;
}

}  // namespace lmvae

// largest[p * rows + r] = the largest of x_r . bf16(w_v) over the entries v of panel p, for panels [begin, end).
LMVAE_DECLARE(void head_largest(const ::lmvae::GreedyHeadArgs& a, int64_t begin, int64_t end, float* largest))
// best[r] takes the best exact fp32 logit of panel p, for each of `count` rows.
LMVAE_DECLARE(void head_exact(const ::lmvae::GreedyHeadArgs& a, int64_t p, const int32_t* rows, int64_t count,
                              ::lmvae::HeadBest* best))

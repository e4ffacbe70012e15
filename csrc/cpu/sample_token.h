// What sample_token.cpp (checks, allocation, threads) hands to sample_token_simd.cpp (arithmetic).
#pragma once

#include <cstdint>

#include "dispatch.h"

namespace lmvae {

// Strides are in elements; rows, steps and the outputs are dense. seen is null without a penalty, logprob without one
// asked.
struct SampleTokenArgs {
  const void* logits;
  int64_t logits_row, logits_col, vocab;
  uint64_t seed, offset;
  const int64_t *rows, *steps;
  const uint8_t* seen;
  int64_t seen_row, seen_col;
  bool greedy;
  double temperature;
  int64_t top_k;
  double top_p, min_p, penalty;
  int64_t* ids;
  float* logprob;
};

}  // namespace lmvae

// Bytes of workspace that a thread needs.
LMVAE_DECLARE(template <typename T> int64_t sample_token_workspace(int64_t vocab))
// Rows [begin, end), one after the other.
LMVAE_DECLARE(template <typename T> void sample_token_rows(const ::lmvae::SampleTokenArgs& a, int64_t begin,
                                                           int64_t end, void* workspace))

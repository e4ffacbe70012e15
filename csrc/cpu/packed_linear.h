// What packed_linear.cpp (checks, memory, threads) hands to packed_linear_simd.cpp (arithmetic).
#pragma once

#include <cstdint>

#include "dispatch.h"

namespace lmvae {

constexpr int64_t kLinearPanel = 32;   // columns that lie together in the packed weight: two of the widest vectors
constexpr int64_t kLinearDepth = 128;  // terms of a sum held in registers; a panel's piece of this depth stays in L1
constexpr int64_t kLinearRows = 128;   // rows of one call

struct PackedLinearArgs {
  int64_t rows, in, out;
  const float* x;       // [in / kLinearDepth][rows][kLinearDepth], the last piece shorter
  const float* weight;  // [panels][in][kLinearPanel], zeros beyond out
  const float* bias;    // [out] or null
  float* y;             // [rows, out]
};

}  // namespace lmvae

// Panels [begin, end).
LMVAE_DECLARE(void packed_linear_panels(const ::lmvae::PackedLinearArgs& a, int64_t begin, int64_t end))

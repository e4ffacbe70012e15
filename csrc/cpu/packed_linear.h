// What packed_linear.cpp (checks, memory, threads) hands to packed_linear_simd.cpp (arithmetic).
#pragma once

#include <cstdint>
#include <functional>

#include "dispatch.h"

namespace lmvae {

constexpr int64_t kLinearPanel = 32;   // columns that lie together in the packed weight: two of the widest vectors
constexpr int64_t kLinearDepth = 128;  // terms of a sum held in registers; a panel's piece of this depth stays in L1
constexpr int64_t kLinearRows = 128;   // rows of one call

// What is done to a product before it is stored; numbers as in kernels/packed_linear/op.py.
enum class Activation : int64_t { None = 0, GeluTanh = 1, SwiGlu = 2 };

struct PackedLinearArgs {
  int64_t rows, in, out;
  Activation activation;  // SwiGlu: a panel holds 16 gates and the 16 columns they are for, and gives 16 outputs
  const float* x;         // [in / kLinearDepth][rows][kLinearDepth], the last piece filled in part
  const float* weight;    // [panels][in][kLinearPanel], zeros beyond out
  const float* bias;      // [out] or null; null with SwiGlu
  const float* residual;  // [rows, out] or null, added last
  float* y;               // [rows, out]
};

// The same on the AMX tiles, where `in` is a multiple of 32: bytes of the rows' parts, the parts of steps [begin, end)
// of 32 depths, and the sums of panels [begin, end), each given to `done` as [rows][kLinearPanel].
int64_t packed_linear_amx_workspace(int64_t rows, int64_t in);
void packed_linear_amx_rows(const float* x, int64_t stride, int64_t rows, int64_t in, char* parts, int64_t begin,
                            int64_t end);
void packed_linear_amx_panels(const PackedLinearArgs& a, const char* parts, int64_t begin, int64_t end,
                              const std::function<void(int64_t panel, float* sums)>& done);

}  // namespace lmvae

// The sums [rows][kLinearPanel] of a panel on their way to y; false if one of them is NaN.
LMVAE_DECLARE(bool packed_linear_finish(const ::lmvae::PackedLinearArgs& a, float* sums, int64_t panel))
// Panels [begin, end).
LMVAE_DECLARE(void packed_linear_panels(const ::lmvae::PackedLinearArgs& a, int64_t begin, int64_t end))

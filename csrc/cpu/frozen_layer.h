// What frozen_layer.cpp (checks, allocation, threads) hands to frozen_layer_simd.cpp (arithmetic). Rows are dense, row
// strides in elements; arithmetic is fp32, rounded once.
#pragma once

#include <cstdint>

#include "dispatch.h"

namespace lmvae {

// Numbers as in kernels/frozen_layer/op.py.
enum class RowActivation : int64_t { GeluTanh = 0, SwiGlu = 1, GegluTanh = 2 };

template <typename T>
struct NormArgs {
  int64_t width;
  double eps;
  bool centred;                // LayerNorm; else RMSNorm
  const float *weight, *bias;  // bias null: none
  const T* x;
  int64_t x_row;
  float* stats;           // [rows, 2]: mean (0 where it is not centred) and 1 / deviation
  const T *grad, *added;  // backward; added null: none
  int64_t grad_row, added_row;
  T* out;  // dense
};

template <typename T>
struct ActivationArgs {
  int64_t width;  // of what comes out; what is gated reads [gate, up], twice as wide
  RowActivation kind;
  const T *x, *grad;
  int64_t x_row, grad_row;
  T* out;
};

// Halves (j, j + dim / 2) of each of `heads` heads in a row are turned by the row's angles, in place.
template <typename T>
struct RotaryArgs {
  int64_t heads, dim;
  bool back;  // by the transposed map, as gradients are
  T* x;
  int64_t x_row;
  const T *cos, *sin;  // [rows, dim]
  int64_t cos_row, sin_row;
};

}  // namespace lmvae

// Rows [begin, end).
LMVAE_DECLARE(template <typename T> void norm_rows(const ::lmvae::NormArgs<T>& a, int64_t begin, int64_t end))
LMVAE_DECLARE(template <typename T> void norm_rows_bwd(const ::lmvae::NormArgs<T>& a, int64_t begin, int64_t end))
LMVAE_DECLARE(template <typename T> void activation_rows(const ::lmvae::ActivationArgs<T>& a, int64_t begin,
                                                         int64_t end))
LMVAE_DECLARE(template <typename T> void activation_rows_bwd(const ::lmvae::ActivationArgs<T>& a, int64_t begin,
                                                             int64_t end))
LMVAE_DECLARE(template <typename T> void rotary_rows(const ::lmvae::RotaryArgs<T>& a, int64_t begin, int64_t end))

// What follows a product: bias, activation and residual, while a panel's 32 columns are in the cache; in fp32, rounded
// once.
#include "packed_linear.h"

#include <algorithm>

#include "simd_math.h"

namespace lmvae::LMVAE_ISA {
namespace {

LMVAE_INLINE float sigmoid(float x) { return 1.0f / (1.0f + exp_(-x)); }

// The 32 sums of a row on their way to y.
template <typename T>
void finish(const LinearEnd<T>& a, float* sums, int64_t row, int64_t panel) {
  constexpr int64_t kHalf = kLinearPanel / 2;
  const bool gated = a.activation == Activation::SwiGlu;
  const int64_t most = gated ? kHalf : kLinearPanel, first = panel * most, width = std::min(most, a.out - first);
  float added[kLinearPanel];
  if (a.bias != nullptr) {
    load_unit(a.bias + first, added, width);
#pragma omp simd
    for (int64_t c = 0; c < width; c++) sums[c] += added[c];
  }
  if (gated)
#pragma omp simd
    for (int64_t c = 0; c < kHalf; c++) sums[c] *= sigmoid(sums[c]) * sums[kHalf + c];
  if (a.activation == Activation::GeluTanh)  // 0.5 x (1 + tanh(u)) is x sigmoid(2 u)
#pragma omp simd
    for (int64_t c = 0; c < width; c++)
      sums[c] *= sigmoid(1.5957691216057308f * (sums[c] + 0.044715f * sums[c] * sums[c] * sums[c]));
  if (a.residual != nullptr) {
    load_unit(a.residual + row * a.out + first, added, width);
#pragma omp simd
    for (int64_t c = 0; c < width; c++) sums[c] += added[c];
  }
  store_row(sums, a.y + row * a.out + first, width);
}

}  // namespace

template <typename T>
bool packed_linear_finish(const LinearEnd<T>& a, float* sums, int64_t panel) {
  int nan = 0;
#pragma omp simd reduction(| : nan)
  for (int64_t i = 0; i < a.rows * kLinearPanel; i++) nan |= sums[i] != sums[i];
  for (int64_t r = 0; r < a.rows; r++) finish(a, sums + r * kLinearPanel, r, panel);
  return nan == 0;
}
template bool packed_linear_finish(const LinearEnd<float>&, float*, int64_t);
template bool packed_linear_finish(const LinearEnd<c10::BFloat16>&, float*, int64_t);

}  // namespace lmvae::LMVAE_ISA

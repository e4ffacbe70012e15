// What follows a product: bias, activation and residual, while a panel's 32 columns are in the cache; in fp32, rounded
// once.
#include "packed_linear.h"

#include <algorithm>

#include "simd_math.h"

namespace lmvae::LMVAE_ISA {
namespace {

constexpr int64_t kHalf = kLinearPanel / 2;

LMVAE_INLINE float sigmoid(float x) { return 1.0f / (1.0f + exp_(-x)); }

// The sums of every row on their way to y: `width` columns of a panel, or `full` where all of them are there and every
// loop has a length that the compiler knows. Returns whether a sum is NaN.
template <typename T, Activation activation, int64_t full>
int finish_rows(const LinearEnd<T>& a, const float* sums, int64_t first, int64_t some) {
  const int64_t width = full > 0 ? full : some;
  float bias[kLinearPanel] = {}, residual[kLinearPanel] = {}, out[kLinearPanel];
  if (a.bias != nullptr) load_unit(a.bias + first, bias, width);
  int nan = 0;
  for (int64_t r = 0; r < a.rows; r++, sums += kLinearPanel) {
#pragma omp simd reduction(| : nan)
    for (int64_t c = 0; c < kLinearPanel; c++) nan |= sums[c] != sums[c];
    if (a.residual != nullptr) load_unit(a.residual + r * a.out + first, residual, width);
#pragma omp simd
    for (int64_t c = 0; c < width; c++) {
      float x = sums[c] + bias[c];
      if constexpr (activation == Activation::SwiGlu) x = sums[c] * (sigmoid(sums[c]) * sums[kHalf + c]);
      if constexpr (activation == Activation::GeluTanh)  // 0.5 x (1 + tanh(u)) is x sigmoid(2 u)
        x *= sigmoid(1.5957691216057308f * (x + 0.044715f * x * x * x));
      out[c] = x + residual[c];
    }
    store_row(out, a.y + r * a.out + first, width);
  }
  return nan;
}

template <typename T, Activation activation>
bool finish(const LinearEnd<T>& a, const float* sums, int64_t panel) {
  constexpr int64_t most = activation == Activation::SwiGlu ? kHalf : kLinearPanel;
  const int64_t first = panel * most, width = std::min(most, a.out - first);
  const int nan = width == most ? finish_rows<T, activation, most>(a, sums, first, width)
                                : finish_rows<T, activation, 0>(a, sums, first, width);
  return nan == 0;
}

}  // namespace

template <typename T>
bool packed_linear_finish(const LinearEnd<T>& a, float* sums, int64_t panel) {
  switch (a.activation) {
    case Activation::GeluTanh: return finish<T, Activation::GeluTanh>(a, sums, panel);
    case Activation::SwiGlu: return finish<T, Activation::SwiGlu>(a, sums, panel);
    default: return finish<T, Activation::None>(a, sums, panel);
  }
}
template bool packed_linear_finish(const LinearEnd<float>&, float*, int64_t);
template bool packed_linear_finish(const LinearEnd<c10::BFloat16>&, float*, int64_t);

}  // namespace lmvae::LMVAE_ISA

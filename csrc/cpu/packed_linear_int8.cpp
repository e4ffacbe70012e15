// packed_linear with int8 weights on CPU: memory and threads (kernels/packed_linear/int8.py checks the arguments).
#include "packed_linear_int8.h"

#include <algorithm>
#include <atomic>

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "cpu_features.h"
#include "row_ops.h"

namespace lmvae {
namespace {

using OptionalTensor = std::optional<at::Tensor>;

constexpr int64_t kGrain = 200'000;  // multiplications worth a thread

template <typename T>
void on_numbers(ByteLinearArgs<T>& a, const T* rows, int64_t stride, int64_t in, int64_t panels, int64_t grain) {
  const int64_t pieces = (in + kByteDepth - 1) / kByteDepth, apart = a.rows * kByteDepth;
  const at::Tensor room = at::empty({pieces * apart}, at::kFloat);
  float* to = room.mutable_data_ptr<float>();
  for (int64_t r = 0; r < a.rows; r++) LMVAE_PICK(byte_linear_widen(rows + r * stride, in, apart, to + r * kByteDepth));
  a.x = to;
  at::parallel_for(0, panels, grain,
                   [&](int64_t begin, int64_t end) { LMVAE_PICK(byte_linear_panels<T>(a, begin, end)); });
}

// False where a row cannot be rounded to whole numbers: it holds Inf or NaN, or nothing but the smallest numbers.
bool on_whole_numbers(ByteLinearArgs<c10::BFloat16>& a, const c10::BFloat16* rows, int64_t stride, int64_t in,
                      int64_t panels, int64_t grain) {
  const int64_t pieces = (in + kByteDepth - 1) / kByteDepth, apart = 2 * a.rows * kByteDepth;
  const at::Tensor room = at::empty({pieces * apart}, at::kByte), scales = at::empty({a.rows}, at::kFloat);
  uint8_t* to = room.mutable_data_ptr<uint8_t>();
  float* counts = scales.mutable_data_ptr<float>();
  std::atomic<bool> whole{true};
  at::parallel_for(0, a.rows, std::max<int64_t>(1, 16'000 / in), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; r++)
      if (!LMVAE_PICK(byte_linear_round(rows + r * stride, in, apart, to + 2 * r * kByteDepth, counts + r)))
        whole = false;
  });
  if (!whole) return false;
  a.x = to;
  a.row_scales = counts;
  at::parallel_for(0, panels, grain, [&](int64_t begin, int64_t end) {
    byte_linear_dot_panels(a, begin, end, [&](int64_t panel, float* sums) {
      LMVAE_PICK(packed_linear_finish<c10::BFloat16>(a, sums, panel));
    });
  });
  return true;
}

template <typename T>
void products(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& scales, const at::Tensor& totals,
              const at::Tensor& bias, const at::Tensor& residual, Activation activation, at::Tensor& y) {
  const int64_t in = x.size(1), out = y.size(1), panels = weight.size(0);
  for (int64_t from = 0; from < x.size(0); from += kLinearRows) {
    const int64_t rows = std::min(kLinearRows, x.size(0) - from);
    ByteLinearArgs<T> a{{rows, out, activation, bias.defined() ? bias.const_data_ptr<T>() : nullptr,
                         residual.defined() ? residual.const_data_ptr<T>() + from * out : nullptr,
                         y.mutable_data_ptr<T>() + from * out},
                        weight.size(1),
                        weight.const_data_ptr<int8_t>(),
                        scales.const_data_ptr<float>(),
                        totals.const_data_ptr<int32_t>(),
                        nullptr,
                        nullptr};
    const T* first = x.const_data_ptr<T>() + from * x.stride(0);
    const int64_t grain = std::max<int64_t>(1, kGrain / (rows * in * kLinearPanel + 1));
    if constexpr (std::is_same_v<T, c10::BFloat16>)
      if (have_byte_dots() && on_whole_numbers(a, first, x.stride(0), in, panels, grain)) continue;
    on_numbers(a, first, x.stride(0), in, panels, grain);
  }
}

}  // namespace

at::Tensor packed_linear_int8(const at::Tensor& input, const at::Tensor& weight, const at::Tensor& scales,
                              const at::Tensor& totals, const OptionalTensor& bias, const OptionalTensor& residual,
                              int64_t activation, int64_t out_features) {
  const auto what = static_cast<Activation>(activation);
  const int64_t width = what == Activation::SwiGlu ? kLinearPanel / 2 : kLinearPanel, in = input.size(1);
  const int64_t steps = (in + kByteStep - 1) / kByteStep, panels = (out_features + width - 1) / width;
  TORCH_CHECK(weight.dim() == 6 && weight.size(0) == panels && weight.size(1) == steps && weight.is_contiguous() &&
                  weight.numel() == panels * steps * kByteStepNumbers && scales.is_contiguous() &&
                  totals.is_contiguous() && scales.numel() == panels * kLinearPanel &&
                  totals.numel() == panels * kLinearPanel,
              "packed_linear_int8: the weight is not quantize_weight's for ", out_features, " x ", in);
  TORCH_CHECK(!residual.has_value() || residual->sizes().equals({input.size(0), out_features}),
              "packed_linear_int8: the residual is not [", input.size(0), ", ", out_features, "]");
  const at::Tensor x = input.stride(1) == 1 ? input : input.contiguous();
  const at::Tensor b = bias.has_value() ? bias->contiguous() : at::Tensor();
  const at::Tensor added = residual.has_value() ? residual->contiguous() : at::Tensor();
  at::Tensor y = at::empty({x.size(0), out_features}, x.options());
  if (x.scalar_type() == at::kBFloat16)
    products<c10::BFloat16>(x, weight, scales, totals, b, added, what, y);
  else
    products<float>(x, weight, scales, totals, b, added, what, y);
  return y;
}

TORCH_LIBRARY_IMPL(lmvae_fast, CPU, m) { m.impl("packed_linear_int8", &packed_linear_int8); }

}  // namespace lmvae

// packed_linear on CPU: memory and threads (kernels/packed_linear/op.py checks the arguments).
#include "packed_linear.h"

#include <algorithm>
#include <cstring>

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

namespace lmvae {
namespace {

using OptionalTensor = std::optional<at::Tensor>;

at::Tensor dense(const OptionalTensor& x) { return x.has_value() ? x->contiguous() : at::Tensor(); }
const float* data(const at::Tensor& x) { return x.defined() ? x.const_data_ptr<float>() : nullptr; }

at::Tensor packed_linear(const at::Tensor& input, const at::Tensor& weight, const OptionalTensor& bias, const OptionalTensor& residual,
                         int64_t activation, int64_t out_features) {
  PackedLinearArgs a{};
  a.activation = static_cast<Activation>(activation);
  const int64_t width = a.activation == Activation::SwiGlu ? kLinearPanel / 2 : kLinearPanel;
  TORCH_CHECK(weight.dim() == 3 && weight.size(2) == kLinearPanel && weight.is_contiguous() && weight.size(1) == input.size(1) &&
                  weight.size(0) == (out_features + width - 1) / width,
              "packed_linear: the weight is not pack_weight's for ", out_features, " x ", input.size(1));
  TORCH_CHECK(!residual.has_value() || residual->sizes().equals({input.size(0), out_features}),
              "packed_linear: the residual is not [", input.size(0), ", ", out_features, "]");
  const at::Tensor x = input.stride(1) == 1 ? input : input.contiguous(), b = dense(bias), added = dense(residual);
  at::Tensor y = at::empty({x.size(0), out_features}, x.options());
  a.in = x.size(1), a.out = out_features;
  a.weight = data(weight), a.bias = data(b);
  const int64_t count = (a.in + kLinearDepth - 1) / kLinearDepth;
  const at::Tensor pieces = at::empty({std::min(x.size(0), kLinearRows) * count * kLinearDepth}, x.options());
  float* piece = pieces.mutable_data_ptr<float>();
  for (int64_t from = 0; from < x.size(0); from += kLinearRows) {
    a.rows = std::min(kLinearRows, x.size(0) - from);
    const float* rows = x.const_data_ptr<float>() + from * x.stride(0);
    // Rows of a power of two would all fall into the same sets of the first-level cache.
    at::parallel_for(0, count, std::max<int64_t>(1, 32'000 / (a.rows * kLinearDepth)), [&](int64_t begin, int64_t end) {
      for (int64_t k = begin * kLinearDepth; k < std::min(a.in, end * kLinearDepth); k += kLinearDepth) {
        const int64_t depth = std::min(kLinearDepth, a.in - k);
        for (int64_t r = 0; r < a.rows; r++)
          std::memcpy(piece + k * a.rows + r * kLinearDepth, rows + r * x.stride(0) + k, depth * sizeof(float));
      }
    });
    a.x = piece, a.y = y.mutable_data_ptr<float>() + from * a.out;
    a.residual = added.defined() ? data(added) + from * a.out : nullptr;
    at::parallel_for(0, weight.size(0), std::max<int64_t>(1, 200'000 / (a.rows * a.in * kLinearPanel + 1)),
                     [&](int64_t begin, int64_t end) { LMVAE_PICK(packed_linear_panels(a, begin, end)); });
  }
  return y;
}

}  // namespace

TORCH_LIBRARY_IMPL(lmvae_fast, CPU, m) { m.impl("packed_linear", &packed_linear); }

}  // namespace lmvae

// frozen_layer on CPU: memory and threads (kernels/frozen_layer/op.py checks the arguments).
#include "frozen_layer.h"

#include <algorithm>

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "row_ops.h"

namespace lmvae {
namespace {

using OptionalTensor = std::optional<at::Tensor>;

constexpr int64_t kGrain = 8192;  // numbers worth a thread

int64_t grain(int64_t width) { return std::max<int64_t>(1, kGrain / std::max<int64_t>(1, width)); }
at::Tensor rows_of(const at::Tensor& x) { return x.stride(1) == 1 ? x : x.contiguous(); }

at::Tensor in_float(const at::Tensor& vector) { return vector.to(at::kFloat).contiguous(); }

template <typename F>
void for_type(const at::Tensor& x, const char* name, const F& body) {
  if (x.scalar_type() == at::kBFloat16)
    body(c10::BFloat16());
  else if (x.scalar_type() == at::kFloat)
    body(float());
  else
    TORCH_CHECK_TYPE(false, name, ": ", x.scalar_type(), " is not one of float32, bfloat16");
}

at::Tensor activation(const at::Tensor& x_in, const OptionalTensor& grad_in, int64_t kind) {
  const at::Tensor x = rows_of(x_in), grad = grad_in.has_value() ? rows_of(*grad_in) : at::Tensor();
  const auto what = static_cast<RowActivation>(kind);
  const int64_t width = what == RowActivation::GeluTanh ? x.size(1) : x.size(1) / 2;
  at::Tensor out = at::empty({x.size(0), grad.defined() ? x.size(1) : width}, x.options());
  for_type(x, "frozen_activation", [&](auto zero) {
    using T = decltype(zero);
    ActivationArgs<T> a{};
    a.width = width;
    a.kind = what;
    a.x = x.const_data_ptr<T>();
    a.x_row = x.stride(0);
    a.out = out.mutable_data_ptr<T>();
    if (grad.defined()) {
      a.grad = grad.const_data_ptr<T>();
      a.grad_row = grad.stride(0);
    }
    const auto rows = grad.defined() ? LMVAE_PICK(activation_rows_bwd<T>) : LMVAE_PICK(activation_rows<T>);
    at::parallel_for(0, x.size(0), grain(width), [&](int64_t begin, int64_t end) { rows(a, begin, end); });
  });
  return out;
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> frozen_norm(const at::Tensor& x_in, const at::Tensor& weight_in,
                                               const OptionalTensor& bias_in, double eps, bool centred) {
  const at::Tensor x = rows_of(x_in), weight = in_float(weight_in);
  const at::Tensor bias = bias_in.has_value() ? in_float(*bias_in) : at::Tensor();
  at::Tensor y = at::empty(x.sizes(), x.options());
  at::Tensor stats = at::empty({x.size(0), 2}, x.options().dtype(at::kFloat));
  for_type(x, "frozen_norm", [&](auto zero) {
    using T = decltype(zero);
    NormArgs<T> a{};
    a.width = x.size(1);
    a.eps = eps;
    a.centred = centred;
    a.x = x.const_data_ptr<T>();
    a.x_row = x.stride(0);
    a.weight = weight.const_data_ptr<float>();
    a.bias = bias.defined() ? bias.const_data_ptr<float>() : nullptr;
    a.stats = stats.mutable_data_ptr<float>();
    a.out = y.mutable_data_ptr<T>();
    const auto rows = LMVAE_PICK(norm_rows<T>);
    at::parallel_for(0, x.size(0), grain(a.width), [&](int64_t begin, int64_t end) { rows(a, begin, end); });
  });
  return {y, stats};
}

at::Tensor frozen_norm_bwd(const at::Tensor& grad_in, const at::Tensor& x_in, const at::Tensor& stats_in,
                           const at::Tensor& weight_in, const OptionalTensor& added_in, bool centred) {
  const at::Tensor grad = rows_of(grad_in), x = rows_of(x_in), stats = stats_in.contiguous();
  const at::Tensor weight = in_float(weight_in), added = added_in.has_value() ? rows_of(*added_in) : at::Tensor();
  at::Tensor out = at::empty(x.sizes(), x.options());
  for_type(x, "frozen_norm_bwd", [&](auto zero) {
    using T = decltype(zero);
    NormArgs<T> a{};
    a.width = x.size(1);
    a.centred = centred;
    a.x = x.const_data_ptr<T>();
    a.x_row = x.stride(0);
    a.weight = weight.const_data_ptr<float>();
    a.stats = const_cast<float*>(stats.const_data_ptr<float>());
    a.grad = grad.const_data_ptr<T>();
    a.grad_row = grad.stride(0);
    if (added.defined()) {
      a.added = added.const_data_ptr<T>();
      a.added_row = added.stride(0);
    }
    a.out = out.mutable_data_ptr<T>();
    const auto rows = LMVAE_PICK(norm_rows_bwd<T>);
    at::parallel_for(0, x.size(0), grain(a.width), [&](int64_t begin, int64_t end) { rows(a, begin, end); });
  });
  return out;
}

at::Tensor frozen_activation(const at::Tensor& x, int64_t kind) { return activation(x, std::nullopt, kind); }

at::Tensor frozen_activation_bwd(const at::Tensor& grad, const at::Tensor& x, int64_t kind) {
  return activation(x, grad, kind);
}

void frozen_rotary(at::Tensor& x, const at::Tensor& cos_in, const at::Tensor& sin_in, int64_t heads, bool back) {
  const at::Tensor cos = rows_of(cos_in), sin = rows_of(sin_in);
  TORCH_CHECK(x.stride(1) == 1 && cos.size(0) == x.size(0) && sin.sizes() == cos.sizes() && cos.size(1) % 2 == 0 &&
                  heads * cos.size(1) <= x.size(1),
              "frozen_rotary: ", heads, " heads of ", cos.size(1), " do not fit rows of ", x.size(1));
  for_type(x, "frozen_rotary", [&](auto zero) {
    using T = decltype(zero);
    const RotaryArgs<T> a{heads,
                          cos.size(1),
                          back,
                          x.mutable_data_ptr<T>(),
                          x.stride(0),
                          cos.const_data_ptr<T>(),
                          sin.const_data_ptr<T>(),
                          cos.stride(0),
                          sin.stride(0)};
    const auto rows = LMVAE_PICK(rotary_rows<T>);
    at::parallel_for(0, x.size(0), grain(heads * a.dim), [&](int64_t begin, int64_t end) { rows(a, begin, end); });
  });
}

TORCH_LIBRARY_IMPL(lmvae_fast, CPU, m) {
  m.impl("frozen_norm", &frozen_norm);
  m.impl("frozen_norm_bwd", &frozen_norm_bwd);
  m.impl("frozen_activation", &frozen_activation);
  m.impl("frozen_activation_bwd", &frozen_activation_bwd);
  m.impl("frozen_rotary", &frozen_rotary);
}

}  // namespace lmvae

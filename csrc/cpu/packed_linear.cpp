// packed_linear on CPU: memory and threads (kernels/packed_linear/op.py checks the arguments).
#include "packed_linear.h"

#include "amx.h"

#include <algorithm>
#include <atomic>
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

constexpr int64_t kAmxRows = 25;     // fewer wait for the weight on the vector units already
constexpr int64_t kGrain = 200'000;  // multiplications worth a thread

int64_t panels_a_thread(const PackedLinearArgs& a) {
  return std::max<int64_t>(1, kGrain / (a.rows * a.in * kLinearPanel + 1));
}

void on_vectors(PackedLinearArgs& a, const float* rows, int64_t stride, int64_t panels) {
  const int64_t count = (a.in + kLinearDepth - 1) / kLinearDepth;
  const at::Tensor room = at::empty({a.rows * count * kLinearDepth}, at::kFloat);
  float* pieces = room.mutable_data_ptr<float>();
  // Rows of a power of two would all fall into the same sets of the first-level cache.
  at::parallel_for(0, count, std::max<int64_t>(1, 32'000 / (a.rows * kLinearDepth)), [&](int64_t begin, int64_t end) {
    for (int64_t k = begin * kLinearDepth; k < std::min(a.in, end * kLinearDepth); k += kLinearDepth) {
      const int64_t depth = std::min(kLinearDepth, a.in - k);
      for (int64_t r = 0; r < a.rows; r++)
        std::memcpy(pieces + k * a.rows + r * kLinearDepth, rows + r * stride + k, depth * sizeof(float));
    }
  });
  a.x = pieces;
  at::parallel_for(0, panels, panels_a_thread(a),
                   [&](int64_t begin, int64_t end) { LMVAE_PICK(packed_linear_panels(a, begin, end)); });
}

// False where a sum is NaN: an infinite number cannot be taken apart, and has to be multiplied whole.
bool on_tiles(const PackedLinearArgs& a, const float* rows, int64_t stride, int64_t panels) {
  const at::Tensor room = at::empty({packed_linear_amx_workspace(a.rows, a.in)}, at::kByte);
  char* parts = static_cast<char*>(room.mutable_data_ptr());
  at::parallel_for(0, a.in / 32, std::max<int64_t>(1, 32'000 / (a.rows * 32)), [&](int64_t begin, int64_t end) {
    packed_linear_amx_rows(rows, stride, a.rows, a.in, parts, begin, end);
  });
  std::atomic<bool> whole{true};
  at::parallel_for(0, panels, panels_a_thread(a), [&](int64_t begin, int64_t end) {
    packed_linear_amx_panels(a, parts, begin, end, [&](int64_t panel, float* sums) {
      if (!LMVAE_PICK(packed_linear_finish(a, sums, panel))) whole = false;
    });
  });
  return whole;
}

at::Tensor packed_linear(const at::Tensor& input, const at::Tensor& weight, const OptionalTensor& bias,
                         const OptionalTensor& residual, int64_t activation, int64_t out_features) {
  PackedLinearArgs a{};
  a.activation = static_cast<Activation>(activation);
  const int64_t width = a.activation == Activation::SwiGlu ? kLinearPanel / 2 : kLinearPanel;
  TORCH_CHECK(weight.dim() == 3 && weight.size(2) == kLinearPanel && weight.is_contiguous() &&
                  weight.size(1) == input.size(1) && weight.size(0) == (out_features + width - 1) / width,
              "packed_linear: the weight is not pack_weight's for ", out_features, " x ", input.size(1));
  TORCH_CHECK(!residual.has_value() || residual->sizes().equals({input.size(0), out_features}),
              "packed_linear: the residual is not [", input.size(0), ", ", out_features, "]");
  const at::Tensor x = input.stride(1) == 1 ? input : input.contiguous(), b = dense(bias), added = dense(residual);
  at::Tensor y = at::empty({x.size(0), out_features}, x.options());
  a.in = x.size(1);
  a.out = out_features;
  a.weight = data(weight);
  a.bias = data(b);
  for (int64_t from = 0; from < x.size(0); from += kLinearRows) {
    a.rows = std::min(kLinearRows, x.size(0) - from);
    const float* rows = data(x) + from * x.stride(0);
    a.y = y.mutable_data_ptr<float>() + from * a.out;
    a.residual = added.defined() ? data(added) + from * a.out : nullptr;
    if (a.rows < kAmxRows || a.in % 32 != 0 || !have_amx() || !on_tiles(a, rows, x.stride(0), weight.size(0)))
      on_vectors(a, rows, x.stride(0), weight.size(0));
  }
  return y;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(lmvae_fast, m) { m.def("packed_linear_has_tiles() -> bool", &have_amx); }
TORCH_LIBRARY_IMPL(lmvae_fast, CPU, m) { m.impl("packed_linear", &packed_linear); }

}  // namespace lmvae

// packed_linear on CPU: memory and threads (kernels/packed_linear/op.py checks the arguments).
#include "packed_linear.h"

#include "amx.h"
#include "cpu_features.h"
#include "row_ops.h"

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
template <typename T>
const T* data(const at::Tensor& x) {
  return x.defined() ? x.const_data_ptr<T>() : nullptr;
}

constexpr int64_t kAmxRows = 25;     // fewer wait for the weight on the vector units already
constexpr int64_t kHalfAmxRows = 9;  // a product of tiles computes 32 rows, or 8 by the dot products, in as long
constexpr int64_t kGrain = 200'000;  // multiplications worth a thread
constexpr int64_t kCopied = 32'000;  // numbers

int64_t panels_a_thread(int64_t rows, int64_t in) {
  return std::max<int64_t>(1, kGrain / (rows * in * kLinearPanel + 1));
}

template <typename T>
LinearEnd<T> end_of(int64_t rows, int64_t out, Activation activation, const at::Tensor& bias,
                    const at::Tensor& residual, at::Tensor& y, int64_t at) {
  return {rows,
          out,
          activation,
          data<T>(bias),
          residual.defined() ? data<T>(residual) + at : nullptr,
          y.mutable_data_ptr<T>() + at};
}

void on_vectors(PackedLinearArgs& a, const float* rows, int64_t stride, int64_t panels) {
  const int64_t count = (a.in + kLinearDepth - 1) / kLinearDepth;
  const at::Tensor room = at::empty({a.rows * count * kLinearDepth}, at::kFloat);
  float* pieces = room.mutable_data_ptr<float>();
  // Rows of a power of two would all fall into the same sets of the first-level cache.
  at::parallel_for(0, count, std::max<int64_t>(1, kCopied / (a.rows * kLinearDepth)), [&](int64_t begin, int64_t end) {
    for (int64_t k = begin * kLinearDepth; k < std::min(a.in, end * kLinearDepth); k += kLinearDepth) {
      const int64_t depth = std::min(kLinearDepth, a.in - k);
      for (int64_t r = 0; r < a.rows; r++)
        std::memcpy(pieces + k * a.rows + r * kLinearDepth, rows + r * stride + k, depth * sizeof(float));
    }
  });
  a.x = pieces;
  at::parallel_for(0, panels, panels_a_thread(a.rows, a.in),
                   [&](int64_t begin, int64_t end) { LMVAE_PICK(packed_linear_panels(a, begin, end)); });
}

// False where a sum is NaN: an infinite number cannot be taken apart, and has to be multiplied whole.
bool on_tiles(const PackedLinearArgs& a, const float* rows, int64_t stride, int64_t panels) {
  const at::Tensor room = at::empty({packed_linear_amx_workspace(a.rows, a.in)}, at::kByte);
  char* parts = static_cast<char*>(room.mutable_data_ptr());
  at::parallel_for(0, a.in / 32, std::max<int64_t>(1, kCopied / (a.rows * 32)), [&](int64_t begin, int64_t end) {
    packed_linear_amx_rows(rows, stride, a.rows, a.in, parts, begin, end);
  });
  std::atomic<bool> whole{true};
  at::parallel_for(0, panels, panels_a_thread(a.rows, a.in), [&](int64_t begin, int64_t end) {
    packed_linear_amx_panels(a, parts, begin, end, [&](int64_t panel, float* sums) {
      if (!LMVAE_PICK(packed_linear_finish<float>(a, sums, panel))) whole = false;
    });
  });
  return whole;
}

void in_fp32(PackedLinearArgs& a, const float* rows, int64_t stride, int64_t panels) {
  if (a.rows < kAmxRows || a.in % 32 != 0 || !have_amx() || !on_tiles(a, rows, stride, panels))
    on_vectors(a, rows, stride, panels);
}

// Rows of bf16 in pieces of kHalfDepth, zeros beyond them: as they are, or in fp32.
template <typename T>
at::Tensor pieces_of(const HalfLinearArgs& a, const c10::BFloat16* rows, int64_t stride, int64_t in) {
  const int64_t count = (in + kHalfDepth - 1) / kHalfDepth;
  at::Tensor room = at::empty({count, a.rows, kHalfDepth}, at::CppTypeToScalarType<T>::value);
  T* pieces = room.mutable_data_ptr<T>();
  at::parallel_for(0, count, std::max<int64_t>(1, kCopied / (a.rows * kHalfDepth)), [&](int64_t begin, int64_t end) {
    for (int64_t piece = begin; piece < end; piece++)
      for (int64_t r = 0; r < a.rows; r++) {
        T* to = pieces + (piece * a.rows + r) * kHalfDepth;
        const int64_t depth = std::min(kHalfDepth, in - piece * kHalfDepth);
        const c10::BFloat16* from = rows + r * stride + piece * kHalfDepth;
        if constexpr (std::is_same_v<T, float>)
          LMVAE_PICK(half_linear_widen(from, depth, to));
        else
          std::memcpy(to, from, depth * sizeof(T));
        std::fill(to + depth, to + (depth + kHalfStep - 1) / kHalfStep * kHalfStep, T(0));
      }
  });
  return room;
}

// The same as AMX tiles, zeros beyond rows and inputs.
at::Tensor tiles_of(const HalfLinearArgs& a, const c10::BFloat16* rows, int64_t stride, int64_t in) {
  constexpr int64_t kBlock = 32;
  const int64_t blocks = (a.rows + kBlock - 1) / kBlock;
  at::Tensor room = at::empty({blocks, a.steps, kBlock, kHalfStep}, at::kBFloat16);
  c10::BFloat16* tiles = room.mutable_data_ptr<c10::BFloat16>();
  at::parallel_for(0, blocks * kBlock, std::max<int64_t>(1, kCopied / in), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; r++)
      for (int64_t s = 0; s < a.steps; s++) {
        c10::BFloat16* to = tiles + ((r / kBlock * a.steps + s) * kBlock + r % kBlock) * kHalfStep;
        const int64_t depth = r < a.rows ? std::min(kHalfStep, in - s * kHalfStep) : 0;
        if (depth > 0) std::memcpy(to, rows + r * stride + s * kHalfStep, depth * sizeof(c10::BFloat16));
        std::fill(to + depth, to + kHalfStep, c10::BFloat16(0));
      }
  });
  return room;
}

void in_bf16(HalfLinearArgs& a, const c10::BFloat16* rows, int64_t stride, int64_t in, int64_t panels) {
  const bool on_tiles = a.rows >= kHalfAmxRows && have_amx(), dots = !on_tiles && have_bf16_dots();
  const at::Tensor x = on_tiles ? tiles_of(a, rows, stride, in)
                       : dots   ? pieces_of<c10::BFloat16>(a, rows, stride, in)
                                : pieces_of<float>(a, rows, stride, in);
  a.x = x.const_data_ptr();
  const auto done = [&](int64_t panel, float* sums) {
    LMVAE_PICK(packed_linear_finish<c10::BFloat16>(a, sums, panel));
  };
  at::parallel_for(0, panels, panels_a_thread(a.rows, in), [&](int64_t begin, int64_t end) {
    if (on_tiles)
      half_linear_amx_panels(a, static_cast<const char*>(a.x), begin, end, done);
    else if (dots)
      half_linear_dot_panels(a, begin, end, done);
    else
      LMVAE_PICK(half_linear_panels(a, begin, end));
  });
}

}  // namespace

at::Tensor packed_linear(const at::Tensor& input, const at::Tensor& weight, const OptionalTensor& bias,
                         const OptionalTensor& residual, int64_t activation, int64_t out_features) {
  const auto what = static_cast<Activation>(activation);
  const int64_t width = what == Activation::SwiGlu ? kLinearPanel / 2 : kLinearPanel, in = input.size(1);
  const bool half = weight.scalar_type() == at::kBFloat16;
  const int64_t steps = (in + kHalfStep - 1) / kHalfStep, panels = (out_features + width - 1) / width;
  TORCH_CHECK(
      weight.is_contiguous() && weight.size(0) == panels && input.scalar_type() == weight.scalar_type() &&
          (half ? weight.dim() == 6 && weight.size(1) == steps && weight.numel() == panels * steps * kStepNumbers
                : weight.dim() == 3 && weight.size(2) == kLinearPanel && weight.size(1) == in),
      "packed_linear: the weight is not pack_weight's for ", out_features, " x ", in);
  TORCH_CHECK(!residual.has_value() || residual->sizes().equals({input.size(0), out_features}),
              "packed_linear: the residual is not [", input.size(0), ", ", out_features, "]");
  const at::Tensor x = input.stride(1) == 1 ? input : input.contiguous(), b = dense(bias), added = dense(residual);
  at::Tensor y = at::empty({x.size(0), out_features}, x.options());
  for (int64_t from = 0; from < x.size(0); from += kLinearRows) {
    const int64_t rows = std::min(kLinearRows, x.size(0) - from), stride = x.stride(0), to = from * out_features;
    if (half) {
      HalfLinearArgs a{end_of<c10::BFloat16>(rows, out_features, what, b, added, y, to), steps, nullptr,
                       reinterpret_cast<const uint16_t*>(data<c10::BFloat16>(weight))};
      in_bf16(a, data<c10::BFloat16>(x) + from * stride, stride, in, panels);
    } else {
      PackedLinearArgs a{end_of<float>(rows, out_features, what, b, added, y, to), in, nullptr, data<float>(weight)};
      in_fp32(a, data<float>(x) + from * stride, stride, panels);
    }
  }
  return y;
}

TORCH_LIBRARY_IMPL(lmvae_fast, CPU, m) { m.impl("packed_linear", &packed_linear); }

}  // namespace lmvae

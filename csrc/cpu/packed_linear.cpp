// packed_linear on CPU: memory and threads (kernels/packed_linear/op.py checks the arguments).
#include "packed_linear.h"

#include "amx.h"
#include "cpu_features.h"
#include "panel_threads.h"
#include "room.h"
#include "row_ops.h"

#include <algorithm>
#include <atomic>
#include <cstring>

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
constexpr int64_t kHalfAmxRows = 5;  // a product of tiles computes 16 rows, or 4 by the dot products, in as long
constexpr int64_t kHalfBlockBytes = 32 * kHalfStep * 2;  // of 32 rows in a step
constexpr int64_t kAmxPass = 256, kHalfAmxPass = 512;    // rows
constexpr int64_t kCopied = 32'000;                      // numbers

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
  panels_in_turn(a.rows, a.in, panels, [&](int64_t begin, int64_t end, int64_t following) {
    LMVAE_PICK(packed_linear_panels(a, begin, end, following));
  });
}

// False where a sum is NaN: an infinite number cannot be taken apart, and has to be multiplied whole.
bool on_tiles(const PackedLinearArgs& a, const float* rows, int64_t stride, int64_t panels) {
  const Room<char> room(packed_linear_amx_workspace(a.rows, a.in));
  char* parts = room.data();
  at::parallel_for(0, a.in / 32, std::max<int64_t>(1, kCopied / (a.rows * 32)), [&](int64_t begin, int64_t end) {
    packed_linear_amx_rows(rows, stride, a.rows, a.in, parts, begin, end);
  });
  std::atomic<bool> whole{true};
  const AmxPlan plan = amx_plan(a.rows, a.in / 32, panels, at::get_num_threads(), 3 * kHalfBlockBytes);
  on_threads(a.rows, a.in, panels, plan.group, [&](PanelQueue& queue) {
    packed_linear_amx_panels(a, parts, plan, queue, [&](int64_t panel, float* sums) {
      if (!LMVAE_PICK(packed_linear_finish<float>(a, sums, panel))) whole = false;
    });
  });
  return whole;
}

bool tiles_in_fp32(int64_t rows, int64_t in) { return rows >= kAmxRows && in % 32 == 0 && have_amx(); }
bool tiles_in_bf16(int64_t rows) { return rows >= kHalfAmxRows && have_amx(); }

void in_fp32(PackedLinearArgs a, const float* rows, int64_t stride, int64_t panels) {
  if (tiles_in_fp32(a.rows, a.in) && on_tiles(a, rows, stride, panels)) return;
  for (int64_t left = a.rows; left > 0; left -= a.rows) {
    a.rows = std::min(kLinearRows, left);
    on_vectors(a, rows, stride, panels);
    rows += a.rows * stride;
    a.y += a.rows * a.out;
    if (a.residual != nullptr) a.residual += a.rows * a.out;
  }
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

void in_bf16_on_tiles(const HalfLinearArgs& a, const c10::BFloat16* rows, int64_t stride, int64_t in, int64_t panels,
                      const PanelSums& done) {
  const int64_t filled = (a.rows + 31) / 32 * 32;
  const Room<char> room(filled * a.steps * kHalfStep * static_cast<int64_t>(sizeof(c10::BFloat16)));
  at::parallel_for(0, filled, std::max<int64_t>(1, kCopied / in), [&](int64_t begin, int64_t end) {
    half_linear_amx_rows(rows, stride, a.rows, in, room.data(), begin, end);
  });
  const AmxPlan plan = amx_plan(a.rows, a.steps, panels, at::get_num_threads(), kHalfBlockBytes);
  on_threads(a.rows, in, panels, plan.group,
             [&](PanelQueue& queue) { half_linear_amx_panels(a, room.data(), plan, queue, done); });
}

void in_bf16(HalfLinearArgs& a, const c10::BFloat16* rows, int64_t stride, int64_t in, int64_t panels) {
  const auto done = [&](int64_t panel, float* sums) {
    LMVAE_PICK(packed_linear_finish<c10::BFloat16>(a, sums, panel));
  };
  if (tiles_in_bf16(a.rows)) return in_bf16_on_tiles(a, rows, stride, in, panels, done);
  const bool dots = have_bf16_dots();
  const at::Tensor x = dots ? pieces_of<c10::BFloat16>(a, rows, stride, in) : pieces_of<float>(a, rows, stride, in);
  a.x = x.const_data_ptr();
  panels_in_turn(a.rows, in, panels, [&](int64_t begin, int64_t end, int64_t following) {
    if (dots)
      half_linear_dot_panels(a, begin, end, following, done);
    else
      LMVAE_PICK(half_linear_panels(a, begin, end, following));
  });
}

// Rows of one pass over the weight: on the tiles more, since there a pass soon waits for the weight.
int64_t rows_of_a_pass(int64_t rows, int64_t in, bool half) {
  const bool tiles = half ? tiles_in_bf16(rows) : tiles_in_fp32(rows, in);
  return tiles ? rows_of_a_tile_pass(rows, half ? kHalfAmxPass : kAmxPass) : kLinearRows;
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
  const int64_t pass = rows_of_a_pass(x.size(0), in, half);
  for (int64_t from = 0; from < x.size(0); from += pass) {
    const int64_t rows = std::min(pass, x.size(0) - from), stride = x.stride(0), to = from * out_features;
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

// packed_linear with int8 weights on CPU: memory and threads (kernels/packed_linear/int8.py checks the arguments).
#include "packed_linear_int8.h"

#include <algorithm>
#include <atomic>

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "amx.h"
#include "cpu_features.h"
#include "panel_threads.h"
#include "room.h"
#include "row_ops.h"

namespace lmvae {
namespace {

using OptionalTensor = std::optional<at::Tensor>;

constexpr int64_t kTileRows = 5;    // a product of tiles computes 16 rows in as long
constexpr int64_t kTilePass = 512;  // rows

// In fp32 on the vector units, kLinearRows rows at a time: their sums lie on the stack.
template <typename T>
void on_numbers(ByteLinearArgs<T> a, const T* rows, int64_t stride, int64_t in, int64_t panels) {
  const int64_t pieces = (in + kByteDepth - 1) / kByteDepth;
  for (int64_t left = a.rows; left > 0; left -= a.rows) {
    a.rows = std::min(kLinearRows, left);
    const int64_t apart = a.rows * kByteDepth;
    const Room<float> room(pieces * apart);
    for (int64_t r = 0; r < a.rows; r++)
      LMVAE_PICK(byte_linear_widen(rows + r * stride, in, apart, room.data() + r * kByteDepth));
    a.x = room.data();
    panels_in_turn(a.rows, in, panels, [&](int64_t begin, int64_t end, int64_t following) {
      LMVAE_PICK(byte_linear_panels<T>(a, begin, end, following));
    });
    rows += a.rows * stride;
    a.y += a.rows * a.out;
    if (a.residual != nullptr) a.residual += a.rows * a.out;
  }
}

bool on_tiles(int64_t rows) { return rows >= kTileRows && have_amx(); }

// False where a row cannot be rounded to whole numbers: it holds Inf or NaN, or nothing but the smallest numbers.
bool on_whole_numbers(ByteLinearArgs<c10::BFloat16>& a, const c10::BFloat16* rows, int64_t stride, int64_t in,
                      int64_t panels) {
  const bool tiles = on_tiles(a.rows);
  const int64_t pieces = (in + kByteDepth - 1) / kByteDepth;
  const int64_t filled = (a.rows + kByteBlockRows - 1) / kByteBlockRows * kByteBlockRows;
  const Room<uint8_t> room(2 * (tiles ? filled * a.steps * kByteStep : pieces * a.rows * kByteDepth));
  const Room<float> counts(a.rows);
  const auto places = [&](int64_t r) -> BytePlaces {
    if (!tiles) return {room.data() + 2 * r * kByteDepth, kByteDepth, 2 * a.rows * kByteDepth, kByteDepth};
    const int64_t block = 2 * kByteBlockRows * kByteStep;
    return {room.data() + r / kByteBlockRows * a.steps * block + r % kByteBlockRows * kByteStep, kByteStep, block,
            block / 2};
  };
  std::atomic<bool> whole{true};
  at::parallel_for(0, a.rows, std::max<int64_t>(1, 16'000 / in), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; r++)
      if (!LMVAE_PICK(byte_linear_round(rows + r * stride, in, places(r), counts.data() + r))) whole = false;
  });
  if (!whole) return false;
  a.x = room.data();
  a.row_scales = counts.data();
  const auto done = [&](int64_t panel, const int32_t* sums) { LMVAE_PICK(byte_linear_finish(a, sums, panel)); };
  if (tiles) {
    const AmxPlan plan =
        amx_plan(a.rows, a.steps, panels, at::get_num_threads(), 4 * kByteBlockRows * kByteStep, kByteSums);
    on_threads(a.rows, in, panels, plan.group,
               [&](PanelQueue& queue) { byte_linear_amx_panels(a, plan, queue, done); });
  } else {
    panels_in_turn(a.rows, in, panels, [&](int64_t begin, int64_t end, int64_t following) {
      byte_linear_dot_panels(a, begin, end, following, done);
    });
  }
  return true;
}

template <typename T>
void products(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& scales, const at::Tensor& totals,
              const at::Tensor& bias, const at::Tensor& residual, Activation activation, at::Tensor& y) {
  const int64_t in = x.size(1), out = y.size(1), panels = weight.size(0);
  const bool tiles = std::is_same_v<T, c10::BFloat16> && have_byte_dots() && on_tiles(x.size(0));
  const int64_t pass = tiles ? rows_of_a_tile_pass(x.size(0), kTilePass) : kLinearRows;
  for (int64_t from = 0; from < x.size(0); from += pass) {
    const int64_t rows = std::min(pass, x.size(0) - from);
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
    if constexpr (std::is_same_v<T, c10::BFloat16>)
      if (have_byte_dots() && on_whole_numbers(a, first, x.stride(0), in, panels)) continue;
    on_numbers(a, first, x.stride(0), in, panels);
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

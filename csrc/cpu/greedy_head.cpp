// greedy_head on CPU (kernels/greedy_head/op.py checks the arguments). Three passes over panels of 32 entries:
// 1. the largest logit of each panel by a bf16 product; 2. from what that can be wrong by, which panels may hold the
// argmax; 3. fp32 logits of those panels alone.
#include "greedy_head.h"

#include <cmath>
#include <limits>
#include <vector>

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/util/BFloat16.h>
#include <torch/library.h>

#include "amx.h"
#include "bf16_dots.h"
#include "cpu_features.h"
#include "packed_linear.h"
#include "panel_threads.h"
#include "room.h"

namespace lmvae {
namespace {

constexpr int64_t kGroup = 32;  // rows of one matrix-unit product
// Rows from which on dot products of bf16 are faster: a single one waits for the panels' bytes either way.
constexpr int64_t kDotRows = 2;

// What the approximate logits of a row can be wrong by: on panel p at most by_error * errors[p] + by_norm * norms[p],
// and what is lost where numbers below 2^-126 count as 0, as matrix units and dot products have it.
struct Bound {
  float by_error, by_norm, underflow;
  float at(float error, float norm) const { return by_error * error + by_norm * norm + underflow; }
};

// |x . w - x' . w'| <= |x| |w - w'| + |x - x'| |w'| with x', w' the bf16 roundings (x' = x where x is not rounded), and
// each of the two fp32 sums of `in` products adds at most in * 2^-24 |x| |w|.
Bound bound_of(const float* x, int64_t in, bool rounded) {
  double norm = 0, error = 0;
  for (int64_t k = 0; k < in; k++) {
    const double lost = rounded ? double(x[k]) - double(float(c10::BFloat16(x[k]))) : 0.0;
    norm += double(x[k]) * x[k];
    error += lost * lost;
  }
  norm = std::sqrt(norm);
  error = std::sqrt(error);
  const double sums = 2.0 * std::ldexp(double(in), -24) * (norm + error);
  // A product and a sum of each input; an input, or a weight, times a factor that is below 2^40 in any model.
  const float underflow = rounded ? std::ldexp(static_cast<float>(in), -84) : 0.0f;
  return {static_cast<float>(1.001 * norm), static_cast<float>(1.001 * (error + sums)), underflow};
}

#ifdef LMVAE_AMX
// x in bf16 as left operands of the tiles.
Room<char> left_tiles(const GreedyHeadArgs& a, const at::Tensor& x) {
  const at::Tensor half = x.to(at::kBFloat16);
  const int64_t filled = (a.rows + kGroup - 1) / kGroup * kGroup;
  Room<char> tiles(filled * a.steps * kHeadDepth * static_cast<int64_t>(sizeof(c10::BFloat16)));
  half_linear_amx_rows(half.const_data_ptr<c10::BFloat16>(), a.in, a.rows, a.in, tiles.data(), 0, filled);
  return tiles;
}

// Of every row the largest of a panel's sums.
TILES void largest_of(const float* sums, int64_t rows, float* largest) {
  for (int64_t r = 0; r < rows; r++, sums += kHeadPanel)
    largest[r] = _mm512_reduce_max_ps(_mm512_max_ps(_mm512_load_ps(sums), _mm512_load_ps(sums + 16)));
}

// Panels lie as packed_linear's in bf16 do, and go by in its order.
static_assert(kHeadPanel == kLinearPanel && kHeadDepth == kHalfStep);
void largest_on_tiles(const GreedyHeadArgs& a, const char* left, float* largest) {
  HalfLinearArgs head{};
  head.steps = a.steps;
  head.weight = a.halves;
  const AmxPlan plan = amx_plan(a.rows, a.steps, a.panels, at::get_num_threads(), kPair);
  on_threads(a.rows, a.in, a.panels, plan.group, [&](PanelQueue& queue) {
    half_linear_amx_panels(head, left, plan, queue, [&](int64_t panel, const float* sums) {
      largest_of(sums, a.rows, largest + panel * a.rows);
    });
  });
}

template <int R = 11>
LMVAE_DOTS32 void dots_of(int64_t rows, const char* a, const char* b, int64_t steps, float* c, bool add) {
  if (rows >= R) return dots<R>(a, b, steps, c, kHeadPanel, add);
  if constexpr (R > 1) dots_of<R - 1>(rows, a, b, steps, c, add);
}

// The same by AVX512-BF16, over the same operands; eight steps at a time, as dots32.
LMVAE_DOTS32 void largest_by_dots(const GreedyHeadArgs& a, const char* left, int64_t begin, int64_t end,
                                  float* largest) {
  alignas(64) float c[kGroup * kHeadPanel];
  for (int64_t p = begin; p < end; p++) {
    const char* panel = reinterpret_cast<const char*>(a.halves) + p * a.steps * kPair;
    for (int64_t r0 = 0; r0 < a.rows; r0 += kGroup) {
      const char* group = left + r0 / kGroup * a.steps * kPair;
      const int64_t rows = std::min(kGroup, a.rows - r0);
      for (int64_t s = 0; s < a.steps; s += 8)
        for (int64_t r = 0; r < rows; r += 11)
          dots_of(rows - r, group + s * kPair + r * 64, panel + s * kPair, std::min<int64_t>(8, a.steps - s),
                  c + r * kHeadPanel, s > 0);
      for (int64_t r = 0; r < rows; r++)
        largest[p * a.rows + r0 + r] = _mm512_reduce_max_ps(
            _mm512_max_ps(_mm512_load_ps(c + r * kHeadPanel), _mm512_load_ps(c + r * kHeadPanel + 16)));
    }
  }
}
#endif

at::Tensor greedy_head(const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& panels,
                       const at::Tensor& errors, const at::Tensor& norms) {
  GreedyHeadArgs a{};
  a.rows = hidden.size(0);
  a.in = hidden.size(1);
  a.vocabulary = weight.size(0);
  a.steps = (a.in + kHeadDepth - 1) / kHeadDepth;
  a.panels = (a.vocabulary + kHeadPanel - 1) / kHeadPanel;
  TORCH_CHECK(weight.is_contiguous() && panels.is_contiguous() && panels.size(0) == a.panels &&
                  panels.numel() == a.panels * a.steps * kHeadPanel * kHeadDepth && errors.numel() == a.panels &&
                  norms.numel() == a.panels,
              "greedy_head: the panels are not pack_head's for ", a.vocabulary, " x ", a.in);
  const at::Tensor x = hidden.contiguous();
  at::Tensor ids = at::empty({a.rows}, x.options().dtype(at::kLong));
  if (a.rows == 0) return ids;
  a.x = x.const_data_ptr<float>();
  a.weight = weight.const_data_ptr<float>();
  a.halves = reinterpret_cast<const uint16_t*>(panels.const_data_ptr<at::BFloat16>());
  const float *error = errors.const_data_ptr<float>(), *norm = norms.const_data_ptr<float>();

  const at::Tensor approximate = at::empty({a.panels, a.rows}, x.options());
  float* largest = approximate.mutable_data_ptr<float>();
  bool rounded = false;
#ifdef LMVAE_AMX
  const bool on_tiles = have_amx();
  rounded = on_tiles || (a.rows >= kDotRows && have_bf16_dots());
  if (rounded) {
    const Room<char> left = left_tiles(a, x);
    const char* tiles = left.data();
    if (on_tiles)
      largest_on_tiles(a, tiles, largest);
    else
      at::parallel_for(0, a.panels, 64,
                       [&](int64_t begin, int64_t end) { largest_by_dots(a, tiles, begin, end, largest); });
  }
#endif
  if (!rounded)
    at::parallel_for(0, a.panels, 16,
                     [&](int64_t begin, int64_t end) { LMVAE_PICK(head_largest(a, begin, end, largest)); });

  std::vector<Bound> bounds(a.rows);
  std::vector<float> least(a.rows, -std::numeric_limits<float>::infinity());  // no logit below this is the largest
  for (int64_t r = 0; r < a.rows; r++) bounds[r] = bound_of(a.x + r * a.in, a.in, rounded);
  for (int64_t p = 0; p < a.panels; p++)
    for (int64_t r = 0; r < a.rows; r++)
      least[r] = std::max(least[r], largest[p * a.rows + r] - bounds[r].at(error[p], norm[p]));
  // Without a finite bound every panel is computed: comparisons with NaN are false.
  for (int64_t r = 0; r < a.rows; r++)
    if (!std::isfinite(least[r]) || !std::isfinite(bounds[r].by_error))
      least[r] = std::numeric_limits<float>::quiet_NaN();

  // As many parts whatever the number of threads; their bests are joined by a rule that knows no order.
  const int64_t parts = std::min<int64_t>(a.panels, 64);
  std::vector<HeadBest> best(parts * a.rows,
                             HeadBest{-std::numeric_limits<float>::infinity(), std::numeric_limits<int64_t>::max()});
  at::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    std::vector<int32_t> rows(a.rows);
    for (int64_t part = begin; part < end; part++)
      for (int64_t p = part * a.panels / parts; p < (part + 1) * a.panels / parts; p++) {
        int64_t count = 0;
        for (int64_t r = 0; r < a.rows; r++)
          if (!(largest[p * a.rows + r] + bounds[r].at(error[p], norm[p]) < least[r]))
            rows[count++] = static_cast<int32_t>(r);
        if (count > 0) LMVAE_PICK(head_exact(a, p, rows.data(), count, best.data() + part * a.rows));
      }
  });
  int64_t* out = ids.mutable_data_ptr<int64_t>();
  for (int64_t r = 0; r < a.rows; r++) {
    HeadBest found = best[r];
    for (int64_t part = 1; part < parts; part++)
      if (const HeadBest& other = best[part * a.rows + r]; better(other.value, other.id, found)) found = other;
    out[r] = found.id;
  }
  return ids;
}

}  // namespace

TORCH_LIBRARY_IMPL(lmvae_fast, CPU, m) { m.impl("greedy_head", &greedy_head); }

}  // namespace lmvae

// A few rows times a large weight. The weight is read once, a piece of a panel at a time; all rows are multiplied with
// the piece while it is in the first-level cache, and meanwhile the next piece is fetched, evenly over all tiles and
// from all of its 4 KB pages in turn: prefetchers follow streams within a page, and several streams have more lines on
// their way than one after another.
#include "packed_linear.h"

#include <algorithm>

#include "simd_math.h"

namespace lmvae::LMVAE_ISA {
namespace {

constexpr int kTileRows = by_registers(12, 6);  // times two vectors of sums
constexpr int kLanesF = Lanes<float>::count, kTileColumns = 2 * kLanesF;
using V = Vec<float>;

// Fetches the piece at `at` while another is multiplied: in every 4 terms of a sum its share of the lines, one of every
// page.
struct Fetch {
  static constexpr int kPage = 4096, kPages = kLinearDepth * kLinearPanel * 4 / kPage;
  static constexpr int kRounds = kPage / 64 / (kLinearDepth / 4);
  const char* at;
  int passes;  // over the piece that is multiplied: it goes by once a tile
  int due = 0;
  __attribute__((always_inline)) void operator()() {
    for (due += kRounds; due >= passes; due -= passes, at += 64)
#pragma GCC unroll 4
      for (int page = 0; page < kPages; page++) __builtin_prefetch(at + page * kPage, 0, 2);
  }
};

// sums[r][0 .. kTileColumns) (+)= sum_k x[r][k] w[k][...] for r < R, while the next piece is fetched.
// Few rows have registers left: their sums are split in C, which hides the latency of an addition and rounds less.
template <int R>
void tile(const float* x, const float* w, int64_t depth, bool add, float* sums, Fetch& next) {
  constexpr int C = R <= 2 ? 4 : R <= 5 ? 2 : 1;
  V acc[C][R][2] = {};
  Fetch fetch = next;
  const auto step = [&](int64_t k, V(&sum)[R][2]) __attribute__((always_inline)) {
    const V left = load(w + k * kLinearPanel), right = load(w + k * kLinearPanel + kLanesF);
#pragma GCC unroll 12
    for (int r = 0; r < R; r++) {
      const V value = splat(x[r * kLinearDepth + k]);
      sum[r][0] += value * left;
      sum[r][1] += value * right;
    }
  };
  int64_t k = 0;
  for (; k + 4 <= depth; k += 4) {
    fetch();
#pragma GCC unroll 4
    for (int c = 0; c < 4; c++) step(k + c, acc[c % C]);
  }
  for (; k < depth; k++) step(k, acc[0]);
  next = fetch;
#pragma GCC unroll 12
  for (int r = 0; r < R; r++)
#pragma GCC unroll 2
    for (int v = 0; v < 2; v++) {
      V sum = acc[0][r][v];
      if constexpr (C == 2) sum += acc[1][r][v];
      if constexpr (C == 4) sum = (sum + acc[1][r][v]) + (acc[2][r][v] + acc[3][r][v]);
      float* at = sums + r * kLinearPanel + v * kLanesF;
      store(at, add ? load(at) + sum : sum);
    }
}

template <int R = kTileRows>
void tile_of(int64_t rows, const float* x, const float* w, int64_t depth, bool add, float* sums, Fetch& next) {
  if (rows == R) return tile<R>(x, w, depth, add, sums, next);
  if constexpr (R > 1) tile_of<R - 1>(rows, x, w, depth, add, sums, next);
}

LMVAE_INLINE float sigmoid(float x) { return 1.0f / (1.0f + exp_(-x)); }

// One row of a panel on its way to y.
void finish(const PackedLinearArgs& a, float* sums, int64_t row, int64_t panel) {
  constexpr int64_t kHalf = kLinearPanel / 2;
  const bool gated = a.activation == Activation::SwiGlu;
  const int64_t most = gated ? kHalf : kLinearPanel, first = panel * most, width = std::min(most, a.out - first);
  const float* bias = a.bias == nullptr ? nullptr : a.bias + first;
  if (bias != nullptr)
#pragma omp simd
    for (int64_t c = 0; c < width; c++) sums[c] += bias[c];
  if (gated)
#pragma omp simd
    for (int64_t c = 0; c < kHalf; c++) sums[c] *= sigmoid(sums[c]) * sums[kHalf + c];
  if (a.activation == Activation::GeluTanh)  // 0.5 x (1 + tanh(u)) is x sigmoid(2 u)
#pragma omp simd
    for (int64_t c = 0; c < width; c++)
      sums[c] *= sigmoid(1.5957691216057308f * (sums[c] + 0.044715f * sums[c] * sums[c] * sums[c]));
  const float* residual = a.residual == nullptr ? nullptr : a.residual + row * a.out + first;
  float* y = a.y + row * a.out + first;
#pragma omp simd
  for (int64_t c = 0; c < width; c++) y[c] = residual == nullptr ? sums[c] : sums[c] + residual[c];
}

}  // namespace

bool packed_linear_finish(const PackedLinearArgs& a, float* sums, int64_t panel) {
  int nan = 0;
#pragma omp simd reduction(| : nan)
  for (int64_t i = 0; i < a.rows * kLinearPanel; i++) nan |= sums[i] != sums[i];
  for (int64_t r = 0; r < a.rows; r++) finish(a, sums + r * kLinearPanel, r, panel);
  return nan == 0;
}

void packed_linear_panels(const PackedLinearArgs& a, int64_t begin, int64_t end) {
  alignas(64) float sums[kLinearRows * kLinearPanel];
  // As few tiles as cover the rows, of equal height: 32 rows are 11 + 11 + 10, not 12 + 12 + 8.
  const int64_t tiles = (a.rows + kTileRows - 1) / kTileRows, step = (a.rows + tiles - 1) / tiles;
  const int passes = static_cast<int>(tiles * (kLinearPanel / kTileColumns));
  for (int64_t p = begin; p < end; p++) {
    const float* panel = a.weight + p * a.in * kLinearPanel;
    for (int64_t k = 0; k < a.in; k += kLinearDepth) {
      const int64_t depth = std::min(kLinearDepth, a.in - k);
      const float *w = panel + k * kLinearPanel, *x = a.x + k * a.rows;
      Fetch next{reinterpret_cast<const char*>(w + depth * kLinearPanel), passes};  // what follows, also the next panel
      for (int64_t column = 0; column < kLinearPanel; column += kTileColumns)
        for (int64_t r = 0; r < a.rows; r += step)
          tile_of(std::min(step, a.rows - r), x + r * kLinearDepth, w + column, depth, k > 0,
                  sums + r * kLinearPanel + column, next);
    }
    packed_linear_finish(a, sums, p);
  }
}

}  // namespace lmvae::LMVAE_ISA

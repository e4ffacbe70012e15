// A few rows times a large weight in fp32. The weight is read once, a piece of a panel at a time; all rows are
// multiplied with the piece while it is in the first-level cache, and meanwhile the next piece is fetched, evenly over
// all tiles and from all of its 4 KB pages in turn (packed_linear_fetch.h).
#include "packed_linear.h"

#include <algorithm>

#include "packed_linear_fetch.h"
#include "simd_math.h"

namespace lmvae::LMVAE_ISA {
namespace {

constexpr int kTileRows = by_registers(12, 6);  // times two vectors of sums
constexpr int kSplitRows = by_registers(7, 5);  // whose sums are split
constexpr int kLanesF = Lanes<float>::count, kTileColumns = 2 * kLanesF;
using V = Vec<float>;

// sums[r][0 .. kTileColumns) (+)= sum_k x[r][k] w[k][...] for r < R, while the next piece is fetched.
// Few rows have registers left: their sums are split in C, which hides the latency of an addition and rounds less.
template <int R>
void tile(const float* x, const float* w, int64_t depth, bool add, float* sums, Fetch& next) {
  constexpr int C = R <= 2 ? 4 : R <= kSplitRows ? 2 : 1;
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

}  // namespace

void packed_linear_panels(const PackedLinearArgs& a, int64_t begin, int64_t end, int64_t following) {
  alignas(64) float sums[kLinearRows * kLinearPanel];
  // As few tiles as cover the rows, of equal height: 32 rows are 11 + 11 + 10, not 12 + 12 + 8.
  const int64_t tiles = (a.rows + kTileRows - 1) / kTileRows, step = (a.rows + tiles - 1) / tiles;
  const int passes = static_cast<int>(tiles * (kLinearPanel / kTileColumns));
  // Terms of a sum in a register: more of them round more. One or two rows have theirs split in four.
  const int64_t run = step > 2 ? kLinearDepth / 2 : kLinearDepth;
  for (int64_t p = begin; p < end; p++) {
    const float* panel = a.weight + p * a.in * kLinearPanel;
    for (int64_t k = 0; k < a.in; k += kLinearDepth) {
      const int64_t depth = std::min(kLinearDepth, a.in - k);
      const float *w = panel + k * kLinearPanel, *x = a.x + k * a.rows;
      const bool last = k + depth == a.in && p + 1 == end;
      Fetch next{
          reinterpret_cast<const char*>(last ? a.weight + following * a.in * kLinearPanel : w + depth * kLinearPanel),
          passes};
      for (int64_t column = 0; column < kLinearPanel; column += kTileColumns)
        for (int64_t r = 0; r < a.rows; r += step)
          for (int64_t t = 0; t < depth; t += run)
            tile_of(std::min(step, a.rows - r), x + r * kLinearDepth + t, w + t * kLinearPanel + column,
                    std::min(run, depth - t), k + t > 0, sums + r * kLinearPanel + column, next);
    }
    packed_linear_finish<float>(a, sums, p);
  }
}

}  // namespace lmvae::LMVAE_ISA

// A few rows times a large weight. The weight is read once, as one stream, a piece of a panel at a time; all rows are
// multiplied with the piece while it is in the first-level cache, and meanwhile the next piece is fetched.
#include "packed_linear.h"

#include <algorithm>

#include "simd_math.h"

namespace lmvae::LMVAE_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64, kTileRows = 12;  // 32 registers: 12 x 2 sums
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32, kTileRows = 6;
#else
constexpr int kVectorBytes = 16, kTileRows = 6;
#endif
constexpr int kLanesF = kVectorBytes / 4, kTileColumns = 2 * kLanesF;
typedef float V __attribute__((vector_size(kVectorBytes), aligned(4), may_alias));

LMVAE_INLINE V load(const float* p) { return *reinterpret_cast<const V*>(p); }
LMVAE_INLINE void store(float* p, V x) { *reinterpret_cast<V*>(p) = x; }

// sums[r][0 .. kTileColumns) (+)= sum_k x[r][k] w[k][...] for r < R; `lines` cache lines from `ahead` on are fetched a step.
// Few rows have registers left: their sums are split in C, which hides the latency of an addition and rounds less.
template <int R>
void tile(const float* x, int64_t x_row, const float* w, int64_t depth, bool add, float* sums, const char* ahead, int lines) {
  constexpr int C = R <= 2 ? 4 : R <= 5 ? 2 : 1;
  V acc[C][R][2] = {};
  const auto step = [&](int64_t k, V (&sum)[R][2]) __attribute__((always_inline)) {
    for (int l = 0; l < lines; l++) __builtin_prefetch(ahead + (k * lines + l) * 64, 0, 2);
    const V left = load(w + k * kLinearPanel), right = load(w + k * kLinearPanel + kLanesF);
#pragma GCC unroll 12
    for (int r = 0; r < R; r++) {
      const V value = x[r * x_row + k] - V{};
      sum[r][0] += value * left, sum[r][1] += value * right;
    }
  };
  int64_t k = 0;
  for (; k + C <= depth; k += C)
#pragma GCC unroll 4
    for (int c = 0; c < C; c++) step(k + c, acc[c]);
  for (; k < depth; k++) step(k, acc[0]);
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
void tile_of(int64_t rows, const float* x, int64_t x_row, const float* w, int64_t depth, bool add, float* sums,
             const char* ahead, int lines) {
  if (rows == R) return tile<R>(x, x_row, w, depth, add, sums, ahead, lines);
  if constexpr (R > 1) tile_of<R - 1>(rows, x, x_row, w, depth, add, sums, ahead, lines);
}

}  // namespace

void packed_linear_panels(const PackedLinearArgs& a, int64_t begin, int64_t end) {
  alignas(64) float sums[kLinearRows * kLinearPanel];
  // As few tiles as cover the rows, of equal height: 32 rows are 11 + 11 + 10, not 12 + 12 + 8.
  const int64_t tiles = (a.rows + kTileRows - 1) / kTileRows, step = (a.rows + tiles - 1) / tiles;
  for (int64_t p = begin; p < end; p++) {
    const float* panel = a.weight + p * a.in * kLinearPanel;
    for (int64_t k = 0; k < a.in; k += kLinearDepth) {
      const int64_t depth = std::min(kLinearDepth, a.in - k);
      const float *w = panel + k * kLinearPanel, *x = a.x + k * a.rows;
      // The next piece follows in memory, also at the end of a panel; 2 lines are one step of it.
      const char* ahead = reinterpret_cast<const char*>(w + depth * kLinearPanel);
      for (int64_t column = 0; column < kLinearPanel; column += kTileColumns)
        for (int64_t r = 0; r < a.rows; r += step) {
          const int64_t number = r / step;
          const int lines = column > 0 ? 0 : tiles == 1 ? 2 : number < 2 ? 1 : 0;
          tile_of(std::min(step, a.rows - r), x + r * depth, depth, w + column, depth, k > 0,
                  sums + r * kLinearPanel + column, ahead + number * depth * 64, lines);
        }
    }
    const int64_t first = p * kLinearPanel, width = std::min(kLinearPanel, a.out - first);
    for (int64_t r = 0; r < a.rows; r++) {
      const float* from = sums + r * kLinearPanel;
      float* to = a.y + r * a.out + first;
#pragma omp simd
      for (int64_t c = 0; c < width; c++) to[c] = a.bias == nullptr ? from[c] : from[c] + a.bias[first + c];
    }
  }
}

}  // namespace lmvae::LMVAE_ISA

// packed_linear with bf16 weights where the CPU has no dot products for them: half the bytes of fp32, widened on the
// way, and fp32 arithmetic.
#include "packed_linear.h"

#include <algorithm>

#include "packed_linear_fetch.h"
#include "simd_math.h"

namespace lmvae::LMVAE_ISA {
namespace {

constexpr int kTileRows = by_registers(12, 4);  // times two vectors of sums
constexpr int kLanesF = Lanes<float>::count, kTileColumns = 2 * kLanesF;
using V = Vec<float>;
using U = Vec<uint32_t>;

// Where the vector of columns v begins within a step.
constexpr int64_t place(int64_t v) { return v * kLanesF / 16 * kHalfBlock + v * kLanesF % 16 * 2; }

// sums[r][0 .. kTileColumns) (+)= sum_k x[r][k] w[k][...] for r < R, while the next piece is fetched. The second vector
// of columns lies `second` behind the first.
template <int R>
void tile(const float* x, const uint16_t* w, int64_t second, int64_t steps, bool add, float* sums, Fetch& next) {
  constexpr int C = R <= 2 ? 2 : 1;
  V acc[C][R][2] = {};
  Fetch fetch = next;
  for (int64_t s = 0; s < steps; s++, w += kStepNumbers, x += kHalfStep) {
#pragma GCC unroll 1
    for (int quarter = 0; quarter < 4; quarter++) {
      fetch();
#pragma GCC unroll 4
      for (int c = 0; c < 4; c++) {
        const int64_t k = 4 * quarter + c;
        const U left = *reinterpret_cast<const U*>(w + 32 * k),
                right = *reinterpret_cast<const U*>(w + 32 * k + second);
        const V l0 = (V)(left << 16), l1 = (V)(left & 0xffff0000u), r0 = (V)(right << 16),
                r1 = (V)(right & 0xffff0000u);
#pragma GCC unroll 12
        for (int r = 0; r < R; r++) {
          const float* pair = x + r * kHalfDepth + 2 * k;
          const V even = splat(pair[0]), odd = splat(pair[1]);
          acc[c % C][r][0] += even * l0;
          acc[c % C][r][1] += even * r0;
          acc[c % C][r][0] += odd * l1;
          acc[c % C][r][1] += odd * r1;
        }
      }
    }
  }
  next = fetch;
#pragma GCC unroll 12
  for (int r = 0; r < R; r++)
#pragma GCC unroll 2
    for (int v = 0; v < 2; v++) {
      V sum = acc[0][r][v];
      if constexpr (C == 2) sum += acc[1][r][v];
      float* at = sums + r * kLinearPanel + v * kLanesF;
      store(at, add ? load(at) + sum : sum);
    }
}

template <int R = kTileRows>
void tile_of(int64_t rows, const float* x, const uint16_t* w, int64_t second, int64_t steps, bool add, float* sums,
             Fetch& next) {
  if (rows == R) return tile<R>(x, w, second, steps, add, sums, next);
  if constexpr (R > 1) tile_of<R - 1>(rows, x, w, second, steps, add, sums, next);
}

}  // namespace

void half_linear_widen(const c10::BFloat16* from, int64_t n, float* to) { load_unit(from, to, n); }

void half_linear_panels(const HalfLinearArgs& a, int64_t begin, int64_t end, int64_t following) {
  alignas(64) float sums[kLinearRows * kLinearPanel];
  const int64_t tiles = (a.rows + kTileRows - 1) / kTileRows, height = (a.rows + tiles - 1) / tiles;
  const int passes = static_cast<int>(tiles * (kLinearPanel / kTileColumns));
  constexpr int64_t kSteps = kHalfDepth / kHalfStep;
  for (int64_t p = begin; p < end; p++) {
    const uint16_t* panel = a.weight + p * a.steps * kStepNumbers;
    for (int64_t s = 0; s < a.steps; s += kSteps) {
      const int64_t steps = std::min(kSteps, a.steps - s);
      const uint16_t* w = panel + s * kStepNumbers;
      const float* x = static_cast<const float*>(a.x) + s / kSteps * a.rows * kHalfDepth;
      const bool last = s + steps == a.steps && p + 1 == end;
      Fetch next{reinterpret_cast<const char*>(last ? a.weight + following * a.steps * kStepNumbers
                                                    : w + steps * kStepNumbers),
                 passes};
      for (int64_t v = 0; v < kLinearPanel / kLanesF; v += 2)
        for (int64_t r = 0; r < a.rows; r += height)
          tile_of(std::min(height, a.rows - r), x + r * kHalfDepth, w + place(v), place(v + 1) - place(v), steps, s > 0,
                  sums + r * kLinearPanel + v * kLanesF, next);
    }
    packed_linear_finish<c10::BFloat16>(a, sums, p);
  }
}

}  // namespace lmvae::LMVAE_ISA

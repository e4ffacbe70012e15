// The argmax over a vocabulary: products with the bf16 panels where neither matrix units nor dot products of bf16 make
// them, and exact fp32 logits.
#include "greedy_head.h"

#include <algorithm>

#include "simd_math.h"

namespace lmvae::LMVAE_ISA {
namespace {

constexpr int kLanesF = Lanes<float>::count;
constexpr int64_t kHalf = 16 * 16 * 2;  // numbers of 16 entries in one step
using V = Vec<float>;
using U = Vec<uint32_t>;

LMVAE_INLINE float sum(V x) {
  float total = 0.0f;
  for (int i = 0; i < kLanesF; i++) total += x[i];
  return total;
}

// out[r] = max(out[r], largest of the 2 kLanesF entries at `w`), for R rows of x. The second vector lies `second`
// behind.
template <int R>
void tile(const float* x, int64_t in, const uint16_t* w, int64_t second, int64_t steps, float* out) {
  V acc[R][2] = {};
  for (int64_t s = 0; s < steps; s++, w += 2 * kHalf) {
    const int64_t pairs = std::min<int64_t>(kHeadDepth, in - s * kHeadDepth) / 2;
    const float* at = x + s * kHeadDepth;
    for (int64_t k = 0; k < pairs; k++) {
      const U left = *reinterpret_cast<const U*>(w + k * 32), right = *reinterpret_cast<const U*>(w + k * 32 + second);
      const V l0 = (V)(left << 16), l1 = (V)(left & 0xffff0000u), r0 = (V)(right << 16), r1 = (V)(right & 0xffff0000u);
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) {
        const float* pair = at + r * in + 2 * k;
        const V even = splat(pair[0]), odd = splat(pair[1]);
        acc[r][0] += even * l0;
        acc[r][1] += even * r0;
        acc[r][0] += odd * l1;
        acc[r][1] += odd * r1;
      }
    }
    if (in - s * kHeadDepth < kHeadDepth && in % 2) {  // the last input has no partner
      const U left = *reinterpret_cast<const U*>(w + pairs * 32);
      const U right = *reinterpret_cast<const U*>(w + pairs * 32 + second);
      for (int r = 0; r < R; r++) {
        const V even = splat(at[r * in + 2 * pairs]);
        acc[r][0] += even * (V)(left << 16);
        acc[r][1] += even * (V)(right << 16);
      }
    }
  }
  for (int r = 0; r < R; r++)
    for (int v = 0; v < 2; v++)
      for (int i = 0; i < kLanesF; i++) out[r] = acc[r][v][i] > out[r] ? acc[r][v][i] : out[r];
}

template <int R = 8>
void tile_of(int64_t rows, const float* x, int64_t in, const uint16_t* w, int64_t second, int64_t steps, float* out) {
  if (rows == R) return tile<R>(x, in, w, second, steps, out);
  if constexpr (R > 1) tile_of<R - 1>(rows, x, in, w, second, steps, out);
}

}  // namespace

void head_largest(const GreedyHeadArgs& a, int64_t begin, int64_t end, float* largest) {
  // where the vector v of a panel's 32 entries begins within a step
  const auto place = [](int64_t v) { return v * kLanesF / 16 * kHalf + v * kLanesF % 16 * 2; };
  for (int64_t p = begin; p < end; p++) {
    float* out = largest + p * a.rows;
    std::fill(out, out + a.rows, -std::numeric_limits<float>::infinity());
    const uint16_t* panel = a.halves + p * a.steps * 2 * kHalf;
    for (int64_t r = 0; r < a.rows; r += 8)
      for (int64_t v = 0; v < kHeadPanel / kLanesF; v += 2)
        tile_of(std::min<int64_t>(8, a.rows - r), a.x + r * a.in, a.in, panel + place(v), place(v + 1) - place(v),
                a.steps, out + r);
  }
}

void head_exact(const GreedyHeadArgs& a, int64_t p, const int32_t* rows, int64_t count, HeadBest* best) {
  const int64_t first = p * kHeadPanel, last = std::min(first + kHeadPanel, a.vocabulary);
  for (int64_t v = first; v < last; v++) {
    const float* w = a.weight + v * a.in;
    for (int64_t i = 0; i < count; i++) {
      const float* x = a.x + rows[i] * a.in;
      V acc[4] = {};
      int64_t k = 0;
      for (; k + 4 * kLanesF <= a.in; k += 4 * kLanesF)
#pragma GCC unroll 4
        for (int c = 0; c < 4; c++) acc[c] += load(x + k + c * kLanesF) * load(w + k + c * kLanesF);
      for (; k + kLanesF <= a.in; k += kLanesF) acc[0] += load(x + k) * load(w + k);
      float value = sum((acc[0] + acc[1]) + (acc[2] + acc[3]));
      for (; k < a.in; k++) value += x[k] * w[k];
      if (better(value, v, best[rows[i]])) best[rows[i]] = {value, v};
    }
  }
}

}  // namespace lmvae::LMVAE_ISA

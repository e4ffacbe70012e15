// packed_linear with bf16 weights by the dot products of AVX512-BF16: pairs of bf16 to fp32 sums, two products a lane.
// Compiled for that instruction set whatever the file's own is; have_bf16_dots() says whether this CPU runs it.
#include "packed_linear.h"

#include <algorithm>

#include "packed_linear_fetch.h"

#if defined(__x86_64__) && defined(__GNUC__)
#pragma GCC diagnostic ignored "-Wuninitialized"  // gcc 12: _mm512_undefined in its own header
#include <immintrin.h>
#define LMVAE_DOTS __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")))
#endif

namespace lmvae {

#ifdef LMVAE_DOTS
namespace {

constexpr int kTileRows = 12;  // times two vectors of sums
constexpr int kFewRows = 2;    // that take less time than their weights do to come
constexpr int64_t kPairs = kHalfStep / 2, kRowPairs = kHalfDepth / 2;

// sums[r][0 .. 32) (+)= sum_k x[r][k] w[k][...] for r < R over one piece, while the next piece is fetched.
// Few rows have registers left: their sums are split in C, which hides the latency of an addition and rounds less.
template <int R>
LMVAE_DOTS void tile(const int32_t* x, const uint16_t* w, int64_t steps, bool add, float* sums, Fetch& next) {
  constexpr int C = R <= 2 ? 4 : R <= 5 ? 2 : 1;
  __m512 acc[C][R][2];
#pragma GCC unroll 4
  for (int c = 0; c < C; c++)
#pragma GCC unroll 12
    for (int r = 0; r < R; r++) acc[c][r][0] = acc[c][r][1] = _mm512_setzero_ps();
  Fetch fetch = next;
  for (int64_t s = 0; s < steps; s++, w += kStepNumbers, x += kPairs) {
    if constexpr (R <= kFewRows) {
      // In the order of the addresses, which the processor's own prefetchers follow: here nothing else hides the
      // memory.
#pragma GCC unroll 2
      for (int v = 0; v < 2; v++)
#pragma GCC unroll 4
        for (int quarter = 0; quarter < 4; quarter++) {
          if (quarter % 2 == 0) fetch();
#pragma GCC unroll 4
          for (int c = 0; c < 4; c++) {
            const int k = 4 * quarter + c;
            const __m512bh column = (__m512bh)_mm512_loadu_si512(w + v * kHalfBlock + 32 * k);
#pragma GCC unroll 8
            for (int r = 0; r < R; r++) {
              const __m512bh pair = (__m512bh)_mm512_set1_epi32(x[r * kRowPairs + k]);
              acc[c % C][r][v] = _mm512_dpbf16_ps(acc[c % C][r][v], column, pair);
            }
          }
        }
      continue;
    }
#pragma GCC unroll 4
    for (int quarter = 0; quarter < 4; quarter++) {
      fetch();
#pragma GCC unroll 4
      for (int c = 0; c < 4; c++) {
        const int k = 4 * quarter + c;
        const __m512bh left = (__m512bh)_mm512_loadu_si512(w + 32 * k);
        const __m512bh right = (__m512bh)_mm512_loadu_si512(w + kHalfBlock + 32 * k);
#pragma GCC unroll 12
        for (int r = 0; r < R; r++) {
          const __m512bh pair = (__m512bh)_mm512_set1_epi32(x[r * kRowPairs + k]);
          acc[c % C][r][0] = _mm512_dpbf16_ps(acc[c % C][r][0], left, pair);
          acc[c % C][r][1] = _mm512_dpbf16_ps(acc[c % C][r][1], right, pair);
        }
      }
    }
  }
  next = fetch;
#pragma GCC unroll 12
  for (int r = 0; r < R; r++)
#pragma GCC unroll 2
    for (int v = 0; v < 2; v++) {
      __m512 sum = acc[0][r][v];
      if constexpr (C == 2) sum = _mm512_add_ps(sum, acc[1][r][v]);
      if constexpr (C == 4)
        sum = _mm512_add_ps(_mm512_add_ps(sum, acc[1][r][v]), _mm512_add_ps(acc[2][r][v], acc[3][r][v]));
      float* at = sums + r * kLinearPanel + 16 * v;
      _mm512_storeu_ps(at, add ? _mm512_add_ps(_mm512_loadu_ps(at), sum) : sum);
    }
}

template <int R = kTileRows>
void tile_of(int64_t rows, const int32_t* x, const uint16_t* w, int64_t steps, bool add, float* sums, Fetch& next) {
  if (rows == R) return tile<R>(x, w, steps, add, sums, next);
  if constexpr (R > 1) tile_of<R - 1>(rows, x, w, steps, add, sums, next);
}

}  // namespace

void half_linear_dot_panels(const HalfLinearArgs& a, int64_t begin, int64_t end, int64_t following,
                            const PanelSums& done) {
  alignas(64) float sums[kLinearRows * kLinearPanel];
  // As few tiles as cover the rows, of equal height: 32 rows are 11 + 11 + 10, not 12 + 12 + 8.
  const int64_t tiles = (a.rows + kTileRows - 1) / kTileRows, height = (a.rows + tiles - 1) / tiles;
  constexpr int64_t kSteps = kHalfDepth / kHalfStep;
  for (int64_t p = begin; p < end; p++) {
    const uint16_t* panel = a.weight + p * a.steps * kStepNumbers;
    for (int64_t s = 0; s < a.steps; s += kSteps) {
      const int64_t steps = std::min(kSteps, a.steps - s);
      const uint16_t* w = panel + s * kStepNumbers;
      const int32_t* x = static_cast<const int32_t*>(a.x) + s / kSteps * a.rows * kRowPairs;
      const bool last = s + steps == a.steps && p + 1 == end;
      Fetch next{reinterpret_cast<const char*>(last ? a.weight + following * a.steps * kStepNumbers
                                                    : w + steps * kStepNumbers),
                 static_cast<int>(tiles)};
      for (int64_t r = 0; r < a.rows; r += height)
        tile_of(std::min(height, a.rows - r), x + r * kRowPairs, w, steps, s > 0, sums + r * kLinearPanel, next);
    }
    done(p, sums);
  }
}
#else
void half_linear_dot_panels(const HalfLinearArgs&, int64_t, int64_t, int64_t, const PanelSums&) {}
#endif

}  // namespace lmvae

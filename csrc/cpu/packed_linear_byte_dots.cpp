// packed_linear with int8 weights by the dot products of AVX512-VNNI. Rows are whole numbers of 16 bits: high and low
// bytes are multiplied one after the other, so that what a row loses by its rounding is far below what bf16 had lost.
// Compiled for that instruction set whatever the file's own is; have_byte_dots() says whether this CPU runs it.
#include "packed_linear_int8.h"

#include <algorithm>

#include "packed_linear_fetch.h"

#if defined(__x86_64__) && defined(__GNUC__)
#pragma GCC diagnostic ignored "-Wuninitialized"  // gcc 12: _mm512_undefined in its own header
#include <immintrin.h>
#define LMVAE_DOTS __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")))
#endif

namespace lmvae {

#ifdef LMVAE_DOTS
namespace {

constexpr int kTileRows = 6;  // times two vectors of sums, of high and of low bytes
constexpr int kFewRows = 2;   // that take less time than their weights do to come
constexpr int64_t kQuads = kByteStep / 4, kRowQuads = kByteDepth / 4;

// sums[r][high, low][0 .. 32) (+)= sum_k x[r][k] w[k][...] for r < R over one piece, while the next piece is fetched.
// Few rows have registers left: their sums are split in C, which hides the latency of an addition.
template <int R>
LMVAE_DOTS void tile(const int32_t* x, const int8_t* w, int64_t steps, bool add, int32_t* sums, Fetch& next) {
  constexpr int C = R <= 2 ? 2 : 1;
  __m512i acc[C][R][4];
#pragma GCC unroll 2
  for (int c = 0; c < C; c++)
#pragma GCC unroll 6
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
      for (int v = 0; v < 4; v++) acc[c][r][v] = _mm512_setzero_si512();
  Fetch fetch = next;
  for (int64_t s = 0; s < steps; s++, w += kByteStepNumbers, x += kQuads) {
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
            const __m512i column = _mm512_loadu_si512(w + v * kByteBlock + 64 * k);
#pragma GCC unroll 4
            for (int r = 0; r < R; r++) {
              __m512i* sum = acc[c % C][r];
              sum[v] = _mm512_dpbusd_epi32(sum[v], _mm512_set1_epi32(x[2 * r * kRowQuads + k]), column);
              sum[2 + v] = _mm512_dpbusd_epi32(sum[2 + v], _mm512_set1_epi32(x[(2 * r + 1) * kRowQuads + k]), column);
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
        const __m512i left = _mm512_loadu_si512(w + 64 * k), right = _mm512_loadu_si512(w + kByteBlock + 64 * k);
#pragma GCC unroll 6
        for (int r = 0; r < R; r++) {
          const __m512i high = _mm512_set1_epi32(x[2 * r * kRowQuads + k]);
          const __m512i low = _mm512_set1_epi32(x[(2 * r + 1) * kRowQuads + k]);
          __m512i* sum = acc[c % C][r];
          sum[0] = _mm512_dpbusd_epi32(sum[0], high, left);
          sum[1] = _mm512_dpbusd_epi32(sum[1], high, right);
          sum[2] = _mm512_dpbusd_epi32(sum[2], low, left);
          sum[3] = _mm512_dpbusd_epi32(sum[3], low, right);
        }
      }
    }
  }
  next = fetch;
#pragma GCC unroll 6
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int v = 0; v < 4; v++) {
      __m512i sum = acc[0][r][v];
      if constexpr (C == 2) sum = _mm512_add_epi32(sum, acc[1][r][v]);
      int32_t* at = sums + r * kByteSums + 16 * v;
      _mm512_storeu_si512(at, add ? _mm512_add_epi32(_mm512_loadu_si512(at), sum) : sum);
    }
}

template <int R = kTileRows>
void tile_of(int64_t rows, const int32_t* x, const int8_t* w, int64_t steps, bool add, int32_t* sums, Fetch& next) {
  if (rows == R) return tile<R>(x, w, steps, add, sums, next);
  if constexpr (R > 1) tile_of<R - 1>(rows, x, w, steps, add, sums, next);
}

}  // namespace

void byte_linear_dot_panels(const ByteLinearArgs<c10::BFloat16>& a, int64_t begin, int64_t end, int64_t following,
                            const WholeSums& done) {
  alignas(64) int32_t whole[kLinearRows * kByteSums];
  const int64_t tiles = (a.rows + kTileRows - 1) / kTileRows, height = (a.rows + tiles - 1) / tiles;
  constexpr int64_t kSteps = kByteDepth / kByteStep;
  for (int64_t p = begin; p < end; p++) {
    const int8_t* panel = a.weight + p * a.steps * kByteStepNumbers;
    for (int64_t s = 0; s < a.steps; s += kSteps) {
      const int64_t steps = std::min(kSteps, a.steps - s);
      const int8_t* w = panel + s * kByteStepNumbers;
      const int32_t* x = static_cast<const int32_t*>(a.x) + 2 * (s / kSteps * a.rows * kRowQuads);
      const bool last = s + steps == a.steps && p + 1 == end;
      Fetch next{reinterpret_cast<const char*>(last ? a.weight + following * a.steps * kByteStepNumbers
                                                    : w + steps * kByteStepNumbers),
                 static_cast<int>(tiles)};
      for (int64_t r = 0; r < a.rows; r += height)
        tile_of(std::min(height, a.rows - r), x + 2 * r * kRowQuads, w, steps, s > 0, whole + r * kByteSums, next);
    }
    done(p, whole);
  }
}
#else
void byte_linear_dot_panels(const ByteLinearArgs<c10::BFloat16>&, int64_t, int64_t, int64_t, const WholeSums&) {}
#endif

}  // namespace lmvae

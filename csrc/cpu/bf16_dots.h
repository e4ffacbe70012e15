// A product of 32 x 32 by the dot products of AVX512-BF16, over operands laid out for the AMX tiles (amx.h): whoever
// packs for one packs for the other. have_bf16_dots() says whether this CPU runs it.
#pragma once

#include "amx.h"

#ifdef LMVAE_AMX  // the compiler that knows the tiles knows the dot products
#include <algorithm>

namespace lmvae {
namespace {

#define LMVAE_DOTS32 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")))

// c[r][0 .. 32) (+)= sum over `steps` steps of 32 depths of left[r] . right, for r < R. Rows of `left` are 64 bytes
// apart, steps of both kPair bytes.
template <int R>
LMVAE_DOTS32 void dots(const char* a, const char* b, int64_t steps, float* c, int64_t ldc, bool add) {
  __m512 acc[R][2];
#pragma GCC unroll 12
  for (int r = 0; r < R; r++)
#pragma GCC unroll 2
    for (int h = 0; h < 2; h++) acc[r][h] = add ? _mm512_loadu_ps(c + r * ldc + 16 * h) : _mm512_setzero_ps();
  for (int64_t s = 0; s < steps; s++, a += kPair, b += kPair) {
#pragma GCC unroll 4
    for (int k = 0; k < 16; k++) {
      const __m512bh low = (__m512bh)_mm512_loadu_si512(b + 64 * k);
      const __m512bh high = (__m512bh)_mm512_loadu_si512(b + kTile + 64 * k);
#pragma GCC unroll 12
      for (int r = 0; r < R; r++) {
        const __m512bh pair = (__m512bh)_mm512_set1_epi32(reinterpret_cast<const int32_t*>(a + 64 * r)[k]);
        acc[r][0] = _mm512_dpbf16_ps(acc[r][0], low, pair);
        acc[r][1] = _mm512_dpbf16_ps(acc[r][1], high, pair);
      }
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < R; r++)
#pragma GCC unroll 2
    for (int h = 0; h < 2; h++) _mm512_storeu_ps(c + r * ldc + 16 * h, acc[r][h]);
}

// As product32 of amx.h with one part. Eight steps at a time: 16 KB of each operand, which stay in the first-level
// cache for all three groups of rows.
LMVAE_DOTS32 __attribute__((noinline)) void dots32(const char* a, const char* b, int64_t steps, float* c, int64_t ldc,
                                                   bool add) {
  constexpr int64_t kSteps = 8;
  for (int64_t s = 0; s < steps; s += kSteps, add = true, a += kSteps * kPair, b += kSteps * kPair) {
    const int64_t count = std::min(kSteps, steps - s);
    dots<11>(a, b, count, c, ldc, add);
    dots<11>(a + 11 * 64, b, count, c + 11 * ldc, ldc, add);
    dots<10>(a + 22 * 64, b, count, c + 22 * ldc, ldc, add);
  }
}

}  // namespace
}  // namespace lmvae
#endif

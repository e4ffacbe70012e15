// Building blocks of the *_simd.cpp files: elementary functions that compilers vectorise, conversions of whole rows, and
// the Philox stream. Everything lives in the instruction set's own namespace and is header-light on purpose.
//
// The functions are branch-free scalar code meant to be inlined into `#pragma omp simd` loops. Accuracy (fp32, checked
// by tests against fp64): exp <= 1.5 ulp over the whole range incl. overflow to Inf and gradual underflow, NaN passes.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define LMVAE_INLINE static inline __attribute__((always_inline))

namespace lmvae::LMVAE_ISA {

LMVAE_INLINE float bits_to_float(uint32_t x) { float y; std::memcpy(&y, &x, 4); return y; }
LMVAE_INLINE uint32_t float_to_bits(float x) { uint32_t y; std::memcpy(&y, &x, 4); return y; }

// e^x. Range reduction by two constants, the minimax polynomial of Cephes' expf, scaling in two halves so that results
// below the smallest normal number and above the largest come out as torch's do.
LMVAE_INLINE float exp_(float x) {
  float c = x > 89.0f ? 89.0f : x;  // comparisons written so that NaN stays NaN
  c = c < -104.0f ? -104.0f : c;
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to the nearest integer, kept in the low bits
  const float shifted = c * 1.44269504088896341f + magic;
  const int32_t n = static_cast<int32_t>(float_to_bits(shifted)) - static_cast<int32_t>(float_to_bits(magic));
  const float nf = shifted - magic;
  float r = c - nf * 0.693359375f;
  r = r - nf * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const int32_t n1 = n >> 1, n2 = n - n1;
  return p * bits_to_float(static_cast<uint32_t>(n1 + 127) << 23) * bits_to_float(static_cast<uint32_t>(n2 + 127) << 23);
}
LMVAE_INLINE double exp_(double x) { return std::exp(x); }

// ln(x) for normal x in (0, 1] (Cephes' logf); relative accuracy holds up to x = 1 - 2^-24.
LMVAE_INLINE float log_unit(float x) {
  const uint32_t bits = float_to_bits(x);
  float e = static_cast<float>(static_cast<int32_t>(bits >> 23) - 126);
  float m = bits_to_float((bits & 0x007fffffu) | 0x3f000000u);  // [0.5, 1)
  const bool low = m < 0.707106781186547524f;
  e = low ? e - 1.0f : e;
  m = low ? m + m - 1.0f : m - 1.0f;
  const float z = m * m;
  float y = 7.0376836292e-2f;
  y = y * m - 1.1514610310e-1f;
  y = y * m + 1.1676998740e-1f;
  y = y * m - 1.2420140846e-1f;
  y = y * m + 1.4249322787e-1f;
  y = y * m - 1.6668057665e-1f;
  y = y * m + 2.0000714765e-1f;
  y = y * m - 2.4999993993e-1f;
  y = y * m + 3.3333331174e-1f;
  y = y * m * z;
  y = y + e * -2.12194440e-4f;
  y = y - 0.5f * z;
  return (m + y) + e * 0.693359375f;
}

// ---- rows in and out -------------------------------------------------------------------------------------------------

template <typename T> struct acc { using type = float; };
template <> struct acc<double> { using type = double; };
template <typename T> using acc_t = typename acc<T>::type;

LMVAE_INLINE void load_unit(const float* x, float* y, int64_t n) { std::memcpy(y, x, n * sizeof(float)); }
LMVAE_INLINE void load_unit(const double* x, double* y, int64_t n) { std::memcpy(y, x, n * sizeof(double)); }
LMVAE_INLINE void load_unit(const c10::BFloat16* x, float* y, int64_t n) {
  const auto* bits = reinterpret_cast<const uint16_t*>(x);
#pragma omp simd
  for (int64_t i = 0; i < n; i++) y[i] = bits_to_float(static_cast<uint32_t>(bits[i]) << 16);
}
LMVAE_INLINE void load_unit(const c10::Half* x, float* y, int64_t n) {
  int64_t i = 0;
#if defined(__AVX2__)
  for (; i + 8 <= n; i += 8)
    _mm256_storeu_ps(y + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x + i))));
#endif
  for (; i < n; i++) y[i] = static_cast<float>(x[i]);
}

// n elements with a stride (in elements, any sign, 0 for expanded) into a dense row of the accumulation type.
template <typename T>
LMVAE_INLINE void load_row(const T* x, int64_t stride, acc_t<T>* y, int64_t n) {
  if (stride == 1) return load_unit(x, y, n);
  for (int64_t i = 0; i < n; i++) y[i] = static_cast<acc_t<T>>(x[i * stride]);
}

LMVAE_INLINE void store_row(const float* x, float* y, int64_t n) { std::memcpy(y, x, n * sizeof(float)); }
LMVAE_INLINE void store_row(const double* x, double* y, int64_t n) { std::memcpy(y, x, n * sizeof(double)); }
LMVAE_INLINE void store_row(const float* x, c10::BFloat16* y, int64_t n) {
  auto* bits = reinterpret_cast<uint16_t*>(y);
#pragma omp simd
  for (int64_t i = 0; i < n; i++) {  // round to nearest even; NaN becomes the quiet NaN 0x7fc0, as in torch
    const uint32_t b = float_to_bits(x[i]);
    const uint32_t rounded = (b + 0x7fffu + ((b >> 16) & 1u)) >> 16;
    bits[i] = static_cast<uint16_t>((b & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
  }
}
LMVAE_INLINE void store_row(const float* x, c10::Half* y, int64_t n) {
  int64_t i = 0;
#if defined(__AVX2__)
  for (; i + 8 <= n; i += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(y + i), _mm256_cvtps_ph(_mm256_loadu_ps(x + i), _MM_FROUND_TO_NEAREST_INT));
#endif
  for (; i < n; i++) y[i] = static_cast<c10::Half>(x[i]);
}

// ---- the random stream (kernels/philox.py is its definition) ---------------------------------------------------------

constexpr int kLanes = 16;  // Philox blocks computed side by side

struct Words { uint32_t x[4][kLanes]; };

// Words of blocks first .. first + 15 of the stream (seed, offset): Philox4x32-10, counter = (block, offset), key = seed.
LMVAE_INLINE Words philox_blocks(uint64_t seed, uint64_t offset, uint64_t first) {
  Words w;
  const uint32_t o0 = static_cast<uint32_t>(offset), o1 = static_cast<uint32_t>(offset >> 32);
#pragma omp simd
  for (int l = 0; l < kLanes; l++) {
    const uint64_t block = first + static_cast<uint64_t>(l);
    uint32_t c0 = static_cast<uint32_t>(block), c1 = static_cast<uint32_t>(block >> 32), c2 = o0, c3 = o1;
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
#pragma GCC unroll 10
    for (int round = 0; round < 10; round++) {
      const uint64_t a = static_cast<uint64_t>(c0) * 0xD2511F53u, b = static_cast<uint64_t>(c2) * 0xCD9E8D57u;
      c0 = static_cast<uint32_t>(b >> 32) ^ c1 ^ k0;
      c2 = static_cast<uint32_t>(a >> 32) ^ c3 ^ k1;
      c1 = static_cast<uint32_t>(b);
      c3 = static_cast<uint32_t>(a);
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    w.x[0][l] = c0;
    w.x[1][l] = c1;
    w.x[2][l] = c2;
    w.x[3][l] = c3;
  }
  return w;
}

// Two standard normals from two words. u1 = ((a >> 8) + 1) / 2^24 in (0, 1], u2 = (b >> 8) / 2^24; the quarter turn
// nearest to u2 is taken off in integers, so sine and cosine see an angle in [-pi/4, pi/4] without rounding.
LMVAE_INLINE void box_muller(uint32_t a, uint32_t b, float* n0, float* n1) {
  const float u1 = static_cast<float>(static_cast<int32_t>((a >> 8) + 1u)) * 0x1p-24f;
  const float radius = std::sqrt(-2.0f * log_unit(u1));
  const int32_t turn = static_cast<int32_t>(b >> 8);
  const int32_t quarter = (turn + (1 << 21)) >> 22;
  const float t = static_cast<float>(turn - (quarter << 22)) * 3.7450702e-7f;  // 2 pi / 2^24
  const float z = t * t;
  float s = -1.9515295891e-4f;
  s = s * z + 8.3321608736e-3f;
  s = s * z - 1.6666654611e-1f;
  s = s * z * t + t;
  float c = 2.443315711809948e-5f;
  c = c * z - 1.388731625493765e-3f;
  c = c * z + 4.166664568298827e-2f;
  c = c * z * z - 0.5f * z + 1.0f;
  const bool swap = quarter & 1;
  const float cosine = swap ? s : c, sine = swap ? c : s;
  const uint32_t flip_cos = static_cast<uint32_t>((quarter + 1) & 2) << 30, flip_sin = static_cast<uint32_t>(quarter & 2) << 30;
  *n0 = radius * bits_to_float(float_to_bits(cosine) ^ flip_cos);
  *n1 = radius * bits_to_float(float_to_bits(sine) ^ flip_sin);
}
LMVAE_INLINE void box_muller(uint32_t a, uint32_t b, double* n0, double* n1) {
  const double radius = std::sqrt(-2.0 * std::log(static_cast<double>((a >> 8) + 1u) * 0x1p-24));
  const double angle = static_cast<double>(b >> 8) * (6.283185307179586476925 * 0x1p-24);
  *n0 = radius * std::cos(angle);
  *n1 = radius * std::sin(angle);
}

// Normals of `blocks` blocks from `first` on: out[4 * i + k] is word k's normal of block first + i. Writes in whole
// groups of 16 blocks, so `out` must have room for 4 * round_up(blocks, 16) elements.
template <typename A>
LMVAE_INLINE void normal_fill(A* out, uint64_t seed, uint64_t offset, uint64_t first, int64_t blocks) {
  for (int64_t b = 0; b < blocks; b += kLanes) {
    const Words w = philox_blocks(seed, offset, first + static_cast<uint64_t>(b));
    A n[4][kLanes];
#pragma omp simd
    for (int l = 0; l < kLanes; l++) {
      box_muller(w.x[0][l], w.x[1][l], &n[0][l], &n[1][l]);
      box_muller(w.x[2][l], w.x[3][l], &n[2][l], &n[3][l]);
    }
    A* o = out + 4 * b;
    for (int l = 0; l < kLanes; l++)
      for (int k = 0; k < 4; k++) o[4 * l + k] = n[k][l];
  }
}

// Dropout factors of the same elements: `scale` where word >> 8 >= threshold (kept), 0 elsewhere. Room as above.
LMVAE_INLINE void keep_fill(float* out, uint32_t threshold, float scale, uint64_t seed, uint64_t offset, uint64_t first,
                            int64_t blocks) {
  for (int64_t b = 0; b < blocks; b += kLanes) {
    const Words w = philox_blocks(seed, offset, first + static_cast<uint64_t>(b));
    float* o = out + 4 * b;
    for (int l = 0; l < kLanes; l++)
      for (int k = 0; k < 4; k++) o[4 * l + k] = (w.x[k][l] >> 8) >= threshold ? scale : 0.0f;
  }
}

}  // namespace lmvae::LMVAE_ISA

// aggregate_logpdf: elementary functions that vectorise, in fp32 and in fp64. Compiled once per instruction set.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "simd_math.h"
#include "vector.h"

#if defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace lmvae::LMVAE_ISA {

template <typename A> constexpr A kInf = std::numeric_limits<A>::infinity();

LMVAE_INLINE float exp_lane(float x) { return exp_(x); }

// e^x to about an ulp: range reduction as in exp_, the series to the 13th power (its rest is below 2^-57 at ln 2 / 2).
LMVAE_INLINE double exp_lane(double x) {
  double c = x > 710.0 ? 710.0 : x;  // comparisons written so that NaN stays NaN
  c = c < -746.0 ? -746.0 : c;
  const double magic = 6755399441055744.0;  // 1.5 * 2^52: adding it rounds to the nearest integer, kept in the low bits
  const double n = (c * 1.4426950408889634074 + magic) - magic;
  double r = c - n * 6.93145751953125e-1;
  r = r - n * 1.42860682030941723212e-6;
  double p = 1.6059043836821614599e-10;
  p = p * r + 2.0876756987868098979e-9;
  p = p * r + 2.5052108385441718775e-8;
  p = p * r + 2.7557319223985890653e-7;
  p = p * r + 2.7557319223985890653e-6;
  p = p * r + 2.4801587301587301587e-5;
  p = p * r + 1.9841269841269841270e-4;
  p = p * r + 1.3888888888888888889e-3;
  p = p * r + 8.3333333333333333333e-3;
  p = p * r + 4.1666666666666666667e-2;
  p = p * r + 1.6666666666666666667e-1;
  p = p * r + 5.0e-1;
  p = p * (r * r) + r + 1.0;
  const double half = (n * 0.5 + magic) - magic;  // scaling in two halves: underflow is gradual
  uint64_t one, two, zero;
  const double first = half + magic, second = (n - half) + magic;
  std::memcpy(&one, &first, 8), std::memcpy(&two, &second, 8), std::memcpy(&zero, &magic, 8);
  one = (one - zero + 1023) << 52;
  two = (two - zero + 1023) << 52;
  double low, high;
  std::memcpy(&low, &one, 8), std::memcpy(&high, &two, 8);
  return p * low * high;
}

// a > b ? a : b and a < b ? a : b, so that NaN in b stays; and density_of, of registers.
#if defined(__AVX512F__)
LMVAE_INLINE Register<float> larger(Register<float> a, Register<float> b) { return _mm512_max_ps(a, b); }
LMVAE_INLINE Register<double> larger(Register<double> a, Register<double> b) { return _mm512_max_pd(a, b); }
LMVAE_INLINE Register<float> smaller(Register<float> a, Register<float> b) { return _mm512_min_ps(a, b); }
LMVAE_INLINE Register<float> density_of(Register<float> c, Register<float> a) { return _mm512_fnmadd_ps(a, a, c); }
LMVAE_INLINE Register<double> density_of(Register<double> c, Register<double> a) { return _mm512_fnmadd_pd(a, a, c); }
#else
LMVAE_INLINE Register<float> larger(Register<float> a, Register<float> b) { return a > b ? a : b; }
LMVAE_INLINE Register<double> larger(Register<double> a, Register<double> b) { return a > b ? a : b; }
LMVAE_INLINE Register<float> smaller(Register<float> a, Register<float> b) { return a < b ? a : b; }
#if defined(__FMA__)
LMVAE_INLINE Register<float> density_of(Register<float> c, Register<float> a) { return _mm256_fnmadd_ps(a, a, c); }
LMVAE_INLINE Register<double> density_of(Register<double> c, Register<double> a) { return _mm256_fnmadd_pd(a, a, c); }
#elif defined(__aarch64__)
LMVAE_INLINE Register<float> density_of(Register<float> c, Register<float> a) { return vfmsq_f32(c, a, a); }
LMVAE_INLINE Register<double> density_of(Register<double> c, Register<double> a) { return vfmsq_f64(c, a, a); }
#else
LMVAE_INLINE Register<float> density_of(Register<float> c, Register<float> a) { return c - a * a; }
LMVAE_INLINE Register<double> density_of(Register<double> c, Register<double> a) { return c - a * a; }
#endif
#endif

// exp_ and exp_lane of a register.
LMVAE_INLINE Register<float> exp_of(Register<float> x) {
  using V = Register<float>;
  using I = Register<int32_t>;
  const V c = larger(splat(-104.0f), smaller(splat(89.0f), x));
  const V shifted = c * 1.44269504088896341f + 12582912.0f;
  const V nf = shifted - 12582912.0f;
  V r = c - nf * 0.693359375f;
  r = r - nf * -2.12194440e-4f;
  V p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
#if defined(__AVX512F__)
  return _mm512_scalef_ps(p, nf);
#else
  const I n = (I)shifted - (I)splat(12582912.0f);
  const I half = n >> 1;
  return p * (V)((half + 127) << 23) * (V)((n - half + 127) << 23);
#endif
}
LMVAE_INLINE Register<double> exp_of(Register<double> x) {
  constexpr int lanes = Lanes<double>::count;
  alignas(64) double y[lanes];
  store(y, x);
#pragma omp simd
  for (int l = 0; l < lanes; l++) y[l] = exp_lane(y[l]);
  return load(y);
}

// ln x of a sum of exponentials: 0, or 1 and above, or NaN (Cephes' logf, as log_unit).
LMVAE_INLINE float log_lane(float x) {
  const int32_t bits = static_cast<int32_t>(float_to_bits(x));
  const float exponent = static_cast<float>((bits >> 23) - 126);
  const float half = bits_to_float((static_cast<uint32_t>(bits) & 0x007fffffu) | 0x3f000000u);  // [0.5, 1)
  const bool low = half < 0.707106781186547524f;
  const float e = low ? exponent - 1.0f : exponent;
  const float m = (low ? half + half : half) - 1.0f;
  const float z = m * m;
  float y = 7.0376836292e-2f * m - 1.1514610310e-1f;
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
  y = (m + y) + e * 0.693359375f;
  y = x == 0.0f ? -kInf<float> : y;
  return x < kInf<float> ? y : x;
}
LMVAE_INLINE double log_lane(double x) { return std::log(x); }

// k - u^2, fused wherever that is one instruction. Written out, because backward takes e^(density - lse) of densities
// that it makes again: were they rounded differently there, weights that ought to be 1 would not be.
LMVAE_INLINE float density_of(float k, float u) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  return __builtin_fmaf(-u, u, k);
#else
  return k - u * u;
#endif
}
LMVAE_INLINE double density_of(double k, double u) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  return __builtin_fma(-u, u, k);
#else
  return k - u * u;
#endif
}

}  // namespace lmvae::LMVAE_ISA

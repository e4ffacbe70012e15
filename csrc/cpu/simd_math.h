// Building blocks of the *_simd.cpp files: elementary functions that compilers vectorise, conversions of whole rows,
// and the Philox stream. Everything lives in the instruction set's own namespace and is header-light on purpose.
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

#include "vector.h"

namespace lmvae::LMVAE_ISA {

LMVAE_INLINE float bits_to_float(uint32_t x) {
  float y;
  std::memcpy(&y, &x, 4);
  return y;
}
LMVAE_INLINE uint32_t float_to_bits(float x) {
  uint32_t y;
  std::memcpy(&y, &x, 4);
  return y;
}

// x = n * ln 2 + r: r, n, and tail = e^r - 1 - r, so that neither e^r - 1 nor e^r - 1 - r has to cancel. Range
// reduction by two constants, the minimax polynomial of Cephes' expf. x is clamped where e^x is 0 or Inf anyway;
// comparisons are written so that NaN stays NaN.
struct Reduced {
  float r, tail;
  int32_t n;
};
LMVAE_INLINE Reduced reduce_exp(float x) {
  float c = x > 89.0f ? 89.0f : x;
  c = c < -104.0f ? -104.0f : c;
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to the nearest integer, kept in the low bits
  const float shifted = c * 1.44269504088896341f + magic;
  const int32_t n = static_cast<int32_t>(float_to_bits(shifted) - float_to_bits(magic));
  const float nf = shifted - magic;
  float r = c - nf * 0.693359375f;
  r = r - nf * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  return {r, p * (r * r), n};
}

// e^x. Scaling in two halves: results below the smallest normal number and above the largest come out as torch's do.
LMVAE_INLINE float exp_(float x) {
  const Reduced a = reduce_exp(x);
  const int32_t n1 = a.n >> 1, n2 = a.n - n1;
  return (a.tail + a.r + 1.0f) * bits_to_float(static_cast<uint32_t>(n1 + 127) << 23) *
         bits_to_float(static_cast<uint32_t>(n2 + 127) << 23);
}

// What a Gaussian divergence needs of x, for the price of one exponential: half = e^(x/2), minus1 = e^x - 1 and
// excess = e^x - 1 - x, the last two without cancellation near x = 0. e^x is the square of 1 + q as a sum of two
// floats, so that its error does not double.
LMVAE_INLINE void exp_parts(float x, float* half, float* minus1, float* excess) {
  const Reduced a = reduce_exp(0.5f * x);
  const int32_t n1 = a.n >> 1, n2 = a.n - n1;
  const float s1 = bits_to_float(static_cast<uint32_t>(n1 + 127) << 23);
  const float s2 = bits_to_float(static_cast<uint32_t>(n2 + 127) << 23);
  const float q = a.tail + a.r, high = q + 1.0f, low = q - (high - 1.0f);
  *half = high * s1 * s2;
  const float full = (high * high + 2.0f * high * low) * s1 * s2 * s1 * s2;
  const bool near = a.n == 0;  // then x = 2 r and e^x = (1 + q)^2
  *minus1 = near ? q * q + 2.0f * q : full - 1.0f;
  *excess = near ? q * q + 2.0f * a.tail : full - 1.0f - x;
}
LMVAE_INLINE void exp_parts(double x, double* half, double* minus1, double* excess) {
  *half = std::exp(0.5 * x);
  *minus1 = std::expm1(x);
  *excess = *minus1 - x;
}
LMVAE_INLINE double exp_(double x) { return std::exp(x); }

// Cephes' tanhf: a polynomial near 0, where 1 - 2 / (e^2x + 1) would cancel.
LMVAE_INLINE float tanh_(float x) {
  const float a = std::fabs(x), z = x * x;
  float p = -5.70498872745e-3f;
  p = p * z + 2.06390887954e-2f;
  p = p * z - 5.37397155531e-2f;
  p = p * z + 1.33314422036e-1f;
  p = p * z - 3.33332819422e-1f;
  const float near = p * z * x + x;
  const float far = std::copysign(1.0f - 2.0f / (exp_(a + a) + 1.0f), x);
  return a < 0.625f ? near : far;  // NaN: far, which is NaN
}
LMVAE_INLINE double tanh_(double x) { return std::tanh(x); }

// ---- rows in and out ------------------------------------------------------------------------------------------------

template <typename T> struct acc {
  using type = float;
};
template <> struct acc<double> {
  using type = double;
};
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
#if defined(__F16C__)
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
#if defined(__F16C__)
  for (; i + 8 <= n; i += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(y + i),
                     _mm256_cvtps_ph(_mm256_loadu_ps(x + i), _MM_FROUND_TO_NEAREST_INT));
#endif
  for (; i < n; i++) y[i] = static_cast<c10::Half>(x[i]);
}

// ---- the random stream (kernels/philox.py is its definition) --------------------------------------------------------

using VecF = Register<float>;
using VecI = Register<int32_t>;
using VecU = Register<uint32_t>;
using VecQ = Register<uint64_t>;  // kWidth / 2 lanes
constexpr int kWidth = Lanes<float>::count;

constexpr int kBlocks = kWidth / 2;  // Philox blocks computed side by side
constexpr int kLanes = 16;           // blocks that a fill may compute and write beyond its last one, at most

// ln(x) for normal x in (0, 1] (Cephes' logf); relative accuracy holds up to x = 1 - 2^-24.
LMVAE_INLINE VecF log_unit(VecF x) {
  const VecI bits = (VecI)x;
  VecF e = __builtin_convertvector((bits >> 23) - 126, VecF);
  VecF m = (VecF)((bits & 0x007fffff) | 0x3f000000);  // [0.5, 1)
  const VecI low = m < 0.707106781186547524f;         // -1 where true
  e = e + __builtin_convertvector(low, VecF);
  m = m - 1.0f + (VecF)((VecI)m & low);
  const VecF z = m * m;
  VecF y = 7.0376836292e-2f * m - 1.1514610310e-1f;
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

// Two standard normals from two words. u = ((a >> 8) + 1) / 2^24 in (0, 1], v = (b >> 8) / 2^24; the quarter turn
// nearest to v is taken off in integers, so sine and cosine see an angle in [-pi/4, pi/4] without rounding.
LMVAE_INLINE void box_muller(VecU a, VecU b, VecF* n0, VecF* n1) {
  const VecF u = __builtin_convertvector((VecI)((a >> 8) + 1u), VecF) * 0x1p-24f;
  const VecF radius = sqrt_(-2.0f * log_unit(u));
  const VecI turn = (VecI)(b >> 8);
  const VecI quarter = (turn + (1 << 21)) >> 22;
  const VecF t = __builtin_convertvector(turn - (quarter << 22), VecF) * 3.7450702e-7f;  // 2 pi / 2^24
  const VecF z = t * t;
  VecF s = -1.9515295891e-4f * z + 8.3321608736e-3f;
  s = s * z - 1.6666654611e-1f;
  s = s * z * t + t;
  VecF c = 2.443315711809948e-5f * z - 1.388731625493765e-3f;
  c = c * z + 4.166664568298827e-2f;
  c = c * z * z - 0.5f * z + 1.0f;
  const VecI swap = -(quarter & 1);
  const VecI cosine = ((VecI)c & ~swap) | ((VecI)s & swap), sine = ((VecI)s & ~swap) | ((VecI)c & swap);
  *n0 = radius * (VecF)(cosine ^ (((quarter + 1) & 2) << 30));
  *n1 = radius * (VecF)(sine ^ ((quarter & 2) << 30));
}

// The key schedule and offset of one stream, spread over a register once.
struct Stream {
  VecQ k0[10], k1[10], c2, c3;
  Stream(uint64_t seed, uint64_t offset) {
    const VecQ zero = {};
    uint32_t a = static_cast<uint32_t>(seed), b = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < 10; round++, a += 0x9E3779B9u, b += 0xBB67AE85u) {
      k0[round] = zero + a;
      k1[round] = zero + b;
    }
    c2 = zero + (offset & 0xffffffffu);
    c3 = zero + (offset >> 32);
  }
};

// Philox4x32-10 of blocks first .. first + kBlocks - 1. Lanes of `even`: [x0, x2] of each block in turn; `odd`: [x1,
// x3].
LMVAE_INLINE void philox(const Stream& s, uint64_t first, VecU* even, VecU* odd) {
  VecQ block;
  for (int l = 0; l < kBlocks; l++) block[l] = first + static_cast<uint64_t>(l);
  VecQ c0 = block, c1 = block >> 32, c2 = s.c2, c3 = s.c3;
  const VecQ zero = {}, m0 = zero + 0xD2511F53u, m1 = zero + 0xCD9E8D57u;
#pragma GCC unroll 10
  for (int round = 0; round < 10; round++) {
    const VecQ p0 = mul_low(c0, m0), p1 = mul_low(c2, m1);
    c0 = (p1 >> 32) ^ c1 ^ s.k0[round];
    c2 = (p0 >> 32) ^ c3 ^ s.k1[round];
    c1 = p1;
    c3 = p0;
  }
  *even = (VecU)((c0 & 0xffffffffu) | (c2 << 32));
  *odd = (VecU)((c1 & 0xffffffffu) | (c3 << 32));
}

// Normals of `blocks` blocks from `first` on: out[4 * i + k] is word k's normal of block first + i. Writes whole
// registers: `out` must have room for 4 * blocks + 4 * kLanes elements. Two chains at a time, since one alone waits on
// multipliers.
LMVAE_INLINE void normal_fill(float* out, uint64_t seed, uint64_t offset, uint64_t first, int64_t blocks) {
  const Stream stream(seed, offset);
  for (int64_t b = 0; b < blocks; b += 2 * kBlocks) {
    VecU even[2], odd[2];
    VecF n0, n1;
    philox(stream, first + static_cast<uint64_t>(b), &even[0], &odd[0]);
    philox(stream, first + static_cast<uint64_t>(b + kBlocks), &even[1], &odd[1]);
    box_muller(even[0], odd[0], &n0, &n1);
    store_zipped(n0, n1, out + 4 * b);
    box_muller(even[1], odd[1], &n0, &n1);
    store_zipped(n0, n1, out + 4 * (b + kBlocks));
  }
}

// The same uniforms at full precision; speed does not matter here.
LMVAE_INLINE void normal_fill(double* out, uint64_t seed, uint64_t offset, uint64_t first, int64_t blocks) {
  const Stream stream(seed, offset);
  for (int64_t b = 0; b < blocks; b += kBlocks) {
    VecU even, odd;
    philox(stream, first + static_cast<uint64_t>(b), &even, &odd);
    for (int l = 0; l < kWidth; l++) {
      const double radius = std::sqrt(-2.0 * std::log(static_cast<double>((even[l] >> 8) + 1u) * 0x1p-24));
      const double angle = static_cast<double>(odd[l] >> 8) * (6.283185307179586476925 * 0x1p-24);
      out[4 * b + 2 * l] = radius * std::cos(angle);
      out[4 * b + 2 * l + 1] = radius * std::sin(angle);
    }
  }
}

// The words themselves. Room as above.
LMVAE_INLINE void words_fill(uint32_t* out, uint64_t seed, uint64_t offset, uint64_t first, int64_t blocks) {
  const Stream stream(seed, offset);
  for (int64_t b = 0; b < blocks; b += kBlocks) {
    VecU even, odd;
    philox(stream, first + static_cast<uint64_t>(b), &even, &odd);
    store_zipped((VecF)even, (VecF)odd, reinterpret_cast<float*>(out + 4 * b));
  }
}

// Bit i of x at bit 2i.
LMVAE_INLINE uint64_t spread_bits(uint32_t x) {
  uint64_t y = x;
  y = (y | y << 16) & 0x0000ffff0000ffff;
  y = (y | y << 8) & 0x00ff00ff00ff00ff;
  y = (y | y << 4) & 0x0f0f0f0f0f0f0f0f;
  y = (y | y << 2) & 0x3333333333333333;
  return (y | y << 1) & 0x5555555555555555;
}

// Which of the same elements a dropout keeps, as bits: those with word >> 8 >= threshold. 16 blocks.
LMVAE_INLINE uint64_t keep_bits(const Stream& stream, uint32_t threshold, uint64_t first) {
  const int32_t least = static_cast<int32_t>(threshold);
  uint64_t bits = 0;
  for (int64_t b = 0; b < 16; b += kBlocks) {
    VecU even, odd;
    philox(stream, first + static_cast<uint64_t>(b), &even, &odd);
    const uint64_t kept =
        spread_bits(sign_bits((VecI)(even >> 8) >= least)) | spread_bits(sign_bits((VecI)(odd >> 8) >= least)) << 1;
    bits |= kept << (4 * b);
  }
  return bits;
}

}  // namespace lmvae::LMVAE_ISA

// The vectors of an instruction set: how wide they are and how many registers there are, the types that compilers put
// into registers (GCC's and Clang's vector extensions), and the operations on them that need an intrinsic. Files named
// *_simd.cpp are compiled once per instruction set; this is the one place that asks which it is.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#define LMVAE_INLINE static inline __attribute__((always_inline))

namespace lmvae::LMVAE_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64, kRegisters = 32;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32, kRegisters = 16;
#elif defined(__aarch64__)
constexpr int kVectorBytes = 16, kRegisters = 32;
#else
constexpr int kVectorBytes = 16, kRegisters = 16;
#endif

// How many of something a register tile has, by how many registers there are to hold its sums.
constexpr int by_registers(int with_32, int with_16) { return kRegisters == 32 ? with_32 : with_16; }

template <typename T>
struct Lanes {
  static constexpr int count = kVectorBytes / static_cast<int>(sizeof(T));
  typedef T Vec __attribute__((vector_size(kVectorBytes), aligned(sizeof(T)), may_alias));
  typedef T Register __attribute__((vector_size(kVectorBytes)));
};
// A vector where it lies, at any address of a T.
template <typename T>
using Vec = typename Lanes<T>::Vec;
// A vector that is computed on.
template <typename T>
using Register = typename Lanes<T>::Register;

template <typename T>
LMVAE_INLINE Vec<T> load(const T* p) {
  return *reinterpret_cast<const Vec<T>*>(p);
}
template <typename T>
LMVAE_INLINE void store(T* p, Vec<T> x) {
  *reinterpret_cast<Vec<T>*>(p) = x;
}
// Floats whose upper 16 bits lie side by side: bf16.
LMVAE_INLINE Vec<float> load_upper_halves(const void* x) {
  constexpr int L = Lanes<float>::count;
  typedef uint16_t Halves __attribute__((vector_size(2 * L), aligned(2), may_alias));
  typedef uint32_t Words __attribute__((vector_size(4 * L)));
  return (Vec<float>)(__builtin_convertvector(*static_cast<const Halves*>(x), Words) << 16);
}
template <typename T>
LMVAE_INLINE Vec<T> splat(T x) {
  return x - Vec<T>{};
}

// ---- transposition
// ---------------------------------------------------------------------------------------------------

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define LMVAE_SHUFFLE 1
#endif
#endif

// Exchanges bit S of the lane number with bit S of the register number: all of them in turn transpose a square block.
template <typename T, int S, typename V, int... I>
LMVAE_INLINE void exchange_bit(V& a, V& b, std::integer_sequence<int, I...>) {
#ifdef LMVAE_SHUFFLE
  constexpr int L = Lanes<T>::count;
  const V low = __builtin_shufflevector(a, b, ((I & S) ? L + (I ^ S) : I)...);
  b = __builtin_shufflevector(a, b, ((I & S) ? L + I : (I ^ S))...);
  a = low;
#else  // GCC before 12
  const V x = a, y = b;
  ((a[I] = (I & S) ? y[I ^ S] : x[I]), ...);
  ((b[I] = (I & S) ? y[I] : x[I ^ S]), ...);
#endif
}

// Rows to columns, of as many vectors as one has lanes.
template <typename T, int S = 1, typename V>
LMVAE_INLINE void transpose_block(V* r) {
  constexpr int L = Lanes<T>::count;
  if constexpr (S < L) {
#pragma GCC unroll 16
    for (int i = 0; i < L; i++)
      if (!(i & S)) exchange_bit<T, S>(r[i], r[i | S], std::make_integer_sequence<int, L>{});
    transpose_block<T, 2 * S>(r);
  }
}

// ---- what needs an intrinsic
// -----------------------------------------------------------------------------------------

// Products of the low halves of 64-bit lanes.
LMVAE_INLINE Register<uint64_t> mul_low(Register<uint64_t> a, Register<uint64_t> b) {
#if defined(__AVX512F__)
  return (Register<uint64_t>)_mm512_mul_epu32((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (Register<uint64_t>)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
  return (Register<uint64_t>)_mm_mul_epu32((__m128i)a, (__m128i)b);
#else
  return (a & 0xffffffffu) * (b & 0xffffffffu);
#endif
}

// [a0, b0, a1, b1, ...] of two registers.
LMVAE_INLINE void store_zipped(Register<float> a, Register<float> b, float* out) {
#if defined(__AVX512F__)
  const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i high = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  _mm512_storeu_ps(out, _mm512_permutex2var_ps((__m512)a, low, (__m512)b));
  _mm512_storeu_ps(out + 16, _mm512_permutex2var_ps((__m512)a, high, (__m512)b));
#elif defined(__AVX2__)
  const __m256 low = _mm256_unpacklo_ps((__m256)a, (__m256)b), high = _mm256_unpackhi_ps((__m256)a, (__m256)b);
  _mm256_storeu_ps(out, _mm256_permute2f128_ps(low, high, 0x20));
  _mm256_storeu_ps(out + 8, _mm256_permute2f128_ps(low, high, 0x31));
#else
  for (int l = 0; l < Lanes<float>::count; l++) {
    out[2 * l] = a[l];
    out[2 * l + 1] = b[l];
  }
#endif
}

// Bit l: whether lane l is negative.
LMVAE_INLINE uint32_t sign_bits(Register<int32_t> x) {
#if defined(__AVX512DQ__)
  return _mm512_movepi32_mask((__m512i)x);
#elif defined(__AVX2__)
  return static_cast<uint32_t>(_mm256_movemask_ps((__m256)x));
#else
  uint32_t bits = 0;
  for (int l = 0; l < Lanes<int32_t>::count; l++) bits |= static_cast<uint32_t>(x[l] < 0) << l;
  return bits;
#endif
}

LMVAE_INLINE Register<float> sqrt_(Register<float> x) {
#if defined(__AVX512F__)
  return (Register<float>)_mm512_sqrt_ps((__m512)x);
#elif defined(__AVX2__)
  return (Register<float>)_mm256_sqrt_ps((__m256)x);
#else
  Register<float> y;
  for (int l = 0; l < Lanes<float>::count; l++) y[l] = std::sqrt(x[l]);
  return y;
#endif
}

// Asks for a cache line that will be read, or written, soon.
LMVAE_INLINE void prefetch_line(const char* line, bool write) {
#if defined(__AVX512F__)
  if (write) {
    asm volatile("prefetchw %0" : : "m"(*line));  // GCC emits it only where told that the CPU has it
    return;
  }
#endif
  __builtin_prefetch(line, 0, 2);
}

}  // namespace lmvae::LMVAE_ISA
